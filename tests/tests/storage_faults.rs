//! Storage that is full, read-only or failing, at each checkpoint: only work that needs it pauses.
//!
//! No worker is lost or killed for it, no step is done twice, and once there is room the run ends with the
//! bits of an undisturbed one.
#![allow(clippy::unwrap_used)] // a test may panic

use std::collections::{BTreeMap, BTreeSet};
use std::io::Error;
use std::thread;

use ganglion_tests::disk::{Disk, Faults};
use ganglion_tests::{Process, Reference, Run, SMALL_MLP, eventually, is_running, send};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use serde_json::Value;

/// Checkpoints at 900, 1800 and the end. The deadline is short, so a member is soon late.
const JOB: &[&str] = &[
    "job.steps=2700",
    "checkpoint.every_steps=900",
    "metrics.every_steps=50",
    "job.data_shards=4",
    "job.failure_deadline=1",
];

/// Attempts of one worker whose pauses are together longer than several deadlines.
const ATTEMPTS: usize = 4;

/// Runs of one case, of which one is to be disturbed.
const TRIES: usize = 5;

/// Kinds of failure.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Full,
    ReadOnly,
    /// System call on a path with this part.
    Call(&'static str, Errno, &'static str),
}

impl Kind {
    /// Reason that the run gives.
    fn reason(self) -> String {
        match self {
            Kind::Full => "it needs ".to_string(),
            Kind::ReadOnly => "Read-only file system".to_string(),
            Kind::Call(_, error, _) => Error::from(error).to_string(),
        }
    }
}

/// Step whose checkpoint is disturbed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    First = 900,
    Middle = 1800,
    Last = 2700,
}

/// The checkpoint storage of a run, and how it fails.
struct Failing {
    kind: Kind,
    disk: Disk,
    faults: Option<Faults>,
}

impl Failing {
    fn new(kind: Kind, run: &mut Run) -> Option<Failing> {
        let disk = Disk::mount(run.beside("disk"))?;
        run.set(&format!("checkpoint.url={}", disk.folder.display()));
        let faults = match kind {
            Kind::Call(..) => Some(Faults::compile()?),
            Kind::Full | Kind::ReadOnly => None,
        };
        Some(Failing { kind, disk, faults })
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        self.faults.iter().flat_map(Faults::variables).collect()
    }

    fn begin(&self) {
        match (self.kind, &self.faults) {
            (Kind::Full, _) => self.disk.fill(),
            (Kind::ReadOnly, _) => self.disk.set_read_only(true),
            (Kind::Call(operation, error, part), Some(faults)) => faults.set(operation, error, part),
            (Kind::Call(..), None) => unreachable!("calls fail by a library"),
        }
    }

    fn end(&self) {
        match (self.kind, &self.faults) {
            (Kind::Full, _) => self.disk.free(),
            (Kind::ReadOnly, _) => self.disk.set_read_only(false),
            (Kind::Call(..), faults) => faults.as_ref().unwrap().clear(),
        }
    }
}

fn count(events: &[Value], kind: &str) -> usize {
    events.iter().filter(|event| event["kind"] == kind).count()
}

/// Run whose storage fails during one checkpoint. On a busy machine training may be past it before
/// this test is; then the case is run again.
fn disturbed(kind: Kind, moment: Moment, workers: u32, reference: &Reference) {
    let in_time = (0..TRIES).any(|_| disturbed_in_time(kind, moment, workers, reference));
    assert!(in_time, "{kind:?} came too late for the {moment:?} checkpoint, {TRIES} times");
}

