//! Spectral normalisation: Miyato, Kataoka, Koyama and Yoshida (2018), "Spectral Normalization for Generative
//! Adversarial Networks", equation 8 and algorithm 1.
//!
//! The greatest singular value of a weight, taken as a matrix (outputs, everything else), is estimated by
//! one step of the power method from a vector that is one of the network's buffers. The buffer update of a
//! pass is the next vector; it depends on the weight and the vector alone and not on the samples, so it is
//! the same in all shard gradients of a phase.

use tch::{Tensor, no_grad};

use super::pieces::in_single;
use super::{Mode, Pass};

/// Returns the weight divided by the estimate of its greatest singular value, with a gradient through the
/// weight. `buffer` is the index of its vector among the network's buffers.
pub(super) fn normalised(weight: &Tensor, buffer: usize, pass: &mut Pass<'_>) -> Tensor {
    // In fp32 in every precision: the vector is a buffer, and rounding would add up over the steps.
    let matrix = in_single(&weight.flatten(1, -1));
    // Equation 8 takes the vectors for constants: the gradient goes through the weight alone.
    let (left, right) = no_grad(|| {
        let right = unit(&matrix.transpose(0, 1).mv(&pass.buffers[buffer]));
        (unit(&matrix.mv(&right)), right)
    });
    let norm = left.dot(&matrix.mv(&right));
    // Inference must not move the vector (D1).
    if pass.mode == Mode::Batch {
        pass.statistics.push(left);
    }
    weight / norm.to_kind(weight.kind())
}

fn unit(vector: &Tensor) -> Tensor {
    // A weight of zeros has no direction.
    vector / vector.norm().clamp_min(1e-12)
}
