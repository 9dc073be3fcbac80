//! Tests of the dashboard over real connections.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpStream as Client;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ganglion_proto::listen::Accept;
use ganglion_proto::wire::{Activity, GetStatusResponse, WorkerStatus};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use super::*;
use crate::records::view::Publisher;

const PNG: &[u8] = b"\x89PNG\r\n\x1a\npixels";

/// A view of a run in progress, with one worker that has a GPU.
pub(super) fn view() -> View {
    let worker = WorkerStatus {
        worker: 3,
        host: "node \"7\"\n".to_string(),
        pid: 77,
        rank: Some(0),
        device: "cuda:0 NVIDIA H100".to_string(),
        shards: 8,
        local: true,
        connected: true,
        heartbeat_age: Some(0.5),
        position: 41,
        activity: Activity::Waiting.into(),
        resident_bytes: Some(1 << 29),
        gpu_memory_bytes: Some(1 << 33),
        gpu_utilisation: Some(87),
        ..WorkerStatus::default()
    };
    let status = GetStatusResponse {
        name: "digits".to_string(),
        run: "0123456789abcdef".to_string(),
        stage: "training".to_string(),
        step: 30,
        last_step: 100,
        failure_deadline: 5.0,
        workers: vec![worker],
        ..GetStatusResponse::default()
    };
    View { status, at: Instant::now() }
}

/// Index built from three rows and some events.
pub(super) fn chronicle() -> Chronicle {
    let chronicle = Chronicle::default();
    let profile = r#"{"data":0.1,"compute":5.0,"wait":1.0,"commit":0.5,"other":0.2}"#;
    for step in [10, 20, 30] {
        let row = format!(
            r#"{{"step":{step},"images_seen":640,"ledger":"00000000000000aa","grad_norm":0.5,"setting_r1":0.25,"loss_discriminator":1.25,"loss_generator":null,"score_real":0.75,"score_fake":0.25,"epoch":0.5,"time":1.5,"generation":1,"world_size":1,"images_per_second":812.5,"profile":{{"discriminator":{profile},"generator":{profile}}}}}"#
        );
        chronicle.row(row.as_bytes());
    }
    for event in [
        r#"{"time":1.0,"kind":"coordinator_started","term":1}"#,
        r#"{"time":2.0,"kind":"fault","worker":3,"fault":"peer"}"#,
        r#"{"time":3.0,"kind":"checkpoint","step":20,"folder":"step-00000020","state_digest":"ab"}"#,
        r#"{"time":4.0,"kind":"samples","step":20}"#,
        r#"{"time":4.5,"kind":"real_samples","file":"samples/real.png"}"#,
        r#"{"time":5.0,"kind":"data","found":{"samples":9,"channels":3,"width":64,"height":64,"class_count":1000,"class_rule":"folder","classes":[{"name":"cat","samples":9}],"left_out":{".gif":{"count":2,"example":"a.gif"}}}}"#,
    ] {
        chronicle.event(event.as_bytes());
    }
    chronicle
}

struct Bench {
    served: Served,
    publisher: Publisher,
    _folder: tempfile::TempDir,
}

async fn bench(guard: impl FnOnce(SocketAddr) -> Guard) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("samples")).unwrap();
    std::fs::write(folder.path().join("samples/step-00000020.png"), PNG).unwrap();
    std::fs::write(folder.path().join("samples/step-00000020.txt"), "a text").unwrap();
    std::fs::write(folder.path().join("samples/real.png"), PNG).unwrap();
    std::fs::write(folder.path().join("secret.png"), "secret").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (publisher, view) = watch::channel(Some(Arc::new(self::view())));
    let site = Site {
        view,
        chronicle: chronicle(),
        samples: folder.path().join("samples"),
        job: serde_json::json!({ "job": { "name": "digits" } }),
        guard: guard(listener.local_addr().unwrap()),
        asked: watch::Sender::new(None),
    };
    Bench { served: serve(listener, site, plainly).unwrap(), publisher, _folder: folder }
}

pub(super) struct Answer {
    status: u16,
    head: String,
    pub(super) body: Vec<u8>,
}

