//! Samples that a state generates.

pub(crate) mod picture;

use std::collections::HashMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ganglion_proto::archive::kind_of;
use ganglion_proto::evaluation::NOT_FINITE;
use ganglion_proto::job::{Family, Likelihood, Model, ModelKind, VaeSettings};
use ganglion_proto::message::{SampleGrid, SampleTexts};
use ganglion_proto::names::named;
use ganglion_proto::progress::Progress;
use safetensors::SafeTensors;
use tch::{Tensor, no_grad};

use crate::checkpoint::{EARLIER, Snapshot, named_tensor};
use crate::data::{DataSet, ImageShape};
use crate::nn::{Autoencoder, Encoder, Models, Network, Pass, TensorSpec, UnsuitableModel, is_finite};
use crate::random::{Key, Purpose};
use crate::sampling::picture::Picture;
use crate::state::{Sections, StateLayout};

/// Number of samples in one forward pass.
// Fixed, as a kernel's rounding may depend on the size of a batch.
const BATCH: usize = 64;
/// Usual number of images in a row of a grid.
const COLUMNS: u32 = 10;
/// Number of classes from which on not each has a column.
const FROM_MANY: u32 = 21;
/// Maximum size of the pixels in a grid of real samples, in bytes. Photographs hardly get smaller as PNG.
const MOST_REAL_BYTES: usize = 8 << 20;

/// Key in the header of a generator's file with the names of its classes, a JSON list.
pub(crate) const CLASS_NAMES: &str = "class_names";

/// File of a checkpoint with the weights of all networks: of each the moving average, where it has one.
pub(crate) const WEIGHTS_FILE: &str = "weights_ema.safetensors";
/// Beginnings of the names of an encoder's and a decoder's tensors in that file.
pub(crate) const AUTOENCODER: [&str; 2] = ["encoder.", "decoder."];

/// Reasons why there is no sample grid.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The checkpoint cannot be read; the message says what and where.
    #[error("{0}")]
    Input(String),
    /// The picture cannot be written.
    #[error("cannot encode the picture: {0}")]
    Encode(#[from] image::ImageError),
    /// A picture of such images would look like one.
    #[error("the images are {NOT_FINITE}: they hold NaN or infinite numbers")]
    NotFinite,
}

/// Returns the metadata of a safetensors file. The error says what the file is, in place of the `wanted` one.
pub(crate) fn metadata(bytes: &[u8], wanted: &str) -> Result<HashMap<String, String>, String> {
    match SafeTensors::read_metadata(bytes) {
        Ok((_, header)) => Ok(header.metadata().clone().unwrap_or_default()),
        Err(error) => {
            let found =
                kind_of(Cursor::new(bytes)).map_or_else(|| format!("damaged ({error})"), str::to_string);
            Err(format!("it is {found}, not {wanted}"))
        }
    }
}

/// Returns a model's tensor by its name, from a file that holds it. Its numbers are finite.
pub(crate) fn finite_tensor(file: &SafeTensors<'_>, spec: &TensorSpec) -> Result<Tensor, String> {
    let tensor = named_tensor(file, spec, "the model's")?;
    if is_finite(&tensor) { Ok(tensor) } else { Err(format!("{} is {NOT_FINITE}; {EARLIER}", spec.name)) }
}

/// Returns images whose numbers are all finite.
///
/// # Errors
/// Some are not.
pub(crate) fn finite(images: Tensor) -> Result<Tensor, SampleError> {
    if is_finite(&images) { Ok(images) } else { Err(SampleError::NotFinite) }
}

/// Generator, or a VAE's decoder, ready for inference.
pub struct Generator {
    network: Arc<dyn Network>,
    latent_dim: usize,
    classes: u32,
    class_names: Vec<String>,
    shape: ImageShape,
    weights: Vec<Tensor>,
    buffers: Vec<Tensor>,
    /// Encoder with its parameters, for a decoder that was read with one.
    encoder: Option<(Encoder, Vec<Tensor>)>,
}

/// Network that rates samples, ready for inference.
#[derive(Debug)]
pub struct Critic {
    /// Samples to ratings, (n, 1).
    pub network: Arc<dyn Network>,
    /// Number of classes that the network is conditioned on; 0 for none.
    pub classes: u32,
    /// Parameters.
    pub weights: Vec<Tensor>,
    /// Buffers.
    pub buffers: Vec<Tensor>,
}

