//! Credentials of coordinators and workers: certificates and the join token.
//!
//! 1. Neither a key nor a token is ever printed.
//! 2. Files are read anew for each connection, so renewed files apply from the next connection on.
//! 3. A process that reads certificates also checks that its peers would accept its own, so that a
//!    mistake shows where it was made.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tonic::Request;
use tonic::metadata::AsciiMetadataValue;
use webpki::{EndEntityCert, KeyUsage};

use crate::clock;

/// File of the trusted certificate authorities.
pub const CA_FILE: &str = "ca.crt";
/// File of the process's own certificate, followed by the intermediate ones up to the authority.
pub const CERTIFICATE_FILE: &str = "tls.crt";
/// File of the own certificate's private key.
pub const KEY_FILE: &str = "tls.key";
/// Environment variable with the folder of these files.
pub const TLS_DIR: &str = "GANGLION_TLS_DIR";
/// Environment variable with the name in the coordinator's certificate, if it is not the one in its
/// address.
pub const TLS_NAME: &str = "GANGLION_TLS_NAME";
/// Environment variable with the join token itself.
pub const JOIN_TOKEN: &str = "GANGLION_JOIN_TOKEN";
/// Environment variable with the path of a file that holds the join token.
pub const JOIN_TOKEN_FILE: &str = "GANGLION_JOIN_TOKEN_FILE";
/// Shortest length of a join token in bytes. A shorter one could be guessed.
const SHORTEST_TOKEN: usize = 16;

/// Unusable credentials of the user: the file, the problem, and the fix.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CredentialError(String);

impl CredentialError {
    /// Creates the error for credentials that could be read but cannot be used.
    pub fn unusable(error: impl fmt::Display) -> CredentialError {
        CredentialError(format!("--tls-dir: these certificates cannot be used: {error}"))
    }
}

/// Folder with the TLS files of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles(PathBuf);

/// Certificate and key of a process, and the authorities that it trusts.
pub struct Identity {
    /// Certificate chain, the process's own certificate first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Private key of the first certificate.
    pub key: PrivateKeyDer<'static>,
    /// Authorities that may sign the certificates of peers.
    pub roots: Arc<RootCertStore>,
}

impl TlsFiles {
    /// Names the TLS files of a folder; reads nothing.
    pub fn new(folder: &Path) -> TlsFiles {
        // A process that this one starts may have another working directory.
        TlsFiles(std::path::absolute(folder).unwrap_or_else(|_| folder.to_path_buf()))
    }

    /// Path of the folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Returns the path of one of the files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Reads the files, and checks that they match each other and are valid now.
    pub fn read(&self) -> Result<Identity, CredentialError> {
        let unreadable = |name: &str, error: &dyn fmt::Display| {
            CredentialError(format!(
                "--tls-dir: {}: {error}; the folder needs {CA_FILE}, {CERTIFICATE_FILE} and {KEY_FILE} in PEM, such as \
                 `coordinator certs init` makes",
                self.path(name).display()
            ))
        };
        let certificates = |name: &str| {
            let text = std::fs::read(self.path(name)).map_err(|error| unreadable(name, &error))?;
            let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
            let found = found.map_err(|error| unreadable(name, &error))?;
            // The parser passes over what is not a certificate, so a key in place of one gives an empty
            // list.
            if found.is_empty() {
                return Err(unreadable(name, &"no certificate in it"));
            }
            Ok(found)
        };
        let mut roots = RootCertStore::empty();
        for authority in certificates(CA_FILE)? {
            roots.add(authority).map_err(|error| unreadable(CA_FILE, &error))?;
        }
        let chain = certificates(CERTIFICATE_FILE)?;
        let key = std::fs::read(self.path(KEY_FILE)).map_err(|error| unreadable(KEY_FILE, &error))?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| unreadable(KEY_FILE, &error))?;
        let identity = Identity { chain, key, roots: Arc::new(roots) };
        // On this side: a peer's refusal would name neither the file nor the reason.
        self.check(&identity)?;
        Ok(identity)
    }

    fn check(&self, identity: &Identity) -> Result<(), CredentialError> {
        let wrong = |why: String| {
            CredentialError(format!("--tls-dir: {}: {why}", self.path(CERTIFICATE_FILE).display()))
        };
        let provider = provider();
        // Compares the public key of the certificate with that of the private key.
        rustls::sign::CertifiedKey::from_der(identity.chain.clone(), identity.key.clone_key(), &provider)
            .map_err(|error| wrong(format!("it does not go with {KEY_FILE} beside it: {error}")))?;
        // Every process is a client of some peers and a server of others: workers are both to each
        // other.
        for (purpose, usage) in [("client", KeyUsage::client_auth()), ("server", KeyUsage::server_auth())] {
            identity.verify(usage, &provider).map_err(|error| wrong(explain(&error, purpose)))?;
        }
        Ok(())
    }
}

