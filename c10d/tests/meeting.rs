//! How a group meets. One test function, as it sets the environment of the process.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use c10d::{Group, KeyValueStore, MemoryStore, StoreError};
use common::{LONG, checks, options};

/// Store that counts the calls.
struct Counted {
    store: Arc<MemoryStore>,
    calls: AtomicUsize,
}

impl Counted {
    fn count(&self) -> &MemoryStore {
        self.calls.fetch_add(1, Ordering::Relaxed);
        &self.store
    }
}

impl KeyValueStore for Counted {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.count().set(key, value)
    }
    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        self.count().get(key, timeout)
    }
    fn get_many(&self, keys: &[&str], timeout: Duration) -> Result<Vec<Vec<u8>>, StoreError> {
        self.count().get_many(keys, timeout)
    }
    fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError> {
        self.count().add(key, amount)
    }
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.count().compare_set(key, expected, desired)
    }
    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        self.count().delete(key)
    }
    fn contains(&self, keys: &[&str]) -> Result<bool, StoreError> {
        self.count().contains(keys)
    }
}

fn calls(world_size: usize) -> usize {
    let store = Arc::new(Counted { store: MemoryStore::new(), calls: AtomicUsize::new(0) });
    thread::scope(|scope| {
        let form = |rank| {
            let store = Arc::clone(&store) as Arc<dyn KeyValueStore>;
            move || {
                let group = Group::gloo(options(rank, world_size, LONG), store, "meeting").unwrap();
                checks::every_collective(&group);
            }
        };
        (0..world_size).for_each(|rank| drop(scope.spawn(form(rank))));
    });
    store.calls.load(Ordering::Relaxed)
}

#[test]
fn a_group_meets_by_few_calls_of_its_store() {
    let usual = calls(12);
    // No other thread of this process runs now.
    c10d::prepare_gloo().unwrap();
    let few = calls(12);
    println!("12 ranks: {usual} calls, then {few}");
    assert!(few <= 12 * 6 && few < usual / 3, "12 ranks: {usual} calls, then {few}");
}
