//! Packages: objectives that were compiled ahead of time, trained without PyTorch. Their graphs are written
//! in C (`src/graph.c`); where `GANGLION_PYTORCH` is set, also by PyTorch.
#![allow(clippy::unwrap_used)] // a test may panic

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ganglion_tests::package::{Fault, Source, bigrams, classifier, gan, npy, regression};
use ganglion_tests::{Ended, Process, Reference, Run, program, send};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// A run of a package, in whose folder the job and the package lie.
struct Packaged {
    run: Run,
    job: String,
}

impl Packaged {
    fn new(source: &Source, settings: &[&str]) -> Packaged {
        Packaged::with(source, Fault::None, settings)
    }

    fn with(source: &Source, fault: Fault, settings: &[&str]) -> Packaged {
        Packaged::of(|path| source.write(path, fault), settings)
    }

    /// A run of the package that `write` writes into a file.
    fn of(write: impl Fn(&Path), settings: &[&str]) -> Packaged {
        let run = Run::new(&[settings]);
        write(&run.beside("x.pt2"));
        let text = "[job]\nsteps = 20\ndata_shards = 4\nfailure_deadline = 2\n[data]\nkind = \"mnist-10k\"\n\
                    [model]\nkind = \"package\"\npath = \"x.pt2\"\n[metrics]\nevery_steps = 1\n";
        std::fs::write(run.beside("job.toml"), text).unwrap();
        let job = run.beside("job.toml").display().to_string();
        Packaged { run, job }
    }

    fn path(&self) -> PathBuf {
        self.run.beside("x.pt2")
    }

    fn start(&self, workers: u32) -> Process {
        self.run.start_with(&["--config", &self.job, "--workers", &workers.to_string()])
    }

    fn complete(&self, workers: u32) -> String {
        let ended = self.start(workers).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        self.run.digest()
    }

    /// Ends with exit code 2 and these words.
    #[track_caller]
    fn assert_refused(&self, words: &[&str]) {
        assert_refused(&self.start(1).wait(), words);
    }

    fn worker(&self, command: &str, arguments: &[&str]) -> Output {
        let run = self.run.path("");
        Command::new(program("worker")).arg(command).arg(run).args(arguments).output().unwrap()
    }
}

#[track_caller]
fn assert_refused(ended: &Ended, words: &[&str]) {
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    words.iter().for_each(|word| assert!(ended.output.contains(word), "{word:?}: {}", ended.output));
}

#[track_caller]
fn assert_answers(output: &Output, code: i32, words: &[&str]) {
    let told =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{told}");
    words.iter().for_each(|word| assert!(told.contains(word), "{word:?}: {told}"));
}

/// Same bits on 1, 2 and 3 workers, through a kill, and through a stop in the middle.
fn has_the_same_bits(write: &dyn Fn(&Path)) {
    has_the_same_bits_on(&[], write);
}

/// The same with these settings of the data.
fn has_the_same_bits_on(data: &[String], write: &dyn Fn(&Path)) {
    let data: Vec<&str> = data.iter().map(String::as_str).collect();
    let settings = [&["job.steps=300", "checkpoint.every_steps=40"], data.as_slice()].concat();
    let packaged = || Packaged::of(write, &settings);
    let reference = Reference::new("1 worker", packaged().complete(1));
    reference.equals("2 workers", &packaged().complete(2));
    let disturbed = packaged();
    let coordinator = disturbed.start(3);
    disturbed.run.wait_for("checkpoint", |_| true);
    send(disturbed.run.pids(1)[1], Signal::SIGKILL);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    reference.equals("3 workers, one of them killed", &disturbed.run.digest());
    disturbed.run.assert_audited();
    let stopped = packaged();
    let coordinator = stopped.start(3);
    stopped.run.wait_for_step(1);
    coordinator.signal(Signal::SIGINT);
    assert_eq!(coordinator.wait().code, Some(130));
    reference.equals("stopped, and gone on with 2 workers", &stopped.complete(2));
}

#[test]
fn a_gan_has_the_same_bits_on_1_to_3_workers_and_through_a_kill_and_a_stop() {
    has_the_same_bits(&|path| gan().write(path, Fault::None));
}

