//! How a step and a meeting grow with the group: `scale --page docs/scale.md`. Groups of real workers are
//! measured whose shards sleep, so that one machine holds many; a model, checked against the largest of
//! them, goes on from there.
#![forbid(unsafe_code)]

mod large;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use ganglion_tests::measured::{cores, date, load, machine, now, processor_time, try_part, write_part};
use ganglion_tests::{Process, Run, Tail, send};
use nix::sys::signal::Signal;
use serde_json::Value;

/// World sizes that are measured. The model is fitted to all but the last, and checked against that one.
const SIZES: [u32; 5] = [4, 8, 16, 32, 64];
/// World sizes that are modelled beyond.
const BEYOND: [u32; 4] = [8, 64, 512, 4096];
/// Phases of a step of the job.
const PHASES: f64 = 2.0;
/// Steps after a group has formed that are not measured, and steps that are.
const WARM_UP: usize = 5;
const STEPS: usize = 40;
/// Lines of the page around what this program writes.
const BEGIN: &str = "<!-- Written by `make scale`; changes below this line are lost. -->";
const END: &str = "<!-- Written by hand again. -->";

/// Route of the reduces.
#[derive(Clone, Copy, PartialEq)]
enum Route {
    Memory,
    Network,
}

/// Figures of a group, in seconds.
struct Figures {
    workers: u32,
    /// Sleep of a shard in a phase.
    sleep: f64,
    /// Median step.
    step: f64,
    /// Processor time of a worker in a step.
    processor: f64,
    /// From the decision on the first group to its first step, without the sleep.
    first: f64,
    /// From the death of a member to the next step, without the sleep of that step. Survivors finish their
    /// sleep first.
    regroup: f64,
}

/// The sleep of a shard: long enough for the cores to do the rest of all workers meanwhile.
fn sleep_of(workers: u32) -> f64 {
    0.01 * f64::from(workers.max(4))
}

fn measure(workers: u32, route: Route) -> Result<Figures, String> {
    let shards = format!("job.data_shards={workers}");
    let settings = ["model.width=8", "job.shard_batch=1", "job.steps=1000000", "metrics.every_steps=1"];
    let run = Run::new(&[&settings, &[&shards, "job.failure_deadline=60"]]).with_failpoints();
    let sleep_ms = 1e3 * sleep_of(workers);
    let mut variables = vec![(ganglion_tests::failpoint::PAUSE, format!("reduce:{sleep_ms:.0}"))];
    if route == Route::Network {
        variables.push(("GANGLION_SHARED_MEMORY", "off".to_string()));
    }
    let mut coordinator = run.start_in(workers, &variables);
    let mut rows = Tail::new(run.path("metrics.jsonl"));
    let mut wait = |is: &dyn Fn(&Value) -> bool| row(&mut rows, &mut coordinator, is, || ());
    let at_step = |step: usize| move |row: &Value| row["step"].as_u64() >= Some(step as u64);
    let first = wait(&at_step(1))?;
    let began = wait(&at_step(WARM_UP))?;
    let pids = run.live_workers();
    let used = processor(&pids);
    let ended = wait(&at_step(WARM_UP + STEPS))?;
    let (used, steps) = (processor(&pids) - used, steps_between(&began, &ended));
    let formed = run.wait_for("generation_formed", |event| event["generation"] == 1);
    let killed = now();
    send(pids[pids.len() / 2], Signal::SIGKILL);
    let next = wait(&|row| row["generation"].as_u64() > Some(1))?;
    let time = |value: &Value| value["time"].as_f64().unwrap_or_default();
    let mut times: Vec<f64> = rows.lines().iter().map(time).collect();
    times.truncate(WARM_UP + STEPS);
    let mut lengths: Vec<f64> = times.windows(2).skip(WARM_UP).map(|pair| pair[1] - pair[0]).collect();
    lengths.sort_by(f64::total_cmp);
    end(&run, &coordinator);
    Ok(Figures {
        workers,
        sleep: sleep_ms / 1e3,
        step: lengths[lengths.len() / 2],
        processor: used / steps / f64::from(workers),
        first: time(&first) - time(&formed) - PHASES * sleep_ms / 1e3,
        regroup: time(&next) - killed - PHASES * sleep_ms / 1e3,
    })
}

