//! Errors, classified by the action that the caller can take.
//!
//! 1. libtorch's messages carry long backtraces; only the first line of a message is kept.

/// Error of a group, a collective or a buffer. Each variant asks for another action.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The time limit passed. The group is broken: form a new one, or give up.
    #[error("the time limit passed")]
    Timeout,
    /// A connection to a peer failed. The group is broken: agree on the remaining peers and form a
    /// new one.
    #[error("a peer was lost: {0}")]
    PeerLost(String),
    /// The group was aborted, by its [`Aborter`](crate::Aborter) or by an earlier failure: form a new one.
    #[error("the group was aborted")]
    Aborted,
    /// Something else refers to the buffer's memory: drop that view or copy and try again.
    #[error("the buffer's memory is shared with another tensor")]
    Aliased,
    /// The arguments do not match: a mistake in the calling code. Nothing was done.
    #[error("invalid argument: {0}")]
    Invalid(String),
    /// libtorch failed in a way that a retry will not mend.
    #[error("libtorch failed: {0}")]
    Fatal(String),
}

impl Error {
    /// Parses the output of `describe` in the shim: a letter, a space, the first line of the
    /// message.
    pub(crate) fn from_shim(description: &str) -> Error {
        // A message without a letter is not from the shim: nothing is known about it.
        let (kind, detail) = description.split_once(' ').unwrap_or(("F", description));
        let detail = || first_line(detail);
        match kind {
            "T" => Error::Timeout,
            "P" => Error::PeerLost(detail()),
            "A" => Error::Aborted,
            // Also for an unknown letter: an error that is not understood must not be taken for a lost
            // peer, which would be tried again.
            _ => Error::Fatal(detail()),
        }
    }
}

impl From<cxx::Exception> for Error {
    fn from(exception: cxx::Exception) -> Error {
        Error::from_shim(exception.what())
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Error {
        Error::Fatal(first_line(&error.to_string()))
    }
}

/// Returns the first line of a message, trimmed.
pub(crate) fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// Collective refused before anything was lent: the reason, with the buffers back.
#[derive(Debug)]
pub struct Refused<T> {
    /// Reason of the refusal.
    pub error: Error,
    /// Buffers of the caller, untouched.
    pub buffers: T,
}

impl<T> std::fmt::Display for Refused<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(formatter)
    }
}

impl<T: std::fmt::Debug> std::error::Error for Refused<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl<T> From<Refused<T>> for Error {
    fn from(refused: Refused<T>) -> Error {
        refused.error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_becomes_the_variant_of_its_letter() {
        assert_eq!(Error::from_shim("T late"), Error::Timeout);
        assert_eq!(Error::from_shim("P gone\nat frame 1"), Error::PeerLost("gone".into()));
        assert_eq!(Error::from_shim("A "), Error::Aborted);
        assert_eq!(Error::from_shim("F odd"), Error::Fatal("odd".into()));
        assert_eq!(Error::from_shim("nonsense"), Error::Fatal("nonsense".into()));
    }
}