/// Draws samples with the weights of a state, for an objective that generates any.
pub trait Sampler {
    /// Returns images (count, c, h, w) in [-1, 1]. Image i depends on the state, on the key's seed and
    /// purpose, and on i.
    fn draw(&self, layout: &StateLayout, snapshot: &Snapshot, key: Key, count: u32) -> Tensor;

    /// Number of classes, which samples are drawn of in turn; 0 without classes.
    fn classes(&self) -> u32 {
        0
    }

    /// Returns the network of the state that tells real samples from generated ones, if there is one.
    fn critic(&self, _layout: &StateLayout, _snapshot: &Snapshot) -> Option<Critic> {
        None
    }
}

/// Writes texts with the weights of a state, for an objective that generates text.
pub trait TextSampler {
    /// Returns `count` texts. Text i depends on the state, on the key's seed and purpose, and on i.
    ///
    /// # Errors
    /// libtorch refused.
    fn write(
        &self,
        layout: &StateLayout,
        snapshot: &Snapshot,
        key: Key,
        count: u32,
    ) -> Result<Vec<String>, c10d::Error>;
}

/// Maximum number of texts of a step.
const MOST_TEXTS: u32 = 5;

/// Returns the texts of a state, at most `MOST_TEXTS`.
///
/// # Errors
/// libtorch refused.
pub fn texts_of(
    sampler: &dyn TextSampler,
    layout: &StateLayout,
    snapshot: &Snapshot,
    seed: u64,
    count: u32,
) -> Result<SampleTexts, c10d::Error> {
    let key = Key { seed, step: 0, phase: 0, shard: 0, purpose: Purpose::Samples };
    let texts = sampler.write(layout, snapshot, key, count.min(MOST_TEXTS))?;
    let (mut all, of) = (String::new(), texts.len());
    for (text, number) in texts.iter().zip(1..) {
        all += &format!("--- {number} of {of} ---\n{}\n", text.trim_end());
    }
    Ok(SampleTexts { step: snapshot.step, text: all })
}

/// Number of images in a row of a grid whose images are of one class after the other: a column is one class,
/// if there are few.
pub fn columns(classes: u32) -> i64 {
    let columns = match classes {
        0 | FROM_MANY.. => COLUMNS,
        // As many as fit, of all classes equally many.
        few if few <= COLUMNS => COLUMNS - COLUMNS % few,
        few => few,
    };
    columns.into()
}

/// Renders a grid of at most `count` real samples as the networks see them, evenly spaced over the data set,
/// each in a place where [`grid_of`] has one of the same class. Places of samples that are not there stay
/// black. Returns `None` for samples that are no images.
///
/// # Errors
/// The picture cannot be encoded.
pub fn grid_of_real(data: &DataSet, count: u32) -> Result<Option<SampleGrid>, SampleError> {
    let Some(shape) = data.shape().image() else { return Ok(None) };
    let numel = shape.numel();
    let most = (MOST_REAL_BYTES / numel).min(count as usize).max(1);
    let places = places_of_real(&data.left(), data.labels(), data.classes(), most);
    let mut pixels = vec![-1.0; places.len() * numel];
    for (index, out) in places.iter().zip(pixels.chunks_exact_mut(numel)) {
        let Some(index) = index else { continue };
        // Training ends with an error if it comes to this sample; a picture of the others is still of use.
        if let Err(error) = data.read(*index, out) {
            tracing::warn!("real.png lacks a sample: {error}");
            out.fill(-1.0);
        }
    }
    let sizes = [places.len(), shape.channels, shape.height, shape.width];
    let sizes = sizes.map(|size| i64::try_from(size).expect("a grid is small"));
    let images = Tensor::from_slice(&pixels).view(sizes);
    let grid = Picture::grid(&images, columns(data.classes()))?.of_step(0)?;
    Ok(Some(SampleGrid { real: true, ..grid }))
}

/// Returns the sample for each place of a grid; `None` where a class has no more.
fn places_of_real(left: &[usize], labels: &[u32], classes: u32, count: usize) -> Vec<Option<usize>> {
    // Item `at` of `of`, evenly spaced over all.
    let spaced = |all: &[usize], at: usize, of: usize| match all.len() {
        few if few <= of => all.get(at).copied(),
        many => Some(all[at * many / of]),
    };
    if classes == 0 {
        let count = count.min(left.len());
        return (0..count).map(|at| spaced(left, at, count)).collect();
    }
    let classes = classes as usize;
    let mut by_class: Vec<Vec<usize>> = vec![Vec::new(); classes];
    left.iter().for_each(|index| by_class[labels[*index] as usize].push(*index));
    let rows = count.div_ceil(classes);
    (0..count).map(|at| spaced(&by_class[at % classes], at / classes, rows)).collect()
}

