//! View of a run, published by its shell for all readers.

use std::sync::Arc;
use std::time::Duration;

use ganglion_proto::wire::GetStatusResponse;
use tokio::sync::watch;
use tokio::time::Instant;

/// Time after which a loop without progress counts as hung: a multiple of the failure deadline, and
/// a minimum.
// Workers give a session up after one deadline without an answer, so a loop that is silent for two
// serves nobody.
const HUNG: (f64, Duration) = (2.0, Duration::from_secs(10));
/// Additional time at the end of a run: local workers exit, and the storage gets its last orders.
// The loop publishes nothing any more while it waits for exits, storage and mirror.
const ENDING: Duration = Duration::from_secs(60);

/// Snapshot of the run, as published by the shell.
#[derive(Clone, Debug)]
pub struct View {
    /// Status of the run.
    pub status: GetStatusResponse,
    /// Time of the snapshot.
    pub at: Instant,
}

impl View {
    /// Age of the snapshot, if it shows that the shell's loop hangs; `None` otherwise.
    pub fn is_hung_for(&self) -> Option<Duration> {
        let deadlines = Duration::try_from_secs_f64(HUNG.0 * self.status.failure_deadline);
        let limit = deadlines.unwrap_or(Duration::MAX).max(HUNG.1);
        let ending = if self.status.outcome.is_empty() { Duration::ZERO } else { ENDING };
        let age = self.at.elapsed();
        (age > limit.saturating_add(ending)).then_some(age)
    }
}

/// Sender of the shell's snapshots.
pub(crate) type Publisher = watch::Sender<Option<Arc<View>>>;