/// Sends a raw request and reads the answer to the end.
pub(super) async fn say(address: SocketAddr, request: String) -> Answer {
    let spoken = tokio::task::spawn_blocking(move || {
        let mut client = Client::connect(address).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(request.as_bytes()).unwrap();
        let mut all = Vec::new();
        // A server that has answered may close before it has read everything that a client sends.
        let _ = client.read_to_end(&mut all);
        all
    });
    let all = spoken.await.unwrap();
    let end = all.windows(4).position(|four| four == b"\r\n\r\n").expect("an answer has a head");
    let head = String::from_utf8_lossy(&all[..end]).into_owned();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body: all[end + 4..].to_vec() }
}

impl Answer {
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

impl Bench {
    /// Sends a raw request and reads the answer to the end.
    async fn say(&self, request: String) -> Answer {
        say(self.served.address, request).await
    }

    async fn ask(&self, method: &str, path: &str, headers: &str) -> Answer {
        self.say(format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n"))
            .await
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "").await
    }
}

#[tokio::test]
async fn everything_is_where_it_is_looked_for() {
    let bench = bench(Guard::open).await;
    for (path, kind) in [
        ("/", "text/html"),
        ("/style.css", "text/css"),
        ("/app.js", "text/javascript"),
        ("/format.js", "text/javascript"),
        ("/job.js", "text/javascript"),
        ("/chart.js", "text/javascript"),
        ("/timeline.js", "text/javascript"),
        ("/icon.svg", "image/svg+xml"),
        ("/api/status", "application/json"),
        ("/api/metrics", "application/json"),
        ("/api/events", "application/json"),
        ("/api/samples", "application/json"),
        ("/samples/step-00000020.png?run=0", "image/png"),
        ("/samples/step-00000020.txt?run=0", "text/plain; charset=utf-8"),
        ("/samples/real.png", "image/png"),
        ("/metrics", "text/plain"),
        ("/healthz", "text/plain"),
        ("/readyz", "text/plain"),
    ] {
        let answer = bench.get(path).await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.header("content-type").unwrap().starts_with(kind), "{path}: {}", answer.head);
        assert!(answer.header("content-security-policy").unwrap().contains("default-src 'none'"), "{path}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        let head = bench.ask("HEAD", path, "").await;
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
    }
    assert_eq!(bench.get("/api/nothing").await.status, 404);
    assert_eq!(bench.get("/samples/step-00000020.png").await.body, PNG);
}

#[tokio::test]
async fn the_status_is_the_published_one_and_what_the_files_tell() {
    let bench = bench(Guard::open).await;
    let status = bench.get("/api/status").await.json();
    assert_eq!((&status["step"], &status["workers"][0]["activity"]), (&30.into(), &"waiting".into()));
    assert_eq!((&status["rows"], &status["events"]), (&3.into(), &6.into()));
    assert_eq!(status["pictures"], 2);
    let data = &status["data"];
    assert_eq!(
        (&data["samples"], &data["class_count"], &data["classes"][0]["name"]),
        (&9.into(), &1000.into(), &"cat".into())
    );
    assert_eq!(data["left_out"][".gif"]["count"], 2);
    let summary = "9 samples of 64 x 64 pixels, in colour";
    assert!(data["summary"].as_str().unwrap().starts_with(summary), "{data}");
    assert!(data["warnings"][0].as_str().unwrap().contains("2 .gif (a.gif)"), "{data}");
    assert_eq!(bench.get("/api/samples").await.json()["real"], "/samples/real.png");
    assert_eq!(status["checkpoints"][0]["state_digest"], "ab");
    assert_eq!(status["job"]["job"]["name"], "digits");
    let mut newer = view();
    newer.status.step = 40;
    bench.publisher.send_replace(Some(Arc::new(newer)));
    assert_eq!(bench.get("/api/status").await.json()["step"], 40);
    bench.publisher.send_replace(None);
    for path in ["/api/status", "/metrics", "/readyz"] {
        assert_eq!(bench.get(path).await.status, 503, "{path}: nothing is known yet");
    }
}

#[tokio::test]
async fn curves_and_events_come_in_bounded_pieces() {
    let bench = bench(Guard::open).await;
    let all = bench.get("/api/metrics?points=1000000000").await.json();
    assert_eq!(all["step"], serde_json::json!([10, 20, 30]));
    assert_eq!(all["loss_discriminator"]["mean"][0], 1.25);
    assert_eq!(all["loss_generator"]["mean"][0], Value::Null);
    assert_eq!(all["wait"]["mean"][0], 2.0);
    let generator =
        serde_json::json!({ "name": "loss_generator", "group": "loss", "of": "generator", "label": "G" });
    assert_eq!((&all["scalars"][0]["name"], &all["scalars"][3]), (&"grad_norm".into(), &generator));
    assert_eq!(all["scalars"][1]["group"], "setting");
    assert_eq!(bench.get("/api/metrics?from=21").await.json()["step"], serde_json::json!([30]));
    assert!(bench.get("/api/metrics?points=1").await.json()["step"].as_array().unwrap().len() <= 2);
    let page = bench.get("/api/events?after=1").await.json();
    assert_eq!((&page["next"], &page["events"][0]["event"]["fault"]), (&6.into(), &"peer".into()));
    assert_eq!(bench.get("/api/events?after=9").await.json()["events"], serde_json::json!([]));
    for wrong in
        ["/api/metrics?from=-1", "/api/metrics?points=x", "/api/events?after=1e3", "/api/events?after="]
    {
        assert_eq!(bench.get(wrong).await.status, 400, "{wrong}");
    }
    let samples = bench.get("/api/samples").await.json();
    assert_eq!(samples["samples"][0]["url"], "/samples/step-00000020.png");
}

/// A picture is served only under a name that the coordinator gives.
#[tokio::test]
async fn no_other_file_is_served() {
    let bench = bench(Guard::open).await;
    for name in [
        "../secret.png",
        "..%2fsecret.png",
        "%2e%2e/secret.png",
        "step-20.png",
        "step-000000020.png",
        "step-+0000020.png",
        "step-00000020.PNG",
        "step-00000021.png",
        "step-00000020.png%00",
        "step-99999999999999999999.png",
        "",
    ] {
        let answer = bench.get(&format!("/samples/{name}")).await;
        assert_eq!(answer.status, 404, "{name}");
        assert!(!answer.body.windows(6).any(|six| six == b"secret"), "{name}");
    }
}

#[tokio::test]
async fn nothing_can_be_changed() {
    let bench = bench(Guard::open).await;
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT-ME"] {
        for path in ["/", "/api/status", "/metrics", "/nothing"] {
            let answer = bench.ask(method, path, "").await;
            assert_eq!((answer.status, answer.header("allow")), (405, Some("GET, HEAD")), "{method} {path}");
        }
    }
    assert_eq!(bench.ask("GET", "/api/status", "content-length: 5\r\n").await.status, 413);
    assert_eq!(bench.ask("GET", "/api/status", "transfer-encoding: chunked\r\n").await.status, 413);
    assert_eq!(
        bench.ask("GET", "/api/status", &format!("x: {}\r\n", "y".repeat(HEADER_BYTES))).await.status,
        431
    );
}

