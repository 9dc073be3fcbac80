//! Groups over NCCL, for buffers on GPUs.
//!
//! 1. Only the caller ends an operation or the process: NCCL's own error handling and monitor are
//!    off.
//! 2. An operation counts as done when the GPU has finished it, not when it is enqueued.

use std::sync::Arc;
use std::time::Duration;

use tch::Device;

use crate::ffi::shim;
use crate::group::check_ranks;
use crate::store::{KeyValueStore, StoreHandle};
use crate::sync::milliseconds;
use crate::{Error, Group};

/// Parameters of an NCCL group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NcclOptions {
    /// Rank of this process in the group, from 0.
    pub rank: usize,
    /// Number of ranks, at least 1.
    pub world_size: usize,
    /// Time limit for finding the peers.
    pub timeout: Duration,
    /// Index of this rank's GPU.
    pub device: usize,
}

impl Group {
    /// Forms a group over NCCL, for buffers on one GPU for each rank; no two ranks may share one.
    /// Blocks until all ranks have made their communicators, and nothing ends that wait: NCCL has
    /// no time limit for it. Operations wait for the work that is enqueued on the calling thread's
    /// current stream.
    ///
    /// # Errors
    /// As for [`Group::gloo`]; [`Error::Fatal`] if there is no GPU.
    pub fn nccl(options: NcclOptions, store: Arc<dyn KeyValueStore>, prefix: &str) -> Result<Group, Error> {
        let NcclOptions { rank, world_size, timeout, device } = options;
        let (small_rank, small_size) = check_ranks(rank, world_size, timeout)?;
        let index = i8::try_from(device).map_err(|_| Error::Invalid(format!("GPU {device}")))?;
        let store = Box::new(StoreHandle(store));
        let limit = milliseconds(timeout);
        let group = shim::nccl_group(small_rank, small_size, limit, index, store, prefix)?;
        Ok(Group::new(group, rank, world_size, Device::Cuda(device)))
    }
}
