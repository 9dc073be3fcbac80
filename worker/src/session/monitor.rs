//! Monitor: a value shared by two threads, with a condition variable.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Value under a lock, with a condition variable.
#[derive(Debug, Default)]
pub(crate) struct Monitor<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Monitor<T> {
    /// Locks the value.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a notification, 200 ms at most: the caller checks its condition again.
    pub(crate) fn wait<'a>(&self, value: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        let waited = self.changed.wait_timeout(value, Duration::from_millis(200));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits while a condition holds, at most `limit`.
    pub(crate) fn wait_while<'a>(
        &self,
        value: MutexGuard<'a, T>,
        limit: Duration,
        holds: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        let waited = self.changed.wait_timeout_while(value, limit, holds);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Wakes all waiting threads.
    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }
}
