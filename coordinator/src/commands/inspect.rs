//! Commands that read a run's files without asking a coordinator: `coordinator runs` and
//! `coordinator checkpoints`.
//!
//! 1. Nothing is written, and a run in progress is not disturbed.
//! 2. Only the ends of a run's records are read, so a long run is listed as fast as a short one.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use ganglion_membership::Checkpoint;
use ganglion_proto::job::Job;
use ganglion_proto::out;
use ganglion_proto::progress::Progress;
use ganglion_proto::record::{EventLine, MetricsRow, RunEvent, RunOutcome};
use ganglion_storage::run::{Chosen, JOB, Shelf, best, manifests, runs_in};
use ganglion_storage::{Address, Error, MANIFEST, Storage, in_folder};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use crate::checkpoints::catalog::check_files;
use crate::commands::audit::evidence::silent;
use crate::error::Failure;
use crate::job_file;
use crate::journal::History;
use crate::records::table::{Table, ago, size};
use crate::run_dir::ownership::is_claimed;

/// Bytes read from the end of a file at first; four times as many where its last line is longer.
// A row or an event has some hundred bytes. The event of a group of hundreds of members is longer, and
// is the last one only where a coordinator died right after it.
const TAIL: u64 = 64 << 10;
/// Maximum number of bytes read from the end of a file.
// Room for the longest line of events.jsonl (`LINE_LIMIT` in records/events.rs) and for one in progress.
const TAIL_LIMIT: u64 = 4 << 20;

/// State of a run, as seen from its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Standing {
    /// A coordinator holds the run directory.
    Running,
    /// The last step is done.
    Complete,
    /// A coordinator stopped it after a clean checkpoint.
    Stopped,
    /// The newest coordinator ended with an error.
    Failed,
    /// The newest coordinator died without recording an end.
    Interrupted,
}

impl Standing {
    /// Returns the name used in the table and in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Standing::Running => "running",
            Standing::Complete => "complete",
            Standing::Stopped => "stopped",
            Standing::Failed => "failed",
            Standing::Interrupted => "interrupted",
        }
    }
}

/// Summary of a run, read from its files.
#[derive(Debug, Serialize)]
pub(crate) struct Overview {
    /// The run directory.
    pub run_dir: PathBuf,
    /// Name of the job, `job.name`.
    pub name: String,
    /// State of the run.
    pub standing: Standing,
    /// Newest recorded step.
    pub step: u64,
    /// Last step of the job; `None` while the size of the data set is unknown.
    pub last_step: Option<u64>,
    /// Step of the newest checkpoint.
    pub checkpoint_step: Option<u64>,
    /// `state_digest` of the newest checkpoint.
    pub state_digest: Option<String>,
    /// Time of the newest record, in seconds of Unix time.
    pub changed: f64,
}

/// A run in a list.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum ListedRun {
    Read(Overview),
    /// A run whose files cannot be read, with the reason.
    Unreadable {
        run_dir: PathBuf,
        standing: &'static str,
        reason: String,
    },
}

impl ListedRun {
    fn read(run: PathBuf) -> ListedRun {
        match overview(&run) {
            Ok(overview) => ListedRun::Read(overview),
            // One of them must not hide the others.
            Err(failure) => {
                ListedRun::Unreadable { run_dir: run, standing: "unreadable", reason: failure.to_string() }
            }
        }
    }

    fn changed(&self) -> f64 {
        match self {
            ListedRun::Read(run) => run.changed,
            ListedRun::Unreadable { .. } => f64::NEG_INFINITY,
        }
    }

    fn row(&self) -> [String; 6] {
        let dash = || "-".to_string();
        let step = |step: Option<u64>| step.map_or_else(dash, |step| step.to_string());
        match self {
            ListedRun::Read(run) => [
                run.run_dir.display().to_string(),
                run.standing.name().to_string(),
                run.step.to_string(),
                step(run.last_step),
                step(run.checkpoint_step),
                ago(run.changed),
            ],
            ListedRun::Unreadable { run_dir, standing, .. } => {
                [run_dir.display().to_string(), (*standing).to_string(), dash(), dash(), dash(), dash()]
            }
        }
    }
}

