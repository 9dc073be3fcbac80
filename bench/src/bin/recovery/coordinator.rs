//! Recovery from a coordinator's death: it is killed, and the same command started again, many
//! times.

use ganglion_tests::measured::{load, now};
use ganglion_tests::{Run, Tail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::figures::{Sample, Section, count, first_time, number, spread_head, value_head};
use crate::options::{Options, Random};
use crate::workers::{JOB, MEMBERS, intervals, stop, uneven, wait_for_full};

/// Measurements of all restarts.
struct Restarts {
    kills: Vec<f64>,
    events: Vec<Value>,
    rows: Vec<Value>,
    audited: bool,
}

/// Kills and restarts the coordinator as often as the options say.
pub(crate) fn measure(options: &Options) -> Section {
    let before = load();
    let run = Run::new(&[JOB]);
    let mut coordinator = run.start(MEMBERS);
    let (mut events, mut rows) = (Tail::new(run.path("events.jsonl")), Tail::new(run.path("metrics.jsonl")));
    let (mut random, mut kills) = (Random(options.seed), Vec::new());
    wait_for_full(&mut events, &mut rows, 0);
    for _ in 0..options.restarts {
        random.sleep(1.0, 3.0);
        kills.push(now());
        coordinator.signal(Signal::SIGKILL);
        coordinator.wait();
        coordinator = run.start(MEMBERS);
        wait_for_takeover(&mut events, &mut rows, *kills.last().expect("one was killed"));
    }
    random.sleep(1.0, 3.0);
    let after = load();
    stop(coordinator);
    let audited = run.audit().code == Some(0);
    let (events, rows) = (events.lines().to_vec(), rows.lines().to_vec());
    Restarts { kills, events, rows, audited }.section(options.seed, &before, &after)
}

/// Waits until a new coordinator has taken over the group, or formed one, and steps are reported to
/// it.
fn wait_for_takeover(events: &mut Tail, rows: &mut Tail, since: f64) {
    let taken = events.wait_for("group of a new coordinator", |event| {
        let has_group = is_kept(event) || event["kind"] == "generation_formed";
        (has_group && number(event, "time") > since).then(|| number(event, "time"))
    });
    rows.wait_for("step after it", |row| (number(row, "time") > taken).then_some(()));
}

fn is_kept(event: &Value) -> bool {
    event["kind"] == "generation_kept"
}

impl Restarts {
    fn first(&self, kill: f64, kind: &str) -> f64 {
        let wanted = |event: &Value| event["kind"] == kind && number(event, "time") > kill;
        first_time(&self.events, wanted) - kill
    }

    fn events_of(&self, kind: &str) -> u64 {
        self.events.iter().filter(|event| event["kind"] == kind).count() as u64
    }

    /// Whether a moment is between a kill and the take-over after it.
    fn is_without(&self, from: f64, to: f64) -> bool {
        let overlaps = |kill: &f64| to > *kill && from < *kill + self.first(*kill, "generation_kept");
        self.kills.iter().any(overlaps)
    }

    /// Longest time between two steps from a kill to the take-over.
    fn longest_gap(&self, kill: f64) -> f64 {
        let taken = kill + self.first(kill, "generation_kept");
        let during = intervals(&self.rows).filter(|(from, to, _)| *to > kill && *from < taken);
        during.map(|(_, _, gap)| gap).fold(f64::NAN, f64::max)
    }

    fn section(&self, seed: u64, before: &str, after: &str) -> Section {
        let mut section = Section::new("The coordinator is killed");
        let kills = self.kills.len();
        section.line(format!(
            "{kills} times, each followed by the same command; {MEMBERS} local workers, seed {seed}; load average {before} \
             before, {after} after.\n"
        ));
        section.line(spread_head(""));
        let of = |kind: &str| Sample::new(self.kills.iter().map(|kill| self.first(*kill, kind)));
        section.line(of("coordinator_started").row("from the kill to the next coordinator's start", &[]));
        section.line(of("generation_kept").row("**time without a coordinator**", &[]));
        let gaps = Sample::new(self.kills.iter().map(|kill| self.longest_gap(*kill)));
        section.line(gaps.row("**longest time between two steps, in each restart**", &[]));
        let usual = || intervals(&self.rows).filter(|(from, to, _)| !self.is_without(*from, *to));
        section.line(
            Sample::new(usual().map(|(_, _, gap)| gap)).row("any time between two steps, otherwise", &[]),
        );
        let longest = Sample::new(self.longest_in_quiet_windows());
        section.line(longest.row("longest of as many quiet windows as long", &[]));
        self.promises(&mut section);
        section
    }

    /// The same as [`Restarts::longest_gap`], for an equally long window that ends just before each
    /// kill.
    fn longest_in_quiet_windows(&self) -> Vec<f64> {
        let longest = |kill: &f64| {
            let length = self.first(*kill, "generation_kept");
            let within =
                |(from, to, _): &(f64, f64, f64)| *to > *kill - length && *from < *kill && *to < *kill;
            intervals(&self.rows).filter(within).map(|(_, _, gap)| gap).fold(f64::NAN, f64::max)
        };
        self.kills.iter().map(longest).collect()
    }

    fn promises(&self, section: &mut Section) {
        section.line("");
        section.line(value_head("all restarts together"));
        let kills = self.kills.len() as u64;
        let restarts = format!("in {kills} restarts");
        let started = self.events_of("worker_started").saturating_sub(MEMBERS.into());
        section.promise_none("workers started again", started, &restarts);
        let formed = self.events_of("generation_formed").saturating_sub(1);
        section.promise_none("groups formed again", formed, &restarts);
        let kept = self.events_of("generation_kept");
        section.promise_none("restarts that did not keep the group", kills.saturating_sub(kept), &restarts);
        let steps = format!("of {}", self.rows.len());
        // There is one group, so a repeated step has two rows, or the file lacks a step.
        let again = self.rows.iter().filter(|row| count(row, "generation") != 1).count() as u64;
        section.promise_none("steps of another group than the first", again, &steps);
        section.promise_none("steps with no row or two", uneven(&self.rows), &steps);
        section.promise_none("failed audits of the run", u64::from(!self.audited), "of 1");
    }
}
