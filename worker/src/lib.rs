//! Worker: trains an objective, such as a GAN, on its share of the data shards, and reduces with the other
//! workers of its group.
//!
//! The cluster never changes the result. Each module holds a part of that promise:
//!
//! - [`random`]: a draw depends on its key alone.
//! - [`data`]: sample i of a shard is a number in an endless stream, whichever worker reads it.
//! - [`objective`]: a shard gradient is one data shard's contribution to an update, whichever worker
//!   computes it.
//! - [`engine::reduce`]: shard gradients are summed in one order, for any number of ranks.
//! - [`engine::commit`]: the only writer of [`state`], and a pure one.
//! - [`engine::finite`]: a reduced gradient that is not finite is skipped or ends the group, by all members
//!   alike.
//! - `engine::generation`: a group starts from one state, compared before the first phase.
//!
//! The sum has the same bits whoever adds its terms:
//!
//! ```no_run
//! use ganglion_worker::engine::reduce::tree::{Node, TreeSum, cover};
//! use tch::Tensor;
//!
//! let gradient = |shard: u32| Tensor::from_slice(&[0.1 * f64::from(shard)]);
//! let sum_of = |shards: std::ops::Range<u32>| {
//!     let mut sum = TreeSum::new(4);
//!     shards.for_each(|shard| sum.push(Node::leaf(shard), gradient(shard)));
//!     sum.take()
//! };
//! // Two workers with two shards each, and one that adds their sums.
//! let mut both = TreeSum::new(4);
//! for (node, sum) in sum_of(0..2).into_iter().chain(sum_of(2..4)) {
//!     both.push(node, sum);
//! }
//! assert_eq!(cover(0..4, 4), [Node::root(4)]);
//! assert_eq!(both.take()[0].1, sum_of(0..4)[0].1);
//! ```
#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod checkpoint;
pub mod commands;
pub mod data;
pub mod device;
pub mod engine;
mod eval;
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

/// Lowers the priority of the calling thread, and of those that it starts, below that of training.
pub(crate) fn give_way() {
    // On Linux the nice value is a thread's own.
    if let Err(error) = rustix::process::nice(10) {
        tracing::debug!("a background thread has the priority of training: {error}");
    }
}
