//! `metrics.jsonl`: one line for each reported step of a run, once each, across deaths of workers
//! and of the coordinator.
//!
//! 1. A step has at most one row. The computed part (step, images seen, sample checksum (`ledger`),
//!    losses, scores) comes first in a row; a step that is recomputed must give the same bytes
//!    there. Time, rates and the group that computed it may differ.
//! 2. A row may come after one of a later step: rows wait on their worker for an acknowledgement,
//!    which may be delayed.
//! 3. A row is durable once a sync that began after it was written has ended.
//!
//! Memory: 16 bytes a row, for an index from steps to lines; the rows themselves stay in the file.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use ganglion_proto::message::{GpuUse, Profile};
use serde::{Deserialize, Serialize};

use super::damage::{self, Damaged};
use super::disk::Disk;
use super::line_file::{LineFile, Sync, Watcher};

/// Metrics of one step, known once it is committed.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Number of the step, counted from 1.
    pub step: u64,
    /// Time at which its last phase was committed, in seconds of Unix time.
    pub time: f64,
    /// Generation that committed it.
    pub generation: u64,
    /// Number of workers in that generation.
    pub world_size: u32,
    /// The discriminator's loss, a mean over the samples of its last phase.
    pub loss_discriminator: f64,
    /// The generator's loss, a mean over the samples of its phase.
    pub loss_generator: f64,
    /// Real images taken per second, over all workers.
    pub images_per_second: f64,
    /// Real images taken since the run began.
    pub images_seen: u64,
    /// Sample checksum (`ledger`) of the state after the step: it identifies the samples committed
    /// up to it.
    pub ledger: u64,
    /// Consecutive phases skipped up to the step's end because their gradients were not finite.
    pub skipped: u64,
    /// Passes over the data since the run began.
    pub epoch: f64,
    /// Time profile of the discriminator's phases and of the generator's.
    pub profile: Option<[Profile; 2]>,
    /// Use of the reporting worker's GPU.
    pub gpu: GpuUse,
    /// Mean D outputs (scores) for real samples and for generated ones, over the discriminator's
    /// last phase; `None` if they were not recorded.
    pub scores: Option<[f64; 2]>,
}

/// Part of a row that the step determines.
#[derive(Serialize)]
struct Computed {
    step: u64,
    images_seen: u64,
    /// Printed as 16 hexadecimal digits: many readers of JSON round numbers beyond 2^53.
    ledger: String,
    #[serde(skip_serializing_if = "is_zero")]
    skipped: u64,
    loss_discriminator: f64,
    loss_generator: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    score_real: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    score_fake: Option<f64>,
}

/// Part of a row that depends on the circumstances of training, and values derived from the other part.
#[derive(Serialize)]
struct Circumstances {
    epoch: f64,
    time: f64,
    generation: u64,
    world_size: u32,
    images_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_utilisation: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<Profiles>,
}

/// Time profile of a step, in milliseconds.
#[derive(Serialize)]
struct Profiles {
    discriminator: Parts,
    generator: Parts,
}

/// Parts of a phase, in milliseconds with three decimals.
#[derive(Serialize)]
struct Parts {
    data: f64,
    compute: f64,
    wait: f64,
    commit: f64,
    other: f64,
}

impl From<Profile> for Parts {
    fn from(profile: Profile) -> Parts {
        let [data, compute, wait, commit, other] =
            [profile.data, profile.compute, profile.wait, profile.commit, profile.other]
                .map(|milliseconds| (milliseconds * 1000.0).round() / 1000.0);
        Parts { data, compute, wait, commit, other }
    }
}

/// Effect of `record`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// The row was written.
    New,
    /// Nothing was written: the step has the same row already.
    Same,
}

/// A recomputed step differs from the recorded one: the promise of equal results is broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breach {
    /// Number of the step.
    pub step: u64,
    /// Computed part of the recorded row, as JSON: step, images seen, sample checksum, losses and scores.
    pub recorded: String,
    /// Computed part of the recomputed row, as JSON.
    pub recomputed: String,
}

/// Reason why a row was not recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file cannot be written or read. The row is not in it.
    #[error("metrics.jsonl: {0}")]
    Io(#[from] io::Error),
    /// The step has another row already, which stays.
    #[error("{0}")]
    Breach(Breach),
}