#[tokio::test]
async fn another_hosts_page_learns_nothing() {
    let bench = bench(Guard::open).await;
    let by = |host: &str| format!("GET /api/status HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    assert_eq!(bench.say(by("evil.example")).await.status, 421);
    assert_eq!(bench.say(by(&bench.served.address.to_string())).await.status, 200);
    assert_eq!(
        bench.say("GET /healthz HTTP/1.1\r\nhost: probe\r\nconnection: close\r\n\r\n".into()).await.status,
        200
    );
}

#[tokio::test]
async fn a_guarded_site_is_for_those_with_its_token() {
    let bench = bench(|_| Guard::with_token("s3cret", "0123456789", false)).await;
    for path in
        ["/", "/api/status", "/api/events", "/metrics", "/app.js", "/samples/step-00000020.png", "/nothing"]
    {
        assert_eq!(bench.get(path).await.status, 401, "{path}");
        assert_eq!(bench.ask("GET", path, "authorization: Bearer wrong\r\n").await.status, 401, "{path}");
    }
    for probe in ["/healthz", "/readyz"] {
        assert_eq!(bench.get(probe).await.status, 200, "{probe}");
    }
    assert_eq!(bench.ask("GET", "/metrics", "authorization: Bearer s3cret\r\n").await.status, 200);
    let page = bench.get("/?token=s3cret").await;
    let cookie = page.header("set-cookie").expect("a cookie").to_string();
    assert!(
        page.status == 200 && cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"),
        "{cookie}"
    );
    let shown = format!("cookie: {}\r\n", cookie.split(';').next().unwrap());
    assert_eq!(bench.ask("GET", "/api/status", &shown).await.status, 200);
}

#[tokio::test]
async fn ready_is_a_coordinator_whose_loop_comes_round() {
    let bench = bench(Guard::open).await;
    assert_eq!(bench.get("/readyz").await.status, 200);
    let stuck = View { at: Instant::now() - Duration::from_secs(60), ..view() };
    bench.publisher.send_replace(Some(Arc::new(stuck)));
    let answer = bench.get("/readyz").await;
    assert_eq!(answer.status, 503);
    assert!(String::from_utf8_lossy(&answer.body).contains("60 s"));
    let late = |seconds, outcome: &str| {
        let mut late = View { at: Instant::now() - Duration::from_secs(seconds), ..view() };
        late.status.outcome = outcome.to_string();
        Some(Arc::new(late))
    };
    let mut healthy = Vec::new();
    for (seconds, outcome) in [(9, ""), (11, ""), (60, "complete"), (80, "complete")] {
        bench.publisher.send_replace(late(seconds, outcome));
        healthy.push(bench.get("/healthz").await.status);
    }
    assert_eq!(healthy, [200, 503, 200, 503], "two deadlines of 5 s, and a minute more at the end");
    bench.publisher.send_replace(None);
    assert_eq!(bench.get("/healthz").await.status, 200, "it starts");
}

/// Invariant 2: clients that send nothing, or half a request, keep no other client out.
#[tokio::test]
async fn idle_connections_delay_no_probe() {
    let bench = bench(Guard::open).await;
    let address = bench.served.address;
    let silent = move |at: usize| {
        let mut client = Client::connect(address).unwrap();
        match at % 3 {
            0 => client.write_all(b"GET /api/status HT").unwrap(),
            1 => client.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap(),
            _ => {}
        }
        client
    };
    let crowd = tokio::task::spawn_blocking(move || (0..LIMITS.all + 2).map(silent).collect::<Vec<_>>());
    let crowd = crowd.await.unwrap();
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!(bench.get("/healthz").await.status, 200);
    }
    assert!(begun.elapsed() < HEADER_LIMIT, "nobody was waited for");
    drop(crowd);
}

