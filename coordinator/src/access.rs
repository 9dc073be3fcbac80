//! How a run's coordinator is reached: a file in its run directory that only its user can read.

use std::path::PathBuf;

use ganglion_proto::credentials::{TLS_DIR, TlsFiles};
use ganglion_proto::dial::Credentials;
use serde::{Deserialize, Serialize};

/// The file in the run directory.
pub const ACCESS_FILE: &str = "admin.json";

/// How a run's coordinator is reached by those who may read its directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Access {
    /// Where it listens.
    pub address: String,
    /// What changes to the run need.
    pub token: String,
    /// The folder of the coordinator's certificate, if it speaks TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// The name that its certificate is for, if that is not the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_name: Option<String>,
}

impl Access {
    /// What an operator shows when connecting: the coordinator's own certificate, unless the environment
    /// names another.
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
