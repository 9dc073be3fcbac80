//! The timeline of a run: one correct file of the coordinator and its workers.
#![allow(clippy::unwrap_used)] // a test may panic

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use ganglion_tests::disk::Disk;
use ganglion_tests::failpoint::VARIABLE;
use ganglion_tests::{Process, Run, SMALL_MLP, program};
use serde_json::Value;

const SETTINGS: [&[&str]; 2] =
    [SMALL_MLP, &["job.steps=40", "job.data_shards=4", "checkpoint.every_steps=20", "metrics.every_steps=1"]];

/// Slice of one row of the timeline.
struct Slice {
    name: String,
    from: u64,
    until: u64,
    args: Value,
    /// Enclosing slices, the outermost first.
    within: Vec<String>,
}

/// Row of the timeline.
#[derive(Default)]
struct Track {
    slices: Vec<Slice>,
    /// Open slices, the innermost last.
    open: Vec<Slice>,
    instants: Vec<(String, Value)>,
}

/// Rows by process and name.
type Tracks = BTreeMap<(String, String), Track>;

/// Reads a finished trace; asserts that the slices of a row nest and do not overlap.
fn read(file: &Path) -> Tracks {
    let events: Vec<Value> = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let named = |kind: &str, key: &str, of: &Value| {
        let mut names = events.iter().filter(|event| event["name"] == kind && event[key] == of[key]);
        names.next_back().unwrap()["args"]["name"].as_str().unwrap().to_string()
    };
    let mut tracks = BTreeMap::<u64, (&Value, Track, u64)>::new();
    for event in events.iter().filter(|event| event["ph"] != "M" && event["ph"] != "C") {
        let (_, track, reached) =
            tracks.entry(event["tid"].as_u64().unwrap()).or_insert_with(|| (event, Track::default(), 0));
        let from = event["ts"].as_u64().unwrap();
        let until = from + event["dur"].as_u64().unwrap_or(0);
        assert!(*reached <= from, "{event} begins before {reached}");
        *reached = until;
        track.add(event, from, until);
    }
    let name = |(event, track, _)| {
        ((named("process_name", "pid", event), named("thread_name", "tid", event)), track)
    };
    tracks.into_values().map(name).collect()
}

impl Track {
    fn add(&mut self, event: &Value, from: u64, until: u64) {
        let name = event["name"].as_str().unwrap_or_default().to_string();
        let within = self.open.iter().map(|slice| slice.name.clone()).collect();
        let slice = Slice { name, from, until, args: event["args"].clone(), within };
        match event["ph"].as_str().unwrap() {
            "B" => self.open.push(slice),
            "X" => self.slices.push(slice),
            "i" => self.instants.push((slice.name, slice.args)),
            "E" => {
                let begun = self.open.pop().expect("something has begun");
                self.slices.push(Slice { until, ..begun });
            }
            other => panic!("no such event: {other}"),
        }
    }

    fn named(&self, is: impl Fn(&str) -> bool) -> Vec<&Slice> {
        self.slices.iter().filter(|slice| is(&slice.name)).collect()
    }

    fn microseconds(&self, name: &str, module: &str) -> u64 {
        let of =
            |slice: &&Slice| slice.name == name && slice.within.last().is_some_and(|last| last == module);
        self.slices.iter().filter(of).map(|slice| slice.until - slice.from).sum()
    }
}

fn is_step(name: &str) -> bool {
    name.starts_with("step ")
}

/// All 40 steps of a worker, each of its two phases, and in them all the time of a step.
fn assert_trained(track: &Track) {
    let steps = track.named(is_step);
    let numbers: Vec<String> = steps.iter().map(|step| step.name.clone()).collect();
    assert_eq!(numbers, (1..=40).map(|step| format!("step {step}")).collect::<Vec<_>>());
    let phases = track.named(|name| name == "discriminator" || name == "generator");
    let positions: Vec<u64> = phases.iter().map(|phase| phase.args["position"].as_u64().unwrap()).collect();
    assert!(positions.iter().copied().eq(0..80), "{positions:?}");
    let length = |slices: &[&Slice]| slices.iter().map(|slice| slice.until - slice.from).sum::<u64>();
    let parts: Vec<&Slice> = track.slices.iter().filter(|slice| slice.within.len() == 2).collect();
    assert_eq!(length(&steps), length(&phases));
    assert_eq!(length(&steps), length(&parts));
    assert!(track.open.is_empty());
}

