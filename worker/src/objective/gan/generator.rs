//! Generated samples, and the gradient of the generator, for which the discriminator is a constant.

use tch::{Tensor, no_grad};

use super::{DISCRIMINATOR, FakeBatch, GENERATOR, Gan, GradPart, PassId, Point, own, part, signed};
use crate::nn::Pass;
use crate::objective::gan::loss;
use crate::objective::{Phase, ShardAt, ShardBatch};
use crate::random::{Draws, Key, Purpose};

impl Gan {
    /// Generates the samples for a shard gradient. Under `no_grad` they cannot begin a generator's
    /// gradient. `real` are the shard's real samples, for a pairwise objective.
    pub fn draw(&self, point: Point<'_>, real: Option<&ShardBatch>) -> FakeBatch {
        let Point { at, state, draws } = point;
        let key = |purpose| self.key(self.drawn_at(at), purpose);
        let noise = self.noise(at, draws);
        // From a key of their own, so that the noise is the same with and without classes.
        let classes = (self.models.classes > 0).then(|| self.classes(key(Purpose::Classes), real, draws));
        let (parameters, buffers) = (state.trainable(GENERATOR), state.buffers(GENERATOR));
        let pass = Pass::batch(parameters, buffers, own(key(Purpose::Network), PassId::Drawing));
        let mut pass = pass.of(classes.as_ref());
        let fake = self.models.generator.forward(&noise, &mut pass);
        let statistics = pass.statistics;
        FakeBatch { shards: at.shard..at.shard + 1, fake, classes, statistics }
    }

    /// Noise of the samples generated for a shard gradient, (b, `latent_dim`).
    pub(super) fn noise(&self, at: ShardAt, draws: &Draws) -> Tensor {
        let key = self.key(self.drawn_at(at), Purpose::Noise);
        let noise = draws.get(key, self.device, || self.noise_of(key));
        noise.view([-1, signed(self.models.latent_dim)])
    }

    /// Noise of a key, flat.
    pub(super) fn noise_of(&self, key: Key) -> Tensor {
        key.normal(self.shard_batch() * self.models.latent_dim)
    }

    /// Coordinates by which the samples of a shard gradient are drawn.
    pub(super) fn drawn_at(&self, at: ShardAt) -> ShardAt {
        // The generator's phase takes the samples of the last discriminator phase.
        let last = self.job.loss.discriminator_steps.saturating_sub(1);
        ShardAt { phase: Phase { index: at.phase.index.min(last), ..at.phase }, ..at }
    }

    /// Classes of the generated samples: those of the real samples that they are paired with, or else drawn
    /// with the frequencies of the data.
    fn classes(&self, key: Key, real: Option<&ShardBatch>, draws: &Draws) -> Tensor {
        if let Some(classes) = real.filter(|_| self.pairs()).and_then(|real| real.classes.as_ref()) {
            // Pairs are of one class: Huang et al. (2024) compare a sample with one that could be it.
            return classes.shallow_clone();
        }
        draws.get(key, self.device, || self.classes_of(key))
    }

    /// Classes of a key, (b) of int64.
    pub(super) fn classes_of(&self, key: Key) -> Tensor {
        let below = u32::try_from(self.labels.len()).expect("a data set has fewer than 2^32 samples");
        // By index into the data, which gives the classes their frequencies there.
        let drawn = key.indices(below, self.shard_batch());
        let classes: Vec<i64> = drawn.into_iter().map(|at| i64::from(self.labels[at as usize])).collect();
        Tensor::from_slice(&classes)
    }

    pub(super) fn generator(
        &self,
        point: Point<'_>,
        drawn: FakeBatch,
        real: Option<&ShardBatch>,
    ) -> Result<GradPart, c10d::Error> {
        // The same values without a gradient: the weight gradients of the discriminator are not
        // computed.
        let frozen = point.state.frozen(DISCRIMINATOR);
        let mut pass = self.look(point, PassId::Fake, frozen).of(drawn.classes.as_ref());
        let fake = self.seen(point, PassId::Fake, &drawn.fake, &mut pass);
        let loss = match real.filter(|_| self.pairs()) {
            Some(real) => {
                let mut pass = self.look(point, PassId::Real, frozen).of(real.classes.as_ref());
                let images = self.mirrored(point, real);
                // Real samples give the generator no gradient.
                let real = no_grad(|| self.seen(point, PassId::Real, &images, &mut pass));
                loss::generator_of_pairs(&real, &fake)
            }
            None => loss::generator(self.job.loss.kind, &fake),
        };
        // The updates of the pass that drew the samples: a pass of the discriminator's here commits
        // none.
        part(loss, [None, None, None], point.state.trainable(GENERATOR), drawn.statistics)
    }
}
