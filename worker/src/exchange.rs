//! Summing leaves over all data shards, and with them agreeing on where everyone is.
//!
//! Each rank sums the leaves of its own shards up to the maximal nodes of the tree. Then, by chunks, it sends every other
//! rank its chunk of these sums, finishes its own chunk in tree order, divides it once by the global batch, and gathers all
//! chunks. Two ranks with one node each send each other the whole sum instead, and both finish all of it: as many bytes, in
//! one round. The result has the same bits either way, and for any number of ranks. A job may ask for the backend's own
//! all-reduce instead, whose bits depend on the number of ranks.
//!
//! 1. A rank sends its chunk of the mean only after it committed the phase before (the call order gives that), so ranks
//!    differ by one phase at most.
//! 2. With the chunk goes a [`Trailer`]; a reduce whose trailers differ is an error and is never committed.
//! 3. Buffers lent to a collective that failed are gone; a new group has new ones.

use std::ops::Range;
use std::time::Duration;

use c10d::{Buffer, Group, Lent, Pending, ReduceOp};
use ganglion_proto::failpoint;
use ganglion_proto::job::Reduction;
use tch::{Device, Kind, Tensor, no_grad};

use crate::phase::{LeafBuffer, LeafLayout};
use crate::profile::Part;
use crate::state::{ALIGNMENT, align, narrow};
use crate::tree::{Node, cover, fold};

/// What a rank says of itself with each reduce. All ranks must agree on all but the last field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trailer {
    /// The generation it trains in.
    pub generation: u64,
    /// The phases it has committed.
    pub position: u64,
    /// Hash of what its last commit made.
    pub fingerprint: u64,
    /// The planned change that it knows of; 0 for none. A change happens when all know of the same.
    pub plan: u64,
    /// Hash sum of the real samples in its leaves of this phase.
    pub ledger: u64,
}

/// The mean leaf over the global batch, and what came with it.
pub struct Reduced {
    /// Laid out as a leaf, with room to spare behind it.
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
        ours: Trailer,
        /// The other rank.
        rank: usize,
        /// What that says.
        theirs: Trailer,
    },
    /// A leaf could not be computed.
    #[error("{0}")]
    Leaf(String),
}

impl<T> From<c10d::Refused<T>> for ReduceError {
    fn from(refused: c10d::Refused<T>) -> Self {
        ReduceError::Collective(refused.error)
    }
}

/// How data shards are dealt to the ranks of a group.
#[derive(Clone, Debug)]
pub struct Deal {
    /// V.
    pub data_shards: u32,
    /// Each rank's shards.
    pub shards: Vec<Range<u32>>,
    /// This rank.
    pub rank: usize,
}

impl Deal {
    /// The shards of this rank.
    pub fn own(&self) -> Range<u32> {
        self.shards[self.rank].clone()
    }

    fn world_size(&self) -> usize {
        self.shards.len()
    }
}

/// What happens in a reduce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A part of the work is done.
    Done(Part),
    /// What this rank contributes is on its way: there is time for other work before the others have answered.
    Sent,
}

/// How sums get to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// There are no others.
    Alone,
    /// The whole sum, in one round.
    Whole,
    /// By chunks, in two rounds.
    Chunks,
    /// By the backend's all-reduce; the trailers follow.
    Ring,
}

/// Reduces leaves of one module's phases within one group.
pub struct Exchange {
    deal: Deal,
    route: Route,
    layout: LeafLayout,
    divisor: Tensor,
    device: Device,
    /// Floats that a rank finishes.
    chunk: usize,
    /// Each rank's nodes.
    nodes: Vec<Vec<Node>>,
    pool: Vec<LeafBuffer>,
    lent: Option<Lendable>,
    mean: Tensor,
}

/// What collectives borrow. What a route does not need is empty.
struct Lendable {
    /// By destination, then by node: that destination's chunk of the node's sum. Or this rank's trailer alone.
    sums: Buffer,
    /// By node, over all ranks: this rank's chunk. Or the other rank's part.
    received: Buffer,
    /// This rank's chunk of the mean, or its whole sum; and its trailer, unless that goes alone.
    part: Buffer,
    /// By rank: its part, or its trailer.
    gathered: Buffer,
}

