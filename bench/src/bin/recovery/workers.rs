//! Recovery from a worker's death: one random member of four is killed, many times.

use std::collections::BTreeSet;

use ganglion_tests::measured::{load, now};
use ganglion_tests::{Process, Run, Tail, send};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::figures::{Sample, Section, count, first_time, number, spread_head, value_head};
use crate::options::{Options, Random};

/// World size at full strength.
pub(crate) const MEMBERS: u32 = 4;
/// Settings of the default job, with a row for every step, so that every commit has its time in a
/// file.
pub(crate) const JOB: &[&str] = &["job.steps=100000000", "metrics.every_steps=1"];
/// Updates per step of the default job: the discriminator's, then the generator's.
const PHASES: u64 = 2;

/// Measurements of all kills.
pub(crate) struct Workers {
    seed: u64,
    load: [String; 2],
    kills: Vec<Kill>,
    events: Vec<Value>,
    rows: Vec<Value>,
    audited: bool,
}

/// Kill of a member.
struct Kill {
    time: f64,
    /// Generation that the member belonged to.
    generation: u64,
}

/// Times after a kill, in seconds, of the stages of its recovery.
struct Recovery {
    noticed: f64,
    regrouped: f64,
    next_step: f64,
    replaced: f64,
    full: f64,
    full_step: f64,
}

/// Kills a member and waits until the group is at full strength, as often as the options say.
pub(crate) fn measure(options: &Options) -> Workers {
    let before = load();
    let run = Run::new(&[JOB]);
    let coordinator = run.start(MEMBERS);
    let (mut events, mut rows) = (Tail::new(run.path("events.jsonl")), Tail::new(run.path("metrics.jsonl")));
    let (mut random, mut kills, mut generation) = (Random(options.seed), Vec::new(), 0);
    for done in 0..options.kills {
        let formed = wait_for_full(&mut events, &mut rows, generation);
        random.sleep(0.0, 2.0);
        generation = count(&formed, "generation");
        kills.push(kill_one(&formed, generation, &mut random));
        if done % 10 == 9 {
            eprintln!("{} of {} members killed", done + 1, options.kills);
        }
    }
    wait_for_full(&mut events, &mut rows, generation);
    let load = [before, load()];
    stop(coordinator);
    let audited = run.audit().code == Some(0);
    let (events, rows) = (events.lines().to_vec(), rows.lines().to_vec());
    Workers { seed: options.seed, load, kills, events, rows, audited }
}

