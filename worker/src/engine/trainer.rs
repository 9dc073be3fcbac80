//! A worker's part in the generations of a group, one after the other.

use std::sync::Arc;

use ganglion_membership::member::Event;
use ganglion_membership::{Checkpoint, Fault, Generation, Position, Start};
use ganglion_proto::job::Job;
use ganglion_proto::message::Assignment;
use ganglion_proto::trace::{Nothing, Track, now};
use serde_json::json;
use tch::{Device, no_grad};

use super::checkpoint_writer::Archive;
use super::finite::NonFinite;
use super::generation::{Team, TeamError};
use super::gradient_log::GradientLog;
use super::profile::Place;
use super::report::Pending;
use super::together::Together;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::init_weights::Beginning;
use crate::checkpoint::storage::{Reading, RunStorage};
use crate::data::{DataError, DataSet};
use crate::eval::beside::Evaluations;
use crate::nn::broken::guarded;
use crate::objective::Model;
use crate::session::Session;
use crate::state::State;

/// Everything a worker trains with, and the state that it holds.
pub(crate) struct Trainer {
    /// The job.
    pub job: Job,
    /// The model.
    pub model: Arc<Model>,
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
    /// Whether this worker has drawn a grid of real samples.
    pub drew_real: bool,
    /// Background evaluator of generated samples.
    pub evaluations: Evaluations,
    /// Log of shard gradients, if the environment asks for one.
    pub gradient_log: Option<GradientLog>,
    /// Verdicts on passes over several shards.
    pub together: Together,
    /// State after the newest commit; `None` before the first assignment.
    pub held: Option<Held>,
    /// Trace track of the training thread.
    pub track: Track,
}

/// State after the newest commit, with the report that goes with it.
pub(crate) struct Held {
    /// The state.
    pub state: State,
    /// The pending report.
    pub pending: Pending,
}

/// Reason why a generation ended early for this worker.
#[derive(Debug)]
enum Broken {
    /// The coordinator, or the end of this worker's part in the run, broke the group up.
    Aborted,
    /// The user's data is wrong.
    InputWrong(String),
    /// The generation failed, for this reason.
    Fault(Fault),
}

impl Trainer {
    /// Takes part in one generation until it ends, and says how.
    pub(crate) fn take_part(&mut self, assignment: &Assignment) {
        let ended = match guarded(|| self.train(assignment)) {
            Ok(trained) => trained.map_err(Broken::from),
            Err(broken) if broken.is_lack_of_memory() => {
                Err(Broken::Fault(Fault::Internal(broken.to_string())))
            }
            Err(broken) => Err(Broken::InputWrong(broken.to_string())),
        };
        let generation = assignment.group.generation;
        if self.track.is_on() {
            let args = json!({ "generation": generation.0, "reason": format!("{ended:?}") });
            self.track.instant("leave group", args);
            self.track.flush();
        }
        match ended {
            Ok(()) | Err(Broken::Aborted) => self.session.stopped(self.position(), None),
            Err(Broken::InputWrong(detail)) => self.session.input_wrong(detail),
            Err(Broken::Fault(fault)) => {
                tracing::info!("leaving generation {generation}: {fault:?}");
                self.session.stopped(self.position(), Some(fault));
            }
        }
    }

    /// Drops the held state, which was rolled back or invalidated: it must not be saved or passed on any
    /// more.
    pub(crate) fn drop_state(&mut self) {
        self.archive.discard();
        self.held = None;
    }

    /// Update index (`position`) of the state that this worker holds.
    fn position(&self) -> Option<Position> {
        self.held.as_ref().map(|held| held.state.counters.position)
    }

    /// Saves the state that this worker holds on its own, for a later coordinator: the unrecorded rows, all
    /// files, then the manifest, each only if it is not there. Returns the checkpoint's folder, or `None`
    /// if there is nothing to save.
    pub(crate) fn save_alone(&self) -> Result<Option<String>, CheckpointError> {
        let Some(Held { state, .. }) = self.held.as_ref().filter(|_| self.storage.seen) else {
            return Ok(None);
        };
        if state.counters.position == Position(0) {
            return Ok(None);
        }
        let files = self.model.files(self.storage.storage(), self.job.job.data_shards);
        let uncopied = |error| CheckpointError::Corrupt(format!("the state cannot be copied: {error}"));
        // All of it: the other members may hold an older one, or be lost.
        let whole = 0..state.layout.len;
        let snapshot = self.snapshot(state, &[whole]).map_err(uncopied)?;
        let rows = self.session.kept_rows();
        let worker = self.session.welcome().worker;
        let save = async || {
            self.storage.check().await?;
            files.write_rows(&snapshot, worker, &rows).await?;
            files.write_whole(&snapshot).await.map(Some)
        };
        // No other worker holds this state: a storage that is full may get room.
        self.storage.wait(self.storage.patiently(save))
    }

