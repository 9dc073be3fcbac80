//! Networks of a variational autoencoder (Kingma and Welling, 2013): an encoder from images to the mean and
//! the logarithm of the variance of a latent vector, and a decoder back.
//!
//! Two convolutions halve the sides of an image, two transposed ones double them again, with kernels as in
//! DCGAN (Radford et al., 2015); between them and the latent vector lies one hidden layer. Activations are
//! x sigmoid(x) (Elfwing et al., 2018; Ramachandran et al., 2017, "Swish"). There is no normalisation, so a
//! sample's result depends on no other sample.

use c10d::convolution::Grid;
use ganglion_proto::job::{Likelihood, Model};
use tch::Tensor;

use super::models::check_shape;
use super::pieces::{Sizes, Specs, convolved, convolved_back, embed, in_single, linear, scaled};
use super::sequential::channels_last;
use super::{Init, Network, Pass, TensorSpec, UnsuitableModel};
use crate::data::ImageShape;

/// Gain that preserves the variance through the activations, about as for a rectifier (He et al., 2015).
const GAIN: f32 = std::f32::consts::SQRT_2;
/// Hidden units for each unit of width.
const HIDDEN: i64 = 16;
/// Side of a kernel.
const KERNEL: i64 = 4;
/// Where kernels lie on the larger map: the other's side is half of it.
const HALVES: Grid = Grid { stride: 2, padding: 1 };
/// Initial logarithm of the deviation of a normal pixel: that of pixels about a poor reconstruction.
const DEVIATION: f32 = -1.5;

/// An encoder and a decoder that fit each other and the data.
#[derive(Clone, Debug)]
pub struct Autoencoder {
    /// Images to the parameters of the posterior.
    pub encoder: Encoder,
    /// Latent vectors to images.
    pub decoder: Decoder,
    /// Length of the latent vector.
    pub latent_dim: usize,
    /// Shape of the images.
    pub shape: ImageShape,
    /// Number of classes that both are conditioned on; 0 for none.
    pub classes: u32,
}

impl Autoencoder {
    /// Builds the networks of a job, for images of a shape and, where the job wants a conditional model, of
    /// `classes` classes.
    ///
    /// # Errors
    /// The images do not have the model's shape, or the model is of another family.
    pub fn new(model: &Model, shape: ImageShape, classes: u32) -> Result<Autoencoder, UnsuitableModel> {
        let (Some(settings), Some(side)) = (&model.vae, model.kind.side()) else {
            return Err(UnsuitableModel::Family(model.kind));
        };
        check_shape(model.kind, None, shape)?;
        let classes = if model.conditional { classes } else { 0 };
        let sizes = Sizes {
            latent: i64::from(model.latent_dim),
            width: i64::from(model.width),
            channels: if shape.channels == 1 { 1 } else { 3 },
            side: i64::from(side),
            classes: i64::from(classes),
        };
        let (encoder, decoder) = (Encoder { sizes }, Decoder { sizes, likelihood: settings.likelihood });
        Ok(Autoencoder { encoder, decoder, latent_dim: model.latent_dim as usize, shape, classes })
    }
}

/// Adds a layer's weight of this shape and its bias. `weight` has the first values of the weight.
fn add_layer(specs: &mut Specs, name: &str, shape: &[i64], outputs: i64, weight: Init) {
    specs.add(format!("{name}.weight"), shape, weight);
    specs.add(format!("{name}.bias"), &[outputs], Init::Constant(0.0));
}

fn add_linear(specs: &mut Specs, name: &str, outputs: i64, inputs: i64, gain: f32) {
    add_layer(specs, name, &[outputs, inputs], outputs, scaled(gain, inputs));
}

/// Adds a vector for each class, which is added to the hidden layer's inputs.
fn add_classes(specs: &mut Specs, sizes: Sizes) {
    if sizes.classes > 0 {
        specs.add_table("class.weight".to_string(), &[sizes.classes, hidden(sizes)], scaled(1.0, 1));
    }
}

fn hidden(sizes: Sizes) -> i64 {
    HIDDEN * sizes.width
}

/// Features and side of the smallest map.
fn smallest(sizes: Sizes) -> [i64; 2] {
    [2 * sizes.width, sizes.side / 4]
}

fn numel([features, side]: [i64; 2]) -> i64 {
    features * side * side
}

/// The hidden layer: a product, with the vector of each sample's class in a conditional model.
fn hidden_layer<'a>(
    x: &Tensor,
    sizes: Sizes,
    mut next: impl FnMut() -> &'a Tensor,
    classes: Option<&Tensor>,
) -> Tensor {
    let seen = linear(x, next(), Some(next()));
    if sizes.classes == 0 {
        return seen.silu();
    }
    (seen + embed(next(), classes)).silu()
}

/// Doubles the sides of a map by a transposed convolution.
fn upsampled(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
    convolved_back(x, weight, Some(bias), HALVES)
}

