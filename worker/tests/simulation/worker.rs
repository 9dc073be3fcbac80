//! A worker's process: the real session, and a model of the rest. What the model does is what `commands/join.rs` and
//! `engine/checkpoint_writer.rs` do.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ganglion_membership::member::Event;
use ganglion_membership::{Generation, LoadedFacts, Passport};
use ganglion_proto::dial::Credentials;
use ganglion_proto::message::FromWorker;
use ganglion_worker::session::{ConnectError, End, Host, Order, Session};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tokio::sync::mpsc;

use crate::job::{self, SAMPLES, State};
use crate::net::{self, Hub, LINKS};
use crate::team::Trainer;

/// Between two looks at what another thread would wake a real worker for.
pub(crate) const LOOK: Duration = Duration::from_millis(2);

/// What the world and its workers share.
#[derive(Default)]
pub(crate) struct Shared {
    /// Whether writes and reads of checkpoints by workers fail.
    pub storage_down: AtomicBool,
    /// The states of an undisturbed run.
    pub lineage: Vec<State>,
    /// The most advanced position that was committed.
    pub furthest: AtomicU64,
    /// Where each generation began to train.
    pub begun: Mutex<BTreeMap<u64, u64>>,
    /// What must not happen and did.
    pub breach: Mutex<Option<String>>,
}

impl Shared {
    /// A generation begins to train.
    pub(crate) fn begin(&self, generation: u64, position: u64) {
        self.begun.lock().expect("nothing panics with it").insert(generation, position);
    }

    /// A member of a generation committed a phase. It must be one of an undisturbed run's; and once a newer
    /// generation trains, one that was under way: a member may be one phase ahead of where the newer one
    /// began.
    pub(crate) fn commit(&self, name: &str, generation: u64, state: &State) {
        let place = usize::try_from(state.position.0).expect("a short run");
        if self.lineage.get(place) != Some(state) {
            self.breach(format!("{name} committed {state:?}, which an undisturbed run does not have"));
        }
        let begun = self.begun.lock().expect("nothing panics with it");
        let newer = begun.range(generation + 1..).find(|(_, position)| state.position.0 > **position + 1);
        if let Some((newer, position)) = newer {
            self.breach(format!(
                "{name} committed {} in generation {generation}, though {newer} trains from {position}",
                state.position
            ));
        }
        drop(begun);
        self.furthest.fetch_max(state.position.0, Ordering::Relaxed);
    }

    pub(crate) fn breach(&self, what: String) {
        self.breach.lock().expect("nothing panics with it").get_or_insert(what);
    }
}

/// What a process is started with.
#[derive(Clone)]
pub(crate) struct Start {
    pub name: String,
    pub seed: u64,
    pub url: String,
    pub token: Option<String>,
    pub address: IpAddr,
    /// How long one data shard takes, in milliseconds.
    pub leaf: u64,
    pub shared: Arc<Shared>,
    /// Its computing stands still until then, in milliseconds of the simulation.
    pub hangs_until: Arc<AtomicU64>,
    /// Whoever asks it to end: filled in by the process.
    pub asks: Arc<Mutex<Option<mpsc::UnboundedSender<()>>>>,
}

/// A process's life.
pub(crate) async fn live(start: Start) {
    let (asks, asked_to_end) = mpsc::unbounded_channel();
    *start.asks.lock().expect("nothing panics with it") = Some(asks);
    let Ok(hub) = Hub::open().await else { return start.shared.breach("no port for links".to_string()) };
    let host = Host {
        clock: || turmoil::sim_elapsed().unwrap_or_default(),
        connect: net::connector(),
        credentials: Credentials::default(),
        asked_to_end,
        local_address: start.address,
        answers: format!("{}:{LINKS}", start.address),
        device: "cpu".to_string(),
        memory: || None,
    };
    let session = match Session::open_on(host, &start.url, start.token.clone()).await {
        Ok(session) => Arc::new(session),
        Err(ConnectError::Unreachable { .. } | ConnectError::Refused(_)) => return,
        Err(error) => return start.shared.breach(error.to_string()),
    };
    let mut rng = ChaCha8Rng::seed_from_u64(start.seed);
    tokio::time::sleep(Duration::from_millis(rng.random_range(20..400))).await;
    let welcome = session.welcome();
    let facts = LoadedFacts {
        passport: Passport([("cpu_capability".to_string(), "ours".to_string())].into()),
        samples: SAMPLES,
        sees_storage: true,
        shape: welcome.job.shape(),
        gpu: None,
        host: None,
        left_out: Vec::new(),
    };
    session.loaded(facts, None);
    let archive = Archive::start(session.clone(), start.clone(), storage_of(&welcome.storage));
    train(Trainer { session, hub, archive, rng, start, held: None }).await;
}

