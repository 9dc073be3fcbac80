//! The promise: the cluster never changes the result.
#![allow(clippy::unwrap_used)] // a test may panic

use std::process::Command;

use ganglion_tests::{Process, Reference, Run, SMALL_DCGAN, SMALL_MLP, eventually, failpoint, program, send};
use nix::sys::signal::Signal;

/// Variable that names the part of the machine whose workers share memory; `off` for none.
const MEMORY: &str = "GANGLION_SHARED_MEMORY";

fn any_number_of_workers(model: &[&str], data_shards: &str) -> Reference {
    let settings = [model, &["job.steps=4", "loss.discriminator_steps=2"], &[data_shards]];
    let reference = Reference::new(&format!("1 worker with {data_shards}"), Run::new(&settings).complete(1));
    for workers in 2..=4 {
        reference
            .equals(&format!("{workers} workers with {data_shards}"), &Run::new(&settings).complete(workers));
    }
    reference
}

#[test]
fn an_mlp_has_the_same_bits_on_1_to_4_workers() {
    let four = any_number_of_workers(SMALL_MLP, "job.data_shards=4");
    let six = any_number_of_workers(SMALL_MLP, "job.data_shards=6");
    assert_ne!(four.digest(), six.digest(), "the number of data shards is part of the job");
}

#[test]
fn a_dcgan_has_the_same_bits_on_1_to_4_workers() {
    any_number_of_workers(SMALL_DCGAN, "job.data_shards=4");
    any_number_of_workers(SMALL_DCGAN, "job.data_shards=6");
}

#[test]
fn every_loss_has_the_same_bits_on_1_and_3_workers() {
    for loss in ["minimax", "least-squares", "hinge", "wasserstein-gp"] {
        let loss = format!("loss.kind={loss}");
        let settings = [SMALL_MLP, &["job.steps=2", "job.data_shards=4"], &[loss.as_str()]];
        let reference = Reference::new(&format!("1 worker with {loss}"), Run::new(&settings).complete(1));
        reference.equals(&format!("3 workers with {loss}"), &Run::new(&settings).complete(3));
    }
}

/// More ranks than exchange sums by chunks; of 11 shards one rank has two, and its death leaves nine ranks.
#[test]
fn a_large_group_has_the_same_bits_over_the_network_and_through_a_death() {
    let settings = [SMALL_MLP, &["job.steps=8", "job.data_shards=11", "job.shard_batch=2"]];
    let reference = Reference::new("1 worker", Run::new(&settings).complete(1));
    for point in ["reduce@7", "gather@7"] {
        let run = Run::new(&settings).with_failpoints();
        let once = run.beside("once");
        let death = (failpoint::VARIABLE, format!("{point}:{}", once.display()));
        let over_network = (MEMORY, "off".to_string());
        let ended = run.start_in(10, &[death, over_network]).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        assert!(once.exists(), "no worker was killed");
        reference.equals(&format!("10 workers of which one died at {point}"), &run.digest());
    }
}

/// Workers of two machines: some messages go through memory and others over the network, also after a death.
#[test]
fn workers_of_two_machines_have_the_same_bits_through_a_death() {
    let settings = [SMALL_MLP, &["job.steps=1000", "job.data_shards=7", "metrics.every_steps=1"]];
    let reference = Reference::of(&settings);
    let run = Run::new(&settings);
    let coordinator = run.start_in(3, &[(MEMORY, "one".to_string())]);
    let started = run.wait_for("coordinator_started", |_| true);
    let join = |_| Process::worker_with(started["address"].as_str().unwrap(), &[(MEMORY, "other")]);
    let joined: Vec<Process> = (0..2).map(join).collect();
    let five = run.wait_for("generation_formed", |event| event["world_size"] == 5);
    let is_of_five = |row: &serde_json::Value| row["generation"] == five["generation"];
    eventually("a step of all five", || run.rows().into_iter().find(is_of_five));
    let victim = run.pids(five["generation"].as_u64().unwrap()).into_iter().find(|pid| {
        // Of the three.
        joined.iter().all(|worker| worker.pid() != *pid)
    });
    send(victim.unwrap(), Signal::SIGKILL);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    for worker in joined {
        let output = worker.wait().output;
        assert!(output.contains("through memory to 1 worker, and over Gloo to the others"), "{output}");
    }
    let sizes: Vec<u64> = run.events().iter().filter_map(|event| event["world_size"].as_u64()).collect();
    assert!(sizes.ends_with(&[5, 4]) || sizes.ends_with(&[5, 4, 5]), "{sizes:?}");
    reference.equals("5 workers of two machines", &run.digest());
    run.assert_audited();
}

