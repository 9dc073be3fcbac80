//! Damage to diagnostic records: detection, and replacement by a file with the readable lines.
//!
//! 1. Nothing is overwritten: the file as it was found stays under an unused name, such as
//!    `metrics.jsonl.damaged-1`.
//! 2. Each readable line is in the new file, in its order.
//! 3. The journal has the loss before the file changes.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use ganglion_proto::words::{are, counted};
use ganglion_storage::whole;
use serde::{Deserialize, Serialize};

use super::{events, metrics};

/// Reason why a record cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Damaged {
    /// A whole line is not one of ours.
    #[error("{}: damaged", .0.display())]
    Lines(PathBuf),
    /// Error of the system.
    #[error("{}: {}", .0.display(), .1)]
    Io(PathBuf, io::Error),
}

impl Damaged {
    /// Whether the user can mend it: another run directory would do. False where this one only
    /// lacks room.
    pub fn is_mistake(&self) -> bool {
        matches!(self, Damaged::Io(_, error) if whole::is_mistake(error))
    }

    /// Classifies an error that occurred while a file was read.
    pub(super) fn of(path: &Path, error: io::Error) -> Damaged {
        match error.kind() {
            ErrorKind::InvalidData => Damaged::Lines(path.to_path_buf()),
            _ => Damaged::Io(path.to_path_buf(), error),
        }
    }
}

/// Wraps a parse error of a line as a read error.
pub(super) fn broken(error: serde_json::Error) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

/// Report of a record that was set aside, with its losses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAside {
    /// Name of the record, such as `metrics.jsonl`.
    pub file: String,
    /// Name under which the damaged file was kept; empty where there was no file.
    pub aside: String,
    /// Number of readable lines.
    pub kept: u64,
    /// Number of damaged places.
    pub lost: u64,
    /// Steps whose rows may have been lost: the first and the last of each range.
    pub steps: Vec<(u64, u64)>,
}

impl SetAside {
    /// Report of a record that is missing as a whole, with the rows up to a step.
    pub fn gone(file: &str, step: u64) -> SetAside {
        let steps = if file == "metrics.jsonl" { vec![(1, step)] } else { Vec::new() };
        SetAside { file: file.to_string(), steps, ..SetAside::default() }
    }

    /// Message for the user.
    pub fn describe(&self) -> String {
        let SetAside { file, aside, kept, lost, .. } = self;
        if aside.is_empty() {
            return format!(
                "{file} is missing; a new one begins, and what it held cannot be proven any more"
            );
        }
        if file == "journal.sqlite" {
            let (rows, verb) = (counted(*kept, "row"), are(*kept));
            return format!("{file} was damaged: set aside as {aside}; {rows} of it {verb} kept");
        }
        let (places, lines, verb) = (counted(*lost, "place"), counted(*kept, "line"), are(*kept));
        format!("{file} was damaged in {places}: set aside as {aside}; {lines} of it {verb} kept")
    }
}

/// Examines a damaged record. Lost rows at its end are assumed to reach up to `reach`.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn examine(path: &Path, reach: u64) -> io::Result<SetAside> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut found = SetAside { aside: free_name(path), ..SetAside::gone(&name, 0) };
    found.steps.clear();
    let (mut newest, mut open) = (0, false);
    for line in lines(&fs::read(path)?) {
        let Some(step) = read_line(&name, line) else {
            found.lost += 1;
            open = true;
            continue;
        };
        found.kept += 1;
        // The gap between the readable neighbours is all that can have been lost in that place.
        if std::mem::take(&mut open) && newest + 1 < step {
            found.steps.push((newest + 1, step - 1));
        }
        newest = step.max(newest);
    }
    if open && name == "metrics.jsonl" && newest < reach {
        found.steps.push((newest + 1, reach));
    }
    Ok(found)
}

/// Sets a damaged record aside and puts one with its readable lines in its place.
///
/// # Errors
/// Error of the system; the record is then unchanged, or already replaced.
pub(crate) fn set_aside(path: &Path, found: &SetAside) -> io::Result<()> {
    let content = fs::read(path)?;
    let aside = path.with_file_name(&found.aside);
    // A hard link where the file system supports it, since it replaces nothing.
    match fs::hard_link(path, &aside) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Err(error),
        Err(_) => whole::create(&aside, &content, 0o666)?,
        Ok(()) => {}
    }
    let mut kept = Vec::with_capacity(content.len());
    for line in lines(&content).filter(|line| read_line(&found.file, line).is_some()) {
        kept.extend_from_slice(line);
        kept.push(b'\n');
    }
    whole::write(path, &kept)
}

/// Whole lines of a file.
fn lines(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    let end = content.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
    content[..end].split(|byte| *byte == b'\n').filter(move |_| end > 0)
}

/// Step of a record's line, 0 for an event; `None` if the line is not one of ours.
fn read_line(name: &str, line: &[u8]) -> Option<u64> {
    match name {
        "metrics.jsonl" => metrics::step_of(line).ok(),
        _ => events::check(line).ok().map(|()| 0),
    }
}

/// Unused name next to a file.
pub(crate) fn free_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let names = (1_u32..).map(|number| format!("{name}.damaged-{number}"));
    let mut free = names.filter(|name| !path.with_file_name(name).exists());
    free.next().expect("a folder has fewer files than there are numbers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_read_is_kept_and_what_was_there_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let row = |step: u64| format!("{{\"step\":{step}}}\n");
        let text: String = [2, 4, 6, 8, 10, 12].map(row).concat();
        // Two rows and the newline between them; then the whole end.
        let mut damaged = text.clone().into_bytes();
        damaged[15..25].fill(0);
        damaged.extend_from_slice(b"\0\0\0\n");
        std::fs::write(folder.path().join("metrics.jsonl.damaged-1"), "before").unwrap();
        std::fs::write(&path, &damaged).unwrap();
        let found = examine(&path, 20).unwrap();
        assert_eq!((found.kept, found.lost, found.aside.as_str()), (4, 2, "metrics.jsonl.damaged-2"));
        assert_eq!(found.steps, [(3, 7), (13, 20)]);
        set_aside(&path, &found).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), [2, 8, 10, 12].map(row).concat());
        assert!(fs::read(path.with_file_name(&found.aside)).unwrap() == damaged);
        assert_eq!(fs::read_to_string(folder.path().join("metrics.jsonl.damaged-1")).unwrap(), "before");
    }
}
