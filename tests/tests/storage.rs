//! Checkpoints on failing storage, and reading them.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::Path;
use std::process::Command;

use ganglion_tests::disk::Disk;
use ganglion_tests::{Process, Run, SMALL_DCGAN, SMALL_MLP, program};

fn flip_a_bit(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_corrupt_checkpoint_is_named_and_the_one_before_is_taken() {
    let whole = Run::new(&[SMALL_MLP, &["job.steps=8", "checkpoint.every_steps=2"]]).complete(1);
    let mut run = Run::new(&[SMALL_MLP, &["job.steps=6", "checkpoint.every_steps=2"]]);
    run.complete(2);
    flip_a_bit(&run.newest_checkpoint().join("state-00002-of-00004.safetensors"));
    run.set("job.steps=8");
    let ended = run.start(2).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    for part in
        ["warning", "step-00000006", "state-00002-of-00004.safetensors", "going on from step-00000004"]
    {
        assert!(ended.output.contains(part), "{part:?} is not in:\n{}", ended.output);
    }
    assert_eq!(run.digest(), whole);
}

#[test]
fn old_checkpoints_are_removed_and_the_newest_kept() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=9", "checkpoint.every_steps=2", "checkpoint.keep_last=2"]]);
    run.complete(2);
    let mut kept: Vec<String> = fs::read_dir(run.path("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("step-"))
        .collect();
    kept.sort();
    assert_eq!(kept, ["step-00000008", "step-00000009"]);
}

#[test]
fn checkpoints_of_any_cluster_are_the_same_files() {
    let settings = [SMALL_DCGAN, &["job.steps=2", "job.data_shards=5"]];
    let (one, three) = (Run::new(&settings), Run::new(&settings));
    one.complete(1);
    three.complete(3);
    let files = |run: &Run| {
        let entries = fs::read_dir(run.newest_checkpoint()).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
            .into_iter()
            .map(|path| (path.file_name().unwrap().to_owned(), fs::read(path).unwrap()))
            .collect::<Vec<_>>()
    };
    let (one, three) = (files(&one), files(&three));
    assert_eq!(one.len(), 4 + 3);
    assert!(one == three);
}

#[test]
fn training_goes_on_while_the_disk_is_full_and_saves_once_it_is_not() {
    let settings = [SMALL_MLP, &["job.steps=3000", "checkpoint.every_steps=50", "metrics.every_steps=10"]];
    let mut run = Run::new(&settings);
    let Some(disk) = Disk::mount(run.beside("disk")) else { return };
    run.set(&format!("checkpoint.url={}", disk.folder.display()));
    // The run's marker is there before the disk is full.
    let coordinator = run.start(2);
    run.wait_for("worker_joined", |_| true);
    disk.fill();
    let delayed = run.wait_for("checkpoint_delayed", |_| true);
    assert!(delayed["reason"].as_str().unwrap().contains("No space"), "{delayed}");
    let now = run.wait_for_step(1);
    run.wait_for_step(now + 200);
    assert!(run.events().iter().all(|event| event["kind"] != "checkpoint"));
    disk.free();
    run.wait_for("checkpoint", |_| true);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(ended.output.contains("warning: the checkpoint of step"), "{}", ended.output);
    let last = run.events().into_iter().rfind(|event| event["kind"] == "checkpoint").unwrap();
    assert_eq!(
        (last["step"].as_u64(), last["state_digest"].as_str()),
        (Some(3000), Some(&*Run::new(&settings).complete(1)))
    );
}

#[test]
fn samples_depend_on_the_checkpoint_and_the_seed_alone() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2"]]);
    run.complete(1);
    let sample = |seed: &str, from: &Path| {
        let out = run.beside("out.png");
        let mut command = Command::new(program("worker"));
        command.args(["sample", "--count", "50", "--seed", seed, "--out"]).arg(&out);
        let ended = Process::start({
            command.arg(from);
            command
        })
        .wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        fs::read(out).unwrap()
    };
    let first = sample("7", &run.path(""));
    assert!(sample("7", &run.newest_checkpoint()) == first);
    assert!(sample("8", &run.path("")) != first);
    let picture = image::load_from_memory(&first).unwrap();
    assert_eq!((picture.width(), picture.height()), (10 * 28 + 11 * 2, 5 * 28 + 6 * 2));
}
