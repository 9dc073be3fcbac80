//! The worker's half of the group protocol.
//!
//! [`Member`] is the twin of [`Machine`](crate::Machine): it takes events of a worker's session and of its
//! training thread, and returns commands. It has no clock, thread or socket, so the worker drives it with
//! threads, and the simulations with virtual time.
//!
//! ```text
//!            source of a checkpoint           read
//!  Quiesced ------------------------> Reading ----+
//!   ^  |                                          v  formed          synced            position reached
//!   |  +--------------------------------------> Forming ----> Syncing ----> Running ----------+
//!   |                                                                         | plan agreed   v
//!   |              stopped                                                    v    saved    Saving
//!   +------------------------------------------------------------------- Leaving <-------- -+
//!   |   stopped, from any of these, by an abort or a failure
//!   +--------------- Probing, after a failure that may be a broken link
//! ```
//!
//! Invariants, each held by a test below or by the simulation in `tests/simulation`:
//!
//! 1. A member says that it is quiesced only once its training thread is at rest, and commits nothing of
//!    that generation afterwards (M2).
//! 2. Nothing is committed past the lease, which counts from when the newest answered heartbeat was sent
//!    (M4).
//! 3. A state that was invalidated is dropped, and nothing of it is reported any more (D10). The coordinator
//!    hears that states differ before it hears that this worker is quiesced.
//! 4. An unrecorded row, file or evaluation is kept, and told again in each new session and, for rows, in
//!    each new group (M13).
//! 5. Only assignments of newer generations count, and only coordinators of the newest term (M1, M6).
//! 6. The reason why this worker left a generation is told again with each new session until there is
//!    another generation: without it the others would be expected to quiesce as well.
//! 7. A worker that its coordinator no longer knows gives its group up before it says that it has loaded.
//! 8. The process ends at rest, with its state saved if nobody else may hold it (M11).

mod events;
mod group;
mod reports;
mod session;

use crate::events::{Fault, Group, Plan, Rested, Start};
use crate::limits::Limits;
use crate::types::{Generation, Position, Rank, Term, Time, WorkerId};
pub use events::{Command, End, Event, Hello, Report, Reported, Resume, Schedule, Timer, Welcome};
use reports::Reports;
pub use reports::Row;
use session::Link;

/// Number of consecutive groups lost to a peer before they trained, after which a member probes the others:
/// a link that is refused, and not silent, would break one group after the other.
pub const UNFORMED: u32 = 3;
/// Maximum number of unrecorded rows that a worker keeps: about 60 MB.
pub const ROWS_LIMIT: usize = 1 << 18;

/// Pure state machine with a worker's knowledge of its session and its group.
#[derive(Debug)]
pub struct Member<R> {
    limits: Limits,
    now: Time,
    link: Link,
    /// Number of attempts to connect.
    attempts: u64,
    /// Newest term known.
    term: Term,
    worker: Option<WorkerId>,
    /// End of the lease; `None` before the first welcome.
    lease: Option<Time>,
    /// Time at which the worker was asked to end.
    leaving: Option<Time>,
    /// Whether the worker sees the storage; `None` while it loads.
    loaded: Option<bool>,
    /// Whether the coordinator knows nothing of what the training thread is still at. Until that is at
    /// rest, the worker does not say that it has loaded.
    is_stranger: bool,
    /// Newest generation assigned.
    assigned: Generation,
    /// Newest generation known to be invalidated.
    condemned: Generation,
    stage: Stage,
    /// Assignment that waits for the training thread to be at rest.
    next: Option<Part>,
    /// Update index of the held state.
    held: Option<Position>,
    /// `Some(true)` after the job's last step, `Some(false)` after a planned stop.
    finished: Option<bool>,
    /// Reason for leaving the newest generation.
    fault: Option<Fault>,
    /// Fault in the user's input, for the coordinator.
    wrong: Option<String>,
    /// Number of consecutive groups that did not come to train.
    unformed: u32,
    reports: Reports<R>,
    end: Option<End>,
    /// Time at which a failed worker ends, whether or not it was dismissed.
    farewell: Option<Time>,
}

#[derive(Debug)]
enum Stage {
    /// The training thread is at rest.
    Quiesced,
    /// The training thread works for a generation.
    Busy(Part),
    /// The training thread is at rest, and looks for the members that it cannot reach; with the reason for
    /// which it left.
    Probing(Option<Fault>),
    SavingAlone,
    Ended,
}

/// This worker's part in one generation.
#[derive(Clone, Debug)]
struct Part {
    term: Term,
    group: Group,
    rank: Rank,
    plan: Option<Plan>,
    work: Work,
    /// Whether the training thread was told to leave.
    aborted: bool,
    /// Whether the coordinator wants to know which members cannot be reached.
    probe: bool,
    /// Whether the generation is invalidated.
    invalid: bool,
}

