//! The job file: parses a TOML file and overrides of it into a [`Job`], and writes the resolved job back.
//!
//! 1. All errors of a job show at once, each with its place, its key, what is wrong and how to mend it.
//! 2. A [`Job`] that leaves this module is complete and checked: defaults filled in, paths
//!    absolute, sizes within limits.
//! 3. Reading the output of [`render`] gives the same job.

mod evaluation;
mod exclusions;
mod models;
mod optimizer;
mod package;
mod rows;
mod sections;
mod settings;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};

pub use exclusions::asked;
use ganglion_proto::job::{Data, Job, TEXT_LIMIT};
pub use optimizer::warmup_is_cut;
use settings::Settings;

/// The job that runs when the user names none.
const EMBEDDED: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/mnist-mlp.toml"));
/// Default name of that job's run.
const EMBEDDED_NAME: &str = "mnist-mlp";

/// Keys that may change when a run resumes: its name, its length, its reporting and its patience. None
/// of them moves a bit of the state at a given step.
const CHANGEABLE: &[&str] = &[
    "job.name",
    "job.steps",
    "job.epochs",
    "job.failure_deadline",
    "checkpoint.every_steps",
    "checkpoint.every_epochs",
    "checkpoint.keep_last",
    "checkpoint.url",
    "sample.every_steps",
    "sample.count",
    "metrics.every_steps",
    "evaluation.every_steps",
    "evaluation.with_checkpoints",
    "alarms.policy",
    "alarms.after_images",
    "alarms.collapse",
    "alarms.overfitting",
    "alarms.saturated_rows",
    // This change is separate: the module `exclusions` decides what may change.
    "data.exclusion",
];

/// Keys that name a place whose content decides the result. The place may change when a run resumes, as
/// each worker proves the content by its fingerprint.
const PLACES: &[&str] = &[
    "data.path",
    "data.tokenizer",
    "model.generator",
    "model.discriminator",
    "model.path",
    "model.init_from",
];

/// Origin of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The job built into the program: the MLP GAN on the bundled digits.
    Embedded,
    /// A TOML file.
    File(PathBuf),
}

/// Place of a wrong setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line of a file, counted from 1.
    Line {
        /// The file, as the user named it.
        file: String,
        /// Number of the line.
        line: usize,
    },
    /// A file as a whole: something is missing in it.
    File(String),
    /// An override, as the user wrote it.
    Override(String),
}

/// One error in a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobError {
    /// Place at which the setting was given.
    pub place: Place,
    /// The key, such as `job.steps`; empty where the text as a whole is wrong.
    pub key: String,
    /// Message: what is wrong, and how to mend it.
    pub problem: String,
}

/// All errors in a job. `Display` gives a block with a line for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobErrors(pub Vec<JobError>);

/// A key that differs between two jobs although it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The key, such as `job.seed`.
    pub key: String,
    /// The value that the run was started with, as TOML, or `not set`.
    pub recorded: String,
    /// The value given now, as TOML, or `not set`.
    pub given: String,
}

/// Reads a job and applies `overrides`, each `key=value`.
///
/// Relative paths start at the job file's folder; those of overrides and of the embedded job at the current
/// one. An override of `job.steps` replaces the file's `job.epochs`, and the other way round.
///
/// # Errors
/// All errors of the file and of the overrides.
pub fn read(source: &Source, overrides: &[String]) -> Result<Job, JobErrors> {
    match source {
        Source::Embedded => {
            let text = Text {
                file: "built-in mnist-mlp.toml",
                folder: Path::new(""),
                default_name: Some(EMBEDDED_NAME),
                text: EMBEDDED,
            };
            text.resolve(overrides, true)
        }
        Source::File(path) => read_file(path, overrides, true),
    }
}

/// Reads the settings of a data set: data of a kind at a path, relative to the current folder,
/// without conversion.
///
/// # Errors
/// The kind does not exist, or no data of it is there.
pub fn read_data(kind: &str, path: Option<&str>) -> Result<Data, JobErrors> {
    let mut overrides = vec![format!("data.kind={kind}")];
    overrides.extend(path.map(|path| format!("data.path={path}")));
    let mut settings = Settings::parse("--data", Path::new(""), "").map_err(JobErrors::sorted)?;
    settings.add_overrides(&overrides);
    let data = sections::data(&mut settings, true, false);
    let errors = settings.finish();
    if errors.is_empty() { Ok(data) } else { Err(JobErrors::sorted(errors)) }
}

/// Reads a job file; `check_paths` says whether its data must exist.
fn read_file(path: &Path, overrides: &[String], check_paths: bool) -> Result<Job, JobErrors> {
    let file = path.display().to_string();
    let unreadable = |problem: String| {
        JobErrors(vec![JobError { place: Place::File(file.clone()), key: String::new(), problem }])
    };
    let bytes = std::fs::read(path).map_err(|error| {
        unreadable(format!("cannot be read: {error}; name a job file, such as those in configs/"))
    })?;
    let text =
        String::from_utf8(bytes).map_err(|_| unreadable("is not UTF-8 text; save it as UTF-8".to_owned()))?;
    let stem = path.file_stem().map(|stem| stem.to_string_lossy());
    let text = Text {
        file: &file,
        folder: path.parent().unwrap_or(Path::new("")),
        default_name: stem.as_deref(),
        text: &text,
    };
    text.resolve(overrides, check_paths)
}

/// Text of a job, and what its relative settings refer to.
struct Text<'a> {
    file: &'a str,
    folder: &'a Path,
    default_name: Option<&'a str>,
    text: &'a str,
}

