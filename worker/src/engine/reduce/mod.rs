//! All-reduce: sums the gradients of all data shards, and checks with each sum that all ranks agree.
//!
//! Each rank sums the gradients of its own shards up to the maximal nodes of the tree. A route, chosen once
//! for a group, combines the sums of all ranks; whatever the number of ranks, the result has the same bits.
//! Only a job that asks for the backend's own all-reduce gets bits that depend on it.
//!
//! A reduce is a straight line: [`begin`](AllReduce::begin), then for each shard, or for the sum over
//! several, [`buffer`](AllReduce::buffer) and [`add`](AllReduce::add), then [`send`](AllReduce::send), then
//! [`wait`](AllReduce::wait). Between the last two there is time for other work.
//!
//! 1. A rank sends its chunk of the mean only after it committed the phase before (the call order ensures
//!    that), so ranks differ by one phase at most.
//! 2. A [`Header`] travels with it; a reduce whose headers differ is an error and is never committed.
//! 3. Buffers lent to a collective that failed are lost; a new group has new ones.

mod butterfly;
mod chunks;
mod gather;
mod header;
mod pair;
mod ring;
mod shared;
pub mod tree;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use c10d::{Group, Lent, Pending};
use ganglion_proto::failpoint;
use ganglion_proto::job::Reduction;
use tch::{Device, Kind, Tensor, no_grad};

use self::butterfly::Butterfly;
use self::chunks::Chunks;
pub(super) use self::gather::gather;
use self::header::Folded;
pub use self::header::Header;
use self::pair::Pair;
use self::ring::Ring;
use self::shared::Shared;
pub use self::shared::{Memory, Sharing};
pub(super) use self::shared::{Wait, pieces};
use self::tree::{Node, Summand, TreeSum, cover};
use crate::engine::profile::{Laps, Part};
use crate::objective::{GradLayout, ShardGrad};
use crate::state::{align, narrow};

/// Reduced gradient: the mean over the global batch, with the contents of the reduce headers.
pub struct Reduced {
    /// Reduced gradient, laid out as a shard gradient, with spare capacity behind it.
    pub mean: Tensor,
    /// Sample checksum of all real samples in it.
    pub ledger: u64,
    /// Number of the planned change that all ranks know of; 0 for none.
    pub agreed_plan: u64,
}

/// Reasons why a reduce gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ReduceError {
    /// A collective failed.
    #[error(transparent)]
    Collective(#[from] c10d::Error),
    /// Ranks disagree in their reduce headers.
    #[error("rank {rank} is at {theirs:?} and rank {own_rank} at {ours:?}")]
    Disagreement {
        /// This rank.
        own_rank: usize,
        /// Header of this rank.
        ours: Header,
        /// The other rank.
        rank: usize,
        /// Header of the other rank.
        theirs: Header,
    },
}

/// The ranks of a group, as a reduce sees them.
#[derive(Clone)]
pub struct Peers {
    /// Group of the collectives.
    pub group: Arc<Group>,
    /// Limit of each wait.
    pub timeout: Duration,
    /// Assignment of data shards to the ranks.
    pub shards: ShardMap,
    /// Device of the buffers.
    pub device: Device,
    /// Memory that ranks of one host share.
    pub sharing: Sharing,
}

/// Assignment of data shards to the ranks of a group.
#[derive(Clone, Debug)]
pub struct ShardMap {
    /// V, the number of data shards of the job.
    pub data_shards: u32,
    /// Contiguous range of shards of each rank, by rank.
    pub ranges: Vec<Range<u32>>,
    /// This rank.
    pub rank: usize,
}

impl ShardMap {
    /// Data shards of this rank.
    pub fn own(&self) -> Range<u32> {
        self.ranges[self.rank].clone()
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.ranges.len()
    }
}

/// Exchange by which the sums of all ranks are combined.
enum Route {
    /// World size 1: no exchange.
    Alone,
    /// Ranks of one host: each reads the sums of all in place.
    Shared(Shared),
    /// Two ranks: each sends its whole sum, in one round; as many bytes as by chunks.
    Pair(Pair),
    /// Few ranks, or GPUs over NCCL: by chunks, in two collectives of the backend's.
    Chunks(Chunks),
    /// Many ranks: each with few others, in rounds.
    Butterfly(Butterfly),
    /// The backend's own all-reduce.
    Ring(Ring),
}

