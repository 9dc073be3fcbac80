//! Joining, resuming, leaving and loss of workers.

use super::locals::{FIT, LOOK};
use super::*;
use crate::events::Rested;
use crate::passport::Difference;

impl Machine {
    pub(super) fn hello(&mut self, worker: WorkerId, local: bool, actions: &mut Vec<Action>) {
        // Once it is known how the run ends. While all members only leave, a newcomer is welcome.
        if matches!(self.stage, Stage::Closing { outcome: Some(_) }) {
            actions.push(Action::Reject(worker, Rejection::Ending));
            return;
        }
        if local {
            self.locals.workers.insert(worker);
        }
        self.workers.insert(worker, Worker::new(self.now));
    }

    pub(super) fn resumed(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        rest: Option<Rested>,
        actions: &mut Vec<Action>,
    ) {
        // It is in sight again: its lease need not run out.
        self.absent.remove(&worker);
        // Its process is alive and wanted: it must not be killed for an earlier loss.
        self.locals.lingering.remove(&worker);
        let now = self.now;
        // A member that was away may have committed out of sight: busy until it says otherwise (M2).
        let entry =
            self.workers.entry(worker).or_insert_with(|| Worker { rest: Rest::Busy, ..Worker::new(now) });
        entry.connected = true;
        entry.last_heard = now;
        // Nothing of its progress could arrive while it was away.
        entry.progress_since = now;
        // A spare holds nothing that the run needs, and reports by itself that it has loaded.
        if !self.is_member(worker) {
            return;
        }
        if generation < self.last_generation {
            self.missed_its_assignment(worker, generation, rest, actions);
        } else if let Some(rest) = rest {
            self.rested(worker, rest, actions);
        } else {
            self.remind(worker, actions);
        }
        // The first member that is back opens the window for the others (M12).
        if let Stage::Reconnecting { until } = &mut self.stage {
            until.get_or_insert(now + self.settings.limits.deadline);
        }
    }

    /// A member never learned that it is one. Whatever state it is quiesced with, it will commit
    /// nothing in the newest generation unless it is told now.
    fn missed_its_assignment(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        rest: Option<Rested>,
        actions: &mut Vec<Action>,
    ) {
        let condemned = self.condemned.is_some_and(|condemned| generation <= condemned);
        let trains = matches!(self.stage, Stage::Training { .. });
        // The group can still meet in this coordinator's store: the assignment was lost, not the group.
        if trains && self.formed_here {
            actions.push(Action::Assign(worker));
        } else if let Some(rest) = rest {
            // A state of an invalidated generation must not become a source (D10).
            let position = rest.position.filter(|_| !condemned);
            self.rested(worker, Rested { position, finished: None }, actions);
        } else {
            // The member has not even left an older generation, so its state is of no use.
            let rest = Rested { position: None, finished: None };
            self.abort(vec![worker], Cause::TakenOver, actions);
            self.rested(worker, rest, actions);
        }
    }

    fn rested(&mut self, worker: WorkerId, rest: Rested, actions: &mut Vec<Action>) {
        let generation = self.last_generation;
        match (rest.finished, rest.position) {
            // Finished without a state does not count as finished: the state may have been invalidated
            // since.
            (Some(complete), Some(position)) => {
                self.finished((worker, generation), position, complete, actions)
            }
            _ => self.ready(worker, generation, rest.position, actions),
        }
    }

    /// Repeats the messages that a member may have missed while its session was away.
    fn remind(&mut self, worker: WorkerId, actions: &mut Vec<Action>) {
        match &self.stage {
            Stage::Regrouping { cause, .. } => self.abort(vec![worker], cause.clone(), actions),
            Stage::Training { plan: Some(plan) } => {
                actions.push(Action::Announce { plan: *plan, workers: vec![worker] });
            }
            // Nothing was announced to a group that trains without a plan, and releases come when it has
            // closed.
            _ => {}
        }
    }

    pub(super) fn loaded(&mut self, worker: WorkerId, facts: LoadedFacts, actions: &mut Vec<Action>) {
        let differences = self.differences(&facts);
        if !differences.is_empty() {
            // Before the refusal: no group may form with it.
            self.workers.remove(&worker);
            actions.push(Action::Reject(worker, Rejection::Passport(differences)));
            // Its replacement would run on the same machine and be refused as well, without end.
            if self.locals.workers.contains(&worker) && self.workers.is_empty() {
                self.end(Outcome::Refused, actions);
            }
            return;
        }
        // The first worker of the run sets what all later ones are held against (D11). Later, a change of the
        // job changed some items, and they were forgotten with it; or an older version had none.
        if self.passport.as_ref() != Some(&facts.passport) {
            self.passport = Some(facts.passport.clone());
            actions.push(Action::AdoptPassport(facts.passport.clone()));
        }
        self.shape.get_or_insert_with(|| facts.shape.clone());
        // It may have been dropped while its report was on the way.
        if let Some(entry) = self.workers.get_mut(&worker) {
            entry.facts = Some(facts);
        }
        self.form_if_gathered(actions);
        // A member that was away is awaited until it has loaded again: this may have been the last one.
        self.form_if_ready(actions);
    }

