//! Joining, resuming, leaving and loss of workers.

use super::*;
use crate::events::Rested;

impl Machine {
    pub(super) fn hello(&mut self, worker: WorkerId, local: bool, actions: &mut Vec<Action>) {
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
        self.absent.remove(&worker);
        self.locals.lingering.remove(&worker);
        let now = self.now;
        let entry =
            self.workers.entry(worker).or_insert_with(|| Worker { rest: Rest::Busy, ..Worker::new(now) });
        entry.connected = true;
        entry.last_heard = now;
        entry.progress_since = now;
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
        if trains && self.formed_here {
            actions.push(Action::Assign(worker));
        } else if let Some(rest) = rest {
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
            (Some(complete), Some(position)) => {
                self.finished(worker, generation, position, complete, actions)
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
            _ => {}
        }
    }

    pub(super) fn loaded(&mut self, worker: WorkerId, facts: LoadedFacts, actions: &mut Vec<Action>) {
        match &self.passport {
            None => {
                self.passport = Some(facts.passport.clone());
                actions.push(Action::AdoptPassport(facts.passport.clone()));
            }
            Some(passport) => {
                let mut differences = passport.differences(&facts.passport);
                differences.retain(|difference| !passport.lets_adopt(&difference.item));
                if differences.is_empty() && *passport != facts.passport {
                    // A change of the job changed these items, and they were forgotten with it; or
                    // an older version had none.
                    self.passport = Some(facts.passport.clone());
                    actions.push(Action::AdoptPassport(facts.passport.clone()));
                }
                if !differences.is_empty() {
                    self.workers.remove(&worker);
                    actions.push(Action::Reject(worker, Rejection::Passport(differences)));
                    if self.locals.workers.contains(&worker) && self.workers.is_empty() {
                        let what = "this machine's workers would compute other bits than the run".to_string();
                        self.end(Outcome::Failed(what), actions);
                    }
                    return;
                }
            }
        }
        if let Some(entry) = self.workers.get_mut(&worker) {
            entry.facts = Some(facts);
        }
        self.form_if_gathered(actions);
        self.form_if_ready(actions);
    }

    /// A worker whose session ended is only suspected: it may be back within the deadline.
    pub(super) fn disconnected(&mut self, worker: WorkerId, actions: &mut Vec<Action>) {
        let Some(entry) = self.workers.get_mut(&worker) else { return };
        entry.connected = false;
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
        if !is_member || self.stage == Stage::Gathering {
            self.let_go(worker, actions);
        }
    }

    /// Releases a worker that is no longer needed.
    pub(super) fn let_go(&mut self, worker: WorkerId, actions: &mut Vec<Action>) {
        if self.workers.remove(&worker).is_some() {
            if self.locals.workers.contains(&worker) {
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
        if dead {
            self.absent.remove(&worker);
        }
        let Some(entry) = self.workers.remove(&worker) else { return };
        let is_member = self.is_member(worker);
        if is_member && !dead {
            // The member may train on out of sight of the coordinator, until its lease ends.
            self.absent.insert(worker, entry.last_heard + self.settings.limits.lease);
        }
        self.locals.lost(worker, &loss, entry.member_since, self.now, self.settings.limits.deadline);
        actions.push(Action::Lose(worker, loss.clone()));
        let cause = Cause::Lost(worker, loss.clone());
        match self.stage {
            // While a group closes, the worker's files of the last checkpoint may be missing: the
            // remaining members write them again.
            Stage::Training { .. } | Stage::Closing { .. } if is_member => self.regroup(cause, actions),
            Stage::Regrouping { .. } => self.form_if_ready(actions),
            Stage::Gathering if self.group.is_none() && self.locals.workers.contains(&worker) => {
                let what = format!("worker {worker}: {loss}, before training began");
                self.end(Outcome::Failed(what), actions);
            }
            Stage::Gathering => self.form_if_gathered(actions),
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
            rest: Rest::Ready(None),
            finished: None,
            leaving: false,
            member_since: None,
        }
    }
}
