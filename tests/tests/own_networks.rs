//! Networks written in Python, with batch normalisation, dropout and spectral normalisation.
#![allow(clippy::unwrap_used)] // a test may panic

use std::io::{Cursor, Read, Write};

use ganglion_tests::{Reference, Run, program, send};
use nix::sys::signal::Signal;

fn file(name: &str) -> String {
    format!("{}/networks/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A run of both networks, or with another discriminator.
fn run(discriminator: &str, settings: &[&str]) -> Run {
    let (generator, discriminator) = (file("G.pt"), file(discriminator));
    let networks = [format!("model.generator={generator}"), format!("model.discriminator={discriminator}")];
    let own: &[&str] = &["model.kind=script", "model.latent_dim=8", "job.shard_batch=3", "job.data_shards=5"];
    Run::new(&[own, &[&networks[0], &networks[1]], settings])
}

#[test]
fn they_have_the_same_bits_on_1_to_3_workers_and_through_a_kill() {
    let settings: &[&str] = &["job.steps=200", "checkpoint.every_steps=40", "job.failure_deadline=2"];
    let undisturbed = run("D.pt", settings);
    let reference = Reference::new("1 worker", undisturbed.complete(1));
    reference.equals("2 workers", &run("D.pt", settings).complete(2));
    let disturbed = run("D.pt", settings);
    let coordinator = disturbed.start(3);
    disturbed.wait_for("checkpoint", |_| true);
    send(disturbed.pids(1)[1], Signal::SIGKILL);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    reference.equals("3 workers, one of them killed", &disturbed.digest());
    disturbed.assert_audited();
    let picture = undisturbed.beside("picture.png");
    let sampled = std::process::Command::new(program("worker"))
        .args(["sample", "--count", "10"])
        .arg(undisturbed.path(""))
        .arg("--out")
        .arg(&picture)
        .status();
    assert!(sampled.unwrap().success() && picture.exists());
}

#[test]
fn penalties_and_several_updates_have_the_same_bits_too() {
    let settings: &[&str] = &["job.steps=3", "loss.kind=wasserstein-gp", "loss.discriminator_steps=2"];
    let reference = Reference::new("1 worker", run("D.pt", settings).complete(1));
    reference.equals("3 workers", &run("D.pt", settings).complete(3));
}

#[test]
fn what_cannot_be_trained_is_named() {
    let cases = [
        ("refused/sigmoid.pt", "ends in a sigmoid"),
        ("refused/counts.pt", "BatchNorm(momentum=None)"),
        ("refused/two-numbers.pt", "it must make one number of each"),
        ("refused/double.pt", "1.weight has numbers of type Double"),
        ("refused/traced.pt", "save it with torch.jit.script"),
        ("G.pt", "model.discriminator"),
        ("make.py", "is a text file, not a TorchScript module"),
        ("absent.pt", "is no file"),
    ];
    for (discriminator, said) in cases {
        let ended = run(discriminator, &["job.steps=3"]).start(1).wait();
        assert_eq!(ended.code, Some(2), "{discriminator}: {}", ended.output);
        assert!(ended.output.contains(said), "{discriminator}: {}", ended.output);
    }
    let ended = run("D.pt", &["job.steps=3", "job.precision=bf16"]).start(1).wait();
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(ended.output.contains("job.precision"), "{}", ended.output);
}

/// The discriminator `D.pt` with lines of TorchScript at the beginning of its `forward`, which takes
/// `images`.
fn changed(lines: &str) -> Vec<u8> {
    let mut archive = zip::ZipArchive::new(Cursor::new(std::fs::read(file("D.pt")).unwrap())).unwrap();
    let mut written = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored = zip::write::FileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        if entry.name() == "D/code/__torch__.py" {
            let (text, begin) = (String::from_utf8(content).unwrap(), "    main = self.main\n");
            assert!(text.contains(begin));
            content = text.replacen(begin, &format!("{lines}{begin}"), 1).into_bytes();
        }
        written.start_file(entry.name(), stored).unwrap();
        written.write_all(&content).unwrap();
    }
    written.finish().unwrap().into_inner()
}

/// A module may pass its check, and fail later.
#[test]
fn a_module_that_fails_later_or_never_ends_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, lines: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, changed(lines)).unwrap();
        path.display().to_string()
    };
    // The check uses two images, training three.
    let fails = write("fails.pt", "    images = torch.expand(images, [2, -1, -1, -1])\n");
    let mut run = run("D.pt", &["job.steps=3"]);
    run.set(&format!("model.discriminator={fails}"));
    let ended = run.start(2).wait();
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(ended.output.contains("fails.pt fails in training: "), "{}", ended.output);
    assert!(!ended.output.contains("panicked"), "{}", ended.output);

    let endless =
        write("endless.pt", "    _t = True\n    while _t:\n      images = torch.leaky_relu(images, 0.5)\n");
    let mut run = self::run("D.pt", &["job.steps=3"]);
    run.set(&format!("model.discriminator={endless}"));
    let ended = run.start_in(1, &[("GANGLION_MODULE_LIMIT", "5".to_string())]).wait();
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(
        ended.output.contains(&format!("error: {endless}: its check takes longer than 5 s")),
        "{}",
        ended.output
    );
}
