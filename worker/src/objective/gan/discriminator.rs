//! Gradient of the discriminator: of the loss over real and generated samples, and of its penalties. The
//! generated samples carry no gradient.

use tch::Tensor;

use super::{DISCRIMINATOR, FakeBatch, Gan, GradPart, PassId, Point, is_single, part};
use crate::nn::Pass;
use crate::objective::ShardBatch;
use crate::objective::gan::loss;

impl Gan {
    /// Computes the part of a discriminator gradient that comes from real samples, where they are seen
    /// apart. A commit of the generator does not change it.
    pub fn real_part(&self, point: Point<'_>, real: &ShardBatch) -> Result<GradPart, c10d::Error> {
        let kind = self.job.loss.kind;
        let parameters = point.state.trainable(DISCRIMINATOR);
        let mut pass = self.look(point, PassId::Real, parameters).of(real.classes.as_ref());
        let logits = self.seen(point, PassId::Real, &self.mirrored(point, real), &mut pass);
        let scores = [Some(loss::score(kind, &logits)), None, self.signs(&logits)];
        // Committed as the first of the phase's two passes.
        part(loss::on_real(kind, &logits), scores, parameters, pass.statistics)
    }

    pub(super) fn fake_part(
        &self,
        point: Point<'_>,
        drawn: &FakeBatch,
        of_real: &[Tensor],
    ) -> Result<GradPart, c10d::Error> {
        let kind = self.job.loss.kind;
        let parameters = point.state.trainable(DISCRIMINATOR);
        // The buffers as the pass over the real samples left them.
        let buffers = self.models.discriminator.after(point.state.buffers(DISCRIMINATOR), of_real);
        let pass = self.look(point, PassId::Fake, parameters).of(drawn.classes.as_ref());
        let mut pass = Pass { buffers: &buffers, ..pass };
        // No gradient into the generator (invariant 1 of `gan`).
        let logits = self.seen(point, PassId::Fake, &drawn.fake.detach(), &mut pass);
        let scores = [None, Some(loss::score(kind, &logits)), None];
        part(loss::on_fake(kind, &logits), scores, parameters, pass.statistics)
    }

    pub(super) fn discriminator(
        &self,
        point: Point<'_>,
        real: &ShardBatch,
        of_real: Option<GradPart>,
        drawn: &FakeBatch,
    ) -> Result<Vec<GradPart>, c10d::Error> {
        let [r1, r2] = self.penalties(point.at);
        let parameters = point.state.trainable(DISCRIMINATOR);
        // Both penalties can share a pass with the loss if samples do not see each other and the pass is in
        // fp32.
        let shares = r1 > 0.0 && r2 > 0.0 && !self.models.discriminator.sees_batch() && is_single(parameters);
        let mut parts = if self.tells_real_apart() {
            // Looked ahead or computed now: the same arithmetic.
            let of_real = of_real.map_or_else(|| self.real_part(point, real), Ok)?;
            let of_fake = self.fake_part(point, drawn, &of_real.statistics)?;
            vec![of_real, of_fake]
        } else {
            vec![self.together(point, real, drawn, shares.then_some([r1, r2]))?]
        };
        // A weight of 0 is also that of a phase in between (`penalty_factor`).
        if r1 > 0.0 && !shares {
            let samples = (&self.mirrored(point, real), real.classes.as_ref());
            parts.push(self.zero_centred(point, PassId::Real, r1, samples)?);
        }
        if r2 > 0.0 && !shares {
            let samples = (&drawn.fake.detach(), drawn.classes.as_ref());
            parts.push(self.zero_centred(point, PassId::Fake, r2, samples)?);
        }
        // Lazy regularisation: Karras et al. (2020), StyleGAN2, section 3.1.
        if loss::has_gradient_penalty(&self.job.loss) && self.penalty_factor(point.at) > 0.0 {
            parts.push(self.penalty(point, real, drawn)?);
        }
        Ok(parts)
    }

    /// Computes the loss of real and generated samples together, in one pass unless samples see each other.
    pub(super) fn together(
        &self,
        point: Point<'_>,
        real: &ShardBatch,
        drawn: &FakeBatch,
        penalties: Option<[f64; 2]>,
    ) -> Result<GradPart, c10d::Error> {
        let kind = self.job.loss.kind;
        let parameters = point.state.trainable(DISCRIMINATOR);
        let mut images = [self.mirrored(point, real), drawn.fake.detach()];
        if penalties.is_some() {
            // Leaves, by which the penalties differentiate.
            images = images.map(|images| images.detach().set_requires_grad(true));
        }
        let classes = [real.classes.as_ref(), drawn.classes.as_ref()];
        let (logits, statistics) = self.both_seen(point, parameters, &images, classes);
        let scores = logits.each_ref().map(|logits| Some(loss::score(kind, logits)));
        let [of_real, of_fake] = scores;
        let mut sum = loss::discriminator(kind, &logits[0], &logits[1]);
        for side in 0..2 {
            if let Some(weights) = penalties {
                // In the order real, generated: another order has other bits.
                sum = sum.g_add(&loss::zero_centred_penalty(weights[side], &images[side], &logits[side]));
            }
        }
        part(sum, [of_real, of_fake, self.signs(&logits[0])], parameters, statistics)
    }

    /// Returns the logits of real and of generated samples, and the buffer updates of all passes that were
    /// needed.
    pub(super) fn both_seen(
        &self,
        point: Point<'_>,
        parameters: &[Tensor],
        images: &[Tensor; 2],
        classes: [Option<&Tensor>; 2],
    ) -> ([Tensor; 2], Vec<Tensor>) {
        let look = |which| self.look(point, which, parameters);
        let shown = |side: usize, which| self.augmented(point, which, &images[side]);
        // Alike for both kinds (Zhao et al., 2020), by keys of their own.
        let [real, fake] = [shown(0, PassId::Real), shown(1, PassId::Fake)];
        // Apart, since moments over both kinds at once would tell them apart.
        if self.models.discriminator.sees_batch() {
            let mut of_real = look(PassId::Real).of(classes[0]);
            let of_real_logits = self.models.discriminator.forward(&real, &mut of_real);
            // The second pass begins where the first ended, as in PyTorch's usual loop.
            let buffers =
                self.models.discriminator.after(point.state.buffers(DISCRIMINATOR), &of_real.statistics);
            let mut of_fake = Pass { buffers: &buffers, ..look(PassId::Fake).of(classes[1]) };
            let logits = [of_real_logits, self.models.discriminator.forward(&fake, &mut of_fake)];
            let mut statistics = of_real.statistics;
            statistics.extend(of_fake.statistics);
            return (logits, statistics);
        }
        let classes = classes[0].zip(classes[1]).map(|(real, fake)| Tensor::cat(&[real, fake], 0));
        let mut pass = look(PassId::Real).of(classes.as_ref());
        // One pass over both is faster than two, and has one gradient.
        let logits = self.models.discriminator.forward(&Tensor::cat(&[real, fake], 0), &mut pass);
        let halves = logits.chunk(2, 0);
        ([0, 1].map(|half| halves[half].shallow_clone()), pass.statistics)
    }
}
