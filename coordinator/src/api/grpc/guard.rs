//! The authentication layer: it decides over each call, before all services, including future ones.
//!
//! 1. With TLS or a join token only health checks answer a client without the required credentials.
//! 2. Secrets are compared by their hashes, so the time of the comparison reveals nothing.
//! 3. An address that has sent too many wrong secrets is blocked for a while, except for its connections
//!    that have shown a right one: nobody can lock out members that train at the same address.
//!
//! | service | with TLS | with a join token | else |
//! |---|---|---|---|
//! | health | open | open | open |
//! | operators' status | certificate, run token | run token | open |
//! | operators' other calls | certificate, run token | run token | run token |
//! | all others | certificate | join token | open |
//!
//! The run token is the token in the run directory.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ganglion_proto::credentials::JoinToken;
use ganglion_proto::throttle::Throttle;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response, header::AUTHORIZATION};
use tower::{Layer, Service};

use super::connection::{Peer, Shown};

/// Wrong secrets per address in a burst, and the pause before each further one.
// A user who mistypes has room; a guess at a token has none at 30 a minute.
const WRONG: (u32, Duration) = (30, Duration::from_secs(2));
/// New sessions per address in a burst, and the pause before each further one.
// As many as may be open at once: a whole cluster behind one address may join together.
const SESSIONS: (u32, Duration) = (4096, Duration::from_millis(200));

/// Access rules of the gRPC services.
#[derive(Debug)]
pub struct Guard {
    operator: blake3::Hash,
    join: Option<blake3::Hash>,
    /// Whether clients must authenticate.
    guarded: bool,
    wrong: Throttle,
    sessions: Throttle,
}

/// Credentials required for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// None.
    Nothing,
    /// Those of a member: a certificate or the join token, as configured.
    Membership,
    /// The token of the run directory.
    Operator,
}

impl Guard {
    /// Creates the rules: `operator` is the operators' token, `join` the members', if one is required.
    pub fn new(operator: &str, join: Option<&JoinToken>, tls: bool) -> Guard {
        let hash = |header: String| blake3::hash(header.as_bytes());
        Guard {
            operator: hash(format!("Bearer {operator}")),
            join: join.map(|token| hash(token.header())),
            guarded: tls || join.is_some(),
            wrong: Throttle::new(WRONG.0, WRONG.1),
            sessions: Throttle::new(SESSIONS.0, SESSIONS.1),
        }
    }

    fn needs(&self, path: &str) -> Needs {
        match path {
            _ if path.starts_with("/grpc.health.v1.Health/") => Needs::Nothing,
            "/ganglion.v1.AdminService/GetStatus" if !self.guarded => Needs::Membership,
            _ if path.starts_with("/ganglion.v1.AdminService/") => Needs::Operator,
            // Services that are added later are closed until somebody opens them here.
            _ => Needs::Membership,
        }
    }

    fn check<B>(&self, request: &Request<B>) -> Result<(), Status> {
        let path = request.uri().path();
        let expected = match self.needs(path) {
            Needs::Nothing => return Ok(()),
            Needs::Membership => self.join,
            Needs::Operator => Some(self.operator),
        };
        // Only a simulated connection has no peer.
        let peer = request.extensions().get::<Peer>();
        peer.map_or(Ok(()), |peer| shown_enough(peer.shown))?;
        if let Some(expected) = expected {
            self.check_secret(request, expected, peer)?;
        }
        let Some(peer) = peer else { return Ok(()) };
        // Only after the secret: the connection now keeps its place, and wrong tokens of its neighbours
        // do not block it (3).
        peer.admit();
        if path == "/ganglion.v1.SessionService/Session" {
            // Counted for authorised clients alone: strangers must not use up what members of their
            // address need.
            if !self.sessions.allows(peer.address()) {
                return Err(Status::resource_exhausted("too many new sessions of this address; try later"));
            }
            self.sessions.note(peer.address());
        }
        Ok(())
    }

