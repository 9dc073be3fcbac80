//! Clock of leases.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Clock with an arbitrary origin. It goes on while the machine sleeps: a lease does too.
pub type Clock = fn() -> Duration;

/// Time since the machine booted, sleep included.
pub(super) fn boot_clock() -> Duration {
    // The call cannot fail: the clock exists since Linux 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}
