//! Authentication of clients, and the credentials of local workers and operators.
//!
//! 1. Faulty credentials are reported before a run directory is touched.
//! 2. Local workers get theirs through the environment, as names of files; no secret is ever on a
//!    command line.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ganglion_proto::credentials::{CredentialError, JOIN_TOKEN_FILE, JoinToken, TLS_DIR, TLS_NAME, TlsFiles};

use crate::api::grpc::guard::Guard;
use crate::api::grpc::tls::{Acceptor, Clients, other_name};
use crate::run_dir::access::Access;

/// Command-line options of authentication.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SecurityArguments {
    /// Folder with ca.crt, tls.crt and tls.key, as `coordinator certs init` makes it. All connections then
    /// use TLS, also between workers, and workers and operators must show a certificate of the same
    /// authority.
    #[arg(long, value_name = "DIR", env = "GANGLION_TLS_DIR")]
    pub tls_dir: Option<PathBuf>,
    /// File with a token that every worker must give to join. The variable GANGLION_JOIN_TOKEN may hold the
    /// token itself.
    #[arg(long, value_name = "FILE", env = "GANGLION_JOIN_TOKEN_FILE")]
    pub join_token_file: Option<PathBuf>,
}

/// Authentication settings of a coordinator.
pub(crate) struct Security {
    /// TLS of the gRPC listener; `None` without TLS.
    pub acceptor: Option<Arc<Acceptor>>,
    tls: Option<TlsFiles>,
    token_file: Option<PathBuf>,
    join: Option<JoinToken>,
}

impl Security {
    /// Reads the files named by the options.
    pub(crate) fn of(arguments: &SecurityArguments) -> Result<Security, CredentialError> {
        // Its name goes to local workers through the environment, and must mean the same file there.
        let absolute = |file: &Path| std::path::absolute(file).unwrap_or_else(|_| file.to_path_buf());
        let token_file = arguments.join_token_file.as_deref().map(absolute);
        let join = JoinToken::read(token_file.as_deref())?;
        let tls = arguments.tls_dir.as_deref().map(TlsFiles::new);
        let open = |files: &TlsFiles| Acceptor::open(files.clone(), Clients::Members);
        // Read now, so that a wrong file ends the start, and not the first handshake.
        let acceptor = tls.as_ref().map(open).transpose()?;
        Ok(Security { acceptor, tls, token_file, join })
    }

    /// Whether clients must authenticate.
    pub(crate) fn guards(&self) -> bool {
        self.tls.is_some() || self.join.is_some()
    }

    /// TLS of the dashboard's listener.
    pub(crate) fn browsers(&self) -> Result<Option<Arc<Acceptor>>, CredentialError> {
        self.tls.as_ref().map(|files| Acceptor::open(files.clone(), Clients::Browsers)).transpose()
    }

    /// Scheme of the addresses.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Access record for clients that may read this run directory.
    pub(crate) fn access(&self, address: SocketAddr, token: String) -> Result<Access, CredentialError> {
        let tls_name = self.tls.as_ref().map(|files| name(files, address.ip())).transpose()?.flatten();
        let tls_dir = self.tls.as_ref().map(|files| files.folder().to_path_buf());
        Ok(Access { address: format!("{}://{address}", self.scheme()), token, tls_dir, tls_name })
    }

    /// Environment variables of local workers.
    pub(crate) fn environment(&self, tls_name: Option<&str>) -> Vec<(&'static str, OsString)> {
        let folder = self.tls.as_ref().map(|files| (TLS_DIR, files.folder().into()));
        let name = tls_name.map(|name| (TLS_NAME, name.into()));
        let token = self.token_file.as_ref().map(|file| (JOIN_TOKEN_FILE, file.into()));
        folder.into_iter().chain(name).chain(token).collect()
    }

    /// Options that remote workers need besides the address.
    pub(crate) fn invitation(&self, tls_name: Option<&str>) -> String {
        let mut text = String::new();
        if self.tls.is_some() {
            text.push_str(" --tls-dir DIR");
        }
        if let Some(name) = tls_name {
            text.push_str(&format!(" --tls-name {name}"));
        }
        if self.join.is_some() {
            text.push_str(" --join-token-file FILE");
        }
        text
    }

    /// Creates the authentication layer; `operator` is the operators' token.
    pub(crate) fn guard(&self, operator: &str) -> Guard {
        Guard::new(operator, self.join.as_ref(), self.tls.is_some())
    }
}

/// Name by which clients on this machine verify the certificate.
fn name(files: &TlsFiles, address: IpAddr) -> Result<Option<String>, CredentialError> {
    Ok(other_name(&files.read()?, address))
}
