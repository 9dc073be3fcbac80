//! Summing gradients over all data shards, and with them agreeing on where everyone is.
//!
//! Each rank sums the gradients of its own shards up to the maximal nodes of the tree. How the sums of all
//! ranks come together is a route, chosen once for a group; whatever the number of ranks, the result has the
//! same bits. Only a job that asks for the backend's own all-reduce gets bits that depend on it.
//!
//! A reduce is a straight line: [`begin`](AllReduce::begin), then for each shard
//! [`buffer`](AllReduce::buffer) and [`add`](AllReduce::add), then [`send`](AllReduce::send), then
//! [`wait`](AllReduce::wait). Between the last two there is time for other work.
//!
//! 1. A rank sends its chunk of the mean only after it committed the phase before (the call order gives
//!    that), so ranks differ by one phase at most.
//! 2. With it goes a [`Header`]; a reduce whose headers differ is an error and is never committed.
//! 3. Buffers lent to a collective that failed are gone; a new group has new ones.

mod chunks;
mod header;
mod pair;
mod ring;
pub mod tree;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use c10d::{Group, Lent, Pending};
use ganglion_proto::failpoint;
use ganglion_proto::job::Reduction;
use tch::{Device, Kind, Tensor, no_grad};

use self::chunks::Chunks;
pub use self::header::Header;
use self::pair::Pair;
use self::ring::Ring;
use self::tree::{Node, Summand, TreeSum, cover};
use crate::objective::{GradLayout, ShardGrad};
use crate::profile::{Laps, Part};
use crate::state::align;

/// The mean gradient over the global batch, and what came with it.
pub struct Reduced {
    /// Laid out as a shard's gradient, with room to spare behind it.
    pub mean: Tensor,
    /// The hash sum of all real samples in it.
    pub ledger: u64,
    /// The planned change that all ranks know of; 0 for none.
    pub agreed_plan: u64,
}

/// Why a reduce gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ReduceError {
    /// A collective failed.
    #[error(transparent)]
    Collective(#[from] c10d::Error),
    /// Ranks disagree about where they are or what they hold.
    #[error("rank {rank} is at {theirs:?} and rank {own_rank} at {ours:?}")]
    Disagreement {
        /// This rank.
        own_rank: usize,
        /// What it says.
        ours: Header,
        /// The other rank.
        rank: usize,
        /// What that says.
        theirs: Header,
    },
}

/// The data shards of each rank of a group.
#[derive(Clone, Debug)]
pub struct ShardMap {
    /// V.
    pub data_shards: u32,
    /// Each rank's shards.
    pub ranges: Vec<Range<u32>>,
    /// This rank.
    pub rank: usize,
}

impl ShardMap {
    /// The shards of this rank.
    pub fn own(&self) -> Range<u32> {
        self.ranges[self.rank].clone()
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.ranges.len()
    }
}

/// How the sums of all ranks come together.
enum Route {
    /// There is one rank.
    Alone,
    /// Each of two ranks sends its whole sum, in one round: as many bytes as by chunks.
    Pair(Pair),
    /// By chunks, in two rounds.
    Chunks(Chunks),
    /// By the backend's all-reduce.
    Ring(Ring),
}

/// Memory for the mean, and the number of samples that it is over.
struct Mean {
    flat: Tensor,
    /// The global batch. A tensor, because some devices multiply by the inverse of a plain number.
    divisor: Tensor,
}

/// Reduces the gradients of one network's phases within one group.
pub struct AllReduce {
    group: Arc<Group>,
    timeout: Duration,
    shards: ShardMap,
    layout: GradLayout,
    device: Device,
    sum: TreeSum<ShardGrad>,
    route: Route,
    mean: Mean,
    /// This rank's header of the reduce that is under way.
    header: Header,
}

impl Summand for ShardGrad {
    fn add(&mut self, right: &ShardGrad) {
        let _ = no_grad(|| self.flat.g_add_(&right.flat));
    }
}

impl AllReduce {
    /// Memory for reduces of gradients of one layout, over `global_batch` samples each. No wait is longer
    /// than `timeout`.
    pub fn new(
        group: Arc<Group>,
        timeout: Duration,
        shards: ShardMap,
        layout: GradLayout,
        (global_batch, reduction): (u64, Reduction),
        device: Device,
    ) -> Result<AllReduce, c10d::Error> {
        let world_size = shards.world_size();
        let mut len = align(layout.len());
        let has_one_node = |range: &Range<u32>| cover(range.clone(), shards.data_shards).len() == 1;
        let route = match world_size {
            1 => Route::Alone,
            _ if reduction == Reduction::Ring => Route::Ring(Ring::new(world_size, len, device)?),
            2 if shards.ranges.iter().all(has_one_node) => Route::Pair(Pair::new(shards.rank, len, device)?),
            _ => {
                let chunk = align(layout.len().div_ceil(world_size));
                len = world_size * chunk;
                Route::Chunks(Chunks::new(shards.clone(), chunk, device)?)
            }
        };
        #[allow(clippy::cast_precision_loss)] // a batch is far below 2^24
        let divisor = Tensor::from(global_batch as f32).to_device(device);
        let mean = Mean { flat: Tensor::zeros([signed(len)], (Kind::Float, device)), divisor };
        let (sum, header) = (TreeSum::new(shards.data_shards), Header::default());
        Ok(AllReduce { group, timeout, shards, layout, device, sum, route, mean, header })
    }

