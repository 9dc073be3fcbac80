//! A client's connection, and the identity of the client.
//!
//! 1. A connection without an authorised call is closed after `PATIENCE`, or earlier if others wait
//!    for its place.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use ganglion_proto::listen::Place;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

/// Time limit for a client's first authorised call.
// Time for a slow client to be authorised; a place is wanted back sooner only if others wait.
const PATIENCE: Duration = Duration::from_secs(30);

/// Credentials that a client showed when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// None, and none are required.
    NothingAsked,
    /// A certificate signed by our authority.
    Certificate,
    /// No certificate.
    NoCertificate,
    /// No TLS, though it is required.
    NoTls,
}

/// The client at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Credentials shown when it connected.
    pub shown: Shown,
    place: Arc<Place>,
    admitted: Arc<AtomicBool>,
}

impl Peer {
    /// Remote address.
    pub fn address(&self) -> IpAddr {
        self.place.address()
    }

    /// Marks the client as authorised: it keeps its place from now on.
    pub fn admit(&self) {
        // Relaxed: the flag guards no other memory. `swap` has the place marked once.
        if !self.admitted.swap(true, Ordering::Relaxed) {
            self.place.trust();
        }
    }

    /// Whether the client was marked as authorised.
    pub fn is_admitted(&self) -> bool {
        self.admitted.load(Ordering::Relaxed)
    }
}

/// A client's connection.
pub struct Connection {
    stream: Stream,
    peer: Peer,
    /// Completes when an unauthorised client must leave.
    patience: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Transport of a connection.
pub enum Stream {
    /// TCP alone.
    Plain(TcpStream),
    /// TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    /// Wraps a greeted stream; `place` is released with the connection.
    pub fn new(stream: Stream, shown: Shown, place: Place) -> Connection {
        let place = Arc::new(place);
        let held = place.clone();
        let patience = async move {
            tokio::select! {
                // Another connection needs this place.
                () = held.shown_out() => {}
                () = sleep(PATIENCE) => {}
            }
        };
        Connection {
            stream,
            peer: Peer { shown, place, admitted: Arc::default() },
            // Boxed once for each connection: the future has no name, and `poll_read` needs it pinned.
            patience: Box::pin(patience),
        }
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
        // Checked on reads alone: the HTTP/2 server always has a read pending, which the timer wakes.
        if !self.peer.is_admitted() && self.patience.as_mut().poll(cx).is_ready() {
            tracing::info!(
                "closed a connection from {}: it has sent no request that is allowed",
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
