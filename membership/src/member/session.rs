//! A member's session with its coordinator: connecting, welcomes, heartbeats, the lease.

use std::collections::VecDeque;
use std::time::Duration;

use super::*;

/// First pause between two attempts to connect; it doubles up to the interval of heartbeats.
const PAUSE: Duration = Duration::from_millis(20);

/// Connection to the coordinator.
#[derive(Debug)]
pub(super) enum Link {
    /// Not connected; the next attempt begins at `until`.
    Away {
        /// Time at which the worker lost its coordinator.
        since: Time,
        until: Time,
        /// Pause before the attempt after the next.
        pause: Duration,
    },
    /// A hello was sent.
    Connecting {
        since: Time,
        /// Time at which the worker lost its coordinator.
        lost: Time,
        pause: Duration,
        /// Whether the hello says that the worker is quiesced.
        says_rest: bool,
    },
    /// Welcomed.
    Open {
        /// Time of the next heartbeat.
        next: Time,
        /// Times at which the unanswered heartbeats were sent.
        unanswered: VecDeque<Time>,
    },
    /// The worker's part in the run has ended.
    Closed,
}

impl Link {
    pub(super) fn first(now: Time) -> Link {
        Link::Connecting { since: now, lost: now, pause: PAUSE, says_rest: false }
    }

    pub(super) fn lost_since(&self) -> Option<Time> {
        match self {
            Link::Away { since: lost, .. } | Link::Connecting { lost, .. } => Some(*lost),
            Link::Open { .. } | Link::Closed => None,
        }
    }

    pub(super) fn timer(&self, timer: Timer, limits: &Limits) -> Option<Time> {
        match (timer, self) {
            (Timer::Answer, Link::Connecting { since, .. }) => Some(*since + limits.attempt),
            (Timer::Answer, Link::Open { unanswered, .. }) => {
                // The oldest: answers come in the order of the heartbeats.
                unanswered.front().map(|sent| *sent + limits.deadline)
            }
            (Timer::Reconnect, Link::Away { until, .. }) => Some(*until),
            (Timer::Heartbeat, Link::Open { next, .. }) => Some(*next),
            _ => None,
        }
    }
}

impl<R: Row> Member<R> {
    pub(super) fn connect(&mut self, commands: &mut Vec<Command<R>>) {
        // An attempt is under way, or the part in the run has ended.
        let Link::Away { since: lost, pause, .. } = self.link else { return };
        self.attempts += 1;
        let resume = self.resume();
        // Noted, as by the time of the welcome the training thread may have come to rest.
        let says_rest = resume.is_some_and(|resume| resume.rest.is_some());
        self.link = Link::Connecting { since: self.now, lost, pause, says_rest };
        commands.push(Command::Connect(Hello { attempt: self.attempts, resume }));
    }

    fn resume(&self) -> Option<Resume> {
        let quiesced = matches!(self.stage, Stage::Quiesced);
        // A position in the hello would be taken for one of a valid state.
        let diverged = matches!(self.fault, Some(Fault::Diverged(_)));
        let rest = (quiesced && !diverged && self.wrong.is_none()).then(|| self.rested());
        self.worker.map(|worker| Resume { worker, term: self.term, generation: self.assigned, rest })
    }

    pub(super) fn welcomed(&mut self, welcome: Welcome, commands: &mut Vec<Command<R>>) {
        // A welcome that comes after its attempt was given up is void.
        let Link::Connecting { since, says_rest, .. } = self.link else { return };
        // A coordinator that a newer one has replaced, and that does not know it yet (M1).
        if welcome.term < self.term {
            self.disconnected();
            return commands.push(Command::Disconnect);
        }
        (self.term, self.limits) = (welcome.term, welcome.limits);
        // A heartbeat at once: a new coordinator needs the progress of its group.
        self.link = Link::Open { next: self.now, unanswered: VecDeque::new() };
        self.prolong_lease(since);
        // Another id than before: this coordinator could not resume the worker.
        let is_stranger = self.worker.is_some_and(|known| known != welcome.worker);
        self.worker = Some(welcome.worker);
        // Before anything is told: an invalidated state must not be told as held (D10).
        self.condemned(welcome.condemned, commands);
        if is_stranger {
            self.forget(commands);
        }
        self.tell_again(says_rest, commands);
    }

