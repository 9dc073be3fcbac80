//! `coordinator data check`: kinds, counts, classes and bad samples of each form of data, and its exit codes.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs::{self, File};
use std::io::{Cursor, Write};
use std::path::Path;
use std::process::Command;

use ganglion_tests::package::npy;
use ganglion_tests::{Ended, Process, program};
use image::{GrayImage, ImageFormat, Luma};
use serde_json::{Value, json};
use tempfile::TempDir;
use zip::write::FileOptions;

/// Runs `coordinator data check` with these arguments.
fn check(arguments: &[&str]) -> Ended {
    let mut command = Command::new(program("coordinator"));
    command.args(["data", "check"]).args(arguments);
    Process::start(command).wait()
}

#[track_caller]
fn assert_says(ended: &Ended, code: i32, says: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.output);
    for part in says {
        assert!(ended.output.contains(part), "{part:?} is not in:\n{}", ended.output);
    }
}

/// Report on some data as JSON, without the time; equal on one thread and on several.
#[track_caller]
fn report(data: &str, code: i32) -> Value {
    let on = |threads: &str| -> Value {
        let ended = check(&["--data", data, "--json", "--threads", threads]);
        assert_eq!(ended.code, Some(code), "{}", ended.output);
        let json = &ended.output[ended.output.find('{').unwrap()..=ended.output.rfind('}').unwrap()];
        let mut report: Value = serde_json::from_str(json).unwrap();
        assert!(report["seconds"].take().is_f64());
        report
    };
    let one = on("1");
    assert_eq!(on("3"), one);
    one
}

/// Picture whose content depends on its number.
fn picture(number: u32, format: ImageFormat) -> Vec<u8> {
    let pixel = |x: u32, y: u32| u8::try_from((x * (number + 3) + y * (number ^ 5)) % 251).unwrap();
    let mut bytes = Vec::new();
    let picture = GrayImage::from_fn(28, 28, |x, y| Luma([pixel(x, y)]));
    picture.write_to(&mut Cursor::new(&mut bytes), format).unwrap();
    bytes
}

/// Picture with a whole header and a missing end.
fn cut_off(number: u32, format: ImageFormat) -> Vec<u8> {
    let mut whole = picture(number, format);
    whole.truncate(whole.len() - 40);
    whole
}

/// Names of bad samples, in the order of the report.
fn bad_names(report: &Value) -> Vec<&str> {
    report["bad_samples"].as_array().unwrap().iter().map(|bad| bad["name"].as_str().unwrap()).collect()
}

/// Leaving out the named samples makes the set good.
#[test]
fn each_bad_picture_of_a_folder_is_named_with_how_to_leave_it_out() {
    let root = TempDir::new().unwrap();
    let (folder, bad) = (root.path().join("pictures"), root.path().join("bad.txt"));
    let name = |index: u32| format!("{}/{index:04}.jpg", ["even", "odd"][index as usize % 2]);
    for index in 0..60 {
        let file = folder.join(name(index));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let of = if [7, 31].contains(&index) { cut_off } else { picture };
        fs::write(file, of(index, ImageFormat::Jpeg)).unwrap();
    }
    fs::write(folder.join("even/notes.txt"), "none").unwrap();
    let data = format!("folder:{}", folder.display());

    let ended = check(&["--data", &data, "--bad", bad.to_str().unwrap()]);
    let advice = format!("--set data.exclude=@{}", bad.display());
    let says = [
        "60 samples",
        "2 classes by folder: even (30), odd (30)",
        "1 .txt (even/notes.txt)",
        "2 of 60 samples",
        &advice,
    ];
    assert_says(&ended, 2, &[&says[..], &[&name(7), &name(31)]].concat());
    assert_eq!(fs::read_to_string(&bad).unwrap(), format!("{}\n{}\n", name(7), name(31)));
    let found = report(&data, 2);
    assert_eq!((&found["samples"], &found["bad"]), (&json!(60), &json!(2)));
    assert_eq!(found["formats"], json!({"jpg": 58}));

    let path = format!("data.path={}", folder.display());
    let settings = ["data.kind=folder", "data.channels=1", "data.resize=28", "job.shard_batch=2", &path];
    let job: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    assert_says(&check(&job), 2, &["2 of 60 samples", "data.exclude="]);
    let exclude = format!("data.exclude=@{}", bad.display());
    let without = [&job[..], &["--set", &exclude]].concat();
    assert_says(&check(&without), 0, &["58 samples", "2 samples by data.exclude"]);
    // 64 samples per phase, of the 58 remaining ones.
    assert_says(&check(&[&without[..], &["--set", "job.shard_batch=8"]].concat()), 2, &["more than the 58"]);
}

