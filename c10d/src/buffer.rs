//! Memory that can be lent to a collective.
//!
//! 1. A buffer is the only owner of its memory; a collective takes it by value.
//! 2. A collective checks at run time that nothing else refers to the memory, and refuses the buffer if so.
//! 3. Bytes are handed out only while the buffer is borrowed mutably, so no view can be made meanwhile.

use tch::{Device, Kind, Tensor};

use crate::ffi::{at_tensor, shim};
use crate::{Error, error};

/// Contiguous, one-dimensional tensor with no other reference to its memory.
///
/// Lend it to a collective by value; the [`Pending`](crate::Pending) gives it back. While it is
/// lent it cannot be touched:
///
/// ```compile_fail,E0382
/// # fn example(group: &c10d::Group, mut buffer: c10d::Buffer) -> Result<(), c10d::Error> {
/// let pending = group.all_reduce(buffer, c10d::ReduceOp::Sum)?;
/// buffer.update(|tensor| tensor.zero_()); // The group has it.
/// # Ok(()) }
/// ```
///
/// but afterwards it can:
///
/// ```no_run
/// # fn example(group: &c10d::Group, mut buffer: c10d::Buffer) -> Result<(), c10d::Error> {
/// let pending = group.all_reduce(buffer, c10d::ReduceOp::Sum)?;
/// let mut buffer = pending.wait(std::time::Duration::from_secs(10))?;
/// buffer.update(|tensor| tensor.zero_());
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Buffer {
    tensor: Tensor,
}

impl Buffer {
    /// Allocates a buffer of `numel` zeros. On a CPU its first element lies on a 64-byte boundary.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a length beyond 2^63, [`Error::Fatal`] if the device cannot allocate
    /// it.
    pub fn zeros(numel: usize, kind: Kind, device: Device) -> Result<Buffer, Error> {
        // libtorch's sizes are signed.
        let numel = i64::try_from(numel).map_err(|_| Error::Invalid(format!("{numel} elements")))?;
        let tensor = tch::no_grad(|| Tensor::f_zeros([numel], (kind, device)))?;
        Ok(Buffer { tensor })
    }

    /// Takes over a tensor that is contiguous, one-dimensional, without gradient and without other
    /// references.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Aliased`], with the tensor back.
    pub fn from_tensor(tensor: Tensor) -> Result<Buffer, error::Refused<Tensor>> {
        let buffer = Buffer { tensor };
        match buffer.check() {
            Ok(()) => Ok(buffer),
            Err(error) => Err(error::Refused { error, buffers: buffer.tensor }),
        }
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.tensor.numel()
    }

    /// Element type.
    pub fn kind(&self) -> Kind {
        self.tensor.kind()
    }

    /// Device of the memory.
    pub fn device(&self) -> Device {
        self.tensor.device()
    }

    /// Returns the tensor, for reading. A shallow copy or view of it that still lives when the
    /// buffer is lent makes the collective refuse the buffer as [`Error::Aliased`].
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Calls `write` with the tensor, without recording gradients.
    pub fn update<R>(&mut self, write: impl FnOnce(&mut Tensor) -> R) -> R {
        // The closure may replace the tensor or keep a view of it: `check` looks again before the buffer
        // is lent.
        tch::no_grad(|| write(&mut self.tensor))
    }

    /// Unwraps the tensor.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }

    /// Returns the raw bytes of a buffer on a CPU. Borrows the buffer mutably, because a view made
    /// meanwhile could write.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the memory is not a CPU's, [`Error::Aliased`] if something else refers to it.
    pub fn as_bytes(&mut self) -> Result<&[u8], Error> {
        self.as_bytes_mut().map(|bytes| &*bytes)
    }

    /// Returns the raw bytes of a buffer on a CPU, for writing.
    ///
    /// # Errors
    /// As [`as_bytes`](Buffer::as_bytes).
    pub fn as_bytes_mut(&mut self) -> Result<&mut [u8], Error> {
        // A view that an earlier `update` kept could change the bytes while they are borrowed.
        self.check()?;
        // An address in a GPU's memory must not be followed here.
        if self.device() != Device::Cpu {
            return Err(Error::Invalid(format!("bytes of memory on {:?}", self.device())));
        }
        // libtorch may give an empty tensor no memory, and a slice must not begin at a null pointer.
        if self.numel() == 0 {
            return Ok(&mut []);
        }
        let tensor = at_tensor(&self.tensor);
        let (pointer, length) = (shim::data_pointer(tensor)?, shim::byte_length(tensor));
        // SAFETY: the tensor is contiguous CPU memory of `length` bytes, initialised by libtorch and valid
        // while it lives; the check above found no other reference to it, and none can be made without
        // borrowing `self`, which the returned slice borrows mutably.
        Ok(unsafe { std::slice::from_raw_parts_mut(pointer, length) })
    }

    /// Checks that the buffer may be lent or viewed as bytes. The closure passed to `update` may
    /// have changed any of this.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let tensor = at_tensor(&self.tensor);
        if !shim::is_flat(tensor) {
            let what = "a buffer must stay dense, contiguous, one-dimensional and without gradient";
            return Err(Error::Invalid(what.into()));
        }
        // D6: another owner could write while libtorch's threads read.
        if !shim::is_exclusive(tensor) {
            return Err(Error::Aliased);
        }
        Ok(())
    }
}
