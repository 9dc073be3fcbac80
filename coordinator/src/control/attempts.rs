//! Attempts by which workers opened their newest sessions.
//!
//! 1. A hello that its worker has abandoned, and that arrives after a newer one, is refused for as
//!    long as the worker may resume.
//! 2. Only such workers, and the newest one, are remembered. Numbers of others are never assigned
//!    again: a late hello of theirs is a newcomer's, with no session to be older than.

use std::collections::BTreeMap;

use ganglion_membership::WorkerId;

/// Newest attempt by worker. See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Attempts(BTreeMap<WorkerId, u64>);

impl Attempts {
    /// Whether a worker has opened a newer session than by this attempt.
    pub(super) fn is_given_up(&self, worker: WorkerId, attempt: u64) -> bool {
        self.0.get(&worker).is_some_and(|newest| attempt < *newest)
    }

    /// Notes that a worker has opened a session, and forgets all workers that are not `known` any more.
    pub(super) fn opened(&mut self, worker: WorkerId, attempt: u64, known: impl Fn(WorkerId) -> bool) {
        // At each opening, so that the map never holds more workers than the machine knows, plus this
        // one.
        self.0.retain(|worker, _| known(*worker));
        self.0.insert(worker, attempt);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Invariants 1 and 2.
    #[test]
    fn a_hello_that_was_given_up_is_known_as_long_as_its_worker_is() {
        let mut attempts = Attempts::default();
        let (stays, passes) = (WorkerId(1), |number: u64| WorkerId(2 + number));
        attempts.opened(stays, 3, |_| true);
        for number in 0..1000 {
            attempts.opened(passes(number), 5, |worker| worker == stays);
            assert!(attempts.0.len() <= 2, "{number}");
            assert!(attempts.is_given_up(stays, 2) && !attempts.is_given_up(stays, 3));
            assert!(attempts.is_given_up(passes(number), 4));
        }
        assert!(!attempts.is_given_up(passes(7), 4), "it is a stranger");
        attempts.opened(stays, 4, |worker| worker == stays);
        assert!(attempts.is_given_up(stays, 3));
    }
}
