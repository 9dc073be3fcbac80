use ganglion_proto::job::{Likelihood, Model, ModelKind, VaeSettings};
use tch::{Device, Kind};

use super::sequential::{channels_last, conv, conv_transpose};
use super::*;
use crate::data::ImageShape;
use crate::random::Purpose;

const KEY: Key = Key { seed: 1, step: 0, phase: 0, shard: 0, purpose: Purpose::Network };

fn model(kind: ModelKind) -> Model {
    Model::plain(kind, 10, 8)
}

fn models(kind: ModelKind, channels: usize, side: usize) -> Models {
    let model = model(kind);
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
        (ModelKind::Sngan32, 3, 32),
        (ModelKind::R3gan28, 1, 28),
        (ModelKind::R3gan32, 3, 32),
    ] {
        let models = models(kind, channels, side);
        let noise = Tensor::ones([4, 10], (Kind::Float, Device::Cpu));
        let (of_g, of_d) = (ones(&models.generator.parameters()), ones(&models.discriminator.parameters()));
        let mut pass = Pass::batch(&of_g, &[], KEY);
        let images = models.generator.forward(&noise, &mut pass);
        let (channels, side) = (i64::try_from(channels).unwrap(), i64::try_from(side).unwrap());
        assert_eq!(images.size(), [4, channels, side, side]);
        assert_eq!(pass.statistics.len(), models.generator.buffers().len());
        let vectors = ones(&models.discriminator.buffers());
        let logits = models.discriminator.forward(&images, &mut Pass::batch(&of_d, &vectors, KEY));
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
    // Squares, so that the gradients depend on all earlier layers.
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
    let model = model(ModelKind::Mlp28);
    let error = Models::new(&model, ImageShape { channels: 3, height: 32, width: 32 }).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("mlp-28") && text.contains("3 x 32 x 32") && text.contains("1 x 28 x 28"),
        "{text}"
    );
}

/// The tensors of a network by their specifications, drawn with a spread that leaves no part without effect.
fn drawn(specs: &[TensorSpec], seed: u64) -> Vec<Tensor> {
    let draw = |(shard, spec): (u32, &TensorSpec)| {
        let inputs = spec.numel() as f64 / spec.shape[0] as f64;
        let values = Key { seed, shard, ..KEY }.normal(spec.numel()) / inputs.sqrt() * 0.7 + 0.02;
        values.view(spec.shape.as_slice()).to_kind(Kind::Double)
    };
    (0..).zip(specs).map(draw).collect()
}

/// The gradient by all tensors, and that of the penalty on the input's gradient, against central differences
/// in double precision along a few directions that move everything.
#[test]
fn networks_have_the_gradients_of_finite_differences() {
    let cases = [
        (ModelKind::Dcgan28, 3),
        (ModelKind::R3gan28, 0),
        (ModelKind::R3gan32, 3),
        (ModelKind::Sngan32, 0),
        (ModelKind::Sngan32, 3),
    ];
    for (kind, classes) in cases {
        let model = Model { conditional: true, width: 8, latent_dim: 3, ..model(kind) };
        let side = kind.side().unwrap();
        let (side, signed) = (side as usize, i64::from(side));
        let shape = ImageShape { channels: 1, height: side, width: side };
        let models = Models::with_classes(&model, shape, classes).unwrap();
        let of_samples = (classes > 0).then(|| Tensor::from_slice(&[2i64, 0]));
        let pixels = Tensor::arange(2 * signed * signed, (Kind::Double, Device::Cpu)) * 0.37;
        let images = pixels.sin().view([2, 1, signed, signed]);
        let noise = Tensor::from_slice(&[0.3, -1.0, 0.8, 1.1, 0.2, -0.4]).view([2, 3]);
        check_network(kind, &*models.generator, &noise, of_samples.as_ref(), false);
        check_network(kind, &*models.discriminator, &images, of_samples.as_ref(), true);
    }
}

