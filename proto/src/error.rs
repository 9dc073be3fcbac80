//! Error of content that comes from the wire.

/// Violation of the wire contract by a message.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("malformed message: {0}")]
pub struct Malformed(pub String);

pub(crate) fn malformed(what: &str) -> Malformed {
    Malformed(what.to_string())
}