impl Exchange {
    /// Memory for reduces of one module's leaves, `global_batch` samples each.
    pub fn new(
        deal: Deal,
        layout: LeafLayout,
        global_batch: u64,
        reduction: Reduction,
        device: Device,
    ) -> Result<Exchange, c10d::Error> {
        let world_size = deal.world_size();
        let nodes: Vec<Vec<Node>> =
            deal.shards.iter().map(|range| cover(range.clone(), deal.data_shards)).collect();
        let route = match world_size {
            1 => Route::Alone,
            _ if reduction == Reduction::Ring => Route::Ring,
            2 if nodes.iter().all(|nodes| nodes.len() == 1) => Route::Whole,
            _ => Route::Chunks,
        };
        let by_chunks = usize::from(route == Route::Chunks);
        let whole = usize::from(route == Route::Whole);
        let ring = usize::from(route == Route::Ring);
        let chunk = align(layout.len().div_ceil(if route == Route::Chunks { world_size } else { 1 }));
        let all_nodes: usize = nodes.iter().map(Vec::len).sum();
        let zeros = |numel| Buffer::zeros(numel, Kind::Float, device);
        let lent = Lendable {
            sums: zeros(by_chunks * world_size * nodes[deal.rank].len() * chunk + ring * ALIGNMENT)?,
            received: zeros(by_chunks * all_nodes * chunk + whole * (chunk + ALIGNMENT))?,
            part: zeros((by_chunks + whole) * (chunk + ALIGNMENT) + ring * chunk)?,
            gathered: zeros(world_size * (by_chunks * (chunk + ALIGNMENT) + ring * ALIGNMENT))?,
        };
        // The divisor is a tensor, because some devices multiply by the inverse of a plain number.
        #[allow(clippy::cast_precision_loss)]
        let divisor = Tensor::from(global_batch as f32).to_device(device);
        let capacity = if route == Route::Chunks { world_size * chunk } else { chunk };
        let mean = Tensor::zeros([signed(capacity)], (Kind::Float, device));
        Ok(Exchange {
            deal,
            route,
            layout,
            divisor,
            device,
            chunk,
            nodes,
            pool: Vec::new(),
            lent: Some(lent),
            mean,
        })
    }

    /// The layout of the leaves.
    pub fn layout(&self) -> &LeafLayout {
        &self.layout
    }

    /// Where the leaves are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Sums the leaves of all shards and divides by the global batch. `leaf` fills a buffer with the leaf of a shard; `on`
    /// hears of what happens.
    pub fn reduce(
        &mut self,
        group: &Group,
        timeout: Duration,
        trailer: Trailer,
        mut leaf: impl FnMut(u32, &mut LeafBuffer) -> Result<(), String>,
        mut on: impl FnMut(Moment) -> Result<(), ReduceError>,
    ) -> Result<Reduced, ReduceError> {
        // A rank that is alone exchanges nothing, so nothing else would tell it.
        if !group.is_open() {
            return Err(c10d::Error::Aborted.into());
        }
        let mut lent = self.lent.take().ok_or(c10d::Error::Aborted)?;
        let sums = self.sum_own_leaves(&mut leaf)?;
        // Numbered by position: the others wait for this rank's sums, then for its chunk of the mean.
        failpoint::reached("reduce", trailer.position);
        on(Moment::Done(Part::Compute))?;
        let reduced = match self.route {
            // Nobody is waited for, so nothing is gained by other work now.
            Route::Alone => Ok(self.finish_alone(sums, trailer)),
            Route::Whole => {
                self.lay_out_whole(sums, trailer, &mut lent.part);
                lent = self.swap(group, timeout, lent, &mut on)?;
                self.finish_whole(&lent, trailer)
            }
            Route::Chunks => {
                self.lay_out(sums, &mut lent.sums);
                lent = self.scatter(group, timeout, lent, &mut on)?;
                self.finish_own_chunk(&mut lent.received, &mut lent.part, trailer);
                failpoint::reached("gather", trailer.position);
                lent = Exchange::gather(group, timeout, lent, &mut on)?;
                self.read(&lent.gathered, trailer)
            }
            Route::Ring => {
                self.lay_out_ring(sums, trailer, &mut lent);
                lent = Exchange::all_reduce(group, timeout, lent, &mut on)?;
                self.finish_ring(&lent, trailer)
            }
        };
        self.lent = Some(lent);
        on(Moment::Done(Part::Other))?;
        reduced
    }