/// Returns whether the storage failed before the run was over.
fn disturbed_in_time(kind: Kind, moment: Moment, workers: u32, reference: &Reference) -> bool {
    let what = format!("{kind:?} at the {moment:?} checkpoint with {workers} workers");
    let mut run = Run::new(&[SMALL_MLP, JOB]);
    let Some(failing) = Failing::new(kind, &mut run) else { return true };
    let coordinator = run.start_in(workers, &failing.variables());
    match moment {
        Moment::First => drop(run.wait_for("worker_joined", |_| true)),
        _ => drop(run.wait_for("checkpoint", |event| event["step"] == moment as u64 - 900)),
    }
    failing.begin();
    // At the last checkpoint no worker trains: the wait is longer than any deadline of a worker.
    let attempts = if matches!(moment, Moment::Last) { ATTEMPTS } else { 1 };
    eventually(&format!("{attempts} attempts, {what}"), || {
        let delays = run.events().into_iter().filter(|event| event["kind"] == "checkpoint_delayed");
        let mut by_writer = BTreeMap::<String, usize>::new();
        // Of any one: the others may have written their files just before the storage failed.
        delays.for_each(|event| *by_writer.entry(event["worker"].to_string()).or_default() += 1);
        let enough = by_writer.values().any(|count| *count >= attempts);
        (enough || !is_running(coordinator.pid())).then_some(())
    });
    failing.end();
    let ended = coordinator.wait();
    if ended.code == Some(0) && count(&run.events(), "checkpoint_delayed") == 0 {
        return false;
    }
    let (output, events) = (&ended.output, run.events());
    assert_eq!(ended.code, Some(0), "{what}: {output}");
    let warned = output.lines().filter(|line| line.starts_with("warning: the checkpoint of step"));
    let warned = warned.filter(|line| line.contains(&kind.reason())).count();
    assert!((1..=workers as usize + 1).contains(&warned), "{what}: one for each writer: {output}");
    assert!(output.contains("checkpoints are written again"), "{what}: {output}");
    for lost in ["worker_lost", "worker_dropped", "regroup"] {
        assert_eq!(count(&events, lost), 0, "{what}: {lost} in {output}");
    }
    assert_eq!(count(&events, "generation_formed"), 1, "{what}: {output}");
    assert_rows_once(&run, &what);
    let last = events.iter().rfind(|event| event["kind"] == "checkpoint").unwrap();
    assert_eq!(last["step"], 2700, "{what}");
    reference.equals(&what, last["state_digest"].as_str().unwrap());
    run.assert_audited();
    true
}

fn assert_rows_once(run: &Run, what: &str) {
    let steps: Vec<u64> = run.rows().iter().map(|row| row["step"].as_u64().unwrap()).collect();
    let once: BTreeSet<u64> = steps.iter().copied().collect();
    assert!(steps.len() == once.len() && once.last() == Some(&2700), "{what}: {steps:?}");
}

#[test]
fn storage_that_fails_at_any_checkpoint_pauses_what_needs_it_and_loses_nothing() {
    let reference = Reference::of(&[SMALL_MLP, JOB]);
    let mut cases = Vec::new();
    for moment in [Moment::First, Moment::Middle, Moment::Last] {
        cases.extend([(Kind::Full, moment, 1), (Kind::Full, moment, 2)]);
    }
    cases.extend([(Kind::ReadOnly, Moment::First, 2), (Kind::ReadOnly, Moment::Middle, 1)]);
    cases.extend([(Kind::ReadOnly, Moment::Last, 1), (Kind::ReadOnly, Moment::Last, 2)]);
    for (call, error, part) in [
        ("sync", Errno::EIO, "/disk/step-"),
        ("sync", Errno::ENOSPC, "manifest.json"),
        ("rename", Errno::ENOSPC, "/disk/latest"),
    ] {
        cases.push((Kind::Call(call, error, part), Moment::Last, 1));
    }
    // Most of the time is waiting.
    for some in cases.chunks(4) {
        thread::scope(|scope| {
            let all = some.iter().map(|(kind, moment, workers)| {
                scope.spawn(|| disturbed(*kind, *moment, *workers, &reference))
            });
            all.collect::<Vec<_>>().into_iter().for_each(|one| one.join().unwrap());
        });
    }
}

/// As folders that FUSE or SMB mount.
#[test]
fn a_folder_that_refuses_hard_links_is_as_good() {
    let settings = [SMALL_MLP, &["job.steps=60", "checkpoint.every_steps=20"]];
    let Some(faults) = Faults::compile() else { return };
    faults.set("link", Errno::EPERM, "/checkpoints/");
    let run = Run::new(&settings);
    let ended = run.start_in(2, &faults.variables()).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    Reference::of(&settings).equals("without hard links", &run.digest());
}