/// Lists the runs in a folder, newest first; those that cannot be read come last, with the reason.
pub(crate) fn runs(folder: &Path, json: bool) -> Result<String, Failure> {
    let listed = runs_in(folder).map_err(|error| {
        Failure::Input(format!("{}: {error}; give the folder that holds run directories", folder.display()))
    })?;
    let mut runs: Vec<ListedRun> = listed.into_iter().map(ListedRun::read).collect();
    runs.sort_by(|one, other| other.changed().total_cmp(&one.changed()));
    if json {
        return Ok(as_json(&runs));
    }
    if runs.is_empty() {
        return Ok(format!("no runs in {}", folder.display()));
    }
    let mut table = Table::new(&["<run", "<state", "step", "of", "checkpoint", "changed"]);
    runs.iter().for_each(|run| table.row(run.row()));
    let reasons = runs.iter().filter_map(|run| match run {
        ListedRun::Read(_) => None,
        ListedRun::Unreadable { run_dir, reason, .. } => {
            Some(format!("\n{} cannot be read: {reason}", run_dir.display()))
        }
    });
    Ok(format!("{table}{}", reasons.collect::<String>()))
}

/// Reads the summary of one run directory.
pub(crate) fn overview(run: &Path) -> Result<Overview, Failure> {
    let wrong = |file: &str, error: &dyn std::fmt::Display| {
        Failure::Input(format!(
            "{}: {error}; give a folder that a coordinator trains in, such as runs/mnist-mlp",
            run.join(file).display()
        ))
    };
    let text = fs::read_to_string(run.join("job.toml")).map_err(|error| wrong("job.toml", &error))?;
    let job = job_file::parse_resolved(&text).map_err(|errors| wrong("job.toml", &errors))?;
    let journal = run.join("journal.sqlite");
    // Read without a lock, so that a coordinator at work is not held up (1).
    let history = History::read(&journal).map_err(|error| wrong("journal.sqlite", &error))?;
    let newest = history.checkpoints.iter().max_by_key(|checkpoint| checkpoint.position);
    let row = newest_row(run);
    let event = last_line(&run.join("events.jsonl")).and_then(|line| EventLine::parse(&line).ok());
    let changed = event.as_ref().map_or(row.time, |event| row.time.max(event.time));
    Ok(Overview {
        run_dir: run.to_path_buf(),
        name: job.job.name.clone(),
        standing: standing(run, event.and_then(|event| event.event.ok()).as_ref()),
        // The newest row may be damaged, which the next start mends.
        step: row.step.max(newest.map_or(0, |newest| newest.step)),
        last_step: history.samples.map(|samples| Job { shape: history.shape, ..job }.last_step(samples)),
        checkpoint_step: newest.map(|checkpoint| checkpoint.step),
        state_digest: newest.map(|checkpoint| checkpoint.state_digest.clone()),
        changed,
    })
}

/// The newest row of a run's metrics; the default where there is none that can be read.
pub(crate) fn newest_row(run: &Path) -> MetricsRow {
    let row = last_line(&run.join("metrics.jsonl"));
    row.and_then(|line| serde_json::from_slice(&line).ok()).unwrap_or_default()
}

fn standing(run: &Path, newest_event: Option<&RunEvent>) -> Standing {
    if is_held(run) {
        return Standing::Running;
    }
    // Only once nobody holds it: a run that goes on may have an old end among its events.
    match newest_event {
        Some(RunEvent::RunEnded { outcome: RunOutcome::Complete, .. } | RunEvent::Staying {}) => {
            Standing::Complete
        }
        Some(RunEvent::RunEnded { outcome: RunOutcome::Stopped, .. }) => Standing::Stopped,
        Some(RunEvent::RunEnded { .. }) => Standing::Failed,
        _ => Standing::Interrupted,
    }
}

/// Whether a coordinator holds a run directory. The check takes a shared lock for an instant; a
/// coordinator that starts at that instant tries again. On file systems whose locks do not reach
/// other machines the claims decide.
pub(crate) fn is_held(run: &Path) -> bool {
    let Ok(file) = File::open(run.join("lock")) else { return false };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        // A holder has it exclusively; two checks at once share it.
        Err((_, Errno::EWOULDBLOCK)) => true,
        asked => is_claimed(run, asked.is_ok()),
    }
}