    /// Sends each rank its chunk of the sums.
    fn scatter(
        &self,
        group: &Group,
        timeout: Duration,
        mut lent: Lendable,
        on: &mut impl FnMut(Moment) -> Result<(), ReduceError>,
    ) -> Result<Lendable, ReduceError> {
        let chunks = |nodes: &Vec<Node>| nodes.len() * self.chunk;
        let sent = vec![chunks(&self.nodes[self.deal.rank]); self.deal.world_size()];
        let received: Vec<usize> = self.nodes.iter().map(chunks).collect();
        let pending = group.all_to_all(lent.sums, &sent, lent.received, &received)?;
        (lent.sums, lent.received) = Exchange::wait_for_first(pending, timeout, on)?;
        Ok(lent)
    }

    /// Gives each of two ranks the other's part.
    fn swap(
        &self,
        group: &Group,
        timeout: Duration,
        mut lent: Lendable,
        on: &mut impl FnMut(Moment) -> Result<(), ReduceError>,
    ) -> Result<Lendable, ReduceError> {
        let mut counts = [self.chunk + ALIGNMENT; 2];
        counts[self.deal.rank] = 0;
        let pending = group.all_to_all(lent.part, &counts, lent.received, &counts)?;
        (lent.part, lent.received) = Exchange::wait_for_first(pending, timeout, on)?;
        Ok(lent)
    }

    /// Sums the ranks' sums in the backend's order, and gathers their trailers.
    fn all_reduce(
        group: &Group,
        timeout: Duration,
        mut lent: Lendable,
        on: &mut impl FnMut(Moment) -> Result<(), ReduceError>,
    ) -> Result<Lendable, ReduceError> {
        let reducing = group.all_reduce(lent.part, ReduceOp::Sum)?;
        lent.part = Exchange::wait_for_first(reducing, timeout, on)?;
        (lent.sums, lent.gathered) = group.all_gather(lent.sums, lent.gathered)?.wait(timeout)?;
        on(Moment::Done(Part::Wait))?;
        Ok(lent)
    }

    /// Waits for the first round of a reduce, under which there is time for other work.
    fn wait_for_first<T: Lent>(
        pending: Pending<T>,
        timeout: Duration,
        on: &mut impl FnMut(Moment) -> Result<(), ReduceError>,
    ) -> Result<T, ReduceError> {
        on(Moment::Done(Part::Other))?;
        on(Moment::Sent)?;
        let buffers = pending.wait(timeout)?;
        on(Moment::Done(Part::Wait))?;
        Ok(buffers)
    }

    /// Gives every rank the parts of all.
    fn gather(
        group: &Group,
        timeout: Duration,
        mut lent: Lendable,
        on: &mut impl FnMut(Moment) -> Result<(), ReduceError>,
    ) -> Result<Lendable, ReduceError> {
        let pending = group.all_gather(lent.part, lent.gathered)?;
        on(Moment::Done(Part::Other))?;
        (lent.part, lent.gathered) = pending.wait(timeout)?;
        on(Moment::Done(Part::Wait))?;
        Ok(lent)
    }

