//! What the run leaves for its users: metrics, events, TensorBoard, pictures, progress, a timeline.
//!
//! 1. A row is acknowledged only once it is written; until then it waits here and with the workers.
//! 2. A failure to write any of these never stops the run. It is told once, and once more when it works again.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};

use ganglion_membership::{Checkpoint, Outcome, Position};
use ganglion_proto::evaluation::{EvaluationRow, names};
use ganglion_proto::found::Found;
use ganglion_proto::job::Job;
use ganglion_proto::message::{MetricsRow, Profile, SampleGrid};
use ganglion_proto::trace::Trace;
use serde::Serialize;

use super::StopSignal;
use crate::journal::now;
use crate::report::chronicle::Chronicle;
use crate::report::events::EventLog;
use crate::report::metrics::{MetricsLog, RecordError, Recorded, Row};
use crate::report::progress::{Progress, Screen};
use crate::report::tensorboard::{Png, TensorBoard};
use crate::report::timeline::Timeline;
use crate::run_dir::write_whole;

/// Rows that may wait for a storage that fails. Workers keep them too.
const WAITING_LIMIT: usize = 1 << 16;

/// The figures of an evaluation that the terminal shows.
const SHOWN: [&str; 6] =
    [names::FRECHET, names::SCORE, names::MODES, names::PRECISION, names::RECALL, names::WASSERSTEIN];

/// All records of a run.
pub struct Records {
    job: Job,
    folder: PathBuf,
    screen: Screen,
    progress: Option<Progress>,
    metrics: MetricsLog,
    events: EventLog,
    tensorboard: TensorBoard,
    /// What all these tell, for those who look on.
    pub chronicle: Chronicle,
    /// The same, with the time that it took.
    pub timeline: Timeline,
    waiting: VecDeque<Row>,
    /// The newest recorded step that workers have not been told of.
    unacknowledged: Option<u64>,
    samples: u64,
    skipped: Skipped,
    failing: bool,
    /// Whether people were told what the data hold.
    data_told: bool,
}

/// The skipped phases that were told of.
#[derive(Default)]
struct Skipped {
    newest: Option<Position>,
    count: u64,
}

/// What an outcome is called.
pub fn outcome_name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Complete => "complete",
        Outcome::Stopped(_) => "stopped",
        Outcome::InputWrong(_) => "input_error",
        Outcome::Failed(_) => "failed",
    }
}

impl Records {
    /// Opens the records in a run directory.
    pub fn open(job: Job, folder: &Path, screen: Screen) -> io::Result<Records> {
        let chronicle = Chronicle::default();
        let (rows, events) = (chronicle.clone(), chronicle.clone());
        let (rows, events) =
            (Box::new(move |line: &[u8]| rows.row(line)), Box::new(move |line: &[u8]| events.event(line)));
        Ok(Records {
            metrics: MetricsLog::open(&folder.join("metrics.jsonl"), rows)?,
            events: EventLog::open(&folder.join("events.jsonl"), events)?,
            chronicle,
            tensorboard: TensorBoard::create(&folder.join("tensorboard"))?,
            timeline: Timeline::new(&Trace::off()),
            job,
            folder: folder.to_path_buf(),
            screen,
            progress: None,
            waiting: VecDeque::new(),
            unacknowledged: None,
            samples: 1,
            skipped: Skipped::default(),
            failing: false,
            data_told: false,
        })
    }

    /// The run directory.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Records an event.
    pub fn event(&mut self, kind: &str, fields: impl Serialize) {
        let time = now();
        self.timeline.event(time, kind, &fields);
        let written = self.events.append(time, kind, fields);
        self.note("events.jsonl", written);
    }

    /// Records that a checkpoint is valid.
    pub fn checkpoint(&mut self, checkpoint: &Checkpoint) {
        self.event(
            "checkpoint",
            serde_json::json!({
                "step": checkpoint.step, "phase": checkpoint.phase,
                "folder": checkpoint.folder(), "state_digest": checkpoint.state_digest,
            }),
        );
    }

