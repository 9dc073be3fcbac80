//! Running many seeds on all cores, or one of them again. Every simulation of the workspace uses this.
//!
//! The environment decides: `SEEDS` how many, `FIRST` from which on, `THREADS` on how many threads; `SEED`
//! runs one and prints all that happens in it. If it says nothing, the seeds that failed once run, the first
//! ones, and some that no other day has.
#![allow(
    clippy::disallowed_methods,
    reason = "a sweep runs for days on cores; the simulations in it have no clock"
)]

use std::io::Write;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Instant, SystemTime};

/// Seeds of a day, UTC, are those from its number since 1970 times this on.
const OF_A_DAY: u64 = 1_000_000;

/// What became of a seed.
pub(crate) struct Run {
    /// What went wrong.
    pub failure: Option<String>,
    /// All that happened, if it was asked for.
    pub log: Vec<String>,
    pub happenings: u64,
}

/// A simulation: a function from a seed, and whether to keep a log, to what becomes of it.
#[derive(Clone, Copy)]
pub(crate) struct Simulation {
    /// The package that it is a test of.
    pub package: &'static str,
    /// Seeds to run if nobody says how many.
    pub seeds: u64,
    /// Seeds of today that run with them.
    pub of_today: u64,
    /// Seeds that failed once and run with them.
    pub failed_once: &'static [u64],
    pub run: fn(u64, bool) -> Run,
}

impl Simulation {
    /// Does what the environment asks for. Panics if a seed fails.
    pub(crate) fn start(&self) {
        match number("SEED") {
            Some(seed) => self.replay(seed),
            None => self.sweep(&self.seeds_to_run()),
        }
    }

    fn seeds_to_run(&self) -> Vec<u64> {
        let (first, count) = (number("FIRST"), number("SEEDS"));
        let start = first.unwrap_or(0);
        let asked_for = start..start + count.unwrap_or(self.seeds);
        if first.is_some() || count.is_some() {
            return asked_for.collect();
        }
        let today = self.seeds_of_today();
        self.failed_once.iter().copied().chain(asked_for).chain(today).collect()
    }

    /// Each day has others, so that a mistake does not hide for ever behind seeds that happen not to find it.
    fn seeds_of_today(&self) -> Range<u64> {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let first = since_1970.as_secs() / 86_400 * OF_A_DAY;
        let range = first..first + self.of_today;
        // Past the harness, which keeps back what is printed by a test that passes.
        let said = format!("{}: with today's seeds {range:?}\n", self.package);
        let _ = std::io::stderr().write_all(said.as_bytes());
        range
    }

    /// Runs a seed. A panic in it is a failure too.
    pub(crate) fn run(&self, seed: u64, keep_log: bool) -> Run {
        let caught = std::panic::catch_unwind(AssertUnwindSafe(|| (self.run)(seed, keep_log)));
        caught.unwrap_or_else(|panic| Run {
            failure: Some(panic_message(&*panic)),
            log: Vec::new(),
            happenings: 0,
        })
    }

    /// How to see a seed again.
    fn describe(&self, seed: u64, failure: &str) -> String {
        format!(
            "seed {seed}: {failure}\n  see it again: SEED={seed} cargo test --release -p {} --test simulation every_seed \
             -- --nocapture",
            self.package
        )
    }

    fn replay(&self, seed: u64) {
        let run = self.run(seed, true);
        run.log.iter().for_each(|line| println!("{line}"));
        println!("seed {seed}: {} happenings", run.happenings);
        if let Some(failure) = run.failure {
            panic!("{}", self.describe(seed, &failure));
        }
    }

    fn sweep(&self, seeds: &[u64]) {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = number("THREADS").map_or(cores, |n| usize::try_from(n).expect("a few threads"));
        let (shared, start) = (Shared::default(), Instant::now());
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| shared.work(self, seeds, start));
            }
        });
        let seconds = start.elapsed().as_secs_f64();
        let happenings = shared.happenings.load(Ordering::Relaxed);
        let mut failures = shared.failures.into_inner().expect("no thread panics with it");
        failures.sort_by_key(|(seed, _)| *seed);
        let count = seeds.len();
        eprintln!(
            "{count} seeds, {happenings} happenings in {seconds:.1} s on {threads} threads: {:.0} seeds/s; {} fail",
            count as f64 / seconds,
            failures.len()
        );
        if let Some((seed, failure)) = failures.first() {
            panic!("{} of {count} seeds fail; the first: {}", failures.len(), self.describe(*seed, failure));
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
    format!("panic: {}", text.unwrap_or_default())
}

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}, not a number")))
}

/// What the threads share; each runs whole seeds.
#[derive(Default)]
struct Shared {
    next: AtomicUsize,
    happenings: AtomicU64,
    failures: Mutex<Vec<(u64, String)>>,
}

impl Shared {
    fn work(&self, simulation: &Simulation, seeds: &[u64], start: Instant) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(seed) = seeds.get(index).copied() else { return };
            let run = simulation.run(seed, false);
            self.happenings.fetch_add(run.happenings, Ordering::Relaxed);
            if let Some(failure) = run.failure {
                eprintln!("{}", simulation.describe(seed, &failure));
                self.failures.lock().expect("no thread panics with it").push((seed, failure));
            }
            if index > 0 && index.is_multiple_of((seeds.len() / 10).max(1)) {
                eprintln!("{index} of {} seeds in {:.1} s", seeds.len(), start.elapsed().as_secs_f64());
            }
        }
    }
}
