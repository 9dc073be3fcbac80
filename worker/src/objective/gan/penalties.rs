//! Penalties on the gradient of the discriminator with respect to its input. They are computed in fp32.

use tch::Tensor;

use super::{DISCRIMINATOR, FakeBatch, Gan, GradPart, PassId, Point, part};
use crate::objective::gan::loss;
use crate::objective::gan::schedule::Schedule;
use crate::objective::{ShardAt, ShardBatch};
use crate::random::{Key, Purpose};

impl Gan {
    /// Factor of the penalties in a phase: 0 in phases without them, else the interval between phases with
    /// them.
    pub(super) fn penalty_factor(&self, at: ShardAt) -> f64 {
        // Every k-th phase, k times as strong: Karras et al. (2020), StyleGAN2, section 3.1.
        let every = self.job.loss.penalty_every;
        // Counted over all steps, so that the interval goes on across them.
        let update = at.step * u64::from(self.job.loss.discriminator_steps) + u64::from(at.phase.index);
        if update.is_multiple_of(u64::from(every)) { f64::from(every) } else { 0.0 }
    }

    /// Weights of R1 and R2 in a phase.
    pub(super) fn penalties(&self, at: ShardAt) -> [f64; 2] {
        let weights = Schedule::after(&self.job, at.step).penalties();
        weights.map(|weight| weight * self.penalty_factor(at))
    }

    /// Computes R1 or R2 of samples, images with their classes, in fp32, in a pass of its own.
    pub(super) fn zero_centred(
        &self,
        point: Point<'_>,
        which: PassId,
        weight: f64,
        (images, classes): (&Tensor, Option<&Tensor>),
    ) -> Result<GradPart, c10d::Error> {
        // The fp32 parameters: a second derivative in bf16 would be mostly rounding.
        let parameters = point.state.master(DISCRIMINATOR);
        // The gradient is taken at these images, and goes no further back.
        let images = images.detach().set_requires_grad(true);
        let mut pass = self.look(point, PassId::Penalty, parameters).of(classes);
        let logits = self.seen(point, which, &images, &mut pass);
        part(loss::zero_centred_penalty(weight, &images, &logits), [None, None, None], parameters, Vec::new())
    }

    /// Places of a key between real and generated samples, (b).
    pub(super) fn places_of(&self, key: Key) -> Tensor {
        key.uniform(0.0, 1.0, self.shard_batch())
    }

    /// Computes the gradient penalty, in fp32. Its buffer updates are dropped: points between real and
    /// generated samples are not data.
    pub(super) fn penalty(
        &self,
        point: Point<'_>,
        real: &ShardBatch,
        drawn: &FakeBatch,
    ) -> Result<GradPart, c10d::Error> {
        let key = self.key(point.at, Purpose::Interpolation);
        // One place for each sample, drawn by the key of the shard (D2).
        let places = point.draws.get(key, self.device, || self.places_of(key));
        let parameters = point.state.master(DISCRIMINATOR);
        let mut pass = self.look(point, PassId::Penalty, parameters).of(real.classes.as_ref());
        let logits = |x: &Tensor| self.models.discriminator.forward(x, &mut pass);
        let weight = self.job.loss.gradient_penalty * self.penalty_factor(point.at);
        // The discriminator sees augmented samples only, so the penalty holds it in check there.
        let real = self.augmented(point, PassId::Real, &self.mirrored(point, real));
        let fake = self.augmented(point, PassId::Fake, &drawn.fake.detach());
        let loss = loss::gradient_penalty(weight, &real, &fake, &places, logits);
        part(loss, [None, None, None], parameters, Vec::new())
    }
}