/// Returns the last whole line of a file of JSON lines.
fn last_line(file: &Path) -> Option<Vec<u8>> {
    let mut file = File::open(file).ok()?;
    let length = file.seek(SeekFrom::End(0)).ok()?;
    let mut size = TAIL;
    // Only the end: the metrics of a long run may be gigabytes (2).
    while size <= TAIL_LIMIT {
        let from = length.saturating_sub(size);
        file.seek(SeekFrom::Start(from)).ok()?;
        let mut tail = Vec::new();
        // No further than `length`: what is appended meanwhile may be any number of lines.
        (&file).take(length - from).read_to_end(&mut tail).ok()?;
        if let Some(line) = last_whole(&tail, from == 0) {
            return Some(line.to_vec());
        }
        if from == 0 {
            return None;
        }
        size *= 4;
    }
    None
}

/// Last whole line in the end of a file, or in all of it. Behind the last newline a line may be in
/// progress.
fn last_whole(tail: &[u8], is_all: bool) -> Option<&[u8]> {
    let newline = |text: &[u8]| text.iter().rposition(|byte| *byte == b'\n');
    let whole = &tail[..newline(tail)?];
    // Without a newline before it, the line may begin before the part that was read.
    let start = newline(whole).map(|end| end + 1).or(is_all.then_some(0))?;
    Some(&whole[start..])
}

/// Metric that decided for the best checkpoint.
#[derive(Debug, Serialize)]
struct BestBy {
    metric: String,
    value: f64,
}

/// A checkpoint, as described by its manifest.
#[derive(Debug, Default, Serialize)]
struct Listed {
    folder: String,
    step: u64,
    phase: u32,
    bytes: u64,
    /// Time at which the manifest was written, in seconds of Unix time; `None` where the storage
    /// does not record it.
    written: Option<f64>,
    state_digest: String,
    /// Other names of the checkpoint, `latest` and `best`.
    names: Vec<&'static str>,
    /// Metric by which it is the best, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    best_by: Option<BestBy>,
    /// Description of the damage, if there is any.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

/// Prints a run's checkpoints, oldest first, or the one that was chosen. With `verify` all of their files
/// are read and hashed.
pub(crate) fn checkpoints(run: &Chosen, verify: bool, json: bool) -> Result<(), Failure> {
    let progress = Progress::start("looking for checkpoints");
    let folder = &run.folder;
    let text = fs::read_to_string(folder.join(JOB)).map_err(|error| {
        Failure::Input(format!("{}: {error}; give the folder of a run", folder.join(JOB).display()))
    })?;
    let job = job_file::parse_resolved(&text).map_err(Failure::input)?;
    let shelf = Shelf::open(&folder.display().to_string(), folder, job.checkpoint.url.as_deref())?;
    let storage = shelf.storage();
    let one = run.checkpoint.map(|choice| shelf.checkpoint(Some(choice))).transpose()?;
    let listed = shelf.wait(list(storage, one.as_deref(), verify, &progress));
    let listed = listed.map_err(|error| Failure::Other(silent(storage, &error).to_string()))?;
    let damaged: Vec<String> = listed
        .iter()
        .filter_map(|listed| Some(format!("{}: {}", listed.folder, listed.damage.as_ref()?)))
        .collect();
    out::print(&if json { as_json(&listed) } else { render(storage.address(), &listed, verify) })?;
    if damaged.is_empty() {
        return Ok(());
    }
    Err(Failure::Other(format!("damaged checkpoints: {}", damaged.join("; "))))
}

async fn list(
    storage: &Storage,
    one: Option<&str>,
    verify: bool,
    progress: &Progress,
) -> Result<Vec<Listed>, Error> {
    let (mut listed, mut manifests) = (Vec::new(), manifests(storage).await?);
    let (latest, best) = (manifests.last().map(|(folder, _)| folder.clone()), best(storage).await?);
    let best = best.and_then(Result::ok);
    manifests.retain(|(folder, _)| one.is_none_or(|one| one == folder));
    progress.part("checkpoints read", if verify { manifests.len() as u64 } else { 0 });
    for (folder, manifest) in manifests {
        let written = storage.modified(&in_folder(&folder, MANIFEST)).await.ok();
        let written = written.and_then(|time| Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs_f64()));
        let best = best.as_ref().filter(|best| best.folder == folder);
        let names = [("latest", latest.as_ref() == Some(&folder)), ("best", best.is_some())];
        let names = names.iter().filter(|(_, is_named)| *is_named).map(|(name, _)| *name).collect();
        let best_by = best.map(|best| BestBy { metric: best.metric.clone(), value: best.value });
        let about = Listed { names, best_by, written, ..Listed::default() };
        listed.push(match manifest {
            Ok(checkpoint) => {
                let damage = if verify { check_files(storage, &checkpoint).await? } else { None };
                Listed { damage, ..about.of(checkpoint) }
            }
            // Listed all the same: a checkpoint that cannot be used must be seen.
            Err(damage) => Listed { folder, damage: Some(damage), ..about },
        });
        progress.add(1);
    }
    Ok(listed)
}

