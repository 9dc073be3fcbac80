//! A worker process: its session with the coordinator. Its training thread is in `team`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ganglion_membership::{
    Activity, Event, Fault, Generation, Group, LoadedFacts, Passport, Plan, Position, Progress, Rank, Rested,
    Term, WorkerId, WrittenPart,
};

use crate::directory::{Trouble, whole};
use crate::job::{Instant, State};
use crate::network::{ConnId, Down, Node, Packet, Proc, Resume, Up};
use crate::note;
use crate::team::Team;
use crate::world::{Ctx, Happening, Seen};

/// What a worker set itself.
#[derive(Clone, Debug)]
pub enum Timer {
    Beat,
    HasLoaded,
    Connect,
    /// The training thread's work of this number is done.
    Worked(u64),
    /// A file of a checkpoint is due to be written. What was to be saved before its state turned out void is
    /// not saved.
    Save(Generation, State, u32, u64),
    /// Past its lease: it saves what it holds, and exits.
    SaveAll(u32),
}

/// What came to a process that was not run.
#[derive(Debug)]
pub enum Input {
    Timer(Timer),
    Packet(ConnId, Node, Packet),
}

struct Session {
    conn: ConnId,
    opened: Instant,
    welcomed: bool,
    last_pulse: Instant,
    said_at_rest: bool,
}

pub struct Worker {
    pub proc: Proc,
    pub token: Option<u64>,
    pub alive: bool,
    pub ended: bool,
    /// Whether it is about to be killed by a coordinator that ends.
    pub dies: bool,
    pub paused_until: Option<Instant>,
    pub inbox: VecDeque<Input>,
    /// After so many more messages it crashes.
    pub crash_after: Option<u32>,
    strange: bool,
    blind: bool,
    loaded: bool,
    pub leaving: bool,
    pub refused: bool,
    session: Option<Session>,
    attempts: u64,
    pub id: Option<WorkerId>,
    pub term: Term,
    pub lease_until: Instant,
    pub expired: bool,
    /// The newest generation that it was assigned to.
    pub newest: Generation,
    /// The newest generation in which it will never commit again.
    pub readied: Generation,
    pub state: Option<State>,
    pub team: Option<Team>,
    pub finished: Option<bool>,
    /// Why it left the newest generation, which its coordinator may not have heard.
    pub fault: Option<(Generation, Fault)>,
    /// Reports of files that are not acknowledged.
    reports: BTreeMap<(u64, u32), (Generation, WrittenPart)>,
    pub saved: Option<Position>,
    /// What was lent to collectives, as the network reads it.
    pub buffers: BTreeMap<u64, u64>,
    pub next_buffer: u64,
    pub leaves: u64,
    pub slowest_leaf: u64,
    /// How often its state turned out void.
    era: u64,
    /// Fault of its storage.
    pub storage: Option<Trouble>,
    /// Files that are to be written, by position and index.
    unwritten: BTreeSet<(u64, u32)>,
    /// Those whose writing is not answered.
    unanswered: Vec<Timer>,
    /// Whether its next commit goes wrong.
    pub flips: bool,
    /// The number of the work in hand, and when its first and its last leaf are done.
    pub work: u64,
    pub work_time: (Instant, Instant),
}

impl Worker {
    pub fn start(proc: Proc, token: Option<u64>, strange: bool, ctx: &mut Ctx) -> Worker {
        let load = ctx.between(20_000, 400_000);
        ctx.after(load, Happening::Timer(proc, Timer::HasLoaded));
        let first = ctx.between(1_000, 50_000);
        ctx.after(first, Happening::Timer(proc, Timer::Connect));
        let beat = ctx.between(1_000, ctx.waits.heartbeat);
        ctx.after(beat, Happening::Timer(proc, Timer::Beat));
        let blind = token.is_none() && ctx.scenario.blind && ctx.chance(0.5);
        Worker {
            proc,
            token,
            alive: true,
            ended: false,
            dies: false,
            paused_until: None,
            inbox: VecDeque::new(),
            crash_after: None,
            strange,
            blind,
            loaded: false,
            leaving: false,
            refused: false,
            session: None,
            attempts: 0,
            id: None,
            term: Term(0),
            lease_until: Instant::MAX,
            expired: false,
            newest: Generation(0),
            readied: Generation(0),
            state: None,
            team: None,
            finished: None,
            fault: None,
            reports: BTreeMap::new(),
            saved: None,
            buffers: BTreeMap::new(),
            next_buffer: 0,
            leaves: 0,
            slowest_leaf: 0,
            era: 0,
            storage: None,
            unwritten: BTreeSet::new(),
            unanswered: Vec::new(),
            flips: false,
            work: 0,
            work_time: (0, 0),
        }
    }

