//! What a seed draws: the job, the cluster, and the mishaps that strike until the world calms down.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ganglion_coordinator::control::StopSignal;
use rand::RngExt;
use rand::rngs::ChaCha8Rng;

use crate::operator;
use crate::world::{COORDINATOR, Due, World};

/// The cluster and the job of a seed.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub locals: u32,
    pub remotes: u32,
    /// The longest that a message takes, in milliseconds.
    pub delay: u64,
    /// The longest that a leaf takes, in milliseconds.
    pub leaf: u64,
    pub quiet_at: Duration,
    /// Keys of the job, and their values.
    pub settings: Vec<(&'static str, u64)>,
}

/// Something that goes wrong, for so many milliseconds where it lasts.
#[derive(Clone, Debug)]
pub(crate) enum Mishap {
    KillCoordinator,
    /// The coordinator's machine stops at once, with the workers on it; the others too if that is said.
    PowerCut(bool),
    KillWorkers(usize),
    KillAll,
    /// The coordinator and a worker.
    KillBoth,
    /// A worker and the coordinator hear nothing of each other, then all that was said.
    HoldSession(u64),
    /// Two workers.
    HoldLink(u64),
    /// A worker and all others.
    Isolate(u64),
    /// The coordinator and all workers.
    IsolateCoordinator(u64),
    /// What a worker and the coordinator say to each other is lost for a while: their connections hang for
    /// ever.
    LoseSession(u64),
    LoseLink(u64),
    /// A worker computes nothing, and its session goes on.
    Hang(u64),
    StorageDown(u64),
    Leave,
    Join,
    Drain,
    Scale(u32),
    Stop,
}

/// Draws a seed's scenario and mishaps.
pub(crate) fn draw(rng: &mut ChaCha8Rng) -> (Scenario, Vec<(Duration, Mishap)>) {
    let total = rng.random_range(1..=4);
    let locals = match rng.random_range(0..3) {
        0 => total,
        1 => 0,
        _ => rng.random_range(0..=total),
    };
    let shards = rng.random_range(u64::from(total)..=6);
    let (phases, steps) = (rng.random_range(1..=2), rng.random_range(6..=30));
    // Mishaps may last longer than a lease, which has 12 s.
    let is_long = rng.random_bool(0.15);
    let quiet_at = if is_long { rng.random_range(20_000..40_000) } else { rng.random_range(1000..9000) };
    // Training alone would take about as long as the mishaps.
    let pace = 4 * quiet_at / ((phases + 1) * steps) * u64::from(total) / shards;
    let settings = vec![
        ("job.seed", rng.random_range(0..1000)),
        ("job.steps", steps),
        ("job.data_shards", shards),
        ("job.shard_batch", rng.random_range(1..=3)),
        ("job.failure_deadline", 1),
        ("loss.discriminator_steps", phases),
        ("metrics.every_steps", rng.random_range(1..=2)),
        ("checkpoint.every_steps", rng.random_range(1..=8)),
        ("checkpoint.keep_last", rng.random_range(0..=3)),
        ("sample.every_steps", 0),
    ];
    let scenario = Scenario {
        locals,
        remotes: total - locals,
        delay: [2, 20, 100][rng.random_range(0..3)],
        leaf: pace.clamp(2, if is_long { 400 } else { 100 }),
        quiet_at: Duration::from_millis(quiet_at),
        settings,
    };
    let mut mishaps = draw_mishaps(rng, quiet_at, is_long);
    if is_long {
        // Somebody who may take the place of a worker that is cut off.
        mishaps.push((Duration::from_millis(rng.random_range(0..quiet_at)), Mishap::Join));
    }
    (scenario, mishaps)
}

fn draw_mishaps(rng: &mut ChaCha8Rng, quiet_at: u64, is_long: bool) -> Vec<(Duration, Mishap)> {
    // A seed has a few kinds of mishaps only, so that they meet more often.
    let kinds: Vec<u32> = (0..rng.random_range(1..=4)).map(|_| rng.random_range(0..18)).collect();
    let count = rng.random_range(0..=8);
    let mut mishaps = Vec::new();
    for _ in 0..count {
        let time = rng.random_range(0..quiet_at);
        let kind = kinds[rng.random_range(0..kinds.len())];
        mishaps.push((Duration::from_millis(time), draw_mishap(rng, kind, is_long)));
    }
    mishaps
}

