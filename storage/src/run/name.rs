//! Names of runs, and the run that is meant without a name.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;

use ganglion_membership::Checkpoint;

use super::{JOB, JOURNAL, RunError};
use crate::Address;

/// Folder that holds the runs whose folders nobody names.
pub const RUNS: &str = "runs";
/// Maximum number of runs that a message lists.
const LISTED: usize = 8;

/// Name of a run, and perhaps of one of its checkpoints. The run is a folder, a name in `runs/`, or an
/// address; an empty one, as in `@best`, is the run that is meant without a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunName {
    text: String,
    /// The text without the checkpoint.
    place: String,
    checkpoint: Option<CheckpointChoice>,
}

/// A checkpoint among those of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointChoice {
    /// The newest, `@latest`; also meant where none is named.
    Latest,
    /// The best by the job's evaluations, `@best`.
    Best,
    /// The one of a step, `@5000`, or of a phase after it, `@step-00005000-phase-1`.
    At {
        /// Number of steps done.
        step: u64,
        /// Number of phases done of the next step.
        phase: u32,
    },
}

/// Error: a text names no run.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("give RUN, RUN@best or RUN@STEP, where RUN is the folder of a run, or its name in {RUNS}/")]
pub struct BadRunName;

/// A run that a command is about.
#[derive(Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The run's folder.
    pub folder: PathBuf,
    /// The checkpoint, if one was named.
    pub checkpoint: Option<CheckpointChoice>,
    /// Line for the user where no run was named.
    pub told: Option<String>,
}

impl FromStr for RunName {
    type Err = BadRunName;

    fn from_str(text: &str) -> Result<RunName, BadRunName> {
        let (place, checkpoint) = match split(text) {
            Some((place, choice)) => (place, Some(choice)),
            None => (text, None),
        };
        // Nothing at all is an unset variable of a script rather than a wish for the newest run.
        if text.is_empty() || text.ends_with('@') {
            return Err(BadRunName);
        }
        Ok(RunName { text: text.to_string(), place: place.to_string(), checkpoint })
    }
}

/// Splits a name at its last `@`, if a checkpoint stands behind it.
fn split(text: &str) -> Option<(&str, CheckpointChoice)> {
    // In an address the first part may have an @ of its own: container@account.
    let path = text
        .find("://")
        .map_or(Some(0), |scheme| text[scheme + 3..].find('/').map(|slash| scheme + 3 + slash))?;
    let at = path + text[path..].rfind('@')?;
    Some((&text[..at], CheckpointChoice::parse(&text[at + 1..])?))
}

impl CheckpointChoice {
    fn parse(text: &str) -> Option<CheckpointChoice> {
        match text {
            "latest" => Some(CheckpointChoice::Latest),
            "best" => Some(CheckpointChoice::Best),
            _ if text.bytes().all(|digit| digit.is_ascii_digit()) => {
                text.parse().ok().map(|step| CheckpointChoice::At { step, phase: 0 })
            }
            _ => Checkpoint::place_of(text).map(|(step, phase)| CheckpointChoice::At { step, phase }),
        }
    }
}

impl fmt::Display for CheckpointChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CheckpointChoice::Latest => f.write_str("latest"),
            CheckpointChoice::Best => f.write_str("best"),
            CheckpointChoice::At { step, phase: 0 } => write!(f, "{step}"),
            CheckpointChoice::At { step, phase } => f.write_str(&Checkpoint::folder_of(*step, *phase)),
        }
    }
}

impl fmt::Display for RunName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An address may hold credentials, which must not be shown.
        f.write_str(if Address::is_secret(&self.place) { "..." } else { &self.text })
    }
}

impl RunName {
    /// The name without its checkpoint.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// The checkpoint, if one is named.
    pub(super) fn checkpoint(&self) -> Option<CheckpointChoice> {
        self.checkpoint
    }

    /// The name of a place that exists with its @: it is no checkpoint's.
    pub(super) fn as_it_is(&self) -> RunName {
        match self.checkpoint.is_some() && Path::new(&self.text).exists() {
            true => RunName { place: self.text.clone(), checkpoint: None, ..self.clone() },
            false => self.clone(),
        }
    }