    /// Records an evaluation.
    pub fn evaluation(&mut self, row: &EvaluationRow) {
        let metrics: serde_json::Map<String, serde_json::Value> =
            row.metrics.iter().map(|(name, value)| (name.clone(), serde_json::json!(value))).collect();
        let fields = serde_json::json!({
            "step": row.step, "metrics": metrics, "features": row.features, "seconds": row.seconds,
        });
        self.event("evaluation", fields);
        for (name, value) in &row.metrics {
            let drawn = self.tensorboard.scalar(&format!("evaluation/{name}"), row.step, now(), *value);
            self.note("tensorboard", drawn);
        }
        let shown: Vec<String> = SHOWN
            .iter()
            .filter_map(|name| Some(format!("{} {:.3}", name.replace('_', " "), row.get(name)?)))
            .collect();
        match row.metrics.is_empty() {
            true => self.message(&format!("warning: no evaluation of step {}: {}", row.step, row.features)),
            false => self.message(&format!("evaluation of step {}: {}", row.step, shown.join(", "))),
        }
    }

    /// Tells people something, above the progress bar.
    pub fn message(&mut self, text: &str) {
        self.screen.print(text);
    }

    /// Tells what a worker found in the data: people once, and the events unless they say so already.
    pub fn data_found(&mut self, found: &Found) {
        if self.data_told {
            return;
        }
        self.data_told = true;
        self.message(&format!("data: {found}"));
        let is_recorded = self.chronicle.look().data.as_ref() == Some(found);
        if !is_recorded {
            self.event("data", serde_json::json!({ "found": found }));
        }
    }

    /// The size of the data set is known: from now on there is a bar.
    pub fn loaded(&mut self, samples: u64, from: Option<&Checkpoint>) {
        self.samples = samples.max(1);
        if self.progress.is_none() {
            let first = from.map_or(0, |checkpoint| checkpoint.step).max(self.last_step());
            self.progress = Some(Progress::new(&self.screen, self.job.last_step(samples), first));
        }
    }

    /// Takes a row of the workers.
    pub fn take_row(&mut self, row: MetricsRow) {
        #[allow(clippy::cast_precision_loss)] // counts of images are far below 2^53
        let epoch = row.images_seen as f64 / self.samples as f64;
        if self.waiting.len() >= WAITING_LIMIT {
            return;
        }
        self.waiting.push_back(Row {
            step: row.step,
            time: row.time,
            generation: row.generation,
            world_size: row.world_size,
            loss_discriminator: row.loss_discriminator,
            loss_generator: row.loss_generator,
            images_per_second: row.images_per_second,
            images_seen: row.images_seen,
            ledger: row.ledger,
            skipped: row.skipped,
            epoch,
            profile: row.profile,
            gpu: row.gpu,
            scores: row.scores,
        });
        self.write_rows();
    }

    /// Takes the rows that workers left on the storage. Most may be recorded already.
    pub fn take_left_rows(&mut self, rows: Vec<MetricsRow>, samples: Option<u64>) {
        self.samples = samples.unwrap_or(1).max(1);
        rows.into_iter().for_each(|row| self.take_row(row));
    }

    /// Writes what waits; returns the newest recorded step if it was not returned before.
    pub fn catch_up(&mut self) -> Option<u64> {
        self.write_rows();
        self.timeline.flush();
        let flushed = self.tensorboard.flush();
        self.note("tensorboard", flushed);
        self.unacknowledged.take()
    }

    fn write_rows(&mut self) {
        while let Some(row) = self.waiting.front() {
            let recorded = match self.metrics.record(row) {
                Ok(recorded) => recorded,
                Err(RecordError::Io(error)) => return self.note("metrics.jsonl", Err(error)),
                Err(RecordError::Breach(breach)) => {
                    let text = breach.to_string();
                    self.message(&format!("warning: {text}"));
                    self.event("metrics_breach", serde_json::json!({ "detail": text }));
                    Recorded::Same
                }
            };
            let Some(row) = self.waiting.pop_front() else { return };
            self.unacknowledged = self.unacknowledged.max(Some(row.step));
            if let Some(progress) = &mut self.progress {
                progress.row(&row);
            }
            if let Recorded::New = recorded {
                self.timeline.row(&row);
                let drawn = self.draw(&row);
                self.note("tensorboard", drawn);
            }
        }
    }

