//! Workers that no coordinator started, as on other machines.
#![allow(clippy::unwrap_used)] // a test may panic

use std::net::TcpListener;

use ganglion_membership::{LoadedFacts, Passport, StepShape};
use ganglion_proto::message::{FromWorker, ToWorker};
use ganglion_tests::wire::{Stranger, connect, hello};
use ganglion_tests::{Process, Run, SMALL_DCGAN, SMALL_MLP};
use nix::sys::signal::Signal;

#[test]
fn two_remote_workers_train_as_local_ones_do() {
    for model in [SMALL_MLP, SMALL_DCGAN] {
        let settings = [model, &["job.steps=40", "job.data_shards=4"]];
        let local = Run::new(&settings).complete(2);
        let run = Run::new(&settings);
        let coordinator = run.start(0);
        let started = run.wait_for("coordinator_started", |_| true);
        let url = started["address"].as_str().unwrap();
        let workers = [Process::worker(url), Process::worker(url)];
        let ended = coordinator.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        for worker in workers {
            let ended = worker.wait();
            assert_eq!(ended.code, Some(0), "{}", ended.output);
        }
        assert_eq!(run.digest(), local);
    }
}

/// Job whose lease, 12 deadlines, is longer than any wait of this test.
#[test]
fn nobody_waits_for_workers_that_a_stop_released() {
    let mut run = Run::new(&[SMALL_MLP, &["job.steps=100000", "job.failure_deadline=20"]]);
    let start = |run: &Run, term: u64| {
        let coordinator = run.start(0);
        let started = run.wait_for("coordinator_started", |event| event["term"] == term);
        let worker = Process::worker(started["address"].as_str().unwrap());
        run.wait_for("generation_formed", |event| event["generation"] == term);
        (coordinator, worker)
    };
    let (coordinator, worker) = start(&run, 1);
    run.wait_for_step(20);
    coordinator.signal(Signal::SIGTERM);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(143), "{}", ended.output);
    assert_eq!(worker.wait().code, Some(0));
    let stopped = run.wait_for("checkpoint", |_| true)["step"].as_u64().unwrap();
    run.set(&format!("job.steps={}", stopped + 20));
    let (coordinator, worker) = start(&run, 2);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert_eq!(worker.wait().code, Some(0));
    run.assert_audited();
}

#[test]
fn a_worker_of_another_passport_is_refused_and_told_what_differs() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=100000"]]);
    let _coordinator = run.start(1);
    run.wait_for_step(1);
    let started = run.wait_for("coordinator_started", |_| true);
    let url = started["address"].as_str().unwrap();
    // libtorch then takes its plain kernels, as on a processor without AVX.
    let stranger = Process::worker_with(url, &[("ATEN_CPU_CAPABILITY", "default")]).wait();
    assert_eq!(stranger.code, Some(1), "{}", stranger.output);
    let differs = "the set of the CPU's instructions that libtorch uses is \"DEFAULT\" here";
    assert!(stranger.output.contains(differs), "{}", stranger.output);
    let refused = run.wait_for("worker_refused", |_| true);
    assert!(refused["reason"].as_str().unwrap().contains(differs), "{refused}");
    // The run continues without it.
    let now = run.wait_for_step(1);
    run.wait_for_step(now + 50);
}

/// The number of this build's arithmetic.
fn numerics(run: &Run) -> u32 {
    let adopted = run.wait_for("passport", |_| true);
    adopted["items"]["numerics"].as_str().unwrap().parse().unwrap()
}

#[test]
fn a_worker_tells_its_version_with_the_number_of_its_arithmetic() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=1"]]);
    run.complete(1);
    let mut command = std::process::Command::new(ganglion_tests::program("worker"));
    command.arg("--version");
    let told = Process::start(command).wait().output;
    assert!(told.contains(&format!("(numerics {})", numerics(&run))), "{told}");
}

#[tokio::test]
async fn a_worker_of_other_arithmetic_is_refused_and_told_what_to_do() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=100000"]]);
    let _coordinator = run.start(1);
    run.wait_for_step(1);
    let started = run.wait_for("coordinator_started", |_| true);
    let ours = numerics(&run);
    let items = run.wait_for("passport", |_| true)["items"].clone();
    let mut passport = Passport(serde_json::from_value(items).unwrap());
    passport.0.insert("numerics".to_string(), (ours + 1).to_string());
    let channel = connect(started["address"].as_str().unwrap()).await;
    let stranger = Stranger::join(channel, hello()).await.unwrap();
    let facts = LoadedFacts {
        passport,
        samples: 10_000,
        sees_storage: true,
        shape: StepShape::new(2, vec![0]).unwrap(),
        gpu: None,
        host: None,
        left_out: Vec::new(),
    };
    stranger.say(FromWorker::Loaded(facts, None));
    let Some(ToWorker::Reject(reason)) = stranger.end().await.unwrap() else { panic!("it was not refused") };
    assert!(reason.contains(&format!("`worker --version` says numerics {ours}")), "{reason}");
    let now = run.wait_for_step(1);
    run.wait_for_step(now + 50);
}

#[test]
fn a_worker_tries_for_a_while_to_find_its_coordinator() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let ended = Process::worker(&url).wait();
    assert_eq!(ended.code, Some(1), "{}", ended.output);
    assert!(ended.output.contains(&url) && ended.output.contains("attempts"), "{}", ended.output);
}

#[test]
fn a_worker_may_come_before_its_coordinator() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let worker = Process::worker(&format!("http://{address}"));
    let run = Run::new(&[SMALL_MLP, &["job.steps=3"]]);
    let ended = run.start_with(&["--workers", "0", "--listen", &address]).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert_eq!(worker.wait().code, Some(0));
}

#[test]
fn an_address_that_is_none_is_the_users_to_mend() {
    for url in ["127.0.0.1:7000", "http://", "http://127.0.0.1", "ftp://127.0.0.1:7000"] {
        let ended = Process::worker(url).wait();
        assert_eq!(ended.code, Some(2), "{url}: {}", ended.output);
        assert!(ended.output.contains("--coordinator"), "{}", ended.output);
    }
}