/// Buffer of the reduced gradient, and the number of samples that it averages.
struct Mean {
    flat: Tensor,
    /// Global batch size. A tensor, because some devices multiply by the inverse of a plain number.
    divisor: Tensor,
}

/// All-reduce within one group of gradients of some layouts, one reduce after the other.
pub struct AllReduce {
    peers: Peers,
    reduces: Vec<Reduce>,
    /// Index of the reduce under way, or of the last one.
    at: usize,
    /// Memory of large gradients that no reduce uses now.
    free: Vec<Tensor>,
    /// Number of floats that any reduce needs for a gradient.
    room: usize,
    /// Header of this rank in the reduce under way.
    header: Header,
}

/// Reduce of gradients of one layout, and of all that are alike but for fewer scalars.
struct Reduce {
    sum: TreeSum<ShardGrad>,
    route: Route,
    mean: Mean,
}

/// Length from which on gradients of all layouts share their memory, in floats: for shorter ones new
/// views would take more time than the memory is worth.
const LARGE: usize = 1 << 22;

impl Summand for ShardGrad {
    fn add(&mut self, right: &ShardGrad) {
        // Parameters of a network have views in this memory; the sum is no part of any graph.
        let _ = no_grad(|| self.flat.g_add_(&right.flat));
    }
}

/// Largest number of ranks for which two collectives take less time than more rounds of fewer messages.
/// Measured over loopback, where the rounds took 1.2 times as long for 4 ranks, 1.05 for 8, and 0.8 for 16.
const FEW: usize = 8;

/// Whether messages go in rounds: then with the memory that this rank shares with some others, if any.
fn rounds_of(peers: &Peers, world_size: usize) -> Option<Option<Memory>> {
    match &peers.sharing {
        Sharing::Some(memory) => Some(memory.clone()),
        _ => (peers.group.exchanges() && world_size > FEW).then_some(None),
    }
}

/// Length of the part of a sum that each rank finishes. Whole alignments: a chunk that ended between would be
/// divided by a kernel's scalar tail (D8).
fn chunk_of(len: usize, world_size: usize) -> usize {
    align(len.div_ceil(world_size))
}

impl Route {
    /// Chooses the exchange for gradients of one layout, and allocates its buffers. Returns it with the
    /// number of floats of a sum.
    fn new(peers: &Peers, layout: &GradLayout, reduction: Reduction) -> Result<(Route, usize), c10d::Error> {
        let (shards, device) = (&peers.shards, peers.device);
        let world_size = shards.world_size();
        let len = align(layout.len());
        // For ranges of more nodes a + b over two ranks would be another order than the tree's (D4).
        let has_one_node = |range: &Range<u32>| cover(range.clone(), shards.data_shards).len() == 1;
        Ok(match world_size {
            1 => (Route::Alone, len),
            _ if reduction == Reduction::Ring => (Route::Ring(Ring::new(world_size, len, device)?), len),
            _ if let Sharing::All(memory) = &peers.sharing => {
                let shared = Shared::new(memory.clone(), shards.clone(), layout.len());
                let len = shared.len;
                (Route::Shared(shared), len)
            }
            2 if shards.ranges.iter().all(has_one_node) => {
                (Route::Pair(Pair::new(shards.rank, len, device)?), len)
            }
            _ if let Some(memory) = rounds_of(peers, world_size) => {
                let butterfly = Butterfly::new(shards, memory, layout.len(), device)?;
                let len = butterfly.len();
                (Route::Butterfly(butterfly), len)
            }
            _ => {
                let chunk = chunk_of(layout.len(), world_size);
                (Route::Chunks(Chunks::new(shards.clone(), chunk, device)?), world_size * chunk)
            }
        })
    }
}

