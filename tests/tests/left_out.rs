//! Runs that continue without an unreadable sample: the changed job gives the same bits on any
//! cluster.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::PathBuf;

use ganglion_tests::{Ended, Reference, Run, SMALL_MLP, send};
use image::{GrayImage, ImageFormat};
use nix::sys::signal::Signal;

/// Pictures in two folders, and a run over them that keeps a record of each step.
struct Pictures {
    run: Run,
    folder: PathBuf,
}

const PICTURES: u32 = 60;

impl Pictures {
    fn new(steps: u32, settings: &[&str]) -> Pictures {
        let path = ["data.kind=folder", "data.channels=1", "data.resize=28", "job.data_shards=4"];
        let records = ["metrics.every_steps=1", "sample.every_steps=0", "evaluation.every_steps=0"];
        let mut run = Run::new(&[SMALL_MLP, &path, &records, settings]);
        let folder = run.beside("pictures");
        for index in 0..PICTURES {
            let file = folder.join(name(index));
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            let pixel = |x: u32, y: u32| u8::try_from((x * (index + 3) + y * (index ^ 5)) % 251).unwrap();
            let picture = GrayImage::from_fn(28, 28, |x, y| image::Luma([pixel(x, y)]));
            picture.save_with_format(file, ImageFormat::Jpeg).unwrap();
        }
        run.set(&format!("data.path={}", folder.display()));
        run.set(&format!("job.steps={steps}"));
        Pictures { run, folder }
    }

    /// Truncates a picture behind its header.
    fn damage(&self, index: u32) {
        let file = self.folder.join(name(index));
        let whole = fs::read(&file).unwrap();
        fs::write(&file, &whole[..whole.len() - 40]).unwrap();
    }

    /// Trains without further pictures.
    fn without(&self, workers: &str, exclude: &str) -> Ended {
        self.run.start_with(&["--workers", workers, "--set", &format!("data.exclude={exclude}")]).wait()
    }

    /// Digest of the run's job from scratch, on one worker.
    fn digest_of_a_fresh_run(&self) -> String {
        let fresh = Run::new(&[&["job.name=fresh"]]);
        let job = self.run.path("job.toml");
        let ended = fresh.start_with(&["--config", job.to_str().unwrap()]).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        fresh.assert_audited();
        fresh.digest()
    }
}

fn name(index: u32) -> String {
    format!("{}/{index:04}.jpg", ["even", "odd"][index as usize % 2])
}

#[track_caller]
fn assert_says(ended: &Ended, code: i32, says: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.output);
    for part in says {
        assert!(ended.output.contains(part), "{part:?} is not in:\n{}", ended.output);
    }
}

/// Two changes, one of them mistyped first, with other numbers of workers and a kill in between; then the
/// file is gone.
#[test]
fn a_run_goes_on_without_bad_pictures_and_its_job_gives_the_same_bits() {
    // 8 of 60 pictures a step; two discriminator phases, so that a change may come in the middle of one.
    let mut pictures = Pictures::new(40, &["loss.discriminator_steps=2"]);
    pictures.damage(7);
    pictures.damage(31);
    let ended = pictures.run.start(2).wait();
    assert_says(&ended, 2, &["cannot decode the image", "the same command with --set data.exclude="]);
    let first = [7, 31].into_iter().find(|index| ended.output.contains(&name(*index))).unwrap();
    let second = if first == 7 { 31 } else { 7 };
    let rows = pictures.run.rows().len();

    let ended = pictures.without("3", &name(first).replace(".jpg", ".jpeg"));
    assert_says(&ended, 2, &["data.exclude: there is no sample", &name(first)]);
    assert_eq!(pictures.run.rows().len(), rows);
    let ended = pictures.without("3", &name(first));
    assert_says(&ended, 2, &[&name(second), "--set data.exclude="]);

    pictures.run.set("job.steps=4000");
    let exclude = format!("data.exclude={}", name(second));
    let going = pictures.run.start_with(&["--workers", "2", "--set", &exclude]);
    pictures.run.wait_for("samples_excluded", |event| event["files"][0] == name(second).as_str());
    let newest = pictures.run.rows().len() as u64;
    pictures.run.wait_for_step(newest + 5);
    send(pictures.run.live_workers()[0], Signal::SIGKILL);
    pictures.run.wait_for("worker_lost", |_| true);
    going.signal(Signal::SIGTERM);
    let ended = going.wait();
    assert_eq!(ended.code, Some(143), "{}", ended.output);
    fs::remove_file(pictures.folder.join(name(first))).unwrap();
    let step = pictures.run.rows().len() as u64;
    pictures.run.set(&format!("job.steps={}", step + 30));
    let digest = pictures.run.complete(4);

    let audited = pictures.run.audit();
    assert_says(&audited, 0, &["left out after step", &name(first), &name(second)]);
    Reference::new("the run that was changed", digest)
        .equals("its job from scratch", &pictures.digest_of_a_fresh_run());
}

/// The change waits for the state of members of a dead coordinator.
#[test]
fn a_change_comes_after_what_living_workers_have_trained() {
    let mut pictures = Pictures::new(1_000_000, &["checkpoint.every_steps=0"]);
    let first = pictures.run.start(2);
    pictures.run.wait_for_step(5);
    let workers = pictures.run.pids(1);
    first.signal(Signal::SIGKILL);
    first.wait();
    let known = pictures.run.rows().len() as u64;
    let exclude = format!("data.exclude={}", name(12));
    let second = pictures.run.start_with(&["--workers", "1", "--set", &exclude]);
    let event = pictures.run.wait_for("samples_excluded", |_| true);
    assert!(event["after_step"].as_u64().unwrap() >= known, "{event} loses steps of {known}");
    let newest = pictures.run.rows().len() as u64;
    let newest = pictures.run.wait_for_step(newest + 5);
    assert!(workers.iter().all(|worker| !pictures.run.live_workers().contains(worker)));
    second.signal(Signal::SIGTERM);
    second.wait();
    pictures.run.set(&format!("job.steps={}", newest + 50));
    let digest = pictures.run.complete(2);
    let told = format!("left out after step {}: {}", event["after_step"], name(12));
    assert_says(&pictures.run.audit(), 0, &[&told]);
    Reference::new("the run that was changed", digest)
        .equals("its job from scratch", &pictures.digest_of_a_fresh_run());
}
