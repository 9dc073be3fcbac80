//! Runs with missing checkpoints or damaged records.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::Path;
use std::process::Command;

use ganglion_tests::{Ended, Process, Reference, Run, SMALL_MLP, program};
use nix::sys::signal::Signal;

const JOB: &[&str] = &["job.steps=6", "checkpoint.every_steps=2", "metrics.every_steps=1"];

#[track_caller]
fn assert_says(ended: &Ended, code: i32, parts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.output);
    for part in parts {
        assert!(ended.output.contains(part), "{part:?} is not in:\n{}", ended.output);
    }
}

fn damage_all(storage: &Path) {
    for entry in fs::read_dir(storage).unwrap() {
        let part = entry.unwrap().path().join("state-00001-of-00004.safetensors");
        if part.exists() {
            fs::write(part, "damaged").unwrap();
        }
    }
}

/// Files that a refused start must not change.
fn kept(run: &Run) -> [Vec<u8>; 3] {
    ["job.toml", "metrics.jsonl", "events.jsonl"].map(|name| fs::read(run.path(name)).unwrap())
}

#[test]
fn a_run_whose_checkpoints_are_lost_is_not_trained_anew_unasked() {
    let run = Run::new(&[SMALL_MLP, JOB]);
    let reference = Reference::new("the run before", run.complete(1));
    let (storage, away) = (run.path("checkpoints"), run.beside("away"));
    let before = kept(&run);
    let journaled = ["step-00000006", reference.digest(), "checkpoint.url", "--run-dir", "--from-start"];

    fs::rename(&storage, &away).unwrap();
    for (empty, says) in [(false, "there is no such folder"), (true, "there is nothing of any run")] {
        if empty {
            fs::create_dir(&storage).unwrap();
        }
        let ended = run.start(1).wait();
        assert_says(&ended, 2, &journaled);
        assert_says(&ended, 2, &[says]);
        assert_eq!(fs::read_dir(&storage).map_or(0, Iterator::count), 0, "nothing is left there");
    }
    fs::remove_dir(&storage).unwrap();
    fs::rename(&away, &storage).unwrap();

    let elsewhere = run.beside("elsewhere");
    let ended = run.start_with(&["--set", &format!("checkpoint.url={}", elsewhere.display())]).wait();
    assert_says(&ended, 2, &journaled);
    assert_says(&ended, 2, &["saved in file://", &storage.display().to_string()]);
    assert!(!elsewhere.exists());
    assert!(kept(&run) == before, "a refusal changes nothing");
    assert_says(&run.start(1).wait(), 0, &["is finished"]);
    assert_says(&run.start_with(&["--from-start"]).wait(), 2, &["the run has step-00000006"]);

    fs::remove_dir_all(storage.join("step-00000006")).unwrap();
    let ended = run.start(1).wait();
    let warning = "warning: checkpoint step-00000006, the newest of this run, is not in";
    assert_says(&ended, 0, &[warning, "going on from step-00000004: steps 5 to 6 are computed again"]);
    reference.equals("a run from an older checkpoint", &run.digest());
    run.assert_audited();

    damage_all(&storage);
    let ended = run.start(1).wait();
    assert_says(&ended, 2, &["no checkpoint is whole (step-00000006: ", "--from-start"]);
    let ended = run.start_with(&["--workers", "2", "--from-start"]).wait();
    assert_says(&ended, 0, &["going on from the start"]);
    reference.equals("a run that was computed again", &run.digest());
    run.assert_audited();

    fs::remove_file(run.path("journal.sqlite")).unwrap();
    assert_says(&run.start(1).wait(), 2, &["journal.sqlite: missing", "coordinator recover"]);
    assert!(!run.path("journal.sqlite").exists());
}

/// Members hold a newer state than any checkpoint; with them all gone there is none.
#[test]
fn members_that_live_go_on_without_the_checkpoints() {
    let settings: &[&[&str]] = &[
        SMALL_MLP,
        &["job.steps=3000", "job.failure_deadline=2", "checkpoint.every_steps=100", "metrics.every_steps=10"],
    ];
    let run = Run::new(settings);
    let coordinator = run.start(2);
    run.wait_for("checkpoint", |_| true);
    coordinator.signal(Signal::SIGKILL);
    coordinator.wait();
    fs::rename(run.path("checkpoints"), run.beside("away")).unwrap();
    let ended = run.start(2).wait();
    assert_says(&ended, 0, &["warning: checkpoint step-", "going on from members that live"]);
    Reference::of(settings).equals("a run without its checkpoints", &run.digest());
    run.assert_audited();
}

/// Members on other machines may live until their lease is over. After that the run is lost.
#[test]
fn a_run_is_not_trained_anew_after_its_remote_members_have_not_come_back() {
    let steps = ["job.steps=3000", "job.failure_deadline=1", "checkpoint.every_steps=50"];
    let run = Run::new(&[SMALL_MLP, &steps]);
    let coordinator = run.start(0);
    let started = run.wait_for("coordinator_started", |_| true);
    let worker = Process::worker(started["address"].as_str().unwrap());
    run.wait_for("checkpoint", |_| true);
    for process in [coordinator, worker] {
        process.signal(Signal::SIGKILL);
        process.wait();
    }
    fs::rename(run.path("checkpoints"), run.beside("away")).unwrap();
    let ended = run.start(1).wait();
    assert_says(&ended, 2, &["going on from members that live", "the run's checkpoints are not there"]);
    let fresh = run.events().into_iter().filter(|event| event["start"] == "fresh").count();
    assert_eq!(fresh, 1, "no second group began at the start");
}

/// Writes zeros over a part of a file, as a disk does.
fn zero(file: &Path, at: usize, count: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at..at + count].fill(0);
    fs::write(file, bytes).unwrap();
}

#[test]
fn damaged_records_and_a_damaged_journal_do_not_end_a_run() {
    let mut run = Run::new(&[SMALL_MLP, JOB]);
    run.complete(1);
    for name in ["metrics.jsonl", "events.jsonl"] {
        let text = fs::read_to_string(run.path(name)).unwrap();
        let third: usize = text.lines().take(2).map(|line| line.len() + 1).sum();
        zero(&run.path(name), third, 64);
    }
    let warnings = ["metrics.jsonl.damaged-1", "events.jsonl.damaged-1", "is finished"];
    assert_says(&run.start(1).wait(), 0, &warnings);
    run.assert_audited();

    zero(&run.path("journal.sqlite"), 4096, 4096);
    assert_says(&run.start(1).wait(), 2, &["journal.sqlite: damaged", "coordinator recover "]);
    let mut command = Command::new(program("coordinator"));
    command.arg("recover").arg(run.path(""));
    let ended = Process::start(command).wait();
    assert_says(&ended, 0, &["the newest of step 6", "count from 1000000001", "journal.sqlite.damaged-1"]);
    run.assert_audited();

    run.set("job.steps=8");
    let digest = run.complete(2);
    Reference::of(&[SMALL_MLP, JOB, &["job.steps=8"]]).equals("a recovered run", &digest);
    let newest = run.rows().into_iter().last().unwrap();
    assert_eq!((newest["step"].as_u64(), newest["generation"].as_u64()), (Some(8), Some(1_000_000_001)));
    let audited = run.audit();
    assert_says(&audited, 0, &["are lost with a damaged record", "the journal was recovered"]);
}
