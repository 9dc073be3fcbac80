//! Exchange between ranks of one host, through memory that they share: each reads the sums of all in place.
//!
//! Two ranks both compute the whole mean, in one round. More ranks finish a chunk each and read those of the
//! others in a second round. A sum is elementwise, so neither changes a bit.
//!
//! A rank's sums come about in its part of the memory: the gradient of the first shard under a node is
//! written there, and those of the others are added to it.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use c10d::aten::is_in_place;
use c10d::shared::Exchange;
use c10d::{Error, Group};
use ganglion_proto::failpoint;
use tch::{Tensor, no_grad};

use super::butterfly::Butterfly;
use super::header::Header;
use super::tree::{Node, Summand, TreeSum, cover};
use super::{GradLayout, Mean, ShardGrad, ShardMap, chunk_of};
use crate::engine::profile::{Laps, Part};
use crate::state::{ALIGNMENT, align, narrow};

/// Which ranks of a group share memory. All of them know it, so that all take the same route.
#[derive(Clone)]
pub enum Sharing {
    /// None.
    None,
    /// All.
    All(Memory),
    /// Some: this one with those of its host, or with nobody.
    Some(Option<Memory>),
}

/// Memory that some ranks of a group share; all their exchanges go through it, one after the other.
#[derive(Clone)]
pub struct Memory {
    exchange: Arc<Mutex<Exchange>>,
    /// The ranks, in the order of their slots.
    ranks: Arc<[usize]>,
}

impl Memory {
    /// Takes over the exchange between these ranks.
    pub fn new(exchange: Exchange, ranks: &[usize]) -> Memory {
        Memory { exchange: Arc::new(Mutex::new(exchange)), ranks: ranks.into() }
    }

    /// The ranks that share it.
    pub(super) fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Number of floats that a slot needs for reduces of gradients of `len` floats, if `ranks` share it.
    pub fn slot(shards: &ShardMap, ranks: &[usize], len: usize) -> usize {
        if ranks.len() < shards.world_size() {
            return Butterfly::slot(shards, ranks, len);
        }
        let nodes = shards.ranges.iter().map(|range| cover(range.clone(), shards.data_shards).len());
        nodes.max().unwrap_or(1) * padded(shards, len) + ALIGNMENT
    }

