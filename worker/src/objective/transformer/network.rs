//! Sizes of a transformer, the tensors that follow from them, and constants of its passes.
//!
//! Names and layouts of tensors are those of nanoGPT's `state_dict`; the output layer is the embedding
//! (Press and Wolf, 2017). No layer has a bias.

use ganglion_proto::job::{Activation, Positions};
use tch::{Device, Kind, Tensor};

use crate::nn::{Init, TensorSpec};

/// Deviation of initial weights (Radford et al., 2018, section 4.1).
const DEVIATION: f32 = 0.02;
/// Rows of queries whose attention is computed at once. What lies after the last of them is not computed.
const ROWS: i64 = 64;
/// Longest wavelength of rotary positions, over 2 pi (Su et al., 2021, section 3.3).
const ROTARY_BASE: f64 = 10_000.0;

/// Sizes of a transformer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sizes {
    /// Number of tokens that it predicts.
    pub vocabulary: i64,
    /// Number of tokens that it reads: those, and one or more that stand in front of a sample.
    pub inputs: i64,
    /// Most tokens that a prediction follows from.
    pub context: i64,
    /// Number of blocks.
    pub layers: i64,
    /// Attention heads of a block.
    pub heads: i64,
    /// Length of an embedding.
    pub width: i64,
    /// Form in which it knows the places of tokens.
    pub positions: Positions,
    /// Nonlinearity of the feed-forward layers.
    pub activation: Activation,
}

impl Sizes {
    /// Length of a head's vectors.
    pub(crate) fn head_width(&self) -> i64 {
        self.width / self.heads
    }

    /// Hidden units of a feed-forward layer.
    fn hidden(&self) -> i64 {
        match self.activation {
            Activation::Gelu => 4 * self.width,
            // Two thirds of that, so that three matrices have as many weights as two (Shazeer, 2020); and
            // whole vectors.
            Activation::Swiglu => (8 * self.width / 3 + 15) / 16 * 16,
        }
    }

    /// Parameters, in the order of [`Parts`].
    pub(crate) fn parameters(&self) -> Vec<TensorSpec> {
        let normal = |deviation| Init::Normal { mean: 0.0, deviation };
        let weight = |name: String, shape: &[i64], deviation: f32| {
            TensorSpec::parameter(name, shape, normal(deviation))
        };
        // Added to activations, or their scale, which stay fp32 too.
        let exact = |spec: TensorSpec| TensorSpec { exact: true, ..spec };
        let norm = |name: String| exact(TensorSpec::parameter(name, &[self.width], Init::Constant(1.0)));
        // The sum of all blocks keeps its size (Radford et al., 2019, section 2.3).
        #[allow(clippy::cast_precision_loss)] // a few layers
        let last = DEVIATION / (2.0 * self.layers as f32).sqrt();
        let (width, hidden) = (self.width, self.hidden());
        let table = |name: &str, rows| TensorSpec::embedding(name.into(), &[rows, width], normal(DEVIATION));
        let inner = if self.activation == Activation::Swiglu { 2 * hidden } else { hidden };
        let mut specs = vec![table("wte.weight", self.inputs)];
        if self.positions == Positions::Learned {
            specs.push(exact(table("wpe.weight", self.context)));
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("h.{layer}.{part}.weight");
            specs.extend([
                norm(name("ln_1")),
                weight(name("attn.c_attn"), &[3 * width, width], DEVIATION),
                weight(name("attn.c_proj"), &[width, width], last),
                norm(name("ln_2")),
                weight(name("mlp.c_fc"), &[inner, width], DEVIATION),
                weight(name("mlp.c_proj"), &[width, hidden], last),
            ]);
        }
        specs.push(norm("ln_f.weight".into()));
        specs
    }
}