/// Invariant 2: an address that opens connections as fast as it can keeps no other address out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_from_one_address_delays_no_probe_of_another() {
    /// Time limit of a probe in the manifests in deploy/kubernetes.
    const LIMIT: Duration = Duration::from_secs(5);
    let bench = bench(Guard::open).await;
    let address = bench.served.address;
    let idle: Vec<_> = (0..LIMITS.all + 2).map(|_| Client::connect(address).unwrap()).collect();
    let (opened, is_over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let flood = |_| {
        let (opened, is_over) = (opened.clone(), is_over.clone());
        std::thread::spawn(move || {
            let mut open = VecDeque::new();
            for at in 0.. {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(mut client) = Client::connect(address) else { continue };
                opened.fetch_add(1, Ordering::Relaxed);
                let said =
                    [&b""[..], b"GET /api/st", b"GET /api/metrics HTTP/1.1\r\nhost: localhost\r\n\r\n"]
                        [at % 3];
                let _ = client.write_all(said);
                open.push_back(client);
                // As fast as the server accepts: the system's own queue is shared by all addresses,
                // and stays short so.
                if open.len() > 2 * LIMITS.all
                    && let Some(mut oldest) = open.pop_front()
                {
                    oldest.set_read_timeout(Some(HEADER_LIMIT)).unwrap();
                    let _ = oldest.read_to_end(&mut Vec::new());
                }
            }
        })
    };
    let flood: Vec<_> = (0..2).map(flood).collect();
    for host in [2, 3].repeat(25) {
        // The shell publishes a view a second: without one, the server says that its loop hangs.
        bench.publisher.send_replace(Some(Arc::new(view())));
        let before = opened.load(Ordering::Relaxed);
        let probe = async {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(([127, 0, 0, host], 0).into()).unwrap();
            let mut probe = socket.connect(address).await.unwrap();
            probe
                .write_all(b"GET /healthz HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n")
                .await
                .unwrap();
            let mut answer = Vec::new();
            probe.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let answer = timeout(LIMIT, probe).await.expect("answered in time");
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        // The next probe comes during the flood.
        let goes_on = async {
            while opened.load(Ordering::Relaxed) < before + 20 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(20), goes_on).await.expect("the flood goes on");
    }
    is_over.store(true, Ordering::Relaxed);
    flood.into_iter().for_each(|flood| flood.join().unwrap());
    drop(idle);
}

/// A listener with two clients, each with the other end of a pipe.
struct Two(Vec<tokio::io::DuplexStream>);

impl Accept for Two {
    type Stream = tokio::io::DuplexStream;

    async fn accept(&mut self) -> io::Result<(tokio::io::DuplexStream, SocketAddr)> {
        match self.0.pop() {
            Some(stream) => Ok((stream, ([10, 0, 0, 1], 1).into())),
            None => pending().await,
        }
    }
}

/// Invariant 2: the request had not been looked at when its connection was to make place for another.
#[tokio::test]
async fn a_question_that_came_before_its_place_was_taken_is_answered() {
    let limits = Limits { all: 1, strangers_of_address: 1, idle_of_address: 1, grace: Duration::ZERO };
    for _ in 0..20 {
        let router = axum::Router::new().route("/", axum::routing::get(async || "here"));
        let ((mut first, one), (_second, other)) = (tokio::io::duplex(1024), tokio::io::duplex(1024));
        first.write_all(b"GET / HTTP/1.1\r\nhost: node\r\n\r\n").await.unwrap();
        let (seated, mut served) = tokio::sync::mpsc::unbounded_channel();
        let serve = move |stream, _, place| drop(seated.send((stream, place)));
        let listener = Two(vec![other, one]);
        let serving = tokio::spawn(accept_loop(listener, Room::new(limits), "a test", pending(), serve));
        let (stream, place) = served.recv().await.unwrap();
        let _newcomer = served.recv().await.unwrap();
        converse(stream, router, &place).await;
        let mut answer = String::new();
        first.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("here"), "{answer:?}");
        serving.abort();
    }
}

