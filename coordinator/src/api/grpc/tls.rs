//! TLS of this process's listeners, with files that may be renewed while it runs.
//!
//! 1. A certificate that a client shows must be signed by an authority of ours; an invalid one ends
//!    the handshake.
//! 2. Renewed files serve later connections; unusable files change nothing.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ganglion_proto::credentials::{CredentialError, Identity, TlsFiles, provider};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ServerConfig, version::TLS13};
use tokio_rustls::server::TlsStream;

/// Minimum interval between two checks of the files, which happen when connections arrive.
// A renewed certificate is used seconds later, and a flood of handshakes reads no file.
const LOOK: Duration = Duration::from_secs(5);

/// Kind of clients of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Workers and operators: they speak HTTP/2 and may show a certificate.
    Members,
    /// Browsers: they are not asked for a certificate.
    Browsers,
}

/// TLS acceptor of a listener.
pub struct Acceptor {
    files: TlsFiles,
    clients: Clients,
    current: Mutex<Current>,
}

struct Current {
    acceptor: TlsAcceptor,
    looked: Instant,
    /// Reason why the renewed files are not used, if they cannot be.
    unusable: Option<String>,
}

impl Acceptor {
    /// Reads the files of a folder.
    pub fn open(files: TlsFiles, clients: Clients) -> Result<Arc<Acceptor>, CredentialError> {
        let acceptor = acceptor(files.read()?, clients)?;
        let current = Mutex::new(Current { acceptor, looked: Instant::now(), unusable: None });
        Ok(Arc::new(Acceptor { files, clients, current }))
    }

    /// Performs the handshake with a client. The caller limits the time.
    pub async fn accept<S>(&self, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // The lock is free again by here: a slow handshake holds up no other.
        self.renewed().accept(stream).await
    }

    fn renewed(&self) -> TlsAcceptor {
        // Held while the files are read, at most once in `LOOK`, so that one handshake alone reads them.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() < LOOK {
            return current.acceptor.clone();
        }
        // Before the files are read: unusable ones are not read again for each handshake.
        current.looked = Instant::now();
        let read = self.files.read().and_then(|identity| acceptor(identity, self.clients));
        let unusable = match read {
            Ok(acceptor) => {
                current.acceptor = acceptor;
                None
            }
            Err(error) => Some(error.to_string()),
        };
        // Half of a renewal is normal for a moment; each reason is told once.
        if let Some(why) = unusable.as_ref().filter(|why| current.unusable.as_ref() != Some(why)) {
            tracing::warn!("going on with the certificate read before: {why}");
        }
        current.unusable = unusable;
        current.acceptor.clone()
    }
}

fn acceptor(identity: Identity, clients: Clients) -> Result<TlsAcceptor, CredentialError> {
    // All clients are of this build, or browsers: none needs an older version.
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
    let builder = builder.map_err(CredentialError::unusable)?;
    let builder = match clients {
        Clients::Browsers => builder.with_no_client_auth(),
        Clients::Members => {
            let verifier = WebPkiClientVerifier::builder_with_provider(identity.roots, provider());
            // So a client without a certificate gets an answer that says what is missing; the guard lets
            // it do nothing (door.rs).
            let verifier = verifier.allow_unauthenticated().build().map_err(CredentialError::unusable)?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config =
        builder.with_single_cert(identity.chain, identity.key).map_err(CredentialError::unusable)?;
    // A client of the other listener fails here, in the handshake, and not with an unreadable answer.
    config.alpn_protocols = match clients {
        Clients::Members => vec![b"h2".to_vec()],
        Clients::Browsers => vec![b"http/1.1".to_vec()],
    };
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Name by which clients that connect to `address` must verify this certificate; `None` if it is
/// valid for the address itself.
pub fn other_name(identity: &Identity, address: IpAddr) -> Option<String> {
    if identity.is_for(&ServerName::from(address)) {
        return None;
    }
    identity.names().into_iter().find(|name| !name.starts_with('*'))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use clap::Parser;
    use tokio::io::AsyncReadExt;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::rustls::pki_types::CertificateDer;

    use super::*;
    use crate::commands::cli::{Cli, Command};

    fn make(folder: &Path) {
        let folder = folder.to_str().unwrap();
        let cli = Cli::parse_from(["coordinator", "certs", "init", "--dir", folder]);
        let Some(Command::Certs(command)) = cli.command else { panic!("it makes certificates") };
        command.run().unwrap();
    }

    /// Connects with the certificate of `client`; returns the one that the acceptor shows.
    async fn shown(acceptor: &Acceptor, client: &Path) -> io::Result<CertificateDer<'static>> {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let config = TlsFiles::new(client).read().unwrap().client(b"h2").unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let (accepted, connected) = tokio::join!(acceptor.accept(ours), connector.connect(name, theirs));
        drop(accepted?);
        let mut connected = connected?;
        let _ = connected.read(&mut [0]).await;
        Ok(connected.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn renewed_files_serve_the_connections_that_come_after() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        make(&path("old"));
        make(&path("new"));
        let used = path("used");
        fs::create_dir(&used).unwrap();
        let put =
            |from: &str, file: &str| fs::copy(path(from).join(file), used.join(file)).map(drop).unwrap();
        ["ca.crt", "tls.crt", "tls.key"].iter().for_each(|file| put("old/coordinator", file));
        let acceptor = Acceptor::open(TlsFiles::new(&used), Clients::Members).unwrap();
        let old = shown(&acceptor, &path("old/worker")).await.unwrap();
        assert!(shown(&acceptor, &path("new/worker")).await.is_err(), "another authority");
        // Half of a renewal: certificate and key do not match, so the old pair stays in use.
        put("new/coordinator", "tls.crt");
        tokio::time::advance(LOOK).await;
        assert_eq!(shown(&acceptor, &path("old/worker")).await.unwrap(), old);
        ["ca.crt", "tls.key"].iter().for_each(|file| put("new/coordinator", file));
        tokio::time::advance(LOOK).await;
        assert_ne!(shown(&acceptor, &path("new/worker")).await.unwrap(), old);
        assert!(shown(&acceptor, &path("old/worker")).await.is_err(), "its authority is not ours any more");
    }

    #[test]
    fn a_certificate_that_is_not_for_the_address_is_checked_by_a_name_that_it_is_for() {
        let folder = tempfile::tempdir().unwrap();
        make(&folder.path().join("certs"));
        let identity = TlsFiles::new(&folder.path().join("certs/coordinator")).read().unwrap();
        assert_eq!(other_name(&identity, IpAddr::from([127, 0, 0, 1])), None);
        assert_eq!(other_name(&identity, IpAddr::from([10, 9, 8, 7])), Some("localhost".to_string()));
    }
}