/// Images to the mean and the logarithm of the variance of each element of the latent vector.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    sizes: Sizes,
}

impl Network for Encoder {
    fn parameters(&self) -> Vec<TensorSpec> {
        let Sizes { latent, width, channels, .. } = self.sizes;
        let mut specs = Specs::default();
        for (name, inputs, outputs) in [("conv1", channels, width), ("conv2", width, 2 * width)] {
            let shape = [outputs, inputs, KERNEL, KERNEL];
            add_layer(&mut specs, name, &shape, outputs, scaled(GAIN, KERNEL * KERNEL * inputs));
        }
        add_linear(&mut specs, "hidden", hidden(self.sizes), numel(smallest(self.sizes)), GAIN);
        add_classes(&mut specs, self.sizes);
        // Small: the posterior begins near the prior.
        add_linear(&mut specs, "posterior", 2 * latent, hidden(self.sizes), 0.5);
        specs.list
    }

    fn buffers(&self) -> Vec<TensorSpec> {
        Vec::new()
    }

    fn sees_batch(&self) -> bool {
        false
    }

    /// Images (n, c, h, w) in [0, 1] to (n, 2 latent): means, then logarithms of variances.
    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor {
        let mut parameters = pass.parameters.iter();
        let mut next = || parameters.next().expect("a tensor for each of the network's parameters");
        let mut x = channels_last(&input.to_kind(pass.kind()));
        for _ in 0..2 {
            x = convolved(&x, next(), Some(next()), HALVES).silu();
        }
        let x = hidden_layer(&x.flatten(1, -1), self.sizes, &mut next, pass.classes);
        in_single(&linear(&x, next(), Some(next())))
    }
}

/// Latent vectors to images. As a network of the worker its output are the means of the pixels, in [-1, 1].
#[derive(Clone, Copy, Debug)]
pub struct Decoder {
    sizes: Sizes,
    likelihood: Likelihood,
}

impl Decoder {
    /// Latent vectors (n, latent) to the logits of the pixels' means in [0, 1], (n, c, h, w).
    pub fn logits(&self, input: &Tensor, pass: &Pass<'_>) -> Tensor {
        let mut parameters = pass.parameters.iter();
        let mut next = || parameters.next().expect("a tensor for each of the network's parameters");
        let x = hidden_layer(&input.to_kind(pass.kind()), self.sizes, &mut next, pass.classes);
        let [features, side] = smallest(self.sizes);
        let x = linear(&x, next(), Some(next())).silu().view([-1, features, side, side]);
        let x = upsampled(&channels_last(&x), next(), next()).silu();
        in_single(&upsampled(&x, next(), next()))
    }

    /// Logarithm of the likelihood of images (n, c, h, w) in [0, 1] in nats, (n), given the logits of the
    /// pixels' means.
    pub fn log_likelihood(&self, images: &Tensor, logits: &Tensor, pass: &Pass<'_>) -> Tensor {
        let of_pixels = match self.likelihood {
            Likelihood::Bernoulli => {
                // log(p^x (1 - p)^(1 - x)), with p = sigmoid(logits).
                logits * images - logits.softplus()
            }
            Likelihood::Gaussian => {
                let deviation = pass.parameters.last().expect("the decoder has a deviation");
                let off = (images - logits.sigmoid()) * (-deviation).exp();
                let constant = 0.5 * (2.0 * std::f64::consts::PI).ln();
                -(&off * &off * 0.5 + deviation + constant)
            }
        };
        of_pixels.flatten(1, -1).sum_dim_intlist([1i64].as_slice(), false, None)
    }
}

impl Network for Decoder {
    fn parameters(&self) -> Vec<TensorSpec> {
        let Sizes { latent, width, channels, .. } = self.sizes;
        let mut specs = Specs::default();
        add_linear(&mut specs, "hidden", hidden(self.sizes), latent, GAIN);
        add_classes(&mut specs, self.sizes);
        add_linear(&mut specs, "map", numel(smallest(self.sizes)), hidden(self.sizes), GAIN);
        for (name, inputs, outputs, gain) in
            [("conv1", 2 * width, width, GAIN), ("conv2", width, channels, 1.0)]
        {
            let shape = [inputs, outputs, KERNEL, KERNEL];
            // A pixel of the larger map gets a quarter of the kernel's weights.
            add_layer(&mut specs, name, &shape, outputs, scaled(gain, KERNEL * KERNEL / 4 * inputs));
        }
        if self.likelihood == Likelihood::Gaussian {
            specs.add_exact("log_deviation".to_string(), &[1], Init::Constant(DEVIATION));
        }
        specs.list
    }

    fn buffers(&self) -> Vec<TensorSpec> {
        Vec::new()
    }

    fn sees_batch(&self) -> bool {
        false
    }

    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor {
        self.logits(input, pass).sigmoid() * 2.0 - 1.0
    }
}
