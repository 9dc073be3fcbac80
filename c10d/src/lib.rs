//! Safe Rust over libtorch's own collectives: process groups over Gloo and, with the feature `cuda`, NCCL.
//!
//! libtorch carries the engine that PyTorch trains on, `c10d`, but only for C++ and Python. This
//! crate binds it with the guarantees that a fault-tolerant trainer needs: typed errors, waits that
//! an abort interrupts at once, buffers that cannot be touched while they are lent to a collective,
//! and a rendezvous store that is a Rust trait.
//!
//! ```no_run
//! use std::time::Duration;
//! use c10d::{Buffer, GlooAddress, GlooOptions, Group, MemoryStore, ReduceOp};
//! use tch::{Device, Kind};
//!
//! # fn main() -> Result<(), c10d::Error> {
//! let options = GlooOptions {
//!     rank: 0,
//!     world_size: 1,
//!     timeout: Duration::from_secs(10),
//!     operation_timeout: Duration::from_secs(60),
//!     address: GlooAddress::Hostname("127.0.0.1".into()),
//! };
//! let group = Group::gloo(options, MemoryStore::new(), "generation 1")?;
//! let mut buffer = Buffer::zeros(1024, Kind::Float, Device::Cpu)?;
//! buffer.update(|tensor| tensor.fill_(1.0));
//! let pending = group.all_reduce(buffer, ReduceOp::Sum)?;
//! let sum = pending.wait(Duration::from_secs(10))?; // The same buffer, with the sum over all ranks.
//! # Ok(()) }
//! ```
//!
//! Invariants of the whole crate, each held by tests:
//! 1. No C++ exception and no Rust panic crosses the language boundary.
//! 2. An operation ends once, as a result or as an error, and unless it succeeded its buffers never
//!    come back.
//! 3. Every wait is limited, and an abort ends it at once.
//! 4. A broken group is never used again; it winds down in the background and leaves nothing behind.
//!
//! This is the only crate of the workspace with unsafe code.

pub mod aten;
// A bridge of cxx declares all that it has as public.
#[allow(unreachable_pub)]
mod aten_ffi;
mod backend;
mod buffer;
pub mod convolution;
mod core;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
// A bridge of cxx declares all that it has as public.
#[allow(unreachable_pub)]
mod ffi;
mod flight;
mod group;
mod host;
#[cfg(feature = "cuda")]
mod nccl;
pub mod package;
mod pending;
pub mod script;
pub mod shared;
mod staging;
mod store;
mod sync;
mod tcp_store;
pub mod transformer;

pub use backend::{live_handles, wait_for_handles};
pub use buffer::Buffer;
pub use error::{Error, Refused};
pub use group::{GlooAddress, GlooOptions, Group, Launch, ReduceOp, prepare_gloo};
pub use host::HostCopy;
#[cfg(feature = "cuda")]
pub use nccl::NcclOptions;
pub use pending::{Aborter, Lent, Pending};
pub use store::{KeyValueStore, MemoryStore, StoreError};
pub use tcp_store::TcpStore;

/// Ends this process at once: no destructor runs, so other threads may still compute with libtorch.
pub fn exit_at_once(code: i32) -> ! {
    // SAFETY: this is the signature of _exit(2) in POSIX, which has no precondition.
    unsafe extern "C" {
        safe fn _exit(code: std::ffi::c_int) -> !;
    }
    _exit(code)
}
