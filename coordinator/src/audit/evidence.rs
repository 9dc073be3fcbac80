//! What an audit reads of a run directory, in the order of invariant 2 of [`super`].

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::path::Path;

use ganglion_membership::Checkpoint;
use ganglion_proto::job::Job;
use ganglion_proto::manifest;
use ganglion_storage::{Address, Blocking, MANIFEST, Storage, in_folder, reason};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::job_file;
use crate::journal::History;

/// A folder that is no run directory, or one that cannot be read: what, where, and how to mend it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoRun(String);

/// A run's files, as read once.
pub(super) struct Evidence {
    /// The job as it was resolved last.
    pub(super) job: Job,
    pub(super) events: Lines<Event>,
    pub(super) rows: Lines<Row>,
    /// The folder that `latest` names.
    pub(super) latest: Option<String>,
    /// The checkpoints that have a manifest, by folder.
    pub(super) manifests: Vec<(String, Result<Checkpoint, String>)>,
    /// Where the checkpoints are.
    pub(super) storage: Blocking,
    pub(super) history: History,
}

/// The lines of a file, and those that could not be read.
pub(super) struct Lines<T> {
    pub(super) whole: Vec<T>,
    pub(super) damaged: Vec<String>,
}

/// An event, as far as an audit needs it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Event {
    pub(super) kind: String,
    pub(super) term: Option<u64>,
    pub(super) generation: Option<u64>,
    pub(super) position: Option<u64>,
    pub(super) world_size: Option<u64>,
    pub(super) step: Option<u64>,
    pub(super) phase: Option<u64>,
    pub(super) state_digest: Option<String>,
    pub(super) outcome: Option<String>,
    pub(super) detail: Option<String>,
}

/// A row of metrics, as far as an audit needs it.
#[derive(Debug, Deserialize)]
pub(super) struct Row {
    pub(super) step: u64,
    pub(super) generation: u64,
    pub(super) world_size: u64,
    pub(super) images_seen: u64,
    #[serde(default)]
    pub(super) ledger: String,
}

impl Evidence {
    pub(super) fn read(run: &Path) -> Result<Evidence, NoRun> {
        let file = |name: &str| run.join(name);
        let (job, journal) = (file("job.toml"), file("journal.sqlite"));
        for needed in [&job, &journal] {
            if !needed.is_file() {
                let name = needed.file_name().unwrap_or_default().display();
                return Err(NoRun(format!(
                    "{}: not a run directory: it has no {name}; give the folder that a coordinator trains in, such as \
                     runs/mnist-mlp",
                    run.display()
                )));
            }
        }
        let unreadable = |file: &Path, error: String| {
            NoRun(format!("{}: {error}; audit as a user that can read it", file.display()))
        };
        let text = fs::read_to_string(&job).map_err(|error| unreadable(&job, error.to_string()))?;
        let resolved = job_file::parse_resolved(&text).map_err(|errors| {
            NoRun(format!(
                "{}: not a job as a coordinator writes it, so nothing can be measured by it:\n{errors}\n  \
                               restore the file",
                job.display()
            ))
        })?;
        let lines = |name: &str| (file(name), name.to_string());
        let (path, name) = lines("events.jsonl");
        let events = Lines::read(&path, &name).map_err(|error| unreadable(&path, error.to_string()))?;
        let (path, name) = lines("metrics.jsonl");
        let rows = Lines::read(&path, &name).map_err(|error| unreadable(&path, error.to_string()))?;
        let storage = open_storage(run, &resolved)?;
        let latest = storage.wait(storage.storage().latest());
        let latest = latest.map_err(|error| silent(storage.storage(), &error))?;
        let manifests = storage.wait(manifests(storage.storage()));
        let manifests = manifests.map_err(|error| silent(storage.storage(), &error))?;
        let history = History::read(&journal).map_err(|error| unreadable(run, error.to_string()))?;
        Ok(Evidence { job: resolved, events, rows, latest, manifests, storage, history })
    }

