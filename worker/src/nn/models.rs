//! Pairs of networks for each `model.kind`.

use std::sync::Arc;

use ganglion_proto::job::{Family, Model, ModelKind};

use super::classes::OfClasses;
use super::pieces::Sizes;
use super::r3gan::R3gan;
use super::{Layer, Network, ScriptNetwork, Sequential, sngan};
use crate::data::ImageShape;

/// A generator and a discriminator that fit each other and the data.
#[derive(Clone, Debug)]
pub struct Models {
    /// Noise (n, latent_dim) to images (n, channels, height, width) in [-1, 1].
    pub generator: Arc<dyn Network>,
    /// Images to logits (n, 1).
    pub discriminator: Arc<dyn Network>,
    /// Length of the noise vector.
    pub latent_dim: usize,
    /// Shape of the images.
    pub shape: ImageShape,
    /// Number of classes that the networks are conditioned on; 0 for none.
    pub classes: u32,
}

/// Reasons why a job's networks cannot be trained on its data.
#[derive(Debug, thiserror::Error)]
pub enum UnsuitableModel {
    /// The model is of another family.
    #[error("model.kind: \"{0}\" has no generator and discriminator")]
    Family(ModelKind),
    /// The data's images do not have the model's shape.
    #[error(transparent)]
    Data(#[from] UnsuitableData),
    /// A user's network cannot be trained.
    #[error("{key}: {what}")]
    Script {
        /// Key of the job file: `model.generator` or `model.discriminator`.
        key: &'static str,
        /// Reason, and how to fix it.
        what: String,
    },
}

/// The data's images do not have the model's shape.
#[derive(Debug, thiserror::Error)]
#[error(
    "model.kind: {model} draws images of {wanted}, and the data has {found}; choose another model, or set \
     data.resize and data.crop"
)]
pub struct UnsuitableData {
    model: ModelKind,
    wanted: String,
    found: ImageShape,
}

impl Models {
    /// Builds the networks of a job, for images of a shape.
    pub fn new(model: &Model, shape: ImageShape) -> Result<Models, UnsuitableModel> {
        Models::with_classes(model, shape, 0)
    }

    /// The same for samples of `classes` classes, where the job wants a conditional model.
    pub fn with_classes(model: &Model, shape: ImageShape, classes: u32) -> Result<Models, UnsuitableModel> {
        if model.kind.family() != Family::Gan {
            return Err(UnsuitableModel::Family(model.kind));
        }
        let Some(side) = model.kind.side() else { return Models::scripts(model, shape) };
        // The perceptron ends in 784 numbers: one channel of 28 x 28.
        let channels = (model.kind == ModelKind::Mlp28).then_some(1);
        check_shape(model.kind, channels, shape)?;
        let sizes = Sizes {
            latent: i64::from(model.latent_dim),
            width: i64::from(model.width),
            // Data are grey or in colour; nothing else passes the check of `data.channels`.
            channels: if shape.channels == 1 { 1 } else { 3 },
            side: i64::from(side),
            // Classes of the data count only where the job asks for them.
            classes: if model.conditional { i64::from(classes) } else { 0 },
        };
        let (generator, discriminator) = networks(model.kind, sizes);
        Ok(Models {
            generator,
            discriminator,
            latent_dim: model.latent_dim as usize,
            shape,
            classes: if model.conditional { classes } else { 0 },
        })
    }

    /// Builds the generator alone: a user's generator needs no discriminator.
    pub fn generator_of(
        model: &Model,
        shape: ImageShape,
        classes: u32,
    ) -> Result<Arc<dyn Network>, UnsuitableModel> {
        match model.kind {
            ModelKind::Script => Models::script_generator(model, shape),
            _ => Ok(Models::with_classes(model, shape, classes)?.generator),
        }
    }

    /// Loads the user's own networks.
    fn scripts(model: &Model, shape: ImageShape) -> Result<Models, UnsuitableModel> {
        let refused = |what| UnsuitableModel::Script { key: "model.discriminator", what };
        let path = model.discriminator.as_deref().ok_or_else(|| refused("missing".to_string()))?;
        Ok(Models {
            generator: Models::script_generator(model, shape)?,
            discriminator: Arc::new(ScriptNetwork::discriminator(path, shape).map_err(refused)?),
            latent_dim: model.latent_dim as usize,
            shape,
            classes: 0,
        })
    }

    fn script_generator(model: &Model, shape: ImageShape) -> Result<Arc<dyn Network>, UnsuitableModel> {
        let refused = |what| UnsuitableModel::Script { key: "model.generator", what };
        let path = model.generator.as_deref().ok_or_else(|| refused("missing".to_string()))?;
        let latent_dim = i64::from(model.latent_dim);
        Ok(Arc::new(ScriptNetwork::generator(path, latent_dim, shape).map_err(refused)?))
    }
}

/// Checks that images have the side of a kind of model, and this number of channels.
pub(super) fn check_shape(
    kind: ModelKind,
    channels: Option<usize>,
    found: ImageShape,
) -> Result<(), UnsuitableData> {
    let Some(side) = kind.side() else { return Ok(()) };
    let fits = [found.height, found.width] == [side as usize; 2]
        && channels.is_none_or(|channels| found.channels == channels);
    if fits {
        return Ok(());
    }
    let channels = channels.map_or("any number of channels".to_string(), |n| n.to_string());
    Err(UnsuitableData { model: kind, wanted: format!("{channels} x {side} x {side}"), found })
}

