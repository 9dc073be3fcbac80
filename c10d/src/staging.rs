//! Copies that travel in place of buffers that a backend cannot carry itself.
//!
//! 1. Only the copies are lent: libtorch never has the memory of the buffers themselves.
//! 2. A buffer is copied when the operation is launched, after all that its device was told to do before, and
//!    written when the operation is waited for and has succeeded, never from another thread.

use tch::{Device, Tensor};

use crate::{Buffer, Error};

/// What an operation does with a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// Reads it.
    Read,
    /// Writes all of it.
    Written,
    /// Reads and writes it.
    Both,
}

/// The buffers of an operation, while copies of them travel.
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
            if *used != Use::Written {
                write(&mut copy, buffer.tensor())?;
            }
            Ok(copy)
        });
        match copies.collect() {
            Ok(copies) => Ok((Staged { buffers, uses }, copies)),
            Err(error) => Err((error, buffers)),
        }
    }

    /// The buffers, with what the copies came to.
    pub(crate) fn finish(mut self, copies: &[Buffer]) -> Result<Vec<Buffer>, Error> {
        for ((buffer, used), copy) in self.buffers.iter_mut().zip(self.uses).zip(copies) {
            if *used != Use::Read {
                write(buffer, copy.tensor())?;
            }
        }
        Ok(self.buffers)
    }

    /// The buffers, as they were.
    pub(crate) fn into_buffers(self) -> Vec<Buffer> {
        self.buffers
    }
}

/// Copies a whole tensor; the calling thread waits for it.
fn write(to: &mut Buffer, from: &Tensor) -> Result<(), Error> {
    to.update(|to| to.f_copy_(from).map(drop)).map_err(Error::from)
}
