//! Uses of a checkpoint: samples, films, modules for other programs.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use ganglion_tests::{Ended, Process, Run, program};
use serde_json::json;

const SHORT: &[&str] = &["job.steps=2", "job.data_shards=2", "job.shard_batch=2", "sample.every_steps=0"];
const DCGAN: &[&str] = &["model.kind=dcgan-28", "model.width=4", "model.latent_dim=8"];
const CLASSES: &[&str] = &["model.conditional=true"];

fn trained(settings: &[&[&str]]) -> Run {
    let run = Run::new(&[&[SHORT], settings].concat());
    run.complete(1);
    run
}

fn worker(run: &Run, arguments: &[&str]) -> Ended {
    let mut command = Command::new(program("worker"));
    command.arg(arguments[0]).arg(run.path("")).args(&arguments[1..]);
    Process::start(command).wait()
}

#[track_caller]
fn done(ended: &Ended) -> &str {
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    &ended.output
}

fn pixels(file: &Path) -> Vec<u8> {
    image::open(file).unwrap().into_luma8().into_raw()
}

#[test]
fn single_samples_are_those_of_the_picture_by_class() {
    let run = trained(&[DCGAN, CLASSES]);
    let (folder, picture) = (run.beside("singles"), run.beside("picture.png"));
    done(&worker(&run, &["sample", "--count", "12", "--seed", "3", "--folder", folder.to_str().unwrap()]));
    done(&worker(&run, &["sample", "--count", "12", "--seed", "3", "--out", picture.to_str().unwrap()]));
    let whole = image::open(picture).unwrap().into_luma8();
    for index in 0..12 {
        let single = folder.join(format!("{:03}/{index:06}.png", index % 10));
        let (left, top) = (2 + 30 * (index % 10), 2 + 30 * (index / 10));
        let cell = image::imageops::crop_imm(&whole, left, top, 28, 28).to_image();
        assert_eq!(pixels(&single), cell.into_raw(), "{}", single.display());
    }
    // A run reads the written folder: ten folders of samples, two of which hold two.
    let data = format!("data.path={}", folder.display());
    let again: &[&str] = &["data.kind=folder", &data, "data.channels=1", "data.resize=28", "data.crop=28"];
    fs::write(folder.join("notes.txt"), "of mine").unwrap();
    let drawn = trained(&[DCGAN, CLASSES, again]);
    // The run reports its data, once.
    let told: Vec<_> = drawn.events().into_iter().filter(|event| event["kind"] == "data").collect();
    assert_eq!(told.len(), 1, "{told:?}");
    let found = &told[0]["found"];
    assert_eq!((&found["samples"], &found["class_count"]), (&json!(12), &json!(10)), "{found}");
    assert_eq!(found["classes"][1], json!({ "name": "001", "samples": 2 }));
    assert_eq!(found["left_out"], json!({ ".txt": { "count": 1, "example": "notes.txt" } }));
}

#[test]
fn truncation_keeps_samples_near_the_middle() {
    let run = trained(&[DCGAN]);
    let of = |arguments: &[&str]| {
        let picture = run.beside("truncated.png");
        let out = ["--count", "3", "--out", picture.to_str().unwrap()];
        done(&worker(&run, &[&["sample"], arguments, &out[..]].concat()));
        pixels(&picture)
    };
    assert_eq!(of(&[]), of(&["--truncation", "20"]), "nothing lies so far out");
    assert_ne!(of(&[]), of(&["--truncation", "0.5"]));
    let ended = worker(&run, &["sample", "--truncation", "0", "--out", "x.png"]);
    assert_eq!(ended.code, Some(2), "{}", ended.output);
}

#[test]
fn a_film_comes_by_samples_and_back() {
    let run = trained(&[DCGAN]);
    let (film, picture) = (run.beside("walk.gif"), run.beside("picture.png"));
    let walk = ["interpolate", "--count", "3", "--points", "2", "--frames", "4", "--out"];
    done(&worker(&run, &[&walk[..], &[film.to_str().unwrap()]].concat()));
    done(&worker(&run, &["sample", "--count", "1", "--out", picture.to_str().unwrap()]));
    let mut frames = gif::DecodeOptions::new().read_info(File::open(film).unwrap()).unwrap();
    let mut seen = Vec::new();
    while let Some(frame) = frames.read_next_frame().unwrap() {
        assert_eq!((frame.width, frame.height), (3 * 30 + 2, 32));
        seen.push(frame.buffer.to_vec());
    }
    assert_eq!(seen.len(), 8);
    // The first walk begins at the first sample.
    let first: Vec<u8> = seen[0].chunks(92).flat_map(|row| row[..32].to_vec()).collect();
    assert_eq!(first, pixels(&picture));
    // There and back between two points.
    assert_eq!(seen[1], seen[7]);
    assert_ne!(seen[0], seen[4]);
}

#[test]
fn every_generator_can_be_exported() {
    let file = |name| format!("{}/networks/{name}", env!("CARGO_MANIFEST_DIR"));
    let networks =
        [format!("model.generator={}", file("G.pt")), format!("model.discriminator={}", file("D.pt"))];
    let script = networks.each_ref().map(String::as_str);
    let small: &[&str] = &["model.width=8", "model.latent_dim=8"];
    let cases: [&[&[&str]]; 6] = [
        &[&["model.kind=mlp-28"], small, CLASSES],
        &[DCGAN],
        &[DCGAN, CLASSES],
        &[&["model.kind=r3gan-28"], small],
        &[&["model.kind=sngan-32", "data.resize=32"], small, CLASSES],
        &[&["model.kind=script", "model.latent_dim=8"], &script],
    ];
    for case in cases {
        let run = trained(case);
        let module = run.beside("G.pt");
        let ended = worker(&run, &["export", "--out", module.to_str().unwrap()]);
        assert!(done(&ended).contains("in [-1, 1]; its images"), "{case:?} {}", ended.output);
        assert!(fs::metadata(&module).unwrap().len() > 1000);
    }
    let run = trained(&[DCGAN]);
    let ended = worker(&run, &["export", "--out", "/no/such/folder/G.pt"]);
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(ended.output.contains("--out /no/such/folder"), "{}", ended.output);
}

/// Also where standard output is a file to which is appended; the message is elsewhere.
#[test]
fn a_picture_goes_to_standard_output_and_nothing_else_does() {
    let run = trained(&[DCGAN]);
    let (log, picture) = (run.beside("log"), run.beside("picture.png"));
    done(&worker(&run, &["sample", "--count", "3", "--out", picture.to_str().unwrap()]));
    let mut command = Command::new(program("worker"));
    command.args(["sample", "--count", "3", "--out", "/dev/stdout", "--checkpoint"]).arg(run.path(""));
    let piped = command.output().unwrap();
    assert_eq!(String::from_utf8(piped.stderr).unwrap(), "/dev/stdout\n");
    assert_eq!(piped.stdout, fs::read(&picture).unwrap());
    fs::write(&log, "before\n").unwrap();
    command.stdout(File::options().append(true).open(&log).unwrap());
    assert!(command.status().unwrap().success());
    assert_eq!(fs::read(&log).unwrap(), [b"before\n", &piped.stdout[..]].concat());
}
