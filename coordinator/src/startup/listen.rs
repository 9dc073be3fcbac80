//! Listeners of a coordinator, and how others learn of them.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use ganglion_membership::{Limits, Term};
use ganglion_proto::record::{FORMAT, RunEvent};
use tokio::sync::{mpsc, watch};

use crate::api::grpc::tls::Acceptor;
use crate::api::http;
use crate::api::security::Security;
use crate::commands::cli::Cli;
use crate::error::Failure;
use crate::journal::{Fact, Journal};
use crate::records::view::Publisher;
use crate::run_dir::RunDir;
use crate::run_dir::access::{ACCESS_FILE, Access};
use crate::startup::host::Host;
use crate::startup::take_over::TakenOver;
use crate::workers::new_token;

/// Open listeners of a coordinator.
pub(super) struct Doors<C> {
    /// Accepted gRPC connections.
    pub incoming: mpsc::Receiver<C>,
    /// Address at which local workers connect.
    pub url: String,
    /// Address and token for operators.
    pub access: Access,
    /// The dashboard.
    pub dashboard: http::Dashboard,
    /// Receives the views that the dashboard shows.
    pub publisher: Publisher,
    /// Address for workers on other machines, with the options that they need.
    pub invitation: String,
}

/// Opens the listeners, and leaves the access record for operators in the run directory.
pub(super) async fn open<H: Host>(
    cli: &Cli,
    host: &H,
    security: &Security,
    run_dir: &RunDir,
    taken: &mut TakenOver,
) -> Result<Doors<H::Connection>, Failure> {
    let (incoming, address) = listen(cli, host, &mut taken.journal, security.acceptor.clone()).await?;
    // Workers on other machines cannot connect to 0.0.0.0.
    let address = SocketAddr::new(reachable(address.ip()), address.port());
    let url = format!("{}://{address}", security.scheme());
    // A new token for each start: one that leaked with an earlier one is worth nothing.
    let access = security.access(address, new_token().map_err(Failure::other)?)?;
    // Empty until the shell's first view: `/readyz` says that the coordinator is starting.
    let (publisher, view) = watch::channel(None);
    let (chronicle, job, run) = (taken.records.chronicle.clone(), &taken.job, &taken.run);
    let content = http::Content { view, chronicle, job, run };
    let wanted = http::Wanted { address: cli.http.as_deref(), is_insecure: cli.insecure };
    let dashboard = http::start(wanted, security, &mut taken.journal, run_dir, content).await?;
    // Last: an operator who finds the file finds a listener behind the address.
    leave_access(run_dir, &access)?;
    let invitation = format!("{url}{}", security.invitation(access.tls_name.as_deref()));
    Ok(Doors { incoming, url, access, dashboard, publisher, invitation })
}

impl<C> Doors<C> {
    /// Prints and records the addresses and settings of this coordinator. `reason` explains the number of
    /// local workers.
    pub(super) fn announce(&self, term: Term, reason: Option<&str>, taken: &mut TakenOver) {
        let (records, job) = (&mut taken.records, &taken.job.job);
        let (url, dashboard) = (&self.url, self.dashboard.url());
        records.event(&RunEvent::CoordinatorStarted {
            address: url.clone(),
            dashboard: dashboard.clone(),
            format: Some(FORMAT),
            pid: std::process::id(),
            term: term.0,
        });
        // For people who set the deadline: everybody else reads what it means in docs/membership.md.
        tracing::debug!("{}", Limits::derive(Duration::from_secs_f64(job.failure_deadline)));
        let (name, folder, invitation) = (&job.name, records.folder().display(), &self.invitation);
        let join =
            format!("run {name} in {folder}; other workers join with: worker --coordinator {invitation}");
        let dashboard = dashboard.map(|dashboard| format!("dashboard {dashboard}"));
        let lines = [Some(join), dashboard, reason.map(str::to_string)];
        lines.into_iter().flatten().for_each(|line: String| records.message(&line));
    }
}

/// Writes the access record for operators.
fn leave_access(run_dir: &RunDir, access: &Access) -> Result<(), Failure> {
    let text = access.render().map_err(Failure::other)?;
    Ok(run_dir.write_secret(ACCESS_FILE, &text)?)
}

async fn listen<H: Host>(
    cli: &Cli,
    host: &H,
    journal: &mut Journal,
    tls: Option<Arc<Acceptor>>,
) -> Result<(mpsc::Receiver<H::Connection>, SocketAddr), Failure> {
    let last_port = journal.fact(Fact::Port)?.and_then(|port| port.parse().ok());
    let wanted = cli.listen_address(last_port).map_err(Failure::input)?;
    let listening = match host.listen(wanted, tls.clone()).await {
        // Another process has the port now. Only a port that nobody asked for may change: an address of
        // the user's is one that others were told.
        Err(error) if cli.listen.is_none() && last_port.is_some() => {
            tracing::warn!("port {} of the last time: {error}; taking another", wanted.port());
            host.listen(SocketAddr::new(wanted.ip(), 0), tls).await
        }
        listening => listening,
    };
    let (incoming, address) = listening.map_err(|error| {
        Failure::Input(format!("--listen {wanted}: {error}; choose another port, or 0 for any that is free"))
    })?;
    // The next coordinator takes this port again: workers that lost theirs try the address that they
    // know, until their lease ends.
    journal.set_fact(Fact::Port, &address.port().to_string())?;
    Ok((incoming, address))
}

/// Address at which others reach a listener: this machine's own, where it listens on all.
fn reachable(address: IpAddr) -> IpAddr {
    if !address.is_unspecified() {
        return address;
    }
    // Connecting a datagram socket sends nothing; it only chooses a route. The target is reserved for
    // documentation.
    let routed = UdpSocket::bind(("0.0.0.0", 0)).and_then(|socket| {
        socket.connect(("192.0.2.1", 9))?;
        socket.local_addr()
    });
    routed.map_or(IpAddr::from([127, 0, 0, 1]), |local| local.ip())
}