fn check_network(
    kind: ModelKind,
    network: &dyn Network,
    input: &Tensor,
    classes: Option<&Tensor>,
    penalised: bool,
) {
    let specs = network.parameters();
    let weights = drawn(&specs, 1);
    let buffers = match network.sees_batch() {
        true => drawn(&network.buffers(), 2),
        // Where the power method has converged the norm does not change with its vector, which passes take
        // for constant.
        false => {
            singular_vectors(&specs, &weights)[..network.buffers().len()].iter().map(Tensor::copy).collect()
        }
    };
    let function = |weights: &[Tensor]| {
        let input = input.copy().set_requires_grad(penalised);
        let mut pass = Pass::batch(weights, &buffers, KEY).of(classes);
        let out = network.forward(&input, &mut pass);
        assert_eq!(pass.statistics.len(), buffers.len());
        let value = out.sin().sum(Kind::Double);
        if !penalised {
            return value;
        }
        let gradients = Tensor::run_backward(&[out.sum(Kind::Double)], &[&input], true, true);
        value + gradients[0].square().sum(Kind::Double)
    };
    let leaves: Vec<Tensor> = weights.iter().map(|tensor| tensor.copy().set_requires_grad(true)).collect();
    let gradients = Tensor::run_backward(&[function(&leaves)], &leaves, false, false);
    let way = drawn(&specs, 3);
    let along = |by: f64| {
        let moved: Vec<Tensor> = weights.iter().zip(&way).map(|(tensor, way)| tensor + way * by).collect();
        function(&moved).double_value(&[])
    };
    let difference = (along(STEP) - along(-STEP)) / (2.0 * STEP);
    let product = |(gradient, way): (&Tensor, &Tensor)| {
        if gradient.defined() { (gradient * way).sum(Kind::Double).double_value(&[]) } else { 0.0 }
    };
    let found: f64 = gradients.iter().zip(&way).map(product).sum();
    let scale = along(0.0).abs() + difference.abs();
    assert!(
        (found - difference).abs() < 1e-4 * scale,
        "{kind}, penalised: {penalised}: {found}, not {difference}"
    );
}

/// Left singular vector of each weight's greatest singular value, as a matrix.
fn singular_vectors(specs: &[TensorSpec], weights: &[Tensor]) -> Vec<Tensor> {
    let vector = |(_, weight): (&TensorSpec, &Tensor)| {
        let (left, _, _) = weight.flatten(1, -1).svd(true, true);
        left.select(1, 0).contiguous()
    };
    specs.iter().zip(weights).filter(|(spec, _)| spec.name.ends_with(".weight")).map(vector).collect()
}

/// Small enough that hardly any activation crosses its kink, where the penalty jumps.
const STEP: f64 = 1e-8;

/// Huang et al. (2024), section 4: a block begins as the identity, so the initial discriminator is one filter
/// after the other.
#[test]
fn a_block_of_r3gan_begins_as_the_identity() {
    let models = models(ModelKind::R3gan28, 1, 28);
    let specs = models.discriminator.parameters();
    let last: Vec<_> = specs.iter().filter(|spec| spec.name.ends_with("conv3.weight")).collect();
    assert_eq!(last.len(), 3);
    assert!(last.iter().all(|spec| spec.init == Init::Constant(0.0)));
    // He's deviation times the gain of leaky ReLU, and 3 blocks to the power of -1/4.
    let first = specs.iter().find(|spec| spec.name == "stage0.block.conv1.weight").unwrap();
    let Init::Normal { deviation, .. } = first.init else { panic!("{first:?}") };
    let expected = (2.0_f64 / 1.04).sqrt() * 3.0_f64.powf(-0.25) / 8.0_f64.sqrt();
    assert!((f64::from(deviation) - expected).abs() < 1e-6, "{deviation}, not {expected}");
}

