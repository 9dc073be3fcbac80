//! Connections that wait for a slot.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::time::Instant;

use super::room::{Place, Room};
use super::{Accept, Door, WAIT_LIMIT, WAITING};

/// Connections that wait for a slot, by address in the order in which they came.
pub(super) struct Queue<S> {
    waiting: BTreeMap<IpAddr, VecDeque<(S, SocketAddr, Instant)>>,
    pub(super) length: usize,
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
    pub(super) fn push<A: Accept<Stream = S>>(
        &mut self,
        room: &Arc<Room>,
        door: &Door<'_, A>,
        (stream, from): (S, SocketAddr),
        serve: &mut impl FnMut(S, SocketAddr, Place),
    ) {
        let address = from.ip().to_canonical();
        // A newcomer does not overtake those of its own address that wait.
        if !self.waiting.contains_key(&address)
            && let Ok(place) = room.take(address)
        {
            return serve(stream, from, place);
        }
        self.waiting.entry(address).or_default().push_back((stream, from, Instant::now()));
        self.length += 1;
        // The address with the most loses, so one address alone cannot push others out (invariant 4).
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
    pub(super) fn seat<A: Accept<Stream = S>>(
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
                    // Its turn is over, so the others of the round come before its next.
                    self.last = Some(address);
                    turns.push_back(address);
                    serve(stream, from, place);
                }
                Err(due) => {
                    // Whichever is earlier: a slot may become free, or the first one's patience ends.
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
        // In a circle: with a fixed order the highest addresses would starve.
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
            // Expired ones are refused here, when their turn comes; nobody needs a timer for each.
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
        // The oldest for a slot, the newest for a refusal.
        let one = end(waiting)?;
        if waiting.is_empty() {
            self.waiting.remove(&address);
        }
        self.length -= 1;
        Some(one)
    }
}
