//! Drawing samples from the generator's moving average, as a grid in a PNG file.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ganglion_proto::job::{EmaSchedule, Job, Model};
use ganglion_proto::message::SampleGrid;
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};
use safetensors::SafeTensors;
use tch::{Kind, Tensor, no_grad};

use crate::checkpoint::{Snapshot, from_bytes};
use crate::data::ImageShape;
use crate::nn::{Models, Network, Pass};
use crate::random::{Key, Purpose};
use crate::state::{Layout, StateLayout, narrow};

/// Samples drawn in one forward pass.
const BATCH: u32 = 64;
/// Pixels between two images of a grid.
const GAP: u32 = 2;

/// Why there is no grid.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The checkpoint cannot be read; says what and where.
    #[error("{0}")]
    Input(String),
    /// The picture cannot be written.
    #[error("cannot encode the picture: {0}")]
    Encode(#[from] image::ImageError),
}

/// A generator in working order.
pub struct Generator {
    network: Arc<dyn Network>,
    latent_dim: usize,
    classes: u32,
    shape: ImageShape,
    weights: Vec<Tensor>,
    buffers: Vec<Tensor>,
}

/// What `generator_ema.safetensors` says of itself: enough to draw without the job.
pub fn describe(job: &Job, models: &Models, step: u64) -> BTreeMap<String, String> {
    let script = job.model.generator.as_ref().map(|path| ("generator", path.display().to_string()));
    let items = [
        ("format", "pt".to_string()),
        ("model", job.model.kind.to_string()),
        ("latent_dim", job.model.latent_dim.to_string()),
        ("width", job.model.width.to_string()),
        ("classes", models.classes.to_string()),
        ("channels", models.shape.channels.to_string()),
        ("height", models.shape.height.to_string()),
        ("step", step.to_string()),
    ];
    items.into_iter().chain(script).map(|(key, value)| (key.to_string(), value)).collect()
}

/// The grid that a job asks for, from a state.
pub fn grid_of(
    job: &Job,
    models: &Models,
    layout: &StateLayout,
    snapshot: &Snapshot,
) -> Result<SampleGrid, SampleError> {
    let images = Generator::of_average(models, layout, snapshot).draw(job.job.seed, job.sample.count);
    grid(&images, snapshot.step)
}

impl Generator {
    /// The moving average of a state.
    pub fn of_average(models: &Models, layout: &StateLayout, snapshot: &Snapshot) -> Generator {
        let range = layout.ema_range();
        let average = from_bytes(&snapshot.flat[4 * range.start..4 * range.end]);
        let sections = &layout.generator;
        let parameters = sections.parameters.len();
        Generator {
            network: models.generator.clone(),
            latent_dim: models.latent_dim,
            classes: models.classes,
            shape: models.shape,
            weights: sections.parameters.views(&narrow(&average, 0..parameters)),
            buffers: sections.buffers.views(&narrow(&average, parameters..range.len())),
        }
    }

