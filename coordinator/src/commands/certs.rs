//! Creation of certificates and a join token, for users without a certificate authority of their own.
//!
//! 1. Nothing is overwritten.
//! 2. Keys and the token are readable by this user alone, from the moment they exist.
//! 3. A worker's certificate names no machine: it cannot impersonate the coordinator.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ganglion_proto::credentials::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, TlsFiles};
use ganglion_storage::whole;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use tempfile::Builder;
use time::{Duration, OffsetDateTime};
use tokio_rustls::rustls::pki_types::ServerName;

use crate::error::Failure;
use crate::workers::new_token;

/// Validity of an authority, in days.
// Ten years: changing an authority means changing every machine's files.
const AUTHORITY_DAYS: u32 = 3650;
/// Tolerated difference between clocks.
// A certificate that is made here and used at once on a machine whose clock is behind must be valid
// there.
const CLOCKS: Duration = Duration::hours(1);
/// Names on the coordinator's certificate, besides those that the user gives.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// Name on workers' certificates: no client connects to it.
const WORKER: &str = "ganglion-worker";

/// Work with certificates.
#[derive(Debug, clap::Subcommand)]
pub enum CertsCommand {
    /// Makes a certificate authority, one certificate for the coordinator, one for workers, and a join token.
    Init(Init),
}

/// Options of `coordinator certs init`.
#[derive(Debug, clap::Args)]
pub struct Init {
    /// Folder to create for them; it must not exist.
    #[arg(long, value_name = "DIR", default_value = "certs")]
    pub dir: PathBuf,
    /// Name or address by which workers connect to the coordinator, besides this machine's name. Can be
    /// repeated.
    #[arg(long = "host", value_name = "NAME|IP")]
    pub hosts: Vec<String>,
    /// Number of days for which the two certificates are valid.
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub days: u32,
    /// Folder of a certificate authority to sign with, such as certs/ca of an earlier call. Default: a new
    /// one.
    #[arg(long, value_name = "DIR")]
    pub ca: Option<PathBuf>,
}

impl CertsCommand {
    /// Runs the command; returns the text to print.
    pub fn run(&self) -> Result<String, Failure> {
        let CertsCommand::Init(init) = self;
        init.run()
    }
}

