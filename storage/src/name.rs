//! Names that come from outside: of objects in a store, of archive members, in a peer's message.

use std::path::{Path, PathBuf};

use ganglion_proto::printable_name;

/// Longest name in bytes, the limit of S3's keys.
const MAX_BYTES: usize = 1024;
/// Longest part between two slashes in bytes, the limit of file systems.
const MAX_PART_BYTES: usize = 255;

/// Reason why a text is not a [`RelativeName`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Empty, or with an empty part: it begins or ends with a slash, or holds two in a row.
    #[error("an empty part")]
    EmptyPart,
    /// A part `.` or `..`.
    #[error("a part . or ..")]
    Dots,
    /// A backslash: a separator on some systems, part of a name on others.
    #[error("a backslash")]
    Backslash,
    /// A NUL, a newline, an escape.
    #[error("a control character")]
    Control,
    /// Longer than file systems and object stores allow.
    #[error("too many bytes")]
    Length,
}

/// Name below a folder: parts with `/` between them. It has no root, no `.` and `..`, no backslash,
/// no control character and a bounded length, so a path made of it lies in that folder. Its
/// `Display` form is escaped for showing, and may differ from the name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelativeName(Box<str>);

impl RelativeName {
    /// Parses and checks a text.
    ///
    /// # Errors
    /// The text could name something outside of the folder, or is not a valid file name on every
    /// system.
    pub fn parse(text: &str) -> Result<RelativeName, BadName> {
        // First, so that a long text is not looked through.
        if text.len() > MAX_BYTES {
            return Err(BadName::Length);
        }
        for part in text.split('/') {
            match part {
                "" => return Err(BadName::EmptyPart),
                "." | ".." => return Err(BadName::Dots),
                _ if part.len() > MAX_PART_BYTES => return Err(BadName::Length),
                // On another system a backslash separates parts, and a checkpoint may be read there.
                _ if part.contains('\\') => return Err(BadName::Backslash),
                _ if part.chars().any(char::is_control) => return Err(BadName::Control),
                _ => {}
            }
        }
        Ok(RelativeName(text.into()))
    }

    /// Returns the name, with `/` between its parts.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the path of this name in `folder`.
    pub fn below(&self, folder: &Path) -> PathBuf {
        // By parts, each of which was checked: `join` with a rooted text would leave the folder.
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
