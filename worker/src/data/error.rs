//! Errors of reading samples.

use std::io;
use std::path::{Path, PathBuf};

use ganglion_proto::job::exclude_argument;

/// Reasons why samples cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The job or the files are wrong, and only the user can fix that. The message names the file, what was
    /// found, what was expected, and the fix.
    #[error("{0}")]
    Input(String),
    /// One sample cannot be read. The message names it and says how to go on without it.
    #[error(
        "{problem}; get it again, or go on without it: the same command with {}", exclude_argument(&[name.as_str()])
    )]
    Sample {
        /// Name of the sample.
        name: String,
        /// Location of the sample, and the problem.
        problem: String,
    },
    /// The system failed. The same input may well work at another time.
    #[error("cannot read {}: {source}", path.display())]
    System {
        /// File or folder in question.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// Samples that were read cannot be copied to the training device.
    #[error("cannot copy samples to the training device: {0}")]
    Upload(String),
    /// No batch is left: the plan is done, or an error that was already returned ended it.
    #[error("no batch is left to take")]
    Finished,
}

impl DataError {
    /// Returns the message for the user, if the user can fix the problem.
    ///
    /// # Errors
    /// The error itself, if the user cannot.
    pub fn into_input(self) -> Result<String, DataError> {
        match self {
            // Both are mended by the user; the others may pass, or are this program's.
            DataError::Input(_) | DataError::Sample { .. } => Ok(self.to_string()),
            DataError::System { .. } | DataError::Upload(_) | DataError::Finished => Err(self),
        }
    }

    /// Says the same of data that were not named by the job's `[data]`: `path` and `kind` are what the user
    /// gave instead of `data.path` and `data.kind`. Samples can be left out of a job alone.
    pub(crate) fn in_words_of(self, path: &str, kind: &str) -> DataError {
        let in_words = |text: String| text.replace("data.path", path).replace("data.kind", kind);
        match self {
            DataError::Input(problem) => DataError::Input(in_words(problem)),
            DataError::Sample { problem, .. } => {
                DataError::Input(in_words(format!("{problem}; get it again, or take it away")))
            }
            other => other,
        }
    }

    /// Attributes a problem of a file to its sample.
    pub(super) fn of_sample(self, name: &str) -> DataError {
        match self {
            DataError::Input(problem) => DataError::Sample { name: name.to_owned(), problem },
            // An error of the system says nothing about the sample.
            other => other,
        }
    }

    /// Classifies a failure to read `path` by whether the user can fix it.
    pub(super) fn reading(path: &Path, source: io::Error) -> DataError {
        use io::ErrorKind::{IsADirectory, NotADirectory, NotFound, PermissionDenied};
        let path = path.to_path_buf();
        match source.kind() {
            NotFound | PermissionDenied | IsADirectory | NotADirectory => {
                DataError::Input(format!("cannot read {}: {source}; correct data.path", path.display()))
            }
            // Such as an error of the disk or of the network: the same file may be read the next time.
            _ => DataError::System { path, source },
        }
    }
}
