//! Memory layout of a shard gradient: one data shard's contribution to an update.
//!
//! In this order: the gradient of the summed loss, laid out as the parameters of the updated networks, one
//! network after the other; b times the updates of the followed buffers, pass by pass; the scalars. All become
//! means over the global batch when the sum over the shards is divided by V x b.
//!
//! Behind the scalars of a phase that clips there is a place for the norm of the reduced gradient: 0 in a shard's,
//! and written by the commit.

use std::borrow::Cow;
use std::ops::Range;

use tch::{Device, Kind, Tensor, no_grad};

use crate::nn::Follow;
use crate::state::{BufferId, Layout, NetworkId, NetworkSet, StateLayout, align, narrow};

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
    /// The norm of the reduced gradient: reported, and the last of all. No objective has such a scalar.
    Norm,
}

/// Neighbouring buffers of a network that follow their updates by one rule.
#[derive(Clone, Debug, PartialEq)]
pub struct BufferRun {
    /// The network.
    pub network: NetworkId,
    /// Range within the network's buffers.
    pub buffers: Range<usize>,
    /// Range within the buffer updates of a pass.
    pub updates: Range<usize>,
    /// Rule by which the buffers follow.
    pub follow: Follow,
}

/// Offsets, in floats, within the gradients of a phase.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GradLayout {
    parameters: Layout,
    /// Range of each updated network's gradient.
    networks: Vec<(NetworkId, Range<usize>)>,
    buffers: Layout,
    runs: Vec<BufferRun>,
    passes: usize,
    scalars: Vec<ScalarSpec>,
}

impl GradLayout {
    /// A layout for the gradients of these networks' parameters, for the updates of these buffers in `passes`
    /// passes, and for scalars. The default one has room for none of them.
    ///
    /// # Panics
    /// A loss comes after another scalar, or the state has no such network or buffer.
    pub fn new(
        state: &StateLayout,
        updates: NetworkSet,
        follows: &[BufferId],
        passes: usize,
        scalars: Vec<ScalarSpec>,
    ) -> GradLayout {
        let is_other = |scalar: &ScalarSpec| scalar.role != ScalarRole::Loss;
        assert!(scalars.is_sorted_by_key(is_other), "losses come before other scalars: {scalars:?}");
        let of_network = |network| state.network(network).parameters.entries().map(|(spec, _)| spec.clone());
        let parameters = Layout::new(updates.iter().flat_map(of_network).collect());
        let (mut end, mut networks) = (0, Vec::new());
        for network in updates.iter() {
            let start = end;
            end += state.network(network).parameters.len();
            networks.push((network, start..end));
        }
        let of_state = |id: &BufferId| state.network(id.network).buffers.entry(id.index);
        let buffers = Layout::new(follows.iter().map(|id| of_state(id).0.clone()).collect());
        let mut runs: Vec<BufferRun> = Vec::new();
        for (id, (spec, offset)) in follows.iter().zip(buffers.entries()) {
            let (from, len) = (of_state(id).1, align(spec.numel()));
            let (network, follow) = (id.network, spec.follow);
            match runs.last_mut() {
                // Neighbours in the state and in the gradient: one operation for all of them.
                Some(run) if (run.network, run.buffers.end, run.follow) == (network, from, follow) => {
                    (run.buffers.end, run.updates.end) = (from + len, offset + len);
                }
                _ => {
                    let (buffers, updates) = (from..from + len, offset..offset + len);
                    runs.push(BufferRun { network, buffers, updates, follow });
                }
            }
        }
        GradLayout { parameters, networks, buffers, runs, passes, scalars }
    }

    /// Whether another layout has all but its scalars in the same places.
    pub fn is_alike(&self, other: &GradLayout) -> bool {
        let but_scalars = |layout: &GradLayout| GradLayout { scalars: Vec::new(), ..layout.clone() };
        but_scalars(self) == but_scalars(other)
    }

    /// Range of the gradient.
    pub fn gradient(&self) -> Range<usize> {
        0..self.parameters.len()
    }

    /// The updated networks, each with the range of its gradient.
    pub fn networks(&self) -> &[(NetworkId, Range<usize>)] {
        &self.networks
    }

