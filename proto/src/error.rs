//! The one error of what comes from the wire.

/// A message breaks the contract.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("malformed message: {0}")]
pub struct Malformed(pub String);

pub(crate) fn malformed(what: &str) -> Malformed {
    Malformed(what.to_string())
}
