//! Worker: trains a GAN on its share of the data shards and reduces with the other workers of its group.
//!
//! The cluster never changes the result. Each module holds a part of that promise:
//!
//! - [`random`]: a draw depends on its key alone.
//! - [`data`]: sample i of a shard is a number in an endless stream, whichever worker reads it.
//! - [`objective`]: a shard gradient is one data shard's contribution to an update, whichever worker
//!   computes it.
//! - [`reduce`]: shard gradients are summed in one order, for any number of ranks.
//! - [`commit`]: the only writer of [`state`], and a pure one.
//! - [`finite`]: a reduced gradient that is not finite is skipped or ends the group, by all members alike.
//! - [`team`]: a group starts from one state, compared before the first phase.
#![forbid(unsafe_code)]

pub mod archive;
pub mod augment;
pub mod beginning;
pub mod checkpoint;
pub mod commit;
pub mod data;
pub mod device;
pub mod draw;
pub mod error;
pub mod eval;
pub mod finite;
pub mod gpu;
pub mod gradient_log;
pub mod loss;
mod module_file;
mod monitor;
pub mod nn;
pub mod objective;
pub mod passport;
pub mod picture;
pub mod profile;
pub mod random;
pub mod reduce;
pub mod run;
pub mod sample;
pub mod schedule;
pub mod session;
pub mod state;
pub mod stay;
pub mod storage;
pub mod team;
pub mod tensor_bytes;
pub mod trainer;
mod tunnel;
pub mod weights;

/// Sets the number of threads inside one tensor operation, for the calling thread and those that it starts.
pub fn set_threads(threads: u32) {
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
}