    /// Passes `len` floats on, piece by piece: each rank may write a piece to the place that it is given, and
    /// all ranks read what is in the places of all.
    pub(in crate::engine) fn pass(
        &self,
        wait: Wait<'_>,
        len: usize,
        write: impl Fn(&Range<usize>, &Tensor),
        read: impl Fn(&Range<usize>, &[Tensor]),
    ) -> Result<(), Error> {
        let mut exchange = self.lock();
        let passed = pieces(len, exchange.len()).try_for_each(|piece| {
            let place = exchange.own()?;
            no_grad(|| write(&piece, &place));
            exchange.publish();
            exchange.finish(
                wait.timeout,
                || wait.group.is_open(),
                |slots| {
                    no_grad(|| read(&piece, slots));
                    Ok(())
                },
            )
        });
        if passed.is_err() {
            wait.group.aborter().abort();
        }
        passed
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Exchange> {
        // A panic on the way is the end of the process, whatever the memory holds.
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Length of a sum with the padding of its last chunk. Two ranks do not cut it into chunks.
fn padded(shards: &ShardMap, len: usize) -> usize {
    let world_size = shards.world_size();
    if world_size == 2 { align(len) } else { world_size * chunk_of(len, world_size) }
}

/// Splits `len` floats into pieces of at most `most`.
pub(in crate::engine) fn pieces(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(most.max(1)).map(move |start| start..(start + most).min(len))
}

/// Limits of the waits of an exchange.
#[derive(Clone, Copy)]
pub(in crate::engine) struct Wait<'a> {
    /// The group, whose abort ends them.
    pub group: &'a Group,
    /// Longest wait for the other ranks.
    pub timeout: Duration,
    /// Update index at which it happens.
    pub position: u64,
}

/// The exchange through shared memory.
pub(super) struct Shared {
    memory: Memory,
    shards: ShardMap,
    /// Tree nodes whose sums each rank publishes, by rank.
    nodes: Vec<Vec<Node>>,
    /// Number of floats in a sum. The header follows the last one.
    pub(super) len: usize,
    /// Gradients over this rank's memory, for later rounds.
    kept: Vec<ShardGrad>,
}

impl Shared {
    /// Prepares reduces of gradients of `len` floats.
    pub(super) fn new(memory: Memory, shards: ShardMap, len: usize) -> Shared {
        let nodes = shards.ranges.iter().map(|range| cover(range.clone(), shards.data_shards)).collect();
        let len = padded(&shards, len);
        Shared { memory, shards, nodes, len, kept: Vec::new() }
    }

    /// Buffer for the gradient of a shard in the round under way, if it is the first one under a node whose
    /// sum is published: there that sum comes about.
    pub(super) fn place(&mut self, layout: &GradLayout, shard: u32) -> Option<ShardGrad> {
        let is_first = |node: &Node| node.leaves(self.shards.data_shards).start == shard;
        let place = self.nodes[self.shards.rank].iter().position(is_first)?;
        let memory = place_of(&self.memory.lock().own().ok()?, place, self.len);
        let kept = self.kept.iter().position(|kept| is_in_place(&memory, &kept.flat));
        // Reduces of other layouts use the memory too.
        Some(match kept {
            Some(at) => self.kept.swap_remove(at).cleared_for(layout),
            None => ShardGrad::over(layout, memory, self.len),
        })
    }

    /// Publishes this rank's sums and header. Returns sums that lie in other memory.
    pub(super) fn send(
        &mut self,
        sums: Vec<(Node, ShardGrad)>,
        header: Header,
    ) -> Result<Vec<ShardGrad>, Error> {
        let Shared { memory, len, kept, .. } = self;
        let slot = memory.lock().own()?;
        let mut others = Vec::new();
        no_grad(|| {
            for (place, (_, sum)) in sums.into_iter().enumerate() {
                let mut place = place_of(&slot, place, *len);
                if is_in_place(&place, &sum.flat) {
                    kept.push(sum);
                } else {
                    place.copy_(&sum.flat);
                    others.push(sum);
                }
            }
        });
        self.header_of(&slot, self.shards.rank).copy_(&header.to_tensor());
        self.memory.lock().publish();
        Ok(others)
    }

    /// Waits for the sums of all ranks, and computes the mean. Returns the headers, one a row.
    pub(super) fn finish(&self, wait: Wait<'_>, mean: &Mean, laps: &mut Laps) -> Result<Tensor, Error> {
        let finished = self.rounds(&mut self.memory.lock(), wait, mean, laps);
        if finished.is_err() {
            // The ranks are out of step, as after any collective that failed.
            wait.group.aborter().abort();
        }
        finished
    }

    fn rounds(
        &self,
        exchange: &mut Exchange,
        wait: Wait<'_>,
        mean: &Mean,
        laps: &mut Laps,
    ) -> Result<Tensor, Error> {
        let (world_size, rank) = (self.shards.world_size(), self.shards.rank);
        let (chunk, is_open) = (self.len / world_size, || wait.group.is_open());
        // Of two ranks each computes the whole: as many bytes are read as by chunks, and one round is saved.
        let whole = world_size == 2;
        let own = if whole { 0..self.len } else { rank * chunk..(rank + 1) * chunk };
        // Bounded by the reduce limit, and ended at once by an abort or the end of a rank.
        let headers = exchange.finish(wait.timeout, is_open, |slots| {
            laps.lap(Part::Wait);
            let headers = slots.iter().enumerate().map(|(rank, slot)| self.header_of(slot, rank));
            let headers = Tensor::stack(&headers.collect::<Vec<_>>(), 0);
            no_grad(|| self.mean_of(slots, &own, mean));
            Ok(headers)
        })?;
        if whole {
            return Ok(headers);
        }
        narrow(&exchange.own()?, 0..chunk).copy_(&narrow(&mean.flat, own));
        // The other ranks wait for this rank's part of the mean.
        failpoint::reached("gather", wait.position);
        exchange.publish();
        laps.lap(Part::Other);
        // Short: all ranks have the sums by now, and only add.
        exchange.finish(wait.timeout, is_open, |slots| {
            laps.lap(Part::Wait);
            for (other, slot) in slots.iter().enumerate().filter(|(other, _)| *other != rank) {
                narrow(&mean.flat, other * chunk..(other + 1) * chunk).copy_(&narrow(slot, 0..chunk));
            }
            Ok(())
        })?;
        Ok(headers)
    }

    /// Writes a part of the mean.
    fn mean_of(&self, slots: &[Tensor], part: &Range<usize>, mean: &Mean) {
        let own = narrow(&mean.flat, part.clone());
        let mut sum = TreeSum::new(self.shards.data_shards);
        // The sum of all comes about where that of the first ones does.
        let mut room = Some(own.shallow_clone());
        for (nodes, slot) in self.nodes.iter().zip(slots) {
            for (place, node) in nodes.iter().enumerate() {
                let start = place * self.len;
                let read = narrow(slot, start + part.start..start + part.end);
                sum.push(*node, Row::Read(read, room.take()));
            }
        }
        let root = sum.take().pop().expect("all ranks' nodes are the whole tree").1;
        // A true division, by a tensor, as in the other routes.
        let _ = root.tensor().divide_out(&own, &mean.divisor);
    }

    fn header_of(&self, slot: &Tensor, rank: usize) -> Tensor {
        let start = self.nodes[rank].len() * self.len;
        narrow(slot, start..start + ALIGNMENT)
    }
}

/// Place of a sum of `len` floats in this rank's slot, by the index of its node.
fn place_of(slot: &Tensor, index: usize, len: usize) -> Tensor {
    narrow(slot, index * len..(index + 1) * len)
}

/// Term of the sum over all ranks.
enum Row {
    /// In memory of the ranks, which nobody may write; and memory for a sum with it, where there is some.
    Read(Tensor, Option<Tensor>),
    /// Sum of some.
    Sum(Tensor),
}

impl Row {
    fn tensor(&self) -> &Tensor {
        let (Row::Read(tensor, _) | Row::Sum(tensor)) = self;
        tensor
    }
}

impl Summand for Row {
    fn add(&mut self, right: &Row) {
        let right = right.tensor();
        match self {
            Row::Read(left, room) => {
                let sum = room.take().map_or_else(|| &*left + right, |room| left.add_out(&room, right));
                *self = Row::Sum(sum);
            }
            Row::Sum(sum) => {
                let _ = sum.g_add_(right);
            }
        }
    }
}
