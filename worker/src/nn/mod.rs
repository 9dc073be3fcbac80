//! Networks over tensors that the caller owns.
//!
//! 1. A forward pass reads parameters and buffers and writes neither: it returns its buffer updates, to be
//!    committed with the phase that it belongs to.
//! 2. A network knows the names and shapes of its tensors; the state owns their memory.
//! 3. The output of a pass is a function of its input and its [`Pass`]. Random draws come from the pass's
//!    key alone.

pub(crate) mod broken;
mod classes;
mod models;
pub(crate) mod module_file;
mod pieces;
mod r3gan;
mod script;
mod sequential;
mod sngan;
mod spectral;
pub mod tensor_bytes;
mod vae;

use std::fmt;
use std::sync::Arc;

pub use models::{Models, UnsuitableModel};
pub use script::ScriptNetwork;
pub use sequential::{Layer, Sequential};
pub use vae::{Autoencoder, Decoder, Encoder};

use tch::{Kind, Tensor};

use crate::random::Key;

/// A network: the tensors it has, and its forward pass.
pub trait Network: fmt::Debug + Send + Sync {
    /// Trained tensors, in the order in which a pass gets them.
    fn parameters(&self) -> Vec<TensorSpec>;

    /// Tensors that follow the batches without being trained, in the order in which a pass gets them.
    fn buffers(&self) -> Vec<TensorSpec>;

    /// Whether the output for a sample depends on the other samples of the batch, as with batch
    /// normalisation.
    fn sees_batch(&self) -> bool;

    /// Whether a pass over several data shards, of so many samples each, sums the gradients of parameters by
    /// [`Pass::shards`].
    fn sums_by_shards(&self, _samples: usize) -> bool {
        false
    }

    /// Returns the network's output for a batch, in fp32, computed in the kind of its first parameter.
    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor;

    /// Returns the buffers for the next pass of a shard gradient, after a pass with these buffer updates.
    fn after(&self, buffers: &[Tensor], _statistics: &[Tensor]) -> Vec<Tensor> {
        // A network whose passes only read its buffers goes on with the same ones.
        buffers.iter().map(Tensor::shallow_clone).collect()
    }

    /// Integer tensors of the `state_dict` beside parameters and buffers.
    fn constants(&self) -> &[Constant] {
        &[]
    }
}

/// Inputs and buffer updates of one forward pass.
#[derive(Debug)]
pub struct Pass<'a> {
    /// Parameters, in the order of [`Network::parameters`].
    pub parameters: &'a [Tensor],
    /// Buffers, in the order of [`Network::buffers`].
    pub buffers: &'a [Tensor],
    /// Training or inference.
    pub mode: Mode,
    /// The class of each sample, (n) of int64, where the model is conditional.
    pub classes: Option<&'a Tensor>,
    /// Number of neighbouring data shards that the samples are of, as many of each. For several, gradients of
    /// parameters are those of the shards, summed as leaves of a binary tree.
    pub shards: u32,
    /// Key of the network's own draws. Each pass of a shard gradient has its own.
    pub key: Key,
    /// Buffer updates of this pass, in the order of the buffers; filled in [`Mode::Batch`] only.
    pub statistics: Vec<Tensor>,
}

impl<'a> Pass<'a> {
    /// Returns a training pass, which fills in the buffer updates.
    pub fn batch(parameters: &'a [Tensor], buffers: &'a [Tensor], key: Key) -> Pass<'a> {
        let (mode, statistics) = (Mode::Batch, Vec::new());
        Pass { parameters, buffers, mode, classes: None, shards: 1, key, statistics }
    }

    /// Returns an inference pass with the buffers as they are.
    pub fn running(parameters: &'a [Tensor], buffers: &'a [Tensor], key: Key) -> Pass<'a> {
        Pass { mode: Mode::Running, ..Pass::batch(parameters, buffers, key) }
    }

    /// Adds the classes of the samples.
    pub fn of(self, classes: Option<&'a Tensor>) -> Pass<'a> {
        Pass { classes, ..self }
    }

    /// Kind of tensor in which the pass computes.
    pub fn kind(&self) -> Kind {
        // A network without parameters computes as the state is kept.
        self.parameters.first().map_or(Kind::Float, Tensor::kind)
    }
}

