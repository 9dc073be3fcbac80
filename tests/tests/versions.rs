//! Programs and run directories of other versions: understood, or refused by name.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;

use ganglion_membership::Term;
use ganglion_proto::PROTOCOL;
use ganglion_proto::message::{FromWorker, Hello, ToWorker};
use ganglion_proto::wire::session_response::Message;
use ganglion_proto::wire::session_service_server::{SessionService, SessionServiceServer};
use ganglion_proto::wire::{SessionRequest, SessionResponse};
use ganglion_tests::wire::{Stranger, connect, hello};
use ganglion_tests::{Ended, Process, Reference, Run, SMALL_MLP};
use rusqlite::Connection;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// Coordinator of another version, as far as its answer to a hello.
struct Other(Box<dyn Fn(Hello) -> Result<SessionResponse, Status> + Send + Sync>);

#[tonic::async_trait]
impl SessionService for Other {
    type SessionStream = tokio_stream::Once<Result<SessionResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let first = request.into_inner().message().await?.expect("a hello");
        let Ok((_, FromWorker::Hello(hello))) = FromWorker::from_wire(first) else { panic!("a hello") };
        (self.0)(hello).map(|answer| Response::new(tokio_stream::once(Ok(answer))))
    }
}

/// Has a worker join a coordinator that answers in this way, and waits for the worker's end.
fn join(answer: impl Fn(Hello) -> Result<SessionResponse, Status> + Send + Sync + 'static) -> Ended {
    let runtime = Runtime::new().unwrap();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let other = Other(Box::new(answer));
    let server = Server::builder().add_service(SessionServiceServer::new(other));
    runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    Process::worker(&url).wait()
}

#[track_caller]
fn assert_told(ended: &Ended, says: &[&str]) {
    assert_eq!(ended.code, Some(1), "{}", ended.output);
    for part in says {
        assert!(ended.output.contains(part), "{part:?} is not in:\n{}", ended.output);
    }
    assert!(!ended.output.contains("panicked"), "{}", ended.output);
}

/// Coordinators of all versions say it in these words.
#[test]
fn a_worker_that_a_coordinator_of_another_version_refuses_names_both_versions() {
    let ended = join(|hello| {
        let spoken = hello.protocol;
        Err(Status::failed_precondition(format!(
            "this worker speaks version {spoken} of the contract and the coordinator version 1; use one build of both"
        )))
    });
    let versions =
        format!("speaks version {PROTOCOL} of the contract and the coordinator version 1; use one build");
    assert_told(&ended, &[&versions]);
}

/// A worker never trains by half a job.
#[test]
fn a_worker_refuses_a_job_with_settings_that_it_does_not_know() {
    let run = Run::new(&[SMALL_MLP]);
    let coordinator = run.start(0);
    let started = run.wait_for("coordinator_started", |_| true);
    let url = started["address"].as_str().unwrap();
    let runtime = Runtime::new().unwrap();
    let stranger = runtime.block_on(async { Stranger::join(connect(url).await, hello()).await }).unwrap();
    let known = ToWorker::Welcome(Box::new(stranger.welcome.clone())).to_wire(Term(1));
    drop((stranger, coordinator));
    let ended = join(move |_| {
        let mut newer = known.clone();
        let Some(Message::Welcome(welcome)) = &mut newer.message else { panic!("a welcome") };
        welcome.job_toml = welcome.job_toml.replace("[optimizer]\n", "[optimizer]\nlookahead = 0.9\n");
        Ok(newer)
    });
    let says = "settings that this build does not know: optimizer.lookahead; use one build of the coordinator and its workers";
    assert_told(&ended, &[says]);
}

