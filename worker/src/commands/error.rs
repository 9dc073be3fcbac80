//! Failures of the `worker` program, by what the user can do about them.

use std::io;
use std::path::Path;

use ganglion_proto::out::{self, OutError};
use ganglion_storage::run::RunError;
use ganglion_storage::whole;

use crate::checkpoint::EARLIER;
use crate::engine::gradient_log::LogError;
use crate::nn::broken::BrokenModule;
use crate::sampling::SampleError;
use crate::session::ConnectError;

/// Failure of a command. The variant says whether the user can fix it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The user's input is wrong; the message says what, where and how to fix it.
    #[error("{0}")]
    Input(String),
    /// The machine, the network or this program failed; the same command may succeed later or elsewhere.
    #[error("{0}")]
    Other(String),
    /// The reader of the output has gone, and wants to hear no more.
    #[error("the reader of the output has gone")]
    Closed,
}

impl Failure {
    /// Returns a failure caused by the user's input.
    pub fn input(error: impl ToString) -> Failure {
        Failure::Input(error.to_string())
    }

    /// Returns a failure that is not the user's.
    pub fn other(error: impl ToString) -> Failure {
        Failure::Other(error.to_string())
    }

    /// Failure to write to a path that an option names: a wrong choice of the user's, unless the disk
    /// is full or failing.
    pub fn unwritable(option: &str, path: &Path, error: &io::Error) -> Failure {
        let line = format!("{option} {}: {error}", path.display());
        if whole::is_mistake(error) { Failure::Input(line) } else { Failure::Other(line) }
    }

    /// Exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Input(_) => 2,
            Failure::Other(_) => 1,
            Failure::Closed => out::CLOSED,
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
            RunError::Input(what) | RunError::NoFile(what) => Failure::Input(what),
            RunError::Storage(what) => Failure::Other(what),
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Address { .. } | ConnectError::Credentials { .. } => Failure::input(error),
            _ => Failure::other(error),
        }
    }
}

impl From<LogError> for Failure {
    fn from(error: LogError) -> Self {
        Failure::input(error)
    }
}

impl From<BrokenModule> for Failure {
    fn from(broken: BrokenModule) -> Self {
        if broken.is_lack_of_memory() { Failure::other(broken) } else { Failure::input(broken) }
    }
}

impl From<SampleError> for Failure {
    fn from(error: SampleError) -> Self {
        match error {
            SampleError::Input(detail) => Failure::Input(detail),
            // The user's checkpoint gives them: the same command would fail again, anywhere.
            SampleError::NotFinite => Failure::Input(format!("{error}; {EARLIER}")),
            other => Failure::other(other),
        }
    }
}
