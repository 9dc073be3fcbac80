//! Inputs and outputs of the machine: settings, events, actions and their reasons.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, WrittenPart};
use crate::limits::Limits;
use crate::passport::{Difference, Passport};
use crate::shape::StepShape;
use crate::types::{Generation, Position, Rank, Term, WorkerId};

/// Constant inputs of the machine, given once at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This coordinator's term.
    pub term: Term,
    /// Target number of local workers, which the coordinator starts itself and replaces when they
    /// end. Training waits for all of them.
    pub local_workers: u32,
    /// V, the number of data shards: the upper bound of the world size.
    pub data_shards: u32,
    /// Time limits, derived from the failure deadline.
    pub limits: Limits,
}

/// State of the run recovered from the journal and the storage when a coordinator starts.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// Newest generation in the journal.
    pub group: Option<Group>,
    /// Members of `group` that are known to have ended, or to be quiesced for good
    /// ([`Action::Close`]).
    pub dead: Vec<WorkerId>,
    /// Workers that an earlier coordinator started and that still run.
    pub locals: Vec<WorkerId>,
    /// Count of processes that an earlier coordinator started and that still run, including those
    /// without a worker id.
    pub running: u32,
    /// Newest invalidated (`condemned`) generation: its states must not be used.
    pub condemned: Option<Generation>,
    /// Update indices of the phases that may be skipped.
    pub skips: Vec<Position>,
    /// Whether the job changed since the newest generation was formed. The group then goes on in
    /// another generation.
    pub job_changed: bool,
    /// Newest checkpoint whose files are whole.
    pub checkpoint: Option<Checkpoint>,
    /// Fingerprint of the environment (`passport`) that the run was started with.
    pub passport: Option<Passport>,
    /// Shape of the run's steps, once it is known.
    pub shape: Option<StepShape>,
}

/// Report of a worker that has loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedFacts {
    /// Fingerprint of the environment: everything that the worker's bits depend on.
    pub passport: Passport,
    /// Number of samples in the worker's data set.
    pub samples: u64,
    /// Whether the worker can write checkpoints.
    pub sees_storage: bool,
    /// Shape of the objective's steps.
    pub shape: StepShape,
    /// Name of the worker's GPU, equal on all workers that share the GPU; `None` for a CPU.
    pub gpu: Option<String>,
    /// Name of the worker's machine, equal on all its workers; `None` if it is not known.
    pub host: Option<String>,
    /// Index of each sample that the job leaves out after the start of the run, in the job's order.
    pub left_out: Vec<u64>,
}

/// Input of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The coordinator has started.
    Started,
    /// A worker asks to take part, under a new id. A local process has one id for as long as its
    /// coordinator lives: if it says hello again it is resumed, or told to exit if
    /// [`Machine::knows`](crate::Machine::knows) no longer knows its id. A hello after
    /// [`Event::Reaped`] has no effect.
    Hello {
        /// New id of the worker.
        worker: WorkerId,
        /// Whether the coordinator started the worker.
        local: bool,
    },
    /// A worker whose session had ended is back. [`Machine::knows`](crate::Machine::knows) has
    /// allowed it.
    Resumed {
        /// Id that the worker had before.
        worker: WorkerId,
        /// Newest generation that the worker was assigned to.
        generation: Generation,
        /// State that the worker is quiesced with; `None` while it may still commit.
        rest: Option<Rested>,
    },
    /// A worker has loaded and is quiesced without state, or reports so again after a resume.
    Loaded(WorkerId, LoadedFacts),
    /// A worker is quiesced: it commits nothing more of the generation. It holds the state at the
    /// given update index, or none yet.
    Ready(WorkerId, Generation, Option<Position>),
    /// A worker left its group because of a fault.
    Fault(WorkerId, Generation, Fault),
    /// A worker sent a heartbeat.
    Heartbeat(WorkerId, Progress),
    /// A worker's session ended.
    Disconnected(WorkerId),
    /// A worker wants to leave, or is asked to.
    Leave(WorkerId),
    /// The target number of local workers changes to this.
    Scale(u32),
    /// A process that the coordinator started has ended.
    Reaped {
        /// Worker id of the process; `None` if it never said hello.
        worker: Option<WorkerId>,
        /// Exit status of the process.
        status: String,
    },
    /// A checkpoint file with a state of the given generation is on the storage. The report may
    /// come long after that generation: storages are slow, and sessions end.
    PartWritten(WorkerId, Generation, WrittenPart),
    /// The manifest of a checkpoint is on the storage.
    CheckpointCommitted(Checkpoint),
    /// The storage was searched: update index of a newer checkpoint that is being committed, if there is one.
    Searched(Option<Position>),
    /// A worker trained to the end (`complete`) or to a planned stop, and is quiesced at that
    /// update index.
    Finished {
        /// Id of the member.
        worker: WorkerId,
        /// Generation that the worker trained in.
        generation: Generation,
        /// Update index: the count of committed phases.
        position: Position,
        /// Whether the last step of the job is done.
        complete: bool,
    },
    /// The user's input is wrong in a way that only a worker could detect; with the reason.
    InputWrong(String),
    /// A worker that the run can go on without cannot take part; with the reason.
    Unable(WorkerId, String),
    /// The user requested a stop.
    StopRequested,
    /// Time has passed; the machine compares its limits with the current time.
    Tick,
}

