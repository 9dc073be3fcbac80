//! A worker's training thread: meeting the others, healing, reduces, commits, coming to rest. What it is to do
//! next the member says.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ganglion_membership::member::{Command, Event, Schedule};
use ganglion_membership::{Activity, Fault, Generation, Group, Start, Term};

use crate::job::{Instant, State, leaf, samples};
use crate::mix::mix;
use crate::network::{ConnId, Node, Packet, Peer, Proc, Trailer, Up};
use crate::note;
use crate::worker::{StepRow, Timer, Worker};
use crate::world::{Ctx, Happening, Seen};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// At the store.
    Meeting,
    /// The first collective: is this the same group for all?
    Greeting,
    /// The source reads the checkpoint.
    Loading,
    Healing,
    /// Is this the same state for all?
    Comparing,
    Computing,
    Reducing,
    Committing,
    /// All is done but for files that are not on the storage.
    Saving,
    /// At rest.
    Done,
}

/// The group that a worker is or was last in.
pub(crate) struct Team {
    pub term: Term,
    pub group: Group,
    pub rank: usize,
    /// Whether it may still commit.
    pub active: bool,
    pub stage: Stage,
    /// Since when.
    since: Instant,
    /// The members' addresses, once they have met.
    pub peers: Vec<Proc>,
    links: BTreeMap<Proc, ConnId>,
    broken: BTreeSet<Proc>,
    mail: BTreeMap<Proc, VecDeque<Peer>>,
    /// What a receiver has of the source's state.
    spare: [Option<u64>; 2],
    /// Whether all had one state and training began.
    pub trains: bool,
    /// To rest as soon as the work in hand is done, with this fault to tell.
    leave: Option<Option<Fault>>,
    /// The sum, the ledger's share and the plan of the phase that is committed.
    reduced: (u64, u64, u64),
    /// This rank's part, and the plan in its trailer.
    own: (u64, u64, u64),
}

impl Team {
    pub(crate) fn activity(&self) -> Activity {
        match self.stage {
            Stage::Done => Activity::Resting,
            Stage::Computing | Stage::Committing => Activity::Computing,
            Stage::Loading | Stage::Saving => Activity::Paused,
            _ => Activity::Waiting,
        }
    }

    fn waits(&self) -> bool {
        self.activity() == Activity::Waiting
    }

    fn others(&self) -> Vec<Proc> {
        let rank = self.rank;
        (0..).zip(&self.peers).filter(|(other, _)| *other != rank).map(|(_, proc)| *proc).collect()
    }

    fn all_said(&self) -> bool {
        self.peers
            .iter()
            .enumerate()
            .all(|(rank, proc)| rank == self.rank || self.mail.get(proc).is_some_and(|mail| !mail.is_empty()))
    }

    fn take_all(&mut self) -> Vec<Peer> {
        let others = self.others();
        let take = |proc: &Proc| self.mail.get_mut(proc).and_then(VecDeque::pop_front);
        others.iter().filter_map(take).collect()
    }

    fn source(&self) -> Option<usize> {
        match &self.group.start {
            Start::Fresh => None,
            Start::Healed(rank) | Start::Checkpoint(rank, _) => Some(rank.0 as usize),
        }
    }

    fn members_hash(&self) -> u64 {
        self.group.members.iter().fold(7, |hash, m| {
            mix(mix(hash, m.worker.0), u64::from(m.shards.start) << 32 | u64::from(m.shards.end))
        })
    }
}

impl Worker {
    // ---- Beginning
    // -------------------------------------------------------------------------------------------

    /// Does a piece of work of the training thread.
    pub(crate) fn train(&mut self, command: Command<StepRow>, ctx: &mut Ctx) {
        match command {
            Command::Begin { term, group, rank } => self.begin(term, group, rank.0 as usize, ctx),
            Command::Read(_) => self.begin_work(10_000, 60_000, ctx),
            Command::Form => {
                self.enter(Stage::Meeting, ctx);
                self.say(Up::Enter(self.member.generation()), ctx);
            }
            Command::SyncState => self.sync_state(ctx),
            Command::Run { .. } => self.next_phase(ctx),
            Command::Save { .. } => {
                self.save_share(ctx);
                self.enter(Stage::Saving, ctx);
                self.finish_if_saved(ctx);
            }
            Command::Leave => self.come_to_rest(None, false, ctx),
            Command::Abort(_) => self.leave_team(None, ctx),
            _ => unreachable!("it is no work of the training thread"),
        }
    }

