//! `--stay`: coordinators and workers that stay when a run is complete.
#![allow(clippy::unwrap_used)] // a test may panic

use std::process::Command;

use ganglion_tests::{Process, Run, SMALL_MLP, eventually, program};
use nix::sys::signal::Signal;

/// Message of both programs once they stay.
const STAYS: &str = "is complete; staying until SIGTERM";

fn staying_worker(url: &str) -> Process {
    let mut command = Command::new(program("worker"));
    command.args(["--stay", "--coordinator", url]);
    Process::start(command)
}

#[track_caller]
fn wait_until_it_stays(process: &Process) {
    eventually("stay", || process.output().contains(STAYS).then_some(()));
}

#[track_caller]
fn assert_ends_well(process: Process) -> String {
    let ended = process.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    ended.output
}

/// Address of the coordinator of a term.
fn url(run: &Run, term: u64) -> String {
    let started = run.wait_for("coordinator_started", |event| event["term"] == term);
    started["address"].as_str().unwrap().to_string()
}

fn resident_kilobytes(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn when_a_run_is_complete_both_stay_until_they_are_asked_to_end() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=20"]]);
    let mut coordinator = run.start_with(&["--workers", "0", "--stay"]);
    let mut stays = staying_worker(&url(&run, 1));
    wait_until_it_stays(&coordinator);
    wait_until_it_stays(&stays);
    run.wait_for("run_ended", |event| event["outcome"] == "complete");
    // A worker that joins now is released before it loads anything, and operators get an answer.
    let late = assert_ends_well(Process::worker(&url(&run, 1)));
    assert!(!late.contains("generation"), "{late}");
    let late = staying_worker(&url(&run, 1));
    wait_until_it_stays(&late);
    let status = run.ask(&["status"]);
    assert!(status.code == Some(0) && status.output.contains("step 20"), "{}", status.output);
    let refused = run.ask(&["scale", "2"]);
    assert!(refused.code == Some(2) && refused.output.contains("complete"), "{}", refused.output);
    assert!(coordinator.is_running() && stays.is_running());
    coordinator.signal(Signal::SIGTERM);
    let said = assert_ends_well(coordinator);
    assert!(said.contains("checkpoints in"), "{said}");
    // A worker that stays needs no coordinator for that.
    assert!(stays.is_running());
    for worker in [stays, late] {
        worker.signal(Signal::SIGTERM);
        assert_ends_well(worker);
    }
    run.assert_audited();
}

#[test]
fn a_run_that_is_found_complete_stays_too_and_tells_who_comes() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=5"]]);
    let digest = run.complete(1);
    let coordinator = run.start_with(&["--workers", "2", "--stay"]);
    wait_until_it_stays(&coordinator);
    assert_ends_well(Process::worker(&url(&run, 2)));
    let status = run.ask(&["status"]);
    let whole = "step 5 of 5, ended, checkpoint of step 5";
    assert!(status.code == Some(0) && status.output.contains(whole), "{}", status.output);
    coordinator.signal(Signal::SIGINT);
    let said = assert_ends_well(coordinator);
    assert!(said.contains("is finished: step 5 of 5"), "{said}");
    let joined = run.events().iter().filter(|event| event["kind"] == "worker_joined").count();
    assert_eq!(joined, 1, "nobody was started for a run that was complete");
    assert_eq!(run.digest(), digest);
    run.assert_audited();
}

#[test]
fn who_is_drained_or_stopped_does_not_stay() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=1000000"]]);
    let coordinator = run.start_with(&["--workers", "1", "--stay"]);
    run.wait_for_step(1);
    let [asked, drained, stopped] = [(); 3].map(|()| staying_worker(&url(&run, 1)));
    run.wait_for("generation_formed", |event| event["world_size"] == 4);
    asked.signal(Signal::SIGTERM);
    assert!(!assert_ends_well(asked).contains(STAYS));
    let pid = drained.pid();
    let joined = run.wait_for("worker_joined", |event| event["pid"] == pid);
    assert_eq!(run.ask(&["drain", &joined["worker"].to_string()]).code, Some(0));
    assert!(!assert_ends_well(drained).contains(STAYS));
    coordinator.signal(Signal::SIGTERM);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(143), "{}", ended.output);
    assert!(!assert_ends_well(stopped).contains(STAYS));
}

#[test]
fn a_worker_that_misses_the_end_hears_of_it_from_the_next_coordinator() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=10"]]).with_failpoints();
    // The coordinator dies once the last checkpoint is valid, before it releases a worker.
    let mut command = run.command(&["--workers", "0", "--stay"]);
    command.env(ganglion_tests::failpoint::VARIABLE, format!("manifest@10:{}", run.beside("once").display()));
    let died = Process::start(command);
    let worker = staying_worker(&url(&run, 1));
    assert_ne!(died.wait().code, Some(0));
    let coordinator = run.start_with(&["--workers", "0", "--stay"]);
    wait_until_it_stays(&worker);
    for process in [worker, coordinator] {
        process.signal(Signal::SIGTERM);
        assert_ends_well(process);
    }
    run.assert_audited();
}

#[test]
fn a_worker_that_stays_gives_its_memory_back() {
    // Seven million parameters, which take some 400 MB in training.
    let settings = ["model.width=1500", "job.steps=1", "job.data_shards=1", "sample.every_steps=0"];
    let run = Run::new(&[SMALL_MLP, &settings]);
    let coordinator = run.start_with(&["--workers", "0", "--stay"]);
    let worker = staying_worker(&url(&run, 1));
    wait_until_it_stays(&worker);
    // The worker's other threads end on their own.
    eventually("memory given back", || (resident_kilobytes(&worker) < 120 << 10).then_some(()));
    drop(coordinator);
}
