//! Object stores. Credentials and endpoints come from the environment, or from the machine that
//! this runs on.

use std::sync::{Arc, Once};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3CopyIfNotExists};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{BackoffConfig, Error, ObjectStore, ObjectStoreScheme, Result, RetryConfig};
use url::Url;

use crate::failure::reason;

/// Opens the object store of an address; returns it and the prefix in it.
pub(crate) fn open(url: &Url) -> std::result::Result<(Arc<dyn ObjectStore>, Path), String> {
    static PROVIDER: Once = Once::new();
    // An error means that another caller was first, and it installed the same provider.
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    let (scheme, prefix) = ObjectStoreScheme::parse(url).map_err(|error| error.to_string())?;
    let store = match scheme {
        ObjectStoreScheme::AmazonS3 => s3(url),
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(url.as_str()).with_retry(retries());
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            // Each builder reads the environment first, so that the address wins where both say
            // something.
            let builder = MicrosoftAzureBuilder::from_env().with_url(url.as_str()).with_retry(retries());
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
        other => Err(Error::NotSupported { source: format!("checkpoints are not kept in {other:?}").into() }),
    };
    store.map(|store| (store, prefix)).map_err(|error| reason(&error))
}

fn s3(url: &Url) -> Result<Arc<dyn ObjectStore>> {
    let mut builder = AmazonS3Builder::from_env().with_url(url.as_str()).with_retry(retries());
    if builder.get_config_value(&AmazonS3ConfigKey::CopyIfNotExists).is_none() {
        // S3's own mechanism. Other servers, such as R2, are configured by AWS_COPY_IF_NOT_EXISTS.
        builder = builder.with_copy_if_not_exists(S3CopyIfNotExists::Multipart);
    }
    Ok(Arc::new(builder.build()?))
}

/// Retries of short failures. For longer outages the callers retry, and log it.
fn retries() -> RetryConfig {
    // With these numbers a request that fails ends within about half a minute (invariant 5 of the
    // crate).
    let backoff = BackoffConfig { max_backoff: Duration::from_secs(4), ..BackoffConfig::default() };
    RetryConfig { backoff, max_retries: 4, retry_timeout: Duration::from_secs(20) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_address_opens_without_a_request() {
        for (text, prefix) in [
            ("s3://bucket/a/b", "a/b"),
            ("gs://bucket/a", "a"),
            ("abfs://container@account.dfs.core.windows.net/a", "a"),
        ] {
            let (_, found) = open(&Url::parse(text).unwrap()).unwrap();
            assert_eq!(found.as_ref(), prefix);
        }
    }
}
