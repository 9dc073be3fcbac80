//! Word of checkpoints that cannot be written: a line when that begins, and one when it is over. Attempts go
//! on meanwhile, each a `checkpoint_delayed` event.

use std::collections::BTreeSet;

/// Writers and reasons that are remembered; beyond these nothing is told.
const LIMIT: usize = 64;

/// Warnings since the last checkpoint became valid: who cannot write, and why.
#[derive(Debug, Default)]
pub struct Delays(BTreeSet<(String, String)>);

impl Delays {
    /// Whether it is news that someone cannot write for a reason.
    pub fn is_news(&mut self, who: &str, reason: &str) -> bool {
        // The room that is needed and free differs from file to file.
        let reason = reason.split(": it needs ").next().unwrap_or(reason);
        self.0.len() < LIMIT && self.0.insert((who.to_string(), reason.to_string()))
    }

    /// A checkpoint is valid: whether that is news.
    pub fn end(&mut self) -> bool {
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
        assert!(delays.is_news("worker 1", "No space left: it needs 5 MB, 1 MB is free"));
        assert!(!delays.is_news("worker 1", "No space left: it needs 3 MB, 0 MB is free"));
        assert!(delays.is_news("worker 2", "No space left: it needs 3 MB, 0 MB is free"));
        assert!(delays.is_news("worker 1", "Read-only file system"));
        assert!(delays.end() && !delays.end());
        assert!(delays.is_news("worker 1", "No space left"));
        assert!((0..1000).filter(|who| delays.is_news(&who.to_string(), "x")).count() < LIMIT);
    }
}
