//! Metrics: functions of features, of class probabilities, or of pixels.
//!
//! 1. Each is pure, computes in f64 on the CPU, and draws only with a key of its own.
//! 2. Features are (n, d), one sample a row; probabilities (n, classes); both without gradients.
//! 3. Each agrees with an independent implementation in numpy and scipy on the same numbers: see `tests`.

mod frechet;
mod kid;
mod labels;
mod neighbours;
mod pixels;
#[cfg(test)]
mod tests;

pub(crate) use frechet::{Moments, frechet_distance};
pub(crate) use kid::kernel_distance;
pub(crate) use labels::Labels;
pub(crate) use neighbours::{Manifold, memorised, nearest, precision_and_recall, threshold};
pub(crate) use pixels::{diversity, sliced_wasserstein};

use tch::Tensor;

/// Converts a count to a float.
fn float(count: i64) -> f64 {
    #[allow(clippy::cast_precision_loss)] // counts of samples are far below 2^53
    let float = count as f64;
    float
}

/// Number of rows.
fn rows(features: &Tensor) -> i64 {
    features.size()[0]
}
