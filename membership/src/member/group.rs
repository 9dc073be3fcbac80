//! A member's part in a generation, from its assignment to its rest.

use super::*;
use crate::events::PlanKind;

impl<R: Row> Member<R> {
    // ---- Orders of the coordinator

    pub(super) fn assigned(&mut self, group: Group, commands: &mut Vec<Command<R>>) {
        let rank = group.members.iter().position(|member| Some(member.worker) == self.worker);
        let rank = rank.and_then(|rank| u32::try_from(rank).ok()).map(Rank);
        // Invariant 5; and nothing begins any more once the end is known.
        let (Some(rank), true, None) = (rank, group.generation > self.assigned, &self.end) else { return };
        self.assigned = group.generation;
        // The reason was about an older generation, which nobody asks about any more.
        self.fault = None;
        self.finished = None;
        let part = Part {
            term: self.term,
            group,
            rank,
            plan: None,
            work: Work::Forming,
            aborted: false,
            probe: false,
            invalid: false,
        };
        match self.stage {
            Stage::Quiesced => self.begin(part, commands),
            Stage::Busy(_) | Stage::Probing(_) => {
                // The coordinator has given the older group up, and this worker missed that.
                self.next = Some(part);
                self.abort_part(commands);
            }
            // Past its lease it saves what it holds, and the group goes on without it (M4).
            Stage::SavingAlone | Stage::Ended => {}
        }
    }

    pub(super) fn planned(&mut self, plan: Plan) {
        let newest = match (&mut self.next, &mut self.stage) {
            // The newer assignment waits: a plan that comes now is about that group.
            (Some(next), _) => &mut next.plan,
            (None, Stage::Busy(part)) => &mut part.plan,
            _ => return,
        };
        // Plans may come twice, by a resume; a higher number replaces a lower one.
        if newest.is_none_or(|known| known.number < plan.number) {
            *newest = Some(plan);
        }
    }

    pub(super) fn aborted(
        &mut self,
        generation: Generation,
        probe: bool,
        condemned: bool,
        commands: &mut Vec<Command<R>>,
    ) {
        if condemned {
            self.condemned(generation, commands);
        }
        // An assignment that was given up before it began.
        self.next.take_if(|next| next.group.generation <= generation);
        if let Stage::Busy(part) = &mut self.stage
            // An order about a newer generation than this worker knows covers the older ones too.
            && part.group.generation <= generation
        {
            // The ranks to probe are those of that very generation.
            part.probe |= probe && part.group.generation == generation;
            self.abort_part(commands);
        }
    }

    /// Generations up to this one are invalidated.
    pub(super) fn condemned(&mut self, generation: Generation, commands: &mut Vec<Command<R>>) {
        let is_news = generation > self.condemned;
        self.condemned = self.condemned.max(generation);
        // Heard before, or about generations from which this worker holds nothing.
        if !is_news || self.assigned == Generation(0) || self.assigned > generation {
            return;
        }
        self.reports.invalidate();
        match &mut self.stage {
            // A state that is still trained is dropped once it is at rest.
            Stage::Busy(part) => part.invalid = true,
            _ => self.drop_state(commands),
        }
    }

    pub(super) fn abort_part(&mut self, commands: &mut Vec<Command<R>>) {
        if let Stage::Busy(part) = &mut self.stage
            && !std::mem::replace(&mut part.aborted, true)
        {
            commands.push(Command::Abort(part.group.generation));
        }
    }

    // ---- The training thread

