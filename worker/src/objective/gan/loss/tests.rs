//! Gradients against central differences, in double precision, and values against the papers' formulas.

use tch::{Device, no_grad};

use super::*;

const KINDS: [LossKind; 5] = [
    LossKind::NonSaturating,
    LossKind::Minimax,
    LossKind::LeastSquares,
    LossKind::Hinge,
    LossKind::WassersteinGp,
];
/// Step of a central difference: the error is of order h^2, and rounding adds about 1e-16 / h.
const H: f64 = 1e-5;

fn column(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).view([-1, 1])
}

/// Logits on both sides of every kink, and none within [`H`] of one.
fn logits() -> (Tensor, Tensor) {
    (column(&[-3.0, -0.4, 0.3, 0.9, 1.7]), column(&[-2.5, -1.2, -0.1, 0.6, 4.0]))
}

fn value(scalar: &Tensor) -> f64 {
    scalar.double_value(&[])
}

/// Compares the gradient by `at`, element by element, with differences of `function`.
#[track_caller]
fn check_gradient(what: &str, at: &Tensor, function: impl Fn(&Tensor) -> Tensor) {
    let leaf = at.copy().set_requires_grad(true);
    let gradients = Tensor::run_backward(&[function(&leaf)], &[&leaf], false, false);
    let shifted = |element: i64, by: f64| {
        let moved = at.copy();
        let flat = moved.view(-1);
        let _ = no_grad(|| flat.narrow(0, element, 1).g_add_scalar_(by));
        value(&function(&moved))
    };
    for element in 0..i64::try_from(at.numel()).unwrap() {
        let difference = (shifted(element, H) - shifted(element, -H)) / (2.0 * H);
        let gradient = gradients[0].view(-1).double_value(&[element]);
        let scale = 1.0 + difference.abs();
        assert!(
            (gradient - difference).abs() < 1e-6 * scale,
            "{what}: element {element} has gradient {gradient} and difference {difference}"
        );
    }
}

#[test]
fn gradients_by_the_logits_are_those_of_finite_differences() {
    let (real, fake) = logits();
    for kind in KINDS {
        check_gradient(&format!("{kind}, D, real"), &real, |real| discriminator(kind, real, &fake));
        check_gradient(&format!("{kind}, D, fake"), &fake, |fake| discriminator(kind, &real, fake));
        check_gradient(&format!("{kind}, G"), &fake, |fake| generator(kind, fake));
    }
    let pairs = LossKind::RelativisticPairing;
    check_gradient("pairs, D, real", &real, |real| discriminator(pairs, real, &fake));
    check_gradient("pairs, D, fake", &fake, |fake| discriminator(pairs, &real, fake));
    check_gradient("pairs, G, fake", &fake, |fake| generator_of_pairs(&real, fake));
}

/// Huang et al. (2024), equation 2, pair by pair: f(t) = -log(1 + e^-t), which D maximises of D(x) - D(G(z)).
#[test]
fn pairs_have_the_values_of_the_paper() {
    let (real, fake) = logits();
    let values = |x: &Tensor| Vec::<f64>::try_from(x.view(-1)).unwrap();
    let f = |t: f64| -(1.0 + (-t).exp()).ln();
    let over = |sign: f64| -> f64 {
        values(&real).into_iter().zip(values(&fake)).map(|(real, fake)| -f(sign * (real - fake))).sum()
    };
    let pairs = LossKind::RelativisticPairing;
    assert!((value(&discriminator(pairs, &real, &fake)) - over(1.0)).abs() < 1e-9);
    assert!((value(&generator_of_pairs(&real, &fake)) - over(-1.0)).abs() < 1e-9);
    assert!((value(&signs(&real)) - 1.0).abs() < 1e-9, "three of five logits are positive");
}

#[test]
fn the_zero_centred_penalty_of_a_linear_discriminator_is_known() {
    // |grad D| = 5 everywhere: 2 samples, weight 10, half of 25 each.
    let slope = Tensor::from_slice(&[3.0, 4.0, 0.0, 0.0]).view([4, 1]);
    let images = images(0.0, 1.0).narrow(0, 0, 2).set_requires_grad(true);
    let penalty = zero_centred_penalty(10.0, &images, &images.flatten(1, -1).matmul(&slope));
    assert!((value(&penalty) - 250.0).abs() < 1e-9, "{penalty:?}");
}

#[test]
fn the_zero_centred_penalty_has_the_gradient_of_finite_differences() {
    let weights = Tensor::arange(16, (Kind::Double, Device::Cpu)).g_mul_scalar(0.7).cos().view([4, 4]);
    check_gradient("zero-centred penalty", &weights, |weights| {
        let images = images(0.3, 0.9).set_requires_grad(true);
        zero_centred_penalty(2.0, &images, &small_discriminator(weights, &images))
    });
}

