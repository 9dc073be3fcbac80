//! Draws of a shard gradient that are made ahead, by another thread than the one that trains.

use tch::Tensor;

use super::{DISCRIMINATOR, Gan, PassId, augment, loss, own};
use crate::objective::ShardAt;
use crate::random::{Key, Purpose};

impl Gan {
    /// All draws of a shard gradient, by their keys, but those of networks. The generator's phase finds the
    /// noise of the discriminator's.
    pub(super) fn draws_of(&self, at: ShardAt) -> Vec<(Key, Vec<Tensor>)> {
        let (job, augmentation, samples) = (&self.job, &self.job.augmentation, self.shard_batch());
        let is_discriminator = at.phase.updates.contains(DISCRIMINATOR);
        let mut all = Vec::new();
        let mut add = |key: Key, of: &dyn Fn(Key) -> Tensor| all.push((key, vec![of(key)]));
        if is_discriminator {
            let drawn_at = self.drawn_at(at);
            add(self.key(drawn_at, Purpose::Noise), &|key| self.noise_of(key));
            if self.models.classes > 0 && !self.pairs() {
                add(self.key(drawn_at, Purpose::Classes), &|key| self.classes_of(key));
            }
            if loss::has_gradient_penalty(&job.loss) && self.penalty_factor(at) > 0.0 {
                add(self.key(at, Purpose::Interpolation), &|key| self.places_of(key));
            }
        }
        let sees_real = is_discriminator || self.pairs();
        let of_pass = |pass| own(self.key(at, Purpose::Augmentation), pass);
        if augmentation.flip && sees_real {
            add(of_pass(PassId::Drawing), &|key| augment::mirror_draws(key, samples));
        }
        let kinds = &augmentation.kinds;
        let passes = [(PassId::Real, sees_real), (PassId::Fake, true)];
        for (pass, _) in passes.into_iter().filter(|(_, is_there)| *is_there && !kinds.is_empty()) {
            add(of_pass(pass), &|key| augment::draws(kinds, key, samples));
        }
        all
    }
}