#[test]
fn the_bundled_digits_are_good_and_nothing_is_refused() {
    assert_says(&check(&[]), 0, &["10000 samples", "28 x 28"]);
    assert_says(&check(&["--data", "folder:/nowhere"]), 2, &["/nowhere"]);
    assert_says(&check(&["--data", "films:/nowhere"]), 2, &["films"]);
}

/// Writes records of CIFAR-10 with these labels.
fn records(file: &Path, labels: &[u8]) {
    let record = |(number, label): (usize, &u8)| {
        let mut bytes = vec![*label];
        bytes.extend((0..3072).map(|at| u8::try_from((at * (number + 3)) % 251).unwrap()));
        bytes
    };
    fs::write(file, labels.iter().enumerate().flat_map(record).collect::<Vec<u8>>()).unwrap();
}

#[test]
fn records_of_cifar_are_counted_and_a_bad_one_is_named() {
    let root = TempDir::new().unwrap();
    let batch = |number: u32| root.path().join(format!("data_batch_{number}.bin"));
    for number in 1..=4 {
        records(&batch(number), &[3, 9, 3]);
    }
    let data = format!("cifar-10:{}", root.path().display());
    assert_says(&check(&["--data", &data]), 2, &["data_batch_5.bin missing"]);

    records(&batch(5), &[0, 9]);
    let found = report(&data, 0);
    let counts = ["samples", "channels", "height", "width", "bytes", "bad"].map(|key| found[key].clone());
    assert_eq!(counts, [14, 3, 32, 32, 14 * 3072, 0].map(|count| json!(count)));
    assert_eq!(found["kind"], "cifar-10");
    assert_eq!(found["sizes"], json!([{"width": 32, "height": 32, "samples": 14}]));
    let class = |name: &str| {
        let classes = found["classes"].as_array().unwrap();
        classes.iter().find(|class| class["name"] == name).map(|class| class["samples"].clone())
    };
    assert_eq!(["airplane", "cat", "truck"].map(|name| class(name).unwrap()), [1, 8, 5].map(|n| json!(n)));
    assert_says(
        &check(&["--data", &data]),
        0,
        &["14 samples of 32 x 32 pixels, in colour", "cat (8)", "truck (5)"],
    );
    let path = format!("data.path={}", root.path().display());
    let settings =
        ["data.kind=cifar-10", "data.resize=28", "model.kind=dcgan-28", "job.shard_batch=1", &path];
    let job: Vec<&str> = settings.iter().chain([&"data.exclude=2"]).flat_map(|set| ["--set", set]).collect();
    assert_says(&check(&job), 0, &["13 samples", "1 samples by data.exclude"]);

    // Such a label is a sign of another format, so the file is refused as a whole, as in training.
    records(&batch(3), &[3, 12, 3]);
    let ended = check(&["--data", &data, "--json"]);
    assert_says(&ended, 2, &["data_batch_3.bin", "label 12 in record 1"]);
    let whole = fs::read(batch(1)).unwrap();
    fs::write(batch(3), &whole[..whole.len() - 1]).unwrap();
    assert_says(&check(&["--data", &data]), 2, &["data_batch_3.bin", "a multiple of 3073"]);
}

/// Writes a zip file. Deflated members are packed.
fn zipped(file: &Path, members: &[(String, Vec<u8>)], method: zip::CompressionMethod) {
    let mut archive = zip::ZipWriter::new(File::create(file).unwrap());
    for (name, content) in members {
        archive.start_file(name, FileOptions::default().compression_method(method)).unwrap();
        archive.write_all(content).unwrap();
    }
    archive.finish().unwrap();
}

fn tarred(file: &Path, members: &[(String, Vec<u8>)]) {
    let mut archive = tar::Builder::new(File::create(file).unwrap());
    for (name, content) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, &content[..]).unwrap();
    }
    archive.finish().unwrap();
}