    pub(super) fn worked(&mut self, event: Event<R>, commands: &mut Vec<Command<R>>) {
        match event {
            Event::Stopped { held, fault } => return self.stopped(held, fault, commands),
            Event::InputWrong(detail) => {
                // Kept, and told in each new session: the user has to mend it.
                self.wrong = Some(detail.clone());
                self.tell(Report::InputWrong(detail), commands);
                self.stage = Stage::Quiesced;
                return self.exit_if_quiesced(commands);
            }
            Event::Probed(ranks) => return self.probed(ranks, commands),
            Event::SavedAlone if matches!(self.stage, Stage::SavingAlone) => return self.exit(commands),
            _ => {}
        }
        let Stage::Busy(part) = &mut self.stage else { return };
        // After an abort the training thread may still finish what it is at, and begins nothing new.
        let goes_on = !part.aborted;
        match (event, part.work) {
            (Event::Read, Work::Reading) => {
                // The state was read, so it is held even if the group was given up meanwhile.
                self.held = Some(part.group.position);
                if goes_on {
                    part.work = Work::Forming;
                    commands.push(Command::Form);
                }
            }
            (Event::Formed, Work::Forming) if goes_on => {
                part.work = Work::Syncing;
                commands.push(Command::SyncState);
            }
            // Also after an abort, for the same reason.
            (Event::Synced(schedule), Work::Syncing) => self.synced(schedule, commands),
            (Event::Committed { position, agreed }, Work::Running { .. }) => {
                self.committed(position, agreed, commands);
            }
            (Event::Saved, Work::Saving { complete }) if goes_on => {
                part.work = Work::Leaving;
                self.finished = Some(complete);
                commands.push(Command::Leave);
            }
            // Of work that was given up: the training thread has not seen the order yet.
            _ => {}
        }
    }

    fn begin(&mut self, part: Part, commands: &mut Vec<Command<R>>) {
        let group = &part.group;
        let starts_anew = !matches!(group.start, Start::Healed(_));
        if starts_anew || self.held.is_some_and(|held| held > group.position) {
            // Rolled back: nobody may fall back to the held state.
            self.drop_state(commands);
        }
        // Taken back by `synced`: counts groups in a row that broke before they trained.
        self.unformed += 1;
        let (term, rank) = (part.term, part.rank);
        commands.push(Command::Begin { term, group: part.group.clone(), rank });
        let mut part = part;
        part.work = match &part.group.start {
            // Only the source reads; the others receive the state from it (M5).
            Start::Checkpoint(source, checkpoint) if *source == rank => {
                commands.push(Command::Read(checkpoint.clone()));
                Work::Reading
            }
            _ => {
                commands.push(Command::Form);
                Work::Forming
            }
        };
        // From here until it has stopped the training thread may commit (M2).
        self.stage = Stage::Busy(part);
    }

    fn synced(&mut self, schedule: Schedule, commands: &mut Vec<Command<R>>) {
        let Stage::Busy(part) = &mut self.stage else { return };
        let position = part.group.position;
        self.held = Some(position);
        self.unformed = 0;
        // It has the state of a group that is given up: it can be a source for the next.
        if part.aborted {
            return;
        }
        part.work = Work::Running { schedule, until: schedule.end, proposed: None };
        let step = position.0 / schedule.phases_per_step;
        let again = match part.group.start {
            Start::Healed(_) => Reported::Again,
            Start::Fresh | Start::Checkpoint(..) => Reported::FromCheckpoint,
        };
        // Rank 0 sends the rows, and sends all that are kept: nobody knows which ones arrived (M13).
        let kept = self.reports.begin(part.rank == Rank(0), step);
        self.tell_all(kept, commands);
        // A member that was brought past the end of a step has not reported it, and the others may be
        // lost.
        if schedule.ends_step(position) && position > Position(0) && position < schedule.end {
            commands.push(Command::ReportStep(again));
        }
        self.run_or_save(schedule, schedule.end, commands);
    }

    fn committed(&mut self, position: Position, agreed: u64, commands: &mut Vec<Command<R>>) {
        let Stage::Busy(part) = &mut self.stage else { return };
        let Work::Running { schedule, until: known, proposed } = part.work else { return };
        self.held = Some(position);
        let change = proposed.filter(|plan| plan.number == agreed).map(|plan| plan.kind);
        let stopping = known < schedule.end || change == Some(PlanKind::Stop);
        let until = if stopping { known.min(schedule.end_of_step(position)) } else { known };
        if schedule.ends_step(position) {
            let last = position == until;
            let reported = if last { Reported::Last { stopping } } else { Reported::Committed };
            commands.push(Command::ReportStep(reported));
        }
        // The commit stands, as it was already done; the order comes next.
        if part.aborted {
            return;
        }
        // All headers had this number, so all leave at this update index (D9).
        if position < until && change == Some(PlanKind::Regroup) {
            part.work = Work::Leaving;
            commands.push(Command::Leave);
        } else if position == until || until < known {
            self.run_or_save(schedule, until, commands);
        }
    }

