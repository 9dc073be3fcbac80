//! libtorch's own store over TCP.

use std::time::Duration;

use cxx::UniquePtr;

use crate::ffi::shim;
use crate::store::{KeyValueStore, StoreError};
use crate::sync::milliseconds;
use crate::{Error, error};

/// Store that one process serves and others connect to. It lives as long as the serving process's
/// object.
///
/// Operations on one object are serialised, so a blocking `get` delays those of other threads.
pub struct TcpStore {
    store: UniquePtr<shim::TcpStore>,
}

impl TcpStore {
    /// Serves a store, on a free port if `port` is 0, and connects to it.
    ///
    /// # Errors
    /// [`Error::PeerLost`] or [`Error::Fatal`] if the port is not available.
    pub fn serve(host: &str, port: u16, timeout: Duration) -> Result<TcpStore, Error> {
        let store = shim::tcp_store(host, port, true, milliseconds(timeout))?;
        Ok(TcpStore { store })
    }

    /// Connects to a store that another process serves.
    ///
    /// # Errors
    /// [`Error::Timeout`] or [`Error::PeerLost`] if no server answers in time.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<TcpStore, Error> {
        let store = shim::tcp_store(host, port, false, milliseconds(timeout))?;
        Ok(TcpStore { store })
    }

    /// Port that the store is served on.
    pub fn port(&self) -> u16 {
        self.store.port()
    }
}

impl KeyValueStore for TcpStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        Ok(self.store.set(key, value)?)
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        // c10d interprets a limit of zero as none.
        Ok(self.store.get(key, milliseconds(timeout).max(1))?)
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError> {
        Ok(self.store.add(key, amount)?)
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, StoreError> {
        Ok(self.store.compare_set(key, expected, desired)?)
    }

    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        Ok(self.store.remove(key)?)
    }

    fn contains(&self, keys: &[&str]) -> Result<bool, StoreError> {
        Ok(self.store.contains(keys)?)
    }
}

impl From<cxx::Exception> for StoreError {
    fn from(exception: cxx::Exception) -> StoreError {
        match Error::from(exception) {
            Error::Timeout => StoreError::Timeout,
            Error::Aborted => StoreError::Aborted,
            Error::PeerLost(detail) => StoreError::Unreachable(detail),
            other => StoreError::Fatal(error::first_line(&other.to_string())),
        }
    }
}