/// Waits for a row, and calls `look` meanwhile.
fn row(
    rows: &mut Tail,
    coordinator: &mut Process,
    is: impl Fn(&Value) -> bool,
    mut look: impl FnMut(),
) -> Result<Value, String> {
    loop {
        look();
        if let Some(row) = rows.lines().iter().find(|row| is(row)) {
            return Ok(row.clone());
        }
        if !coordinator.is_running() {
            return Err(format!("the run ended: {}", coordinator.output()));
        }
        sleep(Duration::from_millis(20));
    }
}

/// Ends all processes of a run.
fn end(run: &Run, coordinator: &Process) {
    coordinator.signal(Signal::SIGKILL);
    // Workers would train on for a while. One that was killed is gone already, or has a successor.
    for pid in run.live_workers() {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }
}

#[allow(clippy::cast_precision_loss)] // a count of some steps
fn steps_between(first: &Value, last: &Value) -> f64 {
    let step = |row: &Value| row["step"].as_u64().unwrap_or_default() as f64;
    (step(last) - step(first)).max(1.0)
}

/// Processor time that processes have used, in seconds.
fn processor(pids: &[i32]) -> f64 {
    pids.iter().map(|pid| processor_time(*pid)).sum()
}

/// A straight line through points, by least squares: its value at 0 and its slope.
fn line(points: &[(f64, f64)]) -> (f64, f64) {
    #[allow(clippy::cast_precision_loss)] // a few points
    let count = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0 / count, y + point.1 / count));
    let (up, across) = points.iter().fold((0.0, 0.0), |(up, across), point| {
        (up + (point.0 - x) * (point.1 - y), across + (point.0 - x) * (point.0 - x))
    });
    let slope = if across > 0.0 { up / across } else { 0.0 };
    (y - slope * x, slope)
}

/// Step that the smaller groups let expect of the last one: what it takes beside the sleep grows with the
/// processor time of all workers, which share the cores, and that of one with the number of its rounds.
fn expected(smaller: &[Figures], workers: u32) -> f64 {
    let rounds = |workers: u32| f64::from(workers).log2();
    let points: Vec<_> = smaller.iter().map(|one| (rounds(one.workers), one.processor)).collect();
    let (base, slope) = line(&points);
    let shared = |workers: u32, processor: f64| f64::from(workers) * processor / f64::from(cores());
    let beside: Vec<_> = smaller
        .iter()
        .map(|one| (shared(one.workers, one.processor), one.step - PHASES * one.sleep))
        .collect();
    let (start, share) = line(&beside);
    let processor = base + slope * rounds(workers);
    PHASES * sleep_of(workers) + start + share * shared(workers, processor)
}

fn table(route: Route, figures: &[Figures]) -> String {
    let name = if route == Route::Memory { "shared memory" } else { "Gloo over loopback" };
    let mut text = format!(
        "Reduces over {name}:\n\n| workers | shard sleeps, ms | step, ms | beside the sleep, ms | processor time of a worker and step, ms | first group: s to the first step | after a kill: s to the next step |\n|---:|---:|---:|---:|---:|---:|---:|\n"
    );
    for Figures { workers, sleep, step, processor, first, regroup } in figures {
        let _ = writeln!(
            text,
            "| {workers} | {:.0} | {:.1} | {:.1} | {:.2} | {first:.2} | {regroup:.2} |",
            1e3 * sleep,
            1e3 * step,
            1e3 * (step - PHASES * sleep),
            1e3 * processor,
        );
    }
    if let Some((last, smaller)) = figures.split_last().filter(|(_, smaller)| smaller.len() > 2) {
        let expected = expected(smaller, last.workers);
        let _ = writeln!(
            text,
            "\nThe smaller groups let expect {:.1} ms for {} workers: measured is {:.2}x that.",
            1e3 * expected,
            last.workers,
            last.step / expected
        );
    }
    text
}

/// A link between machines that the model assumes: seconds a message, bytes a second.
const LINK: (f64, f64) = (50e-6, 25e9 / 8.0);

