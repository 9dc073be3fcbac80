//! Exchange between any number of ranks in rounds (recursive halving and doubling; Thakur, Rabenseifner and
//! Gropp, 2005): towards the root of the tree each pair of nodes shares the work on their parent, and back
//! from it the parts of the mean take the same way. Of W ranks with one shard each, a rank talks to log2 W
//! others.
//!
//! The headers are folded on the way, so what a rank learns of all others has one length.
//!
//! Messages between ranks that share memory go through it, all others over the network, at the same time.

mod near;
mod plan;

use std::collections::BTreeMap;

use c10d::{Buffer, Error, Group, Pending};
use ganglion_proto::failpoint;
use tch::{Device, Kind, Tensor, no_grad};

use self::near::{Came, Near};
use self::plan::{Message, Part, Plan, Round};
use super::header::{FOLDED, Folded, Header};
use super::shared::Memory;
use super::tree::Node;
use super::{Mean, ShardGrad, ShardMap, Wait, arrived};
use crate::engine::profile::{Laps, Part as Lap};
use crate::state::{align, narrow};

/// The exchange by rounds.
pub(super) struct Butterfly {
    plan: Plan,
    rank: usize,
    /// Number of floats in a chunk.
    chunk: usize,
    /// Sums over this rank's own shards, by node; sums over more ranks are made in their memory.
    sums: Vec<ShardGrad>,
    /// Headers of the ranks under each node.
    headers: BTreeMap<Node, Folded>,
    /// Messages through memory. The plan has the others.
    near: Option<Near>,
    /// Send and receive buffers of all rounds; `None` while they are lent to a collective.
    buffers: Option<(Buffer, Buffer)>,
    pending: Option<Pending<(Buffer, Buffer)>>,
}

/// Direction of a round.
#[derive(Clone, Copy)]
enum Way<'a> {
    /// Towards the root: parts of sums, those of a node behind its header.
    Towards,
    /// Back from it: parts of the mean, behind the header of the root.
    Back(&'a Mean),
}

impl Way<'_> {
    fn is_back(self) -> bool {
        matches!(self, Way::Back(_))
    }
}

impl Butterfly {
    /// Allocates the buffers for gradients of `len` floats. `memory` is shared with some of the ranks.
    pub(super) fn new(
        shards: &ShardMap,
        memory: Option<Memory>,
        len: usize,
        device: Device,
    ) -> Result<Butterfly, Error> {
        let mut plan = Plan::new(shards);
        let chunk = chunk_of(&plan, len);
        let near = memory.map(|memory| Near::new(memory, shards, &mut plan, chunk));
        Ok(Butterfly { near, ..Butterfly::with(plan, shards.rank, chunk, device)? })
    }

    /// Number of floats that a slot of memory needs that these ranks share, for gradients of `len` floats.
    pub(super) fn slot(shards: &ShardMap, ranks: &[usize], len: usize) -> usize {
        Near::slot(shards, ranks, chunk_of(&Plan::new(shards), len))
    }

    /// Allocates the buffers for chunks of `chunk` floats, with no memory that is shared.
    fn with(plan: Plan, rank: usize, chunk: usize, device: Device) -> Result<Butterfly, Error> {
        let most = |messages: fn(&Round) -> &Vec<Message>| {
            let rounds = plan.towards.iter().chain(&plan.back);
            let len = |round| messages(round).iter().map(|message| floats(message, chunk)).sum();
            rounds.map(len).max().unwrap_or(0)
        };
        let memory = |len: usize| Buffer::zeros(len, Kind::Float, device);
        let buffers = (memory(most(|round| &round.sends))?, memory(most(|round| &round.receives))?);
        let (sums, headers) = (Vec::new(), BTreeMap::new());
        let (near, buffers) = (None, Some(buffers));
        Ok(Butterfly { plan, rank, chunk, sums, headers, near, buffers, pending: None })
    }

    /// Number of floats in a sum, with the padding of its last chunk.
    pub(super) fn len(&self) -> usize {
        self.plan.chunks * self.chunk
    }

    /// Takes this rank's sums, and starts the first round.
    pub(super) fn send(
        &mut self,
        group: &Group,
        sums: Vec<(Node, ShardGrad)>,
        header: Header,
    ) -> Result<(), Error> {
        self.begin(sums, header);
        self.launch(group, 0, Way::Towards)
    }

