//! One generation of the group, from forming to its end.
//!
//! 1. The first collective compares every member's view of the group's identity; a worker that belongs to
//!    another group is detected before it can touch anyone's state.
//! 2. State comes from one member by broadcast, into spare memory; it replaces the receiver's only when all
//!    of it arrived and its fingerprint is right. Until then the receiver keeps what it had.
//! 3. Before the first phase all members have compared the fingerprint of the whole state.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use c10d::{Buffer, GlooAddress, GlooOptions, Group, KeyValueStore};
use ganglion_membership::{Activity, Backend, Position, Start, Term};
use ganglion_proto::failpoint;
use ganglion_proto::job::Job;
use ganglion_proto::message::Assignment;
use ganglion_proto::record::Scalars;
use tch::{Device, Kind, Tensor, no_grad};

use crate::checkpoint::CheckpointError;
use crate::engine::finite::NonFinite;
use crate::engine::gradient_log::LogError;
use crate::engine::reduce::{AllReduce, ReduceError, ShardMap};
use crate::nn::Models;
use crate::objective::GradLayout;
use crate::objective::gan::grad_layout;
use crate::session::Session;
use crate::state::{ALIGNMENT, Counters, Module, State, StateLayout, narrow};

/// Interval at which the wait for the group looks for an abort.
const LOOK: Duration = Duration::from_millis(2);

/// Data broadcast with the state but not part of it: what a member needs to report a step's row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Carried {
    /// The mean losses of the last discriminator and generator phases, for the row of a step that a change of
    /// the group cut in two.
    pub losses: [f32; 2],
    /// Mean D outputs for real and for generated samples, over the last discriminator phase.
    pub scores: [f32; 2],
    /// Circumstances of the newest step with a row, for a member that was synchronised past its end and may
    /// have to report it.
    pub newest: Circumstances,
}

/// Circumstances in which a step with a row was committed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Circumstances {
    /// Generation that committed the step; 0 if unknown.
    pub generation: u64,
    /// World size of that generation.
    pub world_size: u32,
    /// Real images consumed per second since the row before.
    pub images_per_second: f32,
    /// Time of the commit, in seconds since the Unix epoch.
    pub time: f64,
}

/// Floats behind the state in its broadcast: the counters and [`Carried`].
const TAIL: usize = 2 * ALIGNMENT;

/// Process group of one generation, with an all-reduce for each network.
pub struct Team {
    /// Assignment of data shards to ranks.
    pub shards: ShardMap,
    /// Number of the generation.
    pub generation: u64,
    /// Update indices (positions) by which the run was rolled back.
    pub skips: Vec<Position>,
    group: Arc<Group>,
    timeout: Duration,
    generator: AllReduce,
    discriminator: AllReduce,
}