/// The open `metrics.jsonl` with its index. See the module documentation.
pub struct MetricsLog {
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
    pub fn open(path: &Path, disk: Arc<dyn Disk>, watcher: Watcher) -> Result<Self, Damaged> {
        let mut index = Vec::new();
        let mut fresh = VecDeque::new();
        let lines = LineFile::open(path, disk, watcher, |offset, line| {
            let step = step_of(line).map_err(damage::broken)?;
            index.push((step, offset));
            fresh.push_back((offset + line.len() as u64 + 1, step));
            Ok(())
        })
        .map_err(|error| Damaged::of(path, error))?;
        index.sort_unstable();
        Ok(MetricsLog { lines, index, fresh })
    }

    /// Greatest recorded step.
    pub fn last_step(&self) -> Option<u64> {
        self.index.last().map(|(step, _)| *step)
    }

    /// Whether a step has a row.
    pub fn has(&self, step: u64) -> bool {
        self.index.binary_search_by_key(&step, |entry| entry.0).is_ok()
    }

    /// Least step whose row may not survive a power cut.
    pub fn first_fresh(&self) -> Option<u64> {
        self.fresh.iter().map(|(_, step)| *step).min()
    }

    /// Pending sync, if there is anything to sync.
    pub fn to_sync(&self) -> Option<Sync> {
        self.lines.to_sync()
    }

    /// Notes the result of a sync.
    pub fn was_synced(&mut self, sync: &Sync, done: &io::Result<()>) {
        self.lines.was_synced(sync, done);
        let synced = self.lines.synced();
        while self.fresh.front().is_some_and(|(end, _)| *end <= synced) {
            self.fresh.pop_front();
        }
    }

