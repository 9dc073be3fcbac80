//! The state machine.
//!
//! Invariants, each held by a test in `tests` below:
//!
//! 1. A generation number is never reused, and is above every generation recovered from the journal.
//! 2. A generation starts only when every member of the one before is ready or dead.
//! 3. It starts at the highest position that any of its members is ready with; a newer checkpoint goes before that.
//! 4. A message about another generation than the newest changes nothing.
//! 5. A fault goes before a planned change, and a requested stop survives it.
//! 6. Workers are released only once the last checkpoint is committed.
//! 7. When all members are lost, the next generation starts from the newest checkpoint, and only once each of their
//!    processes is known to have ended.
//! 8. A local worker that ends is replaced, later and later if its replacements do not last, and not for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use crate::checkpoint::{Assembly, Checkpoint, WrittenPart};
use crate::passport::{Difference, Passport};
use crate::shards::shard_ranges;
use crate::types::{Generation, Position, Rank, Time, WorkerId};

/// A member that lasted this long was fit to work; one that ends sooner may do so again.
const FIT: Duration = Duration::from_secs(1);
/// The pause before the second replacement in a row that does not last; it doubles from there.
const PAUSE: Duration = Duration::from_millis(250);
/// So many replacements in a row may fail to last.
const REPLACEMENTS: u32 = 8;

/// What the machine is told once, at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Workers that the coordinator starts itself and replaces when they end; training waits for all of them.
    pub local_workers: u32,
    /// V, which no group is larger than.
    pub data_shards: u32,
    /// How long a silent worker is trusted.
    pub failure_deadline: Duration,
}

/// What an earlier coordinator of the run left behind.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// The newest generation in the journal.
    pub generation: Generation,
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
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker asks to take part. Its id is new.
    Hello {
        /// The worker.
        worker: WorkerId,
        /// Whether the coordinator started it.
        local: bool,
    },
    /// It has loaded and is at rest without state.
    Loaded(WorkerId, LoadedFacts),
    /// It is at rest and commits nothing more of the generation. It holds the state of a position, or none yet.
    Ready(WorkerId, Generation, Option<Position>),
    /// It left its group because of a fault.
    Fault(WorkerId, Generation, Fault),
    /// It gave a sign of life.
    Heartbeat(WorkerId),
    /// It is gone.
    Lost(WorkerId, Loss),
    /// A process that the coordinator started ended.
    Reaped {
        /// Its worker, if it said hello.
        worker: Option<WorkerId>,
        /// Its exit status.
        status: String,
    },
    /// A file of a checkpoint is on the storage.
    PartWritten(WorkerId, WrittenPart),
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
    /// The user asked for a stop.
    StopRequested,
    /// Time has passed.
    Tick,
}

/// Why a worker left its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A peer or the link to it failed.
    Peer,
    /// A reduce took too long.
    Timeout,
    /// The members' states differ.
    Diverged(String),
    /// The worker itself cannot go on.
    Internal(String),
}

