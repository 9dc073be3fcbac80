//! The simulation of the shell: a real coordinator with its gRPC, its journal and its files, and the real
//! sessions of workers, on a network and with a clock that a seed decides. Only the training is a model, and
//! the machines.
//!
//! At the end the run must be complete, its last state that of an undisturbed run, and its audit clean; on
//! the way no worker may commit a state that an undisturbed run does not have.
//!
//! A seed decides the job, the cluster, what goes wrong and when, and every delay of the network. Not seeded
//! is in which order the runtime wakes tasks that are due at once, so two logs of a seed may differ by some
//! milliseconds.
//!
//! - `SEEDS=n cargo test --release -p ganglion-worker --test simulation every_seed` runs the seeds 0 to n -
//!   1.
//! - `SEED=x` with the same command runs one and prints what happens in it.

mod faults;
mod job;
mod machine;
#[path = "../../../membership/tests/simulation/mix.rs"]
mod mix;
mod net;
mod operator;
#[path = "../../../membership/tests/simulation/sweep.rs"]
mod sweep;
mod team;
mod worker;
mod world;

use std::path::Path;
use std::time::Duration;

use faults::Mishap;
use rand::RngExt;
use sweep::{Run, Simulation};
use world::{Due, World};

const SHELL: Simulation =
    Simulation { package: "ganglion-worker", seeds: 40, of_today: 20, failed_once: &[], run };

/// The same runs, and in each the power fails at a random moment.
const POWER: Simulation = Simulation { seeds: 20, of_today: 5, run: run_with_power_cut, ..SHELL };

/// Runs in which nothing goes wrong but that the disk of the run directory is full for a while. More rows
/// come than may wait for it, and the workers are asked for the others.
const FULL: Simulation = Simulation { seeds: 20, of_today: 5, run: run_with_full_disk, ..SHELL };

fn run(seed: u64, keep_log: bool) -> Run {
    live(seed, keep_log, |_| {})
}

fn run_with_power_cut(seed: u64, keep_log: bool) -> Run {
    live(seed, keep_log, |world| {
        let moment = world.rng.random_range(Duration::ZERO..world.scenario.quiet_at);
        let all = world.rng.random_bool(0.5);
        world.at(moment, Due::Mishap(Mishap::PowerCut(all)));
    })
}

fn run_with_full_disk(seed: u64, keep_log: bool) -> Run {
    live(seed, keep_log, |world| {
        world.calm();
        world.keeps_rows = true;
        let begin = world.rng.random_range(Duration::ZERO..world.scenario.quiet_at);
        let end = begin + Duration::from_millis(world.rng.random_range(500..5_000));
        world.at(begin, Due::Disk { is_full: true });
        world.at(end, Due::Disk { is_full: false });
    })
}

fn live(seed: u64, keep_log: bool, prepare: impl FnOnce(&mut World<'_>)) -> Run {
    // The journal waits for the disk after every row: memory is as good here, nobody loses power.
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let folder = tempfile::Builder::new().prefix("ganglion-simulation-").tempdir_in(parent);
    let folder = folder.unwrap_or_else(|error| panic!("no folder for a run: {error}"));
    let mut world = World::new(seed, &folder.path().join("run"), keep_log);
    prepare(&mut world);
    let failure = world.run().err();
    let happenings = u64::try_from(world.now().as_millis()).expect("a short run");
    let mut log = world.log.take().unwrap_or_default();
    if keep_log {
        log.extend(events(&world.folder));
    }
    Run { failure, log, happenings }
}

/// The run's events, but for when they were and on which machine.
fn events(folder: &Path) -> Vec<String> {
    let lines = std::fs::read_to_string(folder.join("events.jsonl")).unwrap_or_default();
    let shown = lines.lines().map(|line| {
        let mut event: serde_json::Value = serde_json::from_str(line).expect("an event is JSON");
        let fields = event.as_object_mut().expect("an event is an object");
        for name in ["time", "pid", "host"] {
            fields.remove(name);
        }
        event.to_string()
    });
    shown.collect()
}

#[test]
fn every_seed_comes_to_the_same_end() {
    SHELL.start();
}

#[test]
fn every_seed_keeps_its_rows_through_a_full_disk() {
    FULL.start();
}

#[test]
fn every_seed_survives_a_power_cut() {
    POWER.start();
}