/// State and outcome of a quiesced worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rested {
    /// Update index of the state that the worker holds; `None` if it holds none.
    pub position: Option<Position>,
    /// `Some(true)` after the last step of the job, `Some(false)` after a planned stop, `None` if
    /// the worker has not finished.
    pub finished: Option<bool>,
}

/// Progress of a worker, as its heartbeats report it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Update index: the count of committed phases.
    pub position: Position,
    /// Shard gradients (`leaves`) computed since the worker started.
    pub leaves: u64,
    /// Current activity of the training thread.
    pub activity: Activity,
    /// Longest time that one of the worker's shard gradients took.
    pub slowest_leaf: Duration,
}

/// Activity of a training thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// Computing shard gradients.
    Computing,
    /// Waiting for other members.
    Waiting,
    /// Quiesced between two groups.
    #[default]
    Resting,
    /// Training is paused for other work: a storage, an evaluation at the end, or a test of links. The
    /// pause has no time limit of the machine's.
    Paused,
}

/// Reason why a worker left its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A peer or the link to it failed.
    Peer,
    /// A reduce took too long.
    Timeout,
    /// These ranks of the generation cannot be reached from the worker.
    Links(Vec<Rank>),
    /// The members' states differ.
    Diverged(String),
    /// The reduced gradient is not finite, so it was not committed. All members that have all of it
    /// check the same bytes and report the same. A member that lost a peer first, because that peer
    /// left for this reason, reports the lost peer instead.
    NonFinite {
        /// Update index: the count of phases committed before the failed one.
        position: Position,
        /// Which value is not finite and in which step; diagnostic only.
        detail: String,
        /// Whether the run must end, because the job says so or because it would not recover.
        /// Otherwise it resumes from the newest checkpoint, with the update index among
        /// [`Group::skips`].
        stop: bool,
    },
    /// The worker itself cannot go on; with the reason.
    Internal(String),
}

/// Evidence by which a worker counts as lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The worker's session ended, and a member of its group lost the connection to it too.
    Session,
    /// The worker's process ended, with this exit status.
    Exited(String),
    /// No heartbeat came within the deadline.
    Silent,
    /// Heartbeats came, but the worker computed nothing, or did not quiesce, within the deadline.
    Late,
    /// The worker reported why it cannot go on.
    Failed(String),
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::Session => f.write_str("its session ended"),
            Loss::Exited(status) => write!(f, "it ended with {status}"),
            Loss::Silent => f.write_str("it was silent for too long"),
            Loss::Late => f.write_str("it made no progress for too long"),
            Loss::Failed(detail) => write!(f, "it failed: {detail}"),
        }
    }
}

/// Reason why a generation is formed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// All expected workers are present, and no member of an earlier generation is left.
    Gathered,
    /// A planned change: a worker joins or leaves.
    Planned,
    /// A member was lost.
    Lost(WorkerId, Loss),
    /// A member reported that it left the group.
    Fault(WorkerId, Fault),
    /// All members wait and nobody makes progress.
    Stalled,
    /// Not all members came back to a new coordinator, or not in the state in which they were left.
    TakenOver,
    /// The members' states differ.
    Diverged(String),
    /// The reduced gradient is not finite, and the job asks for a roll-back.
    NonFinite(String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Gathered => f.write_str("gathered"),
            Cause::Planned => f.write_str("planned"),
            Cause::Lost(worker, loss) => write!(f, "lost worker {worker}: {loss}"),
            Cause::Fault(worker, Fault::Peer) => {
                write!(f, "worker {worker} lost the connection to another worker")
            }
            Cause::Fault(worker, Fault::Timeout) => {
                write!(f, "worker {worker} waited too long for another worker")
            }
            Cause::Fault(worker, Fault::Links(ranks)) => {
                let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
                write!(f, "worker {worker} cannot reach the worker of rank {}", ranks.join(", "))
            }
            Cause::Fault(worker, fault) => write!(f, "worker {worker} left: {fault:?}"),
            Cause::Stalled => f.write_str("stalled: all members wait for each other"),
            Cause::TakenOver => f.write_str("taken over by a new coordinator"),
            Cause::Diverged(detail) => write!(f, "diverged: {detail}"),
            Cause::NonFinite(detail) => write!(f, "rolled back: {detail}"),
        }
    }
}