    /// Whether the last coordinator ended by its own decision. Otherwise it may still be at work.
    pub(super) fn ended(&self) -> bool {
        self.events.whole.last().is_some_and(|event| event.kind == "run_ended")
    }

    /// The events of a kind, in order.
    pub(super) fn events_of(&self, kind: &'static str) -> impl Iterator<Item = &Event> {
        self.events.whole.iter().filter(move |event| event.kind == kind)
    }

    /// The manifests that could be read.
    pub(super) fn checkpoints(&self) -> impl Iterator<Item = &Checkpoint> {
        self.manifests.iter().filter_map(|(_, manifest)| manifest.as_ref().ok())
    }

    /// Whether a row of the journal that tells of a number may have been lost before the journal was
    /// recovered.
    pub(super) fn may_lack(&self, table: &str, number: u64) -> bool {
        self.history.recovery.as_ref().is_some_and(|recovery| recovery.may_lack(table, number))
    }

    /// The position at the end of a step.
    pub(super) fn end_of(&self, step: u64) -> u64 {
        step.saturating_mul(self.job.phases_per_step())
    }
}

impl<T: DeserializeOwned> Lines<T> {
    /// Reads a file, none if it is not there yet. Its last line may be under way or torn: it counts once it
    /// is whole.
    fn read(path: &Path, name: &str) -> io::Result<Lines<T>> {
        let mut lines = Lines { whole: Vec::new(), damaged: Vec::new() };
        let mut reader = match fs::File::open(path) {
            Ok(file) => BufReader::new(file),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(lines),
            Err(error) => return Err(error),
        };
        let mut line = Vec::new();
        for number in 1_u64.. {
            line.clear();
            reader.read_until(b'\n', &mut line)?;
            if line.pop() != Some(b'\n') {
                break;
            }
            match serde_json::from_slice(&line) {
                Ok(read) => lines.whole.push(read),
                Err(error) => lines.damaged.push(format!("{name}:{number} cannot be read: {error}")),
            }
        }
        Ok(lines)
    }
}

/// Opens the storage of checkpoints. A folder that is not there yet holds none.
pub(crate) fn open_storage(run: &Path, job: &Job) -> Result<Blocking, NoRun> {
    let own = || run.join("checkpoints").display().to_string();
    let text = job.checkpoint.url.clone().unwrap_or_else(own);
    let wrong = |what: String| {
        NoRun(format!("checkpoint.url {text}: {what}; without it nothing is proven of checkpoints"))
    };
    let address = Address::parse(&text).map_err(wrong)?;
    let storage = match &address {
        Address::Folder(folder) if !folder.exists() => Storage::in_memory(),
        _ => Storage::open(&address).map_err(wrong)?,
    };
    Blocking::new(storage).map_err(|error| wrong(error.to_string()))
}

/// A storage that does not answer.
pub(crate) fn silent(storage: &Storage, error: &ganglion_storage::Error) -> NoRun {
    let (address, reason) = (storage.address(), reason(error));
    NoRun(format!(
        "{address}: {reason}; without the checkpoints nothing is proven: audit once they can be read"
    ))
}

/// The manifests on a storage, by folder. One that is removed meanwhile is none.
pub(crate) async fn manifests(
    storage: &Storage,
) -> ganglion_storage::Result<Vec<(String, Result<Checkpoint, String>)>> {
    let mut manifests = Vec::new();
    for folder in storage.checkpoints().await? {
        let manifest = match storage.text(&in_folder(&folder, MANIFEST)).await {
            Ok(Some(text)) => manifest::parse(&text).map_err(|error| error.to_string()),
            Ok(None) => continue,
            Err(error) if storage.is_away(&error) => return Err(error),
            Err(error) => Err(format!("{MANIFEST}: {}", reason(&error))),
        };
        manifests.push((folder, manifest));
    }
    Ok(manifests)
}
