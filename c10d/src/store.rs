//! Key-value store for the rendezvous of a group's ranks.
//!
//! 1. A store is shared by threads and processes; each operation is atomic.
//! 2. A panic in an implementation becomes an error: it never unwinds into C++.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::sync::{deadline, lock};

/// Reason why a store did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The key did not appear in time. Forming a group then fails with
    /// [`Error::Timeout`](crate::Error::Timeout).
    #[error("the time limit passed")]
    Timeout,
    /// The store cannot be reached. Forming a group then fails with
    /// [`Error::PeerLost`](crate::Error::PeerLost).
    #[error("the store cannot be reached: {0}")]
    Unreachable(String),
    /// The wait was cancelled. Forming a group then fails with
    /// [`Error::Aborted`](crate::Error::Aborted).
    #[error("the wait was called off")]
    Aborted,
    /// Any other error. Forming a group then fails with [`Error::Fatal`](crate::Error::Fatal).
    #[error("{0}")]
    Fatal(String),
}

/// Key-value store that all ranks of a group share.
///
/// The calls may block. They come from the thread that forms the group and, with NCCL, from others. Values
/// are bytes; a counter is stored as decimal text, as c10d does.
pub trait KeyValueStore: Send + Sync {
    /// Sets a key, replacing its value.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] and other variants, for this and all other operations.
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError>;

    /// Returns the value of a key; waits until it has one.
    ///
    /// # Errors
    /// [`StoreError::Timeout`] if the key has no value in time.
    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError>;

    /// Returns the values of several keys; waits until all have one.
    ///
    /// # Errors
    /// [`StoreError::Timeout`] if a key has no value in time.
    fn get_many(&self, keys: &[&str], timeout: Duration) -> Result<Vec<Vec<u8>>, StoreError> {
        // One limit for all keys together, not for each.
        let until = deadline(timeout);
        let get = |key: &&str| self.get(key, until.saturating_duration_since(Instant::now()));
        keys.iter().map(get).collect()
    }

    /// Adds to a counter, which starts at 0, and returns the sum.
    ///
    /// # Errors
    /// [`StoreError::Fatal`] if the value is not a counter.
    fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError>;

    /// Sets a key to `desired` if its value is `expected`, or if it is absent and `expected` is
    /// empty. Returns the value afterwards; for an absent key with a non-empty `expected`,
    /// `expected` itself.
    ///
    /// # Errors
    /// Those of all operations.
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, StoreError>;

    /// Removes a key; returns whether it existed.
    ///
    /// # Errors
    /// Those of all operations.
    fn delete(&self, key: &str) -> Result<bool, StoreError>;

    /// Whether all the keys have values now.
    ///
    /// # Errors
    /// Those of all operations.
    fn contains(&self, keys: &[&str]) -> Result<bool, StoreError>;

    /// Waits until all the keys have values.
    ///
    /// # Errors
    /// [`StoreError::Timeout`] if a key has no value in time.
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<(), StoreError> {
        self.get_many(keys, timeout).map(drop)
    }
}

/// Store inside one process, for groups of threads and for tests.
#[derive(Debug, Default)]
pub struct MemoryStore {
    values: Mutex<HashMap<String, Vec<u8>>>,
    changed: Condvar,
}

impl MemoryStore {
    /// Creates an empty store.
    pub fn new() -> Arc<MemoryStore> {
        Arc::default()
    }
}

impl KeyValueStore for MemoryStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        lock(&self.values).insert(key.to_owned(), value.to_owned());
        // All waiters look for themselves: each may wait for another key.
        self.changed.notify_all();
        Ok(())
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let until = deadline(timeout);
        let left = until.saturating_duration_since(Instant::now());
        let (values, _) = self
            .changed
            // The lock is given up while it sleeps.
            .wait_timeout_while(lock(&self.values), left, |values| !values.contains_key(key))
            .unwrap_or_else(PoisonError::into_inner);
        values.get(key).cloned().ok_or(StoreError::Timeout)
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError> {
        // Held over reading and writing: two ranks that add at once must both count.
        let mut values = lock(&self.values);
        let current = match values.get(key) {
            None => 0,
            Some(text) => std::str::from_utf8(text)
                .ok()
                .and_then(|text| text.parse::<i64>().ok())
                .ok_or_else(|| StoreError::Fatal(format!("{key} does not hold a number")))?,
        };
        let sum =
            // A counter that wrapped would look like a new one.
            current.checked_add(amount).ok_or_else(|| StoreError::Fatal(format!("{key} would overflow")))?;
        values.insert(key.to_owned(), sum.to_string().into_bytes());
        self.changed.notify_all();
        Ok(sum)
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, StoreError> {
        let mut values = lock(&self.values);
        let matches = match values.get(key) {
            // As c10d's own stores do: an absent key answers with what was expected of it.
            None if !expected.is_empty() => return Ok(expected.to_owned()),
            None => true,
            Some(current) => current == expected,
        };
        if matches {
            values.insert(key.to_owned(), desired.to_owned());
            self.changed.notify_all();
        }
        Ok(values[key].clone())
    }

    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        Ok(lock(&self.values).remove(key).is_some())
    }

    fn contains(&self, keys: &[&str]) -> Result<bool, StoreError> {
        let values = lock(&self.values);
        Ok(keys.iter().all(|key| values.contains_key(*key)))
    }
}

