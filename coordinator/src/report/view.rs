//! The view of a run that its shell publishes, for everybody who asks.

use std::sync::Arc;
use std::time::Duration;

use ganglion_proto::wire::GetStatusResponse;
use tokio::sync::watch;
use tokio::time::Instant;

/// Deadlines of the job, and the least time, after which a loop that has not come round counts as hung.
const HUNG: (f64, Duration) = (2.0, Duration::from_secs(10));
/// Time that the end of a run may take besides: local workers exit, the storage is told the last.
const ENDING: Duration = Duration::from_secs(60);

/// The run as the shell published it.
#[derive(Clone, Debug)]
pub struct View {
    /// How things are.
    pub status: GetStatusResponse,
    /// When that was.
    pub at: Instant,
}

impl View {
    /// For how long the shell's loop has not come round, if that is longer than it may take.
    pub fn is_hung_for(&self) -> Option<Duration> {
        let deadlines = Duration::try_from_secs_f64(HUNG.0 * self.status.failure_deadline);
        let limit = deadlines.unwrap_or(Duration::MAX).max(HUNG.1);
        let ending = if self.status.outcome.is_empty() { Duration::ZERO } else { ENDING };
        let age = self.at.elapsed();
        (age > limit.saturating_add(ending)).then_some(age)
    }
}

/// What the shell publishes its views by.
pub type Publisher = watch::Sender<Option<Arc<View>>>;
