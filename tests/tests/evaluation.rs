//! Evaluations beside training, the best checkpoint, and alarms.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;

use ganglion_tests::{Reference, Run, SMALL_DCGAN, SMALL_MLP, send};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Evaluations that take a moment.
const SMALL_EVALUATION: &[&str] =
    &["evaluation.samples=60", "evaluation.reference=200", "sample.every_steps=0", "job.data_shards=4"];

fn small(model: &[&str], settings: &[&str]) -> Run {
    Run::new(&[model, SMALL_EVALUATION, settings])
}

/// Results of evaluations, by step, without the time that they took.
fn evaluations(run: &Run) -> Vec<(u64, String)> {
    let events = run.events().into_iter().filter(|event| event["kind"] == "evaluation");
    let mut told: Vec<_> = events
        .map(|event| (event["step"].as_u64().unwrap(), format!("{} {}", event["features"], event["metrics"])))
        .collect();
    told.sort();
    told
}

fn count(run: &Run, kind: &str) -> usize {
    run.events().iter().filter(|event| event["kind"] == kind).count()
}

#[test]
fn evaluations_change_no_bit_and_are_the_same_on_any_number_of_workers() {
    for model in [SMALL_MLP, SMALL_DCGAN] {
        let settings = &["job.steps=5", "evaluation.every_steps=2"];
        let without = Reference::new("a run without evaluations", small(model, &["job.steps=5"]).complete(2));
        let runs = [1, 3].map(|workers| {
            let run = small(model, settings);
            without.equals(&format!("{workers} workers with evaluations"), &run.complete(workers));
            run.assert_audited();
            run
        });
        let told = runs.each_ref().map(evaluations);
        let steps: Vec<u64> = told[0].iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, [2, 4, 5], "the last state is always evaluated");
        assert_eq!(told[0], told[1], "3 workers say something else than 1");
        assert!(told[0][0].1.contains("\"frechet_distance\":"), "{told:?}");
    }
}

#[test]
fn networks_that_know_classes_are_asked_about_held_out_samples_and_features_come_from_files() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let digits = format!("{root}/data/mnist-10k/t10k-images-idx3-ubyte.gz");
    let (path, held_out) = (format!("data.path={digits}"), format!("evaluation.held_out={digits}"));
    let features = format!("evaluation.features={root}/tests/networks/features.pt");
    let settings = [
        "job.steps=3",
        "evaluation.every_steps=2",
        "model.conditional=true",
        "data.kind=idx",
        &path,
        &held_out,
        &features,
    ];
    let runs = [1, 3].map(|workers| {
        let run = small(SMALL_DCGAN, &settings);
        run.complete(workers);
        run
    });
    let told = runs.each_ref().map(evaluations);
    assert_eq!(told[0].len(), 2);
    assert_eq!(told[0], told[1], "3 workers say something else than 1");
    for expected in ["file ", "\"frechet_distance\":", "\"discriminator_overfitting\":0.0"] {
        assert!(told[0][0].1.contains(expected), "{expected} {told:?}");
    }
}

#[test]
fn evaluations_are_the_same_through_the_death_of_the_one_that_makes_them() {
    // As many as may wait: on a busy machine training is far ahead of them, and the oldest would be
    // dropped.
    let settings = &["job.steps=400", "evaluation.every_steps=100", "metrics.every_steps=1"];
    let undisturbed = small(SMALL_MLP, settings);
    let reference = Reference::new("an undisturbed run", undisturbed.complete(1));
    for step in [101, 205] {
        let run = small(SMALL_MLP, settings);
        let coordinator = run.start(3);
        run.wait_for_step(step);
        send(run.pids(1)[0], Signal::SIGKILL);
        let ended = coordinator.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        reference.equals("a run whose first worker was killed", &run.digest());
        assert_eq!(evaluations(&run), evaluations(&undisturbed), "killed at step {step}");
        assert_eq!(count(&run, "evaluation_breach"), 0);
        run.assert_audited();
    }
}

#[test]
fn evaluations_are_the_same_when_a_run_stops_and_goes_on() {
    // As many as may wait: on a busy machine training is far ahead of them, and the oldest would be
    // dropped.
    let settings = &["job.steps=200", "evaluation.every_steps=40", "metrics.every_steps=1"];
    let undisturbed = small(SMALL_MLP, settings);
    let reference = Reference::new("an undisturbed run", undisturbed.complete(1));
    let run = small(SMALL_MLP, settings);
    let coordinator = run.start(2);
    run.wait_for_step(81);
    coordinator.signal(Signal::SIGTERM);
    assert_eq!(coordinator.wait().code, Some(143));
    reference.equals("a run that stopped and went on", &run.complete(1));
    assert_eq!(evaluations(&run), evaluations(&undisturbed));
}

