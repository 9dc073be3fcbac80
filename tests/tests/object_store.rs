//! Checkpoints in an object store: a server that speaks S3, behind a proxy that can be cut.
#![cfg(feature = "cloud")]
#![allow(clippy::unwrap_used)] // a test may panic

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ganglion_tests::{Ended, Process, Run, SMALL_MLP, eventually, program, send};
use image::{GrayImage, ImageFormat, Luma};
use nix::sys::signal::Signal;
use serde_json::json;
use zip::write::FileOptions;

const BUCKET: &str = "bucket";
/// Text that this server accepts as a signature.
const SIGNED: &str =
    "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=a";
/// A secret that must not appear anywhere.
const SECRET: &str = "hush-hush-hush";

/// S3 server that keeps its objects in memory.
struct Server {
    process: Process,
    address: SocketAddr,
}

impl Server {
    fn start(variables: &[(&str, &str)]) -> Server {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new("moto_server");
        command.args(["-H", "127.0.0.1", "-p", &address.port().to_string()]);
        command.envs(variables.iter().copied());
        let server = Server { process: Process::start(command), address };
        eventually("server", || TcpStream::connect(address).ok());
        server
    }

    /// Starts a server with a bucket.
    fn with_bucket() -> Server {
        let server = Server::start(&[]);
        assert_eq!(server.ask("PUT", "", b"").0, 200, "{}", server.process.output());
        server
    }

    /// A request for something in the bucket: the status and the content of the answer.
    fn ask(&self, method: &str, rest: &str, content: &[u8]) -> (u16, Vec<u8>) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let length = content.len();
        write!(
            stream,
            "{method} /{BUCKET}{rest} HTTP/1.1\r\nHost: {}\r\nAuthorization: {SIGNED}\r\nConnection: close\r\n\
             Content-Length: {length}\r\n\r\n",
            self.address
        )
        .unwrap();
        stream.write_all(content).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
        let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
        (status, answer.split_off(end + 4))
    }

    /// The objects under a prefix, by their names behind it.
    fn objects(&self, prefix: &str) -> BTreeMap<String, Vec<u8>> {
        let (_, listed) = self.ask("GET", &format!("?list-type=2&prefix={prefix}"), b"");
        let listed = String::from_utf8(listed).unwrap();
        let keys = listed.split("<Key>").skip(1).map(|rest| rest.split("</Key>").next().unwrap());
        let read = |key: &str| {
            let (status, content) = self.ask("GET", &format!("/{key}"), b"");
            assert_eq!(status, 200, "{key}");
            (key[prefix.len()..].to_string(), content)
        };
        keys.map(read).collect()
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        variables(self.address)
    }
}

fn variables(endpoint: SocketAddr) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT_URL", format!("http://{endpoint}")),
        ("AWS_ALLOW_HTTP", "true".to_string()),
        ("AWS_REGION", "us-east-1".to_string()),
        ("AWS_ACCESS_KEY_ID", "somebody".to_string()),
        ("AWS_SECRET_ACCESS_KEY", SECRET.to_string()),
    ]
}

/// Connection to a server, which can be cut and restored.
struct Way {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Way {
    fn to(server: SocketAddr) -> Way {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let way = Way { address, cut: Arc::default(), open: Arc::default() };
        let (cut, open) = (way.cut.clone(), way.open.clone());
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(server) else { continue };
                if cut.load(Ordering::SeqCst) {
                    continue;
                }
                open.lock().unwrap().extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                carry(client.try_clone().unwrap(), server.try_clone().unwrap());
                carry(server, client);
            }
        });
        way
    }

    fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn mend(&self) {
        self.cut.store(false, Ordering::SeqCst);
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
}

fn start(run: &Run, arguments: &[&str], variables: &[(&str, String)]) -> Process {
    let mut command = run.command(arguments);
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    Process::start(command)
}

