//! The dashboard's addresses, during a run and after the death of its coordinator.
#![allow(clippy::unwrap_used)] // a test may panic

use std::io::{Read, Write};
use std::net::TcpStream;

use ganglion_tests::{Process, Run, SMALL_MLP, eventually, send};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Number of steps that no test reaches.
const ENDLESS: &[&str] =
    &["job.steps=10000000", "metrics.every_steps=1", "sample.every_steps=50", "checkpoint.every_steps=100"];

/// Answer of a site: the status, and the body.
fn get(site: &str, path: &str) -> Option<(u16, Vec<u8>)> {
    let address = site.strip_prefix("http://")?.strip_suffix('/')?;
    let mut stream = TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let status = String::from_utf8_lossy(&answer[..end]).split(' ').nth(1)?.parse().ok()?;
    Some((status, answer[end + 4..].to_vec()))
}

fn json(site: &str, path: &str) -> Option<Value> {
    let (status, body) = get(site, path)?;
    (status == 200).then(|| serde_json::from_slice(&body).unwrap())
}

/// Waits until the status is as wanted; returns it.
fn status(site: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    eventually(what, || json(site, "/api/status").filter(|status| is(status)))
}

fn site(run: &Run, term: u64) -> String {
    let started = run.wait_for("coordinator_started", |event| event["term"] == term);
    started["dashboard"].as_str().unwrap().to_string()
}

/// Sample of Prometheus' text format, by name with labels.
fn sample(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

fn stop(coordinator: Process) {
    coordinator.signal(Signal::SIGTERM);
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(143), "{}", ended.output);
}