/// A zip and a tar in a folder, each with a bad picture; then the tar alone, cut off.
#[test]
fn bad_pictures_of_archives_are_named_by_archive_and_member() {
    let root = TempDir::new().unwrap();
    let class = |number: u32| ["cat", "dog"][number as usize % 2];
    let of = |numbers: std::ops::Range<u32>, bad: u32, format: ImageFormat, ending: &str| {
        let member = |number: u32| {
            let content = if number == bad { cut_off } else { picture }(number, format);
            (format!("{}/{number:04}.{ending}", class(number)), content)
        };
        numbers.map(member).collect::<Vec<_>>()
    };
    let zip_members = of(0..20, 7, ImageFormat::Png, "png");
    zipped(&root.path().join("0.zip"), &zip_members[..10], zip::CompressionMethod::Deflated);
    zipped(&root.path().join("1.zip"), &zip_members[10..], zip::CompressionMethod::Stored);
    let mut tar_members = of(20..30, 22, ImageFormat::Jpeg, "jpg");
    tar_members.push(("cat/0022.seg.png".to_owned(), picture(1, ImageFormat::Png)));
    tar_members.push(("dog/notes.txt".to_owned(), b"none".to_vec()));
    tarred(&root.path().join("2.tar"), &tar_members);

    let data = format!("folder:{}", root.path().display());
    let found = report(&data, 2);
    assert_eq!((&found["samples"], &found["bad"]), (&json!(30), &json!(2)));
    assert_eq!(found["formats"], json!({"png": 19, "jpg": 9}));
    assert_eq!(found["classes"], json!([{"name": "cat", "samples": 15}, {"name": "dog", "samples": 15}]));
    assert_eq!(bad_names(&found), ["0.zip/dog/0007.png", "2.tar/cat/0022.jpg"]);
    let left_out = [".txt", "other parts of samples"].map(|kind| found["left_out"][kind]["example"].clone());
    assert_eq!(left_out, ["2.tar/dog/notes.txt", "2.tar/cat/0022.seg.png"].map(|name| json!(name)));
    let exclude = r#"data.exclude=["0.zip/dog/0007.png","2.tar/cat/0022.jpg"]"#;
    assert_says(&check(&["--data", &data]), 2, &["2 of 30 samples", &format!("--set '{exclude}'")]);

    let path = format!("data.path={}", root.path().display());
    let settings = ["data.kind=folder", "data.channels=1", "job.shard_batch=2", &path, exclude];
    let job: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    assert_says(&check(&job), 0, &["28 samples", "2 samples by data.exclude"]);

    let tar = root.path().join("2.tar");
    let alone = report(&format!("folder:{}", tar.display()), 2);
    assert_eq!((&alone["samples"], bad_names(&alone)), (&json!(10), vec!["cat/0022.jpg"]));
    let whole = fs::read(&tar).unwrap();
    fs::write(&tar, &whole[..whole.len() / 2]).unwrap();
    assert_says(&check(&["--data", &data]), 2, &["2.tar: cannot be read", "make it again"]);
}

#[test]
fn text_and_arrays_are_told_by_tokens_and_by_rows() {
    let root = TempDir::new().unwrap();
    let at = |name: &str| root.path().join(name).display().to_string();
    fs::write(at("a.txt"), "x".repeat(1000)).unwrap();
    let numbers: Vec<u8> =
        [1.0_f32, 2.0, 3.0, f32::NAN].iter().flat_map(|number| number.to_le_bytes()).collect();
    fs::write(at("good.npy"), npy("<f4", "(3, 1)", &numbers[..12])).unwrap();
    fs::write(at("bad.npy"), npy("<f4", "(2, 2)", &numbers)).unwrap();
    let text = report(&format!("text:{}", at("a.txt")), 0);
    let found = ["samples", "context", "tokens", "vocabulary", "text_bytes", "documents", "bytes"];
    assert_eq!(found.map(|key| text[key].as_u64().unwrap()), [7, 128, 1000, 256, 1000, 1, 1000]);
    let says =
        ["7 samples of 128 tokens, out of 1000 of 256 different ones; 1000 bytes of text in 1 document"];
    assert_says(&check(&["--data", &format!("text:{}", at("a.txt"))]), 0, &says);
    assert_says(
        &check(&["--data", &format!("arrays:{}", at("good.npy"))]),
        0,
        &["3 samples of good (1 float32)"],
    );
    let refused = check(&["--data", &format!("arrays:{}", at("bad.npy"))]);
    assert_says(&refused, 2, &["bad.npy: the number at [1, 1] is NaN; mend it, or leave sample 1 out"]);
    assert_says(
        &check(&["--data", &format!("text:{}", at("none"))]),
        2,
        &["does not exist", "a file of text"],
    );
}

/// A folder in the place of the tokens stands for one in which nothing can be written.
#[test]
fn tokens_are_kept_elsewhere_where_they_cannot_lie_beside_the_text() {
    let root = TempDir::new().unwrap();
    let (text, cache) = (root.path().join("a.txt.gz"), root.path().join("cache"));
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/../data/kjv/held-out.txt.gz"), &text).unwrap();
    let check = || {
        let mut command = Command::new(program("coordinator"));
        command.args(["data", "check", "--data"]).arg(format!("text:{}", text.display()));
        command.env("GANGLION_CACHE_DIR", &cache);
        assert_says(&Process::start(command).wait(), 0, &["3202 samples of 128 tokens"]);
    };
    let kept = |folder: &Path| {
        let mut names =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.find(|name| name.starts_with("a.txt.gz.tokens-")).unwrap()
    };
    check();
    let name = kept(root.path());
    fs::remove_file(root.path().join(&name)).unwrap();
    fs::create_dir(root.path().join(&name)).unwrap();
    check();
    assert_eq!(kept(&cache), name);
}
