//! The coordinator's shell: it turns messages, exits of processes and time into events, and carries the
//! machine's actions out one by one. It may crash between any two steps of that.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ganglion_membership::member::Resume;
use ganglion_membership::{
    Action, Checkpoint, Event, Generation, Group, Machine, Outcome, Plan, Position, Recovered, Rested,
    Settings, Term, WorkerId,
};

use crate::directory::Row;
use crate::job::{Instant, micros};
use crate::network::{ConnId, Down, Node, Packet, Proc, Up};
use crate::note;
use crate::worker::{StepRow, Worker, generation_of};
use crate::world::{Ctx, Happening, Seen};

/// What a coordinator set itself.
#[derive(Clone, Debug)]
pub(crate) enum Alarm {
    Tick(Instant),
    /// The storage failed: once more.
    Commit(Checkpoint, u32),
    Committed(Checkpoint),
    /// The storage is searched, once more if it failed.
    Search,
    /// From the user.
    Scale(u32),
    Stop,
}

#[derive(Debug)]
enum Input {
    Packet(ConnId, Packet),
    Alarm(Alarm),
    Reaped(u64),
}

/// It crashed on the way.
struct Crashed;

struct Store {
    generation: Generation,
    members: Vec<WorkerId>,
    entered: BTreeMap<WorkerId, Proc>,
}

pub(crate) struct Coordinator {
    pub term: Term,
    pub machine: Machine,
    started: Instant,
    pub paused_until: Option<Instant>,
    inbox: VecDeque<Input>,
    tick_at: Option<Instant>,
    /// The worker and process behind each session that is open.
    pub sessions: BTreeMap<ConnId, (WorkerId, Proc)>,
    pub newest: BTreeMap<WorkerId, ConnId>,
    /// By which attempt each worker opened its newest session.
    attempts: BTreeMap<WorkerId, u64>,
    store: Option<Store>,
    /// Tokens of processes that ended.
    reaped: BTreeSet<u64>,
    /// Workers that ever had a session here.
    welcomed: BTreeSet<WorkerId>,
    /// Workers that were told to exit.
    pub told: BTreeSet<WorkerId>,
    /// Generations that it condemned.
    condemnations: u32,
    /// Ticks in a row that changed nothing.
    pub idle_ticks: u32,
    pub crashed: bool,
    pub outcome: Option<Outcome>,
}

impl Coordinator {
    pub(crate) fn start(workers: &BTreeMap<Proc, Worker>, ctx: &mut Ctx) -> Coordinator {
        let term = Term(ctx.directory.term.0 + 1);
        note!(ctx, "a coordinator starts with term {term}");
        ctx.journal(Row::Term(term));
        let adopted = ctx.directory.newest_manifest().map(|checkpoint| checkpoint.position);
        if let Some(position) = adopted {
            ctx.move_latest(position);
        }
        let settings = Settings {
            term,
            local_workers: ctx.scenario.locals,
            data_shards: ctx.job.shards,
            limits: ctx.limits,
        };
        let recovered = recover(workers, ctx);
        note!(ctx, "it recovers {recovered:?}");
        ctx.seen.push(Seen::CoordinatorStarted { adopted });
        Coordinator {
            term,
            machine: Machine::new(settings, recovered),
            started: ctx.now,
            paused_until: None,
            inbox: VecDeque::new(),
            tick_at: None,
            sessions: BTreeMap::new(),
            newest: BTreeMap::new(),
            attempts: BTreeMap::new(),
            store: None,
            reaped: workers.values().filter(|w| w.ended).filter_map(|w| w.token).collect(),
            welcomed: BTreeSet::new(),
            told: BTreeSet::new(),
            condemnations: 0,
            idle_ticks: 0,
            crashed: false,
            outcome: None,
        }
    }

    pub(crate) fn begin(&mut self, ctx: &mut Ctx) {
        self.feed(Event::Started, ctx);
    }