async fn train(mut trainer: Trainer) {
    loop {
        match next_order(&trainer.session).await {
            Order::DropState => trainer.drop_state(),
            Order::Begin(assignment) => trainer.take_part(&assignment).await,
            Order::Probe => trainer.probe().await,
            Order::SaveAlone => {
                trainer.save_alone();
                trainer.session.tell(Event::SavedAlone);
            }
            Order::Exit(End::Rejected(reason)) => {
                return trainer.start.shared.breach(format!("rejected: {reason}"));
            }
            Order::Exit(_) => return,
            Order::Work(_) => {}
        }
    }
}

async fn next_order(session: &Session) -> Order {
    loop {
        if let Some(order) = session.try_next_order() {
            return order;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// A state of a generation, and the files of its checkpoint to write.
type Share = (Generation, State, Vec<u32>);

/// Saves in the background.
pub(crate) struct Archive {
    orders: mpsc::UnboundedSender<Share>,
    queue: Arc<Queue>,
    pub storage: PathBuf,
}

#[derive(Default)]
struct Queue {
    waiting: AtomicU64,
    /// Orders up to this one are not reported.
    void: AtomicU64,
    pushed: AtomicU64,
}

impl Archive {
    fn start(session: Arc<Session>, start: Start, storage: PathBuf) -> Archive {
        let (orders, mut ordered) = mpsc::unbounded_channel::<Share>();
        let queue = Arc::new(Queue::default());
        let (theirs, folder) = (queue.clone(), storage.clone());
        tokio::spawn(async move {
            let mut rng = ChaCha8Rng::seed_from_u64(start.seed ^ 1);
            let mut number = 0;
            while let Some((generation, state, files)) = ordered.recv().await {
                number += 1;
                let is_void = || theirs.void.load(Ordering::Relaxed) >= number;
                for index in files {
                    tokio::time::sleep(Duration::from_millis(rng.random_range(2..80))).await;
                    while start.shared.storage_down.load(Ordering::Relaxed) && !is_void() {
                        let (step, _) = state.place(&session.welcome().job);
                        session.send(FromWorker::PartDelayed(step, String::new(), "it is down".to_string()));
                        tokio::time::sleep(Duration::from_millis(150)).await;
                    }
                    match job::write_part(&folder, &session.welcome().job, &state, index) {
                        Ok(part) if !is_void() => session.report_part(generation, part),
                        Ok(_) => break,
                        Err(error) => start.shared.breach(format!("cannot write a part: {error}")),
                    }
                }
                theirs.waiting.fetch_sub(1, Ordering::Relaxed);
            }
        });
        Archive { orders, queue, storage }
    }

    pub(crate) fn push(&self, generation: Generation, state: State, files: Vec<u32>) {
        if !files.is_empty() {
            self.queue.pushed.fetch_add(1, Ordering::Relaxed);
            self.queue.waiting.fetch_add(1, Ordering::Relaxed);
            let _ = self.orders.send((generation, state, files));
        }
    }

    pub(crate) fn discard(&self) {
        self.queue.void.store(self.queue.pushed.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Waits until all is written; returns whether it is. Gives up when `abandon` says so.
    pub(crate) async fn drain(&self, abandon: impl Fn() -> bool) -> bool {
        while self.queue.waiting.load(Ordering::Relaxed) > 0 {
            if abandon() {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }
}

fn storage_of(address: &str) -> PathBuf {
    PathBuf::from(address.strip_prefix("file://").unwrap_or(address))
}
