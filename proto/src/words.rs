//! Counts and lists in messages for people.

use std::fmt::Display;

/// Formats a count with its noun: "1 file", "2 files". Nouns that end in s, x, ch or sh take "es", and a
/// consonant with y becomes "ies".
pub fn counted(count: impl TryInto<u64>, noun: &str) -> String {
    match count.try_into().unwrap_or(u64::MAX) {
        1 => format!("1 {noun}"),
        count => format!("{count} {}", plural(noun)),
    }
}

/// Verb that agrees with a count: "is" or "are".
pub fn are(count: impl TryInto<u64>) -> &'static str {
    if count.try_into().is_ok_and(|count| count == 1) { "is" } else { "are" }
}

/// The same verb of the past: "was" or "were".
pub fn were(count: u64) -> &'static str {
    if count == 1 { "was" } else { "were" }
}

fn plural(noun: &str) -> String {
    let stem = noun.strip_suffix('y').filter(|stem| !stem.ends_with(['a', 'e', 'i', 'o', 'u']));
    match stem {
        Some(stem) => format!("{stem}ies"),
        None if ["s", "x", "ch", "sh"].iter().any(|end| noun.ends_with(end)) => format!("{noun}es"),
        None => format!("{noun}s"),
    }
}

/// Joins items with commas; an empty list is "none".
pub fn listed<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() { "none".to_owned() } else { items.join(", ") }
}

/// Joins the first `most` items with commas, and says how many more there are.
pub fn listed_up_to<T: Display>(items: impl IntoIterator<Item = T>, most: usize) -> String {
    let mut items = items.into_iter();
    let shown = listed(items.by_ref().take(most));
    match items.count() {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nouns_agree_with_their_counts() {
        for (count, noun, text) in [
            (1_u32, "worker", "1 worker"),
            (0, "worker", "0 workers"),
            (2, "class", "2 classes"),
            (2, "copy", "2 copies"),
            (2, "day", "2 days"),
            (3, "generated sample", "3 generated samples"),
            (2, "batch", "2 batches"),
        ] {
            assert_eq!(counted(count, noun), text);
        }
        assert_eq!((are(1_u32), are(0_u32), are(2_u64)), ("is", "are", "are"));
    }

    #[test]
    fn lists_say_when_they_are_empty_or_cut() {
        assert_eq!(listed([1, 2]), "1, 2");
        assert_eq!(listed(Vec::<u8>::new()), "none");
        assert_eq!(listed_up_to(1..=3, 3), "1, 2, 3");
        assert_eq!(listed_up_to(1..=9, 3), "1, 2, 3 and 6 more");
    }
}
