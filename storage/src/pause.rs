//! Back-off pauses between attempts.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Exponential back-off with jitter. The pauses double up to a limit; each is drawn between half
/// and all of that, so that many clients of one storage do not come back at once.
#[derive(Clone, Debug)]
pub struct Pauses {
    next: Duration,
    limit: Duration,
}

impl Pauses {
    /// Creates pauses of which the first is at most `first` and none is longer than `limit`.
    pub fn new(first: Duration, limit: Duration) -> Pauses {
        Pauses { next: first.min(limit), limit }
    }

    /// Draws the next pause.
    pub fn draw(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.limit);
        // A hasher's keys are the standard library's source of randomness.
        let chance = u32::try_from(RandomState::new().hash_one(0) % 1024).expect("it is below 1024");
        // From half of the pause on: it stays a pause, and clients still spread.
        whole / 2 + whole * chance / 2048
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_their_limit() {
        let mut pauses = Pauses::new(Duration::from_secs(1), Duration::from_secs(5));
        for whole in [1.0, 2.0, 4.0, 5.0, 5.0] {
            let pause = pauses.draw().as_secs_f64();
            assert!((whole / 2.0..=whole).contains(&pause), "{pause}");
        }
    }
}
