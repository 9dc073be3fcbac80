//! `metrics.jsonl`: one line for each reported step of a run, once each, across deaths of workers
//! and of the coordinator.
//!
//! 1. A step has at most one row. The computed part (step, images seen, sample checksum (`ledger`),
//!    scalars) comes first in a row; a step that is recomputed must give the same bytes there, but for
//!    scalars that one of two builds does not report. Time, rates and the group that computed it may
//!    differ.
//! 2. A row may come after one of a later step: rows wait on their worker for an acknowledgement,
//!    which may be delayed.
//! 3. A row is durable once a sync that began after it was written has ended.
//!
//! Memory: 16 bytes a row, for an index from steps to lines; the rows themselves stay in the file.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use ganglion_proto::record::MetricsRow;
use serde::Deserialize;

use super::damage::{self, Damaged};
use super::disk::Disk;
use super::line_file::{LineFile, Sync, Watcher};

/// Effect of `record`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    /// The row was written.
    New,
    /// Nothing was written: the step has the same row already.
    Same,
}

/// A recomputed step differs from the recorded one: the promise of equal results is broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Breach {
    /// Number of the step.
    pub step: u64,
    /// Computed part of the recorded row, as JSON: step, images seen, sample checksum, scalars.
    pub recorded: String,
    /// Computed part of the recomputed row, as JSON.
    pub recomputed: String,
}

/// Reason why a row was not recorded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// The file cannot be written or read. The row is not in it.
    #[error("metrics.jsonl: {0}")]
    Io(#[from] io::Error),
    /// The step has another row already, which stays.
    #[error("{0}")]
    Breach(Breach),
}

/// The open `metrics.jsonl` with its index. See the module documentation.
pub(crate) struct MetricsLog {
    lines: LineFile,
    /// Recorded steps and the offsets of their lines in bytes, ordered by step.
    index: Vec<(u64, u64)>,
    /// End offset and step of each row that may not survive a power cut, in the order of the file.
    fresh: VecDeque<(u64, u64)>,
}

/// Parses a row's step; fails on lines without one.
#[derive(Deserialize)]
struct Stepped {
    step: u64,
}

/// Returns the step of a line if it is a row of metrics.
pub(super) fn step_of(line: &[u8]) -> Result<u64, serde_json::Error> {
    serde_json::from_slice(line).map(|row: Stepped| row.step)
}

impl MetricsLog {
    /// Opens or creates the file, cuts a torn last line and indexes its steps. `watcher` is called
    /// for every line, including later ones.
    ///
    /// # Errors
    /// The file cannot be opened, or a line that is whole is no row of metrics.
    pub(crate) fn open(path: &Path, disk: Arc<dyn Disk>, watcher: Watcher) -> Result<Self, Damaged> {
        let mut index = Vec::new();
        let mut fresh = VecDeque::new();
        let lines = LineFile::open(path, disk, watcher, |offset, line| {
            let step = step_of(line).map_err(damage::broken)?;
            index.push((step, offset));
            fresh.push_back((offset + line.len() as u64 + 1, step));
            Ok(())
        })
        .map_err(|error| Damaged::of(path, error))?;
        // Rows may be out of order in the file (2).
        index.sort_unstable();
        Ok(MetricsLog { lines, index, fresh })
    }

    /// Greatest recorded step.
    pub(crate) fn last_step(&self) -> Option<u64> {
        self.index.last().map(|(step, _)| *step)
    }

    /// Whether a step has a row.
    pub(crate) fn has(&self, step: u64) -> bool {
        self.index.binary_search_by_key(&step, |entry| entry.0).is_ok()
    }

    /// Least step whose row may not survive a power cut.
    pub(crate) fn first_fresh(&self) -> Option<u64> {
        self.fresh.iter().map(|(_, step)| *step).min()
    }

    /// Pending sync, if there is anything to sync.
    pub(crate) fn to_sync(&self) -> Option<Sync> {
        self.lines.to_sync()
    }

