//! Objectives from outside of the worker's library: the engine trains whatever it is given.
#![allow(clippy::unwrap_used)] // a test may panic

use std::path::Path;

use ganglion_tests::{Reference, Run, failpoint, program};
use tempfile::TempDir;

const JOB: &[&str] = &["job.steps=30", "job.data_shards=6", "job.shard_batch=4", "job.failure_deadline=2"];

/// A folder with the coordinator, and as its worker the example of linear regression: one network, one
/// phase, one scalar.
fn programs() -> TempDir {
    let coordinator = program("coordinator");
    let folder = tempfile::tempdir_in(coordinator.parent().unwrap()).unwrap();
    let link = |from: &Path, name: &str| std::fs::hard_link(from, folder.path().join(name)).unwrap();
    link(&coordinator, "coordinator");
    link(&program("failing-regression"), "worker");
    folder
}

#[test]
fn an_objective_from_outside_has_the_same_bits_on_1_to_3_workers_and_through_a_kill() {
    let programs = programs();
    let run = || Run::new(&[JOB]).by(programs.path());
    let reference = Reference::new("1 worker", run().complete(1));
    for workers in [2, 3] {
        reference.equals(&format!("{workers} workers"), &run().complete(workers));
    }
    let killed = run();
    let once = killed.beside("once");
    let death = (failpoint::VARIABLE, format!("commit@20:{}", once.display()));
    let ended = killed.start_in(3, &[death]).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(once.exists(), "no worker was killed");
    reference.equals("3 workers of which one was killed", &killed.digest());
    let tensors = std::fs::read_to_string(killed.newest_checkpoint().join("state.safetensors.index.json"));
    let tensors = tensors.unwrap();
    assert!(tensors.contains("\"line.weight\"") && !tensors.contains("generator"), "{tensors}");
}
