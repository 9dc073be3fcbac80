//! Adversarial losses. This file alone knows their mathematics.
//!
//! D(x) is the discriminator's logit, s the logistic function. Every function takes logits of shape (n, 1)
//! and returns the *sum* over the n samples as a scalar: the mean over the global batch is taken once,
//! after all shard gradients are summed. Logits go through softplus, never through a logarithm of a
//! probability: -log s(x) = softplus(-x).

use ganglion_proto::job::{Loss, LossKind};
use tch::{Kind, Tensor, no_grad};

use crate::nn::broken::BrokenModule;

/// Loss of the discriminator: [`on_real`] plus [`on_fake`], or a loss over pairs.
///
/// The gradient penalty of `wasserstein-gp` is [`gradient_penalty`], added by the caller.
pub fn discriminator(kind: LossKind, real: &Tensor, fake: &Tensor) -> Tensor {
    match kind {
        // Huang et al. (2024), equation 2 with f(t) = -log(1 + e^-t), after Jolicoeur-Martineau (2019): a
        // real sample shall seem more real than the one it is paired with.
        LossKind::RelativisticPairing => total(&(fake - real).softplus()),
        _ => on_real(kind, real) + on_fake(kind, fake),
    }
}

/// Loss of the discriminator on real samples.
///
/// # Panics
/// For a pairwise objective, whose loss does not split into two sides.
pub fn on_real(kind: LossKind, real: &Tensor) -> Tensor {
    match kind {
        // Goodfellow et al. (2014), equation 1: maximise log s(D(x)) + log(1 - s(D(G(z)))).
        LossKind::NonSaturating | LossKind::Minimax => total(&real.neg().softplus()),
        // Mao et al. (2017), equation 2, with a = 0 and b = 1.
        LossKind::LeastSquares => square_sum(&(real - 1.0)) * 0.5,
        // Miyato et al. (2018), equation 16.
        LossKind::Hinge => total(&(real.neg() + 1.0).relu()),
        // Gulrajani et al. (2017), equation 3, the first two terms.
        LossKind::WassersteinGp => -total(real),
        LossKind::RelativisticPairing => unreachable!("{APART}"),
    }
}

const APART: &str = "pairs are not looked at apart";

/// Loss of the discriminator on generated samples; the equations are those of [`on_real`].
pub fn on_fake(kind: LossKind, fake: &Tensor) -> Tensor {
    match kind {
        LossKind::NonSaturating | LossKind::Minimax => total(&fake.softplus()),
        LossKind::LeastSquares => square_sum(fake) * 0.5,
        LossKind::Hinge => total(&(fake + 1.0).relu()),
        LossKind::WassersteinGp => total(fake),
        LossKind::RelativisticPairing => unreachable!("{APART}"),
    }
}

/// Summed D output, diagnostic only: D(x) of the paper where the objective takes its output for a logit,
/// else the output itself. In single precision, without a gradient.
pub fn score(kind: LossKind, logits: &Tensor) -> Tensor {
    no_grad(|| match kind {
        LossKind::NonSaturating | LossKind::Minimax => logits.sigmoid().sum(Kind::Float),
        _ => logits.sum(Kind::Float),
    })
}

/// Sum of the signs of the logits of real samples, a measure of overfitting (Karras et al., 2020, equation
/// 1). Without a gradient.
pub fn signs(real: &Tensor) -> Tensor {
    // Signs and not values: their mean is between -1 and 1 for any loss.
    no_grad(|| real.sign().sum(Kind::Float))
}

/// Loss of the generator over pairs of a real and a generated sample: Huang et al. (2024), equation 2.
pub fn generator_of_pairs(real: &Tensor, fake: &Tensor) -> Tensor {
    total(&(real - fake).softplus())
}

/// Loss of the generator.
///
/// # Panics
/// For a pairwise objective, whose loss is [`generator_of_pairs`].
pub fn generator(kind: LossKind, fake: &Tensor) -> Tensor {
    match kind {
        // Goodfellow et al. (2014), section 3: maximise log s(D(G(z))).
        LossKind::NonSaturating => total(&fake.neg().softplus()),
        // Equation 1: minimise log(1 - s(D(G(z)))).
        LossKind::Minimax => -total(&fake.softplus()),
        // Mao et al. (2017), equation 2, with c = 1.
        LossKind::LeastSquares => square_sum(&(fake - 1.0)) * 0.5,
        // Miyato et al. (2018), equation 17; Gulrajani et al. (2017).
        LossKind::Hinge | LossKind::WassersteinGp => -total(fake),
        LossKind::RelativisticPairing => unreachable!("{APART}"),
    }
}

/// Weighted sum over the samples of half the square of |grad D(x)| at each x of `images`, whose logits are
/// `logits`.
///
/// Mescheder et al. (2018), equations 9 (R1, at real samples) and 10 (R2, at generated ones). The logits
/// must have been computed from `images`, which require gradients. The result can be differentiated by the
/// discriminator's parameters.
pub fn zero_centred_penalty(weight: f64, images: &Tensor, logits: &Tensor) -> Tensor {
    // The sum's gradient at one image is that of its own logit, as long as samples do not see each
    // other.
    square_sum(&slope(&total(logits), images)) * (0.5 * weight)
}

/// Weighted sum over the samples of (|grad D(x)| - 1)^2 at x = e real + (1 - e) fake.
///
/// Gulrajani et al. (2017), equation 3, the last term. `places` are the e of each sample, shape (n), in [0,
/// 1). `logits` is the discriminator. The result can be differentiated by its parameters.
pub fn gradient_penalty(
    weight: f64,
    real: &Tensor,
    fake: &Tensor,
    places: &Tensor,
    logits: impl FnOnce(&Tensor) -> Tensor,
) -> Tensor {
    let places = places.view([-1, 1, 1, 1]);
    // The straight line between a real and a generated sample.
    let between = fake.lerp_tensor(real, &places).detach().set_requires_grad(true);
    let slope = slope(&total(&logits(&between)), &between);
    // The norm's own derivative is 0 at 0, where that of a square root is infinite.
    let norms = slope.flatten(1, -1).norm_scalaropt_dim(2.0, [1i64].as_slice(), false);
    square_sum(&(norms - 1.0)) * weight
}

/// Gradient of a discriminator's `total` at images, itself differentiable. A user's module may hold an
/// operation without a second derivative.
fn slope(total: &Tensor, images: &Tensor) -> Tensor {
    // Keeps the graph, and makes one for the derivative of the derivative.
    let gradients = Tensor::f_run_backward(&[total], &[images], true, true);
    let gradients = gradients.unwrap_or_else(|error| {
        let module = "the discriminator".to_string();
        let detail = c10d::Error::from(error).to_string();
        BrokenModule { module, phase: "in the gradient that a penalty needs", detail }.raise()
    });
    gradients[0].shallow_clone()
}

/// Whether a job's discriminator loss has a gradient penalty.
pub fn has_gradient_penalty(loss: &Loss) -> bool {
    loss.kind == LossKind::WassersteinGp && loss.gradient_penalty != 0.0
}

fn total(x: &Tensor) -> Tensor {
    x.sum(None::<Kind>)
}

fn square_sum(x: &Tensor) -> Tensor {
    total(&x.square())
}

#[cfg(test)]
mod tests;
