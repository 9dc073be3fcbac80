//! Tests of the accept loop and its connection limit, on a virtual clock and without sockets.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, mpsc};

use super::*;

/// Listener whose results are chosen by the test.
struct Fake {
    came: mpsc::UnboundedReceiver<io::Result<(u32, SocketAddr)>>,
    asked: Arc<AtomicUsize>,
}

impl Accept for Fake {
    type Stream = u32;

    async fn accept(&mut self) -> io::Result<(u32, SocketAddr)> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        match self.came.recv().await {
            Some(came) => came,
            None => std::future::pending().await,
        }
    }
}

struct Bench {
    arrive: mpsc::UnboundedSender<io::Result<(u32, SocketAddr)>>,
    served: mpsc::UnboundedReceiver<(u32, Place)>,
    asked: Arc<AtomicUsize>,
    stop: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

impl Bench {
    fn new(limits: Limits) -> Bench {
        let (arrive, came) = mpsc::unbounded_channel();
        let (seated, served) = mpsc::unbounded_channel();
        let (asked, stop) = (Arc::default(), Arc::new(Notify::new()));
        let (fake, until) = (Fake { came, asked: Arc::clone(&asked) }, stop.clone());
        let task = tokio::spawn(async move {
            let serve = move |stream, _, place| drop(seated.send((stream, place)));
            accept_loop(fake, Room::new(limits), "a test", async move { until.notified().await }, serve)
                .await;
        });
        Bench { arrive, served, asked, stop, task }
    }

    fn come(&self, host: u8, number: u32) {
        self.arrive.send(Ok((number, ([10, 0, 0, host], 1).into()))).unwrap();
    }

