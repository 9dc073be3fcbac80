//! Exchange between few ranks, in two rounds: each rank sends every other its chunk of the sums,
//! finishes its own chunk in tree order, and gathers all chunks. A sum is elementwise, so cutting it
//! changes no bit.

use c10d::{Buffer, Error, Group, Pending};
use ganglion_proto::failpoint;
use tch::{Device, Kind, Tensor};

use super::header::Header;
use super::tree::{Node, TreeSum, cover};
use super::{Mean, ShardGrad, ShardMap, signed};
use crate::state::{ALIGNMENT, narrow};

/// The exchange by chunks.
pub(super) struct Chunks {
    shards: ShardMap,
    /// Tree nodes whose sums each rank sends, by rank.
    nodes: Vec<Vec<Node>>,
    /// Number of floats in the chunk that a rank finishes.
    chunk: usize,
    /// Send buffer, by destination, then by node: that destination's chunk of the node's sum. Receive
    /// buffer, by node, over all ranks: this rank's chunk.
    scattered: Option<(Buffer, Buffer)>,
    /// Send buffer: this rank's chunk of the mean with its header. Receive buffer: those of all ranks.
    gathered: Option<(Buffer, Buffer)>,
    pending: Option<Pending<(Buffer, Buffer)>>,
}

impl Chunks {
    /// Allocates the buffers for chunks of `chunk` floats.
    pub(super) fn new(shards: ShardMap, chunk: usize, device: Device) -> Result<Chunks, Error> {
        let cover = |range: &std::ops::Range<u32>| cover(range.clone(), shards.data_shards);
        let nodes: Vec<Vec<Node>> = shards.ranges.iter().map(cover).collect();
        let all_nodes: usize = nodes.iter().map(Vec::len).sum();
        let memory = |len| Buffer::zeros(len, Kind::Float, device);
        let world_size = shards.world_size();
        // The header is as long as the alignment, so that each rank's part begins on 64 bytes (D8).
        let part = chunk + ALIGNMENT;
        // The longest buffers of a group, so they are made once, and lent again and again.
        let scattered = (memory(world_size * nodes[shards.rank].len() * chunk)?, memory(all_nodes * chunk)?);
        let gathered = (memory(part)?, memory(world_size * part)?);
        Ok(Chunks {
            shards,
            nodes,
            chunk,
            scattered: Some(scattered),
            gathered: Some(gathered),
            pending: None,
        })
    }

    /// Sends each rank its chunk of this rank's sums.
    pub(super) fn send(&mut self, group: &Group, sums: &[(Node, ShardGrad)]) -> Result<(), Error> {
        // Gone if an earlier reduce failed: they belong to the old group (D6).
        let (mut own, received) = self.scattered.take().ok_or(Error::Aborted)?;
        let by_destination = [signed(self.shards.world_size()), signed(sums.len()), signed(self.chunk)];
        for (place, (_, sum)) in sums.iter().enumerate() {
            own.update(|own| {
                // A copy: the sum's own memory takes the next phase's gradients while this one travels.
                let mut place = own.view(by_destination).select(1, signed(place));
                place.copy_(&sum.flat.view([by_destination[0], by_destination[2]]));
            });
        }
        let chunks = |nodes: &Vec<Node>| nodes.len() * self.chunk;
        // This rank's nodes go to each other rank, one chunk of each.
        let to = vec![chunks(&self.nodes[self.shards.rank]); self.shards.world_size()];
        let from: Vec<usize> = self.nodes.iter().map(chunks).collect();
        self.pending = Some(group.all_to_all(own, &to, received, &from)?);
        Ok(())
    }

    /// Returns the collective that [`Chunks::send`] started.
    pub(super) fn pending(&mut self) -> Option<Pending<(Buffer, Buffer)>> {
        self.pending.take()
    }

    /// Finishes this rank's chunk, and starts to send it to all ranks.
    pub(super) fn gather(
        &mut self,
        group: &Group,
        mut scattered: (Buffer, Buffer),
        header: Header,
        mean: &Mean,
    ) -> Result<Pending<(Buffer, Buffer)>, Error> {
        let (mut own, all) = self.gathered.take().ok_or(Error::Aborted)?;
        scattered.1.update(|received| {
            // In place in the memory that came, which is read no more after this.
            let sum = self.sum_nodes(&received.view([-1, signed(self.chunk)]));
            own.update(|own| {
                // The one division by the global batch (D4), by a tensor, so that it is a true one on
                // all devices.
                let _ = sum.divide_out(&narrow(own, 0..self.chunk), &mean.divisor);
                narrow(own, self.chunk..self.chunk + ALIGNMENT).copy_(&header.to_tensor());
            });
        });
        // Back for the next reduce: the first collective is over.
        self.scattered = Some(scattered);
        // Numbered by update index: the other ranks wait for this rank's chunk of the mean.
        failpoint::reached("gather", header.position);
        Ok(group.all_gather(own, all)?)
    }

    /// Sums over all nodes; each row holds the sum of one.
    fn sum_nodes(&self, rows: &Tensor) -> Tensor {
        let mut sum = TreeSum::new(self.shards.data_shards);
        for (node, row) in self.nodes.iter().flatten().zip(0..) {
            sum.push(*node, rows.get(row));
        }
        // One node is left, since the nodes of all ranks cover the tree.
        let root = sum.take().pop();
        root.expect("all ranks' nodes are the whole tree").1
    }

    /// Joins the chunks into the mean. Returns the headers, one a row.
    pub(super) fn finish(&mut self, gathered: (Buffer, Buffer), mean: &Mean) -> Tensor {
        let (ranks, chunk) = (signed(self.shards.world_size()), signed(self.chunk));
        let rows = gathered.1.tensor().view([ranks, chunk + signed(ALIGNMENT)]);
        let headers = rows.narrow(1, chunk, signed(ALIGNMENT)).contiguous();
        // A copy, since the buffer is lent again while the mean is still read.
        mean.flat.view([ranks, chunk]).copy_(&rows.narrow(1, 0, chunk));
        self.gathered = Some(gathered);
        headers
    }
}