    fn begin(&mut self, term: Term, group: Group, rank: usize, ctx: &mut Ctx) {
        self.close_links(ctx);
        self.team = Some(Team {
            term,
            group,
            rank,
            active: true,
            stage: Stage::Loading,
            since: ctx.now,
            peers: Vec::new(),
            links: BTreeMap::new(),
            broken: BTreeSet::new(),
            mail: BTreeMap::new(),
            spare: [None; 2],
            trains: false,
            leave: None,
            reduced: (0, 0, 0),
            own: (0, 0, 0),
        });
    }

    /// All members came to the store.
    pub(crate) fn met(&mut self, generation: Generation, procs: Vec<Proc>, ctx: &mut Ctx) {
        let Some(team) = &mut self.team else { return };
        if !team.active || team.group.generation != generation || team.stage != Stage::Meeting {
            return;
        }
        team.peers = procs;
        if team.peers.iter().any(|proc| team.broken.contains(proc)) {
            return self.leave_team(Some(Fault::Peer), ctx);
        }
        let greeting = Peer::Greet {
            term: team.term,
            generation,
            members: team.members_hash(),
            position: team.group.position,
        };
        self.enter(Stage::Greeting, ctx);
        self.tell_all(&greeting, ctx);
        self.advance(ctx);
    }

    fn enter(&mut self, stage: Stage, ctx: &Ctx) {
        if let Some(team) = &mut self.team {
            team.stage = stage;
            team.since = ctx.now;
        }
    }

    fn tell_all(&mut self, peer: &Peer, ctx: &mut Ctx) {
        let others = self.team.as_ref().map(Team::others).unwrap_or_default();
        for other in others {
            let link = self.link_to(other, ctx);
            ctx.send(link, self.node(), Packet::Peer(peer.clone()));
        }
    }

    fn link_to(&mut self, other: Proc, ctx: &mut Ctx) -> ConnId {
        let (me, proc) = (self.node(), self.proc);
        let team = self.team.as_mut().expect("it has peers");
        let of = (team.term, team.group.generation);
        *team.links.entry(other).or_insert_with(|| {
            let known = ctx.network.link(proc, other, of);
            known.unwrap_or_else(|| ctx.open_link(me, Node::Worker(other), of))
        })
    }

    pub(crate) fn hear_peer(&mut self, conn: ConnId, from: Proc, peer: Peer, ctx: &mut Ctx) {
        let of = ctx.network.conns[conn].link;
        match &mut self.team {
            Some(team) if team.active && of == Some((team.term, team.group.generation)) => {
                team.mail.entry(from).or_default().push_back(peer);
                self.advance(ctx);
            }
            // It may be assigned to that group in a moment, but then it never was at the store: nobody waits.
            Some(team) if of == Some((team.term, team.group.generation)) && team.leave.is_none() => {}
            _ => ctx.close(conn, self.node()),
        }
    }

    pub(crate) fn lose_peer(&mut self, conn: ConnId, from: Proc, ctx: &mut Ctx) {
        let of = ctx.network.conns[conn].link;
        let Some(team) = &mut self.team else { return };
        if !team.active || of != Some((team.term, team.group.generation)) {
            return;
        }
        team.broken.insert(from);
        if !matches!(team.stage, Stage::Meeting | Stage::Saving) {
            self.leave_team(Some(Fault::Peer), ctx);
        }
    }

    fn close_links(&mut self, ctx: &mut Ctx) {
        let links = self.team.as_mut().map(|team| std::mem::take(&mut team.links)).unwrap_or_default();
        for link in links.into_values() {
            ctx.close(link, self.node());
        }
    }

    // ---- Collectives
    // -----------------------------------------------------------------------------------------

    /// Goes on as far as what has arrived allows.
    fn advance(&mut self, ctx: &mut Ctx) {
        // It may crash on the way.
        while self.alive {
            let Some(team) = self.team.as_ref().filter(|team| team.active && team.waits()) else { return };
            let moved = match team.stage {
                Stage::Greeting if team.all_said() => self.greeted(ctx),
                Stage::Healing => self.receive_state(ctx),
                Stage::Comparing if team.all_said() => self.compared(ctx),
                Stage::Reducing if team.all_said() => self.reduced(ctx),
                _ => false,
            };
            if !moved {
                return;
            }
        }
    }