    /// The folder of the run; `None` if there is none of this name.
    pub(super) fn folder(&self) -> Option<PathBuf> {
        // Without the slash at its end, as it is shown and compared.
        let given: PathBuf = Path::new(&self.place).components().collect();
        if is_run(&given) {
            return Some(given);
        }
        let by_name = Path::new(RUNS).join(&given);
        (given.components().count() == 1 && is_run(&by_name)).then_some(by_name)
    }

    /// Error for a name that leads nowhere; `what` is missing.
    pub(super) fn unknown(&self, what: &str) -> RunError {
        let hint = match self.checkpoint.is_none() && self.text.contains('@') {
            true => "; behind @ stands best, latest or a step",
            false => "",
        };
        RunError::Input(format!("{self}: {what} is there{hint}; {}", known()))
    }
}

/// Whether a folder is a run's. One that this user cannot look into may be.
fn is_run(folder: &Path) -> bool {
    [JOB, JOURNAL].iter().any(|file| match fs::metadata(folder.join(file)) {
        Ok(about) => about.is_file(),
        Err(error) => error.kind() == ErrorKind::PermissionDenied,
    })
}

/// The folders of the runs in a folder, the newest first.
///
/// # Errors
/// The folder cannot be read.
pub fn runs_in(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut runs = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // Other folders may lie beside runs.
        if is_run(&path) {
            runs.push((changed(&path), path));
        }
    }
    runs.sort_by(|(one, at), (other, beside)| other.cmp(one).then_with(|| at.cmp(beside)));
    Ok(runs.into_iter().map(|(_, path)| path).collect())
}

