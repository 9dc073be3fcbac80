//! What a process that computes on a GPU needs of CUDA.

use tch::Tensor;

use crate::Error;
use crate::aten_ffi::shim;

/// Settings without which the same kernels may give other bits the next time. Call it before anything else of
/// this crate or of libtorch, and before another thread may read the environment.
///
/// # Errors
/// None in practice.
pub fn prepare() -> Result<(), Error> {
    Ok(shim::prepare_cuda()?)
}

/// Where a GPU sits in this machine: its address on the PCI bus, such as `0000:17:00.0`. All processes of the
/// machine have the same for it, whatever GPUs are hidden from them.
///
/// # Errors
/// [`Error::Invalid`] for an index beyond all, [`Error::Fatal`] if there is no such GPU.
pub fn pci_bus_id(device: usize) -> Result<String, Error> {
    Ok(shim::pci_bus_id(small(device)?)?)
}

/// Copies numbers to a GPU, on a stream of the calling thread's own, and waits for that. The tensor is flat;
/// it is for the GPU's default stream, on which all other threads compute.
///
/// # Errors
/// [`Error::Invalid`] for an index beyond all, [`Error::Fatal`] if there is no such GPU or its memory is used
/// up.
pub fn upload(values: &[f32], device: usize) -> Result<Tensor, Error> {
    let there = shim::upload(values, small(device)?)?.into_raw();
    // SAFETY: the pointer comes from `new at::Tensor` and nobody else has it; tch deletes it when the tensor
    // is dropped.
    Ok(unsafe { Tensor::from_ptr(there.cast()) })
}

fn small(device: usize) -> Result<i8, Error> {
    i8::try_from(device).map_err(|_| Error::Invalid(format!("GPU {device}")))
}
