//! Local workers, the processes that the coordinator started: their number, and when the next is
//! started.

use std::time::Duration;

use super::*;

/// Shortest time after which a member counts as fit; one that ends sooner may do so again.
pub(super) const FIT: Duration = Duration::from_secs(1);
/// Advice where workers end by themselves: only they know why.
pub(super) const LOOK: &str =
    "the worker's own lines before this say why; mend that, and give the same command again";
/// Pause before the second replacement in a row that does not last; it doubles from there.
const PAUSE: Duration = Duration::from_millis(250);
/// Pause before a replacement while others train on: the start of a program takes a core from those that
/// form their next group.
pub(super) const ASIDE: Duration = Duration::from_millis(100);
/// Largest number of replacements in a row that do not last.
const REPLACEMENTS: u32 = 8;

#[derive(Debug)]
pub(super) struct Locals {
    /// Every worker that was ever a local one.
    pub(super) workers: BTreeSet<WorkerId>,
    /// Lost local workers whose processes have not ended yet, each with the time at which its
    /// process is killed.
    pub(super) lingering: BTreeMap<WorkerId, Time>,
    /// Count of running processes.
    pub(super) running: u32,
    /// Count of replacements in a row that did not last.
    pub(super) failures: u32,
    /// Earliest time of the next start.
    next_spawn: Time,
}

impl Locals {
    pub(super) fn new(workers: BTreeSet<WorkerId>, running: u32) -> Locals {
        Locals { workers, lingering: BTreeMap::new(), running, failures: 0, next_spawn: Time::ZERO }
    }

    /// Counts a loss. `lasted` says whether the worker had trained for a while; its process, if it is still
    /// there, is killed at `kill`.
    pub(super) fn lost(&mut self, worker: WorkerId, loss: &Loss, lasted: bool, kill: Time) {
        if !self.workers.contains(&worker) {
            return;
        }
        // After a worker that trained for a while the count starts anew: its replacement may well last.
        self.failures = if lasted { 0 } else { self.failures + 1 };
        // Its process is still there: it ends by itself, or is killed after a while.
        if !matches!(loss, Loss::Exited(_)) {
            self.lingering.insert(worker, kill);
        }
    }

    fn pause(&self) -> Duration {
        match self.failures {
            // The first replacement does not wait for that: most losses come alone.
            0 | 1 => Duration::ZERO,
            // The power is bounded, as failures are counted on after replacement was given up.
            failures => PAUSE * 2u32.pow((failures - 2).min(REPLACEMENTS)),
        }
    }

    fn given_up(&self) -> bool {
        self.failures > REPLACEMENTS
    }
}

impl Machine {
    pub(super) fn reaped(&mut self, worker: Option<WorkerId>, status: String, actions: &mut Vec<Action>) {
        self.locals.running = self.locals.running.saturating_sub(1);
        match worker {
            // `lost` counts the failure, unless the worker was lost before its process ended.
            Some(worker) => {
                self.locals.lingering.remove(&worker);
                self.lost(worker, Loss::Exited(status.clone()), actions);
            }
            // It ended before it said hello, so `lost` never hears of it.
            None => self.locals.failures += 1,
        }
        if self.stage == Stage::Ended {
            return;
        }
        if worker.is_none() && self.group.is_none() {
            // A worker that cannot start will not start better the next time.
            let what = format!("a local worker ended with {status} before training began; {LOOK}");
            return self.end(Outcome::Failed(what), actions);
        }
        // Counted from this end, so that a program that dies at its start is not started in a tight
        // loop.
        let aside = if self.group.is_some() && !self.workers.is_empty() { ASIDE } else { Duration::ZERO };
        self.locals.next_spawn = self.now + self.locals.pause().max(aside);
        if self.locals.given_up() {
            let failures = self.locals.failures;
            let what =
                format!("{failures} local workers in a row did not last; the last one ended with {status}");
            // Without a replacement there is nobody left to train; otherwise the others go on.
            if self.workers.is_empty() {
                self.end(Outcome::Failed(format!("{what}; {LOOK}")), actions);
            } else {
                actions.push(Action::GiveUpReplacing(what));
                // A regroup may wait for a local worker that can save: none will come any more.
                self.form_if_ready(actions);
            }
        } else {
            self.form_if_gathered(actions);
        }
    }

    /// Number of local workers that training waits for. Once replacement is given up, at most the
    /// number of running processes.
    pub(super) fn expected_locals(&self) -> u32 {
        let wanted = self.settings.local_workers;
        if self.locals.given_up() { wanted.min(self.locals.running) } else { wanted }
    }

    /// Whether a local worker is to be started, or runs and has not loaded yet.
    pub(super) fn is_a_local_to_come(&self) -> bool {
        let has_loaded = |(id, worker): &(&WorkerId, &Worker)| {
            worker.facts.is_some() && !worker.leaving && self.locals.workers.contains(id)
        };
        // One that is leaving does not count: it will not write the next checkpoint.
        let loaded = self.workers.iter().filter(has_loaded).count();
        self.misses_a_local() || self.locals.running as usize > loaded
    }

    /// Starts the missing local workers.
    pub(super) fn replace(&mut self, actions: &mut Vec<Action>) {
        while self.misses_a_local() && self.now >= self.locals.next_spawn {
            // Counted from the order on, not from the hello, so that no event orders it twice.
            self.locals.running += 1;
            actions.push(Action::Spawn);
        }
    }

    fn misses_a_local(&self) -> bool {
        // Once the run's end is decided nobody new is needed. While all members only leave, one is.
        !matches!(self.stage, Stage::Closing { outcome: Some(_) } | Stage::Ended)
            && !self.stop_requested
            && self.locals.running < self.settings.local_workers
            && !self.locals.given_up()
    }

    pub(super) fn next_spawn(&self) -> Option<Time> {
        self.misses_a_local().then_some(self.locals.next_spawn)
    }

    /// Releases the newest local workers beyond the target number.
    pub(super) fn shed_locals(&mut self, actions: &mut Vec<Action>) {
        let is_staying_local = |id: &WorkerId| self.locals.workers.contains(id) && !self.is_leaving(*id);
        let staying: Vec<WorkerId> = self.workers.keys().copied().filter(is_staying_local).collect();
        let wanted = self.settings.local_workers as usize;
        // Ids grow, so the newest go: the oldest are warm, and one of them is the source.
        for worker in staying.into_iter().skip(wanted) {
            self.leave(worker, actions);
        }
    }
}
