//! The digit classifier: a small convolutional network that tells handwritten digits apart, bundled with its
//! weights.
//!
//! The classifier gives metrics the features that Inception gives elsewhere, without a download. `worker
//! train-classifier` makes the weights again.
//!
//! 1. The output for an image depends on that image and the weights alone, and on the others of a batch in
//!    no way but the rounding of a kernel that takes several at a time.
//! 2. The weights are fixed: they are part of what a metric means, so their hash is reported with each
//!    evaluation.

use safetensors::SafeTensors;
use tch::{Kind, Tensor, no_grad};

use super::EvalError;
use crate::checkpoint::named_tensor;
use crate::data::ImageShape;
use crate::nn::{Init, TensorSpec};

/// Shape of the classifier's input.
pub(crate) const SHAPE: ImageShape = ImageShape { channels: 1, height: 28, width: 28 };
/// Number of classes.
pub(crate) const CLASSES: i64 = 10;
/// Width of the layer before the last.
pub(crate) const FEATURES: i64 = 64;

/// The bundled weights.
static WEIGHTS: &[u8] = include_bytes!("../../digits/digits.safetensors");
/// blake3 hash of the bundled weights, in hex.
static HASH: &str = include_str!("../../digits/digits.blake3");

/// The classifier's weights, in the order of [`specs`].
#[derive(Debug)]
pub(crate) struct Digits {
    weights: Vec<Tensor>,
}

/// Output of the classifier.
#[derive(Debug)]
pub(crate) struct Seen {
    /// Features (n, [`FEATURES`]), after the rectifier.
    pub features: Tensor,
    /// Logits (n, [`CLASSES`]).
    pub logits: Tensor,
}

/// Tensors of the network, with the initial values that PyTorch gives its layers.
pub(crate) fn specs() -> Vec<TensorSpec> {
    let layers: [(&str, Vec<i64>); 5] = [
        ("conv1", vec![16, 1, 3, 3]),
        ("conv2", vec![32, 16, 3, 3]),
        ("conv3", vec![48, 32, 3, 3]),
        ("features", vec![FEATURES, 432]),
        ("classes", vec![CLASSES, FEATURES]),
    ];
    let mut specs = Vec::new();
    for (layer, shape) in layers {
        let inputs = u16::try_from(shape[1..].iter().product::<i64>()).expect("layers are small");
        let init = Init::Uniform { bound: 1.0 / f32::from(inputs).sqrt() };
        let outputs = shape[0];
        let mut add = |kind: &str, shape: Vec<i64>| {
            specs.push(TensorSpec::parameter(format!("{layer}.{kind}"), &shape, init.clone()));
        };
        add("weight", shape);
        add("bias", vec![outputs]);
    }
    specs
}

/// Forward pass for images (n, 1, 28, 28) in [-1, 1]: three times convolve, rectify and halve, then two
/// linear layers.
pub(crate) fn forward(images: &Tensor, weights: &[Tensor]) -> Seen {
    let mut maps = images.shallow_clone();
    // Pairs of weight and bias, in the order of `specs`.
    for layer in weights[..6].chunks(2) {
        let convolved = maps.conv2d(&layer[0], Some(&layer[1]), [1, 1], [1, 1], [1, 1], 1);
        maps = convolved.relu().max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false);
    }
    // Features after the rectifier, as Inception's are.
    let features = maps.flatten(1, -1).linear(&weights[6], Some(&weights[7])).relu();
    let logits = features.linear(&weights[8], Some(&weights[9]));
    Seen { features, logits }
}

impl Digits {
    /// Loads the bundled classifier.
    ///
    /// # Errors
    /// The weights in this program are damaged.
    pub(crate) fn bundled() -> Result<Digits, EvalError> {
        let hash = blake3::hash(WEIGHTS).to_hex();
        // Built in, but a file in a source tree can be half fetched.
        if hash.as_str() != HASH.trim() {
            return Err(EvalError::Classifier(format!("their hash is {hash}, not {}", HASH.trim())));
        }
        Digits::read(WEIGHTS)
    }

    /// Hash of the bundled weights.
    pub(crate) fn hash() -> &'static str {
        HASH.trim()
    }

    /// Reads weights as `worker train-classifier` writes them.
    ///
    /// # Errors
    /// They are not such weights.
    pub(crate) fn read(bytes: &[u8]) -> Result<Digits, EvalError> {
        let wrong = |what: String| EvalError::Classifier(what);
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| wrong(error.to_string()))?;
        let load = |spec: &TensorSpec| named_tensor(&tensors, spec, "its").map_err(wrong);
        Ok(Digits { weights: specs().iter().map(load).collect::<Result<_, _>>()? })
    }

    /// Classifies images (n, 1, 28, 28) in [-1, 1], without gradients.
    pub(crate) fn look(&self, images: &Tensor) -> Seen {
        no_grad(|| forward(images, &self.weights))
    }

    /// Probabilities of the classes, (n, [`CLASSES`]) in f64.
    pub(crate) fn probabilities(seen: &Seen) -> Tensor {
        // Logarithms of small probabilities follow.
        seen.logits.to_kind(Kind::Double).softmax(-1, Kind::Double)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DataSet;
    use crate::eval::images;
    use crate::eval::train::labels;
    use ganglion_proto::job::Data;

    #[test]
    fn the_bundled_weights_have_their_hash_and_tell_digits_apart() {
        let digits = Digits::bundled().unwrap();
        assert!(WEIGHTS.len() < 300_000);
        let data = DataSet::open(&Data::bundled_digits()).unwrap();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-labels-idx1-ubyte.gz");
        let labels = labels(folder.as_ref()).unwrap();
        let images = images(&data, &(0..data.len()).collect::<Vec<_>>()).unwrap();
        let right = digits.look(&images).logits.argmax(-1, false).eq_tensor(&labels);
        let right = right.sum(Kind::Int64).int64_value(&[]);
        assert!(right >= 9900, "{right} of 10,000 digits are told right");
    }

    #[test]
    fn damaged_weights_are_refused() {
        let refused = Digits::read(&WEIGHTS[..WEIGHTS.len() / 2]).unwrap_err();
        assert!(refused.to_string().contains("classifier"), "{refused}");
    }
}
