//! Lease: the time that a worker may train without hearing from its coordinator.
//!
//! 1. The lease begins when the newest acknowledged heartbeat was sent: the coordinator counts from when it
//!    read that heartbeat, which is later. So it never considers a lease expired that is not.
//! 2. The clock goes on while the machine sleeps.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Lease shared by the session, which renews it, and the training thread, which checks it before a commit.
#[derive(Debug)]
pub struct Lease {
    /// End of the lease, in nanoseconds of its clock.
    until: AtomicU64,
    clock: Clock,
}

/// Clock with an arbitrary origin. It goes on while the machine sleeps.
pub type Clock = fn() -> Duration;

impl Lease {
    /// Returns a lease that begins at `from`.
    pub fn new(clock: Clock, from: Duration, length: Duration) -> Lease {
        let lease = Lease { until: AtomicU64::new(0), clock };
        lease.prolong(from, length);
        lease
    }

    /// Renews the lease from a later moment; an earlier one changes nothing.
    pub fn prolong(&self, from: Duration, length: Duration) {
        let until = u64::try_from((from + length).as_nanos()).unwrap_or(u64::MAX);
        // Relaxed suffices: the value stands alone, and a late reader sees a shorter lease.
        self.until.fetch_max(until, Ordering::Relaxed);
    }

    /// Whether the lease has not expired.
    pub fn holds(&self) -> bool {
        (self.clock)() < Duration::from_nanos(self.until.load(Ordering::Relaxed))
    }
}

/// Time since the machine booted, sleep included.
pub fn boot_clock() -> Duration {
    // The call cannot fail: the clock exists since Linux 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_prolonged_by_later_moments_only() {
        let lease = Lease::new(boot_clock, boot_clock(), Duration::from_secs(100));
        assert!(lease.holds());
        lease.prolong(Duration::ZERO, Duration::ZERO);
        assert!(lease.holds());
        let over = Lease::new(boot_clock, Duration::ZERO, Duration::from_nanos(1));
        assert!(!over.holds());
        over.prolong(boot_clock(), Duration::from_secs(100));
        assert!(over.holds());
    }
}
