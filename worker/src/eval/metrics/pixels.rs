//! What pixels tell, of any data.

use tch::{Kind, Tensor};

use super::{float, rows};
use crate::random::{Key, Purpose};

/// Directions that distributions are looked at along.
const DIRECTIONS: i64 = 256;
/// Directions drawn at once.
const CHUNK: i64 = 64;

/// The sliced Wasserstein distance of the images as points: the mean over 256 fixed random directions of the
/// distance W1 of what lies along each. Rabin et al. (2011), "Wasserstein barycenter and its application to
/// texture mixing"; as a metric of GANs Karras et al. (2018), section 5, there on patches of a Laplacian
/// pyramid, here on whole images. Pixels go from -1 to 1.
///
/// As many samples are taken of each set as the smaller one has.
pub fn sliced_wasserstein(real: &Tensor, fake: &Tensor) -> f64 {
    let samples = rows(real).min(rows(fake));
    let points = |images: &Tensor| images.narrow(0, 0, samples).flatten(1, -1).to_kind(Kind::Float);
    let (real, fake) = (points(real), points(fake));
    let dimensions = real.size()[1];
    // A row a direction: what is sorted lies together in memory.
    let along =
        |directions: &Tensor, points: &Tensor| directions.matmul(&points.transpose(0, 1)).sort(1, false).0;
    let distance = |chunk: i64| {
        let directions = directions(chunk, dimensions);
        let gaps = (along(&directions, &real) - along(&directions, &fake)).abs();
        gaps.mean(Kind::Double).double_value(&[])
    };
    let chunks = DIRECTIONS / CHUNK;
    (0..chunks).map(distance).sum::<f64>() / float(chunks)
}

/// Some directions, each of length 1: (some, dimensions).
fn directions(chunk: i64, dimensions: i64) -> Tensor {
    let shard = u32::try_from(chunk).expect("few chunks");
    let key = Key { seed: 0, step: 0, phase: 1, shard, purpose: Purpose::Evaluation };
    let count = usize::try_from(dimensions * CHUNK).expect("an image is small");
    let drawn = key.normal(count).view([CHUNK, dimensions]);
    let lengths = drawn.square().sum_dim_intlist([1i64].as_slice(), true, Kind::Float).sqrt();
    drawn / lengths
}

/// How far apart the generated samples are, as a share of how far apart the real ones are: the root of the
/// mean squared distance of two of them, by their pixels. 0 if all are alike.
///
/// The mean squared distance of two samples is twice the sum of the variances, so no pairs need be formed.
pub fn diversity(real: &Tensor, fake: &Tensor) -> f64 {
    let spread = |images: &Tensor| {
        let points = images.flatten(1, -1).to_kind(Kind::Double);
        points.var_dim([0i64].as_slice(), true, false).sum(Kind::Double).sqrt().double_value(&[])
    };
    spread(fake) / spread(real)
}
