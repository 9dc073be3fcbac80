//! Startup of a coordinator's dashboard.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use ganglion_proto::job::Job;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::server::TlsStream;

use super::{Guard, Served, Site, View, keep_token, plainly, serve};
use crate::api::address::{ListenError, Listener, loopback};
use crate::api::grpc::tls::Acceptor;
use crate::api::security::Security;
use crate::error::Failure;
use crate::journal::{Fact, Journal};
use crate::records::chronicle::Chronicle;
use crate::run_dir::RunDir;

/// Requested listener of the dashboard.
pub(crate) struct Wanted<'a> {
    /// Value of `--http`.
    pub address: Option<&'a str>,
    /// Whether other machines may reach it without encryption.
    pub is_insecure: bool,
}

/// Content of the dashboard.
pub(crate) struct Content<'a> {
    /// Views published by the shell.
    pub view: watch::Receiver<Option<Arc<View>>>,
    /// Index of the run's records.
    pub chronicle: Chronicle,
    /// The job.
    pub job: &'a Job,
    /// Unique name of the run.
    pub run: &'a str,
}

/// A coordinator's dashboard, if it has one.
pub(crate) struct Dashboard(Option<Served>);

impl Dashboard {
    /// URL of the page.
    pub(crate) fn url(&self) -> Option<String> {
        self.0.as_ref().map(Served::url)
    }

    /// Waits, within limits, until watching clients have seen how the run ended.
    pub(crate) async fn farewell(&self) {
        if let Some(served) = &self.0 {
            served.farewell().await;
        }
    }
}

/// Starts the dashboard where `--http` says. The port is journaled, and the next coordinator takes
/// it again.
pub(crate) async fn start(
    wanted: Wanted<'_>,
    security: &Security,
    journal: &mut Journal,
    run_dir: &RunDir,
    content: Content<'_>,
) -> Result<Dashboard, Failure> {
    // Before the port is taken: wrong files are the user's to mend.
    let acceptor = security.browsers()?;
    let (given, is_secure) = (wanted.address, acceptor.is_some());
    let last_port = journal.fact(Fact::HttpPort)?.and_then(|port| port.parse().ok());
    let wanted = address(given, last_port, wanted.is_insecure || is_secure).map_err(Failure::input)?;
    let Some(wanted) = wanted else { return Ok(Dashboard(None)) };
    let other = |error: io::Error| Failure::Other(format!("the dashboard cannot be served: {error}"));
    let listener = listen(wanted, given.is_some()).await.map_err(|error| {
        Failure::Input(format!(
            "--http {wanted}: {error}; choose another port, 0 for any that is free, or off"
        ))
    })?;
    let address = listener.local_addr().map_err(other)?;
    // A tab that is open on the page finds the next coordinator at the same port.
    journal.set_fact(Fact::HttpPort, &address.port().to_string())?;
    let guard = match security.guards() {
        // Where members must authenticate, a look must not be free either.
        true => Guard::with_token(&keep_token(run_dir)?, content.run, is_secure),
        false => Guard::open(address),
    };
    let site = Site {
        view: content.view,
        chronicle: content.chronicle,
        samples: run_dir.path("samples"),
        // As its text has it: without settings of other families.
        job: serde_json::to_value(content.job.to_table()).map_err(|error| other(error.into()))?,
        guard,
        asked: watch::Sender::new(None),
    };
    let served = match acceptor {
        None => serve(listener, site, plainly),
        Some(acceptor) => serve(listener, site, move |stream| secretly(stream, acceptor.clone())),
    };
    Ok(Dashboard(Some(served.map_err(other)?)))
}

/// Performs the TLS handshake of a connection.
async fn secretly(stream: TcpStream, acceptor: Arc<Acceptor>) -> io::Result<TlsStream<TcpStream>> {
    acceptor.accept(plainly(stream).await?).await
}

/// The listener of the dashboard.
static LISTENER: Listener = Listener {
    option: "--http",
    choice: "HOST:PORT, such as 127.0.0.1:7001, or off",
    advice: "on a network that you trust add --insecure, else give --tls-dir, or serve on 127.0.0.1 and use a tunnel",
};

/// Address to serve on: the one given, a loopback address with `last_port`, or `None` for `off`.
fn address(
    given: Option<&str>,
    last_port: Option<u16>,
    may_be_open: bool,
) -> Result<Option<SocketAddr>, ListenError> {
    match given {
        None => Ok(Some(loopback(last_port))),
        Some("off") => Ok(None),
        Some(text) => LISTENER.parse(text, may_be_open).map(Some),
    }
}

/// Opens the listener. If the port is only the one of the last start, another port of the same host
/// will do.
async fn listen(wanted: SocketAddr, is_given: bool) -> io::Result<TcpListener> {
    match TcpListener::bind(wanted).await {
        Err(error) if !is_given && wanted.port() != 0 => {
            tracing::warn!("port {} of the last dashboard: {error}; taking another", wanted.port());
            TcpListener::bind(SocketAddr::new(wanted.ip(), 0)).await
        }
        listening => listening,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_others_reach_needs_consent() {
        let loopback = |port| Ok(Some(([127, 0, 0, 1], port).into()));
        assert_eq!(address(None, None, false), loopback(0));
        assert_eq!(address(None, Some(7001), false), loopback(7001));
        assert_eq!(address(Some("127.0.0.1:80"), Some(7001), false), loopback(80));
        assert_eq!(address(Some("off"), Some(7001), false), Ok(None));
        assert_eq!(address(Some("0.0.0.0:7001"), None, true), Ok(Some(([0, 0, 0, 0], 7001).into())));
        assert!(address(Some("0.0.0.0:7001"), None, false).unwrap_err().to_string().contains("--insecure"));
        for wrong in ["nonsense", "", "on", "127.0.0.1", "127.0.0.1:70000"] {
            assert!(
                address(Some(wrong), None, true).unwrap_err().to_string().contains("HOST:PORT"),
                "{wrong}"
            );
        }
    }

    #[tokio::test]
    async fn a_port_of_the_last_time_that_is_taken_is_replaced_and_a_given_one_is_not() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        assert_ne!(listen(address, false).await.unwrap().local_addr().unwrap(), address);
        assert!(listen(address, true).await.is_err());
    }
}
