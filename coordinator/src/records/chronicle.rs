//! In-memory index of a run's records for the dashboard: curves, events, checkpoints, pictures, counts.
//!
//! 1. It is built from the lines of `metrics.jsonl` and `events.jsonl`, those of earlier coordinators
//!    first, and from nothing else. So a new coordinator shows the same as the one before.
//! 2. Memory is bounded, and so is the cost of any query. A reader holds the lock for a moment
//!    only: nothing waits for a client, a file or a process with it.
//! 3. No decision depends on it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ganglion_proto::evaluation::EvaluationRow;
use ganglion_proto::record::found::Found;
use ganglion_proto::record::{
    BestCheckpoint, EventKind, EventLine, FaultKind, MetricsRow, Profile, RunEvent, SavedCheckpoint,
};
use serde::Serialize;

use super::curve::{Bucket, Curve};
use super::losses::Losses;

/// Maximum size of the events kept in memory, in bytes; older ones are in the file.
// Some ten thousand events, far more than a page shows; its memory must not grow with the run.
const EVENT_BYTES: usize = 4 << 20;
/// Maximum number of checkpoints kept.
const CHECKPOINTS: usize = 32;
/// Maximum number of evaluations kept.
const EVALUATIONS: usize = 4096;
/// Maximum number of pictures known by name.
const PICTURES: usize = 100_000;

/// Name of the picture of real samples.
pub(crate) const REAL_PICTURE: &str = "real.png";

/// Shared handle of the index; clones refer to the same one.
#[derive(Clone, Debug, Default)]
pub struct Chronicle(Arc<Mutex<Known>>);

/// Content of the index. See the module documentation.
#[derive(Debug, Default)]
pub struct Known {
    curve: Curve,
    /// The row of the greatest step.
    pub newest: Option<MetricsRow>,
    /// Number of rows so far.
    pub rows: u64,
    /// Number and line of each event kept.
    events: VecDeque<(u64, String)>,
    event_bytes: usize,
    /// Number of events so far, which is the number of the next one.
    pub event_count: u64,
    /// Time of the first event, in seconds of Unix time.
    pub begun: Option<f64>,
    /// Newest format of the records; 0 before any coordinator.
    pub format: u32,
    /// Number of events by kind.
    pub kinds: BTreeMap<String, u64>,
    /// Number of faults that workers reported, by kind.
    pub faults: BTreeMap<FaultKind, u64>,
    /// Newest checkpoints, oldest first.
    pub checkpoints: VecDeque<Timed<SavedCheckpoint>>,
    pictures: BTreeSet<u64>,
    /// Whether the samples are texts, and no pictures.
    pub writes_text: bool,
    /// Whether there is a picture of real samples.
    pub has_real: bool,
    /// Newest evaluations, by step.
    pub evaluations: BTreeMap<u64, Timed<EvaluationRow>>,
    /// The best checkpoint.
    pub best: Option<BestCheckpoint>,
    /// Active alarms by name, with their reasons.
    pub alarms: BTreeMap<String, String>,
    /// Magnitudes of the losses so far.
    pub(crate) losses: Losses,
    /// The data set as a worker found it.
    pub data: Option<Found>,
}

/// Record of an event, with the event's time in seconds of Unix time.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Timed<T> {
    pub time: f64,
    #[serde(flatten)]
    pub record: T,
}

/// Values of a row that are drawn as curves, by name.
fn series(row: &MetricsRow) -> impl Iterator<Item = (&str, f64)> {
    let fixed = [("images_per_second", row.images_per_second), ("world_size", f64::from(row.world_size))];
    let parts = Profile::default().parts().into_iter().enumerate().map(|(at, (part, _))| {
        let of_all: f64 = row.profile.iter().map(|(_, profile)| profile.parts()[at].1).sum();
        (part, if row.profile.is_empty() { f64::NAN } else { of_all })
    });
    row.scalars.iter().chain(fixed).chain(parts)
}

impl Chronicle {
    /// Locks the index. Hold the guard for a moment only: the coordinator's loop waits for it.
    pub fn look(&self) -> MutexGuard<'_, Known> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line of `metrics.jsonl`.
    pub fn row(&self, line: &[u8]) {
        // The writer has validated the line; one of another version without the fixed columns is not drawn.
        let Ok(row) = serde_json::from_slice::<MetricsRow>(line) else { return };
        let mut known = self.look();
        known.rows += 1;
        known.losses.add(&row);
        known.curve.add(row.step, row.time, series(&row));
        if known.newest.as_ref().is_none_or(|newest| newest.step < row.step) {
            known.newest = Some(row);
        }
    }

    /// Adds a line of `events.jsonl`.
    pub fn event(&self, line: &[u8]) {
        let mut known = self.look();
        let number = known.event_count;
        // Unreadable lines count as well: a number is the place of a line in the file, for this
        // coordinator and the next.
        known.event_count += 1;
        let (Ok(text), Ok(event)) = (std::str::from_utf8(line), EventLine::parse(line)) else { return };
        known.note(event);
        known.event_bytes += line.len();
        known.events.push_back((number, text.to_string()));
        // The newest one stays, however long it is.
        while known.event_bytes > EVENT_BYTES && known.events.len() > 1 {
            let gone = known.events.pop_front().map_or(0, |(_, line)| line.len());
            known.event_bytes -= gone;
        }
    }
}

