//! Kernel distance (KID).

use tch::{Kind, Tensor};

use super::{float, rows};

/// Number of samples in a block: Bińkowski et al. (2018), section 4, take blocks because the cost grows
/// with the square.
const BLOCK: i64 = 1000;

/// Squared maximum mean discrepancy of two sets of features with the kernel (x y / d + 1)^3, unbiased, a
/// mean over blocks of up to 1,000 samples of each in their order: Bińkowski et al. (2018), "Demystifying
/// MMD GANs", sections 3 and 4. With Inception's features it is the KID. It may be a little below zero.
///
/// A remainder that does not fill a block is left out, unless there is no other block. Both sets need two
/// samples or more.
pub(crate) fn kernel_distance(real: &Tensor, fake: &Tensor) -> f64 {
    in_blocks(real, fake, BLOCK)
}

pub(super) fn in_blocks(real: &Tensor, fake: &Tensor, size: i64) -> f64 {
    let (real, fake) = (real.to_kind(Kind::Double), fake.to_kind(Kind::Double));
    // Blocks are of pairs of as many samples of each.
    let samples = rows(&real).min(rows(&fake));
    let size = samples.min(size);
    let blocks = samples / size;
    let distance =
        |block: i64| of_block(&real.narrow(0, block * size, size), &fake.narrow(0, block * size, size));
    (0..blocks).map(distance).sum::<f64>() / float(blocks)
}

fn of_block(real: &Tensor, fake: &Tensor) -> f64 {
    let dimensions = float(real.size()[1]);
    let kernel =
        // The cubic kernel of section 4.
        |x: &Tensor, y: &Tensor| (x.matmul(&y.transpose(0, 1)) / dimensions + 1.0).pow_tensor_scalar(3);
    let samples = float(rows(real));
    // The kernel of a sample with itself is excluded: it carries no information on the distribution.
    let within = |x: &Tensor| {
        let all = kernel(x, x);
        ((all.sum(Kind::Double) - all.trace()) / (samples * (samples - 1.0))).double_value(&[])
    };
    let between = kernel(real, fake).mean(Kind::Double).double_value(&[]);
    within(real) + within(fake) - 2.0 * between
}
