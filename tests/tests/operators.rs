//! Operators' commands on active and ended runs, and the log.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;

use ganglion_tests::{Ended, Process, Reference, Run, SMALL_MLP, program};
use nix::sys::signal::Signal;
use serde_json::Value;

const JOB: &[&str] = &["job.steps=600", "metrics.every_steps=1", "checkpoint.every_steps=100"];

fn json(ended: Ended) -> Value {
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    serde_json::from_str(&ended.output).unwrap()
}

/// Lists the runs in the folder of a run.
fn runs(run: &Run) -> Value {
    let mut command = std::process::Command::new(program("coordinator"));
    command.arg("runs").arg(run.beside("")).arg("--json");
    json(Process::start(command).wait())
}

#[test]
fn a_run_is_stopped_listed_and_gone_on_with() {
    let settings = [SMALL_MLP, JOB];
    let reference = Reference::of(&settings);
    let run = Run::new(&settings);
    let coordinator = run.start(2);
    run.wait_for_step(150);
    let status = json(run.ask(&["status", "--json"]));
    assert_eq!((&status["standing"], &status["last_step"]), (&"running".into(), &600.into()));
    assert_eq!(status["workers"].as_array().unwrap().len(), 2);
    assert_eq!(runs(&run)[0]["standing"], "running");

    let stopped = run.ask(&["stop"]);
    assert!(stopped.code == Some(0) && stopped.output.contains("it is stopped"), "{}", stopped.output);
    assert_eq!(coordinator.wait().code, Some(143));
    let listed = runs(&run);
    assert_eq!((&listed[0]["standing"], &listed[0]["name"]), (&"stopped".into(), &"mnist-mlp".into()));
    let again = run.ask(&["stop"]);
    assert!(again.code == Some(1) && again.output.contains("no coordinator"), "{}", again.output);

    let checkpoints = json(run.ask(&["checkpoints", "--verify", "--json"]));
    let newest = checkpoints.as_array().unwrap().last().unwrap();
    assert_eq!((&newest["state_digest"], &newest["step"]), (&run.digest().into(), &listed[0]["step"]));

    assert_eq!(run.start(1).wait().code, Some(0));
    reference.equals("a run that was stopped by an operator", &run.digest());
    assert_eq!(json(run.ask(&["status", "--json"]))["standing"], "complete");
    run.assert_audited();
}

#[test]
fn damaged_checkpoints_are_named() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=20"]]);
    run.complete(1);
    let folder = run.newest_checkpoint();
    fs::write(folder.join("generator_ema.safetensors"), "nothing").unwrap();
    let listed = run.ask(&["checkpoints"]);
    assert_eq!(listed.code, Some(0), "only --verify reads the files: {}", listed.output);
    let verified = run.ask(&["checkpoints", "--verify"]);
    assert_eq!(verified.code, Some(1));
    assert!(verified.output.contains("generator_ema.safetensors does not have"), "{}", verified.output);
}

#[test]
fn a_folder_that_is_no_run_is_told_so() {
    let run = Run::new(&[]);
    for question in ["status", "stop", "checkpoints"] {
        let asked = run.ask(&[question]);
        assert_eq!(asked.code, Some(2), "{question}: {}", asked.output);
        assert!(asked.output.contains("give "), "{}", asked.output);
    }
}

#[test]
fn every_line_of_the_structured_log_says_where_in_the_run_it_was() {
    let run = Run::new(&[SMALL_MLP, JOB, &["job.failure_deadline=2"]]);
    let mut command = run.command(&["--workers", "2", "--log-format", "json"]);
    command.env("RUST_LOG", "info");
    let coordinator = Process::start(command);
    run.wait_for_step(50);
    ganglion_tests::send(run.pids(1)[1], Signal::SIGKILL);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    let lines = objects(&ended.output);
    assert!(lines.iter().all(|line| line["run"] == "mnist-mlp" && line["time"].is_f64()), "{}", ended.output);
    let of_survivor =
        |line: &&Value| line["rank"] == 0 && line["generation"] == 1 && line["step"].as_u64() >= Some(50);
    assert!(lines.iter().any(|line| of_survivor(&line)), "{}", ended.output);
    let words = |words: &str| {
        lines.iter().any(|line| line["message"].as_str().is_some_and(|text| text.contains(words)))
    };
    for told in ["other workers join with", "regrouping: ", "step 600/600", "is complete"] {
        assert!(words(told), "no {told:?} in:\n{}", ended.output);
    }
}

/// Lines of the structured log; all must be.
#[track_caller]
fn objects(output: &str) -> Vec<Value> {
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    output.lines().map(parse).collect()
}

/// Messages of commands other than training are of the structured log as well; results are not.
#[test]
fn every_command_writes_its_messages_as_the_log_is_written() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    run.complete(1);
    let (place, picture) = (run.path(""), run.beside("digits.png"));
    let (place, picture) = (place.to_str().unwrap(), picture.to_str().unwrap());
    for (name, line, level, says) in [
        ("worker", &["sample", "--checkpoint", place, "--out", picture][..], "INFO", "digits.png"),
        ("worker", &["sample", "--checkpoint", "/nowhere", "--out", picture], "ERROR", "/nowhere"),
        ("worker", &["sample", "--nonsense"], "ERROR", "--nonsense"),
        ("worker", &["--coordinator", "nonsense"], "ERROR", "--coordinator nonsense"),
        ("coordinator", &["audit", "/nowhere"], "ERROR", "/nowhere"),
        ("coordinator", &["status", "--nonsense"], "ERROR", "--nonsense"),
        ("coordinator", &["--set", "job.stepz=1"], "ERROR", "job.stepz"),
        ("coordinator", &["data", "check", "--data", "folder:/nowhere"], "ERROR", "/nowhere"),
    ] {
        let mut command = std::process::Command::new(program(name));
        command.args(line).args(["--log-format", "json"]);
        let ended = Process::start(command).wait();
        let lines = objects(&ended.output);
        let last = lines.last().unwrap();
        assert_eq!(last["level"], level, "{}", ended.output);
        assert!(last["message"].as_str().unwrap().contains(says), "{}", ended.output);
    }
    let mut status = std::process::Command::new(program("coordinator"));
    status.args(["status", "--run-dir", place]).env("GANGLION_LOG_FORMAT", "json");
    let ended = Process::start(status).wait();
    assert!(ended.output.starts_with("run mnist-mlp: "), "{}", ended.output);
}

#[test]
fn a_container_image_is_built_with_every_member_of_the_workspace() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |file: &str| fs::read_to_string(root.join(file)).unwrap();
    let (manifest, left_out) = (read("Cargo.toml"), read(".dockerignore"));
    let members = manifest.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
    let members: Vec<&str> = members.split(',').map(|member| member.trim().trim_matches('"')).collect();
    assert!(members.len() > 5, "{members:?}");
    for member in members {
        // Without its Cargo.toml cargo builds no other member either.
        assert!(!left_out.lines().any(|line| member.starts_with(line)), "{member} is in .dockerignore");
    }
}
