//! The session's thread: one task that reads, writes and keeps time.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use ganglion_membership::{Position, Term};
use ganglion_proto::message::{FromWorker, Hello, ToWorker, Welcome};
use ganglion_proto::wire::SessionRequest;
use ganglion_proto::wire::session_service_client::SessionServiceClient;
use ganglion_proto::{MESSAGE_LIMIT, PROTOCOL};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Streaming};

use super::{End, Session, Shared};

/// How long to look for the coordinator.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// How long one attempt may take.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(3);
/// How long to wait for a welcome.
const WELCOME_LIMIT: Duration = Duration::from_secs(20);

/// Why no session came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address is no address.
    #[error("--coordinator {url}: {reason}; an address looks like http://10.0.0.1:7000")]
    Address {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody answers there.
    #[error("no coordinator at {url} after {attempts} attempts in {seconds} s: {reason}")]
    Unreachable {
        /// Where.
        url: String,
        /// How often it was tried.
        attempts: u32,
        /// For how long.
        seconds: u64,
        /// The last failure.
        reason: String,
    },
    /// The coordinator answered but did not take this worker in.
    #[error("{0}")]
    Refused(String),
}

type Opened = Result<(Welcome, Channel), ConnectError>;

/// Opens a session; returns once the worker is welcome.
pub fn open(url: &str, spawn_token: Option<String>) -> Result<Session, ConnectError> {
    let (endpoint, address) = endpoint(url)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("session")
        .enable_all()
        .build()
        .map_err(|error| ConnectError::Refused(format!("cannot start the session's thread: {error}")))?;
    let shared = Arc::new(Shared::default());
    let (outbox, outgoing) = unbounded_channel();
    let (opened, welcome) = mpsc::channel();
    let handle = runtime.handle().clone();
    let task = Task { url: url.to_string(), endpoint, spawn_token, shared: shared.clone() };
    handle.spawn(task.run(outgoing, opened));
    let limit = CONNECT_LIMIT + ATTEMPT_LIMIT + WELCOME_LIMIT;
    let refused = |_| ConnectError::Refused(format!("no welcome from {url} in {} s", limit.as_secs()));
    let (welcome, channel) = welcome.recv_timeout(limit).map_err(refused)??;
    // The runtime lives as long as the process, as the session does.
    std::mem::forget(runtime);
    let local_address = local_address_towards(address);
    Ok(Session { welcome, shared, outbox, channel, runtime: handle, local_address })
}

fn endpoint(url: &str) -> Result<(Endpoint, SocketAddr), ConnectError> {
    let bad = |reason: String| ConnectError::Address { url: url.to_string(), reason };
    let uri: Uri = url.parse().map_err(|error| bad(format!("{error}")))?;
    if uri.scheme_str() != Some("http") {
        return Err(bad("it does not start with http://".to_string()));
    }
    let host = uri.host().ok_or_else(|| bad("it has no host".to_string()))?.trim_matches(['[', ']']);
    let port = uri.port_u16().ok_or_else(|| bad("it has no port".to_string()))?;
    let mut addresses = (host, port).to_socket_addrs().map_err(|error| bad(error.to_string()))?;
    let address = addresses.next().ok_or_else(|| bad("its host has no address".to_string()))?;
    let endpoint = Endpoint::from(uri)
        .connect_timeout(ATTEMPT_LIMIT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(20));
    Ok((endpoint, address))
}

/// The address of this machine on the way to another: what its peers can reach as well.
fn local_address_towards(address: SocketAddr) -> IpAddr {
    let any: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    // Connecting a datagram socket sends nothing; it only chooses a route.
    let routed = UdpSocket::bind(any).and_then(|socket| {
        socket.connect(address)?;
        socket.local_addr()
    });
    routed.map_or(address.ip(), |local| local.ip())
}

struct Task {
    url: String,
    endpoint: Endpoint,
    spawn_token: Option<String>,
    shared: Arc<Shared>,
}

impl Task {
    async fn run(self, outgoing: UnboundedReceiver<FromWorker>, opened: mpsc::Sender<Opened>) {
        let (requests, request_stream) = unbounded_channel();
        let (channel, mut responses) = match self.connect(&requests, request_stream).await {
            Ok(connected) => connected,
            Err(error) => return drop(opened.send(Err(error))),
        };
        let welcome = match self.welcome(&mut responses).await {
            Ok(welcome) => welcome,
            Err(error) => return drop(opened.send(Err(error))),
        };
        let grace = Duration::from_secs_f64(welcome.job.job.failure_deadline);
        let term = welcome.term;
        let _ = opened.send(Ok((welcome, channel)));
        let lost = self.converse(term, grace / 5, outgoing, requests, responses).await;
        if let Some(reason) = lost {
            tracing::warn!("lost the coordinator ({reason}); ending in {:.1} s", grace.as_secs_f64());
            tokio::time::sleep(grace).await;
            self.shared.end(End::Lost(reason));
        }
    }

