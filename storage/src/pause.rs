//! Pauses between attempts.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Pauses that double up to a limit. Each is drawn between half and all of that, so that many who wait for
/// one storage do not come back at once.
#[derive(Clone, Debug)]
pub struct Pauses {
    next: Duration,
    limit: Duration,
}

impl Pauses {
    /// The first is at most this long.
    pub fn new(first: Duration, limit: Duration) -> Pauses {
        Pauses { next: first.min(limit), limit }
    }

    /// The next pause.
    pub fn draw(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.limit);
        // A hasher's keys are the standard library's source of chance.
        let chance = u32::try_from(RandomState::new().hash_one(0) % 1024).expect("it is below 1024");
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
