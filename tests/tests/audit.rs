//! `coordinator audit` on real runs.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::Path;
use std::process::Command;

use ganglion_tests::{Ended, Process, Run, SMALL_MLP, program, send};
use nix::sys::signal::Signal;

fn audit(folder: &Path) -> Ended {
    let mut command = Command::new(program("coordinator"));
    command.arg("audit").arg(folder);
    Process::start(command).wait()
}

#[track_caller]
fn assert_holds(audited: &Ended) {
    assert_eq!(audited.code, Some(0), "{}", audited.output);
    assert!(audited.output.lines().all(|line| line.starts_with("ok    ")), "{}", audited.output);
}

fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_run_that_lost_a_worker_is_proven_while_it_goes_on_and_afterwards() {
    let run = Run::new(&[
        SMALL_MLP,
        &["job.steps=1500", "job.failure_deadline=2", "checkpoint.every_steps=200", "checkpoint.keep_last=2"],
        &["metrics.every_steps=1", "loss.discriminator_steps=2"],
    ]);
    let coordinator = run.start(2);
    run.wait_for("checkpoint", |_| true);
    assert_holds(&audit(&run.path("")));
    send(run.pids(1)[1], Signal::SIGKILL);
    run.wait_for("generation_formed", |event| event["generation"] == 2);
    assert_holds(&audit(&run.path("")));
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);

    let before = files(&run.path(""));
    let audited = audit(&run.path(""));
    assert_holds(&audited);
    for figures in
        ["1500 rows up to step 1500, 1500 of them due", "48000 numbers, 4.800 epochs of 10000 samples"]
    {
        assert!(audited.output.contains(figures), "{figures:?} is not in\n{}", audited.output);
    }
    assert_eq!(files(&run.path("")), before, "an audit writes nothing");

    let part = run.newest_checkpoint().join("state-00002-of-00004.safetensors");
    let mut bytes = fs::read(&part).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&part, bytes).unwrap();
    let audited = audit(&run.path(""));
    assert_eq!(audited.code, Some(1), "{}", audited.output);
    let breaches: Vec<&str> = audited.output.lines().filter(|line| !line.starts_with("ok    ")).collect();
    let [breach, "error: 1 claim does not hold"] = breaches.as_slice() else {
        panic!("not one breach:\n{}", audited.output)
    };
    for part in ["BREACH ", "step-00001500", "state-00002-of-00004.safetensors"] {
        assert!(breach.contains(part), "{part:?} is not in {breach:?}");
    }
}

/// Rows are due by the cadence of their term, and a start from a checkpoint uses a journaled one.
#[test]
fn a_run_that_was_resumed_with_other_cadences_is_proven() {
    let mut run =
        Run::new(&[SMALL_MLP, &["job.steps=7", "metrics.every_steps=2", "checkpoint.every_steps=3"]]);
    run.complete(2);
    ["job.steps=20", "metrics.every_steps=3"].iter().for_each(|setting| run.set(setting));
    run.complete(3);
    let audited = audit(&run.path(""));
    assert_holds(&audited);
    for figures in ["2 terms", "1 from step 0, 0 from a member's state, 1 from a checkpoint"] {
        assert!(audited.output.contains(figures), "{figures:?} is not in\n{}", audited.output);
    }
}

#[test]
fn a_folder_that_is_no_run_directory_is_refused() {
    let run = Run::new(&[SMALL_MLP]);
    let audited = audit(&run.beside("nothing"));
    assert_eq!(audited.code, Some(2), "{}", audited.output);
    assert!(audited.output.contains("nothing: no run is there"), "{}", audited.output);
}
