//! Memory layout of a shard gradient: one data shard's contribution to an update.
//!
//! In this order: the gradient of the summed loss, laid out as the network's parameters; b times the buffer
//! updates of each pass, laid out as its buffers; the scalars. All become means over the global batch when
//! the sum over the shards is divided by V x b.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::state::{ALIGNMENT, Layout, narrow};

/// Offsets, in floats, within the gradients of one network's phases.
#[derive(Clone, Debug, PartialEq)]
pub struct GradLayout {
    parameters: Layout,
    buffers: Layout,
    passes: usize,
}

impl GradLayout {
    /// A layout for these parameters, and for the buffer updates of `passes` passes.
    pub fn of(parameters: Layout, buffers: Layout, passes: usize) -> GradLayout {
        GradLayout { parameters, buffers, passes }
    }

    /// Range of the gradient.
    pub fn gradient(&self) -> Range<usize> {
        0..self.parameters.len()
    }

    /// Ranges of the buffer updates (batch statistics), pass by pass.
    pub fn statistics(&self) -> impl Iterator<Item = Range<usize>> {
        let (start, len) = (self.parameters.len(), self.buffers.len());
        (0..self.passes).map(move |pass| start + pass * len..start + (pass + 1) * len)
    }

    /// Offset of the loss.
    pub fn loss(&self) -> usize {
        self.parameters.len() + self.passes * self.buffers.len()
    }

    /// Range of the summed D outputs (`scores`) for real and for generated samples.
    pub fn scores(&self) -> Range<usize> {
        self.loss() + 1..self.loss() + 3
    }

    /// Range of the signs of the logits of real samples, the input of adaptive augmentation.
    pub fn signs(&self) -> Range<usize> {
        self.loss() + 3..self.loss() + 4
    }

    /// Range of the floats that decide something: all but the D outputs and signs.
    pub fn decisive(&self) -> Range<usize> {
        0..self.loss() + 1
    }

    /// Total length in floats: a multiple of [`ALIGNMENT`].
    pub fn len(&self) -> usize {
        self.loss() + ALIGNMENT
    }

    /// Always false: there is the loss at least.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Number of scalars beside the loss: the D outputs for real and for generated samples, and the signs.
pub(super) const SCORES: usize = 3;

/// Shard gradient: views into one flat buffer.
pub struct ShardGrad {
    /// The whole buffer, with spare capacity behind the layout.
    pub flat: Tensor,
    pub(super) gradients: Vec<Tensor>,
    pub(super) statistics: Vec<Tensor>,
    pub(super) loss: Tensor,
    pub(super) scores: [Tensor; SCORES],
}

impl ShardGrad {
    /// A buffer of `capacity` floats, at least the layout's.
    pub fn new(layout: &GradLayout, capacity: usize, device: Device) -> ShardGrad {
        assert!(capacity >= layout.len(), "a gradient needs {} floats", layout.len());
        let capacity = i64::try_from(capacity).expect("fewer than 2^63 floats");
        let flat = Tensor::zeros([capacity], (Kind::Float, device));
        let statistics = layout.statistics();
        ShardGrad {
            gradients: layout.parameters.views(&narrow(&flat, layout.gradient())),
            statistics: statistics.flat_map(|range| layout.buffers.views(&narrow(&flat, range))).collect(),
            loss: narrow(&flat, layout.loss()..layout.loss() + 1),
            scores: std::array::from_fn(|at| layout.scores().start + at).map(|at| narrow(&flat, at..at + 1)),
            flat,
        }
    }

    /// The whole contribution: the gradient, the buffer updates, the scalars.
    pub fn contents(&self) -> [Vec<&Tensor>; 3] {
        let scalars = std::iter::once(&self.loss).chain(&self.scores);
        [self.gradients.iter().collect(), self.statistics.iter().collect(), scalars.collect()]
    }
}
