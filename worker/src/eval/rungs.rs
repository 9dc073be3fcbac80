//! Reference rungs: metrics of samples of known quality, as a scale for reading those of a generator.

use tch::Tensor;

use super::digits::{Digits, SHAPE};
use super::features::chosen;
use super::judge::Judge;
use super::{EvalError, images, some_of};
use crate::data::DataSet;
use crate::random::{Key, Purpose};

/// The class left out of one rung, and the only class of another.
const CHOSEN: [i64; 2] = [9, 3];
/// Side in pixels of the square whose mean blurs.
const BLUR: i64 = 3;

/// Samples of known quality.
#[derive(Debug)]
pub(crate) struct Rung {
    /// Name in the table.
    pub name: &'static str,
    /// Images (n, c, h, w) in [-1, 1].
    pub images: Tensor,
}

/// Builds the rungs, from samples outside the evaluator's reference and some inside it.
///
/// # Errors
/// A sample cannot be read.
pub(crate) fn rungs(judge: &Judge, data: &DataSet, held_out: &DataSet) -> Result<Vec<Rung>, EvalError> {
    let all = images(held_out, &(0..held_out.len()).collect::<Vec<_>>())?;
    let count = judge.samples().min(held_out.len());
    let some = |of: &Tensor| {
        let len = usize::try_from(of.size()[0]).unwrap_or_default();
        let places: Vec<i64> =
            some_of(len, count).into_iter().filter_map(|n| i64::try_from(n).ok()).collect();
        of.index_select(0, &Tensor::from_slice(&places))
    };
    let real = some(&all);
    let mut rungs = Vec::new();
    let mut add = |name, images| rungs.push(Rung { name, images });
    add("real", real.shallow_clone());
    add("copies of the data", images(data, &chosen(data, count))?);
    if held_out.shape().image() == Some(SHAPE) {
        // By the classifier's own judgement, as the metrics are.
        let told = Digits::bundled()?.look(&all).logits.argmax(-1, false);
        let of = |mask: Tensor| some(&all.index_select(0, &mask.nonzero().flatten(0, -1)));
        add("nine of ten digits", of(told.not_equal(CHOSEN[0])));
        add("one digit", of(told.eq(CHOSEN[1])));
    }
    let sides = [BLUR, BLUR];
    // Keeps the size of the images.
    add("blurred", real.avg_pool2d(sides, [1, 1], [BLUR / 2, BLUR / 2], false, false, None::<i64>));
    let key = Key { seed: 0, step: 0, phase: 2, shard: 0, purpose: Purpose::Evaluation };
    add("noise", key.uniform(-1.0, 1.0, real.numel()).view(real.size().as_slice()));
    add("one image again and again", real.narrow(0, 0, 1).expand_as(&real).contiguous());
    Ok(rungs)
}