/// Constants pass through both, except at the border of the halving, whose filter also sees the zeros
/// outside.
#[test]
fn resampling_is_bilinear() {
    let ones = Tensor::ones([1, 8, 8, 3], (Kind::Float, Device::Cpu));
    let (halved, doubled) = (pieces::halve(&ones), pieces::double(&ones));
    assert_eq!((halved.size(), doubled.size()), (vec![1, 4, 4, 3], vec![1, 16, 16, 3]));
    let inner = |x: &Tensor, margin: i64| {
        let side = x.size()[1] - 2 * margin;
        x.narrow(1, margin, side).narrow(2, margin, side).contiguous()
    };
    for x in [inner(&halved, 1), inner(&doubled, 1)] {
        assert!((x - 1.0).abs().max().double_value(&[]) < 1e-6);
    }
    // A lone pixel spreads as 1, 3, 3, 1 over 4, each way.
    let lone = Tensor::zeros([1, 4, 4, 1], (Kind::Float, Device::Cpu));
    let _ = lone.view(-1).get(5).fill_(16.0);
    let row = Vec::<f32>::try_from(pieces::double(&lone).view([8, 8]).get(2)).unwrap();
    assert_eq!(row, [0.0, 3.0, 9.0, 9.0, 3.0, 0.0, 0.0, 0.0].map(|x: f32| x));
}

/// Miyato et al. (2018), equation 8: with the vector iterated often the weight's greatest singular value
/// becomes 1.
#[test]
fn a_spectrally_normalised_weight_has_norm_1() {
    let weight = (Tensor::arange(48, (Kind::Float, Device::Cpu)) * 1.7).sin().view([6, 2, 2, 2]);
    let mut vectors = [Tensor::ones([6], (Kind::Float, Device::Cpu))];
    for _ in 0..200 {
        let mut pass = Pass::batch(&[], &vectors, KEY);
        let _ = spectral::normalised(&weight, 0, &mut pass);
        vectors = [pass.statistics.remove(0)];
    }
    let mut pass = Pass::running(&[], &vectors, KEY);
    let normal = spectral::normalised(&weight, 0, &mut pass).view([6, 8]);
    assert!(pass.statistics.is_empty(), "a pass by the buffers as they are hands nothing out");
    let of_singular_values = normal.matmul(&normal.transpose(0, 1));
    // Powers of it neither grow nor vanish.
    let power = (0..7).fold(of_singular_values, |power, _| power.matmul(&power));
    let trace = power.trace().double_value(&[]);
    assert!((0.9..1.5).contains(&trace), "{trace}");
}

#[test]
fn layers_are_counted_by_the_names_of_their_tensors() {
    let specs = models(ModelKind::Dcgan28, 1, 28).discriminator.parameters();
    // A convolution, another with its batch normalisation, the last.
    assert_eq!(layers(&specs), 4);
    assert_eq!([0, 1, 2, 3, 4].map(|layers| first_layers(&specs, layers)), [0, 1, 2, 4, 5]);
}

#[test]
fn an_autoencoder_fits_images_of_any_colour_and_says_which_it_does_not() {
    let vae =
        VaeSettings { likelihood: Likelihood::Gaussian, beta: 1.0, binarise: false, importance_samples: 1 };
    let model = Model { vae: Some(vae), conditional: true, ..Model::plain(ModelKind::Vae32, 5, 2) };
    let shape = ImageShape { channels: 3, height: 32, width: 32 };
    let networks = Autoencoder::new(&model, shape, 4).unwrap();
    let (encoder, decoder) = (ones(&networks.encoder.parameters()), ones(&networks.decoder.parameters()));
    let images = Tensor::zeros([2, 3, 32, 32], (Kind::Float, Device::Cpu));
    let classes = Tensor::from_slice(&[3i64, 0]);
    let posterior =
        networks.encoder.forward(&images, &mut Pass::running(&encoder, &[], KEY).of(Some(&classes)));
    assert_eq!(posterior.size(), [2, 10]);
    let mut pass = Pass::running(&decoder, &[], KEY).of(Some(&classes));
    let decoded = networks.decoder.forward(&posterior.narrow(1, 0, 5), &mut pass);
    assert_eq!(decoded.size(), [2, 3, 32, 32]);
    let small = ImageShape { channels: 3, height: 28, width: 28 };
    let refused = Autoencoder::new(&model, small, 4).unwrap_err().to_string();
    assert!(refused.contains("vae-32") && refused.contains("x 32 x 32"), "{refused}");
}
