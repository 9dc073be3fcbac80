//! CUDA functions for a process that computes on a GPU.

use tch::Tensor;

use crate::Error;
use crate::aten_ffi::shim;

/// Applies settings without which the same kernels may give other bits the next time. Must be
/// called before anything else of this crate or of libtorch, and before another thread may read the
/// environment.
///
/// # Errors
/// None in practice.
pub fn prepare() -> Result<(), Error> {
    Ok(shim::prepare_cuda()?)
}

/// Returns the address of a GPU on the PCI bus of this machine, such as `0000:17:00.0`. It is the
/// same in all processes of the machine, whatever GPUs are hidden from them.
///
/// # Errors
/// [`Error::Invalid`] for an index out of range, [`Error::Fatal`] if there is no such GPU.
pub fn pci_bus_id(device: usize) -> Result<String, Error> {
    Ok(shim::pci_bus_id(small(device)?)?)
}

/// Copies numbers to a GPU, on a stream of the calling thread's own, and waits for the copy. The
/// tensor is flat; it is for use on the GPU's default stream, on which all other threads compute.
///
/// # Errors
/// [`Error::Invalid`] for an index out of range, [`Error::Fatal`] if there is no such GPU or its
/// memory is exhausted.
pub fn upload(values: &[f32], device: usize) -> Result<Tensor, Error> {
    let there = shim::upload(values, small(device)?)?.into_raw();
    // SAFETY: the pointer comes from `new at::Tensor` and has no other owner; tch deletes it when
    // the tensor is dropped.
    Ok(unsafe { Tensor::from_ptr(there.cast()) })
}

/// A place in the work of a GPU's default stream.
pub struct Mark(cxx::UniquePtr<shim::Mark>);

impl Mark {
    /// Marks the end of what the stream was told to do so far.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an index out of range, [`Error::Fatal`] if CUDA reports an earlier error.
    pub fn here(device: usize) -> Result<Mark, Error> {
        Ok(Mark(shim::mark(small(device)?)?))
    }

    /// Waits until the GPU has done all before it.
    ///
    /// # Errors
    /// [`Error::Fatal`] if some of it failed.
    pub fn wait(&self) -> Result<(), Error> {
        Ok(self.0.wait()?)
    }
}

/// Waits until a GPU has done all that its default stream was told to do.
///
/// # Errors
/// [`Error::Invalid`] for an index out of range, [`Error::Fatal`] if some of it failed.
pub fn wait(device: usize) -> Result<(), Error> {
    Ok(shim::wait_for_gpu(small(device)?)?)
}

/// Returns how many times this process asked for more memory than a GPU had left. libtorch then takes
/// another kernel where it can, which may compute other bits.
///
/// # Errors
/// [`Error::Invalid`] for an index out of range, [`Error::Fatal`] if nothing was computed on it yet.
pub fn refused_allocations(device: usize) -> Result<u64, Error> {
    Ok(shim::refused_allocations(small(device)?)?)
}

/// Returns the compute capability of a GPU, such as `9.0`.
///
/// # Errors
/// [`Error::Invalid`] for an index out of range, [`Error::Fatal`] if there is no such GPU.
pub fn compute_capability(device: usize) -> Result<String, Error> {
    Ok(shim::compute_capability(small(device)?)?)
}

/// Returns the name of a GPU and its number of multiprocessors, by which kernels divide their work, such as
/// `NVIDIA H200, 132 SMs`.
///
/// # Errors
/// [`Error::Invalid`] for an index out of range, [`Error::Fatal`] if there is no such GPU.
pub fn name(device: usize) -> Result<String, Error> {
    Ok(shim::gpu_name(small(device)?)?)
}

/// Returns the versions of cuDNN and cuBLAS as loaded, such as `cuDNN 91500, cuBLAS 13.0.1`.
///
/// # Errors
/// None in practice.
pub fn libraries() -> Result<String, Error> {
    Ok(shim::gpu_libraries()?)
}

/// Returns the version of CUDA that this crate was compiled against, such as `13.0`.
///
/// # Errors
/// None in practice.
pub fn version() -> Result<String, Error> {
    Ok(shim::cuda_version()?)
}

fn small(device: usize) -> Result<i8, Error> {
    // libtorch numbers devices by 8 bits.
    i8::try_from(device).map_err(|_| Error::Invalid(format!("GPU {device}")))
}
