//! Time limits: detection of silent, late and expired workers.

use std::time::Duration;

use super::*;

/// Timers of the machine: each ends one kind of wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timer {
    /// A regroup waits no longer for members that are not ready.
    Regroup,
    /// A new coordinator waits no longer for members that are not back.
    Reconnect,
    /// A member computes and makes no progress.
    Late,
    /// All members wait for each other.
    Stall,
    /// A worker sent nothing for a deadline.
    Silence,
    /// The next local worker may be started.
    Spawn,
    /// A lost local worker's process has had time to end by itself.
    Kill,
    /// The lease of an absent member is over: it trains no more.
    Lease,
    /// Two workers that could not reach each other may be in one group again.
    Apart,
}

impl Timer {
    const ALL: [Timer; 9] = [
        Timer::Regroup,
        Timer::Reconnect,
        Timer::Late,
        Timer::Stall,
        Timer::Silence,
        Timer::Spawn,
        Timer::Kill,
        Timer::Lease,
        Timer::Apart,
    ];
}

impl Machine {
    /// Latest time at which [`Event::Tick`] is due. Never so late that a shell that slept until
    /// then seems to have overslept.
    pub fn deadline(&self) -> Option<Time> {
        self.due
    }

    /// Computes the deadline from the current state.
    pub(super) fn next_due(&self) -> Option<Time> {
        // A quarter, where half a deadline counts as overslept: a timer that fires late is no oversleep.
        let awake = self.now + self.settings.limits.deadline / 4;
        Timer::ALL.into_iter().filter_map(|timer| self.timer(timer)).min().map(|limit| limit.min(awake))
    }

    /// Time at which a timer fires; `None` if it is not set. Limits in the past were already acted on:
    /// what they ended stays ended, and of several members the next one is due.
    fn timer(&self, timer: Timer) -> Option<Time> {
        let later = |at: &Time| *at > self.now;
        match (timer, &self.stage) {
            (Timer::Regroup, Stage::Regrouping { until, .. }) => Some(*until).filter(later),
            (Timer::Reconnect, Stage::Reconnecting { until }) => until.filter(later),
            (Timer::Late, Stage::Training { .. }) => {
                let patience = self.patience();
                let busy = self.unready_members().into_iter();
                busy.filter_map(|id| self.late_at(&self.workers[&id], patience)).filter(later).min()
            }
            (Timer::Stall, Stage::Training { .. }) => self.stalled_at(self.patience()).filter(later),
            (Timer::Regroup | Timer::Reconnect | Timer::Late | Timer::Stall, _) => None,
            // Not filtered by `later`: a silent worker is dropped at once, so none is left in the past.
            (Timer::Silence, _) => {
                self.workers.values().map(|w| w.last_heard + self.settings.limits.deadline).min()
            }
            (Timer::Spawn, _) => self.next_spawn(),
            (Timer::Kill, _) => self.locals.lingering.values().min().copied(),
            (Timer::Lease, _) => self.absent.values().min().copied(),
            (Timer::Apart, _) => self.severed.values().min().copied(),
        }
    }

    pub(super) fn heard_from(&mut self, event: &Event) {
        let worker = match event {
            Event::Loaded(worker, _)
            | Event::Ready(worker, ..)
            | Event::Fault(worker, ..)
            | Event::Heartbeat(worker, _)
            | Event::PartWritten(worker, ..)
            | Event::Finished { worker, .. } => worker,
            // A hello or a resume sets it for itself. The end of a process or of a session is no sign of
            // life.
            _ => return,
        };
        if let Some(entry) = self.workers.get_mut(worker) {
            entry.last_heard = self.now;
        }
    }

    pub(super) fn progressed(&mut self, worker: WorkerId, progress: Progress) {
        let now = self.now;
        if let Some(entry) = self.workers.get_mut(&worker)
            // Any change counts: another activity, or one more shard gradient.
            && entry.progress != progress
        {
            entry.progress = progress;
            entry.progress_since = now;
        }
    }

