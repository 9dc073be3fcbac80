//! Checkpoints and the end of a run.

use super::*;
use crate::checkpoint::{PartConflict, WrittenPart};

impl Machine {
    pub(super) fn finished(
        &mut self,
        (worker, generation): (WorkerId, Generation),
        position: Position,
        complete: bool,
        actions: &mut Vec<Action>,
    ) {
        if !self.concerns_newest(worker, generation) {
            return;
        }
        self.come_to_rest(worker, Some(position));
        if let Some(entry) = self.workers.get_mut(&worker) {
            entry.finished = Some(complete);
        }
        // A member may finish while the others already regroup: then it is ready, and holds the newest
        // state.
        self.form_if_ready(actions);
        self.close_if_finished(actions);
    }

    /// All members have finished: closes the run, or goes on if the stop was requested from an
    /// earlier coordinator only.
    pub(super) fn close_if_finished(&mut self, actions: &mut Vec<Action>) {
        // In a regroup a fault has come between: the next generation finishes what is left.
        let Stage::Training { .. } = self.stage else { return };
        let members = self.present_members();
        let finished = |id: &WorkerId| self.workers[id].finished;
        if members.is_empty() || !members.iter().all(|id| finished(id).is_some()) {
            return;
        }
        let position = members.iter().filter_map(|id| self.rest_position(*id)).max();
        // All or none, as members finish at one update index (D9).
        let complete = members.iter().all(|id| finished(id) == Some(true));
        let all_leave = members.iter().all(|id| self.is_leaving(*id));
        let outcome = match (complete, self.stop_requested, all_leave) {
            (true, ..) => Some(Outcome::Complete),
            // The update index that is reported is the saved one, which is known only at the end.
            (false, true, _) => Some(Outcome::Stopped(position)),
            // The last workers leave: they save, and the run waits for others.
            (false, false, true) => None,
            // An earlier coordinator planned the stop, and its request died with it.
            (false, false, false) => return self.regroup(Cause::Planned, actions),
        };
        self.stage = Stage::Closing { outcome };
        self.close_if_saved(actions);
    }

    fn close_if_saved(&mut self, actions: &mut Vec<Action>) {
        let Stage::Closing { outcome } = &self.stage else { return };
        let members = self.present_members();
        let position = members.iter().filter_map(|id| self.rest_position(*id)).max();
        let saved = self.checkpoint.as_ref().map(|checkpoint| checkpoint.position);
        // `None` sorts below any update index: without a checkpoint nothing counts as saved.
        if position.is_none() || saved < position {
            return;
        }
        let outcome = outcome.clone();
        // Journaled before anybody is released: a coordinator that starts after this must not wait for
        // members that have gone for good (M11).
        actions.push(Action::Close(self.last_generation));
        match outcome {
            Some(Outcome::Stopped(_)) => self.end(Outcome::Stopped(saved), actions),
            Some(outcome) => self.end(outcome, actions),
            None => self.all_left(&members, actions),
        }
    }

    /// Every member has left and the state is saved: the run waits for other workers.
    fn all_left(&mut self, members: &[WorkerId], actions: &mut Vec<Action>) {
        // The checkpoint holds the state: a member that ends from here on is no loss to the run.
        self.stage = Stage::Gathering;
        for worker in members {
            self.let_go(*worker, actions);
        }
        self.form_if_gathered(actions);
    }

    pub(super) fn part_written(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        part: WrittenPart,
        actions: &mut Vec<Action>,
    ) {
        let Some(facts) = self.workers.get(&worker).and_then(|w| w.facts.as_ref()) else {
            return;
        };
        // The next generation may have been formed meanwhile: a late file of an invalidated state
        // would make it look diverged too.
        if self.condemned.is_some_and(|condemned| generation <= condemned) || !self.has_trained(worker) {
            return;
        }
        // A checkpoint is committed once. Reports are repeated in each new session (M13).
        let newest = self.checkpoint.as_ref().map_or((0, 0), |c| (c.step, c.phase));
        if (part.step, part.phase) <= newest && self.checkpoint.is_some() {
            return;
        }
        match self.assembly.add(part, &facts.shape) {
            Ok(None) => {}
            Ok(Some(checkpoint)) => {
                // A writer replaces a waiting state by a newer one, so an older checkpoint's files may
                // never come.
                let given_up = self.assembly.forget_before(checkpoint.step, checkpoint.phase);
                actions.extend(given_up.into_iter().map(Action::AbandonCheckpoint));
                actions.push(Action::Commit(checkpoint));
            }
            // Which of the two states is right cannot be told: all members go back (D10).
            Err(PartConflict(what)) => self.diverged(what, actions),
        }
    }

    pub(super) fn committed(&mut self, checkpoint: Checkpoint, actions: &mut Vec<Action>) {
        // Files that were reported again meanwhile are no checkpoint of their own.
        self.assembly.close(checkpoint.step, checkpoint.phase);
        if self.checkpoint.as_ref().is_none_or(|c| c.position < checkpoint.position) {
            self.checkpoint = Some(checkpoint);
            self.divergences = 0;
        }
        self.close_if_saved(actions);
    }
}
