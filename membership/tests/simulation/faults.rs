//! What a seed draws: the job, the cluster, and the mishaps that strike until the world calms down.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use crate::coordinator::Alarm;
use crate::directory::Trouble;
use crate::job::{Instant, Job};
use crate::network::{Node, Proc};
use crate::note;
use crate::world::{Happening, World};

/// The cluster of a seed.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub locals: u32,
    pub remotes: u32,
    /// The longest that a packet takes, and whether a few take much longer.
    pub delay: u64,
    pub spikes: bool,
    /// How long a leaf takes.
    pub leaf: u64,
    /// Only delays below the limits, and pauses of the coordinator: nobody may be evicted.
    pub calm: bool,
    /// Whether messages to workers come twice now and then.
    pub repeats: bool,
    /// Whether some remote workers cannot see the storage.
    pub blind: bool,
    /// A process that computes other bits.
    pub stranger: Option<Proc>,
    /// Whether mishaps last longer than a lease rather often.
    pub long: bool,
    pub quiet_at: Instant,
}

/// Something that goes wrong.
#[derive(Clone, Debug)]
pub(crate) enum Mishap {
    CrashCoordinator,
    /// So many steps of carrying out actions later.
    CrashCoordinatorWithin(u32),
    CrashWorker,
    /// So many messages later.
    CrashWorkerWithin(u32),
    PauseCoordinator(u64),
    PauseWorker(u64),
    /// The coordinator and all local workers.
    SuspendMachine(u64),
    /// A worker and the coordinator.
    CutSession {
        time: u64,
        reset: bool,
    },
    /// Two workers.
    CutLink {
        time: u64,
        reset: bool,
    },
    /// A worker and all others.
    Isolate {
        time: u64,
        reset: bool,
    },
    /// The coordinator and all workers.
    IsolateCoordinator {
        time: u64,
        reset: bool,
    },
    BreakSession,
    StorageDown(u64),
    /// The storage of a worker, or of all of them.
    Storage {
        time: u64,
        trouble: Trouble,
        all: bool,
    },
    FlipBit,
    Leave,
    Scale(u32),
    Stop,
    Join,
}

/// Draws a seed's scenario, job and mishaps.
pub(crate) fn draw(rng: &mut ChaCha8Rng, seed: u64) -> (Scenario, Job, Vec<(Instant, Mishap)>) {
    let calm = rng.random_bool(0.15);
    let total = rng.random_range(1..=5);
    let locals = match rng.random_range(0..3) {
        0 => total,
        1 => 0,
        _ => rng.random_range(0..=total),
    };
    let shards = rng.random_range(1..=8);
    let phases = rng.random_range(2..=3);
    let steps = rng.random_range(6..=40);
    let every = rng.random_range(1..=8);
    let parts = rng.random_range(1..=3);
    let job = Job { shards, phases, steps, every, parts, lineage: Vec::new() }.with_lineage(seed);
    let long = rng.random_bool(0.15);
    let quiet_at = rng.random_range(if long { 15_000_000..=40_000_000 } else { 1_000_000..=12_000_000 });
    // Training alone would take about as long as the mishaps.
    let pace = quiet_at * 2 / (phases * steps) * u64::from(total.min(shards)) / u64::from(shards);
    let scenario = Scenario {
        locals,
        remotes: total - locals,
        delay: [2_000, 20_000, 100_000][rng.random_range(0..3)],
        spikes: !calm && rng.random_bool(0.3),
        leaf: pace.clamp(1_000, if long { 250_000 } else { 60_000 }),
        long,
        calm,
        repeats: rng.random_bool(0.2),
        blind: locals > 0 && rng.random_bool(0.1),
        stranger: (!calm && rng.random_bool(0.05)).then(|| total + rng.random_range(1..=3)),
        quiet_at,
    };
    let mut mishaps = draw_mishaps(rng, &scenario);
    mishaps.extend(draw_storages(seed, &scenario));
    (scenario, job, mishaps)
}