fn ask(program_name: &str, arguments: &[&str], variables: &[(&str, String)]) -> Ended {
    let mut command = Command::new(program(program_name));
    command.args(arguments).envs(variables.iter().map(|(name, value)| (name, value)));
    Process::start(command).wait()
}

#[track_caller]
fn assert_complete(coordinator: Process) {
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(!ended.output.contains(SECRET));
}

#[track_caller]
fn assert_audited(run: &Run, variables: &[(&str, String)]) {
    let audited = ask("coordinator", &["audit", run.path("").to_str().unwrap()], variables);
    assert_eq!(audited.code, Some(0), "{}", audited.output);
    assert!(!audited.output.contains(": 0 files"), "{}", audited.output);
}

/// Files of a folder, by name, without the run's marker.
fn files(folder: &std::path::Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let whole = entries.filter(|entry| entry.file_type().unwrap().is_file());
    whole.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

const JOB: &[&str] =
    &["job.steps=6", "checkpoint.every_steps=2", "checkpoint.keep_last=2", "sample.every_steps=3"];

#[test]
fn a_bucket_gets_the_bytes_that_a_folder_gets() {
    let local = Run::new(&[SMALL_MLP, JOB]);
    local.complete(2);
    let server = Server::with_bucket();
    let mut run = Run::new(&[SMALL_MLP, JOB]);
    run.set("checkpoint.url=s3://bucket/a/b");
    // An existing object with other content is damaged, and is written again.
    let damaged = "/a/b/step-00000006/state-00001-of-00004.safetensors";
    assert_eq!(server.ask("PUT", damaged, b"damaged").0, 200);
    let variables = server.variables();
    let mirrored = ["--workers", "2", "--mirror", "s3://bucket/mirror"];
    assert_complete(start(&run, &mirrored, &variables));

    let folder = local.newest_checkpoint();
    let name = folder.file_name().unwrap().to_str().unwrap();
    let there = server.objects(&format!("a/b/{name}/"));
    assert_eq!(there.keys().collect::<Vec<_>>(), files(&folder).keys().collect::<Vec<_>>());
    assert!(there == files(&folder), "the files differ");
    assert_eq!(server.ask("GET", "/a/b/latest", b"").1, format!("{name}\n").as_bytes());
    let kept = server.objects("a/b/").keys().filter(|key| key.ends_with("manifest.json")).count();
    assert_eq!(kept, 2, "older checkpoints are removed");
    assert_audited(&run, &variables);

    let copies = server.objects("mirror/");
    for file in ["job.toml", "metrics.jsonl", "events.jsonl", "samples/step-00000006.png"] {
        assert!(copies.get(file) == Some(&fs::read(run.path(file)).unwrap()), "{file} is not copied");
    }
    let picture = |place: &str| {
        let out = run.beside("out.png");
        let ended = ask("worker", &["sample", place, "--out", out.to_str().unwrap()], &variables);
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        fs::read(out).unwrap()
    };
    let drawn = picture(folder.to_str().unwrap());
    let file = format!("s3://bucket/a/b/{name}/generator_ema.safetensors");
    // The run's folder and its mirror lead to the bucket by their job.toml.
    for place in
        [run.path("").to_str().unwrap(), "s3://bucket/mirror", "s3://bucket/a/b", "s3://bucket/a/b@6", &file]
    {
        assert!(picture(place) == drawn, "{place}");
    }
    for file in ["job.toml", "events.jsonl", "journal.sqlite"] {
        let text = String::from_utf8_lossy(&fs::read(run.path(file)).unwrap()).into_owned();
        assert!(!text.contains(SECRET) && !text.contains("somebody"), "{file}");
    }

    // The place belongs to the run: the same command finds it finished, and another run is refused.
    let again = start(&run, &["--workers", "1"], &variables).wait();
    assert!(again.code == Some(0) && again.output.contains("is finished"), "{}", again.output);
    let mut other = Run::new(&[SMALL_MLP, JOB]);
    other.set("checkpoint.url=s3://bucket/a/b");
    let refused = start(&other, &["--workers", "1"], &variables).wait();
    assert!(refused.code == Some(2) && refused.output.contains("another run"), "{}", refused.output);
}

#[test]
fn a_large_part_goes_in_parts_and_comes_back() {
    let wide: &[&str] = &["model.width=640", "job.shard_batch=2", "job.data_shards=2", "job.steps=2"];
    let local = Run::new(&[wide]);
    let digest = local.complete(1);
    let server = Server::with_bucket();
    let mut run = Run::new(&[wide, &["job.steps=1"]]);
    run.set("checkpoint.url=s3://bucket");
    let variables = server.variables();
    assert_complete(start(&run, &["--workers", "1"], &variables));
    // The run resumes from a checkpoint that is read in ranges.
    run.set("job.steps=2");
    assert_complete(start(&run, &["--workers", "1"], &variables));
    let there = server.objects("step-00000002/");
    assert!(there == files(&local.newest_checkpoint()), "the files differ");
    assert!(there["state-00001-of-00002.safetensors"].len() > 8 << 20, "no part is large");
    let manifest: serde_json::Value = serde_json::from_slice(&there["manifest.json"]).unwrap();
    assert_eq!(manifest["state_digest"], digest.as_str());
    let uploads = String::from_utf8(server.ask("GET", "?uploads", b"").1).unwrap();
    assert!(!uploads.contains("<Upload>"), "an upload was left: {uploads}");
}

#[test]
fn data_of_a_bucket_are_those_of_a_folder() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/mnist-10k");
    let settings: &[&str] =
        &["job.steps=4", "data.kind=idx", "model.kind=dcgan-28", "model.width=4", "model.conditional=true"];
    let of = |path: &str| {
        let mut run = Run::new(&[settings, &["job.data_shards=2", "job.shard_batch=4"]]);
        run.set(&format!("data.path={path}"));
        run
    };
    let digest = of(folder.to_str().unwrap()).complete(1);
    let server = Server::with_bucket();
    for (name, content) in files(&folder) {
        assert_eq!(server.ask("PUT", &format!("/digits/{name}"), &content).0, 200);
    }
    let run = of("s3://bucket/digits");
    let cache = run.beside("cache");
    let mut variables = server.variables();
    variables.push(("GANGLION_CACHE_DIR", cache.to_str().unwrap().to_string()));
    assert_complete(start(&run, &["--workers", "2"], &variables));
    assert_eq!(run.digest(), digest);
    let fetched: Vec<_> =
        fs::read_dir(cache).unwrap().map(|entry| files(&entry.unwrap().path().join("files"))).collect();
    assert!(fetched.len() == 1 && fetched[0].contains_key("t10k-images-idx3-ubyte.gz"), "it lies here then");

    let absent = of("s3://bucket/nothing");
    let ended = start(&absent, &["--workers", "1"], &variables).wait();
    assert_eq!(ended.code, Some(2), "{}", ended.output);
    assert!(
        ended.output.contains("data.path: s3://bucket/nothing: there is nothing there"),
        "{}",
        ended.output
    );
}

