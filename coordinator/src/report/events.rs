//! `events.jsonl`: what happened to a run, a line each: membership, faults, checkpoints.
//!
//! 1. A line is in the file when `append` returns; a death of the coordinator loses none that it wrote.
//! 2. Events are the coordinator's journal told to people. Those that a death kept from being written are written again
//!    from the journal, by whoever holds it; [`EventLog::last`] says where to begin.

use std::io;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::line_file::{LineFile, Watcher};

/// The open file. See the module.
pub struct EventLog {
    lines: LineFile,
    last: Option<Map<String, Value>>,
}

#[derive(Serialize)]
struct Line<'a, F> {
    time: f64,
    kind: &'a str,
    #[serde(flatten)]
    fields: F,
}

impl EventLog {
    /// Opens or creates the file and cuts a torn last line. `watcher` is shown all lines, those to come too.
    ///
    /// # Errors
    /// The file cannot be opened, or its last whole line is no event.
    pub fn open(path: &Path, watcher: Watcher) -> io::Result<Self> {
        let mut last = Vec::new();
        let lines = LineFile::open(path, watcher, |_, line| {
            last.clear();
            last.extend_from_slice(line);
            Ok(())
        })?;
        let last = match last.as_slice() {
            [] => None,
            line => serde_json::from_slice(line).map_err(|error| {
                let problem = format!("{}: the last line is no event: {error}", path.display());
                io::Error::new(io::ErrorKind::InvalidData, problem)
            })?,
        };
        Ok(EventLog { lines, last })
    }

    /// The newest event that the file had when it was opened.
    pub fn last(&self) -> Option<&Map<String, Value>> {
        self.last.as_ref()
    }

    /// Writes an event: its `time` in seconds of Unix time, its `kind`, and `fields`, a struct or a map with other keys
    /// than these two, or `()`.
    ///
    /// # Errors
    /// The file cannot be written, or `fields` cannot be JSON.
    pub fn append(&mut self, time: f64, kind: &str, fields: impl Serialize) -> io::Result<()> {
        let line = serde_json::to_vec(&Line { time, kind, fields })?;
        self.lines.append(line).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Lost {
        worker: u64,
        pid: Option<u32>,
        rate: f64,
    }

    #[test]
    fn an_event_is_a_line_with_its_fields() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::open(&path, Box::new(|_| ())).unwrap();
        assert_eq!(log.last(), None);
        let lost = Lost { worker: 2, pid: Some(77), rate: f64::NAN };
        log.append(1.5, "worker_lost", lost).unwrap();
        log.append(2.0, "finished", ()).unwrap();
        let fields = serde_json::json!({"reason": "two\nlines"});
        log.append(3.0, "stopped", fields).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"time\":1.5,\"kind\":\"worker_lost\",\"worker\":2,\"pid\":77,\"rate\":null}\n\
             {\"time\":2.0,\"kind\":\"finished\"}\n\
             {\"time\":3.0,\"kind\":\"stopped\",\"reason\":\"two\\nlines\"}\n"
        );
    }

    #[test]
    fn fields_that_have_no_names_are_refused_and_leave_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::open(&path, Box::new(|_| ())).unwrap();
        assert!(log.append(1.0, "odd", 5).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }

    /// Invariant 2: after a death in the middle of a line, the event before it is the last.
    #[test]
    fn opening_cuts_a_torn_event_and_tells_the_last_whole_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        std::fs::write(&path, "{\"time\":1.0,\"kind\":\"a\",\"id\":7}\n{\"time\":2.0,\"ki").unwrap();
        let mut log = EventLog::open(&path, Box::new(|_| ())).unwrap();
        assert_eq!(log.last().unwrap()["id"], 7);
        log.append(2.0, "b", ()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().nth(1), Some("{\"time\":2.0,\"kind\":\"b\"}"));
    }
}