    /// A shell that did not run for long must not blame the workers: it has not read their messages
    /// yet.
    pub(super) fn notice_oversleep(&mut self, now: Time) {
        let slept = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        let limits = self.settings.limits;
        // `deadline` asks for a tick each quarter, so a longer pause was no mere delay.
        if slept <= limits.deadline / 2 {
            return;
        }
        self.overslept = Some(self.now);
        // Their heartbeats wait unread in the sockets (M9). Leases of absent members are left alone:
        // they end by the members' own clocks.
        for worker in self.workers.values_mut() {
            worker.last_heard = self.now;
            worker.progress_since = self.now;
        }
        match &mut self.stage {
            // Answers of the members may be among the unread messages.
            Stage::Regrouping { until, .. } => *until = self.now + limits.deadline * 2,
            Stage::Reconnecting { until: Some(until) } => *until = self.now + limits.deadline,
            _ => {}
        }
    }

    /// Records that a member is quiesced in the newest generation. For the others that counts as
    /// progress.
    pub(super) fn come_to_rest(&mut self, worker: WorkerId, position: Option<Position>) {
        let now = self.now;
        if let Some(entry) = self.workers.get_mut(&worker) {
            entry.rest = Rest::Ready(position);
            entry.progress_since = now;
        }
    }

    /// Time at which all members that wait for each other have done so for too long. Until then
    /// some member made progress, perhaps one that has quiesced since.
    fn stalled_at(&self, patience: Duration) -> Option<Time> {
        let since = self.members().filter_map(|id| self.workers.get(&id)).map(|worker| worker.progress_since);
        since.max().map(|moved| moved + patience)
    }

    /// Longest time between two steps of a worker's progress. Shard gradients set the pace, once
    /// there are any.
    pub(super) fn patience(&self) -> Duration {
        let limits = &self.settings.limits;
        let members = self.members().filter_map(|id| self.workers.get(&id));
        let slowest = members.map(|worker| worker.progress.slowest_leaf).max();
        // Ten times the slowest shard gradient, but never less than the failure deadline.
        slowest.map_or(limits.lease, |slowest| limits.deadline.max(slowest * 10))
    }

    /// Time at which a member of a training group is late. Meeting, state sync and the first shard
    /// gradients have more time. A paused member is never late: the cause of its wait is no
    /// member's fault, and ending it would lose its state.
    fn late_at(&self, worker: &Worker, patience: Duration) -> Option<Time> {
        if worker.progress.activity == Activity::Paused {
            return None;
        }
        let start = self.group.as_ref().map_or(Position(0), |group| group.position);
        let warm = worker.progress.position > start && worker.progress.slowest_leaf > Duration::ZERO;
        Some(worker.progress_since + if warm { patience } else { self.settings.limits.lease })
    }

    pub(super) fn drop_late(&mut self, actions: &mut Vec<Action>) {
        self.drop_silent(actions);
        self.kill_lingering(actions);
        if let Stage::Training { .. } = self.stage {
            self.drop_stuck(actions);
        }
        self.hurry(actions);
        // M3: a member that is not ready by now is left behind. The group forms with the last of these
        // losses.
        if let Stage::Regrouping { until, .. } = self.stage
            && self.now >= until
        {
            for worker in self.awaited_members() {
                actions.push(Action::Drop(worker));
                self.lost(worker, Loss::Late, actions);
            }
        }
        self.severed.retain(|_, until| *until > self.now);
    }

    /// The first member to quiesce for a planned change may have had another reason, which was lost
    /// on the way: the others would wait for it in vain.
    fn hurry(&mut self, actions: &mut Vec<Action>) {
        let Stage::Regrouping { until, cause: Cause::Planned } = &self.stage else { return };
        let soon = self.now + self.settings.limits.deadline >= *until;
        // One deadline before the limit: a member that only waits for the others can still answer.
        if soon && !self.unready_members().is_empty() {
            self.regroup(Cause::Stalled, actions);
        }
    }

    fn drop_silent(&mut self, actions: &mut Vec<Action>) {
        let deadline = self.settings.limits.deadline;
        let silent = |worker: &Worker| self.now >= worker.last_heard + deadline;
        let silent: Vec<WorkerId> =
            self.workers.iter().filter(|(_, worker)| silent(worker)).map(|(id, _)| *id).collect();
        let all_members = self.present_members().iter().all(|member| silent.contains(member));
        if matches!(self.stage, Stage::Training { .. }) && all_members {
            // The fault may well be on this side: a group that trains on is not told to stop.
            self.stage = Stage::Reconnecting { until: None };
        }
        for worker in silent {
            // An earlier loss may have formed a group that let this worker go.
            if self.workers.contains_key(&worker) {
                actions.push(Action::Drop(worker));
                self.lost(worker, Loss::Silent, actions);
            }
        }
    }

