//! Accept loop of all listeners, with the limit (`Room`) on their open connections.
//!
//! 1. No error of `accept` ends the loop, and none makes it spin.
//! 2. Connections are bounded: in total, unauthenticated ones (strangers) per address, idle ones
//!    per address, and those that wait for a slot (`Place`). A stranger is a connection that has
//!    not shown yet that it belongs here, idle or busy.
//! 3. When all slots are taken, the connection that has been idle the longest gives its slot to the
//!    newcomer, once it has been idle for [`Limits::grace`]. So idle connections keep nobody out,
//!    and busy ones are served in the order in which they came.
//! 4. One address does not keep others out: it has at most [`Limits::strangers_of_address`] slots,
//!    waiting addresses take turns, and when too many connections wait, the address with the most
//!    of them loses its newest.
//! 5. Refused connections are logged once a minute for each address, not each time.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::throttle::Throttle;

/// Pause before `accept` is retried after an error of this machine, as opposed to one of a
/// connection.
const PAUSE: Duration = Duration::from_millis(100);
/// Most connections that wait for a slot.
const WAITING: usize = 1024;
/// Longest wait of a connection for a slot.
const WAIT_LIMIT: Duration = Duration::from_secs(10);
/// Shortest time between two log lines on the same subject.
const QUIET: Duration = Duration::from_secs(60);

/// Bounds of a [`Room`].
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most connections at once.
    pub all: usize,
    /// Most unauthenticated connections of one address. The remaining slots are reserved for other
    /// addresses.
    pub strangers_of_address: usize,
    /// Most idle connections of one address.
    pub idle_of_address: usize,
    /// Idle time after which a connection may lose its slot to another.
    pub grace: Duration,
}

impl Limits {
    /// Returns the same limits, lowered to at most half of the file descriptors that this process
    /// may open. One address leaves a quarter of them.
    #[must_use]
    pub fn within_descriptors(self) -> Limits {
        let most = usize::try_from(descriptor_limit() / 2).unwrap_or(usize::MAX);
        let all = self.all.min(most).max(1);
        Limits { all, strangers_of_address: self.strangers_of_address.min((all - all / 4).max(1)), ..self }
    }
}

/// Soft limit of open file descriptors of this process.
fn descriptor_limit() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Raises this process's soft limit of file descriptors to the hard one: the soft default is meant
/// for programs that use `select`. Children inherit it.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let shown = |limit: Option<u64>| limit.map_or("unlimited".to_string(), |limit| limit.to_string());
    let (soft, hard) = (shown(limit.current), shown(limit.maximum));
    match setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        Ok(()) => tracing::debug!("descriptors: soft limit {soft} raised to the hard limit {hard}"),
        Err(error) => tracing::debug!("descriptors: soft limit {soft} stays, hard limit {hard}: {error}"),
    }
}

/// Connection limit of a listener: a bounded number of slots.
#[derive(Debug)]
pub struct Room {
    limits: Limits,
    taken: Mutex<Taken>,
    /// Notified when a slot may be free again.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    places: BTreeMap<u64, Held>,
    /// Idle connections of each address, in the order in which they became idle: since when, and
    /// their numbers.
    idle: BTreeMap<IpAddr, BTreeMap<u64, (Instant, u64)>>,
    /// Count of unauthenticated connections of each address.
    strangers: BTreeMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Held {
    address: IpAddr,
    /// Order among the idle connections; `None` while busy.
    idle: Option<u64>,
    is_stranger: bool,
    out: Arc<Notify>,
}

/// Slot of a connection in a [`Room`]; freed on drop. A new slot is idle and unauthenticated.
#[derive(Debug)]
pub struct Place {
    room: Arc<Room>,
    address: IpAddr,
    number: u64,
    out: Arc<Notify>,
}

impl Room {
    /// Creates a connection limit with all slots free.
    pub fn new(limits: Limits) -> Arc<Room> {
        Arc::new(Room { limits, taken: Mutex::default(), freed: Notify::new() })
    }

