//! State machine of the group protocol.
//!
//! Invariants, each held by a test in `tests` below or by the simulation in `tests/simulation`:
//!
//! 1. A generation number is never reused, and is above every generation recovered from the journal.
//! 2. A generation starts only when a member of the one before is quiesced and the others are
//!    quiesced, lost or late, or when all of them are dead or past their lease.
//! 3. It starts at the highest update index at which any of its members is quiesced; a newer
//!    checkpoint takes precedence.
//! 4. A message about another generation than the newest has no effect.
//! 5. A fault takes precedence over a planned change, and a requested stop survives it.
//! 6. Workers are released only once the last checkpoint is committed, or once a member that stays
//!    holds the state at their update index.
//! 7. A lost member may come back as long as no newer generation was formed; after that it is a
//!    stranger.
//! 8. A local worker that ends is replaced, with growing pauses if its replacements do not last,
//!    and only up to a limit.
//! 9. A group that is whole when a new coordinator finds it goes on undisturbed.

mod coming;
mod group;
mod locals;
mod saving;
mod watch;

use std::collections::{BTreeMap, BTreeSet};

use crate::checkpoint::{Assembly, Checkpoint};
use crate::events::{
    Action, Activity, Cause, Event, Fault, Group, LoadedFacts, Loss, Outcome, Plan, PlanKind, Progress,
    Recovered, Rejection, Settings,
};
use crate::passport::Passport;
use crate::shape::StepShape;
use crate::types::{Generation, Position, Time, WorkerId};
use locals::Locals;

/// Pure state machine with the coordinator's knowledge of the group. See the crate's documentation.
#[derive(Debug)]
pub struct Machine {
    settings: Settings,
    workers: BTreeMap<WorkerId, Worker>,
    /// Members of the newest generation that are lost without being known to have ended, each with
    /// the end of its lease, when it stops by itself.
    absent: BTreeMap<WorkerId, Time>,
    stage: Stage,
    group: Option<Group>,
    /// Whether this coordinator formed the newest generation. Only then can its members still meet.
    formed_here: bool,
    last_generation: Generation,
    last_plan: u64,
    stop_requested: bool,
    passport: Option<Passport>,
    shape: Option<StepShape>,
    checkpoint: Option<Checkpoint>,
    assembly: Assembly,
    /// Newest invalidated generation: its states must not be used.
    condemned: Option<Generation>,
    /// Update indices of phases that may be skipped, because the run was rolled back by them.
    skips: BTreeSet<Position>,
    /// Whether the newest generation's members still train by another job.
    job_changed: bool,
    /// Search for a newer checkpoint, before a group forms of which nobody holds a state.
    search: Option<Search>,
    /// Count of divergences since the newest checkpoint.
    divergences: u32,
    /// Pairs of workers that cannot reach each other, each with the time until which they are kept
    /// apart.
    severed: BTreeMap<(WorkerId, WorkerId), Time>,
    locals: Locals,
    /// Time at which the shell last found that it had overslept. Sessions that ended around then
    /// are no evidence about their workers.
    overslept: Option<Time>,
    now: Time,
    /// Earliest time at which all limits must be checked again, as of the last check.
    due: Option<Time>,
}

#[derive(Debug)]
struct Worker {
    facts: Option<LoadedFacts>,
    connected: bool,
    last_heard: Time,
    progress: Progress,
    /// Time of the worker's last progress.
    progress_since: Time,
    rest: Rest,
    /// `Some(true)` after the last step of the job, `Some(false)` after a planned stop.
    finished: Option<bool>,
    leaving: bool,
    /// Time at which the worker became a member of a group; `None` if it never was one.
    member_since: Option<Time>,
}

/// Stage of a search for a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Search {
    /// The storage is searched.
    Asked,
    /// A checkpoint at this update index was found, and counts once it is committed.
    Until(Position),
}