impl AllReduce {
    /// Allocates the buffers for gradients of these layouts, over `global_batch` samples each.
    pub fn new(
        peers: Peers,
        layouts: &[GradLayout],
        global_batch: u64,
        reduction: Reduction,
    ) -> Result<AllReduce, c10d::Error> {
        let routes = layouts.iter().map(|layout| Route::new(&peers, layout, reduction));
        let routes = routes.collect::<Result<Vec<_>, _>>()?;
        let room = routes.iter().map(|(_, len)| *len).max().unwrap_or(0);
        #[allow(clippy::cast_precision_loss)] // a batch is far below 2^24
        // One number for all members: V x b follows from the job.
        let divisor = Tensor::from(global_batch as f32).to_device(peers.device);
        // One memory for all of them, as each is used up before the next reduce.
        let all = Tensor::zeros([signed(room)], (Kind::Float, peers.device));
        let reduce = |(route, len)| Reduce {
            sum: TreeSum::new(peers.shards.data_shards),
            route,
            mean: Mean { flat: narrow(&all, 0..len), divisor: divisor.shallow_clone() },
        };
        let reduces = routes.into_iter().map(reduce).collect();
        Ok(AllReduce { peers, reduces, at: 0, free: Vec::new(), room, header: Header::default() })
    }

    /// Whether there are other ranks to wait for.
    pub fn has_peers(&self) -> bool {
        !matches!(self.reduces[self.at].route, Route::Alone)
    }

    /// Begins a reduce of gradients of a layout, by its index. Fails if the group was aborted.
    pub fn begin(&mut self, index: usize) -> Result<(), ReduceError> {
        // A rank that is alone exchanges nothing, so no collective would report the abort.
        if !self.peers.group.is_open() {
            return Err(c10d::Error::Aborted.into());
        }
        // Terms of a reduce that a regroup cut off must not enter this one.
        let last = &mut self.reduces[self.at];
        last.recycle();
        if index != self.at && last.is_large() {
            self.free.extend(std::iter::from_fn(|| last.sum.spare()).map(ShardGrad::into_memory));
        }
        self.at = index;
        Ok(())
    }

    /// Returns a buffer for the gradient of a shard, or of it and some behind it, of a layout that the reduce
    /// has room for.
    pub fn buffer(&mut self, layout: &GradLayout, shard: u32) -> ShardGrad {
        let Reduce { sum, route, mean } = &mut self.reduces[self.at];
        if let Route::Shared(shared) = route
            && let Some(place) = shared.place(layout, shard)
        {
            return place;
        }
        // From the reduces before, once they were added. Lent memory is never among them (D6).
        if let Some(spare) = sum.spare() {
            return spare.with_scalars_of(layout);
        }
        let len = mean.flat.numel();
        let room = if len >= LARGE { self.room } else { len };
        let new = || Tensor::zeros([signed(room)], (Kind::Float, self.peers.device));
        ShardGrad::over(layout, self.free.pop_if(|_| len >= LARGE).unwrap_or_else(new), len)
    }

    /// Adds the gradient of a shard of this rank, or of all those under a node. They come in order.
    pub fn add(&mut self, node: Node, grad: ShardGrad) {
        // In order, as the tree adds a neighbour as soon as it is there.
        self.reduces[self.at].sum.push(node, grad);
    }

    /// Sends the sums of this rank's gradients to the other ranks.
    pub fn send(&mut self, header: Header) -> Result<(), ReduceError> {
        // Numbered by update index: the other ranks wait for this rank's sums.
        failpoint::reached("reduce", header.position);
        self.header = header;
        let (group, Reduce { sum, route, mean }) = (&self.peers.group, &mut self.reduces[self.at]);
        let sums = sum.take();
        let sent = match route {
            Route::Alone => {
                // One sum, as the only rank covers the whole tree.
                for (_, sum) in &sums {
                    let _ = no_grad(|| sum.flat.divide_out(&mean.flat, &mean.divisor));
                }
                Ok(())
            }
            Route::Shared(shared) => {
                // The others read them where they lie.
                shared.send(sums, header)?.into_iter().for_each(|spare| sum.recycle(spare));
                return Ok(());
            }
            Route::Pair(pair) => sums.iter().try_for_each(|(_, sum)| pair.send(group, &sum.flat, header)),
            // Goes on in the sums' memory until the end of the wait.
            Route::Butterfly(butterfly) => return Ok(butterfly.send(group, sums, header)?),
            Route::Chunks(chunks) => chunks.send(group, &sums),
            Route::Ring(ring) => ring.send(group, sums.iter().map(|(_, sum)| sum), header),
        };
        // The other routes copied the sums to their own send buffers, so this memory is free before the wait.
        sums.into_iter().for_each(|(_, spare)| sum.recycle(spare));
        Ok(sent?)
    }

