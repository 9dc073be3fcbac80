//! A group of the shim together with all that must not be freed before it.
//!
//! 1. Destroying a group blocks until its works are over, so it happens on a thread of its own.
//! 2. Buffers parked here are freed only after the group is destroyed: until then libtorch may read or write
//!    them.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use cxx::UniquePtr;

use crate::Buffer;
use crate::ffi::shim;
use crate::sync::{lock, milliseconds};

/// libtorch's side of an operation, which may have to be asked whether it is over. The answer may take its
/// time.
pub(crate) trait Poll: Send + Sync {
    fn poll(&self);
}

impl Poll for UniquePtr<shim::Work> {
    fn poll(&self) {
        shim::Work::poll(self);
    }
}

/// Buffers lent to one operation, and libtorch's side of it. The work goes before the buffers, unless
/// somebody is just asking it: then it stays a moment longer than buffers that its operation has done with.
pub(crate) struct Loan {
    pub(crate) work: Option<Arc<dyn Poll>>,
    pub(crate) buffers: Vec<Buffer>,
}

/// The parts in the order in which they have to be dropped.
struct Parts {
    group: UniquePtr<shim::Group>,
    parked: Vec<Loan>,
}

/// One group of the shim; dropping the last reference winds it down in the background.
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

    /// Cuts the connections. A failure leaves the peers to their own time limits; the waiters here are free
    /// already.
    pub(crate) fn cut(self: Arc<Backend>) {
        let aside = Arc::clone(&self);
        // NCCL waits until the GPU has left its kernels, and others may wait for the thread that aborts.
        let aside = move || drop(aside.group.close());
        let waits = self.group.polls();
        if !waits || thread::Builder::new().name("c10d-abort".into()).spawn(aside).is_err() {
            let _ = self.group.close();
        }
    }

    /// Keeps what an unfinished operation may still use.
    pub(crate) fn park(&self, loan: Loan) {
        lock(&self.parked).push(loan);
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let group = std::mem::replace(&mut self.group, UniquePtr::null());
        let parked = std::mem::take(&mut *lock(&self.parked));
        let parts = Parts { group, parked };
        // Without a thread to spare the closure is dropped here, and with it the parts, which blocks but is
        // right.
        let _ = thread::Builder::new().name("c10d-wind-down".into()).spawn(move || drop_in_order(parts));
    }
}

fn drop_in_order(parts: Parts) {
    let Parts { group, parked } = parts;
    drop(group);
    drop(parked);
}

/// The number of groups, works and loans of memory that libtorch has not let go of yet, in this process.
pub fn live_handles() -> usize {
    shim::live_handles()
}

/// Waits until no handle is left, at most so long, and returns how many are left.
///
/// Call it before the process ends: libtorch does not like to be torn down while a group still winds down.
pub fn wait_for_handles(timeout: Duration) -> usize {
    shim::wait_for_handles(milliseconds(timeout))
}
