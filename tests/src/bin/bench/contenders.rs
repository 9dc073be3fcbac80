//! Running one contender once: our own programs, or a program for PyTorch.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ganglion_tests::measured::now;
use ganglion_tests::{Process, Run, Tail};
use serde_json::Value;

use crate::rows::Row;

/// What one run of a contender showed.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Seconds from the command to the end of the first step.
    pub first_step: f64,
    /// Milliseconds of each counted step.
    pub steps: Vec<f64>,
    /// The largest resident memory of a process that trains, in MiB.
    pub resident: f64,
}

impl Figures {
    /// The median step, in milliseconds.
    pub fn step(&self) -> f64 {
        median(&self.steps)
    }
}

/// The middle of some numbers; NaN of none.
pub fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}

/// Our programs.
pub fn ours(row: &Row) -> Result<Figures, String> {
    let settings: Vec<String> = [
        ("model.kind", format!("{:?}", row.model)),
        ("model.width", row.width.to_string()),
        ("job.data_shards", row.workers.to_string()),
        ("job.shard_batch", row.batch.to_string()),
        ("job.steps", row.steps.to_string()),
        ("optimizer.learning_rate", "0.0002".to_string()),
        ("metrics.every_steps", "1".to_string()),
        ("checkpoint.every_steps", "0".to_string()),
        ("sample.every_steps", "0".to_string()),
    ]
    .iter()
    .map(|(key, value)| format!("{key}={value}"))
    .chain((row.model == "dcgan-64").then(|| "data.resize=64".to_string()))
    .collect();
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let run = Run::new(&[&settings]);
    let started = now();
    let mut coordinator = run.start(row.workers);
    let mut rows = Tail::new(run.path("metrics.jsonl"));
    let mut resident: f64 = 0.0;
    while coordinator.is_running() {
        let workers = run.live_workers();
        resident = workers.iter().filter_map(|pid| largest_resident(*pid)).fold(resident, f64::max);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let ended = coordinator.wait();
    if ended.code != Some(0) {
        return Err(format!("our own run failed: {}", ended.output));
    }
    let times: Vec<f64> = rows.lines().iter().filter_map(|row| row["time"].as_f64()).collect();
    let steps: Vec<f64> = times.windows(2).map(|pair| 1e3 * (pair[1] - pair[0])).collect();
    let first = times.first().ok_or("our own run has no rows")?;
    Ok(Figures { first_step: first - started, steps: steps[row.warm_up..].to_vec(), resident })
}

fn largest_resident(pid: i32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}

/// A program for PyTorch, started by its launcher.
pub fn peer(row: &Row, way: &str, python_path: &Path) -> Result<Figures, String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let path = |path: &Path| path.canonicalize().map_err(|error| format!("{}: {error}", path.display()));
    let mut command = Command::new("python3");
    command
        .env("PYTHONPATH", path(python_path)?)
        .env("OMP_NUM_THREADS", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let workers = row.workers.to_string();
    command.args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", &workers]);
    command.arg(path(&root.join("bench/peer.py"))?).args(["--way", way, "--model", row.model]);
    command.args(["--width", &row.width.to_string(), "--batch", &row.batch.to_string()]);
    command.args(["--steps", &row.steps.to_string(), "--started", &now().to_string()]);
    command.arg("--data").arg(path(&root.join("data/mnist-10k/t10k-images-idx3-ubyte.gz"))?);
    let ended = Process::start(command).wait();
    let line = ended.output.lines().find(|line| line.starts_with('{'));
    let figures: Value = line
        .and_then(|line| serde_json::from_str(line).ok())
        .ok_or_else(|| format!("PyTorch's run failed: {}", ended.output))?;
    let numbers = |name: &str| figures[name].as_array().into_iter().flatten().filter_map(Value::as_f64);
    Ok(Figures {
        first_step: figures["first_step"].as_f64().unwrap_or(f64::NAN),
        steps: numbers("steps").skip(row.warm_up).collect(),
        resident: figures["resident"].as_f64().unwrap_or(f64::NAN),
    })
}

/// Which PyTorch is there.
pub fn version(python_path: &Path) -> String {
    let entries = fs::read_dir(python_path).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let found =
        names.filter_map(|name| Some(name.strip_prefix("torch-")?.strip_suffix(".dist-info")?.to_string()));
    found.collect::<Vec<_>>().join(", ")
}
