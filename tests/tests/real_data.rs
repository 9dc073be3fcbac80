//! The data of a run, said and shown: the first lines, `samples/real.png`, names of classes; and runs that
//! began before there were settings of pictures.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;

use ganglion_tests::{Ended, Process, Run, program};
use image::{Rgb, Rgba, RgbaImage};
use serde_json::json;
use tempfile::TempDir;

const SMALL: &[&str] = &[
    "data.kind=folder",
    "data.resize=28",
    "model.kind=dcgan-28",
    "model.width=4",
    "model.latent_dim=8",
    "model.conditional=true",
    "job.data_shards=2",
    "job.shard_batch=2",
    "sample.count=12",
    "sample.every_steps=0",
];

/// Colour of the opaque half of a picture.
fn colour(class: usize, picture: usize) -> [u8; 3] {
    [class, picture, 7].map(|part| u8::try_from(20 * part).unwrap())
}

/// A folder for each class, with pictures whose right half is transparent over black.
fn pictures(classes: &[&str], each: usize) -> TempDir {
    let root = TempDir::new().unwrap();
    for (class, name) in classes.iter().enumerate() {
        let folder = root.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        for at in 0..each {
            let [red, green, blue] = colour(class, at);
            let left = Rgba([red, green, blue, 255]);
            let picture = RgbaImage::from_fn(28, 28, |x, _| if x < 14 { left } else { Rgba([0; 4]) });
            picture.save(folder.join(format!("{at}.png"))).unwrap();
        }
    }
    root
}

fn worker(run: &Run, arguments: &[&str]) -> Ended {
    let mut command = Command::new(program("worker"));
    command.arg(arguments[0]).arg("--checkpoint").arg(run.path("")).args(&arguments[1..]);
    Process::start(command).wait()
}

fn sample(run: &Run, class: &str) -> Vec<u8> {
    let out = run.beside("one.png");
    let arguments = ["sample", "--count", "2", "--class", class, "--out", out.to_str().unwrap()];
    let ended = worker(run, &arguments);
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    fs::read(out).unwrap()
}

/// Names and files of a folder, sorted.
fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn data_and_classes_are_said_and_shown() {
    let names = ["2", "10", "flags"];
    let data = pictures(&names, 3);
    fs::write(data.path().join("flags/moving.gif"), "").unwrap();
    let path = format!("data.path={}", data.path().display());
    let run = Run::new(&[SMALL, &[&path, "job.steps=2"]]);
    let ended = run.start(2).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    for line in [
        "data: 9 samples of 28 x 28 pixels, in colour; 9 with an alpha channel, over white; 3 classes by folder: 2 (3), \
         10 (3), flags (3); left out: 1 .gif (flags/moving.gif)",
        "warning: pictures in formats that are not read are left out: 1 .gif (flags/moving.gif); convert them to PNG",
        "warning: 3 of 3 classes have fewer than 10 samples: 2 (3), 10 (3), flags (3)",
    ] {
        assert_eq!(ended.output.matches(line).count(), 1, "{line:?} is not once in:\n{}", ended.output);
    }
    let told =
        |kind: &str| run.events().into_iter().filter(|event| event["kind"] == kind).collect::<Vec<_>>();
    assert_eq!(told("data")[0]["found"]["classes"][2], json!({ "name": "flags", "samples": 3 }));
    assert_eq!(told("real_samples").len(), 1);

    // Nine columns of three classes in turn, as in a grid of generated samples.
    let real = image::open(run.path("samples/real.png")).unwrap().into_rgb8();
    assert_eq!(real.dimensions(), (9 * 30 + 2, 2 * 30 + 2));
    for at in 0..12_u32 {
        let (class, picture) = (at as usize % 3, at as usize / 3);
        let (left, top) = (2 + 30 * (at % 9), 2 + 30 * (at / 9));
        // Each class has three pictures for four rows.
        let (opaque, transparent) =
            if picture < 3 { (colour(class, picture), [255; 3]) } else { ([0; 3], [0; 3]) };
        assert_eq!(real.get_pixel(left + 3, top + 9), &Rgb(opaque), "place {at}");
        assert_eq!(real.get_pixel(left + 20, top + 9), &Rgb(transparent), "place {at}");
    }

    names_of_classes_go_with_the_generator(&run);
}

/// Without the data.
fn names_of_classes_go_with_the_generator(run: &Run) {
    assert_ne!(sample(run, "flags"), sample(run, "10"));
    // By its number, since no class has that name.
    assert_eq!(sample(run, "1"), sample(run, "10"));
    assert_ne!(sample(run, "2"), sample(run, "flags"), "a name comes before a number");
    let ended = worker(run, &["sample", "--class", "dogs", "--out", run.beside("x.png").to_str().unwrap()]);
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(ended.output.contains("the classes 2, 10, flags, or their numbers, 0 to 2"), "{}", ended.output);
    let folder = run.beside("drawn");
    let ended = worker(run, &["sample", "--count", "6", "--folder", folder.to_str().unwrap()]);
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert_eq!(entries(&folder), ["10", "2", "flags"]);
    assert_eq!(entries(&folder.join("flags")), ["000002.png", "000005.png"]);
    let module = run.beside("G.pt");
    let ended = worker(run, &["export", "--out", module.to_str().unwrap()]);
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    let mut archive = zip::ZipArchive::new(File::open(module).unwrap()).unwrap();
    let name = archive.file_names().find(|name| name.ends_with("/extra/classes.json")).unwrap().to_owned();
    let mut classes = String::new();
    archive.by_name(&name).unwrap().read_to_string(&mut classes).unwrap();
    assert_eq!(classes, r#"["2","10","flags"]"#);
}

/// A run that began with a version without these settings: its job.toml has none of them.
#[test]
fn a_run_from_before_the_settings_goes_on_as_it_began() {
    let names: Vec<String> = (0..12).map(|class| class.to_string()).collect();
    let data = pictures(&names.iter().map(String::as_str).collect::<Vec<_>>(), 2);
    let path = format!("data.path={}", data.path().display());
    let before = ["data.background=stored", "data.class_order=bytes"];
    let whole = Run::new(&[SMALL, &[&path, "job.steps=6"], &before]).complete(1);
    let mut run = Run::new(&[SMALL, &[&path, "job.steps=3"]]);
    let begun = run.start_with(&["--workers", "1", "--set", before[0], "--set", before[1]]).wait();
    assert_eq!(begun.code, Some(0), "{}", begun.output);
    let job = run.path("job.toml");
    let lines = fs::read_to_string(&job).unwrap();
    let is_new = |line: &&str| line.starts_with("background = ") || line.starts_with("class_order = ");
    assert_eq!(lines.lines().filter(is_new).count(), 2, "{lines}");
    let lines: String = lines.lines().filter(|line| !is_new(line)).map(|line| format!("{line}\n")).collect();
    fs::write(&job, lines).unwrap();
    run.set("job.steps=6");
    assert_eq!(run.complete(2), whole);
    assert_ne!(
        Run::new(&[SMALL, &[&path, "job.steps=6"]]).complete(1),
        whole,
        "a new run has other settings"
    );
}
