//! Weights that samples are drawn with: of a state, or of a file.

use std::path::Path;

use safetensors::SafeTensors;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};

use super::network::{Constants, Parts, Sizes};
use super::pass::Network;
use super::{Choice, NAME, NETWORK, Pixels, Prose, Source};
use crate::checkpoint::Snapshot;
use crate::nn::TensorSpec;
use crate::random::{Key, Stream};
use crate::sampling::{SampleError, WEIGHTS_FILE, finite_tensor, metadata};
use crate::state::StateLayout;

/// Weights of a network, with its constants.
pub(crate) struct Weights {
    pub sizes: Sizes,
    constants: Constants,
    tensors: Vec<Tensor>,
}

impl Weights {
    fn new(sizes: &Sizes, tensors: Vec<Tensor>, device: Device) -> Weights {
        let constants = Constants::new(sizes, (Kind::Float, device));
        Weights { sizes: sizes.clone(), constants, tensors }
    }

    /// The weights of a state, in fp32.
    pub(crate) fn of_state(
        sizes: &Sizes,
        layout: &StateLayout,
        snapshot: &Snapshot,
        device: Device,
    ) -> Weights {
        let sections = layout.network(NETWORK);
        let (tensors, _) = sections.views(&snapshot.floats(sections.weight_range()).to_device(device));
        Weights::new(sizes, tensors, device)
    }

    pub(super) fn network(&self) -> Network<'_> {
        Network {
            sizes: &self.sizes,
            constants: &self.constants,
            weights: Parts::new(&self.sizes, &self.tensors),
        }
    }
}

/// Sizes for the header of a [`WEIGHTS_FILE`].
pub(super) fn describe(sizes: &Sizes) -> Vec<(&'static str, String)> {
    vec![
        ("model", NAME.to_string()),
        ("vocabulary", sizes.vocabulary.to_string()),
        ("inputs", sizes.inputs.to_string()),
        ("context", sizes.context.to_string()),
        ("layers", sizes.layers.to_string()),
        ("heads", sizes.heads.to_string()),
        ("width", sizes.width.to_string()),
        ("positions", sizes.positions.to_string()),
        ("activation", sizes.activation.to_string()),
    ]
}

/// Values of a file's header.
pub(super) struct Header<'a> {
    file: &'a str,
    about: std::collections::HashMap<String, String>,
}

impl Header<'_> {
    pub(crate) fn wrong(&self, what: &str) -> SampleError {
        SampleError::Input(format!("{}: {what}", self.file))
    }

    pub(crate) fn text(&self, key: &str) -> Result<&str, SampleError> {
        let found = self.about.get(key).map(String::as_str);
        found.ok_or_else(|| self.wrong(&format!("it has no {key} in its header; give a {WEIGHTS_FILE}")))
    }

    pub(crate) fn optional(&self, key: &str) -> Option<&str> {
        self.about.get(key).map(String::as_str)
    }

    /// A number of at least 1.
    pub(crate) fn number(&self, key: &str) -> Result<i64, SampleError> {
        let number = self.text(key)?.parse().ok().filter(|number| (1..=1 << 32).contains(number));
        number.ok_or_else(|| self.wrong(&format!("its {key} is no such number")))
    }

    /// A word of a job file.
    fn word<T: DeserializeOwned>(&self, key: &str) -> Result<T, SampleError> {
        let word = serde_json::from_value(serde_json::Value::from(self.text(key)?));
        word.map_err(|error| self.wrong(&format!("its {key}: {error}")))
    }
}

/// Weights with the draws that samples are made from.
#[derive(Clone, Copy)]
pub(crate) struct Pen<'a> {
    pub weights: &'a Weights,
    /// Key of the draws; each sample has its own step.
    pub key: Key,
    pub choice: Choice,
}

impl Pen<'_> {
    /// Draws of a sample.
    pub(super) fn draws(&self, sample: u32) -> Stream {
        Key { step: u64::from(sample), phase: 0, shard: 0, ..self.key }.stream()
    }
}

/// Weights of a file, and the samples that they draw.
pub(crate) struct Drawing {
    pub weights: Weights,
    pub samples: Source,
}

impl Drawing {
    /// Reads the bytes of a [`WEIGHTS_FILE`]. `file` names it in errors; `tokenizer` is the one that it belongs
    /// to, if that is not where it was.
    pub(crate) fn read(file: &str, bytes: &[u8], tokenizer: Option<&Path>) -> Result<Drawing, SampleError> {
        let input = |what: String| SampleError::Input(format!("{file}: {what}"));
        let wanted = format!("a transformer's weights; give a {WEIGHTS_FILE}");
        let header = Header { file, about: metadata(bytes, &wanted).map_err(input)? };
        let sizes = sizes(&header)?;
        let samples = match header.text("samples")? {
            "text" => Source::Text(Prose::read(&header, tokenizer)?),
            "pixels" => Source::Pixels(Pixels::read(&header)?),
            other => {
                return Err(input(format!("its samples are {other:?}, which this version does not know")));
            }
        };
        samples.check(&sizes).map_err(input)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| input(error.to_string()))?;
        let load = |spec: TensorSpec| {
            let spec = TensorSpec { name: format!("{NAME}.{}", spec.name), ..spec };
            finite_tensor(&tensors, &spec).map_err(input)
        };
        let tensors = sizes.parameters().into_iter().map(load).collect::<Result<Vec<_>, _>>()?;
        Ok(Drawing { weights: Weights::new(&sizes, tensors, Device::Cpu), samples })
    }
}

fn sizes(header: &Header<'_>) -> Result<Sizes, SampleError> {
    let sizes = Sizes {
        vocabulary: header.number("vocabulary")?,
        inputs: header.number("inputs")?,
        context: header.number("context")?,
        layers: header.number("layers")?,
        heads: header.number("heads")?,
        width: header.number("width")?,
        positions: header.word("positions")?,
        activation: header.word("activation")?,
    };
    let is_sound = sizes.inputs >= sizes.vocabulary && sizes.width % sizes.heads == 0 && sizes.layers <= 1000;
    if is_sound { Ok(sizes) } else { Err(header.wrong("its sizes do not fit each other")) }
}

impl Source {
    /// Checks that a network has the sizes that these samples need.
    fn check(&self, sizes: &Sizes) -> Result<(), String> {
        let fits = match self {
            Source::Text(prose) => i64::from(prose.codec.vocabulary()) == sizes.vocabulary,
            Source::Pixels(pixels) => {
                let inputs = pixels.levels() + i64::from(pixels.classes().max(1));
                (sizes.vocabulary, sizes.inputs, sizes.context) == (pixels.levels(), inputs, pixels.tokens())
            }
        };
        if fits { Ok(()) } else { Err("its sizes do not fit its samples".to_string()) }
    }
}
