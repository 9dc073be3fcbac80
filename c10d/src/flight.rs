//! Outcome of one operation: a result or an abort, whichever comes first.
//!
//! 1. An operation ends exactly once: the first outcome wins, later ones are ignored.
//! 2. A waiter sleeps on a condition variable here, never inside libtorch, so an abort always wakes it.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use cxx::CxxString;

use crate::Error;
use crate::sync::lock;

/// Outcome of an operation.
pub(crate) type Outcome = Result<(), Error>;

/// Outcome of one operation, on which waiters can sleep.
#[derive(Default)]
pub(crate) struct Flight {
    outcome: Mutex<Option<Outcome>>,
    settled: Condvar,
}

impl Flight {
    /// Ends the operation unless it has ended already, and returns its outcome.
    pub(crate) fn settle(&self, outcome: Outcome) -> Outcome {
        let mut slot = lock(&self.outcome);
        // Invariant 1: after a success the buffers may be claimed, after an abort they are parked. Not
        // both.
        let first = slot.get_or_insert(outcome).clone();
        self.settled.notify_all();
        first
    }

    /// Returns the outcome; `None` while the operation is under way.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        // Held for the clone alone, as in all functions here, so a callback of libtorch never waits.
        lock(&self.outcome).clone()
    }

    /// Sleeps until the operation has ended or `until` has come.
    pub(crate) fn wait_until(&self, until: Instant) -> Option<Outcome> {
        let left = until.saturating_duration_since(Instant::now());
        self.wait_for(left)
    }

    // The lock is given up during the sleep. A spurious wake-up sleeps on.
    fn wait_for(&self, time: Duration) -> Option<Outcome> {
        let slot = lock(&self.outcome);
        let (slot, _) = self
            .settled
            .wait_timeout_while(slot, time, |outcome| outcome.is_none())
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        slot.clone()
    }
}

/// Handle by which libtorch's threads report the end of an operation.
pub(crate) struct Signal(pub(crate) Arc<Flight>);

impl Signal {
    /// Called from one of libtorch's threads; an empty description means success.
    pub(crate) fn complete(&self, description: &CxxString) {
        // No lock but the flight's is taken here: the thread is libtorch's, and others need it to go on.
        let outcome = match description.is_empty() {
            true => Ok(()),
            false => Err(Error::from_shim(&description.to_string_lossy())),
        };
        // Losing against an abort is fine: the buffers stay parked then.
        let _ = self.0.settle(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Invariant 1.
    #[test]
    fn the_first_outcome_wins() {
        let flight = Flight::default();
        assert_eq!(flight.settle(Err(Error::Aborted)), Err(Error::Aborted));
        assert_eq!(flight.settle(Ok(())), Err(Error::Aborted));
        assert_eq!(flight.wait_until(Instant::now()), Some(Err(Error::Aborted)));
    }

    #[test]
    fn a_wait_ends_without_an_outcome() {
        let flight = Flight::default();
        assert_eq!(flight.wait_until(Instant::now() + Duration::from_millis(5)), None);
    }
}
