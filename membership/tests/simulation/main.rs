//! The simulation of the group protocol: the real machine in a world where everything goes wrong, and thirteen invariants
//! that hold nevertheless. A seed decides everything that happens; the same seed gives the same log on any machine.
//!
//! - `SEEDS=n cargo test --release -p ganglion-membership --test simulation` runs the seeds 0 to n - 1 on all cores.
//! - `SEED=x` with the same command runs one and prints all that happens in it.

mod coordinator;
mod directory;
mod faults;
mod invariants;
mod job;
mod network;
mod team;
mod worker;
mod world;

use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use invariants::Breach;
use world::World;

const SEEDS: u64 = 2000;

/// What became of a seed.
struct Run {
    breach: Option<Breach>,
    log: Vec<String>,
    happenings: u64,
}

fn run(seed: u64, keep_log: bool) -> Run {
    let mut world = World::new(seed, keep_log);
    let caught = std::panic::catch_unwind(AssertUnwindSafe(|| world.run().err()));
    let breach = caught.unwrap_or_else(|panic| Some(Breach::new(0, panic_message(&*panic))));
    let happenings = world.happenings;
    Run { breach, log: world.ctx.log.unwrap_or_default(), happenings }
}

/// A panic of the machine is worth a seed too; it has number 0.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
    format!("panic: {}", text.unwrap_or_default())
}

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}, not a number")))
}

/// How to see a seed again.
fn describe(seed: u64, breach: &Breach) -> String {
    format!(
        "seed {seed} breaks invariant {}: {}\n  see it again: SEED={seed} cargo test --release -p \
         ganglion-membership --test simulation every_seed -- --nocapture",
        breach.invariant, breach.what
    )
}

fn replay(seed: u64) {
    let run = run(seed, true);
    run.log.iter().for_each(|line| println!("{line}"));
    println!("seed {seed}: {} happenings", run.happenings);
    if let Some(breach) = run.breach {
        panic!("{}", describe(seed, &breach));
    }
}

/// What the threads share; each runs whole seeds.
#[derive(Default)]
struct Shared {
    next: AtomicU64,
    happenings: AtomicU64,
    breaches: Mutex<Vec<(u64, Breach)>>,
}

impl Shared {
    fn work(&self, first: u64, count: u64, start: Instant) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            let run = run(first + index, false);
            self.happenings.fetch_add(run.happenings, Ordering::Relaxed);
            if let Some(breach) = run.breach {
                eprintln!("{}", describe(first + index, &breach));
                self.breaches.lock().expect("no thread panics with it").push((first + index, breach));
            }
            if index > 0 && index.is_multiple_of((count / 10).max(1)) {
                eprintln!("{index} of {count} seeds in {:.1} s", start.elapsed().as_secs_f64());
            }
        }
    }
}

fn sweep(first: u64, count: u64) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = number("THREADS").map_or(cores, |n| usize::try_from(n).expect("a few threads"));
    let (shared, start) = (Shared::default(), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| shared.work(first, count, start));
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let happenings = shared.happenings.load(Ordering::Relaxed);
    let mut breaches = shared.breaches.into_inner().expect("no thread panics with it");
    breaches.sort_by_key(|(seed, _)| *seed);
    eprintln!(
        "{count} seeds, {happenings} happenings in {seconds:.1} s on {threads} threads: {:.0} seeds/s; {} fail",
        count as f64 / seconds,
        breaches.len()
    );
    if let Some((seed, breach)) = breaches.first() {
        panic!("{} of {count} seeds fail; the first: {}", breaches.len(), describe(*seed, breach));
    }
}

#[test]
fn every_seed_keeps_the_invariants() {
    match number("SEED") {
        Some(seed) => replay(seed),
        None => sweep(number("FIRST").unwrap_or(0), number("SEEDS").unwrap_or(SEEDS)),
    }
}

#[test]
fn the_same_seed_gives_the_same_log() {
    for seed in 0..20 {
        let (first, second) = (run(seed, true), run(seed, true));
        assert!(first.log.len() > 100);
        assert_eq!(first.log, second.log);
    }
}
