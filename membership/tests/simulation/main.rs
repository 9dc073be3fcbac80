//! The simulation of the group protocol: the real machine and the real members in a world where everything
//! goes wrong, and fourteen invariants that hold nevertheless. A seed decides everything that happens; the
//! same seed gives the same log on any machine.
//!
//! - Without either: the first seeds, some of today's, and those that failed once.
//! - `SEEDS=n cargo test --release -p ganglion-membership --test simulation` runs the seeds 0 to n - 1 on all
//!   cores.
//! - `SEED=x` with the same command runs one and prints all that happens in it.

mod coordinator;
mod directory;
mod faults;
mod invariants;
mod job;
mod mix;
mod network;
mod planted;
mod sweep;
mod team;
mod worker;
mod world;

use sweep::{Run, Simulation};
use world::World;

const MACHINE: Simulation = Simulation {
    package: "ganglion-membership",
    seeds: 2000,
    of_today: 4000,
    failed_once: &[
        105_034, 108_826, 282_049, 360_559, 711_331, 771_947, 892_867, 907_752, 928_086, 988_397, 1_111_873,
        1_383_016, 1_396_565,
    ],
    run,
};

fn run(seed: u64, keep_log: bool) -> Run {
    let mut world = World::new(seed, keep_log);
    let breach = world.run().err();
    let failure = breach.map(|breach| format!("breaks invariant {}: {}", breach.invariant, breach.what));
    Run { failure, log: world.ctx.log.unwrap_or_default(), happenings: world.happenings }
}

#[test]
fn every_seed_keeps_the_invariants() {
    MACHINE.start();
}

#[test]
fn the_same_seed_gives_the_same_log() {
    for seed in 0..20 {
        let (first, second) = (MACHINE.run(seed, true), MACHINE.run(seed, true));
        assert!(first.log.len() > 100);
        assert_eq!(first.log, second.log);
    }
}