/// Equal also before any sum: each data shard contributes the same to each update.
#[test]
fn each_shard_gradient_has_the_same_bits_on_1_and_3_workers() {
    let lines = |workers: u32| {
        let run = Run::new(&[SMALL_DCGAN, &["job.steps=2", "job.data_shards=4"]]);
        let log = run.beside("shard-gradients");
        let variable = [("GANGLION_SHARD_GRADIENTS", log.display().to_string())];
        let ended = run.start_in(workers, &variable).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        let mut lines: Vec<String> =
            std::fs::read_to_string(log).unwrap().lines().map(str::to_string).collect();
        lines.sort();
        lines
    };
    let alone = lines(1);
    assert_eq!(alone.len(), 16, "4 data shards in 4 updates");
    assert_eq!(lines(3), alone);
}

/// The same gradients in fp32, to the bit; in bf16 others, as far apart as 8 bits let them be.
#[test]
fn a_probe_tells_how_far_a_device_is_from_fp32() {
    for (model, precision) in
        [SMALL_MLP, SMALL_DCGAN].into_iter().flat_map(|model| [(model, "fp32"), (model, "bf16")])
    {
        let run = Run::new(&[model, &["job.steps=1", &format!("job.precision={precision}")]]);
        run.complete(1);
        let mut probe = Command::new(program("worker"));
        probe.arg("probe").arg(run.path("")).args(["--device", "cpu", "--json"]);
        let ended = Process::start(probe).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        let told: serde_json::Value = serde_json::from_str(&ended.output).unwrap();
        let phases = told["phases"].as_array().unwrap();
        assert_eq!(phases.len(), 2, "{told}");
        for phase in phases {
            assert!(phase["repeats"] == true && phase["milliseconds"].as_f64() > Some(0.0), "{told}");
            let distance = phase["gradient"].as_f64().unwrap();
            let expected = if precision == "fp32" { 0.0..=0.0 } else { 1e-4..=0.3 };
            assert!(expected.contains(&distance), "{model:?} in {precision}: {told}");
        }
    }
}

/// Enough data shards that a lone worker draws some samples twice, and three workers none.
#[test]
fn twenty_data_shards_have_the_same_bits_on_1_and_3_workers() {
    for model in [SMALL_MLP, SMALL_DCGAN] {
        let settings = [model, &["job.steps=2", "job.data_shards=20"]];
        let reference = Reference::new("1 worker with 20 data shards", Run::new(&settings).complete(1));
        reference.equals("3 workers with 20 data shards", &Run::new(&settings).complete(3));
    }
}

#[test]
fn bf16_has_the_same_bits_on_1_and_3_workers() {
    for (model, loss) in [(SMALL_MLP, "wasserstein-gp"), (SMALL_DCGAN, "non-saturating")] {
        let loss = format!("loss.kind={loss}");
        let settings = [model, &["job.precision=bf16", "job.steps=2", "job.data_shards=4"], &[loss.as_str()]];
        let reference =
            Reference::new(&format!("1 worker in bf16 with {loss}"), Run::new(&settings).complete(1));
        reference.equals(&format!("3 workers in bf16 with {loss}"), &Run::new(&settings).complete(3));
    }
}

