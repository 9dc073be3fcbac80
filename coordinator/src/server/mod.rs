//! The gRPC services. Each does no more than check what comes in and pass it on to the shell.
//!
//! 1. A client that breaks the contract loses its session and disturbs nothing else.
//! 2. A client that does not read what it is sent loses its session when its queue is full.

mod store;

use std::pin::Pin;
use std::time::Duration;

use ganglion_membership::{Term, WorkerId};
use ganglion_proto::message::{FromWorker, Hello, ToWorker};
use ganglion_proto::wire::admin_service_server::{AdminService, AdminServiceServer};
use ganglion_proto::wire::session_service_server::{SessionService, SessionServiceServer};
use ganglion_proto::wire::store_service_server::StoreServiceServer;
use ganglion_proto::wire::{GetStatusRequest, GetStatusResponse, SessionRequest, SessionResponse};
use ganglion_proto::{MESSAGE_LIMIT, PROTOCOL};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

pub use store::Store;

/// Messages to a worker that may wait until it reads them.
const OUTBOX: usize = 256;
/// How long a new session may take to say hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// Messages to one worker.
pub type Outbox = mpsc::Sender<ToWorker>;

/// What comes in for the shell.
pub enum Input {
    /// A worker asks to take part. The answer is its number.
    Hello(Hello, Outbox, oneshot::Sender<WorkerId>),
    /// A worker's message.
    Message(WorkerId, FromWorker),
    /// A worker's session ended.
    Closed(WorkerId),
    /// Somebody asks how things are.
    Status(oneshot::Sender<GetStatusResponse>),
}

/// Serves until `shutdown` changes.
pub async fn serve(
    listener: TcpListener,
    term: Term,
    inputs: mpsc::Sender<Input>,
    store: Store,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let sessions = Sessions { term, inputs: inputs.clone() };
    let sessions = SessionServiceServer::new(sessions).max_decoding_message_size(MESSAGE_LIMIT);
    let incoming = TcpListenerStream::new(listener)
        .map(|stream| stream.and_then(|stream| stream.set_nodelay(true).map(|()| stream)));
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .add_service(sessions)
        .add_service(StoreServiceServer::new(store))
        .add_service(AdminServiceServer::new(Admin { inputs }))
        .serve_with_incoming_shutdown(incoming, async move {
            let _ = shutdown.changed().await;
        })
        .await
}

struct Sessions {
    term: Term,
    inputs: mpsc::Sender<Input>,
}

type Responses = Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>;

#[tonic::async_trait]
impl SessionService for Sessions {
    type SessionStream = Responses;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let mut requests = request.into_inner();
        let hello = match tokio::time::timeout(HELLO_LIMIT, requests.message()).await {
            Ok(Ok(Some(request))) => hello_of(request)?,
            Ok(Ok(None)) => return Err(Status::invalid_argument("a session starts with a hello")),
            Ok(Err(status)) => return Err(status),
            Err(_) => return Err(Status::deadline_exceeded("no hello came in time")),
        };
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let (admitted, number) = oneshot::channel();
        let ended = || Status::unavailable("the coordinator is stopping");
        self.inputs.send(Input::Hello(hello, outbox, admitted)).await.map_err(|_| ended())?;
        let worker = number.await.map_err(|_| ended())?;
        tokio::spawn(read(self.term, worker, requests, self.inputs.clone()));
        let term = self.term;
        let responses = ReceiverStream::new(messages).map(move |message| Ok(message.to_wire(term)));
        Ok(Response::new(Box::pin(responses)))
    }
}

fn hello_of(request: SessionRequest) -> Result<Hello, Status> {
    match FromWorker::from_wire(request) {
        Ok((_, FromWorker::Hello(hello))) if hello.protocol == PROTOCOL => Ok(hello),
        Ok((_, FromWorker::Hello(hello))) => Err(Status::failed_precondition(format!(
            "this worker speaks version {} of the contract and the coordinator version {PROTOCOL}; use one build of both",
            hello.protocol
        ))),
        Ok(_) => Err(Status::invalid_argument("a session starts with a hello")),
        Err(malformed) => Err(Status::invalid_argument(malformed.to_string())),
    }
}

/// Passes a worker's messages on until its stream ends or breaks the contract.
async fn read(
    term: Term,
    worker: WorkerId,
    mut requests: Streaming<SessionRequest>,
    inputs: mpsc::Sender<Input>,
) {
    while let Ok(Some(request)) = requests.message().await {
        match FromWorker::from_wire(request) {
            Ok((of, message)) if of == term => {
                if inputs.send(Input::Message(worker, message)).await.is_err() {
                    return;
                }
            }
            Ok((of, _)) => tracing::warn!("dropped a message of worker {worker} of term {of} in term {term}"),
            Err(malformed) => {
                tracing::warn!("closing the session of worker {worker}: {malformed}");
                break;
            }
        }
    }
    let _ = inputs.send(Input::Closed(worker)).await;
}

struct Admin {
    inputs: mpsc::Sender<Input>,
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn get_status(
        &self,
        _request: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        let (answer, status) = oneshot::channel();
        let ended = || Status::unavailable("the coordinator is stopping");
        self.inputs.send(Input::Status(answer)).await.map_err(|_| ended())?;
        Ok(Response::new(status.await.map_err(|_| ended())?))
    }
}
