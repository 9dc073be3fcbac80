//! Limit on the events that a session may cause.
//!
//! Events are lines of a file that is kept for ever. A worker that trains causes few; a broken or
//! hostile one could fill the disk.
//! Questions whose answers are as long as the group is large count as events.

use std::time::Duration;

use tokio::time::Instant;

/// Maximum number of events in a burst.
// Far above what a healthy worker causes at once: a line for its join, its fault and each delayed file.
const IN_A_ROW: u32 = 256;
/// Pause before each further event.
const PAUSE: Duration = Duration::from_millis(250);

/// Rate limiter of a session's events.
#[derive(Debug)]
pub(super) struct Budget {
    /// Time at which the full burst is available again.
    quiet: Instant,
    left_out: u64,
}

impl Budget {
    pub(super) fn new() -> Budget {
        Budget { quiet: Instant::now(), left_out: 0 }
    }

    /// Spends an event; returns how many were dropped since the one before, or `None` if this one
    /// is dropped too.
    pub(super) fn spend(&mut self) -> Option<u64> {
        let now = Instant::now();
        let quiet = self.quiet.max(now) + PAUSE;
        // Time alone is the account, so a flood costs no memory: `quiet` runs ahead of the clock by one
        // pause for each event, and a burst is what fits between the two.
        if quiet - now > PAUSE * IN_A_ROW {
            self.left_out += 1;
            return None;
        }
        self.quiet = quiet;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn so_many_in_a_row_and_then_one_for_each_pause() {
        let mut budget = Budget::new();
        let spent: Vec<_> = (0..IN_A_ROW + 10).map(|_| budget.spend()).collect();
        assert_eq!(spent.iter().flatten().count(), IN_A_ROW as usize);
        tokio::time::advance(PAUSE).await;
        assert_eq!((budget.spend(), budget.spend()), (Some(10), None));
        tokio::time::advance(PAUSE * 2 * IN_A_ROW).await;
        assert_eq!(budget.spend(), Some(1));
        assert_eq!((0..1000).filter(|_| budget.spend().is_some()).count(), IN_A_ROW as usize - 1);
    }
}
