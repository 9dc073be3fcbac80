//! One generation of the group, from forming to its end.
//!
//! 1. The first collective compares every member's view of the group's identity; a worker that belongs to
//!    another group is detected before it can touch anyone's state.
//! 2. Before the first phase all members have compared the fingerprint of the whole state: of the one that
//!    each drew, or with that of the member that gave it (`state_sync`).

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use c10d::shared::{Exchange, OFFER_WORDS, Segment};
use c10d::{GlooAddress, GlooOptions, Group, KeyValueStore};
use ganglion_membership::{Activity, Backend, Position, Start, Term};
use ganglion_proto::job::{Job, Reduction};
use ganglion_proto::message::Assignment;
use ganglion_proto::words::counted;
use tch::Device;

use super::finite::NonFinite;
use super::gradient_log::LogError;
use super::reduce::{AllReduce, Memory, Peers, ReduceError, ShardMap, Sharing, gather};
use super::report::Pending;
use super::state_sync::{report, sync};
use super::trainer::Held;
use crate::checkpoint::CheckpointError;
use crate::device;
use crate::objective::Model;
use crate::session::Session;
use crate::state::State;

/// Interval at which the wait for the group looks for an abort.
const LOOK: Duration = Duration::from_millis(2);

/// Process group of one generation, with its all-reduce.
pub(crate) struct Team {
    /// Number of the generation.
    pub generation: u64,
    /// Update indices (positions) by which the run was rolled back.
    pub skips: Vec<Position>,
    peers: Peers,
    /// All-reduce of the layouts of gradients that the model has.
    pub all_reduce: AllReduce,
}

/// Reasons why a group could not be formed or its training failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TeamError {
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
    pub(crate) fn form(
        assignment: &Assignment,
        session: &Session,
        job: &Job,
        model: &Model,
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
        let mut peers = Peers { group, timeout, shards, device, sharing: Sharing::None };
        let hosts = introduce(&peers, &identity(session, assignment, term), generation.0)?;
        peers.sharing = share(&peers, &hosts, model, job.job.reduction)?;
        let (batch, reduction) = (job.global_batch(), job.job.reduction);
        let all_reduce = AllReduce::new(peers.clone(), model.reduces(), batch, reduction)?;
        let (generation, skips) = (generation.0, assignment.group.skips.clone());
        Ok(Team { generation, skips, peers, all_reduce })
    }

    /// Gives every member the state of the assignment's update index, at index 0 the `fresh` one. `held` is
    /// the state that this member holds or has read; the assignment's source must have one. It stays
    /// unchanged if this fails on the way.
    pub(crate) fn start(
        &self,
        assignment: &Assignment,
        model: &Model,
        fresh: impl FnOnce() -> State,
        held: &mut Option<Held>,
    ) -> Result<(), TeamError> {
        let position = assignment.group.position;
        match &assignment.group.start {
            Start::Fresh => {
                let drawn = held.insert(Held { state: fresh(), pending: Pending::new(model) });
                let at = drawn.state.counters.position;
                if at != position {
                    let what = format!("the state is at position {at}, not {position}");
                    return Err(TeamError::Diverged(what));
                }
                let own = report(drawn)?;
                match differing(&gather(&self.peers, &own)?, &own) {
                    None => Ok(()),
                    Some(rank) => Err(TeamError::Diverged(self.peers.differ(rank, "state", self.generation))),
                }
            }
            Start::Healed(source) | Start::Checkpoint(source, _) => {
                let from = (source.0 as usize, position, self.generation);
                sync(&self.peers, from, model, held)
            }
        }
    }

    /// Assignment of data shards to ranks.
    pub(crate) fn shards(&self) -> &ShardMap {
        &self.peers.shards
    }
}

impl Peers {
    fn differ(&self, rank: usize, what: &str, generation: u64) -> String {
        let own = self.shards.rank;
        format!("rank {rank} and rank {own} differ in their {what} at the start of generation {generation}")
    }
}

/// First rank whose words begin otherwise than `own`.
fn differing(all: &[Vec<u64>], own: &[u64]) -> Option<usize> {
    all.iter().position(|theirs| !theirs.starts_with(own))
}

