//! Metrics of pixels, for any data.

use tch::{Kind, Tensor};

use super::{float, rows};
use crate::random::{Key, Purpose};

/// Number of directions for the sliced distance.
const DIRECTIONS: i64 = 256;
/// Number of directions drawn at once.
const CHUNK: i64 = 64;

/// Sliced Wasserstein distance of the images as points: the mean over 256 fixed random directions of the
/// distance W1 of the projections. Rabin et al. (2011), "Wasserstein barycenter and its application to
/// texture mixing"; as a metric of GANs Karras et al. (2018), section 5, there on patches of a Laplacian
/// pyramid, here on whole images. Pixels go from -1 to 1.
///
/// Of each set as many samples are taken as the smaller one has.
pub(crate) fn sliced_wasserstein(real: &Tensor, fake: &Tensor) -> f64 {
    // The distance of sorted lists needs lists of one length.
    let samples = rows(real).min(rows(fake));
    let points = |images: &Tensor| images.narrow(0, 0, samples).flatten(1, -1).to_kind(Kind::Float);
    let (real, fake) = (points(real), points(fake));
    let dimensions = real.size()[1];
    // One direction a row: the values to sort lie together in memory.
    let along =
        // In one dimension the optimal transport pairs the sorted values.
        |directions: &Tensor, points: &Tensor| directions.matmul(&points.transpose(0, 1)).sort(1, false).0;
    let distance = |chunk: i64| {
        let directions = directions(chunk, dimensions);
        let gaps = (along(&directions, &real) - along(&directions, &fake)).abs();
        gaps.mean(Kind::Double).double_value(&[])
    };
    let chunks = DIRECTIONS / CHUNK;
    (0..chunks).map(distance).sum::<f64>() / float(chunks)
}

/// Returns the directions of a chunk, each of length 1: ([`CHUNK`], dimensions).
fn directions(chunk: i64, dimensions: i64) -> Tensor {
    let shard = u32::try_from(chunk).expect("few chunks");
    // Fixed directions: the figures of two evaluations differ by the samples alone.
    let key = Key { seed: 0, step: 0, phase: 1, shard, purpose: Purpose::Evaluation };
    let count = usize::try_from(dimensions * CHUNK).expect("an image is small");
    let drawn = key.normal(count).view([CHUNK, dimensions]);
    let lengths = drawn.square().sum_dim_intlist([1i64].as_slice(), true, Kind::Float).sqrt();
    drawn / lengths
}

/// Diversity of the generated samples relative to the real ones: the ratio of the root mean squared
/// distances between two samples, by their pixels. 0 if all are alike.
///
/// The mean squared distance of two samples is twice the sum of the variances, so no pairs need be formed.
pub(crate) fn diversity(real: &Tensor, fake: &Tensor) -> f64 {
    let spread = |images: &Tensor| {
        let points = images.flatten(1, -1).to_kind(Kind::Double);
        points.var_dim([0i64].as_slice(), true, false).sum(Kind::Double).sqrt().double_value(&[])
    };
    spread(fake) / spread(real)
}