impl Known {
    fn note(&mut self, EventLine { time, kind, event }: EventLine) {
        self.begun.get_or_insert(time);
        // Before its keys are looked at: an event that this version cannot read has still happened.
        *self.kinds.entry(kind).or_insert(0) += 1;
        // An event of another version is shown as it is, and says nothing else here.
        let Ok(event) = event else { return };
        match event {
            RunEvent::CoordinatorStarted { format, .. } => {
                self.format = self.format.max(format.unwrap_or(1));
            }
            RunEvent::Fault { fault, .. } => *self.faults.entry(fault).or_insert(0) += 1,
            RunEvent::Samples { step, file } => {
                self.writes_text = file.ends_with(".txt");
                self.pictures.insert(step);
                if self.pictures.len() > PICTURES {
                    self.pictures.pop_first();
                }
            }
            RunEvent::RealSamples { .. } => self.has_real = true,
            RunEvent::Checkpoint(checkpoint) => {
                // A step that was computed again is saved again.
                self.checkpoints.retain(|known| known.record.step != checkpoint.step);
                self.checkpoints.push_back(Timed { time, record: checkpoint });
                if self.checkpoints.len() > CHECKPOINTS {
                    self.checkpoints.pop_front();
                }
            }
            RunEvent::Data { found } => self.data = Some(found),
            RunEvent::Evaluation(row) => {
                self.evaluations.insert(row.step, Timed { time, record: row });
                if self.evaluations.len() > EVALUATIONS {
                    self.evaluations.pop_first();
                }
            }
            RunEvent::BestCheckpoint(best) => self.best = Some(best),
            RunEvent::Alarm { alarm, detail, .. } => drop(self.alarms.insert(alarm, detail)),
            RunEvent::AlarmOver { alarm, .. } => drop(self.alarms.remove(&alarm)),
            _ => {}
        }
    }

    /// Rows from a step on, as at most `points` + 1 buckets.
    pub fn curve(&self, from: u64, points: usize) -> Vec<Bucket> {
        self.curve.since(from, points)
    }

    /// Events from a number on with their numbers, at most `limit` and at most about `bytes` of them.
    pub fn events(&self, from: u64, limit: usize, bytes: usize) -> Vec<(u64, String)> {
        // Numbers are in order, so a poll for new events costs a search and not a scan.
        let start = self.events.partition_point(|(number, _)| *number < from);
        let mut size = 0;
        let fits = |(_, line): &&(u64, String)| {
            let fits = size < bytes;
            size += line.len();
            fits
        };
        self.events.range(start..).take(limit).take_while(fits).cloned().collect()
    }

    /// Number of the oldest event kept.
    pub fn first_event(&self) -> u64 {
        self.events.front().map_or(self.event_count, |(number, _)| *number)
    }

    /// Steps that have samples, at most `limit` of them: the first, the newest, and some between.
    pub fn pictures(&self, limit: usize) -> Vec<u64> {
        let all: Vec<u64> = self.pictures.iter().copied().collect();
        if all.len() <= limit || limit < 2 {
            return all.into_iter().rev().take(limit).rev().collect();
        }
        (0..limit).map(|at| all[at * (all.len() - 1) / (limit - 1)]).collect()
    }

    /// Names of the curves' series.
    pub fn series(&self) -> &[String] {
        self.curve.names()
    }

    /// Number of events of a kind.
    pub fn count(&self, kind: EventKind) -> u64 {
        self.kinds.get(kind.name()).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::disk::SystemDisk;
    use crate::records::events::EventLog;
    use crate::records::metrics::{MetricsLog, row_of, scored};

    /// Invariant 1: lines that were there and lines that are added are taken alike.
    #[test]
    fn the_files_tell_the_same_before_and_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let open = |chronicle: &Chronicle| {
            let (rows, events) = (chronicle.clone(), chronicle.clone());
            let disk = || Arc::new(SystemDisk);
            let metrics =
                MetricsLog::open(&path("metrics.jsonl"), disk(), Box::new(move |line| rows.row(line)));
            let events =
                EventLog::open(&path("events.jsonl"), disk(), Box::new(move |line| events.event(line)));
            (metrics.unwrap(), events.unwrap())
        };
        let first = Chronicle::default();
        let (mut metrics, mut events) = open(&first);
        for step in 1..=3 {
            metrics.record(&MetricsRow { scalars: scored(0.75, 0.25), ..row_of(step * 10) }).unwrap();
        }
        let (detail, fault) = (String::new(), FaultKind::Peer);
        events.append(1.0, &RunEvent::Fault { detail, fault, generation: 1, worker: 1 }).unwrap();
        let saved =
            SavedCheckpoint { step: 20, state_digest: "ab".to_string(), ..SavedCheckpoint::default() };
        events.append(2.0, &RunEvent::Checkpoint(saved)).unwrap();
        events.append(3.0, &RunEvent::Samples { file: String::new(), step: 20 }).unwrap();
        let again = Chronicle::default();
        let (mut metrics, _events) = open(&again);
        for chronicle in [&first, &again] {
            let known = chronicle.look();
            assert_eq!((known.rows, known.event_count, known.begun), (3, 3, Some(1.0)));
            assert_eq!((known.count(EventKind::Fault), known.faults.get(&FaultKind::Peer)), (1, Some(&1)));
            assert_eq!(known.checkpoints[0].record.state_digest, "ab");
            assert_eq!(known.pictures(10), [20]);
            assert_eq!(
                (known.series()[2].as_str(), known.curve(0, 10)[2].series[2].mean()),
                ("score_real", Some(0.75))
            );
            assert_eq!(known.newest.as_ref().map(|row| row.step), Some(30));
        }
        // A row that is already recorded adds no line.
        metrics.record(&row_of(40)).unwrap();
        metrics.record(&row_of(40)).unwrap();
        assert_eq!(again.look().rows, 4);
    }