    async fn connect(
        &self,
        requests: &UnboundedSender<SessionRequest>,
        request_stream: UnboundedReceiver<SessionRequest>,
    ) -> Result<(Channel, Streaming<ganglion_proto::wire::SessionResponse>), ConnectError> {
        let channel = self.find_coordinator().await?;
        let hello = Hello {
            protocol: PROTOCOL,
            spawn_token: self.spawn_token.clone(),
            host: nix::unistd::gethostname()
                .map_or_else(|_| "unknown".to_string(), |name| name.to_string_lossy().into_owned()),
            pid: std::process::id(),
        };
        let _ = requests.send(FromWorker::Hello(hello).to_wire(Term(0)));
        let mut client = SessionServiceClient::new(channel.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        let request = Request::new(UnboundedReceiverStream::new(request_stream));
        let response = tokio::time::timeout(WELCOME_LIMIT, client.session(request)).await;
        match response {
            Ok(Ok(response)) => Ok((channel, response.into_inner())),
            Ok(Err(status)) => Err(ConnectError::Refused(status.message().to_string())),
            Err(_) => Err(ConnectError::Refused(format!("{} does not answer", self.url))),
        }
    }

    async fn find_coordinator(&self) -> Result<Channel, ConnectError> {
        let (started, mut attempts, mut pause) = (Instant::now(), 0, Duration::from_millis(50));
        loop {
            attempts += 1;
            let error = match self.endpoint.connect().await {
                Ok(channel) => return Ok(channel),
                Err(error) => error,
            };
            if started.elapsed() > CONNECT_LIMIT {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                return Err(ConnectError::Unreachable {
                    url: self.url.clone(),
                    attempts,
                    seconds: started.elapsed().as_secs(),
                    reason: cause.unwrap_or_else(|| error.to_string()),
                });
            }
            tracing::debug!("attempt {attempts} to reach {}: {error}", self.url);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }

    async fn welcome(
        &self,
        responses: &mut Streaming<ganglion_proto::wire::SessionResponse>,
    ) -> Result<Welcome, ConnectError> {
        let refused = |reason: String| Err(ConnectError::Refused(reason));
        let response = match tokio::time::timeout(WELCOME_LIMIT, responses.message()).await {
            Ok(Ok(Some(response))) => response,
            Ok(Ok(None)) => return refused("the coordinator closed the session".to_string()),
            Ok(Err(status)) => return refused(status.message().to_string()),
            Err(_) => return refused(format!("{} does not answer", self.url)),
        };
        match ToWorker::from_wire(response) {
            Ok((_, ToWorker::Welcome(welcome))) => Ok(*welcome),
            Ok((_, ToWorker::Reject(reason))) => refused(reason),
            Ok((_, other)) => refused(format!("unexpected {other:?} instead of a welcome")),
            Err(malformed) => refused(malformed.to_string()),
        }
    }

    /// Reads, writes and gives signs of life until the session ends. Returns the reason if the coordinator was lost.
    async fn converse(
        &self,
        term: Term,
        heartbeat: Duration,
        mut outgoing: UnboundedReceiver<FromWorker>,
        requests: UnboundedSender<SessionRequest>,
        mut responses: Streaming<ganglion_proto::wire::SessionResponse>,
    ) -> Option<String> {
        let mut heartbeats = tokio::time::interval(heartbeat);
        loop {
            let message = tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        if self.take(term, response) { return None } else { continue }
                    }
                    Ok(None) => return Some("it closed the session".to_string()),
                    Err(status) => return Some(status.message().to_string()),
                },
                Some(message) = outgoing.recv() => message,
                _ = heartbeats.tick() => {
                    let position = self.shared.position.load(std::sync::atomic::Ordering::Relaxed);
                    FromWorker::Heartbeat(Position(position), self.shared.activity())
                }
            };
            if requests.send(message.to_wire(term)).is_err() {
                return Some("the session's stream is closed".to_string());
            }
        }
    }

    /// Takes a message of the coordinator; returns whether the session is over.
    fn take(&self, term: Term, response: ganglion_proto::wire::SessionResponse) -> bool {
        let message = match ToWorker::from_wire(response) {
            Ok((of, message)) if of == term => message,
            Ok((of, _)) => {
                tracing::warn!("dropped a message of term {of} in term {term}");
                return false;
            }
            Err(malformed) => {
                tracing::warn!("dropped a message: {malformed}");
                return false;
            }
        };
        match message {
            ToWorker::Assignment(assignment) => self.shared.take_assignment(assignment),
            ToWorker::Plan(plan) => self.shared.take_plan(plan),
            ToWorker::Abort(generation, reason) => {
                tracing::info!("leaving generation {generation}: {reason}");
                self.shared.abort(generation);
            }
            ToWorker::MetricsRecorded(step) => self.shared.forget_rows(step),
            ToWorker::Release => self.shared.end(End::Released),
            ToWorker::Reject(reason) => self.shared.end(End::Rejected(reason)),
            ToWorker::Welcome(_) => tracing::warn!("dropped a second welcome"),
        }
        self.shared.lock().end.is_some()
    }
}
