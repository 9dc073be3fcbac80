//! Reports of a finished step: the metrics row, the sample grid, the checkpoint, the evaluation.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use ganglion_membership::Position;
use ganglion_membership::member::{Event, Reported};
use ganglion_proto::clock;
use ganglion_proto::job::Job;
use ganglion_proto::message::{Assignment, GpuUse, MetricsRow};
use tch::{Device, Tensor};

use super::checkpoint_writer::Order;
use super::generation::TeamError;
use super::train::Course;
use super::trainer::{Held, Trainer};
use crate::checkpoint::{Fingerprints, Snapshot, joined, weights};
use crate::objective::{Model, Phase, ScalarRole};
use crate::state::{Counters, State, narrow};

/// Pending report: what a member needs to report a step's row. It is broadcast with the state, and no part
/// of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pending {
    /// Newest mean of each reported scalar, in the order of [`Model::reported`], for the row of a step that
    /// a change of the group cut in two.
    scalars: Vec<f64>,
    /// Circumstances of the newest step with a row, for a member that was synchronised past its end and may
    /// have to report it.
    newest: Circumstances,
}

/// Circumstances in which a step with a row was committed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Circumstances {
    /// Generation that committed the step; 0 if unknown.
    generation: u64,
    /// World size of that generation.
    world_size: u32,
    /// Real images consumed per second since the row before.
    images_per_second: f64,
    /// Time of the commit, in seconds since the Unix epoch.
    time: f64,
}

impl Pending {
    /// Nothing to report yet.
    pub(crate) fn new(model: &Model) -> Pending {
        Pending { scalars: vec![0.0; model.reported().len()], newest: Circumstances::default() }
    }

    /// Takes the reported scalars of a phase from its reduced gradient.
    pub(crate) fn note(&mut self, model: &Model, phase: Phase, mean: &Tensor) {
        // The state keeps those of other phases: a report would lack them after a checkpoint.
        if phase.every > 1 {
            return;
        }
        let layout = model.gradient(phase);
        let means = narrow(mean, layout.scalar_range()).to_device(Device::Cpu);
        let means = Vec::<f32>::try_from(means).expect("floats on the CPU");
        for (scalar, mean) in layout.scalars().iter().zip(means) {
            let place = model.reported().iter().position(|name| *name == scalar.name);
            if let (Some(place), false) = (place, scalar.role == ScalarRole::Internal) {
                self.scalars[place] = f64::from(mean);
            }
        }
    }

    /// Number of words of [`to_words`](Self::to_words).
    pub(crate) fn words(model: &Model) -> usize {
        Pending::new(model).to_words(Counters::default(), 0).len()
    }

    /// Encodes the report, with the counters and the fingerprint of the state that it goes with.
    pub(crate) fn to_words(&self, counters: Counters, fingerprint: u64) -> Vec<u64> {
        let Counters { position, ledger, skipped } = counters;
        let Circumstances { generation, world_size, images_per_second, time } = self.newest;
        let fixed = [position.0, ledger, skipped, fingerprint, generation, u64::from(world_size)];
        let floats = [images_per_second, time].into_iter().chain(self.scalars.iter().copied());
        fixed.into_iter().chain(floats.map(f64::to_bits)).collect()
    }

    /// Decodes what [`to_words`](Self::to_words) encoded; `None` for anything else.
    pub(crate) fn from_words(words: &[u64]) -> Option<(Counters, u64, Pending)> {
        let [position, ledger, skipped, fingerprint, generation, world_size, pace, time, scalars @ ..] =
            words
        else {
            return None;
        };
        let counters = Counters { position: Position(*position), ledger: *ledger, skipped: *skipped };
        let newest = Circumstances {
            generation: *generation,
            world_size: u32::try_from(*world_size).ok()?,
            images_per_second: f64::from_bits(*pace),
            time: f64::from_bits(*time),
        };
        let scalars = scalars.iter().map(|word| f64::from_bits(*word)).collect();
        Some((counters, *fingerprint, Pending { scalars, newest }))
    }
}

/// Reports due on the state after a step.
#[derive(Clone, Copy, Default)]
struct Due {
    checkpoint: bool,
    samples: bool,
    evaluation: bool,
}

/// Throughput since the last row of metrics.
pub(crate) struct Pace {
    since: Instant,
    steps: u64,
}

