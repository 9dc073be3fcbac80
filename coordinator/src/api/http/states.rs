//! Synthetic states of runs: everything at its largest, and everything missing. A browser looks at the page
//! in each of them (`tests/browser/dashboard.py`), and the answers behind the page are checked here.

use std::io::Read;
use std::path::Path;

use ganglion_proto::record::{MetricsRow, Profile};
use ganglion_proto::wire::{Activity, GetStatusResponse, WorkerStatus};
use serde_json::{Value, json};

use super::*;
use crate::job_file::{Source, read};
use crate::system::clock::now;

/// Longest name that a job can have.
const LONG_NAME: &str = "street-scenes-at-night-with-rain-and-neon-256x256-r3gan-seed-0007";
/// Longest name that a scalar can have.
const LONG_SCALAR: &str = "perceptual_distance_between_reconstructed_and_original_patches_0";
const HOST: &str = "gpu-node-0042.training-cluster.eu-central-2.internal.example.com";
/// Times of the records end here: the page shows how long ago things were.
const DAYS: f64 = 86_400.0;
const ROWS: u64 = 3000;
const STEPS_OF_ROW: u64 = 4000;
const NEWEST: u64 = ROWS * STEPS_OF_ROW;
const WORKERS: u32 = 64;

/// Settings of a job in which everything changes over the run.
const SETTINGS: [&str; 21] = [
    "model.kind=r3gan-28",
    "model.width=64",
    "model.conditional=true",
    "model.ema_schedule=cosine",
    "model.ema_half_life_images=5000000",
    "loss.kind=hinge",
    "loss.r1=150.0",
    "loss.final_r1=15.0",
    "loss.r2=150.0",
    "loss.final_r2=15.0",
    "loss.penalty_every=4",
    "optimizer.learning_rate=0.0002",
    "optimizer.final_learning_rate=0.00005",
    "optimizer.final_beta2=0.99",
    "optimizer.decay_images=20000000000",
    "augmentation.kinds=flip,rotate90,translation,color,cutout",
    "augmentation.flip=true",
    "augmentation.adaptive=true",
    "job.data_shards=128",
    "job.shard_batch=64",
    "job.steps=20000000",
];

/// A state of a run, by its name.
struct State {
    name: &'static str,
    status: GetStatusResponse,
    chronicle: Chronicle,
    job: Value,
}

/// Noise from -1 to 1, the same each time.
fn noise(at: u64) -> f64 {
    let hash = at.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    f64::from(u32::try_from((hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32).unwrap_or(0))
        / 2f64.powi(31)
        - 1.0
}

fn float(at: u64) -> f64 {
    f64::from(u32::try_from(at).unwrap_or(u32::MAX))
}

fn job(settings: &[&str]) -> Value {
    let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_string()).collect();
    serde_json::to_value(read(&Source::Embedded, &settings).unwrap().to_table()).unwrap()
}