/// Last report of a worker about its part in the newest generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// The worker may still commit.
    Busy,
    /// Quiesced: the worker commits nothing more, and holds the state at an update index, or none
    /// yet.
    Ready(Option<Position>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    /// Nobody holds a state. When all expected workers are present, training resumes from the
    /// newest checkpoint.
    Gathering,
    /// Members of the newest generation may be alive, and none of them is present. Once one is,
    /// `until` ends the wait for the others.
    Reconnecting { until: Option<Time> },
    /// The newest generation trains.
    Training { plan: Option<Plan> },
    /// The members quiesce for the next generation, for this reason; `until` ends the wait for them.
    Regrouping { until: Time, cause: Cause },
    /// All have finished. `outcome` is how the run ends once all is saved; `None` if its workers
    /// only leave.
    Closing { outcome: Option<Outcome> },
    /// The run has ended.
    Ended,
}

impl Machine {
    /// Creates a machine at its start. [`Event::Started`] must be its first event.
    pub fn new(settings: Settings, recovered: Recovered) -> Self {
        let Recovered { group, dead, locals, running, .. } = recovered;
        let Recovered { condemned, skips, job_changed, checkpoint, passport, shape, .. } = recovered;
        let lease = settings.limits.lease;
        let members = group.iter().flat_map(|group| &group.members).map(|member| member.worker);
        // A lease that an earlier coordinator prolonged ends at the latest one lease after this start,
        // since that coordinator was gone by then (M4).
        let absent: BTreeMap<WorkerId, Time> =
            members.filter(|worker| !dead.contains(worker)).map(|worker| (worker, lease)).collect();
        let stage = if absent.is_empty() { Stage::Gathering } else { Stage::Reconnecting { until: None } };
        Machine {
            // Above every plan of an earlier term: members keep the highest number that they know, and
            // plans are not journaled.
            last_plan: settings.term.0 << 32,
            locals: Locals::new(locals.into_iter().collect(), running),
            settings,
            workers: BTreeMap::new(),
            absent,
            stage,
            // Also if the group cannot go on: its number is never used again (M1).
            last_generation: group.as_ref().map_or(Generation(0), |group| group.generation),
            group,
            // Members of an earlier coordinator's generation have met in a store that died with it.
            formed_here: false,
            stop_requested: false,
            passport,
            shape,
            checkpoint,
            assembly: Assembly::default(),
            condemned,
            skips: skips.into_iter().collect(),
            job_changed,
            search: None,
            divergences: 0,
            severed: BTreeMap::new(),
            overslept: None,
            now: Time::ZERO,
            due: None,
        }
    }

    /// Takes one event and appends the resulting actions, in order.
    pub fn handle(&mut self, now: Time, event: Event, actions: &mut Vec<Action>) {
        // Before any limit is checked: an oversleep restarts them all.
        self.notice_oversleep(now);
        if self.stage == Stage::Ended {
            return;
        }
        // A message is a sign of life even if what it says proves out of date.
        self.heard_from(&event);
        let (routine, decided) = (self.is_routine(&event), actions.len());
        self.take(event, actions);
        // Nothing was decided and no limit has come: what follows would only look at every worker again.
        if routine && actions.len() == decided {
            return;
        }
        // Losses come first: groups are formed, and changes planned, from the members that remain.
        self.drop_late(actions);
        self.judge_absent(actions);
        // Before a group forms, so that it is not formed with a worker that is to go.
        self.shed_locals(actions);
        self.form_if_gathered(actions);
        self.replace(actions);
        self.form_if_ready(actions);
        self.plan_ahead(actions);
        // Last, from the state that all decisions have left.
        self.due = self.next_due();
    }

    /// Whether an event that leads to no immediate decision only moves limits, and only to later.
    /// Then the other workers need no check: the messages of a group of n in a second must not cost
    /// n^2.
    fn is_routine(&self, event: &Event) -> bool {
        let routine = match event {
            Event::Heartbeat(..) | Event::Ready(..) | Event::Fault(..) => true,
            Event::Loaded(..) => self.stage == Stage::Gathering,
            // Anything else may bring a limit nearer, or change who is a member.
            _ => false,
        };
        routine && self.due.is_some_and(|due| self.now < due)
    }