impl Pace {
    /// Starts to measure.
    pub(crate) fn start() -> Pace {
        Pace { since: Instant::now(), steps: 0 }
    }

    /// Returns the circumstances of the step that was just committed.
    fn circumstances(&self, assignment: &Assignment, job: &Job) -> Circumstances {
        let now = clock::unix_time();
        let seconds = self.since.elapsed().as_secs_f64().max(1e-9);
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // a rate for people
        let images_per_second = ((self.steps * job.samples_per_step()) as f64 / seconds) as f32;
        Circumstances {
            generation: assignment.group.generation.0,
            world_size: u32::try_from(assignment.group.members.len()).unwrap_or(u32::MAX),
            images_per_second: f64::from(images_per_second),
            time: now.as_secs_f64(),
        }
    }
}

impl Trainer {
    /// Reports a step that ends at the held state: metrics, samples, checkpoints. Waits only while too many
    /// rows are unrecorded or too many checkpoints are unwritten. Fails if the state cannot be copied.
    pub(super) fn report(
        &self,
        assignment: &Assignment,
        held: &mut Held,
        reported: Reported,
        course: &mut Course<'_>,
    ) -> Result<(), TeamError> {
        let step = self.model.steps(held.state.counters.position);
        let row_is_due = self.job.metrics_due(step, self.data.len() as u64);
        match reported {
            Reported::Committed | Reported::Last { .. } => {
                course.pace.steps += 1;
                if row_is_due || matches!(reported, Reported::Last { stopping: true }) {
                    self.report_row(assignment, held, course);
                }
            }
            Reported::Again if row_is_due && held.pending.newest.generation > 0 => {
                // The source of this member's state has reported the row, and may be gone before it was
                // recorded.
                self.session.report_unless_kept(self.row(held));
            }
            Reported::Again | Reported::FromCheckpoint => {}
        }
        let due = self.due(step);
        match reported {
            Reported::Committed | Reported::Again => self.save(assignment, &held.state, due)?,
            // Of the last group's states perhaps only the saved one is left: its evaluation may still be
            // missing.
            Reported::FromCheckpoint => {
                let due = Due { evaluation: due.evaluation, ..Due::default() };
                self.save(assignment, &held.state, due)?;
            }
            // `finish` saves it.
            Reported::Last { .. } => {}
        }
        Ok(())
    }

    fn report_row(&self, assignment: &Assignment, held: &mut Held, course: &mut Course<'_>) {
        let Course { pace, laps, .. } = course;
        held.pending.newest = pace.circumstances(assignment, &self.job);
        let profile = laps.take(pace.steps).collect();
        let GpuUse { memory_bytes, utilisation } = self.session.gpu_use();
        self.session.report(MetricsRow {
            profile,
            gpu_memory_bytes: memory_bytes,
            gpu_utilisation: utilisation,
            ..self.row(held)
        });
        self.session.wait_for_room(assignment.group.generation);
        self.track.flush();
        *pace = Pace::start();
    }

    /// Returns the reports due after `step` steps.
    fn due(&self, step: u64) -> Due {
        let samples = self.data.len() as u64;
        Due {
            checkpoint: self.job.checkpoint_due(step, samples),
            samples: self.job.sample_due(step, samples),
            evaluation: self.job.evaluation_due(step, samples),
        }
    }

    /// Returns the row of the step that a state ends.
    fn row(&self, held: &Held) -> MetricsRow {
        let Held { state, pending } = held;
        let step = self.model.steps(state.counters.position);
        let Circumstances { generation, world_size, images_per_second, time } = pending.newest;
        let images_seen = step * self.job.samples_per_step();
        #[allow(clippy::cast_precision_loss)] // counts of images are far below 2^53
        let epoch = images_seen as f64 / self.data.len() as f64;
        let mut scalars = pending.scalars.clone();
        for (place, mean) in self.model.kept_scalars(state) {
            scalars[place] = mean;
        }
        let reported = self.model.reported().iter().map(ToString::to_string).zip(scalars);
        MetricsRow {
            step,
            images_seen,
            ledger: state.counters.ledger,
            skipped: state.counters.skipped,
            scalars: reported.chain(self.model.settings(state)).collect(),
            epoch,
            time,
            generation,
            world_size,
            images_per_second,
            ..MetricsRow::default()
        }
    }

