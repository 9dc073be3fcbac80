//! A worker process: the real `Member`, its session, its storage. Its training thread is in `team`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ganglion_membership::member::{Command, End, Event, Report, Reported, Row, Welcome};
use ganglion_membership::{
    Activity, Generation, LoadedFacts, Member, Passport, Position, Progress, Rank, Rested, StepShape, Term,
    WorkerId,
};

use crate::directory::{Trouble, whole};
use crate::job::{Instant, State, micros};
use crate::network::{ConnId, Down, Node, Packet, Proc, Up};
use crate::note;
use crate::team::Team;
use crate::world::{Ctx, Happening, Seen};

/// What a worker set itself.
#[derive(Clone, Debug)]
pub(crate) enum Timer {
    /// What is waited for is looked at.
    Look,
    HasLoaded,
    /// The first hello.
    Connect,
    /// A timer of the member.
    Tick(Instant),
    /// The training thread's work of this number is done.
    Worked(u64),
    /// The members that do not answer are known, if the coordinator told where they are.
    Probed {
        told: bool,
    },
    /// A file of a checkpoint is due to be written. What was to be saved before its state turned out void is
    /// not saved.
    Save(Generation, State, u32, u64),
    /// Without a coordinator it saves what it holds.
    SaveAlone(u32),
}

/// What came to a process that was not run.
#[derive(Debug)]
pub(crate) enum Input {
    Timer(Timer),
    Packet(ConnId, Node, Packet),
}

/// The row of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StepRow {
    pub step: u64,
    pub ledger: u64,
}

impl Row for StepRow {
    fn step(&self) -> u64 {
        self.step
    }
}

