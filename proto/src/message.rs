//! Messages between a worker and the coordinator, in the domain's types.

use ganglion_membership::{
    Fault, Generation, Group, LoadedFacts, Plan, Position, Progress, Rested, Term, WorkerId, WrittenPart,
};

use crate::evaluation::EvaluationRow;
use crate::job::Job;
use crate::record::found::Found;
pub use crate::record::{MetricsRow, Profile};

/// Message of a worker to the coordinator.
#[derive(Clone, Debug, PartialEq)]
pub enum FromWorker {
    /// Request to take part; the first message of a session.
    Hello(Hello),
    /// The worker has loaded; with its facts and its report on the data.
    Loaded(LoadedFacts, Option<Box<Found>>),
    /// The worker is quiesced: it commits nothing more of the generation. The state that it holds
    /// is at this update index; `None` without a state.
    Ready(Generation, Option<Position>),
    /// The worker left its group because of a fault.
    Fault(Generation, Fault),
    /// Question where the members of this generation are probed.
    AddressesWanted(Generation),
    /// Heartbeat, with the resource usage of the worker.
    Heartbeat(Progress, Usage),
    /// Metrics row of a reported step.
    Metrics(MetricsRow),
    /// A checkpoint file with a state of this generation is on the storage.
    PartWritten(Generation, WrittenPart),
    /// A checkpoint file could not be written yet: step, file name, reason.
    PartDelayed(u64, String, String),
    /// Grid of generated or of real samples.
    Samples(SampleGrid),
    /// Texts that the state wrote.
    Texts(SampleTexts),
    /// Result of an evaluation.
    Evaluation(EvaluationRow),
    /// The phase that started at this update index was skipped; with the reason, which names the
    /// value that is not finite.
    PhaseSkipped(Position, String),
    /// The worker trained to the end (`true`) or to a planned stop (`false`), at this update index
    /// of the generation.
    Finished(Generation, Position, bool),
    /// The user's input is wrong; with the reason.
    InputError(String),
    /// The worker's machine wants it to end.
    Leave,
}

/// Message of the coordinator to a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum ToWorker {
    /// The worker is accepted.
    Welcome(Box<Welcome>),
    /// The worker is a member of a new generation.
    Assignment(Assignment),
    /// A change is planned.
    Plan(Plan),
    /// Order to leave a generation; with `probe` also to find out which of its members cannot be
    /// reached.
    Abort {
        /// Generation to leave.
        generation: Generation,
        /// Reason; diagnostic only.
        reason: String,
        /// Whether the worker shall find out which members it cannot reach.
        probe: bool,
        /// Whether the generation is invalidated: its state must not be used.
        condemned: bool,
    },
    /// Where each rank of this generation is probed, as HOST:PORT; `None` for a member whose address is not
    /// known. No rank at all if the generation is not the newest any more.
    Addresses(Generation, Vec<Option<String>>),
    /// Metrics rows up to this step are on disk.
    MetricsRecorded(u64),
    /// Order to report the kept rows of this step and of later ones again.
    MetricsWanted(u64),
    /// The worker may not take part; with the reason.
    Reject(String),
    /// The worker is no longer needed.
    Release {
        /// Whether the reason is that the run is complete.
        complete: bool,
    },
    /// Heartbeat acknowledgement.
    Pulse,
    /// Nothing more is needed for the checkpoint of this step and phase, and for earlier ones.
    CheckpointRecorded(u64, u32),
    /// The evaluations of these steps are on disk.
    EvaluationsRecorded(Vec<u64>),
}

/// Identity of a worker at the start of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Version of the wire contract, [`PROTOCOL`](crate::PROTOCOL).
    pub protocol: u32,
    /// Token that the coordinator gave to a worker that it started; `None` for other workers.
    pub spawn_token: Option<String>,
    /// Name of the worker's machine.
    pub host: String,
    /// Process id on that machine.
    pub pid: u32,
    /// Address, as HOST:PORT, at which other workers probe whether they reach this one.
    pub address: String,
    /// Identity and state from before, if an earlier session of this process has ended.
    pub resume: Option<Resume>,
    /// Name of the compute device; diagnostic only.
    pub device: String,
    /// Number of this attempt of the worker to open a session. Only grows.
    pub attempt: u64,
}

/// Earlier identity and current state of a worker whose session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// Id of the run that the worker belongs to.
    pub run: String,
    /// Id of the worker.
    pub worker: WorkerId,
    /// Highest term that welcomed the worker.
    pub term: Term,
    /// Newest generation that the worker was assigned to.
    pub generation: Generation,
    /// State that the worker is quiesced with; `None` while it may still commit.
    pub rest: Option<Rested>,
}

/// Everything that a worker needs to load.
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// Term of the coordinator.
    pub term: Term,
    /// Id of the worker.
    pub worker: WorkerId,
    /// Id of the run directory.
    pub run: String,
    /// Resolved job.
    pub job: Job,
    /// Address of the checkpoint storage.
    pub storage: String,
    /// Newest invalidated generation: its states must not be used. Any worker that was assigned to
    /// nothing newer holds no state.
    pub condemned: Generation,
}

/// Assignment of a worker to a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Generation with all its members, whose data shards are those of
    /// [`shard_ranges`](ganglion_membership::shard_ranges).
    pub group: Group,
    /// Rank of this worker.
    pub rank: u32,
}

/// Resource usage of a worker at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Resident memory of the process in bytes; `None` where the system does not report it.
    pub resident_bytes: Option<u64>,
    /// Usage of the worker's GPU.
    pub gpu: GpuUse,
}

/// Usage of a GPU at a moment by all its processes. All fields are `None` without a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuUse {
    /// Memory in use, in bytes.
    pub memory_bytes: Option<u64>,
    /// Recent busy time of the GPU, in percent.
    pub utilisation: Option<u32>,
}

/// Texts that a state wrote, for people to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleTexts {
    /// Count of steps done when they were written.
    pub step: u64,
    /// All of them, one below the other.
    pub text: String,
}

/// Grid of samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleGrid {
    /// Whether the samples are real ones, as the networks see them, and not generated.
    pub real: bool,
    /// Count of steps done when the grid was drawn; 0 for real samples.
    pub step: u64,
    /// Content of a PNG file.
    pub png: Vec<u8>,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Number of colour channels.
    pub channels: u32,
}
