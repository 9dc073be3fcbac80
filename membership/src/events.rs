//! What the machine is told, and what it decides.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, WrittenPart};
use crate::limits::Limits;
use crate::passport::{Difference, Passport};
use crate::types::{Generation, Position, Rank, Term, WorkerId};

/// What the machine is told once, at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This coordinator's term.
    pub term: Term,
    /// Workers that the coordinator starts itself and replaces when they end; training waits for all of them.
    pub local_workers: u32,
    /// V, which no group is larger than.
    pub data_shards: u32,
    /// How long everything may take.
    pub limits: Limits,
}

/// What an earlier coordinator of the run left behind.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// The newest generation in the journal.
    pub group: Option<Group>,
    /// Its members that are known to have ended, or to rest for good ([`Action::Close`]).
    pub dead: Vec<WorkerId>,
    /// Workers that an earlier coordinator started and that run on.
    pub locals: Vec<WorkerId>,
    /// Processes that an earlier coordinator started and that run on, those without a number included.
    pub running: u32,
    /// A generation whose states must not be used.
    pub condemned: Option<Generation>,
    /// Phases that may be skipped.
    pub skips: Vec<Position>,
    /// Whether the job changed since the newest generation was formed: it then goes on in another one.
    pub job_changed: bool,
    /// The newest checkpoint whose files are whole.
    pub checkpoint: Option<Checkpoint>,
    /// The passport that the run was started with.
    pub passport: Option<Passport>,
}

/// What a worker reports once it has loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedFacts {
    /// What its bits depend on.
    pub passport: Passport,
    /// Samples in its data set.
    pub samples: u64,
    /// Whether it can write checkpoints.
    pub sees_storage: bool,
    /// Phases of one step.
    pub phases_per_step: u32,
    /// The GPU that it computes on, by a name that it has on every worker that shares it; `None` for a CPU.
    pub gpu: Option<String>,
    /// The index of each sample that the job leaves out after its start, in the job's order.
    pub left_out: Vec<u64>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The coordinator is there.
    Started,
    /// A worker asks to take part. Its id is new. A local process has one id for as long as its coordinator
    /// lives: if it says hello again it is resumed, or told to exit once
    /// [`Machine::knows`](crate::Machine::knows) its id no more; and nothing comes of its hello after
    /// [`Event::Reaped`].
    Hello {
        /// The worker.
        worker: WorkerId,
        /// Whether the coordinator started it.
        local: bool,
    },
    /// A worker whose session had ended is back. [`Machine::knows`](crate::Machine::knows) said that it may.
    Resumed {
        /// The worker.
        worker: WorkerId,
        /// The newest generation that it was assigned to.
        generation: Generation,
        /// What it is at rest with; `None` while it may commit.
        rest: Option<Rested>,
    },
    /// It has loaded and is at rest without state, or says so again after a resume.
    Loaded(WorkerId, LoadedFacts),
    /// It is at rest and commits nothing more of the generation. It holds the state of a position, or none
    /// yet.
    Ready(WorkerId, Generation, Option<Position>),
    /// It left its group because of a fault.
    Fault(WorkerId, Generation, Fault),
    /// It gave a sign of life.
    Heartbeat(WorkerId, Progress),
    /// Its session ended.
    Disconnected(WorkerId),
    /// It wants to leave, or is asked to.
    Leave(WorkerId),
    /// So many local workers are wanted from now on.
    Scale(u32),
    /// A process that the coordinator started ended.
    Reaped {
        /// Its worker, if it said hello.
        worker: Option<WorkerId>,
        /// Its exit status.
        status: String,
    },
    /// A file of a checkpoint is on the storage, of a state that a generation trained to. The report may come
    /// long after that generation: storages are slow, and sessions end.
    PartWritten(WorkerId, Generation, WrittenPart),
    /// A manifest is on the storage.
    CheckpointCommitted(Checkpoint),
    /// A worker trained to the end (`complete`) or to a planned stop; it is ready at that position.
    Finished {
        /// The worker.
        worker: WorkerId,
        /// The generation that it trained in.
        generation: Generation,
        /// The phases that it committed.
        position: Position,
        /// Whether the job's last step is done.
        complete: bool,
    },
    /// The user's input is wrong in a way that only a worker could see.
    InputWrong(String),
    /// A worker without which the run goes on cannot take part, and says why.
    Unable(WorkerId, String),
    /// The user asked for a stop.
    StopRequested,
    /// Time has passed.
    Tick,
}

/// What a worker at rest has to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rested {
    /// The position of the state that it holds.
    pub position: Option<Position>,
    /// Whether it finished: `Some(true)` for the job's last step, `Some(false)` for a planned stop.
    pub finished: Option<bool>,
}

/// How far a worker is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The phases that it has committed.
    pub position: Position,
    /// Leaves that it has computed since it started.
    pub leaves: u64,
    /// What its training thread does.
    pub activity: Activity,
    /// The longest that one of its leaves took.
    pub slowest_leaf: Duration,
}

/// What a training thread does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// It computes.
    Computing,
    /// It waits for other members.
    Waiting,
    /// It is at rest, between two groups.
    #[default]
    Resting,
    /// Training pauses for what is no training: a storage, or an evaluation at the end. That takes as long as
    /// it takes.
    Paused,
}

/// Why a worker left its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A peer or the link to it failed.
    Peer,
    /// A reduce took too long.
    Timeout,
    /// It cannot reach these ranks of the generation.
    Links(Vec<Rank>),
    /// The members' states differ.
    Diverged(String),
    /// What was reduced is not finite, so it was not committed. All members that have all of it judge the
    /// same bytes and say the same; one that lost a peer first, because that peer left for this reason,
    /// reports that instead.
    NonFinite {
        /// The phases committed before it.
        position: Position,
        /// What is not finite, in which step, for people.
        detail: String,
        /// Whether the run shall end, by its job or because it would not recover. Otherwise it goes on from
        /// the newest checkpoint, with the position among [`Group::skips`].
        stop: bool,
    },
    /// The worker itself cannot go on.
    Internal(String),
}

