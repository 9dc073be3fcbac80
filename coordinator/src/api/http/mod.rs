//! The dashboard and the endpoints for machines: JSON, Prometheus, probes. All of it is read-only.
//!
//! 1. The shell waits for no client: it publishes a view, and the chronicle's lock is held for a
//!    moment only.
//! 2. The cost of any client is bounded: connections, the time to ask, the size of a request, the
//!    life of a connection, the size of an answer.
//! 3. Only GET and HEAD are served, and no body is read.
//! 4. A page of another site learns nothing: its name is not this host's, and it has no token
//!    (`guard`).

mod assets;
mod guard;
mod pages;
mod prometheus;
mod start;

use std::future::{Future, pending};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use ganglion_proto::listen::{Limits, Place, Room, accept_loop};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::records::chronicle::Chronicle;
use crate::records::view::View;
pub(crate) use guard::{Guard, keep_token};
pub(crate) use start::{Content, Dashboard, Wanted, start};

/// Maximum number of connections, of those of one address, and of those of one address that wait
/// for a request. The connection that has waited the longest makes place for a newcomer, so probes
/// are answered whatever other clients leave open, and whatever one address does.
const LIMITS: Limits =
    Limits { all: 128, strangers_of_address: 96, idle_of_address: 64, grace: Duration::ZERO };
/// Time limit to open a connection, such as by a TLS handshake.
const OPENING_LIMIT: Duration = Duration::from_secs(10);
/// Time limit to send a request, and for silence between two requests.
const HEADER_LIMIT: Duration = if cfg!(test) { Duration::from_millis(500) } else { Duration::from_secs(10) };
/// Maximum size of a request with its headers, in bytes.
const HEADER_BYTES: usize = 16 << 10;
/// Lifetime of a connection. A client that goes on opens another.
// Bounds what one client can hold; a browser opens the next connection by itself.
const LIFE: Duration = Duration::from_secs(60);
/// Time limit for the last answer on a connection.
const LAST_ANSWER: Duration = Duration::from_secs(10);
/// A client whose newest status request is no older than this is still watching.
// The page asks every 1.5 s (`PERIOD` in assets/app.js), so this is three missed requests.
const LOOKING: Duration = Duration::from_secs(5);
/// Time limit, at the end, for watching clients to see how the run ended.
const FAREWELL: Duration = Duration::from_secs(3);
/// Pause for a page that has seen the end to ask for the last rows, events and pictures.
const REST: Duration = Duration::from_millis(500);

/// Content and access rules of the site.
pub(crate) struct Site {
    /// The newest view; `None` before the shell's first.
    pub view: watch::Receiver<Option<Arc<View>>>,
    /// Index of the run's records.
    pub chronicle: Chronicle,
    /// Folder of the pictures.
    pub samples: PathBuf,
    /// The job, as JSON.
    pub job: serde_json::Value,
    /// Access control.
    pub guard: Guard,
    /// Time of the newest status request, and whether the run had ended by then.
    pub asked: watch::Sender<Option<(Instant, bool)>>,
}

/// A running server; dropping it ends the server.
pub(crate) struct Served {
    /// Address of the listener.
    pub address: SocketAddr,
    site: Arc<Site>,
    task: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Served {
    /// URL of the page.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.site.guard.is_secure() { "https" } else { "http" };
        format!("{scheme}://{}/", self.address)
    }

    /// Waits, within limits, until watching clients have seen how the run ended.
    pub(crate) async fn farewell(&self) {
        let mut asked = self.site.asked.subscribe();
        // Nobody is watching, so there is nobody to wait for.
        let is_looked_at = asked.borrow().is_some_and(|(at, _)| at.elapsed() < LOOKING);
        if is_looked_at {
            let seen = asked.wait_for(|asked| asked.is_some_and(|(_, ended)| ended));
            // A tab that was closed a moment ago never asks again.
            if timeout(FAREWELL, seen).await.is_ok() {
                sleep(REST).await;
            }
        }
    }
}

/// Whether only this machine can reach an address.
pub(crate) fn is_local(address: IpAddr) -> bool {
    address.is_loopback()
}

/// Serves a site. `secure` turns an accepted connection into the stream to speak over, such as by a
/// TLS handshake; [`plainly`] leaves it as it is.
pub(crate) fn serve<S, F>(
    listener: TcpListener,
    site: Site,
    secure: impl Fn(TcpStream) -> F + Clone + Send + Sync + 'static,
) -> io::Result<Served>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = io::Result<S>> + Send + 'static,
{
    let (address, site) = (listener.local_addr()?, Arc::new(site));
    let router = pages::router(site.clone());
    let task = tokio::spawn(async move {
        let receive = |stream, from, place: Place| {
            let (opening, router) = (secure(stream), router.clone());
            tokio::spawn(async move {
                // Ends early if another connection needs this place.
                match timeout(OPENING_LIMIT, place.keep(opening)).await {
                    Ok(Ok(stream)) => converse(stream, router, &place).await,
                    Ok(Err(error)) => tracing::debug!("a connection from {from} failed: {error}"),
                    Err(_) => tracing::debug!("a connection from {from} was not opened in time"),
                }
            });
        };
        // A room of its own: browsers cannot take the places of workers.
        let room = Room::new(LIMITS.within_descriptors());
        accept_loop(listener, room, "the dashboard", pending(), receive).await;
    });
    Ok(Served { address, site, task })
}

/// Passes a connection on without encryption.
pub(crate) async fn plainly(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Answers on one connection until it ends, reaches its lifetime, or makes place for another while
/// it waits for a request.
async fn converse<S>(stream: S, router: Router, place: &Place)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let router = TowerToHyperService::new(router);
    let answer = service_fn(|question| {
        // A connection in the middle of an answer does not make place for another.
        place.engage();
        let answer = router.call(question);
        async move {
            let answer = answer.await;
            place.rest();
            answer
        }
    });
    // HTTP/1.1 alone: one request at a time is what the limits above are for.
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    tokio::select! {
        // A request that has already arrived is answered before its connection makes place: in a
        // crowd of one address a probe may be told to leave before it was looked at.
        biased;
        _ = connection.as_mut() => return,
        () = place.shown_out() => return,
        // The answer at hand is still given.
        () = sleep(LIFE) => connection.as_mut().graceful_shutdown(),
    }
    // Bounded: a client that does not read its answer is abandoned.
    let _ = timeout(LAST_ANSWER, connection).await;
}

#[cfg(test)]
mod states;
#[cfg(test)]
mod tests;
