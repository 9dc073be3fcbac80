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

/// A command on a terminal of that kind and width, whose name is printed first.
fn on_terminal(command: &Command, kind: &str, width: usize) -> Process {
    let mut terminal = Command::new("script");
    let line = format!("tty; stty rows 24 cols {width}; exec {}", line(command));
    terminal.args(["--quiet", "--return", "--flush", "--command", &line, "/dev/null"]).env("TERM", kind);
    Process::start(terminal)
}

/// Widths of the lines that were drawn over, in columns, in the order they were drawn in: those
/// that end in a carriage return alone.
fn drawn(output: &str) -> Vec<usize> {
    let plain = console::strip_ansi_codes(output).replace("\r\n", "\n");
    let over = plain.split('\n').filter_map(|line| line.rsplit_once('\r'));
    let lines = over.flat_map(|(over, _)| over.split('\r'));
    lines.map(console::measure_text_width).filter(|width| *width > 0).collect()
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
    for says in ["coordinator.log", "coordinator status /", "coordinator stop /", "join with"] {
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

#[test]
fn the_status_line_fits_a_terminal_of_any_width_and_follows_it() {
    let run = Run::new(&[SMALL_MLP, ENDLESS]);
    let coordinator = on_terminal(&run.command(&["--workers", "1"]), "xterm", 40);
    let is_drawn = |output: &str| drawn(output).len() > 20 && output.contains("step ");
    let output = eventually("a status line", || Some(coordinator.output()).filter(|output| is_drawn(output)));
    assert_eq!(drawn(&output).into_iter().max(), Some(40), "{output:?}");
    let terminal = output.lines().next().unwrap().trim().to_string();
    for width in [23, 90] {
        let so_far = coordinator.output().len();
        assert!(
            Command::new("stty")
                .args(["-F", &terminal, "cols", &width.to_string()])
                .status()
                .unwrap()
                .success()
        );
        // Of the lines that were under way some may have the old width.
        let later = |output: &String| drawn(output.get(so_far..).unwrap_or_default()).len() > 20;
        let output = eventually("later lines", || Some(coordinator.output()).filter(later));
        let widths = drawn(&output[so_far..]);
        assert_eq!(widths[widths.len() - 10..], [width; 10], "{:?}", &output[so_far..]);
    }
    coordinator.signal(Signal::SIGKILL);
    let started = run.wait_for("coordinator_started", |_| true);
    send(i32::try_from(started["pid"].as_i64().unwrap()).unwrap(), Signal::SIGTERM);
}

#[test]
fn a_terminal_that_cannot_draw_gets_lines() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=50", "metrics.every_steps=10"]]);
    let ended = on_terminal(&run.command(&["--workers", "1"]), "dumb", 80).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    let lines = ended.output.replace("\r\n", "\n");
    assert!(!lines.contains(['\r', '\x1b']), "{lines:?}");
    for line in ["step 10/50", "step 50/50", "is complete"] {
        assert!(lines.lines().any(|known| known.contains(line)), "no {line:?} in:\n{lines}");
    }
}

/// The line of a command that waits, here for somebody who reads what it writes.
#[test]
fn the_progress_of_a_command_fits_and_goes() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    run.complete(1);
    let out = run.beside("a pipe with a long name, as files of people often have");
    assert!(Command::new("mkfifo").arg(&out).status().unwrap().success());
    let mut command = Command::new(ganglion_tests::program("worker"));
    command.arg("sample").arg("--checkpoint").arg(run.path("")).arg("--out").arg(&out);
    for (kind, says) in [("xterm", "drawing a picture"), ("dumb", "drawing a picture: ")] {
        let drawing = on_terminal(&command, kind, 15);
        let output =
            eventually("progress", || Some(drawing.output()).filter(|output| output.contains(&says[..12])));
        match kind {
            "xterm" => assert!(
                output.contains("\x1b[K") && drawn(&output).iter().all(|width| *width < 15),
                "{output:?}"
            ),
            _ => assert!(!output.contains('\x1b') && output.contains(says), "{output:?}"),
        }
        fs::read(&out).unwrap();
        assert_eq!(drawing.wait().code, Some(0));
    }
}
