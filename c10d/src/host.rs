//! Copies of tensors in host memory.

use std::ops::Range;
use std::sync::Mutex;

use tch::{Device, Kind, Tensor, no_grad};

use crate::Error;
use crate::sync::lock;

/// Number of floats from which on the memory of a copy is kept.
const LARGE: usize = 1 << 19;

/// Memory of a large copy that is no longer used, for the next one. The system clears memory that is new to a
/// process, and a virtual machine may have to get it first: that took several times as long as a copy.
static SPARE: Mutex<Spare> = Mutex::new(Spare { memory: None, is_kept: true });

struct Spare {
    memory: Option<Tensor>,
    /// Whether the memory of copies is kept at all.
    is_kept: bool,
}

impl Spare {
    /// Keeps the larger of this memory and what is kept: copies may differ in what they leave out.
    fn keep(&mut self, memory: Tensor) {
        let is_larger = self.memory.as_ref().is_none_or(|kept| kept.numel() < memory.numel());
        if self.is_kept && is_larger {
            self.memory = Some(memory);
        }
    }

    /// Takes the memory for a large copy of `numel` floats, if it is long enough. One of more than twice the
    /// length is freed.
    fn take(&mut self, numel: usize) -> Option<Tensor> {
        let memory = self.memory.take_if(|kept| (LARGE..=kept.numel()).contains(&numel))?;
        (memory.numel() <= 2 * numel).then_some(memory)
    }
}

/// Floats of a tensor at one time, in memory of their own on the host.
#[derive(Debug)]
pub struct HostCopy {
    memory: Tensor,
    /// Number of floats that the copy has of it.
    numel: usize,
}

impl HostCopy {
    /// Gets memory for the first copy of `numel` floats, so that making the copy takes no longer than that of
    /// later ones. Does nothing for a small one.
    ///
    /// # Errors
    /// [`Error::Fatal`] if libtorch has no memory.
    pub fn prepare(numel: usize) -> Result<(), Error> {
        if numel >= LARGE {
            let memory = Tensor::f_zeros([signed(numel)?], (Kind::Float, Device::Cpu))?;
            lock(&SPARE).keep(memory);
        }
        Ok(())
    }

    /// Frees the memory that is kept for the next copy, and keeps none from now on.
    pub fn keep_no_memory() {
        *lock(&SPARE) = Spare { memory: None, is_kept: false };
    }

    /// Copies ranges of a flat tensor of floats, one after the other. A large copy goes into the memory of
    /// one before.
    ///
    /// # Errors
    /// [`Error::Fatal`] if the tensor has no such range, libtorch has no memory, or a device fails.
    pub fn of(flat: &Tensor, ranges: &[Range<usize>]) -> Result<HostCopy, Error> {
        let numel = ranges.iter().map(ExactSizeIterator::len).sum();
        let spare = lock(&SPARE).take(numel);
        let new = || {
            let memory = Tensor::f_empty([signed(numel)?], (Kind::Float, Device::Cpu))?;
            // A GPU writes to memory that cannot move, at several times the speed, and without a second copy.
            Ok::<_, Error>(if flat.device().is_cuda() { memory.f_pin_memory(flat.device())? } else { memory })
        };
        let memory = spare.map_or_else(new, Ok)?;
        let mut end = 0;
        for range in ranges {
            let len = signed(range.len())?;
            let mut place = memory.f_narrow(0, end, len)?;
            let from = flat.f_narrow(0, signed(range.start)?, len)?;
            no_grad(|| place.f_copy_(&from))?;
            end += len;
        }
        Ok(HostCopy { memory, numel })
    }
}

impl AsRef<[u8]> for HostCopy {
    fn as_ref(&self) -> &[u8] {
        // An empty tensor may have no memory, and a slice must not begin at a null pointer.
        if self.numel == 0 {
            return &[];
        }
        // SAFETY: a tensor of floats that `of` or `prepare` made on the CPU is contiguous, and `of` has
        // written its first `numel` floats, which live as long as it does. It is private, and nothing writes
        // to it after `of`.
        unsafe { std::slice::from_raw_parts(self.memory.data_ptr().cast::<u8>(), 4 * self.numel) }
    }
}

impl Drop for HostCopy {
    fn drop(&mut self) {
        if self.memory.numel() >= LARGE {
            lock(&SPARE).keep(std::mem::replace(&mut self.memory, Tensor::new()));
        }
    }
}

fn signed(numel: usize) -> Result<i64, Error> {
    i64::try_from(numel).map_err(|_| Error::Invalid(format!("{numel} floats")))
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

    fn whole(flat: &Tensor) -> HostCopy {
        first_of(flat, flat.numel())
    }

    fn first_of(flat: &Tensor, numel: usize) -> HostCopy {
        let range = 0..numel;
        HostCopy::of(flat, &[range]).unwrap()
    }

    fn floats(copy: &HostCopy) -> impl Iterator<Item = f32> {
        copy.as_ref().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
    }

    fn bytes_of_their_time() {
        for numel in [0, 1, 1000, 3 * LARGE + 5] {
            let mut tensor = Tensor::arange(signed(numel).unwrap(), (Kind::Float, Device::Cpu));
            let copy = whole(&tensor);
            let _ = tensor.fill_(-1.0);
            assert!(floats(&copy).eq((0..numel).map(|at| at as f32)), "{numel} floats");
        }
    }

    fn the_memory_of_a_copy_is_used_again_once_nobody_has_it() {
        HostCopy::keep_no_memory();
        lock(&SPARE).is_kept = true;
        let tensor = |value: f64| Tensor::full([3 << 19], value, (Kind::Float, Device::Cpu));
        let is = |copy: &HostCopy, value: f32| floats(copy).all(|float| float == value);
        let first = whole(&tensor(1.0));
        let second = whole(&tensor(2.0));
        assert!(is(&first, 1.0) && is(&second, 2.0) && first.as_ref().as_ptr() != second.as_ref().as_ptr());
        let place = first.as_ref().as_ptr();
        drop(first);
        // A copy that leaves some of it out.
        let third = HostCopy::of(&tensor(3.0), &[0..LARGE, LARGE + 9..2 * LARGE]).unwrap();
        assert!(is(&second, 2.0) && is(&third, 3.0) && third.as_ref().len() == 4 * (2 * LARGE - 9));
        assert_eq!(third.as_ref().as_ptr(), place);
        drop(third);
        drop(first_of(&tensor(4.0), 9));
        assert!(lock(&SPARE).memory.is_some(), "a small copy has memory of its own");
        drop(first_of(&tensor(4.0), LARGE));
        assert_eq!(
            lock(&SPARE).memory.as_ref().map(Tensor::numel),
            Some(LARGE),
            "three times the length was kept"
        );
    }

    #[test]
    fn ranges_are_copied_one_after_the_other() {
        let all = Tensor::arange(12, (Kind::Float, Device::Cpu));
        let copy = HostCopy::of(&all, &[2..4, 7..7, 9..12]).unwrap();
        assert!(floats(&copy).eq([2.0, 3.0, 9.0, 10.0, 11.0]));
        assert!(HostCopy::of(&all, &[2..4, 11..13]).is_err());
    }
}