/// Writes a picture of 8 x 8 pixels, or most of one.
fn picture(number: u8, whole: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let picture =
        GrayImage::from_fn(8, 8, |x, y| Luma([u8::try_from((x * 31 + y * 17) % 251).unwrap() ^ number]));
    picture.write_to(&mut Cursor::new(&mut bytes), ImageFormat::Png).unwrap();
    bytes.truncate(if whole { bytes.len() } else { bytes.len() - 20 });
    bytes
}

/// Pictures, an archive and records in a bucket that is unreachable for a while.
#[test]
fn data_of_a_bucket_are_checked_like_those_of_a_folder() {
    let server = Server::with_bucket();
    let put = |name: &str, content: &[u8]| assert_eq!(server.ask("PUT", name, content).0, 200);
    for number in 0..6 {
        put(
            &format!("/set/{}/{number}.png", ["cat", "dog"][usize::from(number % 2)]),
            &picture(number, number != 3),
        );
    }
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for number in 6..9 {
        archive.start_file(format!("cat/{number}.png"), FileOptions::default()).unwrap();
        archive.write_all(&picture(number, number != 8)).unwrap();
    }
    put("/set/more.zip", &archive.finish().unwrap().into_inner());
    let record = |label: u8| [vec![label], vec![label * 7; 3072]].concat();
    for number in 1..=5 {
        put(&format!("/good/data_batch_{number}.bin"), &[record(3), record(number)].concat());
        put(&format!("/bad/data_batch_{number}.bin"), &[record(3), record(number * 2)].concat());
    }

    let way = Way::to(server.address);
    let cache = tempfile::tempdir().unwrap();
    let mut variables = variables(way.address);
    variables.push(("GANGLION_CACHE_DIR", cache.path().to_str().unwrap().to_string()));
    let start = |data: &str| {
        let mut command = Command::new(program("coordinator"));
        command.args(["data", "check", "--json", "--data", data]);
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        Process::start(command)
    };
    let report = |ended: Ended, code: i32| -> serde_json::Value {
        assert_eq!(ended.code, Some(code), "{}", ended.output);
        assert!(!ended.output.contains(SECRET));
        let lines: String = ended.output.lines().skip_while(|line| *line != "{").collect();
        serde_json::Deserializer::from_str(&lines).into_iter().next().unwrap().unwrap()
    };

    way.cut();
    let waits = start("folder:s3://bucket/set");
    eventually("word of the wait", || waits.output().contains("trying again").then_some(()));
    way.mend();
    let ended = waits.wait();
    assert!(ended.output.contains("file 1 of 7"), "{}", ended.output);
    let found = report(ended, 2);
    assert_eq!(
        (&found["samples"], &found["bad"], &found["formats"]),
        (&json!(9), &json!(2), &json!({"png": 7}))
    );
    let names = [0, 1].map(|index| found["bad_samples"][index]["name"].as_str().unwrap());
    assert_eq!(names, ["dog/3.png", "more.zip/cat/8.png"]);
    assert_eq!(found["classes"], json!([{"name": "cat", "samples": 6}, {"name": "dog", "samples": 3}]));
    let alone = report(start("folder:s3://bucket/set/more.zip").wait(), 2);
    assert_eq!((&alone["samples"], &alone["bad_samples"][0]["name"]), (&json!(3), &json!("cat/8.png")));

    let found = report(start("cifar-10:s3://bucket/good").wait(), 0);
    assert_eq!((&found["samples"], &found["bad"], &found["class_count"]), (&json!(10), &json!(0), &json!(6)));
    let ended = start("cifar-10:s3://bucket/bad").wait();
    let says = "data_batch_5.bin: found label 10 in record 1";
    assert!(ended.code == Some(2) && ended.output.contains(says), "{}", ended.output);
    let ended = start("folder:s3://bucket/nothing").wait();
    assert!(ended.code == Some(2) && ended.output.contains("there is nothing there"), "{}", ended.output);
}

