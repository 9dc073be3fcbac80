//! Augmentation of the discriminator's inputs.
//!
//! Zhao et al. (2020), "Differentiable Augmentation for Data-Efficient GAN Training", equations 4 and 5:
//! real and generated samples are augmented alike, in both networks' phases, and gradients go back through
//! it. Karras et al. (2020), "Training Generative Adversarial Networks with Limited Data", section 3: each
//! kind is applied to a sample with a probability that follows how far the discriminator overfits.
//!
//! 1. The augmentation of a sample is a function of its shard gradient's key and of the probability, and
//!    the same number of draws is made whatever the probability is.
//! 2. Every operation has derivatives of all orders by the pixels, and the same bits each time on every
//!    device: samples are moved by products with matrices of zeros and ones.
//! 3. The controller's probability is part of the state and moves by reduced values alone, so all ranks
//!    have the same.

use ganglion_proto::job::{AugmentationKind, Job};
use tch::{Kind, Tensor, no_grad};

use crate::random::Key;

/// Number of draws for one kind and one sample: whether it applies, and three parameters.
const DRAWS: usize = 4;
/// Number of discriminator updates between adjustments of the controller: Karras et al. (2020), section
/// 3.1.
const UPDATES: u64 = 4;

/// Probability of each kind.
#[derive(Debug)]
pub(crate) enum Probability {
    /// Fixed by the job.
    Fixed(f64),
    /// Set by the controller; a tensor of one element.
    Adaptive(Tensor),
}

/// Kinds of augmentation of a mirror image.
const MIRROR: [AugmentationKind; 1] = [AugmentationKind::Flip];

/// Draws of a key by which so many samples are augmented, flat on the CPU.
pub(crate) fn draws(kinds: &[AugmentationKind], key: Key, samples: usize) -> Tensor {
    // All at once, whatever applies: the next kind's do not depend on this one's (invariant 1).
    key.uniform(0.0, 1.0, samples * DRAWS * kinds.len())
}

/// Draws of a key by which so many samples are mirrored.
pub(crate) fn mirror_draws(key: Key, samples: usize) -> Tensor {
    draws(&MIRROR, key, samples)
}

/// Augments images (b, c, h, w) in [-1, 1] by their [draws](draws), on the same device.
pub(crate) fn augment(
    kinds: &[AugmentationKind],
    probability: &Probability,
    draws: &Tensor,
    images: &Tensor,
) -> Tensor {
    let draws = draws.view([-1, images.size()[0]]);
    let mut x = images.shallow_clone();
    for (kind, first) in kinds.iter().zip((0..).step_by(DRAWS)) {
        let draw = |row: i64| draws.get(first + row).view([-1, 1, 1, 1]);
        let is_done = match probability {
            Probability::Fixed(probability) => draw(0).lt(*probability),
            Probability::Adaptive(probability) => draw(0).lt_tensor(probability),
        };
        let how = [draw(1), draw(2), draw(3)];
        // Computed for all and chosen after: no branch depends on a value on a GPU.
        x = done(*kind, &how, &x).where_self(&is_done, &x);
    }
    x
}

/// Mirrors each image left to right with probability one half, by [draws](mirror_draws).
pub(crate) fn mirror(draws: &Tensor, images: &Tensor) -> Tensor {
    augment(&MIRROR, &Probability::Fixed(0.5), draws, images)
}

/// Applies a kind to images; `how` are draws from [0, 1) of shape (b, 1, 1, 1).
fn done(kind: AugmentationKind, how: &[Tensor; 3], x: &Tensor) -> Tensor {
    match kind {
        AugmentationKind::Flip => x.flip([3]),
        AugmentationKind::Rotate90 => rotate(&how[0], x),
        AugmentationKind::Translation => translate(&how[0], &how[1], x),
        AugmentationKind::Color => color(how, x),
        AugmentationKind::Cutout => cut_out(&how[0], &how[1], x),
    }
}

/// Rotates by 0, 90, 180 or 270 degrees: Karras et al. (2020), appendix B.
fn rotate(how: &Tensor, x: &Tensor) -> Tensor {
    // Four turns as likely each; floor(4 u) is at most 3, as u < 1.
    let turns = (how * 4.0).floor();
    (1..4).fold(x.shallow_clone(), |chosen, by| x.rot90(by, [2, 3]).where_self(&turns.eq(by), &chosen))
}