    fn begin(&mut self, sums: Vec<(Node, ShardGrad)>, header: Header) {
        // The first node tells of the samples of all.
        let silent = Header { ledger: 0, ..header };
        let headers = std::iter::once(header).chain(std::iter::repeat(silent));
        let folded =
            |((node, _), header): (&(Node, ShardGrad), Header)| (*node, Folded::of(self.rank, header));
        self.headers = sums.iter().zip(headers).map(folded).collect();
        self.sums = sums.into_iter().map(|(_, sum)| sum).collect();
    }

    /// Goes through the rounds, and writes the mean. Returns what the headers of all ranks say.
    pub(super) fn finish(&mut self, wait: Wait<'_>, mean: &Mean, laps: &mut Laps) -> Result<Folded, Error> {
        for level in 0..self.plan.towards.len() {
            // The first one is under way already.
            if level > 0 {
                self.launch(wait.group, level, Way::Towards)?;
            }
            self.take(level, Way::Towards, wait, laps)?;
            self.join(level);
        }
        self.divide(mean);
        laps.lap(Lap::Other);
        // The other ranks wait for this rank's chunks of the mean.
        failpoint::reached("gather", wait.position);
        for round in 0..self.plan.back.len() {
            self.launch(wait.group, round, Way::Back(mean))?;
            self.take(round, Way::Back(mean), wait, laps)?;
        }
        // Made here, or by one of those who sent parts of the mean.
        Ok(self.headers[&self.plan.root])
    }