/// Storages that do not answer, fail, are full or slow, from before a checkpoint is due until long after.
/// Calm seeds have them as well: nobody is to blame for its storage. They are drawn apart, so that seeds
/// without them are what they were.
fn draw_storages(seed: u64, scenario: &Scenario) -> Vec<(Instant, Mishap)> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5709_a6e0);
    let count = if rng.random_bool(0.25) { rng.random_range(1..=3) } else { 0 };
    let mut draw = || {
        let trouble = [Trouble::Hangs, Trouble::Fails, Trouble::Slow][rng.random_range(0..3)];
        let mishap =
            Mishap::Storage { time: draw_time(&mut rng, scenario.long), trouble, all: rng.random_bool(0.5) };
        (rng.random_range(0..scenario.quiet_at), mishap)
    };
    (0..count).map(|_| draw()).collect()
}

fn draw_mishaps(rng: &mut ChaCha8Rng, scenario: &Scenario) -> Vec<(Instant, Mishap)> {
    let count = rng.random_range(0..=10);
    // A seed has a few kinds of mishaps only, so that they meet more often.
    let kinds: Vec<u32> = (0..rng.random_range(1..=5)).map(|_| rng.random_range(0..18)).collect();
    let mut mishaps = Vec::new();
    for _ in 0..count {
        let time = rng.random_range(0..scenario.quiet_at);
        let mishap = if scenario.calm {
            Mishap::PauseCoordinator(rng.random_range(50_000..6_000_000))
        } else {
            let kind = kinds[rng.random_range(0..kinds.len())];
            draw_mishap(rng, kind, scenario.long)
        };
        mishaps.push((time, mishap));
    }
    if !scenario.calm && rng.random_bool(0.05) {
        mishaps.push((rng.random_range(0..scenario.quiet_at), Mishap::FlipBit));
    }
    mishaps
}

fn draw_mishap(rng: &mut ChaCha8Rng, kind: u32, long: bool) -> Mishap {
    let reset = rng.random_bool(0.5);
    let time = draw_time(rng, long);
    match kind {
        0 => Mishap::CrashCoordinator,
        1..=3 => Mishap::CrashCoordinatorWithin(rng.random_range(0..12)),
        4 => Mishap::CrashWorker,
        5 => Mishap::CrashWorkerWithin(rng.random_range(0..8)),
        6 => Mishap::PauseCoordinator(time),
        7 => Mishap::PauseWorker(time),
        8 => Mishap::SuspendMachine(time),
        9 => Mishap::CutSession { time, reset },
        10 => Mishap::CutLink { time, reset },
        11 => Mishap::Isolate { time, reset },
        12 => Mishap::IsolateCoordinator { time, reset },
        13 => Mishap::BreakSession,
        14 => Mishap::StorageDown(time),
        15 => Mishap::Leave,
        16 => Mishap::Scale(rng.random_range(1..=4)),
        _ => [Mishap::Stop, Mishap::Join][usize::from(rng.random_bool(0.6))].clone(),
    }
}

/// From a moment to more than a lease.
fn draw_time(rng: &mut ChaCha8Rng, long: bool) -> u64 {
    if long && rng.random_bool(0.5) {
        return rng.random_range(8_000_000..25_000_000);
    }
    match rng.random_range(0..10) {
        0..4 => rng.random_range(10_000..800_000),
        4..8 => rng.random_range(800_000..4_000_000),
        _ => rng.random_range(4_000_000..18_000_000),
    }
}