    /// The sums of this rank's nodes.
    fn sum_own_leaves(
        &mut self,
        leaf: &mut impl FnMut(u32, &mut LeafBuffer) -> Result<(), String>,
    ) -> Result<Vec<LeafBuffer>, ReduceError> {
        let (layout, capacity, device) = (&self.layout, self.mean.numel(), self.device);
        let pool = std::cell::RefCell::new(&mut self.pool);
        let mut compute = |node: Node| -> Result<Option<LeafBuffer>, ReduceError> {
            if node.level > 0 {
                return Ok(None);
            }
            let spare = pool.borrow_mut().pop();
            let mut buffer = spare.unwrap_or_else(|| LeafBuffer::new(layout, capacity, device));
            leaf(node.index, &mut buffer).map_err(ReduceError::Leaf)?;
            Ok(Some(buffer))
        };
        let mut add = |mut left: LeafBuffer, right: LeafBuffer| {
            let _ = no_grad(|| left.flat.g_add_(&right.flat));
            pool.borrow_mut().push(right);
            left
        };
        let sum = |node: &Node| {
            let sum = fold(*node, self.deal.data_shards, &mut compute, &mut add)?;
            Ok(sum.expect("a node of the cover has leaves"))
        };
        self.nodes[self.deal.rank].iter().map(sum).collect()
    }

    /// A rank that is alone has the sum of all leaves.
    fn finish_alone(&mut self, sums: Vec<LeafBuffer>, trailer: Trailer) -> Reduced {
        for sum in sums {
            let _ = no_grad(|| sum.flat.divide_out(&self.mean, &self.divisor));
            self.pool.push(sum);
        }
        self.reduced(&[trailer], trailer)
    }

    /// Puts this rank's one sum where the other gets it from.
    fn lay_out_whole(&mut self, sums: Vec<LeafBuffer>, trailer: Trailer, part: &mut Buffer) {
        for sum in sums {
            part.update(|part| {
                narrow(part, 0..self.chunk).copy_(&sum.flat);
                self.trailer_of(part).copy_(&trailer.to_tensor());
            });
            self.pool.push(sum);
        }
    }

    /// Adds the sums of two ranks, in their order.
    fn finish_whole(&self, lent: &Lendable, ours: Trailer) -> Result<Reduced, ReduceError> {
        let mut parts = [lent.received.tensor(), lent.received.tensor()];
        parts[self.deal.rank] = lent.part.tensor();
        let tails = parts.map(|part| self.trailer_of(part));
        let trailers = self.trailers(&Tensor::stack(&tails, 0), ours)?;
        no_grad(|| {
            let [left, right] = parts.map(|part| narrow(part, 0..self.chunk));
            let _ = left.add_out(&self.mean, &right).divide_(&self.divisor);
        });
        Ok(self.reduced(&trailers, ours))
    }

    /// Puts the sum of this rank's sums where the backend adds to it.
    fn lay_out_ring(&mut self, sums: Vec<LeafBuffer>, trailer: Trailer, lent: &mut Lendable) {
        for (place, sum) in sums.into_iter().enumerate() {
            lent.part.update(
                |part| {
                    if place == 0 { part.copy_(&sum.flat) } else { drop(part.g_add_(&sum.flat)) }
                },
            );
            self.pool.push(sum);
        }
        lent.sums.update(|own| own.copy_(&trailer.to_tensor()));
    }

    /// Divides what the backend has summed.
    fn finish_ring(&self, lent: &Lendable, ours: Trailer) -> Result<Reduced, ReduceError> {
        let trailers = self.trailers(lent.gathered.tensor(), ours)?;
        let _ = no_grad(|| lent.part.tensor().divide_out(&self.mean, &self.divisor));
        Ok(self.reduced(&trailers, ours))
    }

    /// The sum over all nodes, of which each row has one's.
    fn sum_nodes(&self, rows: &Tensor) -> Tensor {
        let nodes: Vec<Node> = self.nodes.iter().flatten().copied().collect();
        let mut at_hand = |node: Node| -> Result<Option<Tensor>, std::convert::Infallible> {
            Ok(nodes.iter().position(|known| *known == node).map(|at| rows.get(signed(at))))
        };
        let mut add = |mut left: Tensor, right: Tensor| no_grad(|| left.g_add_(&right));
        let leaves = self.deal.data_shards;
        match fold(Node::root(leaves), leaves, &mut at_hand, &mut add) {
            Ok(sum) => sum.expect("there is at least one leaf"),
            Err(never) => match never {},
        }
    }