#[test]
fn a_classifier_has_the_same_bits_on_1_to_3_workers_and_through_a_kill_and_a_stop() {
    has_the_same_bits(&|path| classifier().write(path, Fault::None));
}

/// A folder with a text and with arrays, each of 1,000 samples.
fn rows() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: Vec<u8> = (0..16_001_u32).map(|place| (place * place / 7 % 251) as u8).collect();
    std::fs::write(folder.path().join("a.txt"), text).unwrap();
    let arrays = folder.path().join("arrays");
    std::fs::create_dir(&arrays).unwrap();
    let numbers = |count: u16| (0..count).map(|index| (f32::from(index) * 12.9898).sin());
    let x: Vec<u8> = numbers(3000).flat_map(f32::to_le_bytes).collect();
    let wide: Vec<u8> = numbers(2000).flat_map(|number| f64::from(number).to_le_bytes()).collect();
    let y: Vec<u8> = (0..1000_i64).flat_map(|index| (index % 3).to_le_bytes()).collect();
    for (name, bytes) in [
        ("x", npy("<f4", "(1000, 3)", &x)),
        ("wide", npy("<f8", "(1000, 2)", &wide)),
        ("y", npy("<i8", "(1000,)", &y)),
        ("spare", npy("<i8", "(1000,)", &y)),
    ] {
        std::fs::write(arrays.join(format!("{name}.npy")), bytes).unwrap();
    }
    folder
}

/// Settings of the text and of the arrays in that folder.
fn data_of(folder: &tempfile::TempDir) -> [Vec<String>; 2] {
    let at = |name: &str| format!("data.path={}", folder.path().join(name).display());
    [vec!["data.kind=text".to_owned(), at("a.txt")], vec!["data.kind=arrays".to_owned(), at("arrays")]]
}

#[test]
fn text_gives_the_same_bits_on_1_to_3_workers_and_through_a_kill_and_a_stop() {
    has_the_same_bits_on(&data_of(&rows())[0], &|path| bigrams().write(path, Fault::None));
}

#[test]
fn arrays_give_the_same_bits_on_1_to_3_workers_and_through_a_kill_and_a_stop() {
    has_the_same_bits_on(&data_of(&rows())[1], &|path| regression().write(path, Fault::None));
}

#[test]
fn data_of_another_kind_than_the_package_takes_are_refused() {
    let folder = rows();
    let [text, arrays] = data_of(&folder);
    let (small, names) = (vec!["data.context=8".to_owned()], vec!["data.names=[\"x\", \"y\"]".to_owned()]);
    let changed = |mut source: Source, pointer: &str, value: Value| {
        *source.manifest.pointer_mut(pointer).unwrap() = value;
        source
    };
    let few = changed(bigrams(), "/data/tokens/vocabulary", json!(100));
    let other = changed(regression(), "/data/arrays/0/kind", json!("float16"));
    for (source, settings, words) in [
        (bigrams(), vec![], "takes tokens, which data.kind = \"text\" gives, but data.kind is \"mnist-10k\""),
        (gan(), text.clone(), "the package takes images, but data.kind is \"text\""),
        (regression(), text.clone(), "takes arrays, which data.kind = \"arrays\" gives"),
        (bigrams(), [text.clone(), small].concat(), "is 8, and the package was exported for 16"),
        (few, text, "takes tokens below 100, and the data has 256 different ones"),
        (regression(), [arrays.clone(), names].concat(), "the package also takes the array wide"),
        (other, arrays, "takes the array x (3 float16), and the data has x (3 float32)"),
    ] {
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        Packaged::new(&source, &settings).assert_refused(&[words]);
    }
}