    /// Takes a slot, if need be that of a connection idle for long. On failure returns the time at
    /// which a slot may be free, where that is known.
    fn take(self: &Arc<Room>, address: IpAddr) -> Result<Place, Option<Instant>> {
        let mut taken = self.taken();
        let idle = taken.idle.get(&address).map_or(0, BTreeMap::len);
        let strangers = taken.strangers.get(&address).copied().unwrap_or(0);
        let is_crowded = idle >= self.limits.idle_of_address || strangers >= self.limits.strangers_of_address;
        if is_crowded || taken.places.len() >= self.limits.all {
            let (since, number) =
                if is_crowded { taken.oldest(address) } else { taken.oldest_of_most() }.ok_or(None)?;
            let due = since + self.limits.grace;
            if due > Instant::now() {
                return Err(Some(due));
            }
            taken.show_out(number);
        }
        let (number, out) = (taken.next, Arc::new(Notify::new()));
        taken.next += 1;
        taken.places.insert(number, Held { address, idle: None, is_stranger: true, out: out.clone() });
        *taken.strangers.entry(address).or_default() += 1;
        taken.rest(number);
        drop(taken);
        Ok(Place { room: self.clone(), address, number, out })
    }

    /// Locks the slots. The lock is never held across an await, nor for longer than a few look-ups
    /// take.
    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn oldest(&self, address: IpAddr) -> Option<(Instant, u64)> {
        self.idle.get(&address)?.first_key_value().map(|(_, idle)| *idle)
    }

    /// Longest idle connection of the address that has the most idle ones.
    fn oldest_of_most(&self) -> Option<(Instant, u64)> {
        let (address, _) = self.idle.iter().max_by_key(|(_, idle)| idle.len())?;
        self.oldest(*address)
    }

    fn rest(&mut self, number: u64) {
        let Some(held) = self.places.get_mut(&number) else { return };
        let order = self.next;
        self.next += 1;
        let idle = self.idle.entry(held.address).or_default();
        if let Some(before) = held.idle.replace(order) {
            idle.remove(&before);
        }
        idle.insert(order, (Instant::now(), number));
    }

    fn engage(&mut self, number: u64) {
        let Some(held) = self.places.get_mut(&number) else { return };
        let Some(order) = held.idle.take() else { return };
        let address = held.address;
        if let Some(idle) = self.idle.get_mut(&address) {
            idle.remove(&order);
            if idle.is_empty() {
                self.idle.remove(&address);
            }
        }
    }

    fn trust(&mut self, number: u64) {
        let Some(held) = self.places.get_mut(&number).filter(|held| held.is_stranger) else { return };
        held.is_stranger = false;
        let address = held.address;
        if let Some(strangers) = self.strangers.get_mut(&address) {
            *strangers -= 1;
            if *strangers == 0 {
                self.strangers.remove(&address);
            }
        }
    }

    fn remove(&mut self, number: u64) -> Option<Held> {
        self.engage(number);
        self.trust(number);
        self.places.remove(&number)
    }

    fn show_out(&mut self, number: u64) {
        if let Some(held) = self.remove(number) {
            held.out.notify_one();
        }
    }
}

impl Place {
    /// Peer address of the connection.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Marks the connection as busy: it keeps its slot until it is idle again.
    pub fn engage(&self) {
        self.room.taken().engage(self.number);
        self.room.freed.notify_one();
    }

    /// Marks the connection as authenticated and busy. It keeps its slot until it is idle, and no
    /// longer counts as a stranger of its address.
    pub fn trust(&self) {
        let mut taken = self.room.taken();
        taken.engage(self.number);
        taken.trust(self.number);
        drop(taken);
        self.room.freed.notify_one();
    }

    /// Marks the connection as idle from now on.
    pub fn rest(&self) {
        self.room.taken().rest(self.number);
    }

    /// Waits until another connection has taken this slot.
    pub async fn shown_out(&self) {
        self.out.notified().await;
    }

    /// Runs `work` for as long as the slot is kept.
    pub async fn keep<T>(&self, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        tokio::select! {
            // Finished work counts even if the slot is lost at the same time.
            biased;
            done = work => done,
            () = self.shown_out() => {
                Err(io::Error::new(ErrorKind::ConnectionAborted, "it was idle, and made place for another"))
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.room.taken().remove(self.number));
        self.room.freed.notify_one();
    }
}

/// Source of connections: a socket, or a test's.
pub trait Accept {
    /// Type of a connection.
    type Stream;