/// Work of the training thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Reading,
    Forming,
    Syncing,
    Running {
        schedule: Schedule,
        until: Position,
        /// Plan that this member proposed for the phase under way.
        proposed: Option<Plan>,
    },
    Saving {
        complete: bool,
    },
    Leaving,
}

impl<R: Row> Member<R> {
    /// Creates the member of a worker that has just sent its first hello, which has nothing to resume.
    pub fn new(now: Time, limits: Limits) -> Self {
        Member {
            limits,
            now,
            // The first hello is sent before there is a member, so there is a connection to wait for.
            link: Link::first(now),
            attempts: 1,
            term: Term(0),
            worker: None,
            lease: None,
            leaving: None,
            loaded: None,
            is_stranger: false,
            assigned: Generation(0),
            condemned: Generation(0),
            stage: Stage::Quiesced,
            next: None,
            held: None,
            finished: None,
            fault: None,
            wrong: None,
            unformed: 0,
            reports: Reports::default(),
            end: None,
            farewell: None,
        }
    }

    /// Takes one event and appends the resulting commands, in order.
    pub fn handle(&mut self, now: Time, event: Event<R>, commands: &mut Vec<Command<R>>) {
        // Several threads bring events: one that was overtaken must not turn the time back.
        self.now = self.now.max(now);
        // What the threads still bring on their way out changes nothing.
        if matches!(self.stage, Stage::Ended) {
            return;
        }
        match event {
            Event::Welcomed(welcome) => self.welcomed(welcome, commands),
            Event::Disconnected => self.disconnected(),
            Event::Pulse => self.pulse(),
            Event::Dismissed(end) => self.conclude(end, commands),
            Event::LeaveRequested => self.leave_requested(commands),
            Event::Tick => self.tick(commands),
            Event::Assigned(group) => self.assigned(group, commands),
            Event::Planned(plan) => self.planned(plan),
            Event::Aborted { generation, probe, condemned } => {
                self.aborted(generation, probe, condemned, commands);
            }
            Event::Loaded { sees_storage } => {
                self.loaded = Some(sees_storage);
                // Now if there is a session; else the next welcome does it.
                self.introduce(commands);
            }
            event => self.report(event, commands),
        }
    }

    /// Reports, and what the training thread did.
    fn report(&mut self, event: Event<R>, commands: &mut Vec<Command<R>>) {
        match event {
            Event::RowsRecorded(step) => self.reports.rows_recorded(step),
            Event::RowsWanted(step) => self.tell_all(self.reports.rows_from(step), commands),
            Event::EvaluationsRecorded(steps) => self.reports.evaluations_recorded(&steps),
            Event::CheckpointRecorded(step, phase) => self.reports.checkpoint_recorded(step, phase),
            // A row of this member's own has the same content as the others' (M13).
            Event::RowOfOthers(row) if self.reports.keeps_row_of(row.step()) => {}
            Event::Row(row) | Event::RowOfOthers(row) => {
                let sent = self.reports.keep_row(row);
                self.tell_all(sent.map(Report::Row), commands);
            }
            Event::Evaluation(row) => {
                let sent = self.reports.keep_evaluation(row);
                self.tell_all(sent.map(Report::Row), commands);
            }
            Event::PartWritten(generation, part) => {
                // D10: a file of an invalidated state must not count, also if it was written before that
                // was known.
                if generation > self.condemned && self.reports.keep_part(generation, &part) {
                    self.tell(Report::Part(generation, part), commands);
                }
            }
            event => self.worked(event, commands),
        }
    }

    // ---- Questions

    /// Whether the phase that was just reduced may be committed: the lease is not over (M4).
    pub fn may_commit(&self, now: Time) -> bool {
        self.lease.is_some_and(|lease| now < lease)
    }

    /// Number of the plan that this member proposes to the others for the phase under way, 0 for none.
    /// The plan that takes effect is this one, not the one known when the reduce ends (D9).
    pub fn propose(&mut self) -> u64 {
        let Stage::Busy(part) = &mut self.stage else { return 0 };
        // Outside of training there is no phase in which a plan could take effect.
        if let Work::Running { proposed, .. } = &mut part.work {
            *proposed = part.plan;
        }
        part.plan.map_or(0, |plan| plan.number)
    }

    /// Whether no more rows can be kept: training waits until some are recorded.
    pub fn is_full(&self) -> bool {
        self.reports.rows().len() >= ROWS_LIMIT
    }

