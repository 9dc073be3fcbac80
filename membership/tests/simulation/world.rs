//! The world: time, the queue of what happens next, and the processes that it happens to.

use std::collections::{BTreeMap, BTreeSet};

use ganglion_membership::{Action, Checkpoint, Event, Generation, Group, Limits, Outcome, Position, Term};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use crate::coordinator::{Alarm, Coordinator};
use crate::directory::{Directory, Row};
use crate::faults::{self, Mishap, Scenario};
use crate::invariants::{Breach, Invariants};
use crate::job::{Instant, Job, State, Waits};
use crate::network::{ConnId, Network, Node, Packet, Peer, Proc};
use crate::worker::{StepRow, Timer, Worker};

/// What happens at an instant.
#[derive(Debug)]
pub(crate) enum Happening {
    Deliver {
        conn: ConnId,
        to: usize,
        packet: Packet,
        reset: bool,
    },
    /// A partition ended: what stalled arrives.
    Drain {
        conn: ConnId,
        to: usize,
    },
    Timer(Proc, Timer),
    /// Something that a coordinator set itself, by its term.
    Alarm(Term, Alarm),
    /// A local process ended.
    Reaped(u64),
    StartLocal(u64),
    StartRemote,
    Kill(Proc),
    KillLocal(u64),
    /// A process that ended by itself.
    Exit(Proc),
    StartCoordinator,
    Wake(Node),
    Mishap(Mishap),
    /// Partitions and outages that were meant to end do.
    Mend(Node, Node),
    StorageUp,
    /// A worker's.
    StorageMended(Proc),
    /// The faults stop.
    Quiet,
}

/// What the invariants see, besides the world itself.
#[derive(Clone, Debug)]
pub(crate) enum Seen {
    Journaled(Row),
    CoordinatorStarted {
        adopted: Option<Position>,
    },
    Took(Event),
    /// A message of an older generation was handled, with this effect.
    TookStale {
        event: Event,
        actions: Vec<Action>,
    },
    /// A message reached the machine by this connection.
    Heard {
        conn: ConnId,
        newest: Option<ConnId>,
        term: Term,
        current: Term,
    },
    Decided(Action),
    Told {
        term: Term,
        group: Group,
    },
    /// A worker took an assignment.
    Assigned {
        proc: Proc,
        term: Term,
        group: Group,
    },
    Healed {
        proc: Proc,
        state: State,
        source: u64,
    },
    Trains {
        proc: Proc,
        term: Term,
        generation: Generation,
    },
    Committed {
        proc: Proc,
        /// When the commit began.
        begun: Instant,
        generation: Generation,
        state: State,
    },
    /// A worker says that it is at rest with a state of this position.
    Rested {
        proc: Proc,
        generation: Generation,
        position: Option<Position>,
        held: Option<State>,
    },
    /// A row reached the records.
    Recorded(StepRow),
    ManifestWritten(Checkpoint),
    LatestMoved {
        from: Option<u64>,
    },
    Spawned(u64),
    Ended(Outcome),
}

/// What every process of the world may use.
pub(crate) struct Ctx {
    pub now: Instant,
    pub rng: ChaCha8Rng,
    queue: BTreeMap<(Instant, u64), Happening>,
    next: u64,
    pub network: Network,
    pub directory: Directory,
    pub scenario: Scenario,
    pub job: Job,
    pub limits: Limits,
    pub waits: Waits,
    pub seen: Vec<Seen>,
    pub log: Option<Vec<String>>,
    pub quiet: bool,
    /// After so many more steps of carrying out actions the coordinator crashes.
    pub crash_after: Option<u32>,
    pub coordinator_up: bool,
    /// Processes of workers that are gone.
    pub ended: BTreeSet<Proc>,
    /// Whether a flipped bit was copied before anybody could see it: nothing can be promised then.
    pub spoiled: bool,
    /// The generation in which a bit flipped.
    pub flipped_in: Option<Generation>,
    /// How many did.
    pub flips: u32,
}

/// Writes a line into the log, if there is one.
#[macro_export]
macro_rules! note {
    ($ctx:expr, $($arg:tt)*) => {
        if $ctx.log.is_some() {
            let line = format!($($arg)*);
            $ctx.write_down(line);
        }
    };
}

impl Ctx {
    pub(crate) fn write_down(&mut self, line: String) {
        let time = self.now;
        if let Some(log) = &mut self.log {
            log.push(format!("{:>4}.{:06} {line}", time / 1_000_000, time % 1_000_000));
        }
    }

