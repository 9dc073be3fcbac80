//! Staging: copies sent in place of buffers that a backend cannot carry itself.
//!
//! 1. Only the copies are lent: libtorch never has the memory of the buffers themselves.
//! 2. A buffer is copied when the operation is launched, after all work enqueued on its device
//!    before. It is written when the operation is waited for and has succeeded, never from another
//!    thread.

use tch::{Device, Tensor};

use crate::{Buffer, Error};

/// Access of an operation to a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// Reads the buffer.
    Read,
    /// Writes the whole buffer.
    Written,
    /// Reads and writes the buffer.
    Both,
}

/// Buffers of an operation while copies of them are sent.
pub(crate) struct Staged {
    buffers: Vec<Buffer>,
    uses: &'static [Use],
}

impl Staged {
    /// Makes the copies, on the CPU. Gives the buffers back if that fails.
    pub(crate) fn new(
        buffers: Vec<Buffer>,
        uses: &'static [Use],
    ) -> Result<(Staged, Vec<Buffer>), (Error, Vec<Buffer>)> {
        let copies = buffers.iter().zip(uses).map(|(buffer, used)| {
            let mut copy = Buffer::zeros(buffer.numel(), buffer.kind(), Device::Cpu)?;
            // Its content is about to be replaced, and a copy from a GPU is slow.
            if *used != Use::Written {
                write(&mut copy, buffer.tensor())?;
            }
            Ok(copy)
        });
        match copies.collect() {
            Ok(copies) => Ok((Staged { buffers, uses }, copies)),
            // The copies are dropped: nothing has been lent yet.
            Err(error) => Err((error, buffers)),
        }
    }

    /// Returns the buffers with the result of the copies.
    pub(crate) fn finish(mut self, copies: &[Buffer]) -> Result<Vec<Buffer>, Error> {
        for ((buffer, used), copy) in self.buffers.iter_mut().zip(self.uses).zip(copies) {
            // What was only sent is unchanged.
            if *used != Use::Read {
                write(buffer, copy.tensor())?;
            }
        }
        Ok(self.buffers)
    }

    /// Returns the buffers unchanged.
    pub(crate) fn into_buffers(self) -> Vec<Buffer> {
        self.buffers
    }
}

/// Copies a whole tensor; the calling thread waits for the copy.
fn write(to: &mut Buffer, from: &Tensor) -> Result<(), Error> {
    // A blocking copy: it comes after the work that the device has enqueued, and is over when it
    // returns.
    to.update(|to| to.f_copy_(from).map(drop)).map_err(Error::from)
}