    pub fn node(&self) -> Node {
        Node::Worker(self.proc)
    }

    // ---- What comes in
    // ---------------------------------------------------------------------------------------

    pub fn time(&mut self, timer: Timer, ctx: &mut Ctx) {
        if self.paused_until.is_some() {
            self.inbox.push_back(Input::Timer(timer));
            return;
        }
        match timer {
            Timer::Beat => self.beat(ctx),
            Timer::HasLoaded => {
                self.loaded = true;
                self.say_loaded(ctx);
            }
            Timer::Connect => self.connect(ctx),
            Timer::Worked(number) => self.worked(number, ctx),
            Timer::Save(generation, state, index, era) => self.save(generation, state, index, era, ctx),
            Timer::SaveAll(attempt) => self.save_all(attempt, ctx),
        }
    }

    pub fn receive(&mut self, conn: ConnId, from: Node, packet: Packet, ctx: &mut Ctx) {
        if self.paused_until.is_some() {
            self.inbox.push_back(Input::Packet(conn, from, packet));
            return;
        }
        if self.expired {
            return;
        }
        match (packet, from) {
            (Packet::Down(down), _) => self.hear(conn, *down, ctx),
            (Packet::Peer(peer), Node::Worker(from)) => self.hear_peer(conn, from, peer, ctx),
            (Packet::End, Node::Worker(from)) => self.lose_peer(conn, from, ctx),
            (Packet::End, Node::Coordinator) => self.lose_session(conn, ctx),
            (Packet::Up(_) | Packet::Peer(_), _) => unreachable!("it is for a coordinator"),
        }
    }

    pub fn wake(&mut self, ctx: &mut Ctx) {
        self.paused_until = None;
        while let Some(input) = self.inbox.pop_front() {
            if !self.alive {
                return;
            }
            match input {
                Input::Timer(timer) => self.time(timer, ctx),
                Input::Packet(conn, from, packet) => self.receive(conn, from, packet, ctx),
            }
        }
    }

    // ---- The session
    // -----------------------------------------------------------------------------------------

    fn connect(&mut self, ctx: &mut Ctx) {
        if self.session.is_some() || self.expired {
            return;
        }
        let conn = ctx.network.open(self.node(), Node::Coordinator, None);
        let rest = if self.has_diverged() { None } else { self.rest() };
        let said_at_rest = rest.is_some();
        let resume = self.id.map(|worker| Resume { worker, term: self.term, generation: self.newest, rest });
        let opened = ctx.now;
        self.session = Some(Session { conn, opened, welcomed: false, last_pulse: opened, said_at_rest });
        if ctx.listens() {
            self.attempts += 1;
            let hello = Up::Hello { proc: self.proc, attempt: self.attempts, token: self.token, resume };
            self.send(hello, ctx);
        } else if !ctx.network.is_cut(self.node(), Node::Coordinator) {
            ctx.reset(conn);
        }
    }

    /// What it has to show: nothing while it may commit.
    pub fn rest(&self) -> Option<Rested> {
        let busy = self.team.as_ref().is_some_and(|team| team.active);
        let position = self.state.map(|state| state.position);
        (!busy).then_some(Rested { position, finished: self.finished })
    }

    fn send(&mut self, up: Up, ctx: &mut Ctx) {
        let Some(session) = &self.session else { return };
        if let Some(left) = &mut self.crash_after {
            if *left == 0 {
                self.alive = false;
                ctx.after(0, Happening::Kill(self.proc));
                return;
            }
            *left -= 1;
        }
        ctx.send(session.conn, self.node(), Packet::Up(Box::new(up)));
    }

    /// Says something, if somebody listens. If not, a later hello says what it is at rest with.
    pub fn say(&mut self, up: Up, ctx: &mut Ctx) {
        if self.alive && self.session.as_ref().is_some_and(|session| session.welcomed) {
            self.send(up, ctx);
        }
    }

    fn drop_session(&mut self, ctx: &mut Ctx) {
        if let Some(session) = self.session.take() {
            ctx.close(session.conn, self.node());
            self.connect_again(ctx);
        }
    }