    /// Puts the sums where the others get their chunks from.
    fn lay_out(&mut self, sums: Vec<LeafBuffer>, to: &mut Buffer) {
        let by_destination = [signed(self.deal.world_size()), signed(sums.len()), signed(self.chunk)];
        for (place, sum) in sums.into_iter().enumerate() {
            to.update(|to| {
                let mut place = to.view(by_destination).select(1, signed(place));
                place.copy_(&sum.flat.view([by_destination[0], by_destination[2]]));
            });
            self.pool.push(sum);
        }
    }

    fn finish_own_chunk(&self, received: &mut Buffer, part: &mut Buffer, trailer: Trailer) {
        received.update(|received| {
            let sum = self.sum_nodes(&received.view([-1, signed(self.chunk)]));
            part.update(|part| {
                let _ = sum.divide_out(&narrow(part, 0..self.chunk), &self.divisor);
                self.trailer_of(part).copy_(&trailer.to_tensor());
            });
        });
    }

    fn read(&mut self, gathered: &Buffer, ours: Trailer) -> Result<Reduced, ReduceError> {
        let ranks = signed(self.deal.world_size());
        let rows = gathered.tensor().view([ranks, signed(self.chunk + ALIGNMENT)]);
        let tails = rows.narrow(1, signed(self.chunk), signed(ALIGNMENT)).contiguous();
        let trailers = self.trailers(&tails, ours)?;
        self.mean.view([ranks, signed(self.chunk)]).copy_(&rows.narrow(1, 0, signed(self.chunk)));
        Ok(self.reduced(&trailers, ours))
    }

    /// The place of the trailer in a part.
    fn trailer_of(&self, part: &Tensor) -> Tensor {
        narrow(part, self.chunk..self.chunk + ALIGNMENT)
    }

    /// The trailers of all ranks, which agree; one a row.
    fn trailers(&self, tails: &Tensor, ours: Trailer) -> Result<Vec<Trailer>, ReduceError> {
        let trailers = Trailer::from_tensor(&tails.to_device(Device::Cpu));
        let known = |trailer: &Trailer| Trailer { plan: 0, ledger: 0, ..*trailer };
        match trailers.iter().position(|theirs| known(theirs) != known(&ours)) {
            None => Ok(trailers),
            Some(rank) => {
                let (own_rank, theirs) = (self.deal.rank, trailers[rank]);
                Err(ReduceError::Disagreement { own_rank, ours, rank, theirs })
            }
        }
    }

    fn reduced(&self, trailers: &[Trailer], ours: Trailer) -> Reduced {
        let all_know = trailers.iter().all(|trailer| trailer.plan == ours.plan);
        Reduced {
            mean: self.mean.shallow_clone(),
            ledger: trailers.iter().fold(0, |sum, trailer| sum.wrapping_add(trailer.ledger)),
            agreed_plan: if all_know { ours.plan } else { 0 },
        }
    }
}

fn signed(n: usize) -> i64 {
    i64::try_from(n).expect("a tensor has fewer than 2^63 elements")
}

impl Trailer {
    fn words(self) -> [u64; 8] {
        [self.generation, self.position, self.fingerprint, self.plan, self.ledger, 0, 0, 0]
    }

    /// As [`ALIGNMENT`] floats that are only ever copied.
    fn to_tensor(self) -> Tensor {
        let bytes: Vec<u8> = self.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        Tensor::from_slice(&bytes).view_dtype(Kind::Float)
    }

    /// Reads one trailer from each [`ALIGNMENT`] floats.
    fn from_tensor(tensor: &Tensor) -> Vec<Trailer> {
        let bytes = Vec::<u8>::try_from(tensor.flatten(0, -1).view_dtype(Kind::Uint8));
        let bytes = bytes.expect("a contiguous tensor of bytes on the CPU");
        let word = |row: &[u8], at: usize| {
            u64::from_le_bytes(row[8 * at..8 * (at + 1)].try_into().expect("8 bytes"))
        };
        let trailer = |row: &[u8]| Trailer {
            generation: word(row, 0),
            position: word(row, 1),
            fingerprint: word(row, 2),
            plan: word(row, 3),
            ledger: word(row, 4),
        };
        bytes.chunks_exact(4 * ALIGNMENT).map(trailer).collect()
    }
}

#[cfg(test)]
mod tests;