#[test]
fn a_trace_shows_the_coordinator_and_both_workers_and_changes_nothing() {
    let run = Run::new(&SETTINGS);
    let file = run.beside("trace.json");
    let ended = run.start_with(&["--workers", "2", "--trace", file.to_str().unwrap()]).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert_eq!(run.digest(), Run::new(&SETTINGS).complete(2));

    let tracks = read(&file);
    let track = |process: &str, name: &str| &tracks[&(process.to_string(), name.to_string())];
    let events: Vec<&str> =
        track("coordinator", "events").instants.iter().map(|(name, _)| name.as_str()).collect();
    for kind in ["worker_started", "worker_joined", "generation_formed", "checkpoint", "run_ended"] {
        assert!(events.contains(&kind), "{kind} is not among {events:?}");
    }
    assert_eq!(track("coordinator", "groups").named(|name| name.starts_with("generation 1")).len(), 1);
    for worker in ["worker 1", "worker 2"] {
        assert_trained(track(worker, "training"));
        assert!(!track(worker, "archive").named(|name| name == "write file").is_empty());
    }

    // Equal to the metrics rows of rank 0, except for the last digits of each lap.
    let is_first = |track: &&Track| track.named(is_step).first().is_some_and(|step| step.args["rank"] == 0);
    let first = tracks.values().find(is_first).unwrap();
    for module in ["discriminator", "generator"] {
        for part in ["data", "compute", "wait", "commit"] {
            let told =
                run.rows().iter().map(|row| row["profile"][module][part].as_f64().unwrap()).sum::<f64>();
            let (told, shown) = (1e3 * told, first.microseconds(part, module) as f64);
            let rounding = first.slices.len() as f64;
            assert!((told - shown).abs() <= rounding, "{module} {part}: {told} and {shown} microseconds");
        }
    }
}

#[test]
fn a_trace_shows_a_worker_that_is_killed_and_how_the_others_go_on() {
    let run = Run::new(&SETTINGS).with_failpoints();
    let file = run.beside("trace.json");
    let mut command = run.command(&["--workers", "2", "--trace", file.to_str().unwrap()]);
    command.env(VARIABLE, format!("commit@41:{}", run.beside("killed").display()));
    let ended = Process::start(command).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);

    let tracks = read(&file);
    let training = |(process, name): &&(String, String)| name == "training" && process != "coordinator";
    assert!(tracks.keys().filter(training).count() >= 2, "{:?}", tracks.keys());
    let groups = &tracks[&("coordinator".to_string(), "groups".to_string())];
    assert!(!groups.named(|name| name == "regroup").is_empty());
    let healed = |track: &Track| !track.named(|name| name == "heal").is_empty();
    assert!(tracks.values().any(healed), "somebody goes on from a member's state");
}

#[test]
fn a_remote_worker_has_a_trace_of_its_own() {
    let run = Run::new(&SETTINGS);
    let file = run.beside("remote.json");
    let coordinator = run.start(0);
    let started = run.wait_for("coordinator_started", |_| true);
    let mut command = Command::new(program("worker"));
    command.args(["--coordinator", started["address"].as_str().unwrap(), "--trace"]).arg(&file);
    let worker = Process::start(command);
    assert_eq!(coordinator.wait().code, Some(0));
    assert_eq!(worker.wait().code, Some(0));
    let tracks = read(&file);
    assert!(tracks.keys().all(|(process, _)| process == "worker 1"), "{:?}", tracks.keys());
    assert_trained(&tracks[&("worker 1".to_string(), "training".to_string())]);
}

#[test]
fn an_older_trace_stays_where_there_is_no_room_for_a_new_one() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    let Some(disk) = Disk::mount(run.beside("disk")) else { return };
    let trace = disk.folder.join("trace.json");
    let old = "[\n{\"name\":\"an older run\",\"ph\":\"i\",\"ts\":1,\"pid\":1,\"tid\":1,\"args\":{}}\n]\n";
    fs::write(&trace, old).unwrap();
    let full = disk.fill_up();
    let ended = run.start_with(&["--workers", "1", "--trace", trace.to_str().unwrap()]).wait();
    assert_eq!(ended.code, Some(1), "{}", ended.output);
    assert!(ended.output.contains("--trace") && ended.output.contains("No space left"), "{}", ended.output);
    assert_eq!(fs::read_to_string(&trace).unwrap(), old);
    assert_eq!(fs::read_dir(&disk.folder).unwrap().count(), 2, "no draft is left");
    drop(full);
    disk.free();
    let ended = run.start_with(&["--workers", "1", "--trace", trace.to_str().unwrap()]).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(!fs::read_to_string(&trace).unwrap().contains("an older run"));
}
