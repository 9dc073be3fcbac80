//! What a worker and the coordinator say to each other, in the domain's types.

use ganglion_membership::{
    Fault, Generation, Group, LoadedFacts, Plan, Position, Progress, Rested, Term, WorkerId, WrittenPart,
};

use crate::evaluation::EvaluationRow;
use crate::found::Found;
use crate::job::Job;

/// A worker's message.
#[derive(Clone, Debug, PartialEq)]
pub enum FromWorker {
    /// It asks to take part.
    Hello(Hello),
    /// The worker has loaded; with its report on the data.
    Loaded(LoadedFacts, Option<Box<Found>>),
    /// It is at rest and commits nothing more of the generation.
    Ready(Generation, Option<Position>),
    /// It left its group.
    Fault(Generation, Fault),
    /// A sign of life, and what the worker takes of its machine.
    Heartbeat(Progress, Usage),
    /// The figures of a step.
    Metrics(MetricsRow),
    /// A file of a checkpoint is on the storage.
    PartWritten(Generation, WrittenPart),
    /// A file of a checkpoint could not be written yet: step, file, reason.
    PartDelayed(u64, String, String),
    /// A grid of generated samples.
    Samples(SampleGrid),
    /// What was made of an evaluation.
    Evaluation(EvaluationRow),
    /// The phase that started at a position was skipped: what is not finite.
    PhaseSkipped(Position, String),
    /// It has trained to the end (`true`) or to a planned stop.
    Finished(Generation, Position, bool),
    /// The user's input is wrong.
    InputError(String),
    /// Its machine wants it to end.
    Leave,
}

/// The coordinator's message.
#[derive(Clone, Debug, PartialEq)]
pub enum ToWorker {
    /// The worker is taken in.
    Welcome(Box<Welcome>),
    /// It is a member of a new generation.
    Assignment(Assignment),
    /// A change is planned.
    Plan(Plan),
    /// Leave a generation, for a reason; and find out (`probe`) who of it cannot be reached.
    Abort {
        /// The generation.
        generation: Generation,
        /// Why, for people.
        reason: String,
        /// Whether to find out who cannot be reached.
        probe: bool,
        /// Whether what is held of the generation must not be used.
        condemned: bool,
    },
    /// Metrics rows up to this step are on disk.
    MetricsRecorded(u64),
    /// Kept rows of this step and of later ones shall be reported again.
    MetricsWanted(u64),
    /// It may not take part, for a reason.
    Reject(String),
    /// It is not needed any more.
    Release {
        /// Whether that is because the run is complete.
        complete: bool,
    },
    /// A heartbeat was read.
    Pulse,
    /// Nothing more is needed for the checkpoint of this step and phase, and those before.
    CheckpointRecorded(u64, u32),
    /// The evaluations of these steps are on disk.
    EvaluationsRecorded(Vec<u64>),
}

/// How a worker introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Version of the contract.
    pub protocol: u32,
    /// What the coordinator gave to a worker that it started; `None` for others.
    pub spawn_token: Option<String>,
    /// The machine's name.
    pub host: String,
    /// The process on that machine.
    pub pid: u32,
    /// Where other workers find out whether they reach it: HOST:PORT.
    pub address: String,
    /// Who it was, if its session had begun before and ended.
    pub resume: Option<Resume>,
    /// What it computes on, for people.
    pub device: String,
    /// Which of the worker's attempts to open a session this is. Only grows.
    pub attempt: u64,
}

/// What a worker whose session ended says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The run that it belongs to.
    pub run: String,
    /// Its number.
    pub worker: WorkerId,
    /// The highest term that welcomed it.
    pub term: Term,
    /// The newest generation that it was assigned to.
    pub generation: Generation,
    /// What it is at rest with; `None` while it may commit.
    pub rest: Option<Rested>,
}

/// All that a worker needs to load.
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// The coordinator's term.
    pub term: Term,
    /// The worker's number.
    pub worker: WorkerId,
    /// Identifies the run directory.
    pub run: String,
    /// The hyperparameters.
    pub job: Job,
    /// The address of the checkpoint storage.
    pub storage: String,
    /// The newest generation whose states must not be used. Whoever was assigned to nothing newer holds
    /// nothing.
    pub condemned: Generation,
}

/// A worker's place in a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The generation.
    pub group: Group,
    /// This worker's rank.
    pub rank: u32,
    /// Where each rank is probed: HOST:PORT.
    pub addresses: Vec<String>,
}

/// The figures of one reported step.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricsRow {
    /// Steps done.
    pub step: u64,
    /// When the step was committed: seconds since the Unix epoch.
    pub time: f64,
    /// The generation that committed it.
    pub generation: u64,
    /// Its size.
    pub world_size: u32,
    /// Mean loss of the discriminator over the global batch.
    pub loss_discriminator: f64,
    /// Mean loss of the generator over the global batch.
    pub loss_generator: f64,
    /// Real images consumed a second since the row before.
    pub images_per_second: f64,
    /// Real images consumed since the start of the run.
    pub images_seen: u64,
    /// The state's ledger after the step: which samples were committed up to it.
    pub ledger: u64,
    /// Phases skipped in a row, up to the step's end.
    pub skipped: u64,
    /// Where the time of the discriminator's phases and of the generator's went; `None` if nobody measured
    /// it.
    pub profile: Option<[Profile; 2]>,
    /// How the reporting member's GPU was used.
    pub gpu: GpuUse,
    /// What the discriminator says of real samples and of the generator's, means over the global batch;
    /// `None` if nobody noted it.
    pub scores: Option<[f64; 2]>,
}

/// What a worker takes of its machine at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Memory of its process, in bytes, where the system tells.
    pub resident_bytes: Option<u64>,
    /// Its GPU.
    pub gpu: GpuUse,
}

/// How a GPU is used at a moment, by all its processes. Nothing of it is known without a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuUse {
    /// Memory in use, in bytes.
    pub memory_bytes: Option<u64>,
    /// How much of the time it was busy lately, in percent.
    pub utilisation: Option<u32>,
}

/// Where the time of one module's phases went, on one member: milliseconds a step, a mean over the steps
/// since the row before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Profile {
    /// Waiting for samples to be read.
    pub data: f64,
    /// Forward and backward passes of the member's data shards, and adding them up.
    pub compute: f64,
    /// Waiting for other members in a reduce.
    pub wait: f64,
    /// Judging and applying what was reduced.
    pub commit: f64,
    /// All else.
    pub other: f64,
}

/// A grid of generated samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleGrid {
    /// Steps done when it was drawn.
    pub step: u64,
    /// A PNG file.
    pub png: Vec<u8>,
    /// Its width in pixels.
    pub width: u32,
    /// Its height in pixels.
    pub height: u32,
    /// Its colour channels.
    pub channels: u32,
}
