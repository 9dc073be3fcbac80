//! Networks over tensors that somebody else owns.
//!
//! 1. A forward pass reads parameters and buffers and writes neither: what its buffers shall follow is handed
//!    out, to be committed with the phase that it belongs to.
//! 2. A network knows the names and shapes of its tensors; where they live is the state's business.
//! 3. What a pass gives is a function of its input and its [`Pass`]. Random draws come from the pass's key
//!    alone.

pub mod broken;
mod classes;
mod models;
mod pieces;
mod r3gan;
mod script;
mod sequential;
mod sngan;
mod spectral;

use std::fmt;
use std::sync::Arc;

pub use models::{Models, UnsuitableModel};
pub use script::ScriptNetwork;
pub use sequential::{Layer, Sequential};

use tch::{Kind, Tensor};

use crate::random::Key;

/// A network: which tensors it has, and what it makes of a batch.
pub trait Network: fmt::Debug + Send + Sync {
    /// The tensors that are trained, in the order in which a pass gets them.
    fn parameters(&self) -> Vec<TensorSpec>;

    /// The tensors that follow the batches without being trained, in the order in which a pass gets them.
    fn buffers(&self) -> Vec<TensorSpec>;

    /// Whether what it makes of a sample depends on the other samples of the batch, as with batch
    /// normalisation.
    fn sees_batch(&self) -> bool;

    /// The network's output for a batch, in fp32, computed in the kind of its first parameter.
    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor;

    /// The buffers that the next pass of a leaf begins with, after one that handed these statistics out.
    fn after(&self, buffers: &[Tensor], _statistics: &[Tensor]) -> Vec<Tensor> {
        buffers.iter().map(Tensor::shallow_clone).collect()
    }

    /// What its `state_dict` has beside parameters and buffers.
    fn constants(&self) -> &[Constant] {
        &[]
    }
}

/// What a forward pass computes with, and what it hands out.
#[derive(Debug)]
pub struct Pass<'a> {
    /// In the order of [`Network::parameters`].
    pub parameters: &'a [Tensor],
    /// In the order of [`Network::buffers`].
    pub buffers: &'a [Tensor],
    /// How the buffers are used.
    pub mode: Mode,
    /// The class of each sample, (n) of int64, where the model is conditional.
    pub classes: Option<&'a Tensor>,
    /// What the network draws by, if it draws at all. Each pass of a leaf has its own.
    pub key: Key,
    /// In [`Mode::Batch`]: what each buffer shall follow, in their order, by this pass.
    pub statistics: Vec<Tensor>,
}

impl<'a> Pass<'a> {
    /// A pass that hands out what its buffers shall follow.
    pub fn batch(parameters: &'a [Tensor], buffers: &'a [Tensor], key: Key) -> Pass<'a> {
        Pass { parameters, buffers, mode: Mode::Batch, classes: None, key, statistics: Vec::new() }
    }

    /// A pass by the buffers as they are.
    pub fn running(parameters: &'a [Tensor], buffers: &'a [Tensor], key: Key) -> Pass<'a> {
        Pass { mode: Mode::Running, ..Pass::batch(parameters, buffers, key) }
    }

    /// The same with the classes of the samples.
    pub fn of(self, classes: Option<&'a Tensor>) -> Pass<'a> {
        Pass { classes, ..self }
    }

    /// What it computes in.
    pub fn kind(&self) -> Kind {
        self.parameters.first().map_or(Kind::Float, Tensor::kind)
    }
}

/// How a network uses its buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As in training: batch normalisation goes by the batch and hands out its mean and unbiased variance.
    Batch,
    /// As when drawing samples: by the buffers as they are, and nothing is handed out.
    Running,
}

/// How a parameter or buffer starts.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the fields say it by their names
pub enum Init {
    /// All the same.
    Constant(f32),
    /// U[-bound, bound).
    Uniform { bound: f32 },
    /// N(mean, deviation).
    Normal { mean: f32, deviation: f32 },
    /// As somebody else chose.
    Given(Arc<[f32]>),
}

/// A tensor of whole numbers that stays as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constant {
    /// Its name in checkpoints.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its elements.
    pub values: Vec<i64>,
}

/// How a buffer follows what a phase's leaves hand out, on the mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Follow {
    /// Towards it, with this weight against what the buffer held before. With 1 it is replaced.
    Towards(f64),
    /// By it.
    By,
}

/// A tensor of a network.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Its name in checkpoints, `<layer>.weight` and the like.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// How it starts.
    pub init: Init,
    /// Whether it stays fp32 in every precision.
    pub exact: bool,
    /// How a buffer is committed; of no meaning for parameters.
    pub follow: Follow,
}

impl TensorSpec {
    /// A parameter that is cast to the precision of passes.
    pub fn parameter(name: String, shape: &[i64], init: Init) -> TensorSpec {
        TensorSpec { name, shape: shape.to_vec(), init, exact: false, follow: Follow::By }
    }

    /// A buffer that goes towards what a phase's leaves hand out.
    pub fn buffer(name: String, shape: &[i64], init: Init, momentum: f64) -> TensorSpec {
        let follow = Follow::Towards(momentum);
        TensorSpec { name, shape: shape.to_vec(), init, exact: true, follow }
    }

    /// A buffer that moves by what a phase's leaves hand out.
    pub fn moved(name: String, shape: &[i64], init: Init) -> TensorSpec {
        TensorSpec { name, shape: shape.to_vec(), init, exact: true, follow: Follow::By }
    }

    /// Elements.
    pub fn numel(&self) -> usize {
        usize::try_from(self.shape.iter().product::<i64>()).expect("shapes are positive")
    }
}

/// How many of a network's first tensors belong to its first `layers` layers. A layer's tensors have one name
/// up to the last dot.
pub fn first_layers(parameters: &[TensorSpec], layers: u32) -> usize {
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

/// How many layers with parameters a network has.
pub fn layers(parameters: &[TensorSpec]) -> u32 {
    (0..).find(|layers| first_layers(parameters, *layers) == parameters.len()).expect("a network has an end")
}

#[cfg(test)]
mod tests;
