//! The loop: update by update, until the job or the group ends.

use std::ops::Range;
use std::time::Instant;

use ganglion_membership::member::{Event, Schedule};
use ganglion_membership::{Activity, Position};
use ganglion_proto::message::{Assignment, FromWorker};
use ganglion_proto::trace::Nothing;
use ganglion_proto::{failpoint, log};
use tch::Tensor;

use super::commit::{commit, pass, skip};
use super::finite::{Rules, Verdict, judge};
use super::generation::{Team, TeamError};
use super::profile::{Laps, Part, Place};
use super::reduce::tree::nodes_of;
use super::reduce::{Header, Reduced};
use super::report::Pace;
use super::together::Inputs;
use super::trainer::{Held, Trainer};
use crate::data::{Batch, Beside, DataError, Draw, Plan, Prefetcher};
use crate::device;
use crate::objective::{Compute, Phase, Reads, Samples, ShardAt, ShardBatch, ShardsAt};
use crate::session::Work;

/// Number of batches read ahead.
const READ_AHEAD: usize = 4;

/// Largest number of draws that are made ahead for a batch: they wait in memory.
const MOST_AHEAD: usize = 1 << 22;

/// Loop state of one generation.
pub(super) struct Course<'a> {
    compute: Box<dyn Compute + 'a>,
    /// Throughput since the last row.
    pub(super) pace: Pace,
    /// Timings of the phases' parts.
    pub(super) laps: Laps,
    batches: Prefetcher,
    /// Fingerprint of the parameters that the last commit updated.
    fingerprint: u64,
    /// Samples of a phase before, kept while a later phase of the step reads the same.
    same: Option<Loaded>,
    /// Samples of the next step, of which a part was computed during the wait for the other ranks.
    ahead: Option<Loaded>,
}

/// The real samples of a phase.
struct Loaded {
    batch: Batch,
    /// Tensors of a shard's batch, with the shard as one axis more before.
    by_shard: ShardBatch,
}

impl Loaded {
    /// Returns the samples of shards, of which this rank's first is `first`.
    fn of_shards(&self, at: &ShardsAt, first: u32) -> ShardBatch {
        let (place, count) = (i64::from(at.shards.start - first), i64::from(at.count()));
        let own = |all: &Tensor| all.narrow(0, place, count).flatten(0, 1);
        match count {
            // Copied: the address that they start at must not depend on how shards are dealt, since kernels
            // may look at alignment.
            1 => self.by_shard.map(|all| own(all).copy()),
            _ => self.by_shard.map(own),
        }
    }
}

impl Trainer {
    /// Trains from the held state on, until the job or the group ends.
    pub(super) fn train_with(
        &self,
        assignment: &Assignment,
        team: &mut Team,
        held: &mut Held,
    ) -> Result<(), TeamError> {
        self.evaluations.take_over();
        let last_step = self.job.last_step(self.data.len() as u64);
        let at = Place { generation: team.generation, rank: assignment.rank };
        let mut course = Course {
            compute: self.model.objective.begin(),
            pace: Pace::start(),
            laps: Laps::start(self.track.clone(), at, &self.model.names()),
            batches: self.read_ahead(team, held.state.counters.position, last_step),
            fingerprint: 0,
            same: None,
            ahead: None,
        };
        let phases_per_step = self.model.shape().phases();
        let schedule = Schedule { end: Position(last_step.saturating_mul(phases_per_step)), phases_per_step };
        let mut is_first = true;
        let mut next = self.session.advance(Event::Synced(schedule));
        loop {
            for work in next {
                match work {
                    Work::ReportStep(reported) => {
                        self.report(assignment, held, reported, &mut course)?;
                    }
                    Work::Save(complete) => {
                        course.laps.rest();
                        let save = || self.finish(assignment, &held.state, complete);
                        return self.track.during("save", Nothing {}, save);
                    }
                    Work::Leave => return Ok(()),
                    Work::Read | Work::Form | Work::SyncState | Work::Run(_) => {}
                }
            }
            let (_, phase) = self.model.place(held.state.counters.position);
            let agreed = self.run_phase(team, held, phase, &mut course)?;
            // Not earlier: what the first step of a group takes is what its members wait for.
            if self.model.is_last(phase) && std::mem::take(&mut is_first) {
                self.prepare_snapshot(assignment);
            }
            let position = held.state.counters.position;
            next = self.session.advance(Event::Committed { position, agreed });
        }
    }

