//! Objectives: the engine's only view of a model.
//!
//! An objective names its networks, lists the updates of a step, and computes each data shard's contribution
//! to one. The engine sums the contributions of all shards, in one order, and applies the mean.
//!
//! 1. A shard's gradient is a function of (job, state, phase, step, shard, the shard's samples): it reads
//!    state and writes none. What a [`Compute`] keeps from phase to phase saves work and changes no bit.
//! 2. It has memory of its own, and parameters keep no gradient, so that autograd never adds one to another.
//! 3. All else that an objective decides is a function of (job, phase, step), or of reduced values: all
//!    ranks have the same.

mod annealing;
mod batch;
mod checks;
pub mod gan;
mod model;
mod optimizer;
pub(crate) mod package;
mod shard_grad;
#[cfg(test)]
pub(crate) mod test_job;
pub(crate) mod transformer;
pub mod vae;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use ganglion_proto::job::{Family, Job};
use tch::{Device, Tensor};

use self::batch::images_of;
pub use self::batch::{Samples, ShardBatch};
pub use self::model::Model;
pub use self::optimizer::{Optimizer, Rule};
pub use self::shard_grad::{BufferRun, GradLayout, ScalarRole, ScalarSpec, ShardGrad};
use crate::checkpoint::{Snapshot, WeightsFile};
use crate::data::DataSet;
use crate::nn::TensorSpec;
use crate::random::{Draws, Key};
use crate::sampling::{Sampler, TextSampler};
use crate::state::StateLayout;
pub use crate::state::{BufferId, NamedNetwork, NetworkId, NetworkSet, State};

/// One update of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Index of the phase within the step.
    pub index: u32,
    /// Networks whose parameters it updates.
    pub updates: NetworkSet,
    /// Samples that it reads.
    pub reads: Reads,
    /// Cadence: it runs in the steps whose number, counted from 0, is a multiple of this, which is at least
    /// 1. In other steps its update index passes with a commit that changes no network.
    pub every: u32,
}

impl Phase {
    /// A phase of every step that updates one network.
    pub fn of(index: u32, network: NetworkId, reads: Reads) -> Phase {
        Phase { index, updates: NetworkSet::of([network]), reads, every: 1 }
    }

    /// Whether the phase runs in a step, counted from 0.
    pub fn runs_in(self, step: u64) -> bool {
        step.is_multiple_of(u64::from(self.every))
    }
}

/// Samples that a phase reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// The next samples of the stream. Such a phase runs in every step.
    Next,
    /// The newest samples that a phase of the step has read.
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

/// Coordinates of the gradients of neighbouring data shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardsAt {
    /// The phase.
    pub phase: Phase,
    /// Number of steps done before.
    pub step: u64,
    /// The data shards, at least one.
    pub shards: Range<u32>,
}

impl ShardsAt {
    /// Number of the shards.
    pub fn count(&self) -> u32 {
        self.shards.end - self.shards.start
    }

    /// The first shard.
    pub fn first(&self) -> ShardAt {
        ShardAt { phase: self.phase, step: self.step, shard: self.shards.start }
    }

    /// Each of the shards, in order.
    pub fn each(&self) -> impl Iterator<Item = ShardAt> + use<> {
        let ShardsAt { phase, step, ref shards } = *self;
        shards.clone().map(move |shard| ShardAt { phase, step, shard })
    }
}

/// A setting that a schedule or a controller moves over a run. Rows of metrics report it as `setting_NAME`.
pub struct Setting<'a> {
    /// Name of the setting.
    pub name: Cow<'static, str>,
    /// Value of the setting.
    pub value: SettingValue<'a>,
}

/// Value of a setting after a number of steps, in the state that they led to: a function of both alone.
pub type SettingValue<'a> = Box<dyn Fn(u64, &State) -> f64 + 'a>;

impl Setting<'_> {
    /// Name among the scalars of a row.
    fn column(&self) -> String {
        // All that shows scalars tells settings by this beginning (`records/scalars.rs` of the coordinator).
        format!("setting_{}", self.name)
    }
}

/// A job's model cannot be trained on its data; the text says why, and how to fix it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unsuitable(pub String);

/// Makes the objective of a job, for its data and a device.
///
/// # Errors
/// The model cannot be trained on the data, or on this machine.
pub fn make(job: &Job, data: &DataSet, device: Device) -> Result<Arc<dyn Objective>, Unsuitable> {
    match job.model.kind.family() {
        Family::Gan => gan::make(job, data, device),
        Family::Package => package::make(job, data, device),
        Family::Vae => vae::make(job, data, device),
        Family::Transformer => transformer::make(job, data, device),
    }
}

/// A model as the engine sees it.
pub trait Objective: Send + Sync {
    /// Networks, in the order of their sections in the state. [`NetworkId`] is an index into them.
    fn networks(&self) -> Vec<NamedNetwork>;

    /// Tensors of the objective's own in the state, by their names in files: read in each phase with
    /// [`State::own`], written by [`Objective::after_update`].
    fn own_tensors(&self) -> Vec<TensorSpec> {
        Vec::new()
    }

    /// The updates of every step, in order.
    fn phases(&self) -> Vec<Phase>;