/// Compares the identity of the group, and returns a word for each rank, by rank: those that can share memory
/// have the same, and one that shares with nobody has 0.
fn introduce(peers: &Peers, identity: &[u64], generation: u64) -> Result<Vec<u64>, TeamError> {
    let all = gather(peers, &[identity, &[sharing_word()]].concat())?;
    match differing(&all, identity) {
        None => Ok(all.iter().map(|words| words[identity.len()]).collect()),
        // No state is wrong: a worker reached a group that is not its own.
        Some(rank) => Err(TeamError::Fenced(peers.differ(rank, "group", generation))),
    }
}

fn sharing_word() -> u64 {
    let Some(host) = device::host().filter(|_| device::shares_memory()) else { return 0 };
    // A process is found by its number, which belongs to a namespace.
    let numbers = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    // Never 0.
    xxhash_rust::xxh3::xxh3_64(format!("{host}/{}", numbers.display()).as_bytes()) | 1
}

/// Finds out which ranks share memory, by the words of their hosts. All ranks get the same answer.
fn share(peers: &Peers, hosts: &[u64], model: &Model, reduction: Reduction) -> Result<Sharing, TeamError> {
    let world_size = hosts.len();
    let on_host = |host: u64| -> Vec<usize> { (0..world_size).filter(|rank| hosts[*rank] == host).collect() };
    let can_share = |host: u64| host != 0 && on_host(host).len() > 1;
    // Where the group is on more than one host, the others are reached rank by rank.
    let is_possible = on_host(hosts[0]).len() == world_size || peers.group.exchanges();
    let is_wanted = peers.device == Device::Cpu && reduction != Reduction::Ring;
    if !is_wanted || !is_possible || !hosts.iter().any(|host| can_share(*host)) {
        return Ok(Sharing::None);
    }
    let own = hosts[peers.shards.rank];
    let ranks = if can_share(own) { on_host(own) } else { Vec::new() };
    let joined = join(peers, &ranks, model)?;
    // One rank may fail where the others of its host do not, and then all of them must take the other way.
    let worked: Vec<bool> =
        gather(peers, &[u64::from(joined.is_ok())])?.iter().map(|worked| *worked == [1]).collect();
    let shares = |host: u64| can_share(host) && on_host(host).iter().all(|rank| worked[*rank]);
    if let Err(reason) = &joined
        && !ranks.is_empty()
    {
        tracing::info!("no memory is shared with the other workers of this host: {reason}");
    }
    let memory = joined.ok().filter(|_| shares(own)).map(|exchange| Memory::new(exchange, &ranks));
    Ok(match memory {
        Some(memory) if ranks.len() == world_size => {
            tracing::info!("reduces go through memory that all workers share");
            Sharing::All(memory)
        }
        memory if hosts.iter().any(|host| shares(*host)) => {
            let near = counted(memory.as_ref().map_or(0, |_| ranks.len() - 1), "worker");
            tracing::info!("reduces go through memory to {near}, and over Gloo to the others");
            Sharing::Some(memory)
        }
        _ => Sharing::None,
    })
}

/// Joins the exchange between the ranks of this host; every rank of the group takes part in the offers.
fn join(peers: &Peers, ranks: &[usize], model: &Model) -> Result<Result<Exchange, c10d::Error>, TeamError> {
    let shards = &peers.shards;
    let own = match model.reduces().iter().map(|layout| Memory::slot(shards, ranks, layout.len())).max() {
        Some(slot) if !ranks.is_empty() => Segment::new(slot),
        _ => Err(c10d::Error::Fatal("there is nobody to share memory with".into())),
    };
    // No process has the number 0: an offer of zeros is none.
    let all = gather(peers, &own.as_ref().map_or([0; OFFER_WORDS], Segment::offer))?;
    let offers: Vec<_> =
        ranks.iter().filter_map(|rank| <[u64; OFFER_WORDS]>::try_from(&all[*rank][..]).ok()).collect();
    let place = ranks.iter().position(|rank| *rank == shards.rank).unwrap_or(0);
    Ok(own.and_then(|own| Exchange::join(own, place, &offers)))
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

/// Words that identify a group: the same for all its members, and for no other group.
fn identity(session: &Session, assignment: &Assignment, term: Term) -> [u64; 5] {
    let welcome = session.welcome();
    let hash = |bytes: &[u8]| xxhash_rust::xxh3::xxh3_64(bytes);
    let members: Vec<u8> =
        assignment.group.members.iter().flat_map(|member| member.worker.0.to_le_bytes()).collect();
    let group = &assignment.group;
    [hash(welcome.run.as_bytes()), term.0, group.generation.0, group.position.0, hash(&members)]
}
