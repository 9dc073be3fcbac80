//! The few functions of ATen that tch has no safe wrapper for.
//!
//! 1. None panics or lets an exception through: what libtorch throws becomes an [`Error`].
//! 2. [`fused_adam`] on CPU gives the same bits however a flat tensor is cut, as long as the cuts are
//!    multiples of 16 elements: the last few elements of a slice are computed by other instructions.

use tch::Tensor;

use crate::Error;
use crate::aten_ffi::shim;
use crate::ffi::at_tensor;

/// The hyperparameters of Adam (Kingma and Ba, 2015, algorithm 1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// The learning rate.
    pub lr: f64,
    /// The decay of the first moment.
    pub beta1: f64,
    /// The decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

/// One step of Adam, in one kernel, in place, without recording gradients. All tensors have one shape, kind
/// and device; `step` counts from 1.
///
/// # Errors
/// [`Error::Invalid`] for step 0 or tensors that do not match; [`Error::Fatal`] for what libtorch refuses.
pub fn fused_adam(
    params: &mut Tensor,
    grads: &Tensor,
    exp_avg: &mut Tensor,
    exp_avg_sq: &mut Tensor,
    step: u64,
    adam: Adam,
) -> Result<(), Error> {
    if step == 0 {
        return Err(Error::Invalid("Adam's steps count from 1".into()));
    }
    let properties = |tensor: &Tensor| (tensor.size(), tensor.kind(), tensor.device());
    for other in [grads, exp_avg, exp_avg_sq] {
        if properties(other) != properties(params) {
            return Err(Error::Invalid("Adam's tensors must have one shape, kind and device".into()));
        }
    }
    let Adam { lr, beta1, beta2, eps } = adam;
    // The kernel takes the step as a float: beyond 2^24 it is inexact, where it no longer matters.
    let settings = shim::AdamSettings { step: step as f64, lr, beta1, beta2, eps };
    let [params, grads, exp_avg, exp_avg_sq] = [&*params, grads, exp_avg, exp_avg_sq].map(at_tensor);
    Ok(shim::fused_adam(params, grads, exp_avg, exp_avg_sq, &settings)?)
}

/// The state of libtorch's default generator for CPUs, to see whether anything draws from it.
///
/// # Errors
/// [`Error::Fatal`] for what libtorch refuses.
pub fn default_generator_state() -> Result<Vec<u8>, Error> {
    Ok(shim::default_generator_state()?)
}

/// The instruction set that libtorch's CPU kernels use here, such as `AVX512`.
///
/// # Errors
/// [`Error::Fatal`] for what libtorch refuses.
pub fn cpu_capability() -> Result<String, Error> {
    Ok(shim::cpu_capability()?)
}

/// The version of libtorch that this crate was compiled against.
///
/// # Errors
/// None in practice.
pub fn libtorch_version() -> Result<String, Error> {
    Ok(shim::libtorch_version()?)
}

/// Whether operations shall give the same bits each time, in this process, and fail where they have no such
/// implementation. With cuDNN it also keeps timings from choosing algorithms.
///
/// # Errors
/// [`Error::Fatal`] for what libtorch refuses.
pub fn set_deterministic(deterministic: bool) -> Result<(), Error> {
    Ok(shim::set_deterministic(deterministic)?)
}

/// The name and version of the C library at run time, such as `glibc 2.36`.
///
/// # Errors
/// None in practice.
pub fn c_library_version() -> Result<String, Error> {
    Ok(shim::c_library_version()?)
}

/// Gives memory back to the system that is kept for tensors to come: the C library's, and that of all GPUs.
/// What CUDA takes for itself stays until the process ends.
///
/// # Errors
/// [`Error::Fatal`] if CUDA reports an earlier error.
pub fn release_memory() -> Result<(), Error> {
    #[cfg(feature = "cuda")]
    shim::empty_cuda_cache()?;
    Ok(shim::trim_heap()?)
}

/// max(x, slope x), elementwise, in place and differentiable. tch's own has a fixed slope of 0.01.
///
/// # Errors
/// [`Error::Fatal`] for what libtorch refuses.
pub fn leaky_relu(tensor: &mut Tensor, slope: f64) -> Result<(), Error> {
    Ok(shim::leaky_relu(at_tensor(tensor), slope)?)
}