/// A tensor for each parameter: its value, or the place of its gradient.
pub(crate) struct Parts<'a> {
    /// (inputs, width).
    pub tokens: &'a Tensor,
    /// (context, width), where positions are learned.
    pub positions: Option<&'a Tensor>,
    pub blocks: Vec<BlockParts<'a>>,
    /// (width).
    pub norm: &'a Tensor,
}

/// Tensors of a block.
pub(crate) struct BlockParts<'a> {
    /// (width).
    pub attention_norm: &'a Tensor,
    /// (3 width, width): queries, keys, values.
    pub qkv: &'a Tensor,
    /// (width, width).
    pub attention_out: &'a Tensor,
    /// (width).
    pub mlp_norm: &'a Tensor,
    /// (hidden, width); with gates in front for SwiGLU.
    pub mlp_in: &'a Tensor,
    /// (width, hidden).
    pub mlp_out: &'a Tensor,
}

impl<'a> Parts<'a> {
    /// Tensors in the order of [`Sizes::parameters`].
    pub(crate) fn new(sizes: &Sizes, tensors: &'a [Tensor]) -> Parts<'a> {
        let mut tensors = tensors.iter();
        let mut next = || tensors.next().expect("a tensor for each parameter");
        let (tokens, learned) = (next(), sizes.positions == Positions::Learned);
        let positions = learned.then(&mut next);
        let block = |_| BlockParts {
            attention_norm: next(),
            qkv: next(),
            attention_out: next(),
            mlp_norm: next(),
            mlp_in: next(),
            mlp_out: next(),
        };
        let blocks = (0..sizes.layers).map(block).collect();
        Parts { tokens, positions, blocks, norm: next() }
    }
}

/// Constants of a network's passes, on a device.
pub(crate) struct Constants {
    /// (rows, rows): -inf where a key comes after the query.
    future: Tensor,
    /// Cosines and sines by place, (context, head width / 2), of rotary positions.
    rotary: Option<[Tensor; 2]>,
}

impl Constants {
    pub(crate) fn new(sizes: &Sizes, (kind, device): (Kind, Device)) -> Constants {
        let future = Tensor::full([ROWS, ROWS], f64::NEG_INFINITY, (kind, device)).triu(1);
        let rotary = || {
            // In double precision, as angles of far places are large.
            let all = (Kind::Double, Device::Cpu);
            let half = sizes.head_width() / 2;
            #[allow(clippy::cast_precision_loss)] // the length of a vector
            let wavelengths = (Tensor::arange(half, all) / half as f64 * ROTARY_BASE.ln()).exp();
            let angles = Tensor::arange(sizes.context, all).unsqueeze(1) / wavelengths.unsqueeze(0);
            [angles.cos(), angles.sin()].map(|table| table.to_kind(kind).to_device(device))
        };
        Constants { future, rotary: (sizes.positions == Positions::Rotary).then(rotary) }
    }

    /// Groups of queries whose attention is computed at once, each by its start and its length.
    pub(crate) fn groups(queries: i64) -> impl Iterator<Item = (i64, i64)> {
        let starts = (0..queries).step_by(usize::try_from(ROWS).expect("a small number"));
        starts.map(move |start| (start, ROWS.min(queries - start)))
    }

    /// Hides from `count` queries what comes after them: the last keys of `scores` (n, count, keys) are their
    /// own.
    pub(crate) fn hide_future(&self, scores: &Tensor, count: i64) {
        // One query comes after all that there is.
        if count > 1 {
            let keys = scores.size()[2];
            let own = self.future.narrow(0, 0, count).narrow(1, 0, count);
            let _ = scores.narrow(2, keys - count, count).g_add_(&own);
        }
    }

    /// Cosines and sines of `tokens` places from `past` on, where positions are rotary.
    pub(crate) fn angles(&self, past: i64, tokens: i64) -> Option<[Tensor; 2]> {
        let [cos, sin] = self.rotary.as_ref()?;
        Some([cos, sin].map(|table| table.narrow(0, past, tokens)))
    }
}
