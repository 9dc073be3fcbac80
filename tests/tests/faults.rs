//! Processes are killed, stopped and cut off; the result stays the same.
#![allow(clippy::unwrap_used)] // a test may panic

use std::sync::OnceLock;
use std::time::Duration;

use ganglion_tests::{Process, Reference, Run, SMALL_DCGAN, SMALL_MLP, eventually, is_running, send};
use nix::sys::signal::Signal;
use rustix::process::{Pid, Resource, Rlimit};

/// Job long enough that faults fall into its middle.
const LONG: &[&str] =
    &["job.steps=1100", "job.failure_deadline=2", "metrics.every_steps=1", "checkpoint.every_steps=250"];
/// The same for slower networks.
const LONG_DCGAN: &[&str] =
    &["job.steps=250", "job.failure_deadline=2", "metrics.every_steps=1", "checkpoint.every_steps=60"];

/// Result of the job of most tests, computed once.
fn undisturbed_mlp() -> &'static Reference {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    REFERENCE.get_or_init(|| Reference::of(&[SMALL_MLP, LONG]))
}

/// Asserts one row for each step, and a clean audit.
#[track_caller]
fn assert_nothing_lost(run: &Run, steps: u64) {
    let mut rows: Vec<u64> = run.rows().iter().filter_map(|row| row["step"].as_u64()).collect();
    rows.sort_unstable();
    let missing: Vec<u64> = (1..=steps).filter(|step| !rows.contains(step)).collect();
    assert!(missing.is_empty(), "no rows of steps {missing:?}");
    assert_eq!(rows.len() as u64, steps, "a step has two rows");
    run.assert_audited();
}

#[track_caller]
fn assert_complete(coordinator: Process) {
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
}

fn count(run: &Run, kind: &str) -> usize {
    run.events().iter().filter(|event| event["kind"] == kind).count()
}

fn world_sizes(run: &Run) -> Vec<u64> {
    let formed = run.events().into_iter().filter(|event| event["kind"] == "generation_formed");
    formed.map(|event| event["world_size"].as_u64().unwrap()).collect()
}

fn url(run: &Run) -> String {
    run.wait_for("coordinator_started", |_| true)["address"].as_str().unwrap().to_string()
}

/// Hits these ranks of the first group at once and waits for the end; returns the run.
fn with_ranks_hit(settings: &[&[&str]], steps: u64, workers: u32, ranks: &[usize], signal: Signal) -> Run {
    let run = Run::new(settings);
    let coordinator = run.start(workers);
    run.wait_for("checkpoint", |_| true);
    let pids = run.pids(1);
    ranks.iter().for_each(|rank| send(pids[*rank], signal));
    assert_complete(coordinator);
    assert_nothing_lost(&run, steps);
    for rank in ranks {
        assert!(!is_running(pids[*rank]), "rank {rank} was left behind");
    }
    run
}

#[test]
fn killed_workers_change_nothing_and_are_replaced() {
    let dcgan = Reference::of(&[SMALL_DCGAN, LONG_DCGAN]);
    let mlp = ([SMALL_MLP, LONG], 1100, undisturbed_mlp());
    for (settings, steps, reference) in [mlp, ([SMALL_DCGAN, LONG_DCGAN], 250, &dcgan)] {
        let cases: &[(u32, &[usize])] = &[(4, &[1]), (3, &[0, 2])];
        for (workers, ranks) in &cases[..if steps == 250 { 1 } else { 2 }] {
            let (workers, ranks) = (*workers, *ranks);
            let run = with_ranks_hit(&settings, steps, workers, ranks, Signal::SIGKILL);
            reference.equals(&format!("a run that lost ranks {ranks:?} of {workers}"), &run.digest());
            let sizes = world_sizes(&run);
            let left = u64::from(workers) - ranks.len() as u64;
            assert_eq!(sizes[..2], [u64::from(workers), left], "the survivors go on at once");
            assert_eq!(sizes.last(), Some(&u64::from(workers)), "the lost are replaced: {sizes:?}");
        }
    }
}

#[test]
fn a_hung_worker_is_killed_and_replaced() {
    // The only worker, or one of two.
    for workers in 1..=2 {
        let rank = workers as usize - 1;
        let run = with_ranks_hit(&[SMALL_MLP, LONG], 1100, workers, &[rank], Signal::SIGSTOP);
        undisturbed_mlp().equals("a run with a hung worker", &run.digest());
        run.wait_for("worker_dropped", |_| true);
    }
}

