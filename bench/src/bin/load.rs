//! Load test of a coordinator with many sessions: `load 100 500 1000 2000`.
//!
//! The sessions are real, each on a connection of its own. The simulated workers behind them only
//! send a worker's messages: heartbeats at their pace, a metrics row per second from rank 0, and,
//! when one of them is killed, that they lost a peer and are quiesced.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ganglion_membership::{
    Activity, Fault, Generation, Limits, LoadedFacts, Passport, Position, Progress, StepShape,
};
use ganglion_proto::clock;
use ganglion_proto::message::{self, FromWorker, MetricsRow};
use ganglion_proto::wire::session_response::Message;
use ganglion_proto::wire::{Assignment, SessionResponse};
use ganglion_tests::measured::{listed, processor_time};
use ganglion_tests::wire::{Stranger, connect, hello};
use ganglion_tests::{Run, eventually};
use prost::Message as _;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// Time for which the undisturbed group is measured.
const WATCH: Duration = Duration::from_secs(15);
/// Most sessions that are opened at once.
const AT_ONCE: usize = 64;

/// Shared state of all sessions.
struct Crowd {
    /// Index of the session that dies, once it is chosen.
    victim: watch::Sender<Option<usize>>,
    /// Whether the sessions may report that they have loaded.
    load: watch::Sender<bool>,
    /// Assignments by generation: count of members, total bytes, and time of the last one.
    told: Mutex<BTreeMap<u64, Told>>,
    joined: AtomicU64,
    /// Count of messages sent and received.
    messages: AtomicU64,
    step: AtomicU64,
}

#[derive(Clone, Copy)]
struct Told {
    members: usize,
    bytes: usize,
    last: SystemTime,
}

/// Membership of a session in the newest generation.
#[derive(Clone, Copy, Default)]
struct Place {
    generation: u64,
    rank: u32,
    position: u64,
    /// Whether the session has reported that it left.
    rests: bool,
}

impl Crowd {
    fn note(&self, generation: u64, bytes: usize) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock::wall_clock();
        let entry = told.entry(generation).or_insert(Told { members: 0, bytes: 0, last: now });
        *entry = Told { members: entry.members + 1, bytes: entry.bytes + bytes, last: now };
    }

    /// Returns the first generation above `above` that was assigned to this number of members.
    fn whole(&self, above: u64, members: usize) -> Option<(u64, Told)> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let mut newer = told.range(above + 1..);
        newer.find(|(_, told)| told.members == members).map(|(generation, told)| (*generation, *told))
    }

    fn row(&self, place: Place) -> FromWorker {
        FromWorker::Metrics(MetricsRow {
            step: self.step.fetch_add(1, Ordering::Relaxed) + 1,
            images_seen: 1,
            ledger: 1,
            scalars: [("loss_discriminator", 1.0), ("loss_generator", 1.0)].into_iter().collect(),
            time: seconds(clock::wall_clock()),
            generation: place.generation,
            world_size: 1,
            images_per_second: 1.0,
            ..MetricsRow::default()
        })
    }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn facts() -> LoadedFacts {
    let passport = Passport([("build".to_string(), "load".to_string())].into());
    LoadedFacts {
        passport,
        samples: 10_000,
        sees_storage: true,
        shape: StepShape::new(2, vec![0]).expect("it reads"),
        gpu: None,
        host: None,
        left_out: Vec::new(),
    }
}

/// Runs one session, from its hello to its death or the end.
async fn session(crowd: Arc<Crowd>, index: usize, url: String, gate: Arc<Semaphore>) {
    // Bounds the handshakes under way; an open session holds no permit.
    let permit = gate.acquire().await.expect("the gate stays open");
    let mut stranger = Stranger::join(connect(&url).await, hello()).await.expect("welcome");
    drop(permit);
    let (mut victim, mut load) = (crowd.victim.subscribe(), crowd.load.subscribe());
    let limits = Limits::derive(Duration::from_secs_f64(stranger.welcome.job.job.failure_deadline));
    let mut heartbeats = tokio::time::interval(limits.heartbeat);
    let mut rows = tokio::time::interval(Duration::from_secs(1));
    let (mut place, mut leaves, mut loaded) = (Place::default(), 0, false);
    crowd.joined.fetch_add(1, Ordering::Relaxed);
    let say = |stranger: &Stranger, message| {
        crowd.messages.fetch_add(1, Ordering::Relaxed);
        stranger.say(message);
    };
    loop {
        tokio::select! {
            heard = stranger.hear_raw() => {
                let Ok(Some(response)) = heard else { return };
                crowd.messages.fetch_add(1, Ordering::Relaxed);
                if let Some(answer) = take(&crowd, &mut place, response) {
                    say(&stranger, answer);
                }
            }
            _ = heartbeats.tick() => {
                leaves += 1;
                let (position, slowest_leaf) = (Position(place.position + leaves), Duration::from_millis(1));
                let progress = Progress { position, leaves, activity: Activity::Computing, slowest_leaf };
                say(&stranger, FromWorker::Heartbeat(progress, message::Usage::default()));
            }
            _ = rows.tick(), if place.generation > 0 && place.rank == 0 => say(&stranger, crowd.row(place)),
            Ok(()) = load.changed(), if !loaded => {
                loaded = true;
                say(&stranger, FromWorker::Loaded(facts(), None));
            }
            changed = victim.changed() => {
                if changed.is_err() || *victim.borrow() == Some(index) { return }
                let generation = Generation(place.generation);
                place.rests = true;
                say(&stranger, FromWorker::Fault(generation, Fault::Peer));
                say(&stranger, FromWorker::Ready(generation, Some(Position(place.position))));
            }
        }
    }
}