/// A certificate authority that can sign.
struct Authority {
    certificate: String,
    key: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Init {
    fn run(&self) -> Result<String, Failure> {
        let input = |what: String| Failure::Input(format!("--dir {}: {what}", self.dir.display()));
        // First: files of an older authority beside new ones would fit to nothing (1).
        if self.dir.exists() {
            return Err(input(
                "this folder exists already; name a new one, or remove it if its certificates are not in use"
                    .to_string(),
            ));
        }
        if let Some(host) = self.hosts.iter().find(|host| !is_name(host)) {
            return Err(Failure::Input(format!(
                "--host {host}: no name of a machine; give names such as trainer.example.org, or addresses"
            )));
        }
        let authority = match &self.ca {
            None => Authority::new().map_err(failed)?,
            Some(folder) => Authority::read(folder)
                .map_err(|error| Failure::Input(format!("--ca {}: {error}", folder.display())))?,
        };
        let hosts = self.hosts();
        let coordinator = self.certificate(&authority, "ganglion-coordinator", hosts.clone())?;
        let worker = self.certificate(&authority, WORKER, vec![WORKER.to_string()])?;
        let own = (authority.certificate.clone(), authority.key.clone());
        let token = new_token().map_err(Failure::other)?;
        let parts = [("ca", own), ("coordinator", coordinator), ("worker", worker)];
        put(&self.dir, &authority.certificate, &parts, &token)
            .map_err(|error| Failure::unwritable(format_args!("--dir {}", self.dir.display()), &error))?;
        // Read back by the code that will use them: a folder that cannot work is reported here.
        for name in ["coordinator", "worker"] {
            TlsFiles::new(&self.dir.join(name)).read()?;
        }
        Ok(self.advice(&hosts))
    }

    /// All names and addresses on the coordinator's certificate.
    fn hosts(&self) -> Vec<String> {
        let machine = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        let local = LOCAL.map(str::to_string);
        let mut hosts: Vec<String> = self.hosts.iter().cloned().chain(local).chain(machine).collect();
        let mut seen = std::collections::BTreeSet::new();
        // A machine's own name may be one that no certificate can have.
        hosts.retain(|host| is_name(host) && seen.insert(host.clone()));
        hosts
    }

    fn certificate(
        &self,
        authority: &Authority,
        name: &str,
        hosts: Vec<String>,
    ) -> Result<(String, String), Failure> {
        let mut params = CertificateParams::new(hosts).map_err(failed)?;
        name_it(&mut params, name, self.days);
        // TLS 1.3 signs the handshake and needs no other use of the key.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Workers are servers to each other, and operators use the coordinator's as clients.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(failed)?;
        let signed = params.signed_by(&key, &authority.issuer).map_err(failed)?;
        Ok((signed.pem(), key.serialize_pem()))
    }

    fn advice(&self, hosts: &[String]) -> String {
        let dir = self.dir.display();
        format!(
            "made certificates for {days} days and a join token in {dir}:\n\
             \x20 {dir}/coordinator  stays on the coordinator's machine; for {hosts}\n\
             \x20 {dir}/worker       goes to each machine with workers, with {dir}/join-token\n\
             \x20 {dir}/ca           signs further ones (--ca {dir}/ca); keep its tls.key where no run can read it\n\
             then start with:\n\
             \x20 coordinator --listen HOST:7000 --tls-dir {dir}/coordinator --join-token-file {dir}/join-token\n\
             \x20 worker --coordinator https://HOST:7000 --tls-dir {dir}/worker --join-token-file {dir}/join-token",
            days = self.days,
            hosts = hosts.join(", "),
        )
    }
}

/// Error: a folder is not that of an authority.
#[derive(Debug, thiserror::Error)]
enum NoAuthority {
    #[error("{name}: {source}")]
    File { name: &'static str, source: io::Error },
    #[error("{KEY_FILE}: {0}")]
    Key(rcgen::Error),
}

impl Authority {
    fn new() -> Result<Authority, rcgen::Error> {
        let key = KeyPair::generate()?;
        let params = Authority::params(&key);
        let (certificate, text) = (params.self_signed(&key)?.pem(), key.serialize_pem());
        Ok(Authority { certificate, key: text, issuer: Issuer::new(params, key) })
    }

    /// Loads an authority that `new` made. Everything that its signatures need follows from its key.
    fn read(folder: &Path) -> Result<Authority, NoAuthority> {
        let text =
            |name| fs::read_to_string(folder.join(name)).map_err(|source| NoAuthority::File { name, source });
        let (certificate, key_text) = (text(CERTIFICATE_FILE)?, text(KEY_FILE)?);
        let key = KeyPair::from_pem(&key_text).map_err(NoAuthority::Key)?;
        // The name follows from the key, so an issuer that is made again signs as the same one.
        let issuer = Issuer::new(Authority::params(&key), key);
        Ok(Authority { certificate, key: key_text, issuer })
    }

