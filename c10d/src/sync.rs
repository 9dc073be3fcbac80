//! Helpers for locks and time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest wait that is ever passed on: clocks in C++ overflow on longer ones.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Locks a mutex, also after a panic elsewhere: no code here leaves a guarded value half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the end of a wait that starts now.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    // `Instant` overflows with a panic beyond its range.
    Instant::now() + timeout.min(LONGEST)
}

/// Converts to whole milliseconds, rounded up, so that a short wait does not become 0.
pub(crate) fn milliseconds(timeout: Duration) -> u64 {
    // Limited first: the addition would overflow for the longest durations.
    let rounded = timeout.min(LONGEST) + Duration::from_nanos(999_999);
    u64::try_from(rounded.as_millis()).expect("a year in milliseconds fits in 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_round_up_and_are_limited() {
        assert_eq!(milliseconds(Duration::ZERO), 0);
        assert_eq!(milliseconds(Duration::from_micros(1)), 1);
        assert_eq!(milliseconds(Duration::from_millis(7)), 7);
        assert_eq!(milliseconds(Duration::MAX), milliseconds(LONGEST));
    }
}
