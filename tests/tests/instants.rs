//! Faults at the worst instants: inside a reduce, a commit, a state sync, a checkpoint, and between
//! two of the coordinator's decisions.
#![allow(clippy::unwrap_used)] // a test may panic

use std::sync::OnceLock;

use ganglion_tests::failpoint::VARIABLE;
use ganglion_tests::{OVER_GLOO, Process, Reference, Run, SMALL_DCGAN, SMALL_MLP};

const MLP: &[&str] = &[
    "job.steps=500",
    "job.data_shards=6",
    "job.failure_deadline=2",
    "metrics.every_steps=1",
    "checkpoint.every_steps=100",
];
const DCGAN: &[&str] = &[
    "job.steps=100",
    "job.data_shards=6",
    "job.failure_deadline=2",
    "metrics.every_steps=1",
    "checkpoint.every_steps=50",
];

fn undisturbed_mlp() -> &'static Reference {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    REFERENCE.get_or_init(|| Reference::of(&[SMALL_MLP, MLP]))
}

/// Run in which the first process to reach a point kills itself.
fn with_failpoint(settings: &[&[&str]], workers: u32, point: &str) -> (Run, Process) {
    with_failpoint_in(settings, workers, point, &[])
}

fn with_failpoint_in(
    settings: &[&[&str]],
    workers: u32,
    point: &str,
    more: &[(&str, String)],
) -> (Run, Process) {
    let run = Run::new(settings).with_failpoints();
    let once = run.beside("once").display().to_string();
    let variables = [&[(VARIABLE, format!("{point}:{once}"))], more].concat();
    let coordinator = run.start_in(workers, &variables);
    (run, coordinator)
}

#[track_caller]
fn assert_same(run: &Run, coordinator: Process, reference: &Reference, what: &str) {
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{what}: {}", ended.output);
    assert!(run.beside("once").exists(), "nobody came to {what}");
    reference.equals(&format!("a run with a death at {what}"), &run.digest());
    run.assert_audited();
}

#[test]
fn a_worker_may_die_at_any_instant_of_a_phase() {
    for point in ["reduce@401", "gather@402", "commit@401", "commit@402", "committed@403"] {
        let (run, coordinator) = with_failpoint(&[SMALL_MLP, MLP], 3, point);
        assert_same(&run, coordinator, undisturbed_mlp(), point);
    }
}

/// Within its warm-up a run loses a worker, stops, and goes on with others. All steps clip, some of them.
#[test]
fn each_optimizer_has_the_same_bits_through_a_death_and_a_resume() {
    let few: &[&str] = &["job.steps=8", "job.data_shards=6", "job.shard_batch=2", "checkpoint.every_steps=3"];
    let of_all: &[&str] = &[
        "metrics.every_steps=1",
        "optimizer.warmup_steps=6",
        "optimizer.decay=linear",
        "optimizer.decay_steps=8",
    ];
    let sgd: &[&str] = &[
        "optimizer.kind=sgd",
        "optimizer.momentum=0.9",
        "optimizer.nesterov=true",
        "optimizer.weight_decay=0.01",
        "optimizer.learning_rate=0.1",
        "optimizer.clip_norm=0.5",
    ];
    let adamw: &[&str] = &["optimizer.kind=adamw", "optimizer.weight_decay=0.1", "optimizer.clip_norm=0.5"];
    for optimizer in [sgd, adamw] {
        let settings = [SMALL_MLP, few, of_all, optimizer];
        let alone = Run::new(&settings);
        let reference = Reference::new(&format!("1 worker with {optimizer:?}"), alone.complete(1));
        let norms = |run: &Run| {
            let of = |row: &serde_json::Value| {
                ["discriminator", "generator"]
                    .map(|phase| row[format!("gradient_norm_{phase}")].as_f64().unwrap())
            };
            run.rows().iter().map(of).collect::<Vec<_>>()
        };
        let known = norms(&alone);
        assert!(
            known.len() == 8 && known.iter().flatten().any(|norm| *norm > 0.5),
            "none is clipped: {known:?}"
        );
        let run = Run::new(&settings);
        reference.equals(&format!("2 workers with {optimizer:?}"), &run.complete(2));
        assert_eq!(norms(&run), known);
        let (mut run, coordinator) = with_failpoint(
            &[&settings[..], &[&["job.steps=4", "job.failure_deadline=2"]]].concat(),
            3,
            "commit@5",
        );
        assert_eq!(coordinator.wait().code, Some(0));
        assert!(run.beside("once").exists(), "nobody died");
        run.set("job.steps=8");
        reference.equals(&format!("a death, and 2 other workers, with {optimizer:?}"), &run.complete(2));
        assert_eq!(norms(&run), known);
        run.assert_audited();
    }
}

