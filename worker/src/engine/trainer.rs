//! The training loop.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use ganglion_membership::{Activity, Checkpoint, Fault, Generation, PlanKind, Position, Rank, Rested, Start};
use ganglion_proto::job::Job;
use ganglion_proto::message::{Assignment, FromWorker, GpuUse, MetricsRow};
use ganglion_proto::trace::{Nothing, Track, now};
use ganglion_proto::{failpoint, log};
use serde_json::json;
use tch::{Device, Tensor, no_grad};

use crate::checkpoint::init_weights::Beginning;
use crate::checkpoint::storage::{Reading, RunStorage};
use crate::checkpoint::{CheckpointError, Files, Snapshot, file_count};
use crate::data::{Batch, DataError, DataSet, Plan, Prefetcher};
use crate::device;
use crate::engine::checkpoint_writer::{Archive, Order};
use crate::engine::commit::{commit, skip};
use crate::engine::finite::{NonFinite, Verdict, judge};
use crate::engine::gradient_log::GradientLog;
use crate::engine::profile::{Laps, Part, Place};
use crate::engine::reduce::{Header, Reduced};
use crate::engine::team::{Carried, Circumstances, Team, TeamError};
use crate::eval::beside::Evaluations;
use crate::nn::Models;
use crate::nn::broken::guarded;
use crate::nn::tensor_bytes::{from_bytes, to_bytes};
use crate::objective::gan::{self, Gan};
use crate::objective::{Compute, Objective, Phase, Reads, ShardAt, ShardBatch};
use crate::session::{Session, unreachable};
use crate::state::{Counters, State, StateLayout};

/// Number of batches read ahead.
const READ_AHEAD: usize = 4;

/// Number of consecutive groups lost to a peer before they trained, after which a worker probes the other
/// members: a link that is refused, and not silent, would break one group after the other.
pub const UNFORMED: u32 = 3;

/// Everything a worker trains with, and the state that it holds.
pub struct Trainer {
    /// The job.
    pub job: Job,
    /// Generator and discriminator.
    pub models: Models,
    /// Layout of the state.
    pub layout: StateLayout,
    /// Initial weights of the run, if they are not drawn from the seed.
    pub beginning: Option<Beginning>,
    /// The training samples.
    pub data: Arc<DataSet>,
    /// Compute device.
    pub device: Device,
    /// Session with the coordinator.
    pub session: Arc<Session>,
    /// Checkpoint storage.
    pub storage: Arc<RunStorage>,
    /// A checkpoint being read, or already read for a group that never trained.
    pub reading: Option<Reading>,
    /// Background writer of checkpoints and sample grids.
    pub archive: Archive,
    /// Background evaluator of generated samples.
    pub evaluations: Evaluations,
    /// Log of shard gradients, if the environment asks for one.
    pub gradient_log: Option<GradientLog>,
    /// State after the newest commit; `None` before the first assignment.
    pub held: Option<(State, Carried)>,
    /// Number of consecutive groups that did not come to train.
    pub unformed: u32,
    /// Trace track of the training thread.
    pub track: Track,
}

/// Outcome of a generation for this worker.
#[derive(Debug)]
pub enum Rest {
    /// The job's last step is done (`complete`), or a planned stop.
    Finished {
        /// Whether the job's last step is done.
        complete: bool,
    },
    /// All members agreed to stop here for a planned change of the group.
    Planned,
    /// The coordinator, or the end of this worker's session, broke the group up.
    Aborted,
    /// The user's data is wrong.
    InputWrong(String),
    /// The generation failed, for this reason.
    Fault(Fault),
}

/// Loop state of one generation.
struct Course<'a> {
    phases: Vec<Phase>,
    compute: Box<dyn Compute + 'a>,
    /// Timings of the phases' parts.
    laps: Laps,
    batches: Prefetcher,
    /// Fingerprint of the parameters that the last commit updated.
    fingerprint: u64,
    /// Samples of the phase before, kept when the next phase reads the same.
    same: Option<Samples>,
    /// Samples of the next step, of which a part was computed during the wait for the other ranks.
    ahead: Option<Samples>,
}

/// Reports due on the state after a step.
#[derive(Clone, Copy, Default)]
struct Due {
    checkpoint: bool,
    samples: bool,
    evaluation: bool,
}

/// The real samples of a phase.
struct Samples {
    batch: Batch,
    /// By shard: (shards, b, c, h, w).
    images: Tensor,
    /// By shard: (shards, b), where the data set has labels.
    classes: Option<Tensor>,
}

