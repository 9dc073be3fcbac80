//! Building blocks of networks that are no plain lists of layers: each names its tensors and uses them in
//! the same order.

use c10d::convolution::{Grid, convolution, transposed_convolution};
use tch::{Kind, Tensor};

use super::{Init, TensorSpec};

/// Sizes that both networks are built from: the length of the noise, the width, the images' channels and
/// side, and the number of classes, 0 for none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) latent: i64,
    pub(super) width: i64,
    pub(super) channels: i64,
    pub(super) side: i64,
    pub(super) classes: i64,
}

/// List of a network's tensors under construction.
#[derive(Default)]
pub(super) struct Specs {
    pub(super) list: Vec<TensorSpec>,
}

impl Specs {
    /// Adds a parameter.
    pub(super) fn add(&mut self, name: String, shape: &[i64], init: Init) {
        self.list.push(TensorSpec::parameter(name, shape, init));
    }

    /// Adds a parameter with a row for each class.
    pub(super) fn add_table(&mut self, name: String, shape: &[i64], init: Init) {
        self.list.push(TensorSpec::embedding(name, shape, init));
    }

    /// Adds a gain or a bias of a normalisation, perhaps with a row for each class. It stays fp32.
    pub(super) fn add_exact(&mut self, name: String, shape: &[i64], init: Init) {
        self.list.push(TensorSpec { exact: true, ..TensorSpec::embedding(name, shape, init) });
    }
}

/// N(0, gain / sqrt(inputs)), which preserves the variance of activations (He et al., 2015, equation 10);
/// zeros for a gain of 0.
pub(super) fn scaled(gain: f32, inputs: i64) -> Init {
    // The last layer of a block: it begins at zero exactly, and needs no draw.
    if gain == 0.0 {
        return Init::Constant(0.0);
    }
    Init::Normal { mean: 0.0, deviation: gain / root(inputs) }
}

/// The square root of a count.
pub(super) fn root(count: i64) -> f32 {
    #[allow(clippy::cast_precision_loss)] // sizes of networks
    let count = count as f32;
    count.sqrt()
}

/// Linear layer: each row of `x`, (n, inputs), with a weight, (outputs, inputs), and perhaps a bias.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    c10d::aten::linear(x, weight, bias).expect("a layer's tensors fit its input")
}

/// Linear layer with a bias and max(x, slope x) of each element.
pub(super) fn leaky_linear(x: &Tensor, weight: &Tensor, bias: &Tensor, slope: f64) -> Tensor {
    c10d::aten::leaky_linear(x, weight, bias, slope).expect("a layer's tensors fit its input")
}

/// Linear layer with a bias and max(x, slope x) of each element, over samples of several data shards
/// ([`Pass::shards`](super::Pass)).
pub(super) fn dense(x: &Tensor, weight: &Tensor, bias: &Tensor, slope: f64, shards: u32) -> Tensor {
    c10d::aten::linear_by_groups(x, weight, Some(bias), slope, shards)
        .expect("a layer's tensors fit its input")
}

/// Product of matrices.
pub(super) fn product(a: &Tensor, b: &Tensor) -> Tensor {
    c10d::aten::product(a, b).expect("the factors fit each other")
}

/// Convolution of images, (n, inputs, h, w), with a weight, (outputs, inputs, k, k), and perhaps a bias.
pub(super) fn convolved(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, grid: Grid) -> Tensor {
    convolution(x, weight, bias, grid).expect("a layer's tensors fit its input")
}

/// Transposed convolution of images, (n, inputs, h, w), with a weight, (inputs, outputs, k, k), and perhaps a
/// bias.
pub(super) fn convolved_back(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, grid: Grid) -> Tensor {
    transposed_convolution(x, weight, bias, grid).expect("a layer's tensors fit its input")
}

/// Casts tensors of lower precision to fp32.
pub(super) fn in_single(x: &Tensor) -> Tensor {
    match x.kind() {
        // The double kind is that of the tests, which check derivatives.
        Kind::Float | Kind::Double => x.shallow_clone(),
        _ => x.to_kind(Kind::Float),
    }
}

/// Returns a row of `table` (classes, features) for each class. A matrix product, which has all derivatives
/// on all devices.
pub(super) fn embed(table: &Tensor, classes: Option<&Tensor>) -> Tensor {
    let classes = classes.expect("a conditional model is told the classes of its samples");
    let rows = table.size()[0];
    // Exact: each product has one term that is not 0.
    Tensor::eye(rows, (table.kind(), table.device())).index_select(0, classes).matmul(table)
}

/// (n, c, h, w) as (n, h, w, c), without a copy where the features of a pixel lie together.
pub(super) fn features_last(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 1]).contiguous()
}

/// (n, h, w, c) as (n, c, h, w), without a copy.
pub(super) fn features_first(x: &Tensor) -> Tensor {
    x.permute([0, 3, 1, 2])
}

/// Halves each side of (n, h, w, c): a bilinear filter, [1, 3, 3, 1] / 8 each way.
pub(super) fn halve(x: &Tensor) -> Tensor {
    let features = x.size()[3];
    // The square filter sums to 64.
    let filter = filter(x, 1.0 / 64.0, features);
    features_last(&features_first(x).conv2d(&filter, None::<Tensor>, [2, 2], [1, 1], [1, 1], features))
}

/// Doubles each side of (n, h, w, c): the same filter, transposed and four times as strong.
pub(super) fn double(x: &Tensor) -> Tensor {
    let features = x.size()[3];
    // Only one in four of its inputs is not 0.
    let filter = filter(x, 4.0 / 64.0, features);
    let (two, one) = ([2, 2], [1, 1]);
    features_last(&features_first(x).conv_transpose2d(
        &filter,
        None::<Tensor>,
        two,
        one,
        [0, 0],
        features,
        one,
    ))
}

fn filter(like: &Tensor, scale: f64, features: i64) -> Tensor {
    // [1, 3, 3, 1], computed: values copied into a tensor would not be recorded when the network is traced,
    // and a GPU would be waited for.
    let side = (Tensor::arange(4, (Kind::Float, like.device())) - 1.5).abs() * -2.0 + 4.0;
    let square = (side.view([4, 1]) * side.view([1, 4]) * scale).to_kind(like.kind());
    square.expand([features, 1, 4, 4], false).contiguous()
}