fn draw_mishap(rng: &mut ChaCha8Rng, kind: u32, is_long: bool) -> Mishap {
    let time = match rng.random_range(0..10) {
        _ if is_long && rng.random_bool(0.5) => rng.random_range(8_000..30_000),
        0..4 => rng.random_range(10..800),
        4..9 => rng.random_range(800..4_000),
        _ => rng.random_range(4_000..16_000),
    };
    match kind {
        0..3 => Mishap::KillCoordinator,
        3 => Mishap::KillWorkers(rng.random_range(1..=2)),
        4 => Mishap::KillAll,
        5 => Mishap::KillBoth,
        6 => Mishap::HoldSession(time),
        7 => Mishap::HoldLink(time),
        8 => Mishap::Isolate(time),
        9 => Mishap::IsolateCoordinator(time),
        10 => Mishap::LoseSession(time),
        11 => Mishap::LoseLink(time),
        12 => Mishap::Hang(time),
        13 => Mishap::StorageDown(time),
        14 => Mishap::Leave,
        15 => Mishap::Join,
        16 => Mishap::Drain,
        _ => [Mishap::Stop, Mishap::Scale(rng.random_range(1..=3))][rng.random_range(0..2)].clone(),
    }
}

/// Lets a mishap strike.
pub(crate) fn strike(world: &mut World<'_>, mishap: &Mishap) {
    if world.quiet {
        return;
    }
    world.note(format!("mishap {mishap:?}"));
    let names: Vec<String> = world.workers.keys().cloned().collect();
    match mishap {
        Mishap::KillCoordinator => world.crash_coordinator(),
        Mishap::PowerCut(all) => world.cut_power(*all),
        Mishap::KillAll => names.iter().for_each(|name| world.kill(name)),
        Mishap::IsolateCoordinator(time) => {
            names.iter().for_each(|name| hold(world, name, COORDINATOR, *time));
        }
        Mishap::StorageDown(time) => {
            world.shared.storage_down.store(true, Ordering::Relaxed);
            world.after(*time, Due::StorageUp);
        }
        Mishap::Join => world.after(0, Due::StartRemote),
        Mishap::Stop => world.machine.table().stop(StopSignal::Terminate),
        Mishap::Drain => operator::drain(world),
        Mishap::Scale(workers) => operator::scale(world, *workers),
        _ if names.is_empty() => {}
        mishap => strike_worker(world, mishap, &names),
    }
}

fn strike_worker(world: &mut World<'_>, mishap: &Mishap, names: &[String]) {
    let one = names[world.rng.random_range(0..names.len())].clone();
    let other = names[world.rng.random_range(0..names.len())].clone();
    match mishap {
        Mishap::KillWorkers(count) => {
            [&one, &other].into_iter().take(*count).for_each(|name| world.kill(name));
        }
        Mishap::KillBoth => {
            world.crash_coordinator();
            world.kill(&one);
        }
        Mishap::HoldSession(time) => hold(world, &one, COORDINATOR, *time),
        Mishap::HoldLink(time) if one != other => hold(world, &one, &other, *time),
        Mishap::Isolate(time) => {
            let others = world.hosts().into_iter().filter(|name| *name != one);
            others.collect::<Vec<_>>().iter().for_each(|name| hold(world, &one, name, *time));
        }
        Mishap::LoseSession(time) => lose(world, &one, COORDINATOR, *time),
        Mishap::LoseLink(time) if one != other => lose(world, &one, &other, *time),
        Mishap::Hang(time) => {
            let until = u64::try_from(world.now().as_millis()).expect("a short run") + time;
            world.workers[&one].hangs_until.store(until, Ordering::Relaxed);
        }
        Mishap::Leave => world.ask(&one),
        _ => {}
    }
}

fn hold(world: &mut World<'_>, a: &str, b: &str, time: u64) {
    world.sim.hold(a, b);
    world.after(time, Due::Release(a.to_string(), b.to_string()));
}

fn lose(world: &mut World<'_>, a: &str, b: &str, time: u64) {
    world.sim.partition(a, b);
    world.after(time, Due::Repair(a.to_string(), b.to_string()));
}
