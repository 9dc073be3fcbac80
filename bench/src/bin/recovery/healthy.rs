//! Undisturbed job: the messages to the coordinator, and its processor time.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ganglion_tests::measured::load;
use ganglion_tests::{Process, Run, SMALL_MLP, Tail};
use nix::unistd::{SysconfVar, sysconf};
use serde_json::Value;

use crate::figures::{Section, count, number};
use crate::options::Options;
use crate::proxy::{Counts, Proxy, Speaker};
use crate::workers::{MEMBERS, stop};

/// Settings without checkpoints and pictures: the job decides how many messages these cause.
const QUIET: &[&str] = &["job.steps=100000000", "sample.every_steps=0", "checkpoint.every_steps=0"];
/// Kinds of messages by their numbers in the wire contract.
const HEARTBEAT: (Speaker, u64) = (Speaker::Worker, 6);
const ROW: (Speaker, u64) = (Speaker::Worker, 7);
const RECORDED: (Speaker, u64) = (Speaker::Coordinator, 6);
const PULSE: (Speaker, u64) = (Speaker::Coordinator, 9);

/// Measurements of one job.
struct Watched {
    job: &'static str,
    seconds: f64,
    steps_per_second: f64,
    messages: Counts,
    /// Processor time of the coordinator in seconds.
    busy: f64,
}

/// Measures the default job, and one with far shorter steps, for half of the time each.
pub(crate) fn measure(options: &Options) -> Section {
    let before = load();
    let half = Duration::from_secs_f64(f64::from(options.seconds) / 2.0);
    let watched = [
        ("the default job", &["metrics.every_steps=20"][..], &[][..]),
        ("a tiny model", &["metrics.every_steps=100"], SMALL_MLP),
    ]
    .map(|(job, rows, model)| watch(job, &[QUIET, rows, model], half));
    let mut section = Section::new("Nothing happens");
    section.line(format!(
        "{MEMBERS} workers, each job for {:.0} s; load average {before} before, {} after. \
         All messages of all sessions pass through a relay that counts them.\n",
        half.as_secs_f64(),
        load(),
    ));
    section.line(
        "| job | steps/s | heartbeats/s | answers/s | rows and their receipts/s | other messages/s | messages a step, \
         without rows | coordinator's CPU, of one core | a step |\n|---|---|---|---|---|---|---|---|---|",
    );
    watched.iter().for_each(|watched| section.line(watched.row()));
    section
}

fn watch(job: &'static str, settings: &[&[&str]], time: Duration) -> Watched {
    let run = Run::new(settings);
    let coordinator = run.start(0);
    let mut events = Tail::new(run.path("events.jsonl"));
    let mut rows = Tail::new(run.path("metrics.jsonl"));
    let url = events.wait_for("coordinator", |event| event["address"].as_str().map(str::to_string));
    let proxy = Proxy::start(&url).expect("a relay");
    let workers: Vec<Process> = (0..MEMBERS).map(|_| Process::worker(&proxy.url)).collect();
    let group = |event: &Value| (count(event, "world_size") == u64::from(MEMBERS)).then_some(());
    events.wait_for("group of all", group);
    rows.wait_for("step", |row| (count(row, "world_size") == u64::from(MEMBERS)).then_some(()));
    let (messages, busy, since) = (proxy.counts(), busy(coordinator.pid()), Instant::now());
    let first = rows.lines().len() - 1;
    sleep(time);
    let seconds = since.elapsed().as_secs_f64();
    let watched = Watched {
        job,
        seconds,
        steps_per_second: rate(&rows.lines()[first..]),
        messages: difference(&proxy.counts(), &messages),
        busy: self::busy(coordinator.pid()) - busy,
    };
    stop(coordinator);
    drop(workers);
    watched
}

/// Returns the steps per second between the first and the last row.
fn rate(rows: &[Value]) -> f64 {
    let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return f64::NAN };
    (number(last, "step") - number(first, "step")) / (number(last, "time") - number(first, "time"))
}

fn difference(after: &Counts, before: &Counts) -> Counts {
    let less = |(kind, count): (&(Speaker, u64), &u64)| (*kind, count - before.get(kind).unwrap_or(&0));
    after.iter().map(less).collect()
}

/// Returns the processor time of a process in seconds: proc(5), /proc/pid/stat, fields 14 and 15.
fn busy(pid: i32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks: f64 =
        fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    #[allow(clippy::cast_precision_loss)] // some hundreds
    let per_second = per_second as f64;
    ticks / per_second
}

impl Watched {
    fn row(&self) -> String {
        let of =
            |kinds: &[(Speaker, u64)]| kinds.iter().filter_map(|kind| self.messages.get(kind)).sum::<u64>();
        let all: u64 = self.messages.values().sum();
        #[allow(clippy::cast_precision_loss)] // some thousands
        let per_second = |count: u64| count as f64 / self.seconds;
        let rows = of(&[ROW, RECORDED]);
        let known = of(&[HEARTBEAT, PULSE]) + rows;
        format!(
            "| {} | {:.1} | {:.2} | {:.2} | {:.2} | {:.2} | {:.3} | {:.2} % | {:.0} us |",
            self.job,
            self.steps_per_second,
            per_second(of(&[HEARTBEAT])),
            per_second(of(&[PULSE])),
            per_second(rows),
            per_second(all - known),
            per_second(all - rows) / self.steps_per_second,
            100.0 * self.busy / self.seconds,
            1e6 * self.busy / self.seconds / self.steps_per_second,
        )
    }
}
