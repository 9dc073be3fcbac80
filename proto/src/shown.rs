//! Escaping of texts from outside before they are shown: names of files and archive members, texts
//! of peers, modules and servers.
//!
//! 1. The result holds no control sequence for a terminal and nothing that changes the direction of
//!    a text. Such a character is escaped as Rust writes it, so that a file can still be found by
//!    its name.
//! 2. Escaping is idempotent.

use std::borrow::Cow;

/// Escapes a text of one or several lines for a terminal. Line ends and tabulators stay.
pub fn printable(text: &str) -> Cow<'_, str> {
    escape(text, |c| is_command(c) && c != '\n' && c != '\t')
}

/// Escapes a name or another text of one line for a terminal.
pub fn printable_name(name: &str) -> Cow<'_, str> {
    escape(name, is_command)
}

/// Escapes the first `limit` characters of a name and cuts off the rest.
pub fn printable_start(name: &str, limit: usize) -> String {
    match name.char_indices().nth(limit) {
        Some((end, _)) => format!("{}...", printable_name(&name[..end])),
        None => printable_name(name).into_owned(),
    }
}

/// Whether a terminal or a text layout interprets a character instead of showing it.
fn is_command(c: char) -> bool {
    // Marks and overrides of direction: with them a name can be shown as another one.
    let turns =
        matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || turns || matches!(c, '\u{2028}' | '\u{2029}')
}

fn escape(text: &str, is_wrong: impl Fn(char) -> bool) -> Cow<'_, str> {
    // Nearly always: nothing is copied then.
    if !text.contains(&is_wrong) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        match is_wrong(character) {
            // Gives backslashes, letters, digits and braces alone, which no second escape changes
            // (invariant 2).
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    shown.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Invariants 1 and 2.
    #[test]
    fn what_is_shown_moves_no_cursor_and_turns_no_text() {
        let hostile = "a\x1b[2J\r\n\tb\u{9b}c\u{202e}d\u{61c}\0\u{7f}\u{2028}";
        let rest = "b\\u{9b}c\\u{202e}d\\u{61c}\\u{0}\\u{7f}\\u{2028}";
        assert_eq!(printable(hostile), format!("a\\u{{1b}}[2J\\r\n\t{rest}"));
        assert_eq!(printable_name(hostile), format!("a\\u{{1b}}[2J\\r\\n\\t{rest}"));
        for text in [printable(hostile), printable_name(hostile), "Ünïcode 漢字 😀 C:\\n".into()] {
            assert_eq!(printable(&text), text);
        }
    }

    #[test]
    fn a_long_name_is_cut_at_a_character() {
        assert_eq!(printable_start("日本語", 2), "日本...");
        assert_eq!(printable_start("日本", 2), "日本");
        assert_eq!(printable_start("\n\n\n", 2), "\\n\\n...");
    }
}
