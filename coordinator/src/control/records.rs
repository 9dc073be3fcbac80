//! Records of a run for its users: metrics, events, TensorBoard, pictures, progress, a timeline.
//!
//! 1. A row is acknowledged only once it is durable, and all rows before it are; until then it
//!    waits here or with the workers.
//! 2. A failure to write a record never stops the run. It is reported once, and once more when
//!    writing works again.
//! 3. The loop does not wait for the disk: it writes, and a thread syncs the files, within about a
//!    second. A checkpoint is journaled once the rows up to its step are durable.

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ganglion_membership::{Checkpoint, Outcome, Position, StepShape};
use ganglion_proto::evaluation::{EvaluationRow, names};
use ganglion_proto::job::Job;
use ganglion_proto::message::{SampleGrid, SampleTexts};
use ganglion_proto::record::found::Found;
use ganglion_proto::record::{MetricsRow, RunEvent, RunOutcome, SavedCheckpoint};
use ganglion_proto::trace::Trace;
use ganglion_proto::words::{are, counted};
use ganglion_storage::whole;
use tokio::task::JoinHandle;

use super::StopSignal;
use crate::records::chronicle::{Chronicle, REAL_PICTURE};
use crate::records::curves::Curves;
use crate::records::damage::Damaged;
use crate::records::disk::Disk;
use crate::records::events::EventLog;
use crate::records::line_file::Sync;
use crate::records::metrics::{MetricsLog, RecordError, Recorded};
use crate::records::progress::{Progress, Screen};
use crate::records::receipts::Receipts;
use crate::records::timeline::Timeline;
use crate::system::clock::now;

/// Figures of an evaluation that the terminal shows.
const SHOWN: [&str; 6] =
    [names::FRECHET, names::SCORE, names::MODES, names::PRECISION, names::RECALL, names::WASSERSTEIN];

/// Maximum number of pictures that wait for the disk, each of some megabytes at most.
const PICTURES_LIMIT: usize = 16;

/// All records of a run.
pub struct Records {
    job: Job,
    folder: PathBuf,
    screen: Screen,
    progress: Option<Progress>,
    metrics: MetricsLog,
    events: EventLog,
    curves: Curves,
    /// In-memory index of all records, for the dashboard.
    pub chronicle: Chronicle,
    /// Trace of the same events, with their durations.
    pub timeline: Timeline,
    waiting: VecDeque<MetricsRow>,
    /// Maximum number of rows that may wait to be written.
    waiting_limit: usize,
    /// Pictures that are not written yet, oldest first.
    pictures: VecDeque<SampleFile>,
    receipts: Receipts,
    syncing: Option<JoinHandle<Synced>>,
    skipped: Skipped,
    /// Files that cannot be written at present.
    failing: BTreeSet<&'static str>,
    /// Whether the contents of the data set were reported to the user.
    data_told: bool,
}

/// Results of the syncs of events and of metrics.
type Synced = [Option<(Sync, io::Result<()>)>; 2];

/// Skipped phases that were reported.
#[derive(Default)]
struct Skipped {
    newest: Option<Position>,
    count: u64,
}

/// Outcome as it is recorded.
pub(crate) fn recorded(outcome: &Outcome) -> RunOutcome {
    match outcome {
        Outcome::Complete => RunOutcome::Complete,
        Outcome::Stopped(_) => RunOutcome::Stopped,
        Outcome::InputWrong(_) | Outcome::Refused => RunOutcome::InputError,
        Outcome::Failed(_) => RunOutcome::Failed,
    }
}

/// A file in the folder of samples.
pub struct SampleFile {
    name: String,
    content: Vec<u8>,
    /// Steps done before generated samples; `None` for real ones.
    step: Option<u64>,
}

impl From<SampleGrid> for SampleFile {
    fn from(grid: SampleGrid) -> SampleFile {
        let step = (!grid.real).then_some(grid.step);
        let name = step.map_or_else(|| REAL_PICTURE.to_string(), |step| format!("step-{step:08}.png"));
        SampleFile { name, content: grid.png, step }
    }
}

