//! Evidence of an audit: the files of a run directory, read in the order of invariant 2 of [`super`].

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::path::Path;

use ganglion_membership::Checkpoint;
use ganglion_proto::job::Job;
use ganglion_proto::record::{EventLine, FORMAT, MetricsRow, RunEvent, Unread};
use ganglion_storage::run::{manifests, place_of};
use ganglion_storage::{Address, Blocking, Storage, reason};

use crate::job_file;
use crate::journal::History;

/// Error for a folder that is not a run directory, or cannot be read; the text says what, where,
/// and how to mend it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoRun(String);

/// A run's files, each read once.
pub(super) struct Evidence {
    /// The newest resolved job.
    pub(super) job: Job,
    /// Events; `None` for one of another version.
    pub(super) events: Lines<Option<RunEvent>>,
    pub(super) rows: Lines<MetricsRow>,
    /// Folder named by `latest`.
    pub(super) latest: Option<String>,
    /// Manifests by folder; the error says why one cannot be parsed.
    pub(super) manifests: Vec<(String, Result<Checkpoint, String>)>,
    /// Storage that holds the checkpoints.
    pub(super) storage: Blocking,
    pub(super) history: History,
}

/// Parsed lines of a file, and descriptions of the unreadable ones.
pub(super) struct Lines<T> {
    pub(super) whole: Vec<T>,
    pub(super) damaged: Vec<String>,
}

impl Evidence {
    pub(super) fn read(run: &Path) -> Result<Evidence, NoRun> {
        let file = |name: &str| run.join(name);
        let (job, journal) = (file("job.toml"), file("journal.sqlite"));
        // The two files that every claim is measured by.
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
        let (path, name) = (file("events.jsonl"), "events.jsonl");
        // The order of the module's rule 2: events and rows, then the storage, then the journal.
        let events = Lines::read(&path, name, event).map_err(|error| unreadable(&path, error.to_string()))?;
        let formats = events.whole.iter().flatten().filter_map(|event| match event {
            RunEvent::CoordinatorStarted { format, .. } => *format,
            _ => None,
        });
        let newest = formats.max().unwrap_or_default();
        // Whatever this version does not know would be passed over, and a claim would hold that is not
        // shown.
        if newest > FORMAT {
            return Err(NoRun(format!(
                "{}: a newer version wrote the run's records: their format is {newest}, and this version knows none above \
                 {FORMAT}; audit with the version that wrote them, or a newer one",
                path.display()
            )));
        }
        let (path, name) = (file("metrics.jsonl"), "metrics.jsonl");
        let rows = Lines::read(&path, name, |line| serde_json::from_slice(line));
        let rows = rows.map_err(|error| unreadable(&path, error.to_string()))?;
        let storage = open_storage(run, &resolved)?;
        let latest = storage.wait(storage.storage().latest());
        let latest = latest.map_err(|error| silent(storage.storage(), &error))?;
        let manifests = storage.wait(manifests(storage.storage()));
        let manifests = manifests.map_err(|error| silent(storage.storage(), &error))?;
        // Last of all files.
        let history = History::read(&journal).map_err(|error| unreadable(run, error.to_string()))?;
        // By the objective that was trained; a journal of an earlier version has the job's own alone.
        let job = Job { shape: history.shape.clone(), ..resolved };
        Ok(Evidence { job, events, rows, latest, manifests, storage, history })
    }

    /// Whether the last coordinator recorded its end. If not, it may still be at work.
    pub(super) fn ended(&self) -> bool {
        matches!(self.events.whole.last(), Some(Some(RunEvent::RunEnded { .. })))
    }

    /// Events of this version, in order.
    pub(super) fn events(&self) -> impl DoubleEndedIterator<Item = &RunEvent> {
        self.events.whole.iter().flatten()
    }

    /// Manifests that could be parsed.
    pub(super) fn checkpoints(&self) -> impl Iterator<Item = &Checkpoint> {
        self.manifests.iter().filter_map(|(_, manifest)| manifest.as_ref().ok())
    }

    /// Whether the journal may have lost a row about this number before it was recovered.
    pub(super) fn may_lack(&self, table: &str, number: u64) -> bool {
        self.history.recovery.as_ref().is_some_and(|recovery| recovery.may_lack(table, number))
    }

    /// Update index at the end of a step.
    pub(super) fn end_of(&self, step: u64) -> u64 {
        step.saturating_mul(self.job.phases_per_step())
    }
}

/// Parses an event; `None` for one of another version, or without its keys.
fn event(line: &[u8]) -> Result<Option<RunEvent>, serde_json::Error> {
    match EventLine::parse(line)?.event {
        Ok(event) => Ok(Some(event)),
        Err(Unread::Broken(error)) => Err(error),
        Err(Unread::OtherVersion | Unread::LeftOut) => Ok(None),
    }
}

impl<T> Lines<T> {
    /// Reads a file; empty if it does not exist yet. The last line may be in progress or torn: it
    /// counts only once it is whole.
    fn read(
        path: &Path,
        name: &str,
        parse: impl Fn(&[u8]) -> Result<T, serde_json::Error>,
    ) -> io::Result<Lines<T>> {
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
            // No decision was told by half a line.
            if line.pop() != Some(b'\n') {
                break;
            }
            match parse(&line) {
                Ok(read) => lines.whole.push(read),
                Err(error) => lines.damaged.push(format!("{name}:{number} cannot be read: {error}")),
            }
        }
        Ok(lines)
    }
}

/// Opens the storage of checkpoints. A folder that does not exist yet is an empty storage.
pub(crate) fn open_storage(run: &Path, job: &Job) -> Result<Blocking, NoRun> {
    let text = place_of(run, job.checkpoint.url.as_deref());
    let wrong = |what: String| {
        NoRun(format!("checkpoint.url {text}: {what}; without it nothing is proven of checkpoints"))
    };
    let address = Address::parse(&text).map_err(|error| wrong(error.to_string()))?;
    let storage = match &address {
        // Opening it would create it, and an audit writes nothing (1).
        Address::Folder(folder) if !folder.exists() => Storage::in_memory(),
        _ => Storage::open(&address).map_err(wrong)?,
    };
    Blocking::new(storage).map_err(|error| wrong(error.to_string()))
}

/// Error for a storage that does not answer.
pub(crate) fn silent(storage: &Storage, error: &ganglion_storage::Error) -> NoRun {
    let (address, reason) = (storage.address(), reason(error));
    NoRun(format!(
        "{address}: {reason}; without the checkpoints nothing is proven: audit once they can be read"
    ))
}
