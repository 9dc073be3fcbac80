//! Messages of a refused worker: error, place and fix; at once, with exit code 2.

use std::fs;
use std::time::{Duration, Instant};

use ganglion_tests::{Process, Run, SMALL_MLP};

use crate::secrets::{Secrets, start, url, worker};

const ENDLESS: &[&str] = &["job.steps=1000000"];
/// Time limit for an error that retries cannot cure.
const AT_ONCE: Duration = Duration::from_secs(15);

#[track_caller]
fn assert_says(worker: Process, words: &[&str]) {
    let started = Instant::now();
    let ended = worker.wait();
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    for word in words {
        assert!(ended.output.contains(word), "{word} is not in: {}", ended.output);
    }
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
}

#[test]
fn a_worker_without_the_right_secrets_says_what_it_lacks() {
    let run = Run::new(&[SMALL_MLP, ENDLESS]);
    let (ours, theirs) = (Secrets::new(&run, "ours"), Secrets::new(&run, "theirs"));
    let coordinator = start(&run, &ours, 0);
    let url = url(&run);
    let (tls, token) = (ours.path("worker"), ours.path("join-token"));
    let with = |arguments: &[&str]| worker(&url, arguments);
    let plain = url.replace("https://", "http://");

    assert_says(worker(&plain, &[]), &[&plain, "speaks TLS only", "https://", "--tls-dir"]);
    assert_says(worker(&plain, &["--tls-dir", &tls]), &["begins with https://"]);
    assert_says(with(&[]), &["needs a certificate", "--tls-dir DIR"]);
    assert_says(with(&["--tls-dir", &tls]), &["asks for a join token", "--join-token-file"]);
    let other = theirs.path("join-token");
    assert_says(with(&["--tls-dir", &tls, "--join-token-file", &other]), &["not this coordinator's"]);
    let gone = run.beside("gone").display().to_string();
    assert_says(with(&["--tls-dir", &tls, "--join-token-file", &gone]), &[&gone, "No such file"]);
    assert_says(with(&["--tls-dir", &gone]), &[&gone, "ca.crt", "No such file", "certs init"]);
    let stranger = theirs.path("worker");
    let unknown = format!("no authority in {stranger}/ca.crt has signed the coordinator's certificate");
    assert_says(with(&["--tls-dir", &stranger, "--join-token-file", &token]), &[&unknown]);
    let misnamed = ["--tls-dir", &tls, "--join-token-file", &token, "--tls-name", "elsewhere.example"];
    assert_says(with(&misnamed), &["is not for elsewhere.example, but for", "localhost", "--host"]);
    // The worker trusts our authority, but its certificate is not signed by it.
    let mixed = run.beside("mixed");
    fs::create_dir(&mixed).unwrap();
    for file in ["tls.crt", "tls.key"] {
        fs::copy(theirs.path("worker/").to_string() + file, mixed.join(file)).unwrap();
    }
    fs::copy(ours.path("ca/ca.crt"), mixed.join("ca.crt")).unwrap();
    let folder = mixed.display().to_string();
    assert_says(with(&["--tls-dir", &folder]), &["tls.crt: no authority in ca.crt beside it has signed it"]);
    let both = fs::read_to_string(ours.path("ca/ca.crt")).unwrap()
        + &fs::read_to_string(theirs.path("ca/ca.crt")).unwrap();
    fs::write(mixed.join("ca.crt"), both).unwrap();
    let refused = format!("the coordinator does not accept {folder}/tls.crt");
    assert_says(with(&["--tls-dir", &folder]), &[&refused, "has signed it"]);

    let said = coordinator.output();
    for secret in [ours.token(), theirs.token()] {
        assert!(!said.contains(&secret), "{said}");
    }
}

#[test]
fn a_worker_that_speaks_tls_to_one_that_does_not_says_so() {
    let run = Run::new(&[SMALL_MLP, ENDLESS]);
    let secrets = Secrets::new(&run, "certs");
    let _coordinator = run.start(0);
    let url = url(&run).replace("http://", "https://");
    let tls = secrets.path("worker");
    assert_says(worker(&url, &["--tls-dir", &tls]), &["does not speak TLS", "http://"]);
}

#[test]
fn a_coordinator_with_unusable_secrets_does_not_start() {
    let run = Run::new(&[SMALL_MLP, ENDLESS]);
    let secrets = Secrets::new(&run, "certs");
    let short = run.beside("short");
    fs::write(&short, "hunter2\n").unwrap();
    let short = short.display().to_string();
    assert_says(run.start_with(&["--join-token-file", &short]), &[&short, "at least 16"]);
    let open = ["--listen", "0.0.0.0:0", "--join-token-file", &secrets.path("join-token")];
    assert_says(run.start_with(&open), &["not encrypted", "--tls-dir", "--insecure"]);
    fs::copy(secrets.path("worker/tls.key"), secrets.path("coordinator/tls.key")).unwrap();
    let mixed = secrets.path("coordinator");
    assert_says(run.start_with(&["--tls-dir", &mixed]), &["tls.crt: it does not go with tls.key beside it"]);
    assert!(!run.path("").exists(), "nothing is made before the secrets are read");
}