impl Samples {
    /// Returns a shard's samples, by its index among this rank's shards. They are copied: the address they
    /// start at must not depend on how shards are dealt, since kernels may look at alignment.
    fn of_shard(&self, place: u32) -> ShardBatch {
        let own = |all: &Tensor| all.get(i64::from(place)).copy();
        ShardBatch { images: own(&self.images), classes: self.classes.as_ref().map(own) }
    }
}

/// Throughput since the last row of metrics.
struct Pace {
    since: Instant,
    steps: u64,
}

impl Pace {
    fn start() -> Pace {
        Pace { since: Instant::now(), steps: 0 }
    }

    /// Returns the circumstances of the step that was just committed.
    fn circumstances(&self, assignment: &Assignment, job: &Job) -> Circumstances {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seconds = self.since.elapsed().as_secs_f64().max(1e-9);
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // a rate for people
        let images_per_second = ((self.steps * job.samples_per_step()) as f64 / seconds) as f32;
        Circumstances {
            generation: assignment.group.generation.0,
            world_size: u32::try_from(assignment.group.members.len()).unwrap_or(u32::MAX),
            images_per_second,
            time: now.as_secs_f64(),
        }
    }
}

impl Trainer {
    /// Takes part in one generation until it ends.
    pub fn take_part(&mut self, assignment: &Assignment) -> Rest {
        let trained = match guarded(|| self.train(assignment)) {
            Ok(trained) => trained,
            Err(broken) if broken.is_lack_of_memory() => {
                return Rest::Fault(Fault::Internal(broken.to_string()));
            }
            Err(broken) => return Rest::InputWrong(broken.to_string()),
        };
        match trained {
            Ok(rest) => rest,
            Err(TeamError::Data(error)) => match error.into_input() {
                Ok(detail) => Rest::InputWrong(detail),
                Err(other) => Rest::Fault(Fault::Internal(other.to_string())),
            },
            Err(TeamError::Diverged(detail)) => Rest::Fault(Fault::Diverged(detail)),
            Err(TeamError::Fenced(detail)) => {
                tracing::warn!("{detail}");
                Rest::Fault(Fault::Peer)
            }
            Err(TeamError::NonFinite(NonFinite { position, detail, stop })) => {
                Rest::Fault(Fault::NonFinite { position, detail, stop })
            }
            Err(TeamError::Collective(error)) => match error {
                c10d::Error::Aborted => Rest::Aborted,
                c10d::Error::PeerLost(detail) => {
                    tracing::info!("lost a peer: {detail}");
                    Rest::Fault(Fault::Peer)
                }
                c10d::Error::Timeout => Rest::Fault(Fault::Timeout),
                other => Rest::Fault(Fault::Internal(other.to_string())),
            },
            Err(error) => Rest::Fault(Fault::Internal(error.to_string())),
        }
    }

    /// Update index (`position`) of the state that this worker holds.
    pub fn position(&self) -> Option<Position> {
        self.held.as_ref().map(|(state, _)| state.counters.position)
    }

    /// Saves the state that this worker holds on its own, for a later coordinator: the unrecorded rows, all
    /// files, then the manifest, each only if it is not there. Returns the checkpoint's folder, or `None`
    /// if there is nothing to save.
    pub fn save_alone(&self) -> Result<Option<String>, CheckpointError> {
        let usable = self.storage.seen && !self.session.is_void();
        let Some((state, _)) = self.held.as_ref().filter(|_| usable) else { return Ok(None) };
        if state.counters.position == Position(0) {
            return Ok(None);
        }
        let (job, models, layout) = (&self.job, &self.models, &self.layout);
        let files = Files { storage: self.storage.storage(), job, models, layout };
        let (snapshot, rows) = (self.snapshot(state), self.session.kept_rows());
        let worker = self.session.welcome().worker;
        let save = async || {
            self.storage.check().await?;
            files.write_rows(&snapshot, worker, &rows).await?;
            files.write_whole(&snapshot).await.map(Some)
        };
        // No other worker holds this state: a storage that is full may get room.
        self.storage.wait(self.storage.patiently(save))
    }

