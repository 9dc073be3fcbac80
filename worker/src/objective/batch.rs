//! Samples as an objective gets them.

use ganglion_proto::array::{ArraySpec, ElementKind};
use ganglion_proto::job::Job;
use tch::{Device, Kind, Tensor, no_grad};

use super::Unsuitable;
use crate::data::{DataSet, ImageShape, SampleShape, TokenShape, Values};
use crate::random::{Key, Purpose};

/// The real samples of a data shard.
#[derive(Debug)]
pub struct ShardBatch {
    /// The samples, of the kind of the data set.
    pub samples: Samples,
    /// Classes of the samples, (b) of int64, where the data set has labels.
    pub classes: Option<Tensor>,
}

/// Samples of one kind.
#[derive(Debug)]
pub enum Samples {
    /// Images (b, c, h, w), in [-1, 1].
    Images(Tensor),
    /// Tokens (b, context + 1) of int64, each below the vocabulary.
    Tokens(Tensor),
    /// Arrays by their names, each (b, shape...) of its kind.
    Arrays(Vec<(String, Tensor)>),
}

impl Samples {
    /// Copies the values of samples into tensors on the CPU, with these sizes in place of the number of samples.
    pub(crate) fn new(values: &Values, shape: &SampleShape, sizes: &[i64]) -> Samples {
        let sized = |own: &[usize]| {
            let own = own.iter().map(|size| i64::try_from(*size).expect("a sample is in memory"));
            sizes.iter().copied().chain(own).collect::<Vec<i64>>()
        };
        match (values, shape) {
            (Values::Pixels(pixels), shape) => Samples::of_pixels(&Tensor::from_slice(pixels), shape, sizes),
            (Values::Tokens(tokens), SampleShape::Tokens(shape)) => {
                Samples::Tokens(Tensor::from_slice(tokens).view(sized(&[shape.numel()]).as_slice()))
            }
            (Values::Arrays(all), SampleShape::Arrays(specs)) => {
                let tensor = |(bytes, spec): (&Vec<u8>, &ArraySpec)| {
                    let count = i64::try_from(bytes.len() / spec.kind.size()).expect("an array is in memory");
                    let flat = Tensor::from_data_size(bytes, &[count], kind(spec.kind));
                    let own: Vec<usize> = spec
                        .shape
                        .iter()
                        .map(|size| usize::try_from(*size).expect("a sample is in memory"))
                        .collect();
                    (spec.name.clone(), flat.view(sized(&own).as_slice()))
                };
                Samples::Arrays(all.iter().zip(specs).map(tensor).collect())
            }
            (_, shape) => panic!("values of other samples than {shape}"),
        }
    }

    /// Images whose pixels are on a device already.
    ///
    /// # Panics
    /// If the shape is none of images.
    pub(crate) fn of_pixels(pixels: &Tensor, shape: &SampleShape, sizes: &[i64]) -> Samples {
        let shape = shape.image().expect("only pixels of images are uploaded");
        let own =
            [shape.channels, shape.height, shape.width].map(|n| i64::try_from(n).expect("an image is small"));
        Samples::Images(pixels.view([sizes, &own].concat().as_slice()))
    }

    /// Substitutes for `batch` samples of a shape.
    fn stand_ins(key: Key, batch: u32, shape: &SampleShape) -> Samples {
        let count = batch as usize;
        let signed = |n: usize| i64::try_from(n).expect("a sample is in memory");
        match shape {
            SampleShape::Image(shape) => {
                let sizes =
                    [i64::from(batch), signed(shape.channels), signed(shape.height), signed(shape.width)];
                Samples::Images(no_grad(|| key.uniform(-1.0, 1.0, count * shape.numel()).view(sizes)))
            }
            SampleShape::Tokens(shape) => {
                let tokens = key.stream().integers(0, shape.vocabulary.into(), count * shape.numel());
                Samples::Tokens(Tensor::from_slice(&tokens).view([i64::from(batch), signed(shape.numel())]))
            }
            SampleShape::Arrays(specs) => {
                let mut stream = key.stream();
                let mut array = |spec: &ArraySpec| {
                    let all = count * spec.numel();
                    let flat = match spec.kind.is_float() {
                        true => Tensor::from_slice(&stream.uniform(-1.0, 1.0, all)),
                        // Of any use of an integer: a number, an index, a truth value.
                        false => Tensor::from_slice(&stream.integers(0, 2, all)),
                    };
                    let own =
                        spec.shape.iter().map(|size| i64::try_from(*size).expect("a sample is in memory"));
                    let sizes: Vec<i64> = std::iter::once(i64::from(batch)).chain(own).collect();
                    (spec.name.clone(), flat.to_kind(kind(spec.kind)).view(sizes.as_slice()))
                };
                Samples::Arrays(specs.iter().map(&mut array).collect())
            }
        }
    }

    fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Samples {
        match self {
            Samples::Images(images) => Samples::Images(change(images)),
            Samples::Tokens(tokens) => Samples::Tokens(change(tokens)),
            Samples::Arrays(all) => {
                Samples::Arrays(all.iter().map(|(name, array)| (name.clone(), change(array))).collect())
            }
        }
    }
}

impl ShardBatch {
    /// A batch of images (b, c, h, w) in [-1, 1], with their classes where they have any.
    pub fn of_images(images: Tensor, classes: Option<Tensor>) -> ShardBatch {
        ShardBatch { samples: Samples::Images(images), classes }
    }

    /// A batch of tokens (b, context + 1) of int64.
    pub fn of_tokens(tokens: Tensor) -> ShardBatch {
        ShardBatch { samples: Samples::Tokens(tokens), classes: None }
    }

    /// Substitutes for the samples of a shard, with the classes in turn where there are any.
    pub(crate) fn stand_ins(seed: u64, batch: u32, shape: &SampleShape, classes: u32) -> ShardBatch {
        let key = Key { seed, step: 0, phase: 0, shard: 0, purpose: Purpose::Probe };
        let samples = Samples::stand_ins(key, batch, shape);
        let in_turn =
            || Tensor::arange(i64::from(batch), (Kind::Int64, Device::Cpu)).remainder(i64::from(classes));
        ShardBatch { samples, classes: (classes > 0).then(in_turn) }
    }

    /// The images (b, c, h, w), in [-1, 1].
    ///
    /// # Panics
    /// If the samples are no images: [`make`](super::make) compares the data with what the objective takes.
    pub fn images(&self) -> &Tensor {
        match &self.samples {
            Samples::Images(images) => images,
            other => panic!("an objective of images was given {other:?}"),
        }
    }

    /// The tokens (b, context + 1) of int64.
    ///
    /// # Panics
    /// If the samples are no tokens: [`make`](super::make) compares the data with what the objective takes.
    pub fn tokens(&self) -> &Tensor {
        match &self.samples {
            Samples::Tokens(tokens) => tokens,
            other => panic!("an objective of tokens was given {other:?}"),
        }
    }

    /// The array of a name, (b, shape...).
    ///
    /// # Panics
    /// If there is none: [`make`](super::make) compares the data with what the objective takes.
    pub fn array(&self, name: &str) -> &Tensor {
        match &self.samples {
            Samples::Arrays(all) => {
                let found = all.iter().find(|(known, _)| known == name);
                found.map(|(_, array)| array).unwrap_or_else(|| panic!("no array {name}"))
            }
            other => panic!("an objective of arrays was given {other:?}"),
        }
    }

    /// The same samples on a device.
    pub fn to(&self, device: Device) -> ShardBatch {
        // Without a copy where they are there already.
        self.map(|tensor| tensor.to_device(device))
    }

    /// The same samples, with each tensor changed.
    pub(crate) fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> ShardBatch {
        ShardBatch { samples: self.samples.map(&change), classes: self.classes.as_ref().map(&change) }
    }
}

/// The shape of a job's images.
///
/// # Errors
/// The data are of another kind; the text names the model and how to fix it.
pub(super) fn images_of(job: &Job, data: &DataSet) -> Result<ImageShape, Unsuitable> {
    data.shape().image().ok_or_else(|| other_kind(job, data, "images", "mnist-10k"))
}

/// The size of a job's texts.
///
/// # Errors
/// As for [`images_of`].
pub(super) fn tokens_of(job: &Job, data: &DataSet) -> Result<TokenShape, Unsuitable> {
    data.shape().tokens().ok_or_else(|| other_kind(job, data, "text", "text"))
}

fn other_kind(job: &Job, data: &DataSet, wanted: &str, for_example: &str) -> Unsuitable {
    Unsuitable(format!(
        "model.kind = \"{}\" is trained on {wanted}, and data.kind = \"{}\" gives {}; choose another of the two, such as \
         data.kind = \"{for_example}\"",
        job.model.kind,
        job.data.kind,
        data.shape()
    ))
}

/// libtorch's name of a kind of elements.
pub(crate) fn kind(kind: ElementKind) -> Kind {
    match kind {
        ElementKind::Bool => Kind::Bool,
        ElementKind::Uint8 => Kind::Uint8,
        ElementKind::Int8 => Kind::Int8,
        ElementKind::Int16 => Kind::Int16,
        ElementKind::Int32 => Kind::Int,
        ElementKind::Int64 => Kind::Int64,
        ElementKind::Float16 => Kind::Half,
        ElementKind::Float32 => Kind::Float,
        ElementKind::Float64 => Kind::Double,
    }
}