    fn train(&mut self, assignment: &Assignment) -> Result<(), TeamError> {
        let group = &assignment.group;
        // A new coordinator may have brought other cadences, or more steps.
        self.job = self.model.counting(self.session.welcome().job);
        self.evaluations.discard_after(self.model.steps(group.position));
        if let Start::Checkpoint(source, checkpoint) = &group.start
            && source.0 == assignment.rank
        {
            self.held = Some(self.read(assignment.group.generation, checkpoint)?);
            self.session.advance(Event::Read);
        }
        let (job, model, track) = (&self.job, &*self.model, &self.track);
        let place = Place { generation: group.generation.0, rank: assignment.rank };
        let form = || Team::form(assignment, &self.session, job, model, self.device);
        let mut team = track.during("form group", place, form)?;
        self.session.advance(Event::Formed);
        let (held, seed, device) = (&mut self.held, job.job.seed, self.device);
        let fresh = || match &self.beginning {
            Some(beginning) => beginning.state(&model.layout, seed, device),
            None => State::initial(model.layout.clone(), seed, device),
        };
        let start = || team.start(assignment, model, fresh, held);
        track.during(start_name(&group.start), place, start)?;
        let Some(mut held) = self.held.take() else {
            return Err(TeamError::Diverged("a group started without a state".to_string()));
        };
        held.state.cast();
        // Every member could draw the same: rank 0 does, and a later one again.
        if assignment.rank == 0 && !std::mem::replace(&mut self.drew_real, true) {
            self.archive.push_real(self.data.clone());
        }
        let rest = self.train_with(assignment, &mut team, &mut held);
        self.held = Some(held);
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
    fn read(&mut self, generation: Generation, checkpoint: &Checkpoint) -> Result<Held, TeamError> {
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
        let mut state = State::zeros(self.model.layout.clone(), self.device);
        no_grad(|| state.flat.copy_(&snapshot.floats(0..self.model.layout.len)));
        state.counters = snapshot.counters;
        self.track.slice(begun, now(), "read checkpoint", Nothing {});
        Ok(Held { state, pending: Pending::new(&self.model) })
    }

    fn begin_reading(&mut self, checkpoint: &Checkpoint) -> Result<Reading, TeamError> {
        let (storage, model, wanted) = (self.storage.clone(), self.model.clone(), checkpoint.clone());
        let data_shards = self.job.job.data_shards;
        let read = move || {
            let files = model.files(storage.storage(), data_shards);
            storage.wait(storage.patiently(async || files.read(&wanted).await))
        };
        Ok(Reading::of(self.reading.take(), checkpoint, read)?)
    }
}

impl From<TeamError> for Broken {
    fn from(error: TeamError) -> Broken {
        let internal = |error: &dyn std::fmt::Display| Broken::Fault(Fault::Internal(error.to_string()));
        match error {
            TeamError::Data(error) => match error.into_input() {
                Ok(detail) => Broken::InputWrong(detail),
                Err(other) => internal(&other),
            },
            TeamError::Diverged(detail) => Broken::Fault(Fault::Diverged(detail)),
            TeamError::Fenced(detail) => {
                tracing::warn!("{detail}");
                Broken::Fault(Fault::Peer)
            }
            TeamError::NonFinite(NonFinite { position, detail, stop }) => {
                Broken::Fault(Fault::NonFinite { position, detail, stop })
            }
            TeamError::Collective(c10d::Error::Aborted) => Broken::Aborted,
            TeamError::Collective(c10d::Error::PeerLost(detail)) => {
                tracing::info!("lost a peer: {detail}");
                Broken::Fault(Fault::Peer)
            }
            TeamError::Collective(c10d::Error::Timeout) => Broken::Fault(Fault::Timeout),
            error => internal(&error),
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
