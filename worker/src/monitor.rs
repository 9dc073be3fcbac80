//! Something that two threads share, and a way to wait for its change.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A value under a lock, with a bell.
#[derive(Debug, Default)]
pub struct Monitor<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Monitor<T> {
    /// The value, for this thread alone.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, or a little while: whoever waits looks again at what it waits for.
    pub fn wait<'a>(&self, value: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        let waited = self.changed.wait_timeout(value, Duration::from_millis(200));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits while something holds, at most so long.
    pub fn wait_while<'a>(
        &self,
        value: MutexGuard<'a, T>,
        limit: Duration,
        holds: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        let waited = self.changed.wait_timeout_while(value, limit, holds);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Wakes all that wait.
    pub fn notify(&self) {
        self.changed.notify_all();
    }
}