/// Every family of models with all of its options, at sizes that take seconds.
#[test]
fn every_preset_has_the_same_bits_on_1_to_3_workers() {
    const PENALTIES: &[&str] = &["loss.r1=0.5", "loss.r2=0.5", "loss.final_r1=0.1", "loss.penalty_every=2"];
    const SCHEDULES: &[&str] =
        &["optimizer.decay_images=40", "optimizer.final_learning_rate=1e-5", "optimizer.final_beta2=0.99"];
    const CONDITIONAL: &[&str] = &["model.conditional=true"];
    const AUGMENTED: &[&str] =
        &["augmentation.flip=true", "augmentation.kinds=flip,rotate90,translation,color,cutout"];
    const ADAPTIVE: &[&str] = &["augmentation.adaptive=true", "augmentation.adjust_images=100"];
    let r3gan: &[&str] = &["model.kind=r3gan-28", "model.width=8", "model.latent_dim=8"];
    let sngan: &[&str] = &["model.kind=sngan-32", "model.width=8", "model.latent_dim=8", "data.resize=32"];
    let dcgan: &[&str] = &["model.kind=dcgan-28", "model.width=4", "model.latent_dim=8"];
    let pairs: &[&str] = &["loss.kind=relativistic-pairing"];
    let two: &[&str] = &["loss.discriminator_steps=2"];
    let cases: [&[&[&str]]; 7] = [
        &[r3gan, pairs, PENALTIES, SCHEDULES, &["model.ema_schedule=cosine"]],
        &[r3gan, pairs, two, CONDITIONAL, AUGMENTED, &["augmentation.probability=0.5"]],
        &[sngan, two, &["loss.kind=hinge"]],
        &[sngan, two, &["loss.kind=hinge", "loss.r1=0.5"], CONDITIONAL, AUGMENTED, ADAPTIVE],
        &[dcgan, pairs, CONDITIONAL, PENALTIES, SCHEDULES],
        &[dcgan, two, &["loss.r1=0.5", "loss.penalty_every=2"], AUGMENTED, ADAPTIVE],
        &[SMALL_MLP, &["loss.kind=wasserstein-gp", "loss.penalty_every=2", "job.precision=bf16"], AUGMENTED],
    ];
    for case in cases {
        let settings = [case, &[&["job.steps=4", "job.shard_batch=2", "job.data_shards=4"]]].concat();
        let what = case.concat().join(" ");
        let reference = Reference::new(&format!("1 worker with {what}"), Run::new(&settings).complete(1));
        for workers in [2, 3] {
            let run = Run::new(&settings).complete(workers);
            reference.equals(&format!("{workers} workers with {what}"), &run);
        }
    }
}

#[test]
fn another_seed_is_another_result() {
    let digest = |seed: &str| Run::new(&[SMALL_MLP, &["job.steps=2"], &[seed]]).complete(1);
    assert_eq!(digest("job.seed=1"), digest("job.seed=1"));
    assert_ne!(digest("job.seed=1"), digest("job.seed=2"));
}

/// Stops after `half` of the steps, then resumes with another number of workers.
#[test]
fn a_run_that_is_resumed_on_another_number_of_workers_has_the_same_bits() {
    for model in [SMALL_MLP, SMALL_DCGAN] {
        let whole = Run::new(&[model, &["job.steps=6", "job.data_shards=6"]]);
        let reference = Reference::new("one go", whole.complete(2));
        for (first, second) in [(2, 3), (4, 1)] {
            let mut run = Run::new(&[model, &["job.steps=3", "job.data_shards=6"]]);
            run.complete(first);
            run.set("job.steps=6");
            let resumed = run.complete(second);
            reference.equals(&format!("3 steps on {first} workers and 3 on {second}"), &resumed);
            let steps: Vec<u64> = run.rows().iter().filter_map(|row| row["step"].as_u64()).collect();
            assert_eq!(steps, [3, 6], "each reported step has one row");
        }
    }
}