#[test]
fn the_best_checkpoint_is_kept_and_named() {
    let settings = ["job.steps=40", "checkpoint.every_steps=4", "checkpoint.keep_last=1"];
    let run = small(SMALL_MLP, &[&settings[..], &["evaluation.with_checkpoints=true"]].concat());
    run.complete(2);
    let distance = |event: &Value| event["metrics"]["frechet_distance"].as_f64().unwrap();
    let events = run.events();
    let judged: Vec<&Value> = events.iter().filter(|event| event["kind"] == "evaluation").collect();
    assert!(judged.len() > 2, "{}", judged.len());
    let best = judged.iter().min_by(|one, other| distance(one).total_cmp(&distance(other))).unwrap();
    let named = fs::read(run.path("checkpoints/best.json")).unwrap();
    let named: Value = serde_json::from_slice(&named).unwrap();
    assert_eq!((&named["format"], &named["step"]), (&1.into(), &best["step"]));
    assert_eq!(named["metrics"], best["metrics"]);
    let folder = named["folder"].as_str().unwrap();
    assert!(run.path("checkpoints").join(folder).join("manifest.json").exists(), "{folder} is gone");
    let card = fs::read_to_string(run.path("checkpoints/model-card.md")).unwrap();
    for expected in [folder, "## Limits", "frechet distance"] {
        assert!(card.contains(expected), "{expected}\n{card}");
    }
    let folders =
        fs::read_dir(run.path("checkpoints")).unwrap().flatten().filter(|entry| entry.path().is_dir());
    assert!(folders.count() <= 2, "the newest and the best are kept");
    run.assert_audited();
}

/// Steps as large as these throw the generator into a corner of its output within a few steps. Those of the
/// discriminator are small, so that no loss explodes.
const COLLAPSING: &[&str] = &[
    "optimizer.learning_rate=5",
    "optimizer.discriminator_learning_rate=0.001",
    "alarms.after_images=0",
    "evaluation.every_steps=20",
];

#[test]
fn a_collapse_raises_an_alarm_at_the_next_evaluation() {
    let run = small(SMALL_MLP, &[COLLAPSING, &["job.steps=40"]].concat());
    run.complete(1);
    let alarm = run.wait_for("alarm", |_| true);
    assert_eq!((&alarm["alarm"], &alarm["step"]), (&"collapse".into(), &20.into()), "{alarm}");
    assert_eq!(count(&run, "alarm"), 1, "it is told once");
}

#[test]
fn an_alarm_ends_a_run_that_shall_end_and_ends_it_again() {
    let settings =
        [COLLAPSING, &["job.steps=100000", "alarms.policy=stop", "checkpoint.every_steps=10"]].concat();
    let mut run = small(SMALL_MLP, &settings);
    for time in 1..=2 {
        let ended = run.start(2).wait();
        assert_eq!(ended.code, Some(1), "{}", ended.output);
        assert!(ended.output.contains("alarm: collapse"), "{}", ended.output);
        assert_eq!(count(&run, "alarm"), time);
    }
    // The user decides what an alarm does, also for a run that has begun.
    run.set("alarms.policy=warn");
    let newest = run.rows().last().and_then(|row| row["step"].as_u64()).unwrap();
    run.set(&format!("job.steps={}", newest + 20));
    let ended = run.start(1).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
}

#[test]
fn a_healthy_run_raises_no_alarm() {
    let run = Run::new(&[&[
        "job.steps=400",
        "evaluation.every_steps=100",
        "evaluation.samples=500",
        "evaluation.reference=1000",
        "sample.every_steps=0",
    ]]);
    run.complete(2);
    assert_eq!(evaluations(&run).len(), 4);
    assert_eq!(count(&run, "alarm"), 0, "{:?}", run.events());
}

#[test]
fn what_evaluations_cannot_do_is_said_before_training() {
    let file = std::env::temp_dir().join("ganglion-no-module.pt");
    fs::write(&file, "no module").unwrap();
    let no_module = format!("evaluation.features={}", file.display());
    for (settings, expected) in [
        (&["evaluation.held_out=/tmp"][..], "held_out=/tmp: given"),
        (&["evaluation.features=/no/such.pt"], "is no file"),
        (&["evaluation.best_by=beauty"], "evaluation.best_by"),
        (
            &["evaluation.every_steps=1", "evaluation.features=pixels", "evaluation.best_by=kid"],
            "there is no kid",
        ),
        (&["evaluation.every_steps=1", &no_module], "is a text file, not a TorchScript module"),
    ] {
        let ended = small(SMALL_MLP, &[settings, &["job.steps=2"]].concat()).start(1).wait();
        assert_eq!(ended.code, Some(2), "{}", ended.output);
        assert!(ended.output.contains(expected), "{expected}\n{}", ended.output);
    }
    let _ = fs::remove_file(file);
}
