//! Format numbers of JSON files: the key `format`.
//!
//! 1. A file without one is of format 1: earlier versions did not write it.
//! 2. Keys that a reader need not know are added without a new number. A new number means that older
//!    readers would misunderstand the file; they refuse it, and say so.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Content of a file with its number in front.
#[derive(Serialize)]
pub struct Numbered<T> {
    /// The number.
    pub format: u32,
    /// The content.
    #[serde(flatten)]
    pub content: T,
}

/// Error: a text is not a file of a known format.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// A newer version of the program wrote the file.
    #[error(
        "its format is {found}, and this version knows none above {known}; use the version that wrote it, or a newer one"
    )]
    Newer {
        /// Number in the file.
        found: u32,
        /// Newest known number.
        known: u32,
    },
    /// The text is not JSON, or lacks a key.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

#[derive(Deserialize)]
struct Number {
    #[serde(default = "first")]
    format: u32,
}

fn first() -> u32 {
    1
}

/// Parses a file of a format up to `known`. The number is judged first: a newer format may lack
/// what this one needs.
///
/// # Errors
/// See [`FormatError`].
pub fn parse<T: DeserializeOwned>(text: &str, known: u32) -> Result<T, FormatError> {
    // Read twice, the number alone first: the content of a newer format need not fit the type.
    let Number { format } = serde_json::from_str(text)?;
    if format > known {
        return Err(FormatError::Newer { found: format, known });
    }
    Ok(serde_json::from_str(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Content {
        step: u64,
    }

    #[test]
    fn a_file_without_a_number_is_of_the_first_format_and_a_newer_one_is_refused() {
        let numbered = Numbered { format: 1, content: Content { step: 3 } };
        let text = serde_json::to_string(&numbered).unwrap();
        assert_eq!(text, r#"{"format":1,"step":3}"#);
        for text in [text.as_str(), r#"{"step":3}"#, r#"{"step":3,"new":[]}"#] {
            assert_eq!(parse::<Content>(text, 1).unwrap(), Content { step: 3 });
        }
        let newer = parse::<Content>(r#"{"format":3,"steps":[3]}"#, 2).unwrap_err().to_string();
        assert!(newer.starts_with("its format is 3, and this version knows none above 2;"), "{newer}");
        for wrong in [r#"{"format":"x","step":3}"#, r#"{"format":-1,"step":3}"#, r#"{"format":1}"#, "", "[]"]
        {
            assert!(matches!(parse::<Content>(wrong, 1), Err(FormatError::Json(_))), "{wrong}");
        }
    }
}