/// Keys that the first version's `job.toml` did not have.
const LATER_KEYS: [&str; 16] = [
    "non_finite",
    "precision",
    "reduction",
    "deterministic",
    "ema_schedule",
    "conditional",
    "freeze_discriminator",
    "r1",
    "final_r1",
    "r2",
    "final_r2",
    "penalty_every",
    "decay_images",
    "final_learning_rate",
    "final_discriminator_learning_rate",
    "final_beta2",
];
/// Sections that the first version did not have.
const LATER_SECTIONS: [&str; 3] = ["[augmentation]", "[evaluation]", "[alarms]"];

/// Removes the scalars that rows of the first version did not have.
fn age_rows(run: &Run) {
    let text = fs::read_to_string(run.path("metrics.jsonl")).unwrap();
    let is_kept = |entry: &&str| !entry.starts_with("\"setting_") && !entry.starts_with("\"score_");
    let aged = |line: &str| line.split(',').filter(is_kept).collect::<Vec<_>>().join(",") + "\n";
    let rows: String = text.lines().map(aged).collect();
    assert!(rows.len() < text.len(), "{text}");
    fs::write(run.path("metrics.jsonl"), rows).unwrap();
}

/// Rewrites a run directory as the first version would have left it, with three exceptions: the
/// starts of generations, which that version wrote as prose; the note that the last generation
/// is quiesced, without which a coordinator waits until the lease of its members is over; and the
/// version of the arithmetic, as another one is refused.
fn age(run: &Run) {
    let text = fs::read_to_string(run.path("job.toml")).unwrap();
    let mut is_later_section = false;
    let is_kept = |line: &&str| {
        if line.starts_with('[') {
            is_later_section = LATER_SECTIONS.contains(line);
        }
        let key = line.split_once(" = ").map_or("", |(key, _)| key);
        !is_later_section && !LATER_KEYS.contains(&key)
    };
    let kept: Vec<&str> = text.lines().filter(is_kept).collect();
    assert!(kept.len() + LATER_KEYS.len() < text.lines().count(), "{text}");
    fs::write(run.path("job.toml"), kept.join("\n") + "\n").unwrap();
    age_rows(run);

    let journal = Connection::open(run.path("journal.sqlite")).unwrap();
    journal
        .execute_batch(
            r#"DROP TABLE children; DROP TABLE skips; DROP TABLE set_aside; DROP TABLE evaluations;
            ALTER TABLE terms DROP COLUMN metrics_every_steps;
            ALTER TABLE workers DROP COLUMN token;
            ALTER TABLE generations DROP COLUMN cause;
            ALTER TABLE generations DROP COLUMN backend;
            ALTER TABLE checkpoints DROP COLUMN generation;
            ALTER TABLE checkpoints DROP COLUMN valid;
            UPDATE generations SET members = replace(members, ',"writes_parts":true', '');
            UPDATE facts SET value = json_set(value, '$.build', '0.1.0') WHERE name = 'passport';
            DELETE FROM facts WHERE name NOT IN ('run', 'port', 'passport', 'samples', 'closed');
            PRAGMA user_version = 1;"#,
        )
        .unwrap();
    drop(journal);

    let manifest = run.newest_checkpoint().join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    let aged = text.replace("  \"format\": 1,\n", "");
    assert_ne!(aged, text);
    fs::write(&manifest, aged).unwrap();
    fs::remove_file(run.path("admin.json")).ok();
}

/// A build resumes the run directories of all earlier ones that have its arithmetic, with the same bits.
#[test]
fn a_run_directory_of_the_first_version_goes_on_with_the_same_bits() {
    let reference = Reference::of(&[SMALL_MLP, &["job.steps=40"]]);
    let mut run = Run::new(&[SMALL_MLP, &["job.steps=20"]]);
    run.complete(1);
    age(&run);
    run.set("job.steps=40");
    let ended = run.start(2).wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(!ended.output.contains("warning"), "{}", ended.output);
    let steps: Vec<u64> = run.rows().iter().filter_map(|row| row["step"].as_u64()).collect();
    assert_eq!(steps, [10, 20, 30, 40], "a step was lost or reported twice");
    reference.equals("a run that the first version began", &run.digest());
    run.assert_audited();
}