/// Renders a grid of `count` samples from a state.
pub fn grid_of(
    sampler: &dyn Sampler,
    layout: &StateLayout,
    snapshot: &Snapshot,
    seed: u64,
    count: u32,
) -> Result<SampleGrid, SampleError> {
    // Without the step of training: grids of a run show the same noise, so they can be compared.
    let key = Key { seed, step: 0, phase: 0, shard: 0, purpose: Purpose::Samples };
    let images = sampler.draw(layout, snapshot, key, count);
    Ok(Picture::grid(&images, columns(sampler.classes()))?.of_step(snapshot.step)?)
}

/// Header of a file of weights: the model, and what it was trained for.
struct About {
    model: Model,
    shape: ImageShape,
    classes: u32,
    class_names: Vec<String>,
}

impl About {
    /// Reads a header. `script` is the generator's TorchScript, if it is not where it was.
    fn read(about: &HashMap<String, String>, script: Option<&Path>) -> Result<About, String> {
        let text = |key: &str| {
            about.get(key).ok_or_else(|| {
                format!(
                    "it has no {key} in its header, so its weights draw no samples; give a generator_ema.safetensors or \
                     weights_ema.safetensors"
                )
            })
        };
        let number = |key: &str| -> Result<u32, String> {
            text(key)?.parse().map_err(|_| format!("its {key} is not a number"))
        };
        let kind: ModelKind = serde_json::from_value(serde_json::Value::from(text("model")?.as_str()))
            .map_err(|error| error.to_string())?;
        // Files of earlier versions have no number of classes.
        let classes = if about.contains_key("classes") { number("classes")? } else { 0 };
        let class_names = match about.get(CLASS_NAMES) {
            Some(names) => serde_json::from_str(names)
                .map_err(|error| format!("its {CLASS_NAMES} cannot be read: {error}"))?,
            // Files of earlier versions, and of classes that are numbers.
            None => Vec::new(),
        };
        let likelihood = || -> Result<Likelihood, String> {
            let text = text("likelihood")?;
            named(text).ok_or_else(|| format!("its likelihood {text} is unknown"))
        };
        let vae = match kind.family() {
            // The rest is of no meaning for drawing samples.
            Family::Vae => Some(VaeSettings {
                likelihood: likelihood()?,
                beta: 1.0,
                binarise: false,
                importance_samples: 1,
            }),
            _ => None,
        };
        let model = Model {
            conditional: classes > 0,
            // The path in the file is that of the machine that trained.
            generator: script.map(Path::to_path_buf).or_else(|| about.get("generator").map(PathBuf::from)),
            vae,
            ..Model::plain(kind, number("latent_dim")?, number("width")?)
        };
        // The models of this program draw squares; networks of the user's may draw others.
        let height = number("height")? as usize;
        let width = if about.contains_key("image_width") { number("image_width")? as usize } else { height };
        let shape = ImageShape { channels: number("channels")? as usize, height, width };
        Ok(About { model, shape, classes, class_names })
    }
}

impl Critic {
    /// Takes a network's weights from a state.
    pub fn of(network: Arc<dyn Network>, classes: u32, sections: &Sections, snapshot: &Snapshot) -> Critic {
        let (weights, buffers) = sections.views(&snapshot.floats(sections.weight_range()));
        Critic { network, classes, weights, buffers }
    }
}

impl Generator {
    /// Builds the generator from the moving average of a state, or from its weights if it has none.
    pub fn of_average(models: &Models, sections: &Sections, snapshot: &Snapshot) -> Generator {
        // Samples of the average are better than those of the last weights (Yazıcı et al., 2019).
        let range = sections.average_range().unwrap_or_else(|| sections.weight_range());
        let (weights, buffers) = sections.views(&snapshot.floats(range));
        Generator {
            network: models.generator.clone(),
            latent_dim: models.latent_dim,
            classes: models.classes,
            class_names: Vec::new(),
            shape: models.shape,
            weights,
            buffers,
            encoder: None,
        }
    }

