//! Settings from a job file and its overrides, before they are interpreted.
//!
//! The readers in `sections` take each key with its type and its limits; every error is noted and
//! reading goes on, so that one run of the coordinator shows all of them.
//!
//! 1. A setting that no reader took is an unknown key: the list of known keys is the list of keys taken.
//! 2. An override replaces the file's setting of the same key, and its errors name the override, not a line.
//! 3. A key has at most one error; checks over several keys are skipped where one of them has an error.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::{Bound, RangeBounds, RangeInclusive};
use std::path::{Component, Path, PathBuf};

use ganglion_proto::home;
use ganglion_proto::names::{named, names_of};
use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{JobError, Place};

/// One setting as the user gave it.
struct Setting<'t> {
    value: DeValue<'t>,
    place: Place,
}

/// Section whose tables have keys of their own: `[optimizer.PHASE]` for each phase of a package.
const WITH_TABLES: &str = "optimizer";

/// All given settings by their full key, such as `job.steps`, and the errors found so far.
pub(super) struct Settings<'t> {
    file: String,
    folder: PathBuf,
    given: BTreeMap<String, Setting<'t>>,
    /// Sections of the file, including empty ones, and where each begins.
    headers: Vec<(String, Place)>,
    known: Vec<String>,
    errors: Vec<JobError>,
}

impl<'t> Settings<'t> {
    /// Parses the text of `file`, whose relative paths start at `folder`. Text that is not TOML
    /// gives no settings, only errors: what a recovering parser makes of the rest would mostly be
    /// false alarms.
    pub(super) fn parse(file: &str, folder: &Path, text: &'t str) -> Result<Self, Vec<JobError>> {
        let mut settings = Settings {
            file: file.to_owned(),
            folder: folder.to_owned(),
            given: BTreeMap::new(),
            headers: Vec::new(),
            known: Vec::new(),
            errors: Vec::new(),
        };
        let (table, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            return Err(errors.iter().map(|error| settings.syntax_error(error, text)).collect());
        }
        settings.add_file(table.into_inner(), text);
        Ok(settings)
    }

    fn syntax_error(&self, error: &toml::de::Error, text: &str) -> JobError {
        let start = error.span().map_or(0, |span| span.start);
        let rendered = error.to_string();
        let indented: String = rendered.trim_end().lines().map(|line| format!("\n    {line}")).collect();
        JobError {
            place: Place::Line { file: self.file.clone(), line: line_of(text, start) },
            key: String::new(),
            problem: format!("not valid TOML{indented}"),
        }
    }

    fn add_file(&mut self, table: DeTable<'t>, text: &str) {
        for (section, value) in table {
            let place = self.place_of(&section, text);
            match value.into_inner() {
                DeValue::Table(keys) => {
                    // Kept even if empty: a mistyped section without keys would go unnoticed.
                    self.headers.push((section.get_ref().to_string(), place));
                    for (key, value) in keys {
                        let name = format!("{}.{}", section.get_ref(), key.get_ref());
                        match value.into_inner() {
                            DeValue::Table(keys) if section.get_ref() == WITH_TABLES => {
                                for (key, value) in keys {
                                    let place = self.place_of(&key, text);
                                    self.insert(
                                        format!("{name}.{}", key.get_ref()),
                                        value.into_inner(),
                                        place,
                                    );
                                }
                            }
                            value => self.insert(name, value, self.place_of(&key, text)),
                        }
                    }
                }
                value => {
                    let name = section.get_ref().to_string();
                    self.insert(name, value, place);
                }
            }
        }
    }

    fn insert(&mut self, key: String, value: DeValue<'t>, place: Place) {
        self.given.insert(key, Setting { value, place });
    }

    fn place_of<T>(&self, key: &Spanned<T>, text: &str) -> Place {
        Place::Line { file: self.file.clone(), line: line_of(text, key.span().start) }
    }

    /// Adds overrides of the form `key=value`; the last one of a key wins. The value is TOML or
    /// else plain text.
    pub(super) fn add_overrides(&mut self, overrides: &'t [String]) {
        for pair in overrides {
            let place = Place::Override(pair.clone());
            let Some((key, text)) = pair.split_once('=') else {
                self.errors.push(JobError {
                    place,
                    key: String::new(),
                    problem: "has no value; write --set key=value".to_owned(),
                });
                continue;
            };
            let value = match DeValue::parse(text.trim()) {
                Ok(value) => value.into_inner(),
                // A name needs no quotes on a command line.
                Err(_) => DeValue::String(text.into()),
            };
            self.given.insert(key.trim().to_owned(), Setting { value, place });
        }
    }

