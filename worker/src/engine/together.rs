//! Passes over several data shards, and the proof that they may be made.
//!
//! A pass over neighbouring shards gives the sum of their gradients in less time than one for each. It has to
//! have the same bits as the shards' own gradients, added up as the tree adds them, and libraries do not
//! promise that. So the first pass over a number of shards in a phase is held against them, on the data of
//! the run, and their sum is what is used; where a bit differs, no other such pass is made. Members of a
//! group may so decide differently: it changes no bit.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

use super::reduce::tree::{Node, TreeSum};
use crate::objective::{Compute, GradLayout, ShardAt, ShardBatch, ShardGrad, ShardsAt};
use crate::state::{State, narrow};

/// Whether passes over so many shards of a phase, by its index, have the bits of the shards' own gradients.
#[derive(Debug, Default)]
pub(crate) struct Together(Mutex<BTreeMap<(u32, u32), bool>>);

/// Inputs of a gradient, and its layout.
pub(super) struct Inputs<'a> {
    /// The state.
    pub state: &'a State,
    /// The samples of some neighbouring shards, where the phase reads any.
    pub samples: &'a dyn Fn(&ShardsAt) -> Option<ShardBatch>,
    /// Layout of the gradient.
    pub layout: &'a GradLayout,
    /// The device.
    pub device: Device,
}

impl Together {
    /// Largest number of shards of one pass, of those that an objective takes together.
    pub(super) fn most(&self, wanted: u32) -> u32 {
        // For all phases alike: what one keeps for another is of the same shards.
        let is_refuted = self.known().values().any(|is_same| !is_same);
        if is_refuted { 1 } else { wanted }
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<(u32, u32), bool>> {
        // Held for a look alone.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Computes the sum of the gradients of shards, in buffers that `buffer` returns for a shard: the sum in
    /// that of the first.
    ///
    /// # Errors
    /// libtorch refused.
    pub(super) fn sum(
        &self,
        at: &ShardsAt,
        inputs: &Inputs<'_>,
        compute: &mut dyn Compute,
        buffer: &mut dyn FnMut(u32) -> ShardGrad,
    ) -> Result<ShardGrad, c10d::Error> {
        let key = (at.phase.index, at.count());
        let known = self.known().get(&key).copied();
        // A refuted pass is asked for until the end of its phase.
        if at.count() == 1 || known == Some(false) {
            return sum_of_each(at, inputs, compute, buffer);
        }
        let samples = (inputs.samples)(at);
        if known == Some(true) {
            let mut sum = buffer(at.shards.start);
            compute.gradients(at, inputs.state, samples.as_ref(), &mut sum)?;
            return Ok(sum);
        }
        let sum = sum_of_each(at, inputs, compute, buffer)?;
        let mut other = ShardGrad::new(inputs.layout, inputs.layout.len(), inputs.device);
        compute.gradients(at, inputs.state, samples.as_ref(), &mut other)?;
        let is_same = bits(&narrow(&sum.flat, 0..inputs.layout.len())).equal(&bits(&other.flat));
        if !is_same {
            tracing::info!(
                "gradients of {} data shards at once have other bits than one after the other: each is computed alone, \
                 which takes longer",
                at.count()
            );
        }
        self.known().insert(key, is_same);
        Ok(sum)
    }
}

/// Computes the gradient of each shard, and adds them up as the tree does.
fn sum_of_each(
    at: &ShardsAt,
    inputs: &Inputs<'_>,
    compute: &mut dyn Compute,
    buffer: &mut dyn FnMut(u32) -> ShardGrad,
) -> Result<ShardGrad, c10d::Error> {
    let mut tree = TreeSum::new(at.count());
    for (leaf, ShardAt { shard, .. }) in (0..).zip(at.each()) {
        let own = ShardsAt { shards: shard..shard + 1, ..at.clone() };
        let mut gradient = buffer(shard);
        compute.gradient(own.first(), inputs.state, (inputs.samples)(&own).as_ref(), &mut gradient)?;
        tree.push(Node::leaf(leaf), gradient);
    }
    let (_, sum) = tree.take().pop().expect("all shards are under the root");
    Ok(sum)
}

fn bits(flat: &Tensor) -> Tensor {
    flat.view_dtype(Kind::Int)
}

#[cfg(test)]
mod tests {
    use ganglion_proto::job::Precision;
    use tch::no_grad;

    use super::*;
    use crate::objective::{Phase, Reads};
    use crate::state::{NetworkId, StateLayout};

    /// Shard v has the gradient v + 1/3; a pass over several adds `error` to their sum.
    #[derive(Default)]
    struct Thirds {
        error: f64,
        alone: usize,
        together: usize,
    }

    fn phase() -> Phase {
        Phase::of(0, NetworkId(0), Reads::Nothing)
    }

    fn third(shard: u32) -> f32 {
        f32::from(u8::try_from(shard).unwrap()) + 1.0 / 3.0
    }

    impl Compute for Thirds {
        fn gradient(
            &mut self,
            at: ShardAt,
            _: &State,
            _: Option<&ShardBatch>,
            out: &mut ShardGrad,
        ) -> Result<(), c10d::Error> {
            self.alone += 1;
            let _ = no_grad(|| out.flat.fill_(f64::from(third(at.shard))));
            Ok(())
        }

        fn gradients(
            &mut self,
            at: &ShardsAt,
            _: &State,
            _: Option<&ShardBatch>,
            out: &mut ShardGrad,
        ) -> Result<(), c10d::Error> {
            self.together += 1;
            let of = |shard| Tensor::from(third(shard));
            let sum = at.shards.clone().map(of).reduce(|sum, next| sum + next).unwrap() + self.error;
            no_grad(|| out.flat.copy_(&sum));
            Ok(())
        }
    }

    /// Sum over two shards, computed as often as told.
    fn sums(compute: &mut Thirds, times: usize) -> (Vec<f32>, u32) {
        let layout = GradLayout::default();
        let state = State::zeros(StateLayout::new(&[], &[], Precision::Fp32), Device::Cpu);
        let (together, device) = (Together::default(), Device::Cpu);
        let inputs = Inputs { state: &state, samples: &|_| None, layout: &layout, device };
        let at = ShardsAt { phase: phase(), step: 0, shards: 4..6 };
        let sum = |_| {
            let mut buffer = |_| ShardGrad::new(&layout, layout.len(), device);
            let sum = together.sum(&at, &inputs, compute, &mut buffer).unwrap();
            Vec::<f32>::try_from(&sum.flat).unwrap()[0]
        };
        ((0..times).map(sum).collect(), together.most(8))
    }

    #[test]
    fn a_pass_over_several_shards_is_proved_once_and_then_made() {
        let mut right = Thirds::default();
        let wanted = third(4) + third(5);
        assert_eq!(sums(&mut right, 3), (vec![wanted; 3], 8));
        assert_eq!((right.alone, right.together), (2, 3), "the first is held against those of each");
    }

    #[test]
    fn a_pass_with_another_bit_is_never_used() {
        let mut wrong = Thirds { error: 1e-6, ..Thirds::default() };
        let wanted = third(4) + third(5);
        assert_eq!(sums(&mut wrong, 3), (vec![wanted; 3], 1), "each is computed alone from then on");
        assert_eq!((wrong.alone, wrong.together), (6, 1));
    }
}
