//! Clients that speak the wire contract without being workers, so that they can also break it.

use ganglion_membership::{Generation, Term, WorkerId};
use ganglion_proto::message::{FromWorker, Hello, Resume, ToWorker, Welcome};
use ganglion_proto::wire::session_service_client::SessionServiceClient;
use ganglion_proto::wire::{SessionRequest, SessionResponse};
use ganglion_proto::{MESSAGE_LIMIT, PROTOCOL};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

/// What a worker says first that comes on its own.
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

/// The same of one that claims to have been there before.
pub fn resuming(run: &str, worker: WorkerId, term: Term, generation: Generation) -> Hello {
    let resume = Resume { run: run.to_string(), worker, term, generation, rest: None };
    Hello { resume: Some(resume), ..hello() }
}

/// A connection to the coordinator at `url`.
pub async fn connect(url: &str) -> Channel {
    let endpoint = Endpoint::from_shared(url.to_string()).expect("an address");
    endpoint.tcp_nodelay(true).connect().await.expect("a coordinator")
}

/// A session, once it was welcome.
pub struct Stranger {
    /// What it was told.
    pub welcome: Welcome,
    requests: UnboundedSender<SessionRequest>,
    responses: Streaming<SessionResponse>,
}

impl Stranger {
    /// Says hello; or returns why that was refused.
    pub async fn join(channel: Channel, hello: Hello) -> Result<Stranger, Status> {
        Stranger::begin(channel, FromWorker::Hello(hello).to_wire(Term(0))).await
    }

    /// Begins a session with any message, or returns why that was refused.
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

    /// Says something in the term of its welcome.
    pub fn say(&self, message: FromWorker) {
        self.say_in(self.welcome.term, message);
    }

    /// Says something in a term.
    pub fn say_in(&self, term: Term, message: FromWorker) {
        self.say_raw(message.to_wire(term));
    }

    /// Says anything.
    pub fn say_raw(&self, message: SessionRequest) {
        // Nobody listens to it any more if the session has ended, and it finds that out when it listens.
        let _ = self.requests.send(message);
    }

    /// What it hears next; `None` once the session has ended.
    pub async fn hear(&mut self) -> Result<Option<ToWorker>, Status> {
        let heard = self.responses.message().await?;
        Ok(heard.map(|response| ToWorker::from_wire(response).expect("a coordinator keeps the contract").1))
    }

    /// What it hears next, as it is on the wire.
    pub async fn hear_raw(&mut self) -> Result<Option<SessionResponse>, Status> {
        self.responses.message().await
    }

    /// How its session ends, whatever it hears before.
    pub async fn end(mut self) -> Result<Option<ToWorker>, Status> {
        let mut last = None;
        while let Some(heard) = self.hear().await? {
            last = Some(heard);
        }
        Ok(last)
    }
}
