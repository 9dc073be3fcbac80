//! The backend's own all-reduce, whose bits depend on the number of ranks. The headers follow in a second
//! collective.

use c10d::{Buffer, Error, Group, Pending, ReduceOp};
use tch::{Device, Kind, Tensor, no_grad};

use super::header::Header;
use super::{Mean, ShardGrad};
use crate::state::ALIGNMENT;

/// The exchange by the backend's all-reduce.
pub(super) struct Ring {
    sum: Option<Buffer>,
    /// Send and receive buffers of the headers.
    headers: Option<(Buffer, Buffer)>,
    pending: Option<Pending<Buffer>>,
}

impl Ring {
    /// Allocates the buffers for sums of `len` floats.
    pub(super) fn new(world_size: usize, len: usize, device: Device) -> Result<Ring, Error> {
        let memory = |len| Buffer::zeros(len, Kind::Float, device);
        let headers = (memory(ALIGNMENT)?, memory(world_size * ALIGNMENT)?);
        Ok(Ring { sum: Some(memory(len)?), headers: Some(headers), pending: None })
    }

    /// Sends the total of this rank's sums.
    pub(super) fn send<'a>(
        &mut self,
        group: &Group,
        sums: impl Iterator<Item = &'a ShardGrad>,
        header: Header,
    ) -> Result<(), Error> {
        let mut own = self.sum.take().ok_or(Error::Aborted)?;
        for (place, sum) in sums.enumerate() {
            // The first is copied and not added to zeros, which would lose the sign of -0.0.
            own.update(|own| if place == 0 { own.copy_(&sum.flat) } else { drop(own.g_add_(&sum.flat)) });
        }
        if let Some((own, _)) = &mut self.headers {
            // Before the first collective: it is the header of this phase, whatever the next one is.
            own.update(|own| own.copy_(&header.to_tensor()));
        }
        self.pending = Some(group.all_reduce(own, ReduceOp::Sum)?);
        Ok(())
    }

    /// Returns the collective that [`Ring::send`] started.
    pub(super) fn pending(&mut self) -> Option<Pending<Buffer>> {
        self.pending.take()
    }

    /// Starts to gather the headers of all ranks.
    pub(super) fn gather(&mut self, group: &Group) -> Result<Pending<(Buffer, Buffer)>, Error> {
        // In a collective of its own, as a sum would mix the headers.
        let (own, all) = self.headers.take().ok_or(Error::Aborted)?;
        Ok(group.all_gather(own, all)?)
    }

    /// Divides the backend's sum. Returns the headers.
    pub(super) fn finish(&mut self, sum: Buffer, headers: (Buffer, Buffer), mean: &Mean) -> Tensor {
        // From the lent memory, which came back with success, into the mean's own.
        let _ = no_grad(|| sum.tensor().divide_out(&mean.flat, &mean.divisor));
        // A view of the receive buffer: it is decoded before the next reduce lends it.
        let rows = headers.1.tensor().shallow_clone();
        (self.sum, self.headers) = (Some(sum), Some(headers));
        rows
    }
}
