//! Transformers: the same bits whatever the cluster, text and pictures that they draw, and wrong input.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::process::Command;

use ganglion_tests::{Ended, Process, Reference, Run, program};
use serde_json::Value;

const SMALL: &[&str] = &[
    "model.kind=transformer",
    "model.width=16",
    "model.layers=2",
    "model.heads=2",
    "job.data_shards=4",
    "job.shard_batch=4",
    "metrics.every_steps=1",
];
const PIXELS: &[&str] = &["data.resize=6", "data.levels=4"];

/// A run over a short text, with these settings.
fn over_text(settings: &[&[&str]]) -> Run {
    let path = format!("data.path={}", file("data/kjv/README.md"));
    let of_text = ["data.kind=text", "data.context=12", &path];
    Run::new(&[&[SMALL, &of_text], settings].concat())
}

/// Path of a file of the project.
fn file(name: &str) -> String {
    format!("{}/../{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_transformer_has_the_same_bits_on_1_to_3_workers() {
    let dropout: &[&str] = &["model.dropout=0.2", "model.positions=rotary", "model.activation=swiglu"];
    let bf16: &[&str] = &["job.precision=bf16"];
    let conditional: &[&str] = &["model.conditional=true"];
    for (pixels, case) in [(false, dropout), (true, bf16), (true, conditional)] {
        let steps: &[&str] = &["job.steps=4"];
        let run = || if pixels { Run::new(&[SMALL, PIXELS, case, steps]) } else { over_text(&[case, steps]) };
        let reference = Reference::new(&format!("1 worker with {case:?}"), run().complete(1));
        for workers in [2, 3] {
            reference.equals(&format!("{workers} workers with {case:?}"), &run().complete(workers));
        }
    }
}

#[test]
fn a_transformer_has_the_same_bits_through_a_kill_and_a_resume() {
    let run = |steps: &str| over_text(&[&["model.dropout=0.1", "job.failure_deadline=2", steps]]);
    let one = run("job.steps=10");
    let reference = Reference::new("1 worker", one.complete(1));
    let killed = run("job.steps=10").with_failpoints();
    let digest = killed.complete_with_a_death(3, "commit@5");
    reference.equals("3 workers of which one was killed", &digest);
    let mut resumed = run("job.steps=6");
    resumed.complete(2);
    resumed.set("job.steps=10");
    resumed.complete(1);
    reference.equals("2 workers, then 1", &resumed.digest());
    let computed = |run: &Run| -> Vec<String> {
        let of = |row: &Value| {
            ["step", "ledger", "nll", "bits_per_byte"].map(|name| row[name].to_string()).join(" ")
        };
        run.rows().iter().map(of).collect()
    };
    for run in [&one, &killed, &resumed] {
        run.assert_audited();
        assert_eq!(computed(run), computed(&one));
    }
}

fn worker(run: &Run, arguments: &[&str]) -> Ended {
    let mut command = Command::new(program("worker"));
    command.arg(arguments[0]).arg(run.path("")).args(&arguments[1..]);
    Process::start(command).wait()
}

fn told(run: &Run, arguments: &[&str]) -> String {
    let ended = worker(run, arguments);
    assert_eq!(ended.code, Some(0), "{arguments:?} {}", ended.output);
    ended.output
}

#[track_caller]
fn refused(run: &Run, arguments: &[&str], says: &str) {
    let ended = worker(run, arguments);
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(ended.output.contains(says), "{says}\n{}", ended.output);
}

#[test]
fn a_transformer_writes_text() {
    let steps: &[&str] = &["job.steps=60", "optimizer.learning_rate=0.01", "sample.every_steps=30"];
    let run = over_text(&[steps]);
    run.complete(1);
    let texts = fs::read_to_string(run.path("samples/step-00000060.txt")).unwrap();
    assert!(texts.starts_with("--- 1 of 5 ---\n"), "{texts}");
    let samples = run.events().into_iter().filter(|event| event["kind"] == "samples");
    assert_eq!(
        samples.map(|event| event["file"].to_string()).collect::<Vec<_>>(),
        ["\"samples/step-00000030.txt\"", "\"samples/step-00000060.txt\""]
    );
    // The same text as in the file, as the draws are the same.
    let once = told(&run, &["sample", "--seed", "3", "--tokens", "40", "--prompt", "The "]);
    assert_eq!(once, told(&run, &["sample", "--seed", "3", "--tokens", "40", "--prompt", "The "]));
    assert!(once.starts_with("The ") && once.trim_end().len() >= 40, "{once}");
    assert_ne!(once, told(&run, &["sample", "--seed", "4", "--tokens", "40", "--prompt", "The "]));
    let greedy = |seed: &str| told(&run, &["sample", "--seed", seed, "--tokens", "30", "--top-k", "1"]);
    assert_eq!(greedy("1"), greedy("2"));
    let file = run.beside("out.txt");
    told(
        &run,
        &["sample", "--seed", "3", "--tokens", "40", "--prompt", "The ", "--out", file.to_str().unwrap()],
    );
    assert_eq!(fs::read_to_string(&file).unwrap().trim_end(), once.trim_end());
    let long = "long ".repeat(20);
    let warned = told(&run, &["sample", "--tokens", "3", "--prompt", &long]);
    assert!(warned.contains("--prompt has 100 tokens; the model sees the last 12"), "{warned}");
    refused(&run, &["sample", "--prompt", ""], "--prompt: it is empty");
    refused(&run, &["sample", "--top-k", "257"], "--top-k 257: the model knows 256 tokens");
    refused(&run, &["sample", "--complete", "--out", "x.png"], "--complete is for images");
    refused(&run, &["interpolate", "--out", "x.gif"], "the run trains a transformer");
    let exported = run.beside("t.safetensors");
    told(&run, &["export", "--out", exported.to_str().unwrap()]);
    let bytes = fs::read(exported).unwrap();
    let header = String::from_utf8_lossy(&bytes[..2000]);
    assert!(header.contains("transformer.h.0.attn.c_attn.weight"), "{header}");
}

#[test]
fn a_transformer_draws_and_completes_images() {
    let evaluated: &[&str] =
        &["evaluation.every_steps=2", "evaluation.samples=20", "evaluation.reference=20"];
    let run =
        Run::new(&[SMALL, PIXELS, evaluated, &["job.steps=2", "sample.count=20", "model.conditional=true"]]);
    run.complete(1);
    assert!(run.path("samples/step-00000002.png").exists());
    let picture = |name: &str, arguments: &[&str]| {
        let file = run.beside(name);
        told(&run, &[&["sample", "--out", file.to_str().unwrap()], arguments].concat());
        image::open(file).unwrap().into_luma8()
    };
    let many = picture("many.png", &["--count", "40", "--class", "3"]);
    assert_eq!((many.width(), many.height()), (10 * 8 + 2, 4 * 8 + 2));
    // Sample i depends on i alone, not on how many there are.
    let few = picture("few.png", &["--count", "10", "--class", "3"]);
    let cell =
        |from: &image::GrayImage, at: u32| image::imageops::crop_imm(from, 2 + 8 * at, 2, 6, 6).to_image();
    assert!((0..10).all(|at| cell(&many, at) == cell(&few, at)));
    let completed = picture("half.png", &["--count", "20", "--complete"]);
    assert_eq!((completed.width(), completed.height()), (10 * 8 + 2, 2 * 8 + 2));
    let rows = |at: u32, range: std::ops::Range<u32>| {
        let cell = cell(&completed, at);
        range
            .flat_map(|y| (0..6).map(move |x| (x, y)))
            .map(|(x, y)| cell.get_pixel(x, y).0[0])
            .collect::<Vec<u8>>()
    };
    // All have the upper half of the original; the second column has nothing below it.
    assert!((1..10).all(|at| rows(at, 0..3) == rows(0, 0..3)));
    assert!(rows(1, 3..6).iter().all(|pixel| *pixel == 0));
    refused(&run, &["sample", "--prompt", "x", "--out", "x.png"], "--prompt is for text");
    refused(&run, &["sample"], "give --out FILE.png, or --folder DIR");
}

#[test]
fn settings_that_make_no_transformer_are_refused() {
    let text: &[&str] = &["data.kind=text", "data.path=/no/such/text"];
    for (settings, says) in [
        (&["model.heads=3"][..], "is 3, which does not divide model.width = 16"),
        (&["model.heads=16", "model.positions=rotary"], "a head has 1 numbers"),
        (&["data.levels=1"], "data.levels"),
        (&["model.dropout=1"], "model.dropout"),
        (&["model.kind=mlp-28", "data.levels=4"], "data.levels"),
        (&[text, &["data.levels=4"]].concat(), "gives none; remove it"),
    ] {
        let run = Run::new(&[SMALL, PIXELS, settings]);
        let ended = run.start(1).wait();
        assert_eq!(ended.code, Some(2), "{settings:?}: {}", ended.output);
        assert!(ended.output.contains(says), "{settings:?}: {}", ended.output);
    }
}

#[test]
fn a_transformer_without_held_out_samples_is_not_evaluated() {
    let run = over_text(&[&["job.steps=1"]]);
    run.complete(1);
    refused(&run, &["eval"], "give them with --held-out");
    refused(&run, &["eval", "--held-out", "nothing.txt"], "nothing.txt");
}

#[test]
fn held_out_text_is_evaluated() {
    let held_out = format!("evaluation.held_out={}", file("LICENSE"));
    let run = over_text(&[&["job.steps=4", "evaluation.every_steps=2", &held_out]]);
    run.complete(1);
    let rows: Vec<Value> = run.events().into_iter().filter(|event| event["kind"] == "evaluation").collect();
    assert_eq!(rows.len(), 2);
    // The same samples and draws as beside training, so the same figures to the last bit.
    let evaluated = |arguments: &[&str]| -> Value {
        let told = told(&run, &[&["eval", "--json"], arguments].concat());
        serde_json::from_str(&told[told.find('{').unwrap()..]).unwrap()
    };
    let own = evaluated(&[]);
    assert_eq!(own["judged"][0]["metrics"], rows[1]["metrics"], "{own}");
    assert_eq!(own, evaluated(&["--held-out", &file("LICENSE")]));
    assert_ne!(own["judged"], evaluated(&["--held-out", &file("SECURITY.md")])["judged"]);
    for row in rows {
        let [nll, bits] = ["nll", "bits_per_byte"].map(|name| row["metrics"][name].as_f64().unwrap());
        assert!((nll / std::f64::consts::LN_2 - bits).abs() < 1e-9 && (3.0..9.0).contains(&bits), "{row}");
    }
}