    /// Sums that are no longer needed.
    pub(super) fn sums(&mut self) -> impl Iterator<Item = ShardGrad> + '_ {
        self.sums.drain(..)
    }

    fn round(&self, place: usize, way: Way<'_>) -> &Round {
        match way {
            Way::Towards => &self.plan.towards[place],
            Way::Back(_) => &self.plan.back[place],
        }
    }

    /// Starts a round, if this rank has any message in it.
    fn launch(&mut self, group: &Group, place: usize, way: Way<'_>) -> Result<(), Error> {
        let round = self.round(place, way);
        let places = |messages: &[Message]| -> Vec<(usize, usize)> {
            messages.iter().map(|message| (message.rank, floats(message, self.chunk))).collect()
        };
        let (to, from) = (places(&round.sends), places(&round.receives));
        if !to.is_empty() || !from.is_empty() {
            // Gone if an earlier reduce failed: they belong to the old group (D6).
            let (mut own, received) = self.buffers.take().ok_or(Error::Aborted)?;
            own.update(|own| self.pack(&self.round(place, way).sends, way, own));
            self.pending = Some(group.exchange(own, &to, received, &from)?);
        }
        if let Some(near) = &self.near {
            let round = near.round(place, way.is_back());
            if round.is_busy {
                let exchange = near.memory.lock();
                let slot = exchange.own()?;
                no_grad(|| self.pack(&round.sends, way, &slot));
                exchange.publish();
            }
        }
        Ok(())
    }

    /// Waits for the messages of a round, and takes them in.
    fn take(&mut self, place: usize, way: Way<'_>, wait: Wait<'_>, laps: &mut Laps) -> Result<(), Error> {
        // Both wait for the partners: bounded by the reduce limit, and ended at once by an abort.
        let headers = self.take_near(place, way, wait, laps)?;
        self.headers.extend(headers);
        let Some(pending) = self.pending.take() else { return Ok(()) };
        let buffers = arrived(Some(pending), wait.timeout, laps)?;
        let (mut at, mut headers) = (0, Vec::new());
        for message in &self.round(place, way).receives {
            let len = floats(message, self.chunk);
            headers.extend(self.unpack(message, way, &narrow(buffers.1.tensor(), at..at + len)));
            at += len;
        }
        self.headers.extend(headers);
        self.buffers = Some(buffers);
        Ok(())
    }

    /// Takes in what the other ranks of the host have for this one; returns the headers.
    fn take_near(
        &self,
        place: usize,
        way: Way<'_>,
        wait: Wait<'_>,
        laps: &mut Laps,
    ) -> Result<Vec<(Node, Folded)>, Error> {
        let Some(near) = &self.near else { return Ok(Vec::new()) };
        let round = near.round(place, way.is_back());
        if !round.is_busy {
            return Ok(Vec::new());
        }
        let mut headers = Vec::new();
        let came = near.memory.lock().finish(
            wait.timeout,
            || wait.group.is_open(),
            |slots| {
                laps.lap(Lap::Wait);
                for Came { message, sender, offset } in &round.receives {
                    let theirs = narrow(&slots[*sender], *offset..offset + floats(message, self.chunk));
                    headers.extend(no_grad(|| self.unpack(message, way, &theirs)));
                }
                Ok(())
            },
        );
        if came.is_err() {
            // The ranks are out of step, as after any collective that failed.
            wait.group.aborter().abort();
        }
        came.map(|()| headers)
    }

    /// Node whose header is in front of parts.
    fn head(&self, parts: &[Part], way: Way<'_>) -> Node {
        match way {
            Way::Towards => parts[0].node,
            Way::Back(_) => self.plan.root,
        }
    }

    /// Writes messages, one after the other.
    fn pack(&self, messages: &[Message], way: Way<'_>, out: &Tensor) {
        let mut at = 0;
        let mut write = |from: &Tensor| {
            let len = from.numel();
            narrow(out, at..at + len).copy_(from);
            at += len;
        };
        for parts in messages.iter().flat_map(Message::by_node) {
            write(&self.headers[&self.head(parts, way)].to_tensor());
            for part in parts {
                // Copies, as the rest of the memory is added to while they travel.
                match way {
                    Way::Towards => write(&self.of(&self.sums[part.buffer].flat, part)),
                    Way::Back(mean) => write(&self.of(&mean.flat, part)),
                }
            }
        }
    }

    /// Takes a message in; returns the headers in it.
    fn unpack(&self, message: &Message, way: Way<'_>, received: &Tensor) -> Vec<(Node, Folded)> {
        let mut at = 0;
        let mut next = |len: usize| {
            at += len;
            narrow(received, at - len..at)
        };
        let len = |part: &Part| part.chunks.len() * self.chunk;
        let mut headers = Vec::new();
        for parts in message.by_node() {
            headers.push((self.head(parts, way), Folded::from_tensor(&next(FOLDED))));
            for part in parts {
                let theirs = next(len(part));
                match way {
                    Way::Towards => self.add(part, part.node, &theirs),
                    Way::Back(mean) => self.of(&mean.flat, part).copy_(&theirs),
                }
            }
        }
        headers
    }

    /// Adds what lies on this rank, and makes the parents' headers.
    fn join(&mut self, level: usize) {
        let Round { adds, joins, .. } = &self.plan.towards[level];
        for (part, from) in adds {
            self.add(part, part.node.sibling(), &self.of(&self.sums[*from].flat, part));
        }
        for (node, has_sibling) in joins {
            let [left, right] = node.parent().children();
            let folded = match has_sibling {
                true => self.headers[&left].fold(&self.headers[&right]),
                false => self.headers[node],
            };
            self.headers.insert(node.parent(), folded);
        }
    }

    /// Adds the chunks of a node to those that this rank has of its sibling.
    fn add(&self, part: &Part, node: Node, theirs: &Tensor) {
        let ours = self.of(&self.sums[part.buffer].flat, part);
        // Left plus right, as in the tree.
        let [left, right] = if node.is_right() { [&ours, theirs] } else { [theirs, &ours] };
        let _ = no_grad(|| left.add_out(&ours, right));
    }

    /// Writes this rank's chunks of the mean.
    fn divide(&self, mean: &Mean) {
        for part in &self.plan.finished {
            // The one division by the global batch (D4), by a tensor, so that it is a true one on all
            // devices.
            let sum = self.of(&self.sums[part.buffer].flat, part);
            let _ = no_grad(|| sum.divide_out(&self.of(&mean.flat, part), &mean.divisor));
        }
    }

    /// Floats of a part, in a buffer of a whole sum.
    fn of(&self, flat: &Tensor, part: &Part) -> Tensor {
        narrow(flat, part.chunks.start * self.chunk..part.chunks.end * self.chunk)
    }
}

/// Length of a chunk. Whole alignments, as in the other routes (D8).
fn chunk_of(plan: &Plan, len: usize) -> usize {
    align(len.div_ceil(plan.chunks))
}

/// Number of floats in a message.
fn floats(message: &Message, chunk: usize) -> usize {
    let of_node = |parts: &[Part]| FOLDED + parts.iter().map(|part| part.chunks.len() * chunk).sum::<usize>();
    message.by_node().map(of_node).sum()
}

#[cfg(test)]
mod tests;
