//! Copies of tensors in host memory.

use rustix::mm::{Advice, madvise};
use tch::{Device, Tensor, no_grad};

use crate::Error;

/// Size of a huge page. Smaller copies do not ask for them.
const HUGE_PAGE: usize = 2 << 20;

/// The bytes of a tensor at one time, in memory of their own on the host.
#[derive(Debug)]
pub struct HostCopy(Tensor);

impl HostCopy {
    /// Copies a tensor. A large copy asks the system for huge pages, since it is made in one go and freed
    /// soon: the first touch of each small page would take longer than the copy.
    ///
    /// # Errors
    /// [`Error::Fatal`] if libtorch has no memory, or a device fails.
    pub fn of(tensor: &Tensor) -> Result<HostCopy, Error> {
        let options = (tensor.kind(), Device::Cpu);
        let mut copy = Tensor::f_empty(tensor.size(), options)?;
        let bytes = copy.numel() * copy.kind().elt_size_in_bytes();
        let start = copy.data_ptr();
        let skipped = start.align_offset(HUGE_PAGE);
        if bytes >= skipped.saturating_add(HUGE_PAGE) {
            // SAFETY: the range lies within memory that `copy` owns and that nothing else uses. The advice
            // changes how the system backs it, and not what it holds.
            let advised = unsafe { madvise(start.byte_add(skipped), bytes - skipped, Advice::LinuxHugepage) };
            // A system without huge pages copies as it always did.
            let _ = advised;
        }
        no_grad(|| copy.f_copy_(tensor))?;
        Ok(HostCopy(copy))
    }
}

impl AsRef<[u8]> for HostCopy {
    fn as_ref(&self) -> &[u8] {
        let bytes = self.0.numel() * self.0.kind().elt_size_in_bytes();
        // An empty tensor may have no memory, and a slice must not begin at a null pointer.
        if bytes == 0 {
            return &[];
        }
        // SAFETY: a new tensor on the CPU is contiguous, with `bytes` initialised bytes from `data_ptr` on,
        // which live as long as it does. It is private, and nothing writes to it after `of`.
        unsafe { std::slice::from_raw_parts(self.0.data_ptr().cast::<u8>(), bytes) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn a_copy_has_the_bytes_of_its_time_whatever_its_size() {
        for numel in [0, 1, 1000, 3 * HUGE_PAGE / 4 + 5] {
            let count = i64::try_from(numel).unwrap();
            let mut tensor = Tensor::arange(count, (Kind::Float, Device::Cpu));
            let copy = HostCopy::of(&tensor).unwrap();
            let _ = tensor.fill_(-1.0);
            let floats = copy.as_ref().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            assert!(floats.eq((0..numel).map(|at| at as f32)), "{numel} floats");
        }
    }

    #[test]
    fn a_part_of_a_tensor_is_copied_alone() {
        let whole = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
        let copy = HostCopy::of(&whole.select(1, 2)).unwrap();
        assert_eq!(copy.as_ref(), [2_f32, 6.0, 10.0].map(f32::to_le_bytes).as_flattened());
    }
}