    /// Notes the result of a sync.
    pub(crate) fn was_synced(&mut self, sync: &Sync, done: &io::Result<()>) {
        self.lines.was_synced(sync, done);
        let synced = self.lines.synced();
        // In the order of the file, which is the order in which bytes become durable; steps may be in
        // another.
        while self.fresh.front().is_some_and(|(end, _)| *end <= synced) {
            self.fresh.pop_front();
        }
    }

    /// Writes a row, unless its step is already recorded.
    ///
    /// # Errors
    /// [`RecordError::Breach`] if the step is recorded with another result.
    pub(crate) fn record(&mut self, row: &MetricsRow) -> Result<Recorded, RecordError> {
        let line = row.line();
        match self.index.binary_search_by_key(&row.step, |entry| entry.0) {
            Ok(found) => {
                // Read from the file: keeping all rows in memory would grow with the run.
                let recorded = self.lines.line_at(self.index[found].1)?;
                compare(row.step, &recorded, &line).map_err(RecordError::Breach)
            }
            Err(place) => {
                let length = line.len() as u64 + 1;
                let offset = self.lines.append(line.into_bytes())?;
                self.index.insert(place, (row.step, offset));
                self.fresh.push_back((offset + length, row.step));
                Ok(Recorded::New)
            }
        }
    }
}

/// Compares a recomputed row with the recorded line as bytes: a number read back from text need not
/// be the same.
fn compare(step: u64, recorded: &[u8], recomputed: &str) -> Result<Recorded, Breach> {
    let recorded = String::from_utf8_lossy(recorded);
    // Without times and rates, which differ each time (M13).
    let parts = [&recorded, recomputed].map(MetricsRow::computed);
    if parts[0] == parts[1] || agree(parts) {
        return Ok(Recorded::Same);
    }
    let [recorded, recomputed] = parts.map(|part| format!("{part}}}"));
    Err(Breach { step, recorded, recomputed })
}

/// Whether the computed parts of two builds agree: they have the same fixed columns, and the same bytes
/// for every scalar that both report.
fn agree([one, other]: [&str; 2]) -> bool {
    let [one, other] = [columns(one), columns(other)];
    let is_fixed = |name: &str| MetricsRow::FIELDS.iter().any(|field| field.name == name);
    one.keys().chain(other.keys()).all(|name| match (one.get(name), other.get(name)) {
        (Some(one), Some(other)) => one == other,
        _ => !is_fixed(name),
    })
}

/// Columns of a computed part, as written.
fn columns(part: &str) -> BTreeMap<&str, &str> {
    // Numbers and hexadecimal digits alone: no value has a comma or a colon.
    let entries = part.trim_start_matches('{').split(',').filter_map(|entry| entry.split_once(':'));
    entries.map(|(name, value)| (name.trim_matches('"'), value)).collect()
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "step {} was recomputed with another result: recorded {}, recomputed {}",
            self.step, self.recorded, self.recomputed
        )
    }
}

#[cfg(test)]
pub(super) fn row_of(step: u64) -> MetricsRow {
    MetricsRow {
        step,
        images_seen: step * 64,
        ledger: 0xfeed << 32 | step,
        scalars: losses(1.25, 0.1 + 0.2),
        epoch: 0.5,
        time: 1_700_000_000.5,
        generation: 3,
        world_size: 2,
        images_per_second: 8123.4,
        ..MetricsRow::default()
    }
}

#[cfg(test)]
fn losses(discriminator: f64, generator: f64) -> ganglion_proto::record::Scalars {
    [("loss_discriminator", discriminator), ("loss_generator", generator)].into_iter().collect()
}