/// Packages of PyTorch's own: a conditional GAN with batch normalisation, dropout and a lazy penalty, and a
/// classifier.
#[test]
fn packages_of_pytorch_have_the_same_bits_and_can_be_used() {
    if std::env::var_os("GANGLION_PYTORCH").is_none() {
        eprintln!("SKIPPED: packages of PyTorch's own need PyTorch for Python: `make test-pytorch`");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/pytorch/small.py");
    let exported = Command::new("python3").arg(script).arg(folder.path()).output().unwrap();
    assert!(exported.status.success(), "{}", String::from_utf8_lossy(&exported.stderr));
    let copied = |name: &'static str| {
        let from = folder.path().join(name);
        move |to: &Path| {
            std::fs::copy(&from, to).unwrap();
        }
    };
    ["gan.pt2", "classifier.pt2"].iter().for_each(|name| has_the_same_bits(&copied(name)));
    let trained = Packaged::of(copied("gan.pt2"), &["job.steps=7"]);
    trained.complete(2);
    let scalars = ["discriminator_loss", "generator_loss", "penalty_loss", "score_real"];
    assert_eq!(names(&trained.run.rows()[6]), scalars);
    let [picture, film] = ["a.png", "film.gif"].map(|name| trained.run.beside(name).display().to_string());
    assert_answers(&trained.worker("sample", &["--out", &picture, "--class", "7"]), 0, &[&picture]);
    let few = ["--out", &film, "--count", "5", "--points", "2", "--frames", "2"];
    assert_answers(&trained.worker("interpolate", &few), 0, &[&film]);
    let refused = trained.worker("sample", &["--out", &picture, "--class", "10"]);
    assert_answers(&refused, 2, &["knows the classes 0 to 9"]);
}

/// Scalars of a row, but for the settings that move.
fn names(row: &Value) -> Vec<&str> {
    let fixed = ["step", "images_seen", "ledger", "epoch", "time", "generation", "world_size", "profile"];
    let keys = row.as_object().unwrap().keys().map(String::as_str);
    keys.filter(|key| !fixed.contains(key) && *key != "images_per_second").collect()
}

#[test]
fn scalars_settings_and_weights_go_by_the_names_of_the_package() {
    let settings: &[&str] = &[
        "optimizer.decay_images=160",
        "optimizer.generator.final_learning_rate=0",
        "optimizer.learning_rate=0.02",
    ];
    let trained = Packaged::new(&gan(), settings);
    trained.complete(2);
    let rows = trained.run.rows();
    assert_eq!(names(&rows[0]), ["discriminator_loss", "generator_loss", "setting_learning_rate_generator"]);
    let rates: Vec<f64> =
        [&rows[0], &rows[19]].map(|row| row["setting_learning_rate_generator"].as_f64().unwrap()).to_vec();
    assert!((0.01..0.02).contains(&rates[0]) && rates[1] == 0.0, "{rates:?}");
    // The discriminator tells apart what is real: its loss falls.
    let losses = [&rows[0], &rows[19]].map(|row| row["discriminator_loss"].as_f64().unwrap());
    assert!(losses[1] < losses[0], "{losses:?}");
    let job = std::fs::read_to_string(trained.run.path("job.toml")).unwrap();
    assert!(job.contains("[optimizer.discriminator]\n") && !job.contains("[loss]"), "{job}");
    let weights = std::fs::read(trained.run.newest_checkpoint().join("weights_ema.safetensors")).unwrap();
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let mut found = weights.names();
    found.sort_unstable();
    assert_eq!(found, ["d.v", "g.a", "g.c"]);
}

