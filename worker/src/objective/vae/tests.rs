//! Tests of the loss, its gradient and the bounds.

use ganglion_proto::job::{Likelihood, Model, ModelKind, Precision};
use tch::{Device, Kind, Tensor, no_grad};

use super::*;
use crate::data::ImageShape;
use crate::nn::TensorSpec;
use crate::nn::tensor_bytes::to_bytes;
use crate::objective::test_job::{check_draws_ahead, small_job};
use crate::objective::{Model as LaidOut, Samples};
use crate::state::{initial_values, narrow};

const BATCH: i64 = 3;
const LATENT: i64 = 4;

fn key(shard: u32) -> Key {
    Key { seed: 5, step: 0, phase: 0, shard, purpose: Purpose::Probe }
}

fn vae(settings: VaeSettings, classes: u32) -> Vae {
    let vae = Some(settings);
    let conditional = classes > 0;
    let model = Model { vae, conditional, ..Model::plain(ModelKind::Vae28, 4, 1) };
    let job = small_job(model);
    let shape = ImageShape { channels: 1, height: 28, width: 28 };
    let networks = Autoencoder::new(&job.model, shape, classes).unwrap();
    Vae::new(&job, networks, Vec::new(), Device::Cpu)
}

fn settings(likelihood: Likelihood, beta: f64) -> VaeSettings {
    VaeSettings { likelihood, beta, binarise: false, importance_samples: 1 }
}

/// Values of parameters in double precision.
fn values(specs: &[TensorSpec], first: u32) -> Vec<Tensor> {
    let value = |(shard, spec): (u32, &TensorSpec)| {
        initial_values(key(shard), spec).view(spec.shape.as_slice()).to_kind(Kind::Double)
    };
    (first..).zip(specs).map(value).collect()
}

fn all_weights(vae: &Vae) -> [Vec<Tensor>; 2] {
    let networks = &vae.networks;
    [values(&networks.encoder.parameters(), 100), values(&networks.decoder.parameters(), 200)]
}

fn normal(shard: u32, sizes: &[i64]) -> Tensor {
    let count = usize::try_from(sizes.iter().product::<i64>()).unwrap();
    key(shard).normal(count).view(sizes).to_kind(Kind::Double)
}

fn images() -> Tensor {
    key(1).uniform(0.0, 1.0, 3 * 784).view([BATCH, 1, 28, 28]).to_kind(Kind::Double)
}

/// Of each parameter along one direction, in double precision.
#[test]
fn gradients_are_those_of_finite_differences() {
    let (images, noise) = (images(), normal(2, &[BATCH, LATENT]));
    let classes = Tensor::from_slice(&[1i64, 0, 1]);
    for (likelihood, beta, classes) in [
        (Likelihood::Bernoulli, 1.0, None),
        (Likelihood::Gaussian, 0.3, None),
        (Likelihood::Bernoulli, 4.0, Some(&classes)),
    ] {
        let vae = vae(settings(likelihood, beta), if classes.is_some() { 2 } else { 0 });
        let at = |encoder: &[Tensor], decoder: &[Tensor]| {
            let terms = vae.terms(&images, &noise, Weights { encoder, decoder }, classes);
            vae.loss(&terms).sum(None)
        };
        let [encoder, decoder] = all_weights(&vae);
        let leaves = |tensors: &[Tensor]| -> Vec<Tensor> {
            tensors.iter().map(|tensor| tensor.copy().set_requires_grad(true)).collect()
        };
        let (free_encoder, free_decoder) = (leaves(&encoder), leaves(&decoder));
        let loss = at(&free_encoder, &free_decoder);
        let parameters: Vec<&Tensor> = free_encoder.iter().chain(&free_decoder).collect();
        let gradients = Tensor::run_backward(&[&loss], &parameters, false, false);
        let both: Vec<Tensor> = encoder.into_iter().chain(decoder).collect();
        let of_encoder = free_encoder.len();
        for (index, gradient) in gradients.iter().enumerate() {
            let direction = normal(300, &both[index].size());
            let moved = |by: f64| {
                let mut moved: Vec<Tensor> = both.iter().map(Tensor::shallow_clone).collect();
                moved[index] = &both[index] + &direction * by;
                no_grad(|| at(&moved[..of_encoder], &moved[of_encoder..])).double_value(&[])
            };
            let step = 1e-5;
            let expected = (moved(step) - moved(-step)) / (2.0 * step);
            let found = (gradient * &direction).sum(None).double_value(&[]);
            let scale = 1.0 + expected.abs();
            assert!((found - expected).abs() < 1e-5 * scale, "{likelihood} {index}: {found} and {expected}");
        }
    }
}

