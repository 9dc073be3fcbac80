//! Copies of tensors in host memory.

use std::sync::Mutex;

use tch::{Device, Kind, Tensor, no_grad};

use crate::Error;
use crate::sync::lock;

/// Size from which on the memory of a copy is kept, in bytes.
const LARGE: usize = 2 << 20;

/// Memory of the last large copy that is no longer used, for the next one of the same shape. The system
/// clears memory that is new to a process, and a virtual machine may have to get it first: that took several
/// times as long as a copy.
static SPARE: Mutex<Spare> = Mutex::new(Spare { memory: None, is_kept: true });

struct Spare {
    memory: Option<Tensor>,
    /// Whether the memory of copies is kept at all.
    is_kept: bool,
}

impl Spare {
    fn keep(&mut self, memory: Tensor) {
        if self.is_kept {
            self.memory = Some(memory);
        }
    }
}

/// The bytes of a tensor at one time, in memory of their own on the host.
#[derive(Debug)]
pub struct HostCopy(Tensor);

impl HostCopy {
    /// Gets memory for the first copy of a tensor of `numel` floats, so that making the copy takes no longer
    /// than that of later ones. Does nothing for a small one.
    ///
    /// # Errors
    /// [`Error::Fatal`] if libtorch has no memory.
    pub fn prepare(numel: usize) -> Result<(), Error> {
        let numel = i64::try_from(numel).map_err(|_| Error::Invalid(format!("{numel} floats")))?;
        let memory = Tensor::f_zeros([numel], (Kind::Float, Device::Cpu))?;
        if bytes_of(&memory) >= LARGE {
            lock(&SPARE).keep(memory);
        }
        Ok(())
    }

    /// Frees the memory that is kept for the next copy, and keeps none from now on.
    pub fn keep_no_memory() {
        *lock(&SPARE) = Spare { memory: None, is_kept: false };
    }

    /// Copies a tensor. A large copy goes into the memory of the one before.
    ///
    /// # Errors
    /// [`Error::Fatal`] if libtorch has no memory, or a device fails.
    pub fn of(tensor: &Tensor) -> Result<HostCopy, Error> {
        let fits = |spare: &mut Tensor| spare.size() == tensor.size() && spare.kind() == tensor.kind();
        let spare = lock(&SPARE).memory.take_if(fits);
        let new = || {
            let memory = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?;
            // A GPU writes to memory that cannot move, at several times the speed, and without a second copy.
            if tensor.device().is_cuda() { memory.f_pin_memory(tensor.device()) } else { Ok(memory) }
        };
        let mut copy = spare.map_or_else(new, Ok)?;
        no_grad(|| copy.f_copy_(tensor))?;
        Ok(HostCopy(copy))
    }
}

impl AsRef<[u8]> for HostCopy {
    fn as_ref(&self) -> &[u8] {
        let bytes = bytes_of(&self.0);
        // An empty tensor may have no memory, and a slice must not begin at a null pointer.
        if bytes == 0 {
            return &[];
        }
        // SAFETY: a new tensor on the CPU is contiguous, with `bytes` initialised bytes from `data_ptr` on,
        // which live as long as it does. It is private, and nothing writes to it after `of`.
        unsafe { std::slice::from_raw_parts(self.0.data_ptr().cast::<u8>(), bytes) }
    }
}

impl Drop for HostCopy {
    fn drop(&mut self) {
        if bytes_of(&self.0) >= LARGE {
            // The newest: that of another shape will hardly be asked for again.
            lock(&SPARE).keep(std::mem::replace(&mut self.0, Tensor::new()));
        }
    }
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use super::*;

    /// One test, as copies of all threads share the memory that is kept.
    #[test]
    fn a_copy_has_the_bytes_of_its_time_in_memory_of_its_own() {
        bytes_of_their_time();
        the_memory_of_a_copy_is_used_again_once_nobody_has_it();
    }

    fn bytes_of_their_time() {
        for numel in [0, 1, 1000, 3 * LARGE / 4 + 5] {
            let count = i64::try_from(numel).unwrap();
            let mut tensor = Tensor::arange(count, (Kind::Float, Device::Cpu));
            let copy = HostCopy::of(&tensor).unwrap();
            let _ = tensor.fill_(-1.0);
            let floats = copy.as_ref().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            assert!(floats.eq((0..numel).map(|at| at as f32)), "{numel} floats");
        }
    }

    fn the_memory_of_a_copy_is_used_again_once_nobody_has_it() {
        let tensor = |value: f64| Tensor::full([2, 1 << 20], value, (Kind::Float, Device::Cpu));
        let is = |copy: &HostCopy, value: f32| {
            copy.as_ref().as_chunks().0.iter().all(|b| f32::from_le_bytes(*b) == value)
        };
        let first = HostCopy::of(&tensor(1.0)).unwrap();
        let second = HostCopy::of(&tensor(2.0)).unwrap();
        assert!(is(&first, 1.0) && is(&second, 2.0) && first.as_ref().as_ptr() != second.as_ref().as_ptr());
        let place = first.as_ref().as_ptr();
        drop(first);
        let third = HostCopy::of(&tensor(3.0)).unwrap();
        assert!(is(&second, 2.0) && is(&third, 3.0));
        assert_eq!(third.as_ref().as_ptr(), place);
    }

    #[test]
    fn a_part_of_a_tensor_is_copied_alone() {
        let whole = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
        let copy = HostCopy::of(&whole.select(1, 2)).unwrap();
        assert_eq!(copy.as_ref(), [2_f32, 6.0, 10.0].map(f32::to_le_bytes).as_flattened());
    }
}