#[test]
fn a_slow_worker_slows_the_others_and_is_not_lost() {
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(3);
    run.wait_for("checkpoint", |_| true);
    let slow = run.pids(1)[1];
    for _ in 0..30 {
        send(slow, Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(90));
        send(slow, Signal::SIGCONT);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_complete(coordinator);
    undisturbed_mlp().equals("a run with a slow worker", &run.digest());
    assert_nothing_lost(&run, 1100);
    assert_eq!(world_sizes(&run), [3], "nobody was lost");
}

#[test]
fn a_worker_that_runs_out_of_memory_is_replaced() {
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(2);
    run.wait_for("checkpoint", |_| true);
    let poor = run.pids(1)[0];
    // From now on it gets no further memory, and the next change of its group needs some.
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::prlimit(Pid::from_raw(poor), Resource::As, none).unwrap();
    send(run.pids(1)[1], Signal::SIGKILL);
    run.wait_for("worker_exited", |event| event["pid"] == poor);
    assert_complete(coordinator);
    undisturbed_mlp().equals("a run with a worker without memory", &run.digest());
    assert_nothing_lost(&run, 1100);
}

#[test]
fn when_all_workers_are_killed_the_newest_checkpoint_goes_on() {
    let reference = undisturbed_mlp();
    let run = with_ranks_hit(&[SMALL_MLP, LONG], 1100, 2, &[0, 1], Signal::SIGKILL);
    reference.equals("a run that lost all workers", &run.digest());
    let second = run.wait_for("generation_formed", |event| event["generation"] == 2);
    assert!(second["start"].as_str().unwrap().starts_with("step-"), "{second}");
}

#[test]
fn a_coordinator_that_is_killed_and_started_again_is_no_event_for_its_workers() {
    let run = Run::new(&[SMALL_MLP, LONG]);
    for kill in 1..=3 {
        let coordinator = run.start(2);
        if kill > 1 {
            // A coordinator that is killed before its workers are back has taken none over.
            run.wait_for("generation_kept", |event| event["term"] == kill);
        }
        run.wait_for_step(220 * kill);
        coordinator.signal(Signal::SIGKILL);
        assert_eq!(coordinator.wait().code, None);
    }
    assert_complete(run.start(2));
    undisturbed_mlp().equals("a run that lost its coordinator three times", &run.digest());
    assert_nothing_lost(&run, 1100);
    assert_eq!(count(&run, "worker_started"), 2, "no worker was restarted");
    assert_eq!(count(&run, "generation_formed"), 1, "no step was done again");
    assert_eq!(count(&run, "generation_kept"), 3);
}

#[test]
fn a_coordinator_and_a_worker_that_die_together_are_both_replaced() {
    let reference = undisturbed_mlp();
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(3);
    run.wait_for("checkpoint", |_| true);
    coordinator.signal(Signal::SIGKILL);
    send(run.pids(1)[1], Signal::SIGKILL);
    coordinator.wait();
    assert_complete(run.start(3));
    reference.equals("a run that lost its coordinator and a worker", &run.digest());
    assert_nothing_lost(&run, 1100);
    let second = run.wait_for("generation_formed", |event| event["generation"] == 2);
    assert!(second["start"].as_str().unwrap().starts_with("rank "), "the survivors held the state: {second}");
    assert_eq!(count(&run, "worker_started"), 4);
}

#[test]
fn without_a_coordinator_workers_save_what_they_hold_and_the_next_one_adopts_it() {
    let mut run = Run::new(&[SMALL_MLP, LONG, &["job.steps=1000000", "job.failure_deadline=1"]]);
    let coordinator = run.start(2);
    let step = run.wait_for_step(20);
    let pids = run.pids(1);
    coordinator.signal(Signal::SIGKILL);
    coordinator.wait();
    for pid in pids {
        eventually("end of a worker", || (!is_running(pid)).then_some(()));
    }
    let saved = std::fs::read_dir(run.path("checkpoints")).unwrap().flatten();
    let saved = saved.filter(|entry| entry.path().join("manifest.json").exists());
    let saved: Vec<String> = saved.map(|entry| entry.file_name().into_string().unwrap()).collect();
    let newest = saved.iter().filter_map(|name| name[5..13].parse::<u64>().ok()).max().unwrap();
    assert!(newest > step, "trained on without a coordinator after step {step}: {saved:?}");
    run.set(&format!("job.steps={}", newest + 20));
    assert_complete(run.start(1));
    let first = run.wait_for("generation_formed", |event| event["generation"] == 2);
    assert!(first["start"].as_str().unwrap().starts_with(&format!("step-{newest:08}")), "{first}");
    let whole = Run::new(&[SMALL_MLP, LONG, &[&format!("job.steps={}", newest + 20)]]);
    assert_eq!(run.digest(), whole.complete(1));
    // Rows that no coordinator recorded lay beside the checkpoint.
    assert_nothing_lost(&run, newest + 20);
}

#[test]
fn a_run_that_is_interrupted_saves_and_goes_on_to_the_same_bits() {
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(2);
    let before = run.wait_for_step(100);
    coordinator.signal(Signal::SIGINT);
    // As a launcher does, which signals the process and its group.
    coordinator.signal(Signal::SIGINT);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(130), "{}", ended.output);
    let saved = run.wait_for("checkpoint", |_| true)["step"].as_u64().unwrap();
    assert!(saved >= before && saved < 1100, "stopped at {saved} after {before}");
    undisturbed_mlp().equals("a run that was interrupted", &run.complete(3));
    assert_nothing_lost(&run, 1100);
}