    pub(crate) fn at(&mut self, time: Instant, happening: Happening) {
        self.next += 1;
        self.queue.insert((time.max(self.now), self.next), happening);
    }

    pub(crate) fn after(&mut self, wait: u64, happening: Happening) {
        self.at(self.now + wait, happening);
    }

    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        self.rng.random_range(low..=high.max(low))
    }

    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        self.rng.random_bool(probability)
    }

    /// How long a packet takes.
    fn delay(&mut self) -> u64 {
        let longest = if self.quiet { self.scenario.delay.min(20_000) } else { self.scenario.delay };
        let spike = !self.quiet && self.scenario.spikes && self.chance(0.01);
        self.between(200, if spike { longest * 15 } else { longest })
    }

    /// A state was copied, or is the only one. With a flipped bit in it that is nobody's mistake, until
    /// somebody saw it.
    pub(crate) fn copied(&mut self, tainted: bool) {
        self.spoiled |= tainted && self.directory.condemned < self.flipped_in;
    }

    pub(crate) fn start_local(&mut self, token: u64) {
        self.after(0, Happening::StartLocal(token));
    }

    pub(crate) fn kill_local(&mut self, token: u64) {
        self.after(0, Happening::KillLocal(token));
    }

    /// Whether somebody answers at the coordinator's address.
    pub(crate) fn listens(&self) -> bool {
        self.coordinator_up
    }

    pub(crate) fn open_link(&mut self, from: Node, to: Node, of: (Term, Generation)) -> ConnId {
        let link = self.network.open(from, to, Some(of));
        let Node::Worker(proc) = to else { return link };
        if self.ended.contains(&proc) {
            self.reset(link);
        }
        link
    }

    // ---- Connections
    // -----------------------------------------------------------------------------------------

    pub(crate) fn send(&mut self, conn: ConnId, from: Node, packet: Packet) {
        let delay = self.delay();
        let entry = &mut self.network.conns[conn];
        let to = 1 - entry.side_of(from);
        if entry.broken || entry.closed[1 - to] {
            return;
        }
        let time = (self.now + delay).max(entry.last[to] + 1);
        entry.last[to] = time;
        self.at(time, Happening::Deliver { conn, to, packet, reset: false });
    }

    /// One side ends a connection: what it sent still arrives, then the end.
    pub(crate) fn close(&mut self, conn: ConnId, by: Node) {
        self.send(conn, by, Packet::End);
        let entry = &mut self.network.conns[conn];
        let side = entry.side_of(by);
        entry.closed[side] = true;
        entry.stalled[side].clear();
    }

    /// A connection breaks: everything that is in flight is lost, both ways.
    pub(crate) fn reset(&mut self, conn: ConnId) {
        if self.network.conns[conn].broken {
            return;
        }
        self.network.conns[conn].broken = true;
        for to in [0, 1] {
            self.network.conns[conn].stalled[to].clear();
            let delay = self.delay();
            self.after(delay, Happening::Deliver { conn, to, packet: Packet::End, reset: true });
        }
    }

    /// A process is gone: each of its connections ends in one of the ways in which that happens.
    fn abandon(&mut self, node: Node, graceful: bool, remote: bool) {
        let silent = remote && !graceful && !self.quiet && self.chance(0.1);
        for conn in self.network.of(node, None) {
            if silent {
                // The machine lost its power: nobody hears of it.
                self.network.conns[conn].closed = [true; 2];
                let to = 1 - self.network.conns[conn].side_of(node);
                self.network.conns[conn].closed[to] = false;
            } else if graceful || self.chance(0.5) {
                self.close(conn, node);
            } else {
                self.reset(conn);
            }
        }
    }

    pub(crate) fn mend(&mut self, a: Node, b: Node) {
        self.network.mend(a, b);
        self.drain(self.network.of(a, Some(b)));
    }

    fn mend_all(&mut self) {
        self.network.mend_all();
        self.drain((0..self.network.conns.len()).collect());
    }

    fn drain(&mut self, conns: Vec<ConnId>) {
        for conn in conns {
            for to in [0, 1] {
                if !self.network.conns[conn].stalled[to].is_empty() {
                    let delay = self.delay();
                    self.after(delay, Happening::Drain { conn, to });
                }
            }
        }
    }
}

