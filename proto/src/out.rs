//! Output of the programs: results and messages on standard output, messages on standard error.
//!
//! 1. An error of standard output is the command's: see [`OutError`]. One of standard error cannot
//!    be told; the exit code says the same.
//! 2. A reader that has seen enough, such as `head`, ends a command quietly, with the exit code of
//!    a program that SIGPIPE ended.
//! 3. In the structured log ([`log`]) a message is an object. A result, such as a table, stays as
//!    it is.
//! 4. The status line of [`Progress`](crate::progress::Progress) is removed before anything else is
//!    written.
#![allow(clippy::disallowed_methods)] // the one place that opens the standard streams

use std::env;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use console::{Term, measure_text_width, truncate_str};
use tracing::Level;

use crate::{log, printable_name};

/// Exit code of a command whose reader has closed the pipe: 128 and the number of SIGPIPE.
// Not 0: a script that reads only the first lines of an audit must not take it for one that holds.
pub const CLOSED: u8 = 141;
/// Exit code for wrong input.
const WRONG: u8 = 2;
/// Moves to the beginning of the line and removes what is there.
const CLEAR: &str = "\r\x1b[K";

/// Whether a status line is on the terminal. Locked by each write to a standard stream.
static DRAWN: Mutex<bool> = Mutex::new(false);

/// Error of standard output.
#[derive(Debug, thiserror::Error)]
pub enum OutError {
    /// The reader has closed the pipe. Nobody is there to be told.
    #[error("the reader of the output has gone")]
    Closed,
    /// The output is incomplete.
    #[error("cannot write the output: {0}")]
    Failed(String),
}

impl From<io::Error> for OutError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => OutError::Closed,
            _ => OutError::Failed(cause(&error)),
        }
    }
}

/// Cause of an error in the system's words, to follow a colon.
fn cause(error: &io::Error) -> String {
    let text = error.to_string();
    let words = text.split(" (os error ").next().unwrap_or_default();
    let mut letters = words.chars();
    let first = letters.next().map(|first| first.to_ascii_lowercase());
    first.into_iter().chain(letters).collect()
}

/// Prints a command's result on standard output, with a newline at its end.
///
/// # Errors
/// Standard output cannot be written, or its reader has gone.
pub fn print(result: &str) -> Result<(), OutError> {
    let end = if result.ends_with('\n') { "" } else { "\n" };
    let text = format!("{result}{end}");
    Ok(undisturbed(|| {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        // Now, while there is somebody to tell of an error.
        out.flush()
    })?)
}

/// Shows a piece of a result on standard output at once, as it is.
///
/// # Errors
/// As [`print!`].
pub fn show(piece: &str) -> Result<(), OutError> {
    Ok(undisturbed(|| {
        let mut out = io::stdout().lock();
        out.write_all(piece.as_bytes())?;
        out.flush()
    })?)
}

/// Prints a message on standard output.
///
/// # Errors
/// As [`print!`].
pub fn say(message: &str) -> Result<(), OutError> {
    print(&log::line(Level::INFO, message))
}

/// Prints a message on standard error.
pub fn tell(level: Level, message: &str) {
    let line = log::line(level, message) + "\n";
    // Invariant 1. One call, so that lines of several threads stay whole.
    let _ = Stderr.write_all(line.as_bytes());
}

/// Prints the answer to a command line that asks for help, or is wrong: by `print`, which may use
/// colours, or as a message of the structured log. Returns the exit code.
///
/// # Errors
/// As [`print!`].
pub fn usage(is_wrong: bool, text: &str, print: impl FnOnce() -> io::Result<()>) -> Result<u8, OutError> {
    if is_wrong && log::is_structured() {
        tell(Level::ERROR, text.trim_start_matches("error: ").trim_end());
        return Ok(WRONG);
    }
    match print().and_then(|()| io::stdout().flush()) {
        // Invariant 1.
        _ if is_wrong => Ok(WRONG),
        printed => Ok(printed.map(|()| 0)?),
    }
}