/// Lets a mishap strike.
pub(crate) fn strike(world: &mut World, mishap: Mishap) {
    if world.ctx.quiet {
        return;
    }
    note!(world.ctx, "mishap {mishap:?}");
    match mishap {
        Mishap::CrashCoordinator => world.crash_coordinator(),
        Mishap::CrashCoordinatorWithin(steps) => world.ctx.crash_after = Some(steps),
        Mishap::PauseCoordinator(time) => world.pause(Node::Coordinator, time),
        Mishap::SuspendMachine(time) => suspend(world, time),
        Mishap::StorageDown(time) => {
            world.ctx.directory.storage_down = true;
            world.ctx.after(time, Happening::StorageUp);
        }
        Mishap::Storage { time, trouble, all: true } => {
            for proc in alive(world) {
                trouble_storage(world, proc, time, trouble);
            }
        }
        Mishap::IsolateCoordinator { time, reset } => {
            for proc in alive(world) {
                cut(world, Node::Worker(proc), Node::Coordinator, time, reset);
            }
        }
        Mishap::Scale(count) => user(world, Alarm::Scale(count)),
        Mishap::Stop => user(world, Alarm::Stop),
        Mishap::Join => world.ctx.after(0, Happening::StartRemote),
        mishap => {
            let alive = alive(world);
            if !alive.is_empty() {
                let choice = world.ctx.rng.random_range(0..alive.len());
                strike_worker(world, mishap, alive[choice], &alive);
            }
        }
    }
}

fn strike_worker(world: &mut World, mishap: Mishap, proc: Proc, alive: &[Proc]) {
    let node = Node::Worker(proc);
    match mishap {
        Mishap::CrashWorker => world.end_worker(proc, false),
        Mishap::CrashWorkerWithin(messages) => {
            world.workers.get_mut(&proc).expect("it lives").crash_after = Some(messages);
        }
        Mishap::PauseWorker(time) => world.pause(node, time),
        Mishap::CutSession { time, reset } => cut(world, node, Node::Coordinator, time, reset),
        Mishap::CutLink { time, reset } => {
            let other = alive[world.ctx.rng.random_range(0..alive.len())];
            if other != proc {
                cut(world, node, Node::Worker(other), time, reset);
            }
        }
        Mishap::Isolate { time, reset } => {
            for other in alive.iter().filter(|other| **other != proc) {
                cut(world, node, Node::Worker(*other), time, reset);
            }
            cut(world, node, Node::Coordinator, time, reset);
        }
        Mishap::BreakSession => {
            if let Some(conn) = world.workers[&proc].session() {
                world.ctx.reset(conn);
            }
        }
        Mishap::Storage { time, trouble, .. } => trouble_storage(world, proc, time, trouble),
        Mishap::FlipBit => flip(world, proc),
        Mishap::Leave => {
            let worker = world.workers.get_mut(&proc).expect("it lives");
            worker.asked_to_leave(&mut world.ctx);
        }
        _ => unreachable!("it strikes no worker"),
    }
}

fn alive(world: &World) -> Vec<Proc> {
    world.workers.values().filter(|worker| worker.alive).map(|worker| worker.proc).collect()
}

fn cut(world: &mut World, a: Node, b: Node, time: u64, reset: bool) {
    world.ctx.network.cut(a, b);
    if reset {
        for conn in world.ctx.network.of(a, Some(b)) {
            world.ctx.reset(conn);
        }
    }
    world.ctx.after(time, Happening::Mend(a, b));
}

fn trouble_storage(world: &mut World, proc: Proc, time: u64, trouble: Trouble) {
    world.workers.get_mut(&proc).expect("it lives").storage = Some(trouble);
    world.ctx.after(time, Happening::StorageMended(proc));
}

fn suspend(world: &mut World, time: u64) {
    world.pause(Node::Coordinator, time);
    for proc in alive(world) {
        if world.workers[&proc].token.is_some() {
            world.pause(Node::Worker(proc), time);
        }
    }
}

fn user(world: &mut World, alarm: Alarm) {
    if let Some(term) = world.coordinator.as_ref().map(|coordinator| coordinator.term) {
        world.ctx.after(0, Happening::Alarm(term, alarm));
    }
}

/// A bit flips where others can see it: in a group of several that trains, at once or in the next commit.
fn flip(world: &mut World, proc: Proc) {
    let at_once = world.ctx.chance(0.5);
    let worker = world.workers.get_mut(&proc).expect("it lives");
    let trains = worker.team.as_ref().is_some_and(|team| team.active && team.trains && team.peers.len() > 1);
    if trains && at_once {
        worker.flip(&mut world.ctx);
    } else {
        worker.flips = trains;
    }
}