    /// Waits for the other ranks, and returns the mean over all shards.
    pub fn wait(&mut self, laps: &mut Laps) -> Result<Reduced, ReduceError> {
        let AllReduce { peers: Peers { group, timeout, .. }, reduces, header, .. } = self;
        let Reduce { sum, route, mean } = &mut reduces[self.at];
        let wait = Wait { group, timeout: *timeout, position: header.position };
        let headers = match route {
            // There is nobody to disagree with, and nothing to wait for.
            Route::Alone => return self.reduced(Folded::of(0, self.header)),
            Route::Butterfly(butterfly) => {
                let folded = butterfly.finish(wait, mean, laps)?;
                butterfly.sums().for_each(|spare| sum.recycle(spare));
                return self.reduced(folded);
            }
            Route::Shared(shared) => shared.finish(wait, mean, laps)?,
            Route::Pair(pair) => {
                // Waits for the other rank: bounded by the reduce limit, and ended at once by an abort.
                let came = arrived(pair.pending(), *timeout, laps)?;
                pair.finish(came, mean)
            }
            Route::Chunks(chunks) => {
                // Waits for all ranks' chunks, which may still compute their shards: bounded as above.
                let came = arrived(chunks.pending(), *timeout, laps)?;
                let gathering = chunks.gather(group, came, *header, mean)?;
                laps.lap(Part::Other);
                // Short: all ranks have the chunks by now, and only divide.
                let came = arrived(Some(gathering), *timeout, laps)?;
                chunks.finish(came, mean)
            }
            Route::Ring(ring) => {
                // Both waits as above, with the headers after the sum.
                let sum = arrived(ring.pending(), *timeout, laps)?;
                let headers = arrived(Some(ring.gather(group)?), *timeout, laps)?;
                ring.finish(sum, headers, mean)
            }
        };
        // From a GPU this waits for all that was enqueued, so no error of it is missed (D7).
        let headers = Header::from_tensor(&headers.to_device(Device::Cpu)).into_iter().enumerate();
        let folded = headers.map(|(rank, header)| Folded::of(rank, header));
        self.reduced(folded.reduce(|all, next| all.fold(&next)).expect("each rank has a header"))
    }

    /// Returns the reduced gradient, if all ranks' headers agree.
    fn reduced(&self, Folded { header, rank, other }: Folded) -> Result<Reduced, ReduceError> {
        let (own_rank, ours) = (self.peers.shards.rank, self.header);
        // Before anything is committed (D9). One rank that differs is named; more may.
        let differs = if header.agrees(&ours) { other } else { Some((rank, header)) };
        if let Some((rank, theirs)) = differs {
            return Err(ReduceError::Disagreement { own_rank, ours, rank, theirs });
        }
        let mean = self.reduces[self.at].mean.flat.shallow_clone();
        Ok(Reduced { mean, ledger: header.ledger, agreed_plan: header.plan })
    }
}

impl Reduce {
    fn is_large(&self) -> bool {
        self.mean.flat.numel() >= LARGE
    }

    /// Recycles the sums of a reduce that was given up.
    fn recycle(&mut self) {
        if let Route::Butterfly(butterfly) = &mut self.route {
            butterfly.sums().for_each(|sum| self.sum.recycle(sum));
        }
        let terms = self.sum.take();
        // Those in shared memory are no spare ones.
        if !matches!(self.route, Route::Shared(_)) {
            terms.into_iter().for_each(|(_, sum)| self.sum.recycle(sum));
        }
    }
}

/// Waits for a collective that is under way, at most `timeout`, and books the time as [`Part::Wait`].
fn arrived<T: Lent>(
    pending: Option<Pending<T>>,
    timeout: Duration,
    laps: &mut Laps,
) -> Result<T, c10d::Error> {
    let came = pending.ok_or(c10d::Error::Aborted)?.wait(timeout);
    laps.lap(Part::Wait);
    came
}

fn signed(n: usize) -> i64 {
    i64::try_from(n).expect("a tensor has fewer than 2^63 elements")
}

#[cfg(test)]
mod tests;
