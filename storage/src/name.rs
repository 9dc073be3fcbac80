//! Names that come from outside: of objects in a store, of members of an archive, in a message of a peer.

use std::path::{Path, PathBuf};

use ganglion_proto::printable_name;

/// Longest name, as long as a key of S3 may be.
const MAX_BYTES: usize = 1024;
/// Longest part between two slashes, as long as file systems allow.
const MAX_PART_BYTES: usize = 255;

/// Reason why a text is no [`RelativeName`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Empty, or with an empty part: it begins or ends with a slash, or holds two in a row.
    #[error("an empty part")]
    EmptyPart,
    /// A part `.` or `..`.
    #[error("a part . or ..")]
    Dots,
    /// A backslash: a separator to some, a part of a name to others.
    #[error("a backslash")]
    Backslash,
    /// A NUL, a line's end, an escape.
    #[error("a control character")]
    Control,
    /// Beyond the limits of file systems and object stores.
    #[error("too many bytes")]
    Length,
}

/// A name below a folder: parts with `/` between them. It has no root, no `.` and `..`, no backslash, no
/// control character and a bounded length, so a path made of it lies in that folder. Displayed it is safe to
/// show, and may be another text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelativeName(Box<str>);

impl RelativeName {
    /// Checks a text.
    ///
    /// # Errors
    /// The text could name something outside of the folder, or cannot be a file's name everywhere.
    pub fn parse(text: &str) -> Result<RelativeName, BadName> {
        if text.len() > MAX_BYTES {
            return Err(BadName::Length);
        }
        for part in text.split('/') {
            match part {
                "" => return Err(BadName::EmptyPart),
                "." | ".." => return Err(BadName::Dots),
                _ if part.len() > MAX_PART_BYTES => return Err(BadName::Length),
                _ if part.contains('\\') => return Err(BadName::Backslash),
                _ if part.chars().any(char::is_control) => return Err(BadName::Control),
                _ => {}
            }
        }
        Ok(RelativeName(text.into()))
    }

    /// The name, with `/` between its parts.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The file or folder of this name in `folder`.
    pub fn below(&self, folder: &Path) -> PathBuf {
        self.0.split('/').fold(folder.to_path_buf(), |path, part| path.join(part))
    }
}

impl std::fmt::Display for RelativeName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&printable_name(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_in_its_folder() {
        for text in ["a", "a/b.png", "..a/b..", "...", "ä/日本.png", "a b/#1 [2]%", "~/-rf"] {
            let name = RelativeName::parse(text).unwrap();
            assert_eq!((name.as_str(), name.below(Path::new("/f"))), (text, Path::new("/f").join(text)));
        }
    }

    #[test]
    fn names_that_could_lead_elsewhere_are_refused() {
        let long = "x".repeat(256);
        let many = "x/".repeat(512) + "x";
        for (text, wrong) in [
            ("", BadName::EmptyPart),
            ("/etc/passwd", BadName::EmptyPart),
            ("a//b", BadName::EmptyPart),
            ("a/", BadName::EmptyPart),
            ("..", BadName::Dots),
            ("a/../../b", BadName::Dots),
            ("./a", BadName::Dots),
            ("..\\a", BadName::Backslash),
            ("C:\\a", BadName::Backslash),
            ("a\0b", BadName::Control),
            ("a\x1b[2J", BadName::Control),
            ("a\u{85}b", BadName::Control),
            (&long, BadName::Length),
            (&many, BadName::Length),
        ] {
            assert_eq!(RelativeName::parse(text), Err(wrong), "{text:?}");
        }
    }

    #[test]
    fn a_name_is_shown_in_the_direction_in_which_it_was_written() {
        let name = RelativeName::parse("cat\u{202e}gnp.exe").unwrap();
        assert_eq!((name.as_str(), name.to_string().as_str()), ("cat\u{202e}gnp.exe", "cat\\u{202e}gnp.exe"));
    }
}