/// Output of the machine: a command that the coordinator's shell carries out, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Refuse a worker, with the reason.
    Reject(WorkerId, Rejection),
    /// Record the run's fingerprint of the environment (`passport`).
    AdoptPassport(Passport),
    /// Record that a generation is invalidated (`condemned`): its states must not be used. Also
    /// give up the checkpoints that were decided on and are not committed yet. A storage that is
    /// away may keep them waiting for long, and they may hold such a state.
    Condemn(Generation),
    /// Record that a generation's members are quiesced for good and that their state is saved:
    /// nobody needs to wait for them any more.
    Close(Generation),
    /// Record that the phase at this update index may be skipped from now on.
    AllowSkip(Position),
    /// Form a generation, with the reason: journal it, then send each member its assignment.
    Form(Group, Cause),
    /// Repeat the assignment to a member of the newest generation, which this coordinator formed.
    Assign(WorkerId),
    /// Tell these workers to leave a generation.
    Abort {
        /// Generation to leave.
        generation: Generation,
        /// Members of the generation that are still present.
        workers: Vec<WorkerId>,
        /// Reason why the group is broken up.
        cause: Cause,
        /// Whether the members shall probe which of the others they cannot reach.
        probe: bool,
    },
    /// Announce a planned change to these workers.
    Announce {
        /// Planned change.
        plan: Plan,
        /// All members of the group.
        workers: Vec<WorkerId>,
    },
    /// Write the manifest of a checkpoint, then report [`Event::CheckpointCommitted`].
    Commit(Checkpoint),
    /// Look in the storage for a checkpoint that members saved by themselves, and report
    /// [`Event::Searched`]; if it is newer than all that were committed, commit it.
    Search,
    /// Record that the files of this step's checkpoint never became complete.
    AbandonCheckpoint(u64),
    /// Start a worker process.
    Spawn,
    /// Report to the user that a local worker is no longer replaced, and why.
    GiveUpReplacing(String),
    /// Record that the newest generation goes on unchanged under this coordinator.
    Keep,
    /// Record that a worker is lost, with the evidence.
    Lose(WorkerId, Loss),
    /// Tell a worker to exit.
    Release(WorkerId),
    /// End a worker's session, and kill its process if this coordinator owns it.
    Drop(WorkerId),
    /// End the run.
    End(Outcome),
}

/// Reason why a worker is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The worker's fingerprint of the environment differs: it would compute other bits.
    Passport(Vec<Difference>),
    /// The run is ending.
    Ending,
}

/// Outcome of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The last step of the job is done and saved.
    Complete,
    /// A requested stop, saved at this update index; `None` when nothing was trained yet.
    Stopped(Option<Position>),
    /// The user's input is wrong; with the reason.
    InputWrong(String),
    /// The run cannot go on; with the reason and the way on.
    Failed(String),
    /// The run cannot go on: this machine's workers were refused, and so would be their replacements.
    Refused,
}

/// Planned change: the members agree on the update index at which it takes effect while they train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Sequence number: a higher one replaces a lower one.
    pub number: u64,
    /// Kind of the change.
    pub kind: PlanKind,
}

/// Kinds of planned changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanKind {
    /// Quiesce, for a new generation.
    Regroup,
    /// Finish the step, save the state, and finish.
    Stop,
}

/// One generation: its members and where their state comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Generation number.
    pub generation: Generation,
    /// Members in the order of their ranks.
    pub members: Vec<GroupMember>,
    /// Update index at which the generation starts.
    pub position: Position,
    /// Source of the state at that update index.
    pub start: Start,
    /// Update indices by which the run was rolled back. A phase that starts at one of them is
    /// skipped if its reduced gradient is not finite again.
    pub skips: Vec<Position>,
    /// Backend of the collectives.
    pub backend: Backend,
}

/// Member of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMember {
    /// Worker id.
    pub worker: WorkerId,
    /// Data shards that the member computes: those of its rank by [`shard_ranges`](crate::shard_ranges).
    pub shards: Range<u32>,
    /// Whether the member writes checkpoint files.
    pub writes_parts: bool,
}

/// Source of a group's initial state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Drawn from the job's seed.
    Fresh,
    /// State sync from the member of this rank, which holds the state.
    Healed(Rank),
    /// A checkpoint, which the member of this rank reads.
    Checkpoint(Rank, Checkpoint),
}
