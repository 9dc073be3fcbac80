//! Memory layout of a shard gradient: one data shard's contribution to an update.
//!
//! In this order: the gradient of the summed loss, laid out as the network's parameters; b times the buffer
//! updates of each pass, laid out as its buffers; the scalars. All become means over the global batch when
//! the sum over the shards is divided by V x b.

use std::borrow::Cow;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::state::{Layout, align, narrow};

/// A scalar of a shard gradient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScalarSpec {
    /// Name in metrics.
    pub name: Cow<'static, str>,
    /// Use of the mean over the global batch.
    pub role: ScalarRole,
}

impl ScalarSpec {
    /// A scalar of this name.
    pub fn new(name: impl Into<Cow<'static, str>>, role: ScalarRole) -> ScalarSpec {
        ScalarSpec { name: name.into(), role }
    }
}

/// Use of a scalar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScalarRole {
    /// A loss: reported, and an update is not applied where it is not finite. Losses come first.
    Loss,
    /// A diagnostic: reported, and decides nothing.
    Diagnostic,
    /// An input of [`Objective::after_update`](super::Objective::after_update); not reported.
    Internal,
}

/// Offsets, in floats, within the gradients of a phase.
#[derive(Clone, Debug, PartialEq)]
pub struct GradLayout {
    parameters: Layout,
    buffers: Layout,
    passes: usize,
    scalars: Vec<ScalarSpec>,
}

impl GradLayout {
    /// A layout for these parameters, for the buffer updates of `passes` passes, and for scalars.
    ///
    /// # Panics
    /// A loss comes after another scalar.
    pub fn of(parameters: Layout, buffers: Layout, passes: usize, scalars: Vec<ScalarSpec>) -> GradLayout {
        let is_other = |scalar: &ScalarSpec| scalar.role != ScalarRole::Loss;
        assert!(scalars.is_sorted_by_key(is_other), "losses come before other scalars: {scalars:?}");
        GradLayout { parameters, buffers, passes, scalars }
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

    /// The scalars, in order.
    pub fn scalars(&self) -> &[ScalarSpec] {
        &self.scalars
    }

    /// Range of all scalars.
    pub fn scalar_range(&self) -> Range<usize> {
        let start = self.parameters.len() + self.passes * self.buffers.len();
        start..start + self.scalars.len()
    }

    /// Range of the losses.
    pub fn losses(&self) -> Range<usize> {
        let start = self.scalar_range().start;
        start..start + self.scalars.iter().filter(|scalar| scalar.role == ScalarRole::Loss).count()
    }

    /// Range of the floats that must be finite: all but the scalars behind the losses.
    pub fn decisive(&self) -> Range<usize> {
        // A diagnostic that is not finite must not stop a run.
        0..self.losses().end
    }

    /// Total length in floats: a multiple of [`ALIGNMENT`](crate::state::ALIGNMENT).
    pub fn len(&self) -> usize {
        // The rest up to 64 bytes is summed as well, and read by nobody.
        self.scalar_range().start + align(self.scalars.len().max(1))
    }

    /// Always false: there is room for a scalar at least.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Shard gradient: views into one flat buffer. A buffer is used again: an objective writes every tensor.
pub struct ShardGrad {
    /// The whole buffer, with spare capacity behind the layout.
    pub flat: Tensor,
    /// Gradient of the summed loss, by parameter.
    pub gradients: Vec<Tensor>,
    /// b times the buffer updates, by pass and buffer.
    pub statistics: Vec<Tensor>,
    /// Scalars, each of one element, summed over the shard's samples.
    pub scalars: Vec<Tensor>,
}

impl ShardGrad {
    /// A buffer of `capacity` floats, at least the layout's.
    pub fn new(layout: &GradLayout, capacity: usize, device: Device) -> ShardGrad {
        // Views of a shorter buffer would lie in other memory.
        assert!(capacity >= layout.len(), "a gradient needs {} floats", layout.len());
        let capacity = i64::try_from(capacity).expect("fewer than 2^63 floats");
        // Also the spare capacity is summed and sent: it must be numbers.
        let flat = Tensor::zeros([capacity], (Kind::Float, device));
        let statistics = layout.statistics();
        ShardGrad {
            gradients: layout.parameters.views(&narrow(&flat, layout.gradient())),
            statistics: statistics.flat_map(|range| layout.buffers.views(&narrow(&flat, range))).collect(),
            scalars: layout.scalar_range().map(|at| narrow(&flat, at..at + 1)).collect(),
            flat,
        }
    }
}
