//! One run of a contender: Ganglion, or a program for PyTorch.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use ganglion_tests::measured::{listed, now};
use ganglion_tests::{Process, Run, Tail};
use serde_json::Value;

use crate::figures::Figures;
use crate::job::{GPT, Job, Precision, TRANSFORMER, VAE};

/// Text that transformers are trained on.
const TEXT: &str = "data/kjv/train.txt.gz";
/// Interval at which a running contender is polled.
const LOOK: Duration = Duration::from_millis(50);

/// Runs a job with Ganglion's programs.
pub(crate) fn ours(job: &Job) -> Result<Figures, String> {
    if job.model == TRANSFORMER.model {
        return of_text(job);
    }
    let settings = settings(job);
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let run = Run::new(&[&settings, job.settings]);
    measure(&run, job, &[])
}

/// Runs a job with the built-in transformer.
fn of_text(job: &Job) -> Result<Figures, String> {
    let own = vec![format!("model.width={}", job.width), format!("job.seed={}", job.seed)];
    let settings = [schedule(job), own].concat();
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let run = Run::new(&[&settings, job.settings]);
    // The default job has sections that a transformer has no use for.
    let (config, text) = (run.beside("job.toml"), file(TEXT)?);
    let sections = format!("[data]\nkind = \"text\"\npath = {text:?}\n[model]\nkind = \"transformer\"\n");
    fs::write(&config, sections).map_err(|error| format!("{}: {error}", config.display()))?;
    measure(&run, job, &["--config", &config.display().to_string()])
}

/// Runs a job with a package in place of its model.
pub(crate) fn package(job: &Job, package: &Path) -> Result<Figures, String> {
    let settings = schedule(job);
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let run = Run::new(&[&settings, job.settings]);
    // The default job has sections that a package has no use for.
    let (file, package) = (run.beside("job.toml"), absolute(package)?);
    let sections = format!("[data]\nkind = \"mnist-10k\"\n[model]\nkind = \"package\"\npath = {package:?}\n");
    fs::write(&file, sections).map_err(|error| format!("{}: {error}", file.display()))?;
    measure(&run, job, &["--config", &file.display().to_string()])
}

fn measure(run: &Run, job: &Job, arguments: &[&str]) -> Result<Figures, String> {
    let started = now();
    let workers = job.workers.to_string();
    let mut coordinator = run.start_with(&[&["--workers", &workers], arguments].concat());
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
    let [first_loss, second_loss] = job.losses.map(|name| column(name, rows));
    if times.len() <= job.warm_up {
        return Err(format!("our own run has only {} rows", times.len()));
    }
    Ok(Figures {
        first_step: first - started,
        steps: steps.skip(job.warm_up).collect(),
        resident,
        losses: first_loss.into_iter().zip(second_loss).map(|(first, second)| [first, second]).collect(),
    })
}

fn settings(job: &Job) -> Vec<String> {
    let mut settings = vec![
        format!("model.kind={:?}", job.model),
        format!("model.width={}", job.width),
        "optimizer.learning_rate=0.0002".to_string(),
        format!("job.seed={}", job.seed),
    ];
    settings.extend(schedule(job));
    if job.model == "dcgan-64" {
        settings.push("data.resize=64".to_string());
    }
    if job.precision != Precision::Fp32 {
        settings.push(format!("job.precision={:?}", job.precision.name()));
    }
    settings
}

/// Settings of all jobs: sizes, and no work beside training.
fn schedule(job: &Job) -> Vec<String> {
    vec![
        format!("job.data_shards={}", job.data_shards),
        format!("job.shard_batch={}", job.shard_batch),
        format!("job.steps={}", job.steps),
        "metrics.every_steps=1".to_string(),
        "checkpoint.every_steps=0".to_string(),
        "sample.every_steps=0".to_string(),
    ]
}

fn absolute(path: &Path) -> Result<PathBuf, String> {
    path.canonicalize().map_err(|error| format!("{}: {error}", path.display()))
}

#[allow(clippy::cast_precision_loss)] // some gigabytes
fn largest_resident(pid: i32) -> Option<f64> {
    Some(listed(pid, "status", &["VmHWM"])? as f64 / 1024.0)
}

/// Runs a job with a program for PyTorch, started by its launcher. `more` are arguments for it.
pub(crate) fn peer(job: &Job, way: &str, more: &[&str], python_path: &Path) -> Result<Figures, String> {
    let mut command = command(job, way, python_path)?;
    command.args(more);
    let mut process = Process::start(command);
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
    let mut command = python(python_path)?;
    let workers = job.workers.to_string();
    command.args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", &workers]);
    if way == "tuned" {
        // Keeps memory of freed tensors for the next ones, as our workers do (`c10d::aten::keep_freed_memory`).
        command.env("MALLOC_MMAP_THRESHOLD_", "33554432").env("MALLOC_TRIM_THRESHOLD_", "2147483647");
    }
    if job.model == GPT.model {
        command.arg(file("bench/python/gpt_peer.py")?);
    } else if job.model == VAE.model {
        command.arg(file("bench/python/vae_peer.py")?).args(["--width", &job.width.to_string()]);
        command.args(["--seed", &job.seed.to_string()]);
    } else if job.model == TRANSFORMER.model {
        command.arg(file("bench/python/transformer.py")?).args(["--seed", &job.seed.to_string()]);
    } else {
        command.arg(file("bench/peer.py")?).args(["--model", job.model, "--width", &job.width.to_string()]);
        command.args(["--precision", job.precision.name()]);
    }
    let batch = job.global_batch() / job.workers;
    command.args(["--way", way, "--batch", &batch.to_string(), "--steps", &job.steps.to_string()]);
    command.args(["--started", &now().to_string()]);
    let is_text = job.model == TRANSFORMER.model;
    command.arg("--data").arg(file(if is_text { TEXT } else { "data/mnist-10k/t10k-images-idx3-ubyte.gz" })?);
    Ok(command)
}

/// Path of a file of the project.
pub(crate) fn file(name: &str) -> Result<PathBuf, String> {
    absolute(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(name))
}

/// Python with PyTorch.
pub(crate) fn python(python_path: &Path) -> Result<Command, String> {
    let mut command = Command::new("python3");
    command
        .env("PYTHONPATH", absolute(python_path)?)
        .env("OMP_NUM_THREADS", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1");
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