    fn greeted(&mut self, ctx: &mut Ctx) -> bool {
        let team = self.team.as_mut().expect("it is in a team");
        let own = (team.term, team.group.generation, team.members_hash(), team.group.position);
        let same = team.take_all().iter().all(|peer| {
            matches!(peer, Peer::Greet { term, generation, members, position }
                if (*term, *generation, *members, *position) == own)
        });
        if !same {
            self.leave_team(Some(Fault::Peer), ctx);
            return false;
        }
        self.feed(Event::Formed, ctx);
        true
    }

    fn sync_state(&mut self, ctx: &mut Ctx) {
        let team = self.team.as_ref().expect("it is in a team");
        let (position, is_source) = (team.group.position, team.source() == Some(team.rank));
        match (&team.group.start, self.state) {
            (Start::Fresh, _) => {
                self.state = Some(ctx.job.lineage[0]);
                self.compare(ctx);
            }
            (_, Some(state)) if is_source && state.position == position => {
                self.broadcast(&state, ctx);
                self.compare(ctx);
            }
            _ if is_source => {
                self.leave_team(Some(Fault::Internal("it has no such state".to_string())), ctx);
            }
            _ => self.enter(Stage::Healing, ctx),
        }
    }

    fn begin_work(&mut self, low: u64, high: u64, ctx: &mut Ctx) {
        self.work += 1;
        let time = ctx.between(low, high);
        self.work_time = (ctx.now, ctx.now + time);
        ctx.after(time, Happening::Timer(self.proc, Timer::Worked(self.work)));
    }

    /// Leaves of the phase in hand that are done.
    pub(crate) fn leaves_in_hand(&self, now: Instant) -> u64 {
        let Some(team) = self.team.as_ref().filter(|team| team.stage == Stage::Computing) else { return 0 };
        let shards = team.group.members[team.rank].shards.len() as u64;
        let (start, end) = self.work_time;
        shards * now.min(end).saturating_sub(start) / (end - start).max(1)
    }

    fn broadcast(&mut self, state: &State, ctx: &mut Ctx) {
        for half in [0, 1] {
            let chunk = Peer::Chunk {
                half,
                value: state.halves[half],
                ledger: state.ledger,
                fingerprint: state.fingerprint(),
                tainted: state.tainted,
            };
            self.tell_all(&chunk, ctx);
        }
    }

    /// Takes the source's state into spare memory; makes it its own once all of it is there.
    fn receive_state(&mut self, ctx: &mut Ctx) -> bool {
        let team = self.team.as_mut().expect("it is in a team");
        let Some(source) = team.source().and_then(|rank| team.peers.get(rank)) else { return false };
        let Some(Peer::Chunk { half, value, ledger, fingerprint, tainted }) =
            team.mail.get_mut(source).and_then(VecDeque::pop_front)
        else {
            return false;
        };
        team.spare[half] = Some(value);
        let [Some(first), Some(second)] = team.spare else { return true };
        let position = team.group.position;
        let healed = matches!(team.group.start, Start::Healed(_));
        let state = State { position, halves: [first, second], ledger, tainted };
        if state.fingerprint() != fingerprint {
            self.leave_team(Some(Fault::Peer), ctx);
            return false;
        }
        if !healed || self.state.is_none_or(|own| own.position != position) {
            self.state = Some(state);
            ctx.copied(tainted);
            ctx.seen.push(Seen::Healed { proc: self.proc, state, source: fingerprint });
        }
        self.compare(ctx);
        true
    }

    fn compare(&mut self, ctx: &mut Ctx) {
        let print = Peer::Print(self.state.map_or(0, |state| state.fingerprint()));
        self.enter(Stage::Comparing, ctx);
        self.tell_all(&print, ctx);
    }

    fn compared(&mut self, ctx: &mut Ctx) -> bool {
        let own = self.state.map_or(0, |state| state.fingerprint());
        let team = self.team.as_mut().expect("it is in a team");
        let same = team.take_all().iter().all(|peer| matches!(peer, Peer::Print(print) if *print == own));
        if !same {
            self.found_divergence(ctx);
            return false;
        }
        team.trains = true;
        if team.peers.len() == 1 {
            ctx.copied(self.state.is_some_and(|state| state.tainted));
        }
        let (term, generation, position) = (team.term, team.group.generation, team.group.position);
        ctx.seen.push(Seen::Trains { proc: self.proc, term, generation });
        self.reported.retain(|step| step * ctx.job.phases <= position.0);
        let schedule = Schedule { end: ctx.job.end(), phases_per_step: ctx.job.phases };
        self.feed(Event::Synced(schedule), ctx);
        true
    }

