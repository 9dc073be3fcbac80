//! The gRPC services. Each one validates its input and passes it on to the shell.
//!
//! 1. A client that violates the contract loses its session and disturbs nothing else.
//! 2. A client that does not read its messages loses its session once its queue is full.
//! 3. A connection whose client does not begin to speak HTTP/2 in time is closed, so no descriptor
//!    is held for nothing.
//! 4. An authentication layer (`guard.rs`) stands before all services; only health checks are open
//!    to everybody.
//! 5. Connections, sessions, streams, headers and messages are bounded in number and size.

pub(crate) mod connection;
pub(crate) mod door;
pub(crate) mod guard;
pub(crate) mod refusal;
mod store;
pub mod tls;

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ganglion_membership::{Term, WorkerId};
use ganglion_proto::message::{FromWorker, Hello, ToWorker};
use ganglion_proto::wire::admin_service_server::{AdminService, AdminServiceServer};
use ganglion_proto::wire::session_request::Message;
use ganglion_proto::wire::session_service_server::{SessionService, SessionServiceServer};
use ganglion_proto::wire::store_service_server::StoreServiceServer;
use ganglion_proto::wire::{
    DESCRIPTORS, DrainRequest, DrainResponse, GetStatusRequest, GetStatusResponse, ScaleRequest,
    ScaleResponse, SessionRequest, SessionResponse, StopRequest, StopResponse,
};
use ganglion_proto::{MESSAGE_LIMIT, PROTOCOL};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::records::view::View;
use guard::{Guard, GuardLayer};
use refusal::{NotAdmitted, NotChanged};
pub use store::Store;

/// Capacity of the queue of messages to one worker.
// Answers to heartbeats, and a few messages for each change of a group: a full queue means that the
// worker stopped reading long ago.
const OUTBOX: usize = 256;
/// Time limit for the hello of a new session.
// As for all first words of a client (docs/membership.md, "Waits").
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Maximum number of concurrent sessions, including those before their hello.
// Bounds what clients can make this process hold: each session has a task and a queue.
const SESSIONS: usize = 4096;
/// Maximum number of concurrent calls on one connection: a worker has its session and a few keys
/// that it waits for.
const STREAMS: u32 = 256;
/// Maximum size of a call's headers, in bytes.
const HEADERS: u32 = 16 << 10;
/// Maximum size of a message to the store, in bytes: its largest entry and some margin.
const STORE_LIMIT: usize = 1 << 20;
/// Interval between two updates of the reported health.
const HEALTH_LOOK: Duration = Duration::from_secs(1);
/// Maximum size of an operator's message, in bytes.
const ADMIN_LIMIT: usize = 64 << 10;

/// Queue of messages to one worker.
pub type Outbox = mpsc::Sender<ToWorker>;

/// Identifies one session of a worker. A worker that reconnects gets a new one; late input of its
/// older sessions is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId(pub(crate) u64);

/// Input for the shell.
pub enum Input {
    /// A worker asks to join. The answer is its number.
    Hello {
        /// Self-description of the worker.
        hello: Hello,
        /// The session it was sent in.
        session: SessionId,
        /// Queue of messages to the worker.
        outbox: Outbox,
        /// Receives the worker's number, or the reason of a refusal.
        answer: oneshot::Sender<Result<WorkerId, NotAdmitted>>,
    },
    /// A message of a worker.
    Message(SessionId, WorkerId, FromWorker),
    /// A session ended.
    Closed(SessionId, WorkerId),
    /// A request of an operator.
    Admin(AdminInput),
}

/// Request of an operator.
pub enum AdminInput {
    /// Returns the status of the run.
    Status(oneshot::Sender<GetStatusResponse>),
    /// Drains a worker. The answer gives the reason of a refusal.
    Drain(WorkerId, oneshot::Sender<Result<(), NotChanged>>),
    /// Sets the number of local workers. The answer gives the reason of a refusal.
    Scale(u32, oneshot::Sender<Result<(), NotChanged>>),
    /// Stops the run after a clean checkpoint.
    Stop(oneshot::Sender<()>),
}

/// Services of a term, and what they pass their requests on to.
pub struct Services {
    /// The term.
    pub term: Term,
    /// Queue of the shell.
    pub inputs: mpsc::Sender<Input>,
    /// Store in which the members of a group meet.
    pub store: Store,
    /// Authentication of all requests.
    pub guard: Guard,
    /// Views of the shell, which determine the reported health.
    pub views: watch::Receiver<Option<Arc<View>>>,
}

