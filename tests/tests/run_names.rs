//! Names of runs and checkpoints: `RUN`, `RUN@best`, `RUN@STEP` in all commands, and the run that is meant
//! without a name.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ganglion_tests::{Ended, Process, program};
use serde_json::Value;

/// Folder with a finished run `runs/tiny`, with checkpoints of steps 2, 4 and 6, each evaluated.
struct Here {
    root: tempfile::TempDir,
}

impl Here {
    fn new() -> Here {
        let here = Here { root: tempfile::tempdir().unwrap() };
        let ended = here.coordinator(&[]);
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        here
    }

    /// Runs a program in the folder.
    fn run(&self, name: &str, arguments: &[&str]) -> Ended {
        let mut command = Command::new(program(name));
        command.args(arguments).current_dir(self.root.path());
        Process::start(command).wait()
    }

    /// Runs a coordinator of the job.
    fn coordinator(&self, settings: &[&str]) -> Ended {
        let job = [
            "job.name=tiny",
            "job.steps=6",
            "job.data_shards=2",
            "job.shard_batch=2",
            "model.width=16",
            "model.latent_dim=8",
            "checkpoint.every_steps=2",
            "checkpoint.keep_last=0",
            "evaluation.with_checkpoints=true",
            "evaluation.samples=20",
            "evaluation.reference=50",
        ];
        let settings = [&job, settings].concat();
        self.run("coordinator", &settings.iter().flat_map(|setting| ["--set", setting]).collect::<Vec<_>>())
    }

    #[track_caller]
    fn done(&self, name: &str, arguments: &[&str]) -> String {
        let ended = self.run(name, arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.output);
        ended.output
    }

    #[track_caller]
    fn refused(&self, name: &str, arguments: &[&str], says: &str) {
        let ended = self.run(name, arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}: {}", ended.output);
        assert!(ended.output.contains(says), "{says:?} is not in: {}", ended.output);
    }

    /// The picture that `worker sample` makes for these arguments.
    #[track_caller]
    fn picture(&self, name: &[&str]) -> Vec<u8> {
        self.done("worker", &[&["sample"], name, &["--count", "4", "--out", "out.png"]].concat());
        fs::read(self.path("out.png")).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Copies the run, under another name.
    fn copy(&self, name: &str) {
        copy(&self.path("runs/tiny"), &self.path("runs").join(name));
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = { (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name())) };
        if from.is_dir() { copy(&from, &to) } else { assert!(fs::copy(&from, &to).is_ok()) }
    }
}

#[test]
fn a_name_means_the_same_checkpoint_in_all_commands() {
    let here = Here::new();
    let best = fs::read_to_string(here.path("runs/tiny/checkpoints/best.json")).unwrap();
    let best: Value = serde_json::from_str(&best).unwrap();
    let best = best["step"].as_u64().unwrap();

    let newest = here.picture(&["runs/tiny/checkpoints/step-00000006"]);
    fs::write(here.path("runs/tiny/checkpoints/latest"), "").unwrap();
    for name in [
        &["runs/tiny"][..],
        &["tiny"],
        &["tiny@latest"],
        &["tiny@6"],
        &["@6"],
        &[],
        &["--checkpoint", "runs/tiny"],
        &["runs/tiny/checkpoints/step-00000006/generator_ema.safetensors"],
    ] {
        assert!(here.picture(name) == newest, "{name:?}");
    }
    let fourth = here.picture(&["runs/tiny/checkpoints/step-00000004"]);
    assert!(here.picture(&["tiny@4"]) == fourth && fourth != newest);
    assert!(here.picture(&["tiny@best"]) == here.picture(&[&format!("tiny@{best}")]));
    let told = format!("tiny has no checkpoint of step 5; it has 2, 4, 6 (latest), best is {best}");
    here.refused("worker", &["sample", "tiny@5", "--out", "out.png"], &told);
    here.refused("worker", &["sample", "tinny", "--out", "out.png"], "runs/, which has tiny");
    for command in [
        &["interpolate", "tiny@4", "--frames", "1", "--out", "walk.gif"][..],
        &["export", "tiny@4", "--out", "G.pt"],
    ] {
        here.done("worker", command);
    }
    let judged = here.done("worker", &["eval", "tiny@4", "--samples", "20", "--reference", "50"]);
    assert!(judged.contains("step-00000004"), "{judged}");

    fs::write(here.path("runs/tiny/checkpoints/latest"), "step-00000006\n").unwrap();
    for run in [&["tiny"][..], &["runs/tiny/"], &["--run-dir", "runs/tiny"]] {
        for command in ["status", "checkpoints", "audit"] {
            let told = here.done("coordinator", &[&[command], run].concat());
            assert!(!told.contains("the only run"), "{told}");
        }
    }
    let all = here.done("coordinator", &["checkpoints", "tiny"]);
    let one = here.done("coordinator", &["checkpoints", "tiny@4"]);
    assert!(all.contains("step-00000006") && all.contains("latest") && all.contains("best"), "{all}");
    assert!(one.contains("step-00000004") && !one.contains("step-00000006"), "{one}");
    here.refused("coordinator", &["checkpoints", "tiny@5"], &told);
    here.refused("coordinator", &["status", "tiny@4"], "leave @4 out");

    // The checkpoints move: the run still leads to them.
    fs::rename(here.path("runs/tiny/checkpoints"), here.path("kept")).unwrap();
    here.refused(
        "worker",
        &["sample", "tiny", "--out", "out.png"],
        "runs/tiny has no checkpoint: there is no folder",
    );
    let ended = here.coordinator(&[&format!("checkpoint.url={}", here.path("kept").display())]);
    assert!(ended.code == Some(0) && ended.output.contains("is finished"), "{}", ended.output);
    assert!(here.picture(&["tiny"]) == newest && here.picture(&["kept@4"]) == fourth);
    fs::rename(here.path("kept"), here.path("away")).unwrap();
    here.refused("worker", &["sample", "tiny", "--out", "out.png"], "kept: there is no such folder; mount");
}