/// Decisions wait for the journal: the loss of a worker waits, and workers and operators are
/// answered.
#[test]
fn a_journal_that_cannot_be_written_holds_decisions_up_and_nothing_else() {
    let settings = [SMALL_MLP, &["job.steps=4000", "metrics.every_steps=50", "checkpoint.every_steps=0"]];
    let Some(faults) = Faults::compile() else { return };
    let run = Run::new(&settings);
    let coordinator = run.start_in(2, &faults.variables());
    run.wait_for_step(50);
    faults.set("write", Errno::ENOSPC, "journal.sqlite");
    send(run.pids(1)[1], Signal::SIGKILL);
    eventually("word of the journal", || {
        coordinator.output().contains("nothing is decided until the journal can be written").then_some(())
    });
    let asked = run.ask(&["status"]);
    assert_eq!(asked.code, Some(0), "{}", asked.output);
    assert_eq!(count(&run.events(), "generation_formed"), 1, "no group that is not journaled");
    faults.clear();
    run.wait_for("generation_formed", |event| event["generation"] == 2);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert_eq!(ended.output.matches("nothing is decided until").count(), 1, "{}", ended.output);
    assert!(ended.output.contains("journal.sqlite is written again"), "{}", ended.output);
    Reference::of(&settings).equals("a journal that could not be written", &run.digest());
    run.assert_audited();
}

/// The run directory and the checkpoints in it, all on one disk that is full.
#[test]
fn a_full_run_directory_ends_no_run() {
    let reference = Reference::of(&[SMALL_MLP, JOB]);
    let run = Run::new(&[SMALL_MLP, JOB]);
    let Some(disk) = Disk::mount(run.path("")) else { return };
    let coordinator = run.start(2);
    run.wait_for("checkpoint", |event| event["step"] == 900);
    disk.fill();
    eventually("word of a checkpoint", || {
        coordinator.output().contains("warning: the checkpoint of step").then_some(())
    });
    disk.free();
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert_eq!(count(&run.events(), "generation_formed"), 1, "{}", ended.output);
    assert_rows_once(&run, "a full run directory");
    reference.equals("a full run directory", &run.digest());
}

/// A worker without a coordinator holds the only copy of its state: it waits for space.
#[test]
fn a_worker_that_saves_alone_waits_for_room() {
    let mut run = Run::new(&[
        SMALL_MLP,
        &[
            "job.steps=1000000",
            "checkpoint.every_steps=0",
            "metrics.every_steps=50",
            "job.failure_deadline=0.5",
        ],
    ]);
    let Some(disk) = Disk::mount(run.beside("disk")) else { return };
    run.set(&format!("checkpoint.url={}", disk.folder.display()));
    let coordinator = run.start(0);
    let started = run.wait_for("coordinator_started", |_| true);
    let worker = Process::worker(started["address"].as_str().unwrap());
    let step = run.wait_for_step(50);
    disk.fill();
    coordinator.signal(Signal::SIGKILL);
    eventually("an attempt", || worker.output().contains("No space left on device").then_some(()));
    disk.free();
    let ended = worker.wait();
    let saved = ended.output.split("saved step-").nth(1).and_then(|rest| rest.get(..8));
    let saved: Option<u64> = saved.and_then(|saved| saved.parse().ok());
    assert!(saved.is_some_and(|saved| saved >= step), "{}", ended.output);
    assert!(ended.output.contains("works again"), "{}", ended.output);
}

/// A start without space reports that, not as wrong input, and works once there is space.
#[test]
fn a_start_without_room_goes_on_later() {
    let mut run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    let Some(disk) = Disk::mount(run.beside("disk")) else { return };
    run.set(&format!("checkpoint.url={}", disk.folder.display()));
    disk.fill();
    std::fs::OpenOptions::new()
        .append(true)
        .open(disk.folder.join("filler"))
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    std::fs::write(disk.folder.join("rest"), vec![1; 16 << 10]).unwrap_or_default();
    let ended = Process::start(run.command(&["--workers", "1"])).wait();
    assert_eq!(ended.code, Some(1), "{}", ended.output);
    assert!(ended.output.contains("the same command goes on"), "{}", ended.output);
    let _ = std::fs::remove_file(disk.folder.join("rest"));
    disk.free();
    let ended = run.start(1).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
}
