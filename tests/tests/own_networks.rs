//! Networks that a user wrote in Python, with batch normalisation, dropout and spectral normalisation inside.
#![allow(clippy::unwrap_used)] // a test may panic

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
        .args(["sample", "--count", "10", "--checkpoint"])
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
        ("refused/double.pt", "1.weight is of kind Double"),
        ("refused/traced.pt", "use torch.jit.script"),
        ("G.pt", "model.discriminator"),
        ("make.py", "is no TorchScript"),
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
