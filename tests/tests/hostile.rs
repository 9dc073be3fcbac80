//! Hostile input on the wire: it is refused, and the run continues undisturbed.
#![allow(clippy::unwrap_used)] // a test may panic

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use ganglion_membership::{
    Fault, Generation, LoadedFacts, Passport, Position, Progress, Rank, Share, StepShape, StoredFile, Term,
    WorkerId, WrittenPart,
};
use ganglion_proto::message::{FromWorker, Hello, MetricsRow, SampleGrid, ToWorker, Usage};
use ganglion_proto::wire::admin_service_client::AdminServiceClient;
use ganglion_proto::wire::store_service_client::StoreServiceClient;
use ganglion_proto::wire::{
    self, AddRequest, DrainRequest, GetRequest, GetStatusRequest, Key, ScaleRequest, SessionRequest,
    SetRequest,
};
use ganglion_proto::{MESSAGE_LIMIT, PROTOCOL};
use ganglion_tests::wire::{Stranger, connect, hello, resuming};
use ganglion_tests::{LIMIT, Process, Run, SMALL_MLP, eventually};
use nix::sys::signal::Signal;
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// The highest number that a message may hold where it counts something.
const HIGHEST: u64 = (1 << 53) - 1;
/// Bound on the bytes of events.jsonl after an attack.
const EVENTS_LIMIT: u64 = 256 << 10;
const ENDLESS: &[&str] = &["job.steps=1000000", "job.failure_deadline=2", "metrics.every_steps=1"];

/// A run that one local worker trains, to be attacked.
struct Target {
    run: Run,
    coordinator: Process,
    url: String,
    runtime: Runtime,
}

impl Target {
    fn new() -> Target {
        let target = Target::with(1, ENDLESS);
        target.run.wait_for_step(10);
        target
    }

    fn with(workers: u32, job: &[&str]) -> Target {
        let run = Run::new(&[SMALL_MLP, job]);
        let coordinator = run.start(workers);
        let started = run.wait_for("coordinator_started", |_| true);
        let url = started["address"].as_str().unwrap().to_string();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Target { run, coordinator, url, runtime: runtime.unwrap() }
    }

    fn channel(&self) -> Channel {
        self.runtime.block_on(connect(&self.url))
    }

