//! Retries for an unreachable storage that a run needs to start.

use std::time::Duration;

use ganglion_storage::{Error, Pauses, Storage, reason};
use tokio::time::Instant;

use crate::records::progress::Screen;

/// Maximum wait for the storage at startup. After that an outer supervisor may start the
/// coordinator again.
const LIMIT: Duration = Duration::from_secs(300);
/// Maximum pause between two attempts.
// Short against `LIMIT`, so that a storage that is back is noticed soon.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// Retry policy, with the screen that its messages go to.
pub struct Patience {
    screen: Screen,
}

impl Patience {
    /// Creates a policy that prints on a screen what it waits for.
    pub fn new(screen: Screen) -> Patience {
        Patience { screen }
    }

    /// Creates a policy that prints nothing.
    #[cfg(test)]
    pub fn silent() -> Patience {
        Patience::new(Screen::silent())
    }

    /// Repeats a request to a storage until the storage answers. Past the limit its last error is returned.
    pub async fn wait_for<T>(
        &self,
        storage: &Storage,
        ask: impl AsyncFn() -> Result<T, Error>,
    ) -> Result<T, Error> {
        // Drawn at random: a fleet of runs must not ask a store that is recovering all at once.
        let mut pauses = Pauses::new(Duration::from_secs(1), PAUSE_LIMIT);
        let started = Instant::now();
        let mut told = false;
        loop {
            let error = match ask().await {
                Err(error) if storage.is_away(&error) && started.elapsed() < LIMIT => error,
                // Success, an error other than unreachability, or the end of the limit.
                done => return done,
            };
            if !std::mem::replace(&mut told, true) {
                let (address, limit) = (storage.address(), LIMIT.as_secs());
                let reason = reason(&error);
                self.screen.print(&format!("waiting for the storage {address}, at most {limit} s: {reason}"));
            }
            // Nothing else waits meanwhile: the doors are not served yet.
            tokio::time::sleep(pauses.draw()).await;
        }
    }

    /// Message for the end of the limit.
    pub fn over(&self, storage: &Storage, error: &Error) -> String {
        format!(
            "{}: away for {} s: {}; once it is back, the same command goes on, and nothing is lost",
            storage.address(),
            LIMIT.as_secs(),
            reason(error)
        )
    }
}