/// By hand, and by the mean of log q(z) - log p(z) over draws of z.
#[test]
fn the_divergence_is_that_of_normal_distributions() {
    let of = |mean: &[f64], log_variance: &[f64]| {
        let row = |numbers: &[f64]| Tensor::from_slice(numbers).view([1, -1]);
        Posterior { mean: row(mean), log_variance: row(log_variance) }
    };
    let value = |posterior: &Posterior| posterior.divergence().double_value(&[0]);
    assert_eq!(value(&of(&[0.0, 0.0], &[0.0, 0.0])), 0.0);
    assert!((value(&of(&[3.0, 0.0], &[0.0, 0.0])) - 4.5).abs() < 1e-12);
    // (v - log v - 1) / 2 with v = 4.
    let of_variance = value(&of(&[0.0], &[4.0f64.ln()]));
    assert!((of_variance - (3.0 - 4.0f64.ln()) / 2.0).abs() < 1e-12, "{of_variance}");
    let posterior = of(&[0.7, -1.2], &[-0.5, 0.4]);
    let noise = normal(4, &[400_000, 2]);
    let latent = posterior.at(&noise);
    let log_q = -(&noise * &noise + &posterior.log_variance) * 0.5;
    let log_p = &latent * &latent * -0.5;
    let drawn = (log_q - log_p).sum_dim_intlist([1i64].as_slice(), false, None).mean(None).double_value(&[]);
    assert!((drawn - value(&posterior)).abs() < 0.01, "{drawn} and {}", value(&posterior));
}

/// Evaluates zero images by weights that a function changes.
fn bounds(draws: u32, change: impl Fn(&str, &mut Tensor)) -> [f64; 2] {
    let mut vae = vae(settings(Likelihood::Bernoulli, 3.0), 0);
    (vae.settings.importance_samples, vae.settings.binarise) = (draws, true);
    let model = LaidOut::new(Arc::new(vae), Precision::Fp32).unwrap();
    let state = State::initial(model.layout.clone(), 9, Device::Cpu);
    for tensor in model.layout.tensors() {
        change(&tensor.name, &mut narrow(&state.flat, tensor.range));
    }
    let flat = to_bytes(&state.flat);
    let snapshot = Snapshot::whole((0, 0), flat.into(), state.counters);
    let samples = Samples::Images(Tensor::full([BATCH, 1, 28, 28], -0.5, (Kind::Float, Device::Cpu)));
    let batch = ShardBatch { samples, classes: None };
    let evaluator = model.objective.evaluator().unwrap();
    assert_eq!(evaluator.scalars(), ["iwae_bound", "elbo_bound"]);
    let mut sums = evaluator.begin(&model.layout, &snapshot).unwrap();
    let found = sums(&batch, key(7)).unwrap();
    assert_eq!(found, sums(&batch, key(7)).unwrap(), "the same draws");
    [found[0] / 3.0, found[1] / 3.0]
}

/// A decoder that does not look at the latent vector has a known likelihood: 784 times log 2 for logits of 0.
#[test]
fn the_bounds_are_those_of_a_known_likelihood() {
    let known = 784.0 * 2.0f64.ln();
    let blind = |name: &str, tensor: &mut Tensor| {
        if name.contains("decoder") {
            let _ = tensor.zero_();
        }
    };
    let [importance, single] = bounds(3000, blind);
    assert!((importance - known).abs() < 0.05, "{importance} and {known}");
    // Above by the divergence of the posterior, which is not the prior.
    assert!(single > known + 0.02, "{single} and {known}");
    let prior = bounds(2, |name, tensor| {
        blind(name, tensor);
        if name.contains("posterior") {
            let _ = tensor.zero_();
        }
    });
    assert!(prior.iter().all(|bound| (bound - known).abs() < 1e-3), "{prior:?} and {known}");
    let [one, same] = bounds(1, |_, _| {});
    assert!((one - same).abs() < 1e-9, "one draw has one bound: {one} and {same}");
    assert!(bounds(50, |_, _| {})[0] < bounds(1, |_, _| {})[0]);
}

#[test]
fn draws_made_ahead_change_no_bit_and_are_used() {
    let settings = VaeSettings { binarise: true, ..settings(Likelihood::Bernoulli, 1.0) };
    let objective: Arc<dyn Objective> = Arc::new(vae(settings, 0));
    let batch = ShardBatch::of_images(normal(1, &[BATCH, 1, 28, 28]).tanh().to_kind(Kind::Float), None);
    assert_eq!(check_draws_ahead(&objective, &batch), [1, 1], "of the pixels and of the latent vector");
}
