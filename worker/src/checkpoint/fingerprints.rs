//! Fingerprints of a state's tensors, by which the members of a group make sure that all hold one state.
//!
//! Each member computes them where the state is. A writer computes those of its tensors once more, from the
//! copy that it writes: if the copy is damaged, what it reports is not what the others report.

use ganglion_membership::Position;
use tch::{Device, Tensor};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::snapshot::Snapshot;
use crate::nn::tensor_bytes::from_bytes;
use crate::state::{Counters, NamedTensor, StateLayout, narrow};

/// Fingerprints of a state's tensors, in the order of the buffer.
#[derive(Clone, Debug)]
pub struct Fingerprints {
    /// Device that holds the state: GPUs compute other fingerprints than CPUs.
    device: Device,
    tensors: Vec<(NamedTensor, u64)>,
}

impl Fingerprints {
    /// Computes the fingerprints of a state with this buffer.
    ///
    /// # Errors
    /// A device fails.
    pub fn of(layout: &StateLayout, flat: &Tensor) -> Result<Fingerprints, c10d::Error> {
        let of = |tensor: NamedTensor| {
            let fingerprint = c10d::aten::fingerprint(&narrow(flat, tensor.range.clone()), 0)?;
            Ok((tensor, fingerprint))
        };
        let tensors = layout.tensors().into_iter().map(of).collect::<Result<_, c10d::Error>>()?;
        Ok(Fingerprints { device: flat.device(), tensors })
    }

    /// Fingerprint of the whole state, with these tensors as a snapshot has them.
    pub(super) fn with_copies(
        &self,
        snapshot: &Snapshot,
        copied: &[NamedTensor],
    ) -> Result<u64, c10d::Error> {
        let mut words = Vec::with_capacity(8 * self.tensors.len());
        for (tensor, fingerprint) in &self.tensors {
            let is_copied = copied.iter().any(|copied| copied.range == tensor.range);
            let word = if is_copied { self.of_copy(snapshot, tensor)? } else { *fingerprint };
            words.extend(word.to_le_bytes());
        }
        let Counters { position: Position(position), ledger, skipped } = snapshot.counters;
        words.extend([position, ledger, skipped].iter().flat_map(|counter| counter.to_le_bytes()));
        Ok(xxh3_64_with_seed(&words, 0))
    }

    fn of_copy(&self, snapshot: &Snapshot, tensor: &NamedTensor) -> Result<u64, c10d::Error> {
        let bytes = snapshot.bytes(tensor.range.clone());
        match self.device {
            // The same as `fingerprint`, without a tensor in between.
            Device::Cpu => Ok(xxh3_64_with_seed(&bytes, 0)),
            device => c10d::aten::fingerprint_of_copy(&from_bytes(&bytes), device, 0),
        }
    }
}