    // ---- What comes in
    // ---------------------------------------------------------------------------------------

    pub(crate) fn receive(&mut self, conn: ConnId, packet: Packet, ctx: &mut Ctx) {
        self.take(Input::Packet(conn, packet), ctx);
    }

    pub(crate) fn alarm(&mut self, alarm: Alarm, ctx: &mut Ctx) {
        self.take(Input::Alarm(alarm), ctx);
    }

    pub(crate) fn reaped(&mut self, token: u64, ctx: &mut Ctx) {
        self.take(Input::Reaped(token), ctx);
    }

    pub(crate) fn wake(&mut self, ctx: &mut Ctx) {
        self.paused_until = None;
        while let Some(input) = self.inbox.pop_front() {
            self.take(input, ctx);
        }
    }

    fn take(&mut self, input: Input, ctx: &mut Ctx) {
        if self.paused_until.is_some() {
            self.inbox.push_back(input);
            return;
        }
        if self.crashed || self.outcome.is_some() {
            return;
        }
        match input {
            Input::Packet(conn, Packet::Up(up)) => self.hear(conn, *up, ctx),
            Input::Packet(conn, _) => self.session_ended(conn, ctx),
            Input::Alarm(Alarm::Tick(at)) => self.tick(at, ctx),
            Input::Alarm(Alarm::Commit(checkpoint, condemnations)) => {
                // What waited when a generation was condemned is given up.
                if condemnations == self.condemnations {
                    let committed = self.commit(checkpoint, ctx);
                    self.settle(committed, ctx);
                }
            }
            Input::Alarm(Alarm::Committed(checkpoint)) => {
                self.feed(Event::CheckpointCommitted(checkpoint), ctx);
            }
            Input::Alarm(Alarm::Search) => self.search(ctx),
            Input::Alarm(Alarm::Scale(count)) => self.feed(Event::Scale(count), ctx),
            Input::Alarm(Alarm::Stop) => self.feed(Event::StopRequested, ctx),
            Input::Reaped(token) => self.child_ended(token, ctx),
        }
    }

    fn tick(&mut self, at: Instant, ctx: &mut Ctx) {
        if self.tick_at == Some(at) {
            self.tick_at = None;
            self.feed(Event::Tick, ctx);
        }
    }

    fn child_ended(&mut self, token: u64, ctx: &mut Ctx) {
        if !self.reaped.insert(token) {
            return;
        }
        let worker = ctx.directory.tokens.get(&token).and_then(|workers| workers.last()).copied();
        self.feed(Event::Reaped { worker, status: "signal: 9".to_string() }, ctx);
    }

    fn session_ended(&mut self, conn: ConnId, ctx: &mut Ctx) {
        let Some((worker, _)) = self.sessions.remove(&conn) else { return };
        if self.newest.get(&worker) == Some(&conn) {
            self.newest.remove(&worker);
            self.feed(Event::Disconnected(worker), ctx);
        }
    }

    fn hear(&mut self, conn: ConnId, up: Up, ctx: &mut Ctx) {
        if let Up::Hello { proc, attempt, token, resume } = up {
            return self.hello(conn, (proc, attempt), (token, resume), ctx);
        }
        let Some((worker, proc)) = self.sessions.get(&conn).copied() else { return };
        if self.newest.get(&worker) != Some(&conn) {
            return;
        }
        ctx.seen.push(Seen::Heard {
            conn,
            newest: self.newest.get(&worker).copied(),
            term: self.term,
            current: ctx.directory.term,
        });
        let event = match up {
            Up::Hello { .. } => unreachable!("it was taken above"),
            Up::Loaded(facts) => Event::Loaded(worker, facts),
            Up::Ready(generation, position) => Event::Ready(worker, generation, position),
            Up::Fault(generation, fault) => Event::Fault(worker, generation, fault),
            Up::Heartbeat(progress) => {
                self.send(conn, Down::Pulse, ctx);
                Event::Heartbeat(worker, progress)
            }
            Up::Leave => Event::Leave(worker),
            Up::PartWritten(generation, part) => Event::PartWritten(worker, generation, part),
            Up::Finished { generation, position, complete } => {
                Event::Finished { worker, generation, position, complete }
            }
            Up::Enter(generation) => return self.enter(worker, proc, generation, ctx),
            Up::Row(row) => return self.record(row, ctx),
        };
        self.feed(event, ctx);
    }

