//! Waiting for a storage that is away, when a run cannot start without it.

use std::time::Duration;

use ganglion_storage::{Error, Pauses, Storage, reason};
use tokio::time::Instant;

use crate::report::progress::Screen;

/// How long a start waits for the storage. Whatever starts coordinators again does so afterwards.
const LIMIT: Duration = Duration::from_secs(300);
/// Between two attempts.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// How long a storage is waited for, and where that is said.
pub struct Patience {
    screen: Screen,
}

impl Patience {
    /// Says on a screen what it waits for.
    pub fn new(screen: Screen) -> Patience {
        Patience { screen }
    }

    /// Says nothing.
    #[cfg(test)]
    pub fn silent() -> Patience {
        Patience::new(Screen::silent())
    }

    /// Asks a storage for something until it is not away. Past the limit its last error is returned.
    pub async fn wait_for<T>(
        &self,
        storage: &Storage,
        ask: impl AsyncFn() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut pauses = Pauses::new(Duration::from_secs(1), PAUSE_LIMIT);
        let started = Instant::now();
        let mut told = false;
        loop {
            let error = match ask().await {
                Err(error) if storage.is_away(&error) && started.elapsed() < LIMIT => error,
                done => return done,
            };
            if !std::mem::replace(&mut told, true) {
                let (address, limit) = (storage.address(), LIMIT.as_secs());
                let reason = reason(&error);
                self.screen.print(&format!("waiting for the storage {address}, at most {limit} s: {reason}"));
            }
            tokio::time::sleep(pauses.draw()).await;
        }
    }

    /// What to say once the limit is over.
    pub fn over(&self, storage: &Storage, error: &Error) -> String {
        format!(
            "{}: away for {} s: {}; nothing is lost: once it is back, the same command goes on",
            storage.address(),
            LIMIT.as_secs(),
            reason(error)
        )
    }
}
