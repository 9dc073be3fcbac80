//! Generative adversarial networks (Goodfellow et al., 2014): the discriminator's phases, then the
//! generator's.
//!
//! 1. The generator's samples carry no gradient into a discriminator phase, and the discriminator is a
//!    constant in the generator's phase.
//! 2. The samples of a step's last discriminator phase are those of its generator phase too, as in DCGAN's
//!    training loop. Whether they are kept from the one to the other or drawn again changes no bit.
//!
//! The scalars of a gradient are the summed loss; in a discriminator's, its outputs for the real samples and
//! for the generator's, and the signs of the former. Nothing is decided by the outputs.

pub mod augment;
mod discriminator;
mod generator;
pub mod loss;
mod penalties;
pub mod schedule;

use ganglion_proto::job::Job;
use tch::{Device, Kind, Tensor, no_grad};

use self::augment::{Probability, augment};
use super::shard_grad::SCORES;
use super::{Compute, GradLayout, Objective, Phase, Reads, ShardAt, ShardBatch, ShardGrad};
use crate::nn::{Models, Pass, first_layers};
use crate::objective::gan::schedule::Schedule;
use crate::random::{Key, Purpose};
use crate::state::{Module, State, StateLayout};

/// Maximum number of data shards whose generated samples are kept, with all that their backward pass needs,
/// from the discriminator's phase to the generator's. Those of other shards are drawn again. A larger
/// number takes more memory.
const KEPT: usize = 8;

type Scores = [Option<Tensor>; SCORES];

/// Passes of a shard gradient; each has its own key for the networks' own draws.
#[derive(Clone, Copy)]
pub(super) enum PassId {
    /// The generator's forward pass.
    Drawing = 0,
    /// The discriminator on real samples, or on all at once.
    Real = 1,
    /// The discriminator on generated samples.
    Fake = 2,
    /// The discriminator, for a penalty.
    Penalty = 3,
}

/// Generated samples of a data shard, with the graph for a backward pass.
pub struct FakeBatch {
    /// The data shard.
    pub shard: u32,
    fake: Tensor,
    /// Classes of the samples, where the model is conditional.
    classes: Option<Tensor>,
    statistics: Vec<Tensor>,
}

/// Summand of a shard gradient. The discriminator's summands come from real samples, from generated ones,
/// and from the penalty.
pub struct GradPart {
    loss: Tensor,
    /// Sums of D outputs for real and for generated samples, and of signs, where this part has them.
    scores: Scores,
    gradients: Vec<Tensor>,
    statistics: Vec<Tensor>,
}

/// The samples that a shard's gradient is computed from.
pub enum Input<'a> {
    /// Discriminator phase: real samples, their part of the gradient if known, and generated samples.
    Samples(&'a ShardBatch, Option<GradPart>, &'a FakeBatch),
    /// Generator phase: generated samples, and the real samples of the step's last discriminator phase for
    /// a pairwise objective.
    Fake(FakeBatch, Option<&'a ShardBatch>),
}

/// The GAN of a job.
pub struct Gan<'a> {
    /// The job.
    pub job: &'a Job,
    /// Generator and discriminator.
    pub models: &'a Models,
    /// The class of each sample of the data, where the model is conditional.
    pub labels: &'a [u32],
    /// Compute device.
    pub device: Device,
}

/// Phases of every step, in order: the discriminator's, then the generator's.
pub fn phases(job: &Job) -> Vec<Phase> {
    let updates = job.loss.discriminator_steps;
    let discriminator =
        (0..updates).map(|index| Phase { index, module: Module::Discriminator, reads: Reads::Next });
    let reads = if job.loss.kind.pairs() { Reads::Same } else { Reads::Nothing };
    discriminator.chain([Phase { index: updates, module: Module::Generator, reads }]).collect()
}

/// Layout of the gradients of a network's phases.
pub fn grad_layout(models: &Models, layout: &StateLayout, module: Module) -> GradLayout {
    let sections = layout.module(module);
    // With batch normalisation the discriminator sees real and fake samples apart.
    let passes = match module {
        Module::Discriminator if models.discriminator.sees_batch() => 2,
        _ => 1,
    };
    GradLayout::of(sections.parameters.clone(), sections.buffers.clone(), passes)
}

