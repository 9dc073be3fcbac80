//! Clients that speak the wire contract without being workers, so that they can also violate it.

use ganglion_membership::{Generation, Term, WorkerId};
use ganglion_proto::message::{FromWorker, Hello, Resume, ToWorker, Welcome};
use ganglion_proto::wire::session_service_client::SessionServiceClient;
use ganglion_proto::wire::{SessionRequest, SessionResponse};
use ganglion_proto::{MESSAGE_LIMIT, PROTOCOL};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

/// First message of a worker that joins on its own.
pub fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL,
        spawn_token: None,
        host: "elsewhere".to_string(),
        pid: std::process::id(),
        address: "127.0.0.1:9".to_string(),
        resume: None,
        device: "cpu".to_string(),
        attempt: 1,
    }
}

/// First message of a worker that claims an earlier session.
pub fn resuming(run: &str, worker: WorkerId, term: Term, generation: Generation) -> Hello {
    let resume = Resume { run: run.to_string(), worker, term, generation, rest: None };
    Hello { resume: Some(resume), ..hello() }
}

/// Connects to the coordinator at `url`.
pub async fn connect(url: &str) -> Channel {
    let endpoint = Endpoint::from_shared(url.to_string()).expect("an address");
    endpoint.tcp_nodelay(true).connect().await.expect("a coordinator")
}

/// Session of a client that was welcomed.
pub struct Stranger {
    /// Welcome message of the coordinator.
    pub welcome: Welcome,
    requests: UnboundedSender<SessionRequest>,
    responses: Streaming<SessionResponse>,
}

impl Stranger {
    /// Joins with a hello; returns the status if that was refused.
    pub async fn join(channel: Channel, hello: Hello) -> Result<Stranger, Status> {
        Stranger::begin(channel, FromWorker::Hello(hello).to_wire(Term(0))).await
    }

    /// Begins a session with any message; returns the status if that was refused.
    pub async fn begin(channel: Channel, first: SessionRequest) -> Result<Stranger, Status> {
        let (requests, stream) = unbounded_channel();
        requests.send(first).expect("the receiver is here");
        let mut client = SessionServiceClient::new(channel)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(usize::MAX);
        let mut responses = client.session(UnboundedReceiverStream::new(stream)).await?.into_inner();
        let first = responses.message().await?.ok_or_else(|| Status::aborted("closed"))?;
        match ToWorker::from_wire(first) {
            Ok((_, ToWorker::Welcome(welcome))) => Ok(Stranger { welcome: *welcome, requests, responses }),
            other => panic!("{other:?} instead of a welcome"),
        }
    }

    /// Sends a message in the term of the welcome.
    pub fn say(&self, message: FromWorker) {
        self.say_in(self.welcome.term, message);
    }

    /// Sends a message in a given term.
    pub fn say_in(&self, term: Term, message: FromWorker) {
        self.say_raw(message.to_wire(term));
    }

    /// Sends any message.
    pub fn say_raw(&self, message: SessionRequest) {
        // After the session's end the message is lost; the client learns of the end when it
        // receives.
        let _ = self.requests.send(message);
    }

    /// Receives the next message; `None` once the session has ended.
    pub async fn hear(&mut self) -> Result<Option<ToWorker>, Status> {
        let heard = self.responses.message().await?;
        Ok(heard.map(|response| ToWorker::from_wire(response).expect("a coordinator keeps the contract").1))
    }

    /// Receives the next message in its wire form.
    pub async fn hear_raw(&mut self) -> Result<Option<SessionResponse>, Status> {
        self.responses.message().await
    }

    /// Receives until the session ends; returns its last message or its error.
    pub async fn end(mut self) -> Result<Option<ToWorker>, Status> {
        let mut last = None;
        while let Some(heard) = self.hear().await? {
            last = Some(heard);
        }
        Ok(last)
    }
}
