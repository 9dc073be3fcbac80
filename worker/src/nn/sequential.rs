//! Sequential networks: one layer after the other.
//!
//! Between convolutions the features of a pixel lie together (channels last): libtorch's kernels for CPUs,
//! and those for GPUs in half precision, are faster on that. Parameters lie as PyTorch has them. No shape
//! names the number of samples, so that a recorded network takes any.

use c10d::convolution::Grid;
use tch::Tensor;

use super::pieces::{convolved, convolved_back, dense, in_single, linear, product};
use super::{Init, Mode, Network, Pass, TensorSpec};

/// Epsilon of batch normalisation, PyTorch's default.
const BATCH_NORM_EPSILON: f64 = 1e-5;

/// Weight of the new batch in batch normalisation's running statistics, PyTorch's default.
pub(super) const BATCH_NORM_MOMENTUM: f64 = 0.1;

/// One layer. Sizes are counts of features; kernels are square, in pixels.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the fields say it by their names
pub enum Layer {
    /// Fully connected: (n, inputs) to (n, outputs).
    Linear { inputs: i64, outputs: i64 },
    /// Convolution without bias: (n, inputs, h, w) to (n, outputs, h', w').
    Conv { inputs: i64, outputs: i64, kernel: i64, stride: i64, padding: i64 },
    /// Transposed convolution without bias.
    ConvTranspose { inputs: i64, outputs: i64, kernel: i64, stride: i64, padding: i64 },
    /// Batch normalisation (Ioffe and Szegedy, 2015) over (n, features, h, w).
    BatchNorm { features: i64 },
    /// max(x, slope x).
    LeakyRelu { slope: f64 },
    /// max(x, 0).
    Relu,
    /// Hyperbolic tangent.
    Tanh,
    /// Gives each sample this shape.
    Reshape(Vec<i64>),
}

/// A feed-forward network.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequential {
    layers: Vec<Layer>,
}

impl Sequential {
    /// A network of these layers.
    ///
    /// # Panics
    /// If it begins with an activation, which would overwrite the input.
    pub fn new(layers: Vec<Layer>) -> Self {
        let first = layers.iter().find(|layer| !matches!(layer, Layer::Reshape(_)));
        // It works in place, and the input belongs to the caller, which uses it again.
        let activates = matches!(first, Some(Layer::LeakyRelu { .. } | Layer::Relu | Layer::Tanh));
        assert!(!activates, "a network begins with something else than an activation");
        Sequential { layers }
    }
}

impl Network for Sequential {
    fn sees_batch(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer, Layer::BatchNorm { .. }))
    }

    fn sums_by_shards(&self, samples: usize) -> bool {
        self.layers.iter().all(|layer| match *layer {
            Layer::Linear { inputs, outputs } => c10d::aten::sums_by_groups(samples, [outputs, inputs]),
            Layer::LeakyRelu { .. } | Layer::Relu | Layer::Tanh | Layer::Reshape(_) => true,
            Layer::Conv { .. } | Layer::ConvTranspose { .. } | Layer::BatchNorm { .. } => false,
        })
    }

    fn parameters(&self) -> Vec<TensorSpec> {
        let mut specs = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            // Its moments are sums over many numbers, which bf16 would round away.
            let exact = matches!(layer, Layer::BatchNorm { .. });
            let mut add = |kind: &str, shape: &[i64], init| {
                let spec = TensorSpec::parameter(format!("{index}.{kind}"), shape, init);
                specs.push(TensorSpec { exact, ..spec });
            };
            // DCGAN's weights, Radford et al. (2015), section 4.
            // Of convolutions; linear layers have PyTorch's own initial values.
            let normal = Init::Normal { mean: 0.0, deviation: 0.02 };
            match *layer {
                Layer::Linear { inputs, outputs } => {
                    let init = Init::Uniform { bound: linear_bound(inputs) };
                    add("weight", &[outputs, inputs], init.clone());
                    add("bias", &[outputs], init);
                }
                Layer::Conv { inputs, outputs, kernel, .. } => {
                    add("weight", &[outputs, inputs, kernel, kernel], normal);
                }
                Layer::ConvTranspose { inputs, outputs, kernel, .. } => {
                    add("weight", &[inputs, outputs, kernel, kernel], normal);
                }
                Layer::BatchNorm { features } => {
                    add("weight", &[features], Init::Normal { mean: 1.0, deviation: 0.02 });
                    add("bias", &[features], Init::Constant(0.0));
                }
                _ => {}
            }
        }
        specs
    }

    fn buffers(&self) -> Vec<TensorSpec> {
        let mut specs = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            if let Layer::BatchNorm { features } = *layer {
                let mut add = |kind: &str, start| {
                    let (name, start) = (format!("{index}.{kind}"), Init::Constant(start));
                    specs.push(TensorSpec::buffer(name, &[features], start, BATCH_NORM_MOMENTUM));
                };
                add("running_mean", 0.0);
                add("running_var", 1.0);
            }
        }
        specs
    }

    fn forward(&self, input: &Tensor, pass: &mut Pass<'_>) -> Tensor {
        let mut parameters = pass.parameters.iter();
        let mut next = || parameters.next().expect("a tensor for each of the network's parameters");
        let mut buffers_used = 0;
        // Once, at the entry: all layers compute in the kind of the parameters.
        let mut x = input.to_kind(pass.kind());
        let mut layers = self.layers.iter().peekable();
        while let Some(layer) = layers.next() {
            x = match layer {
                Layer::Linear { .. } => {
                    match layers.next_if(|next| matches!(next, Layer::LeakyRelu { .. })) {
                        Some(Layer::LeakyRelu { slope }) => dense(&x, next(), next(), *slope, pass.shards),
                        _ => dense(&x, next(), next(), 1.0, pass.shards),
                    }
                }
                Layer::Conv { kernel, stride, padding, .. } => {
                    conv(&channels_last(&x), next(), *kernel, *stride, *padding)
                }
                Layer::ConvTranspose { stride, padding, .. } => {
                    conv_transpose(&channels_last(&x), next(), *stride, *padding)
                }
                Layer::BatchNorm { .. } => {
                    let normalised = normalise(&x, Some((next(), next())), pass, buffers_used);
                    // A mean and a variance for each normalisation, in the order of the layers.
                    buffers_used += 2;
                    normalised
                }
                // In place: no backward pass needs what an activation was computed from.
                Layer::LeakyRelu { slope } => leaky_relu(x, *slope),
                Layer::Relu => x.relu_(),
                Layer::Tanh => x.tanh_(),
                Layer::Reshape(shape) => x.reshape([&[-1], shape.as_slice()].concat()),
            };
        }
        in_single(&x)
    }
}

