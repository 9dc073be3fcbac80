//! Fingerprint of the environment: everything that a worker's bits depend on besides the job and
//! the data.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Named facts about a worker's build, machine and arithmetic. Workers with equal fingerprints
/// compute equal bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passport(pub BTreeMap<String, String>);

/// One item in which two fingerprints differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Name of the item.
    pub item: String,
    /// Value that the run was started with; empty if the run has no such item.
    pub expected: String,
    /// Value of the refused worker; empty if it has no such item.
    pub found: String,
}

/// Item with the version number of the build's arithmetic.
pub const NUMERICS: &str = "numerics";

/// Items about the samples, which may change with the job during a run.
pub const OF_SAMPLES: [&str; 3] = ["data", "data_names", "exclusions"];

impl Passport {
    /// Whether the first worker that has an item may set it anew.
    pub fn lets_adopt(&self, item: &str) -> bool {
        // Only while the run has none: once it is set, a worker that differs is refused (D11).
        OF_SAMPLES.contains(&item) && !self.0.contains_key(item)
    }

    /// Returns the same fingerprint in the current items. Builds without a number of their
    /// arithmetic reported their version instead, which was 0.1.0 in all of them: theirs is the
    /// first number.
    pub fn numbered(mut self) -> Passport {
        if self.0.get("build").is_some_and(|version| version == "0.1.0") {
            self.0.remove("build");
            self.0.entry(NUMERICS.to_string()).or_insert_with(|| "1".to_string());
        }
        self
    }

    /// Returns the items in which `other` differs, in the order of their names.
    pub fn differences(&self, other: &Passport) -> Vec<Difference> {
        // Items of both: one that only one side has is a difference too.
        let items: BTreeSet<&String> = self.0.keys().chain(other.0.keys()).collect();
        let value = |passport: &Passport, item: &String| passport.0.get(item).cloned().unwrap_or_default();
        items
            .into_iter()
            .filter(|item| self.0.get(*item) != other.0.get(*item))
            .map(|item| Difference {
                item: item.clone(),
                expected: value(self, item),
                found: value(other, item),
            })
            .collect()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {:?} here and {:?} in the run", self.item, self.found, self.expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passport(items: &[(&str, &str)]) -> Passport {
        Passport(items.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    #[test]
    fn a_build_that_has_no_number_has_the_first() {
        let first = passport(&[("numerics", "1"), ("cpu", "AVX2")]);
        assert_eq!(passport(&[("build", "0.1.0"), ("cpu", "AVX2")]).numbered(), first);
        for unchanged in [first, passport(&[("numerics", "2")]), passport(&[("build", "other")])] {
            assert_eq!(unchanged.clone().numbered(), unchanged);
        }
    }

    #[test]
    fn differences_name_changed_and_missing_items() {
        let run = passport(&[("build", "1"), ("cpu", "AVX512"), ("data", "x")]);
        let other = passport(&[("build", "1"), ("cpu", "AVX2"), ("device", "cuda")]);
        let items: Vec<String> = run.differences(&other).into_iter().map(|d| d.item).collect();
        assert_eq!(items, ["cpu", "data", "device"]);
        assert!(run.differences(&run.clone()).is_empty());
    }
}