    fn lose_session(&mut self, conn: ConnId, ctx: &mut Ctx) {
        if self.session.as_ref().is_some_and(|session| session.conn == conn) {
            self.session = None;
            self.connect_again(ctx);
        }
    }

    fn connect_again(&mut self, ctx: &mut Ctx) {
        let pause = ctx.between(ctx.waits.heartbeat / 4, ctx.waits.heartbeat);
        ctx.after(pause, Happening::Timer(self.proc, Timer::Connect));
    }

    fn beat(&mut self, ctx: &mut Ctx) {
        if self.expired {
            return;
        }
        ctx.after(ctx.waits.heartbeat, Happening::Timer(self.proc, Timer::Beat));
        if ctx.now >= self.lease_until {
            return self.expire(ctx);
        }
        self.check_session(ctx);
        self.say(Up::Heartbeat(self.progress(ctx.now), ctx.now), ctx);
        self.check_waits(ctx);
    }

    fn check_session(&mut self, ctx: &mut Ctx) {
        let Some(session) = &self.session else { return };
        let patience = if session.welcomed { ctx.waits.deadline } else { ctx.waits.attempt };
        if ctx.now >= session.last_pulse + patience {
            self.drop_session(ctx);
        }
    }

    fn progress(&self, now: Instant) -> Progress {
        Progress {
            position: self.state.map_or(Position(0), |state| state.position),
            leaves: self.leaves + self.leaves_in_hand(now),
            activity: self.team.as_ref().map_or(Activity::Resting, Team::activity),
            slowest_leaf: std::time::Duration::from_micros(self.slowest_leaf),
        }
    }

    fn hear(&mut self, conn: ConnId, down: Down, ctx: &mut Ctx) {
        if self.session.as_ref().is_none_or(|session| session.conn != conn) {
            return;
        }
        match down {
            Down::Welcome { term, worker, saved, condemned } => {
                self.heard_condemned(condemned, ctx);
                self.welcomed(term, worker, saved, ctx);
            }
            Down::Assignment(term, group) => self.assigned(term, group, ctx),
            Down::Abort { generation, cause, probe } => self.abort(generation, &cause, probe, ctx),
            Down::Announce(plan) => self.announced(plan),
            Down::Pulse(sent) => self.pulse(sent, ctx),
            Down::Release => self.exit(ctx),
            Down::Reject => {
                self.refused = self.strange;
                self.exit(ctx);
            }
            Down::Saved(position) => self.acknowledged(position),
            Down::Met(generation, procs) => self.met(generation, procs, ctx),
        }
    }

    fn pulse(&mut self, sent: Instant, ctx: &Ctx) {
        if let Some(session) = &mut self.session {
            session.last_pulse = ctx.now;
        }
        if self.lease_until != Instant::MAX {
            self.lease_until = self.lease_until.max(sent + ctx.waits.lease);
        }
    }

    fn announced(&mut self, plan: Plan) {
        if let Some(team) = &mut self.team {
            team.plan = Some(plan);
        }
    }

    fn acknowledged(&mut self, position: Position) {
        self.saved = self.saved.max(Some(position));
        self.reports = self.reports.split_off(&(position.0 + 1, 0));
    }

    fn welcomed(&mut self, term: Term, worker: WorkerId, saved: Option<Position>, ctx: &mut Ctx) {
        if term < self.term {
            return self.drop_session(ctx);
        }
        self.term = term;
        let session = self.session.as_mut().expect("it was welcomed there");
        session.welcomed = true;
        session.last_pulse = ctx.now;
        let lease = session.opened + ctx.waits.lease;
        let said_at_rest = session.said_at_rest;
        self.lease_until = if self.lease_until == Instant::MAX { lease } else { self.lease_until.max(lease) };
        if self.id != Some(worker) {
            self.id = Some(worker);
            self.forget(ctx);
        }
        if let Some(position) = saved {
            self.acknowledged(position);
        }
        self.say_loaded(ctx);
        if !self.team.as_ref().is_some_and(|team| team.active) {
            self.say_fault(ctx);
            if !said_at_rest {
                self.say_rest(ctx);
            }
        }
        if self.leaving {
            self.say(Up::Leave, ctx);
        }
        for (generation, part) in self.reports.clone().into_values() {
            self.say(Up::PartWritten(generation, part), ctx);
        }
    }

    /// What it holds of a condemned generation is void, also what it has to report of it.
    fn heard_condemned(&mut self, condemned: Option<Generation>, ctx: &mut Ctx) {
        let Some(team) = &mut self.team else { return };
        if condemned.is_some_and(|condemned| self.newest <= condemned) {
            team.void = true;
            self.reports.clear();
            self.leave_team(None, ctx);
        }
    }

