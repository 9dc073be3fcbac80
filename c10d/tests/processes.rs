//! Groups of processes, one of which is killed. The test binary runs itself again as each of the ranks.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use c10d::{Group, KeyValueStore, ReduceOp, TcpStore};
use common::{LONG, buffer_of, checks, values_of};

const ROLE: &str = "C10D_TEST_ROLE";

/// Far longer than the test takes, so that nothing is freed by Gloo's own limit.
const NO_HELP: Duration = Duration::from_secs(60);

fn spawn(role: &str, port: u16, rank: usize, world_size: usize) -> Child {
    let role = format!("{role} {port} {rank} {world_size}");
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "rank", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn connect(port: u16) -> Arc<TcpStore> {
    Arc::new(TcpStore::connect("127.0.0.1", port, LONG).unwrap())
}

fn form(port: u16, prefix: &str, rank: usize, world_size: usize, timeout: Duration) -> Group {
    Group::gloo(common::options(rank, world_size, timeout), connect(port), prefix).unwrap()
}

/// Body of a child process; not a test of its own.
#[test]
fn rank() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut words = role.split(' ');
    let name = words.next().unwrap();
    let port = words.next().unwrap().parse().unwrap();
    let [rank, world_size] = [0; 2].map(|_: i32| words.next().unwrap().parse().unwrap());
    match name {
        "collectives" => {
            let group = form(port, "first", rank, world_size, LONG);
            checks::every_collective(&group);
            drop(group);
            assert_eq!(c10d::wait_for_handles(LONG), 0);
        }
        "survivor" => {
            // No thread of this process reads the environment yet. The others meet in the usual way.
            c10d::prepare_gloo().unwrap();
            survive(port, rank, world_size);
        }
        other => panic!("{other}"),
    }
}

/// Reduces until the group breaks, then forms the next one with the remaining ranks and reduces in
/// it.
fn survive(port: u16, rank: usize, world_size: usize) {
    let group = form(port, "first", rank, world_size, NO_HELP);
    let aborter = group.aborter();
    thread::spawn(move || {
        connect(port).get("abort", LONG).unwrap();
        aborter.abort();
    });
    let sum = |group: &Group| {
        let pending = group.all_reduce(buffer_of(&[1.0; 100_000]), ReduceOp::Sum)?;
        pending.wait(LONG).map(|buffer| values_of(&buffer))
    };
    let store = connect(port);
    let mut reduces = 0;
    let error = loop {
        match sum(&group) {
            Ok(values) => assert_eq!(values, vec![world_size as f32; 100_000]),
            Err(error) => break error,
        }
        reduces += 1;
        if reduces == 10 {
            store.add("warm", 1).unwrap();
        }
    };
    drop(group);
    let ranks = store.get("second ranks", LONG).unwrap();
    let place = ranks.iter().position(|old| usize::from(*old) == rank).unwrap();
    let group = form(port, "second", place, ranks.len(), NO_HELP);
    assert_eq!(sum(&group).unwrap(), vec![ranks.len() as f32; 100_000]);
    println!("\nreduced again after {error:?}");
    // The old group may wind down for a minute more; nothing here needs it.
    store.add("done", 1).unwrap();
    let _ = store.get("exit", LONG);
    std::process::abort();
}

#[test]
fn every_collective_is_right_between_processes() {
    for world_size in 1..=4 {
        let store = TcpStore::serve("127.0.0.1", 0, LONG).unwrap();
        let children: Vec<_> =
            (0..world_size).map(|rank| spawn("collectives", store.port(), rank, world_size)).collect();
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        }
    }
}

/// Waits for a counter in the store.
fn await_count(store: &TcpStore, key: &str, count: i64) {
    let end = Instant::now() + LONG;
    while store.add(key, 0).unwrap() < count {
        assert!(Instant::now() < end, "{key} did not reach {count}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn survivors_of_a_kill_reduce_in_a_new_group() {
    for victim in 0..4_u8 {
        let store = TcpStore::serve("127.0.0.1", 0, LONG).unwrap();
        let mut children: Vec<_> = (0..4).map(|rank| spawn("survivor", store.port(), rank, 4)).collect();
        await_count(&store, "warm", 4);
        let start = Instant::now();
        let mut dead = children.remove(usize::from(victim));
        dead.kill().unwrap();
        let ranks: Vec<u8> = (0..4).filter(|rank| *rank != victim).collect();
        store.set("abort", b"now").unwrap();
        store.set("second ranks", &ranks).unwrap();
        await_count(&store, "done", 3);
        println!("killed rank {victim}: all others reduced again after {:?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(10));
        dead.wait().unwrap();
        store.set("exit", b"now").unwrap();
        for mut child in children {
            let output = BufReader::new(child.stdout.take().unwrap());
            let said = output.lines().map_while(Result::ok).find(|line| line.starts_with("reduced again"));
            println!("  {said:?}");
            assert!(said.is_some());
            child.wait().unwrap();
        }
    }
}