#[test]
fn what_a_package_draws_is_drawn_by_the_commands() {
    let trained = Packaged::new(&gan(), &["job.steps=6", "checkpoint.every_steps=3", "sample.every_steps=3"]);
    trained.complete(1);
    assert!(trained.run.path("samples/step-00000003.png").exists());
    let out = |name: &str| trained.run.beside(name).display().to_string();
    let read = |name: &str| std::fs::read(trained.run.beside(name)).unwrap();
    for (name, arguments) in
        [("a.png", &[][..]), ("b.png", &[]), ("c.png", &["--seed", "1"]), ("d.png", &["--count", "70"])]
    {
        let out = out(name);
        let arguments = [&["--out", out.as_str()], arguments].concat();
        assert_answers(&trained.worker("sample", &arguments), 0, &[&out]);
    }
    assert_eq!(read("a.png"), read("b.png"));
    assert_ne!(read("a.png"), read("c.png"));
    let folder = out("images");
    assert_answers(&trained.worker("sample", &["--folder", &folder, "--count", "23"]), 0, &[]);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 23);
    // A sample depends on its number, and not on how many are drawn.
    let fewer = out("fewer");
    assert_answers(&trained.worker("sample", &["--folder", &fewer, "--count", "4"]), 0, &[]);
    assert_eq!(read("fewer/000003.png"), read("images/000003.png"));
    assert_ne!(read("images/000003.png"), read("images/000022.png"));
    let film = out("film.gif");
    let few = ["--out", &film, "--count", "25", "--points", "2", "--frames", "2"];
    assert_answers(&trained.worker("interpolate", &few), 0, &[&film]);
    let figures = ["--features", "pixels", "--samples", "50", "--reference", "100"];
    assert_answers(&trained.worker("eval", &figures), 0, &["50 samples against 100 real ones"]);
    assert_answers(&trained.worker("export", &["--out", &out("g.pt")]), 2, &["ganglion.load(run)"]);
    let refused = trained.worker("sample", &["--out", &film, "--truncation", "2"]);
    assert_answers(&refused, 2, &["--truncation: a package draws its own noise"]);
    // The package moves, and is changed.
    let moved = trained.run.beside("y.pt2");
    std::fs::rename(trained.path(), &moved).unwrap();
    let moved = moved.display().to_string();
    assert_answers(&trained.worker("sample", &["--out", &film]), 2, &["give its place with --package FILE"]);
    assert_answers(&trained.worker("sample", &["--out", &film, "--package", &moved]), 0, &[]);
    let mut other = gan();
    other.manifest["shard_batch"] = json!(5);
    other.write(Path::new(&moved), Fault::None);
    let refused = trained.worker("sample", &["--out", &film, "--package", &moved]);
    assert_answers(&refused, 2, &["is another package: it was changed since the run"]);
}

#[test]
fn a_package_without_samples_trains_and_says_so_where_samples_are_asked_for() {
    let trained = Packaged::new(&classifier(), &["job.steps=60"]);
    trained.complete(2);
    let rows = trained.run.rows();
    let accuracy = |row: &Value| row["accuracy"].as_f64().unwrap();
    assert!(accuracy(&rows[59]) > 0.5 && accuracy(&rows[0]) < 0.5, "{rows:?}");
    let out = trained.run.beside("a.png").display().to_string();
    assert_answers(
        &trained.worker("sample", &["--out", &out]),
        2,
        &["draws no samples", "sample(self, draw, n)"],
    );
    trained.run.assert_audited();
}

#[test]
fn held_out_samples_are_evaluated_and_the_best_checkpoint_is_chosen_by_them() {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-images-idx3-ubyte.gz");
    let (path, held_out) = (format!("data.path={data}"), format!("evaluation.held_out={data}"));
    let settings: &[&str] = &[
        "data.kind=idx",
        &path,
        &held_out,
        "job.steps=60",
        "checkpoint.every_steps=20",
        "evaluation.with_checkpoints=true",
        "evaluation.best_by=held_out_accuracy",
        "evaluation.best_goal=max",
    ];
    let trained = Packaged::new(&classifier(), settings);
    trained.complete(2);
    let evaluated = trained.run.events().into_iter().filter(|event| event["kind"] == "evaluation");
    let accuracies: Vec<f64> =
        evaluated.map(|event| event["metrics"]["held_out_accuracy"].as_f64().unwrap()).collect();
    assert_eq!(accuracies.len(), 3);
    assert!(accuracies.iter().all(|accuracy| (0.3..1.0).contains(accuracy)), "{accuracies:?}");
    let best = std::fs::read(trained.run.path("checkpoints/best.json")).unwrap();
    let best: Value = serde_json::from_slice(&best).unwrap();
    let most = accuracies.iter().copied().fold(0.0, f64::max);
    assert_eq!(best["metrics"]["held_out_accuracy"].as_f64(), Some(most));
    let card = trained.run.path("checkpoints/model-card.md");
    let card = std::fs::read_to_string(card).unwrap();
    assert!(card.contains("from a package") && card.contains("weights_ema.safetensors"), "{card}");
}

