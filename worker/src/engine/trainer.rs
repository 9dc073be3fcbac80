//! A worker's part in the generations of a group, one after the other.

use std::sync::Arc;

use ganglion_membership::{Checkpoint, Fault, Generation, Position, Rank, Rested, Start};
use ganglion_proto::job::Job;
use ganglion_proto::message::{Assignment, FromWorker};
use ganglion_proto::trace::{Nothing, Track, now};
use serde_json::json;
use tch::{Device, no_grad};

use super::checkpoint_writer::Archive;
use super::finite::NonFinite;
use super::generation::{Team, TeamError};
use super::gradient_log::GradientLog;
use super::profile::Place;
use super::report::Pending;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::init_weights::Beginning;
use crate::checkpoint::storage::{Reading, RunStorage};
use crate::data::{DataError, DataSet};
use crate::eval::beside::Evaluations;
use crate::nn::broken::guarded;
use crate::nn::tensor_bytes::from_bytes;
use crate::objective::Model;
use crate::session::{Session, unreachable};
use crate::state::State;

/// Number of consecutive groups lost to a peer before they trained, after which a worker probes the other
/// members: a link that is refused, and not silent, would break one group after the other.
pub const UNFORMED: u32 = 3;

/// Everything a worker trains with, and the state that it holds.
pub struct Trainer {
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
    /// Background evaluator of generated samples.
    pub evaluations: Evaluations,
    /// Log of shard gradients, if the environment asks for one.
    pub gradient_log: Option<GradientLog>,
    /// State after the newest commit; `None` before the first assignment.
    pub held: Option<Held>,
    /// Number of consecutive groups that did not come to train.
    pub unformed: u32,
    /// Trace track of the training thread.
    pub track: Track,
}

/// State after the newest commit, with the report that goes with it.
pub struct Held {
    /// The state.
    pub state: State,
    /// The pending report.
    pub pending: Pending,
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
        self.held.as_ref().map(|held| held.state.counters.position)
    }

    /// Saves the state that this worker holds on its own, for a later coordinator: the unrecorded rows, all
    /// files, then the manifest, each only if it is not there. Returns the checkpoint's folder, or `None`
    /// if there is nothing to save.
    pub fn save_alone(&self) -> Result<Option<String>, CheckpointError> {
        let usable = self.storage.seen && !self.session.is_void();
        let Some(Held { state, .. }) = self.held.as_ref().filter(|_| usable) else { return Ok(None) };
        if state.counters.position == Position(0) {
            return Ok(None);
        }
        let files = self.model.files(self.storage.storage(), self.job.job.data_shards);
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
            self.evaluations.discard_after(self.model.steps(group.position));
            self.held = None;
            self.session.void_is_gone();
        }
        if let Start::Checkpoint(source, checkpoint) = &group.start
            && source.0 == assignment.rank
        {
            self.held = Some(self.read(assignment.group.generation, checkpoint)?);
        }
        self.unformed += 1;
        let (job, model, track) = (&self.job, &*self.model, &self.track);
        let place = Place { generation: group.generation.0, rank: assignment.rank };
        let form = || Team::form(assignment, &self.session, job, model, self.device);
        let mut team = track.during("form group", place, form)?;
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
        self.unformed = 0;
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
        no_grad(|| state.flat.copy_(&from_bytes(&snapshot.flat)));
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
