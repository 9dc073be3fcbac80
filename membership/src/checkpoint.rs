//! Assembly of a checkpoint from the files that its writers report.
//!
//! 1. A checkpoint is complete when each of its files was reported, all with one fingerprint of the state.
//! 2. A file reported twice does no harm: the same state gives the same bytes.
//! 3. Two fingerprints for one update index are a divergence and never make a checkpoint.
//! 4. The state digest is put together from the writers' shares: no member hashes all of a state.

use std::collections::BTreeMap;

use crate::digest::{self, Share};
use crate::shape::StepShape;
use crate::types::Position;

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// File name in the checkpoint's folder.
    pub file: String,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// blake3 of its content, in hex.
    pub blake3: String,
}

/// A report that a file of a checkpoint is on the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenPart {
    /// Count of steps done when the state was taken.
    pub step: u64,
    /// Count of phases done of the next step.
    pub phase: u32,
    /// The file's index among the checkpoint's files.
    pub index: u32,
    /// Number of files in the checkpoint.
    pub count: u32,
    /// Name, length and hash of the file.
    pub file: StoredFile,
    /// Fingerprint of the whole state, as its writer held it.
    pub fingerprint: u64,
    /// Share of the file in the state digest: the tensors in it. None of a file derived from the state.
    pub share: Share,
}

/// A whole checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Update index of the state: the count of committed phases.
    pub position: Position,
    /// Count of steps done.
    pub step: u64,
    /// Count of phases done of the next step.
    pub phase: u32,
    /// All its files, by index.
    pub files: Vec<StoredFile>,
    /// blake3 of the whole state, in hex.
    pub state_digest: String,
}

impl Checkpoint {
    /// Returns the folder name of a checkpoint after `step` steps and `phase` phases of the next
    /// one.
    pub fn folder_of(step: u64, phase: u32) -> String {
        match phase {
            0 => format!("step-{step:08}"),
            _ => format!("step-{step:08}-phase-{phase}"),
        }
    }

    /// Returns the steps and phases that a folder's name stands for; `None` for any other name.
    /// Folders are ordered by these numbers: as texts, names of nine digits come before those of
    /// eight.
    pub fn place_of(folder: &str) -> Option<(u64, u32)> {
        let numbers = folder.strip_prefix("step-")?;
        let (step, phase) = numbers.split_once("-phase-").unwrap_or((numbers, "0"));
        let (step, phase) = (step.parse().ok()?, phase.parse().ok()?);
        // Only the one spelling that a coordinator writes counts: `parse` also takes a sign, or fewer
        // digits.
        (Checkpoint::folder_of(step, phase) == folder).then_some((step, phase))
    }

    /// Returns the folder name of this checkpoint.
    pub fn folder(&self) -> String {
        Checkpoint::folder_of(self.step, self.phase)
    }

    /// Returns the files that hold the state, in order. The other files are derived from it for
    /// other readers.
    pub fn state_files(&self) -> Vec<StoredFile> {
        // Members that read a state need only these; a generator's file is for other programs.
        let is_state = |file: &&StoredFile| file.file.starts_with("state-");
        self.files.iter().filter(is_state).cloned().collect()
    }
}

/// Error: the files that writers reported for one update index are not of one state. The text says at which
/// step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartConflict(pub String);

/// Incomplete checkpoints, by step and phase.
#[derive(Debug, Default)]
pub struct Assembly {
    open: BTreeMap<(u64, u32), Open>,
}

#[derive(Debug)]
struct Open {
    count: u32,
    fingerprint: u64,
    files: BTreeMap<u32, (StoredFile, Share)>,
}