/// Scalars of a GAN that explodes, and all settings that can change.
fn gan(at: u64) -> Vec<(String, f64)> {
    let passed = float(at) / float(ROWS);
    let fall =
        |first: f64, last: f64| last + (first - last) * 0.5 * (1.0 + (std::f64::consts::PI * passed).cos());
    let explodes = 10f64.powf(11.7 * passed) * (1.0 + 0.3 * noise(at));
    let scalars = [
        ("loss_discriminator", -explodes),
        ("loss_generator", explodes / 32.0),
        ("score_real", 0.5 + 0.3 * passed + 0.1 * noise(at)),
        ("score_fake", 0.5 - 0.3 * passed + 0.1 * noise(at + 1)),
        ("gradient_norm", explodes.sqrt()),
        ("setting_learning_rate_generator", fall(2e-4, 5e-5)),
        ("setting_learning_rate_discriminator", fall(2e-4, 5e-5)),
        ("setting_beta2", fall(0.9, 0.99)),
        ("setting_r1", fall(150.0, 15.0)),
        ("setting_r2", fall(150.0, 15.0)),
        ("setting_ema_half_life_images", fall(0.0, 5e6)),
        ("setting_augmentation_probability", (passed + 0.02 * noise(at)).clamp(0.0, 1.0)),
    ];
    scalars.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

/// Scalars of an objective of somebody's own.
fn own(at: u64) -> Vec<(String, f64)> {
    let mut scalars = vec![(
        "loss_transformer_with_a_long_name".to_string(),
        4.0 / (1.0 + float(at)) + 0.1 * noise(at).abs(),
    )];
    let names = (0..20).map(|number| match number {
        0 => LONG_SCALAR.to_string(),
        number => format!("head_{number}_entropy"),
    });
    scalars.extend(
        (0..).zip(names).map(|(number, name)| (name, noise(at + number) * 10f64.powf(float(number) - 6.0))),
    );
    scalars
}

fn row(chronicle: &Chronicle, at: u64, begun: f64, scalars: Vec<(String, f64)>) {
    let profile =
        |compute| Profile { data: 3.2, compute, wait: 120.0 * (1.0 + noise(at)), commit: 14.0, other: 6.0 };
    let line = MetricsRow {
        step: at * STEPS_OF_ROW,
        images_seen: at * STEPS_OF_ROW * 8192,
        scalars: scalars.into_iter().collect(),
        epoch: float(at) * 27.3,
        time: begun + float(at) * 60.0,
        generation: 128,
        world_size: WORKERS,
        images_per_second: 1_234_567.0 * (1.0 + 0.2 * noise(at)),
        profile: [("discriminator", profile(2400.0)), ("generator", profile(1100.0))].into_iter().collect(),
        ..MetricsRow::default()
    };
    chronicle.row(line.line().as_bytes());
}

fn event(chronicle: &Chronicle, time: f64, kind: &str, mut keys: Value) {
    keys["time"] = time.into();
    keys["kind"] = kind.into();
    chronicle.event(keys.to_string().as_bytes());
}

/// Metrics of an evaluation: all that there are, small and large.
fn metrics(at: u64) -> Value {
    let trend = 1.0 / (1.0 + float(at) / 8.0) + 0.03 * noise(at);
    json!({
        "classifier_score": 9.87 - trend, "discriminator_overfitting": 0.9 - trend / 2.0, "diversity": 1.0 - trend / 4.0,
        "frechet_distance": 123_456.0 * trend, "kid": 1.5e-5 * trend, "label_entropy": 0.998, "label_kl": 0.0123 * trend,
        "memorised": null, "modes": 1000.0, "precision": 0.8 - trend / 4.0, "recall": 0.6 - trend / 2.0,
        "sliced_wasserstein": 16.2e9 * trend,
    })
}

/// A data set with much to say about it.
fn data() -> Value {
    let class =
        |at: u64| json!({ "name": format!("{at:02}-a-class-with-a-long-name"), "samples": 10_000 * at + 3 });
    let example = "a/folder/in/a/folder/holiday-in-the-mountains-2024-08-17-0042.heic";
    json!({
        "samples": 1_281_167, "channels": 3, "width": 256, "height": 256, "class_count": 12, "class_rule": "folder",
        "classes": (0..12).map(class).collect::<Vec<_>>(), "image_rule": "", "least": [64, 64], "greatest": [12_000, 9000],
        "left_out": { ".heic": { "count": 1234, "example": example }, ".txt": { "count": 1, "example": "README.txt" } },
        "turned": 88, "alpha": 4321, "cropped": { "count": 98_765, "example": example }, "cropped_most": 93,
        "enlarged": { "count": 12, "example": example }, "small_classes": 1,
    })
}

/// Events of a long run with many faults.
fn events(chronicle: &Chronicle, begun: f64) {
    let tell = |time: f64, kind: &str, keys: Value| event(chronicle, begun + time, kind, keys);
    let start = |term| json!({ "term": term, "pid": 4_194_303, "address": "https://[2001:db8::42]:41233", "format": 1 });
    tell(0.0, "coordinator_started", start(1));
    tell(1.0, "data", json!({ "found": data() }));
    tell(2.0, "real_samples", json!({ "file": "samples/real.png" }));
    for generation in 1..=128_u64 {
        let time = float(generation) * 1380.0;
        if generation > 1 {
            let host = format!("{HOST}: no heartbeat for 30 s, and the connection was reset by its peer");
            tell(time - 40.0, "worker_lost", json!({ "worker": generation, "pid": 77, "reason": host }));
            tell(
                time - 35.0,
                "fault",
                json!({ "worker": 3, "fault": "links", "generation": generation,
                "detail": format!("ranks {} cannot be reached", (0..40).map(|rank| rank.to_string()).collect::<Vec<_>>().join(", ")) }),
            );
            tell(
                time - 30.0,
                "regroup",
                json!({ "generation": generation - 1, "reason": "a member is lost" }),
            );
        }
        tell(
            time,
            "generation_formed",
            json!({ "generation": generation, "world_size": 64 - generation % 7, "members": [],
            "position": generation * 180_000, "start": "rank 0", "backend": "nccl", "cause": "a worker was lost" }),
        );
    }
    tell(90_000.0, "coordinator_started", start(2));
    for number in 1..=40_u64 {
        let (time, step) = (float(number) * 4400.0, number * NEWEST / 40);
        tell(time, "samples", json!({ "step": step, "file": format!("samples/step-{step:08}.png") }));
        tell(
            time + 5.0,
            "checkpoint",
            json!({ "step": step, "folder": format!("step-{step:08}"), "state_digest": "0123456789abcdef".repeat(4) }),
        );
        tell(
            time + 65.0,
            "evaluation",
            json!({ "step": step, "metrics": metrics(number), "features": "inception", "seconds": 61.0 }),
        );
    }
    tell(
        175_000.0,
        "best_checkpoint",
        json!({ "step": NEWEST - NEWEST / 40, "folder": "f", "metric": "frechet_distance", "value": 20576.1 }),
    );
    tell(176_000.0, "metrics_breach", json!({ "detail": "x".repeat(4096) }));
    tell(
        176_500.0,
        "alarm",
        json!({ "alarm": "collapse", "step": NEWEST, "detail":
        format!("at step {NEWEST} the samples are 3 % as far apart as real ones, less than 30 %") }),
    );
    tell(
        176_600.0,
        "alarm",
        json!({ "alarm": "discriminator_overfitting", "step": NEWEST, "detail":
        format!("at step {NEWEST} the discriminator takes held-out samples for generated ones: 0.93 of the way, more than 0.8") }),
    );
    tell(176_700.0, "alarm", json!({ "alarm": "non_finite", "step": NEWEST, "detail": "y".repeat(300) }));
    tell(176_800.0, "an_event_of_a_later_version", json!({ "reason": "nobody knows yet" }));
}

fn worker(number: u32) -> WorkerStatus {
    let is_spare = number == WORKERS;
    WorkerStatus {
        worker: 1_000_000 + u64::from(number),
        host: if number.is_multiple_of(3) { HOST.to_string() } else { format!("node{number}") },
        pid: 4_194_303,
        rank: (!is_spare).then_some(number),
        device: "cuda:7 NVIDIA H100 80GB HBM3 SXM5 MIG 7g.80gb".to_string(),
        first_shard: 2 * number,
        shards: if is_spare { 0 } else { 2 },
        local: number < 8,
        connected: number != 13,
        heartbeat_age: if is_spare { None } else { Some(if number == 7 { 100_000.0 } else { 0.4 }) },
        position: 23_456_789,
        activity: if number.is_multiple_of(5) { Activity::Waiting } else { Activity::Computing }.into(),
        resident_bytes: Some(123_456_789_012),
        gpu_memory_bytes: Some(85_899_345_920),
        gpu_utilisation: Some(100),
    }
}

fn full() -> State {
    let (chronicle, begun) = (Chronicle::default(), now() - 2.1 * DAYS);
    (1..=ROWS).for_each(|at| row(&chronicle, at, begun, gan(at)));
    events(&chronicle, begun);
    let status = GetStatusResponse {
        name: LONG_NAME[..64].to_string(),
        run: "0123456789abcdef0123456789abcdef".to_string(),
        term: 2,
        generation: 128,
        world_size: WORKERS,
        step: NEWEST,
        last_step: 20_000_000,
        stage: "training".to_string(),
        data_shards: 2 * WORKERS,
        phases_per_step: 2,
        failure_deadline: 30.0,
        checkpoint_step: NEWEST,
        workers: (0..=WORKERS).map(worker).collect(),
        ..GetStatusResponse::default()
    };
    State { name: "full", status, chronicle, job: job(&SETTINGS) }
}

/// The same when it is over: no worker is left.
fn finished() -> State {
    let State { mut status, chronicle, job, .. } = full();
    event(&chronicle, now() - 60.0, "run_ended", json!({ "outcome": "complete", "detail": "" }));
    (status.step, status.workers) = (status.last_step, Vec::new());
    (status.stage, status.outcome) = ("ended".to_string(), "complete".to_string());
    State { name: "finished", status, chronicle, job }
}

/// A coordinator that nobody has joined.
fn alone() -> State {
    let chronicle = Chronicle::default();
    let address = "http://127.0.0.1:41233";
    event(
        &chronicle,
        now() - 20.0,
        "coordinator_started",
        json!({ "term": 1, "pid": 5, "address": address }),
    );
    let status = GetStatusResponse {
        name: "digits".to_string(),
        run: "0123456789abcdef".to_string(),
        term: 1,
        stage: "gathering".to_string(),
        data_shards: 8,
        phases_per_step: 2,
        failure_deadline: 5.0,
        ..GetStatusResponse::default()
    };
    State { name: "alone", status, chronicle, job: job(&[]) }
}

/// The group of a coordinator that came back, before any worker has.
fn orphaned() -> State {
    let State { mut status, chronicle, job, .. } = alone();
    (1..=3).for_each(|at| row(&chronicle, at, now() - 300.0, gan(at)));
    event(
        &chronicle,
        now() - 200.0,
        "generation_formed",
        json!({ "generation": 1, "world_size": 2, "members": [],
        "position": 0, "start": "fresh", "backend": "gloo", "cause": "the run begins" }),
    );
    (status.generation, status.world_size, status.stage) = (1, 2, "reconnecting".to_string());
    (status.step, status.last_step) = (3 * STEPS_OF_ROW, 6 * STEPS_OF_ROW);
    State { name: "orphaned", status, chronicle, job }
}

/// An objective with many scalars of its own.
fn foreign() -> State {
    let State { mut status, job, .. } = full();
    let (chronicle, begun) = (Chronicle::default(), now() - DAYS / 24.0);
    (1..=40).for_each(|at| row(&chronicle, at, begun, own(at)));
    status.workers.truncate(3);
    (status.step, status.generation, status.world_size) = (40 * STEPS_OF_ROW, 1, 3);
    State { name: "foreign", status, chronicle, job }
}

fn all() -> [State; 5] {
    [full(), finished(), alone(), orphaned(), foreign()]
}

impl State {
    /// Serves the state; the pictures of its steps are copies of one.
    fn serve(self, listener: TcpListener, folder: &Path) -> (Served, watch::Sender<Option<Arc<View>>>) {
        let address = listener.local_addr().unwrap();
        let samples = folder.join(self.name);
        std::fs::create_dir(&samples).unwrap();
        let picture = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/digits-dcgan.png");
        let steps = self.chronicle.look().pictures(1000);
        let names = steps.into_iter().map(|step| format!("step-{step:08}.png"));
        for name in names.chain(["real.png".to_string()]) {
            std::fs::copy(picture, samples.join(name)).unwrap();
        }
        let (publisher, view) =
            watch::channel(Some(Arc::new(View { status: self.status, at: Instant::now() })));
        let site = Site {
            view,
            chronicle: self.chronicle,
            samples,
            job: self.job,
            guard: Guard::open(address),
            asked: watch::Sender::new(None),
        };
        (serve(listener, site, plainly).unwrap(), publisher)
    }
}

/// Serves each state at an address of its own until the input ends.
#[tokio::test]
#[ignore = "serves pages for a browser until its input ends"]
#[expect(clippy::print_stdout, reason = "the browser's script reads the addresses")]
async fn serve_all() {
    let folder = tempfile::tempdir().unwrap();
    let mut serving = Vec::new();
    for state in all() {
        let (name, listener) = (state.name, TcpListener::bind("127.0.0.1:0").await.unwrap());
        serving.push(state.serve(listener, folder.path()));
        println!("state {name} {}", serving[serving.len() - 1].0.url());
    }
    println!("states are served");
    let mut rest = Vec::new();
    tokio::task::spawn_blocking(move || std::io::stdin().read_to_end(&mut rest)).await.unwrap().unwrap();
}

/// The page asks for all of this every few seconds, whatever the run is.
#[tokio::test]
async fn answers_about_the_largest_run_are_small() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (served, _publisher) = full().serve(listener, folder.path());
    let get = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        super::tests::say(served.address, request)
    };
    for (path, most) in
        [("/api/status", 64 << 10), ("/api/metrics?points=500", 1 << 20), ("/api/events", 512 << 10)]
    {
        let answer = get(path).await;
        assert!(answer.body.len() < most, "{path}: {} bytes", answer.body.len());
        assert!(answer.json().is_object(), "{path}");
    }
    let metrics = get("/api/metrics?points=500").await.json();
    let settings =
        metrics["scalars"].as_array().unwrap().iter().filter(|scalar| scalar["group"] == "setting");
    assert_eq!(settings.count(), 7);
    assert_eq!(get("/api/status").await.json()["workers"].as_array().map(Vec::len), Some(65));
}
