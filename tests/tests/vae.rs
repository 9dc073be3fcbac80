//! Variational autoencoders: the same bits whatever the cluster, and what a user does with one.
#![allow(clippy::unwrap_used)] // a test may panic

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use ganglion_tests::{Ended, Process, Reference, Run, eventually, program};
use serde_json::Value;

const SMALL: &[&str] = &[
    "model.kind=vae-28",
    "model.width=2",
    "model.latent_dim=4",
    "job.data_shards=4",
    "job.shard_batch=8",
    "metrics.every_steps=1",
];
const BINARISED: &[&str] = &["loss.binarise=true", "loss.beta=2"];
const CONDITIONAL: &[&str] = &["model.conditional=true", "loss.likelihood=gaussian"];

#[test]
fn a_vae_has_the_same_bits_on_1_to_3_workers() {
    let of_32: &[&str] = &["model.kind=vae-32", "data.resize=32", "job.precision=bf16"];
    for case in [BINARISED, CONDITIONAL, of_32] {
        let settings = [SMALL, case, &["job.steps=4"]];
        let reference = Reference::new(&format!("1 worker with {case:?}"), Run::new(&settings).complete(1));
        for workers in [2, 3] {
            let what = format!("{workers} workers with {case:?}");
            reference.equals(&what, &Run::new(&settings).complete(workers));
        }
    }
}

#[test]
fn a_vae_has_the_same_bits_through_a_kill_and_a_resume() {
    let settings =
        |steps: &'static str| [SMALL, BINARISED, &["job.failure_deadline=2"], &[steps][..]].concat();
    let (six, ten) = (settings("job.steps=6"), settings("job.steps=10"));
    let one = Run::new(&[&ten]);
    let reference = Reference::new("1 worker", one.complete(1));
    let killed = Run::new(&[&ten]).with_failpoints();
    let digest = killed.complete_with_a_death(3, "commit@5");
    reference.equals("3 workers of which one was killed", &digest);
    let mut resumed = Run::new(&[&six]);
    resumed.complete(2);
    resumed.set("job.steps=10");
    resumed.complete(1);
    reference.equals("2 workers, then 1", &resumed.digest());
    let computed = |run: &Run| -> Vec<String> {
        let of = |row: &Value| {
            ["step", "ledger", "loss", "recon", "kl"].map(|name| row[name].to_string()).join(" ")
        };
        run.rows().iter().map(of).collect()
    };
    for run in [&one, &killed, &resumed] {
        run.assert_audited();
        assert_eq!(computed(run), computed(&one));
        assert_eq!(run.rows().len(), 10);
    }
}

fn worker(run: &Run, arguments: &[&str]) -> Ended {
    let mut command = Command::new(program("worker"));
    command.arg(arguments[0]).arg(run.path("")).args(&arguments[1..]);
    Process::start(command).wait()
}

#[track_caller]
fn refused(run: &Run, arguments: &[&str], says: &str) {
    let ended = worker(run, arguments);
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(ended.output.contains(says), "{says}\n{}", ended.output);
}

/// Cell of a picture of images of 28 x 28.
fn cell(picture: &Path, column: u32, row: u32) -> Vec<u8> {
    let whole = image::open(picture).unwrap().into_luma8();
    image::imageops::crop_imm(&whole, 2 + 30 * column, 2 + 30 * row, 28, 28).to_image().into_raw()
}

#[test]
fn a_vae_draws_samples_and_encodes_images() {
    let run = Run::new(&[SMALL, CONDITIONAL, &["job.steps=40", "optimizer.learning_rate=3e-3"]]);
    run.complete(1);
    let out = |name: &str| run.beside(name).to_str().unwrap().to_string();
    let do_it = |arguments: &[&str]| {
        let ended = worker(&run, arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?} {}", ended.output);
        ended.output
    };
    do_it(&["sample", "--count", "20", "--out", &out("samples.png")]);
    let module = do_it(&["export", "--out", &out("D.pt")]);
    assert!(module.contains("noise (n, 4) and classes (n) of int64 to images (n, 1, 28, 28)"), "{module}");
    do_it(&["eval", "--samples", "50", "--reference", "50"]);
    do_it(&["interpolate", "--count", "2", "--points", "2", "--frames", "2", "--out", &out("walk.gif")]);
    // Samples of the data, by index: digits that differ.
    do_it(&["sample", "--reconstruct", "0", "1", "2", "--out", &out("three.png")]);
    let three = run.beside("three.png");
    assert_ne!(cell(&three, 0, 0), cell(&three, 0, 1), "a reconstruction is no copy");
    assert_ne!(cell(&three, 0, 1), cell(&three, 1, 1), "and each is of its own image");
    do_it(&["sample", "--reconstruct", "--count", "13", "--out", &out("some.png")]);
    let some = image::open(run.beside("some.png")).unwrap();
    assert_eq!((some.width(), some.height()), (10 * 30 + 2, 4 * 30 + 2));
    // A picture in a file is the same image.
    let single = run.beside("one.png");
    image::GrayImage::from_raw(28, 28, cell(&three, 1, 0)).unwrap().save(&single).unwrap();
    let single = single.to_str().unwrap();
    // The second digit is a 2.
    do_it(&["sample", "--reconstruct", single, "--class", "2", "--out", &out("file.png")]);
    assert_eq!(cell(&run.beside("file.png"), 0, 1), cell(&three, 1, 1));
    do_it(&["interpolate", "--images", "0", "1", "--frames", "3", "--out", &out("between.gif")]);
    let film = std::fs::File::open(run.beside("between.gif")).unwrap();
    let mut frames = gif::DecodeOptions::new().read_info(film).unwrap();
    let mut count = 0;
    while let Some(frame) = frames.read_next_frame().unwrap() {
        assert_eq!((frame.width, frame.height), (3 * 30 + 2, 32));
        count += 1;
    }
    assert_eq!(count, 6, "there and back");
    let x = &out("x.png");
    refused(&run, &["sample", "--reconstruct", "10000", "--out", x], "the data has the samples 0 to 9999");
    refused(&run, &["sample", "--reconstruct", single, "--out", x], "give that of the image with --class");
    refused(&run, &["sample", "--reconstruct", "/no/such.png", "--class", "1", "--out", x], "/no/such.png");
}

