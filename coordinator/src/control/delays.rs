//! Warnings about checkpoints that cannot be written: a line when that begins, and one when it is
//! over. Attempts go on meanwhile, each a `checkpoint_delayed` event.

use std::collections::BTreeSet;

/// Maximum number of writers and reasons remembered; further ones are not reported.
// Reasons are texts of workers, so their number needs a bound that does not trust them.
const LIMIT: usize = 64;

/// Warnings since the last checkpoint became valid: writer and reason of each.
#[derive(Debug, Default)]
pub(super) struct Delays(BTreeSet<(String, String)>);

impl Delays {
    /// Whether a writer's failure for a reason was not reported yet.
    pub(super) fn is_news(&mut self, who: &str, reason: &str) -> bool {
        // The required and free space differs from file to file.
        let reason = reason.split(": it needs ").next().unwrap_or(reason);
        self.0.len() < LIMIT && self.0.insert((who.to_string(), reason.to_string()))
    }

    /// Clears the warnings, since a checkpoint is valid; returns whether there were any.
    pub(super) fn end(&mut self) -> bool {
        !std::mem::take(&mut self.0).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_told_once_until_it_is_over() {
        let mut delays = Delays::default();
        assert!(!delays.end());
        assert!(delays.is_news("worker 1", "No space left: it needs 5 MB, free: 1 MB"));
        assert!(!delays.is_news("worker 1", "No space left: it needs 3 MB, free: 0 MB"));
        assert!(delays.is_news("worker 2", "No space left: it needs 3 MB, free: 0 MB"));
        assert!(delays.is_news("worker 1", "Read-only file system"));
        assert!(delays.end() && !delays.end());
        assert!(delays.is_news("worker 1", "No space left"));
        assert!((0..1000).filter(|who| delays.is_news(&who.to_string(), "x")).count() < LIMIT);
    }
}