    /// Builds a generator of a VAE's decoder with these parameters.
    pub(crate) fn of_decoder(networks: &Autoencoder, weights: Vec<Tensor>) -> Generator {
        Generator {
            network: Arc::new(networks.decoder),
            latent_dim: networks.latent_dim,
            classes: networks.classes,
            class_names: Vec::new(),
            shape: networks.shape,
            weights,
            buffers: Vec::new(),
            encoder: None,
        }
    }

    /// Reads the bytes of a `generator_ema.safetensors`, or of a VAE's `weights_ema.safetensors`. `file` names
    /// it in errors; `script` is the TorchScript that it belongs to, if that is not where it was.
    pub fn read(file: &str, bytes: &[u8], script: Option<&Path>) -> Result<Generator, SampleError> {
        let input = |what: String| SampleError::Input(format!("{file}: {what}"));
        const WANTED: &str =
            "weights that draw samples; give a generator_ema.safetensors or weights_ema.safetensors";
        let about = metadata(bytes, WANTED).map_err(input)?;
        let about = About::read(&about, script).map_err(input)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| input(error.to_string()))?;
        let load = |prefix: &str, specs: Vec<TensorSpec>| -> Result<Vec<Tensor>, SampleError> {
            let load = |spec: TensorSpec| {
                let spec = TensorSpec { name: format!("{prefix}{}", spec.name), ..spec };
                finite_tensor(&tensors, &spec).map_err(input)
            };
            specs.into_iter().map(load).collect()
        };
        let About { model, shape, classes, class_names } = about;
        let unsuitable = |error: UnsuitableModel| input(error.to_string());
        if model.kind.family() == Family::Vae {
            let networks = Autoencoder::new(&model, shape, classes).map_err(unsuitable)?;
            let [of_encoder, of_decoder] = AUTOENCODER;
            let encoder = load(of_encoder, networks.encoder.parameters())?;
            let weights = load(of_decoder, networks.decoder.parameters())?;
            let encoder = Some((networks.encoder, encoder));
            return Ok(Generator { encoder, class_names, ..Generator::of_decoder(&networks, weights) });
        }
        let network = Models::generator_of(&model, shape, classes).map_err(unsuitable)?;
        let (weights, buffers) = (load("", network.parameters())?, load("", network.buffers())?);
        let latent_dim = model.latent_dim as usize;
        Ok(Generator { network, latent_dim, classes, class_names, shape, weights, buffers, encoder: None })
    }

    /// Whether there is an encoder.
    pub fn has_encoder(&self) -> bool {
        self.encoder.is_some()
    }

    /// Means of the latent vectors (n, latent_dim) of images (n, c, h, w) in [-1, 1], each of a class; `None`
    /// without an encoder.
    pub fn encoded(&self, images: &Tensor, classes: &[u32]) -> Option<Tensor> {
        let (encoder, weights) = self.encoder.as_ref()?;
        let key = Key { seed: 0, step: 0, phase: 0, shard: 0, purpose: Purpose::Network };
        let classes: Vec<i64> = classes.iter().map(|class| i64::from(*class)).collect();
        let classes = Tensor::from_slice(&classes);
        let classes = Some(&classes).filter(|_| self.classes > 0);
        let mut pass = Pass::running(weights, &[], key).of(classes);
        let posterior = no_grad(|| encoder.forward(&((images + 1.0) * 0.5), &mut pass));
        // The second half are variances.
        Some(posterior.chunk(2, 1).swap_remove(0))
    }

    /// Names of the classes by their numbers; empty where they are numbers.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// Number of classes that the generator is conditioned on; 0 for none.
    pub fn classes(&self) -> u32 {
        self.classes
    }

    /// Shape of the generated images.
    pub fn shape(&self) -> ImageShape {
        self.shape
    }

    /// Length of the noise vector.
    pub fn latent_dim(&self) -> usize {
        self.latent_dim
    }

    /// Generates `count` images, (count, c, h, w) in [-1, 1]. Sample i depends on the seed and i alone. A
    /// conditional generator takes the classes in turn.
    pub fn draw(&self, seed: u64, count: u32) -> Tensor {
        self.draw_for(Purpose::Samples, seed, count)
    }

    /// The same, from noise for another purpose.
    pub fn draw_for(&self, purpose: Purpose, seed: u64, count: u32) -> Tensor {
        self.draw_counted(purpose, seed, count, &Progress::off())
    }

    /// The same, with each batch counted.
    pub fn draw_counted(&self, purpose: Purpose, seed: u64, count: u32, progress: &Progress) -> Tensor {
        let noise: Vec<Tensor> = (0..count).map(|index| self.noise(purpose, seed, index, None)).collect();
        self.images_counted(&Tensor::stack(&noise, 0), &self.classes_in_turn(count), progress)
    }

    /// Returns the noise of sample `index`, (latent_dim). With truncation, values beyond it are drawn
    /// again: Brock et al. (2019), "Large scale GAN training for high fidelity natural image synthesis",
    /// section 3.1.
    pub fn noise(&self, purpose: Purpose, seed: u64, index: u32, truncation: Option<f64>) -> Tensor {
        let draw =
            // A key for each sample, so that it does not depend on how many are drawn.
            |phase| Key { seed, step: u64::from(index), phase, shard: 0, purpose }.normal(self.latent_dim);
        let mut noise = draw(0);
        let Some(limit) = truncation else { return noise };
        for phase in 1.. {
            let beyond = noise.abs().gt(limit);
            // Ends with probability 1; a limit far below one takes long.
            if !bool::try_from(beyond.any()).expect("one truth value") {
                break;
            }
            noise = draw(phase).where_self(&beyond, &noise);
        }
        noise
    }

    /// Returns a class for each of `count` samples, in turn.
    pub fn classes_in_turn(&self, count: u32) -> Vec<u32> {
        // Without classes there is nothing to take in turn.
        (0..count).map(|index| index % self.classes.max(1)).collect()
    }

    /// Generates images (n, c, h, w) in [-1, 1] from noise (n, latent_dim), each of a class below
    /// [`classes`](Self::classes); an unconditional generator ignores the classes.
    pub fn images(&self, noise: &Tensor, classes: &[u32]) -> Tensor {
        self.images_counted(noise, classes, &Progress::off())
    }

    /// The same, with each batch counted.
    pub fn images_counted(&self, noise: &Tensor, classes: &[u32], progress: &Progress) -> Tensor {
        let size = i64::try_from(BATCH).expect("a small number");
        let draw = |(noise, classes): (&Tensor, &[u32])| {
            let classes: Vec<i64> = classes.iter().map(|class| i64::from(*class)).collect();
            let images = self.forward(noise, Some(&Tensor::from_slice(&classes)));
            progress.add(classes.len() as u64);
            images
        };
        let batches: Vec<Tensor> =
            no_grad(|| noise.split(size, 0).iter().zip(classes.chunks(BATCH)).map(draw).collect());
        Tensor::cat(&batches, 0)
    }

    /// Runs one pass of the network: noise (n, latent_dim), and classes (n) of int64 for a conditional
    /// model, to images (n, c, h, w).
    pub fn forward(&self, noise: &Tensor, classes: Option<&Tensor>) -> Tensor {
        let key = Key { seed: 0, step: 0, phase: 0, shard: 0, purpose: Purpose::Network };
        // `images` always passes a list of classes.
        let classes = classes.filter(|_| self.classes > 0);
        self.network.forward(noise, &mut Pass::running(&self.weights, &self.buffers, key).of(classes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_of_one_class() {
        let of = [0, 1, 2, 3, 4, 6, 7, 10, 11, 20, 21, 1000].map(columns);
        assert_eq!(of, [10, 10, 10, 9, 8, 6, 7, 10, 11, 20, 10, 10]);
        assert!((1..=20).all(|classes| columns(classes) % i64::from(classes) == 0));
    }

    #[test]
    fn real_samples_are_spread_over_the_data_and_lie_in_the_places_of_their_classes() {
        let left: Vec<usize> = (0..100).filter(|index| index % 10 != 3).collect();
        let found = places_of_real(&left, &[], 0, 4);
        assert_eq!(found, [0, 25, 50, 75].map(Some), "every 22nd or 23rd of 90");
        assert_eq!(places_of_real(&[4, 7], &[], 0, 50), [Some(4), Some(7)]);
        // Three classes: one of many, one of one, one of none.
        let labels: Vec<u32> = (0..20).map(|index| u32::from(index == 7)).collect();
        let left: Vec<usize> = (0..20).collect();
        let expected = [Some(0), Some(7), None, Some(10), None, None];
        assert_eq!(places_of_real(&left, &labels, 3, 6), expected);
    }
}
