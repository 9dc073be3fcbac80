//! Groups of threads for the tests of this crate.

// Each test binary uses only some of these functions.
#![allow(dead_code)]

pub(crate) mod checks;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use c10d::{Buffer, GlooAddress, GlooOptions, Group, KeyValueStore, MemoryStore};
use tch::{Device, Kind, Tensor};

/// Longer than any healthy operation here, and short enough to wait for.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// Gloo's own limit in the tests: the longest wind-down of an aborted group.
pub(crate) const GLOO_LIMIT: Duration = Duration::from_secs(2);

static GROUPS: AtomicU64 = AtomicU64::new(0);

pub(crate) fn options(rank: usize, world_size: usize, timeout: Duration) -> GlooOptions {
    let address = GlooAddress::Hostname("127.0.0.1".into());
    GlooOptions { rank, world_size, timeout, operation_timeout: timeout, address }
}

/// Forms one group among threads of this process, and returns it rank by rank.
pub(crate) fn groups(world_size: usize, timeout: Duration) -> Vec<Group> {
    let store: Arc<dyn KeyValueStore> = MemoryStore::new();
    let prefix = format!("group {}", GROUPS.fetch_add(1, Ordering::Relaxed));
    thread::scope(|scope| {
        let (store, prefix) = (&store, &prefix);
        let form = |rank| {
            move || Group::gloo(options(rank, world_size, timeout), Arc::clone(store), prefix).unwrap()
        };
        let threads: Vec<_> = (0..world_size).map(|rank| scope.spawn(form(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Runs one thread per rank of a new group and returns what they return.
pub(crate) fn on_ranks<R: Send>(world_size: usize, run: impl Fn(&Group) -> R + Sync) -> Vec<R> {
    let groups = groups(world_size, GLOO_LIMIT);
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = groups.iter().map(|group| scope.spawn(move || run(group))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub(crate) fn buffer_of(values: &[f32]) -> Buffer {
    let mut buffer = Buffer::zeros(values.len(), Kind::Float, Device::Cpu).unwrap();
    buffer.update(|tensor| tensor.copy_(&Tensor::from_slice(values)));
    buffer
}

pub(crate) fn values_of(buffer: &Buffer) -> Vec<f32> {
    Vec::try_from(buffer.tensor()).unwrap()
}

/// Asserts that no object of the shim is left after the time `within`.
pub(crate) fn assert_nothing_left(within: Duration) {
    assert_eq!(c10d::wait_for_handles(within), 0, "handles are left");
}