impl From<SampleTexts> for SampleFile {
    fn from(SampleTexts { step, text }: SampleTexts) -> SampleFile {
        SampleFile { name: format!("step-{step:08}.txt"), content: text.into_bytes(), step: Some(step) }
    }
}

impl Records {
    /// Opens the records in a run directory. TensorBoard's event files are completed from them.
    ///
    /// # Errors
    /// A record cannot be opened, or its content was not written by this program.
    pub fn open(job: Job, folder: &Path, screen: Screen, disk: &Arc<dyn Disk>) -> Result<Records, Damaged> {
        let chronicle = Chronicle::default();
        let board = folder.join("tensorboard");
        let curves = Curves::open(folder).map_err(|error| Damaged::Io(board, error))?;
        let (rows, events) = ((chronicle.clone(), curves.clone()), (chronicle.clone(), curves.clone()));
        let rows = Box::new(move |line: &[u8]| {
            rows.0.row(line);
            rows.1.row(line);
        });
        let events = Box::new(move |line: &[u8]| {
            events.0.event(line);
            events.1.event(line);
        });
        Ok(Records {
            metrics: MetricsLog::open(&folder.join("metrics.jsonl"), disk.clone(), rows)?,
            events: EventLog::open(&folder.join("events.jsonl"), disk.clone(), events)?,
            chronicle,
            curves,
            timeline: Timeline::new(&Trace::off()),
            receipts: Receipts::new(job.metrics.every_steps),
            job,
            folder: folder.to_path_buf(),
            screen,
            progress: None,
            waiting: VecDeque::new(),
            waiting_limit: disk.rows_that_wait(),
            pictures: VecDeque::new(),
            syncing: None,
            skipped: Skipped::default(),
            failing: BTreeSet::new(),
            data_told: false,
        })
    }

    /// The run directory.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Records an event.
    pub fn event(&mut self, event: &RunEvent) {
        let time = now();
        self.timeline.event(time, event);
        let written = self.events.append(time, event);
        self.note("events.jsonl", written);
    }

