//! `make soak`: one run under rare faults must stay flat, and keep its bits.
//!
//! The coordinator and one worker live from start to end while the others are killed, stopped, asked to end
//! and joined. Their memory, descriptors and threads at the end must be those of the start, and the last
//! checkpoint must be that of an undisturbed run.
#![allow(clippy::print_stdout)] // it is for people

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ganglion_tests::measured::listed;
use ganglion_tests::{Process, Run, SMALL_MLP, failpoint, is_running};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::ChaCha8Rng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

/// Settings of the job. Its workers pause in each phase, so that an undisturbed run catches up in minutes.
const JOB: &[&str] =
    &["job.data_shards=6", "metrics.every_steps=5", "sample.every_steps=2000", "checkpoint.every_steps=1000"];
const PAUSE: &str = "reduce:5";
/// Workers that the coordinator keeps.
const WORKERS: u32 = 4;
/// Mean time between faults, and between looks.
const FAULTS: Duration = Duration::from_secs(12);
const LOOKS: Duration = Duration::from_secs(4);
/// Growth from the second eighth to the last that is taken for noise: a group may have one member more then.
const NOISE: [u64; 4] = [8, 4, 3, 1];
const MEASURES: [&str; 4] = ["memory, MiB", "descriptors", "threads", "/dev/shm"];

/// Holdings of a process: MiB that it shares with nobody, descriptors, threads; and entries of /dev/shm.
type Look = [u64; 4];

fn look(pid: i32) -> Option<Look> {
    let memory = listed(pid, "smaps_rollup", &["Private_Clean", "Private_Dirty"])? / 1024;
    let entries = |path: &Path| fs::read_dir(path).map_or(0, |entries| entries.count() as u64);
    let descriptors = entries(&Path::new("/proc").join(pid.to_string()).join("fd"));
    Some([memory, descriptors, listed(pid, "status", &["Threads"])?, entries(Path::new("/dev/shm"))])
}

/// A process that is watched from start to end.
struct Watched {
    name: &'static str,
    pid: i32,
    looks: Vec<Look>,
}

impl Watched {
    fn new(name: &'static str, pid: i32) -> Watched {
        Watched { name, pid, looks: Vec::new() }
    }

    /// The median of a measure in one eighth of the time.
    fn median(&self, eighth: usize, measure: usize) -> u64 {
        let count = self.looks.len();
        let part = &self.looks[count * eighth / 8..count * (eighth + 1) / 8];
        let mut values: Vec<u64> = part.iter().map(|look| look[measure]).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(0)
    }

    /// Prints what it held in each eighth; returns what grew.
    fn judge(&self) -> Vec<String> {
        let mut grown = Vec::new();
        for (at, measure) in MEASURES.iter().enumerate() {
            let eighths: Vec<u64> = (0..8).map(|eighth| self.median(eighth, at)).collect();
            println!("{}, {measure}: {eighths:?}", self.name);
            // In the first eighth, buffers and threads are still made.
            if eighths[7] > eighths[1] + NOISE[at] {
                grown.push(format!("{}'s {measure} grew from {} to {}", self.name, eighths[1], eighths[7]));
            }
        }
        grown
    }
}

/// Disturbs all workers but the one that is watched.
fn disturb(run: &Run, watched: i32, joined: &mut Vec<Process>, rng: &mut ChaCha8Rng) {
    let others: Vec<i32> = run.live_workers().into_iter().filter(|pid| *pid != watched).collect();
    let Some(pid) = others.choose(rng).copied() else { return };
    // It may have ended meanwhile.
    let send = |signal: Signal| kill(Pid::from_raw(pid), signal).unwrap_or_default();
    match rng.random_range(0..4) {
        0 => send(Signal::SIGKILL),
        1 => {
            send(Signal::SIGSTOP);
            sleep(Duration::from_millis(rng.random_range(0..4000)));
            send(Signal::SIGCONT);
        }
        2 => {
            send(Signal::SIGTERM);
            run.ask(&["scale", &WORKERS.to_string()]);
        }
        _ => {
            joined.iter().for_each(|worker| worker.signal(Signal::SIGTERM));
            joined.clear();
            let started = run.wait_for("coordinator_started", |_| true);
            joined.extend(started["address"].as_str().map(Process::worker));
        }
    }
}

/// The digest after these steps without faults and pauses.
fn undisturbed(steps: u64) -> Result<String, String> {
    let run = Run::new(&[SMALL_MLP, JOB, &[&format!("job.steps={steps}")]]);
    let mut coordinator = run.start(1);
    while coordinator.is_running() {
        sleep(Duration::from_secs(1));
    }
    let ended = coordinator.wait();
    if ended.code == Some(0) { Ok(run.digest()) } else { Err(ended.output) }
}

fn soak(minutes: u64, seed: u64) -> Result<(), String> {
    let mut endless = Run::new(&[SMALL_MLP, JOB, &["job.steps=100000000"]]).with_failpoints();
    let coordinator = endless.start_in(WORKERS, &[(failpoint::PAUSE, PAUSE.to_string())]);
    endless.wait_for_step(100);
    let mut watched =
        [Watched::new("coordinator", coordinator.pid()), Watched::new("worker", endless.pids(1)[0])];
    let (mut rng, mut joined, mut faults) = (ChaCha8Rng::seed_from_u64(seed), Vec::new(), 0);
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    while Instant::now() < end {
        for process in &mut watched {
            let look = look(process.pid).filter(|_| is_running(process.pid));
            let Some(look) = look else {
                let (name, folder) = (process.name, endless.keep());
                return Err(format!("the {name} ended, see {}:\n{}", folder.display(), coordinator.output()));
            };
            process.looks.push(look);
        }
        if rng.random_bool(LOOKS.as_secs_f64() / FAULTS.as_secs_f64()) {
            disturb(&endless, watched[1].pid, &mut joined, &mut rng);
            faults += 1;
        }
        sleep(LOOKS);
    }
    coordinator.signal(Signal::SIGINT);
    let ended = coordinator.wait();
    let checkpoint = endless.newest_checkpoint();
    let name = checkpoint.file_name().unwrap_or_default().to_string_lossy();
    let step: u64 =
        name.trim_start_matches("step-").parse().map_err(|_| format!("no step is named by {name}"))?;
    let generations = endless.events().iter().filter(|event| event["kind"] == "generation_formed").count();
    println!("{faults} faults, {generations} groups, {step} steps in {minutes} min, seed {seed}");
    let mut wrong: Vec<String> = watched.iter().flat_map(Watched::judge).collect();
    if endless.digest() != undisturbed(step)? {
        wrong.push("the last checkpoint differs from that of an undisturbed run".to_string());
    }
    let audited = endless.audit();
    if audited.code != Some(0) {
        wrong.push(audited.output);
    }
    if wrong.is_empty() { Ok(()) } else { Err(format!("{}\n{}", wrong.join("\n"), ended.output)) }
}

fn main() -> ExitCode {
    let setting = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = setting("SEED").unwrap_or_else(|| u64::from(std::process::id()));
    match soak(setting("MINUTES").unwrap_or(60), seed) {
        Ok(()) => {
            println!("all of it is flat, and the last checkpoint is that of an undisturbed run");
            ExitCode::SUCCESS
        }
        Err(problem) => {
            println!("{problem}");
            ExitCode::FAILURE
        }
    }
}