#[test]
fn a_mistake_is_said_at_once() {
    let server = Server::with_bucket();
    let strict = Server::start(&[("INITIAL_NO_AUTH_ACTION_COUNT", "0")]);
    for (server, url, says) in
        [(&server, "s3://no-such-bucket/a", "NoSuchBucket"), (&strict, "s3://bucket/a", "InvalidAccessKeyId")]
    {
        let mut run = Run::new(&[SMALL_MLP, JOB]);
        run.set(&format!("checkpoint.url={url}"));
        let ended = start(&run, &["--workers", "1"], &server.variables()).wait();
        assert_eq!(ended.code, Some(2), "{}", ended.output);
        assert!(ended.output.contains(says) && ended.output.contains("credentials"), "{}", ended.output);
    }
}

/// Time for which a store stays unreachable after the awaited event: longer than a client's own
/// attempts.
const OUTAGE: Duration = Duration::from_secs(30);

const LONG: &[&str] = &[
    "job.steps=4000",
    "job.failure_deadline=2",
    "checkpoint.every_steps=400",
    "checkpoint.keep_last=0",
    "metrics.every_steps=10",
];

/// While the store is away a worker is killed, then the coordinator, which is started again and waits.
#[test]
fn training_goes_on_while_the_store_is_away_and_nothing_is_lost() {
    let digest = Run::new(&[SMALL_MLP, LONG]).complete(1);
    let server = Server::with_bucket();
    let way = Way::to(server.address);
    let mut run = Run::new(&[SMALL_MLP, LONG]);
    run.set("checkpoint.url=s3://bucket/run");
    let variables = variables(way.address);
    let coordinator = start(&run, &["--workers", "2"], &variables);
    run.wait_for("checkpoint", |_| true);
    way.cut();
    run.wait_for("checkpoint_delayed", |_| true);
    let now = run.wait_for_step(1);
    run.wait_for_step(now + 100);
    send(run.pids(1)[1], Signal::SIGKILL);
    run.wait_for("generation_formed", |event| event["generation"] == 2);
    coordinator.signal(Signal::SIGKILL);
    drop(coordinator);
    let again = start(&run, &["--workers", "2"], &variables);
    eventually("word of the wait", || again.output().contains("waiting for the storage").then_some(()));
    thread::sleep(OUTAGE);
    way.mend();
    assert_complete(again);
    assert_audited(&run, &variables);
    let there = server.objects("run/");
    let latest = String::from_utf8(there["latest"].clone()).unwrap();
    assert_eq!(latest, "step-00004000\n");
    let manifest: serde_json::Value =
        serde_json::from_slice(&there[&format!("{}/manifest.json", latest.trim())]).unwrap();
    assert_eq!(manifest["state_digest"], digest.as_str());
}