    fn train(&mut self, assignment: &Assignment) -> Result<Rest, TeamError> {
        let group = &assignment.group;
        // A new coordinator may have brought other cadences, or more steps.
        self.job = self.session.welcome().job;
        let starts_anew = !matches!(group.start, Start::Healed(_));
        if starts_anew || self.session.is_void() || self.position().is_some_and(|held| held > group.position)
        {
            // Rolled back, or invalidated: the held state must not be saved or passed on any more.
            self.archive.discard();
            self.evaluations.discard_after(group.position.0 / self.job.phases_per_step());
            self.held = None;
            self.session.void_is_gone();
        }
        if let Start::Checkpoint(source, checkpoint) = &group.start
            && source.0 == assignment.rank
        {
            self.held = Some(self.read(assignment.group.generation, checkpoint)?);
        }
        self.unformed += 1;
        let (job, models, layout, track) = (&self.job, &self.models, &self.layout, &self.track);
        let place = Place { generation: group.generation.0, rank: assignment.rank };
        let form = || Team::form(assignment, &self.session, job, models, layout, self.device);
        let mut team = track.during("form group", place, form)?;
        let (held, seed, device) = (&mut self.held, job.job.seed, self.device);
        let fresh = || match &self.beginning {
            Some(beginning) => beginning.state(layout, seed, device),
            None => State::initial(layout.clone(), seed, device),
        };
        let start = || team.start(&group.start, group.position, layout, &fresh, held, device);
        track.during(start_name(&group.start), place, start)?;
        let Some((mut state, mut carried)) = self.held.take() else {
            return Err(TeamError::Diverged("a group started without a state".to_string()));
        };
        state.cast();
        self.unformed = 0;
        let rest = self.train_with(assignment, &mut team, &mut state, &mut carried);
        self.held = Some((state, carried));
        if let Err(TeamError::Data(DataError::Input(_) | DataError::Sample { .. })) = &rest {
            // The group is still open: the other members wait in their reduce and do not take this one for
            // lost.
            self.save_before_the_end();
        }
        rest
    }

    /// Saves the state of this worker, which met a sample that it cannot read: that ends the run, but loses
    /// no step of it.
    fn save_before_the_end(&self) {
        let session = self.session.clone();
        let _pause = session.pause();
        match self.save_alone() {
            Ok(Some(folder)) => tracing::info!("saved {folder}"),
            Ok(None) => {}
            Err(error) => tracing::warn!("what this worker holds cannot be saved: {error}"),
        }
    }

    /// Reads a checkpoint. If the group is given up meanwhile, the reading is kept for the next group.
    fn read(
        &mut self,
        generation: Generation,
        checkpoint: &Checkpoint,
    ) -> Result<(State, Carried), TeamError> {
        let begun = now();
        let mut reading = self.begin_reading(checkpoint)?;
        let session = self.session.clone();
        let _pause = session.pause();
        let snapshot = loop {
            if let Some(read) = reading.poll(&self.storage) {
                break read?;
            }
            if self.session.is_aborted(generation) {
                self.reading = Some(reading);
                return Err(c10d::Error::Aborted.into());
            }
        };
        let mut state = State::zeros(self.layout.clone(), self.device);
        no_grad(|| state.flat.copy_(&from_bytes(&snapshot.flat)));
        state.counters = snapshot.counters;
        self.track.slice(begun, now(), "read checkpoint", Nothing {});
        Ok((state, Carried::default()))
    }

    fn begin_reading(&mut self, checkpoint: &Checkpoint) -> Result<Reading, TeamError> {
        let (storage, job, models, layout) =
            (self.storage.clone(), self.job.clone(), self.models.clone(), self.layout.clone());
        let wanted = checkpoint.clone();
        let read = move || {
            let (storage, job, models, layout) = (&storage, &job, &models, &layout);
            let files = Files { storage: storage.storage(), job, models, layout };
            storage.wait(storage.patiently(async || files.read(&wanted).await))
        };
        Ok(Reading::of(self.reading.take(), checkpoint, read)?)
    }

