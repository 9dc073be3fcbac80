//! Copies of the state in host memory: of all of it, or of the tensors that their owner writes or draws with.

use std::ops::Range;

use bytes::Bytes;
use c10d::HostCopy;
use tch::Tensor;

use crate::nn::tensor_bytes::from_bytes;
use crate::state::{Counters, State, StateLayout, align};

/// Copy of a state, or of some of its tensors, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Number of steps done.
    pub step: u64,
    /// Number of phases done of the next step.
    pub phase: u32,
    /// Integer state.
    pub counters: Counters,
    /// Ranges of the state's buffer that were copied, each with the place of its first float in `floats`.
    ranges: Vec<(Range<usize>, usize)>,
    /// The copied floats, little-endian. Files share this memory.
    floats: Bytes,
}

impl Snapshot {
    /// The whole state with this buffer, after `step` steps and `phase` phases of the next one.
    pub fn whole((step, phase): (u64, u32), flat: Bytes, counters: Counters) -> Snapshot {
        Snapshot { step, phase, counters, ranges: vec![(0..flat.len() / 4, 0)], floats: flat }
    }

    /// Copies these ranges of a state, in ascending order, after `step` steps and `phase` phases of the next.
    ///
    /// # Errors
    /// The host has no memory for them, or a device fails.
    pub fn of(
        state: &State,
        (step, phase): (u64, u32),
        ranges: &[Range<usize>],
    ) -> Result<Snapshot, c10d::Error> {
        let floats = Bytes::from_owner(HostCopy::of(&state.flat, ranges)?);
        let mut end = 0;
        let place = |range: &Range<usize>| {
            let start = end;
            end += range.len();
            (range.clone(), start)
        };
        let ranges = ranges.iter().map(place).collect();
        Ok(Snapshot { step, phase, counters: state.counters, ranges, floats })
    }

    /// Bytes of a range of the state's buffer. They share the snapshot's memory.
    ///
    /// # Panics
    /// The snapshot was not taken of this range.
    pub fn bytes(&self, range: Range<usize>) -> Bytes {
        let after = self.ranges.partition_point(|(copied, _)| copied.start <= range.start);
        let known = after.checked_sub(1).map(|at| &self.ranges[at]);
        let known = known.filter(|(copied, _)| range.end <= copied.end);
        let (copied, place) = known.expect("a snapshot is read for what it was taken for");
        let start = place + range.start - copied.start;
        self.floats.slice(4 * start..4 * (start + range.len()))
    }

    /// Floats of a range of the state's buffer, flat.
    ///
    /// # Panics
    /// The snapshot was not taken of this range.
    pub fn floats(&self, range: Range<usize>) -> Tensor {
        from_bytes(&self.bytes(range))
    }
}

/// Joins ranges of a state's buffer, so that neighbours are copied at once, with the gaps between them.
pub fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= align(last.end) => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Ranges of the weights that samples and evaluations are made with: of each network, and of its average.
pub fn weights(layout: &StateLayout) -> impl Iterator<Item = Range<usize>> {
    layout
        .networks()
        .iter()
        .flat_map(|network| [Some(network.weight_range()), network.average_range()])
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_over_gaps_and_others_are_not() {
        assert_eq!(joined(vec![40..50, 0..3, 16..20, 18..19]), [0..20, 40..50]);
        assert_eq!(joined(vec![0..16, 16..32, 60..61]), [0..32, 60..61]);
        assert_eq!(joined(vec![]), [] as [Range<usize>; 0]);
    }
}