    /// For two keys that exclude each other: if an override gives one, drops the file's setting of
    /// the other.
    pub(super) fn override_either(&mut self, one: &str, other: &str) {
        match (self.is_overridden(one), self.is_overridden(other)) {
            // The last word wins: a user who sets the steps does not mean the file's epochs.
            (true, false) => self.given.remove(other),
            (false, true) => self.given.remove(one),
            _ => None,
        };
    }

    fn is_overridden(&self, key: &str) -> bool {
        let place = self.given.get(key).map(|setting| &setting.place);
        matches!(place, Some(Place::Override(_)))
    }

    /// Drops the file's setting of `key` if an override gives `other`; returns whether it did.
    pub(super) fn yields(&mut self, key: &str, other: &str) -> bool {
        let yields = self.is_overridden(other) && !self.is_overridden(key);
        if yields {
            self.given.remove(key);
            self.errors.retain(|error| error.key != key);
        }
        yields
    }

    /// Whether the user gave `key`, rightly or not.
    pub(super) fn is_given(&self, key: &str) -> bool {
        self.given.contains_key(key)
    }

    /// Keys of a section, or of a table in one, that the user gave.
    pub(super) fn given_in(&self, section: &str) -> Vec<String> {
        let is_in = |key: &&String| key.strip_prefix(section).is_some_and(|rest| rest.starts_with('.'));
        self.given.keys().filter(is_in).cloned().collect()
    }

    /// Adds an error for a known key that may not be given here.
    pub(super) fn refuse(&mut self, key: &str, problem: impl Into<String>) {
        self.known.push(key.to_owned());
        // Its value has no meaning, so other errors of it would mislead.
        self.errors.retain(|error| error.key != key);
        self.fault(key, problem);
    }

    /// Whether none of `keys` has an error so far.
    pub(super) fn sound(&self, keys: &[&str]) -> bool {
        !self.errors.iter().any(|error| keys.contains(&error.key.as_str()))
    }

    /// Adds an error for `key`, at the place where it was given or else in the file as a whole.
    pub(super) fn fault(&mut self, key: &str, problem: impl Into<String>) {
        let place = match self.given.get(key) {
            Some(setting) => setting.place.clone(),
            None => Place::File(self.file.clone()),
        };
        self.errors.push(JobError { place, key: key.to_owned(), problem: problem.into() });
    }

    /// Hides the given value of `key` in messages: it holds a secret.
    pub(super) fn conceal(&mut self, key: &str) {
        if let Some(Setting { place: Place::Override(pair), .. }) = self.given.get_mut(key) {
            *pair = format!("{key}=...");
        }
    }

