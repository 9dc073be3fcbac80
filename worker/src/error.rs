//! Failures of the `worker` program, and what each asks of people.

use crate::gradient_log::LogError;
use crate::nn::broken::BrokenModule;
use crate::sample::SampleError;
use crate::session::ConnectError;

/// Failure of a command. A variant says who can do something about it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The user's input is wrong and is to be mended; the text says what, where and how.
    #[error("{0}")]
    Input(String),
    /// The machine, the network or this program failed; the same command may succeed later or elsewhere.
    #[error("{0}")]
    Other(String),
}

impl Failure {
    /// A failure that the user's input is the cause of.
    pub fn input(error: impl ToString) -> Failure {
        Failure::Input(error.to_string())
    }

    /// A failure that is not the user's.
    pub fn other(error: impl ToString) -> Failure {
        Failure::Other(error.to_string())
    }

    /// The process's exit code.
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