/// Returns the problem of the process's own certificate, with the fix.
fn explain(error: &webpki::Error, purpose: &str) -> String {
    match error {
        webpki::Error::CertExpired { .. } => {
            "it has expired, or this machine's clock is wrong; renew it".to_string()
        }
        webpki::Error::CertNotValidYet { .. } => {
            "it is not valid yet; wait, or set this machine's clock".to_string()
        }
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            format!("no authority in {CA_FILE} beside it has signed it; copy both from the same place")
        }
        webpki::Error::RequiredEkuNotFoundContext(_) => {
            format!(
                "it may not be used as a {purpose}'s; make it with the usages \"server auth\" and \"client auth\""
            )
        }
        other => format!("it cannot be used: {other}"),
    }
}

impl Identity {
    fn verify(&self, usage: KeyUsage, provider: &CryptoProvider) -> Result<(), webpki::Error> {
        let (own, between) = self.chain.split_first().ok_or(webpki::Error::BadDer)?;
        let own = EndEntityCert::try_from(own)?;
        let roots = &self.roots.roots;
        let algorithms = provider.signature_verification_algorithms.all;
        let now = UnixTime::since_unix_epoch(clock::unix_time());
        // Without revocation lists: the files are replaced instead (invariant 2).
        own.verify_for_usage(algorithms, roots, between, now, usage, None, None).map(drop)
    }

    /// DNS names that this certificate is valid for.
    pub fn names(&self) -> Vec<String> {
        let own = self.chain.first().map(EndEntityCert::try_from);
        let Some(Ok(own)) = own else { return Vec::new() };
        own.valid_dns_names().map(str::to_string).collect()
    }

    /// Whether this certificate is valid for a name or an address.
    pub fn is_for(&self, name: &rustls::pki_types::ServerName<'_>) -> bool {
        let own = self.chain.first().map(EndEntityCert::try_from);
        // For names and for addresses, as the peers do it.
        own.is_some_and(|own| own.is_ok_and(|own| own.verify_is_valid_for_subject_name(name).is_ok()))
    }

    /// Returns a name by which peers can verify this certificate.
    pub fn peer_name(&self) -> Result<String, CredentialError> {
        // A wildcard is not a name, but any name in its place is covered.
        let name = self.names().into_iter().next().map(|name| name.replacen('*', "any", 1));
        name.ok_or_else(|| CredentialError::unusable("the own one is for no DNS name; make it with one"))
    }

    /// Returns the client configuration of this process for a protocol.
    pub fn client(self, protocol: &[u8]) -> Result<ClientConfig, CredentialError> {
        let builder = ClientConfig::builder_with_provider(provider());
        // One version for all: this program has no older peers.
        let builder = builder.with_protocol_versions(&[&TLS13]).map_err(CredentialError::unusable)?;
        let builder = builder.with_root_certificates(self.roots);
        let config = builder.with_client_auth_cert(self.chain, self.key);
        let mut config = config.map_err(CredentialError::unusable)?;
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(config)
    }

    /// Returns the server configuration of this process for a protocol; clients must have a
    /// certificate.
    pub fn server(self, protocol: &[u8]) -> Result<ServerConfig, CredentialError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots, provider()).build();
        let verifier = verifier.map_err(CredentialError::unusable)?;
        let builder = ServerConfig::builder_with_provider(provider());
        let builder = builder.with_protocol_versions(&[&TLS13]).map_err(CredentialError::unusable)?;
        let builder = builder.with_client_cert_verifier(verifier);
        let mut config = builder.with_single_cert(self.chain, self.key).map_err(CredentialError::unusable)?;
        config.alpn_protocols = vec![protocol.to_vec()];
        // Clients never resume a connection, so tickets would be wasted.
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

/// Returns the cryptography provider: never the process's default, which only object stores set.
pub fn provider() -> Arc<CryptoProvider> {
    // As an argument everywhere: with two providers linked in, rustls would not choose one by itself.
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Secret by which a worker is allowed to join.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken(String);

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinToken(..)")
    }
}

impl JoinToken {
    /// Reads the token from a file, else from the environment; `None` if there is none.
    pub fn read(file: Option<&Path>) -> Result<Option<JoinToken>, CredentialError> {
        if let Some(file) = file {
            let place = format!("--join-token-file {}", file.display());
            let text = std::fs::read_to_string(file)
                .map_err(|error| CredentialError(format!("{place}: {error}; give the file that holds it")))?;
            // A file ends with a newline, which `parse` trims.
            return JoinToken::parse(&place, &text).map(Some);
        }
        match std::env::var(JOIN_TOKEN) {
            Ok(text) => JoinToken::parse(JOIN_TOKEN, &text).map(Some),
            Err(std::env::VarError::NotPresent) => Ok(None),
            // The value is not shown: it may be the token but for one byte.
            Err(std::env::VarError::NotUnicode(_)) => Err(unusable(JOIN_TOKEN)),
        }
    }

