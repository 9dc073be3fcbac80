use super::kid::in_blocks;
use super::*;
use tch::{Device, Kind};

#[allow(clippy::excessive_precision, missing_docs)]
mod reference {
    include!("reference.rs");
}

const SAMPLES: i64 = 240;
const DIMENSIONS: i64 = 6;
const CLASSES: i64 = 10;

/// The numbers of `features` in tests/python/metrics.py.
fn features(seed: i64) -> Tensor {
    let value = |place: i64| {
        let mixed = (place * place * 7919 + place * (104_729 + 2 * seed) + seed * 1_299_709) % 10_007;
        (float(mixed) / 10_007.0).powi(2) * (1.0 + float(place % DIMENSIONS))
    };
    Tensor::from_slice(&(0..SAMPLES * DIMENSIONS).map(value).collect::<Vec<f64>>())
        .view([SAMPLES, DIMENSIONS])
}

/// The numbers of `probabilities` in tests/python/metrics.py.
fn probabilities(seed: i64) -> Tensor {
    let value = |place: i64| {
        let mixed = (place * place * 6007 + place * (15_485_863 % 10_007 + seed) + seed * 31) % 10_007;
        let rare = if seed == 2 && place % CLASSES == 7 { 0.01 } else { 1.0 };
        (float(mixed) + 1.0).powi(4) * rare
    };
    let weights = Tensor::from_slice(&(0..SAMPLES * CLASSES).map(value).collect::<Vec<f64>>());
    let weights = weights.view([SAMPLES, CLASSES]);
    &weights / weights.sum_dim_intlist([1i64].as_slice(), true, Kind::Double)
}

fn real_and_fake() -> (Tensor, Tensor) {
    (features(1), features(2) * 0.8 + 0.1)
}

#[track_caller]
fn assert_close(ours: f64, reference: f64) {
    assert!((ours - reference).abs() <= 1e-9 * reference.abs().max(1.0), "{ours} is not {reference}");
}

/// Invariant 3.
#[test]
fn the_frechet_distance_is_scipys() {
    let (real, fake) = real_and_fake();
    let (one, other) = (Moments::of(&real), Moments::of(&fake));
    assert_close(frechet_distance(&one, &other).unwrap(), reference::FRECHET);
    assert_close(frechet_distance(&other, &one).unwrap(), reference::FRECHET);
    assert_close(frechet_distance(&one, &one).unwrap(), reference::FRECHET_OF_THE_SAME);
}

/// Features that are zero for every sample make a covariance without an inverse.
#[test]
fn features_that_never_fire_do_no_harm() {
    let (real, fake) = real_and_fake();
    let padded = |x: &Tensor| Tensor::cat(&[x, &x.zeros_like()], 1);
    let distance = frechet_distance(&Moments::of(&padded(&real)), &Moments::of(&padded(&fake)));
    assert_close(distance.unwrap(), reference::FRECHET);
    let broken = Moments::of(&(real * f64::NAN));
    assert!(!frechet_distance(&broken, &Moments::of(&fake)).unwrap_or(f64::NAN).is_finite());
}

/// Invariant 3.
#[test]
fn the_kernel_distance_is_numpys() {
    let (real, fake) = real_and_fake();
    assert_close(kernel_distance(&real, &fake), reference::KID);
    assert_close(in_blocks(&real, &fake, 80), reference::KID_IN_BLOCKS_OF_80);
}

/// Invariant 3.
#[test]
fn precision_recall_and_neighbours_are_numpys() {
    let (real, fake) = real_and_fake();
    let [precision, recall] = precision_and_recall(&Manifold::of(&real), &Manifold::of(&fake));
    assert_close(precision, reference::PRECISION);
    assert_close(recall, reference::RECALL);
    let nearest = nearest(&fake, &real, false);
    assert_close(nearest.mean(Kind::Double).double_value(&[]), reference::NEAREST);
}

/// Invariant 3.
#[test]
fn what_labels_tell_is_scipys() {
    let (own, real) = (Labels::new(&probabilities(2)), Labels::new(&probabilities(1)));
    assert_close(own.score(), reference::SCORE);
    assert_close(own.divergence(&real), reference::LABEL_KL);
    assert_close(own.relative_entropy(&real), reference::RELATIVE_ENTROPY);
    assert_close(f64::from(u32::try_from(own.modes(&real)).unwrap()), reference::MODES);
}

#[test]
fn the_score_goes_from_one_to_the_number_of_classes() {
    let all_alike = Labels::new(&Tensor::from_slice(&[0.7, 0.2, 0.1]).expand([5, 3], false));
    assert_close(all_alike.score(), 1.0);
    let each_its_own = Labels::new(&Tensor::eye(3, (Kind::Double, Device::Cpu)));
    assert_close(each_its_own.score(), 3.0);
    assert_eq!(all_alike.modes(&each_its_own), 1);
    assert_close(all_alike.relative_entropy(&each_its_own), 0.0);
}

/// Invariant 3: of points with one coordinate all directions are the same.
#[test]
fn the_sliced_wasserstein_distance_is_scipys() {
    let (real, fake) = real_and_fake();
    let column = |x: &Tensor| x.narrow(1, 2, 1);
    let distance = sliced_wasserstein(&column(&real), &column(&fake));
    assert!((distance - reference::WASSERSTEIN_OF_A_COLUMN).abs() < 1e-6, "{distance}");
    assert_close(sliced_wasserstein(&real, &real), 0.0);
}

/// Invariant 3.
#[test]
fn diversity_is_numpys() {
    let (real, fake) = real_and_fake();
    assert_close(diversity(&real, &fake), reference::DIVERSITY);
    assert_close(diversity(&real, &real.narrow(0, 0, 1).expand_as(&real)), 0.0);
}

#[test]
fn copies_are_memorised_and_fresh_samples_are_not() {
    let (train, fresh) = real_and_fake();
    let limit = threshold(&nearest(&fresh, &train, false));
    assert_close(memorised(&nearest(&train, &train, false), limit), 1.0);
    let share = memorised(&nearest(&fresh, &train, false), limit);
    assert!(share <= 0.01, "{share}");
    // Without held-out data each sample is fresh to the others.
    let limit = threshold(&nearest(&train, &train, true));
    assert!(limit > 0.0 && memorised(&nearest(&train, &train, true), limit) <= 0.01);
}