/// Handles a message; returns the answer, if any.
fn take(crowd: &Crowd, place: &mut Place, response: SessionResponse) -> Option<FromWorker> {
    let bytes = response.encoded_len();
    match response.message? {
        Message::Assignment(Assignment { generation, rank, position, .. }) => {
            *place = Place { generation, rank, position, rests: false };
            crowd.note(generation, bytes);
            None
        }
        Message::Abort(abort) if abort.generation == place.generation && !place.rests => {
            place.rests = true;
            Some(FromWorker::Ready(Generation(place.generation), Some(Position(place.position))))
        }
        _ => None,
    }
}

/// Resource usage of a process, as the system reports it.
struct Usage {
    /// Processor time in seconds.
    processor: f64,
    /// Resident memory in MiB.
    memory: u64,
    at: Instant,
}

fn usage(pid: i32) -> Usage {
    let kib = listed(pid, "status", &["VmRSS"]).expect("the coordinator runs");
    Usage { processor: processor_time(pid), memory: kib >> 10, at: Instant::now() }
}

/// Time at which the coordinator decided to form a generation.
fn formed(run: &Run, generation: u64) -> f64 {
    let event = run.wait_for("generation_formed", |event| event["generation"] == generation);
    event["time"].as_f64().unwrap_or_default()
}

/// Measures a coordinator with this number of sessions and prints a row of the table.
async fn measure(count: usize) {
    let run = Run::new(&[&["job.steps=1000000000", "job.data_shards=2048", "job.shard_batch=1"]]);
    let coordinator = run.start_with(&["--workers", "0"]);
    let started = run.wait_for("coordinator_started", |_| true);
    let url = started["address"].as_str().expect("an address").to_string();
    let crowd = Arc::new(Crowd {
        victim: watch::channel(None).0,
        load: watch::channel(false).0,
        told: Mutex::default(),
        joined: AtomicU64::new(0),
        messages: AtomicU64::new(0),
        step: AtomicU64::new(0),
    });
    let gate = Arc::new(Semaphore::new(AT_ONCE));
    let mut sessions = JoinSet::new();
    let begun = Instant::now();
    for index in 0..count {
        sessions.spawn(session(crowd.clone(), index, url.clone(), gate.clone()));
    }
    let wait = |what: &'static str, crowd: Arc<Crowd>, above: u64, members: usize| async move {
        let waited = tokio::task::spawn_blocking(move || eventually(what, || crowd.whole(above, members)));
        waited.await.expect("it does not panic")
    };
    while crowd.joined.load(Ordering::Relaxed) < count as u64 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let joined = begun.elapsed();
    let _ = crowd.load.send(true);
    let (first, _) = wait("group of all", crowd.clone(), 0, count).await;

    let (before, said) = (usage(coordinator.pid()), crowd.messages.load(Ordering::Relaxed));
    tokio::time::sleep(WATCH).await;
    let (after, said) = (usage(coordinator.pid()), crowd.messages.load(Ordering::Relaxed) - said);
    let seconds_watched = (after.at - before.at).as_secs_f64();

    let lost = seconds(clock::wall_clock());
    let _ = crowd.victim.send(Some(count / 2));
    let (next, told) = wait("group of the others", crowd.clone(), first, count - 1).await;
    let (decided, last) = (formed(&run, next) - lost, seconds(told.last) - lost);
    #[allow(clippy::cast_precision_loss)] // counts of a few millions
    let (per_second, megabytes) = (said as f64 / seconds_watched, told.bytes as f64 / 1e6);
    let processor = (after.processor - before.processor) / seconds_watched * 100.0;
    println!(
        "| {count} | {:.1} | {} | {processor:.1} | {per_second:.0} | {decided:.2} | {last:.2} | {megabytes:.1} | {} | {} |",
        joined.as_secs_f64(),
        after.memory,
        usage(coordinator.pid()).memory,
        next - first,
    );
    sessions.shutdown().await;
}

fn main() -> ExitCode {
    let counts: Result<Vec<usize>, _> = std::env::args().skip(1).map(|count| count.parse()).collect();
    let Ok(counts) = counts else {
        eprintln!("usage: load SESSIONS...");
        return ExitCode::from(2);
    };
    println!(
        "| sessions | s to join | MiB | CPU % | messages/s | s to the decision | s to the last assignment | MB of assignments | MiB after | generations |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    counts.into_iter().for_each(|count| runtime.block_on(measure(count)));
    ExitCode::SUCCESS
}
