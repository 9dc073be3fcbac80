//! Run directories on file systems without locks or shared memory.
//!
//! A preloaded library refuses the calls that such a file system refuses; its source is beside this
//! file.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use ganglion_tests::{Ended, Process, Reference, Run, SMALL_MLP, program};
use nix::sys::signal::Signal;

const STEPS: &[&str] = &["job.steps=400", "metrics.every_steps=20", "checkpoint.every_steps=100"];

/// File system that lacks a feature.
struct FileSystem {
    folder: tempfile::TempDir,
    lacks: &'static str,
}

impl FileSystem {
    fn without(lacks: &'static str) -> FileSystem {
        let folder = tempfile::tempdir().unwrap();
        let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/refusing/refuse.c");
        let library = folder.path().join("refuse.so");
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-o"]).arg(library).arg(source).arg("-ldl");
        assert!(compile.status().unwrap().success());
        FileSystem { folder, lacks }
    }

    fn with(&self, mut command: Command) -> Command {
        command.env("LD_PRELOAD", self.folder.path().join("refuse.so")).env("REFUSED", self.lacks);
        command
    }

    fn start(&self, run: &Run, workers: u32) -> Process {
        Process::start(self.with(run.command(&["--workers", &workers.to_string()])))
    }

    fn ask(&self, run: &Run, what: &str) -> Ended {
        let mut command = Command::new(program("coordinator"));
        command.arg(what);
        match what {
            "audit" => command.arg(run.path("")),
            _ => command.arg("--run-dir").arg(run.path("")),
        };
        Process::start(self.with(command)).wait()
    }
}

#[track_caller]
fn assert_ended(ended: &Ended, code: i32, says: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.output);
    for text in says {
        assert!(ended.output.contains(text), "no {text:?} in:\n{}", ended.output);
    }
}

/// One coordinator at a time, a journal that is read while it is written, a death, and the same bits.
#[test]
fn a_run_lives_without_locks_and_without_shared_memory() {
    let reference = Reference::of(&[SMALL_MLP, STEPS]);
    for (lacks, told) in [
        ("mmap", ["without a write-ahead log", "I/O error"]),
        ("flock, fcntl, mmap", ["cannot be locked (ENOLCK", "and without locks"]),
    ] {
        let here = FileSystem::without(lacks);
        let run = Run::new(&[SMALL_MLP, STEPS]);
        let first = here.start(&run, 2);
        run.wait_for("checkpoint", |_| true);
        let holder = format!("held by another coordinator (process {} on ", first.pid());
        assert_ended(&here.start(&run, 1).wait(), 1, &[&holder]);
        assert_ended(&here.ask(&run, "status"), 0, &["generation 1"]);
        assert_ended(&here.ask(&run, "audit"), 0, &["1 term"]);
        for text in told {
            assert!(first.output().contains(text), "no {text:?} in:\n{}", first.output());
        }
        first.signal(Signal::SIGKILL);
        assert_eq!(first.wait().code, None);
        assert_ended(&here.start(&run, 2).wait(), 0, &["is complete"]);
        reference.equals(lacks, &run.digest());
        assert_ended(&here.ask(&run, "audit"), 0, &["2 terms"]);
        assert_ended(&here.ask(&run, "status"), 0, &["it is complete"]);
        // Moved to a full file system, where the journal has a write-ahead log again.
        assert_ended(&run.start(1).wait(), 0, &["is finished"]);
        run.assert_audited();
    }
}

#[test]
fn of_two_coordinators_that_start_at_once_one_is_refused_also_without_locks() {
    let here = FileSystem::without("flock");
    let run = Run::new(&[SMALL_MLP, STEPS]);
    let both = [here.start(&run, 1), here.start(&run, 1)].map(Process::wait);
    let mut codes = both.each_ref().map(|ended| ended.code);
    codes.sort_unstable();
    assert_eq!(codes, [Some(0), Some(1)], "{}\n{}", both[0].output, both[1].output);
    let refused = both.iter().find(|ended| ended.code == Some(1)).unwrap();
    assert_ended(refused, 1, &["held by another coordinator"]);
    run.assert_audited();
}

/// As a requeued job on another node, whose locks this one does not see.
#[test]
fn a_coordinator_that_another_machine_took_over_from_stops_and_touches_nothing_more() {
    let reference = Reference::of(&[SMALL_MLP, STEPS]);
    let run = Run::new(&[SMALL_MLP, STEPS]);
    let first = run.start(1);
    run.wait_for("checkpoint", |_| true);
    let claim = r#"{"claim":2,"pid":7,"started":7,"host":"elsewhere","boot":"b","pids":"p","term":1,"locked":true,"released":true}"#;
    fs::write(run.path("owners/0000000002"), format!("{claim}\n")).unwrap();
    let says = ["another coordinator (process 7 on elsewhere) has taken this run over"];
    assert_ended(&first.wait(), 1, &says);
    assert!(run.events().iter().all(|event| event["kind"] != "run_ended"), "the run has not ended");
    assert_ended(&run.start(1).wait(), 0, &["is complete"]);
    reference.equals("a run that was taken over", &run.digest());
    run.assert_audited();
}