    /// Records that a checkpoint is valid.
    pub fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        self.event(&RunEvent::Checkpoint(SavedCheckpoint {
            folder: checkpoint.folder(),
            phase: checkpoint.phase,
            state_digest: checkpoint.state_digest.clone(),
            step: checkpoint.step,
        }));
    }

    /// Records an evaluation.
    pub fn evaluation(&mut self, row: &EvaluationRow) {
        let metrics = row.metrics.clone().sorted();
        self.event(&RunEvent::Evaluation(EvaluationRow { metrics, ..row.clone() }));
        // The objective's own scalars have names that no metric has.
        let own = row.metrics.iter().map(|(name, _)| name).filter(|name| !names::ALL.contains(name));
        let shown = own.take(SHOWN.len()).chain(SHOWN);
        let shown: Vec<String> = shown
            .filter_map(|name| Some(format!("{} {:.3}", name.replace('_', " "), row.get(name)?)))
            .collect();
        match row.metrics.is_empty() {
            true => self.message(&format!("warning: no evaluation of step {}: {}", row.step, row.features)),
            false => self.message(&format!("evaluation of step {}: {}", row.step, shown.join(", "))),
        }
    }

    /// Time for which the user was shown nothing.
    pub fn quiet_for(&self) -> Duration {
        self.screen.quiet_for()
    }

    /// Prints a message for the user, above the progress bar.
    pub fn message(&mut self, text: &str) {
        self.screen.print(text);
    }

    /// Reports what a worker found in the data set: to the user once, and as an event unless there
    /// is an equal one.
    pub fn data_found(&mut self, found: &Found) {
        // Every worker that loads reports the same; one line is enough.
        if self.data_told {
            return;
        }
        self.data_told = true;
        self.message(&format!("data: {found}"));
        found.warnings().iter().for_each(|line| self.message(&format!("warning: {line}")));
        // An earlier coordinator may have recorded the same.
        let is_recorded = self.chronicle.look().data.as_ref() == Some(found);
        if !is_recorded {
            self.event(&RunEvent::Data { found: found.clone() });
        }
    }

    /// Counts steps by the shape of the objective that is trained.
    pub fn learn_shape(&mut self, shape: &StepShape) {
        self.job.shape = Some(shape.clone());
    }

    /// Notes the size of the data set; from now on there is a progress bar.
    pub fn loaded(&mut self, samples: u64, from: Option<&Checkpoint>) {
        self.receipts.ends_with(self.job.last_step(samples));
        if self.progress.is_none() {
            let first = from.map_or(0, |checkpoint| checkpoint.step).max(self.last_step());
            self.progress =
                Some(Progress::new(&self.screen, self.job.last_step(samples), first, self.job.data.kind));
        }
    }

    /// Takes a row that a worker reported.
    pub fn take_row(&mut self, row: MetricsRow) {
        // Memory for a full disk is bounded; the worker has the row as well (M13).
        if self.waiting.len() >= self.waiting_limit {
            return self.refuse(row.step);
        }
        // Noted before it is written: a row that waits here counts as received, and `first_unsafe` keeps
        // it from being acknowledged.
        self.receipts.took(row.step);
        self.waiting.push_back(row);
        self.write_rows();
    }

    /// Takes the rows that workers left on the storage. Most may already be recorded.
    pub fn take_left_rows(&mut self, rows: Vec<MetricsRow>, samples: Option<u64>) {
        #[allow(clippy::cast_precision_loss)] // counts of images are far below 2^53
        let epoch = |row: &MetricsRow| row.images_seen as f64 / samples.unwrap_or(1).max(1) as f64;
        for mut row in rows {
            // A former build left it to the coordinator to divide.
            if row.epoch == 0.0 {
                row.epoch = epoch(&row);
            }
            self.take_row(row);
        }
    }

    /// Leaves a row with the workers.
    fn refuse(&mut self, step: u64) {
        // Nothing from this row on is acknowledged, so its worker keeps it and is asked for it later.
        self.receipts.refused(step);
        if self.failing.insert("more rows") {
            let limit = self.waiting_limit;
            self.message(&format!(
                "warning: {limit} rows wait until metrics.jsonl can be written; workers keep the others and report them again"
            ));
        }
    }

    /// Notes that a generation was formed at an update index: from there on it reports by this
    /// term's cadence.
    pub fn formed(&mut self, position: Position) {
        self.receipts.formed(position.0 / self.job.phases_per_step());
    }

    /// Writes what waits, and starts a sync. Rows written now are acknowledged after that sync.
    pub fn catch_up(&mut self) {
        // Before the sync, which then covers what was just written.
        self.write_waiting();
        self.begin_sync();
    }

    /// Writes what waits, without waiting for the disk.
    fn write_waiting(&mut self) {
        let written = self.events.catch_up(now());
        self.note("events.jsonl", written);
        self.write_rows();
        self.write_pictures();
        self.timeline.flush();
        let flushed = self.curves.flush();
        self.note("tensorboard", flushed);
    }

    /// Newest step up to which workers need keep no rows, unless they already know it.
    pub fn acknowledge(&mut self) -> Option<u64> {
        let newest = self.last_step();
        let bound = self.first_unsafe(newest);
        self.receipts.acknowledge(newest, bound.unwrap_or(u64::MAX))
    }

    /// Whether all rows up to a step would survive a power cut.
    pub fn are_durable(&mut self, step: u64) -> bool {
        self.first_unsafe(step).is_none_or(|first| first > step)
    }

    /// First step up to `limit` whose row a power cut would take, or whose row is missing.
    fn first_unsafe(&mut self, limit: u64) -> Option<u64> {
        let waiting = self.waiting.iter().map(|row| row.step).min();
        // A row is safe only if none of these holds: it waits for the disk, it was written and not
        // synced, or it has not come at all.
        [waiting, self.metrics.first_fresh(), self.missing(limit)].into_iter().flatten().min()
    }

    /// First step up to `limit` whose row has not arrived, or found no room. Rows that wait here
    /// are not missing.
    pub fn missing(&mut self, limit: u64) -> Option<u64> {
        let Records { receipts, metrics, waiting, .. } = self;
        let waiting: BTreeSet<u64> = waiting.iter().map(|row| row.step).collect();
        receipts.missing(limit, |step| metrics.has(step) || waiting.contains(&step))
    }

    /// Whether there is room for rows that were left with the workers.
    pub fn has_room(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Gives up all missing rows up to a step: no worker has them any more.
    pub fn give_up(&mut self, limit: u64) {
        let mut steps = Vec::new();
        // Ends, since each step that is given up counts as lost from then on.
        while let Some(step) = self.missing(limit) {
            self.receipts.give_up(step);
            steps.push(step);
        }
        let (Some(&first), Some(&last)) = (steps.first(), steps.last()) else { return };
        let count = steps.len() as u64;
        self.message(&format!(
            "warning: {} of steps {first} to {last} {} lost with the workers that had them",
            counted(count, "metrics row"),
            are(count)
        ));
        self.event(&RunEvent::MetricsLost { count, first, last });
    }

    /// Starts to sync the written records, unless a sync is in progress.
    pub fn begin_sync(&mut self) {
        let jobs = [self.events.to_sync(), self.metrics.to_sync()];
        // One sync at a time. Rows that are written meanwhile are covered by the next one, at most a
        // second later.
        if self.syncing.is_some() || jobs.iter().all(Option::is_none) {
            return;
        }
        // In a thread: a busy disk takes seconds for it, and the loop must answer heartbeats within a
        // deadline.
        self.syncing = Some(tokio::task::spawn_blocking(move || sync(jobs)));
    }

    /// Waits for the end of a sync; for ever if none is in progress. Cancel safe.
    pub async fn synced(&mut self) {
        let Some(syncing) = &mut self.syncing else { return std::future::pending().await };
        // If the shell's loop drops this future, the thread goes on, and the next call waits for
        // the same sync.
        let synced = syncing.await;
        self.syncing = None;
        // A thread that could not be started has synced nothing.
        if let Ok(synced) = synced {
            self.was_synced(synced);
        }
    }

    fn was_synced(&mut self, [events, metrics]: Synced) {
        if let Some((sync, done)) = events {
            self.events.was_synced(&sync, &done);
            self.note("events.jsonl (sync)", done);
        }
        if let Some((sync, done)) = metrics {
            self.metrics.was_synced(&sync, &done);
            self.note("metrics.jsonl (sync)", done);
        }
    }

    fn write_rows(&mut self) {
        while let Some(row) = self.waiting.front() {
            let recorded = match self.metrics.record(row) {
                Ok(recorded) => {
                    self.note("metrics.jsonl", Ok(()));
                    recorded
                }
                // The row stays in front, so that rows are written in the order in which they came.
                Err(RecordError::Io(error)) => return self.note("metrics.jsonl", Err(error)),
                Err(RecordError::Breach(breach)) => {
                    let text = breach.to_string();
                    self.message(&format!("warning: {text}"));
                    self.event(&RunEvent::MetricsBreach { detail: text });
                    // The recorded row stays, and the other one is acknowledged: a worker that keeps
                    // repeating it would change nothing.
                    Recorded::Same
                }
            };
            let Some(row) = self.waiting.pop_front() else { return };
            if let Some(progress) = &mut self.progress {
                progress.row(&row);
            }
            if let Recorded::New = recorded {
                self.timeline.row(&row);
            }
        }
        self.note("more rows", Ok(()));
    }

    /// Stores samples, a grid as a picture or texts, and shows them in TensorBoard.
    pub fn take_samples(&mut self, samples: impl Into<SampleFile>) {
        let samples = samples.into();
        // Samples that wait and are drawn again, after a change of the group, wait once.
        self.pictures.retain(|waiting| waiting.name != samples.name);
        self.pictures.push_back(samples);
        self.write_pictures();
        // Only the oldest: a new one tells more of the run.
        while self.pictures.len() > PICTURES_LIMIT
            && let Some(dropped) = self.pictures.pop_front()
        {
            let name = dropped.name;
            self.message(&format!("warning: samples/{name} is lost: too many of them wait for the disk"));
        }
    }

    fn write_pictures(&mut self) {
        while let Some(samples) = self.pictures.pop_front() {
            let file = self.folder.join("samples").join(&samples.name);
            // Each start draws the real samples; an earlier one may have ended before it told of them.
            let is_told = samples.step.is_some() || self.chronicle.look().has_real;
            if is_told && std::fs::read(&file).is_ok_and(|known| known == samples.content) {
                // They were drawn again after a change of the group.
                continue;
            }
            // Whole or not there: the dashboard and the mirror read this folder at any moment.
            let written = whole::write(&file, &samples.content);
            let is_written = written.is_ok();
            self.note("samples", written);
            if !is_written {
                // In front again: pictures are shown in the order in which they came.
                return self.pictures.push_front(samples);
            }
            // After the file: the event names it, and readers open it at once.
            let file = format!("samples/{}", samples.name);
            self.event(&match samples.step {
                None => RunEvent::RealSamples { file },
                Some(step) => RunEvent::Samples { file, step },
            });
        }
    }

    /// Notes that the phase that started at `position` was skipped. All members report it, and
    /// again when they compute it again: it is recorded once. The user is told of the first, the
    /// second, the fourth and so on.
    pub fn phase_skipped(&mut self, position: Position, detail: &str) {
        // Another member has reported it, or it was computed again.
        if self.skipped.newest >= Some(position) {
            return;
        }
        self.skipped = Skipped { newest: Some(position), count: self.skipped.count + 1 };
        let step = position.0 / self.job.phases_per_step() + 1;
        self.event(&RunEvent::PhaseSkipped { position: position.0, reason: detail.to_string(), step });
        // A run that skips thousands of phases must not flood the terminal; each one is an event all the
        // same.
        if self.skipped.count.is_power_of_two() {
            let count = self.skipped.count;
            self.message(&format!(
                "warning: {detail}; its update is left out ({count} since the coordinator started)"
            ));
        }
    }

    /// Newest recorded step; 0 before the first.
    pub fn last_step(&self) -> u64 {
        self.metrics.last_step().unwrap_or(0)
    }

    /// Records how the run ended.
    pub fn finish(&mut self, outcome: &Outcome, signal: Option<StopSignal>) {
        let detail = match outcome {
            Outcome::Complete | Outcome::Refused => String::new(),
            Outcome::Stopped(_) => signal.map(|signal| format!("{signal:?}")).unwrap_or_default(),
            Outcome::InputWrong(detail) | Outcome::Failed(detail) => detail.clone(),
        };
        // Before the end's event, which is the last one of a run that has ended.
        self.write_waiting();
        if !self.pictures.is_empty() {
            let count = std::mem::take(&mut self.pictures).len();
            self.message(&format!("warning: {} could not be written to samples", counted(count, "picture")));
        }
        self.event(&RunEvent::RunEnded { detail, outcome: recorded(outcome) });
        self.finish_writing();
        self.timeline.finish();
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
    }

    /// Writes and syncs the rest. It blocks, since the loop has ended or not begun.
    pub fn finish_writing(&mut self) {
        self.write_waiting();
        // A sync in progress is not waited for: this one begins later and covers it.
        self.was_synced(sync([self.events.to_sync(), self.metrics.to_sync()]));
        if !self.waiting.is_empty() {
            let count = self.waiting.len();
            self.message(&format!(
                "warning: {} could not be written to metrics.jsonl",
                counted(count, "row")
            ));
        }
    }

    /// Reports the first failure to write a file and the first success after it.
    fn note(&mut self, what: &'static str, written: io::Result<()>) {
        match written {
            Ok(()) if self.failing.remove(what) => self.message(&format!("{what}: written again")),
            Err(error) if self.failing.insert(what) => {
                self.message(&format!(
                    "warning: cannot write {what}: {error}; it is tried again; workers keep the rows meanwhile, and checkpoints \
                     wait for them"
                ));
            }
            _ => {}
        }
    }
}

/// Waits for the disk: events first, so that no row is durable before the events that preceded it.
fn sync([events, metrics]: [Option<Sync>; 2]) -> Synced {
    [events, metrics].map(|job| {
        let job = job?;
        let done = job.run();
        Some((job, done))
    })
}