/// Store for use by C++: its errors are strings in the form that `Error::from_shim` parses.
pub(crate) struct StoreHandle(pub(crate) Arc<dyn KeyValueStore>);

impl StoreHandle {
    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
        self.call(|store| store.set(key, value))
    }

    pub(crate) fn get(&self, key: &str, timeout_ms: u64) -> Result<Vec<u8>, String> {
        self.call(|store| store.get(key, Duration::from_millis(timeout_ms)))
    }

    /// The values one after the other, each behind its length as eight little-endian bytes.
    pub(crate) fn get_many(&self, keys: &[&str], timeout_ms: u64) -> Result<Vec<u8>, String> {
        let values = self.call(|store| store.get_many(keys, Duration::from_millis(timeout_ms)))?;
        let framed =
            values.iter().flat_map(|value| [&(value.len() as u64).to_le_bytes(), &value[..]].concat());
        Ok(framed.collect())
    }

    pub(crate) fn add(&self, key: &str, amount: i64) -> Result<i64, String> {
        self.call(|store| store.add(key, amount))
    }

    pub(crate) fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, String> {
        self.call(|store| store.compare_set(key, expected, desired))
    }

    pub(crate) fn remove(&self, key: &str) -> Result<bool, String> {
        self.call(|store| store.delete(key))
    }

    pub(crate) fn contains(&self, keys: &[&str]) -> Result<bool, String> {
        self.call(|store| store.contains(keys))
    }

    pub(crate) fn wait(&self, keys: &[&str], timeout_ms: u64) -> Result<(), String> {
        self.call(|store| store.wait(keys, Duration::from_millis(timeout_ms)))
    }

    fn call<T>(
        &self,
        operation: impl FnOnce(&dyn KeyValueStore) -> Result<T, StoreError>,
    ) -> Result<T, String> {
        // Unwinding into C++ would be undefined. After a panic the group is not formed, so what the
        // store holds is not used by it again.
        match catch_unwind(AssertUnwindSafe(|| operation(&*self.0))) {
            Ok(Ok(value)) => Ok(value),
            // The letters that `Error::from_shim` reads. C++ passes them on unchanged.
            Ok(Err(StoreError::Timeout)) => Err("T ".into()),
            Ok(Err(StoreError::Aborted)) => Err("A ".into()),
            Ok(Err(error @ StoreError::Unreachable(_))) => Err(format!("P {error}")),
            Ok(Err(StoreError::Fatal(detail))) => Err(format!("F {detail}")),
            Err(_) => Err("F the store panicked".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compare_set_follows_c10d() {
        let store = MemoryStore::default();
        assert_eq!(store.compare_set("k", b"x", b"y"), Ok(b"x".to_vec()));
        assert_eq!(store.contains(&["k"]), Ok(false));
        assert_eq!(store.compare_set("k", b"", b"y"), Ok(b"y".to_vec()));
        assert_eq!(store.compare_set("k", b"x", b"z"), Ok(b"y".to_vec()));
        assert_eq!(store.compare_set("k", b"y", b"z"), Ok(b"z".to_vec()));
    }

    #[test]
    fn counters_are_decimal_text() {
        let store = MemoryStore::default();
        assert_eq!(store.add("n", 2), Ok(2));
        assert_eq!(store.add("n", -5), Ok(-3));
        assert_eq!(store.get("n", Duration::ZERO), Ok(b"-3".to_vec()));
        store.set("text", b"abc").unwrap();
        assert!(matches!(store.add("text", 1), Err(StoreError::Fatal(_))));
        assert_eq!(store.delete("n"), Ok(true));
        assert_eq!(store.delete("n"), Ok(false));
    }

    #[test]
    fn a_wait_is_limited_and_woken() {
        let store = MemoryStore::default();
        assert_eq!(store.get("late", Duration::from_millis(5)), Err(StoreError::Timeout));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| store.wait(&["a", "b"], Duration::from_secs(10)));
            store.set("a", b"1").unwrap();
            store.set("b", b"2").unwrap();
            assert_eq!(waiter.join().unwrap(), Ok(()));
        });
    }

    /// Invariant 2.
    #[test]
    fn a_panic_becomes_an_error() {
        struct Panics;
        impl KeyValueStore for Panics {
            fn set(&self, _: &str, _: &[u8]) -> Result<(), StoreError> {
                panic!("set")
            }
            fn get(&self, _: &str, _: Duration) -> Result<Vec<u8>, StoreError> {
                panic!("get")
            }
            fn add(&self, _: &str, _: i64) -> Result<i64, StoreError> {
                panic!("add")
            }
            fn compare_set(&self, _: &str, _: &[u8], _: &[u8]) -> Result<Vec<u8>, StoreError> {
                panic!("compare_set")
            }
            fn delete(&self, _: &str) -> Result<bool, StoreError> {
                panic!("delete")
            }
            fn contains(&self, _: &[&str]) -> Result<bool, StoreError> {
                panic!("contains")
            }
        }
        let handle = StoreHandle(Arc::new(Panics));
        assert!(handle.set("k", b"v").is_err());
        assert!(handle.wait(&["k"], 1).is_err());
    }
}
