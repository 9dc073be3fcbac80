//! Life of a worker, from its hello to its exit code.

use std::sync::Arc;
use std::time::Duration;

use ganglion_membership::LoadedFacts;
use ganglion_membership::member::Event;
use ganglion_proto::clock;
use ganglion_proto::dial::Credentials;
use ganglion_proto::job::Job;
use ganglion_proto::log;
use ganglion_proto::message::{Assignment, FromWorker};
use ganglion_proto::trace::{Nothing, Trace, Track};
use serde_json::json;
use tch::Device;

use crate::checkpoint::init_weights::Beginning;
use crate::checkpoint::storage::RunStorage;
use crate::commands::error::Failure;
use crate::commands::restored::opened;
use crate::data::DataSet;
use crate::device::gpu::GpuWatch;
use crate::device::{self, DeviceChoice};
use crate::engine::checkpoint_writer::{Archive, Context};
use crate::engine::gradient_log::GradientLog;
use crate::engine::passport;
use crate::engine::together::Together;
use crate::engine::trainer::Trainer;
use crate::eval::beside::{self, Evaluations};
use crate::eval::inputs::Inputs;
use crate::nn::broken::guarded;
use crate::objective::{Model, Objective, Unsuitable};
use crate::session::{ConnectError, End, Order, Session};

/// Environment variable with the spawn token, which the coordinator sets for its own workers.
pub const SPAWN_TOKEN: &str = "GANGLION_SPAWN_TOKEN";

/// Reasons for which a worker was released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// The run is complete.
    Complete,
    /// The worker, or its machine, was asked to leave; or the run stopped, and may go on later.
    ToLeave,
}

/// Makes the objective of a job, for its data and a device.
pub type MakeObjective<'a> = &'a dyn Fn(&Job, &DataSet, Device) -> Result<Arc<dyn Objective>, Unsuitable>;

/// Takes part in the run of the coordinator at `url` until it is released, and records its work on `trace`.
/// Trains the objective that `make` makes of the run's job.
pub fn run(
    url: &str,
    credentials: Credentials,
    device: DeviceChoice,
    make: MakeObjective<'_>,
    trace: &Trace,
) -> Result<Released, Failure> {
    // Before any thread starts: these set the environment, which threads read.
    c10d::prepare_gloo().map_err(Failure::other)?;
    c10d::aten::use_huge_pages().map_err(Failure::other)?;
    #[cfg(feature = "cuda")]
    c10d::cuda::prepare().map_err(Failure::other)?;
    let device = device.resolve().map_err(Failure::Input)?;
    let token = std::env::var(SPAWN_TOKEN).ok();
    let track = trace.track(1, "training");
    let computes_on = device::describe(device);
    let open = || Session::open(url, credentials, token, computes_on);
    let session = match track.during("find coordinator", Nothing {}, open) {
        Err(ConnectError::Complete) => return Ok(Released::Complete),
        opened => Arc::new(opened?),
    };
    introduce(&session, trace, &track);
    let loading = || {
        guarded(|| load(&session, device, make, trace, &track)).unwrap_or_else(|broken| Err(broken.into()))
    };
    let loaded = track.during("load", Nothing {}, loading);
    let mut trainer = match loaded {
        Ok(trainer) => trainer,
        Err(Failure::Input(detail)) => {
            session.send(FromWorker::InputError(detail.clone()));
            // The coordinator ends the session once it has read this.
            session.wait_for_end(Duration::from_secs(5));
            return Err(Failure::Input(detail));
        }
        Err(other) => return Err(other),
    };
    serve(&mut trainer, trace)
}

/// Does what the protocol wants of the training thread, one order after the other, until the worker's part in
/// the run ends.
fn serve(trainer: &mut Trainer, trace: &Trace) -> Result<Released, Failure> {
    let (session, track) = (trainer.session.clone(), trainer.track.clone());
    let mut saved = None;
    loop {
        match track.during("at rest", Nothing {}, || session.next_order()) {
            Order::DropState => trainer.drop_state(),
            Order::Begin(assignment) => {
                trace.name(&format!("worker {}", session.welcome().worker));
                tell_of(&assignment);
                trainer.take_part(&assignment);
            }
            Order::Probe => session.probe(),
            Order::SaveAlone => {
                saved = Some(track.during("save alone", Nothing {}, || save_alone(trainer)));
                session.tell(Event::SavedAlone);
            }
            Order::Exit(End::Released) => return Ok(Released::ToLeave),
            Order::Exit(End::Complete) => return Ok(Released::Complete),
            Order::Exit(End::Rejected(reason) | End::Failed(reason)) => return Err(Failure::Other(reason)),
            Order::Exit(End::Lost) => {
                let saved = saved.unwrap_or_else(|| "there is nothing to save".to_string());
                // A session that is merely silent has no reason of its own.
                let why = Some(session.why_lost()).filter(|why| !why.is_empty());
                let why = why.unwrap_or_else(|| "nothing was heard of it until the lease ended".to_string());
                return Err(Failure::Other(format!("lost the coordinator: {why}; {saved}")));
            }
            // What was left of a generation that ended.
            Order::Work(_) => {}
        }
    }
}

/// Records on a trace the worker's identity and the wall-clock time: another machine has another time axis.
fn introduce(session: &Session, trace: &Trace, track: &Track) {
    let welcome = session.welcome();
    trace.name(&format!("worker {}", welcome.worker));
    log::note("run", welcome.job.job.name.as_str());
    log::note("term", welcome.term.0);
    log::note("worker", welcome.worker.0);
    track.instant("welcome", json!({ "time": clock::now(), "term": welcome.term.0 }));
}

