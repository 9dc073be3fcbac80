//! Reasons for which the shell refuses a worker, or an operator's request.

use ganglion_membership::{Term, WorkerId};
use ganglion_proto::words::{are, counted, listed};

/// Reason why a worker may not take part.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// The worker belongs to another run.
    #[error("this coordinator has another run")]
    OtherRun,
    /// Another coordinator took the run over.
    #[error("a coordinator of term {newer} has this run; this is term {own}")]
    TakenOver {
        /// Term that the worker has seen.
        newer: Term,
        /// Term of this coordinator.
        own: Term,
    },
    /// The worker claims to be a local one, without that one's token.
    #[error(
        "this number is that of a process which the coordinator started: only with its token it may go on"
    )]
    WithoutToken,
    /// No process was started with the token.
    #[error(
        "its token is of no worker that this coordinator started; to join as a worker of your own, unset GANGLION_SPAWN_TOKEN"
    )]
    StrangeToken,
    /// The session was overtaken by a newer one of the same worker.
    #[error("this worker has given this session up and opened a newer one")]
    GivenUp,
}

/// Reason why an operator's change is not made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotChanged {
    /// There is nothing to change.
    #[error("the run is complete, and no worker is left")]
    Complete,
    /// The worker does not exist.
    #[error("there is no worker {worker}; the workers are: {}", listed(known))]
    NoWorker {
        /// The worker.
        worker: WorkerId,
        /// Workers that exist.
        known: Vec<WorkerId>,
    },
    /// Each worker needs a data shard.
    #[error("{} {} more than the job's {}", counted(*workers, "worker"), are(*workers), counted(*shards, "data shard"))]
    TooManyWorkers {
        /// Requested number.
        workers: u32,
        /// Number of data shards.
        shards: u32,
    },
}