    fn params(key: &KeyPair) -> CertificateParams {
        let mut params = CertificateParams::default();
        // Two authorities of the same name would be mistaken for each other.
        let number = blake3::hash(key.public_key_raw()).to_hex();
        name_it(&mut params, &format!("Ganglion {}", &number[..16]), AUTHORITY_DAYS);
        // No authority below this one: a key that signs machines must not make more of its kind.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }
}

/// Whether a certificate can name this host: a DNS name, perhaps with a wildcard, or an address.
fn is_name(host: &str) -> bool {
    ServerName::try_from(host.strip_prefix("*.").unwrap_or(host)).is_ok()
}

fn name_it(params: &mut CertificateParams, name: &str, days: u32) {
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - CLOCKS, now + Duration::days(days.into()));
}

#[allow(clippy::needless_pass_by_value)] // as map_err hands it over
fn failed(error: rcgen::Error) -> Failure {
    Failure::Other(format!("cannot make a certificate: {error}"))
}

/// Writes all files, and then gives their folder its name: it appears whole or not at all.
fn put(dir: &Path, authority: &str, parts: &[(&str, (String, String))], token: &str) -> io::Result<()> {
    let above = dir.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    whole::create_folders(above)?;
    let all = Permissions::from_mode(0o777);
    let draft = Builder::new().prefix(".certs.").suffix(".new").permissions(all).tempdir_in(above)?;
    for (name, (certificate, key)) in parts {
        write(&draft.path().join(name), authority, certificate, key)?;
    }
    write_new(&draft.path().join("join-token"), token, 0o600)?;
    // Refused if another process has made the folder meanwhile, and it is not empty (1).
    whole::rename(draft.path(), dir)?;
    // It has another name now.
    let _ = draft.keep();
    Ok(())
}

fn write(folder: &Path, authority: &str, certificate: &str, key: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    write_new(&folder.join(CA_FILE), authority, 0o644)?;
    write_new(&folder.join(CERTIFICATE_FILE), certificate, 0o644)?;
    write_new(&folder.join(KEY_FILE), key, 0o600)
}

fn write_new(file: &Path, text: &str, mode: u32) -> io::Result<()> {
    let end = if text.ends_with('\n') { "" } else { "\n" };
    // Fails if the file exists, and has its mode from the start (2).
    whole::create(file, format!("{text}{end}").as_bytes(), mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(dir: PathBuf, ca: Option<PathBuf>, hosts: &[&str]) -> Init {
        Init { dir, hosts: hosts.iter().map(|host| host.to_string()).collect(), days: 1, ca }
    }

    #[test]
    fn nothing_is_overwritten_and_secrets_are_this_users_alone() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("certs");
        let said = init(dir.clone(), None, &["trainer.example.org", "10.1.2.3"]).run().unwrap();
        for name in ["trainer.example.org, 10.1.2.3, localhost, 127.0.0.1", "https://HOST:7000"] {
            assert!(said.contains(name), "{said}");
        }
        for secret in ["ca/tls.key", "coordinator/tls.key", "worker/tls.key", "join-token"] {
            let mode = fs::metadata(dir.join(secret)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{secret}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no draft is left");
        let key = fs::read(dir.join("ca/tls.key")).unwrap();
        let again = init(dir.clone(), None, &[]).run().unwrap_err();
        assert!(again.exit_code() == 2 && again.to_string().contains("exists already"), "{again}");
        assert_eq!(fs::read(dir.join("ca/tls.key")).unwrap(), key);
        let wrong = init(folder.path().join("x"), None, &["no name"]).run().unwrap_err();
        assert!(wrong.exit_code() == 2 && wrong.to_string().contains("--host"), "{wrong}");
    }

    #[test]
    fn an_authority_signs_again() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        init(old.clone(), None, &[]).run().unwrap();
        init(new.clone(), Some(old.join("ca")), &[]).run().unwrap();
        let read = |file: PathBuf| fs::read(file).unwrap();
        assert_eq!(read(old.join("ca/ca.crt")), read(new.join("worker/ca.crt")));
        assert_ne!(read(old.join("worker/tls.crt")), read(new.join("worker/tls.crt")));
        // Holders of the old files trust the new certificate.
        fs::copy(old.join("ca/ca.crt"), new.join("worker/ca.crt")).unwrap();
        TlsFiles::new(&new.join("worker")).read().unwrap();
        let none = init(folder.path().join("x"), Some(folder.path().join("none")), &[]).run().unwrap_err();
        assert!(none.exit_code() == 2 && none.to_string().contains("--ca"), "{none}");
    }
}
