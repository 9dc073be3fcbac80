//! Samples that the job leaves out (`data.exclude`), by name.
//!
//! 1. Those left out from the start are no samples: their files are not read, and may be missing.
//! 2. Those left out later keep their index for the whole run, also once their files are gone; they are
//!    never read for a step past the change, and the fingerprint does not cover them.
//! 3. A change records the hash of the data set's names at its time. So a name that never existed is
//!    detected, as is another data set.

use std::collections::BTreeMap;

use ganglion_proto::job::Exclusion;
use ganglion_proto::record::found::Found;

use super::DataError;

/// Maximum number of similar names to propose for an unknown one.
const NEAREST: usize = 3;

/// Samples that a job leaves out, matched against those that exist.
pub(super) struct LeftOut<'a> {
    exclusions: &'a [Exclusion],
    /// Excluded names, and whether each was found.
    named: BTreeMap<&'a str, bool>,
}

impl<'a> LeftOut<'a> {
    pub(super) fn new(exclusions: &'a [Exclusion]) -> LeftOut<'a> {
        let names = exclusions.iter().flat_map(|exclusion| &exclusion.files);
        LeftOut { exclusions, named: names.map(|name| (name.as_str(), false)).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Whether a name is excluded; notes that its sample exists.
    pub(super) fn find(&mut self, name: &str) -> bool {
        self.named.get_mut(name).map(|found| *found = true).is_some()
    }

    /// Whether a name is excluded.
    pub(super) fn names(&self, name: &str) -> bool {
        self.named.contains_key(name)
    }

    /// Whether the sample of a name takes no part in the run at all.
    pub(super) fn is_from_the_start(&self, name: &str) -> bool {
        !self.is_empty() && self.of(true).any(|other| other == name)
    }

    /// Names that were not found, and whether each is known to have existed when the run began.
    pub(super) fn missing(&self) -> impl Iterator<Item = (&'a str, bool)> {
        let missing = self.named.iter().filter(|(_, found)| !**found).map(|(name, _)| *name);
        missing.map(|name| {
            let known = |one: &&Exclusion| one.names.is_some() && one.files.iter().any(|other| other == name);
            (name, self.exclusions.iter().any(|one| known(&one)))
        })
    }

    /// Reports the excluded samples that exist.
    pub(super) fn report(&self, found: &mut Found) {
        let there = self.named.iter().filter(|(_, there)| **there);
        there.for_each(|(name, _)| found.leave_out("samples by data.exclude", name));
    }

    /// Names that are left out from the start, or all others, in the job's order.
    pub(super) fn of(&self, the_start: bool) -> impl Iterator<Item = &'a str> {
        // A job has few changes; its names may be many.
        let chosen = self.exclusions.iter().filter(move |one| one.is_from_the_start() == the_start);
        chosen.flat_map(|one| one.files.iter().map(String::as_str))
    }

    /// Checks that each name that is left out later is a sample's, where no sample can be gone.
    ///
    /// # Errors
    /// A name belongs to no sample.
    pub(super) fn check_all_there<'n>(
        &self,
        place: &str,
        found: impl Fn() -> Box<dyn Iterator<Item = String> + 'n>,
    ) -> Result<(), DataError> {
        let mut later = self.missing().map(|(name, _)| name).filter(|name| !self.is_from_the_start(name));
        later.next().map_or(Ok(()), |name| Err(DataError::Input(no_sample(name, place, found()))))
    }

    /// Checks the samples of the run, found or not, against the records of the job's changes.
    ///
    /// # Errors
    /// A name belongs to no sample, or the data set is not the one that was changed.
    pub(super) fn check<'n>(
        &self,
        names: &Names,
        place: &str,
        found: impl Fn() -> Box<dyn Iterator<Item = String> + 'n>,
    ) -> Result<(), DataError> {
        // For a new run, or one from before names were recorded, earlier names are unknown.
        for (name, _) in self.missing().filter(|(_, known)| !known) {
            let problem = no_sample(name, place, found());
            if !self.is_from_the_start(name) {
                return Err(DataError::Input(problem));
            }
            tracing::warn!("{problem}");
        }
        // From the newest change back: each step adds the names that were samples before it.
        let mut then = *names;
        for exclusion in self.exclusions.iter().rev() {
            if exclusion.is_from_the_start() {
                // The sum of hashes lets a name be added without the list of all.
                exclusion.files.iter().for_each(|name| then.add(name));
            }
            // A change of an earlier build has no record, and is believed.
            if exclusion.names.as_ref().is_none_or(|names| *names == then.hash()) {
                continue;
            }
            let mut missing = self.missing().filter(|(_, known)| *known).map(|(name, _)| name);
            return Err(DataError::Input(match missing.next() {
                Some(name) => no_sample(name, place, found()),
                None => format!(
                    "{place}: found other samples than the run began with; put the same files there again, but for those \
                     that data.exclude leaves out"
                ),
            }));
        }
        Ok(())
    }

    /// Returns the index of each name that is left out after the start, in the job's order, among the
    /// samples of the run.
    pub(super) fn indices(&self, names: impl Iterator<Item = String>) -> Vec<u64> {
        if self.is_empty() {
            return Vec::new();
        }
        // Only of names that are left out, so memory does not grow with the data set.
        let places: BTreeMap<String, u64> =
            names.zip(0..).filter(|(name, _)| self.named.contains_key(name.as_str())).collect();
        self.of(false).filter_map(|name| places.get(name).copied()).collect()
    }
}

/// Order-independent hash of a set of names: the sum of their hashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Names(u64);

impl Names {
    pub(super) fn of(names: impl Iterator<Item = String>) -> Names {
        let mut sum = Names::default();
        names.for_each(|name| sum.add(&name));
        sum
    }

    fn add(&mut self, name: &str) {
        let hash = blake3::hash(name.as_bytes());
        let first = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
        // A sum and not a sequence: names come in any order. It detects mistakes, not attacks.
        self.0 = self.0.wrapping_add(u64::from_le_bytes(*first));
    }

    pub(super) fn hash(self) -> String {
        format!("{:016x}", self.0)
    }
}

/// Error message for a name that belongs to no sample.
fn no_sample(name: &str, place: &str, found: impl Iterator<Item = String>) -> String {
    let mut nearest: Vec<(usize, String)> = Vec::new();
    for other in found {
        // Over all names, which takes a while: the run has ended, and this is its last message.
        let distance = strsim::levenshtein(name, &other);
        if nearest.len() < NEAREST || nearest.last().is_some_and(|(last, _)| distance < *last) {
            let at = nearest.partition_point(|(known, _)| *known <= distance);
            nearest.insert(at, (distance, other));
            nearest.truncate(NEAREST);
        }
    }
    let nearest: Vec<String> = nearest.into_iter().map(|(_, name)| name).collect();
    format!(
        "data.exclude: there is no sample {name} in {place}; the nearest names are {}",
        if nearest.is_empty() { "none".to_owned() } else { nearest.join(", ") }
    )
}