    /// The layout of the gradients.
    pub fn layout(&self) -> &GradLayout {
        &self.layout
    }

    /// Where they are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether there are others to wait for.
    pub fn has_peers(&self) -> bool {
        !matches!(self.route, Route::Alone)
    }

    /// Begins a reduce.
    pub fn begin(&mut self) -> Result<(), ReduceError> {
        // A rank that is alone exchanges nothing, so nothing else would tell it.
        if !self.group.is_open() {
            return Err(c10d::Error::Aborted.into());
        }
        self.recycle();
        Ok(())
    }

    /// Memory for the gradient of a shard.
    pub fn buffer(&mut self) -> ShardGrad {
        let new = || ShardGrad::new(&self.layout, self.mean.flat.numel(), self.device);
        self.sum.spare().unwrap_or_else(new)
    }

    /// Adds the gradient of a shard of this rank's. They come in order.
    pub fn add(&mut self, shard: u32, grad: ShardGrad) {
        self.sum.push(Node::leaf(shard), grad);
    }

    /// Sends what was added to the others.
    pub fn send(&mut self, header: Header) -> Result<(), ReduceError> {
        // Numbered by position: the others wait for this rank's sums.
        failpoint::reached("reduce", header.position);
        self.header = header;
        let sums = self.sum.take();
        let sent = match &mut self.route {
            Route::Alone => {
                for (_, sum) in &sums {
                    let _ = no_grad(|| sum.flat.divide_out(&self.mean.flat, &self.mean.divisor));
                }
                Ok(())
            }
            Route::Pair(pair) => {
                sums.iter().try_for_each(|(_, sum)| pair.send(&self.group, &sum.flat, header))
            }
            Route::Chunks(chunks) => chunks.send(&self.group, &sums),
            Route::Ring(ring) => ring.send(&self.group, sums.iter().map(|(_, sum)| sum), header),
        };
        sums.into_iter().for_each(|(_, sum)| self.sum.recycle(sum));
        Ok(sent?)
    }

    /// Waits for the others; the mean over all shards is there then.
    pub fn wait(&mut self, laps: &mut Laps) -> Result<Reduced, ReduceError> {
        let AllReduce { group, timeout, route, mean, header, .. } = self;
        let headers = match route {
            Route::Alone => return self.reduced(&[self.header]),
            Route::Pair(pair) => {
                let came = arrived(pair.pending(), *timeout, laps)?;
                pair.finish(came, mean)
            }
            Route::Chunks(chunks) => {
                let came = arrived(chunks.pending(), *timeout, laps)?;
                let gathering = chunks.gather(group, came, *header, mean)?;
                laps.lap(Part::Other);
                let came = arrived(Some(gathering), *timeout, laps)?;
                chunks.finish(came, mean)
            }
            Route::Ring(ring) => {
                let sum = arrived(ring.pending(), *timeout, laps)?;
                let headers = arrived(Some(ring.gather(group)?), *timeout, laps)?;
                ring.finish(sum, headers, mean)
            }
        };
        self.reduced(&Header::from_tensor(&headers.to_device(Device::Cpu)))
    }

    /// The mean, if all ranks' headers agree.
    fn reduced(&self, headers: &[Header]) -> Result<Reduced, ReduceError> {
        let ours = self.header;
        if let Some(rank) = headers.iter().position(|theirs| !theirs.agrees(&ours)) {
            let (own_rank, theirs) = (self.shards.rank, headers[rank]);
            return Err(ReduceError::Disagreement { own_rank, ours, rank, theirs });
        }
        let all_know = headers.iter().all(|header| header.plan == ours.plan);
        Ok(Reduced {
            mean: self.mean.flat.shallow_clone(),
            ledger: headers.iter().fold(0, |sum, header| sum.wrapping_add(header.ledger)),
            agreed_plan: if all_know { ours.plan } else { 0 },
        })
    }

    /// Takes back what a reduce that was given up had summed.
    fn recycle(&mut self) {
        self.sum.take().into_iter().for_each(|(_, sum)| self.sum.recycle(sum));
    }
}

/// What a collective that is under way gives.
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
