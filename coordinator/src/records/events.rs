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

use ganglion_proto::record::{EventLine, RunEvent};

use super::damage::{self, Damaged};
use super::disk::Disk;
use super::line_file::{LineFile, Sync, Watcher};

/// Maximum size of the events that wait for the disk, in bytes.
const WAITING_LIMIT: usize = 4 << 20;

/// Maximum size of a line, in bytes. A group of a thousand members takes a tenth of it.
const LINE_LIMIT: usize = 1 << 20;

/// The open `events.jsonl`. See the module documentation.
pub(crate) struct EventLog {
    lines: LineFile,
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    /// Number of events that found no room.
    dropped: u64,
}

/// Checks that a line is an event.
pub(super) fn check(line: &[u8]) -> Result<(), serde_json::Error> {
    EventLine::parse(line).map(drop)
}

impl EventLog {
    /// Opens or creates the file and cuts a torn last line. `watcher` is called for every line,
    /// including later ones.
    ///
    /// # Errors
    /// The file cannot be opened, or a whole line is not an event.
    pub(crate) fn open(path: &Path, disk: Arc<dyn Disk>, watcher: Watcher) -> Result<Self, Damaged> {
        let lines = LineFile::open(path, disk, watcher, |_, line| check(line).map_err(damage::broken));
        let lines = lines.map_err(|error| Damaged::of(path, error))?;
        Ok(EventLog { lines, waiting: VecDeque::new(), waiting_bytes: 0, dropped: 0 })
    }

    /// Writes an event with its `time` in seconds of Unix time.
    ///
    /// # Errors
    /// The file cannot be written, and the event waits.
    pub(crate) fn append(&mut self, time: f64, event: &RunEvent) -> io::Result<()> {
        let line = event.line(time, LINE_LIMIT);
        // A disk that stays full for days must not fill the memory.
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
    pub(crate) fn catch_up(&mut self, time: f64) -> io::Result<()> {
        while let Some(line) = self.waiting.front() {
            // Cloned, since a line that cannot be written stays at the front.
            self.lines.append(line.clone())?;
            self.waiting_bytes -= line.len();
            self.waiting.pop_front();
        }
        // After the waiting ones: the number stands where the gap is.
        if self.dropped > 0 {
            let dropped = RunEvent::EventsDropped { count: self.dropped };
            self.lines.append(dropped.line(time, LINE_LIMIT))?;
            self.dropped = 0;
        }
        self.lines.restore()
    }

    /// Pending sync, if there is anything to sync.
    pub(crate) fn to_sync(&self) -> Option<Sync> {
        self.lines.to_sync()
    }

    /// Notes the result of a sync.
    pub(crate) fn was_synced(&mut self, sync: &Sync, done: &io::Result<()>) {
        self.lines.was_synced(sync, done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::disk::{SystemDisk, tests::FullDisk};
    use ganglion_proto::record::EventKind;

    fn refused(worker: u64) -> RunEvent {
        RunEvent::WorkerRefused { reason: "two\nlines".to_string(), worker }
    }

    #[test]
    fn an_event_is_a_line_with_its_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
        log.append(1.5, &refused(2)).unwrap();
        log.append(2.0, &RunEvent::Staying {}).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"time\":1.5,\"kind\":\"worker_refused\",\"reason\":\"two\\nlines\",\"worker\":2}\n\
             {\"time\":2.0,\"kind\":\"staying\"}\n"
        );
    }

    #[test]
    fn opening_cuts_a_torn_event() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        std::fs::write(&path, "{\"time\":1.0,\"kind\":\"a\",\"id\":7}\n{\"time\":2.0,\"ki").unwrap();
        let mut log = EventLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
        log.append(2.0, &RunEvent::Staying {}).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().nth(1), Some("{\"time\":2.0,\"kind\":\"staying\"}"));
    }

    /// Invariant 2.
    #[test]
    fn events_that_a_full_disk_refuses_are_written_later_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let disk = Arc::new(FullDisk::default());
        let mut log = EventLog::open(&path, disk.clone(), Box::new(|_| ())).unwrap();
        log.append(1.0, &refused(1)).unwrap();
        disk.fill();
        assert!(log.append(2.0, &refused(2)).is_err());
        let long = RunEvent::MetricsBreach { detail: "x".repeat(LINE_LIMIT - 100) };
        for _ in 0..=WAITING_LIMIT / LINE_LIMIT {
            assert!(log.append(3.0, &long).is_err());
        }
        disk.free();
        log.append(4.0, &refused(4)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let kinds: Vec<EventKind> = text
            .lines()
            .map(|line| EventLine::parse(line.as_bytes()).unwrap().event.unwrap().kind())
            .collect();
        let waited = [EventKind::MetricsBreach; WAITING_LIMIT / LINE_LIMIT];
        let refused = [EventKind::WorkerRefused; 2];
        assert_eq!(
            kinds,
            [&refused[..], &waited, &[EventKind::WorkerRefused, EventKind::EventsDropped]].concat()
        );
    }
}
