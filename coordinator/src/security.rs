//! Who may connect to this coordinator, and how its own workers and operators do.
//!
//! 1. Whatever is wrong with credentials is said before a run directory is touched.
//! 2. Local workers get them by their environment, as names of files; no secret is ever on a command line.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ganglion_proto::credentials::{CredentialError, JOIN_TOKEN_FILE, JoinToken, TLS_DIR, TLS_NAME, TlsFiles};

use crate::access::Access;
use crate::server::guard::Guard;
use crate::server::tls::{Acceptor, Clients, other_name};

/// What the user says about it.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SecurityArguments {
    /// Speak TLS only, with the ca.crt, tls.crt and tls.key of this folder: on --listen with workers and
    /// operators that show a certificate of that authority, and between workers. `coordinator certs init`
    /// makes such folders.
    #[arg(long, value_name = "DIR", env = "GANGLION_TLS_DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Let workers in only with the token of this file. GANGLION_JOIN_TOKEN may hold the token itself.
    #[arg(long, value_name = "FILE", env = "GANGLION_JOIN_TOKEN_FILE")]
    pub join_token_file: Option<PathBuf>,
}

/// Who may connect.
pub struct Security {
    /// Does the TLS of gRPC's socket.
    pub acceptor: Option<Arc<Acceptor>>,
    tls: Option<TlsFiles>,
    token_file: Option<PathBuf>,
    join: Option<JoinToken>,
}

impl Security {
    /// Reads the files that the user names.
    pub fn of(arguments: &SecurityArguments) -> Result<Security, CredentialError> {
        let absolute = |file: &Path| std::path::absolute(file).unwrap_or_else(|_| file.to_path_buf());
        let token_file = arguments.join_token_file.as_deref().map(absolute);
        let join = JoinToken::read(token_file.as_deref())?;
        let tls = arguments.tls_dir.as_deref().map(TlsFiles::new);
        let open = |files: &TlsFiles| Acceptor::open(files.clone(), Clients::Members);
        let acceptor = tls.as_ref().map(open).transpose()?;
        Ok(Security { acceptor, tls, token_file, join })
    }

    /// Whether clients must prove who they are.
    pub fn guards(&self) -> bool {
        self.tls.is_some() || self.join.is_some()
    }

    /// The files of TLS, for other sockets of this process.
    pub fn tls(&self) -> Option<&TlsFiles> {
        self.tls.as_ref()
    }

    /// Does the TLS of the dashboard's socket.
    pub fn browsers(&self) -> Result<Option<Arc<Acceptor>>, CredentialError> {
        self.tls.as_ref().map(|files| Acceptor::open(files.clone(), Clients::Browsers)).transpose()
    }

    /// How addresses begin.
    pub fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// How this coordinator is reached by those who may read its run directory.
    pub fn access(&self, address: SocketAddr, token: String) -> Result<Access, CredentialError> {
        let tls_name = self.tls.as_ref().map(|files| name(files, address.ip())).transpose()?.flatten();
        let tls_dir = self.tls.as_ref().map(|files| files.folder().to_path_buf());
        Ok(Access { address: format!("{}://{address}", self.scheme()), token, tls_dir, tls_name })
    }

    /// What local workers find in their environment.
    pub fn environment(&self, tls_name: Option<&str>) -> Vec<(&'static str, OsString)> {
        let folder = self.tls.as_ref().map(|files| (TLS_DIR, files.folder().into()));
        let name = tls_name.map(|name| (TLS_NAME, name.into()));
        let token = self.token_file.as_ref().map(|file| (JOIN_TOKEN_FILE, file.into()));
        folder.into_iter().chain(name).chain(token).collect()
    }

    /// What other workers need besides the address.
    pub fn invitation(&self, tls_name: Option<&str>) -> String {
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

    /// Decides over the calls of clients.
    pub fn guard(&self, operator: &str) -> Guard {
        Guard::new(operator, self.join.as_ref(), self.tls.is_some())
    }
}

/// The name by which this machine's own clients check the certificate.
fn name(files: &TlsFiles, address: IpAddr) -> Result<Option<String>, CredentialError> {
    Ok(other_name(&files.read()?, address))
}
