//! Bits of one run, and the first difference between the bits of two.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

/// Bits that a run computed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bits {
    /// Digest of the last state.
    pub digest: String,
    /// Hashes of all shard gradients; empty for a build that does not log them.
    pub gradients: BTreeMap<Shard, Hashes>,
}

/// Key of a shard gradient in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Shard {
    update: u64,
    phase: u64,
    shard: u64,
}

/// Network of a shard gradient, and the hashes of its parts by name.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Hashes {
    network: String,
    parts: BTreeMap<String, String>,
}

impl Bits {
    /// Reads a log of shard gradients. One that was computed twice must have been equal both times.
    pub(crate) fn read(digest: String, log: &Path) -> Result<Bits, String> {
        let mut gradients = BTreeMap::new();
        for line in std::fs::read_to_string(log).unwrap_or_default().lines() {
            let (shard, hashes) = parse(line).ok_or_else(|| format!("not of a shard gradient: {line}"))?;
            if let Some(before) = gradients.insert(shard, hashes.clone()).filter(|before| *before != hashes) {
                let where_and_what = shard.describe(&hashes, &differing(&hashes, &before));
                return Err(format!("computed again, the shard gradients part at {where_and_what}"));
            }
        }
        Ok(Bits { digest, gradients })
    }

    /// Describes the difference from the bits of `other`; `None` if they are equal. If `other` has
    /// no logged shard gradients, only the digest counts.
    pub(crate) fn difference(&self, other: &Bits) -> Option<String> {
        let is_logged = !other.gradients.is_empty();
        let parted = if is_logged { self.first_parted(other) } else { None };
        let digests = if self.digest == other.digest {
            format!("both digests are {}", short(&self.digest))
        } else {
            format!("digest {} instead of {}", short(&self.digest), short(&other.digest))
        };
        match parted {
            Some(parted) => Some(format!("{digests}; the shard gradients part at {parted}")),
            None if self.digest == other.digest => None,
            None if is_logged => Some(format!("{digests}; all shard gradients are equal")),
            None => Some(format!("{digests}; the base logs no shard gradients")),
        }
    }

    fn first_parted(&self, other: &Bits) -> Option<String> {
        let all =
            self.gradients.keys().chain(other.gradients.keys()).collect::<std::collections::BTreeSet<_>>();
        all.into_iter().find_map(|shard| match (self.gradients.get(shard), other.gradients.get(shard)) {
            (Some(ours), Some(theirs)) if ours == theirs => None,
            (Some(ours), Some(theirs)) => Some(shard.describe(ours, &differing(ours, theirs))),
            (Some(ours), None) => Some(shard.describe(ours, "an additional one")),
            (None, theirs) => Some(shard.describe(theirs?, "missing")),
        })
    }
}

impl Shard {
    fn describe(&self, hashes: &Hashes, what: &str) -> String {
        let Shard { update, phase, shard } = self;
        format!("update {update} (phase {phase}, {}), data shard {shard}: {what}", hashes.network)
    }
}

/// Names the parts in which two shard gradients differ.
fn differing(ours: &Hashes, theirs: &Hashes) -> String {
    let parts = ours.parts.iter().filter(|(part, hash)| theirs.parts.get(*part) != Some(hash));
    let names: Vec<&str> = parts.map(|(part, _)| part.as_str()).collect();
    if names.is_empty() { "parts of other names".to_string() } else { names.join(", ") }
}

fn parse(line: &str) -> Option<(Shard, Hashes)> {
    let line: BTreeMap<String, Value> = serde_json::from_str(line).ok()?;
    let number = |name: &str| line.get(name)?.as_u64();
    let shard = Shard { update: number("update")?, phase: number("phase")?, shard: number("shard")? };
    let network = line.get("network")?.as_str()?.to_string();
    let texts = line.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_string())));
    Some((shard, Hashes { network, parts: texts.filter(|(name, _)| name != "network").collect() }))
}

fn short(digest: &str) -> &str {
    &digest[..digest.len().min(12)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(update: u64, shard: u64, gradient: &str, scalars: &str) -> String {
        let (phase, network) = (update % 2, "discriminator");
        format!(
            r#"{{"update":{update},"phase":{phase},"network":"{network}","shard":{shard},"gradient":"{gradient}","scalars":"{scalars}"}}"#
        )
    }

    fn read(digest: &str, lines: &[String]) -> Result<Bits, String> {
        let log = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(log.path(), lines.join("\n")).unwrap();
        Bits::read(digest.to_string(), log.path())
    }

    #[test]
    fn the_first_shard_gradient_that_differs_is_named_whatever_the_order_of_the_log() {
        let base = read("a", &[line(0, 0, "x", "y"), line(2, 1, "x", "y"), line(2, 0, "x", "y")]).unwrap();
        let here = read("b", &[line(2, 1, "X", "y"), line(2, 0, "x", "Y"), line(0, 0, "x", "y")]).unwrap();
        let difference = here.difference(&base).unwrap();
        let parted = "update 2 (phase 0, discriminator), data shard 0: scalars";
        assert!(
            difference.starts_with("digest b instead of a") && difference.ends_with(parted),
            "{difference}"
        );
        assert_eq!(base.difference(&base), None);
    }

    #[test]
    fn a_difference_of_the_update_alone_and_one_that_cannot_be_placed_are_told_apart() {
        let logged = |digest| read(digest, &[line(0, 0, "x", "y")]).unwrap();
        assert!(logged("a").difference(&logged("b")).unwrap().contains("all shard gradients are equal"));
        let not_logged = read("b", &[]).unwrap();
        assert!(logged("a").difference(&not_logged).unwrap().contains("logs no shard gradients"));
        assert!(not_logged.difference(&logged("b")).unwrap().ends_with("data shard 0: missing"));
        assert_eq!(logged("a").difference(&read("a", &[]).unwrap()), None);
    }

    #[test]
    fn a_missing_or_additional_shard_gradient_is_a_difference() {
        let two = read("a", &[line(0, 0, "x", "y"), line(0, 1, "x", "y")]).unwrap();
        let one = read("a", &[line(0, 0, "x", "y")]).unwrap();
        assert!(two.difference(&one).unwrap().ends_with("data shard 1: an additional one"));
        assert!(one.difference(&two).unwrap().ends_with("data shard 1: missing"));
    }

    #[test]
    fn a_shard_gradient_that_is_computed_again_must_be_the_same() {
        assert!(read("a", &[line(0, 0, "x", "y"), line(0, 0, "x", "y")]).is_ok());
        let error = read("a", &[line(0, 0, "x", "y"), line(0, 0, "z", "y")]).unwrap_err();
        assert!(error.ends_with("update 0 (phase 0, discriminator), data shard 0: gradient"), "{error}");
    }
}
