//! Answers of a coordinator, by the client's credentials.

use std::io;
use std::sync::Arc;

use ganglion_membership::Term;
use ganglion_proto::credentials::{TlsFiles, provider};
use ganglion_proto::dial::Credentials;
use ganglion_proto::message::FromWorker;
use ganglion_proto::wire::admin_service_client::AdminServiceClient;
use ganglion_proto::wire::session_service_client::SessionServiceClient;
use ganglion_proto::wire::store_service_client::StoreServiceClient;
use ganglion_proto::wire::{DrainRequest, GetRequest, GetStatusRequest, Key};
use ganglion_tests::wire::hello;
use ganglion_tests::{Run, SMALL_MLP, eventually};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::secrets::{Secrets, start, url};

fn with<T>(message: T, token: Option<&str>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    request
}

/// Answer of each service.
async fn answers(channel: &Channel, token: Option<&str>) -> Vec<(&'static str, Result<(), Status>)> {
    let hello = FromWorker::Hello(hello()).to_wire(Term(0));
    let session = SessionServiceClient::new(channel.clone())
        .session(with(tokio_stream::once(hello), token))
        .await
        .map(drop);
    let key = Some(Key { term: 1, generation: 0, name: "k".to_string() });
    let get = GetRequest { key, timeout_ms: 1 };
    let store = StoreServiceClient::new(channel.clone()).get(with(get, token)).await.map(drop);
    let mut admin = AdminServiceClient::new(channel.clone());
    let status = admin.get_status(with(GetStatusRequest {}, token)).await.map(drop);
    let drain = admin.drain(with(DrainRequest { worker: 9 }, token)).await.map(drop);
    let reflection = reflect(channel, token).await;
    vec![
        ("session", session),
        ("store", store),
        ("status", status),
        ("drain", drain),
        ("reflection", reflection),
    ]
}

async fn reflect(channel: &Channel, token: Option<&str>) -> Result<(), Status> {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    let list = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel.clone());
    let mut listed = client.server_reflection_info(with(tokio_stream::once(list), token)).await?.into_inner();
    let text = format!("{:?}", listed.message().await?);
    assert!(text.contains("ganglion.v1.SessionService"), "{text}");
    Ok(())
}

async fn assert_healthy(channel: &Channel) {
    let asked = HealthCheckRequest { service: String::new() };
    let answer = HealthClient::new(channel.clone()).check(asked).await.unwrap().into_inner();
    assert_eq!(answer.status, 1, "serving");
}

/// Connects with TLS and without a certificate.
async fn without_certificate(url: &str, trusted: &TlsFiles) -> Channel {
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let roots = trusted.read().unwrap().roots;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let open = move |uri: Uri| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect((uri.host().unwrap(), uri.port_u16().unwrap())).await?;
            let name = ServerName::try_from("localhost").unwrap();
            Ok::<_, io::Error>(TokioIo::new(connector.connect(name, stream).await?))
        }
    };
    let plain = url.replace("https://", "http://");
    let endpoint = Endpoint::from_shared(plain).unwrap();
    endpoint.connect_with_connector(tower::service_fn(open)).await.unwrap()
}

fn assert_all_refused(answers: &[(&'static str, Result<(), Status>)], reason: &str) {
    for (service, answer) in answers {
        let status = answer.as_ref().expect_err(service);
        assert_eq!(status.code(), Code::Unauthenticated, "{service}: {status}");
        let operators = "the token of the run directory is needed";
        assert!(
            status.message().contains(reason) || status.message().contains(operators),
            "{service}: {status}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_but_health_answers_a_stranger() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=1000000"]]);
    let (ours, theirs) = (Secrets::new(&run, "ours"), Secrets::new(&run, "theirs"));
    let coordinator = start(&run, &ours, 1);
    let url = url(&run);
    run.wait_for_step(1);
    let files = TlsFiles::new(ours.path("worker").as_ref());
    let plain = Endpoint::from_shared(url.replace("https://", "http://")).unwrap().connect().await.unwrap();
    let anonymous = without_certificate(&url, &files).await;
    let token = ours.token();
    for (channel, reason) in [(&plain, "speaks TLS only"), (&anonymous, "asks for a certificate")] {
        for token in [None, Some(token.as_str())] {
            assert_all_refused(&answers(channel, token).await, reason);
        }
        assert_healthy(channel).await;
    }
    let connect = |credentials: Credentials| {
        let endpoint = credentials.endpoint(&url.parse().unwrap());
        async move { credentials.connect(endpoint?).await }
    };
    let member = connect(ours.credentials()).await.unwrap();
    assert_all_refused(&answers(&member, None).await, "asks for a join token");
    assert_all_refused(&answers(&member, Some(&theirs.token())).await, "not this coordinator's");
    assert_healthy(&member).await;
    // The same calls with the token are answered, so that the ones above could have been.
    let of = |answers: Vec<(&'static str, Result<(), Status>)>, service: &str| {
        answers.into_iter().find(|(name, _)| *name == service).unwrap().1
    };
    let admitted = answers(&member, Some(&token)).await;
    assert!(of(admitted.clone(), "session").is_ok(), "{admitted:?}");
    assert!(of(admitted.clone(), "reflection").is_ok(), "{admitted:?}");
    assert_eq!(of(admitted.clone(), "store").unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(of(admitted, "drain").unwrap_err().code(), Code::Unauthenticated);
    let stranger = connect(theirs.credentials()).await.unwrap_err().to_string();
    assert!(stranger.contains("no authority"), "{stranger}");
    eventually("a line", || coordinator.output().contains("without the join token").then_some(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_with_too_many_wrong_tokens_is_not_heard_but_for_those_with_a_right_one() {
    let run = Run::new(&[SMALL_MLP, &["job.steps=1000000"]]);
    let secrets = Secrets::new(&run, "certs");
    let _coordinator = start(&run, &secrets, 0);
    let url = url(&run);
    let credentials = secrets.credentials();
    let endpoint = credentials.endpoint(&url.parse().unwrap()).unwrap();
    let token = secrets.token();
    let member = credentials.clone().connect(endpoint.clone()).await.unwrap();
    // An admitted client learns that there is no such generation.
    let get = |channel: &Channel, token: &str| {
        let key = Some(Key { term: 1, generation: 9, name: "k".to_string() });
        let request = with(GetRequest { key, timeout_ms: 1 }, Some(token));
        let mut store = StoreServiceClient::new(channel.clone());
        async move { store.get(request).await.unwrap_err().code() }
    };
    assert_eq!(get(&member, &token).await, Code::FailedPrecondition);
    let guessing = credentials.connect(endpoint).await.unwrap();
    let mut guesses = 0;
    while get(&guessing, &format!("a guess, the {guesses}th")).await == Code::Unauthenticated {
        guesses += 1;
        assert!(guesses < 1000, "nobody stops it");
    }
    assert!(guesses >= 10, "{guesses}");
    assert_eq!(get(&guessing, &token).await, Code::ResourceExhausted);
    assert_eq!(get(&member, &token).await, Code::FailedPrecondition);
}
