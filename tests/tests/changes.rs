//! Workers that join and leave on purpose: nothing is computed again.
#![allow(clippy::unwrap_used)] // a test may panic

use std::sync::OnceLock;

use ganglion_tests::{Process, Reference, Run, SMALL_DCGAN, SMALL_MLP};
use nix::sys::signal::Signal;

const LONG: &[&str] =
    &["job.steps=1100", "job.failure_deadline=2", "metrics.every_steps=1", "checkpoint.every_steps=250"];
const LONG_DCGAN: &[&str] =
    &["job.steps=250", "job.failure_deadline=2", "metrics.every_steps=1", "checkpoint.every_steps=60"];

/// Results of the jobs of most tests, computed once.
fn undisturbed_mlp() -> &'static Reference {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    REFERENCE.get_or_init(|| Reference::of(&[SMALL_MLP, LONG]))
}

fn undisturbed_dcgan() -> &'static Reference {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    REFERENCE.get_or_init(|| Reference::of(&[SMALL_DCGAN, LONG_DCGAN]))
}

/// Asserts that the run is complete with the same bits, and that no change in it was a fault.
#[track_caller]
fn assert_undisturbed(run: &Run, coordinator: Process, reference: &Reference, what: &str) {
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    reference.equals(what, &run.digest());
    let faults: Vec<_> = run.events().into_iter().filter(|event| event["kind"] == "regroup").collect();
    assert!(faults.is_empty(), "{faults:?}");
    run.assert_audited();
}

fn url(run: &Run) -> String {
    run.wait_for("coordinator_started", |_| true)["address"].as_str().unwrap().to_string()
}

fn formed(run: &Run, world_size: u64, after: u64) -> serde_json::Value {
    run.wait_for("generation_formed", |event| {
        event["world_size"] == world_size && event["generation"].as_u64() > Some(after)
    })
}

#[test]
fn a_worker_that_joins_in_the_middle_changes_nothing() {
    for (settings, reference) in
        [([SMALL_MLP, LONG], undisturbed_mlp()), ([SMALL_DCGAN, LONG_DCGAN], undisturbed_dcgan())]
    {
        let run = Run::new(&settings);
        let coordinator = run.start(1);
        run.wait_for_step(20);
        let joiner = Process::worker(&url(&run));
        assert_eq!(formed(&run, 2, 0)["start"], "rank 0", "the joiner is healed by the member");
        assert_undisturbed(&run, coordinator, reference, "a run that was joined");
        assert_eq!(joiner.wait().code, Some(0));
    }
}

#[test]
fn a_worker_that_is_asked_to_end_leaves_with_nothing_done_again() {
    let run = Run::new(&[SMALL_DCGAN, LONG_DCGAN]);
    let coordinator = run.start(2);
    run.wait_for_step(20);
    // As a scheduler does to free the machine.
    ganglion_tests::send(run.pids(1)[0], Signal::SIGTERM);
    assert_eq!(formed(&run, 1, 1)["cause"], "planned");
    let exited = run.wait_for("worker_exited", |_| true);
    assert_eq!(exited["status"], "exit status: 0");
    assert_eq!(formed(&run, 2, 2)["cause"], "planned", "its place is taken by another");
    assert_undisturbed(&run, coordinator, undisturbed_dcgan(), "a run that a worker left");
}

#[test]
fn the_last_worker_saves_before_it_leaves_and_the_run_waits_for_another() {
    let reference = undisturbed_mlp();
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(0);
    let first = Process::worker(&url(&run));
    run.wait_for_step(50);
    first.signal(Signal::SIGTERM);
    let ended = first.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    let saved = run.wait_for("checkpoint", |_| true)["step"].as_u64().unwrap();
    let second = Process::worker(&url(&run));
    let next = formed(&run, 1, 1);
    assert_eq!(next["start"], format!("step-{saved:08}"));
    assert_undisturbed(&run, coordinator, reference, "a run that changed its only worker");
    assert_eq!(second.wait().code, Some(0));
}

#[test]
fn a_drained_worker_leaves_and_is_not_replaced() {
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(2);
    run.wait_for_step(20);
    let drained = run.ask(&["drain", "1"]);
    assert_eq!(drained.code, Some(0), "{}", drained.output);
    formed(&run, 1, 1);
    assert_undisturbed(&run, coordinator, undisturbed_mlp(), "a run with a drained worker");
    assert_eq!(run.events().iter().filter(|event| event["kind"] == "worker_started").count(), 2);
}

#[test]
fn operators_see_the_workers_and_are_told_of_a_wrong_number() {
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(1);
    run.wait_for_step(20);
    let status = run.ask(&["status"]);
    assert!(status.code == Some(0) && status.output.contains("worker"), "{}", status.output);
    let unknown = run.ask(&["drain", "77"]);
    assert_eq!(unknown.code, Some(2), "{}", unknown.output);
    assert!(unknown.output.contains("no worker 77"), "{}", unknown.output);
    assert_undisturbed(&run, coordinator, undisturbed_mlp(), "a run whose status was asked");
}

#[test]
fn local_workers_are_scaled_up_and_down() {
    let settings = [SMALL_MLP, LONG, &["job.steps=3000"]];
    let reference = Reference::of(&settings);
    let run = Run::new(&settings);
    let coordinator = run.start(1);
    run.wait_for_step(20);
    let beyond = run.ask(&["scale", "9"]);
    assert_eq!(beyond.code, Some(2), "{}", beyond.output);
    assert_eq!(run.ask(&["scale", "3"]).code, Some(0));
    let grown = formed(&run, 3, 1);
    assert_eq!(run.ask(&["scale", "1"]).code, Some(0));
    formed(&run, 1, grown["generation"].as_u64().unwrap());
    assert_undisturbed(&run, coordinator, &reference, "a run that grew and shrank");
}

#[test]
fn a_worker_beyond_the_data_shards_waits_until_it_is_needed() {
    let settings = [SMALL_MLP, LONG, &["job.data_shards=2", "job.steps=3000"]];
    let reference = Reference::of(&settings);
    let run = Run::new(&settings);
    let coordinator = run.start(2);
    run.wait_for_step(20);
    let spare = Process::worker(&url(&run));
    run.wait_for("worker_joined", |event| event["local"] == false);
    let step = run.wait_for_step(1);
    run.wait_for_step(step + 100);
    ganglion_tests::send(run.pids(1)[0], Signal::SIGKILL);
    let next = formed(&run, 2, 1);
    let worker = run.wait_for("worker_joined", |event| event["local"] == false)["worker"].clone();
    assert!(next["members"].as_array().unwrap().iter().any(|member| member["worker"] == worker), "{next}");
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    reference.equals("a run whose spare took over", &run.digest());
    drop(spare);
}
