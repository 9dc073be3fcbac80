use tch::Device;

use super::*;
use crate::random::Purpose;

const EVERY: [AugmentationKind; 5] = [
    AugmentationKind::Flip,
    AugmentationKind::Rotate90,
    AugmentationKind::Translation,
    AugmentationKind::Color,
    AugmentationKind::Cutout,
];
const KEY: Key = Key { seed: 3, step: 1, phase: 0, shard: 2, purpose: Purpose::Augmentation };

fn images(samples: i64, channels: i64, side: i64) -> Tensor {
    let count = samples * channels * side * side;
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.37).sin().view([samples, channels, side, side])
}

fn by_key(kinds: &[AugmentationKind], probability: &Probability, key: Key, x: &Tensor) -> Tensor {
    let samples = usize::try_from(x.size()[0]).unwrap();
    augment(kinds, probability, &draws(kinds, key, samples), x)
}

fn fixed(kinds: &[AugmentationKind], probability: f64, x: &Tensor) -> Tensor {
    by_key(kinds, &Probability::Fixed(probability), KEY, x)
}

#[test]
fn a_probability_of_zero_does_nothing_and_of_one_everything() {
    let x = images(16, 3, 8);
    for kind in EVERY {
        assert!(fixed(&[kind], 0.0, &x).equal(&x), "{kind}");
        assert!(!fixed(&[kind], 1.0, &x).equal(&x), "{kind}");
    }
    assert!(fixed(&[AugmentationKind::Flip], 1.0, &x).equal(&x.flip([3])));
}

#[test]
fn the_controllers_probability_is_a_number_like_any_other() {
    let x = images(32, 1, 8);
    for p in [0.0f32, 0.3, 1.0] {
        let adaptive = by_key(&EVERY, &Probability::Adaptive(Tensor::from_slice(&[p])), KEY, &x);
        assert!(adaptive.equal(&fixed(&EVERY, f64::from(p), &x)), "{p}");
    }
}

/// A sample that is moved, turned or cut has only pixels that were there, or zeros.
#[test]
fn geometry_keeps_pixels_exactly() {
    let x = images(64, 1, 8);
    let original = Vec::<f32>::try_from(x.view(-1)).unwrap();
    for kind in [AugmentationKind::Rotate90, AugmentationKind::Translation, AugmentationKind::Cutout] {
        let changed = Vec::<f32>::try_from(fixed(&[kind], 1.0, &x).contiguous().view(-1)).unwrap();
        for (sample, pixels) in changed.chunks(64).enumerate() {
            let own = &original[64 * sample..64 * (sample + 1)];
            assert!(pixels.iter().all(|pixel| *pixel == 0.0 || own.contains(pixel)), "{kind}");
        }
        let zeros = changed.iter().filter(|pixel| **pixel == 0.0).count();
        let share = zeros as f64 / changed.len() as f64;
        let expected = match kind {
            AugmentationKind::Rotate90 => 0.0..0.001,
            AugmentationKind::Translation => 0.02..0.25,
            _ => 0.1..0.26,
        };
        assert!(expected.contains(&share), "{kind}: {share} of the pixels are blank");
    }
}

#[test]
fn samples_are_treated_apart_and_by_key_alone() {
    let x = images(8, 3, 8);
    let all = fixed(&EVERY, 0.5, &x);
    assert!(all.equal(&fixed(&EVERY, 0.5, &x)));
    let other = by_key(&EVERY, &Probability::Fixed(0.5), Key { shard: 3, ..KEY }, &x);
    assert!(!all.equal(&other));
    let mut second = x.copy();
    let _ = second.get(1).zero_();
    let of_second = fixed(&EVERY, 0.5, &second);
    assert!(of_second.get(0).equal(&all.get(0)) && of_second.get(7).equal(&all.get(7)));
    second = x.copy();
    assert!(second.equal(&x), "what goes in stays as it was");
}

/// Against central differences, in double precision.
#[test]
fn gradients_are_those_of_finite_differences() {
    let x = images(2, 3, 4).to_kind(Kind::Double);
    let f = |x: &Tensor| fixed(&EVERY, 0.8, x).square().sum(Kind::Double);
    let leaf = x.copy().set_requires_grad(true);
    let gradient = &Tensor::run_backward(&[f(&leaf)], &[&leaf], false, false)[0];
    for at in 0..96 {
        let moved = |by: f64| {
            let moved = x.copy();
            let _ = moved.view(-1).get(at).g_add_scalar_(by);
            f(&moved).double_value(&[])
        };
        let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        let found = gradient.contiguous().view(-1).double_value(&[at]);
        assert!((found - difference).abs() < 1e-5 * (1.0 + difference.abs()), "{at}: {found}, {difference}");
    }
}
