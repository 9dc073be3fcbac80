//! Memory shared by ranks: rounds, interrupts, ranks that are not there.
#![allow(clippy::unwrap_used)] // a test may panic

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use c10d::Error;
use c10d::shared::{Exchange, Segment};

const LONG: Duration = Duration::from_secs(20);
const LEN: usize = 1000;

fn exchanges(count: usize) -> Vec<Exchange> {
    let segments: Vec<Segment> = (0..count).map(|_| Segment::new(LEN).unwrap()).collect();
    let offers: Vec<_> = segments.iter().map(Segment::offer).collect();
    segments.into_iter().enumerate().map(|(rank, own)| Exchange::join(own, rank, &offers).unwrap()).collect()
}

fn publish(exchange: &Exchange, value: f64) {
    let _ = exchange.own().unwrap().fill_(value);
    exchange.publish();
}

/// Module invariant 2, with ranks that are late by turns.
#[test]
fn each_round_shows_what_all_ranks_published_in_it() {
    let ranks = 3;
    thread::scope(|scope| {
        for (rank, mut exchange) in exchanges(ranks).into_iter().enumerate() {
            scope.spawn(move || {
                for round in 0..500_u32 {
                    if round as usize % ranks == rank && round < 30 {
                        thread::sleep(Duration::from_millis(2)); // longer than a waiter spins
                    }
                    publish(&exchange, f64::from(round) * 10.0 + rank as f64);
                    let seen = exchange.finish(
                        LONG,
                        || true,
                        |slots| {
                            Ok(slots
                                .iter()
                                .map(|slot| (slot.min().double_value(&[]), slot.max().double_value(&[])))
                                .collect::<Vec<_>>())
                        },
                    );
                    for (other, (least, most)) in seen.unwrap().into_iter().enumerate() {
                        let value = f64::from(round) * 10.0 + other as f64;
                        assert!(
                            least == value && most == value,
                            "round {round}, rank {other}: {least} to {most}"
                        );
                    }
                }
            });
        }
    });
}

#[test]
fn a_wait_for_a_rank_that_is_silent_ends_by_its_limit_or_an_abort() {
    let [mut waits, silent] = <[Exchange; 2]>::try_from(exchanges(2)).ok().unwrap();
    publish(&waits, 1.0);
    let (begun, limit) = (Instant::now(), Duration::from_millis(50));
    assert_eq!(waits.finish(limit, || true, |_| Ok(())), Err(Error::Timeout));
    assert!(begun.elapsed() >= limit);
    let open = Arc::new(AtomicBool::new(true));
    let is_open = open.clone();
    let waiter = thread::spawn(move || {
        let ended = waits.finish(LONG, || is_open.load(Ordering::Relaxed), |_| Ok(()));
        (ended, Instant::now())
    });
    thread::sleep(Duration::from_millis(20)); // so that it sleeps; an abort before would do as well
    let aborted = Instant::now();
    open.store(false, Ordering::Relaxed);
    let (ended, at) = waiter.join().unwrap();
    assert_eq!(ended, Err(Error::Aborted));
    assert!(at.saturating_duration_since(aborted) < Duration::from_millis(50), "{:?}", at - aborted);
    drop(silent);
}

/// Rounds that it published before its end count.
#[test]
fn a_rank_that_leaves_is_noticed_by_those_who_wait_for_more() {
    let [mut stays, mut leaves] = <[Exchange; 2]>::try_from(exchanges(2)).ok().unwrap();
    publish(&stays, 1.0);
    publish(&leaves, 2.0);
    leaves.finish(LONG, || true, |_| Ok(())).unwrap();
    drop(leaves);
    stays.finish(LONG, || true, |_| Ok(())).unwrap();
    publish(&stays, 1.0);
    let lost = stays.finish(LONG, || true, |_| Ok(()));
    assert!(matches!(&lost, Err(Error::PeerLost(which)) if which.contains("rank 1")), "{lost:?}");
}

#[test]
fn memory_that_is_not_the_offered_one_is_not_mapped() {
    let (own, other) = (|| Segment::new(LEN).unwrap(), Segment::new(LEN).unwrap());
    let [pid, fd, low, high] = other.offer();
    let longer = Segment::new(LEN + 4096).unwrap();
    // Of a process that is not there, of another file, with another key, of another size.
    for offer in
        [[u64::from(u32::MAX), fd, low, high], [pid, 0, low, high], [pid, fd, low ^ 1, high], longer.offer()]
    {
        let own = own();
        let offers = [own.offer(), offer];
        assert!(matches!(Exchange::join(own, 0, &offers), Err(Error::Fatal(_))), "{offer:?}");
    }
    let own = own();
    let offers = [own.offer(), other.offer()];
    assert!(Exchange::join(own, 0, &offers).is_ok());
}

/// A view that outlives the exchange stays readable.
#[test]
fn a_tensor_keeps_its_memory() {
    let mut all = exchanges(1);
    publish(&all[0], 7.0);
    let kept = all[0].finish(LONG, || true, |slots| Ok(slots[0].shallow_clone())).unwrap();
    drop(all);
    assert_eq!(kept.sum(tch::Kind::Float).double_value(&[]), 7.0 * LEN as f64);
}