#[test]
fn a_run_is_seen_before_and_after_its_coordinators_death() {
    let run = Run::new(&[SMALL_MLP, ENDLESS, &["job.failure_deadline=2"]]);
    let coordinator = run.start(2);
    let first = site(&run, 1);
    let trains = |status: &Value| {
        let workers = status["workers"].as_array().unwrap();
        let position = |worker: &Value| worker["position"].as_u64() > Some(0);
        status["checkpoint_step"].as_u64() >= Some(100) && workers.len() == 2 && workers.iter().all(position)
    };
    let seen = status(&first, "two workers that train", trains);
    assert_eq!((&seen["stage"], &seen["finished"]), (&"training".into(), &false.into()));
    assert_eq!((&seen["workers"][0]["rank"], &seen["workers"][0]["local"]), (&0.into(), &true.into()));
    assert!(seen["workers"][0]["device"].as_str().unwrap().starts_with("cpu"), "{seen}");
    assert!(seen["workers"][0]["resident_bytes"].as_u64() > Some(1 << 20), "{seen}");
    assert_eq!(seen["checkpoints"][0]["state_digest"].as_str().map(str::len), Some(64));

    let (code, text) = get(&first, "/metrics").unwrap();
    let text = String::from_utf8(text).unwrap();
    assert_eq!((code, sample(&text, "ganglion_world_size")), (200, Some(2.0)), "{text}");
    assert!(sample(&text, "ganglion_step") >= Some(100.0), "{text}");
    let real = sample(&text, "ganglion_score{of=\"real\"}").unwrap();
    assert!((0.0..=1.0).contains(&real), "a probability: {text}");
    let half_life = sample(&text, "ganglion_setting{name=\"ema_half_life_images\"}");
    assert!(half_life > Some(0.0), "it grows with the run: {text}");
    for probe in ["/healthz", "/readyz"] {
        assert_eq!(get(&first, probe).unwrap().0, 200, "{probe}");
    }
    let pictures = json(&first, "/api/samples").unwrap();
    let (code, png) = get(&first, pictures["samples"][0]["url"].as_str().unwrap()).unwrap();
    assert_eq!((code, &png[..4]), (200, &b"\x89PNG"[..]));

    coordinator.signal(Signal::SIGKILL);
    drop(coordinator.wait());
    assert_eq!(get(&first, "/healthz"), None, "nobody serves");
    let before = run.rows().len() as u64;
    let coordinator = run.start(2);
    let second = site(&run, 2);
    assert_eq!(second, first, "a page finds it where it was");
    let seen = status(&second, "new rows", |status| status["rows"].as_u64() > Some(before + 50));
    assert_eq!(seen["term"], 2);
    let curve = json(&second, "/api/metrics?from=0&points=100").unwrap();
    let steps: Vec<u64> = curve["step"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
    assert!(steps[0] < before && steps.last() >= Some(&before), "history and new rows: {steps:?}");
    let events = json(&second, "/api/events?after=0").unwrap();
    let starts = events["events"].as_array().unwrap().iter();
    assert_eq!(starts.filter(|event| event["event"]["kind"] == "coordinator_started").count(), 2);
    stop(coordinator);
}

#[test]
fn a_lost_worker_shows_and_then_shows_no_more() {
    let run = Run::new(&[SMALL_MLP, ENDLESS]);
    let coordinator = run.start(2);
    let site = site(&run, 1);
    status(&site, "a group of two", |status| status["world_size"] == 2);
    let lost = run.pids(1)[1];
    send(lost, Signal::SIGKILL);
    let replaced = status(&site, "a new group of two", |status| {
        status["generation"].as_u64() > Some(1) && status["world_size"] == 2
    });
    let pids: Vec<i64> =
        replaced["workers"].as_array().unwrap().iter().filter_map(|w| w["pid"].as_i64()).collect();
    assert!(!pids.contains(&i64::from(lost)), "{pids:?}");
    let text = String::from_utf8(get(&site, "/metrics").unwrap().1).unwrap();
    assert!(sample(&text, "ganglion_workers_lost_total") >= Some(1.0), "{text}");
    assert!(sample(&text, "ganglion_regroups_total") >= Some(1.0), "{text}");
    assert!(!text.contains(&format!("pid=\"{lost}\"")), "{text}");
    stop(coordinator);
}

/// Scores and moving settings are a function of the job, like all values of a row that describe a step.
#[test]
fn scalars_are_the_same_for_any_number_of_workers() {
    const MOVING: &[&str] = &[
        "optimizer.decay_images=400",
        "optimizer.final_learning_rate=1e-5",
        "augmentation.kinds=translation",
        "augmentation.adaptive=true",
        "augmentation.target=0.1",
        "augmentation.adjust_images=500",
    ];
    const NAMES: [&str; 6] = [
        "score_real",
        "score_fake",
        "setting_learning_rate_generator",
        "setting_learning_rate_discriminator",
        "setting_ema_half_life_images",
        "setting_augmentation_probability",
    ];
    let scalars = |workers| {
        let run = Run::new(&[SMALL_MLP, MOVING, &["job.steps=30", "metrics.every_steps=1"]]);
        run.complete(workers);
        let mut rows = run.rows();
        rows.sort_by_key(|row| row["step"].as_u64());
        let of_row =
            |row: &Value| NAMES.map(|name| row[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}")));
        rows.iter().map(of_row).collect::<Vec<_>>()
    };
    let one = scalars(1);
    assert!(
        one.iter().all(|[real, fake, ..]| [real, fake].iter().all(|score| (0.0..=1.0).contains(*score))),
        "{one:?}"
    );
    let (first, last) = (one[0], one[one.len() - 1]);
    assert!(first[2] > 1e-4 && (last[2], last[3]) == (1e-5, 1e-5), "the rates fall: {first:?} {last:?}");
    assert!(last[4] > first[4], "the half-life grows: {first:?} {last:?}");
    assert!(one.iter().any(|row| row[5] > 0.0), "the controller moves: {one:?}");
    assert_eq!(one, scalars(3));
}

#[test]
fn a_run_needs_no_dashboard_and_a_wrong_address_is_named() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=5"]]);
    let ended = Process::start(run.command(&["--http", "off"])).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(run.wait_for("coordinator_started", |_| true)["dashboard"].is_null());
    for (wrong, says) in
        [("nonsense", "HOST:PORT"), ("0.0.0.0:0", "--insecure"), ("192.0.2.1:1", "--http 192.0.2.1:1")]
    {
        let arguments: &[&str] =
            if says.contains("192") { &["--insecure", "--http", wrong] } else { &["--http", wrong] };
        let ended = Process::start(Run::new(&[SMALL_MLP]).command(arguments)).wait();
        assert_eq!(ended.code, Some(2), "{}", ended.output);
        assert!(ended.output.contains(says), "{}", ended.output);
    }
}
