//! Labels: the class of each sample, a number from 0 on.

use ganglion_proto::record::found::{Class, Found};
use ganglion_proto::words::counted;

use super::DataError;

/// Maximum number of classes; more are a sign of a damaged file.
const MAX_CLASSES: u32 = 65_536;

/// Maximum number of characters of a class's name.
pub(super) const NAME_CHARACTERS: usize = 100;

/// Labels of a data set.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Labels {
    /// Class of each sample, by its index.
    pub(super) of: Vec<u32>,
    /// Number of classes: one more than the greatest.
    pub(super) classes: u32,
    /// Names of the classes; empty where they are numbers.
    pub(super) names: Vec<String>,
    /// Whether the names come from a file that the fingerprint of the samples does not cover.
    names_apart: bool,
    /// Rule by which the labels were found, diagnostic only.
    rule: &'static str,
    /// Source of the labels, for messages.
    origin: String,
}

impl Labels {
    /// Labels that `origin` gives by a rule.
    pub(super) fn new(of: Vec<u32>, rule: &'static str, origin: impl Into<String>) -> Labels {
        // A file may claim the greatest number, and is refused by `check`.
        let classes = of.iter().max().map_or(0, |greatest| greatest.saturating_add(1));
        Labels { of, classes, names: Vec::new(), names_apart: false, rule, origin: origin.into() }
    }

    /// Adds a name for each class.
    pub(super) fn named(self, names: Vec<String>) -> Labels {
        Labels { names, ..self }
    }

    /// Adds a name for each class, from a file that the fingerprint of the samples does not cover.
    pub(super) fn named_apart(self, names: Vec<String>) -> Labels {
        Labels { names, names_apart: true, ..self }
    }

    /// Drops all samples but those with these ascending indices. Classes keep their numbers, also those
    /// left without a sample.
    pub(super) fn keep(&mut self, kept: &[usize]) {
        self.of = kept.iter().map(|index| self.of[*index]).collect();
    }

    /// Checks that each of `samples` samples has a label, and that the classes are in bounds.
    pub(super) fn check(&self, samples: usize) -> Result<(), DataError> {
        let (origin, found) = (&self.origin, self.of.len());
        if found != samples {
            return Err(DataError::Input(format!(
                "{origin}: found {} for {}, expected one each; get both files again",
                counted(found, "label"),
                counted(samples, "image")
            )));
        }
        // Before `report` allocates one count for each.
        if self.classes > MAX_CLASSES {
            return Err(DataError::Input(format!(
                "{origin}: found class {}, expected 0 to {}; number the classes from 0 on",
                self.classes - 1,
                MAX_CLASSES - 1
            )));
        }
        Ok(())
    }

    /// Returns the fingerprint of samples with these labels, given that of the samples.
    pub(super) fn fingerprint_with(&self, samples: &[u8; 32]) -> [u8; 32] {
        // Apart from the fingerprint of the same samples without labels.
        let mut hasher = blake3::Hasher::new_derive_key("ganglion 2026 labelled data set");
        hasher.update(samples);
        for label in &self.of {
            hasher.update(&label.to_le_bytes());
        }
        // Checkpoints have the names, so all workers must have the same.
        for name in self.names.iter().filter(|_| self.names_apart) {
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        }
        hasher.finalize().into()
    }

    /// Reports the classes, once they are checked.
    pub(super) fn report(&self, found: &mut Found) {
        let mut counts = vec![0; self.classes as usize];
        self.of.iter().for_each(|class| counts[*class as usize] += 1);
        let name = |class: usize| self.names.get(class).cloned().unwrap_or_else(|| class.to_string());
        let classes =
            counts.into_iter().enumerate().map(|(class, samples)| Class { name: name(class), samples });
        found.add_classes(self.rule, classes);
    }
}
