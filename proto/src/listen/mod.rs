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

mod queue;
mod room;

use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use self::queue::Queue;
pub use self::room::{Limits, Place, Room, raise_descriptor_limit};
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
    // A line at most each minute (invariant 5); the first one at once.
    let mut door = Door { listener, what, failing: None, refusals: Throttle::new(1, QUIET) };
    let mut queue = Queue::default();
    // Polled again and again in the loop, and must not start anew.
    let mut shutdown = pin!(shutdown);
    loop {
        // Before each wait: a place may have become free by a timer or by the last connection.
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
                // An error of `accept` was logged, and its pause is over.
                let Some((stream, from)) = came else { continue };
                // Never waits: a slot or a place in the queue, else the longest queue loses its newest.
                queue.push(&room, &door, (stream, from), &mut serve);
            }
        }
    }
}

/// Accepts one connection, within a time limit.
pub async fn accept_one(listener: TcpListener, what: &str, limit: Duration) -> io::Result<TcpStream> {
    // One connection is all that is wanted, so the room limits nothing.
    let limits = Limits { all: 1, strangers_of_address: 1, idle_of_address: 1, grace: Duration::ZERO };
    let room = Room::new(limits);
    let mut door = Door { listener, what, failing: None, refusals: Throttle::new(1, QUIET) };
    // The whole wait is bounded, however many attempts fail.
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
        // Without a number of the system it is none of one connection, and the pause follows.
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
            room.show_out_oldest();
        }
        // A slot that becomes free cuts the pause short; that is rarer than this error would come
        // back.
        // An error that stays, such as too few descriptors, would otherwise fill a core.
        sleep(PAUSE).await;
        None
    }

    /// Logs that a connection was closed, unless that was logged for its address recently.
    fn refuse(&self, from: SocketAddr, why: &str) {
        // The same peer may come over IPv4 and over IPv4 mapped into IPv6.
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

#[cfg(test)]
mod tests;