    /// Takes `key` as an integer within `limits`, or `default` if it is not given.
    pub(super) fn whole_or<T>(&mut self, key: &str, limits: RangeInclusive<T>, default: T) -> T
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        self.whole(key, limits, default).unwrap_or(default)
    }

    /// Takes `key` as an integer within `limits`.
    pub(super) fn whole<T>(&mut self, key: &str, limits: RangeInclusive<T>, example: T) -> Option<T>
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        let found = match self.take(key)? {
            DeValue::Integer(integer) => integer,
            other => return self.wrong_type(key, "a whole number", &example, &other),
        };
        // A number that overflows even 128 bits is out of every range.
        let value = i128::from_str_radix(found.as_str(), found.radix()).ok();
        let value = value.and_then(|value| T::try_from(value).ok());
        let within = value.filter(|value| limits.contains(value));
        if within.is_none() {
            let (low, high) = (limits.start(), limits.end());
            self.fault(
                key,
                format!("must be from {low} to {high}, but is {found}; choose a value in between"),
            );
        }
        within
    }

    /// Takes `key` as a number within `limits`, or `default` if it is not given. An integer is accepted.
    pub(super) fn number_or(&mut self, key: &str, limits: impl RangeBounds<f64>, default: f64) -> f64 {
        self.number(key, limits, default).unwrap_or(default)
    }

    /// Takes `key` as a number within `limits`.
    pub(super) fn number(&mut self, key: &str, limits: impl RangeBounds<f64>, example: f64) -> Option<f64> {
        let text = match self.take(key)? {
            DeValue::Float(float) => float.as_str().to_owned(),
            // Hexadecimal numbers have no meaning as fractions.
            DeValue::Integer(integer) if integer.radix() == 10 => integer.as_str().to_owned(),
            other => return self.wrong_type(key, "a number", &example, &other),
        };
        let value: Option<f64> = text.parse().ok();
        // Comparisons with a NaN are false, so that no range contains it.
        let within = value.filter(|value| limits.contains(value));
        if within.is_none() {
            let range = describe(&limits);
            self.fault(key, format!("must be {range}, but is {text}; try {example}"));
        }
        within
    }

    /// Takes `key` as non-empty text.
    pub(super) fn text(&mut self, key: &str, example: &str) -> Option<String> {
        match self.take(key)? {
            DeValue::String(text) if text.is_empty() => {
                self.fault(key, format!("is empty; write for example \"{example}\""));
                None
            }
            DeValue::String(text) => Some(text.into_owned()),
            other => {
                let example = format!("\"{example}\"");
                self.wrong_type(key, "text in quotes", &example, &other)
            }
        }
    }

    /// Takes `key` as true or false, or `default` if it is not given.
    pub(super) fn flag_or(&mut self, key: &str, default: bool) -> bool {
        self.flag(key, default).unwrap_or(default)
    }

    /// Takes `key` as true or false.
    pub(super) fn flag(&mut self, key: &str, example: bool) -> Option<bool> {
        match self.take(key)? {
            DeValue::Boolean(flag) => Some(flag),
            other => self.wrong_type(key, "true or false", &example, &other),
        }
    }

    /// Takes `key` as a value of an enumeration, by its name, or `default` if it is not given.
    pub(super) fn choice_or<T: DeserializeOwned>(&mut self, key: &str, default: T) -> T {
        self.choice(key).unwrap_or(default)
    }

    /// Takes `key` as a value of an enumeration, by its name.
    pub(super) fn choice<T: DeserializeOwned>(&mut self, key: &str) -> Option<T> {
        let text = self.text(key, names_of::<T>()[0])?;
        let chosen = named(&text);
        if chosen.is_none() {
            let problem = format!("there is no \"{text}\"; choose one of {}", quoted::<T>());
            self.fault(key, problem);
        }
        chosen
    }

    /// Takes `key` as a list of values of an enumeration, or as text with commas between them,
    /// without duplicates.
    pub(super) fn choices<T: DeserializeOwned>(&mut self, key: &str) -> Vec<T> {
        let given: Vec<String> = match self.take(key) {
            None => return Vec::new(),
            Some(DeValue::String(text)) => {
                text.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
            }
            Some(DeValue::Array(items)) if items.iter().all(|item| item.get_ref().is_str()) => {
                items.iter().filter_map(|item| item.get_ref().as_str().map(str::to_owned)).collect()
            }
            Some(other) => {
                let example = format!("[\"{}\"]", names_of::<T>()[0]);
                return self.wrong_type(key, "a list of names", &example, &other).unwrap_or_default();
            }
        };
        let mut chosen = Vec::with_capacity(given.len());
        for (at, name) in given.iter().enumerate() {
            let Some(choice) = named(name) else {
                self.fault(key, format!("there is no \"{name}\"; choose from {}", quoted::<T>()));
                return Vec::new();
            };
            if given[..at].contains(name) {
                self.fault(key, format!("has \"{name}\" twice; remove one"));
                return Vec::new();
            }
            chosen.push(choice);
        }
        chosen
    }

    /// Takes `key` as a text or a list of texts. An integer stands for its digits.
    pub(super) fn texts(&mut self, key: &str, example: &str) -> Vec<String> {
        let text = |value: &DeValue<'_>| match value {
            DeValue::String(text) => Some(text.to_string()),
            DeValue::Integer(number) => Some(number.as_str().to_owned()),
            _ => None,
        };
        let Some(value) = self.take(key) else { return Vec::new() };
        let texts = match &value {
            DeValue::Array(items) => items.iter().map(|item| text(item.get_ref())).collect(),
            one => text(one).map(|text| vec![text]),
        };
        texts.or_else(|| self.wrong_type(key, "a list of texts", &example, &value)).unwrap_or_default()
    }

    /// Takes `key` as a list of tables.
    pub(super) fn tables(&mut self, key: &str, example: &str) -> Vec<DeTable<'t>> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let tables = match &value {
            DeValue::Array(items) => items.iter().map(|item| item.get_ref().as_table().cloned()).collect(),
            _ => None,
        };
        let example = format!("[[{key}]] with {example}");
        tables.or_else(|| self.wrong_type(key, "tables", &example, &value)).unwrap_or_default()
    }

    /// Makes a path given as `key` absolute: in a file, relative paths start at the file's folder,
    /// in an override at the current one. A leading `..` leaves the folder that the file really
    /// lies in, links resolved, so that one place has one name; links anywhere else stay, for they
    /// may lead elsewhere on another machine.
    pub(super) fn absolute(&mut self, key: &str, path: &str) -> Option<PathBuf> {
        let folder = match self.given.get(key).map(|setting| &setting.place) {
            Some(Place::Override(_)) => PathBuf::new(),
            _ => self.folder.clone(),
        };
        let absolute = from_folder(&folder, Path::new(&home::expanded(path)));
        match absolute {
            Ok(path) if path.to_str().is_some() => Some(path),
            Ok(path) => {
                let shown = path.display();
                self.fault(key, format!("{shown} is not UTF-8; rename the folder"));
                None
            }
            Err(error) => {
                self.fault(key, format!("cannot be made absolute: {error}; give an absolute path"));
                None
            }
        }
    }

    /// Returns all errors, including unknown keys.
    pub(super) fn finish(mut self) -> Vec<JobError> {
        self.find_unknown_keys();
        self.find_unknown_sections();
        self.errors
    }

    fn find_unknown_keys(&mut self) {
        let is_unknown = |key: &&String| !self.known.contains(key);
        let unknown: Vec<String> = self.given.keys().filter(is_unknown).cloned().collect();
        for key in unknown {
            let section = key.split_once('.').map(|(section, _)| section);
            let problem = match section {
                Some(section) if self.sections().contains(&section) => self.unknown_key(&key),
                None => self.unknown_key(&key),
                // An unknown section of the file is reported as such, once.
                Some(_) if !self.is_overridden(&key) => continue,
                Some(section) => self.unknown_section(section),
            };
            self.fault(&key, problem);
        }
    }

    fn find_unknown_sections(&mut self) {
        for (section, place) in std::mem::take(&mut self.headers) {
            if !self.sections().contains(&section.as_str()) {
                let problem = self.unknown_section(&section);
                self.errors.push(JobError { place, key: section, problem });
            }
        }
    }

    fn unknown_key(&self, key: &str) -> String {
        if self.sections().contains(&key) {
            return format!("is a section; write [{key}] and its keys below");
        }
        let (section, name) = key.split_once('.').unwrap_or(("", key));
        // The right name in the wrong section is one slip, as a wrong letter is.
        let slips = |known: &str| {
            let (known_section, known_name) = known.split_once('.').unwrap_or(("", known));
            distance(name, known_name) + usize::from(section != known_section)
        };
        let nearest = self.known.iter().min_by_key(|known| slips(known));
        match nearest {
            // One slip, and one more for every four letters: beyond that a guess misleads.
            Some(known) if slips(known) <= 1 + name.len() / 4 => {
                format!("unknown key; did you mean {known}?")
            }
            _ if section.is_empty() => {
                let sections = self.sections().join("], [");
                format!("unknown key; keys stand in one of the sections [{sections}]")
            }
            _ => {
                let prefix = format!("{section}.");
                let keys: Vec<&str> =
                    self.known.iter().filter_map(|known| known.strip_prefix(prefix.as_str())).collect();
                format!("unknown key; [{section}] has {}", keys.join(", "))
            }
        }
    }

    fn unknown_section(&self, section: &str) -> String {
        let sections = self.sections();
        let nearest = sections.iter().min_by_key(|known| distance(section, known));
        match nearest {
            Some(known) if distance(section, known) <= 1 + section.len() / 4 => {
                format!("unknown section; did you mean [{known}]?")
            }
            _ => format!("unknown section; there are [{}]", sections.join("], [")),
        }
    }

    /// Names of the known sections, in the order of their first key.
    fn sections(&self) -> Vec<&str> {
        let mut sections: Vec<&str> = Vec::new();
        for known in &self.known {
            let section = known.split('.').next().unwrap_or_default();
            if !sections.contains(&section) {
                sections.push(section);
            }
        }
        sections
    }

    fn take(&mut self, key: &str) -> Option<DeValue<'t>> {
        // Also where it is not given: the known keys are the ones that were asked for (1).
        self.known.push(key.to_owned());
        self.given.get(key).map(|setting| setting.value.clone())
    }

    fn wrong_type<T>(
        &mut self,
        key: &str,
        expected: &str,
        example: &impl Display,
        found: &DeValue<'_>,
    ) -> Option<T> {
        let found = shown(found);
        self.fault(key, format!("expected {expected}, such as {example}, but found {found}"));
        None
    }
}

