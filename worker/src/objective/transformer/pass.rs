//! Forward pass: of training, which keeps what its gradient needs, of evaluation, and of sampling, which keeps
//! keys and values of the tokens before.
//!
//! Activations are (tokens of all samples, width) in fp32. Products of matrices are in the kind of the
//! weights.

use c10d::Error;
use c10d::aten::{Into, matmul_into};
use c10d::transformer::{Heads, swiglu};

use ganglion_proto::job::Activation;
use tch::{Kind, Tensor};

use super::dropout::{Dropout, Factors, dropped};
use super::network::{BlockParts, Constants, Parts, Sizes};

/// Epsilon of layer normalisation, PyTorch's default.
const EPSILON: f64 = 1e-5;

/// Network with its weights.
pub(super) struct Network<'a> {
    pub sizes: &'a Sizes,
    pub constants: &'a Constants,
    pub weights: Parts<'a>,
}

/// Layer normalisation with what its gradient needs.
pub(super) struct Normalised {
    pub input: Tensor,
    pub output: Tensor,
    pub moments: [Tensor; 2],
}

/// Attention with what its gradient needs.
pub(super) struct Attended {
    /// Queries, keys and values, (samples x heads, tokens, head width).
    pub qkv: [Tensor; 3],
    /// Weights of each group of queries, (samples x heads, queries, keys), and their dropout.
    pub groups: Vec<(Tensor, Factors)>,
    /// (tokens, width).
    pub output: Tensor,
}

/// A block's pass, with what its gradient needs.
pub(super) struct BlockPass {
    pub attention_norm: Normalised,
    pub attended: Attended,
    pub attention_dropout: Factors,
    pub mlp_norm: Normalised,
    /// Before the nonlinearity, and after it.
    pub hidden: [Tensor; 2],
    pub mlp_dropout: Factors,
}

/// Place of activations in a pass.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub samples: i64,
    pub layer: usize,
    /// Keys and values of tokens before.
    pub cache: Option<&'a Cache>,
}

/// Keys and values of the tokens before.
pub(super) struct Cache {
    /// Number of tokens of each sample that are there.
    pub past: i64,
    /// Keys and values of each layer, (samples x heads, context, head width).
    layers: Vec<[Tensor; 2]>,
}

impl Cache {
    /// Room for a context of `samples`.
    pub(crate) fn new(sizes: &Sizes, samples: i64, like: &Tensor) -> Cache {
        let shape = [samples * sizes.heads, sizes.context, sizes.head_width()];
        let room = || Tensor::zeros(shape, (like.kind(), like.device()));
        Cache { past: 0, layers: (0..sizes.layers).map(|_| [room(), room()]).collect() }
    }

    /// Appends keys and values of a layer's new tokens; returns all that are there.
    fn extended(&self, layer: usize, new: [Tensor; 2]) -> [Tensor; 2] {
        let mut pairs = self.layers[layer].iter().zip(new);
        [0, 1].map(|_| {
            let (held, new) = pairs.next().expect("keys and values");
            let count = new.size()[1];
            held.narrow(1, self.past, count).copy_(&new);
            held.narrow(1, 0, self.past + count)
        })
    }
}

/// Computes x W^T.
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor, Error> {
    let out = Tensor::empty([x.size()[0], weight.size()[0]], (x.kind(), x.device()));
    matmul_into(&out, Into::Write, 1.0, [&x.to_kind(weight.kind()), &weight.transpose(0, 1)])?;
    Ok(out)
}

/// Computes scale a b^T, or scale a b, for batches of matrices; the factors are cast to a kind.
pub(super) fn product(kind: Kind, scale: f64, [a, b]: [&Tensor; 2]) -> Result<Tensor, Error> {
    let out = Tensor::empty([a.size()[0], a.size()[1], b.size()[2]], (a.kind(), a.device()));
    matmul_into(&out, Into::Write, scale, [&a.to_kind(kind), &b.to_kind(kind)])?;
    Ok(out)
}