#[test]
fn a_graph_that_does_not_do_what_its_manifest_says_is_refused_before_training() {
    for (fault, words) in [
        (Fault::Fails, &["x.pt2 fails in training"][..]),
        (Fault::NanGradient, &["gradient of classifier.weight is not finite at the start"]),
        (Fault::Forgets, &["gradient of classifier.weight is another the second time"]),
        (Fault::WrongShape, &["gradient of classifier.weight", "[11, 784]", "[10, 784]"]),
        (Fault::WrongKind, &["gradient of classifier.bias is Double"]),
    ] {
        Packaged::with(&classifier(), fault, &[]).assert_refused(words);
    }
    let later = Packaged::with(&classifier(), Fault::FailsLater, &[]);
    later.assert_refused(&["x.pt2 fails in training: ", "the compiled graph failed"]);
    assert!(later.run.rows().len() > 1, "it has trained before");
    let hangs = Packaged::with(&classifier(), Fault::Hangs, &[]);
    let mut command = hangs.run.command(&["--config", &hangs.job, "--workers", "1"]);
    command.env("GANGLION_MODULE_LIMIT", "2");
    assert_refused(&Process::start(command).wait(), &["its check takes longer than 2 s"]);
}

#[test]
fn a_package_for_another_machine_job_or_data_is_refused() {
    let changed = |pointer: &str, value: Value| {
        let mut source = classifier();
        *source.manifest.pointer_mut(pointer).unwrap() = value;
        source
    };
    for (pointer, value, words) in [
        ("/torch", json!("2.99.0"), "with PyTorch 2.99.0, and this worker runs PyTorch 2.11.0"),
        ("/cpu/features", json!(["amx_future"]), "a processor with amx_future, which this machine's lacks"),
        ("/cpu/arch", json!("riscv64"), "was compiled for riscv64 processors"),
        (
            "/data/classes",
            json!(7),
            "for data of 7 classes, and the data has 10; export it again with classes=10",
        ),
        (
            "/networks/0/buffers/0/shape",
            json!([3]),
            "first weights that do not fit its manifest: classifier.mean",
        ),
        ("/data/images/height", json!(29), "takes images of 29 x 28, and the data gives 28 x 28"),
    ] {
        Packaged::new(&changed(pointer, value), &[]).assert_refused(&[words]);
    }
    let mut for_gpus = classifier();
    for_gpus.manifest["device"] = json!("cuda");
    for_gpus.manifest["capability"] = json!("9.0");
    for_gpus.manifest["cuda"] = json!("13.0");
    Packaged::new(&for_gpus, &[])
        .assert_refused(&["was exported for GPUs, and this worker computes on a CPU"]);
    Packaged::new(&classifier(), &["job.shard_batch=8"]).assert_refused(&["the package was exported for 4"]);
    Packaged::new(&classifier(), &["loss.kind=hinge"])
        .assert_refused(&["loss.kind", "a package has its own"]);
    let cut = Packaged::new(&classifier(), &[]);
    let bytes = std::fs::read(cut.path()).unwrap();
    std::fs::write(cut.path(), &bytes[..bytes.len() / 2]).unwrap();
    cut.assert_refused(&["x.pt2: is a zip file that is cut off or damaged, not a package"]);
}

#[test]
fn a_changed_package_is_refused_at_a_resume_and_by_a_worker_that_has_another() {
    let stopped = Packaged::new(&gan(), &["job.steps=100000"]);
    let coordinator = stopped.start(1);
    stopped.run.wait_for_step(3);
    coordinator.signal(Signal::SIGINT);
    assert_eq!(coordinator.wait().code, Some(130));
    let mut changed = gan();
    changed.manifest["phases"][0]["optimizer"]["learning_rate"] = json!(0.5);
    let whole = std::fs::read(stopped.path()).unwrap();
    changed.write(&stopped.path(), Fault::None);
    stopped
        .assert_refused(&["the package was changed since the run began", "put the run's own package back"]);
    std::fs::write(stopped.path(), whole).unwrap();
    // The coordinator has read the run's own package before a worker reads another.
    let coordinator = stopped.run.start_with(&["--config", &stopped.job, "--workers", "0"]);
    let started = stopped.run.wait_for("coordinator_started", |event| event["term"] == 2);
    changed.write(&stopped.path(), Fault::None);
    let ended = Process::worker(started["address"].as_str().unwrap()).wait();
    assert_refused(&ended, &["is another package than the run's"]);
    coordinator.signal(Signal::SIGTERM);
    coordinator.wait();
}