    fn found_divergence(&mut self, ctx: &mut Ctx) {
        self.leave_team(Some(Fault::Diverged("fingerprints differ".to_string())), ctx);
    }

    // ---- Phases
    // ----------------------------------------------------------------------------------------------

    fn next_phase(&mut self, ctx: &mut Ctx) {
        let plan = self.member.propose();
        let team = self.team.as_mut().expect("it is in a team");
        team.own.2 = plan;
        let shards = team.group.members[team.rank].shards.len() as u64;
        let pace = ctx.scenario.leaf;
        self.enter(Stage::Computing, ctx);
        let slow = if !ctx.quiet && ctx.chance(0.02) { 4 } else { 1 };
        self.begin_work(pace * shards / 2, pace * shards * slow, ctx);
    }

    pub(crate) fn worked(&mut self, number: u64, ctx: &mut Ctx) {
        if number != self.work {
            return;
        }
        match self.team.as_ref().map(|team| team.stage) {
            Some(Stage::Loading) => self.loaded_checkpoint(ctx),
            Some(Stage::Computing) => self.computed(ctx),
            Some(Stage::Committing) => self.committed(ctx),
            _ => {}
        }
    }

    fn loaded_checkpoint(&mut self, ctx: &mut Ctx) {
        if self.leaves_now(ctx) {
            return;
        }
        let team = self.team.as_ref().expect("it is in a team");
        let Start::Checkpoint(_, checkpoint) = &team.group.start else { return };
        let answers = self.storage_answers();
        match ctx.directory.load(checkpoint).filter(|_| answers) {
            Some(state) => {
                self.state = Some(state);
                self.feed(Event::Read, ctx);
            }
            None => self.begin_work(50_000, 100_000, ctx),
        }
    }

    fn computed(&mut self, ctx: &mut Ctx) {
        let Some(state) = self.state else { return };
        let team = self.team.as_mut().expect("it is in a team");
        let shards = team.group.members[team.rank].shards.clone();
        let sum = shards.clone().fold(0u64, |sum, shard| sum.wrapping_add(leaf(&state, shard)));
        let read = shards.clone().fold(0u64, |sum, v| sum.wrapping_add(samples(state.position, v)));
        let trailer = Trailer {
            generation: team.group.generation,
            position: state.position,
            fingerprint: state.fingerprint(),
            plan: team.own.2,
        };
        team.own = (sum, read, trailer.plan);
        self.leaves += shards.len() as u64;
        self.slowest_leaf = self.slowest_leaf.max(ctx.scenario.leaf);
        if self.leaves_now(ctx) {
            return;
        }
        let buffer = self.next_buffer;
        self.next_buffer += 1;
        self.buffers.insert(buffer, sum);
        self.buffers.remove(&buffer.wrapping_sub(8));
        self.enter(Stage::Reducing, ctx);
        self.tell_all(&Peer::Part { buffer, sum, samples: read, trailer }, ctx);
        if self.team.as_ref().is_some_and(|team| team.peers.len() == 1) {
            let plan = trailer.plan;
            self.start_commit(sum, read, plan, ctx);
        } else {
            self.advance(ctx);
        }
    }

    fn reduced(&mut self, ctx: &mut Ctx) -> bool {
        let Some(state) = self.state else { return false };
        let team = self.team.as_mut().expect("it is in a team");
        let (mut sum, mut read, mut plan) = team.own;
        for peer in team.take_all() {
            let Peer::Part { sum: its, samples: its_samples, trailer, .. } = peer else { return false };
            if (trailer.generation, trailer.position) != (team.group.generation, state.position)
                || trailer.fingerprint != state.fingerprint()
            {
                self.found_divergence(ctx);
                return false;
            }
            sum = sum.wrapping_add(its);
            read = read.wrapping_add(its_samples);
            plan = if trailer.plan == plan { plan } else { 0 };
        }
        self.start_commit(sum, read, plan, ctx);
        true
    }