    /// The followed buffers.
    pub fn buffer_runs(&self) -> &[BufferRun] {
        &self.runs
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

    /// Place of the norm of the reduced gradient, if the phase clips.
    pub fn norm(&self) -> Option<usize> {
        let is_there = self.scalars.last().is_some_and(|scalar| scalar.role == ScalarRole::Norm);
        is_there.then(|| self.scalar_range().end - 1)
    }

    /// Range of the objective's scalars.
    fn own_scalars(&self) -> Range<usize> {
        let all = self.scalar_range();
        all.start..self.norm().unwrap_or(all.end)
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

    /// Ranges that no tensor takes in a buffer of `capacity` floats.
    fn gaps(&self, capacity: usize) -> impl Iterator<Item = Range<usize>> {
        let passes = self.statistics().map(|range| (&self.buffers, range.start));
        let tensors = std::iter::once((&self.parameters, 0)).chain(passes).flat_map(|(layout, start)| {
            layout.entries().map(move |(spec, offset)| start + offset..start + offset + spec.numel())
        });
        let mut end = 0;
        let taken = tensors.chain([self.own_scalars(), capacity..capacity]);
        let gaps = taken.map(move |range| std::mem::replace(&mut end, range.end)..range.start);
        gaps.filter(|gap| !gap.is_empty())
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
    /// The buffer, with spare capacity behind the layout.
    pub flat: Tensor,
    /// The memory that it begins.
    memory: Tensor,
    /// Gradient of the summed loss, by parameter: network by network, in the order of their indices.
    pub gradients: Vec<Tensor>,
    /// b times the buffer updates, by pass and by buffer as [`Objective::follows`](super::Objective::follows)
    /// names them.
    pub statistics: Vec<Tensor>,
    /// Scalars, each of one element, summed over the shard's samples.
    pub scalars: Vec<Tensor>,
}

impl ShardGrad {
    /// A buffer of `capacity` floats, at least the layout's.
    pub fn new(layout: &GradLayout, capacity: usize, device: Device) -> ShardGrad {
        let signed = i64::try_from(capacity).expect("fewer than 2^63 floats");
        ShardGrad::over(layout, Tensor::zeros([signed], (Kind::Float, device)), capacity)
    }

    /// A buffer of `capacity` floats, at least the layout's, in memory of at least as many. It may have
    /// been that of a gradient of another layout.
    pub fn over(layout: &GradLayout, memory: Tensor, capacity: usize) -> ShardGrad {
        // Views of a shorter buffer would lie in other memory.
        assert!(capacity >= layout.len(), "a gradient needs {} floats", layout.len());
        let flat = narrow(&memory, 0..capacity);
        let gradients = layout.parameters.views(&narrow(&flat, layout.gradient()));
        let views = |range| layout.buffers.views(&narrow(&flat, range));
        let statistics: Vec<Tensor> = layout.statistics().flat_map(views).collect();
        let scalars = scalars(&flat, layout);
        clear_gaps(&flat, layout);
        ShardGrad { flat, memory, gradients, statistics, scalars }
    }

    /// The same buffer for gradients of an alike layout, if something else lay in its memory meanwhile.
    pub fn cleared_for(self, layout: &GradLayout) -> ShardGrad {
        let cleared = self.with_scalars_of(layout);
        clear_gaps(&cleared.flat, layout);
        cleared
    }

    /// The memory, for a buffer of another layout.
    pub fn into_memory(self) -> Tensor {
        self.memory
    }

    /// The same buffer for gradients of an alike layout.
    pub fn with_scalars_of(mut self, layout: &GradLayout) -> ShardGrad {
        // Mostly it had this layout before.
        if self.scalars.len() != layout.own_scalars().len() {
            self.scalars = scalars(&self.flat, layout);
        }
        if let Some(norm) = layout.norm() {
            // Perhaps the place of a scalar of another phase.
            let _ = narrow(&self.flat, norm..norm + 1).zero_();
        }
        self
    }
}

/// Clears what is no tensor's.
fn clear_gaps(flat: &Tensor, layout: &GradLayout) {
    // Also the gaps are summed, sent and committed; a state's must stay zero.
    no_grad(|| {
        layout.gaps(flat.numel()).for_each(|gap| {
            let _ = narrow(flat, gap).zero_();
        });
    });
}

fn scalars(flat: &Tensor, layout: &GradLayout) -> Vec<Tensor> {
    layout.own_scalars().map(|at| narrow(flat, at..at + 1)).collect()
}