    async fn next(&mut self) -> (u32, Place) {
        timeout(Duration::from_secs(1), self.served.recv()).await.expect("served in time").unwrap()
    }
}

const LIMITS: Limits =
    Limits { all: 6, strangers_of_address: 6, idle_of_address: 4, grace: Duration::from_secs(1) };

#[tokio::test(start_paused = true)]
async fn errors_neither_end_the_loop_nor_make_it_spin() {
    let mut bench = Bench::new(LIMITS);
    for errno in [Errno::EMFILE, Errno::ENFILE, Errno::EINVAL, Errno::ENOMEM].repeat(10) {
        bench.arrive.send(Err(io::Error::from_raw_os_error(errno as i32))).unwrap();
    }
    let begun = Instant::now();
    bench.come(1, 7);
    let (number, _place) = timeout(Duration::from_secs(60), bench.served.recv()).await.unwrap().unwrap();
    assert_eq!((number, bench.asked.load(Ordering::Relaxed)), (7, 42));
    assert!(begun.elapsed() >= 40 * PAUSE, "{:?}", begun.elapsed());
    // An error of one connection delays no other.
    bench.arrive.send(Err(io::Error::from_raw_os_error(Errno::ECONNABORTED as i32))).unwrap();
    let begun = Instant::now();
    bench.come(1, 8);
    assert_eq!(bench.next().await.0, 8);
    assert_eq!(begun.elapsed(), Duration::ZERO);
    bench.stop.notify_one();
    bench.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_descriptors_an_idle_connection_gives_its_own() {
    let mut bench = Bench::new(LIMITS);
    bench.come(1, 1);
    let (_, place) = bench.next().await;
    bench.arrive.send(Err(io::Error::from_raw_os_error(Errno::EMFILE as i32))).unwrap();
    timeout(Duration::from_secs(1), place.shown_out()).await.expect("shown out");
}

#[tokio::test(start_paused = true)]
async fn idle_connections_of_an_address_make_place_for_a_newcomer_after_their_grace() {
    let mut bench = Bench::new(LIMITS);
    (0..4).for_each(|number| bench.come(1, number));
    let mut crowd = Vec::new();
    for _ in 0..4 {
        crowd.push(bench.next().await);
    }
    let begun = Instant::now();
    bench.come(1, 4);
    bench.come(2, 5);
    let (number, _other) = bench.next().await;
    assert_eq!((number, begun.elapsed()), (5, Duration::ZERO), "another address does not wait");
    let (number, _place) = timeout(Duration::from_secs(5), bench.served.recv()).await.unwrap().unwrap();
    assert_eq!((number, begun.elapsed()), (4, LIMITS.grace));
    timeout(Duration::ZERO, crowd[0].1.shown_out()).await.expect("the oldest is shown out");
    assert!(timeout(Duration::ZERO, crowd[1].1.shown_out()).await.is_err(), "and no other");
}

#[tokio::test(start_paused = true)]
async fn who_does_something_keeps_its_place() {
    let mut bench = Bench::new(LIMITS);
    let mut busy = Vec::new();
    for number in 0..6 {
        bench.come(1, number);
        let (_, place) = bench.next().await;
        place.engage();
        busy.push(place);
    }
    bench.come(2, 6);
    assert!(timeout(WAIT_LIMIT / 2, bench.served.recv()).await.is_err(), "there is no place");
    // A connection that is idle again may lose its slot, but not at once.
    busy[3].rest();
    let begun = Instant::now();
    bench.come(3, 7);
    let (number, place) = timeout(2 * LIMITS.grace, bench.served.recv()).await.unwrap().unwrap();
    assert_eq!((number, begun.elapsed()), (6, LIMITS.grace));
    timeout(Duration::ZERO, busy[3].shown_out()).await.expect("the one that rests");
    place.engage();
    drop(place);
    assert_eq!(bench.next().await.0, 7, "a place that is given back is taken at once");
}

#[tokio::test(start_paused = true)]
async fn a_crowd_that_does_something_is_served_in_order_and_whole() {
    let mut bench = Bench::new(LIMITS);
    (0..1000).for_each(|number| bench.come(1, number));
    for expected in 0..1000 {
        let (number, place) = bench.next().await;
        assert_eq!(number, expected);
        place.engage();
        drop(place);
    }
}

#[tokio::test(start_paused = true)]
async fn those_that_wait_are_bounded_in_number_and_time() {
    let mut bench = Bench::new(Limits { grace: 10 * WAIT_LIMIT, ..LIMITS });
    (0..u32::try_from(4 + WAITING + 10).unwrap()).for_each(|number| bench.come(1, number));
    let mut seated = Vec::new();
    for _ in 0..4 {
        seated.push(bench.next().await);
    }
    tokio::time::sleep(WAIT_LIMIT).await;
    seated.clear();
    assert!(timeout(Duration::from_secs(1), bench.served.recv()).await.is_err(), "they were refused");
    bench.come(1, 5000);
    assert_eq!(bench.next().await.0, 5000);
}

/// Invariant 4: busy unauthenticated connections are limited for each address.
#[tokio::test(start_paused = true)]
async fn one_address_leaves_places_for_others_until_it_has_shown_that_it_belongs_here() {
    let mut bench = Bench::new(Limits { strangers_of_address: 4, ..LIMITS });
    (0..6).for_each(|number| bench.come(1, number));
    let mut busy = Vec::new();
    for _ in 0..4 {
        let (_, place) = bench.next().await;
        place.engage();
        busy.push(place);
    }
    assert!(timeout(LIMITS.grace, bench.served.recv()).await.is_err(), "the others are for others");
    bench.come(2, 6);
    let (number, _other) = bench.next().await;
    assert_eq!(number, 6);
    let trusted = busy.remove(0);
    trusted.trust();
    let (number, place) = bench.next().await;
    assert_eq!(number, 4);
    place.engage();
    drop(trusted);
    assert!(
        timeout(LIMITS.grace, bench.served.recv()).await.is_err(),
        "one that was trusted counted already"
    );
    drop(busy.remove(0));
    assert_eq!(bench.next().await.0, 5);
}

/// Invariant 4.
#[tokio::test(start_paused = true)]
async fn addresses_that_wait_take_turns_and_the_crowd_loses_its_newest() {
    let mut bench = Bench::new(LIMITS);
    let mut busy = VecDeque::new();
    for number in 0..6 {
        bench.come(1, number);
        let (_, place) = bench.next().await;
        place.engage();
        busy.push_back(place);
    }
    // More connections than may wait, all of one address, and then one of two others.
    (0..u32::try_from(WAITING).unwrap() + 100).for_each(|number| bench.come(1, 1000 + number));
    bench.come(3, 7);
    bench.come(2, 8);
    // The clock stands still until all of them wait.
    tokio::time::sleep(Duration::from_millis(1)).await;
    let mut came = Vec::new();
    for free in [2, 1, 1] {
        busy.drain(..free);
        for _ in 0..free {
            let (number, place) = bench.next().await;
            place.engage();
            busy.push_back(place);
            came.push(number);
        }
    }
    assert_eq!(came, [1000, 8, 7, 1001]);
}

#[test]
fn the_soft_limit_of_descriptors_becomes_the_hard_one() {
    raise_descriptor_limit();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    assert_eq!(limit.current, limit.maximum);
    let limits = Limits { all: usize::MAX, ..LIMITS }.within_descriptors();
    assert_eq!(limits.all as u64, limit.current.map_or(u64::MAX / 2, |limit| limit / 2));
    let few = Limits { all: 128, strangers_of_address: 4096, ..LIMITS }.within_descriptors();
    assert_eq!(few.strangers_of_address, 96);
}
