//! Inputs and outputs of a member: events, commands, timers.

use crate::checkpoint::{Checkpoint, WrittenPart};
use crate::events::{Fault, Group, Plan, Rested};
use crate::limits::Limits;
use crate::types::{Generation, Position, Rank, Term, WorkerId};

/// Input of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<R> {
    // ---- The session
    /// The coordinator has taken the worker in, as the answer to [`Command::Connect`].
    Welcomed(Welcome),
    /// The attempt to connect failed, or the connection is lost.
    Disconnected,
    /// The coordinator answered the oldest unanswered heartbeat of this connection.
    Pulse,
    /// The worker is a member of a new generation.
    Assigned(Group),
    /// A change of the newest generation is planned.
    Planned(Plan),
    /// Order to leave a generation.
    Aborted {
        /// Generation to leave.
        generation: Generation,
        /// Whether the worker shall find out which members it cannot reach.
        probe: bool,
        /// Whether the generation is invalidated: its state must not be used.
        condemned: bool,
    },
    /// The coordinator needs or wants this worker no longer. Also the answer to an attempt to connect.
    Dismissed(End),
    /// Rows up to this step are durable.
    RowsRecorded(u64),
    /// The coordinator lacks the rows of this step and of later ones.
    RowsWanted(u64),
    /// The evaluations of these steps are durable.
    EvaluationsRecorded(Vec<u64>),
    /// The checkpoint of this step and phase is recorded; it and earlier ones need nothing more.
    CheckpointRecorded(u64, u32),

    // ---- The worker's machine
    /// The worker is asked to end.
    LeaveRequested,
    /// Time has passed; the member compares its timers with the current time.
    Tick,

    // ---- The training thread
    /// The worker can train.
    Loaded {
        /// Whether the worker can write checkpoints.
        sees_storage: bool,
    },
    /// The checkpoint is read and held: the answer to [`Command::Read`].
    Read,
    /// All members have met and mean the same group: the answer to [`Command::Form`].
    Formed,
    /// All members hold the same state, at the group's update index: the answer to
    /// [`Command::SyncState`].
    Synced(Schedule),
    /// A phase was committed, during [`Command::Run`].
    Committed {
        /// Update index after the commit.
        position: Position,
        /// Number of the plan that all members proposed ([`Member::propose`](super::Member::propose));
        /// 0 where they differ, or proposed none.
        agreed: u64,
    },
    /// The last state is stored whole: the answer to [`Command::Save`].
    Saved,
    /// The training thread is at rest: the answer to [`Command::Leave`] and [`Command::Abort`], or a
    /// failure of the group. It commits nothing more of the generation.
    Stopped {
        /// Update index of the state that it holds. A failure may come between the moment at which it took
        /// a source's state over and the moment at which all have compared theirs.
        held: Option<Position>,
        /// Reason of a failure.
        fault: Option<Fault>,
    },
    /// The training thread is at rest, because the user's input is wrong; with the reason.
    InputWrong(String),
    /// These ranks do not answer: the answer to [`Command::Probe`].
    Probed(Vec<Rank>),
    /// The state was saved as far as that is possible: the answer to [`Command::SaveAlone`].
    SavedAlone,
    /// The worker committed a step with this row.
    Row(R),
    /// The worker was synchronised past the end of a step, whose row it may not have.
    RowOfOthers(R),
    /// The worker made this evaluation.
    Evaluation(R),
    /// A checkpoint file with a state of this generation is on the storage.
    PartWritten(Generation, WrittenPart),
}

/// Answer of a coordinator that takes a worker in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Term of the coordinator.
    pub term: Term,
    /// Id of the worker. Another id than before means that the coordinator no longer knew the worker.
    pub worker: WorkerId,
    /// Newest invalidated generation, 0 if there is none.
    pub condemned: Generation,
    /// Time limits of the run.
    pub limits: Limits,
}

/// Extent of the job, in phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Update index after the last step.
    pub end: Position,
    /// Number of phases in one step.
    pub phases_per_step: u64,
}

impl Schedule {
    /// Whether a step ends at an update index.
    pub fn ends_step(&self, position: Position) -> bool {
        position.0.is_multiple_of(self.phases_per_step)
    }

    /// End of the step that an update index is in.
    pub(super) fn end_of_step(&self, position: Position) -> Position {
        Position(position.0.next_multiple_of(self.phases_per_step))
    }
}