/// How a worker was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its session ended, and a member of its group lost it too.
    Session,
    /// Its process ended, with this exit status.
    Exited(String),
    /// It was silent beyond the deadline.
    Silent,
    /// It gave signs of life and computed nothing, or did not come to rest, beyond the deadline.
    Late,
    /// It said why it cannot go on.
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

/// What a generation follows from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// All workers that were waited for are there, and no member of an earlier generation is left.
    Gathered,
    /// A planned change: a worker joins or leaves.
    Planned,
    /// A member was lost.
    Lost(WorkerId, Loss),
    /// A member reported that it left the group.
    Fault(WorkerId, Fault),
    /// All members wait and nothing moves.
    Stalled,
    /// Not all members came back to a new coordinator, or not as they were.
    TakenOver,
    /// The members' states differ.
    Diverged(String),
    /// What was reduced is not finite, and the job wants the run to be rolled back.
    NonFinite(String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Gathered => f.write_str("gathered"),
            Cause::Planned => f.write_str("planned"),
            Cause::Lost(worker, loss) => write!(f, "lost worker {worker}: {loss}"),
            Cause::Fault(worker, Fault::Peer) => write!(f, "worker {worker} lost a peer"),
            Cause::Fault(worker, Fault::Timeout) => write!(f, "worker {worker} waited too long for a peer"),
            Cause::Fault(worker, Fault::Links(ranks)) => {
                let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
                write!(f, "worker {worker} cannot reach rank {}", ranks.join(", "))
            }
            Cause::Fault(worker, fault) => write!(f, "worker {worker} left: {fault:?}"),
            Cause::Stalled => f.write_str("stalled: all members wait for each other"),
            Cause::TakenOver => f.write_str("taken over by a new coordinator"),
            Cause::Diverged(detail) => write!(f, "diverged: {detail}"),
            Cause::NonFinite(detail) => write!(f, "rolled back: {detail}"),
        }
    }
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Refuse a worker.
    Reject(WorkerId, Rejection),
    /// Record the run's passport.
    AdoptPassport(Passport),
    /// Record that the states of a generation must not be used, and give up the checkpoints that were to be
    /// committed and are not yet: a storage that is away may keep them waiting for long, and they may hold
    /// such a state.
    Condemn(Generation),
    /// Record that a generation's members rest for good and what they held is saved: nobody need wait for
    /// them any more.
    Close(Generation),
    /// Record that a phase may be skipped from now on.
    AllowSkip(Position),
    /// Form a generation, and what it follows from: journal it, then tell each member.
    Form(Group, Cause),
    /// Tell a member of the newest generation, which this coordinator formed, once more that it is one.
    Assign(WorkerId),
    /// Tell these workers to leave a generation.
    Abort {
        /// The generation.
        generation: Generation,
        /// Its members that are still there.
        workers: Vec<WorkerId>,
        /// What broke it.
        cause: Cause,
        /// Whether they shall find out which members they cannot reach.
        probe: bool,
    },
    /// Tell these workers of a planned change.
    Announce {
        /// The change.
        plan: Plan,
        /// The members.
        workers: Vec<WorkerId>,
    },
    /// Write a manifest, then report [`Event::CheckpointCommitted`].
    Commit(Checkpoint),
    /// Report that the files of a step's checkpoint were never complete.
    AbandonCheckpoint(u64),
    /// Start a worker process.
    Spawn,
    /// Tell people that a local worker is not replaced any more, and why.
    GiveUpReplacing(String),
    /// The newest generation goes on under this coordinator as it was.
    Keep,
    /// A worker is lost.
    Lose(WorkerId, Loss),
    /// Tell a worker to exit.
    Release(WorkerId),
    /// End a worker's session, and its process if it is ours.
    Drop(WorkerId),
    /// The run has ended.
    End(Outcome),
}

/// Why a worker is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// It would compute other bits.
    Passport(Vec<Difference>),
    /// The run is ending.
    Ending,
}

/// How a run ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The job's last step is done and saved.
    Complete,
    /// A requested stop, saved at this position; `None` when nothing was trained yet.
    Stopped(Option<Position>),
    /// The user's input is wrong.
    InputWrong(String),
    /// The run cannot go on.
    Failed(String),
}

/// A change that the members agree on while they train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// A higher number replaces a lower one.
    pub number: u64,
    /// The change.
    pub kind: PlanKind,
}

/// Planned changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanKind {
    /// Rest, for a new generation.
    Regroup,
    /// Finish the step, save, finish.
    Stop,
}

/// One generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its number.
    pub generation: Generation,
    /// Its members, by rank.
    pub members: Vec<Member>,
    /// The position from which it trains.
    pub position: Position,
    /// Where the state at that position comes from.
    pub start: Start,
    /// Positions by which the run was rolled back: a phase that starts at one of them is skipped if what it
    /// reduces is not finite again.
    pub skips: Vec<Position>,
    /// What its reduces go over.
    pub backend: Backend,
}

/// A member of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The worker.
    pub worker: WorkerId,
    /// Its data shards.
    pub shards: Range<u32>,
    /// Whether it writes checkpoint files.
    pub writes_parts: bool,
}

/// Where a group's state comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// The job's seed.
    Fresh,
    /// The member of this rank, which has it.
    Healed(Rank),
    /// A checkpoint, which the member of this rank reads.
    Checkpoint(Rank, Checkpoint),
}
