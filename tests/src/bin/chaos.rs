//! `make chaos`: real processes and random faults must give the same bits.
//!
//! In each round a run is disturbed by random faults, then left alone until it is complete. Its
//! digest must be that of an undisturbed run, and its audit must be clean.
#![allow(clippy::print_stdout)] // it is for people

use std::fmt::Write as _;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ganglion_tests::{Process, Reference, Run, SMALL_MLP};
use nix::sys::signal::Signal;
use rand::rngs::ChaCha8Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};

/// Settings of the disturbed job.
const JOB: &[&str] = &[
    "job.steps=4000",
    "job.data_shards=6",
    "job.failure_deadline=1.5",
    "metrics.every_steps=1",
    "checkpoint.every_steps=300",
    "loss.discriminator_steps=2",
];
/// Largest number of local workers.
const WORKERS: u32 = 4;
/// Number of faults in one round.
const FAULTS: usize = 25;

/// Kinds of faults.
#[derive(Clone, Copy, Debug)]
enum Fault {
    KillWorkers,
    StopWorker,
    AskWorkerToEnd,
    DrainWorker,
    Scale,
    Join,
    KillCoordinator,
    KillBoth,
    StopCoordinator,
}

const ALL: [Fault; 9] = [
    Fault::KillWorkers,
    Fault::StopWorker,
    Fault::AskWorkerToEnd,
    Fault::DrainWorker,
    Fault::Scale,
    Fault::Join,
    Fault::KillCoordinator,
    Fault::KillBoth,
    Fault::StopCoordinator,
];

struct Round {
    run: Run,
    coordinator: Process,
    /// Workers that were not started by the coordinator.
    joined: Vec<Process>,
    rng: ChaCha8Rng,
    /// Log of the round's faults; diagnostic only.
    story: String,
}

fn main() -> ExitCode {
    let setting = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let minutes = setting("MINUTES").unwrap_or(10);
    let seed = setting("SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("chaos for {minutes} min, seed {seed}");
    let reference = Reference::of(&[SMALL_MLP, JOB]);
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    let mut rounds = 0;
    while Instant::now() < end || rounds == 0 {
        let started = Instant::now();
        let mut round = Round::start(ChaCha8Rng::seed_from_u64(seed + rounds));
        round.disturb();
        let verdict = round.verdict(&reference);
        println!("round {rounds}, {:.0} s:{}", started.elapsed().as_secs_f64(), round.story);
        if let Err(breach) = verdict {
            println!(
                "BREACH in round {rounds} of seed {seed}: {breach}\nkept in {}",
                round.run.keep().display()
            );
            return ExitCode::FAILURE;
        }
        rounds += 1;
    }
    println!(
        "{rounds} rounds of {FAULTS} faults each: every digest is {}, every audit is clean",
        reference.digest()
    );
    ExitCode::SUCCESS
}

impl Round {
    fn start(mut rng: ChaCha8Rng) -> Round {
        let run = Run::new(&[SMALL_MLP, JOB]);
        let coordinator = run.start(rng.random_range(1..=WORKERS));
        run.wait_for_step(1);
        Round { run, coordinator, joined: Vec::new(), rng, story: String::new() }
    }

    fn disturb(&mut self) {
        for _ in 0..FAULTS {
            self.pause(1500);
            if !self.coordinator.is_running() {
                break;
            }
            let fault = *ALL.choose(&mut self.rng).expect("there are faults");
            let _ = write!(self.story, " {fault:?}");
            self.cause(fault);
        }
    }

    fn pause(&mut self, up_to_ms: u64) {
        sleep(Duration::from_millis(self.rng.random_range(0..=up_to_ms)));
    }

    fn cause(&mut self, fault: Fault) {
        let mut workers = self.run.live_workers();
        workers.shuffle(&mut self.rng);
        let some = self.rng.random_range(1..=workers.len().max(1)).min(workers.len());
        match fault {
            Fault::KillWorkers => kill_all(&workers[..some]),
            Fault::StopWorker => self.stop(workers.first().copied(), 4000),
            Fault::AskWorkerToEnd => {
                workers.first().into_iter().for_each(|pid| signal(*pid, Signal::SIGTERM))
            }
            Fault::DrainWorker => {
                let joined = self.run.events().into_iter().filter(|event| event["kind"] == "worker_joined");
                let newest = joined.filter_map(|event| event["worker"].as_u64()).max().unwrap_or(1);
                let worker = self.rng.random_range(1..=newest).to_string();
                self.run.ask(&["drain", &worker]);
            }
            Fault::Scale => {
                let workers = self.rng.random_range(1..=WORKERS).to_string();
                self.run.ask(&["scale", &workers]);
            }
            Fault::Join => {
                let started =
                    self.run.events().into_iter().rfind(|event| event["kind"] == "coordinator_started");
                let url = started.and_then(|event| event["address"].as_str().map(str::to_string));
                self.joined.extend(url.map(|url| Process::worker(&url)));
            }
            Fault::KillCoordinator => self.restart(&[]),
            Fault::KillBoth => self.restart(&workers[..some]),
            Fault::StopCoordinator => self.stop(Some(self.coordinator.pid()), 4000),
        }
    }

    /// Stops a process for a while.
    fn stop(&mut self, pid: Option<i32>, up_to_ms: u64) {
        let Some(pid) = pid else { return };
        signal(pid, Signal::SIGSTOP);
        self.pause(up_to_ms);
        signal(pid, Signal::SIGCONT);
    }

    /// Kills the coordinator and these workers; after a while the same command is started again.
    fn restart(&mut self, workers: &[i32]) {
        self.coordinator.signal(Signal::SIGKILL);
        kill_all(workers);
        self.pause(3000);
        let again = self.run.start(self.rng.random_range(1..=WORKERS));
        std::mem::replace(&mut self.coordinator, again).wait();
    }

    /// Leaves the run alone until it is complete, then checks it.
    fn verdict(&mut self, reference: &Reference) -> Result<(), String> {
        let ended = self.complete()?;
        let _ = write!(self.story, " -> {} generations", self.generations());
        if ended != reference.digest() {
            return Err(format!("the digest is {ended} and not {}", reference.digest()));
        }
        let audited = self.run.audit();
        if audited.code == Some(0) { Ok(()) } else { Err(audited.output) }
    }

    /// Waits until the run is complete; starts the same command again where it gave up.
    fn complete(&mut self) -> Result<String, String> {
        for _ in 0..5 {
            while self.coordinator.is_running() {
                sleep(Duration::from_millis(50));
            }
            let again = self.run.start(2);
            let ended = std::mem::replace(&mut self.coordinator, again).wait();
            if ended.code == Some(0) {
                return Ok(self.run.digest());
            }
            let why = ended.output.lines().last().unwrap_or_default().to_string();
            let _ = write!(self.story, " (ended with {:?}: {why})", ended.code);
        }
        Err("it does not become complete".to_string())
    }

    fn generations(&self) -> usize {
        self.run.events().iter().filter(|event| event["kind"] == "generation_formed").count()
    }
}

fn kill_all(pids: &[i32]) {
    pids.iter().for_each(|pid| signal(*pid, Signal::SIGKILL));
}

/// Sends a signal to a process that may have ended meanwhile.
fn signal(pid: i32, signal: Signal) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
}
