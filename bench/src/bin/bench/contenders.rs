//! One run of a contender: Ganglion, or a program for PyTorch.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use ganglion_tests::measured::now;
use ganglion_tests::{Process, Run, Tail};
use serde_json::Value;

use crate::figures::Figures;
use crate::job::{Job, Precision};

/// Interval at which a running contender is polled.
const LOOK: Duration = Duration::from_millis(50);

/// Runs a job with Ganglion's programs.
pub(crate) fn ours(job: &Job) -> Result<Figures, String> {
    let settings = settings(job);
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let run = Run::new(&[&settings, job.settings]);
    let started = now();
    let mut coordinator = run.start(job.workers);
    let mut rows = Tail::new(run.path("metrics.jsonl"));
    let mut resident: f64 = 0.0;
    while coordinator.is_running() {
        let workers = run.live_workers();
        resident = workers.iter().filter_map(|pid| largest_resident(*pid)).fold(resident, f64::max);
        sleep(LOOK);
    }
    let ended = coordinator.wait();
    if ended.code != Some(0) {
        return Err(format!("our own run failed: {}", ended.output));
    }
    let column =
        |name: &str, rows: &[Value]| rows.iter().filter_map(|row| row[name].as_f64()).collect::<Vec<f64>>();
    let rows = rows.lines();
    let times = column("time", rows);
    let first = times.first().ok_or("our own run has no rows")?;
    let steps = times.windows(2).map(|pair| 1e3 * (pair[1] - pair[0]));
    let losses = column("loss_discriminator", rows).into_iter().zip(column("loss_generator", rows));
    Ok(Figures {
        first_step: first - started,
        steps: steps.skip(job.warm_up).collect(),
        resident,
        losses: losses.map(|(discriminator, generator)| [discriminator, generator]).collect(),
    })
}

fn settings(job: &Job) -> Vec<String> {
    let mut settings = vec![
        format!("model.kind={:?}", job.model),
        format!("model.width={}", job.width),
        format!("job.data_shards={}", job.data_shards),
        format!("job.shard_batch={}", job.shard_batch),
        format!("job.steps={}", job.steps),
        "optimizer.learning_rate=0.0002".to_string(),
        "metrics.every_steps=1".to_string(),
        "checkpoint.every_steps=0".to_string(),
        "sample.every_steps=0".to_string(),
    ];
    if job.model == "dcgan-64" {
        settings.push("data.resize=64".to_string());
    }
    if job.precision != Precision::Fp32 {
        settings.push(format!("job.precision={:?}", job.precision.name()));
    }
    settings
}

fn largest_resident(pid: i32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}

/// Runs a job with a program for PyTorch, started by its launcher.
pub(crate) fn peer(job: &Job, way: &str, python_path: &Path) -> Result<Figures, String> {
    let mut process = Process::start(command(job, way, python_path)?);
    while process.is_running() {
        sleep(LOOK);
    }
    let ended = process.wait();
    let line = ended.output.lines().find(|line| line.starts_with('{'));
    let figures: Value = line
        .and_then(|line| serde_json::from_str(line).ok())
        .ok_or_else(|| format!("PyTorch's run failed: {}", ended.output))?;
    let all = |name: &str| figures[name].as_array().into_iter().flatten();
    Ok(Figures {
        first_step: figures["first_step"].as_f64().unwrap_or(f64::NAN),
        steps: all("steps").filter_map(Value::as_f64).skip(job.warm_up).collect(),
        resident: figures["resident"].as_f64().unwrap_or(f64::NAN),
        losses: all("losses").filter_map(|pair| Some([pair[0].as_f64()?, pair[1].as_f64()?])).collect(),
    })
}

fn command(job: &Job, way: &str, python_path: &Path) -> Result<Command, String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let path = |path: &Path| path.canonicalize().map_err(|error| format!("{}: {error}", path.display()));
    let mut command = Command::new("python3");
    command
        .env("PYTHONPATH", path(python_path)?)
        .env("OMP_NUM_THREADS", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let workers = job.workers.to_string();
    command.args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", &workers]);
    command.arg(path(&root.join("bench/peer.py"))?).args(["--way", way, "--model", job.model]);
    let batch = job.global_batch() / job.workers;
    command.args(["--width", &job.width.to_string(), "--batch", &batch.to_string()]);
    command.args(["--steps", &job.steps.to_string(), "--precision", job.precision.name()]);
    command.args(["--started", &now().to_string()]);
    command.arg("--data").arg(path(&root.join("data/mnist-10k/t10k-images-idx3-ubyte.gz"))?);
    Ok(command)
}

/// Returns the version of PyTorch.
pub(crate) fn version(python_path: &Path) -> String {
    let entries = fs::read_dir(python_path).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let found =
        names.filter_map(|name| Some(name.strip_prefix("torch-")?.strip_suffix(".dist-info")?.to_string()));
    found.collect::<Vec<_>>().join(", ")
}