    /// Reads the bytes of a `generator_ema.safetensors`. `file` names it in errors; `script` is the TorchScript that it
    /// belongs to, if that is not where it was.
    pub fn read(file: &str, bytes: &[u8], script: Option<&Path>) -> Result<Generator, SampleError> {
        let input = |what: String| SampleError::Input(format!("{file}: {what}"));
        let (_, header) = SafeTensors::read_metadata(bytes)
            .map_err(|error| input(format!("not a safetensors file: {error}")))?;
        let about = header.metadata().clone().unwrap_or_default();
        let text = |key: &str| {
            about
                .get(key)
                .ok_or_else(|| input(format!("its header lacks {key}; give a generator_ema.safetensors")))
        };
        let number = |key: &str| -> Result<u32, SampleError> {
            text(key)?.parse().map_err(|_| input(format!("its {key} is not a number")))
        };
        let kind = serde_json::from_value(serde_json::Value::from(text("model")?.as_str()))
            .map_err(|error| input(error.to_string()))?;
        // Files of earlier versions know of no classes.
        let classes = if about.contains_key("classes") { number("classes")? } else { 0 };
        let model = Model {
            kind,
            latent_dim: number("latent_dim")?,
            width: number("width")?,
            ema_half_life_images: 0,
            ema_schedule: EmaSchedule::RampUp,
            conditional: classes > 0,
            init_from: None,
            freeze_discriminator: 0,
            generator: script.map(Path::to_path_buf).or_else(|| about.get("generator").map(PathBuf::from)),
            discriminator: None,
        };
        let side = number("height")? as usize;
        let shape = ImageShape { channels: number("channels")? as usize, height: side, width: side };
        let network =
            Models::generator_of(&model, shape, classes).map_err(|error| input(error.to_string()))?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| input(error.to_string()))?;
        let load = |layout: Layout| -> Result<Vec<Tensor>, SampleError> {
            let load = |spec: &crate::nn::TensorSpec| {
                let tensor = tensors.tensor(&spec.name).map_err(|error| input(error.to_string()))?;
                if tensor.data().len() != 4 * spec.numel() {
                    return Err(input(format!("{} does not have the model's shape", spec.name)));
                }
                Ok(from_bytes(tensor.data()).view(spec.shape.as_slice()))
            };
            layout.entries().map(|(spec, _)| load(spec)).collect()
        };
        let weights = load(Layout::new(network.parameters()))?;
        let buffers = load(Layout::new(network.buffers()))?;
        Ok(Generator { network, latent_dim: model.latent_dim as usize, classes, shape, weights, buffers })
    }

    /// How many classes it knows; 0 for none.
    pub fn classes(&self) -> u32 {
        self.classes
    }

    /// The images that it draws.
    pub fn shape(&self) -> ImageShape {
        self.shape
    }

    /// `count` images, (count, c, h, w) in [-1, 1]. Sample i depends on the seed and i alone. A conditional generator draws
    /// one class after the other.
    pub fn draw(&self, seed: u64, count: u32) -> Tensor {
        self.draw_for(Purpose::Samples, seed, count)
    }

    /// The same, from noise for another purpose.
    pub fn draw_for(&self, purpose: Purpose, seed: u64, count: u32) -> Tensor {
        let classes = self.classes.max(1);
        self.draw_classes(purpose, seed, count, |index| index % classes)
    }

    /// The same with the class of each sample, below [`classes`](Self::classes), by its index; a generator that knows no
    /// classes does not ask.
    pub fn draw_classes(
        &self,
        purpose: Purpose,
        seed: u64,
        count: u32,
        class: impl Fn(u32) -> u32,
    ) -> Tensor {
        let latent = self.latent_dim;
        let noise = |index: u32| {
            let key = Key { seed, step: u64::from(index), phase: 0, shard: 0, purpose };
            key.normal(latent)
        };
        let indices: Vec<u32> = (0..count).collect();
        let draw = |indices: &[u32]| {
            let noise: Vec<Tensor> = indices.iter().map(|index| noise(*index)).collect();
            let key = Key { seed, step: 0, phase: 0, shard: indices[0], purpose: Purpose::Network };
            let classes: Vec<i64> = indices.iter().map(|index| i64::from(class(*index))).collect();
            let classes = (self.classes > 0).then(|| Tensor::from_slice(&classes));
            let mut pass = Pass::running(&self.weights, &self.buffers, key).of(classes.as_ref());
            self.network.forward(&Tensor::stack(&noise, 0), &mut pass)
        };
        let batches: Vec<Tensor> = no_grad(|| indices.chunks(BATCH as usize).map(draw).collect());
        Tensor::cat(&batches, 0)
    }
}

/// Lays images (n, c, h, w) in [-1, 1] out in rows of ten.
pub fn grid(images: &Tensor, step: u64) -> Result<SampleGrid, SampleError> {
    let size: Vec<u32> = images.size().iter().map(|n| u32::try_from(*n).expect("a grid is small")).collect();
    let (count, channels, height, width) = (size[0], size[1], size[2], size[3]);
    let columns = count.min(10);
    let rows = count.div_ceil(columns.max(1));
    let extent = |cells: u32, side: u32| cells * side + (cells + 1) * GAP;
    let (whole_width, whole_height) = (extent(columns, width), extent(rows, height));
    let levels = ((images + 1.0) * 127.5).round().clamp(0.0, 255.0).to_kind(Kind::Uint8);
    // To one run of pixels an image: (n, h, w, c).
    let pixels = levels.permute([0, 2, 3, 1]).contiguous().flatten(0, -1);
    let pixels = Vec::<u8>::try_from(pixels).expect("a flat tensor of bytes on the CPU");
    let at = |image: u32, y: u32, x: u32| (((image * height + y) * width + x) * channels) as usize;
    let mut canvas = if channels == 1 {
        DynamicImage::ImageLuma8(GrayImage::new(whole_width, whole_height))
    } else {
        DynamicImage::ImageRgb8(RgbImage::new(whole_width, whole_height))
    };
    for image in 0..count {
        let (left, top) = (extent(image % columns, width), extent(image / columns, height));
        for y in 0..height {
            for x in 0..width {
                let from = at(image, y, x);
                match &mut canvas {
                    DynamicImage::ImageLuma8(gray) => {
                        gray.put_pixel(left + x, top + y, image::Luma([pixels[from]]))
                    }
                    DynamicImage::ImageRgb8(rgb) => {
                        let colour = [pixels[from], pixels[from + 1], pixels[from + 2]];
                        rgb.put_pixel(left + x, top + y, image::Rgb(colour));
                    }
                    _ => unreachable!("the canvas was made above"),
                }
            }
        }
    }
    let mut png = Cursor::new(Vec::new());
    canvas.write_to(&mut png, ImageFormat::Png)?;
    Ok(SampleGrid { step, png: png.into_inner(), width: whole_width, height: whole_height, channels })
}
