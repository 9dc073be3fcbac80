//! Coordinators and the terminals that they were started from.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::Path;
use std::process::Command;

use ganglion_tests::{Ended, Process, Reference, Run, SMALL_MLP, eventually, is_running, send};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};

const ENDLESS: &[&str] = &["job.steps=10000000", "metrics.every_steps=20", "checkpoint.every_steps=1000000"];

/// Coordinator that is not a child of the test.
struct Detached(i32);

impl Detached {
    /// The coordinator that `--detach` printed.
    fn of(launched: &Ended) -> Detached {
        assert_eq!(launched.code, Some(0), "{}", launched.output);
        let (_, after) = launched.output.split_once("goes on without this terminal, as process ").unwrap();
        Detached(after.split(';').next().unwrap().parse().unwrap())
    }

    fn wait(&self) {
        eventually("its end", || (!is_running(self.0)).then_some(()));
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
    }
}

fn log(run: &Run) -> String {
    fs::read_to_string(run.path("coordinator.log")).unwrap_or_default()
}

/// The program that runs a command, as one line for a shell.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_terminal_that_is_closed_stops_its_run_after_a_checkpoint() {
    let mut run = Run::new(&[SMALL_MLP, ENDLESS]);
    let mut terminal = Command::new("script");
    let command = format!("exec {}", line(&heeding_hangups(&run.command(&["--workers", "2"]))));
    terminal.args(["--quiet", "--flush", "--command", &command, "/dev/null"]);
    let terminal = Process::start(terminal);
    let started = run.wait_for("coordinator_started", |_| true);
    let coordinator = Detached(i32::try_from(started["pid"].as_i64().unwrap()).unwrap());
    run.wait_for_step(100);
    terminal.signal(Signal::SIGKILL);
    let ended = run.wait_for("run_ended", |_| true);
    assert_eq!((ended["outcome"].as_str(), ended["detail"].as_str()), (Some("stopped"), Some("Hangup")));
    coordinator.wait();
    assert!(run.live_workers().is_empty());
    // Signalled alone, it reports the signal.
    let again = Process::start(heeding_hangups(&run.command(&["--workers", "1"])));
    run.wait_for("generation_formed", |event| event["generation"] == 2);
    again.signal(Signal::SIGHUP);
    let again = again.wait();
    assert_eq!(again.code, Some(129), "{}", again.output);
    assert!(again.output.contains("stopped; the same command goes on"), "{}", again.output);
    run.set(&format!("job.steps={}", run.wait_for_step(1) + 20));
    run.complete(1);
    let steps = run.wait_for_step(1);
    Reference::of(&[SMALL_MLP, &[&format!("job.steps={steps}")]])
        .equals("a run without its terminal", &run.digest());
    run.assert_audited();
}

/// The command as a terminal starts it. These tests may have been started with `nohup` themselves.
fn heeding_hangups(command: &Command) -> Command {
    let mut heeding = Command::new("env");
    heeding.arg("--default-signal=HUP").arg(command.get_program()).args(command.get_args());
    heeding
}

/// With `nohup` the run must continue.
#[test]
fn a_hangup_that_is_ignored_stays_ignored() {
    let run = Run::new(&[SMALL_MLP, ENDLESS]);
    let command = run.command(&["--workers", "1"]);
    let mut nohup = Command::new("nohup");
    nohup.arg(command.get_program()).args(command.get_args());
    let run_on = Process::start(nohup);
    let worker = run.pids(1)[0];
    for pid in [run_on.pid(), worker] {
        send(pid, Signal::SIGHUP);
        run.wait_for_step(run.wait_for_step(1) + 100);
    }
    run_on.signal(Signal::SIGTERM);
    assert_eq!(run_on.wait().code, Some(143));
}

#[test]
fn a_detached_run_goes_on_alone_and_is_watched_and_stopped() {
    let run = Run::new(&[SMALL_MLP, ENDLESS]);
    let launched = run.start_with(&["--workers", "2", "--detach"]).wait();
    let coordinator = Detached::of(&launched);
    let started = run.wait_for("generation_formed", |_| true);
    assert_eq!(started["world_size"], 2, "it returned once a group trained");
    for says in ["coordinator.log", "coordinator status --run-dir", "coordinator stop --run-dir", "join with"]
    {
        assert!(launched.output.contains(says), "no {says:?} in:\n{}", launched.output);
    }
    assert_eq!(getsid(Some(Pid::from_raw(coordinator.0))), Ok(Pid::from_raw(coordinator.0)));
    for stream in ["1", "2"] {
        let file = fs::read_link(format!("/proc/{}/fd/{stream}", coordinator.0)).unwrap();
        assert_eq!(file, run.path("coordinator.log").canonicalize().unwrap());
    }
    assert_eq!(fs::read_link(format!("/proc/{}/fd/0", coordinator.0)).unwrap(), Path::new("/dev/null"));
    run.wait_for_step(100);
    assert!(log(&run).contains("other workers join with"), "the log begins with the start:\n{}", log(&run));
    // A second coordinator is refused as usual, and does not touch the log.
    let before = log(&run).len();
    let refused = run.start_with(&["--detach"]).wait();
    assert_eq!(refused.code, Some(1), "{}", refused.output);
    assert!(refused.output.contains("held by another coordinator"), "{}", refused.output);
    assert!(!log(&run)[before..].contains("held by"));
    let stopped = run.ask(&["stop"]);
    assert_eq!(stopped.code, Some(0), "{}", stopped.output);
    coordinator.wait();
    assert!(log(&run).contains("stopped; the same command goes on from step"), "{}", log(&run));
    // Again, without local workers: it returns although no worker trains.
    let waits = Detached::of(&run.start_with(&["--workers", "0", "--detach"]).wait());
    send(waits.0, Signal::SIGTERM);
    waits.wait();
    assert_eq!(
        log(&run).matches("other workers join with").count(),
        2,
        "one log, appended to:\n{}",
        log(&run)
    );
}

/// The same message and exit code as without `--detach`, from parent and child alike.
#[test]
fn a_detached_run_that_cannot_start_says_why() {
    let nowhere: &[&str] = &["data.kind=idx", "data.path=/nowhere/images.gz"];
    for (settings, code, says) in [
        (&["job.stepz=1"][..], 2, "job.stepz"),
        (nowhere, 2, "/nowhere/images.gz"),
        (&["job.steps=1"], 0, "is complete"),
    ] {
        let ends = [&["--detach"][..], &[]].map(|detach| {
            let run = Run::new(&[SMALL_MLP, settings]);
            let ended = run.start_with(&[&["--workers", "1"], detach].concat()).wait();
            if let (Some(0), false) = (ended.code, detach.is_empty()) {
                run.wait_for("run_ended", |event| event["outcome"] == "complete");
                Detached::of(&ended).wait();
                let again = run.start_with(&["--detach"]).wait();
                assert_eq!(again.code, Some(0));
                assert!(again.output.contains("is finished"), "{}", again.output);
                return Ended { output: log(&run), ..ended };
            }
            ended
        });
        for ended in ends {
            assert_eq!(ended.code, Some(code), "{}", ended.output);
            assert!(ended.output.contains(says), "no {says:?} in:\n{}", ended.output);
        }
    }
}