    fn hello(
        &mut self,
        conn: ConnId,
        (proc, attempt): (Proc, u64),
        (token, resume): (Option<u64>, Option<Resume>),
        ctx: &mut Ctx,
    ) {
        if resume.as_ref().is_some_and(|resume| resume.term > self.term) {
            ctx.close(conn, Node::Coordinator);
            return;
        }
        if token.is_some_and(|token| self.reaped.contains(&token)) {
            // It said so before it ended, and its end was seen first: nobody would hear of its end again.
            ctx.close(conn, Node::Coordinator);
            return;
        }
        if self.is_unwanted(token, ctx) {
            self.send(conn, Down::Release, ctx);
            return;
        }
        self.attempts.retain(|worker, _| self.machine.knows(*worker, Generation(0)));
        let resume = self.hello_again(token, resume.as_ref(), ctx).or(resume);
        match resume.filter(|resume| self.machine.knows(resume.worker, resume.generation)) {
            // One that the worker gave up may arrive after a newer one: what it says is not true any more.
            Some(Resume { worker, .. }) if self.attempts.get(&worker).is_some_and(|a| attempt < *a) => {
                ctx.close(conn, Node::Coordinator);
            }
            Some(Resume { worker, generation, rest, .. }) => {
                self.attempts.insert(worker, attempt);
                self.open_session(conn, worker, proc, ctx);
                self.feed(Event::Resumed { worker, generation, rest }, ctx);
            }
            None => {
                let worker = ctx.directory.next_worker();
                if self.step(ctx).is_err() {
                    return;
                }
                ctx.journal(Row::Worker(worker, token));
                self.attempts.insert(worker, attempt);
                self.open_session(conn, worker, proc, ctx);
                self.feed(Event::Hello { worker, local: token.is_some() }, ctx);
            }
        }
    }

    /// A local process has one number for as long as its coordinator lives. Once the machine has let that
    /// number go, the process has to end: only then the machine hears that it is gone, and replaces it.
    fn is_unwanted(&self, token: Option<u64>, ctx: &Ctx) -> bool {
        let workers = token.and_then(|token| ctx.directory.tokens.get(&token));
        let last = workers.and_then(|workers| workers.last());
        last.is_some_and(|last| self.welcomed.contains(last) && !self.machine.knows(*last, Generation(0)))
    }

    /// A local process whose welcome was lost does not know its number yet: it is known by its token.
    fn hello_again(&self, token: Option<u64>, resume: Option<&Resume>, ctx: &Ctx) -> Option<Resume> {
        let worker = *ctx.directory.tokens.get(&token?)?.last()?;
        let heard = resume.is_some_and(|resume| resume.worker == worker);
        let rest = Some(Rested { position: None, finished: None });
        let resume = Resume { worker, term: Term(0), generation: Generation(0), rest };
        (self.welcomed.contains(&worker) && !heard).then_some(resume)
    }

    fn open_session(&mut self, conn: ConnId, worker: WorkerId, proc: Proc, ctx: &mut Ctx) {
        if let Some(older) = self.newest.insert(worker, conn) {
            ctx.close(older, Node::Coordinator);
        }
        self.sessions.insert(conn, (worker, proc));
        self.welcomed.insert(worker);
        let condemned = ctx.directory.condemned;
        self.send(conn, Down::Welcome { term: self.term, worker, condemned }, ctx);
        if let Some(checkpoint) = self.machine.checkpoint() {
            self.send(conn, Down::Saved(checkpoint.position), ctx);
        }
        self.send(conn, Down::RowsRecorded(ctx.directory.rows_up_to()), ctx);
    }