impl Objective for Gan<'_> {
    fn phases(&self) -> Vec<Phase> {
        phases(self.job)
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        Box::new(Course { gan: self, drawn: Vec::new(), ahead: None })
    }
}

/// Computation of one member's gradients: what is kept from phase to phase.
struct Course<'a> {
    gan: &'a Gan<'a>,
    /// Generated samples kept for the generator's phase.
    drawn: Vec<FakeBatch>,
    /// The real samples' part of a discriminator gradient in a phase to come.
    ahead: Option<(ShardAt, GradPart)>,
}

impl Compute for Course<'_> {
    fn gradient(
        &mut self,
        at: ShardAt,
        state: &State,
        batch: Option<&ShardBatch>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let Course { gan, drawn, ahead } = self;
        let draw = || gan.draw(at, state, batch);
        let Some(real) = batch.filter(|_| at.phase.module == Module::Discriminator) else {
            let kept = drawn.iter().position(|drawn| drawn.shard == at.shard);
            let fake = kept.map_or_else(draw, |kept| drawn.swap_remove(kept));
            return gan.compute(at, state, Input::Fake(fake, batch), out);
        };
        // Only kept samples need a graph: the discriminator's gradient detaches them.
        let keep = gan.serves_generator(at.phase) && drawn.len() < KEPT;
        let fake = if keep { draw() } else { no_grad(draw) };
        let of_real = ahead.take_if(|(of, _)| *of == at).map(|(_, part)| part);
        gan.compute(at, state, Input::Samples(real, of_real, &fake), out)?;
        if keep {
            drawn.push(fake);
        }
        Ok(())
    }

    /// With batch normalisation the discriminator sees real samples apart, and the generator's update does
    /// not change their part of the gradient.
    fn looks_ahead(&self, under_way: Phase) -> bool {
        under_way.module == Module::Generator && self.gan.tells_real_apart()
    }

    fn look_ahead(&mut self, at: ShardAt, state: &State, batch: &ShardBatch) -> Result<(), c10d::Error> {
        self.ahead = Some((at, self.gan.real_part(at, state, batch)?));
        Ok(())
    }
}