/// Translates by whole pixels, at most an eighth of a side, with zeros (grey) coming in: the released code
/// of Zhao et al. (2020).
fn translate(down: &Tensor, right: &Tensor, x: &Tensor) -> Tensor {
    let moved = |how: &Tensor, side: i64| {
        let most = (side + 4) / 8;
        // Whole pixels from -most to most.
        let by = (how * count(2 * most + 1)).floor() - count(most);
        let at = Tensor::arange(side, (Kind::Float, x.device()));
        // Row i is taken from row i + by.
        (at.view([1, 1, side, 1]) + by).eq_tensor(&at.view([1, 1, 1, side])).to_kind(x.kind())
    };
    let [height, width] = [x.size()[2], x.size()[3]];
    // A product with zeros and ones moves pixels exactly, and its derivative is another such product.
    moved(down, height).matmul(x).matmul(&moved(right, width).transpose(2, 3))
}

/// Changes brightness, saturation and contrast: the released code of Zhao et al. (2020).
fn color(how: &[Tensor; 3], x: &Tensor) -> Tensor {
    // Brightness from -0.5 to 0.5, saturation from 0 to 2, contrast from 0.5 to 1.5, as in that code.
    let x = x + (&how[0] - 0.5);
    let grey = x.mean_dim([1i64].as_slice(), true, None);
    let x = (&x - &grey) * (&how[1] * 2.0) + grey;
    let mean = x.mean_dim([1i64, 2, 3].as_slice(), true, None);
    (&x - &mean) * (&how[2] + 0.5) + mean
}

/// Sets a square of half the side to zero, wherever its middle lies: the released code of Zhao et al.
/// (2020).
fn cut_out(row: &Tensor, column: &Tensor, x: &Tensor) -> Tensor {
    let within = |how: &Tensor, side: i64, shape: [i64; 4]| {
        let size = (side + 1) / 2;
        // The middle may lie at any pixel, so a hole at the edge is smaller.
        let start = (how * count(side + 1 - size % 2)).floor() - count(size / 2);
        let at = Tensor::arange(side, (Kind::Float, x.device())).view(shape);
        at.ge_tensor(&start).logical_and(&at.lt_tensor(&(start + count(size))))
    };
    let [height, width] = [x.size()[2], x.size()[3]];
    let hole = within(row, height, [1, 1, height, 1]).logical_and(&within(column, width, [1, 1, 1, width]));
    x * hole.logical_not().to_kind(x.kind())
}

#[allow(clippy::cast_precision_loss)] // sides of images
fn count(n: i64) -> f64 {
    n as f64
}

/// Adjusts a controller after a discriminator's update, by the mean sign of D(x) over real samples: Karras et
/// al. (2020), section 3.1. `controller` holds the probability, and the sum of signs since the last
/// adjustment. `updates` counts the discriminator's updates, this one included.
pub(crate) fn adjust(job: &Job, controller: &Tensor, sign: &Tensor, updates: u64) {
    let (mut probability, mut signs) = (controller.narrow(0, 0, 1), controller.narrow(0, 1, 1));
    no_grad(|| {
        let _ = signs.g_add_(sign);
        // Counted by the network's updates, which are the same on all ranks.
        if !updates.is_multiple_of(UPDATES) {
            return;
        }
        #[allow(clippy::cast_precision_loss)] // far below 2^53
        let (images, over) = ((UPDATES * job.global_batch()) as f64, job.augmentation.adjust_images as f64);
        #[allow(clippy::cast_precision_loss)]
        // The mean sign of the last updates, by reduced values alone (invariant 3).
        let excess = &signs / UPDATES as f64 - job.augmentation.target;
        // By a fixed amount either way: from 0 to 1 within `adjust_images` images.
        let _ = probability.g_add_(&(excess.sign() * (images / over))).clamp_(0.0, 1.0);
        let _ = signs.zero_();
    });
}

#[cfg(test)]
mod tests;