    /// Records a row, and says so to all once no row before it is missing.
    fn record(&mut self, row: StepRow, ctx: &mut Ctx) {
        let before = ctx.directory.rows_up_to();
        ctx.seen.push(Seen::Recorded(row));
        ctx.directory.rows.insert(row.step, row.ledger);
        let now = ctx.directory.rows_up_to();
        if now > before {
            for worker in self.newest.keys().copied().collect::<Vec<WorkerId>>() {
                self.tell(worker, Down::RowsRecorded(now), ctx);
            }
        }
    }

    fn enter(&mut self, worker: WorkerId, proc: Proc, generation: Generation, ctx: &mut Ctx) {
        let Some(store) = &mut self.store else { return };
        if store.generation != generation || !store.members.contains(&worker) {
            return;
        }
        let complete = store.entered.len() == store.members.len();
        store.entered.insert(worker, proc);
        if store.entered.len() < store.members.len() {
            return;
        }
        let procs: Vec<Proc> = store.members.iter().map(|member| store.entered[member]).collect();
        let told = if complete { vec![worker] } else { store.members.clone() };
        for member in told {
            self.tell(member, Down::Met(generation, procs.clone()), ctx);
        }
    }

    // ---- The machine
    // -----------------------------------------------------------------------------------------

    fn feed(&mut self, event: Event, ctx: &mut Ctx) {
        if self.crashed || self.outcome.is_some() {
            return;
        }
        let stale = generation_of(&event)
            .is_some_and(|g| self.machine.group().is_none_or(|group| g < group.generation));
        if stale {
            // Whatever is due by now is not the message's doing.
            self.feed(Event::Tick, ctx);
        }
        if !matches!(event, Event::Heartbeat(..) | Event::Tick) {
            note!(ctx, "event {event:?}");
            ctx.seen.push(Seen::Took(event.clone()));
        }
        let now = self.now(ctx);
        let mut actions = Vec::new();
        let kept = stale.then(|| event.clone());
        let is_tick = event == Event::Tick;
        self.machine.handle(now, event, &mut actions);
        // A tick that was due must have moved what it was due for.
        let due_again = is_tick && self.machine.deadline().is_some_and(|deadline| deadline <= now);
        self.idle_ticks = if due_again { self.idle_ticks + 1 } else { 0 };
        if let Some(event) = kept {
            ctx.seen.push(Seen::TookStale { event, actions: actions.clone() });
        }
        let done = actions.into_iter().try_for_each(|action| self.carry_out(action, ctx));
        self.settle(done, ctx);
    }

    fn now(&self, ctx: &Ctx) -> Duration {
        Duration::from_micros(ctx.now - self.started)
    }

    fn settle(&mut self, done: Result<(), Crashed>, ctx: &mut Ctx) {
        if done.is_err() || self.crashed {
            self.crashed = true;
            return;
        }
        let Some(deadline) = self.machine.deadline() else { return };
        let at = (self.started + micros(deadline)).max(ctx.now + 1);
        if self.tick_at.is_none_or(|tick| at < tick || tick < ctx.now) {
            self.tick_at = Some(at);
            ctx.at(at, Happening::Alarm(self.term, Alarm::Tick(at)));
        }
    }

