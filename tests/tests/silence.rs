//! No command is silent: a line within a second where it waits for others, progress after two.
//!
//! A pipe that nobody writes to or reads stands for a disk that takes its time.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ganglion_tests::{Process, Run, SMALL_MLP, eventually, program};

/// Time limit for a first line, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(10);

fn start(name: &str, arguments: &[&str]) -> Process {
    let mut command = Command::new(program(name));
    command.args(arguments);
    Process::start(command)
}

/// Waits until a process has printed a text; returns what it has printed then.
fn says(process: &Process, text: &str) -> String {
    eventually(text, || Some(process.output()).filter(|output| output.contains(text)))
}

fn pipe(path: &Path) -> &str {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    path.to_str().unwrap()
}

#[test]
fn a_coordinator_without_workers_says_that_it_waits_and_how_to_start_one() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    let token = run.beside("token");
    fs::write(&token, "0123456789abcdef0123456789abcdef\n").unwrap();
    let begun = Instant::now();
    let coordinator = run.start_with(&["--workers", "0", "--join-token-file", token.to_str().unwrap()]);
    let said = says(&coordinator, "--workers 0: waiting for workers");
    assert!(begun.elapsed() < SOON);
    assert!(said.contains("join with: worker --coordinator http://127.0.0.1:"), "{said}");
    assert!(said.contains(" --join-token-file FILE"), "{said}");
    // And again, since a log may have grown meanwhile.
    let said =
        says(&coordinator, "waiting for workers; start one with: worker --coordinator http://127.0.0.1:");
    assert!(said.lines().last().unwrap().ends_with(" --join-token-file FILE"), "{said}");
}

#[test]
fn a_worker_without_a_coordinator_says_where_it_looks_and_why_in_vain() {
    let begun = Instant::now();
    let worker = start("worker", &["--coordinator", "http://127.0.0.1:1"]);
    says(&worker, "connecting to the coordinator at http://127.0.0.1:1");
    says(&worker, "no coordinator at http://127.0.0.1:1 yet: Connection refused");
    assert!(begun.elapsed() < SOON);
    eventually("a second word", || (worker.output().matches(" yet: ").count() >= 2).then_some(()));
}

#[test]
fn commands_that_take_long_show_what_they_do() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    run.complete(1);
    let place = run.path("");
    let place = place.to_str().unwrap();
    let (out, weights) = (run.beside("out"), run.beside("weights"));
    let out = pipe(&out);
    let sample = start("worker", &["sample", "--checkpoint", place, "--out", out]);
    says(&sample, "drawing a picture: ");
    let digits = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-");
    let file = |name: &str| format!("{digits}{name}-ubyte.gz");
    let (images, labels) = (file("images-idx3"), file("labels-idx1"));
    let train = ["train-classifier", "--images", &images, "--labels", &labels, "--epochs", "1000", "--out"];
    let train = start("worker", &[&train[..], &[weights.to_str().unwrap()]].concat());
    says(&train, " of 78,000 (");
    let read = std::thread::scope(|scope| {
        let read = scope.spawn(|| fs::read(out).unwrap());
        assert_eq!(sample.wait().code, Some(0));
        read.join().unwrap()
    });
    assert!(image::load_from_memory(&read).is_ok(), "the pipe got the picture");
    fs::remove_file(run.path("metrics.jsonl")).unwrap();
    pipe(&run.path("metrics.jsonl"));
    says(&start("coordinator", &["audit", place]), "reading the run: ");
}
