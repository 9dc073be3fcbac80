//! Phases and their leaves: what one data shard contributes to one update.
//!
//! 1. A leaf is a function of (job, state, phase, shard, the shard's real samples): it reads state and writes none.
//! 2. It has a buffer of its own, and parameters keep no gradient, so that autograd never adds one leaf to another.
//! 3. The generator's samples carry no gradient into a discriminator phase, and the discriminator is a constant in the
//!    generator's phase.
//!
//! A leaf's buffer holds, in this order: the gradient of the summed loss, laid out as the module's parameters; b times
//! the batch statistics of each pass, laid out as its buffers; the summed loss. All become means over the global batch
//! when the sum of the leaves is divided by V x b.

use std::ops::Range;

use ganglion_proto::job::Job;
use tch::{Device, Kind, Tensor, no_grad};

use crate::loss;
use crate::nn::{Mode, Models, Network};
use crate::random::{Key, Purpose};
use crate::state::{ALIGNMENT, Layout, Module, State, StateLayout, narrow};

/// One update of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Its place in the step.
    pub index: u32,
    /// What it updates.
    pub module: Module,
}

/// The phases of every step, in order: the discriminator's, then the generator's.
pub fn phases(job: &Job) -> Vec<Phase> {
    let discriminator =
        (0..job.loss.discriminator_steps).map(|index| Phase { index, module: Module::Discriminator });
    let last = Phase { index: job.loss.discriminator_steps, module: Module::Generator };
    discriminator.chain([last]).collect()
}

/// Where things lie in a leaf of one module's phases, in floats.
#[derive(Clone, Debug, PartialEq)]
pub struct LeafLayout {
    parameters: Layout,
    buffers: Layout,
    passes: usize,
}

impl LeafLayout {
    /// The layout of `module`'s leaves.
    pub fn new(models: &Models, layout: &StateLayout, module: Module) -> LeafLayout {
        let sections = layout.module(module);
        // With batch normalisation the discriminator sees real and fake samples apart.
        let passes = match module {
            Module::Discriminator if models.discriminator.has_batch_norm() => 2,
            _ => 1,
        };
        LeafLayout::of(sections.parameters.clone(), sections.buffers.clone(), passes)
    }

    /// A layout for these parameters, and for the batch statistics of so many passes.
    pub fn of(parameters: Layout, buffers: Layout, passes: usize) -> LeafLayout {
        LeafLayout { parameters, buffers, passes }
    }

    /// Place of the gradient.
    pub fn gradient(&self) -> Range<usize> {
        0..self.parameters.len()
    }

    /// Places of the batch statistics, pass by pass.
    pub fn statistics(&self) -> impl Iterator<Item = Range<usize>> {
        let (start, len) = (self.parameters.len(), self.buffers.len());
        (0..self.passes).map(move |pass| start + pass * len..start + (pass + 1) * len)
    }

    /// Place of the loss.
    pub fn loss(&self) -> usize {
        self.parameters.len() + self.passes * self.buffers.len()
    }

    /// Floats in a leaf: a multiple of [`ALIGNMENT`].
    pub fn len(&self) -> usize {
        self.loss() + ALIGNMENT
    }

    /// Never: a leaf has its loss at least.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Memory for one leaf.
pub struct LeafBuffer {
    /// All of it, and room to spare behind it.
    pub flat: Tensor,
    gradients: Vec<Tensor>,
    statistics: Vec<Tensor>,
    loss: Tensor,
}

impl LeafBuffer {
    /// A buffer of `capacity` floats, at least the layout's.
    pub fn new(layout: &LeafLayout, capacity: usize, device: Device) -> LeafBuffer {
        assert!(capacity >= layout.len(), "a leaf needs {} floats", layout.len());
        let capacity = i64::try_from(capacity).expect("fewer than 2^63 floats");
        let flat = Tensor::zeros([capacity], (Kind::Float, device));
        let statistics = layout.statistics();
        LeafBuffer {
            gradients: layout.parameters.views(&narrow(&flat, layout.gradient())),
            statistics: statistics.flat_map(|range| layout.buffers.views(&narrow(&flat, range))).collect(),
            loss: narrow(&flat, layout.loss()..layout.loss() + 1),
            flat,
        }
    }
}

/// The beginning of a generator's leaf.
pub struct Begun {
    /// The data shard.
    pub shard: u32,
    fake: Tensor,
    statistics: Vec<Tensor>,
}

/// What a leaf is computed from.
pub enum Input<'a> {
    /// Real samples, in a discriminator's phase.
    Real(&'a Tensor),
    /// What the generator has drawn, in its phase.
    Begun(Begun),
}

/// Computes leaves of a job.
pub struct Leaves<'a> {
    /// The job.
    pub job: &'a Job,
    /// Its networks.
    pub models: &'a Models,
    /// Where to compute.
    pub device: Device,
}