/// Reasons why a group could not be formed or its training failed.
#[derive(Debug, thiserror::Error)]
pub enum TeamError {
    /// A collective failed.
    #[error(transparent)]
    Collective(#[from] c10d::Error),
    /// A shard's gradient could not be computed.
    #[error("{0}")]
    Compute(#[source] c10d::Error),
    /// The checkpoint that the group starts from cannot be read.
    #[error("{0}")]
    Checkpoint(#[from] CheckpointError),
    /// The log of shard gradients cannot be written.
    #[error(transparent)]
    Log(#[from] LogError),
    /// No thread could be started to read the checkpoint.
    #[error("cannot read a checkpoint: {0}")]
    Spawn(#[from] std::io::Error),
    /// The real samples could not be read.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
    /// Members hold different states.
    #[error("{0}")]
    Diverged(String),
    /// Members belong to different groups.
    #[error("{0}")]
    Fenced(String),
    /// The reduced gradient is not finite and is not to be skipped.
    #[error(transparent)]
    NonFinite(#[from] NonFinite),
}

impl From<ReduceError> for TeamError {
    fn from(error: ReduceError) -> Self {
        match error {
            ReduceError::Collective(error) => TeamError::Collective(error),
            error @ ReduceError::Disagreement { .. } => TeamError::Diverged(error.to_string()),
        }
    }
}

impl<T> From<c10d::Refused<T>> for TeamError {
    fn from(refused: c10d::Refused<T>) -> Self {
        refused.error.into()
    }
}

impl Team {
    /// Meets the other members of an assignment and checks that all mean the same group.
    pub fn form(
        assignment: &Assignment,
        session: &Session,
        job: &Job,
        models: &Models,
        layout: &StateLayout,
        device: Device,
    ) -> Result<Team, TeamError> {
        let generation = assignment.group.generation;
        let shards = ShardMap {
            data_shards: job.job.data_shards,
            ranges: assignment.group.members.iter().map(|member| member.shards.clone()).collect(),
            rank: assignment.rank as usize,
        };
        let (group, term) = meet(&shards, assignment, session, device)?;
        let (group, timeout) = (Arc::new(group), session.limits().reduce);
        session.watch_group(generation, group.aborter());
        let all_reduce = |module| {
            let layout = grad_layout(models, layout, module);
            let over = (job.global_batch(), job.job.reduction);
            AllReduce::new(group.clone(), timeout, shards.clone(), layout, over, device)
        };
        let (generator, discriminator) = (all_reduce(Module::Generator)?, all_reduce(Module::Discriminator)?);
        let (generation, skips) = (generation.0, assignment.group.skips.clone());
        let team = Team { shards, generation, skips, group, timeout, generator, discriminator };
        match team.compare("group", &identity(session, assignment, term)) {
            // No state is wrong: a worker reached a group that is not its own.
            Err(TeamError::Diverged(what)) => Err(TeamError::Fenced(what)),
            compared => compared.map(|()| team),
        }
    }

    /// Gives every member the state of the assignment's update index, at index 0 the `fresh` one. `held` is
    /// the state that this member holds or has read; the assignment's source must have one. It stays
    /// unchanged if this fails on the way.
    pub fn start(
        &self,
        start: &Start,
        position: Position,
        layout: &StateLayout,
        fresh: &dyn Fn() -> State,
        held: &mut Option<(State, Carried)>,
        device: Device,
    ) -> Result<(), TeamError> {
        match start {
            Start::Fresh => {
                *held = Some((fresh(), Carried::default()));
            }
            // After a loss the survivors mostly hold the same state already.
            Start::Healed(_) if self.all_hold(position, held.as_ref())? => return Ok(()),
            Start::Healed(source) | Start::Checkpoint(source, _) => {
                self.broadcast(source.0 as usize, layout, held, device)?;
            }
        }
        let Some((state, _)) = held else {
            return Err(TeamError::Diverged("the source of the state has none".to_string()));
        };
        if state.counters.position != position {
            let what = format!("the state is at position {}, not {position}", state.counters.position);
            return Err(TeamError::Diverged(what));
        }
        self.compare("state", &summary(state)?)
    }

    /// Whether all members hold the same state, at the given update index. All members get the same answer.
    fn all_hold(&self, position: Position, held: Option<&(State, Carried)>) -> Result<bool, TeamError> {
        let held = held.filter(|(state, _)| state.counters.position == position);
        let own = held.map_or(Ok([u64::MAX; 4]), |(state, _)| summary(state))?;
        let other = self.first_other(&own)?;
        Ok(held.is_some() && other.is_none())
    }

    fn broadcast(
        &self,
        source: usize,
        layout: &StateLayout,
        held: &mut Option<(State, Carried)>,
        device: Device,
    ) -> Result<(), TeamError> {
        if self.shards.world_size() == 1 {
            return Ok(());
        }
        let mut spare = Buffer::zeros(layout.len + TAIL, Kind::Float, device)?;
        // Numbered by generation: the source is about to send, a receiver has received and not taken over
        // yet.
        if self.shards.rank == source {
            failpoint::reached("heal-source", self.generation);
        }
        if let Some((state, carried)) = held.as_ref().filter(|_| self.shards.rank == source) {
            let tail = carried.to_tensor(state.counters, c10d::aten::fingerprint(&state.flat, 0)?);
            spare.update(|spare| {
                narrow(spare, 0..layout.len).copy_(&state.flat);
                narrow(spare, layout.len..layout.len + TAIL).copy_(&tail);
            });
        }
        // Bounded by the timeout of reduces; an abort of the group ends the wait at once.
        let spare = self.group.broadcast(spare, source)?.wait(self.timeout)?;
        let tail = narrow(spare.tensor(), layout.len..layout.len + TAIL).to_device(Device::Cpu);
        let (counters, carried, fingerprint) = Carried::from_tensor(&tail);
        let received = narrow(spare.tensor(), 0..layout.len);
        if c10d::aten::fingerprint(&received, 0)? != fingerprint {
            return Err(TeamError::Diverged("a broadcast state does not have its fingerprint".to_string()));
        }
        if self.shards.rank != source {
            failpoint::reached("heal", self.generation);
        }
        let (state, known) =
            held.get_or_insert_with(|| (State::zeros(layout.clone(), device), Carried::default()));
        no_grad(|| state.flat.copy_(&received));
        (state.counters, *known) = (counters, carried);
        Ok(())
    }

    /// Returns the all-reduce of a network's gradients.
    pub fn all_reduce(&mut self, module: Module) -> &mut AllReduce {
        match module {
            Module::Generator => &mut self.generator,
            Module::Discriminator => &mut self.discriminator,
        }
    }

    /// The layout of a network's gradients.
    pub fn leaf_layout(&self, module: Module) -> &GradLayout {
        match module {
            Module::Generator => self.generator.layout(),
            Module::Discriminator => self.discriminator.layout(),
        }
    }

    /// Fails unless all members have the same words.
    fn compare(&self, what: &str, words: &[u64]) -> Result<(), TeamError> {
        match self.first_other(words)? {
            None => Ok(()),
            Some(rank) => Err(TeamError::Diverged(format!(
                "rank {rank} and rank {} differ in their {what} at the start of generation {}",
                self.shards.rank, self.generation
            ))),
        }
    }

    /// Returns the first rank whose words differ from this one's.
    fn first_other(&self, words: &[u64]) -> Result<Option<usize>, TeamError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut own = Buffer::zeros(bytes.len(), Kind::Uint8, self.generator.device())?;
        own.update(|own| own.copy_(&Tensor::from_slice(&bytes)));
        let all =
            Buffer::zeros(bytes.len() * self.shards.world_size(), Kind::Uint8, self.generator.device())?;
        let (_, all) = self.group.all_gather(own, all)?.wait(self.timeout)?;
        let all = Vec::<u8>::try_from(all.tensor().to_device(Device::Cpu)).expect("bytes on the CPU");
        Ok(all.chunks_exact(bytes.len()).position(|theirs| theirs != bytes))
    }
}

/// Forms the process group, and returns it with the term of its store's coordinator. An abort ends the wait
/// at once.
fn meet(
    shards: &ShardMap,
    assignment: &Assignment,
    session: &Session,
    device: Device,
) -> Result<(Group, Term), c10d::Error> {
    let (rank, world_size) = (shards.rank, shards.world_size());
    let limits = session.limits();
    let generation = assignment.group.generation;
    let (store, term) = session.store();
    let tunnels = session.tunnels().map(|tunnels| tunnels.group(rank, store.clone())).transpose();
    let tunnels = tunnels.map_err(|error| c10d::Error::Fatal(format!("no tunnels: {error}")))?;
    let address = match (&tunnels, std::env::var("GLOO_SOCKET_IFNAME")) {
        (Some(tunnels), _) => GlooAddress::Hostname(tunnels.loopback().to_string()),
        (None, Ok(interface)) => GlooAddress::Interface(interface),
        (None, Err(_)) => GlooAddress::Hostname(session.local_address().to_string()),
    };
    let backend = assignment.group.backend;
    // The same limit as this worker's own waits have: a member that computes for long must not break the
    // group.
    let (timeout, operation_timeout) = (limits.meet, limits.reduce);
    let options = GlooOptions { rank, world_size, timeout, operation_timeout, address };
    let connect = move || match tunnels.filter(|_| backend == Backend::Gloo) {
        None => connect(backend, options, store, device),
        Some(tunnels) => {
            let group = connect(backend, options, tunnels.clone(), device)?;
            // A group that went around the tunnels would not be encrypted.
            tunnels.wait(world_size - 1, timeout).map(|()| group)
        }
    };
    // libtorch's own wait for peers cannot be interrupted: a thread that is told to leave walks away from it.
    let (done, met) = mpsc::channel();
    let waiter = std::thread::Builder::new().name("meet".to_string());
    waiter
        .spawn(move || drop(done.send(connect())))
        .map_err(|error| c10d::Error::Fatal(format!("no thread to meet others: {error}")))?;
    session.set_activity(Activity::Waiting);
    loop {
        match met.recv_timeout(LOOK) {
            Ok(group) => return Ok((group?, term)),
            Err(RecvTimeoutError::Timeout) if session.is_aborted(generation) => {
                return Err(c10d::Error::Aborted);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(c10d::Error::Fatal("the thread that met others panicked".to_string()));
            }
        }
    }
}

/// Forms a group over the backend that was decided for all its members.
fn connect(
    backend: Backend,
    options: GlooOptions,
    store: Arc<dyn KeyValueStore>,
    device: Device,
) -> Result<Group, c10d::Error> {
    match (backend, device) {
        #[cfg(feature = "cuda")]
        (Backend::Nccl, Device::Cuda(device)) => {
            let GlooOptions { rank, world_size, operation_timeout: timeout, .. } = options;
            Group::nccl(c10d::NcclOptions { rank, world_size, timeout, device }, store, "nccl")
        }
        (Backend::Nccl, _) => {
            let what = format!("the group reduces over NCCL, and this worker computes on {device:?}");
            Err(c10d::Error::Fatal(what))
        }
        (Backend::Gloo, Device::Cpu) => Group::gloo(options, store, "gloo"),
        (Backend::Gloo, _) => Ok(Group::gloo(options, store, "gloo")?.staged(device)),
    }
}

/// Words by which two states are compared: counters and fingerprint.
fn summary(state: &State) -> Result<[u64; 4], c10d::Error> {
    let Counters { position, ledger, skipped } = state.counters;
    Ok([position.0, ledger, skipped, c10d::aten::fingerprint(&state.flat, 0)?])
}

/// Words that identify a group: the same for all its members, and for no other group.
fn identity(session: &Session, assignment: &Assignment, term: Term) -> [u64; 5] {
    let welcome = session.welcome();
    let hash = |bytes: &[u8]| xxhash_rust::xxh3::xxh3_64(bytes);
    let members: Vec<u8> =
        assignment.group.members.iter().flat_map(|member| member.worker.0.to_le_bytes()).collect();
    let group = &assignment.group;
    [hash(welcome.run.as_bytes()), term.0, group.generation.0, group.position.0, hash(&members)]
}

impl Carried {
    /// Takes the loss and D outputs of a phase from its reduced gradient.
    pub fn note(&mut self, module: Module, layout: &GradLayout, mean: &Tensor) {
        let told = narrow(mean, layout.loss()..layout.scores().end).to_device(Device::Cpu);
        let told = Vec::<f32>::try_from(told).unwrap_or_default();
        let [loss, real, fake] = told.try_into().unwrap_or([f32::NAN; 3]);
        match module {
            Module::Generator => self.losses[1] = loss,
            Module::Discriminator => (self.losses[0], self.scores) = (loss, [real, fake]),
        }
    }

    /// The scalars of a row.
    pub fn scalars(&self) -> Scalars {
        let names = ["loss_discriminator", "loss_generator", "score_real", "score_fake"];
        let values = self.losses.iter().chain(&self.scores).map(|value| f64::from(*value));
        names.into_iter().zip(values).collect()
    }

    fn to_tensor(self, counters: Counters, fingerprint: u64) -> Tensor {
        let mut bytes = Vec::with_capacity(4 * TAIL);
        for word in [counters.position.0, counters.ledger, counters.skipped, fingerprint] {
            bytes.extend(word.to_le_bytes());
        }
        self.losses.iter().for_each(|loss| bytes.extend(loss.to_le_bytes()));
        let Circumstances { generation, world_size, images_per_second, time } = self.newest;
        bytes.extend(generation.to_le_bytes());
        bytes.extend(world_size.to_le_bytes());
        bytes.extend(images_per_second.to_le_bytes());
        bytes.extend(time.to_le_bytes());
        self.scores.iter().for_each(|score| bytes.extend(score.to_le_bytes()));
        bytes.resize(4 * TAIL, 0);
        Tensor::from_slice(&bytes).view_dtype(Kind::Float)
    }

    fn from_tensor(tensor: &Tensor) -> (Counters, Carried, u64) {
        let bytes = Vec::<u8>::try_from(tensor.view_dtype(Kind::Uint8)).expect("bytes on the CPU");
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let float = |at: usize| f32::from_bits(half(at));
        let counters = Counters { position: Position(word(0)), ledger: word(8), skipped: word(16) };
        let newest = Circumstances {
            generation: word(40),
            world_size: half(48),
            images_per_second: float(52),
            time: f64::from_bits(word(56)),
        };
        (
            counters,
            Carried { losses: [float(32), float(36)], scores: [float(64), float(68)], newest },
            word(24),
        )
    }
}