/// Invariant 1: a client that does not read its answers delays no other.
#[tokio::test]
async fn a_client_that_does_not_read_delays_nobody() {
    let bench = bench(Guard::open).await;
    let mut deaf = Client::connect(bench.served.address).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let question = b"GET /app.js HTTP/1.1\r\nhost: localhost\r\n\r\n";
    // Until the connection takes no more: the answers fill the way back.
    while deaf.write(question).is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.get("/api/status").await.status, 200);
}

#[tokio::test]
async fn who_looks_sees_the_end() {
    let bench = bench(Guard::open).await;
    let ask_again = async {
        loop {
            bench.get("/api/status").await;
        }
    };
    bench.get("/api/status").await;
    let mut ended = view();
    ended.status.outcome = "complete".to_string();
    bench.publisher.send_replace(Some(Arc::new(ended)));
    let begun = Instant::now();
    tokio::select! {
        () = bench.served.farewell() => {}
        () = ask_again => {}
    }
    assert!(begun.elapsed() >= REST, "it can still ask for the last rows");
    assert!(bench.served.site.asked.borrow().is_some_and(|(_, ended)| ended));
}

/// The scripts find what they look for in the page.
#[test]
fn the_scripts_name_elements_that_the_page_has() {
    let content = |path: &str| assets::all().iter().find(|asset| asset.path == path).unwrap().content;
    let (page, script) = (content("/"), content("/app.js"));
    let named = |call: &'static str| script.split(call).skip(1).filter_map(|rest| rest.split('\'').next());
    let ids: Vec<&str> = ["$('", " set('", "(set('", "Smalls('"].into_iter().flat_map(named).collect();
    assert!(ids.len() > 60, "{}", ids.len());
    for id in ids {
        assert!(page.contains(&format!("id=\"{id}\"")), "there is no element {id}");
    }
}

/// One module writes all numbers, so each is written alike wherever it is.
#[test]
fn numbers_are_written_in_one_place() {
    let scripts =
        assets::all().iter().filter(|asset| asset.path.ends_with(".js") && asset.path != "/format.js");
    for asset in scripts {
        for own in ["toFixed", "toPrecision", "toExponential", "toLocale", "Intl."] {
            assert!(!asset.content.contains(own), "{}: {own}", asset.path);
        }
    }
}

/// The page works without a network: it loads nothing from elsewhere.
#[test]
fn the_page_needs_nothing_from_elsewhere() {
    for asset in assets::all() {
        let (path, text) = (asset.path, asset.content.replace("http://www.w3.org/", ""));
        for elsewhere in
            ["http://", "https://", "url(", "@import", "<script>", "style=", "innerHTML", "eval("]
        {
            assert!(!text.contains(elsewhere), "{path}: {elsewhere}");
        }
    }
}
