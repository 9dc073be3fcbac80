//! Bounds of the content of a peer's messages. Conversion applies them, so nothing larger reaches
//! the domain.
//!
//! | what | bound | beyond it |
//! |---|---|---|
//! | a diagnostic text, such as the detail of a fault | [`TEXT`] bytes | cut off |
//! | texts that a model wrote | [`SAMPLE_TEXT`] bytes | cut off |
//! | a name, such as a host's or a file's | [`NAME`] bytes | refused |
//! | the address of a storage | [`PATH`] bytes | refused |
//! | a job | [`TEXT_LIMIT`](crate::job::TEXT_LIMIT) bytes | refused |
//! | a list | a number of items of its own, below | refused |
//! | a count, such as an update index or a step | [`COUNT`] | refused |
//!
//! Texts and names are made safe to show (`shown.rs`). Their bounds apply to the result, since a
//! peer passes it on.

use crate::error::Malformed;
use crate::shown::{printable, printable_name};

/// Largest diagnostic text, in bytes.
pub(crate) const TEXT: usize = 4096;
/// Largest name, in bytes. A host with its port has 259 at most.
pub(crate) const NAME: usize = 512;
/// Largest address of a storage, in bytes.
pub(crate) const PATH: usize = 8192;
/// Highest count: floating-point numbers and JSON hold it exactly. Multiplied by [`PHASES`] it fits
/// into 63 bits, as SQLite and update indices need.
pub(crate) const COUNT: u64 = (1 << 53) - 1;
/// Most phases in a step.
pub const PHASES: u32 = 1 << 10;
/// Most members of a group.
pub(crate) const MEMBERS: usize = 1 << 16;
/// Most networks of an objective, and most names of its phases.
pub const NETWORKS: usize = 64;
/// Most files of a checkpoint.
pub(crate) const FILES: usize = 1 << 12;
/// Most stretches of the state digest in one file of a checkpoint: one for each tensor.
pub(crate) const STRETCHES: usize = 1 << 16;
/// Most bytes at the ends of a stretch: less than a chunk of blake3 at each.
pub(crate) const ENDS: usize = 2 << 10;
/// Most subtrees in a stretch: less than two for each level of the tree.
pub(crate) const SUBTREES: usize = 2 * 54;
/// Most update indices whose phases may be skipped.
pub(crate) const SKIPS: usize = 1 << 16;
/// Most items in a fingerprint of the environment (`passport`).
pub(crate) const PASSPORT: usize = 64;
/// Most steps of evaluations.
pub(crate) const EVALUATIONS: usize = 1 << 20;
/// Most samples that a job leaves out.
pub(crate) const LEFT_OUT: usize = 1 << 20;
/// Largest texts of one step, in bytes.
pub const SAMPLE_TEXT: usize = 1 << 18;
/// Longest side of a picture, in pixels.
pub(crate) const SIDE: u32 = 1 << 16;

/// Bounds a diagnostic text: printable, cut off at its bound.
pub(crate) fn text(text: String) -> String {
    // A cut inside of a character would be no text.
    let cut =
        |text: &str| (0..=TEXT.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    // Cut before escaping as well: escapes are longer than the original, and a peer may send many
    // of them.
    let mut shown = printable(&text[..cut(&text)]).into_owned();
    // Again, since escaping has made it longer.
    shown.truncate(cut(&shown));
    shown
}

/// Bounds a name: one line, printable.
pub(crate) fn name(name: String, what: &str) -> Result<String, Malformed> {
    // Before escaping, so that a text without end is not escaped first.
    let name = within(name, NAME, what)?;
    // And after it, as the escaped form is passed on.
    within(printable_name(&name).into_owned(), NAME, what)
}

/// Checks a text that a program interprets: refused beyond its bound, otherwise unchanged.
pub(crate) fn within(text: String, limit: usize, what: &str) -> Result<String, Malformed> {
    match text.len() {
        length if length > limit => {
            Err(Malformed(format!("{what} has {length} bytes, and at most {limit} are allowed")))
        }
        _ => Ok(text),
    }
}

/// Checks that a list has at most `limit` items.
pub(crate) fn list<T>(items: Vec<T>, limit: usize, what: &str) -> Result<Vec<T>, Malformed> {
    match items.len() {
        length if length > limit => {
            Err(Malformed(format!("{what} has {length} items, and at most {limit} are allowed")))
        }
        _ => Ok(items),
    }
}

/// Checks a count against [`COUNT`].
pub(crate) fn count(number: u64, what: &str) -> Result<u64, Malformed> {
    // An equal number passes: floating-point numbers hold it exactly too.
    if number > COUNT {
        return Err(Malformed(format!("{what} is {number}, and at most {COUNT} is allowed")));
    }
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_names_are_safe_to_show_within_their_bounds() {
        assert_eq!(text("a\x1b[2J".to_string()), "a\\u{1b}[2J");
        assert_eq!(text("two\n\tlines, Ünïcode 漢字 😀".to_string()), "two\n\tlines, Ünïcode 漢字 😀");
        assert_eq!(name("node\n7\t".to_string(), "host").unwrap(), "node\\n7\\t");
        // A text accepted from one peer is passed on to others, who have the same bounds.
        assert!(name("\n".repeat(NAME / 2), "host").is_ok() && name("\n".repeat(NAME), "host").is_err());
        let shown = text("\x1b".repeat(TEXT));
        assert!(shown.len() <= TEXT && text(shown.clone()) == shown);
    }

    #[test]
    fn texts_are_cut_at_a_character_and_all_else_is_refused_beyond_its_bound() {
        assert_eq!(text("é".repeat(TEXT)).len(), TEXT);
        assert_eq!(text(format!("a{}", "é".repeat(TEXT))).len(), TEXT - 1);
        assert!(name("x".repeat(NAME), "host").is_ok() && name("x".repeat(NAME + 1), "host").is_err());
        assert!(count(COUNT, "step").is_ok());
        let refused = count(COUNT + 1, "step").unwrap_err().to_string();
        assert_eq!(
            refused,
            "malformed message: step is 9007199254740992, and at most 9007199254740991 is allowed"
        );
        assert!(list(vec![0; 3], 3, "ranks").is_ok() && list(vec![0; 4], 3, "ranks").is_err());
    }
}
