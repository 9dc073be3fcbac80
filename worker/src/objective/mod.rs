//! Objectives: the engine's only view of a model.
//!
//! An objective lists the updates of a step, and computes each data shard's contribution to one. The engine
//! sums the contributions of all shards, in one order, and applies the mean.
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
    /// Index of the phase within the step.
    pub index: u32,
    /// Network that it updates.
    pub module: Module,
    /// Samples that it reads.
    pub reads: Reads,
}

/// Samples that a phase reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// The next samples of the stream.
    Next,
    /// The samples of the phase before.
    Same,
    /// No samples.
    Nothing,
}

/// Coordinates of a shard gradient; they key its draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardAt {
    /// The phase.
    pub phase: Phase,
    /// Number of steps done before.
    pub step: u64,
    /// The data shard.
    pub shard: u32,
}

/// The real samples of a data shard.
#[derive(Debug)]
pub struct ShardBatch {
    /// (b, c, h, w), in [-1, 1].
    pub images: Tensor,
    /// Classes of the images, (b) of int64, where the model is conditional.
    pub classes: Option<Tensor>,
}

/// A model as the engine sees it.
pub trait Objective {
    /// The updates of every step, in order.
    fn phases(&self) -> Vec<Phase>;

    /// Returns a computation with nothing kept yet.
    fn begin(&self) -> Box<dyn Compute + '_>;
}

/// Computes the gradients of one member's shards, phase by phase.
pub trait Compute {
    /// Fills `out` with a shard's contribution to a phase. `batch` holds the shard's samples, where the
    /// phase reads some.
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

    /// Whether a part of the next step's gradient can be computed while the gradients of a phase are
    /// summed. The update under way must not change that part.
    fn looks_ahead(&self, under_way: Phase) -> bool;

    /// Computes that part for a shard's next samples, and keeps it.
    ///
    /// # Errors
    /// libtorch refused.
    fn look_ahead(&mut self, at: ShardAt, state: &State, batch: &ShardBatch) -> Result<(), c10d::Error>;
}