    /// The coordinator knows nothing of this worker: its group is not its group any more, but old
    /// generations stay old.
    fn forget(&mut self, commands: &mut Vec<Command<R>>) {
        self.fault = None;
        self.finished = None;
        self.next = None;
        // At rest it is ready to load anew. Else the thread has to come to rest first (invariant 7).
        self.is_stranger = !matches!(self.stage, Stage::Quiesced);
        self.abort_part(commands);
    }

    /// Tells a new session what the coordinator may not have heard.
    fn tell_again(&mut self, says_rest: bool, commands: &mut Vec<Command<R>>) {
        self.introduce(commands);
        let quiesced = matches!(self.stage, Stage::Quiesced) && self.assigned > Generation(0);
        let fault = self.fault.clone().filter(|_| quiesced);
        self.tell_all(fault.map(|fault| Report::Fault(self.assigned, fault)), commands);
        if quiesced && !says_rest && self.wrong.is_none() {
            self.tell(Report::Quiesced(self.assigned, self.rested()), commands);
        }
        self.tell_all(self.reports.unrecorded(), commands);
        self.tell_all(self.wrong.clone().map(Report::InputWrong), commands);
        self.tell_all(self.leaving.map(|_| Report::Leave), commands);
    }

    pub(super) fn introduce(&self, commands: &mut Vec<Command<R>>) {
        if self.loaded.is_some() && !self.is_stranger {
            self.tell(Report::Loaded, commands);
        }
    }

    pub(super) fn disconnected(&mut self) {
        let (since, pause) = match self.link {
            Link::Connecting { lost, pause, .. } => (lost, pause),
            // The wait starts anew after each session that was open: the coordinator was there.
            Link::Open { .. } => (self.now, PAUSE),
            Link::Away { .. } | Link::Closed => return,
        };
        // The pause is bounded, so that a coordinator that is back finds its group in time.
        let longer = (pause * 2).min(self.limits.heartbeat);
        self.link = Link::Away { since, until: self.now + pause, pause: longer };
    }

    pub(super) fn beat(&mut self, commands: &mut Vec<Command<R>>) {
        let Link::Open { next, unanswered } = &mut self.link else { return };
        unanswered.push_back(self.now);
        *next = self.now + self.limits.heartbeat;
        commands.push(Command::Heartbeat);
    }

    pub(super) fn pulse(&mut self) {
        let Link::Open { unanswered, .. } = &mut self.link else { return };
        // An answer that no heartbeat asked for is ignored.
        if let Some(sent) = unanswered.pop_front() {
            self.prolong_lease(sent);
        }
    }

    /// Prolongs the lease from a message that the coordinator answered. The coordinator counts from when it
    /// read that message, which is later: it never takes a lease for over that is not.
    fn prolong_lease(&mut self, sent: Time) {
        // An answer that comes late must not shorten what a later one has given.
        self.lease = self.lease.max(Some(sent + self.limits.lease));
    }

    pub(super) fn leave_requested(&mut self, commands: &mut Vec<Command<R>>) {
        if self.leaving.is_none() {
            self.leaving = Some(self.now);
        }
        // Told again in each new session, by `leaving`.
        self.tell(Report::Leave, commands);
    }

    pub(super) fn hang_up(&mut self, commands: &mut Vec<Command<R>>) {
        if !matches!(self.link, Link::Away { .. } | Link::Closed) {
            commands.push(Command::Disconnect);
        }
        self.link = Link::Closed;
    }

    pub(super) fn tell(&self, report: Report<R>, commands: &mut Vec<Command<R>>) {
        // What is not told now is kept, and told in the next session (invariant 4).
        if matches!(self.link, Link::Open { .. }) {
            commands.push(Command::Tell(report));
        }
    }

    pub(super) fn tell_all(
        &self,
        reports: impl IntoIterator<Item = Report<R>>,
        commands: &mut Vec<Command<R>>,
    ) {
        reports.into_iter().for_each(|report| self.tell(report, commands));
    }
}