    fn draw(&mut self, row: &Row) -> io::Result<()> {
        for (tag, value) in [
            ("loss/discriminator", row.loss_discriminator),
            ("loss/generator", row.loss_generator),
            ("throughput/images_per_second", row.images_per_second),
            ("cluster/world_size", f64::from(row.world_size)),
        ] {
            self.tensorboard.scalar(tag, row.step, row.time, value)?;
        }
        #[allow(clippy::cast_precision_loss)] // a curve for people
        let memory = row.gpu.memory_bytes.map(|bytes| bytes as f64);
        let utilisation = row.gpu.utilisation.map(f64::from);
        for (tag, value) in [("gpu/memory_bytes", memory), ("gpu/utilisation_percent", utilisation)] {
            if let Some(value) = value {
                self.tensorboard.scalar(tag, row.step, row.time, value)?;
            }
        }
        for (tag, value) in ["score/real", "score/fake"].into_iter().zip(row.scores.into_iter().flatten()) {
            self.tensorboard.scalar(tag, row.step, row.time, value)?;
        }
        for (module, profile) in ["discriminator", "generator"].iter().zip(row.profile.iter().flatten()) {
            let Profile { data, compute, wait, commit, other } = *profile;
            for (part, milliseconds) in
                [("data", data), ("compute", compute), ("wait", wait), ("commit", commit), ("other", other)]
            {
                let tag = format!("milliseconds_of_a_step/{module}_{part}");
                self.tensorboard.scalar(&tag, row.step, row.time, milliseconds)?;
            }
        }
        Ok(())
    }

    /// Keeps a grid of samples as a picture and shows it in TensorBoard.
    pub fn take_samples(&mut self, grid: SampleGrid) {
        let name = format!("step-{:08}.png", grid.step);
        let file = self.folder.join("samples").join(&name);
        if std::fs::read(&file).is_ok_and(|known| known == grid.png) {
            // Drawn again after a change of the group.
            return;
        }
        let written = write_whole(&file, &grid.png);
        self.note("samples", written);
        let image = Png { bytes: &grid.png, height: grid.height, width: grid.width, channels: grid.channels };
        let drawn = self.tensorboard.image_png("samples", grid.step, now(), image);
        self.note("tensorboard", drawn);
        self.event("samples", serde_json::json!({ "step": grid.step, "file": format!("samples/{name}") }));
    }

    /// Notes that the phase that started at `position` was skipped. All members say so, and say it again when they compute
    /// it again: it is noted once. People are told of the first, the second, the fourth and so on.
    pub fn phase_skipped(&mut self, position: Position, detail: &str) {
        if self.skipped.newest >= Some(position) {
            return;
        }
        self.skipped = Skipped { newest: Some(position), count: self.skipped.count + 1 };
        let step = position.0 / self.job.phases_per_step() + 1;
        let fields = serde_json::json!({ "position": position.0, "step": step, "reason": detail });
        self.event("phase_skipped", fields);
        if self.skipped.count.is_power_of_two() {
            let count = self.skipped.count;
            self.message(&format!(
                "warning: {detail}; phase skipped ({count} since the coordinator started)"
            ));
        }
    }

    /// The newest recorded step; 0 before the first.
    pub fn last_step(&self) -> u64 {
        self.metrics.last_step().unwrap_or(0)
    }

    /// Says how the run ended.
    pub fn finish(&mut self, outcome: &Outcome, signal: Option<StopSignal>) {
        let detail = match outcome {
            Outcome::Complete => String::new(),
            Outcome::Stopped(_) => signal.map(|signal| format!("{signal:?}")).unwrap_or_default(),
            Outcome::InputWrong(detail) | Outcome::Failed(detail) => detail.clone(),
        };
        let fields = serde_json::json!({ "outcome": outcome_name(outcome), "detail": detail });
        self.event("run_ended", fields);
        self.catch_up();
        self.timeline.finish();
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
    }

    /// Tells of the first failure and of the first success after it.
    fn note(&mut self, what: &str, written: io::Result<()>) {
        match written {
            Ok(()) => self.failing = false,
            Err(_) if self.failing => {}
            Err(error) => {
                self.failing = true;
                let text = format!("warning: cannot write {what}: {error}; trying again");
                self.message(&text);
            }
        }
    }
}
