//! Gradients of neighbouring data shards in one pass. Of small shards most of the time is the bookkeeping of
//! operators, which one pass has once.
//!
//! 1. Every number of a sample is computed as in a pass over its shard alone, and gradients are summed over the
//!    shards as leaves of the tree. Losses are computed shard by shard, since libtorch's kernels for them treat the
//!    last few numbers of a tensor in another way than the others.
//! 2. Only plain objectives do this: samples do not see each other, and nothing but noise is drawn.

use c10d::aten::PlacedGradients;
use ganglion_proto::job::Precision;
use tch::{Device, Tensor, no_grad};

use super::{DISCRIMINATOR, FakeBatch, GENERATOR, Gan, GradPart, fill, kept, loss, signed};
use crate::nn::Pass;
use crate::objective::{ShardBatch, ShardGrad, ShardsAt};
use crate::random::{Draws, Purpose};
use crate::state::State;

/// Number of samples from which on a larger pass is no faster.
const ROWS: u32 = 128;

/// Largest number of samples that are kept, with all that their backward pass needs.
const KEPT_SAMPLES: usize = 2048;

impl Gan {
    /// Whether the gradients of several shards can be computed in one pass.
    pub(super) fn takes_shards_together(&self) -> bool {
        let Gan { job, models, .. } = self;
        let (loss, augmentation) = (&job.loss, &job.augmentation);
        let weights = [loss.r1, loss.r2, loss.final_r1, loss.final_r2];
        let has_penalty = weights.iter().any(|weight| *weight != 0.0) || loss::has_gradient_penalty(loss);
        let changes_images = augmentation.flip || !augmentation.kinds.is_empty() || augmentation.adaptive;
        let is_plain = !has_penalty && !changes_images && !self.pairs() && models.classes == 0;
        let rows = self.shard_batch();
        is_plain
            && self.device == Device::Cpu
            && job.job.precision == Precision::Fp32
            && models.generator.sums_by_shards(rows)
            // It sees real and generated samples at once.
            && models.discriminator.sums_by_shards(2 * rows)
    }

    /// Largest number of shards of one pass: the more, the fewer passes, up to some rows.
    pub(super) fn most_together(&self) -> u32 {
        (ROWS / self.job.job.shard_batch.max(1)).next_power_of_two().clamp(8, 64)
    }

    /// Whether the samples of so many more shards of one pass are kept for the generator's phase. The graph
    /// of a plain network is small.
    pub(super) fn keeps_together(&self, drawn: &[FakeBatch], count: u32) -> bool {
        (kept(drawn) + count as usize) * self.shard_batch() <= KEPT_SAMPLES
    }

    /// Generates the samples of neighbouring shards. Under `no_grad` they cannot begin a generator's
    /// gradient.
    pub(super) fn draw_together(&self, at: &ShardsAt, state: &State, draws: &Draws) -> FakeBatch {
        let noise = at.each().map(|at| self.noise(at, draws)).collect::<Vec<_>>();
        let (parameters, buffers) = (state.trainable(GENERATOR), state.buffers(GENERATOR));
        let key = self.key(at.first(), Purpose::Network);
        let mut pass = Pass { shards: at.count(), ..Pass::batch(parameters, buffers, key) };
        let fake = self.models.generator.forward(&Tensor::cat(&noise, 0), &mut pass);
        FakeBatch { shards: at.shards.clone(), fake, classes: None, statistics: Vec::new() }
    }

    /// Fills `out` with the discriminator's gradient, summed over neighbouring shards.
    pub(super) fn discriminator_together(
        &self,
        at: &ShardsAt,
        state: &State,
        (real, drawn): (&ShardBatch, &FakeBatch),
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let kind = self.job.loss.kind;
        // Rows of a shard lie together, its real samples before the generated ones.
        let by_shard = |images: &Tensor| images.unflatten(0, [at.count().into(), -1].as_slice());
        let images = Tensor::cat(&[by_shard(real.images()), by_shard(&drawn.fake.detach())], 1);
        let parameters = state.trainable(DISCRIMINATOR);
        let logits = self.logits_together(at, state, parameters, &images.flatten(0, 1));
        let halves = logits.chunk(2 * i64::from(at.count()), 0);
        let (mut losses, mut scalars) = (Vec::new(), Vec::new());
        for half in halves.chunks(2) {
            let [real, fake] = [&half[0], &half[1]];
            let loss = loss::discriminator(kind, real, fake);
            scalars.extend([loss.detach(), loss::score(kind, real), loss::score(kind, fake)]);
            losses.push(loss);
        }
        self.fill_together((losses, scalars), parameters, self.frozen_tensors(), out)
    }

    /// Fills `out` with the generator's gradient, summed over the shards of the samples.
    pub(super) fn generator_together(
        &self,
        at: &ShardsAt,
        state: &State,
        drawn: &FakeBatch,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let logits = self.logits_together(at, state, state.frozen(DISCRIMINATOR), &drawn.fake);
        let of_shards = logits.chunk(at.count().into(), 0);
        let losses: Vec<_> =
            of_shards.iter().map(|logits| loss::generator(self.job.loss.kind, logits)).collect();
        let scalars = losses.iter().map(Tensor::detach).collect();
        self.fill_together((losses, scalars), state.trainable(GENERATOR), 0, out)
    }

    fn logits_together(
        &self,
        at: &ShardsAt,
        state: &State,
        parameters: &[Tensor],
        images: &Tensor,
    ) -> Tensor {
        let key = self.key(at.first(), Purpose::Network);
        let pass = Pass::batch(parameters, state.buffers(DISCRIMINATOR), key);
        self.models.discriminator.forward(images, &mut Pass { shards: at.count(), ..pass })
    }

    fn fill_together(
        &self,
        (losses, scalars): (Vec<Tensor>, Vec<Tensor>),
        parameters: &[Tensor],
        frozen: usize,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        // Each loss has the gradient 1, as in a pass of its own.
        let placed = PlacedGradients::new(out.gradients.iter_mut().zip(parameters).skip(frozen))?;
        let gradients = Tensor::f_run_backward(&losses, parameters, false, false)?;
        drop(placed);
        no_grad(|| {
            let of_shards = signed(losses.len());
            let scalars = tree_sum(Tensor::stack(&scalars, 0).view([of_shards, -1]));
            let mut scalars = (0..signed(scalars.numel())).map(|at| scalars.get(at));
            let loss = scalars.next().expect("each gradient has a loss");
            let scores = [scalars.next(), scalars.next(), None];
            let part = GradPart { loss, scores, gradients, statistics: Vec::new() };
            fill(out, &[part], f64::from(self.job.job.shard_batch), frozen)
        })
    }
}

/// Sums rows as leaves of a binary tree from left to right.
fn tree_sum(mut rows: Tensor) -> Tensor {
    while rows.size()[0] > 1 {
        let count = rows.size()[0];
        let [left, right] = [0, 1].map(|first| rows.slice(0, first, count / 2 * 2, 2));
        // One without a neighbour goes up as it is.
        rows = Tensor::cat(&[left + right, rows.narrow(0, count / 2 * 2, count % 2)], 0);
    }
    rows.get(0)
}