    fn parse(place: &str, text: &str) -> Result<JoinToken, CredentialError> {
        let token = text.trim();
        // It becomes the value of a header.
        if token.len() < SHORTEST_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(unusable(place));
        }
        Ok(JoinToken(token.to_string()))
    }

    /// Value of a request's `authorization` header.
    pub fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Adds the token to a request.
    pub fn authorise<T>(&self, request: &mut Request<T>) {
        // Parsing cannot fail: a token consists of printable ASCII.
        if let Ok(mut header) = self.header().parse::<AsciiMetadataValue>() {
            // So that neither logs nor the header compression of HTTP/2 keep it.
            header.set_sensitive(true);
            request.metadata_mut().insert("authorization", header);
        }
    }
}

fn unusable(place: &str) -> CredentialError {
    CredentialError(format!(
        "{place}: a join token has at least {SHORTEST_TOKEN} letters, digits and signs, without spaces; `coordinator certs \
         init` makes one"
    ))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, ExtendedKeyUsagePurpose as Purpose, IsCa, Issuer, KeyPair};
    use time::{Duration, OffsetDateTime};

    use super::*;

    const BOTH: [Purpose; 2] = [Purpose::ServerAuth, Purpose::ClientAuth];

    fn authority() -> (Issuer<'static, KeyPair>, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().pem();
        (Issuer::new(params, key), certificate)
    }

    /// Writes a certificate signed by an authority, with its key and the authority's certificate.
    fn write(
        folder: &Path,
        authority: &(Issuer<'static, KeyPair>, String),
        days: [i64; 2],
        purposes: &[Purpose],
    ) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_string()]).unwrap();
        let [from, to] = days.map(|days| OffsetDateTime::now_utc() + Duration::days(days));
        (params.not_before, params.not_after) = (from, to);
        params.extended_key_usages = purposes.to_vec();
        let certificate = params.signed_by(&key, &authority.0).unwrap().pem();
        for (file, text) in
            [(CA_FILE, &authority.1), (CERTIFICATE_FILE, &certificate), (KEY_FILE, &key.serialize_pem())]
        {
            std::fs::write(folder.join(file), text).unwrap();
        }
    }

    #[track_caller]
    fn assert_says(folder: &Path, words: &[&str]) {
        let error = TlsFiles::new(folder).read().err().expect("refused").to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{word} is not in: {error}"));
    }

    #[test]
    fn what_is_wrong_with_certificates_is_told_from_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let (ours, theirs) = (authority(), authority());
        write(folder, &ours, [-1, 1], &BOTH);
        assert_eq!(TlsFiles::new(folder).read().unwrap().names(), ["localhost"]);
        write(folder, &ours, [-2, -1], &BOTH);
        assert_says(folder, &["tls.crt", "has expired", "renew it"]);
        write(folder, &ours, [1, 2], &BOTH);
        assert_says(folder, &["tls.crt", "not valid yet"]);
        write(folder, &ours, [-1, 1], &[Purpose::ServerAuth]);
        assert_says(folder, &["may not be used as a client's", "\"client auth\""]);
        write(folder, &ours, [-1, 1], &[Purpose::ClientAuth]);
        assert_says(folder, &["may not be used as a server's", "\"server auth\""]);
        write(folder, &ours, [-1, 1], &BOTH);
        std::fs::write(folder.join(CA_FILE), &theirs.1).unwrap();
        assert_says(folder, &["no authority in ca.crt beside it has signed it"]);
        write(folder, &ours, [-1, 1], &BOTH);
        std::fs::write(folder.join(KEY_FILE), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert_says(folder, &["does not go with tls.key"]);
        for (file, text) in [(KEY_FILE, "no key"), (CERTIFICATE_FILE, ""), (CA_FILE, "nothing")] {
            write(folder, &ours, [-1, 1], &BOTH);
            std::fs::write(folder.join(file), text).unwrap();
            assert_says(folder, &[file, "in PEM"]);
            std::fs::remove_file(folder.join(file)).unwrap();
            assert_says(folder, &[file, "No such file"]);
        }
    }

    #[test]
    fn a_token_is_long_and_never_shown() {
        for wrong in ["", "short", "0123456789 abcdef", "0123456789abcd\u{e4}f"] {
            let error = JoinToken::parse("here", wrong).unwrap_err().to_string();
            assert!(error.contains("here: a join token has at least 16"), "{error}");
            assert!(wrong.is_empty() || !error.contains(wrong), "{error}");
        }
        let token = JoinToken::parse("here", " 0123456789abcdef\n").unwrap();
        assert_eq!(token.header(), "Bearer 0123456789abcdef");
        let mut request = Request::new(());
        token.authorise(&mut request);
        let shown = format!("{token:?} {request:?}");
        assert!(!shown.contains("0123456789"), "{shown}");
    }
}