/// End of a worker's part in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Released by the coordinator: the worker is no longer needed.
    Released,
    /// The run is complete: neither the worker nor another in its place is needed any more.
    Complete,
    /// Refused by the coordinator, with the reason.
    Rejected(String),
    /// The coordinator is gone for longer than the lease.
    Lost,
    /// The worker itself cannot go on; with the reason.
    Failed(String),
}

/// Identity that a worker presents when it connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Number of the attempt to connect, from 1. A coordinator reads a hello of an attempt that was
    /// given up perhaps after that of a newer one; the lower number tells.
    pub attempt: u64,
    /// Identity under an earlier session; `None` before the first welcome.
    pub resume: Option<Resume>,
}

/// Identity and state of a worker whose session had ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// Id that the worker had.
    pub worker: WorkerId,
    /// Newest term that the worker knows. A coordinator of an older one must not take it in.
    pub term: Term,
    /// Newest generation that the worker was assigned to, 0 before the first.
    pub generation: Generation,
    /// State that the worker is quiesced with. `None` while it may commit, and while the coordinator
    /// must first hear that the state diverged.
    pub rest: Option<Rested>,
}

/// Report to the coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report<R> {
    /// The worker has loaded.
    Loaded,
    /// Reason why the worker left a generation.
    Fault(Generation, Fault),
    /// The worker is quiesced: it commits nothing more of the generation.
    Quiesced(Generation, Rested),
    /// A row of metrics, or an evaluation.
    Row(R),
    /// A checkpoint file with a state of this generation is on the storage.
    Part(Generation, WrittenPart),
    /// The user's input is wrong; with the reason.
    InputWrong(String),
    /// The worker was asked to end.
    Leave,
}

