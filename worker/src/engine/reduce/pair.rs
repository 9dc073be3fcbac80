//! Exchange between two ranks with one node each: they swap their whole sums in one round, and both compute
//! the whole mean.

use c10d::{Buffer, Error, Group, Pending};
use tch::{Device, Kind, Tensor, no_grad};

use super::Mean;
use super::header::Header;
use crate::state::{ALIGNMENT, narrow};

/// The exchange of two ranks.
pub(super) struct Pair {
    rank: usize,
    /// Number of floats in a sum. The header follows it.
    len: usize,
    /// Send and receive buffers; `None` while they are lent to a collective.
    buffers: Option<(Buffer, Buffer)>,
    pending: Option<Pending<(Buffer, Buffer)>>,
}

impl Pair {
    /// Allocates the buffers for sums of `len` floats.
    pub(super) fn new(rank: usize, len: usize, device: Device) -> Result<Pair, Error> {
        let memory = || Buffer::zeros(len + ALIGNMENT, Kind::Float, device);
        Ok(Pair { rank, len, buffers: Some((memory()?, memory()?)), pending: None })
    }

    /// Sends this rank's sum and header.
    pub(super) fn send(&mut self, group: &Group, sum: &Tensor, header: Header) -> Result<(), Error> {
        // Gone if an earlier reduce failed (D6).
        let (mut own, other) = self.buffers.take().ok_or(Error::Aborted)?;
        own.update(|own| {
            // A copy: the sum's memory takes the next gradients.
            narrow(own, 0..self.len).copy_(sum);
            self.header_of(own).copy_(&header.to_tensor());
        });
        // All to the other rank, and nothing to itself.
        let mut counts = [self.len + ALIGNMENT; 2];
        counts[self.rank] = 0;
        self.pending = Some(group.all_to_all(own, &counts, other, &counts)?);
        Ok(())
    }

    /// Returns the collective that [`Pair::send`] started.
    pub(super) fn pending(&mut self) -> Option<Pending<(Buffer, Buffer)>> {
        self.pending.take()
    }

    /// Adds the two sums, in the order of the ranks. Returns the headers, one a row.
    pub(super) fn finish(&mut self, (own, other): (Buffer, Buffer), mean: &Mean) -> Tensor {
        // By rank and not by owner: a + b is the tree's order only if shard 0 is in a (D4).
        let mut sums = [other.tensor(), other.tensor()];
        sums[self.rank] = own.tensor();
        let headers = Tensor::stack(&sums.map(|sum| self.header_of(sum)), 0);
        no_grad(|| {
            let [left, right] = sums.map(|sum| narrow(sum, 0..self.len));
            // A true division, by a tensor, as in the other routes.
            let _ = left.add_out(&mean.flat, &right).divide_(&mean.divisor);
        });
        // Both are read no more: the headers were copied by `stack`.
        self.buffers = Some((own, other));
        headers
    }

    fn header_of(&self, part: &Tensor) -> Tensor {
        narrow(part, self.len..self.len + ALIGNMENT)
    }
}