impl Gan<'_> {
    /// Fills `out` with the gradient of a shard.
    pub fn compute(
        &self,
        at: ShardAt,
        state: &State,
        input: Input<'_>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let (parts, frozen) = match input {
            Input::Samples(real, of_real, drawn) => {
                (self.discriminator(at, state, real, of_real, drawn)?, self.frozen_tensors())
            }
            Input::Fake(drawn, real) => (vec![self.generator(at, drawn, real, state)?], 0),
        };
        no_grad(|| fill(out, &parts, f64::from(self.job.job.shard_batch), frozen));
        Ok(())
    }

    /// Whether the samples generated in a phase are those of the generator's phase too.
    pub fn serves_generator(&self, phase: Phase) -> bool {
        phase.index + 1 == self.job.loss.discriminator_steps
    }

    /// Whether the objective compares pairs, so that the generator's phase needs real samples.
    pub fn pairs(&self) -> bool {
        self.job.loss.kind.pairs()
    }

    /// Whether the discriminator sees real samples in a pass apart from the generated ones.
    pub fn tells_real_apart(&self) -> bool {
        self.models.discriminator.sees_batch() && !self.pairs()
    }

    /// Forward pass of the discriminator with the given parameters.
    pub(super) fn look<'a>(
        &self,
        at: ShardAt,
        state: &'a State,
        which: PassId,
        parameters: &'a [Tensor],
    ) -> Pass<'a> {
        let key = own(self.key(at, Purpose::Network), which);
        Pass::batch(parameters, state.buffers(Module::Discriminator), key)
    }

    /// Logits of the discriminator for images, after augmentation.
    pub(super) fn seen(
        &self,
        at: ShardAt,
        state: &State,
        which: PassId,
        images: &Tensor,
        pass: &mut Pass<'_>,
    ) -> Tensor {
        self.models.discriminator.forward(&self.augmented(at, state, which, images), pass)
    }

    pub(super) fn augmented(&self, at: ShardAt, state: &State, which: PassId, images: &Tensor) -> Tensor {
        let kinds = &self.job.augmentation.kinds;
        if kinds.is_empty() {
            return images.shallow_clone();
        }
        let fixed = || Probability::Fixed(Schedule::after(self.job, at.step).augmentation());
        let probability = augment::controlled(state).map_or_else(fixed, Probability::Adaptive);
        augment(kinds, &probability, own(self.key(at, Purpose::Augmentation), which), images)
    }

    /// Real samples, mirrored at random where the job allows flips.
    pub(super) fn mirrored(&self, at: ShardAt, real: &ShardBatch) -> Tensor {
        if !self.job.augmentation.flip {
            return real.images.shallow_clone();
        }
        augment::mirror(own(self.key(at, Purpose::Augmentation), PassId::Drawing), &real.images)
    }

    pub(super) fn signs(&self, real: &Tensor) -> Option<Tensor> {
        self.job.augmentation.adaptive.then(|| loss::signs(real))
    }

    /// Number of the discriminator's first tensors that stay frozen.
    pub(super) fn frozen_tensors(&self) -> usize {
        match self.job.model.freeze_discriminator {
            0 => 0,
            layers => first_layers(&self.models.discriminator.parameters(), layers),
        }
    }

    pub(super) fn key(&self, at: ShardAt, purpose: Purpose) -> Key {
        let ShardAt { phase, step, shard } = at;
        Key { seed: self.job.job.seed, step, phase: phase.index, shard, purpose }
    }

    pub(super) fn shard_batch(&self) -> usize {
        self.job.job.shard_batch as usize
    }
}

/// Returns a part with the gradient of its loss.
fn part(
    loss: Tensor,
    scores: Scores,
    parameters: &[Tensor],
    statistics: Vec<Tensor>,
) -> Result<GradPart, c10d::Error> {
    let gradients = Tensor::f_run_backward(&[&loss], parameters, false, false)?;
    Ok(GradPart { loss, scores, gradients, statistics })
}

/// Whether all these parameters are fp32.
fn is_single(parameters: &[Tensor]) -> bool {
    parameters.iter().all(|parameter| parameter.kind() == Kind::Float)
}

/// Adds the parts of a shard's gradient up, in their order. The first `frozen` tensors have no gradient: with
/// moments of zero Adam leaves them exactly as they are.
fn fill(out: &mut ShardGrad, parts: &[GradPart], batch: f64, frozen: usize) {
    for (place, at) in out.gradients.iter_mut().zip(0..) {
        if at < frozen {
            let _ = place.zero_();
            continue;
        }
        sum_into(place, parts.iter().map(|part| &part.gradients[at]));
    }
    let statistics = parts.iter().flat_map(|part| &part.statistics);
    for (place, statistic) in out.statistics.iter_mut().zip(statistics) {
        place.copy_(&(statistic * batch));
    }
    sum_into(&mut out.loss, parts.iter().map(|part| &part.loss));
    for (of, place) in out.scores.iter_mut().enumerate() {
        sum_into(place, parts.iter().filter_map(|part| part.scores[of].as_ref()));
    }
}

/// Writes a sum to its place. A parameter that a part of the loss does not depend on has no gradient from
/// that part.
fn sum_into<'a>(place: &mut Tensor, mut terms: impl Iterator<Item = &'a Tensor>) {
    match terms.find(|term| term.defined()) {
        Some(first) => place.copy_(first),
        None => drop(place.zero_()),
    }
    for term in terms.filter(|term| term.defined()) {
        let _ = place.g_add_(term);
    }
}

/// Key of a network's own draws in one pass of a gradient.
fn own(key: Key, look: PassId) -> Key {
    Key { phase: 4 * key.phase + look as u32, ..key }
}

fn signed(n: usize) -> i64 {
    i64::try_from(n).expect("a small count")
}