    /// The loop: step by step, phase by phase, until the job or the group ends.
    fn train_with(
        &mut self,
        assignment: &Assignment,
        team: &mut Team,
        state: &mut State,
        carried: &mut Carried,
    ) -> Result<Rest, TeamError> {
        self.catch_up(assignment, state, carried);
        let gan = self.gan();
        let phases = gan.phases();
        let last_step = self.job.last_step(self.data.len() as u64);
        let batches = self.read_ahead(team, state.counters, last_step);
        let at = Place { generation: team.generation, rank: assignment.rank };
        let laps = Laps::start(self.track.clone(), at);
        let (compute, kept) = (gan.begin(), phases.clone());
        let mut course =
            Course { phases: kept, compute, laps, batches, fingerprint: 0, same: None, ahead: None };
        let mut pace = Pace::start();
        let mut agreed = None;
        let (mut step, mut first) = place(state.counters, &phases);
        while step < last_step && agreed != Some(PlanKind::Stop) {
            for phase in &phases[first..] {
                let plan = self.run_phase(team, state, carried, *phase, &mut course)?;
                agreed = plan.or(agreed);
                if agreed == Some(PlanKind::Regroup) {
                    break;
                }
            }
            (step, first) = place(state.counters, &phases);
            if first == 0 {
                let stopping = agreed == Some(PlanKind::Stop);
                self.report(assignment, state, carried, &mut pace, &mut course.laps, stopping);
            }
            if agreed == Some(PlanKind::Regroup) {
                return Ok(Rest::Planned);
            }
        }
        course.laps.rest();
        self.track.during("save", Nothing {}, || self.finish(assignment, state, step == last_step))
    }

    /// Makes up for reports that a change of the group cut short: a member that was synchronised past the
    /// end of a step did not report it, and one that was lost did not save its share of a checkpoint.
    fn catch_up(&self, assignment: &Assignment, state: &State, carried: &Carried) {
        let steps_done = state.counters.position.0 / self.job.phases_per_step();
        self.session.report_kept(Rank(assignment.rank), steps_done);
        self.evaluations.take_over();
        let samples = self.data.len() as u64;
        let (step, phase) = place(state.counters, &gan::phases(&self.job));
        let at_the_end_of_a_step = phase == 0 && (1..self.job.last_step(samples)).contains(&step);
        if at_the_end_of_a_step && matches!(assignment.group.start, Start::Healed(_)) {
            if self.job.metrics_due(step, samples) && carried.newest.generation > 0 {
                // The source of this member's state has reported the row, and may be gone before it was
                // recorded.
                self.session.report_unless_kept(Rank(assignment.rank), self.row(state, carried));
            }
            self.save(assignment, state, self.due(step));
        } else if at_the_end_of_a_step {
            // Of the last group's states perhaps only the saved one is left: its evaluation may still be
            // missing.
            self.save(assignment, state, Due { evaluation: self.due(step).evaluation, ..Due::default() });
        }
    }

    fn read_ahead(&self, team: &Team, counters: Counters, end_step: u64) -> Prefetcher {
        let phases = gan::phases(&self.job);
        let (first_step, first_phase) = place(counters, &phases);
        let discriminator_phases = self.job.loss.discriminator_steps;
        let first_phase = u32::try_from(first_phase).expect("a step has few phases");
        // In the middle of a step only the generator's phase may be left, which reads no data, or again those
        // of the phase before it.
        let pairs = self.job.loss.kind.pairs();
        let skip = first_phase >= discriminator_phases && !pairs;
        let plan = Plan {
            seed: self.job.job.seed,
            data_shards: self.job.job.data_shards,
            shard_batch: self.job.job.shard_batch,
            phases: discriminator_phases,
            shards: team.shards.own(),
            first_step: first_step + u64::from(skip),
            first_phase: if skip { 0 } else { first_phase.min(discriminator_phases - 1) },
            end_step,
            depth: READ_AHEAD,
            changes: self.data.changes(&self.job),
        };
        Prefetcher::start_with(self.data.clone(), plan, device::upload(self.device))
    }