    fn say_loaded(&mut self, ctx: &mut Ctx) {
        if self.loaded {
            let build = if self.strange { "other" } else { "ours" };
            let facts = LoadedFacts {
                passport: Passport([("build".to_string(), build.to_string())].into()),
                samples: 1,
                sees_storage: !self.blind,
                phases_per_step: u32::try_from(ctx.job.phases).expect("few phases"),
                gpu: None,
                left_out: Vec::new(),
            };
            self.say(Up::Loaded(facts), ctx);
        }
    }

    /// Says why it left its group, whether or not the coordinator has heard that already: without the reason
    /// it would think that the others come to rest as well.
    pub fn say_fault(&mut self, ctx: &mut Ctx) {
        if let Some((generation, fault)) = self.fault.clone() {
            self.say(Up::Fault(generation, fault), ctx);
        }
    }

    fn has_diverged(&self) -> bool {
        matches!(self.fault, Some((_, Fault::Diverged(_))))
    }

    /// Says that it is at rest.
    pub fn say_rest(&mut self, ctx: &mut Ctx) {
        let Some(team) = &self.team else { return };
        let generation = team.group.generation;
        let position = self.state.map(|state| state.position);
        match (self.finished, position) {
            (Some(complete), Some(position)) => {
                self.say(Up::Finished { generation, position, complete }, ctx);
            }
            _ => self.say(Up::Ready(generation, position), ctx),
        }
    }

    /// It is somebody new: its group is not its group any more, but old generations stay old.
    fn forget(&mut self, ctx: &mut Ctx) {
        self.finished = None;
        self.fault = None;
        self.void_reports();
        if let Some(team) = &mut self.team {
            team.next = None;
            team.forgotten = true;
        }
        self.leave_team(None, ctx);
    }

    fn assigned(&mut self, term: Term, group: Group, ctx: &mut Ctx) {
        if term < self.term || group.generation <= self.newest {
            return;
        }
        self.newest = group.generation;
        ctx.seen.push(Seen::Assigned { proc: self.proc, term, group: group.clone() });
        if let Some(team) = &mut self.team {
            team.next = Some((term, group));
            if team.active {
                return self.leave_team(None, ctx);
            }
        } else {
            return self.begin(term, group, ctx);
        }
        self.begin_next(ctx);
    }

    fn abort(
        &mut self,
        generation: Generation,
        cause: &ganglion_membership::Cause,
        probe: bool,
        ctx: &mut Ctx,
    ) {
        let Some(team) = &mut self.team else { return };
        if generation < team.group.generation {
            return;
        }
        if team.next.as_ref().is_some_and(|(_, group)| group.generation <= generation) {
            team.next = None;
        }
        if matches!(cause, ganglion_membership::Cause::Diverged(_)) {
            team.void = true;
        }
        let unreachable = if probe { self.unreachable(ctx) } else { Vec::new() };
        if !unreachable.is_empty() {
            self.fault = Some((generation, Fault::Links(unreachable)));
            self.say_fault(ctx);
        }
        self.leave_team(None, ctx);
    }

    fn unreachable(&self, ctx: &Ctx) -> Vec<Rank> {
        let Some(team) = &self.team else { return Vec::new() };
        let cut = |proc: Proc| ctx.network.is_cut(self.node(), Node::Worker(proc));
        let ranks = (0u32..).zip(&team.peers);
        ranks.filter(|(_, proc)| cut(**proc)).map(|(rank, _)| Rank(rank)).collect()
    }

    // ---- Checkpoints and the end
    // -----------------------------------------------------------------------------

    pub fn save_later(&mut self, generation: Generation, state: State, index: u32, ctx: &mut Ctx) {
        let slow = if self.storage == Some(Trouble::Slow) { 40 } else { 1 };
        let wait = ctx.between(2_000, 80_000) * slow;
        self.unwritten.insert((state.position.0, index));
        ctx.after(wait, Happening::Timer(self.proc, Timer::Save(generation, state, index, self.era)));
    }