pub(crate) struct World {
    pub ctx: Ctx,
    pub coordinator: Option<Coordinator>,
    pub workers: BTreeMap<Proc, Worker>,
    next_proc: Proc,
    /// How the run ended, once it is complete.
    pub complete: bool,
    pub quiet_since: Option<Instant>,
    pub happenings: u64,
    /// Whom the last thing happened to.
    pub touched: Option<Node>,
    restart_due: bool,
}

impl World {
    pub(crate) fn new(seed: u64, keep_log: bool) -> World {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (scenario, job, mishaps) = faults::draw(&mut rng, seed);
        let limits = Limits::derive(std::time::Duration::from_secs(1));
        let ctx = Ctx {
            now: 0,
            rng,
            queue: BTreeMap::new(),
            next: 0,
            network: Network::default(),
            directory: Directory::default(),
            scenario,
            job,
            limits,
            waits: Waits::of(&limits),
            seen: Vec::new(),
            log: keep_log.then(Vec::new),
            quiet: false,
            crash_after: None,
            coordinator_up: false,
            ended: BTreeSet::new(),
            spoiled: false,
            flipped_in: None,
            flips: 0,
        };
        let mut world = World {
            ctx,
            coordinator: None,
            workers: BTreeMap::new(),
            next_proc: 0,
            complete: false,
            quiet_since: None,
            happenings: 0,
            touched: None,
            restart_due: true,
        };
        world.prepare(mishaps);
        world
    }

    fn prepare(&mut self, mishaps: Vec<(Instant, Mishap)>) {
        note!(self.ctx, "{:?}", self.ctx.scenario);
        self.ctx.at(0, Happening::StartCoordinator);
        for _ in 0..self.ctx.scenario.remotes {
            let when = self.ctx.between(0, 500_000);
            self.ctx.at(when, Happening::StartRemote);
        }
        for (time, mishap) in mishaps {
            self.ctx.at(time, Happening::Mishap(mishap));
        }
        self.ctx.at(self.ctx.scenario.quiet_at, Happening::Quiet);
    }

