//! Dropout (Srivastava et al., 2014): which activations of a pass survive.

use std::vec::IntoIter;

use tch::Tensor;

use super::network::{Constants, Sizes};
use crate::random::Key;

/// Factors of a tensor's activations, where there is dropout: 0, or the reciprocal of the probability that
/// one survives.
pub(super) type Factors = Option<Tensor>;

/// Factors of all activations of a pass, in its order.
pub(super) struct Dropout(IntoIter<Tensor>);

impl Dropout {
    pub(super) fn new(factors: Vec<Tensor>) -> Dropout {
        Dropout(factors.into_iter())
    }

    /// Draws the factors of a pass over `samples` of a whole context, of which a share is dropped.
    pub(super) fn draw(key: Key, dropped: f64, sizes: &Sizes, samples: i64) -> Vec<Tensor> {
        let kept = 1.0 - dropped;
        let mut stream = key.stream();
        let mut factors = |shape: Vec<i64>| {
            let numel = usize::try_from(shape.iter().product::<i64>()).expect("sizes of a network");
            (Tensor::from_slice(&stream.bernoulli(kept, numel)) / kept).view(shape.as_slice())
        };
        shapes(sizes, samples).into_iter().map(&mut factors).collect()
    }

    /// Factors of the next activations.
    pub(super) fn next(&mut self) -> Tensor {
        self.0.next().expect("factors of each tensor of the pass")
    }
}

/// Shapes of what is dropped in a pass: embeddings, then of each block attention's weights by groups of
/// queries, and the outputs of its two halves.
fn shapes(sizes: &Sizes, samples: i64) -> Vec<Vec<i64>> {
    let rows = vec![samples * sizes.context, sizes.width];
    let mut shapes = vec![rows.clone()];
    for _ in 0..sizes.layers {
        let groups = Constants::groups(sizes.context);
        shapes.extend(groups.map(|(start, count)| vec![samples * sizes.heads, count, start + count]));
        shapes.extend([rows.clone(), rows.clone()]);
    }
    shapes
}

/// Multiplies by factors of dropout.
pub(super) fn dropped(x: Tensor, factors: &Factors) -> Tensor {
    match factors {
        Some(factors) => x * factors,
        None => x,
    }
}