/// A discriminator small enough to differentiate by hand: w . tanh(M x) for images of 1 x 2 x 2.
fn small_discriminator(weights: &Tensor, images: &Tensor) -> Tensor {
    let (m, w) = (weights.narrow(0, 0, 3), weights.narrow(0, 3, 1));
    let hidden = images.flatten(1, -1).matmul(&m.transpose(0, 1)).tanh();
    hidden.matmul(&w.narrow(1, 0, 3).transpose(0, 1))
}

fn images(start: f64, step: f64) -> Tensor {
    Tensor::arange(12, (Kind::Double, Device::Cpu))
        .g_mul_scalar(step)
        .g_add_scalar(start)
        .view([3, 1, 2, 2])
        .sin()
}

/// The second derivative: how the norm of D's gradient changes with D's weights.
#[test]
fn the_gradient_penalty_has_the_gradient_of_finite_differences() {
    let weights = Tensor::arange(16, (Kind::Double, Device::Cpu)).g_mul_scalar(0.7).cos().view([4, 4]);
    let (real, fake) = (images(0.3, 0.9), images(-1.0, 1.7));
    let places = Tensor::from_slice(&[0.1, 0.5, 0.8]);
    check_gradient("gradient penalty", &weights, |weights| {
        gradient_penalty(10.0, &real, &fake, &places, |x| small_discriminator(weights, x))
    });
}

#[test]
fn the_gradient_penalty_of_a_linear_discriminator_is_known() {
    // D(x) = 3 x1 + 4 x2 has a gradient of length 5 everywhere: 2 samples, weight 10, (5 - 1)^2 each.
    let slope = Tensor::from_slice(&[3.0, 4.0, 0.0, 0.0]).view([4, 1]);
    let (real, fake) = (images(0.0, 1.0).narrow(0, 0, 2), images(2.0, 0.5).narrow(0, 0, 2));
    let places = Tensor::from_slice(&[0.25, 0.75]);
    let penalty = gradient_penalty(10.0, &real, &fake, &places, |x| x.flatten(1, -1).matmul(&slope));
    assert!((value(&penalty) - 320.0).abs() < 1e-9, "{penalty:?}");
}

#[test]
fn a_flat_discriminator_has_a_penalty_and_a_finite_gradient() {
    let weights = Tensor::zeros([4, 4], (Kind::Double, Device::Cpu)).set_requires_grad(true);
    let places = Tensor::from_slice(&[0.1, 0.5, 0.8]);
    let (real, fake) = (images(0.0, 1.0), images(2.0, 0.5));
    let penalty = gradient_penalty(10.0, &real, &fake, &places, |x| small_discriminator(&weights, x));
    assert!((value(&penalty) - 30.0).abs() < 1e-9, "{penalty:?}");
    let gradients = Tensor::run_backward(&[penalty], &[&weights], false, false);
    assert!(gradients[0].isfinite().all().int64_value(&[]) == 1, "{:?}", gradients[0]);
}

#[test]
fn values_are_those_of_the_papers() {
    let (real, fake) = logits();
    let over = |x: &Tensor, term: fn(f64) -> f64| {
        Vec::<f64>::try_from(x.view(-1)).unwrap().into_iter().map(term).sum::<f64>()
    };
    let log_s = |x: f64| -(-x).exp().ln_1p();
    let log_not_s = |x: f64| -x.exp().ln_1p();
    let log_likelihood = -over(&real, log_s) - over(&fake, log_not_s);
    let half_square = |x: f64| 0.5 * x * x;
    let half_square_to_one = |x: f64| 0.5 * (x - 1.0) * (x - 1.0);
    let expected = [
        (LossKind::NonSaturating, log_likelihood, -over(&fake, log_s)),
        (LossKind::Minimax, log_likelihood, over(&fake, log_not_s)),
        (
            LossKind::LeastSquares,
            over(&real, half_square_to_one) + over(&fake, half_square),
            over(&fake, half_square_to_one),
        ),
        (
            LossKind::Hinge,
            over(&real, |x| (1.0 - x).max(0.0)) + over(&fake, |x| (1.0 + x).max(0.0)),
            -over(&fake, |x| x),
        ),
        (LossKind::WassersteinGp, over(&fake, |x| x) - over(&real, |x| x), -over(&fake, |x| x)),
    ];
    for (kind, d, g) in expected {
        let found = (value(&discriminator(kind, &real, &fake)), value(&generator(kind, &fake)));
        assert!(
            (found.0 - d).abs() < 1e-9 && (found.1 - g).abs() < 1e-9,
            "{kind}: {found:?}, not {d} and {g}"
        );
    }
}
