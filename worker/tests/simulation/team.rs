//! A worker's training: meeting the others, healing, reduces, commits, coming to rest. What the model does is
//! what `engine/trainer.rs`, `generation.rs` and `reduce` do; the arithmetic and the collectives are its own.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ganglion_membership::{Activity, Fault, PlanKind, Position, Rank, Rested, Start as From};
use ganglion_proto::job::Job;
use ganglion_proto::message::{Assignment, MetricsRow};
use ganglion_proto::stream::SampleStream;
use ganglion_proto::wire::store_service_client::StoreServiceClient;
use ganglion_proto::wire::{GetRequest, Key, SetRequest};
use ganglion_worker::engine::trainer::UNFORMED;
use ganglion_worker::session::Session;
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use tonic::transport::Endpoint;

use crate::job::{self, SAMPLES, State};
use crate::mix::mix;
use crate::net::{self, Hub, LINKS, Link};
use crate::worker::{Archive, LOOK, Start};

/// Why a generation ended for this worker.
#[derive(Debug)]
pub enum Rest {
    Finished { complete: bool },
    Planned,
    Aborted,
    Fault(Fault),
}

/// What ends a wait for others.
enum Broken {
    Aborted,
    Fault(Fault),
}

impl std::convert::From<Broken> for Rest {
    fn from(broken: Broken) -> Rest {
        match broken {
            Broken::Aborted => Rest::Aborted,
            Broken::Fault(fault) => Rest::Fault(fault),
        }
    }
}

/// What goes with the state without being part of it.
type Held = (State, Carried);
/// Which generation committed the newest step with a row, and its size.
pub type Carried = [u64; 2];

pub struct Trainer {
    pub session: Arc<Session>,
    pub hub: Hub,
    pub archive: Archive,
    pub rng: ChaCha8Rng,
    pub start: Start,
    pub held: Option<Held>,
    /// Groups in a row that did not come to train.
    pub unformed: u32,
}

/// A group that has met.
struct Team<'a> {
    session: &'a Session,
    assignment: &'a Assignment,
    term: u64,
    links: BTreeMap<usize, Link>,
    limit: Duration,
}

impl Trainer {
    pub async fn take_part(&mut self, assignment: &Assignment) -> Rest {
        match self.train(assignment).await {
            Ok(rest) => rest,
            Err(broken) => broken.into(),
        }
    }

    fn position(&self) -> Option<Position> {
        self.held.map(|(state, _)| state.position)
    }

    pub fn save_alone(&self) {
        let Some((state, _)) = self.held.filter(|_| !self.session.is_void()) else { return };
        let down = self.start.shared.storage_down.load(Ordering::Relaxed);
        if state.position == Position(0) || down {
            return;
        }
        let (welcome, rows) = (self.session.welcome(), self.session.kept_rows());
        let storage = &self.archive.storage;
        let saved = job::write_rows(storage, &welcome.job, &state, welcome.worker, &rows);
        if let Err(error) = saved.and_then(|()| job::write_whole(storage, &welcome.job, &state)) {
            self.start.shared.breach(format!("cannot save alone: {error}"));
        }
    }