/// A tokenizer with these words.
fn tokenizer(words: &[&str]) -> String {
    let vocabulary: serde_json::Map<String, Value> =
        words.iter().zip(0..).map(|(word, number)| ((*word).to_owned(), json!(number))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
    })
    .to_string()
}

#[test]
fn a_run_goes_on_with_its_own_tokenizer_alone() {
    let folder = rows();
    let text = folder.path().join("words.txt");
    std::fs::write(&text, "one two three two one\n".repeat(200)).unwrap();
    let file = folder.path().join("tokenizer.json");
    let [own, other] = [&["?", "one", "two", "three"][..], &["?", "two", "one", "three"]].map(tokenizer);
    std::fs::write(&file, &own).unwrap();
    let settings = [format!("data.path={}", text.display()), format!("data.tokenizer={}", file.display())];
    let settings: Vec<&str> = ["data.kind=text", "job.steps=100000"]
        .into_iter()
        .chain(settings.iter().map(String::as_str))
        .collect();
    let stopped = Packaged::new(&bigrams(), &settings);
    let coordinator = stopped.start(1);
    stopped.run.wait_for_step(3);
    coordinator.signal(Signal::SIGINT);
    assert_eq!(coordinator.wait().code, Some(130));
    let data = stopped.run.wait_for("data", |_| true);
    assert_eq!((&data["found"]["tokens"], &data["found"]["vocabulary"]), (&json!(1000), &json!(4)));
    std::fs::write(&file, &other).unwrap();
    stopped.assert_refused(&[
        "the tokenizer was changed since the run began",
        "put the run's own tokenizer back",
    ]);
    std::fs::write(&file, &own).unwrap();
    // The coordinator has read the run's own before a worker reads another.
    let coordinator = stopped.run.start_with(&["--config", &stopped.job, "--workers", "0"]);
    let started = stopped.run.wait_for("coordinator_started", |event| event["term"] == 2);
    std::fs::write(&file, &other).unwrap();
    let ended = Process::worker(started["address"].as_str().unwrap()).wait();
    assert_refused(&ended, &["is another tokenizer than the run's", "put the same file there"]);
    coordinator.signal(Signal::SIGTERM);
    coordinator.wait();
}

#[test]
fn a_package_may_move_between_a_stop_and_the_next_start_and_begin_with_the_weights_of_another_run() {
    let settings: &[&str] = &["job.steps=400"];
    let reference = Reference::new("in place", Packaged::new(&gan(), settings).complete(1));
    let mut moved = Packaged::new(&gan(), settings);
    let coordinator = moved.start(2);
    moved.run.wait_for_step(1);
    coordinator.signal(Signal::SIGINT);
    assert_eq!(coordinator.wait().code, Some(130));
    let elsewhere = moved.run.beside("y.pt2");
    std::fs::rename(moved.path(), &elsewhere).unwrap();
    moved.assert_refused(&["model.path", "x.pt2: cannot be read"]);
    moved.run.set(&format!("model.path={}", elsewhere.display()));
    reference.equals("elsewhere", &moved.complete(1));
    let initial = format!("model.init_from={}", moved.run.newest_checkpoint().display());
    let continued = Packaged::new(&gan(), &["job.steps=1", &initial]);
    continued.complete(1);
    let loss =
        |packaged: &Packaged, row: usize| packaged.run.rows()[row]["discriminator_loss"].as_f64().unwrap();
    // Not that of the first step, and near to that of the last.
    let apart = |row| (loss(&continued, 0) - loss(&moved, row)).abs();
    assert!(apart(399) < apart(0), "{} {}", apart(399), apart(0));
}

#[test]
fn graphs_are_unpacked_where_they_may_run_and_nothing_is_left() {
    let trained = Packaged::new(&gan(), &["job.steps=4"]);
    let folder = trained.run.beside("tmp");
    std::fs::create_dir(&folder).unwrap();
    let start = |tmp: &Path| {
        let mut command = trained.run.command(&["--config", &trained.job, "--workers", "2"]);
        command.env("TMPDIR", tmp);
        Process::start(command).wait()
    };
    let refused = start(&trained.run.beside("absent"));
    assert_refused(&refused, &["cannot be unpacked into", "set TMPDIR to a folder with room"]);
    let ended = start(&folder);
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
}
