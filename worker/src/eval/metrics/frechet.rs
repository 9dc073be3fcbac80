//! The Fréchet distance.

use tch::{Kind, TchError, Tensor};

use super::{float, rows};

/// Mean and covariance of features, in f64.
#[derive(Debug)]
pub(crate) struct Moments {
    mean: Tensor,
    covariance: Tensor,
}

impl Moments {
    /// Computes the moments of features (n, d), n at least 2; the covariance is the unbiased one.
    pub(crate) fn of(features: &Tensor) -> Moments {
        let features = features.to_kind(Kind::Double);
        let mean = features.mean_dim([0i64].as_slice(), false, Kind::Double);
        let centred = &features - &mean;
        // The unbiased covariance, as the published code of the FID takes it.
        let covariance = centred.transpose(0, 1).matmul(&centred) / (float(rows(&features)) - 1.0);
        Moments { mean, covariance }
    }
}

/// Fréchet distance of two sets of features, modelled as normal distributions: Heusel et al. (2017), "GANs
/// trained by a two time-scale update rule", equation 6: |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)). With
/// Inception's features it is the FID.
///
/// Of the product's root only the trace is needed. C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2
/// C1^(1/2), so two symmetric decompositions give it, and a matrix whose root may turn out complex is never
/// decomposed.
/// # Errors
/// A number is not finite, so that there is no decomposition.
pub(crate) fn frechet_distance(one: &Moments, other: &Moments) -> Result<f64, TchError> {
    let root = symmetric_root(&one.covariance)?;
    let product = root.matmul(&other.covariance).matmul(&root);
    // Rounding leaves it a little asymmetric, and the decomposition reads one triangle only.
    let symmetric = (&product + product.transpose(0, 1)) / 2.0;
    // Rounding may leave an eigenvalue a little below zero.
    let eigenvalues = symmetric.f_linalg_eigvalsh("L")?.clamp_min(0.0);
    let trace_of_root = eigenvalues.sqrt().sum(Kind::Double);
    let means = (&one.mean - &other.mean).square().sum(Kind::Double);
    let traces = one.covariance.trace() + other.covariance.trace();
    Ok((means + traces - trace_of_root * 2.0).double_value(&[]))
}

fn symmetric_root(matrix: &Tensor) -> Result<Tensor, TchError> {
    let (values, vectors) = matrix.f_linalg_eigh("L")?;
    // Likewise for a covariance of fewer samples than dimensions.
    Ok((&vectors * values.clamp_min(0.0).sqrt()).matmul(&vectors.transpose(0, 1)))
}
