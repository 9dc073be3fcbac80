//! Group of the shim, together with everything that must not be freed before it.
//!
//! 1. Destroying a group blocks until its works are over, so that happens on a thread of its own.
//! 2. Buffers parked here are freed only after the group is destroyed: until then libtorch may read or write
//!    them.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use cxx::UniquePtr;

use crate::Buffer;
use crate::ffi::shim;
use crate::sync::{lock, milliseconds};

/// Operation on libtorch's side, which may have to be polled for its end. Polling may block for a
/// while.
pub(crate) trait Poll: Send + Sync {
    fn poll(&self);
}

impl Poll for UniquePtr<shim::Work> {
    fn poll(&self) {
        shim::Work::poll(self);
    }
}

/// Buffers lent to one operation, and its work on libtorch's side. The work is dropped before the
/// buffers, unless it is just being polled: then it lives a moment longer than the buffers, which
/// its operation no longer uses.
pub(crate) struct Loan {
    pub(crate) work: Option<Arc<dyn Poll>>,
    pub(crate) buffers: Vec<Buffer>,
}

/// Parts of a backend in the order in which they must be dropped.
struct Parts {
    group: UniquePtr<shim::Group>,
    parked: Vec<Loan>,
}

/// Owner of one group of the shim; dropping the last reference winds it down in the background.
pub(crate) struct Backend {
    group: UniquePtr<shim::Group>,
    parked: Mutex<Vec<Loan>>,
}

impl Backend {
    pub(crate) fn new(group: UniquePtr<shim::Group>) -> Arc<Backend> {
        Arc::new(Backend { group, parked: Mutex::default() })
    }

    pub(crate) fn group(&self) -> &shim::Group {
        &self.group
    }

    /// Cuts the connections. After a failure the peers run into their own time limits; the local
    /// waiters have already been woken.
    pub(crate) fn cut(self: Arc<Backend>) {
        let aside = Arc::clone(&self);
        // NCCL waits here until the GPU has left its kernels, and other threads may wait for the
        // aborting one. Gloo waits for its own thread once for each peer, up to 10 ms each.
        let aside = move || drop(aside.group.close());
        if thread::Builder::new().name("c10d-abort".into()).spawn(aside).is_err() {
            // Cut or not, this group is never used again; its peers have limits of their own.
            let _ = self.group.close();
        }
    }

    /// Keeps the buffers and the work of an unfinished operation, which may still use them.
    pub(crate) fn park(&self, loan: Loan) {
        // Held for the push alone: parking is part of an abort, which must not wait.
        lock(&self.parked).push(loan);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Moved out of `self`: another thread is to own and destroy them.
        let group = std::mem::replace(&mut self.group, UniquePtr::null());
        let parked = std::mem::take(&mut *lock(&self.parked));
        let parts = Parts { group, parked };
        // If no thread can be started, the closure is dropped here, and with it the parts, which
        // blocks but is correct.
        let _ = thread::Builder::new().name("c10d-wind-down".into()).spawn(move || drop_in_order(parts));
    }
}

fn drop_in_order(parts: Parts) {
    let Parts { group, parked } = parts;
    // Blocks until libtorch no longer uses the parked buffers (invariant 2).
    drop(group);
    drop(parked);
}

/// Returns the number of groups, works and memory loans that libtorch has not released yet, in this
/// process.
pub fn live_handles() -> usize {
    shim::live_handles()
}

/// Waits until no handle is left, for at most `timeout`, and returns how many are left.
///
/// Must be called before the process ends: libtorch may fail if it is torn down while a group winds
/// down.
pub fn wait_for_handles(timeout: Duration) -> usize {
    shim::wait_for_handles(milliseconds(timeout))
}