    async fn train(&mut self, assignment: &Assignment) -> Result<Rest, Broken> {
        let group = &assignment.group;
        let job = self.session.welcome().job;
        let starts_anew = !matches!(group.start, From::Healed(_));
        if starts_anew || self.session.is_void() || self.position().is_some_and(|held| held > group.position)
        {
            self.archive.discard();
            self.held = None;
            self.session.void_is_gone();
        }
        if let From::Checkpoint(source, checkpoint) = &group.start
            && source.0 == assignment.rank
        {
            let session = self.session.clone();
            let _pause = session.pause();
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(10..60))).await;
            while self.start.shared.storage_down.load(Ordering::Relaxed) {
                if session.is_aborted(group.generation) {
                    return Err(Broken::Aborted);
                }
                tokio::time::sleep(LOOK).await;
            }
            let read =
                job::read(&self.archive.storage, checkpoint).map_err(|error| internal(&error.to_string()))?;
            self.held = Some((read, Carried::default()));
        }
        self.unformed += 1;
        let session = self.session.clone();
        let mut team = Team::form(assignment, &session, &self.hub, &self.start).await?;
        team.start(&job, &mut self.held).await?;
        let (mut state, mut carried) = self.held.expect("a team starts with a state");
        self.unformed = 0;
        self.start.shared.begin(group.generation.0, group.position.0);
        let rest = self.train_with(&job, assignment, &mut team, &mut state, &mut carried).await;
        self.held = Some((state, carried));
        rest
    }

    async fn train_with(
        &mut self,
        job: &Job,
        assignment: &Assignment,
        team: &mut Team<'_>,
        state: &mut State,
        carried: &mut Carried,
    ) -> Result<Rest, Broken> {
        self.catch_up(job, assignment, state, carried);
        let mut stream = SampleStream::new(job.job.seed, SAMPLES);
        let last_step = job.last_step(SAMPLES);
        let mut agreed = None;
        while state.place(job).0 < last_step && agreed != Some(PlanKind::Stop) {
            loop {
                let plan = self.run_phase(job, team, state, &mut stream).await?;
                self.start.shared.commit(&self.start.name, assignment.group.generation.0, state);
                agreed = plan.or(agreed);
                if agreed == Some(PlanKind::Regroup) || state.place(job).1 == 0 {
                    break;
                }
            }
            if state.place(job).1 == 0 {
                self.report(job, assignment, state, carried, agreed == Some(PlanKind::Stop));
            }
            if agreed == Some(PlanKind::Regroup) {
                return Ok(Rest::Planned);
            }
        }
        self.archive.push(assignment.group.generation, *state, files(assignment));
        let _pause = self.session.pause();
        let left = || self.session.end().is_some() || self.session.is_aborted(assignment.group.generation);
        if !self.archive.drain(left).await {
            return Ok(Rest::Aborted);
        }
        Ok(Rest::Finished { complete: state.place(job).0 == last_step })
    }

    async fn run_phase(
        &mut self,
        job: &Job,
        team: &mut Team<'_>,
        state: &mut State,
        stream: &mut SampleStream,
    ) -> Result<Option<PlanKind>, Broken> {
        let shards = team.shards();
        let plan = self.session.plan();
        self.session.set_activity(Activity::Computing);
        let mut sum = 0_u64;
        for shard in shards.clone() {
            self.compute(team).await?;
            sum = sum.wrapping_add(state.leaf(shard));
        }
        self.session.set_activity(Activity::Waiting);
        let ledger = job::ledger(job, stream, state.position, shards);
        let plan_number = plan.map_or(0, |plan| plan.number);
        let own = [team.term, state.position.0, state.fingerprint(), plan_number, ledger, sum];
        let all = team.all_gather(&own).await?;
        if let Some(rank) = all.iter().position(|theirs| theirs[..3] != own[..3]) {
            return Err(Broken::Fault(Fault::Diverged(format!("rank {rank} is elsewhere"))));
        }
        if !self.session.may_commit() {
            return Err(Broken::Aborted);
        }
        let total = |field: usize| all.iter().fold(0_u64, |sum, theirs| sum.wrapping_add(theirs[field]));
        state.commit(total(5), total(4));
        self.session.set_position(state.position);
        let is_agreed = all.iter().all(|theirs| theirs[3] == plan_number);
        Ok(plan.filter(|_| is_agreed).map(|plan| plan.kind))
    }

    /// One leaf.
    async fn compute(&mut self, team: &Team<'_>) -> Result<(), Broken> {
        let begun = tokio::time::Instant::now();
        let leaf = Duration::from_millis(self.rng.random_range(0..=self.start.leaf));
        tokio::time::sleep(leaf).await;
        let hangs = || {
            let now = turmoil::sim_elapsed().unwrap_or_default().as_millis();
            now < u128::from(self.start.hangs_until.load(Ordering::Relaxed))
        };
        while hangs() {
            tokio::time::sleep(LOOK).await;
        }
        self.session.leaf_done(begun.elapsed());
        if team.is_aborted() { Err(Broken::Aborted) } else { Ok(()) }
    }

    fn catch_up(&self, job: &Job, assignment: &Assignment, state: &State, carried: &Carried) {
        let (step, phase) = state.place(job);
        self.session.report_kept(Rank(assignment.rank), step);
        let at_the_end = phase == 0 && (1..job.last_step(SAMPLES)).contains(&step);
        if !at_the_end || !matches!(assignment.group.start, From::Healed(_)) {
            return;
        }
        if job.metrics_due(step, SAMPLES) && carried[0] > 0 {
            self.session.report_unless_kept(Rank(assignment.rank), row(job, state, carried));
        }
        if job.checkpoint_due(step, SAMPLES) {
            self.archive.push(assignment.group.generation, *state, files(assignment));
        }
    }

    fn report(
        &self,
        job: &Job,
        assignment: &Assignment,
        state: &State,
        carried: &mut Carried,
        stopping: bool,
    ) {
        let (step, _) = state.place(job);
        if job.metrics_due(step, SAMPLES) || stopping {
            *carried = [assignment.group.generation.0, assignment.group.members.len() as u64];
            self.session.report(Rank(assignment.rank), row(job, state, carried));
        }
        let last = stopping || step == job.last_step(SAMPLES);
        if !last && job.checkpoint_due(step, SAMPLES) {
            self.archive.push(assignment.group.generation, *state, files(assignment));
        }
    }

    pub async fn tell(&self, assignment: &Assignment, rest: Rest) {
        let generation = assignment.group.generation;
        let mut finished = None;
        match rest {
            Rest::Finished { complete } => finished = Some(complete),
            Rest::Fault(Fault::Diverged(detail)) => {
                self.archive.discard();
                self.session.left(generation, Fault::Diverged(detail));
            }
            Rest::Fault(fault) => {
                let fault = self.with_links(assignment, fault).await;
                self.session.left(generation, fault);
            }
            Rest::Aborted if self.session.take_probe() => {
                if let links @ Fault::Links(_) = self.with_links(assignment, Fault::Timeout).await {
                    self.session.left(generation, links);
                }
            }
            Rest::Aborted | Rest::Planned => {}
        }
        self.session.rested(generation, Rested { position: self.position(), finished });
    }

    async fn with_links(&self, assignment: &Assignment, fault: Fault) -> Fault {
        if fault != Fault::Timeout && (fault != Fault::Peer || self.unformed < UNFORMED) {
            return fault;
        }
        let limit = self.session.limits().attempt;
        let asked = assignment.addresses.iter().map(|address| {
            let address = address.clone();
            tokio::spawn(async move { net::answers(&address, limit).await })
        });
        let asked: Vec<_> = asked.collect();
        let mut lost = Vec::new();
        for (rank, answer) in (0..).zip(asked) {
            if rank != assignment.rank && !answer.await.unwrap_or(false) {
                lost.push(Rank(rank));
            }
        }
        if lost.is_empty() { fault } else { Fault::Links(lost) }
    }
}

