//! Worker: trains an objective, such as a GAN, on its share of the data shards and reduces with the other workers of its group.
//!
//! The cluster never changes the result. Each module holds a part of that promise:
//!
//! - [`random`]: a draw depends on its key alone.
//! - [`data`]: sample i of a shard is a number in an endless stream, whichever worker reads it.
//! - [`objective`]: a shard gradient is one data shard's contribution to an update, whichever worker
//!   computes it.
//! - [`engine::reduce`]: shard gradients are summed in one order, for any number of ranks.
//! - [`engine::commit`]: the only writer of [`state`], and a pure one.
//! - [`engine::finite`]: a reduced gradient that is not finite is skipped or ends the group, by all members alike.
//! - [`engine::generation`]: a group starts from one state, compared before the first phase.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod commands;
pub mod data;
pub mod device;
pub mod engine;
pub mod eval;
pub mod nn;
pub mod objective;
pub mod random;
pub mod sampling;
pub mod session;
pub mod state;

/// Sets the number of threads inside one tensor operation, for the calling thread and those that it starts.
pub fn set_threads(threads: u32) {
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
}