fn kill_one(formed: &Value, generation: u64, random: &mut Random) -> Kill {
    let members = formed["members"].as_array().expect("a group has members");
    let pid = random.choose(members)["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    let time = now();
    send(pid.expect("a member has a process"), Signal::SIGKILL);
    Kill { time, generation }
}

/// Waits until a group of all members, younger than `generation`, has committed a step.
pub(crate) fn wait_for_full(events: &mut Tail, rows: &mut Tail, generation: u64) -> Value {
    let formed = events.wait_for("group at full strength", |event| {
        let full = is_full(event) && count(event, "generation") > generation;
        full.then(|| event.clone())
    });
    let generation = count(&formed, "generation");
    rows.wait_for("step of it", |row| (count(row, "generation") >= generation).then_some(()));
    formed
}

/// Stops a run, which saves a checkpoint.
pub(crate) fn stop(coordinator: Process) {
    coordinator.signal(Signal::SIGINT);
    coordinator.wait();
}

fn is_full(event: &Value) -> bool {
    event["kind"] == "generation_formed" && count(event, "world_size") == u64::from(MEMBERS)
}

impl Workers {
    /// Times from a kill to the next committed step.
    pub(crate) fn next_step(&self) -> Sample {
        Sample::new(self.recoveries().iter().map(|recovery| recovery.next_step))
    }

    /// Times from a kill to a step of a group at full strength.
    pub(crate) fn full_step(&self) -> Sample {
        Sample::new(self.recoveries().iter().map(|recovery| recovery.full_step))
    }

    fn recoveries(&self) -> Vec<Recovery> {
        self.kills.iter().map(|kill| self.recovery(kill)).collect()
    }

    fn recovery(&self, kill: &Kill) -> Recovery {
        let event = |is: &dyn Fn(&Value) -> bool| {
            let later = |event: &Value| number(event, "time") >= kill.time && is(event);
            first_time(&self.events, later) - kill.time
        };
        let younger = |event: &Value| count(event, "generation") > kill.generation;
        let full = self.events.iter().find(|event| younger(event) && is_full(event));
        let full_generation = full.map_or(u64::MAX, |event| count(event, "generation"));
        let step = |generation: u64| {
            first_time(&self.rows, |row| count(row, "generation") >= generation) - kill.time
        };
        Recovery {
            noticed: event(&|event| event["kind"] == "regroup"),
            regrouped: event(&|event| event["kind"] == "generation_formed"),
            next_step: step(kill.generation + 1),
            replaced: event(&|event| event["kind"] == "worker_joined"),
            full: full.map_or(f64::NAN, |event| number(event, "time") - kill.time),
            full_step: step(full_generation),
        }
    }

    /// Count of steps that were committed, and repeated by a later group: its update index is
    /// before their end.
    fn redone(&self) -> u64 {
        let formed = self.events.iter().filter(|event| event["kind"] == "generation_formed");
        let redone = |group: &Value| {
            let earlier = |row: &&Value| count(row, "generation") < count(group, "generation");
            let steps = self.rows.iter().filter(earlier).map(|row| count(row, "step")).max();
            steps.unwrap_or_default().saturating_sub(count(group, "position") / PHASES)
        };
        formed.map(redone).sum()
    }

    /// Count of steps that have more or fewer rows than one.
    fn uneven(&self) -> u64 {
        uneven(&self.rows)
    }

    /// Formats the table.
    pub(crate) fn section(&self) -> Section {
        let mut section = Section::new("A worker is killed");
        let [before, after] = &self.load;
        section.line(format!(
            "{} kills of a random member of {MEMBERS}, seed {}; load average {before} before, {after} after.\n",
            self.kills.len(),
            self.seed,
        ));
        section.line(spread_head("from the kill to"));
        let recoveries = self.recoveries();
        let of = |what: fn(&Recovery) -> f64| Sample::new(recoveries.iter().map(what));
        section.line(of(|r| r.noticed).row("the coordinator's order to regroup", &[]));
        section.line(of(|r| r.regrouped).row("the survivors' new group", &[]));
        section.line(self.next_step().row("**its first committed step**", &[(0.5, 60.0), (0.99, 100.0)]));
        section.line(of(|r| r.replaced).row("the replacement, ready to train", &[]));
        section.line(of(|r| r.full).row("**the group at full strength**", &[(0.5, 1500.0)]));
        section.line(self.full_step().row("its first committed step", &[]));
        let usual = intervals(&self.rows).map(|(_, _, gap)| gap);
        section.line(Sample::new(usual).row("(from any step to the next)", &[]));
        self.promises(&mut section);
        section
    }

    fn promises(&self, section: &mut Section) {
        section.line("");
        section.line(value_head("all kills together"));
        let steps = format!("of {}", self.rows.len());
        section.promise_none("committed steps done again", self.redone(), &steps);
        section.promise_none("steps with no row or two", self.uneven(), &steps);
        let lost = self.recoveries().iter().filter(|recovery| recovery.full_step.is_nan()).count();
        let kills = format!("of {}", self.kills.len());
        section.promise_none("kills without recovery", lost as u64, &kills);
        section.promise_none("failed audits of the run", u64::from(!self.audited), "of 1");
    }
}

/// Count of steps within the range of all rows that do not have exactly one row.
pub(crate) fn uneven(rows: &[Value]) -> u64 {
    let steps: BTreeSet<u64> = rows.iter().map(|row| count(row, "step")).collect();
    let expected = steps.last().copied().unwrap_or_default();
    rows.len().abs_diff(steps.len()) as u64 + expected.abs_diff(steps.len() as u64)
}

/// Intervals between steps that are consecutive in time: the times of their commits, and the
/// seconds between.
pub(crate) fn intervals(rows: &[Value]) -> impl Iterator<Item = (f64, f64, f64)> {
    let mut times: Vec<f64> = rows.iter().map(|row| number(row, "time")).collect();
    times.sort_by(f64::total_cmp);
    let next = times.clone().into_iter().skip(1);
    times.into_iter().zip(next).map(|(from, to)| (from, to, to - from))
}