impl Assembly {
    /// Adds a report; returns the checkpoint that it completes.
    pub fn add(&mut self, part: WrittenPart, shape: &StepShape) -> Result<Option<Checkpoint>, PartConflict> {
        let key = (part.step, part.phase);
        // The first report sets the fingerprint that all others are held against.
        let (count, fingerprint) = (part.count, part.fingerprint);
        let new = || Open { count, fingerprint, files: BTreeMap::new() };
        let open = self.open.entry(key).or_insert_with(new);
        // The number of files is a function of the job (M10), so another one is another state as well.
        if (open.fingerprint, open.count) != (fingerprint, count) {
            return Err(PartConflict(format!("the workers' states differ at step {}", part.step)));
        }
        // From a worker, hence not trusted: an index out of range must not complete the count.
        if part.index < part.count {
            open.files.insert(part.index, (part.file, part.share));
        }
        if open.files.len() < open.count as usize {
            return Ok(None);
        }
        let Some(open) = self.open.remove(&key) else { return Ok(None) };
        let Some(state_digest) = digest::whole(open.files.values().map(|(_, share)| share)) else {
            let what = format!("the workers' files of step {} do not make up one state", part.step);
            return Err(PartConflict(what));
        };
        // A folder is named after steps and phases; members compare update indices.
        let position = part.step * shape.phases() + u64::from(part.phase);
        Ok(Some(Checkpoint {
            position: Position(position),
            step: part.step,
            phase: part.phase,
            files: open.files.into_values().map(|(file, _)| file).collect(),
            state_digest,
        }))
    }

    /// Discards what was reported of a committed checkpoint after it was complete.
    pub fn close(&mut self, step: u64, phase: u32) {
        self.open.remove(&(step, phase));
    }

    /// Discards incomplete checkpoints older than a committed one; returns their steps.
    pub fn forget_before(&mut self, step: u64, phase: u32) -> Vec<u64> {
        // Keys are ordered by step, then phase, so all that lie below this one are older.
        let kept = self.open.split_off(&(step, phase));
        std::mem::replace(&mut self.open, kept).into_keys().map(|(step, _)| step).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Stretch;

    fn two() -> StepShape {
        StepShape::new(2, vec![0]).unwrap()
    }

    /// Text that stands for the state, of which each file has one half.
    const STATE: &str = "the whole state";

    fn part(index: u32, fingerprint: u64) -> WrittenPart {
        let file = StoredFile { file: format!("state-{index}"), bytes: 1, blake3: "h".into() };
        let (total, half) = (STATE.len() as u64, STATE.len() / 2);
        let (start, text) = [(0, &STATE[..half]), (half as u64, &STATE[half..])][index as usize];
        let share = Share { total, stretches: vec![Stretch::of(total, start, &[text.as_bytes()])] };
        WrittenPart { step: 3, phase: 0, index, count: 2, file, fingerprint, share }
    }

    #[test]
    fn a_checkpoint_is_complete_with_its_last_file_and_duplicates_do_no_harm() {
        let mut assembly = Assembly::default();
        assert_eq!(assembly.add(part(1, 7), &two()), Ok(None));
        assert_eq!(assembly.add(part(1, 7), &two()), Ok(None));
        let done = assembly.add(part(0, 7), &two()).unwrap().unwrap();
        assert_eq!((done.position, done.files.len()), (Position(6), 2));
        assert_eq!(done.folder(), "step-00000003");
        assert_eq!(done.state_digest, blake3::hash(STATE.as_bytes()).to_hex().as_str());
    }

    #[test]
    fn a_folder_tells_its_place_and_other_names_tell_none() {
        for place in [(0, 0), (3, 0), (3, 1), (99_999_999, 12), (100_000_000, 0), (u64::MAX, u32::MAX)] {
            assert_eq!(Checkpoint::place_of(&Checkpoint::folder_of(place.0, place.1)), Some(place));
        }
        for other in [
            "step-3",
            "step-00000003-phase-0",
            "step-000000003",
            "step-+0000003",
            "step-",
            "step-00000003.old",
        ] {
            assert_eq!(Checkpoint::place_of(other), None, "{other}");
        }
    }

    #[test]
    fn two_states_for_one_position_are_a_conflict() {
        let mut assembly = Assembly::default();
        assembly.add(part(0, 7), &two()).unwrap();
        let conflict = PartConflict("the workers' states differ at step 3".to_string());
        assert_eq!(assembly.add(part(1, 8), &two()), Err(conflict));
    }

    #[test]
    fn files_that_lack_some_of_the_state_are_a_conflict() {
        let mut assembly = Assembly::default();
        assembly.add(part(0, 7), &two()).unwrap();
        let lacking = WrittenPart { share: Share::default(), ..part(1, 7) };
        let conflict = PartConflict("the workers' files of step 3 do not make up one state".to_string());
        assert_eq!(assembly.add(lacking, &two()), Err(conflict));
        // And no reason to keep what was reported.
        assert_eq!(assembly.add(part(0, 7), &two()), Ok(None));
    }
}