    fn socket(&self) -> TcpStream {
        let stream = TcpStream::connect(self.url.strip_prefix("http://").unwrap()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    fn join(&self, hello: Hello) -> Result<Stranger, Status> {
        self.runtime.block_on(Stranger::join(self.channel(), hello))
    }

    fn end_of(&self, stranger: Stranger) -> Result<Option<ToWorker>, Status> {
        self.runtime.block_on(async { tokio::time::timeout(LIMIT, stranger.end()).await.unwrap() })
    }

    /// Waits until a client receives a message.
    #[track_caller]
    fn hears(&self, stranger: &mut Stranger, wanted: impl Fn(&ToWorker) -> bool) {
        let hearing =
            async { while !wanted(&stranger.hear().await.unwrap().expect("the session goes on")) {} };
        self.runtime.block_on(async { tokio::time::timeout(LIMIT, hearing).await.expect("it hears") });
    }

    /// Asserts that a first message is refused and logged.
    #[track_caller]
    fn refuses(&self, first: SessionRequest, code: Code, reason: &str) {
        let begun = self.runtime.block_on(Stranger::begin(self.channel(), first));
        let status = begun.err().expect("refused");
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(reason), "{status}");
        self.logs(reason);
    }

    /// Waits until the coordinator has logged something.
    #[track_caller]
    fn logs(&self, text: &str) {
        eventually(text, || self.coordinator.output().contains(text).then_some(()));
    }

    /// Stops the run, and asserts that nothing of the attack is in it.
    fn assert_undisturbed(self) {
        let before = self.run.wait_for_step(1);
        self.run.wait_for_step(before + 50);
        self.coordinator.signal(Signal::SIGTERM);
        let ended = self.coordinator.wait();
        assert_eq!(ended.code, Some(143), "{}", ended.output);
        let count = |kind: &str| self.run.events().iter().filter(|event| event["kind"] == kind).count();
        assert_eq!(count("generation_formed"), 1, "{}", ended.output);
        assert_eq!(count("regroup") + count("condemned") + count("metrics_breach"), 0);
        self.run.assert_audited();
        let saved = self.run.events().into_iter().rfind(|event| event["kind"] == "checkpoint").unwrap();
        let step = saved["step"].as_u64().unwrap();
        let events = std::fs::metadata(self.run.path("events.jsonl")).unwrap().len();
        assert!(events < EVENTS_LIMIT, "{events} bytes of events");
        let last = self.run.rows().iter().filter_map(|row| row["step"].as_u64()).max();
        assert_eq!(last, Some(step), "a row of a step that was never done");
        let whole = Run::new(&[SMALL_MLP, ENDLESS, &[&format!("job.steps={step}")]]);
        assert_eq!(self.run.digest(), whole.complete(1));
    }
}

fn first(message: FromWorker) -> SessionRequest {
    message.to_wire(Term(0))
}

fn facts(items: &[(&str, &str)]) -> LoadedFacts {
    let item = |(item, value): &(&str, &str)| (item.to_string(), value.to_string());
    let passport = Passport(items.iter().map(item).collect());
    LoadedFacts {
        passport,
        samples: 7,
        sees_storage: true,
        shape: StepShape::new(2, vec![0]).unwrap(),
        gpu: None,
        host: None,
        left_out: Vec::new(),
    }
}

fn part(step: u64) -> WrittenPart {
    let (file, blake3) = ("state-00001-of-00001.safetensors".into(), "0".repeat(64));
    let file = StoredFile { file, bytes: 1, blake3 };
    WrittenPart { step, phase: 0, index: 0, count: 1, file, fingerprint: 0, share: Share::default() }
}

fn row(step: u64) -> MetricsRow {
    MetricsRow { step, generation: 1, world_size: 1, ..MetricsRow::default() }
}

/// All messages of a member about its generation.
fn claims(generation: Generation) -> Vec<FromWorker> {
    let (position, what) = (Position(1 << 40), "made up".to_string());
    let faults = [
        Fault::Peer,
        Fault::Timeout,
        Fault::Links(vec![Rank(0), Rank(u32::MAX)]),
        Fault::Diverged(what.clone()),
        Fault::Internal(what.clone()),
        Fault::NonFinite { position, detail: what.clone(), stop: false },
        Fault::NonFinite { position, detail: what.clone(), stop: true },
    ];
    let mut claims: Vec<FromWorker> =
        faults.into_iter().map(|fault| FromWorker::Fault(generation, fault)).collect();
    claims.extend([
        FromWorker::Ready(generation, Some(position)),
        FromWorker::Ready(generation, None),
        FromWorker::Finished(generation, position, true),
        FromWorker::Finished(generation, position, false),
        FromWorker::PartWritten(generation, part(1)),
        FromWorker::PartWritten(generation, part(HIGHEST)),
        FromWorker::PartDelayed(1, "state".to_string(), what.clone()),
        FromWorker::Metrics(row(1)),
        FromWorker::Metrics(row(999_999)),
        FromWorker::PhaseSkipped(position, what),
        FromWorker::Samples(SampleGrid {
            real: false,
            step: 1,
            png: vec![0; 1 << 20],
            width: 1,
            height: 1,
            channels: 1,
        }),
    ]);
    claims
}

#[test]
fn what_does_not_speak_the_protocol_is_shown_out() {
    let target = Target::new();
    let nonsense: Vec<u8> = (0..4096u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for said in [nonsense.clone(), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), b"PRI * HTTP/3.0".to_vec()]
    {
        let mut socket = target.socket();
        socket.write_all(&said).unwrap();
        // Closed, or reset because not all of it was read.
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        assert_eq!(answer, b"", "nothing is answered");
    }
    target.logs("does not speak HTTP/2");
    let mut socket = target.socket();
    socket.write_all(preface).unwrap();
    let _ = socket.write_all(&nonsense);
    // HTTP/2 may answer anything, and then ends.
    let _ = socket.read_to_end(&mut Vec::new());
    target.assert_undisturbed();
}

#[test]
fn a_session_begins_with_a_hello_that_is_true() {
    let target = Target::new();
    let other = Hello { protocol: PROTOCOL + 1, ..hello() };
    let versions = format!(
        "this worker speaks version {} of the contract and the coordinator version {PROTOCOL}; use one build of both",
        PROTOCOL + 1
    );
    target.refuses(first(FromWorker::Hello(other.clone())), Code::FailedPrecondition, &versions);
    // The hello may hold data that this version would refuse.
    let longer = Hello { host: "x".repeat(1000), ..other };
    target.refuses(first(FromWorker::Hello(longer)), Code::FailedPrecondition, &versions);
    for message in claims(Generation(1)).into_iter().chain([FromWorker::Leave]) {
        target.refuses(first(message), Code::InvalidArgument, "starts with a hello");
    }
    let empty = SessionRequest { term: 0, message: None };
    target.refuses(empty, Code::InvalidArgument, "message is missing");
    let token = Hello { spawn_token: Some("made up".to_string()), ..hello() };
    target.refuses(first(FromWorker::Hello(token)), Code::FailedPrecondition, "its token is of no worker");
    let huge = Hello { host: "x".repeat(MESSAGE_LIMIT + 1), ..hello() };
    target.refuses(first(FromWorker::Hello(huge)), Code::OutOfRange, "too large");

    let run = target.join(hello()).unwrap().welcome.run;
    let claim = |run: &str, worker, term, generation| {
        first(FromWorker::Hello(resuming(run, WorkerId(worker), Term(term), Generation(generation))))
    };
    for worker in [1, 2, 99] {
        target.refuses(claim("other", worker, 1, 1), Code::FailedPrecondition, "another run");
    }
    target.refuses(claim(&run, 1, 2, 1), Code::FailedPrecondition, "a coordinator of term 2 has this run");
    target.refuses(claim(&run, 1, 1, 1), Code::FailedPrecondition, "only with its token");
    // A client with impossible claims is treated as new.
    for (worker, generation) in [(1, 2), (99, 1), (99, HIGHEST)] {
        let resuming = resuming(&run, WorkerId(worker), Term(1), Generation(generation));
        let welcome = target.join(resuming).unwrap().welcome;
        assert!(welcome.worker != WorkerId(worker), "taken in as worker {worker}");
    }
    // A late message of an abandoned session is out of date.
    let again = |worker, attempt| Hello { attempt, ..resuming(&run, worker, Term(1), Generation(0)) };
    let worker = target.join(hello()).unwrap().welcome.worker;
    let newer = target.join(again(worker, 3)).unwrap();
    assert_eq!(newer.welcome.worker, worker);
    target.refuses(
        first(FromWorker::Hello(again(worker, 2))),
        Code::FailedPrecondition,
        "opened a newer one",
    );
    target.assert_undisturbed();
}

#[test]
fn a_worker_that_is_no_member_changes_nothing_whatever_it_claims() {
    let target = Target::new();
    let stranger = target.join(hello()).unwrap();
    for generation in [0, 1, 2, HIGHEST].map(Generation) {
        for message in claims(generation) {
            stranger.say_in(Term(0), message.clone());
            stranger.say_in(Term(2), message.clone());
            stranger.say(message);
        }
    }
    let slow = Progress { slowest_leaf: Duration::MAX, ..Progress::default() };
    stranger.say(FromWorker::Heartbeat(slow, Usage::default()));
    stranger.say(FromWorker::Leave);
    assert_eq!(target.end_of(stranger).unwrap(), Some(ToWorker::Release { complete: false }));
    target.logs("of term 2 in term 1");
    target.logs("which has not trained");

    let stranger = target.join(hello()).unwrap();
    stranger.say(FromWorker::Loaded(facts(&[("data", "other"), ("build", "other")]), None));
    let end = target.end_of(stranger).unwrap();
    assert!(matches!(&end, Some(ToWorker::Reject(reason)) if reason.contains("other bits")), "{end:?}");

    let stranger = target.join(hello()).unwrap();
    stranger.say(FromWorker::InputError("data.path is not here".to_string()));
    let end = target.end_of(stranger).unwrap();
    assert!(matches!(&end, Some(ToWorker::Reject(reason)) if reason.contains("data.path")), "{end:?}");
    target.assert_undisturbed();
}

#[test]
fn who_breaks_the_contract_in_a_session_loses_it() {
    let target = Target::new();
    let breaches = [
        (SessionRequest { term: 1, message: None }, Code::InvalidArgument),
        (FromWorker::Loaded(facts(&[]), None).to_wire(Term(1)), Code::InvalidArgument),
        (FromWorker::InputError("x".repeat(MESSAGE_LIMIT + 1)).to_wire(Term(1)), Code::OutOfRange),
    ];
    let many = Fault::Links(vec![Rank(u32::MAX); 1 << 20]);
    let beyond = Position(HIGHEST + 1);
    let breaches = breaches.into_iter().chain(
        [
            FromWorker::Fault(Generation(1), many),
            FromWorker::PhaseSkipped(Position(u64::MAX), String::new()),
            FromWorker::Ready(Generation(1), Some(beyond)),
            FromWorker::Fault(
                Generation(1),
                Fault::NonFinite { position: beyond, detail: String::new(), stop: false },
            ),
            FromWorker::Finished(Generation(u64::MAX), Position(0), true),
        ]
        .map(|breach| (breach.to_wire(Term(1)), Code::InvalidArgument)),
    );
    for (breach, code) in breaches {
        let stranger = target.join(hello()).unwrap();
        stranger.say_raw(breach);
        assert_eq!(target.end_of(stranger).unwrap_err().code(), code);
    }
    target.logs("closing the session of worker 4");
    target.logs("ranks has 1048576 items");
    // Events are bounded too, and texts cannot control a terminal.
    let stranger = target.join(Hello { host: "\x1b[2Jnode".to_string(), ..hello() }).unwrap();
    let joined = stranger.welcome.worker.0;
    (0..10_000).for_each(|_| stranger.say(FromWorker::Leave));
    let end = target.end_of(stranger).unwrap();
    assert!(matches!(&end, Some(ToWorker::Reject(_) | ToWorker::Release { .. })), "{end:?}");
    let joined = target.run.wait_for("worker_joined", |event| event["worker"] == joined);
    assert_eq!(joined["host"], "\\u{1b}[2Jnode");
    let stranger = target.join(hello()).unwrap();
    stranger.say(FromWorker::Hello(hello()));
    target.end_of(stranger).unwrap();
    target.logs("says hello twice");
    target.assert_undisturbed();
}

/// A member is asked for a missing row. A member that causes endless events fills no disk.
#[test]
fn a_member_owes_its_rows_and_causes_so_many_events() {
    let target = Target::with(0, &["job.steps=1000", "job.failure_deadline=60", "metrics.every_steps=1"]);
    let mut member = target.join(hello()).unwrap();
    member.say(FromWorker::Loaded(facts(&[("build", "made up")]), None));
    target.hears(&mut member, |heard| matches!(heard, ToWorker::Assignment(_)));
    [1, 3].into_iter().for_each(|step| member.say(FromWorker::Metrics(row(step))));
    target.hears(&mut member, |heard| *heard == ToWorker::MetricsWanted(2));
    member.say(FromWorker::Metrics(row(2)));
    target.hears(&mut member, |heard| *heard == ToWorker::MetricsRecorded(3));
    let mut steps: Vec<_> = target.run.rows().iter().map(|row| row["step"].as_u64().unwrap()).collect();
    steps.sort_unstable();
    assert_eq!(steps, [1, 2, 3]);
    for at in 0..10_000 {
        member.say(FromWorker::PartDelayed(1, "state".to_string(), format!("made up {at}")));
    }
    // After that its session is closed for the first event that a storage does not cause.
    member.say(FromWorker::Fault(Generation(1), Fault::Peer));
    target.end_of(member).unwrap();
    target.logs("causes too many events");
    let events = std::fs::metadata(target.run.path("events.jsonl")).unwrap().len();
    assert!(events < EVENTS_LIMIT, "{events} bytes of events");
}

/// Every message of a worker with numbers and texts at and beyond their bounds.
fn extremes() -> Vec<wire::session_request::Message> {
    use wire::session_request::Message;
    let file = |bytes| Some(wire::StoredFile { file: "state-1".into(), bytes, blake3: "a".repeat(64) });
    let escape = || "\x1b]0;owned\x07\u{202e}".repeat(300);
    let of = |n: u64| {
        [
            Message::Ready(wire::Ready { generation: n, position: Some(n) }),
            Message::Fault(wire::Fault {
                generation: 1,
                kind: wire::FaultKind::NonFinite.into(),
                detail: escape(),
                ranks: vec![u32::MAX; 1000],
                position: n,
            }),
            Message::Fault(wire::Fault {
                generation: n,
                kind: wire::FaultKind::Links.into(),
                ranks: vec![u32::MAX; 1000],
                ..Default::default()
            }),
            Message::Heartbeat(wire::Heartbeat {
                position: n,
                activity: 1,
                leaves: n,
                slowest_leaf_us: n,
                ..Default::default()
            }),
            Message::Metrics(wire::MetricsRow {
                step: n,
                images_seen: n,
                time: f64::NAN,
                ..Default::default()
            }),
            Message::PartWritten(wire::PartWritten {
                generation: n,
                step: n,
                phase: u32::MAX,
                index: u32::MAX,
                count: u32::MAX,
                file: file(n),
                fingerprint: n,
                digest_bytes: n,
                stretches: vec![wire::Stretch { start: n, bytes: n, ends: vec![0; 9], subtrees: vec![0; 9] }],
            }),
            Message::PartDelayed(wire::PartDelayed { step: n, file: escape(), detail: escape() }),
            Message::PhaseSkipped(wire::PhaseSkipped { position: n, detail: escape() }),
            Message::Finished(wire::Finished { generation: n, position: n, complete: true }),
            Message::Evaluation(wire::EvaluationRow { step: n, features: escape(), ..Default::default() }),
            Message::Texts(wire::SampleTexts { step: n, text: escape() }),
            Message::Samples(wire::SampleGrid { step: n, width: u32::MAX, ..Default::default() }),
            Message::Loaded(wire::Loaded {
                passport: [("data".to_string(), escape())].into(),
                samples: n,
                phases_per_step: u32::MAX,
                gpu: escape(),
                ..Default::default()
            }),
        ]
    };
    [0, HIGHEST, HIGHEST + 1, i64::MAX as u64, i64::MAX as u64 + 1, u64::MAX]
        .into_iter()
        .flat_map(of)
        .collect()
}

#[test]
fn extreme_numbers_and_texts_disturb_nothing() {
    let target = Target::new();
    for message in extremes() {
        let stranger = target.join(hello()).unwrap();
        stranger.say_raw(SessionRequest { term: 1, message: Some(message) });
        stranger.say(FromWorker::Leave);
        // Refused, or let go.
        let _ = target.end_of(stranger);
    }
    let log = target.coordinator.output();
    assert!(!log.contains('\x1b') && !log.contains("panicked"), "{log}");
    target.assert_undisturbed();
}

#[test]
fn who_stalls_is_shut_out() {
    let target = Target::new();
    // These send nothing, or stop in the middle of a greeting or of a frame.
    let silent: Vec<TcpStream> = (0..300).map(|_| target.socket()).collect();
    let mut halting = [target.socket(), target.socket()];
    halting[0].write_all(b"PRI * HT").unwrap();
    halting[1].write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0").unwrap();
    // One sends a hello and then nothing.
    let mute = target.join(hello()).unwrap();
    let lost = target.run.wait_for("worker_lost", |event| event["worker"] == mute.welcome.worker.0);
    assert_eq!(lost["reason"], "it was silent for too long");
    target.end_of(mute).unwrap();
    // One sends much and never reads.
    let deaf = target.join(hello()).unwrap();
    for _ in 0..100_000 {
        deaf.say(FromWorker::Heartbeat(Progress::default(), Usage::default()));
    }
    target.logs(&format!("worker {} does not read its messages", deaf.welcome.worker));
    for mut socket in silent.into_iter().chain(halting) {
        // Closed, or reset.
        let _ = socket.read_to_end(&mut Vec::new());
    }
    target.assert_undisturbed();
}

#[test]
fn the_store_serves_the_newest_generation_and_what_is_small() {
    let target = Target::new();
    let mut store = StoreServiceClient::new(target.channel()).max_encoding_message_size(usize::MAX);
    let key = |term, generation, name: &str| Some(Key { term, generation, name: name.to_string() });
    target.runtime.block_on(async {
        for (term, generation) in [(1, 0), (1, 2), (0, 1), (2, 1), (1, u64::MAX)] {
            let set = SetRequest { key: key(term, generation, "x"), value: vec![1] };
            assert_eq!(store.set(set).await.unwrap_err().code(), Code::FailedPrecondition);
            let get = GetRequest { key: key(term, generation, "x"), timeout_ms: u64::MAX };
            assert_eq!(store.get(get).await.unwrap_err().code(), Code::FailedPrecondition);
            let add = AddRequest { key: key(term, generation, "x"), delta: 1 };
            assert_eq!(store.add(add).await.unwrap_err().code(), Code::FailedPrecondition);
        }
        let nameless = SetRequest { key: None, value: vec![] };
        assert_eq!(store.set(nameless).await.unwrap_err().code(), Code::InvalidArgument);
        let long = SetRequest { key: key(1, 1, &"k".repeat(100_000)), value: vec![] };
        assert_eq!(store.set(long).await.unwrap_err().code(), Code::ResourceExhausted);
        let large = SetRequest { key: key(1, 1, "k"), value: vec![0; 100_000] };
        assert_eq!(store.set(large).await.unwrap_err().code(), Code::ResourceExhausted);
        let huge = SetRequest { key: key(1, 1, "k"), value: vec![0; MESSAGE_LIMIT] };
        assert_eq!(store.set(huge).await.unwrap_err().code(), Code::OutOfRange);
        let add = |delta| AddRequest { key: key(1, 1, "n"), delta };
        store.add(add(i64::MAX)).await.unwrap();
        assert_eq!(store.add(add(1)).await.unwrap_err().code(), Code::OutOfRange);
    });
    target.assert_undisturbed();
}

#[test]
fn only_who_has_the_token_of_the_run_directory_may_change_the_run() {
    let target = Target::new();
    let channel = target.channel();
    target.runtime.block_on(async {
        let mut admin = AdminServiceClient::new(channel);
        for token in [None, Some("Bearer "), Some("Bearer wrong"), Some("wrong"), Some("Basic eDp5")] {
            let (mut drain, mut scale) =
                (Request::new(DrainRequest { worker: 1 }), Request::new(ScaleRequest { workers: 0 }));
            if let Some(token) = token {
                drain.metadata_mut().insert("authorization", token.parse().unwrap());
                scale.metadata_mut().insert("authorization", token.parse().unwrap());
            }
            assert_eq!(admin.drain(drain).await.unwrap_err().code(), Code::Unauthenticated);
            assert_eq!(admin.scale(scale).await.unwrap_err().code(), Code::Unauthenticated);
        }
        let status = admin.get_status(GetStatusRequest {}).await.unwrap().into_inner();
        assert_eq!((status.generation, status.workers.len()), (1, 1));
    });
    target.logs("refused an operator");
    target.assert_undisturbed();
}
