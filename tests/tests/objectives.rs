//! Objectives from outside of the worker's library: the engine trains whatever it is given.
#![allow(clippy::unwrap_used)] // a test may panic

use std::path::Path;

use ganglion_tests::{Reference, Run, program};
use serde_json::Value;
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
    let digest = killed.complete_with_a_death(3, "commit@7");
    reference.equals("3 workers of which one was killed", &digest);
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
    killed.complete_with_a_death(3, "commit@5");
    assert_same("3 workers of which one was killed", &killed);
    // Step 7 runs neither phase: its row has scalars from before the checkpoint.
    let mut resumed = run_to(6);
    resumed.complete(2);
    resumed.set(&format!("job.steps={STEPS}"));
    resumed.complete(2);
    assert_same("2 workers, resumed", &resumed);
}

/// The figures of a run's evaluations by step, without the time that they took.
fn evaluations(run: &Run) -> Vec<(u64, String)> {
    let events = run.events().into_iter().filter(|event| event["kind"] == "evaluation");
    let figures = |event: &Value| format!("{} {} {}", event["features"], event["held_out"], event["metrics"]);
    let mut told: Vec<_> = events.map(|event| (event["step"].as_u64().unwrap(), figures(&event))).collect();
    told.sort();
    told
}

/// It draws no samples, so the scalars of its own are all that there is.
#[test]
fn an_objective_is_evaluated_by_its_own_scalars_and_the_best_checkpoint_is_by_any_of_them() {
    let programs = programs(THREE);
    let digits = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-images-idx3-ubyte.gz");
    let (path, held_out) = (format!("data.path={digits}"), format!("evaluation.held_out={digits}"));
    let evaluated =
        ["data.kind=idx", &path, &held_out, "checkpoint.every_steps=3", "evaluation.with_checkpoints=true"];
    let run = |more: &[&str]| Run::new(&[JOB, &evaluated, more]).by(programs.path());
    let by_error = run(&["evaluation.best_by=error"]);
    let reference = Reference::new("1 worker", by_error.complete(1));
    let by_quality = run(&["evaluation.best_by=quality", "evaluation.best_goal=max"]);
    reference.equals("3 workers", &by_quality.complete(3));
    let told = evaluations(&by_error);
    assert_eq!(told, evaluations(&by_quality), "3 workers say something else than 1");
    assert_eq!(told.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 6, 9, 12]);
    // 66 whole batches of 150 samples.
    assert!(told[0].1.starts_with("\"none\" 9900 {\"error\":"), "{}", told[0].1);
    let metrics: Vec<Value> = by_error
        .events()
        .into_iter()
        .filter(|event| event["kind"] == "evaluation")
        .map(|event| event["metrics"].clone())
        .collect();
    let least =
        metrics.iter().filter_map(|metrics| metrics["error"].as_f64()).min_by(f64::total_cmp).unwrap();
    for (run, metric, value) in [(&by_error, "error", least), (&by_quality, "quality", -least)] {
        let named = std::fs::read(run.path("checkpoints/best.json")).unwrap();
        let named: Value = serde_json::from_slice(&named).unwrap();
        assert_eq!((&named["metric"], &named["value"]), (&metric.into(), &value.into()), "{named}");
        assert_eq!(named["held_out"], 9900);
        run.assert_audited();
    }
    let listed = by_error.ask(&["checkpoints"]).output;
    assert!(listed.contains("best (error "), "{listed}");
}

#[test]
fn what_an_objective_cannot_be_evaluated_by_is_said_before_training() {
    let programs = programs(THREE);
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let digits = format!("{root}/data/mnist-10k/t10k-images-idx3-ubyte.gz");
    let (path, held_out) = (format!("data.path={digits}"), format!("evaluation.held_out={digits}"));
    let wanted = ["data.kind=idx", &path, "evaluation.every_steps=1"];
    let folder = tempfile::tempdir().unwrap();
    let header = [0x803_u32, 10, 28, 28].map(u32::to_be_bytes).concat();
    let small = folder.path().join("small-idx3-ubyte");
    std::fs::write(&small, [header, vec![7; 10 * 28 * 28]].concat()).unwrap();
    let few = format!("evaluation.held_out={}", small.display());
    for (settings, expected) in [
        (&wanted[..], "draws no samples to evaluate; set evaluation.held_out"),
        (&["evaluation.best_by=beauty"], "there is no \"beauty\"; choose \"auto\" or one of error, quality"),
        (&["evaluation.best_by=Beauty"], "evaluation.best_by=Beauty: \"Beauty\" is not the name"),
        (&["evaluation.best_by=error", "evaluation.best_goal=most"], "choose one of \"min\", \"max\""),
        (&[&wanted[..], &[&held_out, "evaluation.best_by=kid"]].concat(), "there is no \"kid\""),
        (&[&wanted[..], &[&few]].concat(), "has 10 samples, fewer than the 150 of a batch"),
    ] {
        let ended = Run::new(&[JOB, settings]).by(programs.path()).start(1).wait();
        assert_eq!(ended.code, Some(2), "{}", ended.output);
        assert!(ended.output.contains(expected), "{expected}\n{}", ended.output);
    }
}