/// Serves the connections that arrive on `incoming` until `shutdown` changes.
pub async fn serve<C>(
    services: Services,
    incoming: mpsc::Receiver<C>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error>
where
    C: Connected + AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Services { term, inputs, store, guard, views } = services;
    let room = Arc::new(Semaphore::new(SESSIONS));
    let sessions = Sessions { term, inputs: inputs.clone(), opened: AtomicU64::new(0), room };
    // The largest message is a picture of samples; what is longer is refused before it is read.
    let sessions = SessionServiceServer::new(sessions).max_decoding_message_size(MESSAGE_LIMIT);
    let store = StoreServiceServer::new(store).max_decoding_message_size(STORE_LIMIT);
    let admin = AdminServiceServer::new(Admin { inputs }).max_decoding_message_size(ADMIN_LIMIT);
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("these descriptors were compiled with the services");
    let incoming = ReceiverStream::new(incoming).map(Ok::<_, std::io::Error>);
    let served = Server::builder()
        // A machine that vanished sends no FIN. After these 30 s its connection gives back its
        // descriptor; membership has a limit of its own (M8).
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        // One connection could otherwise hold all places of sessions and waiters.
        .max_concurrent_streams(STREAMS)
        .http2_max_header_list_size(HEADERS)
        .layer(GuardLayer(Arc::new(guard)))
        .add_service(health)
        .add_service(reflection.max_decoding_message_size(ADMIN_LIMIT))
        .add_service(sessions)
        .add_service(store)
        .add_service(admin)
        .serve_with_incoming_shutdown(incoming, async move {
            // Graceful: sessions end after their last messages, within the caller's limit.
            let _ = shutdown.changed().await;
        });
    tokio::select! {
        served = served => served,
        // Polled in this task, so it ends with the server.
        never = report_health(reporter, views) => match never {},
    }
}

/// Reports whether the shell's loop makes progress, as `/healthz` does.
async fn report_health(reporter: HealthReporter, views: watch::Receiver<Option<Arc<View>>>) -> Infallible {
    let mut looks = tokio::time::interval(HEALTH_LOOK);
    loop {
        // Reads a view that the loop has published: nothing here waits for the loop.
        looks.tick().await;
        let hung = views.borrow().as_ref().and_then(|view| view.is_hung_for());
        let status = if hung.is_some() { ServingStatus::NotServing } else { ServingStatus::Serving };
        reporter.set_service_status("", status).await;
    }
}

struct Sessions {
    term: Term,
    inputs: mpsc::Sender<Input>,
    opened: AtomicU64,
    room: Arc<Semaphore>,
}

type Responses = Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>;

#[tonic::async_trait]
impl SessionService for Sessions {
    type SessionStream = Responses;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Responses>, Status> {
        // Refused at once and not queued: a waiting client would hold its stream.
        let Ok(place) = self.room.clone().try_acquire_owned() else {
            return Err(refused(Status::resource_exhausted(format!("{SESSIONS} sessions are open"))));
        };
        let mut requests = request.into_inner();
        // The place in `room` is held meanwhile, so a client that says nothing has a limit.
        let hello = match tokio::time::timeout(HELLO_LIMIT, requests.message()).await {
            Ok(Ok(Some(request))) => hello_of(request),
            Ok(Ok(None)) => Err(Status::invalid_argument("a session starts with a hello")),
            Ok(Err(status)) => Err(status),
            Err(_) => Err(Status::deadline_exceeded("no hello came in time")),
        };
        let hello = hello.map_err(refused)?;
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let (answer, admitted) = oneshot::channel();
        // Relaxed: the numbers must differ, and order no other memory.
        let session = SessionId(self.opened.fetch_add(1, Ordering::Relaxed));
        // Waits while the shell's queue is full. The session's place stays taken, which is the
        // back-pressure on new clients.
        self.inputs.send(Input::Hello { hello, session, outbox, answer }).await.map_err(|_| ended())?;
        // The shell answers every hello, though only once the journal can be written. If the shell
        // ends, the sender is dropped and this returns an error.
        let worker = admitted.await.map_err(|_| ended())?;
        let worker = worker.map_err(|reason| refused(Status::failed_precondition(reason.to_string())))?;
        let (broke, breach) = oneshot::channel();
        let (term, inputs) = (self.term, self.inputs.clone());
        let reader = Reader { term, session, worker, inputs };
        // Ends with the client's stream, or with the shell. It owns the place, so a session counts until
        // its last message was passed on.
        tokio::spawn(async move {
            reader.read(requests, broke).await;
            drop(place);
        });
        // Ends when the shell drops the outbox, after the messages that are in it.
        let responses = ReceiverStream::new(messages).map(move |message| Ok(message.to_wire(term)));
        Ok(Response::new(Box::pin(responses.chain(last_word(breach)))))
    }
}