    fn save(&mut self, generation: Generation, state: State, index: u32, era: u64, ctx: &mut Ctx) {
        if era != self.era {
            return;
        }
        if self.storage == Some(Trouble::Hangs) {
            return self.unanswered.push(Timer::Save(generation, state, index, era));
        }
        let Ctx { directory, job, .. } = ctx;
        let works = self.storage != Some(Trouble::Fails);
        match works.then(|| directory.write_part(job, &state, index)).flatten() {
            None if self.unwritten.last().is_some_and(|(newest, _)| *newest > state.position.0) => {
                // A newer checkpoint takes its place.
                self.unwritten.remove(&(state.position.0, index));
            }
            None => ctx
                .after(150_000, Happening::Timer(self.proc, Timer::Save(generation, state, index, self.era))),
            Some(part) => {
                self.unwritten.remove(&(state.position.0, index));
                if self.saved < Some(state.position) {
                    self.reports.insert((state.position.0, index), (generation, part.clone()));
                }
                self.say(Up::PartWritten(generation, part), ctx);
                self.finish_if_saved(ctx);
            }
        }
    }

    /// Whether all that it was to save is on the storage.
    pub fn is_saved(&self) -> bool {
        self.unwritten.is_empty()
    }

    /// Whether its storage does what it is asked for, sooner or later.
    pub fn storage_answers(&self) -> bool {
        !matches!(self.storage, Some(Trouble::Hangs | Trouble::Fails))
    }

    /// Answers the requests that were not answered, one after the other.
    pub fn storage_mended(&mut self, ctx: &mut Ctx) {
        self.storage = None;
        for timer in std::mem::take(&mut self.unanswered) {
            let wait = ctx.between(500, 20_000);
            ctx.after(wait, Happening::Timer(self.proc, timer));
        }
    }

    /// Its state must not be used, nor what it was to save of it.
    pub fn drop_state(&mut self) {
        self.state = None;
        self.void_reports();
    }

    /// Nothing more is saved or reported of what it saw until now.
    fn void_reports(&mut self) {
        self.reports.clear();
        self.unwritten.clear();
        self.era += 1;
    }

    /// Its machine computes wrongly for a moment.
    pub fn flip(&mut self, ctx: &mut Ctx) {
        if let Some(state) = &mut self.state {
            state.halves[0] ^= 1 << 17;
            state.tainted = true;
            ctx.flipped_in = Some(self.newest);
            ctx.flips += 1;
        }
    }

    /// The grace period is over: it trains no more.
    pub fn expire(&mut self, ctx: &mut Ctx) {
        note!(ctx, "worker process {} is past its lease", self.proc);
        self.expired = true;
        self.work += 1;
        let wait = ctx.between(1_000, 50_000);
        ctx.after(wait, Happening::Timer(self.proc, Timer::SaveAll(0)));
    }

    fn save_all(&mut self, attempt: u32, ctx: &mut Ctx) {
        let Some(state) = self.state.filter(|_| !self.blind) else { return self.exit(ctx) };
        if ctx.directory.storage_down || !self.storage_answers() {
            if attempt < 10 {
                ctx.after(200_000, Happening::Timer(self.proc, Timer::SaveAll(attempt + 1)));
            } else {
                self.exit(ctx);
            }
            return;
        }
        let checkpoint = whole(&ctx.job, &state);
        let Ctx { directory, job, .. } = ctx;
        for index in 0..job.parts {
            directory.write_part(job, &state, index);
        }
        ctx.directory.write_manifest(checkpoint.clone());
        // Cut off, it may never have heard that its state was condemned.
        ctx.spoiled |= state.tainted;
        ctx.seen.push(Seen::ManifestWritten(checkpoint));
        self.exit(ctx);
    }

    pub fn exit(&mut self, ctx: &mut Ctx) {
        self.alive = false;
        ctx.after(0, Happening::Exit(self.proc));
    }

    /// Somebody asks it to leave.
    pub fn asked_to_leave(&mut self, ctx: &mut Ctx) {
        self.leaving = true;
        self.say(Up::Leave, ctx);
    }

    /// Whether it is at rest and will not train in `generation`, whatever reaches it.
    pub fn is_out_of(&self, generation: Generation) -> bool {
        let active = self.team.as_ref().is_some_and(|team| team.active);
        !active && (self.readied >= generation || self.newest < generation)
    }

    /// The connection of its session.
    pub fn session(&self) -> Option<ConnId> {
        self.session.as_ref().map(|session| session.conn)
    }
}

/// The generation that a message speaks of.
pub fn generation_of(event: &Event) -> Option<Generation> {
    match event {
        Event::Ready(_, generation, _)
        | Event::Fault(_, generation, _)
        | Event::Finished { generation, .. } => Some(*generation),
        _ => None,
    }
}
