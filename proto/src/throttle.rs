//! Rate limit per address.
//!
//! 1. Memory is bounded: only up to 4096 addresses are tracked, and those that have been quiet are
//!    forgotten first.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Most addresses that are tracked at once.
const ADDRESSES: usize = 4096;

/// Rate limit: each address may act `in_a_row` times at once, and once more after each `pause`.
#[derive(Debug)]
pub struct Throttle {
    in_a_row: u32,
    pause: Duration,
    /// Time at which each address has its full allowance again.
    quiet: Mutex<BTreeMap<IpAddr, Instant>>,
}

impl Throttle {
    /// Creates a limit of `in_a_row` actions at once, and one more after each pause.
    pub fn new(in_a_row: u32, pause: Duration) -> Throttle {
        Throttle { in_a_row, pause, quiet: Mutex::default() }
    }

    /// Whether an address may act now.
    pub fn allows(&self, address: IpAddr) -> bool {
        // Held for a look-up; nothing here waits.
        let quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        let ahead = quiet.get(&address).map(|quiet| quiet.saturating_duration_since(Instant::now()));
        // Each action moves the time of the full allowance by one pause, so this counts without a
        // counter.
        ahead.is_none_or(|ahead| ahead + self.pause <= self.pause * self.in_a_row)
    }

    /// Records an action of an address.
    pub fn note(&self, address: IpAddr) {
        let now = Instant::now();
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        if quiet.len() >= ADDRESSES && !quiet.contains_key(&address) {
            // Addresses with their full allowance are forgotten first, then any one.
            quiet.retain(|_, quiet| *quiet > now);
            if quiet.len() >= ADDRESSES {
                quiet.pop_first();
            }
        }
        let until = quiet.entry(address).or_insert(now);
        // Time that passed while an address was quiet is not saved up beyond the allowance.
        *until = (*until).max(now) + self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_address_that_was_too_quick_waits_and_others_do_not() {
        let throttle = Throttle::new(3, Duration::from_secs(2));
        let (here, there) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        for _ in 0..3 {
            assert!(throttle.allows(here));
            throttle.note(here);
        }
        assert!(!throttle.allows(here) && throttle.allows(there));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(throttle.allows(here));
        throttle.note(here);
        assert!(!throttle.allows(here));
        tokio::time::advance(Duration::from_secs(6)).await;
        (0..3).for_each(|_| throttle.note(here));
        assert!(!throttle.allows(here));
    }

    #[test]
    fn what_is_known_of_addresses_is_bounded() {
        let throttle = Throttle::new(1, Duration::from_secs(60));
        for number in 0..10_000u32 {
            throttle.note(IpAddr::from(number.to_be_bytes()));
        }
        assert_eq!(throttle.quiet.lock().unwrap().len(), ADDRESSES);
    }
}
