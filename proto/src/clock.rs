//! Wall clock, for records, logs, certificates and the age of files. Nothing that is computed depends on it, and the
//! group protocol takes its time from events. The lints allow it in this module alone.

use std::time::{Duration, SystemTime};

/// Current time since the Unix epoch.
#[allow(clippy::disallowed_methods, reason = "this is the clock")]
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Current time in seconds since the Unix epoch, as records have it.
pub fn now() -> f64 {
    unix_time().as_secs_f64()
}

/// Current time, to compare with the times of files.
pub fn wall_clock() -> SystemTime {
    SystemTime::UNIX_EPOCH + unix_time()
}