/// Time of a run's newest record; the oldest of all times where nothing can be read.
fn changed(run: &Path) -> SystemTime {
    let written = |file: &&str| fs::metadata(run.join(file)).and_then(|about| about.modified()).ok();
    let records = [JOB, JOURNAL, "events.jsonl", "metrics.jsonl"];
    records.iter().filter_map(written).max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Names that a user may give, for messages.
fn known() -> String {
    let runs = runs_in(Path::new(RUNS)).unwrap_or_default();
    if runs.is_empty() {
        return format!("there are no runs in {RUNS}/ here, so give the folder that a coordinator trains in");
    }
    let names: Vec<String> =
        runs.iter().take(LISTED).filter_map(|run| Some(run.file_name()?.display().to_string())).collect();
    let more = if runs.len() > LISTED { ", ..." } else { "" };
    format!("give the folder of a run, or a name in {RUNS}/, which has {}{more}", names.join(", "))
}

/// The run that a command is about; without a name the newest in `runs/`.
///
/// # Errors
/// There is no such run.
pub fn chosen(name: Option<&RunName>) -> Result<Chosen, RunError> {
    let name = name.map(RunName::as_it_is);
    let checkpoint = name.as_ref().and_then(RunName::checkpoint);
    if let Some(name) = name.filter(|name| !name.place.is_empty()) {
        let folder = name.folder().ok_or_else(|| name.unknown("no run"))?;
        return Ok(Chosen { folder, checkpoint, told: None });
    }
    let runs = runs_in(Path::new(RUNS)).unwrap_or_default();
    let Some(newest) = runs.first().cloned() else { return Err(RunError::Input(known())) };
    let why = match runs.len() {
        1 => format!("the only run in {RUNS}/"),
        count => format!("the newest of {count} runs"),
    };
    Ok(Chosen { told: Some(format!("{}, {why}", newest.display())), folder: newest, checkpoint })
}

/// The run that a command changes; without a name the only one in `runs/` that `is_one` accepts. `what`
/// describes it, such as "run that is going on".
///
/// # Errors
/// There is no such run, or more than one.
pub fn only(name: Option<&RunName>, is_one: impl Fn(&Path) -> bool, what: &str) -> Result<Chosen, RunError> {
    if name.is_some_and(|name| !name.place.is_empty()) {
        return chosen(name);
    }
    let runs = runs_in(Path::new(RUNS)).unwrap_or_default();
    let runs: Vec<PathBuf> = runs.into_iter().filter(|run| is_one(run)).collect();
    match &runs[..] {
        [one] => Ok(Chosen {
            folder: one.clone(),
            checkpoint: name.and_then(RunName::checkpoint),
            told: Some(format!("{}, the only {what} in {RUNS}/", one.display())),
        }),
        [] => Err(RunError::Input(format!("there is no {what} in {RUNS}/ here; name the folder of a run"))),
        several => {
            let names: Vec<String> = several.iter().map(|run| run.display().to_string()).collect();
            Err(RunError::Input(format!("each of these is a {what}, so name one: {}", names.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, Option<CheckpointChoice>) {
        let name: RunName = text.parse().unwrap();
        (name.place, name.checkpoint)
    }

    #[test]
    fn a_name_is_a_run_and_perhaps_one_of_its_checkpoints() {
        let at = |step, phase| Some(CheckpointChoice::At { step, phase });
        let best = Some(CheckpointChoice::Best);
        for (text, place, choice) in [
            ("mnist-mlp", "mnist-mlp", None),
            ("runs/x@best", "runs/x", best),
            ("runs/x@latest", "runs/x", Some(CheckpointChoice::Latest)),
            ("runs/x@5000", "runs/x", at(5000, 0)),
            ("runs/x@step-00005000", "runs/x", at(5000, 0)),
            ("runs/x@step-00005000-phase-1", "runs/x", at(5000, 1)),
            ("@best", "", best),
            ("runs/a@b@7", "runs/a@b", at(7, 0)),
            // No checkpoint stands behind the @.
            ("runs/x@+5", "runs/x@+5", None),
            ("runs/x@bset", "runs/x@bset", None),
            ("runs/x@99999999999999999999", "runs/x@99999999999999999999", None),
            ("s3://bucket/a@best", "s3://bucket/a", best),
            ("abfs://box@5000", "abfs://box@5000", None),
            ("abfs://box@account.net/run@10", "abfs://box@account.net/run", at(10, 0)),
        ] {
            assert_eq!(parsed(text), (place.to_string(), choice), "{text}");
        }
        for text in ["", "@", "runs/x@"] {
            assert_eq!(text.parse::<RunName>(), Err(BadRunName), "{text}");
        }
    }

    #[test]
    fn credentials_in_a_name_are_not_shown() {
        for text in ["s3://key:hush@bucket/a@best", "s3://key:hush@5000", "s3://key:hush@b/c"] {
            let name: RunName = text.parse().unwrap();
            assert_eq!(name.to_string(), "...", "{text}");
        }
    }

    #[test]
    fn runs_are_listed_by_their_newest_record() {
        let root = tempfile::tempdir().unwrap();
        let hour = std::time::Duration::from_secs(3600);
        for (age, name) in (1u32..).zip(["old", "middle", "new"]) {
            fs::create_dir(root.path().join(name)).unwrap();
            let file = fs::File::create(root.path().join(name).join(JOB)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + age * hour).unwrap();
        }
        fs::create_dir(root.path().join("no-run")).unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let listed = runs_in(root.path()).unwrap();
        let names: Vec<_> = listed.iter().map(|run| run.file_name().unwrap()).collect();
        assert_eq!(names, ["new", "middle", "old"]);
        assert!(is_run(&root.path().join("old")) && !is_run(&root.path().join("no-run")));
    }

    #[test]
    fn a_folder_with_the_name_of_a_checkpoint_is_that_folder() {
        let root = tempfile::tempdir().unwrap();
        for folder in ["x", "x@best"] {
            fs::create_dir(root.path().join(folder)).unwrap();
            fs::write(root.path().join(folder).join(JOB), "").unwrap();
        }
        let name = |text: &str| -> RunName { root.path().join(text).display().to_string().parse().unwrap() };
        let found = |text: &str| {
            let Chosen { folder, checkpoint, .. } = chosen(Some(&name(text))).unwrap();
            (folder.file_name().unwrap().display().to_string(), checkpoint)
        };
        assert_eq!(found("x@best"), ("x@best".to_string(), None));
        assert_eq!(found("x/"), ("x".to_string(), None));
        assert_eq!(found("x@3"), ("x".to_string(), Some(CheckpointChoice::At { step: 3, phase: 0 })));
        let unknown = chosen(Some(&name("y@bset"))).unwrap_err().to_string();
        assert!(unknown.contains("y@bset: no run is there; behind @ stands best"), "{unknown}");
    }
}