    /// A crash may come before each step.
    fn step(&mut self, ctx: &mut Ctx) -> Result<(), Crashed> {
        match &mut ctx.crash_after {
            Some(0) => {
                self.crashed = true;
                Err(Crashed)
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn carry_out(&mut self, action: Action, ctx: &mut Ctx) -> Result<(), Crashed> {
        if self.outcome.is_some() {
            return Ok(());
        }
        note!(ctx, "action {action:?}");
        self.step(ctx)?;
        ctx.seen.push(Seen::Decided(action.clone()));
        match action {
            Action::Reject(worker, _) => self.dismiss(worker, Down::Reject, ctx),
            Action::Release(worker) => self.dismiss(worker, Down::Release, ctx),
            Action::AdoptPassport(passport) => ctx.journal(Row::Passport(passport)),
            Action::Condemn(generation) => {
                self.condemnations += 1;
                ctx.journal(Row::Condemned(generation));
            }
            Action::Close(generation) => ctx.journal(Row::Closed(generation)),
            Action::Form(group, _) => self.form(group, ctx)?,
            Action::Assign(worker) => self.assign(worker, ctx),
            Action::Abort { generation, workers, probe, .. } => {
                let condemned = ctx.directory.condemned == Some(generation);
                for worker in workers {
                    self.step(ctx)?;
                    self.tell(worker, Down::Abort { generation, probe, condemned }, ctx);
                }
            }
            Action::Announce { plan, workers } => self.announce(plan, workers, ctx)?,
            Action::Commit(checkpoint) => self.commit(checkpoint, ctx)?,
            Action::Search => ctx.after(0, Happening::Alarm(self.term, Alarm::Search)),
            Action::Spawn => self.spawn(ctx)?,
            Action::Drop(worker) => self.drop_worker(worker, ctx),
            Action::End(outcome) => {
                ctx.seen.push(Seen::Ended(outcome.clone()));
                self.outcome = Some(outcome);
            }
            Action::AbandonCheckpoint(_)
            | Action::AllowSkip(_)
            | Action::GiveUpReplacing(_)
            | Action::Keep
            | Action::Lose(..) => {}
        }
        Ok(())
    }

    fn form(&mut self, group: Group, ctx: &mut Ctx) -> Result<(), Crashed> {
        ctx.journal(Row::Group(self.term, group.clone()));
        self.step(ctx)?;
        let members: Vec<WorkerId> = group.members.iter().map(|member| member.worker).collect();
        self.store =
            Some(Store { generation: group.generation, members: members.clone(), entered: BTreeMap::new() });
        for worker in members {
            self.step(ctx)?;
            self.assign_group(worker, group.clone(), ctx);
        }
        Ok(())
    }

    fn assign(&mut self, worker: WorkerId, ctx: &mut Ctx) {
        if let Some(group) = self.machine.group().cloned() {
            self.assign_group(worker, group, ctx);
        }
    }

    fn assign_group(&mut self, worker: WorkerId, group: Group, ctx: &mut Ctx) {
        ctx.seen.push(Seen::Told { term: self.term, group: group.clone() });
        self.tell(worker, Down::Assignment(self.term, group), ctx);
    }

    fn announce(&mut self, plan: Plan, workers: Vec<WorkerId>, ctx: &mut Ctx) -> Result<(), Crashed> {
        for worker in workers {
            self.step(ctx)?;
            self.tell(worker, Down::Announce(plan), ctx);
        }
        Ok(())
    }

    fn dismiss(&mut self, worker: WorkerId, down: Down, ctx: &mut Ctx) {
        self.told.insert(worker);
        self.tell(worker, down, ctx);
    }

    /// Says something, now and then twice: repeating an action does no harm.
    fn tell(&mut self, worker: WorkerId, down: Down, ctx: &mut Ctx) {
        let Some(conn) = self.newest.get(&worker).copied() else { return };
        if ctx.scenario.repeats && ctx.chance(0.1) {
            self.send(conn, down.clone(), ctx);
        }
        self.send(conn, down, ctx);
    }

    fn send(&self, conn: ConnId, down: Down, ctx: &mut Ctx) {
        ctx.send(conn, Node::Coordinator, Packet::Down(Box::new(down)));
    }

    fn commit(&mut self, checkpoint: Checkpoint, ctx: &mut Ctx) -> Result<(), Crashed> {
        let Some(written) = ctx.directory.write_manifest(checkpoint.clone()) else {
            ctx.after(200_000, Happening::Alarm(self.term, Alarm::Commit(checkpoint, self.condemnations)));
            return Ok(());
        };
        let one_digest = written.files.iter().all(|file| file.blake3 == written.state_digest);
        ctx.copied(one_digest && ctx.directory.load(&written).is_some_and(|state| state.tainted));
        ctx.seen.push(Seen::ManifestWritten(written.clone()));
        self.step(ctx)?;
        ctx.move_latest(written.position);
        self.step(ctx)?;
        let position = written.position;
        let workers: Vec<WorkerId> = self.newest.keys().copied().collect();
        for worker in workers {
            self.tell(worker, Down::Saved(position), ctx);
        }
        let wait = ctx.between(100, 5_000);
        ctx.after(wait, Happening::Alarm(self.term, Alarm::Committed(written)));
        Ok(())
    }

    fn search(&mut self, ctx: &mut Ctx) {
        if ctx.directory.storage_down {
            return ctx.after(200_000, Happening::Alarm(self.term, Alarm::Search));
        }
        let known = self.machine.checkpoint().map(|checkpoint| checkpoint.position);
        let newest = ctx.directory.newest_manifest().cloned();
        let newer = newest.filter(|newest| known.is_none_or(|known| known < newest.position));
        let position = newer.as_ref().map(|checkpoint| checkpoint.position);
        if let Some(checkpoint) = newer {
            let committed = self.commit(checkpoint, ctx);
            self.settle(committed, ctx);
        }
        self.feed(Event::Searched(position), ctx);
    }

    fn spawn(&mut self, ctx: &mut Ctx) -> Result<(), Crashed> {
        let token = ctx.directory.next_token();
        ctx.journal(Row::Token(token));
        self.step(ctx)?;
        ctx.seen.push(Seen::Spawned(token));
        ctx.start_local(token);
        Ok(())
    }

    fn drop_worker(&mut self, worker: WorkerId, ctx: &mut Ctx) {
        if let Some(conn) = self.newest.remove(&worker) {
            self.sessions.remove(&conn);
            ctx.close(conn, Node::Coordinator);
        }
        if let Some(token) = ctx.directory.token_of(worker) {
            ctx.kill_local(token);
        }
    }
}

/// What the journal, the checkpoints and the process table say.
fn recover(workers: &BTreeMap<Proc, Worker>, ctx: &Ctx) -> Recovered {
    let directory = &ctx.directory;
    let alive: BTreeSet<u64> = workers.values().filter(|w| !w.ended).filter_map(|w| w.token).collect();
    let of = |lives: bool| {
        let tokens = directory.tokens.iter().filter(|(token, _)| alive.contains(token) == lives);
        tokens.flat_map(|(_, workers)| workers.iter().copied()).collect::<Vec<WorkerId>>()
    };
    let closed = directory.group.iter().filter(|group| directory.closed == Some(group.generation));
    let resting = closed.flat_map(|group| &group.members).map(|member| member.worker);
    let running = workers.values().filter(|w| !w.ended && w.token.is_some()).count();
    Recovered {
        group: directory.group.clone(),
        dead: of(false).into_iter().chain(resting).collect(),
        locals: of(true),
        running: u32::try_from(running).expect("few processes"),
        condemned: directory.condemned,
        skips: Vec::new(),
        job_changed: false,
        checkpoint: directory.newest_manifest().cloned(),
        passport: directory.passport.clone(),
        // The first worker sets it anew: all have the same.
        shape: None,
    }
}

impl Ctx {
    pub(crate) fn journal(&mut self, row: Row) {
        note!(self, "journal {row:?}");
        self.seen.push(Seen::Journaled(row.clone()));
        self.directory.journal(row);
    }

    pub(crate) fn move_latest(&mut self, position: Position) {
        let from = self.directory.latest;
        self.directory.move_latest(position);
        self.seen.push(Seen::LatestMoved { from });
    }
}