    /// Writes a row, unless its step is already recorded.
    ///
    /// # Errors
    /// [`RecordError::Breach`] if the step is recorded with another result.
    pub fn record(&mut self, row: &Row) -> Result<Recorded, RecordError> {
        let computed = row.computed();
        match self.index.binary_search_by_key(&row.step, |entry| entry.0) {
            Ok(found) => {
                let recorded = self.lines.line_at(self.index[found].1)?;
                compare(row.step, &recorded, computed).map_err(RecordError::Breach)
            }
            Err(place) => {
                let line = row.line();
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
fn compare(step: u64, recorded: &[u8], computed: String) -> Result<Recorded, Breach> {
    let rest = recorded.strip_prefix(computed.as_bytes());
    if rest.is_some_and(|rest| rest.starts_with(b",")) {
        return Ok(Recorded::Same);
    }
    let recorded = String::from_utf8_lossy(recorded);
    let part = recorded.split(",\"epoch\"").next().unwrap_or_default();
    Err(Breach { step, recorded: format!("{part}}}"), recomputed: format!("{computed}}}") })
}

impl Row {
    /// The row's line, without its newline.
    pub(super) fn line(&self) -> String {
        format!("{},{}", self.computed(), self.circumstances())
    }

    /// First part of the row's line, from its opening brace on.
    fn computed(&self) -> String {
        let mut part = to_json(&Computed {
            step: self.step,
            images_seen: self.images_seen,
            ledger: format!("{:016x}", self.ledger),
            skipped: self.skipped,
            loss_discriminator: self.loss_discriminator,
            loss_generator: self.loss_generator,
            score_real: self.scores.map(|[real, _]| real),
            score_fake: self.scores.map(|[_, fake]| fake),
        });
        part.pop();
        part
    }

    /// Second part of the row's line, up to its closing brace.
    fn circumstances(&self) -> String {
        let mut part = to_json(&Circumstances {
            epoch: self.epoch,
            time: self.time,
            generation: self.generation,
            world_size: self.world_size,
            images_per_second: self.images_per_second,
            gpu_memory_bytes: self.gpu.memory_bytes,
            gpu_utilisation: self.gpu.utilisation,
            profile: self.profile.map(|[discriminator, generator]| Profiles {
                discriminator: discriminator.into(),
                generator: generator.into(),
            }),
        });
        part.remove(0);
        part
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde hands it over so
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Renders a part as JSON. Numbers that are not finite become null.
fn to_json(part: &impl Serialize) -> String {
    serde_json::to_string(part).expect("a struct of numbers can be written as JSON")
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
pub(super) fn row_of(step: u64) -> Row {
    Row {
        step,
        time: 1_700_000_000.5,
        generation: 3,
        world_size: 2,
        loss_discriminator: 1.25,
        loss_generator: 0.1 + 0.2,
        images_per_second: 8123.4,
        images_seen: step * 64,
        ledger: 0xfeed << 32 | step,
        skipped: 0,
        epoch: 0.5,
        profile: None,
        gpu: GpuUse::default(),
        scores: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::disk::SystemDisk;
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
    fn a_row_has_every_column() {
        let (_dir, path, mut log) = log();
        assert_eq!(log.record(&row_of(10)).unwrap(), Recorded::New);
        let expected = serde_json::json!({
            "step": 10, "time": 1_700_000_000.5, "generation": 3, "world_size": 2, "loss_discriminator": 1.25,
            "loss_generator": 0.1 + 0.2, "images_per_second": 8123.4, "images_seen": 640, "ledger": "0000feed0000000a",
            "epoch": 0.5,
        });
        assert_eq!(rows(&path), [expected]);
    }

    #[test]
    fn a_measured_profile_shows_with_three_decimals_and_decides_nothing() {
        let (_dir, path, mut log) = log();
        let profile = Profile { data: 0.0, compute: 12.345_67, wait: 1.5, commit: 0.25, other: 0.1 };
        log.record(&Row { profile: Some([profile, Profile::default()]), ..row_of(1) }).unwrap();
        assert_eq!(rows(&path)[0]["profile"]["discriminator"]["compute"], 12.346);
        assert_eq!(rows(&path)[0]["profile"]["generator"]["wait"], 0.0);
        assert_eq!(log.record(&row_of(1)).unwrap(), Recorded::Same);
    }

    /// Invariant 1: a row that another worker recomputes may have another GPU's figures, or none.
    #[test]
    fn a_gpus_use_shows_where_there_is_one_and_decides_nothing() {
        let (_dir, path, mut log) = log();
        let gpu = GpuUse { memory_bytes: Some(1 << 34), utilisation: Some(97) };
        log.record(&Row { gpu, ..row_of(1) }).unwrap();
        log.record(&Row { gpu: GpuUse { utilisation: None, ..gpu }, ..row_of(2) }).unwrap();
        assert_eq!(log.record(&row_of(1)).unwrap(), Recorded::Same);
        let busier = GpuUse { utilisation: Some(98), ..gpu };
        assert_eq!(log.record(&Row { gpu: busier, ..row_of(1) }).unwrap(), Recorded::Same);
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
        let again =
            Row { time: 1_800_000_000.0, generation: 4, world_size: 1, images_per_second: 1.0, ..row_of(20) };
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
            Row { loss_generator: 0.3, ..row_of(10) },
            Row { loss_discriminator: -1.25, ..row_of(10) },
            Row { loss_discriminator: f64::NAN, ..row_of(10) },
            Row { images_seen: 64, ..row_of(10) },
            Row { ledger: 1, ..row_of(10) },
            Row { skipped: 1, ..row_of(10) },
            Row { scores: Some([0.75, 0.25]), ..row_of(10) },
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

    #[test]
    fn a_longer_number_with_the_same_beginning_is_a_breach() {
        let (_dir, _path, mut log) = log();
        log.record(&Row { loss_generator: 0.125, ..row_of(1) }).unwrap();
        let shorter = Row { loss_generator: 0.12, ..row_of(1) };
        assert!(matches!(log.record(&shorter), Err(RecordError::Breach(_))));
    }

    #[test]
    fn numbers_that_are_not_finite_are_null() {
        let (_dir, path, mut log) = log();
        let row = Row { loss_generator: f64::NAN, images_per_second: f64::INFINITY, ..row_of(1) };
        log.record(&row).unwrap();
        assert_eq!(log.record(&row).unwrap(), Recorded::Same);
        assert_eq!(rows(&path)[0]["loss_generator"], Value::Null);
        assert_eq!(rows(&path)[0]["images_per_second"], Value::Null);
    }

    #[test]
    fn skipped_phases_show_only_where_there_are_some() {
        let (_dir, path, mut log) = log();
        log.record(&Row { skipped: 3, ..row_of(1) }).unwrap();
        log.record(&row_of(2)).unwrap();
        assert_eq!(rows(&path)[0]["skipped"], 3);
        assert_eq!(rows(&path)[1].get("skipped"), None);
    }

    #[test]
    fn scores_show_where_they_were_noted_and_are_part_of_the_result() {
        let (_dir, path, mut log) = log();
        let scored = Row { scores: Some([0.75, f64::NAN]), ..row_of(1) };
        log.record(&scored).unwrap();
        assert_eq!(log.record(&scored).unwrap(), Recorded::Same);
        let other = Row { scores: Some([0.5, f64::NAN]), ..row_of(1) };
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
