//! Gradient of a shard's loss, by hand: each gradient of a weight is computed in its place. Autograd would
//! compute it elsewhere and copy it, and its products of matrices take twice as long.

use c10d::Error;
use c10d::aten::{Into, LayerNorm, matmul_into};
use c10d::transformer::swiglu_backward;

use ganglion_proto::job::Activation;
use tch::Tensor;

use super::dropout::{Dropout, dropped};
use super::network::{BlockParts, Constants, Parts};
use super::pass::{At, Attended, BlockPass, Network, Normalised};

/// Tokens that a shard's samples consist of, (samples, n), and those that come next.
pub(super) struct Tokens<'a> {
    pub inputs: &'a Tensor,
    pub targets: &'a Tensor,
}

impl Network<'_> {
    /// Writes the gradient of the loss to its places; returns the loss: the negative log-likelihood in nats a
    /// token, summed over the samples.
    pub(crate) fn gradient(
        &self,
        tokens: &Tokens<'_>,
        mut dropout: Option<Dropout>,
        places: &Parts<'_>,
    ) -> Result<Tensor, Error> {
        let (samples, count) = (tokens.inputs.size()[0], tokens.inputs.size()[1]);
        let (mut x, factors) = self.embedded(tokens.inputs, 0, dropout.as_mut());
        let mut passes = Vec::new();
        for layer in 0..self.weights.blocks.len() {
            let (next, pass) = self.block(&x, At { samples, layer, cache: None }, dropout.as_mut())?;
            passes.push(pass);
            x = next;
        }
        let normalised = self.normalised(&x, self.weights.norm);
        drop(x);
        let (loss, of_output) = self.head(&normalised.output, tokens.targets, count, places)?;
        let of_x = Tensor::zeros_like(&of_output);
        normalised.backward(&of_output, self.weights.norm, &of_x, places.norm)?;
        for (layer, pass) in passes.into_iter().enumerate().rev() {
            self.block_backward(&pass, layer, &of_x, &places.blocks[layer])?;
        }
        let of_rows = dropped(of_x, &factors).view([samples, count, self.sizes.width]);
        if let Some(place) = places.positions {
            place.narrow(0, 0, count).copy_(&of_rows.sum_dim_intlist(
                [0i64].as_slice(),
                false,
                of_rows.kind(),
            ));
        }
        let rows = self.sizes.inputs;
        let of_tokens = Tensor::embedding_dense_backward(&of_rows, tokens.inputs, rows, -1, false);
        // The output layer's gradient is there already.
        let _ = places.tokens.shallow_clone().g_add_(&of_tokens);
        Ok(loss)
    }

    /// Loss, and the gradient of the activations that it follows from.
    fn head(
        &self,
        x: &Tensor,
        targets: &Tensor,
        count: i64,
        places: &Parts<'_>,
    ) -> Result<(Tensor, Tensor), Error> {
        let logits = self.logits(x)?;
        let log_likelihoods = logits.log_softmax(-1, logits.kind());
        drop(logits);
        let targets = targets.reshape([-1, 1]);
        #[allow(clippy::cast_precision_loss)] // the length of a context
        let share = 1.0 / count as f64;
        let loss = log_likelihoods.gather(1, &targets, false).sum(log_likelihoods.kind()) * -share;
        let mut of_logits = log_likelihoods.exp();
        let ones = Tensor::full_like(&targets, -1.0).to_kind(of_logits.kind());
        let of_logits = of_logits.scatter_add_(1, &targets, &ones);
        let weight = self.output_weight();
        // Rows of tokens that are never predicted have no gradient from here.
        let (vocabulary, inputs) = (self.sizes.vocabulary, self.sizes.inputs);
        let _ = places.tokens.narrow(0, vocabulary, inputs - vocabulary).zero_();
        let place = places.tokens.narrow(0, 0, vocabulary);
        let of_x = linear_backward(&of_logits, [x, &weight], share, &place)?;
        Ok((loss, of_x))
    }

    /// Adds the gradient of a block's input, from that of its output, in place; writes those of its weights.
    fn block_backward(
        &self,
        pass: &BlockPass,
        layer: usize,
        of_x: &Tensor,
        places: &BlockParts<'_>,
    ) -> Result<(), Error> {
        let weights = self.block_weights(layer);
        let of_out = dropped(of_x.shallow_clone(), &pass.mlp_dropout);
        let [before, after] = &pass.hidden;
        let of_after = linear_backward(&of_out, [after, weights.mlp_out], 1.0, places.mlp_out)?;
        let of_before = match self.sizes.activation {
            Activation::Gelu => before.gelu_backward(&of_after, "none"),
            Activation::Swiglu => swiglu_backward(before, &of_after)?,
        };
        let of_norm =
            linear_backward(&of_before, [&pass.mlp_norm.output, weights.mlp_in], 1.0, places.mlp_in)?;
        pass.mlp_norm.backward(&of_norm, weights.mlp_norm, of_x, places.mlp_norm)?;
        let of_out = dropped(of_x.shallow_clone(), &pass.attention_dropout);
        let attended = &pass.attended;
        let of_attended =
            linear_backward(&of_out, [&attended.output, weights.attention_out], 1.0, places.attention_out)?;
        let of_qkv = self.attention_backward(attended, &of_attended)?;
        let of_norm = linear_backward(&of_qkv, [&pass.attention_norm.output, weights.qkv], 1.0, places.qkv)?;
        pass.attention_norm.backward(&of_norm, weights.attention_norm, of_x, places.attention_norm)
    }

    /// Gradient of queries, keys and values, (samples x n, 3 width).
    fn attention_backward(&self, pass: &Attended, of_output: &Tensor) -> Result<Tensor, Error> {
        let [query, key, value] = &pass.qkv;
        let (tokens, width) = (query.size()[1], query.size()[2]);
        let samples = query.size()[0] / self.sizes.heads;
        let of_output = self.heads(samples, 1, None).split(of_output)?.get(0);
        let of_all = Tensor::zeros([3, query.size()[0], tokens, width], (query.kind(), query.device()));
        let [of_query, of_key, of_value] = [0, 1, 2].map(|index| of_all.get(index));
        let kind = self.kind();
        for ((start, count), (weights, factors)) in Constants::groups(tokens).zip(&pass.groups) {
            let known = start + count;
            let own = |all: &Tensor| all.narrow(1, start, count).contiguous().to_kind(kind);
            let first = |all: &Tensor| all.narrow(1, 0, known).contiguous().to_kind(kind);
            let (of_own, query) = (own(&of_output), own(query));
            let used = dropped(weights.shallow_clone(), factors).to_kind(kind);
            let add = |place: &Tensor, scale: f64, factors: [&Tensor; 2]| {
                matmul_into(&place.narrow(1, 0, known), Into::Add, scale, factors)
            };
            add(&of_value, 1.0, [&used.transpose(1, 2), &of_own])?;
            let of_weights = Tensor::empty(weights.size().as_slice(), (weights.kind(), weights.device()));
            matmul_into(&of_weights, Into::Write, 1.0, [&of_own, &first(value).transpose(1, 2)])?;
            let of_weights = dropped(of_weights, factors);
            let of_scores = Tensor::internal_softmax_backward_data(&of_weights, weights, -1, weights.kind());
            let of_scores = of_scores.to_kind(kind);
            let place = of_query.narrow(1, start, count);
            matmul_into(&place, Into::Write, self.scale(), [&of_scores, &first(key)])?;
            add(&of_key, self.scale(), [&of_scores.transpose(1, 2), &query])?;
        }
        let angles = self.constants.angles(0, tokens);
        self.heads(samples, 3, angles.as_ref()).join(&of_all)
    }
}

impl Normalised {
    /// Adds the gradient of the input, from that of the output, and writes that of the weight.
    fn backward(
        &self,
        of_output: &Tensor,
        weight: &Tensor,
        of_input: &Tensor,
        of_weight: &Tensor,
    ) -> Result<(), Error> {
        let pass = LayerNorm { input: &self.input, weight, moments: [&self.moments[0], &self.moments[1]] };
        pass.backward(of_output, of_input, of_weight)
    }
}

/// Writes the gradient of a linear layer's weight; returns that of its input. Both are scaled.
fn linear_backward(
    of_output: &Tensor,
    [input, weight]: [&Tensor; 2],
    scale: f64,
    place: &Tensor,
) -> Result<Tensor, Error> {
    let kind = weight.kind();
    let of_output = of_output.to_kind(kind);
    matmul_into(place, Into::Write, scale, [&of_output.transpose(0, 1), &input.to_kind(kind)])?;
    let of_input = Tensor::empty(input.size().as_slice(), (input.kind(), input.device()));
    matmul_into(&of_input, Into::Write, scale, [&of_output, weight])?;
    Ok(of_input)
}