/// Names of an enumeration's values, quoted.
fn quoted<T: DeserializeOwned>() -> String {
    let names: Vec<String> = names_of::<T>().iter().map(|name| format!("\"{name}\"")).collect();
    names.join(", ")
}

/// Number of the line, counted from 1, that holds a byte of a text.
fn line_of(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// Renders a value for a message.
fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the text \"{text}\""),
        DeValue::Integer(integer) => format!("the whole number {integer}"),
        DeValue::Float(float) => format!("the number {float}"),
        DeValue::Boolean(value) => format!("{value}"),
        DeValue::Datetime(time) => format!("the date {time}"),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a section".to_owned(),
    }
}

/// Renders a range of numbers in words.
fn describe(limits: &impl RangeBounds<f64>) -> String {
    let low = match limits.start_bound() {
        Bound::Included(low) => format!("at least {low:?}"),
        Bound::Excluded(low) => format!("above {low:?}"),
        Bound::Unbounded => return "any number".to_owned(),
    };
    match limits.end_bound() {
        Bound::Included(high) => format!("{low} and at most {high:?}"),
        Bound::Excluded(high) => format!("{low} and below {high:?}"),
        Bound::Unbounded => low,
    }
}

/// Makes a path absolute that starts at `folder`.
fn from_folder(folder: &Path, path: &Path) -> std::io::Result<PathBuf> {
    let path = path.strip_prefix(".").unwrap_or(path);
    if !path.starts_with("..") {
        let absolute = std::path::absolute(folder.join(path))?;
        // Rebuilt from its components, without a slash at the end, which would make one place look
        // like two.
        return Ok(absolute.components().collect());
    }
    // `..` of a link is the parent of the link's target for the system, and of the link for a mere text.
    let mut absolute = std::path::absolute(folder.join("."))?.canonicalize()?;
    let mut rest = path.components();
    loop {
        let mut ahead = rest.clone();
        match ahead.next() {
            Some(Component::ParentDir) => absolute.pop(),
            _ => return Ok(absolute.join(rest.as_path()).components().collect()),
        };
        rest = ahead;
    }
}

/// Edit distance: the least number of letters to insert, delete or replace to turn one word into
/// the other (Levenshtein, 1966).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, letter) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, wanted) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *wanted);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_slips() {
        assert_eq!(distance("step", "steps"), 1);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }

    #[test]
    fn a_leading_parent_leaves_the_real_folder() {
        let root = tempfile::tempdir().unwrap();
        let real = root.path().canonicalize().unwrap().join("project/configs");
        std::fs::create_dir_all(&real).unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let data = real.parent().unwrap().join("data");
        for parent in ["../data", ".././data/", "./../data"] {
            let absolute = from_folder(&link, Path::new(parent)).unwrap();
            assert_eq!(absolute.to_str(), data.to_str());
        }
        assert_eq!(from_folder(&link, Path::new("data")).unwrap(), link.join("data"));
        let here = from_folder(&link, Path::new("./data")).unwrap();
        assert_eq!(here, link.join("data"));
        assert_eq!(from_folder(&link, Path::new("/data/")).unwrap().to_str(), Some("/data"));
    }
}