/// The server accepts connections and never answers, while more checkpoints are due than may wait.
#[test]
fn a_store_that_hangs_does_not_hold_training_up() {
    let job: &[&str] = &["job.steps=2000", "checkpoint.every_steps=50", "metrics.every_steps=10"];
    let digest = Run::new(&[SMALL_MLP, job]).complete(1);
    let server = Server::with_bucket();
    let mut run = Run::new(&[SMALL_MLP, job]);
    run.set("checkpoint.url=s3://bucket/run");
    let variables = server.variables();
    let coordinator = start(&run, &["--workers", "2"], &variables);
    run.wait_for("checkpoint", |_| true);
    server.process.signal(Signal::SIGSTOP);
    let now = run.wait_for_step(1);
    run.wait_for_step(now + 400);
    server.process.signal(Signal::SIGCONT);
    assert_complete(coordinator);
    assert_audited(&run, &variables);
    let groups = run.events().iter().filter(|event| event["kind"] == "generation_formed").count();
    assert_eq!(groups, 1, "nobody was taken for late");
    let last = run.events().into_iter().rfind(|event| event["kind"] == "checkpoint").unwrap();
    let of = (last["step"].as_u64(), last["state_digest"].as_str());
    assert_eq!(of, (Some(2000), Some(digest.as_str())));
}

/// The last checkpoint cannot be written: the run waits for it, and ends once it can.
#[test]
fn a_run_ends_only_with_its_last_checkpoint() {
    let server = Server::with_bucket();
    let way = Way::to(server.address);
    let mut run =
        Run::new(&[SMALL_MLP, &["job.steps=300", "checkpoint.every_steps=0", "metrics.every_steps=1"]]);
    run.set("checkpoint.url=s3://bucket/run");
    let mut coordinator = start(&run, &["--workers", "1"], &variables(way.address));
    run.wait_for_step(1);
    way.cut();
    run.wait_for_step(300);
    run.wait_for("checkpoint_delayed", |_| true);
    thread::sleep(OUTAGE);
    assert!(coordinator.is_running());
    way.mend();
    assert_complete(coordinator);
    assert!(server.objects("run/").contains_key("step-00000300/manifest.json"));
}