/// Output of a member, carried out in the order given. Each says when it is emitted, why, and what must
/// have come before.
///
/// The training thread has one piece of work at a time: from [`Command::Begin`] on until it answers
/// [`Event::Stopped`] no other generation is begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command<R> {
    /// Connect to the coordinator, and send this hello.
    ///
    /// *When:* a pause after a failed attempt or a lost connection, until the lease is over.
    /// *Why:* a coordinator that restarts finds its group again by the workers that come back.
    /// *Before:* the answers are [`Event::Welcomed`], [`Event::Dismissed`] and [`Event::Disconnected`].
    Connect(Hello),
    /// Close the connection, or give up the attempt; no [`Event::Disconnected`] is needed.
    ///
    /// *When:* nothing was answered in time, the coordinator's term is older than one that the worker
    /// knows (M1), or the lease is over.
    /// *Why:* a coordinator that is superseded must not be heard.
    Disconnect,
    /// Send a heartbeat with the current progress.
    ///
    /// *When:* at each interval of an open session.
    /// *Why:* the lease counts from when the newest answered one was sent (M4).
    Heartbeat,
    /// Send a report.
    ///
    /// *When:* at once while a session is open, else with the next welcome.
    /// *Why:* M2, M13. Rows go before files: with the last file of the last checkpoint the run may end.
    /// *Before:* [`Report::Quiesced`] follows [`Event::Stopped`] only, and the [`Report::Fault`] that led
    /// to it.
    Tell(Report<R>),

    /// Drop the held state and everything still to be saved of it.
    ///
    /// *When:* the state was invalidated, or the next generation starts from elsewhere or further back.
    /// *Why:* D10: it must not be saved, passed on or fallen back to.
    /// *Before:* the training thread is at rest; the next generation's work comes after.
    DropState,
    /// Take up the part in a new generation.
    ///
    /// *When:* the training thread is at rest, and a newer generation is assigned.
    /// *Before:* [`Command::DropState`], where the held state is of no use. The links of the last generation
    /// are closed.
    Begin {
        /// Term of the coordinator that assigned the group.
        term: Term,
        /// Group to form.
        group: Group,
        /// Rank of this worker.
        rank: Rank,
    },
    /// Read the checkpoint that the group starts from, and hold it.
    ///
    /// *When:* after [`Command::Begin`], for the member that is the source.
    /// *Why:* the others need not see the storage. It comes before [`Command::Form`], so that a storage
    /// that is away keeps no collective waiting. A reading that an abort cuts short may go on for the next
    /// group.
    Read(Checkpoint),
    /// Meet the other members, and compare the group's identity with theirs (M6).
    ///
    /// *When:* after [`Command::Begin`], or [`Event::Read`] for the source of a checkpoint.
    /// *Why:* a worker of another group must not touch anybody's state.
    Form,
    /// Give all members the state of the group's update index (M5).
    ///
    /// *When:* after [`Event::Formed`].
    /// *Why:* a receiver keeps what it holds until all has arrived and its fingerprint is right.
    SyncState,
    /// Report a step that ends at the held state: its row, and the checkpoint, samples and evaluation that
    /// are due.
    ///
    /// *When:* after [`Event::Committed`] at the end of a step; with [`Reported::Again`] after
    /// [`Event::Synced`] there, because a change of the group may have cut the first report short.
    /// *Before:* it comes before the [`Command::Save`], [`Command::Leave`] of the same event.
    ReportStep(Reported),
    /// Train until the update index: compute, reduce, ask
    /// [`Member::may_commit`](super::Member::may_commit), commit, answer [`Event::Committed`].
    ///
    /// *When:* after [`Event::Synced`]; again, with an earlier index, once all agree to stop.
    /// *Why:* all members propose and agree in the reduces themselves, so all end at the same index (D9).
    Run {
        /// Update index to train to.
        until: Position,
    },
    /// Save the held state, and wait until all that is to be saved is stored.
    ///
    /// *When:* the end of the job, or of the step at which all agreed to stop.
    /// *Why:* M11: the run may end once its last checkpoint is recorded.
    Save {
        /// Whether the job's last step is done.
        complete: bool,
    },
    /// Leave the group in order; answer [`Event::Stopped`].
    ///
    /// *When:* a planned change is agreed, or the last state is stored.
    /// *Why:* M2: only a training thread at rest makes `Quiesced` true.
    Leave,
    /// Leave this generation and all before as soon as possible, whatever is under way; answer
    /// [`Event::Stopped`]. A commit that has begun is finished first, and answered.
    ///
    /// *When:* the coordinator says so, a newer generation is assigned, the worker is a stranger to its
    /// coordinator, or its part in the run ends.
    Abort(Generation),
    /// Find out which members of the last group do not answer; answer [`Event::Probed`].
    ///
    /// *When:* after a timeout, an abort that asks for it, or [`UNFORMED`](super::UNFORMED) groups in a row
    /// that a peer broke before they trained.
    /// *Why:* a broken link makes all wait, without a sign of which one it is (M8).
    /// *Before:* the training thread is at rest, and has not said so: the coordinator decides with the
    /// answer.
    Probe,
    /// Save the held state and the kept rows alone, each file only if it is not there.
    ///
    /// *When:* the lease is over, or the worker shall end and no coordinator comes back.
    /// *Why:* M11: the next coordinator adopts the most advanced state.
    /// *Before:* the training thread is at rest.
    SaveAlone,
    /// End the process.
    ///
    /// *When:* the training thread is at rest, and what can be saved is saved. Nothing comes after.
    Exit(End),
}

/// Occasion on which a step is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// The step was just committed, and training goes on.
    Committed,
    /// The step was just committed, and is the last of the job or before a stop: its state is saved by
    /// [`Command::Save`].
    Last {
        /// Whether the members agreed to stop.
        stopping: bool,
    },
    /// The group begins at the step's end, with a state that a member held.
    Again,
    /// The group begins at the step's end, with the state of a checkpoint.
    FromCheckpoint,
}

/// Timers of a member: each ends one kind of wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// The next heartbeat is due.
    Heartbeat,
    /// The coordinator owes an answer, to a hello or to a heartbeat.
    Answer,
    /// The next attempt to connect is due.
    Reconnect,
    /// The lease ends: nothing more may be committed.
    Lease,
    /// The worker was asked to end, and has no coordinator to release it.
    Alone,
    /// The coordinator had time to read why this worker fails.
    Farewell,
}

impl Timer {
    /// All timers, in the order in which they fire at one moment. The lease goes before what would ask for
    /// another answer.
    pub const ALL: [Timer; 6] =
        [Timer::Lease, Timer::Alone, Timer::Farewell, Timer::Answer, Timer::Reconnect, Timer::Heartbeat];
}
