//! Signal handling common to coordinator and worker.

/// Whether this process was started with SIGHUP ignored, as by `nohup`: then the end of a terminal
/// is no request to stop. Must be called before a handler is installed.
pub fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    is_first_ignored(&status)
}

/// Whether SIGHUP, signal 1 and so the lowest bit of the mask, is ignored. See proc(5),
/// /proc/pid/status.
fn is_first_ignored(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // 128 bits, as the mask has more than 64 signals on some machines.
    let mask = mask.and_then(|mask| u128::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_read() {
        assert!(is_first_ignored("Name:\tx\nSigIgn:\t0000000000001001\n"));
        assert!(!is_first_ignored("Name:\tx\nSigIgn:\t0000000000001000\n"));
        assert!(!is_first_ignored("Name:\tx\n"));
    }
}