    /// Name of a phase, where people read one: by default that of the first network that it updates. Phases
    /// of one name share a profile.
    fn phase_name(&self, phase: Phase) -> Cow<'_, str> {
        let first = phase.updates.first().and_then(|NetworkId(index)| self.networks().into_iter().nth(index));
        first.map_or_else(|| format!("phase_{}", phase.index).into(), |network| network.name)
    }

    /// Buffers that a phase's passes update: by default all those of the networks that it updates. They may
    /// belong to any network; a shard gradient has their updates in this order.
    fn follows(&self, phase: Phase) -> Vec<BufferId> {
        let networks = self.networks();
        let of = |network: NetworkId| {
            (0..networks[network.0].buffers.len()).map(move |index| BufferId { network, index })
        };
        phase.updates.iter().flat_map(of).collect()
    }

    /// Scalars of a phase's gradients.
    fn scalars(&self, phase: Phase) -> Vec<ScalarSpec>;

    /// Settings that change over a run. One that stays the same is in the job, and in no row.
    fn settings(&self) -> Vec<Setting<'_>> {
        Vec::new()
    }

    /// Number of passes of a phase whose buffer updates are committed.
    fn passes(&self, _phase: Phase) -> usize {
        // With several passes each has buffer updates of its own, which are committed one after the
        // other.
        1
    }

    /// Draws of a shard gradient that can be made ahead, by their keys, on the CPU: [`Compute::keep`] may get
    /// them. None by default, and where they take much memory.
    fn draws(&self, _at: ShardAt) -> Vec<(Key, Vec<Tensor>)> {
        Vec::new()
    }

    /// Returns a computation with nothing kept yet.
    fn begin(&self) -> Box<dyn Compute + '_>;

    /// Optimizer of a phase's update, `steps` steps after the start. Over a run its rule stays of one kind, and
    /// clips or does not.
    fn optimizer(&self, phase: Phase, steps: u64) -> Optimizer;

    /// Share of a network's moving average that stays at the end of a step, `steps` steps after the start.
    fn average_decay(&self, _network: NetworkId, _steps: u64) -> f64 {
        // Nothing of the old average stays: the average is the network itself.
        0.0
    }

    /// Updates the objective's own tensors after a phase's update, number `updates` of the first of its
    /// networks, by the means of the phase's scalars.
    fn after_update(&self, _phase: Phase, _updates: u64, _scalars: &Tensor, _state: &State) {}

    /// Draws samples from a state, for an objective that generates any.
    fn sampler(&self) -> Option<&dyn Sampler> {
        None
    }

    /// Writes texts from a state, for an objective that generates text.
    fn text_sampler(&self) -> Option<&dyn TextSampler> {
        None
    }

    /// Evaluates states on held-out data, for an objective that has scalars of its own for it.
    fn evaluator(&self) -> Option<&dyn Evaluator> {
        None
    }

    /// File that each checkpoint has beside the state, with the weights that samples are drawn with.
    fn weights_file(&self) -> Option<WeightsFile> {
        None
    }

    /// Items of the environment's fingerprint (`passport`) beside the engine's own, by name.
    fn fingerprint(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Number of samples by which the machine is identified, of a job with shards of `shard_batch`.
    fn probe_batch(&self, shard_batch: u32) -> u32 {
        // Enough for kernels that take several samples at a time, and little work.
        shard_batch.min(4)
    }

    /// The same objective for shards of `shard_batch` samples, with substitutes for what it knows of the
    /// data: its arithmetic identifies the machine, whatever the data are.
    fn probe(&self, shard_batch: u32) -> Box<dyn Objective>;
}

/// Evaluates states on held-out data.
pub trait Evaluator: Send + Sync {
    /// Names of the scalars, in order. None is that of a metric of generated samples.
    fn scalars(&self) -> Vec<Cow<'static, str>>;

    /// Prepares the weights of a snapshot, which has those of each network and their averages, and perhaps
    /// nothing else of the state.
    ///
    /// # Errors
    /// libtorch refused.
    fn begin<'a>(
        &'a self,
        layout: &'a StateLayout,
        snapshot: &'a Snapshot,
    ) -> Result<BatchSums<'a>, c10d::Error>;

    /// Returns the scalars for the sums over all batches, of so many samples of this data set: by default the
    /// mean of each sum.
    fn figures(&self, sums: Vec<f64>, samples: f64, _data: &DataSet) -> Vec<f64> {
        sums.into_iter().map(|sum| sum / samples).collect()
    }
}

/// Function from a batch of held-out samples, on the CPU, and the key of its draws to the sums over the samples
/// that the evaluator's scalars follow from. A batch has as many samples as a data shard.
pub type BatchSums<'a> = Box<dyn FnMut(&ShardBatch, Key) -> Result<Vec<f64>, c10d::Error> + 'a>;

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

    /// Takes draws of phases to come, which [`Objective::draws`] made, on the device.
    fn keep(&mut self, _draws: Draws) {
        // What is not kept is drawn when it is needed.
    }

    /// Largest number of neighbouring shards whose gradients in a phase [`Compute::gradients`] sums in one
    /// pass.
    fn most_together(&self, _phase: Phase) -> u32 {
        1
    }

    /// Fills `out` with the contributions of neighbouring shards to a phase, at most
    /// [`most_together`](Compute::most_together): with the bits of [`Compute::gradient`]'s for each, summed
    /// as leaves of a binary tree from left to right. `batch` holds the samples of all of them, in order.
    ///
    /// # Errors
    /// libtorch refused.
    fn gradients(
        &mut self,
        _at: &ShardsAt,
        _state: &State,
        _batch: Option<&ShardBatch>,
        _out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        unreachable!("several shards are never computed together by default")
    }

    /// Whether a part of the next step's first gradient can be computed while the gradients of a step's
    /// last phase are summed. The update under way must not change that part.
    fn looks_ahead(&self) -> bool {
        // An objective that looks ahead promises that the update under way does not change that part.
        false
    }

    /// Computes that part for a shard's next samples, and keeps it.
    ///
    /// # Errors
    /// libtorch refused.
    fn look_ahead(&mut self, _at: ShardAt, _state: &State, _batch: &ShardBatch) -> Result<(), c10d::Error> {
        Ok(())
    }
}