    fn save(&self, assignment: &Assignment, state: &State, due: Due) -> Result<(), TeamError> {
        let files = if due.checkpoint { self.files_to_write(assignment) } else { Vec::new() };
        // Every member could draw the same grid and evaluate the same samples: rank 0 does.
        let is_first = assignment.rank == 0;
        let samples = due.samples && is_first;
        let is_archived = !files.is_empty() || samples;
        if !is_archived && !due.evaluation {
            return Ok(());
        }
        let ranges = self.ranges(&files, samples || due.evaluation);
        if is_archived {
            self.archive.make_room(self.model.steps(state.counters.position), 4 * floats(&ranges));
        }
        let snapshot = Arc::new(self.snapshot(state, &ranges)?);
        if due.evaluation {
            self.evaluations.push(snapshot.clone(), is_first);
        }
        if is_archived {
            let generation = assignment.group.generation;
            let is_written = !files.is_empty();
            let fingerprints =
                is_written.then(|| Fingerprints::of(&state.layout, &state.flat)).transpose()?;
            self.archive.push(Order { generation, snapshot, files, fingerprints, samples });
        }
        Ok(())
    }

    /// Gets memory for this member's first snapshot, beside training.
    pub(super) fn prepare_snapshot(&self, assignment: &Assignment) {
        let draws = assignment.rank == 0 && self.job.sample.every_steps != 0;
        self.archive.prepare(floats(&self.ranges(&self.files_to_write(assignment), draws)));
    }

    /// Ranges of the state's buffer that a snapshot has for these files, and if it `draws` for samples and
    /// evaluations. The files of a checkpoint are written by all members, so none of them copies all of it.
    fn ranges(&self, files: &[usize], draws: bool) -> Vec<Range<usize>> {
        let of_files = self.model.files(self.storage.storage(), self.job.job.data_shards).ranges(files);
        let drawn = weights(&self.model.layout).filter(|_| draws);
        joined(of_files.into_iter().chain(drawn).collect())
    }

    /// Copies ranges of a state to host memory.
    pub(super) fn snapshot(&self, state: &State, ranges: &[Range<usize>]) -> Result<Snapshot, c10d::Error> {
        let (step, phase) = self.model.place(state.counters.position);
        Snapshot::of(state, (step, phase.index), ranges)
    }

    /// Returns this member's share of a checkpoint's files: they are dealt to all members that see the
    /// storage.
    fn files_to_write(&self, assignment: &Assignment) -> Vec<usize> {
        let members = &assignment.group.members;
        if !members[assignment.rank as usize].writes_parts {
            return Vec::new();
        }
        let writers = members.iter().filter(|member| member.writes_parts).count();
        let before = members[..assignment.rank as usize].iter().filter(|member| member.writes_parts);
        let first = before.count();
        (first..self.model.file_count(self.job.job.data_shards)).step_by(writers).collect()
    }

    /// Saves the last state and waits until it is stored, or the group is given up.
    pub(super) fn finish(
        &self,
        assignment: &Assignment,
        state: &State,
        complete: bool,
    ) -> Result<(), TeamError> {
        let samples = complete && self.job.sample.every_steps != 0;
        let evaluation = self.due(self.model.steps(state.counters.position)).evaluation;
        self.save(assignment, state, Due { checkpoint: true, samples, evaluation })?;
        let left = || self.session.is_aborted(assignment.group.generation);
        if !self.archive.drain(left) {
            // The members of the next group save this state again.
            return Err(c10d::Error::Aborted.into());
        }
        // If the member that makes the last evaluation is lost, the others are still here to make it.
        self.evaluations.drain(left);
        self.session.advance(Event::Saved);
        Ok(())
    }
}

/// Number of floats in these ranges.
fn floats(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(ExactSizeIterator::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pending_report_comes_out_as_it_went_in() {
        let newest =
            Circumstances { generation: 7, world_size: 3, images_per_second: 0.1, time: 1_753_000_000.25 };
        for scalars in [vec![], vec![0.5, f64::NEG_INFINITY, -0.0]] {
            let pending = Pending { scalars, newest };
            let counters = Counters { position: Position(5), ledger: u64::MAX, skipped: 2 };
            let words = pending.to_words(counters, 9);
            assert_eq!(Pending::from_words(&words), Some((counters, 9, pending)));
        }
        assert_eq!(Pending::from_words(&[0; 7]), None);
    }
}