    fn run_or_save(&mut self, schedule: Schedule, until: Position, commands: &mut Vec<Command<R>>) {
        let Stage::Busy(part) = &mut self.stage else { return };
        // A group may also form at the last update index, only to save.
        if self.held >= Some(until) {
            let complete = self.held >= Some(schedule.end);
            part.work = Work::Saving { complete };
            commands.push(Command::Save { complete });
        } else {
            part.work = Work::Running { schedule, until, proposed: None };
            commands.push(Command::Run { until });
        }
    }

    // ---- Coming to rest

    fn stopped(&mut self, held: Option<Position>, fault: Option<Fault>, commands: &mut Vec<Command<R>>) {
        let Stage::Busy(part) = &mut self.stage else { return };
        self.held = held;
        if matches!(fault, Some(Fault::Diverged(_))) {
            part.invalid = true;
            self.condemned = self.condemned.max(part.group.generation);
            self.reports.invalidate();
        }
        // After a limit passed in silence, or when it was asked to look. A peer that is refused may just
        // be dead, so only after several groups.
        let is_link = match &fault {
            Some(Fault::Timeout) => true,
            Some(Fault::Peer) => self.unformed >= UNFORMED,
            Some(_) => false,
            None => part.probe,
        };
        // A probe takes time, and is of use only if its result is heard.
        if is_link && self.is_heard() {
            self.drop_if_invalid(commands);
            self.stage = Stage::Probing(fault);
            return commands.push(Command::Probe);
        }
        self.left(fault, commands);
        self.quiesce(commands);
    }

    fn probed(&mut self, ranks: Vec<Rank>, commands: &mut Vec<Command<R>>) {
        let Stage::Probing(fault) = &mut self.stage else { return };
        // All can be reached: the first reason stands.
        let fault = if ranks.is_empty() { fault.take() } else { Some(Fault::Links(ranks)) };
        self.left(fault, commands);
        self.quiesce(commands);
    }

    /// Whether anybody is interested in how this worker's part in its generation ended.
    fn is_heard(&self) -> bool {
        self.next.is_none() && self.end.is_none() && !self.is_stranger
    }

    /// Says why this worker left a generation.
    fn left(&mut self, fault: Option<Fault>, commands: &mut Vec<Command<R>>) {
        let Some(fault) = fault else { return };
        // Once the coordinator has moved on it wants no reason.
        if self.is_heard() {
            self.fault = Some(fault.clone());
            self.tell(Report::Fault(self.assigned, fault.clone()), commands);
        }
        if let Fault::Internal(detail) = fault
            && self.end.is_none()
        {
            // A worker that cannot go on must not begin another generation.
            self.next = None;
            self.end = Some(End::Failed(detail));
            // The coordinator has read this once it ends the session.
            self.farewell = Some(self.now + self.limits.attempt);
        }
    }

    fn drop_if_invalid(&mut self, commands: &mut Vec<Command<R>>) {
        if matches!(&self.stage, Stage::Busy(part) if part.invalid) {
            self.drop_state(commands);
        }
    }

    /// The training thread is at rest, and commits nothing more of its generation.
    fn quiesce(&mut self, commands: &mut Vec<Command<R>>) {
        self.drop_if_invalid(commands);
        self.stage = Stage::Quiesced;
        // Invariant 7: of the group that it gave up nobody wants to hear.
        if std::mem::take(&mut self.is_stranger) {
            self.introduce(commands);
        } else if self.next.is_none() {
            self.tell(Report::Quiesced(self.assigned, self.rested()), commands);
        }
        self.exit_if_quiesced(commands);
        if matches!(self.stage, Stage::Quiesced)
            && let Some(next) = self.next.take()
        {
            self.begin(next, commands);
        }
    }

    pub(super) fn rested(&self) -> Rested {
        // After a roll-back there is no state that could have finished.
        Rested { position: self.held, finished: self.finished.filter(|_| self.held.is_some()) }
    }

    fn drop_state(&mut self, commands: &mut Vec<Command<R>>) {
        self.held = None;
        self.finished = None;
        commands.push(Command::DropState);
    }
}
