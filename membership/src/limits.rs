//! Time limits of a run, all derived from its one setting.

use std::time::Duration;

/// Time limits. See [`Limits::derive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest time that a silent process is trusted; the setting itself.
    pub deadline: Duration,
    /// Interval between two heartbeats of a worker, and the longest pause between two of its
    /// attempts to find its coordinator.
    pub heartbeat: Duration,
    /// Longest time that one attempt to reach a process may take.
    pub attempt: Duration,
    /// Longest time in which the members must meet in a new group.
    pub meet: Duration,
    /// Longest time that members wait for each other in a reduce. The coordinator detects a late
    /// member first.
    pub reduce: Duration,
    /// Longest time that workers train without a coordinator. Then they save their state and stop
    /// by themselves.
    pub lease: Duration,
}

impl Limits {
    /// Shortest deadline that the limits can be derived from: heartbeats of a busy machine come
    /// this late.
    pub const SHORTEST: Duration = Duration::from_millis(200);
    /// Longest deadline that the limits can be derived from.
    pub const LONGEST: Duration = Duration::from_secs(3600);

    /// Derives all limits from the failure deadline, which is first clamped to its bounds.
    pub fn derive(failure_deadline: Duration) -> Limits {
        let deadline = failure_deadline.clamp(Limits::SHORTEST, Limits::LONGEST);
        Limits {
            deadline,
            // Four of five may be late or lost before a worker counts as silent.
            heartbeat: deadline / 5,
            // One attempt that hangs, and the pause before the next, fit in one deadline: a worker that
            // lost its connection is back before it is given up.
            attempt: deadline / 2,
            // Longer than the deadline: the coordinator finds out who is missing before the others give
            // up.
            meet: deadline * 2,
            // Well above the deadline: the coordinator sees a late member before the others give up on
            // it (M8).
            reduce: deadline * 12,
            // Not shorter than a reduce: a group that only lost its coordinator is not ended by its own
            // waits.
            lease: deadline * 12,
        }
    }
}

impl std::fmt::Display for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = |limit: Duration| limit.as_secs_f64();
        write!(
            f,
            "failure deadline {} s: heartbeats every {} s, {} s to meet, {} s for a reduce, {} s without a coordinator",
            seconds(self.deadline),
            seconds(self.heartbeat),
            seconds(self.meet),
            seconds(self.reduce),
            seconds(self.lease),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_in_the_order_that_the_protocol_needs() {
        for seconds in [0.0, 0.2, 5.0, 1e9] {
            let limits = Limits::derive(Duration::from_secs_f64(seconds));
            // A worker that lost its connection is back before it is given up.
            assert!(limits.heartbeat + limits.attempt < limits.deadline);
            // A coordinator sees a late member before the members give up on each other.
            assert!(limits.deadline < limits.meet && limits.meet < limits.reduce);
            // A group that only lost its coordinator is not ended by its own waits first.
            assert!(limits.reduce <= limits.lease);
        }
    }
}
