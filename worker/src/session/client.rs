//! The session's thread: one task that connects to the coordinator, reads, writes and keeps time.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ganglion_membership::Term;
use ganglion_membership::member::{self, End, Event};
use ganglion_proto::dial::{Credentials, DialError};
use ganglion_proto::message::{FromWorker, Hello, Resume, ToWorker, Usage, Welcome};
use ganglion_proto::signals::hangup_is_ignored;
use ganglion_proto::wire::session_service_client::SessionServiceClient;
use ganglion_proto::wire::{SessionRequest, SessionResponse};
use ganglion_proto::words::counted;
use ganglion_proto::{MESSAGE_LIMIT, PROTOCOL, printable};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Streaming};

use super::clock::{Clock, boot_clock};
use super::{Dialling, Session, Shared, probe};
use crate::session::gloo_tls::Tunnels;

/// Limit on the search for the coordinator at start.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// Limit on one attempt to connect.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(3);
/// Limit on the wait for the first welcome.
const WELCOME_LIMIT: Duration = Duration::from_secs(20);
/// The first pause between two attempts; it doubles.
const PAUSE: Duration = Duration::from_millis(20);
/// Interval at which a search that fails is told of.
const WORD: Duration = Duration::from_secs(5);

/// Reasons why a session could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address cannot be parsed or resolved.
    #[error(
        "--coordinator {url}: {reason}; an address looks like https://10.0.0.1:7000, or http:// for a coordinator without TLS"
    )]
    Address {
        /// Address as given.
        url: String,
        /// Reason.
        reason: String,
    },
    /// The peer does not accept this worker's credentials, or this worker does not trust the peer's.
    #[error("--coordinator {url}: {reason}")]
    Credentials {
        /// Address as given.
        url: String,
        /// Reason.
        reason: String,
    },
    /// No coordinator answered within the limit.
    #[error("no coordinator at {url} after {} in {seconds} s: {reason}", counted(*attempts, "attempt"))]
    Unreachable {
        /// Address as given.
        url: String,
        /// Number of attempts.
        attempts: u32,
        /// Duration of the search, in seconds.
        seconds: u64,
        /// Reason of the last failure.
        reason: String,
    },
    /// The coordinator answered that there is nothing left to do.
    #[error("the run is complete")]
    Complete,
    /// The coordinator answered but did not take this worker in.
    #[error("{0}")]
    Refused(String),
}

/// Machine that a session runs on: clock, network, signals. A simulation substitutes its own.
pub struct Host {
    /// Clock of leases; the boot clock outside simulations.
    pub clock: Clock,
    /// Connects to a coordinator.
    pub connect: Connect,
    /// Credentials shown to the coordinator.
    pub credentials: Credentials,
    /// Requests to end, one for each signal received.
    pub asked_to_end: UnboundedReceiver<()>,
    /// The address under which other machines find this one.
    pub local_address: IpAddr,
    /// Address of the probe listener: HOST:PORT.
    pub answers: String,
    /// Name of the compute device, diagnostic only.
    pub device: String,
    /// Resident memory of the worker's process in bytes; `None` where the system does not tell.
    pub memory: fn() -> Option<u64>,
}

/// Function that connects to an endpoint.
pub type Connect = Box<dyn Fn(Endpoint) -> Connecting + Send + Sync>;
/// Future of a connection.
pub type Connecting = Pin<Box<dyn Future<Output = Result<Channel, DialError>> + Send>>;