/// Time of an exchange of `floats` with a core for each worker, in seconds: by rounds (two for each level
/// of the tree, which halve what is sent), and by chunks (all to all, then a ring).
fn modelled(workers: u32, floats: f64) -> [f64; 2] {
    let (message, bytes_a_second) = LINK;
    let ranks = f64::from(workers);
    let bytes = 2.0 * 4.0 * floats * (ranks - 1.0) / ranks / bytes_a_second;
    [2.0 * ranks.log2() * message + bytes, 3.0 * (ranks - 1.0) * message + bytes]
}

fn model() -> String {
    let mut text = "| workers | messages of a rank, by rounds | by chunks | 0.29 M floats: ms by rounds | by chunks | 30 M floats: ms by rounds | by chunks |\n|---:|---:|---:|---:|---:|---:|---:|\n".to_string();
    for workers in BEYOND {
        let [[small, small_chunks], [large, large_chunks]] =
            [0.29e6, 30e6].map(|floats| modelled(workers, floats).map(|seconds| 1e3 * seconds));
        let _ = writeln!(
            text,
            "| {workers} | {} | {} | {small:.1} | {small_chunks:.1} | {large:.0} | {large_chunks:.0} |",
            2 * workers.ilog2(),
            3 * (workers - 1),
        );
    }
    text
}

fn run(page: Option<&PathBuf>, largest: u32) -> Result<(), String> {
    if let Some(page) = page {
        try_part(page, BEGIN, END).map_err(|error| format!("--page {}: {error}", page.display()))?;
    }
    let (before, mut part) = (load(), String::new());
    for route in [Route::Memory, Route::Network] {
        let sizes = SIZES.into_iter().filter(|size| *size <= largest);
        let measured = sizes.map(|size| {
            eprintln!("{size} workers");
            measure(size, route)
        });
        let text = table(route, &measured.collect::<Result<Vec<_>, _>>()?);
        println!("{text}");
        let _ = write!(part, "\n{text}");
    }
    let groups = large::GROUPS.into_iter().filter(|(workers, _)| *workers <= largest);
    let measured = groups.map(|(workers, width)| {
        eprintln!("{workers} workers with a large state");
        large::measure(workers, width)
    });
    let text = large::table(&measured.collect::<Result<Vec<_>, _>>()?);
    println!("{text}");
    let _ = write!(part, "\n{text}");
    let circumstances = format!(
        "Measured {} on {}, by `make scale`; load average {before} before, {} after.\n",
        date(),
        machine(),
        load()
    );
    let text =
        format!("{circumstances}{part}\nModelled, for a link of 25 Gb/s and 50 us a message:\n\n{}", model());
    println!("{}", model());
    match page {
        Some(page) => write_part(page, BEGIN, END, text.trim_end())
            .map_err(|error| format!("{}: {error}", page.display())),
        None => Ok(()),
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (mut page, mut largest) = (None, 64);
    while let Some(name) = arguments.next() {
        let value = arguments.next();
        match (name.as_str(), value) {
            ("--page", Some(value)) => page = Some(PathBuf::from(value)),
            ("--largest", Some(value)) if value.parse::<u32>().is_ok_and(|size| size >= SIZES[0]) => {
                largest = value.parse().unwrap_or(largest);
            }
            _ => {
                eprintln!("usage: scale [--largest WORKERS] [--page FILE]");
                return ExitCode::from(2);
            }
        }
    }
    match run(page.as_ref(), largest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("scale: {problem}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_through_its_points() {
        let (start, slope) = line(&[(0.0, 1.0), (1.0, 3.0), (3.0, 7.0)]);
        assert!((start - 1.0).abs() < 1e-12 && (slope - 2.0).abs() < 1e-12);
    }

    #[test]
    fn the_model_of_equal_groups_expects_what_they_are() {
        let figures = |workers: u32| {
            let (sleep, processor) = (sleep_of(workers), 0.001 + 0.0002 * f64::from(workers).log2());
            let beside = 0.002 + f64::from(workers) * processor / f64::from(cores());
            Figures { workers, sleep, step: PHASES * sleep + beside, processor, first: 0.0, regroup: 0.0 }
        };
        let expected = expected(&[4, 8, 16, 32].map(figures), 64);
        assert!((expected - figures(64).step).abs() < 1e-9);
    }

    #[test]
    fn rounds_need_fewer_messages_than_chunks() {
        let [rounds, chunks] = modelled(4096, 1e6);
        assert!(rounds < chunks / 20.0);
    }
}
