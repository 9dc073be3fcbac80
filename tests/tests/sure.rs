//! Never falsely sure: changed inputs are named, numbers that are not finite are refused, a failing run says
//! so, and few samples are warned of.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::Path;
use std::process::Command;

use ganglion_tests::{Ended, Process, Run, SMALL_MLP, program};
use image::{GrayImage, Luma};

#[track_caller]
fn says(ended: &Ended, code: i32, parts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.output);
    parts
        .iter()
        .for_each(|part| assert!(ended.output.contains(part), "{part:?} is not in:\n{}", ended.output));
}

fn worker(arguments: &[&str]) -> Ended {
    let mut command = Command::new(program("worker"));
    command.args(arguments);
    Process::start(command).wait()
}

fn pictures(folder: &Path, count: u8) {
    fs::create_dir_all(folder.join("a b")).unwrap();
    for index in 0..count {
        let picture = GrayImage::from_fn(28, 28, |x, _| Luma([u8::try_from(x).unwrap() + index]));
        picture.save(folder.join(format!("a b/{index:02}.png"))).unwrap();
    }
}

/// A resumed run is refused for what differs, with the way on for that; and that way works.
#[test]
fn what_differs_is_named_with_the_way_on() {
    let settings = &["data.kind=folder", "data.channels=1", "data.resize=28", "sample.every_steps=0"];
    let mut run =
        Run::new(&[SMALL_MLP, settings, &["job.data_shards=2", "job.steps=3", "metrics.every_steps=1"]]);
    let folder = run.beside("pictures");
    pictures(&folder, 12);
    run.set(&format!("data.path={}", folder.display()));
    run.complete(1);
    run.set("job.steps=6");

    // libtorch reads it when a worker starts.
    let less = run.start_in(2, &[("ATEN_CPU_CAPABILITY", "default".to_string())]).wait();
    says(
        &less,
        2,
        &["CPU's instructions", "is \"DEFAULT\" here and \"AVX", "start with ATEN_CPU_CAPABILITY=avx"],
    );
    assert!(!less.output.contains("the same command"), "{}", less.output);

    let (first, kept) = (folder.join("a b/03.png"), fs::read(folder.join("a b/03.png")).unwrap());
    fs::copy(folder.join("a b/04.png"), &first).unwrap();
    says(&run.start(1).wait(), 2, &["its data differ: a b/03.png was changed", "put it back"]);
    fs::write(&first, &kept).unwrap();
    fs::write(folder.join("new.png"), &kept).unwrap();
    says(&run.start(1).wait(), 2, &["new.png is new", "take what is new away"]);
    fs::remove_file(folder.join("new.png")).unwrap();
    fs::remove_file(&first).unwrap();
    let without = "--set 'data.exclude=a b/03.png'";
    says(&run.start(1).wait(), 2, &["its data differ: a b/03.png is missing", "put it back", without]);
    assert_eq!(run.rows().len(), 3, "a refusal trains nothing");

    let ended = run.start_with(&["--workers", "1", "--set", "data.exclude=a b/03.png"]).wait();
    says(&ended, 0, &["is complete"]);
    run.assert_audited();
}

/// A generator with a weight that is NaN is refused by all that draw from it, and no file is written.
#[test]
fn a_generator_that_is_not_finite_is_refused() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2", "job.data_shards=2", "sample.every_steps=0"]]);
    run.complete(1);
    let mut weights = fs::read(run.newest_checkpoint().join("generator_ema.safetensors")).unwrap();
    let end = weights.len();
    weights[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let (broken, out) = (run.beside("broken.safetensors"), run.beside("out"));
    fs::write(&broken, &weights).unwrap();
    let (broken, out_name) = (broken.to_str().unwrap(), out.to_str().unwrap());
    for command in ["sample", "interpolate", "export"] {
        let ended = worker(&[command, "--checkpoint", broken, "--out", out_name]);
        says(&ended, 2, &["not finite", "take an earlier one"]);
        assert!(!out.exists(), "{command} has written a file");
    }
    let ended = worker(&["eval", "--checkpoint", broken, "--data", "mnist-10k", "--samples", "100"]);
    says(&ended, 2, &["not finite"]);
    assert!(!ended.output.contains("frechet_distance"), "{}", ended.output);
}

/// The rates are so high that the losses explode, all finite.
#[test]
fn an_error_that_explodes_is_an_alarm_and_is_told_at_the_end() {
    let rates = ["optimizer.learning_rate=10", "optimizer.discriminator_learning_rate=10"];
    let job = ["loss.kind=wasserstein-gp", "job.steps=60", "metrics.every_steps=1", "sample.every_steps=0"];
    let run = Run::new(&[SMALL_MLP, &job, &rates]);
    let ended = run.start(1).wait();
    says(
        &ended,
        0,
        &["alarm: exploding loss: loss_", "is complete", "finished with 1 alarm: exploding loss: "],
    );
    let raised: Vec<_> = run.events().into_iter().filter(|event| event["kind"] == "alarm").collect();
    assert!(raised.len() == 1 && raised[0]["alarm"] == "exploding_loss", "{raised:?}");
    // The same command again says it too.
    says(&run.start(1).wait(), 0, &["is finished", "finished with 1 alarm: exploding loss: "]);
}

#[test]
fn figures_of_few_samples_are_refused_or_warned_of() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=2", "job.data_shards=2", "sample.every_steps=0"]]);
    run.complete(1);
    let (checkpoint, folder) = (run.path(""), run.beside("few"));
    pictures(&folder, 9);
    let few = format!("folder:{}", folder.display());
    let judge = |arguments: &[&str]| {
        worker(&[&["eval", "--checkpoint", checkpoint.to_str().unwrap()], arguments].concat())
    };
    let least = &["9 real samples", "at least 10"];
    says(&judge(&["--samples", "20", "--data", &few]), 2, least);
    let warned = judge(&["--samples", "20", "--reference", "500"]);
    says(&warned, 0, &["20 samples against 500 real ones are too few for 64 features", "frechet_distance"]);
    let enough = judge(&["--samples", "65", "--reference", "65"]);
    assert!(enough.code == Some(0) && !enough.output.contains("too few"), "{}", enough.output);

    // Beside training: before the first step.
    let mut beside = Run::new(&[SMALL_MLP, &["data.kind=folder", "data.channels=1", "data.resize=28"]]);
    beside.set(&format!("data.path={}", folder.display()));
    for setting in ["job.data_shards=2", "job.steps=2", "evaluation.every_steps=1"] {
        beside.set(setting);
    }
    says(&beside.start(1).wait(), 2, least);
    assert!(beside.rows().is_empty());
}