/// Opens a session on this machine; returns once the coordinator has sent its welcome.
pub(super) fn open(
    url: &str,
    credentials: Credentials,
    spawn_token: Option<String>,
    device: String,
) -> Result<Session, ConnectError> {
    let (_, address) = endpoint(url, &credentials)?;
    let system = |what: &str, error: std::io::Error| ConnectError::Refused(format!("{what}: {error}"));
    let local_address = data_address().unwrap_or_else(|| local_address_towards(address));
    let answers = probe::answer(local_address).map_err(|error| system("cannot listen for probes", error))?;
    let tunnels = credentials.tls.clone().map(|files| Tunnels::open(files, local_address)).transpose();
    let tunnels = tunnels.map_err(|error| system("cannot listen for reduces", error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("session")
        .enable_all()
        .build()
        .map_err(|error| system("cannot start the session's thread", error))?;
    let session = runtime.block_on(async {
        let asked_to_end = signals().map_err(|error| system("cannot listen for signals", error))?;
        let dial = credentials.clone();
        let connect: Connect = Box::new(move |endpoint| Box::pin(dial.clone().connect(endpoint)));
        let (clock, answers, memory) = (boot_clock as Clock, answers.to_string(), resident_bytes as _);
        let host = Host { clock, connect, credentials, asked_to_end, local_address, answers, device, memory };
        begin(url, spawn_token, host).await
    });
    // The runtime lives as long as the process, as the session does.
    std::mem::forget(runtime);
    session.map(|session| Session { tunnels, ..session })
}

/// Opens a session on the given host; returns once the coordinator has sent its welcome.
pub(super) async fn begin(
    url: &str,
    spawn_token: Option<String>,
    host: Host,
) -> Result<Session, ConnectError> {
    let (endpoint, _) = endpoint(url, &host.credentials)?;
    let Host { clock, connect, credentials, mut asked_to_end, local_address, answers, device, memory } = host;
    let url = url.to_string();
    let dial = Dial {
        url,
        endpoint,
        credentials: credentials.clone(),
        spawn_token,
        clock,
        connect,
        answers,
        device,
    };
    let connection = tokio::select! {
        biased;
        Some(()) = asked_to_end.recv() => {
            return Err(ConnectError::Refused("asked to end before a coordinator took this worker in".to_string()));
        }
        connection = dial.first() => connection?,
    };
    let (outbox, outgoing) = unbounded_channel();
    let (welcome, channel) = (connection.welcome.clone(), connection.channel.clone());
    let shared = Arc::new(Shared::new(welcome, channel, (clock, connection.since), outbox));
    let talk = Talk { shared: shared.clone(), outgoing, clock, memory, asked_to_end };
    let (task, watched) = (tokio::spawn(dial.run(connection, talk)), shared.clone());
    tokio::spawn(async move {
        if let Err(panic) = task.await {
            // Without this task nothing would renew the lease or notice that it ended.
            watched.lock().lost = format!("the session's thread ended: {panic}");
            watched.feed(Event::Dismissed(End::Lost));
        }
    });
    let runtime = tokio::runtime::Handle::current();
    Ok(Session { shared, runtime, local_address, credentials, tunnels: None })
}

/// Channel that receives one value for each SIGTERM, SIGINT or SIGHUP of this process.
fn signals() -> std::io::Result<UnboundedReceiver<()>> {
    let (came, asked_to_end) = unbounded_channel();
    let hangup = (!hangup_is_ignored()).then(SignalKind::hangup);
    for kind in [SignalKind::terminate(), SignalKind::interrupt()].into_iter().chain(hangup) {
        let (mut listener, came) = (signal(kind)?, came.clone());
        tokio::spawn(async move { while listener.recv().await.is_some() && came.send(()).is_ok() {} });
    }
    Ok(asked_to_end)
}

fn endpoint(url: &str, credentials: &Credentials) -> Result<(Endpoint, SocketAddr), ConnectError> {
    let bad = |reason: String| ConnectError::Address { url: url.to_string(), reason };
    let uri: Uri = url.parse().map_err(|error| bad(format!("{error}")))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(bad("it does not start with https:// or http://".to_string()));
    }
    let host = uri.host().ok_or_else(|| bad("it has no host".to_string()))?.trim_matches(['[', ']']);
    let port = uri.port_u16().ok_or_else(|| bad("it has no port".to_string()))?;
    let mut addresses = (host, port).to_socket_addrs().map_err(|error| bad(error.to_string()))?;
    let address = addresses.next().ok_or_else(|| bad("its host has no address".to_string()))?;
    let endpoint = credentials
        .endpoint(&uri)
        .map_err(|error| ConnectError::Credentials { url: url.to_string(), reason: error.to_string() })?;
    let endpoint = endpoint.connect_timeout(ATTEMPT_LIMIT).tcp_nodelay(true);
    Ok((endpoint, address))
}

/// Resident memory of this process, in bytes.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// Address of this machine on the route to another, which its peers can reach too.
fn local_address_towards(address: SocketAddr) -> IpAddr {
    let any: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    // Connecting a datagram socket sends nothing; it only chooses a route.
    let routed = UdpSocket::bind(any).and_then(|socket| {
        socket.connect(address)?;
        socket.local_addr()
    });
    routed.map_or(address.ip(), |local| local.ip())
}

/// Address of the interface that the user named for reduces (`GLOO_SOCKET_IFNAME`).
fn data_address() -> Option<IpAddr> {
    let wanted = std::env::var("GLOO_SOCKET_IFNAME").ok()?;
    let addresses = nix::ifaddrs::getifaddrs().ok()?.filter(|found| found.interface_name == wanted);
    let mut v4 = addresses.filter_map(|found| Some(found.address?.as_sockaddr_in()?.ip()));
    v4.next().map(IpAddr::from)
}

/// Parameters for dialling the coordinator.
struct Dial {
    url: String,
    endpoint: Endpoint,
    credentials: Credentials,
    spawn_token: Option<String>,
    clock: Clock,
    connect: Connect,
    /// Address of the probe listener.
    answers: String,
    device: String,
}

/// Open stream with a welcomed worker.
struct Connection {
    channel: Channel,
    requests: UnboundedSender<SessionRequest>,
    responses: Streaming<SessionResponse>,
    welcome: Welcome,
    /// Time at which the hello was sent, by the host's clock.
    since: Duration,
}

/// Reasons why one attempt failed, by what may follow.
enum Failed {
    /// Temporary: another attempt may succeed.
    Later(String),
    /// Permanent: the coordinator refuses this worker.
    Refused(String),
    /// Permanent until the user changes credentials or address.
    Wrong(String),
    /// The run is complete.
    Complete,
}

impl From<DialError> for Failed {
    fn from(error: DialError) -> Self {
        match error {
            DialError::Later(reason) => Failed::Later(reason),
            DialError::Wrong(reason) => Failed::Wrong(reason),
        }
    }
}

impl Dial {
    async fn run(self, mut connection: Connection, mut talk: Talk) {
        loop {
            let Some(reason) = talk.converse(&mut connection).await else { return };
            tracing::warn!(
                "lost the coordinator: {reason}; training goes on meanwhile, for twelve times job.failure_deadline at most"
            );
            talk.shared.lock().lost = reason;
            match self.find_again(&mut talk).await {
                Some(found) => connection = found,
                None => return,
            }
        }
    }

    /// Makes the first connection. The coordinator may not be listening yet.
    async fn first(&self) -> Result<Connection, ConnectError> {
        let (started, mut attempts, mut pause) = (Instant::now(), 0, PAUSE);
        // Before the first attempt, which may hang on an address that drops what comes.
        tracing::info!("connecting to the coordinator at {}", self.url);
        let mut word = Word::new();
        loop {
            attempts += 1;
            let hello = member::Hello { attempt: 1, resume: None };
            let attempt = tokio::time::timeout(WELCOME_LIMIT, self.attempt(hello, String::new()));
            let silent = |_| Err(Failed::Later(format!("{} does not answer", self.url)));
            let reason = match attempt.await.unwrap_or_else(silent) {
                Ok(connection) => return Ok(connection),
                Err(Failed::Refused(reason)) => return Err(ConnectError::Refused(reason)),
                Err(Failed::Wrong(reason)) => {
                    return Err(ConnectError::Credentials { url: self.url.clone(), reason });
                }
                Err(Failed::Complete) => return Err(ConnectError::Complete),
                Err(Failed::Later(reason)) => reason,
            };
            if started.elapsed() > CONNECT_LIMIT {
                let (url, seconds) = (self.url.clone(), started.elapsed().as_secs());
                return Err(ConnectError::Unreachable { url, attempts, seconds, reason });
            }
            if word.is_due() {
                let (url, limit) = (&self.url, CONNECT_LIMIT.as_secs());
                tracing::info!("no coordinator at {url} yet: {reason}; trying again, for {limit} s in all");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }

    /// Looks for the coordinator, or the run's next one, until the member gives up.
    async fn find_again(&self, talk: &mut Talk) -> Option<Connection> {
        // The loss itself was told just now.
        let mut word = Word::said();
        loop {
            match talk.next().await {
                Dialling::Connect(hello) => {
                    if let Some(connection) = self.try_again(talk, hello, &mut word).await {
                        return Some(connection);
                    }
                }
                // Nothing is connected.
                Dialling::Disconnect | Dialling::Heartbeat => {}
            }
            if talk.shared.lock().member.is_closed() {
                return None;
            }
        }
    }

    /// Makes one attempt, until it ends or the member gives it up.
    async fn try_again(&self, talk: &mut Talk, hello: member::Hello, word: &mut Word) -> Option<Connection> {
        let run = talk.shared.lock().welcome.run.clone();
        let attempt = tokio::select! {
            biased;
            attempt = self.attempt(hello, run) => attempt,
            // The only command during an attempt is to give it up.
            _ = talk.next() => return None,
        };
        match attempt {
            Ok(connection) => {
                let (welcome, channel) = (connection.welcome.clone(), connection.channel.clone());
                let term = welcome.term;
                for message in talk.shared.welcome_again(welcome, channel) {
                    let _ = connection.requests.send(message.to_wire(term));
                }
                if talk.shared.lock().member.is_connected() {
                    return Some(connection);
                }
                tracing::warn!("a coordinator of term {term} is older than ours");
            }
            Err(Failed::Complete) => talk.shared.feed(Event::Dismissed(End::Complete)),
            Err(Failed::Later(reason) | Failed::Refused(reason) | Failed::Wrong(reason)) => {
                if word.is_due() {
                    tracing::warn!("still without a coordinator at {}: {reason}", self.url);
                }
                talk.shared.feed(Event::Disconnected);
            }
        }
        None
    }

    /// Connects and says hello. `run` names the run to resume.
    async fn attempt(&self, hello: member::Hello, run: String) -> Result<Connection, Failed> {
        let connected = tokio::time::timeout(ATTEMPT_LIMIT, (self.connect)(self.endpoint.clone())).await;
        let channel = match connected {
            Ok(channel) => channel?,
            Err(_) => return Err(Failed::Later("no connection in time".to_string())),
        };
        let (requests, stream) = unbounded_channel();
        let since = (self.clock)();
        let _ = requests.send(FromWorker::Hello(self.hello(hello, run)).to_wire(Term(0)));
        let mut client = SessionServiceClient::new(channel.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        let mut request = Request::new(UnboundedReceiverStream::new(stream));
        if let Some(token) = self.credentials.token()? {
            token.authorise(&mut request);
        }
        // The first response carries the answer to the hello. The caller bounds the wait.
        let answered = async {
            let mut responses = client.session(request).await?.into_inner();
            let first = responses.message().await?;
            Ok((responses, first))
        };
        let (responses, first) = match answered.await {
            Ok((responses, Some(first))) => (responses, first),
            Ok((_, None)) => return Err(Failed::Later("the coordinator closed the session".to_string())),
            Err(status) => return Err(failed(&status)),
        };
        match ToWorker::from_wire(first) {
            Ok((_, ToWorker::Welcome(welcome))) => {
                Ok(Connection { channel, requests, responses, welcome: *welcome, since })
            }
            Ok((_, ToWorker::Reject(reason))) => Err(Failed::Refused(reason)),
            Ok((_, ToWorker::Release { complete: true })) => Err(Failed::Complete),
            Ok((_, other)) => Err(Failed::Refused(format!("unexpected {other:?} instead of a welcome"))),
            Err(malformed) => Err(Failed::Refused(malformed.to_string())),
        }
    }

    fn hello(&self, hello: member::Hello, run: String) -> Hello {
        let resume = |resume: member::Resume| Resume {
            run,
            worker: resume.worker,
            term: resume.term,
            generation: resume.generation,
            rest: resume.rest,
        };
        Hello {
            protocol: PROTOCOL,
            spawn_token: self.spawn_token.clone(),
            host: nix::unistd::gethostname()
                .map_or_else(|_| "unknown".to_string(), |name| name.to_string_lossy().into_owned()),
            pid: std::process::id(),
            address: self.answers.clone(),
            resume: hello.resume.map(resume),
            device: self.device.clone(),
            attempt: hello.attempt,
        }
    }
}

/// When a search that fails was told of last.
struct Word(Option<Instant>);

impl Word {
    fn new() -> Word {
        Word(None)
    }

    fn said() -> Word {
        Word(Some(Instant::now()))
    }

    /// Whether a line is due; notes that it is said.
    fn is_due(&mut self) -> bool {
        let is_due = self.0.is_none_or(|said| said.elapsed() >= WORD);
        if is_due {
            self.0 = Some(Instant::now());
        }
        is_due
    }
}

fn failed(status: &tonic::Status) -> Failed {
    let reason = printable(status.message()).into_owned();
    match status.code() {
        Code::Unauthenticated => Failed::Wrong(reason),
        Code::FailedPrecondition | Code::InvalidArgument | Code::Unimplemented => Failed::Refused(reason),
        _ => Failed::Later(reason),
    }
}

/// State of the conversation with the coordinator, kept across connections.
struct Talk {
    shared: Arc<Shared>,
    outgoing: UnboundedReceiver<FromWorker>,
    clock: Clock,
    memory: fn() -> Option<u64>,
    asked_to_end: UnboundedReceiver<()>,
}

impl Talk {
    /// Reads, writes and sends heartbeats until the connection or the session ends. Returns why the
    /// connection ended, `None` when the session did.
    async fn converse(&mut self, connection: &mut Connection) -> Option<String> {
        let term = connection.welcome.term;
        let lost = loop {
            let message = tokio::select! {
                // Responses that have arrived are read before the coordinator is judged silent.
                biased;
                response = connection.responses.message() => match response {
                    Ok(Some(response)) => {
                        self.take(term, response);
                        None
                    }
                    Ok(None) => break "it closed the session".to_string(),
                    Err(status) => break printable(status.message()).into_owned(),
                },
                Some(message) = self.outgoing.recv() => Some(message),
                dialling = next(&self.shared, self.clock, &mut self.asked_to_end) => match dialling {
                    Dialling::Heartbeat => {
                        let usage = Usage { resident_bytes: (self.memory)(), gpu: self.shared.gpu_use() };
                        Some(FromWorker::Heartbeat(self.shared.progress(), usage))
                    }
                    Dialling::Disconnect | Dialling::Connect(_) => {
                        return (!self.shared.lock().member.is_closed()).then(|| "it does not answer".to_string());
                    }
                },
            };
            if self.shared.lock().member.is_closed() {
                return None;
            }
            if let Some(message) = message
                && connection.requests.send(message.to_wire(term)).is_err()
            {
                break "the session's stream is closed".to_string();
            }
        };
        self.shared.feed(Event::Disconnected);
        Some(lost)
    }

    /// The next command of the member for this thread.
    async fn next(&mut self) -> Dialling {
        next(&self.shared, self.clock, &mut self.asked_to_end).await
    }

    /// Handles a message of the coordinator.
    fn take(&self, term: Term, response: SessionResponse) {
        let message = match ToWorker::from_wire(response) {
            Ok((of, message)) if of == term => message,
            Ok((of, _)) => return tracing::warn!("dropped a message of term {of} in term {term}"),
            Err(malformed) => return tracing::warn!("dropped a message: {malformed}"),
        };
        let event = match message {
            ToWorker::Pulse => Event::Pulse,
            ToWorker::Assignment(assignment) => return self.shared.take_assignment(assignment),
            ToWorker::Addresses(generation, addresses) => {
                return self.shared.take_addresses(generation, addresses);
            }
            ToWorker::Plan(plan) => Event::Planned(plan),
            ToWorker::Abort { generation, reason, probe, condemned } => {
                tracing::info!("leaving generation {generation}: {reason}");
                Event::Aborted { generation, probe, condemned }
            }
            ToWorker::MetricsRecorded(step) => Event::RowsRecorded(step),
            ToWorker::MetricsWanted(step) => Event::RowsWanted(step),
            ToWorker::CheckpointRecorded(step, phase) => Event::CheckpointRecorded(step, phase),
            ToWorker::EvaluationsRecorded(steps) => Event::EvaluationsRecorded(steps),
            ToWorker::Release { complete: true } => Event::Dismissed(End::Complete),
            ToWorker::Release { complete: false } => Event::Dismissed(End::Released),
            ToWorker::Reject(reason) => Event::Dismissed(End::Rejected(reason)),
            ToWorker::Welcome(_) => return tracing::warn!("dropped a second welcome"),
        };
        self.shared.feed(event);
    }
}

/// Waits for the member's next command to the session's thread: for its timers, and for the machine to ask
/// this worker to end.
async fn next(shared: &Shared, clock: Clock, asked_to_end: &mut UnboundedReceiver<()>) -> Dialling {
    loop {
        let (command, deadline) = {
            let mut inbox = shared.lock();
            (inbox.dial.pop_front(), inbox.member.next_deadline())
        };
        if let Some(command) = command {
            return command;
        }
        if shared.lock().member.is_closed() {
            return Dialling::Disconnect;
        }
        // A heartbeat is never far: events of the training thread need not wake this thread.
        let wait = deadline.map_or(Duration::from_secs(1), |deadline| deadline.saturating_sub(clock()));
        tokio::select! {
            () = tokio::time::sleep(wait) => shared.feed(Event::Tick),
            Some(()) = asked_to_end.recv() => {
                tracing::info!("asked to end: leaving once the others have what this worker holds");
                shared.feed(Event::LeaveRequested);
            }
        }
    }
}