    /// Returns the next connection and its peer address. Cancel safe: no connection is lost when
    /// the future is dropped.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>>;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        TcpListener::accept(self).await
    }
}

/// Accepts connections until `shutdown` completes and hands each with its slot to `serve`, which
/// does not wait for it. `what` names the listener in the log.
pub async fn accept_loop<A: Accept>(
    listener: A,
    room: Arc<Room>,
    what: &str,
    shutdown: impl Future<Output = ()>,
    mut serve: impl FnMut(A::Stream, SocketAddr, Place),
) {
    let mut door = Door { listener, what, failing: None, refusals: Throttle::new(1, QUIET) };
    let mut queue = Queue::default();
    let mut shutdown = pin!(shutdown);
    loop {
        let retry = queue.seat(&room, &door, &mut serve);
        let retry = async {
            match retry {
                Some(at) => sleep_until(at).await,
                // No retry is due: only the other branches can end this wait.
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Polled in order: shutdown first, newcomers last.
            biased;
            () = shutdown.as_mut() => return,
            // Waiting connections take precedence over newcomers. A slot freed while nobody listens
            // leaves a permit in `Notify`, so no wake-up is lost.
            () = room.freed.notified(), if queue.length > 0 => {}
            () = retry => {}
            came = door.next(&room) => {
                let Some((stream, from)) = came else { continue };
                queue.push(&room, &door, stream, from, &mut serve);
            }
        }
    }
}

/// Accepts one connection, within a time limit.
pub async fn accept_one(listener: TcpListener, what: &str, limit: Duration) -> io::Result<TcpStream> {
    let limits = Limits { all: 1, strangers_of_address: 1, idle_of_address: 1, grace: Duration::ZERO };
    let room = Room::new(limits);
    let mut door = Door { listener, what, failing: None, refusals: Throttle::new(1, QUIET) };
    let accepted = timeout(limit, async {
        loop {
            if let Some((stream, _)) = door.next(&room).await {
                return stream;
            }
        }
    });
    accepted.await.map_err(|_| ErrorKind::TimedOut.into())
}

struct Door<'a, A> {
    listener: A,
    what: &'a str,
    /// Time of the last log line that nothing can be accepted.
    failing: Option<Instant>,
    refusals: Throttle,
}

impl<A: Accept> Door<'_, A> {
    /// Accepts the next connection; `None` if that failed.
    async fn next(&mut self, room: &Room) -> Option<(A::Stream, SocketAddr)> {
        // Waits without limit; the callers' `select!` and `timeout` bound it.
        let error = match self.listener.accept().await {
            Ok(came) => return Some(came),
            Err(error) => error,
        };
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
        if is_of_one_connection(errno) {
            tracing::debug!("a connection for {} ended before it was accepted: {error}", self.what);
            return None;
        }
        if self.failing.is_none_or(|said| said.elapsed() >= QUIET) {
            tracing::warn!("cannot accept connections for {}: {error}; trying again", self.what);
            self.failing = Some(Instant::now());
        }
        if matches!(errno, Errno::EMFILE | Errno::ENFILE) {
            // Frees the file descriptor of an idle connection for a newcomer.
            let mut taken = room.taken();
            if let Some((_, number)) = taken.oldest_of_most() {
                taken.show_out(number);
            }
        }
        // A slot that becomes free cuts the pause short; that is rarer than this error would come
        // back.
        sleep(PAUSE).await;
        None
    }

    /// Logs that a connection was closed, unless that was logged for its address recently.
    fn refuse(&self, from: SocketAddr, why: &str) {
        let address = from.ip().to_canonical();
        if self.refusals.allows(address) {
            self.refusals.note(address);
            tracing::warn!("refused a connection from {from} for {}: {why}", self.what);
        }
    }
}

/// Whether an error of `accept` concerns only the connection that was to be accepted, which is then
/// gone from the system's queue.
fn is_of_one_connection(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ECONNABORTED
            | Errno::EINTR
            | Errno::EPERM
            | Errno::EPROTO
            | Errno::ENETDOWN
            | Errno::ENOPROTOOPT
            | Errno::EHOSTDOWN
            | Errno::EHOSTUNREACH
            | Errno::EOPNOTSUPP
            | Errno::ENETUNREACH
    )
}