/// Use of buffers in a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Training: batch normalisation uses the batch's moments, and its updates are their mean and unbiased
    /// variance.
    Batch,
    /// Inference: the buffers are used as they are, and there are no updates.
    Running,
}

/// Initial values of a parameter or buffer.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the fields say it by their names
pub enum Init {
    /// One value for all elements.
    Constant(f32),
    /// U[-bound, bound).
    Uniform { bound: f32 },
    /// N(mean, deviation).
    Normal { mean: f32, deviation: f32 },
    /// Given values, flat.
    Given(Arc<[f32]>),
}

/// A constant tensor of integers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constant {
    /// Name in checkpoints.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<i64>,
    /// Elements, flat.
    pub values: Vec<i64>,
}

/// Rule by which a buffer follows the mean of its updates over all shards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Follow {
    /// Exponential average: interpolates towards the mean with this weight. With 1 it is replaced.
    Towards(f64),
    /// Sum: the mean is added.
    By,
}

/// Description of a network's tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Name in checkpoints, `<layer>.weight` and the like.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<i64>,
    /// Initial values.
    pub init: Init,
    /// Whether the tensor stays fp32 in every precision.
    pub exact: bool,
    /// Rule by which a buffer is updated; of no meaning for parameters.
    pub follow: Follow,
    /// Whether a weight decay shrinks the tensor; of no meaning for buffers.
    pub decays: bool,
}

/// Whether a parameter of this shape decays, if it is no embedding: biases and the gains of a normalisation,
/// which have one dimension, do not.
pub fn decays(shape: &[i64]) -> bool {
    shape.len() >= 2
}

impl TensorSpec {
    /// A parameter that is cast to the precision of passes.
    pub fn parameter(name: String, shape: &[i64], init: Init) -> TensorSpec {
        let decays = decays(shape);
        TensorSpec { name, shape: shape.to_vec(), init, exact: false, follow: Follow::By, decays }
    }

    /// A parameter with a row for each of several classes, tokens or places: it does not decay.
    pub fn embedding(name: String, shape: &[i64], init: Init) -> TensorSpec {
        TensorSpec { decays: false, ..TensorSpec::parameter(name, shape, init) }
    }

    /// A buffer that interpolates towards the mean of its updates.
    pub fn buffer(name: String, shape: &[i64], init: Init, momentum: f64) -> TensorSpec {
        let follow = Follow::Towards(momentum);
        TensorSpec { name, shape: shape.to_vec(), init, exact: true, follow, decays: false }
    }

    /// A buffer to which the mean of its updates is added.
    pub fn moved(name: String, shape: &[i64], init: Init) -> TensorSpec {
        TensorSpec { name, shape: shape.to_vec(), init, exact: true, follow: Follow::By, decays: false }
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        usize::try_from(self.shape.iter().product::<i64>()).expect("shapes are positive")
    }
}

/// Number of a network's first tensors that belong to its first `layers` layers. A layer's tensors have one
/// name up to the last dot.
pub fn first_layers(parameters: &[TensorSpec], layers: u32) -> usize {
    // `0.weight` and `0.bias` are one layer; a name without a dot is one of its own.
    let layer = |spec: &TensorSpec| spec.name.rsplit_once('.').map(|(layer, _)| layer.to_string());
    let mut known = Vec::new();
    let of_first = parameters.iter().take_while(|spec| {
        if !known.contains(&layer(spec)) {
            known.push(layer(spec));
        }
        known.len() <= layers as usize
    });
    of_first.count()
}

/// Number of layers with parameters.
pub fn layers(parameters: &[TensorSpec]) -> u32 {
    // Ends, since with each layer at least one tensor more is counted.
    (0..).find(|layers| first_layers(parameters, *layers) == parameters.len()).expect("a network has an end")
}

/// Whether all numbers of a tensor are finite.
pub(crate) fn is_finite(tensor: &Tensor) -> bool {
    bool::try_from(tensor.isfinite().all()).expect("one truth value")
}

#[cfg(test)]
mod tests;