impl Leaves<'_> {
    /// What the generator's leaf of `shard` begins with, which is all that does not need the discriminator.
    pub fn begin_generator(&self, phase: Phase, step: u64, shard: u32, state: &State) -> Begun {
        let mut statistics = Vec::new();
        let key = self.noise_key(phase, step, shard);
        let fake = self.generate(key, state.trainable(Module::Generator), &mut statistics);
        Begun { shard, fake, statistics }
    }

    /// Fills `out` with the leaf of `shard`, from its b samples in a discriminator phase, (b, c, h, w), or from what it was
    /// begun with.
    pub fn compute(
        &self,
        phase: Phase,
        step: u64,
        shard: u32,
        state: &State,
        input: Input<'_>,
        out: &mut LeafBuffer,
    ) -> Result<(), c10d::Error> {
        let mut statistics = Vec::new();
        let loss = match input {
            Input::Real(real) => {
                self.discriminator_loss(self.noise_key(phase, step, shard), state, real, &mut statistics)
            }
            Input::Begun(begun) => {
                statistics = begun.statistics;
                self.generator_loss(&begun.fake, state)
            }
        };
        let gradients = Tensor::f_run_backward(&[&loss], state.trainable(phase.module), false, false)?;
        no_grad(|| {
            for (place, gradient) in out.gradients.iter_mut().zip(&gradients) {
                place.copy_(gradient);
            }
            let batch = f64::from(self.job.job.shard_batch);
            for (place, statistic) in out.statistics.iter_mut().zip(&statistics) {
                place.copy_(&(statistic * batch));
            }
            out.loss.copy_(&loss);
        });
        Ok(())
    }

    fn noise_key(&self, phase: Phase, step: u64, shard: u32) -> Key {
        Key { seed: self.job.job.seed, step, phase: phase.index, shard, purpose: Purpose::Noise }
    }

    fn discriminator_loss(
        &self,
        key: Key,
        state: &State,
        real: &Tensor,
        statistics: &mut Vec<Tensor>,
    ) -> Tensor {
        let fake = no_grad(|| self.generate(key, state.frozen(Module::Generator), &mut Vec::new()));
        let network = &self.models.discriminator;
        let parameters = state.trainable(Module::Discriminator);
        let logits = |x: &Tensor, statistics: &mut Vec<Tensor>| {
            network.forward(x, parameters, &mut Mode::Batch(statistics))
        };
        let (on_real, on_fake) = if network.has_batch_norm() {
            (logits(real, statistics), logits(&fake, statistics))
        } else {
            both_at_once(network, parameters, real, &fake)
        };
        let objective = &self.job.loss;
        let loss = loss::discriminator(objective.kind, &on_real, &on_fake);
        if !loss::has_gradient_penalty(objective) {
            return loss;
        }
        let places = Key { purpose: Purpose::Interpolation, ..key }.uniform(0.0, 1.0, self.shard_batch());
        let places = places.to_device(self.device);
        // The statistics of places between real and fake are not the data's.
        let penalty = |x: &Tensor| logits(x, &mut Vec::new());
        loss + loss::gradient_penalty(objective.gradient_penalty, real, &fake, &places, penalty)
    }

    fn generator_loss(&self, fake: &Tensor, state: &State) -> Tensor {
        let frozen = state.frozen(Module::Discriminator);
        let logits = self.models.discriminator.forward(fake, frozen, &mut Mode::Batch(&mut Vec::new()));
        loss::generator(self.job.loss.kind, &logits)
    }

    fn generate(&self, key: Key, parameters: &[Tensor], statistics: &mut Vec<Tensor>) -> Tensor {
        let latent = self.models.latent_dim;
        let signed = |n: usize| i64::try_from(n).expect("a small count");
        let noise = key.normal(self.shard_batch() * latent).view([-1, signed(latent)]).to_device(self.device);
        self.models.generator.forward(&noise, parameters, &mut Mode::Batch(statistics))
    }

    fn shard_batch(&self) -> usize {
        self.job.job.shard_batch as usize
    }
}

/// Without batch normalisation samples do not see each other, so one pass serves real and fake ones.
fn both_at_once(network: &Network, parameters: &[Tensor], real: &Tensor, fake: &Tensor) -> (Tensor, Tensor) {
    let both = Tensor::cat(&[real, fake], 0);
    let logits = network.forward(&both, parameters, &mut Mode::Batch(&mut Vec::new()));
    let reals = real.size()[0];
    (logits.narrow(0, 0, reals), logits.narrow(0, reals, fake.size()[0]))
}
