//! Client connections to a coordinator, with or without TLS.
//!
//! 1. Errors that no retry can mend are told apart from those that may pass.
//! 2. A connection counts as established only once the coordinator has accepted the client's
//!    certificate. In TLS 1.3 a client's handshake is over before that. But an HTTP/2 server sends
//!    first, and it sends only after accepting the certificate.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tokio::io::AsyncBufReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{AlertDescription, CertificateError, Error as TlsError};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::credentials::{CA_FILE, CERTIFICATE_FILE, CredentialError, JoinToken, TlsFiles};

/// Credentials of a client.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// TLS files of the client; `None` connects without TLS.
    pub tls: Option<TlsFiles>,
    /// Name in the coordinator's certificate, if it is not the one in its address.
    pub name: Option<String>,
    /// File with the join token; with `None` the environment may hold the token.
    pub token_file: Option<PathBuf>,
}

/// Reason why no connection was established.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DialError {
    /// Transient: a later attempt may succeed.
    #[error("{0}")]
    Later(String),
    /// The user's credentials or address are wrong.
    #[error("{0}")]
    Wrong(String),
}

impl From<CredentialError> for DialError {
    fn from(error: CredentialError) -> Self {
        DialError::Wrong(error.to_string())
    }
}

impl Credentials {
    /// Checks that an address suits these credentials and that they can be used; returns the
    /// endpoint to connect to.
    pub fn endpoint(&self, uri: &Uri) -> Result<Endpoint, DialError> {
        // Read only to be checked: a token that cannot be used shows before the first attempt.
        JoinToken::read(self.token_file.as_deref())?;
        let secure = uri.scheme_str() == Some("https");
        match &self.tls {
            None if secure => Err(DialError::Wrong(
                "https:// needs a certificate; give --tls-dir DIR, or write http:// if the coordinator runs without TLS"
                    .to_string(),
            )),
            Some(_) if !secure => Err(DialError::Wrong(
                "with --tls-dir an address begins with https://; leave --tls-dir out if the coordinator runs without TLS"
                    .to_string(),
            )),
            None => Ok(Endpoint::from(uri.clone())),
            Some(files) => {
                // Likewise for the certificates; each connection reads them anew.
                files.read()?;
                // The connection that is handed over is already encrypted; tonic must not add TLS.
                let plain = uri.to_string().replacen("https://", "http://", 1);
                let endpoint = Endpoint::from_shared(plain).map_err(|error| DialError::Wrong(error.to_string()))?;
                Ok(endpoint.origin(uri.clone()))
            }
        }
    }

    /// Returns the join token, if there is one.
    pub fn token(&self) -> Result<Option<JoinToken>, DialError> {
        Ok(JoinToken::read(self.token_file.as_deref())?)
    }

    /// Connects to an endpoint that [`Credentials::endpoint`] returned.
    pub async fn connect(self, endpoint: Endpoint) -> Result<Channel, DialError> {
        let connected = match self.tls {
            None => endpoint.connect().await,
            Some(files) => {
                let dial = Arc::new(Dial { files, name: self.name });
                let open = move |uri: Uri| {
                    let dial = dial.clone();
                    async move { dial.open(&uri).await.map(TokioIo::new) }
                };
                endpoint.connect_with_connector(tower::service_fn(open)).await
            }
        };
        connected.map_err(|error| cause(&error))
    }
}

/// Returns the cause that this module gave, else the system's.
fn cause(error: &tonic::transport::Error) -> DialError {
    // tonic wraps what the connector returned: only an inner error tells anything.
    let mut deepest: &dyn std::error::Error = error;
    while let Some(source) = deepest.source() {
        if let Some(own) = source.downcast_ref::<DialError>() {
            return own.clone();
        }
        deepest = source;
    }
    DialError::Later(deepest.to_string())
}

struct Dial {
    files: TlsFiles,
    name: Option<String>,
}