/// Logs an assignment, and notes it for later lines.
fn tell_of(assignment: &Assignment) {
    let group = &assignment.group;
    log::note("generation", group.generation.0);
    log::note("rank", assignment.rank);
    tracing::info!(
        "generation {}: rank {} of {}, data shards {:?}, from update index {}",
        group.generation,
        assignment.rank,
        group.members.len(),
        group.members[assignment.rank as usize].shards,
        group.position,
    );
}

/// Saves the state of a worker whose coordinator does not come back, for the next one; returns how that went.
fn save_alone(trainer: &Trainer) -> String {
    match trainer.save_alone() {
        Ok(Some(folder)) => format!("saved {folder} for the next coordinator"),
        Ok(None) => "there is nothing to save".to_string(),
        Err(error) => format!("and what this worker holds cannot be saved: {error}"),
    }
}

/// Opens the data, makes the objective, proves the arithmetic.
fn load(
    session: &Arc<Session>,
    device: Device,
    make: MakeObjective<'_>,
    trace: &Trace,
    track: &Track,
) -> Result<Trainer, Failure> {
    let welcome = session.welcome();
    let mut job = welcome.job.clone();
    crate::set_threads(job.job.threads);
    tch::set_num_interop_threads(1);
    c10d::aten::keep_freed_memory().map_err(Failure::other)?;
    c10d::aten::set_deterministic(job.job.deterministic).map_err(Failure::other)?;
    device::set_tf32(device, job.job.tf32).map_err(Failure::other)?;
    let data = opened(&job, &job.data).map_err(|error| match error.into_input() {
        Ok(detail) => Failure::Input(detail),
        Err(other) => Failure::Other(other.to_string()),
    })?;
    let found = Box::new(data.found().clone());
    check_batch(&job, (data.len() - data.left_out().len()) as u64)?;
    let objective = make(&job, &data, device).map_err(Failure::input)?;
    let model = Arc::new(Model::new(objective, job.job.precision).map_err(Failure::input)?);
    job = model.counting(job);
    let storage = Arc::new(RunStorage::open(&welcome.storage, &welcome.run).map_err(Failure::Input)?);
    let beginning = job.model.init_from.as_deref().map(|place| Beginning::read(place, &model.layout));
    let beginning = beginning.transpose().map_err(Failure::Input)?;
    let facts = facts(&job, &model, &data, beginning.as_ref(), device)?;
    let facts = LoadedFacts { sees_storage: storage.seen, ..facts };
    if let Some(place) = device::place(device).map_err(Failure::other)? {
        let watch = GpuWatch::start(&place).map_err(Failure::other)?;
        session.watch_gpu(watch);
    }
    let context = Context {
        job: job.clone(),
        model: model.clone(),
        storage: storage.clone(),
        session: session.clone(),
        track: trace.track(2, "archive"),
    };
    let archive = Archive::start(context).map_err(Failure::other)?;
    let data = Arc::new(data);
    let evaluations = evaluations(&job, &model, &data, session, trace)?;
    session.loaded(facts, Some(found));
    Ok(Trainer {
        job,
        model,
        beginning,
        data,
        device,
        session: session.clone(),
        storage,
        reading: None,
        archive,
        drew_real: false,
        evaluations,
        gradient_log: GradientLog::from_environment()?,
        together: Together::default(),
        held: None,
        track: track.clone(),
    })
}

/// Computes what the coordinator is told of this worker, the storage aside.
fn facts(
    job: &Job,
    model: &Model,
    data: &DataSet,
    beginning: Option<&Beginning>,
    device: Device,
) -> Result<LoadedFacts, Failure> {
    let probe = passport::probe(job, model, device).map_err(Failure::input)?;
    let mut passport = passport::take(job, &probe, data, device).map_err(Failure::other)?;
    if let Some(beginning) = beginning {
        passport.0.insert("initial_weights".to_string(), beginning.digest().to_string());
    }
    let place = device::place(device).map_err(Failure::other)?;
    Ok(LoadedFacts {
        passport,
        samples: data.len() as u64,
        sees_storage: false,
        shape: model.shape().clone(),
        gpu: place.as_deref().map(device::name),
        host: device::host(),
        left_out: data.left_out().to_vec(),
    })
}

/// Checks that no phase reads a sample twice.
fn check_batch(job: &Job, left: u64) -> Result<(), Failure> {
    let batch = job.global_batch();
    if batch <= left {
        return Ok(());
    }
    let out_of = if job.data.exclusions.is_empty() { "" } else { " that data.exclude leaves" };
    Err(Failure::Input(format!(
        "job.data_shards x job.shard_batch is {batch} samples, more than the {left} of the data{out_of}; lower one of them"
    )))
}

/// Opens the inputs of evaluations, if the job has any, and starts their thread.
fn evaluations(
    job: &Job,
    model: &Arc<Model>,
    data: &Arc<DataSet>,
    session: &Arc<Session>,
    trace: &Trace,
) -> Result<Evaluations, Failure> {
    if job.sample.every_steps != 0 && model.objective.sampler().is_none() {
        tracing::info!("the objective draws no samples: there are no grids");
    }
    let inputs = Inputs::open(job, model, data, |held_out| opened(job, held_out))?;
    let context = inputs.map(|inputs| beside::Context {
        job: job.clone(),
        model: model.clone(),
        data: data.clone(),
        inputs,
        session: session.clone(),
        track: trace.track(3, "evaluation"),
    });
    Evaluations::start(context, session).map_err(Failure::other)
}