    /// Items in which a worker differs from the run, and may not.
    fn differences(&self, facts: &LoadedFacts) -> Vec<Difference> {
        let mut differences = Vec::new();
        if let Some(passport) = &self.passport {
            differences = passport.differences(&facts.passport);
            differences.retain(|difference| !passport.lets_adopt(&difference.item));
        }
        // No item of the fingerprint: builds that do not report one may still join.
        if let Some(shape) = self.shape.as_ref().filter(|shape| **shape != facts.shape) {
            let (expected, found) = (shape.to_string(), facts.shape.to_string());
            differences.push(Difference { item: "step".to_string(), expected, found });
        }
        differences
    }

    /// A worker whose session ended is only suspected: it may be back within the deadline.
    pub(super) fn disconnected(&mut self, worker: WorkerId, actions: &mut Vec<Action>) {
        let Some(entry) = self.workers.get_mut(&worker) else { return };
        entry.connected = false;
        // A peer reported its connection reset, now the session is gone too: with both it is lost (M9).
        if matches!(self.stage, Stage::Regrouping { cause: Cause::Fault(_, Fault::Peer), .. }) {
            self.lose_disconnected(actions);
        }
    }

    /// A member that lost its session, and that a peer lost too, is dead or cut off from all. The
    /// exception: all sessions ended because the shell did not run and could not answer.
    pub(super) fn lose_disconnected(&mut self, actions: &mut Vec<Action>) {
        let deadline = self.settings.limits.deadline;
        if self.overslept.is_some_and(|overslept| self.now < overslept + deadline) {
            return;
        }
        // A quiesced member holds nobody up. It has until the deadline to come back.
        for worker in self.unready_members() {
            if !self.workers[&worker].connected {
                self.lost(worker, Loss::Session, actions);
            }
        }
    }

    pub(super) fn leave(&mut self, worker: WorkerId, actions: &mut Vec<Action>) {
        let is_member = self.is_member(worker);
        let Some(entry) = self.workers.get_mut(&worker) else { return };
        entry.leaving = true;
        // Nobody waits for it: a spare holds no state, and while gathering there is no state but the
        // checkpoint.
        if !is_member || self.stage == Stage::Gathering {
            self.let_go(worker, actions);
        }
    }

    /// Releases a worker that is no longer needed.
    pub(super) fn let_go(&mut self, worker: WorkerId, actions: &mut Vec<Action>) {
        if self.workers.remove(&worker).is_some() {
            if self.locals.workers.contains(&worker) {
                // It goes in order, so its end says nothing about how well replacements last.
                self.locals.failures = 0;
                // Its process is killed if it has not ended by then.
                self.locals.lingering.insert(worker, self.now + self.settings.limits.deadline);
            }
            actions.push(Action::Release(worker));
        }
    }

    /// A worker is lost.
    pub(super) fn lost(&mut self, worker: WorkerId, loss: Loss, actions: &mut Vec<Action>) {
        let dead = matches!(loss, Loss::Exited(_) | Loss::Failed(_));
        // It trains no more, so nobody has to wait for its lease.
        if dead {
            self.absent.remove(&worker);
        }
        // Lost before, or never known: there is no group to break up for it.
        let Some(entry) = self.workers.remove(&worker) else { return };
        let is_member = self.is_member(worker);
        if is_member && !dead {
            // The member may train on out of sight of the coordinator, until its lease ends.
            self.absent.insert(worker, entry.last_heard + self.settings.limits.lease);
        }
        let lasted = entry.member_since.is_some_and(|since| self.now >= since + FIT);
        self.locals.lost(worker, &loss, lasted, self.now + self.settings.limits.deadline);
        actions.push(Action::Lose(worker, loss.clone()));
        let cause = Cause::Lost(worker, loss.clone());
        match self.stage {
            // While a group closes, the worker's files of the last checkpoint may be missing: the
            // remaining members write them again.
            Stage::Training { .. } | Stage::Closing { .. } if is_member => self.regroup(cause, actions),
            Stage::Regrouping { .. } => self.form_if_ready(actions),
            // No group was ever formed, so it cannot have been a fault of the group: a replacement would
            // fail alike.
            Stage::Gathering if self.group.is_none() && self.locals.workers.contains(&worker) => {
                let what = format!("worker {worker}: {loss}, before training began; {LOOK}");
                self.end(Outcome::Failed(what), actions);
            }
            Stage::Gathering => self.form_if_gathered(actions),
            // While reconnecting, `judge_absent` decides, after every event.
            _ => {}
        }
    }
}

impl Worker {
    fn new(now: Time) -> Worker {
        Worker {
            facts: None,
            connected: true,
            last_heard: now,
            progress: Progress::default(),
            progress_since: now,
            // A new worker has committed nothing, and a regroup need not wait for it.
            rest: Rest::Ready(None),
            finished: None,
            leaving: false,
            member_since: None,
        }
    }
}
