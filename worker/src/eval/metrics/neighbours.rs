//! Metrics of nearest neighbours.

use tch::{Kind, Tensor};

use super::{float, rows};

/// Maximum number of distances held at once: 8 MiB, which the allocator keeps between calls.
const CHUNK: i64 = 1 << 20;
/// Index k of the neighbour whose distance is a sample's radius: Kynkäänniemi et al. (2019), section 3.1.
const NEIGHBOUR: i64 = 3;
/// Share of fresh real samples whose distance to the training samples is below the threshold.
const NEAR: f64 = 0.01;

/// Returns the squared distances from each row of `from` to each of `to`.
fn squared_distances(from: &Tensor, to: &Tensor) -> Tensor {
    let norms = |x: &Tensor| x.square().sum_dim_intlist([1i64].as_slice(), true, Kind::Double);
    let products = from.matmul(&to.transpose(0, 1));
    // By the binomial formula; rounding may leave it a little below zero, where a root would be NaN.
    (norms(from) + norms(to).transpose(0, 1) - products * 2.0).clamp_min(0.0)
}

/// Reduces the squared distances from each row of `from` to all of `to`, some rows at a time.
fn by_rows(from: &Tensor, to: &Tensor, of: impl Fn(Tensor) -> Tensor) -> Tensor {
    let (from, to) = (from.to_kind(Kind::Double), to.to_kind(Kind::Double));
    let parts: Vec<Tensor> = from
        // As many rows as fit; at least one, however long it is.
        .split((CHUNK / rows(&to)).clamp(1, CHUNK), 0)
        .iter()
        .map(|part| of(squared_distances(part, &to)))
        .collect();
    Tensor::cat(&parts, 0)
}

/// Returns the squared distance from each sample to its k-th nearest other one.
fn radii(samples: &Tensor) -> Tensor {
    let others = rows(samples) - 1;
    // The nearest sample of all is the sample itself.
    let place = NEIGHBOUR.min(others) + 1;
    by_rows(samples, samples, |squared| squared.kthvalue(place, 1, false).0)
}

/// Share of `samples` that lie within the radius of at least one sample of a manifold.
fn share_within(samples: &Tensor, of: &Manifold) -> f64 {
    let within = by_rows(samples, &of.samples, |squared| squared.le_tensor(&of.radii).any_dim(1, false));
    within.to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}

/// Samples with their radii: the squared distance to the third-nearest other one.
#[derive(Debug)]
pub(crate) struct Manifold {
    samples: Tensor,
    radii: Tensor,
}

impl Manifold {
    /// Computes the radii of two samples or more.
    pub(crate) fn of(samples: &Tensor) -> Manifold {
        let samples = samples.to_kind(Kind::Double);
        Manifold { radii: radii(&samples), samples }
    }

    /// Samples, (n, d) in f64.
    pub(crate) fn samples(&self) -> &Tensor {
        &self.samples
    }
}

/// Improved precision and recall, with k = 3: Kynkäänniemi et al. (2019), "Improved precision and recall
/// metric for assessing generative models", equation 2. Precision is the share of generated samples that lie
/// among the real ones, recall the share of the real ones that lie among the generated ones. Both sets should
/// be as large.
pub(crate) fn precision_and_recall(real: &Manifold, fake: &Manifold) -> [f64; 2] {
    [share_within(&fake.samples, real), share_within(&real.samples, fake)]
}

/// Returns the distance from each sample to the nearest of `to`; with `but_itself` both are the same
/// samples, and the nearest other one is taken.
pub(crate) fn nearest(samples: &Tensor, to: &Tensor, but_itself: bool) -> Tensor {
    let nearest = |squared: Tensor| match but_itself && rows(to) > 1 {
        // The first one is the sample itself, at distance 0.
        true => squared.kthvalue(2, 1, false).0,
        false => squared.amin([1i64].as_slice(), false),
    };
    by_rows(samples, to, nearest).sqrt()
}

/// Returns the memorisation threshold: the distance to the nearest training sample that a hundredth of
/// fresh real samples stay below.
pub(crate) fn threshold(fresh: &Tensor) -> f64 {
    #[allow(clippy::cast_possible_truncation)] // a place among samples
    // At least one sample, so that there is a threshold for small sets too.
    let place = (float(rows(fresh)) * NEAR).ceil().max(1.0) as i64;
    fresh.kthvalue(place, 0, false).0.double_value(&[])
}

/// Share of generated samples whose nearest training sample is nearer than the threshold. Fresh real
/// samples have 0.01; copies of training samples have 1. It is the idea of Meehan et al. (2020), "A
/// non-parametric test to detect data-copying in generative models", as one number: samples nearer to the
/// training samples than fresh ones were not generalised.
pub(crate) fn memorised(generated: &Tensor, threshold: f64) -> f64 {
    generated.lt(threshold).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}