impl Text<'_> {
    fn resolve(&self, overrides: &[String], check_paths: bool) -> Result<Job, JobErrors> {
        let mut settings = Settings::parse(self.file, self.folder, self.text).map_err(JobErrors::sorted)?;
        settings.add_overrides(overrides);
        let job = sections::read(&mut settings, self.default_name, check_paths);
        // After all readers: a key that none of them took is unknown.
        let mut errors = settings.finish();
        // Only a job without errors has a length that means anything.
        if errors.is_empty() {
            errors.extend(self.too_long(&job));
        }
        if errors.is_empty() { Ok(job) } else { Err(JobErrors::sorted(errors)) }
    }

    /// Error of a job that workers would refuse for the length of its text.
    fn too_long(&self, job: &Job) -> Option<JobError> {
        let length = job.to_toml().len();
        let problem = format!(
            "the job has {length} bytes with all its defaults, and at most {TEXT_LIMIT} can be sent to workers; leave fewer \
             samples out by name"
        );
        let error = JobError { place: Place::File(self.file.to_owned()), key: String::new(), problem };
        (length > TEXT_LIMIT).then_some(error)
    }
}

/// Renders the resolved job as TOML, for the run directory.
pub fn render(job: &Job) -> String {
    format!(
        "# The job of this run as it was resolved: defaults filled in, paths absolute. A coordinator that\n\
         # resumes the run compares this file with the job given, so do not edit it.\n\n{}",
        job.to_toml()
    )
}

/// Parses the output of [`render`]. The data need not exist any more.
///
/// # Errors
/// All errors, where the text was damaged or edited.
pub fn parse_resolved(text: &str) -> Result<Job, JobErrors> {
    let text = Text { file: "job.toml", folder: Path::new("/"), default_name: None, text };
    text.resolve(&[], false)
}

/// Compares two jobs: the keys that differ and must not when a run resumes, ordered by name. Empty
/// means that `given` may continue the run.
pub fn differences(recorded: &Job, given: &Job) -> Vec<Difference> {
    let moves = moves(recorded, given);
    let mut differences = all_differences(recorded, given);
    // What is not listed may not change: a new key decides the result until somebody shows that it does
    // not.
    differences.retain(|found| !CHANGEABLE.contains(&found.key.as_str()) && !moves.contains(found));
    differences
}

/// Compares the places of two jobs whose content decides the result.
pub fn moves(recorded: &Job, given: &Job) -> Vec<Difference> {
    let mut moves = all_differences(recorded, given);
    // A place that only one of the two has is another job and no move.
    moves.retain(|found| {
        PLACES.contains(&found.key.as_str()) && found.recorded != NOT_SET && found.given != NOT_SET
    });
    moves
}

/// All keys in which two jobs differ, ordered by name.
fn all_differences(recorded: &Job, given: &Job) -> Vec<Difference> {
    let (recorded, given) = (flat(recorded), flat(given));
    let mut keys: Vec<&String> = recorded.keys().chain(given.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter()
        .filter(|key| recorded.get(*key) != given.get(*key))
        .map(|key| Difference {
            key: key.clone(),
            recorded: shown(recorded.get(key)),
            given: shown(given.get(key)),
        })
        .collect()
}

/// Value of a key that a job does not have, for messages.
const NOT_SET: &str = "not set";

/// Converts a job to a table from full keys to values.
fn flat(job: &Job) -> toml::Table {
    fn add(flat: &mut toml::Table, prefix: &str, table: toml::Table) {
        for (key, value) in table {
            let key = format!("{prefix}{key}");
            match value {
                toml::Value::Table(below) => add(flat, &format!("{key}."), below),
                value => drop(flat.insert(key, value)),
            }
        }
    }
    let mut flat = toml::Table::new();
    add(&mut flat, "", job.to_table());
    flat
}

fn shown(value: Option<&toml::Value>) -> String {
    value.map_or(NOT_SET.to_owned(), toml::Value::to_string)
}

impl Place {
    /// Sorts a file as a whole before its lines, and overrides last.
    fn order(&self) -> (u8, usize) {
        match self {
            Place::File(_) => (0, 0),
            Place::Line { line, .. } => (1, *line),
            Place::Override(_) => (2, 0),
        }
    }
}

impl JobErrors {
    /// Sorts errors: those of the file by line, then those of the overrides.
    fn sorted(mut errors: Vec<JobError>) -> Self {
        errors.sort_by_key(|error| error.place.order());
        JobErrors(errors)
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Line { file, line } => write!(f, "{file}:{line}: ")?,
            Place::File(file) => write!(f, "{file}: ")?,
            // The override already names its key.
            Place::Override(pair) => return write!(f, "--set {pair}: {}", self.problem),
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.problem)
    }
}

impl fmt::Display for JobErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(JobError::to_string).collect();
        f.write_str(&lines.join("\n"))?;
        match self.0.len() {
            0 | 1 => Ok(()),
            count => write!(f, "\n{count} errors in the job"),
        }
    }
}

impl std::error::Error for JobErrors {}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { key, recorded, given } = self;
        if key == package::HASH && recorded != NOT_SET && given != NOT_SET {
            return f.write_str(
                "model.path: the package was changed since the run began, and its hash is another: put the run's own package \
                 back; if only its first weights differ, export it again after the same torch.manual_seed",
            );
        }
        if key == rows::HASH && recorded != NOT_SET && given != NOT_SET {
            return f.write_str(
                "data.tokenizer: the tokenizer was changed since the run began, and its hash is another: put the run's own \
                 tokenizer back, or begin a new run with another --run-dir",
            );
        }
        write!(f, "{key}: the run was started with {recorded}, but given is {given}")
    }
}
