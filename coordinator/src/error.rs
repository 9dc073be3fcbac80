//! Failures of the `coordinator` program, and the user's action for each.

use std::io;

use ganglion_proto::credentials::CredentialError;
use ganglion_proto::out::{self, OutError};
use ganglion_storage::run::RunError;
use ganglion_storage::whole;

use crate::checkpoints::catalog::Unusable;
use crate::journal::JournalError;
use crate::run_dir::RunDirError;

/// Failure of a command. A variant says who can act on it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The user's input is wrong and must be mended; the text says what, where and how.
    #[error("{0}")]
    Input(String),
    /// A signal stopped the run after a clean checkpoint: the same command goes on.
    #[error("stopped; the same command goes on from step {step}")]
    Stopped {
        /// Exit code of the process.
        code: u8,
        /// Number of steps saved.
        step: u64,
    },
    /// A signal ended a command other than training; the exit code is the signal's.
    #[error("stopped")]
    Interrupted(u8),
    /// The machine, the network or this program failed; the same command may succeed later or elsewhere.
    #[error("{0}")]
    Other(String),
    /// The reader of the output has gone, and wants to hear no more.
    #[error("the reader of the output has gone")]
    Closed,
}

impl Failure {
    /// Failure caused by the user's input.
    pub fn input(error: impl ToString) -> Failure {
        Failure::Input(error.to_string())
    }

    /// Failure that the user did not cause.
    pub fn other(error: impl ToString) -> Failure {
        Failure::Other(error.to_string())
    }

    /// Failure to write what an option names: a wrong choice of the user's, unless the disk is full
    /// or failing.
    pub fn unwritable(option: impl std::fmt::Display, error: &io::Error) -> Failure {
        let text = format!("{option}: {error}");
        if whole::is_mistake(error) { Failure::Input(text) } else { Failure::Other(text) }
    }

    /// Exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Input(_) => 2,
            Failure::Stopped { code, .. } | Failure::Interrupted(code) => *code,
            Failure::Other(_) => 1,
            Failure::Closed => out::CLOSED,
        }
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        match error {
            // Only the user can help here, with another version or with `coordinator recover`: a
            // supervisor that restarts the program would do so for ever.
            JournalError::Newer(_) | JournalError::Damaged { .. } => Failure::input(error),
            JournalError::Sqlite(_) if error.may_mend() => {
                let text = error.to_string();
                // SQLite does not say of shared memory that there is no room for it.
                let hint =
                    if text.ends_with("I/O error") { ", as of a disk that is full or failing" } else { "" };
                Failure::Other(format!(
                    "{text}{hint}; once that is mended, the same command goes on, and nothing is lost"
                ))
            }
            JournalError::Sqlite(_)
            | JournalError::File(_)
            | JournalError::Busy
            | JournalError::Superseded => Failure::other(error),
        }
    }
}

impl From<RunDirError> for Failure {
    fn from(error: RunDirError) -> Self {
        match error {
            RunDirError::Input(_) => Failure::input(error),
            // May be free in a moment, so a restart by a supervisor makes sense.
            RunDirError::Held { .. } | RunDirError::System(_) => Failure::other(error),
        }
    }
}

impl From<Unusable> for Failure {
    fn from(error: Unusable) -> Self {
        match error {
            Unusable::Input(_) => Failure::input(error),
            Unusable::Away(_) => Failure::other(error),
        }
    }
}

impl From<OutError> for Failure {
    fn from(error: OutError) -> Self {
        match error {
            OutError::Closed => Failure::Closed,
            OutError::Failed(_) => Failure::other(error),
        }
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Input(_) | RunError::NoFile(_) => Failure::input(error),
            RunError::Storage(_) => Failure::other(error),
        }
    }
}

impl From<CredentialError> for Failure {
    fn from(error: CredentialError) -> Self {
        Failure::Input(error.to_string())
    }
}