    fn take(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Started => self.form_if_gathered(actions),
            Event::Hello { worker, local } => self.hello(worker, local, actions),
            Event::Resumed { worker, generation, rest } => self.resumed(worker, generation, rest, actions),
            Event::Loaded(worker, facts) => self.loaded(worker, facts, actions),
            Event::Ready(worker, generation, position) => self.ready(worker, generation, position, actions),
            Event::Fault(worker, generation, fault) => self.fault(worker, generation, fault, actions),
            Event::Heartbeat(worker, progress) => self.progressed(worker, progress),
            // A tick exists for the checks that follow every event.
            Event::Tick => {}
            Event::Disconnected(worker) => self.disconnected(worker, actions),
            Event::Leave(worker) => self.leave(worker, actions),
            // Carried out by `shed_locals` and `replace`, which run after every event.
            Event::Scale(count) => self.settings.local_workers = count,
            Event::Reaped { worker, status } => self.reaped(worker, status, actions),
            Event::PartWritten(worker, generation, part) => {
                self.part_written(worker, generation, part, actions);
            }
            Event::CheckpointCommitted(checkpoint) => self.committed(checkpoint, actions),
            // The group forms in what follows every event.
            Event::Searched(found) => self.search = found.map(Search::Until),
            Event::Finished { worker, generation, position, complete } => {
                self.finished((worker, generation), position, complete, actions);
            }
            // The job or its data are wrong for every worker: no other would do better.
            Event::InputWrong(detail) => self.end(Outcome::InputWrong(detail), actions),
            Event::Unable(worker, detail) => {
                // Dropped first: what it still sends must not count after its loss.
                actions.push(Action::Drop(worker));
                self.lost(worker, Loss::Failed(detail), actions);
            }
            Event::StopRequested => self.stop_requested(actions),
        }
    }

    /// The newest group.
    pub fn group(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    /// Stage of the group in a word; diagnostic only.
    pub fn stage(&self) -> &'static str {
        match self.stage {
            Stage::Gathering => "gathering",
            Stage::Reconnecting { .. } => "reconnecting",
            Stage::Training { .. } => "training",
            Stage::Regrouping { .. } => "regrouping",
            Stage::Closing { .. } => "closing",
            Stage::Ended => "ended",
        }
    }

    /// Whether members of the newest generation may be alive, too few of which are present.
    pub fn is_reconnecting(&self) -> bool {
        matches!(self.stage, Stage::Reconnecting { .. })
    }

    /// The newest committed checkpoint.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        self.checkpoint.as_ref()
    }

    /// Newest invalidated generation.
    pub fn condemned(&self) -> Option<Generation> {
        self.condemned
    }

    /// Target number of local workers.
    pub fn local_workers(&self) -> u32 {
        self.settings.local_workers
    }

    /// Shape of the run's steps, once a worker has loaded its objective.
    pub fn shape(&self) -> Option<&StepShape> {
        self.shape.as_ref()
    }

    /// Number of samples in the data set, once a worker has loaded it.
    pub fn samples(&self) -> Option<u64> {
        // Any worker will do: their fingerprints, which cover the data, are equal (D11).
        self.workers.values().find_map(|w| w.facts.as_ref()).map(|facts| facts.samples)
    }

    /// Whether a worker has loaded and was taken in, so that its fingerprint of the environment is
    /// the run's.
    pub fn has_loaded(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|worker| worker.facts.is_some())
    }

    /// Indices of the samples that the job leaves out after its start, once a worker has loaded
    /// them.
    pub fn left_out(&self) -> Option<&[u64]> {
        self.workers.values().find_map(|w| w.facts.as_ref()).map(|facts| facts.left_out.as_slice())
    }

    /// Whether a worker whose session ended may resume its identity: it is present, or a lost
    /// member of the newest generation. Any other worker is a stranger.
    pub fn knows(&self, worker: WorkerId, generation: Generation) -> bool {
        let known = self.workers.contains_key(&worker) || self.absent.contains_key(&worker);
        // A newer generation than the journal's was never announced by this run (M1).
        known && generation <= self.last_generation
    }

    /// Whether a worker is, or was under this coordinator, a member of a group. No other worker has
    /// anything to report about the run.
    pub fn has_trained(&self, worker: WorkerId) -> bool {
        let was_member = self.workers.get(&worker).is_some_and(|worker| worker.member_since.is_some());
        was_member || self.is_member(worker)
    }

    /// All workers that are present: expected, members, or spare.
    pub fn workers(&self) -> impl Iterator<Item = WorkerId> {
        self.workers.keys().copied()
    }

    fn end(&mut self, outcome: Outcome, actions: &mut Vec<Action>) {
        let workers: Vec<WorkerId> = self.workers.keys().copied().collect();
        actions.extend(workers.into_iter().map(Action::Release));
        self.stage = Stage::Ended;
        // After the releases: the shell carries actions out in order, and ends with this one.
        actions.push(Action::End(outcome));
    }

    fn stop_requested(&mut self, actions: &mut Vec<Action>) {
        self.stop_requested = true;
        match &mut self.stage {
            Stage::Gathering => self.end_stopped(actions),
            // Members that are back in time are stopped in order; the others save by themselves.
            Stage::Reconnecting { until } => {
                until.get_or_insert(self.now + self.settings.limits.deadline);
            }
            // All members were leaving, and the run was to wait for others. Now it ends, once they have
            // saved; the update index is filled in then.
            Stage::Closing { outcome: outcome @ None } => *outcome = Some(Outcome::Stopped(None)),
            // A group learns of the stop by a plan, as soon as it trains.
            Stage::Training { .. } | Stage::Regrouping { .. } | Stage::Closing { .. } | Stage::Ended => {}
        }
    }

    fn end_stopped(&mut self, actions: &mut Vec<Action>) {
        let position = self.checkpoint.as_ref().map(|checkpoint| checkpoint.position);
        self.end(Outcome::Stopped(position), actions);
    }

    // ---- Questions

    fn concerns_newest(&self, worker: WorkerId, generation: Generation) -> bool {
        // Invariant 4. A member that is lost, or not back yet, does not count either.
        generation == self.last_generation && self.is_member(worker) && self.workers.contains_key(&worker)
    }

    fn is_member(&self, worker: WorkerId) -> bool {
        self.group.as_ref().is_some_and(|g| g.members.iter().any(|m| m.worker == worker))
    }

    fn members(&self) -> impl Iterator<Item = WorkerId> {
        self.group.iter().flat_map(|group| &group.members).map(|member| member.worker)
    }

    fn present_members(&self) -> Vec<WorkerId> {
        self.members().filter(|id| self.workers.contains_key(id)).collect()
    }

    fn unready_members(&self) -> Vec<WorkerId> {
        let present = self.present_members();
        present.into_iter().filter(|id| self.workers[id].rest == Rest::Busy).collect()
    }

    /// Members that a regroup waits for. A member that is back has to report again that it has
    /// loaded.
    fn awaited_members(&self) -> Vec<WorkerId> {
        self.members().filter(|id| self.is_awaited(id)).collect()
    }

    fn is_awaited(&self, member: &WorkerId) -> bool {
        // One without facts could not be judged: whether it can save, and which GPU it has.
        let awaited = |worker: &Worker| worker.rest == Rest::Busy || worker.facts.is_none();
        self.workers.get(member).is_some_and(awaited)
    }

    fn rest_position(&self, worker: WorkerId) -> Option<Position> {
        match self.workers.get(&worker)?.rest {
            Rest::Ready(position) => position,
            Rest::Busy => None,
        }
    }

    fn is_leaving(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|worker| worker.leaving)
    }

    fn sees_storage(&self, worker: WorkerId) -> bool {
        let facts = self.workers.get(&worker).and_then(|w| w.facts.as_ref());
        facts.is_some_and(|facts| facts.sees_storage)
    }

    fn gpu_of(&self, worker: WorkerId) -> Option<&str> {
        self.workers.get(&worker)?.facts.as_ref()?.gpu.as_deref()
    }
}

#[cfg(test)]
mod tests;