#[test]
fn a_gan_has_no_encoder_and_says_so() {
    let run = Run::new(&[ganglion_tests::SMALL_MLP, &["job.steps=1", "job.data_shards=2"]]);
    run.complete(1);
    let out = run.beside("x").to_str().unwrap().to_string();
    refused(&run, &["sample", "--reconstruct", "--out", &out], "the run's model has no encoder");
    refused(&run, &["interpolate", "--images", "0", "1", "--out", &out], "the run's model has no encoder");
}

/// Answer of a coordinator's site.
fn get(site: &str, path: &str) -> String {
    let address = site.strip_prefix("http://").unwrap().strip_suffix('/').unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[track_caller]
fn assert_own_words(what: &str, text: &str) {
    let lower = text.to_lowercase();
    for word in ["generator", "discriminator", "adversarial"] {
        let line = lower.lines().find(|line| line.contains(word));
        assert_eq!(line, None, "{what} speaks of a {word}");
    }
}

/// Pages, records, card and terminal speak of what is trained.
#[test]
fn nothing_of_a_vae_speaks_of_a_generator_or_discriminator() {
    let evaluated = [
        "job.steps=2",
        "evaluation.with_checkpoints=true",
        "evaluation.samples=20",
        "evaluation.reference=20",
    ];
    let run = Run::new(&[SMALL, BINARISED, &evaluated]);
    let coordinator = run.start_with(&["--workers", "2", "--stay"]);
    let started = run.wait_for("coordinator_started", |_| true);
    let site = started["dashboard"].as_str().unwrap().to_string();
    run.wait_for("evaluation", |event| event["step"] == 2);
    eventually("the model card", || run.path("checkpoints/model-card.md").exists().then_some(()));
    for page in ["/", "/api/status", "/api/metrics", "/api/events", "/api/samples", "/metrics"] {
        assert_own_words(page, &get(&site, page));
    }
    for file in ["job.toml", "metrics.jsonl", "events.jsonl", "checkpoints/model-card.md"] {
        assert_own_words(file, &std::fs::read_to_string(run.path(file)).unwrap());
    }
    let card = std::fs::read_to_string(run.path("checkpoints/model-card.md")).unwrap();
    assert!(card.contains("A variational autoencoder of images") && card.contains("weights_ema"), "{card}");
    assert_own_words("status", &run.ask(&["status"]).output);
    assert_own_words("checkpoints", &run.ask(&["checkpoints"]).output);
    coordinator.signal(nix::sys::signal::Signal::SIGTERM);
    let ended = coordinator.wait();
    assert!(ended.output.contains("recon ") && ended.output.contains(" kl "), "{}", ended.output);
    assert_own_words("the terminal", &ended.output);
    // Damaged weights, and none.
    let weights = run.newest_checkpoint().join("weights_ema.safetensors");
    let out = run.beside("x.png").to_str().unwrap().to_string();
    std::fs::write(&weights, b"x").unwrap();
    refused(&run, &["sample", "--out", &out], "weights_ema.safetensors: damaged");
}

/// The figures of a run's evaluations by step.
fn bounds(run: &Run) -> Vec<(u64, Value, Value)> {
    let events = run.events().into_iter().filter(|event| event["kind"] == "evaluation");
    let of = |event: Value| {
        let metrics = &event["metrics"];
        (event["step"].as_u64().unwrap(), metrics["iwae_bound"].clone(), metrics["elbo_bound"].clone())
    };
    let mut bounds: Vec<_> = events.map(of).collect();
    bounds.sort_by_key(|(step, ..)| *step);
    bounds
}

#[test]
fn the_bound_of_held_out_images_is_a_function_of_the_job_and_chooses_the_best() {
    let digits = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-images-idx3-ubyte.gz");
    let (path, held_out) = (format!("data.path={digits}"), format!("evaluation.held_out={digits}"));
    let evaluated = [
        "job.steps=6",
        "job.shard_batch=500",
        "data.kind=idx",
        &path,
        &held_out,
        "evaluation.every_steps=3",
        "evaluation.samples=20",
        "evaluation.reference=20",
        "evaluation.importance_samples=2",
        "evaluation.best_by=iwae_bound",
    ];
    let run = |workers: u32| {
        let run = Run::new(&[SMALL, BINARISED, &evaluated]);
        run.complete(workers);
        run
    };
    let (one, three) = (run(1), run(3));
    assert_eq!(bounds(&one), bounds(&three));
    let told = bounds(&one);
    assert_eq!(told.iter().map(|(step, ..)| *step).collect::<Vec<_>>(), [3, 6]);
    for (_, importance, single) in &told {
        assert!(importance.as_f64().unwrap() < single.as_f64().unwrap(), "{told:?}");
    }
    let best = std::fs::read_to_string(one.path("checkpoints/best.json")).unwrap();
    assert!(best.contains("iwae_bound"), "{best}");
    // The same bound by the command.
    let sized = ["eval", "--json", "--samples", "20", "--reference", "20", "--held-out", digits];
    let ended = worker(&one, &sized);
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    let own: Value = serde_json::from_str(&ended.output[ended.output.find('{').unwrap()..]).unwrap();
    assert_eq!(own["judged"][0]["metrics"]["iwae_bound"], told[1].1, "{own}");
}
