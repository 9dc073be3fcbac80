//! Failures of the `worker` program, by what the user can do about them.

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

    /// Exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Input(_) => 2,
            Failure::Other(_) => 1,
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
            other => Failure::other(other),
        }
    }
}