    /// Runs one phase: the gradients of this rank's shards, the mean over all shards, the update. Returns
    /// the planned change that all members agree on.
    fn run_phase(
        &self,
        team: &mut Team,
        state: &mut State,
        carried: &mut Carried,
        phase: Phase,
        course: &mut Course<'_>,
    ) -> Result<Option<PlanKind>, TeamError> {
        let position = state.counters.position.0;
        let step = position / self.job.phases_per_step();
        course.laps.begin(phase.module, step + 1, position);
        log::note("step", step + 1);
        let samples = self.samples(phase, course)?;
        course.laps.lap(Part::Data);
        let plan = self.session.plan();
        // Samples that were read before are in the sample checksum already.
        let counted = samples.as_ref().filter(|_| phase.reads == Reads::Next);
        let header = Header {
            generation: team.generation,
            position,
            fingerprint: course.fingerprint,
            plan: plan.map_or(0, |plan| plan.number),
            ledger: counted.map_or(0, |samples| samples.batch.ledger),
        };
        let (shards, all_reduce) = (team.shards.own(), team.all_reduce(phase.module));
        all_reduce.begin()?;
        self.session.set_activity(Activity::Computing);
        for shard in shards.clone() {
            let batch = samples.as_ref().map(|samples| samples.of_shard(shard - shards.start));
            let (at, mut grad) = (ShardAt { phase, step, shard }, all_reduce.buffer());
            course.compute.gradient(at, state, batch.as_ref(), &mut grad).map_err(TeamError::Compute)?;
            if let Some(log) = &self.gradient_log {
                log.record(position, phase, shard, &grad)?;
            }
            self.session.leaf_done(course.laps.leaf(shard));
            all_reduce.add(shard, grad);
        }
        course.laps.lap(Part::Compute);
        // The header carries the fingerprint of the last commit: other ranks detect a divergence before
        // they commit this phase.
        all_reduce.send(header)?;
        if all_reduce.has_peers() {
            course.laps.lap(Part::Other);
            self.look_ahead(phase, step + 1, shards.start, state, course)?;
            course.laps.lap(Part::Compute);
            self.session.set_activity(Activity::Waiting);
        }
        let reduced = all_reduce.wait(&mut course.laps)?;
        course.laps.lap(Part::Other);
        // Past the lease the coordinator may have formed another group: nothing more may be committed.
        if !self.session.may_commit() {
            return Err(c10d::Error::Aborted.into());
        }
        course.fingerprint = self.update(team, state, carried, phase, &reduced)?;
        course.laps.lap(Part::Commit);
        let next = course.phases.get(phase.index as usize + 1);
        match samples {
            Some(samples) if next.is_some_and(|next| next.reads == Reads::Same) => {
                course.same = Some(samples);
            }
            Some(samples) => course.batches.recycle(samples.batch),
            None => {}
        }
        // The plan as it went into the header: a newer one may be here by now.
        Ok(plan.filter(|plan| plan.number == reduced.agreed_plan).map(|plan| plan.kind))
    }

    /// Updates the state by a phase's reduced gradient, or skips the phase where that is not finite.
    /// Returns the fingerprint of the updated parameters.
    fn update(
        &self,
        team: &Team,
        state: &mut State,
        carried: &mut Carried,
        phase: Phase,
        reduced: &Reduced,
    ) -> Result<u64, TeamError> {
        let (module, layout, mean) = (phase.module, team.leaf_layout(phase.module), &reduced.mean);
        // Numbered by update index: this member has all parts of the phase and may be the only one; then it
        // is one update ahead.
        failpoint::reached("commit", state.counters.position.0);
        match judge(&self.job, state.counters, module, layout, mean, &team.skips)? {
            Verdict::Commit => commit(&self.job, state, phase, layout, mean, reduced.ledger)?,
            Verdict::End(fault) => return Err(fault.into()),
            Verdict::Skip(detail) => {
                self.session.send(FromWorker::PhaseSkipped(state.counters.position, detail));
                skip(&self.job, state, phase, reduced.ledger);
            }
        }
        let position = state.counters.position;
        failpoint::reached("committed", position.0);
        carried.note(module, layout, mean);
        let fingerprint = c10d::aten::fingerprint(state.parameters(module), position.0)?;
        self.session.set_position(position);
        Ok(fingerprint)
    }