#[cfg(test)]
pub(super) fn scored(real: f64, fake: f64) -> ganglion_proto::record::Scalars {
    let losses = losses(1.25, 0.1 + 0.2);
    losses.iter().chain([("score_real", real), ("score_fake", fake)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::disk::SystemDisk;
    use ganglion_proto::record::Profile;
    use serde_json::Value;

    fn log() -> (tempfile::TempDir, std::path::PathBuf, MetricsLog) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let log = MetricsLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
        (dir, path, log)
    }

    fn rows(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_row_is_a_line_with_every_column() {
        let (_dir, path, mut log) = log();
        assert_eq!(log.record(&row_of(10)).unwrap(), Recorded::New);
        let expected = concat!(
            r#"{"step":10,"images_seen":640,"ledger":"0000feed0000000a","loss_discriminator":1.25,"#,
            r#""loss_generator":0.30000000000000004,"epoch":0.5,"time":1700000000.5,"generation":3,"#,
            r#""world_size":2,"images_per_second":8123.4}"#,
            "\n",
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    }

    #[test]
    fn a_measured_profile_shows_with_three_decimals_and_decides_nothing() {
        let (_dir, path, mut log) = log();
        let profile = Profile { data: 0.0, compute: 12.345_67, wait: 1.5, commit: 0.25, other: 0.1 };
        let profile = [("discriminator", profile), ("generator", Profile::default())].into_iter().collect();
        log.record(&MetricsRow { profile, ..row_of(1) }).unwrap();
        assert_eq!(rows(&path)[0]["profile"]["discriminator"]["compute"], 12.346);
        assert_eq!(rows(&path)[0]["profile"]["generator"]["wait"], 0.0);
        assert_eq!(log.record(&row_of(1)).unwrap(), Recorded::Same);
    }

    /// Invariant 1: a row that another worker recomputes may have another GPU's figures, or none.
    #[test]
    fn a_gpus_use_shows_where_there_is_one_and_decides_nothing() {
        let (_dir, path, mut log) = log();
        let gpu = |utilisation| MetricsRow {
            gpu_memory_bytes: Some(1 << 34),
            gpu_utilisation: utilisation,
            ..row_of(1)
        };
        log.record(&gpu(Some(97))).unwrap();
        log.record(&MetricsRow { step: 2, ..gpu(None) }).unwrap();
        assert_eq!(log.record(&row_of(1)).unwrap(), Recorded::Same);
        assert_eq!(log.record(&gpu(Some(98))).unwrap(), Recorded::Same);
        let rows = rows(&path);
        assert_eq!(
            (&rows[0]["gpu_memory_bytes"], &rows[0]["gpu_utilisation"]),
            (&(1_u64 << 34).into(), &97.into())
        );
        assert_eq!(rows[1].get("gpu_utilisation"), None);
    }

    /// Invariant 1, also across a restart.
    #[test]
    fn a_recomputed_row_is_not_written_twice() {
        let (_dir, path, mut log) = log();
        for step in [10, 20, 30] {
            log.record(&row_of(step)).unwrap();
        }
        let again = MetricsRow {
            time: 1_800_000_000.0,
            generation: 4,
            world_size: 1,
            images_per_second: 1.0,
            ..row_of(20)
        };
        assert_eq!(log.record(&again).unwrap(), Recorded::Same);
        let mut log = MetricsLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
        assert_eq!(log.record(&again).unwrap(), Recorded::Same);
        assert_eq!(log.record(&row_of(40)).unwrap(), Recorded::New);
        assert_eq!(log.last_step(), Some(40));
        assert_eq!(rows(&path).len(), 4);
    }

    /// Invariant 1: one unit in the last place is a difference, and the recorded row stays.
    #[test]
    fn a_different_row_is_a_breach() {
        let (_dir, path, mut log) = log();
        log.record(&row_of(10)).unwrap();
        let other = [
            MetricsRow { scalars: losses(1.25, 0.3), ..row_of(10) },
            MetricsRow { scalars: losses(-1.25, 0.1 + 0.2), ..row_of(10) },
            MetricsRow { scalars: losses(f64::NAN, 0.1 + 0.2), ..row_of(10) },
            MetricsRow { images_seen: 64, ..row_of(10) },
            MetricsRow { ledger: 1, ..row_of(10) },
            MetricsRow { skipped: 1, ..row_of(10) },
            MetricsRow {
                scalars: losses(1.25, 0.3).iter().chain([("score_real", 0.5)]).collect(),
                ..row_of(10)
            },
        ];
        for row in other {
            let RecordError::Breach(breach) = log.record(&row).unwrap_err() else {
                panic!("not a breach");
            };
            assert_eq!(breach.step, 10);
            assert_ne!(breach.recorded, breach.recomputed);
            let recorded: Value = serde_json::from_str(&breach.recorded).unwrap();
            assert_eq!(recorded["loss_discriminator"], 1.25);
            serde_json::from_str::<Value>(&breach.recomputed).unwrap();
        }
        assert_eq!(rows(&path).len(), 1);
    }

    /// Invariant 1: a run goes on with a later build, and with the one before again.
    #[test]
    fn a_scalar_that_only_one_build_reports_is_no_breach() {
        let (_dir, path, mut log) = log();
        let later = |step| MetricsRow { scalars: scored(0.75, f64::NAN), ..row_of(step) };
        log.record(&row_of(10)).unwrap();
        assert_eq!(log.record(&later(10)).unwrap(), Recorded::Same);
        log.record(&later(20)).unwrap();
        assert_eq!(log.record(&row_of(20)).unwrap(), Recorded::Same);
        assert_eq!(rows(&path)[0].get("score_real"), None, "the recorded row stays");
    }

    #[test]
    fn a_longer_number_with_the_same_beginning_is_a_breach() {
        let (_dir, _path, mut log) = log();
        log.record(&MetricsRow { scalars: losses(1.25, 0.125), ..row_of(1) }).unwrap();
        let shorter = MetricsRow { scalars: losses(1.25, 0.12), ..row_of(1) };
        assert!(matches!(log.record(&shorter), Err(RecordError::Breach(_))));
    }

    #[test]
    fn numbers_that_are_not_finite_are_null() {
        let (_dir, path, mut log) = log();
        let row =
            MetricsRow { scalars: losses(1.25, f64::NAN), images_per_second: f64::INFINITY, ..row_of(1) };
        log.record(&row).unwrap();
        assert_eq!(log.record(&row).unwrap(), Recorded::Same);
        assert_eq!(rows(&path)[0]["loss_generator"], Value::Null);
        assert_eq!(rows(&path)[0]["images_per_second"], Value::Null);
    }

    #[test]
    fn skipped_phases_show_only_where_there_are_some() {
        let (_dir, path, mut log) = log();
        log.record(&MetricsRow { skipped: 3, ..row_of(1) }).unwrap();
        log.record(&row_of(2)).unwrap();
        assert_eq!(rows(&path)[0]["skipped"], 3);
        assert_eq!(rows(&path)[1].get("skipped"), None);
    }

    #[test]
    fn scores_show_where_they_were_noted_and_are_part_of_the_result() {
        let (_dir, path, mut log) = log();
        let noted = MetricsRow { scalars: scored(0.75, f64::NAN), ..row_of(1) };
        log.record(&noted).unwrap();
        assert_eq!(log.record(&noted).unwrap(), Recorded::Same);
        let other = MetricsRow { scalars: scored(0.5, f64::NAN), ..row_of(1) };
        assert!(matches!(log.record(&other), Err(RecordError::Breach(_))));
        assert_eq!(
            (&rows(&path)[0]["score_real"], &rows(&path)[0]["score_fake"]),
            (&0.75.into(), &Value::Null)
        );
    }

    /// Invariant 2.
    #[test]
    fn a_late_row_is_recorded() {
        let (_dir, path, mut log) = log();
        for step in [10, 30, 20] {
            assert_eq!(log.record(&row_of(step)).unwrap(), Recorded::New);
        }
        let mut log = MetricsLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
        for step in [10, 20, 30] {
            assert_eq!(log.record(&row_of(step)).unwrap(), Recorded::Same);
        }
        assert_eq!(log.last_step(), Some(30));
    }

    #[test]
    fn a_torn_row_is_written_again_and_a_damaged_one_is_named() {
        let (_dir, path, mut log) = log();
        log.record(&row_of(1)).unwrap();
        log.record(&row_of(2)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        let mut log = MetricsLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).unwrap();
        assert_eq!(log.record(&row_of(2)).unwrap(), Recorded::New);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);

        std::fs::write(&path, format!("{text}garbage\n")).unwrap();
        let error = MetricsLog::open(&path, Arc::new(SystemDisk), Box::new(|_| ())).err().unwrap();
        assert!(matches!(error, Damaged::Lines(file) if file == path));
    }
}
