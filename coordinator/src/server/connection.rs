//! A client's connection, and what is known of who is at its other end.
//!
//! 1. A client that may do nothing is shown out after `PATIENCE`, and before that if others wait for its
//!    place.

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

/// How long a client may take until it has done something that it may do.
const PATIENCE: Duration = Duration::from_secs(30);

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
    admitted: Arc<AtomicBool>,
}

impl Peer {
    /// Where from.
    pub fn address(&self) -> IpAddr {
        self.place.address()
    }

    /// Keeps its place from now on: it did something that it may do.
    pub fn admit(&self) {
        if !self.admitted.swap(true, Ordering::Relaxed) {
            self.place.trust();
        }
    }

    /// Whether it did.
    pub fn is_admitted(&self) -> bool {
        self.admitted.load(Ordering::Relaxed)
    }
}

/// A client's connection.
pub struct Connection {
    stream: Stream,
    peer: Peer,
    /// Ends when the client must leave, unless it was admitted.
    patience: Pin<Box<dyn Future<Output = ()> + Send>>,
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
    pub fn new(stream: Stream, shown: Shown, place: Place) -> Connection {
        let place = Arc::new(place);
        let held = place.clone();
        let patience = async move {
            tokio::select! {
                () = held.shown_out() => {}
                () = sleep(PATIENCE) => {}
            }
        };
        Connection {
            stream,
            peer: Peer { shown, place, admitted: Arc::default() },
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