/// How a worker was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its session ended.
    Session,
    /// Its process ended, with this exit status. Comes from [`Event::Reaped`].
    Exited(String),
    /// It was silent beyond the deadline.
    Silent,
    /// It said why it cannot go on. Comes from [`Fault::Internal`].
    Failed(String),
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Refuse a worker.
    Reject(WorkerId, Rejection),
    /// Record the run's passport.
    AdoptPassport(Passport),
    /// Form a generation: journal it, then tell each member.
    Form(Group),
    /// Tell these workers to leave a generation.
    Abort {
        /// The generation.
        generation: Generation,
        /// Its members that are still there.
        workers: Vec<WorkerId>,
        /// What broke it, for people.
        reason: String,
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
    /// Start a worker process in the place of one that ended.
    Spawn,
    /// Tell people that a local worker is not replaced any more, and why.
    GiveUpReplacing(String),
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

/// The coordinator's knowledge of the group and its decisions. See the crate's documentation.
#[derive(Debug)]
pub struct Machine {
    settings: Settings,
    workers: BTreeMap<WorkerId, Worker>,
    stage: Stage,
    group: Option<Group>,
    last_generation: Generation,
    last_plan: u64,
    stop_requested: bool,
    passport: Option<Passport>,
    checkpoint: Option<Checkpoint>,
    assembly: Assembly,
    locals: Locals,
    now: Time,
}

/// The processes that the coordinator started.
#[derive(Debug)]
struct Locals {
    /// Every worker that was ever one of them.
    workers: BTreeSet<WorkerId>,
    /// Those that are lost to the group and whose processes have not been seen to end, and when those are killed.
    lingering: BTreeMap<WorkerId, Time>,
    /// Processes that run.
    running: u32,
    /// Replacements in a row that did not last.
    failures: u32,
    /// When the next may be started.
    next_spawn: Time,
}

#[derive(Debug)]
struct Worker {
    facts: Option<LoadedFacts>,
    last_heard: Time,
    rest: Rest,
    finished: bool,
    /// When it became a member of a group.
    member_since: Option<Time>,
}

/// What a worker last said of its part in the newest generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// It may still commit.
    Busy,
    /// It commits nothing more, and holds the state of a position, or none yet.
    Ready(Option<Position>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    Gathering,
    Training { plan: Option<Plan> },
    Regrouping { until: Time },
    Closing { outcome: Outcome },
    Ended,
}

impl Machine {
    /// A machine at its start.
    pub fn new(settings: Settings, recovered: Recovered) -> Self {
        let locals = Locals {
            workers: BTreeSet::new(),
            lingering: BTreeMap::new(),
            running: settings.local_workers,
            failures: 0,
            next_spawn: Time::ZERO,
        };
        Machine {
            settings,
            locals,
            workers: BTreeMap::new(),
            stage: Stage::Gathering,
            group: None,
            last_generation: recovered.generation,
            last_plan: 0,
            stop_requested: false,
            passport: recovered.passport,
            checkpoint: recovered.checkpoint,
            assembly: Assembly::default(),
            now: Time::ZERO,
        }
    }

    /// Takes an event at a time and appends what is to be done, in order.
    pub fn handle(&mut self, now: Time, event: Event, actions: &mut Vec<Action>) {
        self.notice_oversleep(now);
        if self.stage == Stage::Ended {
            return;
        }
        self.heard_from(&event);
        match event {
            Event::Hello { worker, local } => self.hello(worker, local, actions),
            Event::Loaded(worker, facts) => self.loaded(worker, facts, actions),
            Event::Ready(worker, generation, position) => {
                self.ready(worker, generation, position, actions);
            }
            Event::Fault(worker, generation, fault) => {
                self.fault(worker, generation, fault, actions);
            }
            Event::Heartbeat(_) | Event::Tick => {}
            Event::Lost(worker, loss) => self.lost(worker, &loss, actions),
            Event::Reaped { worker, status } => self.reaped(worker, status, actions),
            Event::PartWritten(worker, part) => self.part_written(worker, part, actions),
            Event::CheckpointCommitted(checkpoint) => self.committed(checkpoint, actions),
            Event::Finished { worker, generation, position, complete } => {
                self.finished(worker, generation, position, complete, actions);
            }
            Event::InputWrong(detail) => self.end(Outcome::InputWrong(detail), actions),
            Event::StopRequested => self.stop_requested(actions),
        }
        self.drop_silent(actions);
        self.replace(actions);
    }

    /// When [`Event::Tick`] is due at the latest.
    pub fn deadline(&self) -> Option<Time> {
        let regroup = match self.stage {
            Stage::Regrouping { until } => Some(until),
            _ => None,
        };
        let silence = self.workers.values().map(|w| w.last_heard + self.settings.failure_deadline).min();
        let spawn = self.misses_a_local().then_some(self.locals.next_spawn);
        let kill = self.locals.lingering.values().min().copied();
        regroup.into_iter().chain(silence).chain(spawn).chain(kill).min()
    }

    /// The newest group.
    pub fn group(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    /// The newest committed checkpoint.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        self.checkpoint.as_ref()
    }

    /// Samples in the data set, once a worker has loaded it.
    pub fn samples(&self) -> Option<u64> {
        self.workers.values().find_map(|w| w.facts.as_ref()).map(|facts| facts.samples)
    }

    // ---- Workers come and go -------------------------------------------------------------------------------------

    fn hello(&mut self, worker: WorkerId, local: bool, actions: &mut Vec<Action>) {
        if matches!(self.stage, Stage::Closing { .. }) {
            actions.push(Action::Reject(worker, Rejection::Ending));
            return;
        }
        if local {
            self.locals.workers.insert(worker);
        }
        let entry = Worker {
            facts: None,
            last_heard: self.now,
            rest: Rest::Ready(None),
            finished: false,
            member_since: None,
        };
        self.workers.insert(worker, entry);
    }

    fn loaded(&mut self, worker: WorkerId, facts: LoadedFacts, actions: &mut Vec<Action>) {
        match &self.passport {
            None => {
                self.passport = Some(facts.passport.clone());
                actions.push(Action::AdoptPassport(facts.passport.clone()));
            }
            Some(passport) => {
                let differences = passport.differences(&facts.passport);
                if !differences.is_empty() {
                    self.workers.remove(&worker);
                    self.locals.failures += u32::from(self.locals.workers.contains(&worker));
                    actions.push(Action::Reject(worker, Rejection::Passport(differences)));
                    return;
                }
            }
        }
        if let Some(entry) = self.workers.get_mut(&worker) {
            entry.facts = Some(facts);
        }
        match self.stage {
            Stage::Gathering => self.form_if_gathered(actions),
            Stage::Training { plan: None } if self.group_can_grow() => {
                self.announce(PlanKind::Regroup, actions);
            }
            _ => {}
        }
    }

    fn lost(&mut self, worker: WorkerId, loss: &Loss, actions: &mut Vec<Action>) {
        let Some(entry) = self.workers.remove(&worker) else { return };
        if self.locals.workers.contains(&worker) {
            let lasted = entry.member_since.is_some_and(|since| self.now >= since + FIT);
            self.locals.failures = if lasted { 0 } else { self.locals.failures + 1 };
            if !matches!(loss, Loss::Exited(_)) {
                self.locals.lingering.insert(worker, self.now + self.settings.failure_deadline);
            }
        }
        let what = match loss {
            Loss::Session => format!("worker {worker} closed its session"),
            Loss::Exited(status) => format!("worker {worker} ended with {status}"),
            Loss::Failed(detail) => format!("worker {worker} failed: {detail}"),
            Loss::Silent => format!(
                "worker {worker} was silent for {:.1} s",
                self.settings.failure_deadline.as_secs_f64()
            ),
        };
        match self.stage {
            Stage::Training { .. } if self.is_member(worker) => self.regroup(&what, actions),
            Stage::Regrouping { .. } => self.form_if_ready(&what, actions),
            Stage::Closing { .. } if self.is_member(worker) => {
                // Its files of the last checkpoint may be missing: whoever is left writes them again.
                self.regroup(&what, actions);
            }
            Stage::Gathering if self.locals.workers.contains(&worker) => {
                self.fail_before_the_first_group(&what, actions);
            }
            _ => {}
        }
    }

    /// Before the first group a local worker that cannot start will not start better the next time.
    fn fail_before_the_first_group(&mut self, what: &str, actions: &mut Vec<Action>) {
        if self.stage == Stage::Gathering && self.group.is_none() {
            self.end(Outcome::Failed(format!("{what} before training began")), actions);
        }
    }

    fn reaped(&mut self, worker: Option<WorkerId>, status: String, actions: &mut Vec<Action>) {
        self.locals.running = self.locals.running.saturating_sub(1);
        match worker {
            Some(worker) => {
                self.locals.lingering.remove(&worker);
                self.lost(worker, &Loss::Exited(status.clone()), actions);
            }
            None => {
                self.locals.failures += 1;
                self.fail_before_the_first_group(&format!("a local worker ended with {status}"), actions);
            }
        }
        let failures = self.locals.failures;
        let pause =
            if failures < 2 { Duration::ZERO } else { PAUSE * 2u32.pow((failures - 2).min(REPLACEMENTS)) };
        self.locals.next_spawn = self.now + pause;
        if failures > REPLACEMENTS && self.stage != Stage::Ended {
            let what =
                format!("{failures} local workers in a row did not last; the last one ended with {status}");
            if self.present_members().is_empty() {
                self.end(Outcome::Failed(what), actions);
            } else {
                actions.push(Action::GiveUpReplacing(what));
            }
        } else if self.stage == Stage::Gathering {
            self.form_if_gathered(actions);
        }
    }

    /// Starts what is missing of the local workers.
    fn replace(&mut self, actions: &mut Vec<Action>) {
        while self.misses_a_local() && self.now >= self.locals.next_spawn {
            self.locals.running += 1;
            actions.push(Action::Spawn);
        }
    }

    fn misses_a_local(&self) -> bool {
        let going_on =
            matches!(self.stage, Stage::Training { .. } | Stage::Regrouping { .. } | Stage::Gathering);
        going_on
            && self.group.is_some()
            && !self.stop_requested
            && self.locals.running < self.settings.local_workers
            && self.locals.failures <= REPLACEMENTS
    }

    fn drop_silent(&mut self, actions: &mut Vec<Action>) {
        let deadline = self.settings.failure_deadline;
        let silent: Vec<WorkerId> = self
            .workers
            .iter()
            .filter(|(_, w)| self.now >= w.last_heard + deadline)
            .map(|(id, _)| *id)
            .collect();
        for worker in silent {
            actions.push(Action::Drop(worker));
            self.lost(worker, &Loss::Silent, actions);
        }
        for (worker, kill_at) in &mut self.locals.lingering {
            if self.now >= *kill_at {
                *kill_at = self.now + deadline;
                actions.push(Action::Drop(*worker));
            }
        }
        if let Stage::Regrouping { until } = self.stage
            && self.now >= until
        {
            for worker in self.unready_members() {
                actions.push(Action::Drop(worker));
                self.lost(worker, &Loss::Silent, actions);
            }
        }
    }

    // ---- Groups form, break and end ------------------------------------------------------------------------------

    fn form_if_gathered(&mut self, actions: &mut Vec<Action>) {
        let loaded = self.workers.values().filter(|w| w.facts.is_some()).count();
        let all_loaded = loaded == self.workers.len() && self.locals.lingering.is_empty();
        if all_loaded && loaded >= (self.settings.local_workers as usize).max(1) {
            self.form(actions);
        }
    }

    fn ready(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        position: Option<Position>,
        actions: &mut Vec<Action>,
    ) {
        if !self.concerns_newest(worker, generation) {
            return;
        }
        if let Some(entry) = self.workers.get_mut(&worker) {
            entry.rest = Rest::Ready(position);
        }
        if matches!(self.stage, Stage::Training { .. }) {
            // The first member to rest for a planned change; the others follow at the same position.
            self.stage = Stage::Regrouping { until: self.now + self.settings.failure_deadline };
        }
        if matches!(self.stage, Stage::Regrouping { .. }) {
            self.form_if_ready("no member of the group is left", actions);
        }
    }

    fn fault(&mut self, worker: WorkerId, generation: Generation, fault: Fault, actions: &mut Vec<Action>) {
        if !self.concerns_newest(worker, generation) {
            return;
        }
        match fault {
            Fault::Diverged(detail) => self.end(Outcome::Failed(detail), actions),
            Fault::Internal(detail) => {
                actions.push(Action::Drop(worker));
                self.lost(worker, &Loss::Failed(detail), actions);
            }
            Fault::Peer => self.regroup(&format!("worker {worker} lost a peer"), actions),
            Fault::Timeout => {
                self.regroup(&format!("worker {worker} waited too long for a peer"), actions);
            }
        }
    }

    /// Breaks the group up, from training or from closing.
    fn regroup(&mut self, what: &str, actions: &mut Vec<Action>) {
        if let Stage::Training { .. } | Stage::Closing { .. } = self.stage {
            self.stage = Stage::Regrouping { until: self.now + self.settings.failure_deadline };
            actions.push(Action::Abort {
                generation: self.last_generation,
                workers: self.present_members(),
                reason: what.to_string(),
            });
        }
        self.form_if_ready(what, actions);
    }

    fn form_if_ready(&mut self, what: &str, actions: &mut Vec<Action>) {
        if !self.unready_members().is_empty() {
            return;
        }
        let members = self.group.iter().flat_map(|group| &group.members);
        let all_local =
            members.map(|member| member.worker).all(|worker| self.locals.workers.contains(&worker));
        if !self.present_members().is_empty() {
            self.form(actions);
        } else if all_local && !self.stop_requested && self.locals.failures <= REPLACEMENTS {
            self.stage = Stage::Gathering;
            self.form_if_gathered(actions);
        } else {
            // A worker of another machine may still train: only its own clock ends it.
            let outcome = format!("{what}, and no worker is left that holds the state");
            self.end(Outcome::Failed(outcome), actions);
        }
    }

    fn form(&mut self, actions: &mut Vec<Action>) {
        let loaded = self.workers.iter().filter(|(_, worker)| worker.facts.is_some());
        let ids: Vec<WorkerId> = loaded.map(|(id, _)| *id).take(self.settings.data_shards as usize).collect();
        let world_size = u32::try_from(ids.len()).expect("a group is at most V workers");
        let members: Vec<Member> = ids
            .into_iter()
            .zip(shard_ranges(self.settings.data_shards, world_size))
            .map(|(worker, shards)| Member { worker, shards, writes_parts: self.sees_storage(worker) })
            .collect();
        if !members.iter().any(|member| member.writes_parts) {
            let outcome = "no worker can write to the checkpoint storage; share its folder with the \
                           workers' machines and name it in checkpoint.url";
            self.end(Outcome::Failed(outcome.to_string()), actions);
            return;
        }
        let (position, start) = self.choose_start(&members);
        self.last_generation = Generation(self.last_generation.0 + 1);
        for worker in self.workers.values_mut() {
            worker.rest = Rest::Busy;
            worker.finished = false;
        }
        for member in &members {
            let entry = self.workers.get_mut(&member.worker).expect("members are present");
            entry.member_since.get_or_insert(self.now);
        }
        let group = Group { generation: self.last_generation, members, position, start };
        self.group = Some(group.clone());
        self.stage = Stage::Training { plan: None };
        actions.push(Action::Form(group));
        if self.stop_requested {
            self.announce(PlanKind::Stop, actions);
        }
    }

    fn choose_start(&self, members: &[Member]) -> (Position, Start) {
        let rank = |index: usize| Rank(u32::try_from(index).expect("a rank is below V"));
        // The most advanced member, the lowest rank of those.
        let mut best: Option<(Position, Rank)> = None;
        for (index, member) in members.iter().enumerate() {
            if let Some(position) = self.rest_position(member.worker)
                && best.is_none_or(|(highest, _)| position > highest)
            {
                best = Some((position, rank(index)));
            }
        }
        match (best, &self.checkpoint) {
            (Some((position, source)), checkpoint)
                if checkpoint.as_ref().is_none_or(|c| c.position <= position) =>
            {
                (position, Start::Healed(source))
            }
            (_, Some(checkpoint)) => {
                let reader = members.iter().position(|member| member.writes_parts).unwrap_or(0);
                (checkpoint.position, Start::Checkpoint(rank(reader), checkpoint.clone()))
            }
            (_, None) => (Position(0), Start::Fresh),
        }
    }

    fn finished(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        position: Position,
        complete: bool,
        actions: &mut Vec<Action>,
    ) {
        if !self.concerns_newest(worker, generation) {
            return;
        }
        if let Some(entry) = self.workers.get_mut(&worker) {
            entry.rest = Rest::Ready(Some(position));
            entry.finished = true;
        }
        if matches!(self.stage, Stage::Regrouping { .. }) {
            self.form_if_ready("no member of the group is left", actions);
            return;
        }
        let members = self.present_members();
        if members.iter().all(|id| self.workers[id].finished) {
            let outcome = if complete { Outcome::Complete } else { Outcome::Stopped(Some(position)) };
            self.stage = Stage::Closing { outcome };
            self.close_if_saved(position, actions);
        }
    }

    fn close_if_saved(&mut self, position: Position, actions: &mut Vec<Action>) {
        if let Stage::Closing { outcome } = &self.stage
            && self.checkpoint.as_ref().is_some_and(|c| c.position >= position)
        {
            let outcome = outcome.clone();
            self.end(outcome, actions);
        }
    }

    fn stop_requested(&mut self, actions: &mut Vec<Action>) {
        self.stop_requested = true;
        match self.stage {
            Stage::Gathering => {
                let position = self.checkpoint.as_ref().map(|checkpoint| checkpoint.position);
                self.end(Outcome::Stopped(position), actions);
            }
            Stage::Training { .. } => self.announce(PlanKind::Stop, actions),
            // A group that forms later hears of the stop; one that closes is stopping already.
            Stage::Regrouping { .. } | Stage::Closing { .. } | Stage::Ended => {}
        }
    }

    fn announce(&mut self, kind: PlanKind, actions: &mut Vec<Action>) {
        self.last_plan += 1;
        let plan = Plan { number: self.last_plan, kind };
        self.stage = Stage::Training { plan: Some(plan) };
        actions.push(Action::Announce { plan, workers: self.present_members() });
    }

    fn end(&mut self, outcome: Outcome, actions: &mut Vec<Action>) {
        let workers: Vec<WorkerId> = self.workers.keys().copied().collect();
        actions.extend(workers.into_iter().map(Action::Release));
        self.stage = Stage::Ended;
        actions.push(Action::End(outcome));
    }

    // ---- Checkpoints ---------------------------------------------------------------------------------------------

    fn part_written(&mut self, worker: WorkerId, part: WrittenPart, actions: &mut Vec<Action>) {
        let Some(facts) = self.workers.get(&worker).and_then(|w| w.facts.as_ref()) else {
            return;
        };
        let newest = self.checkpoint.as_ref().map_or((0, 0), |c| (c.step, c.phase));
        if (part.step, part.phase) <= newest && self.checkpoint.is_some() {
            return;
        }
        match self.assembly.add(part, facts.phases_per_step) {
            Ok(None) => {}
            Ok(Some(checkpoint)) => {
                let given_up = self.assembly.forget_before(checkpoint.step, checkpoint.phase);
                actions.extend(given_up.into_iter().map(Action::AbandonCheckpoint));
                actions.push(Action::Commit(checkpoint));
            }
            Err(conflict) => {
                let outcome = format!(
                    "the workers' states differ at step {}; this is wrong arithmetic or memory on one of them",
                    conflict.step
                );
                self.end(Outcome::Failed(outcome), actions);
            }
        }
    }

    fn committed(&mut self, checkpoint: Checkpoint, actions: &mut Vec<Action>) {
        if self.checkpoint.as_ref().is_none_or(|c| c.position < checkpoint.position) {
            self.checkpoint = Some(checkpoint);
        }
        let members = self.present_members();
        let rests = members.first().and_then(|id| self.rest_position(*id));
        if let Some(position) = rests {
            self.close_if_saved(position, actions);
        }
    }

    // ---- Questions -----------------------------------------------------------------------------------------------

    fn heard_from(&mut self, event: &Event) {
        let worker = match event {
            Event::Loaded(worker, _)
            | Event::Ready(worker, ..)
            | Event::Fault(worker, ..)
            | Event::Heartbeat(worker)
            | Event::PartWritten(worker, _)
            | Event::Finished { worker, .. } => worker,
            _ => return,
        };
        if let Some(entry) = self.workers.get_mut(worker) {
            entry.last_heard = self.now;
        }
    }

    /// A shell that was not run for long must not blame the workers: it has not read their messages yet.
    fn notice_oversleep(&mut self, now: Time) {
        let slept = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        if slept > self.settings.failure_deadline / 2 {
            for worker in self.workers.values_mut() {
                worker.last_heard = self.now;
            }
            if let Stage::Regrouping { until } = &mut self.stage {
                *until = self.now + self.settings.failure_deadline;
            }
        }
    }

    fn concerns_newest(&self, worker: WorkerId, generation: Generation) -> bool {
        generation == self.last_generation && self.is_member(worker) && self.workers.contains_key(&worker)
    }

    fn is_member(&self, worker: WorkerId) -> bool {
        self.group.as_ref().is_some_and(|g| g.members.iter().any(|m| m.worker == worker))
    }

    fn present_members(&self) -> Vec<WorkerId> {
        let members = self.group.iter().flat_map(|group| &group.members);
        members.map(|m| m.worker).filter(|id| self.workers.contains_key(id)).collect()
    }

    fn unready_members(&self) -> Vec<WorkerId> {
        let present = self.present_members();
        present.into_iter().filter(|id| self.workers[id].rest == Rest::Busy).collect()
    }

    fn group_can_grow(&self) -> bool {
        self.present_members().len() < self.settings.data_shards as usize && !self.stop_requested
    }

    fn rest_position(&self, worker: WorkerId) -> Option<Position> {
        match self.workers.get(&worker)?.rest {
            Rest::Ready(position) => position,
            Rest::Busy => None,
        }
    }

    fn sees_storage(&self, worker: WorkerId) -> bool {
        let facts = self.workers.get(&worker).and_then(|w| w.facts.as_ref());
        facts.is_some_and(|facts| facts.sees_storage)
    }
}

#[cfg(test)]
mod tests;