#[test]
fn a_remote_worker_that_is_killed_is_gone_at_once() {
    let reference = undisturbed_mlp();
    let run = Run::new(&[SMALL_MLP, LONG]);
    let coordinator = run.start(0);
    let workers = [(); 3].map(|()| Process::worker(&url(&run)));
    run.wait_for("generation_formed", |event| event["world_size"] == 3);
    run.wait_for("checkpoint", |_| true);
    workers[1].signal(Signal::SIGKILL);
    let lost = run.wait_for("worker_lost", |_| true);
    let next = run.wait_for("generation_formed", |event| {
        event["world_size"] == 2 && event["time"].as_f64() >= lost["time"].as_f64()
    });
    let regroup = run.wait_for("regroup", |event| event["time"].as_f64() <= next["time"].as_f64());
    assert!(regroup["reason"].as_str().unwrap().contains("lost the connection"), "{regroup}");
    assert_eq!(lost["reason"], "its session ended", "nobody waited for the deadline");
    assert_complete(coordinator);
    reference.equals("a run that lost a remote worker", &run.digest());
    assert_nothing_lost(&run, 1100);
}

/// The machine of the coordinator slept, for example. Its workers trained on until their leases ended, saved
/// what they had and left; no step of that is computed again.
#[test]
fn a_coordinator_that_was_away_goes_on_from_what_its_workers_saved() {
    let model = ["model.kind=dcgan-28", "model.width=8", "model.latent_dim=8", "job.shard_batch=6"];
    let steps: &[&str] = &["job.steps=1200", "metrics.every_steps=1", "checkpoint.every_steps=20"];
    // Leases of six seconds.
    let settings = [&model, steps, &["job.failure_deadline=0.5"]];
    let run = Run::new(&settings);
    let coordinator = run.start(2);
    let before = run.wait_for("checkpoint", |_| true)["step"].as_u64().unwrap();
    let pids = run.pids(1);
    coordinator.signal(Signal::SIGSTOP);
    eventually("end of the leases", || pids.iter().all(|pid| !is_running(*pid)).then_some(()));
    coordinator.signal(Signal::SIGCONT);
    let formed = run.wait_for("generation_formed", |event| event["generation"].as_u64() > Some(1));
    let start = formed["start"].as_str().unwrap().strip_prefix("step-").expect("from a checkpoint");
    let step: u64 = start.split('-').next().unwrap().parse().unwrap();
    assert!(step > before + 20, "from step {step}, although step {before} was saved before");
    assert_complete(coordinator);
    assert_nothing_lost(&run, 1200);
    Reference::of(&settings).equals("a run whose coordinator was away", &run.digest());
}

#[test]
fn a_remote_worker_that_comes_back_from_the_dead_joins_anew() {
    let settings = [SMALL_MLP, LONG, &["job.steps=4000"]];
    let reference = Reference::of(&settings);
    let run = Run::new(&settings);
    let coordinator = run.start(1);
    run.wait_for_step(10);
    let worker = Process::worker(&url(&run));
    run.wait_for("generation_formed", |event| event["world_size"] == 2);
    let step = run.wait_for_step(50);
    worker.signal(Signal::SIGSTOP);
    run.wait_for("generation_formed", |event| {
        event["generation"].as_u64() > Some(2) && event["world_size"] == 1
    });
    run.wait_for_step(step + 100);
    worker.signal(Signal::SIGCONT);
    run.wait_for("generation_formed", |event| {
        event["generation"].as_u64() > Some(3) && event["world_size"] == 2
    });
    assert_eq!(count(&run, "worker_joined"), 3, "it is a stranger");
    assert_complete(coordinator);
    assert_eq!(worker.wait().code, Some(0));
    reference.equals("a run with a worker that came back", &run.digest());
    assert_nothing_lost(&run, 4000);
}