/// Whether standard error is a terminal on which a line can be drawn over, and messages are for
/// people.
pub fn can_draw() -> bool {
    !log::is_structured() && io::stderr().is_terminal() && is_able(env::var("TERM").ok().as_deref())
}

/// Whether messages on standard error may have colours.
pub fn may_colour() -> bool {
    can_draw() && env::var_os("NO_COLOR").is_none_or(|text| text.is_empty())
}

/// Whether a terminal of that kind moves its cursor.
fn is_able(kind: Option<&str>) -> bool {
    !matches!(kind, None | Some("" | "dumb"))
}

/// Standard error, as a writer for a log.
#[derive(Clone, Copy, Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        undisturbed(|| io::stderr().lock().write(bytes))
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        undisturbed(|| io::stderr().lock().write_all(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}

/// Joins the parts of a status line that fit into so many columns. A part is there as a whole or not at
/// all, since half a number is another number; only the first is cut.
pub fn fitting(parts: &[String], between: &str, columns: usize) -> String {
    let mut line = String::new();
    for part in parts {
        let longer = if line.is_empty() { part.clone() } else { format!("{line}{between}{part}") };
        if measure_text_width(&longer) > columns {
            break;
        }
        line = longer;
    }
    match parts.first() {
        Some(first) if line.is_empty() => truncate_str(first, columns, "").into_owned(),
        _ => line,
    }
}

/// Draws the status line, as much of it as fits the terminal's present width.
pub(crate) fn draw(parts: &[String]) {
    let (_, width) = Term::stderr().size();
    // The last column stays free: behind it some terminals go on in the next line.
    let room = usize::from(width).saturating_sub(1);
    let parts: Vec<String> = parts.iter().map(|part| printable_name(part).into_owned()).collect();
    let text = format!("{CLEAR}{}", fitting(&parts, ", ", room));
    let mut drawn = DRAWN.lock().unwrap_or_else(PoisonError::into_inner);
    *drawn = io::stderr().lock().write_all(text.as_bytes()).is_ok();
}

/// Removes the status line.
pub(crate) fn clear() {
    undisturbed(|| ());
}

/// Writes where no status line is.
fn undisturbed<T>(write: impl FnOnce() -> T) -> T {
    // Held while it writes, so that the line does not come back in the middle.
    let mut drawn = DRAWN.lock().unwrap_or_else(PoisonError::into_inner);
    if std::mem::take(&mut *drawn) {
        let _ = io::stderr().lock().write_all(CLEAR.as_bytes());
    }
    write()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_output_is_told_in_one_sentence_and_a_closed_pipe_is_none() {
        let full = OutError::from(io::Error::from_raw_os_error(28));
        assert_eq!(full.to_string(), "cannot write the output: no space left on device");
        assert!(matches!(OutError::from(io::Error::from_raw_os_error(32)), OutError::Closed));
    }

    #[test]
    fn a_status_line_has_whole_parts_and_fits() {
        let parts = ["step 12/20", "60%", "8,123 images/s"].map(str::to_string);
        for (columns, line) in [
            (80, "step 12/20  60%  8,123 images/s"),
            (31, "step 12/20  60%  8,123 images/s"),
            (30, "step 12/20  60%"),
            (11, "step 12/20"),
            (6, "step 1"),
            (0, ""),
        ] {
            assert_eq!(fitting(&parts, "  ", columns), line);
        }
        assert_eq!(fitting(&["日本語".to_string()], "  ", 5), "日本");
        assert_eq!(fitting(&[], "  ", 5), "");
    }

    #[test]
    fn a_terminal_that_cannot_move_its_cursor_is_not_drawn_on() {
        assert!(is_able(Some("xterm-256color")) && is_able(Some("linux")));
        assert!(!is_able(Some("dumb")) && !is_able(Some("")) && !is_able(None));
    }
}