    #[test]
    fn evaluations_the_best_checkpoint_and_alarms_are_known() {
        let chronicle = Chronicle::default();
        let tell = |line: &str| chronicle.event(line.as_bytes());
        for (step, distance) in [(20, "2.5"), (10, "null")] {
            tell(&format!(
                r#"{{"time":1.0,"kind":"evaluation","step":{step},"metrics":{{"kid":{distance}}},"features":"f","seconds":0.5}}"#
            ));
        }
        tell(
            r#"{"time":2.0,"kind":"best_checkpoint","step":20,"folder":"step-00000020","metric":"kid","value":2.5}"#,
        );
        tell(r#"{"time":3.0,"kind":"alarm","alarm":"collapse","step":20,"detail":"why"}"#);
        {
            let known = chronicle.look();
            let told: Vec<_> = known
                .evaluations
                .values()
                .map(|line| (line.record.step, line.record.get("kid").unwrap()))
                .collect();
            assert!(told[0].0 == 10 && told[0].1.is_nan());
            assert_eq!(told[1], (20, 2.5));
            assert_eq!(known.best.as_ref().map(|best| best.step), Some(20));
            assert_eq!(known.alarms.get("collapse").map(String::as_str), Some("why"));
        }
        tell(r#"{"time":4.0,"kind":"alarm_over","alarm":"collapse","step":30}"#);
        assert!(chronicle.look().alarms.is_empty());
    }

    #[test]
    fn the_data_set_is_known_as_it_was_found() {
        let chronicle = Chronicle::default();
        let mut found = Found { samples: 5, ..Found::default() };
        found.leave_out(".gif", "a.gif");
        let line = serde_json::json!({ "time": 1.0, "kind": "data", "found": found });
        chronicle.event(line.to_string().as_bytes());
        chronicle.event(br#"{"time":2.0,"kind":"data","found":5}"#);
        assert_eq!(chronicle.look().data.as_ref(), Some(&found));
    }

    /// Invariant 2.
    #[test]
    fn events_come_in_pages_and_the_oldest_go() {
        let chronicle = Chronicle::default();
        let filler = "x".repeat(1000);
        for time in 0..10_000 {
            chronicle.event(format!(r#"{{"time":{time}.0,"kind":"a","filler":"{filler}"}}"#).as_bytes());
        }
        let known = chronicle.look();
        assert!(known.event_bytes <= EVENT_BYTES && known.event_bytes > EVENT_BYTES / 2);
        assert_eq!((known.event_count, known.kinds["a"]), (10_000, 10_000));
        let page = known.events(0, 5, usize::MAX);
        assert_eq!(page.len(), 5);
        assert_eq!(page[0].0, known.first_event());
        assert!(page[0].0 > 0, "the oldest are gone");
        assert_eq!(known.events(9_998, 5, usize::MAX).len(), 2);
        assert_eq!(known.events(0, 1000, 2500).len(), 3);
        assert!(known.events(10_000, 5, usize::MAX).is_empty());
    }

    #[test]
    fn many_pictures_are_told_by_some_of_them() {
        let chronicle = Chronicle::default();
        (1..=1000).for_each(|step| {
            chronicle.event(format!(r#"{{"time":1.0,"kind":"samples","step":{step}}}"#).as_bytes());
        });
        let some = chronicle.look().pictures(11);
        assert_eq!((some.len(), some[0], some[10]), (11, 1, 1000));
        assert_eq!(chronicle.look().pictures(5000).len(), 1000);
    }

    #[test]
    fn lines_that_say_something_else_are_passed_over() {
        let chronicle = Chronicle::default();
        for line in ["", "{", "[]", "{}", r#"{"time":"x","kind":5}"#, "\u{0}"] {
            chronicle.event(line.as_bytes());
            chronicle.row(line.as_bytes());
        }
        let known = chronicle.look();
        assert_eq!((known.event_count, known.events.len()), (6, 0));
    }
}