fn row(job: &Job, state: &State, carried: &Carried) -> MetricsRow {
    let (step, _) = state.place(job);
    let [generation, world_size] = *carried;
    MetricsRow {
        step,
        images_seen: step * job.samples_per_step(),
        ledger: state.ledger,
        scalars: [("loss_model", 0.0)].into_iter().collect(),
        generation,
        world_size: u32::try_from(world_size).expect("few members"),
        images_per_second: 1.0,
        ..MetricsRow::default()
    }
}

fn files(assignment: &Assignment) -> Vec<u32> {
    let members = &assignment.group.members;
    let writers = members.iter().filter(|member| member.writes_parts).count();
    let rank = assignment.rank as usize;
    let place = members[..rank].iter().filter(|member| member.writes_parts).count();
    if members[rank].writes_parts { job::files_of(place, writers) } else { Vec::new() }
}

fn internal(detail: &str) -> Broken {
    Broken::Fault(Fault::Internal(detail.to_string()))
}

fn peer_lost<E>(_: E) -> Broken {
    Broken::Fault(Fault::Peer)
}

impl<'a> Team<'a> {
    async fn form(
        assignment: &'a Assignment,
        session: &'a Session,
        hub: &Hub,
        start: &Start,
    ) -> Result<Team<'a>, Broken> {
        let welcome = session.welcome();
        let limit = session.limits().meet;
        let mut team = Team { session, assignment, term: welcome.term.0, links: BTreeMap::new(), limit };
        session.set_activity(Activity::Waiting);
        team.links = team.interruptible(team.meet(hub, start)).await?;
        team.limit = session.limits().reduce;
        let group = &assignment.group;
        let members = group.members.iter().fold(7, |hash, member| mix(hash, member.worker.0));
        let identity = [team.term, group.generation.0, group.position.0, members];
        let all = team.all_gather(&identity).await?;
        if all.iter().all(|theirs| *theirs == identity) { Ok(team) } else { Err(peer_lost(())) }
    }

    /// Learns from the store where the others are, and opens the links to those of lower ranks.
    async fn meet(&self, hub: &Hub, start: &Start) -> io::Result<BTreeMap<usize, Link>> {
        let endpoint = Endpoint::from_shared(start.url.clone()).map_err(io::Error::other)?;
        let channel = (net::connector())(endpoint).await.map_err(io::Error::other)?;
        let mut store = StoreServiceClient::new(channel);
        let generation = self.assignment.group.generation.0;
        let key = |rank: usize| Some(Key { term: self.term, generation, name: format!("at/{rank}") });
        let own = self.rank();
        let value = format!("{}:{LINKS}", start.address).into_bytes();
        store.set(SetRequest { key: key(own), value }).await.map_err(io::Error::other)?;
        let mut links = BTreeMap::new();
        for rank in (0..self.assignment.group.members.len()).filter(|rank| *rank != own) {
            let timeout_ms = u64::try_from(self.limit.as_millis()).expect("a short limit");
            let got = store.get(GetRequest { key: key(rank), timeout_ms }).await.map_err(io::Error::other)?;
            let address = String::from_utf8(got.into_inner().value).map_err(io::Error::other)?;
            let address: SocketAddr = address.parse().map_err(io::Error::other)?;
            let link = if rank < own {
                Link::open(address, [self.term, generation, own as u64]).await?
            } else {
                hub.take([self.term, generation, rank as u64]).await
            };
            links.insert(rank, link);
        }
        Ok(links)
    }

    fn rank(&self) -> usize {
        self.assignment.rank as usize
    }

    fn shards(&self) -> std::ops::Range<u32> {
        self.assignment.group.members[self.rank()].shards.clone()
    }

    fn is_aborted(&self) -> bool {
        self.session.is_aborted(self.assignment.group.generation)
    }

    /// A wait for others, which ends with the group or with the time limit.
    async fn interruptible<T>(&self, wait: impl Future<Output = io::Result<T>>) -> Result<T, Broken> {
        let aborted = async {
            while !self.is_aborted() {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            biased;
            () = aborted => Err(Broken::Aborted),
            done = tokio::time::timeout(self.limit, wait) => match done {
                Ok(done) => done.map_err(peer_lost),
                Err(_) => Err(Broken::Fault(Fault::Timeout)),
            },
        }
    }

    /// Tells all others, and hears from all, by rank.
    async fn all_gather(&mut self, own: &[u64]) -> Result<Vec<Vec<u64>>, Broken> {
        let mut links = std::mem::take(&mut self.links);
        let gathered = self
            .interruptible(async {
                for link in links.values_mut() {
                    link.send(own).await?;
                }
                let mut all = BTreeMap::from([(self.rank(), own.to_vec())]);
                for (rank, link) in &mut links {
                    all.insert(*rank, link.receive().await?);
                }
                Ok(all.into_values().collect())
            })
            .await;
        self.links = links;
        gathered
    }

    /// Gives every member the state of the assignment's position.
    async fn start(&mut self, job: &Job, held: &mut Option<Held>) -> Result<(), Broken> {
        let position = self.assignment.group.position;
        match &self.assignment.group.start {
            From::Fresh => *held = Some((State::fresh(job.job.seed), Carried::default())),
            From::Healed(_) if self.all_hold(position, held.as_ref()).await? => return Ok(()),
            From::Healed(source) | From::Checkpoint(source, _) => {
                self.broadcast(source.0 as usize, held).await?
            }
        }
        let different = || Broken::Fault(Fault::Diverged("no such state".to_string()));
        let (state, _) =
            held.as_ref().filter(|(state, _)| state.position == position).ok_or_else(different)?;
        let own = [state.fingerprint()];
        let all = self.all_gather(&own).await?;
        if all.iter().all(|theirs| *theirs == own) { Ok(()) } else { Err(different()) }
    }

    async fn all_hold(&mut self, position: Position, held: Option<&Held>) -> Result<bool, Broken> {
        let held = held.filter(|(state, _)| state.position == position);
        let own = [held.map_or(u64::MAX, |(state, _)| state.fingerprint())];
        let all = self.all_gather(&own).await?;
        Ok(held.is_some() && all.iter().all(|theirs| *theirs == own))
    }

    async fn broadcast(&mut self, source: usize, held: &mut Option<Held>) -> Result<(), Broken> {
        let own = if self.rank() == source { held.as_ref() } else { None };
        let words = own.map_or(Vec::new(), |(state, carried)| {
            vec![state.position.0, state.ledger, state.value, carried[0], carried[1]]
        });
        let all = self.all_gather(&words).await?;
        if self.rank() == source {
            return Ok(());
        }
        let [position, ledger, value, generation, world_size] = all[source][..] else {
            return Err(internal("the source of the state has none"));
        };
        let state = State { position: Position(position), ledger, value };
        *held = Some((state, [generation, world_size]));
        Ok(())
    }
}