/// PyTorch's default for linear layers: Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(n), 1/sqrt(n)).
pub(super) fn linear_bound(inputs: i64) -> f32 {
    // Sizes of layers are far below 2^16, which a float holds exactly.
    let inputs = f32::from(u16::try_from(inputs).unwrap_or(u16::MAX));
    1.0 / inputs.sqrt()
}

/// Returns the images with the features of a pixel together in memory.
pub(super) fn channels_last(x: &Tensor) -> Tensor {
    let [_, features, height, width] = sizes(x);
    if features == 1 && !x.requires_grad() {
        // Both orders are the same bytes then; the strides tell the kernels which one is meant.
        let strides = [height * width, 1, width, 1];
        return x.contiguous().as_strided(x.size(), strides, None);
    }
    x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

pub(super) fn sizes(x: &Tensor) -> [i64; 4] {
    x.size().try_into().expect("images have four dimensions")
}

pub(super) fn conv(x: &Tensor, weight: &Tensor, kernel: i64, stride: i64, padding: i64) -> Tensor {
    let [_, inputs, height, width] = sizes(x);
    // The map is as large as the kernel, so there is one place for it.
    if padding == 0 && (height, width) == (kernel, kernel) {
        // The kernel covers the whole map: a product of matrices, several times as fast.
        let [outputs, ..] = sizes(weight);
        let rows = |x: &Tensor| x.permute([0, 2, 3, 1]).reshape([-1, inputs * height * width]);
        return linear(&rows(x), &rows(weight), None).view([-1, outputs, 1, 1]);
    }
    convolved(x, weight, None, Grid { stride, padding })
}

pub(super) fn conv_transpose(x: &Tensor, weight: &Tensor, stride: i64, padding: i64) -> Tensor {
    let [_, inputs, height, width] = sizes(x);
    if padding == 0 && (height, width) == (1, 1) {
        // Every sample is one vector, and each feature of it weighs a whole map.
        let [_, outputs, kernel, _] = sizes(weight);
        let maps = product(&x.reshape([-1, inputs]), &weight.reshape([inputs, -1]));
        return channels_last(&maps.view([-1, outputs, kernel, kernel]));
    }
    convolved_back(x, weight, None, Grid { stride, padding })
}

pub(super) fn leaky_relu(mut x: Tensor, slope: f64) -> Tensor {
    c10d::aten::leaky_relu(&mut x, slope).expect("an activation takes any tensor that is no parameter");
    x
}

/// Batch normalisation, with a scale and a shift of each feature or without. `buffer` is the place of its
/// mean among the network's buffers.
pub(super) fn normalise(
    x: &Tensor,
    affine: Option<(&Tensor, &Tensor)>,
    pass: &mut Pass<'_>,
    buffer: usize,
) -> Tensor {
    let (weight, bias) = (affine.map(|(weight, _)| weight), affine.map(|(_, bias)| bias));
    match pass.mode {
        Mode::Running => {
            // In inference a sample's result must not depend on the others of its batch.
            let (mean, variance) = (&pass.buffers[buffer], &pass.buffers[buffer + 1]);
            x.batch_norm(weight, bias, Some(mean), Some(variance), false, 0.0, BATCH_NORM_EPSILON, false)
        }
        Mode::Batch => {
            let none = None::<&Tensor>;
            let (out, mean, inverse) =
                // Without running statistics to write: they come back as updates, and are committed
                // (D1).
                x.native_batch_norm(weight, bias, none, none, true, 0.0, BATCH_NORM_EPSILON);
            // Numbers of a feature over the batch and the map.
            let samples: i64 = x.size().iter().product::<i64>() / x.size()[1];
            let samples = i32::try_from(samples).map_or(f64::from(i32::MAX), f64::from);
            let (mean, inverse) = (mean.detach(), inverse.detach());
            // The kernel returns 1 / sqrt(variance + epsilon) of the biased variance.
            let biased = inverse.pow_tensor_scalar(-2) - BATCH_NORM_EPSILON;
            pass.statistics.push(mean);
            // The unbiased variance, as PyTorch keeps it; of one number the biased one.
            pass.statistics.push(biased * (samples / (samples - 1.0).max(1.0)));
            out
        }
    }
}