    fn kill_lingering(&mut self, actions: &mut Vec<Action>) {
        let deadline = self.settings.limits.deadline;
        for (worker, kill_at) in &mut self.locals.lingering {
            if self.now >= *kill_at {
                // Again after a deadline: an order to a process that does not end may have to be
                // repeated.
                *kill_at = self.now + deadline;
                actions.push(Action::Drop(*worker));
            }
        }
    }

    /// A member is late if it neither waits for the others nor has paused. If all wait, a link is
    /// broken.
    fn drop_stuck(&mut self, actions: &mut Vec<Action>) {
        let busy = self.unready_members();
        let patience = self.patience();
        let late_at = |id: &WorkerId| self.late_at(&self.workers[id], patience);
        let late = |id: &WorkerId| late_at(id).is_some_and(|at| self.now >= at);
        // Nobody is over the limit: the usual case, which must stay cheap.
        if busy.is_empty() || !busy.iter().any(late) {
            return;
        }
        let waits = |id: &WorkerId| self.workers[id].progress.activity == Activity::Waiting;
        // A member that waits is late because of another one: only members that compute are to blame.
        let stuck: Vec<WorkerId> = busy.iter().copied().filter(|id| late(id) && !waits(id)).collect();
        let nothing_moves = self.stalled_at(patience).is_some_and(|at| self.now >= at);
        // Without one that computes, the wait is a link's: a probe finds it. Not so while another was
        // just on the move.
        if stuck.is_empty() && nothing_moves && busy.iter().all(|id| late(id) && waits(id)) {
            self.regroup(Cause::Stalled, actions);
        }
        for worker in stuck {
            // An earlier loss may have formed a group that let this worker go.
            if self.workers.contains_key(&worker) {
                actions.push(Action::Drop(worker));
                self.lost(worker, Loss::Late, actions);
            }
        }
    }

    /// Decides about the members that are not present, as far as possible.
    pub(super) fn judge_absent(&mut self, actions: &mut Vec<Action>) {
        let now = self.now;
        // Past its lease a member commits nothing and stops by itself (M4).
        self.absent.retain(|_, lease| *lease > now);
        let Stage::Reconnecting { until } = self.stage else { return };
        let present = self.present_members();
        let waited = until.is_some_and(|until| now >= until);
        // All of them have ended or are past their lease: none trains any more (M4).
        if present.is_empty() && self.absent.is_empty() {
            self.gather(actions);
        } else if present.is_empty() && waited && self.stop_requested {
            // The members that may still train save by themselves at the end of their lease (M11).
            self.end_stopped(actions);
        } else if present.is_empty() && waited {
            // The members that were back are lost again: the next one opens a window of its own.
            self.stage = Stage::Reconnecting { until: None };
        } else if !present.is_empty() && (self.absent.is_empty() || waited) {
            self.take_over(&present, actions);
        }
    }

    /// All members that may come back are back. If nothing happened to their group, it goes on.
    fn take_over(&mut self, present: &[WorkerId], actions: &mut Vec<Action>) {
        let whole = present.len() == self.members().count();
        let busy = self.unready_members().len();
        let finished = present.iter().all(|id| self.workers[id].finished == Some(true));
        let loaded = present.iter().all(|id| self.workers[id].facts.is_some());
        let usable = self.condemned != Some(self.last_generation) && !self.job_changed;
        if !loaded {
            // Their reports are under way; the next one leads here again.
            return;
        }
        self.stage = Stage::Training { plan: None };
        // All still train, or all have finished: nothing happened to the group that needs another
        // generation (M12).
        if whole && usable && (busy == present.len() || finished) {
            actions.push(Action::Keep);
            self.close_if_finished(actions);
        } else {
            self.regroup(Cause::TakenOver, actions);
        }
    }
}
