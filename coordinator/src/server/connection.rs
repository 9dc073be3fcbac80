//! A client's connection, and what is known of who is at its other end.
//!
//! 1. A client that may do nothing is shown out after `PATIENCE`.
//! 2. So many connections are open at once, and so many of one address by clients that may do nothing yet.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

/// How long a client may take until it has done something that it may do.
const PATIENCE: Duration = Duration::from_secs(30);
/// Connections at once, where the system allows as many files.
const MOST: usize = 8192;
/// Those among them of one address whose clients have done nothing yet that they may do.
const MOST_STRANGERS: usize = 512;

/// What a client showed when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Nothing, and nothing is asked for.
    NothingAsked,
    /// A certificate of ours.
    Certificate,
    /// No certificate.
    NoCertificate,
    /// It does not speak TLS, though we do.
    NoTls,
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// What it showed when it connected.
    pub shown: Shown,
    place: Arc<Place>,
}

impl Peer {
    /// Where from.
    pub fn address(&self) -> IpAddr {
        self.place.address
    }

    /// It did something that it may do.
    pub fn admit(&self) {
        if !self.place.admitted.swap(true, Ordering::Relaxed) {
            self.place.room.leave_strangers(self.place.address);
        }
    }

    /// Whether it did.
    pub fn is_admitted(&self) -> bool {
        self.place.admitted.load(Ordering::Relaxed)
    }
}

/// Room for connections.
#[derive(Debug)]
pub struct Room {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    strangers: BTreeMap<IpAddr, usize>,
}

/// A connection's place in the room.
#[derive(Debug)]
pub struct Place {
    room: Arc<Room>,
    address: IpAddr,
    admitted: AtomicBool,
}

impl Room {
    /// Room for as many connections as half the files that this process may open, so that the run's own files find a place.
    pub fn new() -> Arc<Room> {
        let mut files = getrlimit(Resource::Nofile);
        // What a process starts with is meant for those that cannot handle more.
        let more = Rlimit { current: files.maximum, maximum: files.maximum };
        if setrlimit(Resource::Nofile, more).is_ok() {
            files = more;
        }
        let files = files.current.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX);
        Arc::new(Room { most: MOST.min(files / 2), taken: Mutex::default() })
    }

    /// A place, or why there is none.
    pub fn take(self: &Arc<Room>, address: IpAddr) -> Result<Arc<Place>, String> {
        let mut taken = self.taken();
        if taken.all >= self.most {
            return Err(format!("{} connections are open", taken.all));
        }
        let strangers = taken.strangers.entry(address).or_default();
        if *strangers >= MOST_STRANGERS {
            return Err(format!("{strangers} connections of this address have done nothing yet"));
        }
        *strangers += 1;
        taken.all += 1;
        Ok(Arc::new(Place { room: self.clone(), address, admitted: AtomicBool::new(false) }))
    }

    fn leave_strangers(&self, address: IpAddr) {
        let mut taken = self.taken();
        if let Some(strangers) = taken.strangers.get_mut(&address) {
            *strangers -= 1;
            if *strangers == 0 {
                taken.strangers.remove(&address);
            }
        }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.admitted.load(Ordering::Relaxed) {
            self.room.leave_strangers(self.address);
        }
        self.room.taken().all -= 1;
    }
}

/// A client's connection.
pub struct Connection {
    stream: Stream,
    peer: Peer,
    patience: Pin<Box<Sleep>>,
}

/// What it goes over.
pub enum Stream {
    /// TCP alone.
    Plain(TcpStream),
    /// TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    /// The connection of a client that showed something.
    pub fn new(stream: Stream, shown: Shown, place: Arc<Place>) -> Connection {
        Connection { stream, peer: Peer { shown, place }, patience: Box::pin(sleep(PATIENCE)) }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.peer.is_admitted() && self.patience.as_mut().poll(cx).is_ready() {
            tracing::info!(
                "closed a connection from {}: it does nothing that it may do",
                self.peer.address()
            );
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(room: &Arc<Room>, number: u8) -> Result<Peer, String> {
        let place = room.take(IpAddr::from([10, 0, 0, number]))?;
        Ok(Peer { shown: Shown::NothingAsked, place })
    }

    #[test]
    fn strangers_of_one_address_leave_room_for_others() {
        let room = Arc::new(Room { most: 2 * MOST_STRANGERS, taken: Mutex::default() });
        let mut crowd: Vec<Peer> = (0..MOST_STRANGERS).map(|_| peer(&room, 1).unwrap()).collect();
        assert!(peer(&room, 1).unwrap_err().contains("of this address"));
        let other = peer(&room, 2).unwrap();
        // Twice is once.
        crowd[0].admit();
        crowd[0].admit();
        crowd.push(peer(&room, 1).unwrap());
        assert!(peer(&room, 1).is_err());
        crowd.clear();
        other.admit();
        let crowd: Vec<Peer> =
            (0..2 * MOST_STRANGERS - 1).map(|_| peer(&room, 1).unwrap()).inspect(Peer::admit).collect();
        assert!(peer(&room, 3).unwrap_err().contains("connections are open"));
        drop((crowd, other));
        assert_eq!(room.taken().all, 0);
        assert!(room.taken().strangers.is_empty());
    }
}
