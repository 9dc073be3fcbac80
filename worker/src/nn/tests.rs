use ganglion_proto::job::{Model, ModelKind};
use tch::{Device, Kind};

use super::sequential::{channels_last, conv, conv_transpose};
use super::*;
use crate::data::ImageShape;
use crate::random::Purpose;

const KEY: Key = Key { seed: 1, step: 0, phase: 0, shard: 0, purpose: Purpose::Network };

fn models(kind: ModelKind, channels: usize, side: usize) -> Models {
    let model = Model {
        kind,
        latent_dim: 10,
        width: 8,
        ema_half_life_images: 1,
        generator: None,
        discriminator: None,
    };
    Models::new(&model, ImageShape { channels, height: side, width: side }).unwrap()
}

fn ones(specs: &[TensorSpec]) -> Vec<Tensor> {
    specs.iter().map(|spec| Tensor::full(spec.shape.as_slice(), 0.01, (Kind::Float, Device::Cpu))).collect()
}

#[test]
fn every_model_maps_noise_to_images_and_images_to_logits() {
    for (kind, channels, side) in [
        (ModelKind::Mlp28, 1, 28),
        (ModelKind::Dcgan28, 1, 28),
        (ModelKind::Dcgan28, 3, 28),
        (ModelKind::Dcgan64, 3, 64),
    ] {
        let models = models(kind, channels, side);
        let noise = Tensor::ones([4, 10], (Kind::Float, Device::Cpu));
        let (of_g, of_d) = (ones(&models.generator.parameters()), ones(&models.discriminator.parameters()));
        let mut pass = Pass::batch(&of_g, &[], KEY);
        let images = models.generator.forward(&noise, &mut pass);
        let (channels, side) = (i64::try_from(channels).unwrap(), i64::try_from(side).unwrap());
        assert_eq!(images.size(), [4, channels, side, side]);
        assert_eq!(pass.statistics.len(), models.generator.buffers().len());
        let logits = models.discriminator.forward(&images, &mut Pass::batch(&of_d, &[], KEY));
        assert_eq!(logits.size(), [4, 1]);
    }
}

/// A convolution whose kernel covers the map, and its transpose, are computed as products of matrices.
#[test]
fn a_covering_convolution_is_libtorchs_with_its_gradients() {
    tch::manual_seed(1);
    let random = |shape: &[i64]| Tensor::rand(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let none = None::<&Tensor>;
    let (maps, weight) = (random(&[3, 5, 4, 4]), random(&[2, 5, 4, 4]));
    let covered = conv(&channels_last(&maps), &weight, 4, 1, 0);
    let theirs = maps.conv2d(&weight, none, [1, 1], [0, 0], [1, 1], 1);
    assert_same(&covered, &theirs, &[&maps, &weight]);
    let (noise, weight) = (random(&[3, 5, 1, 1]), random(&[5, 2, 4, 4]));
    let covered = conv_transpose(&noise, &weight, 1, 0);
    let theirs = noise.conv_transpose2d(&weight, none, [1, 1], [0, 0], [0, 0], 1, [1, 1]);
    assert_same(&covered, &theirs, &[&noise, &weight]);
}

#[track_caller]
fn assert_same(ours: &Tensor, theirs: &Tensor, inputs: &[&Tensor]) {
    assert_eq!(ours.size(), theirs.size());
    assert!(ours.allclose(theirs, 1e-5, 1e-5, false));
    // Squares, so that the gradients depend on all that went before.
    let gradients =
        |out: &Tensor| Tensor::run_backward(&[out.square().sum(Kind::Float)], inputs, false, false);
    for (ours, theirs) in gradients(ours).iter().zip(gradients(theirs)) {
        assert!(ours.allclose(&theirs, 1e-4, 1e-4, false));
    }
}

#[test]
fn images_keep_their_places_with_their_features_together() {
    for features in [1, 3] {
        let x = Tensor::arange(2 * features * 12, (Kind::Float, Device::Cpu)).view([2, features, 4, 3]);
        let last = channels_last(&x);
        assert!(last.equal(&x));
        assert_eq!(last.stride(), [12 * features, 1, 3 * features, features]);
    }
}

#[test]
fn batch_statistics_are_the_mean_and_the_unbiased_variance() {
    let network = Sequential::new(vec![Layer::BatchNorm { features: 2 }]);
    let x = Tensor::from_slice(&[1f32, 5.0, 2.0, 7.0, 6.0, 9.0]).view([3, 2, 1, 1]);
    let parameters =
        [Tensor::ones([2], (Kind::Float, Device::Cpu)), Tensor::zeros([2], (Kind::Float, Device::Cpu))];
    let mut pass = Pass::batch(&parameters, &[], KEY);
    let out = network.forward(&x, &mut pass);
    let statistics = pass.statistics;
    let close = |tensor: &Tensor, values: [f64; 2]| {
        (0..2).all(|i| (tensor.double_value(&[i]) - values[usize::try_from(i).unwrap()]).abs() < 1e-4)
    };
    assert!(close(&statistics[0], [3.0, 7.0]), "{:?}", statistics[0]);
    assert!(close(&statistics[1], [7.0, 4.0]), "{:?}", statistics[1]);
    let running = network.forward(&x, &mut Pass::running(&parameters, &statistics, KEY));
    assert!(out.mean(None).double_value(&[]).abs() < 1e-6);
    assert!(running.mean(None).double_value(&[]).abs() < 1e-6);
}

#[test]
fn images_that_do_not_fit_the_model_are_refused_with_both_shapes() {
    let model = Model {
        kind: ModelKind::Mlp28,
        latent_dim: 10,
        width: 8,
        ema_half_life_images: 1,
        generator: None,
        discriminator: None,
    };
    let error = Models::new(&model, ImageShape { channels: 3, height: 32, width: 32 }).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("mlp-28") && text.contains("3 x 32 x 32") && text.contains("1 x 28 x 28"),
        "{text}"
    );
}
