//! The gRPC listener: a connection must begin to speak HTTP/2 in time, or it is closed.
//!
//! HTTP/2 has keep-alive pings only once both sides have exchanged their prefaces. Before that a
//! client could hold a connection for ever, and a file descriptor of this process with it. With TLS
//! the handshake takes the place of the preface.
//!
//! A client without a certificate, or without TLS, is accepted with access to health checks alone;
//! so it gets an error message that names what is missing.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ganglion_proto::listen::{Limits, Place, Room, accept_loop};
use ganglion_proto::throttle::Throttle;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::connection::{Connection, Shown, Stream};
use super::tls::Acceptor;

/// First bytes of every HTTP/2 client.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// First byte of every TLS client: the type of a handshake record.
const HANDSHAKE: u8 = 22;
/// Answer to a TLS client of a listener without TLS. It is not TLS, which the client's library reports.
const NO_TLS: &[u8] = b"this coordinator does not speak TLS\n";
/// Time limit for the TLS handshake or the HTTP/2 preface.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// Interval at which the rest of a preface is polled.
// Clients send the preface in one packet, so the second look is rare.
const LOOK: Duration = Duration::from_millis(20);
/// Connection limits: all connections at once, where the system allows twice as many descriptors;
/// idle ones of one address, which have made no authorised call yet; and the time for which these
/// keep their places while others wait.
const LIMITS: Limits =
    Limits { all: 8192, strangers_of_address: 512, idle_of_address: 512, grace: Duration::from_secs(1) };
/// Log lines per address in a burst, and the pause before each further one.
const COMPLAINTS: (u32, Duration) = (60, Duration::from_secs(10));
/// Capacity of the queue of accepted connections.
// The server takes connections faster than handshakes end; more would only hide that it hangs.
const WAITING: usize = 64;

/// Starts to accept connections; returns those whose clients have sent a preface or finished a handshake.
pub(crate) fn open(listener: TcpListener, tls: Option<Arc<Acceptor>>) -> mpsc::Receiver<Connection> {
    let (let_in, greeted) = mpsc::channel(WAITING);
    let hall = Arc::new(Hall { tls, let_in, complaints: Throttle::new(COMPLAINTS.0, COMPLAINTS.1) });
    let room = Room::new(LIMITS.within_descriptors());
    tokio::spawn(async move {
        let (closed, inside) = (hall.let_in.clone(), hall);
        let serve = |stream, from, place| drop(tokio::spawn(inside.clone().receive(stream, from, place)));
        // Ends with the server, which drops the receiver.
        accept_loop(listener, room, "workers and operators", closed.closed(), serve).await;
    });
    greeted
}

/// State shared by all connections before they are accepted.
struct Hall {
    tls: Option<Arc<Acceptor>>,
    let_in: mpsc::Sender<Connection>,
    complaints: Throttle,
}

impl Hall {
    async fn receive(self: Arc<Hall>, stream: TcpStream, from: SocketAddr, place: Place) {
        // In a task for each connection: one that says nothing delays no other.
        let greeting = place.keep(greet(stream, self.tls.as_deref()));
        // Ends early if another connection needs this place.
        let greeted = tokio::time::timeout(GREETING_LIMIT, greeting).await;
        match greeted.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
            // Waits while the server's queue is full; the connection keeps its place meanwhile.
            Ok((stream, shown)) => drop(self.let_in.send(Connection::new(stream, shown, place)).await),
            Err(error) => self.complain(from, &error.to_string()),
        }
    }

    /// Logs that a connection was closed, at a limited rate per address.
    fn complain(&self, from: SocketAddr, why: &str) {
        let address = from.ip().to_canonical();
        if self.complaints.allows(address) {
            self.complaints.note(address);
            tracing::warn!("closed a connection from {from}: {why}");
        }
    }
}

async fn greet(mut stream: TcpStream, tls: Option<&Acceptor>) -> io::Result<(Stream, Shown)> {
    // Messages are small and awaited. Nagle's algorithm would hold a heartbeat back for a round trip.
    stream.set_nodelay(true)?;
    // The caller limits the time of all waits here.
    let speaks_tls = first_byte(&stream).await? == HANDSHAKE;
    match (tls, speaks_tls) {
        (Some(tls), true) => {
            let stream = Box::new(tls.accept(stream).await.map_err(not_greeted)?);
            let is_member = stream.get_ref().1.peer_certificates().is_some();
            let shown = if is_member { Shown::Certificate } else { Shown::NoCertificate };
            Ok((Stream::Tls(stream), shown))
        }
        (None, true) => {
            // Bounded by the greeting's limit, like all waits here.
            stream.write_all(NO_TLS).await?;
            Err(io::Error::new(ErrorKind::InvalidData, "it speaks TLS, and this coordinator does not"))
        }
        (tls, false) => {
            greets(&stream).await.map_err(|error| {
                io::Error::new(error.kind(), format!("it does not speak HTTP/2: {error}"))
            })?;
            let shown = if tls.is_some() { Shown::NoTls } else { Shown::NothingAsked };
            Ok((Stream::Plain(stream), shown))
        }
    }
}

fn not_greeted(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("the TLS handshake failed: {error}"))
}

/// First byte that a client sends; it stays in the socket.
async fn first_byte(stream: &TcpStream) -> io::Result<u8> {
    let mut said = [0];
    match stream.peek(&mut said).await? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => Ok(said[0]),
    }
}

/// Waits until a client has sent its preface, which stays in the socket.
async fn greets(stream: &TcpStream) -> io::Result<()> {
    let mut said = [0; PREFACE.len()];
    loop {
        let length = stream.peek(&mut said).await?;
        if length == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if said[..length] != PREFACE[..length] {
            return Err(ErrorKind::InvalidData.into());
        }
        if length == PREFACE.len() {
            return Ok(());
        }
        // Peeked bytes stay in the socket, so it remains readable; polling replaces a wait for readability.
        tokio::time::sleep(LOOK).await;
    }
}
