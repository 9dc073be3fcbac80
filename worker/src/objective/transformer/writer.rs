//! Writing of tokens, one after the other, with a cache of keys and values.
//!
//! 1. Token i of sample s follows from the weights, the tokens before, and draw i of a stream that is keyed by s.
//! 2. A prediction sees at most a context of tokens. When that is full, its older half is dropped, and the rest is
//!    passed through the network anew: what a prediction sees is a function of its place alone.

use c10d::Error;
use tch::{Kind, Tensor};

use super::choice::Choice;
use super::network::Sizes;
use super::pass::{Cache, Network};
use crate::random::Stream;

/// Writes the tokens of several samples side by side.
pub(super) struct Writer<'a> {
    network: Network<'a>,
    cache: Cache,
    /// Number of first tokens that are no longer seen.
    dropped: usize,
    /// Tokens of each sample: as many of one as of another.
    tokens: Vec<Vec<i64>>,
    draws: Vec<Stream>,
    choice: Choice,
}

impl<'a> Writer<'a> {
    /// Begins samples with these tokens, at least one, and these draws.
    pub(crate) fn new(
        network: Network<'a>,
        tokens: Vec<Vec<i64>>,
        draws: Vec<Stream>,
        choice: Choice,
    ) -> Writer<'a> {
        let samples = i64::try_from(tokens.len()).expect("a few samples");
        let cache = Cache::new(network.sizes, samples, network.weights.norm);
        Writer { network, cache, dropped: 0, tokens, draws, choice }
    }

    /// Logits of the next token of each sample, (samples, vocabulary).
    fn logits(&mut self) -> Result<Tensor, Error> {
        let count = self.tokens[0].len();
        let dropped = dropped(self.network.sizes, count);
        if dropped != self.dropped {
            (self.dropped, self.cache.past) = (dropped, 0);
        }
        let known = dropped + usize::try_from(self.cache.past).expect("a count");
        let new: Vec<i64> = self.tokens.iter().flat_map(|tokens| &tokens[known..]).copied().collect();
        let samples = i64::try_from(self.tokens.len()).expect("a few samples");
        let device = self.network.weights.norm.device();
        let new = Tensor::from_slice(&new).view([samples, -1]).to_device(device);
        let x = self.network.infer(&new, Some(&mut self.cache))?;
        let last = x.view([samples, -1, self.network.sizes.width]).select(1, -1);
        self.network.logits(&last)
    }

    /// Adds a token to each sample; returns the new ones.
    pub(crate) fn write(&mut self) -> Result<Vec<i64>, Error> {
        let logits = self.logits()?.to_device(tch::Device::Cpu).to_kind(Kind::Float);
        let (mut new, choice) = (Vec::new(), self.choice);
        for ((row, tokens), draws) in (0..).zip(&mut self.tokens).zip(&mut self.draws) {
            let logits = Vec::<f32>::try_from(logits.get(row)).expect("floats on the CPU");
            let draw = f64::from(draws.uniform(0.0, 1.0, 1)[0]);
            let token = i64::try_from(choice.token(&logits, draw)).expect("a token");
            tokens.push(token);
            new.push(token);
        }
        Ok(new)
    }
}

/// Number of first tokens that the prediction behind `count` tokens does not see.
pub(super) fn dropped(sizes: &Sizes, count: usize) -> usize {
    let context = usize::try_from(sizes.context).expect("a positive number");
    let half = (context / 2).max(1);
    count.saturating_sub(context).div_ceil(half) * half
}