pub(crate) struct Worker {
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
    pub leaving: bool,
    is_probing: bool,
    pub refused: bool,
    pub member: Member<StepRow>,
    /// What the member wants done, in order.
    commands: VecDeque<Command<StepRow>>,
    is_busy: bool,
    tick_at: Option<Instant>,
    /// The connection of its session.
    conn: Option<ConnId>,
    /// The newest generation in which it will never commit again.
    pub readied: Generation,
    pub state: Option<State>,
    pub team: Option<Team>,
    /// Steps whose rows it has reported, but for those that it computes again.
    pub reported: BTreeSet<u64>,
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
    pub(crate) fn start(proc: Proc, token: Option<u64>, strange: bool, ctx: &mut Ctx) -> Worker {
        let load = ctx.between(20_000, 400_000);
        ctx.after(load, Happening::Timer(proc, Timer::HasLoaded));
        let first = ctx.between(1_000, 50_000);
        ctx.after(first, Happening::Timer(proc, Timer::Connect));
        let look = ctx.between(1_000, ctx.waits.heartbeat);
        ctx.after(look, Happening::Timer(proc, Timer::Look));
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
            leaving: false,
            is_probing: false,
            refused: false,
            member: Member::new(Duration::from_micros(ctx.now), ctx.limits),
            commands: VecDeque::new(),
            is_busy: false,
            tick_at: None,
            conn: None,
            readied: Generation(0),
            state: None,
            team: None,
            reported: BTreeSet::new(),
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

    pub(crate) fn node(&self) -> Node {
        Node::Worker(self.proc)
    }

    // ---- What comes in
    // ---------------------------------------------------------------------------------------

    pub(crate) fn time(&mut self, timer: Timer, ctx: &mut Ctx) {
        if self.paused_until.is_some() {
            self.inbox.push_back(Input::Timer(timer));
            return;
        }
        match timer {
            Timer::Look => {
                ctx.after(ctx.waits.heartbeat, Happening::Timer(self.proc, Timer::Look));
                self.check_waits(ctx);
            }
            Timer::HasLoaded => self.feed(Event::Loaded { sees_storage: !self.blind }, ctx),
            Timer::Connect => {
                self.open_session(ctx);
                self.say(Up::Hello { proc: self.proc, attempt: 1, token: self.token, resume: None }, ctx);
                self.set_tick(ctx);
            }
            Timer::Tick(at) if self.tick_at == Some(at) => {
                self.tick_at = None;
                self.feed(Event::Tick, ctx);
            }
            Timer::Tick(_) => {}
            Timer::Worked(number) => self.worked(number, ctx),
            Timer::Probed { told } => {
                self.is_probing = false;
                let ranks = if told { self.unreachable(ctx) } else { Vec::new() };
                self.feed(Event::Probed(ranks), ctx);
            }
            Timer::Save(generation, state, index, era) => self.save((generation, state, index), era, ctx),
            Timer::SaveAlone(attempt) => self.save_alone(attempt, ctx),
        }
    }

    pub(crate) fn receive(&mut self, conn: ConnId, from: Node, packet: Packet, ctx: &mut Ctx) {
        if self.paused_until.is_some() {
            self.inbox.push_back(Input::Packet(conn, from, packet));
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

    /// What has arrived is read before anybody is judged silent.
    pub(crate) fn wake(&mut self, ctx: &mut Ctx) {
        self.paused_until = None;
        let (packets, timers): (VecDeque<Input>, VecDeque<Input>) =
            std::mem::take(&mut self.inbox).into_iter().partition(|input| matches!(input, Input::Packet(..)));
        for input in packets.into_iter().chain(timers) {
            if !self.alive {
                return;
            }
            match input {
                Input::Timer(timer) => self.time(timer, ctx),
                Input::Packet(conn, from, packet) => self.receive(conn, from, packet, ctx),
            }
        }
    }

    // ---- The member
    // ------------------------------------------------------------------------------------------

    /// Lets the member take an event, and does what it wants.
    pub(crate) fn feed(&mut self, event: Event<StepRow>, ctx: &mut Ctx) {
        if !self.alive {
            return;
        }
        let mut commands = Vec::new();
        self.member.handle(Duration::from_micros(ctx.now), event, &mut commands);
        self.commands.extend(commands);
        if std::mem::replace(&mut self.is_busy, true) {
            return;
        }
        while let Some(command) = self.commands.pop_front() {
            if !self.alive {
                return;
            }
            self.carry_out(command, ctx);
        }
        self.is_busy = false;
        self.set_tick(ctx);
    }

    fn set_tick(&mut self, ctx: &mut Ctx) {
        let Some(deadline) = self.member.next_deadline() else { return };
        let at = micros(deadline).max(ctx.now + 1);
        if self.tick_at.is_none_or(|tick| at < tick) {
            self.tick_at = Some(at);
            ctx.at(at, Happening::Timer(self.proc, Timer::Tick(at)));
        }
    }

    fn carry_out(&mut self, command: Command<StepRow>, ctx: &mut Ctx) {
        match command {
            Command::Connect(hello) => {
                self.open_session(ctx);
                if let Some((generation, rest)) =
                    hello.resume.and_then(|resume| Some((resume.generation, resume.rest?)))
                {
                    self.note_rest(generation, rest, ctx);
                }
                let (proc, token) = (self.proc, self.token);
                self.say(Up::Hello { proc, attempt: hello.attempt, token, resume: hello.resume }, ctx);
            }
            Command::Disconnect => {
                if let Some(conn) = self.conn.take() {
                    ctx.close(conn, self.node());
                }
            }
            Command::Heartbeat => self.say(Up::Heartbeat(self.progress(ctx.now)), ctx),
            Command::Tell(report) => self.tell(report, ctx),
            Command::DropState => {
                self.state = None;
                self.unwritten.clear();
                self.era += 1;
            }
            Command::ReportStep(reported) => self.report_step(reported, ctx),
            Command::Probe => {
                self.is_probing = true;
                // Whom it is to probe it asks the coordinator, for a limited time.
                let told = ctx.listens() && !ctx.network.is_cut(self.node(), Node::Coordinator);
                let asked = if told { ctx.between(1_000, ctx.waits.attempt) } else { ctx.waits.attempt };
                let is_quick = !told || self.unreachable(ctx).is_empty();
                let wait = asked + if is_quick { 2_000 } else { ctx.waits.attempt };
                ctx.after(wait, Happening::Timer(self.proc, Timer::Probed { told }));
            }
            Command::SaveAlone => {
                let wait = ctx.between(1_000, 50_000);
                ctx.after(wait, Happening::Timer(self.proc, Timer::SaveAlone(0)));
            }
            Command::Exit(end) => {
                note!(ctx, "worker process {} exits: {end:?}", self.proc);
                self.refused = matches!(end, End::Rejected(_)) && self.strange;
                self.alive = false;
                ctx.after(0, Happening::Exit(self.proc));
            }
            training => self.train(training, ctx),
        }
    }

    fn tell(&mut self, report: Report<StepRow>, ctx: &mut Ctx) {
        let up = match report {
            Report::Loaded => Up::Loaded(self.facts(ctx)),
            Report::Fault(generation, fault) => Up::Fault(generation, fault),
            Report::Quiesced(generation, rest) => {
                self.note_rest(generation, rest, ctx);
                match (rest.finished, rest.position) {
                    (Some(complete), Some(position)) => Up::Finished { generation, position, complete },
                    _ => Up::Ready(generation, rest.position),
                }
            }
            Report::Row(row) => Up::Row(row),
            Report::Part(generation, part) => Up::PartWritten(generation, part),
            Report::InputWrong(_) => unreachable!("all samples can be read"),
            Report::Leave => Up::Leave,
        };
        self.say(up, ctx);
    }

    fn note_rest(&self, generation: Generation, rest: Rested, ctx: &mut Ctx) {
        let (proc, position, held) = (self.proc, rest.position, self.state);
        ctx.seen.push(Seen::Rested { proc, generation, position, held });
    }

    fn facts(&self, ctx: &Ctx) -> LoadedFacts {
        let build = if self.strange { "other" } else { "ours" };
        LoadedFacts {
            passport: Passport([("build".to_string(), build.to_string())].into()),
            samples: 1,
            sees_storage: !self.blind,
            shape: StepShape::new(u32::try_from(ctx.job.phases).expect("few phases"), vec![0])
                .expect("it reads"),
            gpu: None,
            host: Some(format!("host {}", self.proc % 3)),
            left_out: Vec::new(),
        }
    }

    fn report_step(&mut self, reported: Reported, ctx: &mut Ctx) {
        let Some(state) = self.state else { return };
        let row = StepRow { step: state.position.0 / ctx.job.phases, ledger: state.ledger };
        if reported == Reported::FromCheckpoint {
            return;
        }
        self.reported.insert(row.step);
        let is_again = reported == Reported::Again;
        self.feed(if is_again { Event::RowOfOthers(row) } else { Event::Row(row) }, ctx);
        if !matches!(reported, Reported::Last { .. }) && ctx.job.is_due(state.position) {
            self.save_share(ctx);
        }
    }

    // ---- The session
    // -----------------------------------------------------------------------------------------

    fn open_session(&mut self, ctx: &mut Ctx) {
        let conn = ctx.network.open(self.node(), Node::Coordinator, None);
        self.conn = Some(conn);
        if !ctx.listens() && !ctx.network.is_cut(self.node(), Node::Coordinator) {
            ctx.reset(conn);
        }
    }

    /// Says something to the coordinator; it may crash instead.
    pub(crate) fn say(&mut self, up: Up, ctx: &mut Ctx) {
        let Some(conn) = self.conn else { return };
        if let Some(left) = &mut self.crash_after {
            if *left == 0 {
                self.alive = false;
                ctx.after(0, Happening::Kill(self.proc));
                return;
            }
            *left -= 1;
        }
        ctx.send(conn, self.node(), Packet::Up(Box::new(up)));
    }

    fn lose_session(&mut self, conn: ConnId, ctx: &mut Ctx) {
        if self.conn == Some(conn) {
            self.conn = None;
            self.feed(Event::Disconnected, ctx);
        }
    }

    fn progress(&self, now: Instant) -> Progress {
        Progress {
            position: self.state.map_or(Position(0), |state| state.position),
            leaves: self.leaves + self.leaves_in_hand(now),
            activity: match &self.team {
                _ if self.is_probing => Activity::Paused,
                Some(team) => team.activity(),
                None => Activity::Resting,
            },
            slowest_leaf: Duration::from_micros(self.slowest_leaf),
        }
    }

    fn hear(&mut self, conn: ConnId, down: Down, ctx: &mut Ctx) {
        if self.conn != Some(conn) {
            return;
        }
        let event = match down {
            Down::Welcome { term, worker, condemned } => {
                let condemned = condemned.unwrap_or_default();
                Event::Welcomed(Welcome { term, worker, condemned, limits: ctx.limits })
            }
            Down::Assignment(term, group) => {
                let before = self.member.generation();
                self.feed(Event::Assigned(group.clone()), ctx);
                if self.member.generation() > before {
                    ctx.seen.push(Seen::Assigned { proc: self.proc, term, group });
                }
                return;
            }
            Down::Abort { generation, probe, condemned } => Event::Aborted { generation, probe, condemned },
            Down::Announce(plan) => Event::Planned(plan),
            Down::Pulse => Event::Pulse,
            Down::Release => Event::Dismissed(End::Released),
            Down::Reject => Event::Dismissed(End::Rejected("its passport differs".to_string())),
            Down::Saved(position) => {
                let phase = u32::try_from(position.0 % ctx.job.phases).expect("few phases");
                Event::CheckpointRecorded(position.0 / ctx.job.phases, phase)
            }
            Down::RowsRecorded(step) => Event::RowsRecorded(step),
            Down::Met(generation, procs) => return self.met(generation, procs, ctx),
        };
        self.feed(event, ctx);
    }

    fn unreachable(&self, ctx: &Ctx) -> Vec<Rank> {
        let Some(team) = &self.team else { return Vec::new() };
        let cut = |proc: Proc| ctx.network.is_cut(self.node(), Node::Worker(proc));
        let ranks = (0u32..).zip(&team.peers);
        ranks.filter(|(_, proc)| cut(**proc)).map(|(rank, _)| Rank(rank)).collect()
    }

    // ---- What others see of it
    // -------------------------------------------------------------------------------

    pub(crate) fn id(&self) -> Option<WorkerId> {
        self.member.worker()
    }

    pub(crate) fn term(&self) -> Term {
        self.member.term()
    }

    pub(crate) fn lease_until(&self) -> Instant {
        self.member.lease().map_or(Instant::MAX, micros)
    }

    /// Whether it has given its coordinator up: it trains no more.
    pub(crate) fn expired(&self) -> bool {
        self.member.end() == Some(&End::Lost)
    }

    /// Whether it is at rest and will not train in `generation`, whatever reaches it.
    pub(crate) fn is_out_of(&self, generation: Generation) -> bool {
        let active = self.team.as_ref().is_some_and(|team| team.active);
        !active && (self.readied >= generation || self.member.generation() < generation)
    }

    /// The connection of its session.
    pub(crate) fn session(&self) -> Option<ConnId> {
        self.conn
    }

    // ---- Checkpoints and the end
    // -----------------------------------------------------------------------------

    pub(crate) fn save_later(&mut self, generation: Generation, state: State, index: u32, ctx: &mut Ctx) {
        let slow = if self.storage == Some(Trouble::Slow) { 40 } else { 1 };
        let wait = ctx.between(2_000, 80_000) * slow;
        self.unwritten.insert((state.position.0, index));
        ctx.after(wait, Happening::Timer(self.proc, Timer::Save(generation, state, index, self.era)));
    }

    fn save(&mut self, (generation, state, index): (Generation, State, u32), era: u64, ctx: &mut Ctx) {
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
                self.feed(Event::PartWritten(generation, part), ctx);
                self.finish_if_saved(ctx);
            }
        }
    }

    /// Whether all that it was to save is on the storage.
    pub(crate) fn is_saved(&self) -> bool {
        self.unwritten.is_empty()
    }

    /// Whether its storage does what it is asked for, sooner or later.
    pub(crate) fn storage_answers(&self) -> bool {
        !matches!(self.storage, Some(Trouble::Hangs | Trouble::Fails))
    }

    /// Answers the requests that were not answered, one after the other.
    pub(crate) fn storage_mended(&mut self, ctx: &mut Ctx) {
        self.storage = None;
        for timer in std::mem::take(&mut self.unanswered) {
            let wait = ctx.between(500, 20_000);
            ctx.after(wait, Happening::Timer(self.proc, timer));
        }
    }

    /// Its machine computes wrongly for a moment.
    pub(crate) fn flip(&mut self, ctx: &mut Ctx) {
        if let Some(state) = &mut self.state {
            state.halves[0] ^= 1 << 17;
            state.tainted = true;
            ctx.flipped_in = Some(self.member.generation());
            ctx.flips += 1;
        }
    }

    fn save_alone(&mut self, attempt: u32, ctx: &mut Ctx) {
        let down = ctx.directory.storage_down || !self.storage_answers();
        if down && attempt < 10 {
            return ctx.after(200_000, Happening::Timer(self.proc, Timer::SaveAlone(attempt + 1)));
        }
        if let Some(state) = self.state.filter(|_| !down) {
            for row in self.member.rows() {
                ctx.directory.rows.insert(row.step, row.ledger);
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
        }
        self.feed(Event::SavedAlone, ctx);
    }

    /// Somebody asks it to leave.
    pub(crate) fn asked_to_leave(&mut self, ctx: &mut Ctx) {
        self.leaving = true;
        self.feed(Event::LeaveRequested, ctx);
    }
}

/// The generation that a message speaks of.
pub(crate) fn generation_of(event: &ganglion_membership::Event) -> Option<Generation> {
    use ganglion_membership::Event;
    match event {
        Event::Ready(_, generation, _)
        | Event::Fault(_, generation, _)
        | Event::Finished { generation, .. } => Some(*generation),
        _ => None,
    }
}
