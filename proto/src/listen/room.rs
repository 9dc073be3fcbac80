//! Limit on the open connections of a listener: who holds a slot, and who has to give one up.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

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
        // Half: the other half is for files, and for the connections that this process opens.
        let most = usize::try_from(descriptor_limit() / 2).unwrap_or(usize::MAX);
        let all = self.all.min(most).max(1);
        // A quarter stays for other addresses, also under a limit that was lowered.
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
    // A process may raise its own soft limit without privileges. If it may not, the lower one holds.
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
    pub(super) freed: Notify,
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
    pub(super) fn take(self: &Arc<Room>, address: IpAddr) -> Result<Place, Option<Instant>> {
        // Held until the slot is entered, so that two connections do not take the last one.
        let mut taken = self.taken();
        let idle = taken.idle.get(&address).map_or(0, BTreeMap::len);
        let strangers = taken.strangers.get(&address).copied().unwrap_or(0);
        // Its own address pays for it, not the others.
        let is_crowded = idle >= self.limits.idle_of_address || strangers >= self.limits.strangers_of_address;
        if is_crowded || taken.places.len() >= self.limits.all {
            let (since, number) =
                // All are busy: none can be shown out, and when one becomes idle `freed` tells.
                if is_crowded { taken.oldest(address) } else { taken.oldest_of_most() }.ok_or(None)?;
            let due = since + self.limits.grace;
            if due > Instant::now() {
                return Err(Some(due));
            }
            // Gives the slot away now; the connection closes as soon as its task runs.
            taken.show_out(number);
        }
        let (number, out) = (taken.next, Arc::new(Notify::new()));
        taken.next += 1;
        taken.places.insert(number, Held { address, idle: None, is_stranger: true, out: out.clone() });
        *taken.strangers.entry(address).or_default() += 1;
        // Idle until it shows that it belongs here, so that silence costs it the slot first.
        taken.rest(number);
        drop(taken);
        Ok(Place { room: self.clone(), address, number, out })
    }

    /// Closes the longest idle connection of the address that has the most idle ones.
    pub(super) fn show_out_oldest(&self) {
        let mut taken = self.taken();
        if let Some((_, number)) = taken.oldest_of_most() {
            taken.show_out(number);
        }
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
        // A number and not the time: two connections may become idle in the same instant.
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
        // Both lists count it, so both have to forget it.
        self.engage(number);
        self.trust(number);
        self.places.remove(&number)
    }

    fn show_out(&mut self, number: u64) {
        if let Some(held) = self.remove(number) {
            // Leaves a permit if the connection does not wait just now, so the order is not lost.
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
        // Not a slot, but the count of idle ones of this address has changed, which may let one in.
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
        // A slot that another connection has taken is gone already, and this removes nothing.
        drop(self.room.taken().remove(self.number));
        self.room.freed.notify_one();
    }
}
