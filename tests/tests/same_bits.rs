//! The promise: the cluster never changes the result.
#![allow(clippy::unwrap_used)] // a test may panic

use ganglion_tests::{Process, Run, SMALL_DCGAN, SMALL_MLP};
use nix::sys::signal::Signal;

/// A digest that must be the same for all, and what it was computed by.
struct Reference {
    what: String,
    digest: String,
}

impl Reference {
    #[track_caller]
    fn equals(&self, what: &str, digest: &str) {
        assert_eq!(digest, self.digest, "{what} differs from {}", self.what);
    }
}

fn any_number_of_workers(model: &[&str], data_shards: &str) -> Reference {
    let settings = [model, &["job.steps=4", "loss.discriminator_steps=2"], &[data_shards]];
    let reference =
        Reference { what: format!("1 worker with {data_shards}"), digest: Run::new(&settings).complete(1) };
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
    assert_ne!(four.digest, six.digest, "the number of data shards is part of the job");
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
        let reference =
            Reference { what: format!("1 worker with {loss}"), digest: Run::new(&settings).complete(1) };
        reference.equals(&format!("3 workers with {loss}"), &Run::new(&settings).complete(3));
    }
}

#[test]
fn another_seed_is_another_result() {
    let digest = |seed: &str| Run::new(&[SMALL_MLP, &["job.steps=2"], &[seed]]).complete(1);
    assert_eq!(digest("job.seed=1"), digest("job.seed=1"));
    assert_ne!(digest("job.seed=1"), digest("job.seed=2"));
}

/// Stops after `half` of the steps by themselves, then goes on with another number of workers.
#[test]
fn a_run_that_is_resumed_on_another_number_of_workers_has_the_same_bits() {
    for model in [SMALL_MLP, SMALL_DCGAN] {
        let whole = Run::new(&[model, &["job.steps=6", "job.data_shards=6"]]);
        let reference = Reference { what: "one go".to_string(), digest: whole.complete(2) };
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

const LONG: &[&str] =
    &["job.steps=1500", "job.failure_deadline=2", "metrics.every_steps=1", "checkpoint.every_steps=400"];

/// Rows of all steps, once each; a row may come after a later one.
#[track_caller]
fn assert_every_step_once(run: &Run) {
    let mut steps: Vec<u64> = run.rows().iter().filter_map(|row| row["step"].as_u64()).collect();
    steps.sort_unstable();
    let missing: Vec<u64> = (1..=1500).filter(|step| !steps.contains(step)).collect();
    assert!(missing.is_empty(), "no rows of steps {missing:?}");
    assert_eq!(steps.len(), 1500, "a step has two rows");
}

fn long_reference() -> Reference {
    Reference { what: "an undisturbed run".to_string(), digest: Run::new(&[SMALL_MLP, LONG]).complete(1) }
}

#[test]
fn a_run_that_is_interrupted_saves_and_goes_on_to_the_same_bits() {
    let reference = long_reference();
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let run = Run::new(&[SMALL_MLP, LONG]);
        let coordinator = run.start(2);
        let before = run.wait_for_step(100);
        coordinator.signal(signal);
        // As a launcher does that signals the process and its group.
        coordinator.signal(signal);
        let ended = coordinator.wait();
        assert_eq!(ended.code, Some(code), "{}", ended.output);
        let saved = run.wait_for("checkpoint", |_| true)["step"].as_u64().unwrap();
        assert!(saved >= before && saved < 1500, "stopped at {saved} after {before}");
        reference.equals(&format!("a run stopped by {signal}"), &run.complete(3));
        assert_every_step_once(&run);
    }
}

/// Kills these ranks of the first group at once and waits for the end; returns the run.
fn with_ranks_hit(workers: u32, ranks: &[usize], signal: Signal) -> Run {
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(workers);
    run.wait_for("checkpoint", |_| true);
    let pids = run.pids(1);
    ranks.iter().for_each(|rank| ganglion_tests::send(pids[*rank], signal));
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert_every_step_once(&run);
    for rank in ranks {
        assert!(!ganglion_tests::is_running(pids[*rank]), "rank {rank} was left behind");
    }
    run
}

fn world_sizes(run: &Run) -> Vec<u64> {
    let formed = run.events().into_iter().filter(|event| event["kind"] == "generation_formed");
    formed.map(|event| event["world_size"].as_u64().unwrap()).collect()
}

#[test]
fn killed_workers_change_nothing_and_are_replaced() {
    let reference = long_reference();
    for ranks in [&[1][..], &[0], &[0, 2]] {
        let run = with_ranks_hit(3, ranks, Signal::SIGKILL);
        reference.equals(&format!("a run that lost ranks {ranks:?}"), &run.digest());
        let sizes = world_sizes(&run);
        assert_eq!(sizes[..2], [3, 3 - ranks.len() as u64], "the survivors go on at once");
        assert_eq!(sizes.last(), Some(&3), "the lost are replaced: {sizes:?}");
    }
}

#[test]
fn a_hung_worker_is_killed_and_replaced() {
    let reference = long_reference();
    let run = with_ranks_hit(2, &[1], Signal::SIGSTOP);
    reference.equals("a run with a hung worker", &run.digest());
    run.wait_for("worker_dropped", |_| true);
    assert_eq!(world_sizes(&run)[..2], [2, 1]);
}

#[test]
fn when_all_workers_are_killed_the_newest_checkpoint_goes_on() {
    let reference = long_reference();
    let run = with_ranks_hit(2, &[0, 1], Signal::SIGKILL);
    reference.equals("a run that lost all workers", &run.digest());
    let second = run.wait_for("generation_formed", |event| event["generation"] == 2);
    assert!(second["start"].as_str().unwrap().starts_with("step-"), "{second}");
}

#[test]
fn a_killed_coordinator_takes_its_workers_along_and_the_run_resumes() {
    let reference = long_reference();
    for workers in [1, 2] {
        // Too long to end by itself before its workers give up.
        let mut run = Run::new(&[SMALL_MLP, LONG, &["job.steps=1000000"]]);
        let coordinator = run.start(workers);
        run.wait_for("checkpoint", |_| true);
        let pids = run.pids(1);
        coordinator.signal(Signal::SIGKILL);
        assert_eq!(coordinator.wait().code, None);
        for pid in pids {
            ganglion_tests::eventually("end of a worker", || {
                (!ganglion_tests::is_running(pid)).then_some(())
            });
        }
        run.set("job.steps=1500");
        reference.equals("a run that lost its coordinator", &run.complete(2));
        assert_every_step_once(&run);
    }
}

#[test]
fn a_worker_that_joins_in_the_middle_changes_nothing() {
    let reference = long_reference();
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(1);
    let started = run.wait_for("coordinator_started", |_| true);
    run.wait_for_step(50);
    let joiner = Process::worker(started["address"].as_str().unwrap());
    let formed = run.wait_for("generation_formed", |event| event["world_size"] == 2);
    assert_eq!(formed["start"], "rank 0", "the joiner is healed by the member");
    assert_eq!(coordinator.wait().code, Some(0));
    assert_eq!(joiner.wait().code, Some(0));
    reference.equals("a run that was joined", &run.digest());
    assert_every_step_once(&run);
}