impl Dial {
    async fn open(&self, uri: &Uri) -> Result<TlsStream<TcpStream>, DialError> {
        let later = |error: io::Error| DialError::Later(error.to_string());
        // Brackets of an IPv6 address, which are part of the URI and not of the name.
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        // Waits as long as the system tries. The caller bounds a whole attempt (a worker:
        // `Limits::attempt`).
        let stream = TcpStream::connect((host, uri.port_u16().unwrap_or_default())).await.map_err(later)?;
        // Heartbeats and headers are small, and would wait for the acknowledgement of what was sent
        // before.
        stream.set_nodelay(true).map_err(later)?;
        let expected = self.name.as_deref().unwrap_or(host);
        let name = ServerName::try_from(expected.to_string())
            .map_err(|_| DialError::Wrong(format!("{expected} is no name that a certificate can be for")))?;
        // tonic speaks HTTP/2 only, and a server that does not is found out here.
        let config = self.files.read()?.client(b"h2")?;
        let connector = TlsConnector::from(Arc::new(config));
        let explain = |error: io::Error| self.explain(expected, &error);
        // Bounded by the attempt, like the connection itself.
        let mut stream = connector.connect(name, stream).await.map_err(explain)?;
        // Invariant 2: the server's first bytes mean that it accepted the certificate. A stream
        // that ends instead means that it did not.
        if stream.fill_buf().await.map_err(explain)?.is_empty() {
            return Err(self.explain(expected, &io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(stream)
    }

    /// Explains to the user why a handshake failed.
    fn explain(&self, host: &str, error: &io::Error) -> DialError {
        let ca = self.files.path(CA_FILE).display().to_string();
        let own = self.files.path(CERTIFICATE_FILE).display().to_string();
        let tls = error.get_ref().and_then(|error| error.downcast_ref::<TlsError>());
        DialError::Wrong(match tls {
            Some(TlsError::InvalidCertificate(wrong)) => untrusted(wrong, host, &ca),
            Some(TlsError::AlertReceived(alert)) => match refusal(*alert) {
                Some(why) => format!("the coordinator does not accept {own}: {why}"),
                None => {
                    // An alert that is not about certificates may be the end of a coordinator that
                    // restarts.
                    return DialError::Later(format!("the coordinator ended the TLS handshake: {alert:?}"));
                }
            },
            Some(TlsError::InvalidMessage(_)) => {
                "what answers there does not speak TLS; write http:// and leave --tls-dir \
                 out, or start the coordinator with --tls-dir"
                    .to_string()
            }
            // Not known to be a mistake of the user's, so it is tried again.
            Some(other) => return DialError::Later(other.to_string()),
            None => return DialError::Later(format!("the connection ended in the TLS handshake: {error}")),
        })
    }
}

/// Explains why the coordinator's certificate is not accepted.
fn untrusted(wrong: &CertificateError, host: &str, ca: &str) -> String {
    match wrong {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => format!(
            "no authority in {ca} has signed the coordinator's certificate; copy ca.crt from where that was made"
        ),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "the coordinator's certificate has expired, or this machine's clock is wrong; renew it there"
                .to_string()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "the coordinator's certificate is not valid yet; wait, or set this machine's clock".to_string()
        }
        CertificateError::NotValidForName => not_for(host, ""),
        CertificateError::NotValidForNameContext { presented, .. } => {
            not_for(host, &format!(", but for {}", presented.join(", ")))
        }
        other => format!("the coordinator's certificate cannot be used: {other}"),
    }
}

fn not_for(host: &str, but: &str) -> String {
    format!(
        "the coordinator's certificate is not for {host}{but}; connect by a name that it is for, name it with --tls-name, or \
         make one with `coordinator certs init --host {host}`"
    )
}

/// Explains why the coordinator refuses the client's certificate; `None` if its alert means
/// something else.
fn refusal(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "no authority that it trusts has signed it; use one made with the coordinator's"
        }
        AlertDescription::CertificateExpired => {
            "it has expired, or one of the two machines' clocks is wrong; renew it"
        }
        AlertDescription::CertificateRequired => "it wants to see one",
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied => {
            "make one with the usages \"server auth\" and \"client auth\", as `coordinator certs init` does"
        }
        // Says nothing about this worker's certificate.
        _ => return None,
    })
}
