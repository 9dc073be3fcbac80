//! Access record of a run's coordinator: a file in its run directory that only its user can read.

use std::path::PathBuf;

use ganglion_proto::credentials::{TLS_DIR, TlsFiles};
use ganglion_proto::dial::Credentials;
use serde::{Deserialize, Serialize};

/// Name of the file in the run directory.
pub const ACCESS_FILE: &str = "admin.json";

/// Address and credentials for clients that may read the run directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Access {
    /// Address of the listener.
    pub address: String,
    /// Token required for changes to the run.
    pub token: String,
    /// Folder of the coordinator's certificate; `None` without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// Name on its certificate, if that is not the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_name: Option<String>,
}

impl Access {
    /// Credentials for an operator's connection: the coordinator's own certificate, unless the
    /// environment names another.
    pub fn credentials(&self) -> Credentials {
        let own = self.tls_dir.as_ref();
        let folder = own.map(|own| std::env::var_os(TLS_DIR).map_or_else(|| own.clone(), PathBuf::from));
        Credentials {
            tls: folder.map(|folder| TlsFiles::new(&folder)),
            name: self.tls_name.clone(),
            ..Credentials::default()
        }
    }
}
