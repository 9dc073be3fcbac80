//! Wall-clock time, for records and diagnostics. No decision depends on it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Current time in seconds since the Unix epoch.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