    /// Lets everything happen until the run is complete or an invariant is broken.
    pub(crate) fn run(&mut self) -> Result<(), Breach> {
        let mut invariants = Invariants::default();
        while !self.complete {
            let Some(((time, _), happening)) = self.ctx.queue.pop_first() else {
                return Err(Breach::new(12, "nothing happens any more".to_string()));
            };
            self.ctx.now = time;
            self.happenings += 1;
            self.touched = None;
            self.happen(happening);
            invariants.check(self)?;
        }
        invariants.check_end(self)
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Deliver { conn, to, packet, reset } => self.deliver(conn, to, packet, reset),
            Happening::Drain { conn, to } => self.drain(conn, to),
            Happening::Timer(proc, timer) => self.with_worker(proc, |w, ctx| w.time(timer, ctx)),
            Happening::Alarm(term, alarm) => self.with_coordinator(Some(term), |c, ctx| c.alarm(alarm, ctx)),
            Happening::Reaped(token) => self.with_coordinator(None, |c, ctx| c.reaped(token, ctx)),
            Happening::StartLocal(token) => self.start_worker(Some(token)),
            Happening::StartRemote => self.start_worker(None),
            Happening::KillLocal(token) => self.kill_local(token),
            Happening::Kill(proc) => self.end_worker(proc, false),
            Happening::Exit(proc) => self.end_worker(proc, true),
            Happening::StartCoordinator => self.start_coordinator(),
            Happening::Wake(node) => self.wake(node),
            Happening::Mishap(mishap) => faults::strike(self, mishap),
            Happening::Mend(a, b) => self.ctx.mend(a, b),
            Happening::StorageUp => self.ctx.directory.storage_down = false,
            Happening::StorageMended(proc) => self.with_worker(proc, |w, ctx| w.storage_mended(ctx)),
            Happening::Quiet => self.calm_down(),
        }
        self.tend();
    }

    /// The worker to whom the last thing happened, if it lives: nobody else has changed.
    pub(crate) fn touched_worker(&self) -> Option<&Worker> {
        let Some(Node::Worker(proc)) = self.touched else { return None };
        self.workers.get(&proc).filter(|worker| worker.alive)
    }

    /// The coordinator, if the last thing happened to it and it goes on.
    pub(crate) fn touched_coordinator(&self) -> Option<&Coordinator> {
        let coordinator = self.coordinator.as_ref().filter(|_| self.touched == Some(Node::Coordinator));
        coordinator.filter(|coordinator| !coordinator.crashed && coordinator.outcome.is_none())
    }

    // ---- Packets
    // ---------------------------------------------------------------------------------------------

    fn deliver(&mut self, conn: ConnId, to: usize, packet: Packet, reset: bool) {
        let entry = &mut self.ctx.network.conns[conn];
        if entry.closed[to] || (entry.broken && !reset) {
            return;
        }
        let ends = entry.ends;
        let stalls = !reset && (!entry.stalled[to].is_empty() || self.ctx.network.is_cut(ends[0], ends[1]));
        if stalls {
            self.ctx.network.conns[conn].stalled[to].push_back(packet);
        } else {
            self.hand_over(conn, to, packet);
        }
    }

    fn drain(&mut self, conn: ConnId, to: usize) {
        let entry = &mut self.ctx.network.conns[conn];
        let ends = entry.ends;
        if self.ctx.network.is_cut(ends[0], ends[1]) {
            return;
        }
        let stalled = std::mem::take(&mut self.ctx.network.conns[conn].stalled[to]);
        for packet in stalled {
            let entry = &self.ctx.network.conns[conn];
            if !entry.closed[to] && !entry.broken {
                self.hand_over(conn, to, packet);
            }
        }
    }

    fn hand_over(&mut self, conn: ConnId, to: usize, mut packet: Packet) {
        let entry = &self.ctx.network.conns[conn];
        let (from, to) = (entry.ends[1 - to], entry.ends[to]);
        if let (Packet::Peer(Peer::Part { buffer, sum, .. }), Node::Worker(sender)) = (&mut packet, from)
            && let Some(content) = self.workers.get(&sender).and_then(|w| w.buffers.get(buffer))
        {
            *sum = *content;
        }
        note!(self.ctx, "{to:?} <- #{conn} {packet:?}");
        match to {
            Node::Coordinator => self.with_coordinator(None, |c, ctx| c.receive(conn, packet, ctx)),
            Node::Worker(proc) => self.with_worker(proc, |w, ctx| w.receive(conn, from, packet, ctx)),
        }
    }

    fn with_worker(&mut self, proc: Proc, act: impl FnOnce(&mut Worker, &mut Ctx)) {
        if let Some(worker) = self.workers.get_mut(&proc)
            && worker.alive
        {
            self.touched = Some(Node::Worker(proc));
            act(worker, &mut self.ctx);
        }
    }

    fn with_coordinator(&mut self, term: Option<Term>, act: impl FnOnce(&mut Coordinator, &mut Ctx)) {
        if let Some(coordinator) = &mut self.coordinator
            && term.is_none_or(|term| term == coordinator.term)
        {
            self.touched = Some(Node::Coordinator);
            act(coordinator, &mut self.ctx);
        }
    }

    // ---- Processes
    // -------------------------------------------------------------------------------------------

    fn start_worker(&mut self, token: Option<u64>) {
        self.next_proc += 1;
        let proc = self.next_proc;
        note!(self.ctx, "worker process {proc} starts, token {token:?}");
        let strange = self.ctx.scenario.stranger == Some(proc) && self.ctx.directory.passport.is_some();
        let worker = Worker::start(proc, token, strange, &mut self.ctx);
        self.workers.insert(proc, worker);
    }

    fn kill_local(&mut self, token: u64) {
        let proc = self.workers.values().find(|worker| worker.token == Some(token)).map(|worker| worker.proc);
        if let Some(proc) = proc {
            self.end_worker(proc, false);
        }
    }

    pub(crate) fn end_worker(&mut self, proc: Proc, graceful: bool) {
        let Some(worker) = self.workers.get_mut(&proc) else { return };
        if worker.ended {
            return;
        }
        note!(self.ctx, "worker process {proc} ends, by itself: {graceful}");
        worker.alive = false;
        worker.ended = true;
        self.ctx.ended.insert(proc);
        worker.inbox.clear();
        let (token, returns) = (worker.token, !worker.leaving && !worker.refused);
        self.ctx.abandon(Node::Worker(proc), graceful, token.is_none());
        match token {
            Some(token) => {
                let delay = self.ctx.between(100, 50_000);
                self.ctx.after(delay, Happening::Reaped(token));
            }
            None if returns || self.nobody_is_left() => {
                let delay = self.ctx.between(300_000, 3_000_000);
                self.ctx.after(delay, Happening::StartRemote);
            }
            None => {}
        }
    }

    /// Whether it is time for an operator to start another.
    fn nobody_is_left(&self) -> bool {
        self.ctx.scenario.locals == 0 && !self.workers.values().any(|w| w.alive && w.token.is_none())
    }

    fn start_coordinator(&mut self) {
        self.restart_due = false;
        if self.coordinator.is_some() || self.complete {
            return;
        }
        let coordinator = Coordinator::start(&self.workers, &mut self.ctx);
        self.coordinator = Some(coordinator);
        self.ctx.coordinator_up = true;
        self.with_coordinator(None, |c, ctx| c.begin(ctx));
    }

    pub(crate) fn crash_coordinator(&mut self) {
        if self.coordinator.take().is_some() {
            note!(self.ctx, "the coordinator crashes");
            self.ctx.coordinator_up = false;
            self.ctx.crash_after = None;
            self.ctx.abandon(Node::Coordinator, false, false);
        }
    }

    /// What is always done after something happened: a coordinator that crashed or ended is taken away, an
    /// operator sees to it that one runs and that there are workers.
    fn tend(&mut self) {
        match self.coordinator.as_ref().map(|c| (c.crashed, c.outcome.clone())) {
            Some((true, _)) => self.crash_coordinator(),
            Some((_, Some(outcome))) => self.end_coordinator(&outcome),
            _ => {}
        }
        if self.coordinator.is_none() && !self.restart_due && !self.complete {
            self.restart_due = true;
            let slow = !self.ctx.quiet && self.ctx.chance(0.1);
            let wait = self.ctx.between(20_000, if slow { 15_000_000 } else { 2_500_000 });
            self.ctx.after(wait + self.end_pause(), Happening::StartCoordinator);
        }
    }

    /// A coordinator that ended has killed its own before the next one starts.
    fn end_pause(&self) -> u64 {
        let lives = |worker: &Worker| worker.dies && worker.alive;
        if self.workers.values().any(lives) { 1_200_000 } else { 0 }
    }

    fn end_coordinator(&mut self, outcome: &Outcome) {
        note!(self.ctx, "the coordinator ends: {outcome:?}");
        self.coordinator = None;
        self.ctx.coordinator_up = false;
        self.ctx.crash_after = None;
        self.ctx.abandon(Node::Coordinator, true, false);
        self.complete = *outcome == Outcome::Complete;
        let locals: Vec<Proc> =
            self.workers.values().filter(|w| w.alive && w.token.is_some()).map(|w| w.proc).collect();
        for proc in locals {
            self.workers.get_mut(&proc).expect("it is there").dies = true;
            self.ctx.after(1_000_000, Happening::Kill(proc));
        }
        if self.nobody_is_left() {
            self.ctx.after(1_000_000, Happening::StartRemote);
        }
    }

    // ---- Pauses
    // ----------------------------------------------------------------------------------------------

    pub(crate) fn pause(&mut self, node: Node, time: u64) {
        note!(self.ctx, "{node:?} is not run for {time} us");
        let until = self.ctx.now + time;
        match node {
            Node::Coordinator => self.with_coordinator(None, |c, _| c.paused_until = Some(until)),
            Node::Worker(proc) => self.with_worker(proc, |w, _| w.paused_until = Some(until)),
        }
        self.ctx.at(until, Happening::Wake(node));
    }

    fn wake(&mut self, node: Node) {
        let now = self.ctx.now;
        match node {
            Node::Coordinator => self.with_coordinator(None, |c, ctx| {
                if c.paused_until.is_some_and(|until| until <= now) {
                    c.wake(ctx);
                }
            }),
            Node::Worker(proc) => self.with_worker(proc, |w, ctx| {
                if w.paused_until.is_some_and(|until| until <= now) {
                    w.wake(ctx);
                }
            }),
        }
    }

    /// The faults stop and what they did is repaired.
    fn calm_down(&mut self) {
        note!(self.ctx, "the faults stop");
        self.ctx.quiet = true;
        self.quiet_since = Some(self.ctx.now);
        self.ctx.crash_after = None;
        self.ctx.directory.storage_down = false;
        self.ctx.mend_all();
        self.with_coordinator(None, |c, ctx| c.wake(ctx));
        let procs: Vec<Proc> = self.workers.keys().copied().collect();
        for proc in procs {
            self.with_worker(proc, |w, ctx| {
                w.crash_after = None;
                w.storage_mended(ctx);
                w.wake(ctx);
            });
        }
        if self.nobody_is_left() {
            self.ctx.after(100_000, Happening::StartRemote);
        }
    }
}
