//! Workers that nobody started here: as on other machines.
#![allow(clippy::unwrap_used)] // a test may panic

use std::net::TcpListener;

use ganglion_tests::{Process, Run, SMALL_DCGAN, SMALL_MLP};

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
    assert!(stranger.output.contains("cpu_capability"), "{}", stranger.output);
    let refused = run.wait_for("worker_refused", |_| true);
    assert!(refused["reason"].as_str().unwrap().contains("cpu_capability"), "{refused}");
    // The run goes on without it.
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