    /// Runs one phase: the gradients of this rank's shards, the mean over all shards, the update. Returns
    /// the number of the plan that all members proposed, 0 if there is none.
    fn run_phase(
        &self,
        team: &mut Team,
        held: &mut Held,
        phase: Phase,
        course: &mut Course<'_>,
    ) -> Result<u64, TeamError> {
        let position = held.state.counters.position;
        let step = self.model.steps(position);
        course.laps.begin(self.model.name(phase), step + 1, position.0);
        log::note("step", step + 1);
        // In a step in which the phase does not run, only headers are exchanged.
        let runs = phase.runs_in(step);
        let samples = if runs { self.samples(phase, course)? } else { None };
        course.laps.lap(Part::Data);
        self.add_shards(team, held, (phase, samples.as_ref()), course)?;
        let (first_shard, all_reduce) = (team.shards().own().start, &mut team.all_reduce);
        // Samples that were read before are in the sample checksum already.
        let counted = samples.as_ref().filter(|_| phase.reads == Reads::Next);
        // The header carries the fingerprint of the last commit: other ranks detect a divergence before
        // they commit this phase.
        let header = Header {
            generation: team.generation,
            position: position.0,
            fingerprint: course.fingerprint,
            // As late as possible: a plan that came meanwhile takes effect a phase earlier.
            plan: self.session.propose(),
            ledger: counted.map_or(0, |samples| samples.batch.ledger),
        };
        all_reduce.send(header)?;
        if all_reduce.has_peers() {
            course.laps.lap(Part::Other);
            self.look_ahead(held, phase, first_shard, course)?;
            course.laps.lap(Part::Compute);
            self.session.set_activity(Activity::Waiting);
        }
        let reduced = all_reduce.wait(&mut course.laps)?;
        course.laps.lap(Part::Other);
        // Past the lease the coordinator may have formed another group: nothing more may be committed.
        if !self.session.may_commit() {
            return Err(c10d::Error::Aborted.into());
        }
        course.fingerprint = if runs {
            self.update(team, held, phase, &reduced)?
        } else {
            self.pass(held, phase, course.fingerprint)
        };
        course.laps.lap(Part::Commit);
        self.put_away(samples, step, phase, course);
        Ok(reduced.agreed_plan)
    }