    fn check_secret<B>(
        &self,
        request: &Request<B>,
        expected: blake3::Hash,
        peer: Option<&Peer>,
    ) -> Result<(), Status> {
        let stranger = peer.filter(|peer| !peer.is_admitted());
        if stranger.is_some_and(|peer| !self.wrong.allows(peer.address())) {
            return Err(Status::resource_exhausted("too many wrong tokens of this address; try later"));
        }
        let given = request.headers().get(AUTHORIZATION).map(|given| given.as_bytes());
        // The hash of a missing header is nobody's secret either, so it needs no case of its own.
        if blake3::hash(given.unwrap_or_default()) == expected {
            return Ok(());
        }
        if let Some(peer) = peer {
            self.wrong.note(peer.address());
        }
        let what = if expected == self.operator {
            "an operator without the run directory's token"
        } else {
            "a client without the join token"
        };
        let from = peer.map_or("an unknown address".to_string(), |peer| peer.address().to_string());
        tracing::warn!("refused {what}, from {from}");
        Err(Status::unauthenticated(match (expected == self.operator, given) {
            (true, _) => "the token of the run directory is needed: see admin.json in it",
            (false, None) => {
                "this coordinator asks for a join token; give --join-token-file FILE or GANGLION_JOIN_TOKEN"
            }
            (false, Some(_)) => {
                "the join token is not this coordinator's; give the one that it was started with"
            }
        }))
    }
}

fn shown_enough(shown: Shown) -> Result<(), Status> {
    match shown {
        Shown::NothingAsked | Shown::Certificate => Ok(()),
        Shown::NoTls => Err(Status::unauthenticated(
            "this coordinator speaks TLS only; write https:// and give --tls-dir DIR",
        )),
        Shown::NoCertificate => Err(Status::unauthenticated(
            "this coordinator asks for a certificate; give --tls-dir DIR with ca.crt, tls.crt and tls.key",
        )),
    }
}

/// Tower layer that puts the rules before services.
#[derive(Clone)]
pub(crate) struct GuardLayer(pub Arc<Guard>);

impl<S> Layer<S> for GuardLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { guard: self.0.clone(), inner }
    }
}

/// Services behind the authentication layer.
#[derive(Clone)]
pub(crate) struct Guarded<S> {
    guard: Arc<Guard>,
    inner: S,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = tonic::codegen::BoxFuture<Response<Body>, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.guard.check(&request) {
            Ok(()) => Box::pin(self.inner.call(request)),
            // The inner service never sees the call, so no handler can forget to ask.
            Err(status) => Box::pin(std::future::ready(Ok(status.into_http()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATHS: [&str; 5] = [
        "/ganglion.v1.SessionService/Session",
        "/ganglion.v1.StoreService/Get",
        "/ganglion.v1.AdminService/GetStatus",
        "/ganglion.v1.AdminService/Drain",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ];

    fn answers(guard: &Guard, token: Option<&str>) -> [bool; 5] {
        PATHS.map(|path| {
            let mut request = Request::builder().uri(path);
            if let Some(token) = token {
                request = request.header(AUTHORIZATION, token);
            }
            guard.check(&request.body(()).unwrap()).is_ok()
        })
    }

    #[test]
    fn each_secret_opens_what_it_is_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "0123456789abcdef\n").unwrap();
        let join = JoinToken::read(Some(&file)).unwrap();
        let (open, tokens) =
            (Guard::new("operator", None, false), Guard::new("operator", join.as_ref(), false));
        assert_eq!(answers(&open, None), [true, true, true, false, true]);
        assert_eq!(answers(&open, Some("Bearer operator")), [true; 5]);
        assert_eq!(answers(&tokens, None), [false; 5]);
        assert_eq!(answers(&tokens, Some("Bearer wrong")), [false; 5]);
        assert_eq!(answers(&tokens, Some("Bearer 0123456789abcdef")), [true, true, false, false, true]);
        assert_eq!(answers(&tokens, Some("Bearer operator")), [false, false, true, true, false]);
        let tls = Guard::new("operator", None, true);
        assert_eq!(answers(&tls, None), [true, true, false, false, true], "a certificate was shown before");
        let health = Request::builder().uri("/grpc.health.v1.Health/Check").body(()).unwrap();
        assert!(tokens.check(&health).is_ok());
        for near in ["/grpc.health.v1.Healthy/Check", "//grpc.health.v1.Health/Check", "/", "*"] {
            let request = Request::builder().uri(near).body(()).unwrap();
            assert!(tokens.check(&request).is_err(), "{near}");
        }
    }
}
