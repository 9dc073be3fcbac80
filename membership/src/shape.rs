//! Shape of a step: its phases, and which of them read new samples.

use std::fmt;

use crate::types::Position;

/// Number of phases in a step, and the phases that read the next samples of the stream. All members of a run
/// have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepShape {
    phases: u32,
    /// Indices, ascending.
    readers: Vec<u32>,
}

impl StepShape {
    /// Returns a shape; `None` unless `readers` are ascending indices of phases, at least one.
    pub fn new(phases: u32, readers: Vec<u32>) -> Option<StepShape> {
        let ascend = readers.windows(2).all(|pair| pair[0] < pair[1]);
        // Without any the stream would stand still, and epochs would have no length.
        let are_phases = readers.last().is_some_and(|last| *last < phases);
        (ascend && are_phases).then_some(StepShape { phases, readers })
    }

    /// Number of phases: updates in one step.
    pub fn phases(&self) -> u64 {
        u64::from(self.phases)
    }

    /// Indices of the phases that read the next samples, ascending.
    pub fn readers(&self) -> &[u32] {
        &self.readers
    }

    /// Number of whole steps before an update index.
    pub fn steps(&self, position: Position) -> u64 {
        position.0 / self.phases()
    }

    /// Index of the phase that begins at an update index.
    pub fn phase(&self, position: Position) -> u64 {
        position.0 % self.phases()
    }

    /// Number of batches that a step takes from the stream.
    pub fn batches(&self) -> u64 {
        self.readers.len() as u64
    }

    /// Number of batches that the first `phases` phases of a step take from the stream.
    pub fn batches_of(&self, phases: u64) -> u64 {
        self.readers.partition_point(|reader| u64::from(*reader) < phases) as u64
    }

    /// Number of batches that were taken from the stream before an update index.
    pub fn batches_before(&self, position: Position) -> u64 {
        self.steps(position) * self.batches() + self.batches_of(self.phase(position))
    }
}

impl fmt::Display for StepShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} phases, new samples in {:?}", self.phases, self.readers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_have_a_step_a_phase_and_a_place_in_the_stream() {
        // Shape, phases in order: whether each reads.
        for reads in [vec![true], vec![true, true, false], vec![false, true], vec![true, false, false, true]]
        {
            let readers = (0..).zip(&reads).filter(|(_, reads)| **reads).map(|(phase, _)| phase).collect();
            let shape = StepShape::new(u32::try_from(reads.len()).unwrap(), readers).unwrap();
            let (mut position, mut batches) = (0, 0);
            for step in 0..3 {
                for (phase, reads) in (0..).zip(&reads) {
                    let at = Position(position);
                    assert_eq!((shape.steps(at), shape.phase(at)), (step, phase), "{shape}");
                    assert_eq!(shape.batches_before(at), batches, "{shape} at {position}");
                    position += 1;
                    batches += u64::from(*reads);
                }
                assert_eq!(batches, (step + 1) * shape.batches(), "{shape}");
            }
        }
    }

    #[test]
    fn a_shape_has_phases_that_read_and_no_others() {
        for (phases, readers) in [(0, vec![]), (1, vec![]), (1, vec![1]), (3, vec![1, 0]), (3, vec![1, 1])] {
            assert_eq!(StepShape::new(phases, readers.clone()), None, "{phases} {readers:?}");
        }
        let told = StepShape::new(3, vec![0, 2]).unwrap().to_string();
        assert_eq!(told, "3 phases, new samples in [0, 2]");
    }
}
