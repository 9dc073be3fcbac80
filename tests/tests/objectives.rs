//! Objectives from outside of the worker's library: the engine trains whatever it is given.
#![allow(clippy::unwrap_used)] // a test may panic

use std::path::Path;

use ganglion_tests::{Reference, Run, failpoint, program};
use tempfile::TempDir;

/// Number of samples of a step: one phase reads, whatever a GAN of this job would do.
const IMAGES: u64 = 6 * 150;
/// One epoch of the 10,000 digits.
const STEPS: u64 = 12;
const JOB: &[&str] = &[
    "job.epochs=1",
    "job.data_shards=6",
    "job.shard_batch=150",
    "job.failure_deadline=2",
    "loss.discriminator_steps=2",
    "metrics.every_steps=1",
];

/// One network, one phase, one scalar: the example of linear regression.
const REGRESSION: &str = "failing-regression";
/// Three networks, in four phases of all kinds.
const THREE: &str = "failing-three";

/// A folder with the coordinator, and this program as its worker.
fn programs(worker: &str) -> TempDir {
    let coordinator = program("coordinator");
    let folder = tempfile::tempdir_in(coordinator.parent().unwrap()).unwrap();
    let link = |from: &Path, name: &str| std::fs::hard_link(from, folder.path().join(name)).unwrap();
    link(&coordinator, "coordinator");
    link(&program(worker), "worker");
    folder
}

/// Asserts that the run took one epoch, counted as its objective counts, and that its files prove it.
#[track_caller]
fn assert_counted(run: &Run) {
    let audited = run.audit();
    assert_eq!(audited.code, Some(0), "{}", audited.output);
    assert!(audited.output.lines().all(|line| line.starts_with("ok    ")), "{}", audited.output);
    let seen =
        run.rows().iter().map(|row| (row["step"].as_u64(), row["images_seen"].as_u64())).collect::<Vec<_>>();
    let expected: Vec<_> = (1..=STEPS).map(|step| (Some(step), Some(step * IMAGES))).collect();
    assert_eq!(seen, expected);
}

#[test]
fn an_objective_from_outside_has_the_same_bits_on_1_and_2_workers_and_through_a_kill() {
    let programs = programs(REGRESSION);
    let run = || Run::new(&[JOB]).by(programs.path());
    let (one, two) = (run(), run());
    let reference = Reference::new("1 worker", one.complete(1));
    reference.equals("2 workers", &two.complete(2));
    let killed = run();
    let once = killed.beside("once");
    let death = (failpoint::VARIABLE, format!("commit@7:{}", once.display()));
    let ended = killed.start_in(3, &[death]).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(once.exists(), "no worker was killed");
    reference.equals("3 workers of which one was killed", &killed.digest());
    [&one, &two, &killed].into_iter().for_each(assert_counted);
    let tensors = std::fs::read_to_string(killed.newest_checkpoint().join("state.safetensors.index.json"));
    let tensors = tensors.unwrap();
    assert!(tensors.contains("\"line.weight\"") && !tensors.contains("generator"), "{tensors}");
}

/// The columns of a run's rows that are a function of the job.
fn computed(run: &Run) -> Vec<String> {
    let columns = ["step", "ledger", "fit_loss", "lazy_loss", "judge_loss", "agree_loss"];
    run.rows().iter().map(|row| columns.map(|column| row[column].to_string()).join(" ")).collect()
}

/// Phase 1 of a step runs in every fourth step, phase 3 in every third. A worker dies at update 5, phase 1 of a
/// step in which it does not run: the next group begins there or at phase 2, and reads its samples again.
#[test]
fn phases_with_a_cadence_have_the_same_bits_through_a_kill_and_a_resume() {
    let programs = programs(THREE);
    // For the steps of an epoch, so that a resume can ask for more.
    let run_to = |steps| Run::new(&[&JOB[1..], &[&format!("job.steps={steps}")]]).by(programs.path());
    let run = || run_to(STEPS);
    let one = run();
    let reference = Reference::new("1 worker", one.complete(1));
    assert_counted(&one);
    assert!(!computed(&one).concat().contains("null"), "every row has the newest scalars of all phases");
    let assert_same = |what: &str, other: &Run| {
        reference.equals(what, &other.digest());
        assert_counted(other);
        assert_eq!(computed(&one), computed(other), "{what}");
    };
    let killed = run();
    let once = killed.beside("once");
    let death = (failpoint::VARIABLE, format!("commit@5:{}", once.display()));
    let ended = killed.start_in(3, &[death]).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(once.exists(), "no worker was killed");
    assert_same("3 workers of which one was killed", &killed);
    // Step 7 runs neither phase: its row has scalars from before the checkpoint.
    let mut resumed = run_to(6);
    resumed.complete(2);
    resumed.set(&format!("job.steps={STEPS}"));
    resumed.complete(2);
    assert_same("2 workers, resumed", &resumed);
}
