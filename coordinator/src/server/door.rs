//! The door: who connects must speak HTTP/2 soon, or is shown out.
//!
//! HTTP/2 keeps a connection alive by questions and answers only once both sides have greeted. Before that a client could
//! hold a connection for ever, and a file descriptor of this process with it.

use std::io::{self, ErrorKind};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// What every client of HTTP/2 says first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long it may take.
const PREFACE_LIMIT: Duration = Duration::from_secs(10);
/// How often the rest of it is looked for.
const LOOK: Duration = Duration::from_millis(20);
/// How long to wait before connections are accepted again when that failed: file descriptors may have run out.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections that may wait to be served.
const WAITING: usize = 64;

/// The connections on which a client greets.
pub fn open(listener: TcpListener) -> mpsc::Receiver<TcpStream> {
    let (let_in, greeted) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        while !let_in.is_closed() {
            match listener.accept().await {
                Ok((stream, from)) => drop(tokio::spawn(receive(stream, from, let_in.clone()))),
                Err(error) => {
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    });
    greeted
}

async fn receive(stream: TcpStream, from: std::net::SocketAddr, let_in: mpsc::Sender<TcpStream>) {
    let greeted = tokio::time::timeout(PREFACE_LIMIT, greets(&stream)).await;
    let greeted = greeted.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
    match greeted.and_then(|()| stream.set_nodelay(true)) {
        Ok(()) => drop(let_in.send(stream).await),
        Err(error) => tracing::warn!("closed a connection from {from}, which does not speak HTTP/2: {error}"),
    }
}

/// Waits until a client has greeted; leaves what it said to be read.
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
        // What has come is not taken, so the socket stays readable.
        tokio::time::sleep(LOOK).await;
    }
}