    fn start_commit(&mut self, sum: u64, read: u64, plan: u64, ctx: &mut Ctx) {
        if !self.member.may_commit(Duration::from_micros(ctx.now)) {
            return self.come_to_rest(None, true, ctx);
        }
        self.team.as_mut().expect("it is in a team").reduced = (sum, read, plan);
        self.enter(Stage::Committing, ctx);
        self.begin_work(200, 3_000, ctx);
    }

    fn committed(&mut self, ctx: &mut Ctx) {
        let Some(state) = &mut self.state else { return };
        let team = self.team.as_mut().expect("it is in a team");
        let (sum, read, plan) = team.reduced;
        state.commit(sum, read);
        if std::mem::take(&mut self.flips) && team.peers.len() > 1 {
            self.flip(ctx);
        }
        let (Some(state), Some(team)) = (self.state, &self.team) else { return };
        let (generation, begun) = (team.group.generation, team.since);
        ctx.seen.push(Seen::Committed { proc: self.proc, begun, generation, state });
        self.feed(Event::Committed { position: state.position, agreed: plan }, ctx);
        let goes_on = self.alive && self.team.as_ref().is_some_and(|team| team.stage == Stage::Committing);
        if goes_on && !self.leaves_now(ctx) {
            self.next_phase(ctx);
        }
    }

    /// Writes this member's share of the files of a checkpoint.
    pub(crate) fn save_share(&mut self, ctx: &mut Ctx) {
        let Some(state) = self.state else { return };
        let team = self.team.as_ref().expect("it is in a team");
        let writers: Vec<usize> =
            (0..team.group.members.len()).filter(|rank| team.group.members[*rank].writes_parts).collect();
        let Some(mine) = writers.iter().position(|rank| *rank == team.rank) else { return };
        let generation = team.group.generation;
        for index in 0..ctx.job.parts {
            if index as usize % writers.len() == mine {
                self.save_later(generation, state, index, ctx);
            }
        }
    }

    // ---- Coming to rest
    // --------------------------------------------------------------------------------------

    /// Its part is done once its last state is on the storage, however long that takes.
    pub(crate) fn finish_if_saved(&mut self, ctx: &mut Ctx) {
        let saves = self.team.as_ref().is_some_and(|team| team.active && team.stage == Stage::Saving);
        if saves && self.is_saved() {
            self.feed(Event::Saved, ctx);
        }
    }

    /// Leaves the group, at once or when the work in hand is done.
    pub(crate) fn leave_team(&mut self, fault: Option<Fault>, ctx: &mut Ctx) {
        let Some(team) = &mut self.team else { return };
        if !team.active {
            return;
        }
        if matches!(team.stage, Stage::Computing | Stage::Committing | Stage::Loading) {
            let known = team.leave.take().flatten();
            team.leave = Some(known.or(fault));
        } else {
            self.come_to_rest(fault, true, ctx);
        }
    }

    fn leaves_now(&mut self, ctx: &mut Ctx) -> bool {
        let Some(fault) = self.team.as_mut().and_then(|team| team.leave.take()) else { return false };
        self.come_to_rest(fault, true, ctx);
        true
    }

    fn come_to_rest(&mut self, fault: Option<Fault>, close: bool, ctx: &mut Ctx) {
        if close {
            self.close_links(ctx);
        }
        let team = self.team.as_mut().expect("it is in a team");
        team.active = false;
        team.stage = Stage::Done;
        team.mail.clear();
        let generation = team.group.generation;
        self.readied = self.readied.max(generation);
        note!(ctx, "worker process {} rests: {fault:?}, {:?}", self.proc, self.state);
        let held = self.state.map(|state| state.position);
        self.feed(Event::Stopped { held, fault }, ctx);
    }

    /// Gives up what takes too long.
    pub(crate) fn check_waits(&mut self, ctx: &mut Ctx) {
        let Some(team) = self.team.as_ref().filter(|team| team.active) else { return };
        let waited = ctx.now - team.since;
        let (stage, generation) = (team.stage, team.group.generation);
        match stage {
            Stage::Meeting if waited >= ctx.waits.meet => self.leave_team(Some(Fault::Timeout), ctx),
            Stage::Meeting => self.say(Up::Enter(generation), ctx),
            _ if team.waits() && waited >= ctx.waits.reduce => self.leave_team(Some(Fault::Timeout), ctx),
            _ => {}
        }
    }
}