/// As between machines: workers of one otherwise share memory.
#[test]
fn a_worker_may_die_at_any_instant_of_a_reduce_over_gloo() {
    for (workers, point) in [(3, "reduce@401"), (3, "gather@402"), (2, "reduce@402")] {
        let over_gloo = (OVER_GLOO.0, OVER_GLOO.1.to_string());
        let (run, coordinator) = with_failpoint_in(&[SMALL_MLP, MLP], workers, point, &[over_gloo]);
        assert_same(&run, coordinator, undisturbed_mlp(), point);
    }
}

/// A generator's phase over pairs reads the real samples of the phase before it once more, and a
/// controller of augmentation is part of the synced state.
#[test]
fn a_worker_may_die_among_pairs_and_controllers() {
    const FEW: &[&str] = &[
        "job.steps=8",
        "job.data_shards=6",
        "job.shard_batch=2",
        "checkpoint.every_steps=3",
        "loss.discriminator_steps=2",
        "model.conditional=true",
        "model.width=8",
        "model.latent_dim=8",
        "loss.r1=0.5",
        "loss.penalty_every=2",
    ];
    const PAIRS: &[&str] =
        &["model.kind=r3gan-28", "augmentation.kinds=color,cutout", "augmentation.probability=0.5"];
    const CONTROLLED: &[&str] = &[
        "model.kind=sngan-32",
        "data.resize=32",
        "augmentation.kinds=flip,translation",
        "augmentation.adaptive=true",
        "augmentation.adjust_images=100",
    ];
    for (kind, points) in [(PAIRS, ["commit@8", "gather@9"]), (CONTROLLED, ["gather@10", "commit@11"])] {
        let reference = Reference::of(&[FEW, kind]);
        for point in points {
            let (run, coordinator) = with_failpoint(&[FEW, kind, &["job.failure_deadline=2"]], 3, point);
            assert_same(&run, coordinator, &reference, point);
        }
    }
}

#[test]
fn a_worker_whose_training_stands_still_is_replaced() {
    let point = "hang:reduce@401";
    let (run, coordinator) = with_failpoint(&[SMALL_MLP, MLP], 3, point);
    assert_same(&run, coordinator, undisturbed_mlp(), point);
    // The session continued: the worker was not silent.
    run.wait_for("worker_lost", |event| event["reason"] == "it made no progress for too long");
}

#[test]
fn a_worker_of_networks_with_batch_norm_may_die_at_any_instant_of_a_phase() {
    let reference = Reference::of(&[SMALL_DCGAN, DCGAN]);
    for point in ["reduce@101", "commit@102", "checkpoint@50"] {
        let (run, coordinator) = with_failpoint(&[SMALL_DCGAN, DCGAN], 3, point);
        assert_same(&run, coordinator, &reference, point);
    }
}

#[test]
fn a_worker_may_die_while_it_saves() {
    for point in ["checkpoint@200", "checkpoint@500"] {
        let (run, coordinator) = with_failpoint(&[SMALL_MLP, MLP], 3, point);
        assert_same(&run, coordinator, undisturbed_mlp(), point);
    }
}

/// Generation 2 begins when the second of two workers is killed, generation 3 when its replacement
/// has the state.
#[test]
fn the_source_or_the_receiver_of_a_healing_may_die_in_its_middle() {
    // Long enough for a replacement to come.
    let settings = [SMALL_DCGAN, DCGAN, &["job.steps=400"]];
    let reference = Reference::of(&settings);
    for point in ["heal@3", "heal-source@3"] {
        let (run, coordinator) = with_failpoint(&settings, 2, point);
        run.wait_for_step(20);
        ganglion_tests::send(run.pids(1)[1], nix::sys::signal::Signal::SIGKILL);
        assert_same(&run, coordinator, &reference, point);
    }
}

/// The same command, started again, finds a half-done decision.
#[test]
fn a_coordinator_may_die_between_two_of_its_decisions() {
    for point in ["form@1", "assign@1", "spawn@0", "spawn@1", "manifest@300", "manifest@500"] {
        let (run, coordinator) = with_failpoint(&[SMALL_MLP, MLP], 2, point);
        assert_eq!(coordinator.wait().code, None, "{point}");
        let again = run.start(2);
        assert_same(&run, again, undisturbed_mlp(), point);
    }
}
