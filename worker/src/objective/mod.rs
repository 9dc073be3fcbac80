//! Objectives: what a model is to the engine, which knows nothing else of it.
//!
//! An objective says which updates a step consists of, and computes what each data shard contributes to one.
//! The engine sums the contributions of all shards, in one order, and applies the mean.
//!
//! 1. A shard's gradient is a function of (job, state, phase, step, shard, the shard's samples): it reads
//!    state and writes none. What a [`Compute`] keeps from phase to phase saves work and changes no bit.
//! 2. It has memory of its own, and parameters keep no gradient, so that autograd never adds one to another.

pub mod gan;
mod shard_grad;

use tch::Tensor;

pub use self::shard_grad::{GradLayout, ShardGrad};
use crate::state::{Module, State};

/// One update of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Its place in the step.
    pub index: u32,
    /// The network that it updates.
    pub module: Module,
    /// The samples that it reads.
    pub reads: Reads,
}

/// The samples that a phase reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// The next of the stream.
    Next,
    /// Those of the phase before.
    Same,
    /// None.
    Nothing,
}

/// Where a shard's gradient belongs: its draws are keyed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardAt {
    /// The phase.
    pub phase: Phase,
    /// Steps done before.
    pub step: u64,
    /// The data shard.
    pub shard: u32,
}

/// The real samples of a data shard.
#[derive(Debug)]
pub struct ShardBatch {
    /// (b, c, h, w), in [-1, 1].
    pub images: Tensor,
    /// Their classes, (b) of int64, where the model is conditional.
    pub classes: Option<Tensor>,
}

/// A model as the engine sees it.
pub trait Objective {
    /// The updates of every step, in order.
    fn phases(&self) -> Vec<Phase>;

    /// Begins to compute gradients, with nothing kept.
    fn begin(&self) -> Box<dyn Compute + '_>;
}

/// Computes the gradients of one member's shards, phase by phase.
pub trait Compute {
    /// Fills `out` with what a shard contributes to a phase. `batch` are its samples, where the phase reads
    /// some.
    ///
    /// # Errors
    /// libtorch refused.
    fn gradient(
        &mut self,
        at: ShardAt,
        state: &State,
        batch: Option<&ShardBatch>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error>;

    /// Whether something of the next step can be computed while the gradients of a phase are summed: its
    /// update must not change that.
    fn looks_ahead(&self, under_way: Phase) -> bool;

    /// Computes that for a shard, of its next samples, and keeps it.
    ///
    /// # Errors
    /// libtorch refused.
    fn look_ahead(&mut self, at: ShardAt, state: &State, batch: &ShardBatch) -> Result<(), c10d::Error>;
}
