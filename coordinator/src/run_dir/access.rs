//! Access record of a run's coordinator: a file in its run directory that only its user can read.

use std::path::PathBuf;

use ganglion_proto::credentials::{TLS_DIR, TlsFiles};
use ganglion_proto::dial::Credentials;
use ganglion_proto::format::{self, FormatError, Numbered};
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

/// Number of the file's format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;

impl Access {
    /// Renders the content of the file.
    ///
    /// # Errors
    /// A path is not UTF-8.
    pub fn render(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(&Numbered { format: FORMAT, content: self })
    }

    /// Parses the content of the file.
    ///
    /// # Errors
    /// A newer version wrote it, or it is damaged.
    pub fn parse(text: &str) -> Result<Access, FormatError> {
        format::parse(text, FORMAT)
    }

    /// Credentials for an operator's connection: the coordinator's own certificate, unless the
    /// environment names another.
    pub fn credentials(&self) -> Credentials {
        // Only where the coordinator speaks TLS: a certificate for a plain address would be an error.
        let own = self.tls_dir.as_ref();
        let folder = own.map(|own| std::env::var_os(TLS_DIR).map_or_else(|| own.clone(), PathBuf::from));
        Credentials {
            tls: folder.map(|folder| TlsFiles::new(&folder)),
            name: self.tls_name.clone(),
            ..Credentials::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_of_an_earlier_version_is_read_and_one_of_a_newer_version_is_named() {
        let access = Access {
            address: "http://127.0.0.1:7".to_string(),
            token: "t".to_string(),
            tls_dir: None,
            tls_name: Some("n".to_string()),
        };
        let text = access.render().unwrap();
        assert_eq!(text, r#"{"format":1,"address":"http://127.0.0.1:7","token":"t","tls_name":"n"}"#);
        let earlier = text.replace("\"format\":1,", "");
        for text in [&text, &earlier] {
            let read = Access::parse(text).unwrap();
            assert_eq!((read.address, read.tls_name), (access.address.clone(), access.tls_name.clone()));
        }
        let newer = Access::parse(r#"{"format":2,"addresses":[]}"#).unwrap_err().to_string();
        assert!(newer.starts_with("its format is 2"), "{newer}");
    }
}
