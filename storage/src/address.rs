//! Address of a storage, as users write it.

use std::fmt;
use std::path::PathBuf;

use object_store::ObjectStoreScheme;
use url::Url;

/// Forms of addresses, for error texts.
const CHOICE: &str =
    "a folder, file:///FOLDER, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX";

/// Error: a text is not the address of a storage. The message does not repeat the text, which may
/// contain credentials.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// The text holds credentials, and must not be shown.
    #[error(
        "holds credentials, or what looks like them (a user and password, or something behind a question mark), which would \
         end up in logs; remove them and put them into the environment, as docs/storage.md says"
    )]
    Credentials,
    /// The URL of a file is relative.
    #[error("names no absolute folder; give {CHOICE}")]
    RelativeFolder,
    /// The text is no URL.
    #[error("is no address: {0}; give {CHOICE}")]
    NoUrl(#[from] url::ParseError),
    /// The URL is of something else.
    #[error("is of no storage that is known here; give {CHOICE}")]
    UnknownKind,
}

/// Address of a storage. It never contains credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Folder of this machine, or one that it mounts.
    Folder(PathBuf),
    /// Prefix in an object store.
    Cloud(Url),
}

impl Address {
    /// Parses an address.
    ///
    /// # Errors
    /// See [`AddressError`].
    pub fn parse(text: &str) -> Result<Address, AddressError> {
        match text.split_once("://") {
            // Without a scheme it is a path, whatever characters it has.
            None => Ok(Address::Folder(PathBuf::from(text))),
            // Not percent-decoded: the folder's name is taken literally.
            Some(("file", folder)) if folder.starts_with('/') => Ok(Address::Folder(PathBuf::from(folder))),
            Some(("file", _)) => Err(AddressError::RelativeFolder),
            Some(_) => parse_url(text).map(Address::Cloud),
        }
    }

    /// Whether a text seems to contain credentials, and must not be shown.
    pub fn is_secret(text: &str) -> bool {
        text.contains("://") && Url::parse(text).is_ok_and(|url| holds_credentials(&url))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Folder(folder) => write!(f, "file://{}", folder.display()),
            Address::Cloud(url) => f.write_str(url.as_str()),
        }
    }
}

fn parse_url(text: &str) -> Result<Url, AddressError> {
    let url = Url::parse(text)?;
    // Refused and not cut out: the address is journaled, logged and sent to workers.
    if holds_credentials(&url) {
        return Err(AddressError::Credentials);
    }
    match ObjectStoreScheme::parse(&url) {
        Ok((
            ObjectStoreScheme::AmazonS3
            | ObjectStoreScheme::GoogleCloudStorage
            | ObjectStoreScheme::MicrosoftAzure,
            _,
        )) => Ok(url),
        // `ObjectStoreScheme` also knows memory, files and plain web servers.
        _ => Err(AddressError::UnknownKind),
    }
}

fn holds_credentials(url: &Url) -> bool {
    // abfs://CONTAINER@ACCOUNT... has a container where other URLs have a user.
    let azure = matches!(url.scheme(), "az" | "azure" | "adl" | "abfs" | "abfss");
    let user = !url.username().is_empty() && !azure;
    // A signature of a shared link stands behind the question mark or the number sign.
    user || url.password().is_some() || url.query().is_some() || url.fragment().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_folder_or_a_place_in_an_object_store() {
        for (text, shown) in [
            ("/a/b c", "file:///a/b c"),
            ("file:///a/100%", "file:///a/100%"),
            ("s3://bucket/a/b", "s3://bucket/a/b"),
            ("s3://bucket", "s3://bucket"),
            ("gs://bucket/a", "gs://bucket/a"),
            ("az://container/a", "az://container/a"),
            (
                "abfs://container@account.dfs.core.windows.net/a",
                "abfs://container@account.dfs.core.windows.net/a",
            ),
            (
                "https://account.blob.core.windows.net/container/a",
                "https://account.blob.core.windows.net/container/a",
            ),
        ] {
            assert_eq!(Address::parse(text).map(|address| address.to_string()).as_deref(), Ok(shown));
        }
    }

    #[test]
    fn what_is_no_storage_is_refused_with_the_choice() {
        for text in
            ["file://here", "ftp://host/a", "http://host/a", "https://example.org/a", "memory:///", "s3://"]
        {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(error.contains("s3://BUCKET/PREFIX"), "{text}: {error}");
        }
    }

    /// Invariant 4.
    #[test]
    fn credentials_are_refused_and_not_shown() {
        for text in [
            "s3://key:hush@bucket/a",
            "s3://hush@bucket/a",
            "az://container/a?sv=1&sig=hush",
            "abfs://container:hush@account.dfs.core.windows.net/a",
            "https://bucket.s3.eu-west-1.amazonaws.com/a#hush",
        ] {
            let error = Address::parse(text).unwrap_err();
            assert_eq!(error, AddressError::Credentials);
            assert!(!error.to_string().contains("hush"), "{error}");
            assert!(Address::is_secret(text));
        }
        assert!(!Address::is_secret("s3://bucket/a") && !Address::is_secret("/a?b"));
    }
}
