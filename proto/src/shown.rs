//! Texts from outside, made safe to show: names of files and members of archives, words of peers, of modules,
//! of servers.
//!
//! 1. What is shown holds no command to a terminal and nothing that turns the direction of a text. Such a
//!    character is escaped as Rust writes it, so that whoever looks for a file by its name still finds it.
//! 2. Showing again what was made safe changes nothing.

use std::borrow::Cow;

/// A text of one or several lines, as a terminal may show it. Line ends and tabulators stay.
pub fn printable(text: &str) -> Cow<'_, str> {
    escape(text, |c| is_command(c) && c != '\n' && c != '\t')
}

/// A name or another text of one line, as a terminal may show it.
pub fn printable_name(name: &str) -> Cow<'_, str> {
    escape(name, is_command)
}

/// The same, cut off behind so many characters of the name.
pub fn printable_start(name: &str, limit: usize) -> String {
    match name.char_indices().nth(limit) {
        Some((end, _)) => format!("{}...", printable_name(&name[..end])),
        None => printable_name(name).into_owned(),
    }
}

/// Whether a terminal, or whoever lays a text out, obeys a character instead of showing it.
fn is_command(c: char) -> bool {
    let turns =
        matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || turns || matches!(c, '\u{2028}' | '\u{2029}')
}

fn escape(text: &str, is_wrong: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_wrong) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        match is_wrong(character) {
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
