//! A worker's training: meeting the others, healing, reduces, commits, coming to rest. What the model does is
//! what `engine/trainer.rs`, `generation.rs` and `reduce` do; the arithmetic and the collectives are its own.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ganglion_membership::member::{Event, Reported, Schedule};
use ganglion_membership::{Activity, Fault, Position, Start as From};
use ganglion_proto::job::Job;
use ganglion_proto::message::{Assignment, MetricsRow};
use ganglion_proto::stream::SampleStream;
use ganglion_proto::wire::store_service_client::StoreServiceClient;
use ganglion_proto::wire::{GetRequest, Key, SetRequest};
use ganglion_worker::session::{Session, Work};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use tonic::transport::Endpoint;

use crate::job::{self, SAMPLES, State};
use crate::mix::mix;
use crate::net::{self, Hub, LINKS, Link};
use crate::worker::{Archive, LOOK, Start};

/// What ends a wait for others.
enum Broken {
    Aborted,
    Fault(Fault),
}

/// What goes with the state without being part of it.
type Held = (State, Carried);
/// Which generation committed the newest step with a row, and its size.
pub(crate) type Carried = [u64; 2];

pub(crate) struct Trainer {
    pub session: Arc<Session>,
    pub hub: Hub,
    pub archive: Archive,
    pub rng: ChaCha8Rng,
    pub start: Start,
    pub held: Option<Held>,
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
    pub(crate) async fn take_part(&mut self, assignment: &Assignment) {
        let fault = match self.train(assignment).await {
            Ok(()) | Err(Broken::Aborted) => None,
            Err(Broken::Fault(fault)) => Some(fault),
        };
        self.session.stopped(self.held.map(|(state, _)| state.position), fault);
    }

    pub(crate) fn drop_state(&mut self) {
        self.archive.discard();
        self.held = None;
    }

    pub(crate) fn save_alone(&self) {
        let Some((state, _)) = self.held else { return };
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

    async fn train(&mut self, assignment: &Assignment) -> Result<(), Broken> {
        let group = &assignment.group;
        let job = self.session.welcome().job;
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
            session.advance(Event::Read);
        }
        let session = self.session.clone();
        let mut team = Team::form(assignment, &session, &self.hub, &self.start).await?;
        session.advance(Event::Formed);
        team.start(&job, &mut self.held).await?;
        let mut held = self.held.expect("a team starts with a state");
        self.start.shared.begin(group.generation.0, group.position.0);
        let rest = self.train_with(&job, assignment, &mut team, &mut held).await;
        self.held = Some(held);
        rest
    }

    async fn train_with(
        &mut self,
        job: &Job,
        assignment: &Assignment,
        team: &mut Team<'_>,
        held: &mut (State, Carried),
    ) -> Result<(), Broken> {
        let generation = assignment.group.generation;
        let mut stream = SampleStream::new(job.job.seed, SAMPLES);
        let phases_per_step = job.phases_per_step();
        let schedule = Schedule { end: Position(job.last_step(SAMPLES) * phases_per_step), phases_per_step };
        let mut next = self.session.advance(Event::Synced(schedule));
        loop {
            for work in next {
                match work {
                    Work::ReportStep(reported) => self.report(job, assignment, held, reported),
                    Work::Save(_) => {
                        self.archive.push(generation, held.0, files(assignment));
                        let _pause = self.session.pause();
                        let saved = self.archive.drain(|| self.session.is_aborted(generation)).await;
                        let left = if saved { self.session.advance(Event::Saved) } else { Vec::new() };
                        return if left.is_empty() { Err(Broken::Aborted) } else { Ok(()) };
                    }
                    Work::Leave => return Ok(()),
                    Work::Read | Work::Form | Work::SyncState | Work::Run(_) => {}
                }
            }
            let (state, _) = held;
            let agreed = self.run_phase(job, team, state, &mut stream).await?;
            self.start.shared.commit(&self.start.name, generation.0, state);
            next = self.session.advance(Event::Committed { position: state.position, agreed });
        }
    }

    async fn run_phase(
        &mut self,
        job: &Job,
        team: &mut Team<'_>,
        state: &mut State,
        stream: &mut SampleStream,
    ) -> Result<u64, Broken> {
        let shards = team.shards();
        let plan_number = self.session.propose();
        self.session.set_activity(Activity::Computing);
        let mut sum = 0_u64;
        for shard in shards.clone() {
            self.compute(team).await?;
            sum = sum.wrapping_add(state.leaf(shard));
        }
        self.session.set_activity(Activity::Waiting);
        let ledger = job::ledger(job, stream, state.position, shards);
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
        Ok(if is_agreed { plan_number } else { 0 })
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

    fn report(
        &self,
        job: &Job,
        assignment: &Assignment,
        (state, carried): &mut (State, Carried),
        reported: Reported,
    ) {
        let (step, _) = state.place(job);
        let row_is_due = job.metrics_due(step, SAMPLES);
        match reported {
            Reported::Again if row_is_due && carried[0] > 0 => {
                self.session.report_unless_kept(row(job, state, carried));
            }
            Reported::Again | Reported::FromCheckpoint => {}
            Reported::Committed | Reported::Last { .. } => {
                if row_is_due || matches!(reported, Reported::Last { stopping: true }) {
                    *carried = [assignment.group.generation.0, assignment.group.members.len() as u64];
                    self.session.report(row(job, state, carried));
                }
            }
        }
        let saves = matches!(reported, Reported::Committed | Reported::Again);
        if saves && job.checkpoint_due(step, SAMPLES) {
            self.archive.push(assignment.group.generation, *state, files(assignment));
        }
    }

    /// Finds out which members do not answer.
    pub(crate) async fn probe(&self) {
        let _pause = self.session.pause();
        let (addresses, limit) = self.session.members_to_probe().await;
        let own = format!("{}:{LINKS}", self.start.address);
        // The address of one that is not known says nothing about the link to it.
        let asked = addresses.into_iter().map(|address| {
            let other = address.filter(|address| *address != own);
            tokio::spawn(async move {
                match other {
                    Some(other) => net::answers(&other, limit).await,
                    None => true,
                }
            })
        });
        let asked: Vec<_> = asked.collect();
        let mut lost = Vec::new();
        for (rank, answer) in asked.into_iter().enumerate() {
            if !answer.await.unwrap_or(false) {
                lost.push(rank);
            }
        }
        self.session.probed(lost);
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
