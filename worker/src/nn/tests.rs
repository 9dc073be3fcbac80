use ganglion_proto::job::{Model, ModelKind};
use tch::{Device, Kind};

use super::*;
use crate::data::ImageShape;

fn models(kind: ModelKind, channels: usize, side: usize) -> Models {
    let model = Model { kind, latent_dim: 10, width: 8, ema_half_life_images: 1 };
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
        let mut statistics = Vec::new();
        let mode = &mut Mode::Batch(&mut statistics);
        let images = models.generator.forward(&noise, &ones(&models.generator.parameters()), mode);
        let (channels, side) = (i64::try_from(channels).unwrap(), i64::try_from(side).unwrap());
        assert_eq!(images.size(), [4, channels, side, side]);
        assert_eq!(statistics.len(), models.generator.buffers().len());
        let mode = &mut Mode::Batch(&mut statistics);
        let logits = models.discriminator.forward(&images, &ones(&models.discriminator.parameters()), mode);
        assert_eq!(logits.size(), [4, 1]);
    }
}

#[test]
fn batch_statistics_are_the_mean_and_the_unbiased_variance() {
    let network = Network::new(vec![Layer::BatchNorm { features: 2 }]);
    let x = Tensor::from_slice(&[1f32, 5.0, 2.0, 7.0, 6.0, 9.0]).view([3, 2, 1, 1]);
    let parameters =
        [Tensor::ones([2], (Kind::Float, Device::Cpu)), Tensor::zeros([2], (Kind::Float, Device::Cpu))];
    let mut statistics = Vec::new();
    let out = network.forward(&x, &parameters, &mut Mode::Batch(&mut statistics));
    let close = |tensor: &Tensor, values: [f64; 2]| {
        (0..2).all(|i| (tensor.double_value(&[i]) - values[usize::try_from(i).unwrap()]).abs() < 1e-4)
    };
    assert!(close(&statistics[0], [3.0, 7.0]), "{:?}", statistics[0]);
    assert!(close(&statistics[1], [7.0, 4.0]), "{:?}", statistics[1]);
    let running = network.forward(&x, &parameters, &mut Mode::Running(&statistics));
    assert!(out.mean(None).double_value(&[]).abs() < 1e-6);
    assert!(running.mean(None).double_value(&[]).abs() < 1e-6);
}

#[test]
fn images_that_do_not_fit_the_model_are_refused_with_both_shapes() {
    let model = Model { kind: ModelKind::Mlp28, latent_dim: 10, width: 8, ema_half_life_images: 1 };
    let error = Models::new(&model, ImageShape { channels: 3, height: 32, width: 32 }).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("mlp-28") && text.contains("3 x 32 x 32") && text.contains("1 x 28 x 28"),
        "{text}"
    );
}
