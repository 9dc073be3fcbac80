//! Whole runs over TLS.

use ganglion_tests::{Reference, Run, SMALL_MLP, send};
use nix::sys::signal::Signal;

use crate::secrets::{Secrets, start, url};

#[test]
fn two_workers_over_tls_come_to_the_same_bits() {
    // Long enough that neither worker is done before the other has joined.
    let settings = [SMALL_MLP, &["job.steps=3000", "job.data_shards=4"]];
    let plain = Reference::of(&settings);
    let run = Run::new(&settings);
    let secrets = Secrets::new(&run, "certs");
    let coordinator = start(&run, &secrets, 0);
    let url = url(&run);
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let workers = [secrets.worker(&url), secrets.worker(&url)];
    for process in workers.into_iter().chain([coordinator]) {
        let ended = process.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        assert!(!ended.output.contains(&secrets.token()), "{}", ended.output);
    }
    plain.equals("a run of two workers over TLS", &run.digest());
    let formed = run.wait_for("generation_formed", |event| event["world_size"] == 2);
    assert_eq!(formed["backend"], "Gloo");
    run.assert_audited();
}

#[test]
fn a_group_over_tls_survives_a_death_and_operators_reach_it() {
    let settings = [SMALL_MLP, &["job.steps=2000", "job.data_shards=4", "metrics.every_steps=1"]];
    let run = Run::new(&settings);
    let secrets = Secrets::new(&run, "certs");
    let coordinator = start(&run, &secrets, 2);
    run.wait_for("generation_formed", |event| event["world_size"] == 2);
    for pid in run.live_workers() {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(!command.contains(&secrets.token()), "{command}");
    }
    run.wait_for_step(20);
    let status = run.ask(&["status"]);
    assert_eq!(status.code, Some(0), "{}", status.output);
    assert!(status.output.contains("worker"), "{}", status.output);
    let nobody = run.ask(&["drain", "99"]);
    assert_eq!(nobody.code, Some(2), "{}", nobody.output);
    assert!(nobody.output.contains("there is no worker 99"), "{}", nobody.output);
    let newest = run.events().into_iter().rfind(|event| event["kind"] == "generation_formed").unwrap();
    send(run.pids(newest["generation"].as_u64().unwrap())[1], Signal::SIGKILL);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    Reference::of(&settings).equals("a run over TLS with a death", &run.digest());
    run.assert_audited();
}