impl Network<'_> {
    /// Kind of products of matrices.
    pub(crate) fn kind(&self) -> Kind {
        self.weights.tokens.kind()
    }

    /// Scale of attention's scores.
    pub(crate) fn scale(&self) -> f64 {
        #[allow(clippy::cast_precision_loss)] // the length of a vector
        (self.sizes.head_width() as f64).sqrt().recip()
    }

    /// Embeddings of tokens (samples, n), of which `past` tokens are before, and their dropout.
    pub(crate) fn embedded(
        &self,
        tokens: &Tensor,
        past: i64,
        dropout: Option<&mut Dropout>,
    ) -> (Tensor, Factors) {
        let rows = Tensor::embedding(self.weights.tokens, tokens, -1, false, false);
        let kind = self.weights.norm.kind();
        let rows = rows.to_kind(kind);
        let rows = match self.weights.positions {
            Some(places) => rows + places.narrow(0, past, tokens.size()[1]),
            None => rows,
        };
        let rows = rows.view([-1, self.sizes.width]);
        let factors = dropout.map(Dropout::next);
        (dropped(rows, &factors), factors)
    }

    /// Layer normalisation (Ba et al., 2016).
    pub(crate) fn normalised(&self, input: &Tensor, weight: &Tensor) -> Normalised {
        let none = None::<&Tensor>;
        let (output, mean, rstd) = input.native_layer_norm([self.sizes.width], Some(weight), none, EPSILON);
        Normalised { input: input.shallow_clone(), output, moments: [mean, rstd] }
    }

    /// Passes activations (samples x n, width) through a block.
    pub(crate) fn block(
        &self,
        x: &Tensor,
        At { samples, layer, cache }: At<'_>,
        mut dropout: Option<&mut Dropout>,
    ) -> Result<(Tensor, BlockPass), Error> {
        let weights = &self.weights.blocks[layer];
        let attention_norm = self.normalised(x, weights.attention_norm);
        let qkv = linear(&attention_norm.output, weights.qkv)?;
        let qkv = self.split(&qkv, samples, layer, cache)?;
        let attended = self.attended(qkv, samples, dropout.as_deref_mut())?;
        let out = linear(&attended.output, weights.attention_out)?;
        let attention_dropout = dropout.as_deref_mut().map(Dropout::next);
        let x = dropped(out, &attention_dropout).g_add_(x);
        let mlp_norm = self.normalised(&x, weights.mlp_norm);
        let before = linear(&mlp_norm.output, weights.mlp_in)?;
        let after = match self.sizes.activation {
            Activation::Gelu => before.gelu("none"),
            Activation::Swiglu => swiglu(&before)?,
        };
        let out = linear(&after, weights.mlp_out)?;
        let mlp_dropout = dropout.map(Dropout::next);
        let x = dropped(out, &mlp_dropout).g_add_(&x);
        let hidden = [before, after];
        Ok((x, BlockPass { attention_norm, attended, attention_dropout, mlp_norm, hidden, mlp_dropout }))
    }

    /// Queries of new tokens, and keys and values of all, from (samples x n, 3 width).
    fn split(
        &self,
        qkv: &Tensor,
        samples: i64,
        layer: usize,
        cache: Option<&Cache>,
    ) -> Result<[Tensor; 3], Error> {
        let past = cache.map_or(0, |cache| cache.past);
        let angles = self.constants.angles(past, qkv.size()[0] / samples);
        let by_head = self.heads(samples, 3, angles.as_ref()).split(qkv)?;
        let [query, key, value] = [0, 1, 2].map(|part| by_head.get(part));
        let [key, value] = match cache {
            Some(cache) => cache.extended(layer, [key, value]),
            None => [key, value],
        };
        Ok([query, key, value])
    }

    /// Causal attention (Vaswani et al., 2017, equation 1).
    fn attended(
        &self,
        [query, key, value]: [Tensor; 3],
        samples: i64,
        mut dropout: Option<&mut Dropout>,
    ) -> Result<Attended, Error> {
        let (queries, keys) = (query.size()[1], key.size()[1]);
        let mut output = Vec::new();
        let mut groups = Vec::new();
        for (start, count) in Constants::groups(queries) {
            let known = keys - queries + start + count;
            let own = query.narrow(1, start, count).contiguous();
            let [key, value] = [&key, &value].map(|all| first(all, known, count));
            let scores = product(self.kind(), self.scale(), [&own, &key.transpose(1, 2)])?;
            self.constants.hide_future(&scores, count);
            let weights = scores.softmax(-1, scores.kind());
            let factors = dropout.as_deref_mut().map(Dropout::next);
            output.push(product(self.kind(), 1.0, [&dropped(weights.shallow_clone(), &factors), &value])?);
            groups.push((weights, factors));
        }
        let output = if let [whole] = &output[..] { whole.shallow_clone() } else { Tensor::cat(&output, 1) };
        let output = self.heads(samples, 1, None).join(&output.unsqueeze(0))?;
        Ok(Attended { qkv: [query, key, value], groups, output })
    }

    /// Heads with so many vectors of each token, of which queries and keys are turned if there are angles.
    pub(crate) fn heads<'a>(&self, samples: i64, parts: i64, angles: Option<&'a [Tensor; 2]>) -> Heads<'a> {
        Heads { samples, parts, heads: self.sizes.heads, angles }
    }

    /// Logits (n, vocabulary) for activations behind the last block.
    pub(crate) fn logits(&self, x: &Tensor) -> Result<Tensor, Error> {
        linear(x, &self.output_weight())
    }

    /// Weight of the output layer, (vocabulary, width): the embeddings of the tokens that it predicts.
    pub(crate) fn output_weight(&self) -> Tensor {
        self.weights.tokens.narrow(0, 0, self.sizes.vocabulary)
    }

    /// Activations behind the last normalisation for tokens (samples, n), without what a gradient needs.
    pub(crate) fn infer(&self, tokens: &Tensor, mut cache: Option<&mut Cache>) -> Result<Tensor, Error> {
        let (samples, count) = (tokens.size()[0], tokens.size()[1]);
        let past = cache.as_ref().map_or(0, |cache| cache.past);
        let (mut x, _) = self.embedded(tokens, past, None);
        for layer in 0..self.weights.blocks.len() {
            x = self.block(&x, At { samples, layer, cache: cache.as_deref() }, None)?.0;
        }
        if let Some(cache) = &mut cache {
            cache.past += count;
        }
        Ok(self.normalised(&x, self.weights.norm).output)
    }

    /// Negative log-likelihood of tokens in nats, a mean over a sample's, summed over the samples.
    pub(crate) fn loss(&self, inputs: &Tensor, targets: &Tensor) -> Result<Tensor, Error> {
        let logits = self.logits(&self.infer(inputs, None)?)?;
        let log_likelihoods = logits.log_softmax(-1, logits.kind());
        #[allow(clippy::cast_precision_loss)] // the length of a context
        let share = 1.0 / targets.size()[1] as f64;
        Ok(log_likelihoods.gather(1, &targets.reshape([-1, 1]), false).sum(Kind::Double) * -share)
    }

    /// Weights of a block.
    pub(crate) fn block_weights(&self, layer: usize) -> &BlockParts<'_> {
        &self.weights.blocks[layer]
    }
}

/// The first `count` rows of each matrix, together in memory where several queries read them.
fn first(all: &Tensor, count: i64, queries: i64) -> Tensor {
    let first = all.narrow(1, 0, count);
    // For one query a copy would take longer than the product.
    if queries > 1 { first.contiguous() } else { first }
}