#[test]
fn without_a_name_a_run_is_taken_and_named_or_none_is() {
    let here = Here { root: tempfile::tempdir().unwrap() };
    here.refused("coordinator", &["status"], "there are no runs in runs/ here");
    here.refused("worker", &["sample", "--out", "out.png"], "there are no runs in runs/ here");
    let ended = here.coordinator(&["job.steps=2"]);
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    for (name, command) in [("coordinator", &["status"][..]), ("worker", &["sample", "--out", "out.png"])] {
        let told = here.done(name, command);
        assert!(told.contains("runs/tiny, the only run in runs/\n"), "{told}");
    }
    here.copy("older");
    let past = std::time::UNIX_EPOCH;
    for file in fs::read_dir(here.path("runs/older")).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() {
            fs::File::options().append(true).open(path).unwrap().set_modified(past).unwrap();
        }
    }
    for (name, command) in
        [("coordinator", &["audit"][..]), ("worker", &["eval", "--samples", "20", "--reference", "50"])]
    {
        let told = here.done(name, command);
        assert!(told.contains("runs/tiny, the newest of 2 runs\n"), "{told}");
    }
    // What changes a run guesses none.
    for command in [&["stop"][..], &["drain", "1"], &["scale", "2"]] {
        here.refused("coordinator", command, "there is no run that is going on in runs/");
    }
    here.refused("coordinator", &["recover"], "each of these is a run, so name one: runs/tiny, runs/older");
}

#[test]
fn a_run_that_cannot_be_read_does_not_hide_the_others() {
    let here = Here { root: tempfile::tempdir().unwrap() };
    let ended = here.coordinator(&["job.steps=2"]);
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    for (name, file, content) in [("a", "job.toml", "nonsense"), ("b", "journal.sqlite", "nonsense")] {
        here.copy(name);
        fs::write(here.path("runs").join(name).join(file), content).unwrap();
    }
    here.copy("c");
    fs::remove_file(here.path("runs/c/journal.sqlite")).unwrap();
    let told = here.done("coordinator", &["runs"]);
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines[1].contains("runs/tiny") && lines[1].contains("complete"), "{told}");
    for name in ["runs/a", "runs/b", "runs/c"] {
        assert!(lines.iter().any(|line| line.starts_with(name) && line.contains("unreadable")), "{told}");
        assert!(told.contains(&format!("{name} cannot be read: ")), "{told}");
    }
    let listed: Value = serde_json::from_str(&here.done("coordinator", &["runs", "--json"])).unwrap();
    let standing: Vec<_> =
        listed.as_array().unwrap().iter().map(|run| run["standing"].as_str().unwrap()).collect();
    assert_eq!(standing, ["complete", "unreadable", "unreadable", "unreadable"]);
    assert!(listed[1]["reason"].is_string(), "{listed}");
}