    fn gan(&self) -> Gan<'_> {
        let Trainer { job, models, device, data, .. } = self;
        Gan { job, models, labels: data.labels(), device: *device }
    }

    /// Returns the samples of a phase, if it reads any.
    fn samples(&self, phase: Phase, course: &mut Course<'_>) -> Result<Option<Samples>, TeamError> {
        let known = match phase.reads {
            Reads::Nothing => return Ok(None),
            Reads::Same => course.same.take(),
            Reads::Next => course.ahead.take(),
        };
        match known {
            Some(samples) => Ok(Some(samples)),
            // This also reads the same samples again, for a group that begins in the middle of a step.
            None => Ok(Some(self.samples_of(self.next_batch(&mut course.batches)?))),
        }
    }

    /// Returns the next batch as soon as it is read. Data that is late is no member's fault: the wait
    /// counts as a pause, and a warning is logged.
    fn next_batch(&self, batches: &mut Prefetcher) -> Result<Batch, DataError> {
        if let Some(batch) = batches.try_next() {
            return Ok(batch);
        }
        let _pause = self.session.pause();
        let (since, limit) = (Instant::now(), self.session.limits().deadline);
        if !batches.wait(limit) {
            tracing::warn!("the data do not come: waiting for {} s for the next batch", limit.as_secs_f64());
            let batch = batches.next();
            tracing::warn!("the data come again, after {:.0} s", since.elapsed().as_secs_f64());
            return batch;
        }
        batches.next()
    }

    /// Computes a part of the next step's gradient before a phase's update, if its samples have arrived.
    fn look_ahead(
        &self,
        under_way: Phase,
        step: u64,
        shard: u32,
        state: &State,
        course: &mut Course<'_>,
    ) -> Result<(), TeamError> {
        if !course.compute.looks_ahead(under_way) {
            return Ok(());
        }
        let Some(batch) = course.batches.try_next() else { return Ok(()) };
        let samples = self.samples_of(batch);
        let at = ShardAt { phase: course.phases[0], step, shard };
        course.compute.look_ahead(at, state, &samples.of_shard(0)).map_err(TeamError::Compute)?;
        course.ahead = Some(samples);
        Ok(())
    }

    /// Returns a batch's samples by shard.
    fn samples_of(&self, batch: Batch) -> Samples {
        let labels = (!batch.labels.is_empty()).then(|| Tensor::from_slice(&batch.labels));
        let by_shard = |labels: Tensor| labels.view([-1, i64::from(self.job.job.shard_batch)]);
        let classes = labels.map(|labels| by_shard(labels).to_device(self.device));
        Samples { images: self.real_images(&batch), classes, batch }
    }

    /// Returns a batch's images by shard: (shards, b, c, h, w).
    fn real_images(&self, batch: &Batch) -> Tensor {
        let signed = |n: usize| i64::try_from(n).expect("an image is small");
        let shape = self.data.shape();
        let batch_size = i64::from(self.job.job.shard_batch);
        let sizes = [-1, batch_size, signed(shape.channels), signed(shape.height), signed(shape.width)];
        match &batch.uploaded {
            Some(uploaded) => uploaded.view(sizes),
            None => Tensor::from_slice(&batch.pixels).view(sizes).to_device(self.device),
        }
    }

    /// Reports a finished step: metrics, samples, checkpoints. Waits only while too many rows are unrecorded
    /// or too many checkpoints are unwritten.
    fn report(
        &self,
        assignment: &Assignment,
        state: &State,
        carried: &mut Carried,
        pace: &mut Pace,
        laps: &mut Laps,
        stopping: bool,
    ) {
        let samples = self.data.len() as u64;
        let step = state.counters.position.0 / self.job.phases_per_step();
        pace.steps += 1;
        if self.job.metrics_due(step, samples) || stopping {
            carried.newest = pace.circumstances(assignment, &self.job);
            let [discriminator, generator] = laps.take(pace.steps);
            let profile = [("discriminator", discriminator), ("generator", generator)].into_iter().collect();
            let GpuUse { memory_bytes, utilisation } = self.session.gpu_use();
            let row = MetricsRow {
                profile,
                gpu_memory_bytes: memory_bytes,
                gpu_utilisation: utilisation,
                ..self.row(state, carried)
            };
            self.session.report(Rank(assignment.rank), row);
            self.session.wait_for_room(assignment.group.generation);
            self.track.flush();
            *pace = Pace::start();
        }
        // The last state, of the job or before a stop, is saved by `finish`.
        let last = stopping || step == self.job.last_step(samples);
        if !last {
            self.save(assignment, state, self.due(step));
        }
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
    fn row(&self, state: &State, carried: &Carried) -> MetricsRow {
        let step = state.counters.position.0 / self.job.phases_per_step();
        let Circumstances { generation, world_size, images_per_second, time } = carried.newest;
        let images_seen = step * self.job.samples_per_step();
        #[allow(clippy::cast_precision_loss)] // counts of images are far below 2^53
        let epoch = images_seen as f64 / self.data.len() as f64;
        MetricsRow {
            step,
            images_seen,
            ledger: state.counters.ledger,
            skipped: state.counters.skipped,
            scalars: carried.scalars(),
            epoch,
            time,
            generation,
            world_size,
            images_per_second: f64::from(images_per_second),
            ..MetricsRow::default()
        }
    }

    fn save(&self, assignment: &Assignment, state: &State, due: Due) {
        let files = if due.checkpoint { self.files_to_write(assignment) } else { Vec::new() };
        // Every member could draw the same grid and evaluate the same samples: rank 0 does.
        let is_first = assignment.rank == 0;
        let samples = due.samples && is_first;
        if files.is_empty() && !samples && !due.evaluation {
            return;
        }
        let snapshot = Arc::new(self.snapshot(state));
        if due.evaluation {
            self.evaluations.push(snapshot.clone(), is_first);
        }
        if !files.is_empty() || samples {
            let generation = assignment.group.generation;
            self.archive.push(Order { generation, snapshot, files, samples });
        }
    }

    fn snapshot(&self, state: &State) -> Snapshot {
        let position = state.counters.position.0;
        Snapshot {
            step: position / self.job.phases_per_step(),
            phase: u32::try_from(position % self.job.phases_per_step()).expect("a step has few phases"),
            flat: to_bytes(&state.flat),
            counters: state.counters,
        }
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
        (first..file_count(&self.layout, self.job.job.data_shards)).step_by(writers).collect()
    }

    /// Saves the last state and waits until it is stored, or the group is given up.
    fn finish(&self, assignment: &Assignment, state: &State, complete: bool) -> Result<Rest, TeamError> {
        let samples = complete && self.job.sample.every_steps != 0;
        let step = state.counters.position.0 / self.job.phases_per_step();
        let evaluation = self.due(step).evaluation;
        self.save(assignment, state, Due { checkpoint: true, samples, evaluation });
        let generation = assignment.group.generation;
        let left = || self.session.end().is_some() || self.session.is_aborted(generation);
        if !self.archive.drain(left) {
            // The members of the next group save this state again.
            return Ok(Rest::Aborted);
        }
        // If the member that makes the last evaluation is lost, the others are still here to make it.
        self.evaluations.drain(left);
        Ok(Rest::Finished { complete })
    }

    /// Reports to the coordinator how this worker's part in a generation ended.
    pub fn tell(&self, assignment: &Assignment, rest: Rest) {
        let generation = assignment.group.generation;
        if self.track.is_on() {
            let args = json!({ "generation": generation.0, "reason": format!("{rest:?}") });
            self.track.instant("leave group", args);
            self.track.flush();
        }
        let mut finished = None;
        match rest {
            Rest::Finished { complete } => finished = Some(complete),
            Rest::InputWrong(detail) => return self.session.send(FromWorker::InputError(detail)),
            Rest::Fault(Fault::Diverged(detail)) => {
                tracing::warn!("leaving generation {generation}: {detail}");
                self.archive.discard();
                self.session.left(generation, Fault::Diverged(detail));
            }
            Rest::Fault(fault) => {
                tracing::info!("leaving generation {generation}: {fault:?}");
                let fault = self.with_links(assignment, fault);
                self.session.left(generation, fault);
            }
            Rest::Aborted if self.session.take_probe() => {
                if let links @ Fault::Links(_) = self.with_links(assignment, Fault::Timeout) {
                    self.session.left(generation, links);
                }
            }
            Rest::Aborted | Rest::Planned => {}
        }
        self.session.rested(generation, Rested { position: self.position(), finished });
    }

    /// Adds the unreachable members to a fault, after a timeout or when one group after the other cannot
    /// form. The fault stays as it is if all can be reached.
    fn with_links(&self, assignment: &Assignment, fault: Fault) -> Fault {
        let is_refused = fault == Fault::Peer && self.unformed >= UNFORMED;
        if fault != Fault::Timeout && !is_refused {
            return fault;
        }
        let lost = unreachable(&assignment.addresses, self.session.limits().attempt);
        match lost.as_slice() {
            [] => fault,
            lost => {
                Fault::Links(lost.iter().filter_map(|rank| Some(Rank(u32::try_from(*rank).ok()?))).collect())
            }
        }
    }
}

/// Name of a group's start in a trace.
fn start_name(start: &Start) -> &'static str {
    match start {
        Start::Fresh => "draw initial state",
        Start::Healed(_) => "heal",
        Start::Checkpoint(..) => "share checkpoint",
    }
}

/// The step of an update index, and the index of its next phase.
fn place(counters: Counters, phases: &[Phase]) -> (u64, usize) {
    let per_step = phases.len() as u64;
    let phase = usize::try_from(counters.position.0 % per_step).expect("a step has few phases");
    (counters.position.0 / per_step, phase)
}