fn networks(kind: ModelKind, sizes: Sizes) -> (Arc<dyn Network>, Arc<dyn Network>) {
    let Sizes { latent, width, channels, classes, .. } = sizes;
    // Networks that know no classes are wrapped in `OfClasses`, which adds the conditioning.
    // Beside the noise comes a vector of the class as long as it; the discriminator's vector is
    // multiplied by one (`classes.rs`).
    let (inputs, outputs) = if classes > 0 { (2 * latent, latent) } else { (latent, 1) };
    let plain = |(generator, discriminator)| -> (Arc<dyn Network>, Arc<dyn Network>) {
        (Arc::new(Sequential::new(generator)), Arc::new(Sequential::new(discriminator)))
    };
    let (generator, discriminator): (Arc<dyn Network>, Arc<dyn Network>) = match kind {
        ModelKind::Mlp28 => plain(mlp_28(inputs, width, outputs)),
        ModelKind::Dcgan28 => plain(dcgan_28(inputs, width, channels, outputs)),
        ModelKind::Dcgan64 => plain(dcgan_64(inputs, width, channels, outputs)),
        ModelKind::R3gan28 | ModelKind::R3gan32 => {
            (Arc::new(R3gan::generator(sizes, inputs)), Arc::new(R3gan::discriminator(sizes, outputs)))
        }
        ModelKind::Sngan32 => {
            // It has classes within, and is not wrapped.
            return (Arc::new(sngan::Generator::new(sizes)), Arc::new(sngan::Discriminator::new(sizes)));
        }
        ModelKind::Script => unreachable!("its networks come from files"),
        ModelKind::Vae28 | ModelKind::Vae32 | ModelKind::Transformer | ModelKind::Package => {
            unreachable!("no GANs")
        }
    };
    if classes == 0 {
        return (generator, discriminator);
    }
    (
        OfClasses::generator(generator, classes, latent),
        OfClasses::discriminator(discriminator, classes, latent),
    )
}

// The slope of Radford et al. (2015), section 4.
const LEAKY: Layer = Layer::LeakyRelu { slope: 0.2 };

/// Multi-layer perceptrons: latent-width-width-784 and 784-width-width-outputs.
fn mlp_28(latent: i64, width: i64, outputs: i64) -> (Vec<Layer>, Vec<Layer>) {
    let linear = |inputs, outputs| Layer::Linear { inputs, outputs };
    let generator = vec![
        linear(latent, width),
        LEAKY,
        linear(width, width),
        LEAKY,
        linear(width, 784),
        Layer::Tanh,
        Layer::Reshape(vec![1, 28, 28]),
    ];
    // No last activation in any of them: the losses take the logit.
    let discriminator = vec![
        Layer::Reshape(vec![784]),
        linear(784, width),
        LEAKY,
        linear(width, width),
        LEAKY,
        linear(width, outputs),
    ];
    (generator, discriminator)
}

/// A convolution that halves each side, or its transpose that doubles it.
// The kernel is a multiple of the stride, so it covers each pixel equally often (Odena et al., 2016).
const HALVING: (i64, i64, i64) = (4, 2, 1);
/// A convolution that covers a whole map, or its transpose that starts one.
const fn covering(kernel: i64) -> (i64, i64, i64) {
    (kernel, 1, 0)
}

fn up(inputs: i64, outputs: i64, (kernel, stride, padding): (i64, i64, i64)) -> Layer {
    Layer::ConvTranspose { inputs, outputs, kernel, stride, padding }
}

fn down(inputs: i64, outputs: i64, (kernel, stride, padding): (i64, i64, i64)) -> Layer {
    Layer::Conv { inputs, outputs, kernel, stride, padding }
}

fn norm(features: i64) -> Layer {
    Layer::BatchNorm { features }
}

/// DCGAN in two doublings from a 7 x 7 map.
fn dcgan_28(latent: i64, width: i64, channels: i64, outputs: i64) -> (Vec<Layer>, Vec<Layer>) {
    let generator = vec![
        Layer::Reshape(vec![latent, 1, 1]),
        up(latent, 4 * width, covering(7)),
        norm(4 * width),
        Layer::Relu,
        up(4 * width, 2 * width, HALVING),
        norm(2 * width),
        Layer::Relu,
        up(2 * width, channels, HALVING),
        Layer::Tanh,
    ];
    let discriminator = vec![
        // No normalisation in the first layer of the discriminator, nor in the last of the generator:
        // Radford et al. (2015), section 3.
        down(channels, 2 * width, HALVING),
        LEAKY,
        down(2 * width, 4 * width, HALVING),
        norm(4 * width),
        LEAKY,
        down(4 * width, outputs, covering(7)),
        Layer::Reshape(vec![outputs]),
    ];
    (generator, discriminator)
}

/// DCGAN in four doublings from a 4 x 4 map, Radford et al. (2015), figure 1.
fn dcgan_64(latent: i64, width: i64, channels: i64, outputs: i64) -> (Vec<Layer>, Vec<Layer>) {
    let mut generator = vec![Layer::Reshape(vec![latent, 1, 1])];
    let mut inputs = latent;
    for (features, shape) in
        [(8 * width, covering(4)), (4 * width, HALVING), (2 * width, HALVING), (width, HALVING)]
    {
        generator.extend([up(inputs, features, shape), norm(features), Layer::Relu]);
        inputs = features;
    }
    generator.extend([up(width, channels, HALVING), Layer::Tanh]);

    let mut discriminator = vec![down(channels, width, HALVING), LEAKY];
    let mut inputs = width;
    for features in [2 * width, 4 * width, 8 * width] {
        discriminator.extend([down(inputs, features, HALVING), norm(features), LEAKY]);
        inputs = features;
    }
    discriminator.extend([down(8 * width, outputs, covering(4)), Layer::Reshape(vec![outputs])]);
    (generator, discriminator)
}