    /// Computes the gradients of this rank's shards, and adds them up.
    fn add_shards(
        &self,
        team: &mut Team,
        held: &Held,
        (phase, samples): (Phase, Option<&Loaded>),
        course: &mut Course<'_>,
    ) -> Result<(), TeamError> {
        let position = held.state.counters.position;
        let step = self.model.steps(position);
        let (reduce, layout) = self.model.reduce_of(phase, step);
        let (shards, all_reduce) = (team.shards().own(), &mut team.all_reduce);
        all_reduce.begin(reduce)?;
        let mut launched = Vec::new();
        self.session.set_activity(Activity::Computing);
        let samples = |at: &ShardsAt| samples.map(|samples| samples.of_shards(at, shards.start));
        let inputs = Inputs { state: &held.state, samples: &samples, layout, device: self.device };
        let runs = phase.runs_in(step);
        let (data_shards, log) = (self.job.job.data_shards, self.gradient_log.as_ref());
        // A log has the gradient of each shard.
        let most = if runs && log.is_none() { course.compute.most_together(phase) } else { 1 };
        for node in nodes_of(shards.clone(), data_shards, self.together.most(most)) {
            let at = ShardsAt { phase, step, shards: node.leaves(data_shards) };
            let mut buffer = |shard| all_reduce.buffer(layout, shard);
            let gradient = if runs {
                let sum = self.together.sum(&at, &inputs, &mut *course.compute, &mut buffer);
                sum.map_err(TeamError::Compute)?
            } else {
                buffer(at.shards.start)
            };
            if let Some(log) = log.filter(|_| runs) {
                log.record(position.0, at.first(), self.model.name(phase), &gradient)?;
            }
            all_reduce.add(node, gradient);
            match device::mark(self.device).map_err(TeamError::Compute)? {
                Some(mark) => launched.push((at.shards.start, mark)),
                None => self.session.leaf_done(course.laps.leaf(at.shards.start)),
            }
        }
        // Launches return at once: only here is it known how long a GPU takes for a shard, by which the
        // coordinator judges whether a worker is late.
        for (shard, mark) in launched {
            mark.wait().map_err(TeamError::Compute)?;
            self.session.leaf_done(course.laps.leaf(shard));
        }
        device::check_memory(self.device).map_err(TeamError::Compute)?;
        course.laps.lap(Part::Compute);
        Ok(())
    }

    /// Updates the state by a phase's reduced gradient, or skips the phase where that is not finite.
    /// Returns the fingerprint of the updated parameters.
    fn update(
        &self,
        team: &Team,
        held: &mut Held,
        phase: Phase,
        reduced: &Reduced,
    ) -> Result<u64, TeamError> {
        let (model, Held { state, pending }) = (&self.model, held);
        // Numbered by update index: this member has all parts of the phase and may be the only one; then it
        // is one update ahead.
        failpoint::reached("commit", state.counters.position.0);
        let rules = Rules { policy: self.job.job.non_finite, skips: &team.skips };
        match judge(rules, model, phase, state.counters, &reduced.mean)? {
            Verdict::Commit => commit(model, state, phase, &reduced.mean, reduced.ledger)?,
            Verdict::End(fault) => return Err(fault.into()),
            Verdict::Skip(detail) => {
                self.session.send(FromWorker::PhaseSkipped(state.counters.position, detail));
                skip(model, state, phase, &reduced.mean, reduced.ledger)?;
            }
        }
        let position = state.counters.position;
        failpoint::reached("committed", position.0);
        pending.note(model, phase, &reduced.mean);
        // Of several networks, each one's seeds the next one's.
        let of = |seed, network| c10d::aten::fingerprint(state.parameters(network), seed);
        let fingerprint = phase.updates.iter().try_fold(position.0, of)?;
        self.session.set_position(position);
        Ok(fingerprint)
    }

    /// Commits a phase in a step in which it does not run, after a commit with this fingerprint. Returns the
    /// fingerprint for the next header.
    fn pass(&self, held: &mut Held, phase: Phase, fingerprint: u64) -> u64 {
        let state = &mut held.state;
        failpoint::reached("commit", state.counters.position.0);
        pass(&self.model, state, phase);
        let position = state.counters.position;
        failpoint::reached("committed", position.0);
        self.session.set_position(position);
        fingerprint
    }

    /// Computes a part of the next step's gradient before a step's last update, if its samples have
    /// arrived.
    fn look_ahead(
        &self,
        held: &Held,
        under_way: Phase,
        shard: u32,
        course: &mut Course<'_>,
    ) -> Result<(), TeamError> {
        if !self.model.is_last(under_way) || !course.compute.looks_ahead() {
            return Ok(());
        }
        let Some(batch) = course.batches.try_next() else { return Ok(()) };
        let samples = self.samples_of(batch, &mut *course.compute);
        let step = self.model.steps(held.state.counters.position) + 1;
        let at = ShardAt { phase: self.model.phases()[0], step, shard };
        let own = ShardsAt { phase: at.phase, step, shards: shard..shard + 1 };
        let computed = course.compute.look_ahead(at, &held.state, &samples.of_shards(&own, shard));
        computed.map_err(TeamError::Compute)?;
        course.ahead = Some(samples);
        Ok(())
    }

