//! `events.jsonl`: the event log of a run, one line per event: membership, faults, checkpoints.
//!
//! 1. A line is in the file when `append` returns without an error; a death of the coordinator
//!    loses none that it wrote.
//! 2. Lines that cannot be written wait here, in order, and are written before later ones. Lines
//!    that do not fit here are counted, and an event reports their number.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::damage::{self, Damaged};
use super::disk::Disk;
use super::line_file::{LineFile, Sync, Watcher};

/// Maximum size of the events that wait for the disk, in bytes.
const WAITING_LIMIT: usize = 4 << 20;

/// Maximum size of a line, in bytes. A group of a thousand members takes a tenth of it.
const LINE_LIMIT: usize = 1 << 20;

/// The open `events.jsonl`. See the module documentation.
pub struct EventLog {
    lines: LineFile,
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    /// Number of events that found no room.
    dropped: u64,
}

#[derive(Serialize)]
struct Line<'a, F> {
    time: f64,
    kind: &'a str,
    #[serde(flatten)]
    fields: F,
}

/// Fields common to all events.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "time")]
    _time: f64,
    #[serde(rename = "kind", borrow)]
    _kind: std::borrow::Cow<'a, str>,
}

/// Checks that a line is an event.
pub(super) fn check(line: &[u8]) -> Result<(), serde_json::Error> {
    serde_json::from_slice::<Event<'_>>(line).map(drop)
}

impl EventLog {
    /// Opens or creates the file and cuts a torn last line. `watcher` is called for every line,
    /// including later ones.
    ///
    /// # Errors
    /// The file cannot be opened, or a whole line is not an event.
    pub fn open(path: &Path, disk: Arc<dyn Disk>, watcher: Watcher) -> Result<Self, Damaged> {
        let lines = LineFile::open(path, disk, watcher, |_, line| check(line).map_err(damage::broken));
        let lines = lines.map_err(|error| Damaged::of(path, error))?;
        Ok(EventLog { lines, waiting: VecDeque::new(), waiting_bytes: 0, dropped: 0 })
    }

    /// Writes an event: its `time` in seconds of Unix time, its `kind`, and `fields`, a struct or a
    /// map with keys other than these two, or `()`.
    ///
    /// # Errors
    /// The file cannot be written, and the event waits; or `fields` cannot be represented as JSON.
    pub fn append(&mut self, time: f64, kind: &str, fields: impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(&Line { time, kind, fields })?;
        if line.len() > LINE_LIMIT {
            let fields = serde_json::json!({ "bytes_left_out": line.len() });
            line = serde_json::to_vec(&Line { time, kind, fields })?;
        }
        if self.waiting_bytes + line.len() > WAITING_LIMIT {
            self.dropped += 1;
        } else {
            self.waiting_bytes += line.len();
            self.waiting.push_back(line);
        }
        self.catch_up(time)
    }

    /// Writes the waiting events.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn catch_up(&mut self, time: f64) -> io::Result<()> {
        while let Some(line) = self.waiting.front() {
            self.lines.append(line.clone())?;
            self.waiting_bytes -= line.len();
            self.waiting.pop_front();
        }
        if self.dropped > 0 {
            let fields = serde_json::json!({ "count": self.dropped });
            self.lines.append(serde_json::to_vec(&Line { time, kind: "events_dropped", fields })?)?;
            self.dropped = 0;
        }
        self.lines.restore()
    }

    /// Pending sync, if there is anything to sync.
    pub fn to_sync(&self) -> Option<Sync> {
        self.lines.to_sync()
    }

    /// Notes the result of a sync.
    pub fn was_synced(&mut self, sync: &Sync, done: &io::Result<()>) {
        self.lines.was_synced(sync, done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::disk::{SystemDisk, tests::FullDisk};

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
        let mut log = EventLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
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
    fn a_line_that_would_be_too_long_tells_its_length_instead() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
        log.append(1.0, "fault", serde_json::json!({ "detail": "x".repeat(LINE_LIMIT) })).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            format!("{{\"time\":1.0,\"kind\":\"fault\",\"bytes_left_out\":{}}}\n", LINE_LIMIT + 39)
        );
    }

    #[test]
    fn fields_that_have_no_names_are_refused_and_leave_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
        assert!(log.append(1.0, "odd", 5).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn opening_cuts_a_torn_event() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        std::fs::write(&path, "{\"time\":1.0,\"kind\":\"a\",\"id\":7}\n{\"time\":2.0,\"ki").unwrap();
        let mut log = EventLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
        log.append(2.0, "b", ()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().nth(1), Some("{\"time\":2.0,\"kind\":\"b\"}"));
    }

    /// Invariant 2.
    #[test]
    fn events_that_a_full_disk_refuses_are_written_later_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let disk = Arc::new(FullDisk::default());
        let mut log = EventLog::open(&path, disk.clone(), Box::new(|_| ())).unwrap();
        log.append(1.0, "a", ()).unwrap();
        disk.fill();
        assert!(log.append(2.0, "b", ()).is_err());
        let long = serde_json::json!({ "text": "x".repeat(LINE_LIMIT - 100) });
        for _ in 0..=WAITING_LIMIT / LINE_LIMIT {
            assert!(log.append(3.0, "long", &long).is_err());
        }
        disk.free();
        log.append(4.0, "c", ()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let kinds: Vec<&str> = text.lines().map(|line| line.split('"').nth(5).unwrap()).collect();
        let waited = ["long"; WAITING_LIMIT / LINE_LIMIT];
        assert_eq!(kinds, [&["a", "b"][..], &waited, &["c", "events_dropped"]].concat());
    }
}