/// Connections that wait for a slot, by address in the order in which they came.
struct Queue<S> {
    waiting: BTreeMap<IpAddr, VecDeque<(S, SocketAddr, Instant)>>,
    length: usize,
    /// Address that got a slot last. The addresses behind it have their turn before it.
    last: Option<IpAddr>,
}

impl<S> Default for Queue<S> {
    fn default() -> Self {
        Queue { waiting: BTreeMap::new(), length: 0, last: None }
    }
}

impl<S> Queue<S> {
    /// Gives a newcomer a slot, or queues it.
    fn push<A: Accept<Stream = S>>(
        &mut self,
        room: &Arc<Room>,
        door: &Door<'_, A>,
        stream: S,
        from: SocketAddr,
        serve: &mut impl FnMut(S, SocketAddr, Place),
    ) {
        let address = from.ip().to_canonical();
        if !self.waiting.contains_key(&address)
            && let Ok(place) = room.take(address)
        {
            return serve(stream, from, place);
        }
        self.waiting.entry(address).or_default().push_back((stream, from, Instant::now()));
        self.length += 1;
        if self.length > WAITING
            && let Some(address) =
                self.waiting.iter().max_by_key(|(_, waiting)| waiting.len()).map(|(at, _)| *at)
            && let Some((_, from, _)) = self.pop(address, VecDeque::pop_back)
        {
            door.refuse(from, &format!("{WAITING} connections wait for a place"));
        }
    }

    /// Gives slots to waiting connections, one of each address in turn; returns the time of the
    /// next attempt, where that is known.
    fn seat<A: Accept<Stream = S>>(
        &mut self,
        room: &Arc<Room>,
        door: &Door<'_, A>,
        serve: &mut impl FnMut(S, SocketAddr, Place),
    ) -> Option<Instant> {
        let mut retry: Option<Instant> = None;
        let mut turns = self.turns();
        while let Some(address) = turns.pop_front() {
            let Some(given_up) = self.first_given_up(address, door) else { continue };
            match room.take(address) {
                Ok(place) => {
                    let Some((stream, from, _)) = self.pop(address, VecDeque::pop_front) else { continue };
                    self.last = Some(address);
                    turns.push_back(address);
                    serve(stream, from, place);
                }
                Err(due) => {
                    let due = due.map_or(given_up, |due| due.min(given_up));
                    retry = Some(retry.map_or(due, |retry| retry.min(due)));
                }
            }
        }
        retry
    }

    /// Returns the waiting addresses, beginning behind the one that got a slot last.
    fn turns(&self) -> VecDeque<IpAddr> {
        let mut turns: VecDeque<IpAddr> = self.waiting.keys().copied().collect();
        let before = turns.iter().take_while(|address| self.last >= Some(**address)).count();
        turns.rotate_left(before);
        turns
    }

    /// Returns the time at which the first waiting connection of an address expires. Those already
    /// expired are refused first.
    fn first_given_up<A: Accept<Stream = S>>(
        &mut self,
        address: IpAddr,
        door: &Door<'_, A>,
    ) -> Option<Instant> {
        loop {
            let (_, from, since) = self.waiting.get(&address)?.front()?;
            let (from, given_up) = (*from, *since + WAIT_LIMIT);
            if given_up > Instant::now() {
                return Some(given_up);
            }
            door.refuse(from, "it waited too long for a place");
            self.pop(address, VecDeque::pop_front);
        }
    }

    /// Removes one waiting connection of an address.
    fn pop(
        &mut self,
        address: IpAddr,
        end: impl FnOnce(&mut VecDeque<(S, SocketAddr, Instant)>) -> Option<(S, SocketAddr, Instant)>,
    ) -> Option<(S, SocketAddr, Instant)> {
        let waiting = self.waiting.get_mut(&address)?;
        let one = end(waiting)?;
        if waiting.is_empty() {
            self.waiting.remove(&address);
        }
        self.length -= 1;
        Some(one)
    }
}

#[cfg(test)]
mod tests;
