//! Runs and their checkpoints, by the names that users give them: `RUN`, `RUN@best`, `RUN@5000`.
//!
//! 1. A name is parsed and looked up here and nowhere else, so both programs take the same run and
//!    the same checkpoint for it.
//! 2. A run leads to its checkpoints by its `job.toml` alone: in `checkpoint.url`, or in its folder.
//! 3. Nothing is written.

mod checkpoint;
mod name;

use thiserror::Error;

pub use checkpoint::{ContentOfRun, Shelf, best, manifests, place_of, read};
pub use name::{BadRunName, CheckpointChoice, Chosen, RUNS, RunName, chosen, only, runs_in};

/// Name of the resolved job in a run's folder.
pub const JOB: &str = "job.toml";
/// Name of the journal in a run's folder.
pub const JOURNAL: &str = "journal.sqlite";

/// Reason why a name leads to no run, or to no checkpoint.
#[derive(Debug, Error)]
pub enum RunError {
    /// The user must name something else, or mend what is there.
    #[error("{0}")]
    Input(String),
    /// The checkpoint is there and lacks the file.
    #[error("{0}")]
    NoFile(String),
    /// The storage failed or does not answer.
    #[error("{0}")]
    Storage(String),
}