    /// Rows that no coordinator has acknowledged.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &R> {
        self.reports.rows()
    }

    /// Whether the coordinator has acknowledged the evaluation of a step.
    pub fn is_evaluated(&self, step: u64) -> bool {
        self.reports.is_evaluated(step)
    }

    /// Id of the worker; `None` before the first welcome.
    pub fn worker(&self) -> Option<WorkerId> {
        self.worker
    }

    /// Newest term known.
    pub fn term(&self) -> Term {
        self.term
    }

    /// Newest generation assigned.
    pub fn generation(&self) -> Generation {
        self.assigned
    }

    /// Update index of the held state.
    pub fn held(&self) -> Option<Position> {
        self.held
    }

    /// End of the lease; `None` before the first welcome.
    pub fn lease(&self) -> Option<Time> {
        self.lease
    }

    /// Whether the coordinator has welcomed this connection.
    pub fn is_connected(&self) -> bool {
        matches!(self.link, Link::Open { .. })
    }

    /// Whether no more is to be heard or said.
    pub fn is_closed(&self) -> bool {
        matches!((&self.link, &self.stage), (Link::Closed, _) | (_, Stage::Ended))
    }

    /// End of the worker's part in the run, if it has come.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    // ---- The end

    /// The worker's part in the run ends, once the training thread is at rest.
    fn conclude(&mut self, end: End, commands: &mut Vec<Command<R>>) {
        // The first reason stands: a dismissal may follow this worker's own failure.
        if self.end.is_none() {
            self.end = Some(end);
        }
        // The coordinator has answered, so there is nothing left to wait for.
        self.farewell = None;
        self.next = None;
        self.hang_up(commands);
        if matches!(self.stage, Stage::Probing(_)) {
            // Nobody waits for the answer any more.
            self.stage = Stage::Quiesced;
        }
        self.abort_part(commands);
        self.exit_if_quiesced(commands);
    }

    fn exit_if_quiesced(&mut self, commands: &mut Vec<Command<R>>) {
        // Not in the middle of a phase, nor before the coordinator could read why this worker failed.
        let (Stage::Quiesced, Some(end), None) = (&self.stage, &self.end, self.farewell) else { return };
        // The state at update index 0 follows from the seed: there is nothing to save.
        let trained = self.held.is_some_and(|held| held > Position(0));
        if *end == End::Lost && trained && self.loaded == Some(true) {
            self.stage = Stage::SavingAlone;
            commands.push(Command::SaveAlone);
        } else {
            self.exit(commands);
        }
    }

    fn exit(&mut self, commands: &mut Vec<Command<R>>) {
        self.stage = Stage::Ended;
        commands.extend(self.end.clone().map(Command::Exit));
    }

    // ---- Timers

    /// Time of the next timer, when [`Event::Tick`] is due.
    pub fn next_deadline(&self) -> Option<Time> {
        Timer::ALL.into_iter().filter_map(|timer| self.timer(timer)).min()
    }

    /// Time at which a timer fires; `None` if it is not set.
    pub fn timer(&self, timer: Timer) -> Option<Time> {
        if matches!(self.stage, Stage::Ended) {
            return None;
        }
        // A worker that knows how it ends waits for no coordinator.
        let lasts = self.end.is_none();
        match timer {
            Timer::Lease => self.lease.filter(|_| lasts),
            Timer::Alone => {
                // Asked to leave, and nobody there to release it: after a deadline it saves and goes
                // (M11).
                let alone = self.leaving.zip(self.link.lost_since()).filter(|_| lasts);
                alone.map(|(leaving, lost)| leaving.max(lost) + self.limits.deadline)
            }
            Timer::Farewell => self.farewell,
            Timer::Answer | Timer::Reconnect | Timer::Heartbeat => self.link.timer(timer, &self.limits),
        }
    }

    fn tick(&mut self, commands: &mut Vec<Command<R>>) {
        // All that are due: firing one may set or clear another.
        for timer in Timer::ALL {
            if self.timer(timer).is_some_and(|at| at <= self.now) {
                self.fire(timer, commands);
            }
        }
    }

    fn fire(&mut self, timer: Timer, commands: &mut Vec<Command<R>>) {
        match timer {
            // M4: past the lease the next coordinator may continue without this worker.
            Timer::Lease | Timer::Alone => self.conclude(End::Lost, commands),
            Timer::Farewell => {
                self.farewell = None;
                self.exit_if_quiesced(commands);
            }
            // An open connection that nobody answers is as good as a closed one.
            Timer::Answer => {
                self.disconnected();
                commands.push(Command::Disconnect);
            }
            Timer::Reconnect => self.connect(commands),
            Timer::Heartbeat => self.beat(commands),
        }
    }
}

#[cfg(test)]
mod tests;