    fn read_ahead(&self, team: &Team, position: Position, end_step: u64) -> Prefetcher {
        let (step, phase) = self.model.place(position);
        // In the middle of a step perhaps only phases are left that read nothing, or again what was read
        // before.
        let (first_step, first_phase) = match self.model.next_reader(step, phase.index) {
            Some(reader) => (step, self.model.batch_of(reader)),
            None => (step + 1, 0),
        };
        let plan = Plan {
            seed: self.job.job.seed,
            data_shards: self.job.job.data_shards,
            shard_batch: self.job.job.shard_batch,
            phases: self.model.batches_per_step(),
            shards: team.shards().own(),
            first_step,
            first_phase,
            end_step,
            depth: READ_AHEAD,
            changes: self.data.changes(&self.job),
        };
        let draw = self.draws_ahead(team.shards().own());
        let beside = Beside { draw: Some(draw), upload: device::upload(self.device) };
        Prefetcher::start_with(self.data.clone(), plan, beside)
    }

    /// Returns a function from a step and a batch of it to the draws of the phase that reads the batch, and
    /// of those up to the next.
    fn draws_ahead(&self, shards: Range<u32>) -> Draw {
        let model = self.model.clone();
        Box::new(move |step, batch| {
            let phases = model.phases().iter().copied();
            let own = phases.filter(|phase| phase.runs_in(step) && model.newest_batch(*phase) == batch);
            let at = own.flat_map(|phase| shards.clone().map(move |shard| ShardAt { phase, step, shard }));
            let mut numbers = 0;
            let draws = at.flat_map(|at| model.objective.draws(at));
            // What is left out is drawn when it is needed.
            let few = draws.take_while(|(_, tensors)| {
                numbers += tensors.iter().map(Tensor::numel).sum::<usize>();
                numbers <= MOST_AHEAD
            });
            few.collect()
        })
    }

    /// Returns the samples of a phase, if it reads any.
    fn samples(&self, phase: Phase, course: &mut Course<'_>) -> Result<Option<Loaded>, TeamError> {
        let known = match phase.reads {
            Reads::Nothing => return Ok(None),
            Reads::Same => course.same.take(),
            Reads::Next => course.ahead.take(),
        };
        match known {
            Some(samples) => Ok(Some(samples)),
            // This also reads the same samples again, for a group that begins in the middle of a step.
            None => {
                let batch = self.next_batch(&mut course.batches)?;
                Ok(Some(self.samples_of(batch, &mut *course.compute)))
            }
        }
    }

    /// Keeps samples for a later phase of the step, or recycles their memory.
    fn put_away(&self, samples: Option<Loaded>, step: u64, phase: Phase, course: &mut Course<'_>) {
        let Some(samples) = samples else { return };
        let next = self.model.next_reader(step, phase.index + 1);
        if next.is_some_and(|next| next.reads == Reads::Same) {
            course.same = Some(samples);
        } else {
            course.batches.recycle(samples.batch);
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

    /// Returns a batch's samples by shard; `compute` gets the draws that came with it.
    fn samples_of(&self, mut batch: Batch, compute: &mut dyn Compute) -> Loaded {
        compute.keep(std::mem::take(&mut batch.draws));
        let of_shard = [-1, i64::from(self.job.job.shard_batch)];
        let samples = match &batch.uploaded {
            Some(uploaded) => Samples::of_pixels(uploaded, self.data.shape(), &of_shard),
            None => Samples::new(&batch.values, self.data.shape(), &of_shard),
        };
        let labels = (!batch.labels.is_empty()).then(|| Tensor::from_slice(&batch.labels));
        let by_shard = ShardBatch { samples, classes: labels.map(|labels| labels.view(of_shard)) };
        Loaded { by_shard: by_shard.to(self.device), batch }
    }
}
