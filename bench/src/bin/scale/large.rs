//! A large state: what a step, a checkpoint and a replaced worker take, on this machine's cores.

use std::fmt::Write as _;
use std::fs;

use ganglion_tests::measured::{listed, now};
use ganglion_tests::{Run, Tail, send};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Groups that are measured: workers, and the width of their dense layers.
pub(crate) const GROUPS: [(u32, u32); 3] = [(3, 4096), (2, 5600), (4, 5600)];
/// Steps from one checkpoint to the next.
const CADENCE: usize = 8;
/// Step after which a worker is killed, and the last one.
const KILL: usize = 20;
const END: usize = 34;

/// Figures of a group, in seconds and bytes.
pub(crate) struct Figures {
    workers: u32,
    /// Size of the state in files.
    state: f64,
    /// Median step of those that follow no checkpoint closely.
    step: f64,
    /// Steps right after a checkpoint.
    after_checkpoints: Vec<f64>,
    /// From the death of a member to the next step.
    regroup: f64,
    /// From the death of a member to the first step of a group with a successor.
    full: f64,
    /// Largest proportional share of memory (PSS) of a worker.
    memory: f64,
}

/// Measures a group of this many workers with layers of this width.
///
/// # Errors
/// The run ended.
pub(crate) fn measure(workers: u32, width: u32) -> Result<Figures, String> {
    let (width, cadence) = (format!("model.width={width}"), format!("checkpoint.every_steps={CADENCE}"));
    let job = ["job.data_shards=4", "job.shard_batch=8", "job.steps=1000000", "sample.every_steps=0"];
    let run = Run::new(&[&job, &["metrics.every_steps=1", &width, &cadence]]);
    let mut coordinator = run.start_in(workers, &[]);
    let (mut rows, mut memory) = (Tail::new(run.path("metrics.jsonl")), 0.0_f64);
    let mut look = || {
        memory = run.live_workers().into_iter().filter_map(share_of).fold(memory, f64::max);
    };
    let mut wait = |is: &dyn Fn(&Value) -> bool| crate::row(&mut rows, &mut coordinator, is, &mut look);
    let step_of = |row: &Value| row["step"].as_u64().and_then(|step| usize::try_from(step).ok());
    let generation_of = |row: &Value| row["generation"].as_u64();
    wait(&|row| step_of(row) >= Some(KILL))?;
    let pids = run.live_workers();
    let killed = now();
    send(pids[pids.len() - 1], Signal::SIGKILL);
    let next = wait(&|row| generation_of(row) > Some(1))?;
    let is_full = |event: &Value| generation_of(event) > Some(1) && event["world_size"] == workers;
    let formed = generation_of(&run.wait_for("generation_formed", is_full));
    let full = wait(&|row| generation_of(row) >= formed)?;
    wait(&|row| step_of(row) >= Some(END))?;
    let state = fs::read_dir(run.newest_checkpoint()).map_err(|error| error.to_string())?;
    let parts = state.flatten().filter(|file| file.file_name().to_string_lossy().starts_with("state-"));
    #[allow(clippy::cast_precision_loss)] // some gigabytes
    let state = parts.filter_map(|file| Some(file.metadata().ok()?.len() as f64)).sum();
    let time = |row: &Value| row["time"].as_f64().unwrap_or_default();
    let times: Vec<f64> = rows.lines().iter().map(time).collect();
    let length = |step: usize| times[step - 1] - times[step - 2];
    let mut quiet: Vec<f64> = (2..KILL).filter(|step| (step - 1) % CADENCE > 2).map(length).collect();
    quiet.sort_by(f64::total_cmp);
    crate::end(&run, &coordinator);
    Ok(Figures {
        workers,
        state,
        step: quiet[quiet.len() / 2],
        after_checkpoints: (1..KILL / CADENCE + 1).map(|count| length(count * CADENCE + 1)).collect(),
        regroup: time(&next) - killed,
        full: time(&full) - killed,
        memory,
    })
}

/// Proportional share of a process's memory, in bytes.
#[allow(clippy::cast_precision_loss)] // some gigabytes
fn share_of(pid: i32) -> Option<f64> {
    Some(1024.0 * listed(pid, "smaps_rollup", &["Pss"])? as f64)
}

/// The table of all groups.
pub(crate) fn table(groups: &[Figures]) -> String {
    let mut text = format!(
        "Large states: dense layers of 4,096 and 5,600, 4 data shards of 8 samples, a checkpoint every {CADENCE} steps:\n\n| workers | state, GB | step, s | steps right after a checkpoint, s | after a kill: s to the next step | s to the first step at full strength | largest PSS of a worker, GB |\n|---:|---:|---:|---:|---:|---:|---:|\n"
    );
    for figures in groups {
        let after: Vec<String> = figures.after_checkpoints.iter().map(|step| format!("{step:.2}")).collect();
        let _ = writeln!(
            text,
            "| {} | {:.2} | {:.2} | {} | {:.2} | {:.2} | {:.2} |",
            figures.workers,
            figures.state / 1e9,
            figures.step,
            after.join(", "),
            figures.regroup,
            figures.full,
            figures.memory / 1e9,
        );
    }
    text
}