/// Stream of at most one final item: the reason why the client lost its session, if it violated the contract.
fn last_word<T>(mut breach: oneshot::Receiver<Status>) -> impl Stream<Item = Result<T, Status>> {
    // Not awaited: a session may end for other reasons while the client goes on sending.
    tokio_stream::iter(std::iter::from_fn(move || breach.try_recv().ok().map(Err)))
}

/// Logs the reason of a refusal.
fn refused(status: Status) -> Status {
    tracing::warn!("refused a session: {}", status.message());
    status
}

#[allow(clippy::needless_pass_by_value)] // as map_err hands it over
fn not_changed(reason: NotChanged) -> Status {
    Status::failed_precondition(reason.to_string())
}

fn ended() -> Status {
    Status::unavailable("the coordinator is stopping")
}

fn hello_of(request: SessionRequest) -> Result<Hello, Status> {
    // Before all else: the hello of another version may break the rules of this one.
    if let Some(Message::Hello(hello)) = &request.message
        && hello.protocol != PROTOCOL
    {
        return Err(Status::failed_precondition(format!(
            "this worker speaks version {} of the contract and the coordinator version {PROTOCOL}; use one build of both",
            hello.protocol
        )));
    }
    match FromWorker::from_wire(request) {
        Ok((_, FromWorker::Hello(hello))) => Ok(hello),
        Ok(_) => Err(Status::invalid_argument("a session starts with a hello")),
        Err(malformed) => Err(Status::invalid_argument(malformed.to_string())),
    }
}

/// Reader of the messages of one session.
struct Reader {
    term: Term,
    session: SessionId,
    worker: WorkerId,
    inputs: mpsc::Sender<Input>,
}

impl Reader {
    /// Passes on a worker's messages until its stream ends or violates the contract.
    async fn read(self, mut requests: Streaming<SessionRequest>, broke: oneshot::Sender<Status>) {
        let Reader { term, session, worker, inputs } = self;
        let breach = loop {
            let request = match requests.message().await {
                Ok(Some(request)) => request,
                Ok(None) => break None,
                Err(status) => break Some(status).filter(is_breach),
            };
            match FromWorker::from_wire(request) {
                Ok((of, message)) if of == term => {
                    // Back-pressure: while the shell's queue is full, the stream is not read. An error
                    // means that the shell has ended.
                    if inputs.send(Input::Message(session, worker, message)).await.is_err() {
                        return;
                    }
                }
                // Sent before the worker knew of this term. It reports everything of importance again
                // after its welcome.
                Ok((of, _)) => {
                    tracing::warn!("dropped a message of worker {worker} of term {of} in term {term}");
                }
                Err(malformed) => break Some(Status::invalid_argument(malformed.to_string())),
            }
        };
        if let Some(breach) = breach {
            tracing::warn!("closing the session of worker {worker}: {}", breach.message());
            // The client may be gone and need no reason.
            let _ = broke.send(breach);
        }
        // Last, after all messages of the session. If the shell has ended, nothing needs it any more.
        let _ = inputs.send(Input::Closed(session, worker)).await;
    }
}

/// Whether a stream ended because of its content, and not because the connection failed.
fn is_breach(status: &Status) -> bool {
    // A failed connection comes with the transport's error as its source.
    std::error::Error::source(status).is_none() && matches!(status.code(), Code::OutOfRange | Code::Internal)
}

/// Operators' service. The authentication layer has already checked the caller.
struct Admin {
    inputs: mpsc::Sender<Input>,
}

impl Admin {
    async fn ask<T>(&self, input: impl FnOnce(oneshot::Sender<T>) -> AdminInput) -> Result<T, Status> {
        let (answer, answered) = oneshot::channel();
        self.inputs.send(Input::Admin(input(answer))).await.map_err(|_| ended())?;
        // Waits for the shell's loop, and longer while the journal cannot be written. An error
        // means that the shell has ended.
        answered.await.map_err(|_| ended())
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn get_status(
        &self,
        _request: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        Ok(Response::new(self.ask(AdminInput::Status).await?))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        let worker = WorkerId(request.into_inner().worker);
        let answer = self.ask(|answer| AdminInput::Drain(worker, answer)).await?;
        answer.map(|()| Response::new(DrainResponse {})).map_err(not_changed)
    }

    async fn scale(&self, request: Request<ScaleRequest>) -> Result<Response<ScaleResponse>, Status> {
        let workers = request.into_inner().workers;
        let answer = self.ask(|answer| AdminInput::Scale(workers, answer)).await?;
        answer.map(|()| Response::new(ScaleResponse {})).map_err(not_changed)
    }

    async fn stop(&self, _request: Request<StopRequest>) -> Result<Response<StopResponse>, Status> {
        self.ask(AdminInput::Stop).await?;
        Ok(Response::new(StopResponse {}))
    }
}