impl Listed {
    fn of(self, checkpoint: Checkpoint) -> Listed {
        Listed {
            folder: checkpoint.folder(),
            step: checkpoint.step,
            phase: checkpoint.phase,
            bytes: checkpoint.files.iter().map(|file| file.bytes).sum(),
            state_digest: checkpoint.state_digest,
            ..self
        }
    }
}

fn render(storage: &Address, listed: &[Listed], verify: bool) -> String {
    if listed.is_empty() {
        return format!("no checkpoints in {storage}");
    }
    let mut table = Table::new(&["<checkpoint", "step", "size", "saved", "<state_digest", "<", "<"]);
    for checkpoint in listed {
        let state = match &checkpoint.damage {
            Some(_) => "damaged",
            None if verify => "whole",
            None => "",
        };
        table.row([
            checkpoint.folder.clone(),
            checkpoint.step.to_string(),
            size(checkpoint.bytes),
            checkpoint.written.map_or("-".to_string(), ago),
            checkpoint.state_digest.clone(),
            match &checkpoint.best_by {
                Some(BestBy { metric, value }) => {
                    format!("{} ({} {value:.4})", checkpoint.names.join(", "), metric.replace('_', " "))
                }
                None => checkpoint.names.join(", "),
            },
            state.to_string(),
        ]);
    }
    table.to_string()
}

/// Renders a value as JSON for programs.
pub(crate) fn as_json(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).expect("texts and numbers can be written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_line_is_found_behind_a_torn_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lines");
        for (text, last) in [("one\n", "one"), ("one\ntwo\nth", "two")] {
            fs::write(&file, text).unwrap();
            assert_eq!(last_line(&file).unwrap(), last.as_bytes());
        }
        fs::write(&file, "{\"st").unwrap();
        assert!(last_line(&file).is_none());
        let long = format!("{}\nthree\n", "x".repeat(2 * usize::try_from(TAIL).unwrap()));
        fs::write(&file, long).unwrap();
        assert_eq!(last_line(&file).unwrap(), b"three");
    }

    #[test]
    fn a_last_line_of_any_length_is_read_from_its_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lines");
        let tail = usize::try_from(TAIL).unwrap();
        for length in [tail - 1, tail, tail + 1, 1 << 20] {
            let long = "x".repeat(length);
            for before in ["", "one\n"] {
                // A torn line behind it may be as long.
                for torn in ["", &long] {
                    fs::write(&file, format!("{before}{long}\n{torn}")).unwrap();
                    assert!(
                        last_line(&file).unwrap() == long.as_bytes(),
                        "{length} {before:?} {}",
                        torn.len()
                    );
                }
            }
        }
    }

    #[test]
    fn how_things_stand_is_told_by_the_lock_and_by_the_last_event() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        let ended = |outcome| Some(RunEvent::RunEnded { detail: String::new(), outcome });
        let standing = |event: Option<RunEvent>| standing(run, event.as_ref());
        assert_eq!(standing(ended(RunOutcome::Complete)), Standing::Complete);
        assert_eq!(standing(ended(RunOutcome::Stopped)), Standing::Stopped);
        assert_eq!(standing(ended(RunOutcome::InputError)), Standing::Failed);
        assert_eq!(standing(Some(RunEvent::Staying {})), Standing::Complete);
        assert_eq!(standing(Some(RunEvent::StopRequested {})), Standing::Interrupted);
        let held = crate::run_dir::RunDir::hold(run).unwrap();
        assert_eq!(standing(ended(RunOutcome::Complete)), Standing::Running);
        drop(held);
        assert_eq!(standing(ended(RunOutcome::Complete)), Standing::Complete);
    }
}