/// Whether a tensor of floats holds neither an infinity nor a NaN. A contiguous tensor of `f32` on a CPU is
/// read once, by its bits, and nothing is allocated; of another the largest absolute value is taken.
///
/// # Errors
/// [`Error::Fatal`] for a tensor that holds no floats, and for what libtorch refuses.
pub fn all_finite(tensor: &Tensor) -> Result<bool, Error> {
    Ok(shim::all_finite(at_tensor(tensor))?)
}

/// A hash of a contiguous tensor's bytes: XXH3 (64 bits) on a CPU. On another device a sum of its 32-bit
/// words, each times an odd number that belongs to its place, mod 2^64, is taken there and hashed: it tells
/// two tensors apart that differ in one element for certain, others almost certainly. So hashes of one kind
/// of device can be compared.
///
/// # Errors
/// [`Error::Invalid`] for a tensor that is not contiguous.
pub fn fingerprint(tensor: &Tensor, seed: u64) -> Result<u64, Error> {
    if !tensor.is_contiguous() {
        return Err(Error::Invalid("only a contiguous tensor has a fingerprint".into()));
    }
    if tensor.device() != tch::Device::Cpu && tensor.kind().elt_size_in_bytes() == 4 {
        return fingerprint_of_sum(tensor, seed);
    }
    let on_cpu = tensor.f_to_device(tch::Device::Cpu)?;
    let bytes = on_cpu.numel() * on_cpu.kind().elt_size_in_bytes();
    if bytes == 0 {
        return Ok(xxhash_rust::xxh3::xxh3_64_with_seed(&[], seed));
    }
    // SAFETY: a contiguous, non-empty tensor on the CPU has `bytes` initialised bytes from `data_ptr` on,
    // which live as long as `on_cpu`. Nothing on this thread writes to them before the slice is gone; a
    // tensor that another thread writes to must not be handed in, as for any other operation of libtorch.
    let bytes = unsafe { std::slice::from_raw_parts(on_cpu.data_ptr().cast::<u8>(), bytes) };
    Ok(xxhash_rust::xxh3::xxh3_64_with_seed(bytes, seed))
}

/// The fingerprint of words that are not on a CPU: all that comes to the CPU is their sum.
fn fingerprint_of_sum(tensor: &Tensor, seed: u64) -> Result<u64, Error> {
    let sum = shim::weighted_sum(at_tensor(tensor))?;
    Ok(xxhash_rust::xxh3::xxh3_64_with_seed(&sum.to_le_bytes(), seed))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use super::*;

    /// With a CPU in the other device's place.
    #[test]
    fn a_sum_of_weighted_words_tells_tensors_apart() {
        let values: Vec<f32> = (0..3000_u16).map(|i| f32::from(i).sin()).collect();
        let of = |values: &[f32]| fingerprint_of_sum(&Tensor::from_slice(values), 1).unwrap();
        let known = of(&values);
        assert_eq!(known, of(&values));
        assert_ne!(known, fingerprint_of_sum(&Tensor::from_slice(&values), 2).unwrap());
        assert_ne!(known, of(&values[1..]));
        for (at, bit) in [(0, 0), (1, 31), (1499, 22), (2999, 7)] {
            let mut other = values.clone();
            other[at] = f32::from_bits(other[at].to_bits() ^ (1 << bit));
            assert_ne!(known, of(&other), "bit {bit} of number {at}");
        }
        let mut swapped = values.clone();
        swapped.swap(3, 4);
        assert_ne!(known, of(&swapped));
        assert_ne!(of(&[0.0]), of(&[-0.0]));
        assert_ne!(of(&[f32::NAN, 1.0]), of(&[1.0, f32::NAN]));
    }

    /// The sum wraps and is the same in any order, so it is the same on any device.
    #[test]
    fn a_weighted_sum_is_the_one_that_integers_give() {
        let mix = |i: i64| {
            let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15_u64.cast_signed());
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9_u64.cast_signed());
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb_u64.cast_signed());
            (z ^ (z >> 31)) | 1
        };
        let words: Vec<i32> = (1..=5000).map(|i: i32| i.wrapping_mul(0x2545_f491)).collect();
        let terms = (1..).zip(&words).map(|(i, word)| mix(i).wrapping_mul(i64::from(*word)));
        let sum = terms.fold(0_i64, i64::wrapping_add).cast_unsigned();
        assert_eq!(shim::weighted_sum(at_tensor(&Tensor::from_slice(&words))).unwrap(), sum);
    }
}
