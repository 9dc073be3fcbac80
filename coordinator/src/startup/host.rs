//! Interface to the machine: a listener, processes, signals. The clock is tokio's.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use ganglion_proto::signals::hangup_is_ignored;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tonic::transport::server::Connected;

use crate::api::grpc::connection::Connection;
use crate::api::grpc::door;
use crate::api::grpc::tls::Acceptor;
use crate::control::StopSignal;
use crate::records::disk::{Disk, SystemDisk};
use crate::records::logging::LogFormat;
use crate::workers::{Processes, SystemProcesses};

/// A machine: the real one, or a simulated one.
pub trait Host {
    /// A client's connection.
    type Connection: Connected + AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Listens on an address, with TLS if an acceptor is given; returns the accepted connections,
    /// and the address with its port.
    fn listen(
        &self,
        wanted: SocketAddr,
        tls: Option<Arc<Acceptor>>,
    ) -> impl Future<Output = io::Result<(mpsc::Receiver<Self::Connection>, SocketAddr)>>;

    /// Processes of the machine.
    fn processes(&self) -> io::Result<Box<dyn Processes>>;

    /// Disk below the run's records.
    fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(SystemDisk)
    }

    /// Signals that ask this process to stop.
    fn signals(&self) -> io::Result<mpsc::UnboundedReceiver<StopSignal>>;
}

/// The real machine.
pub struct System {
    /// Log format of this process and of the workers that it starts.
    pub log_format: LogFormat,
}

impl Host for System {
    type Connection = Connection;

    async fn listen(
        &self,
        wanted: SocketAddr,
        tls: Option<Arc<Acceptor>>,
    ) -> io::Result<(mpsc::Receiver<Connection>, SocketAddr)> {
        let listener = TcpListener::bind(wanted).await?;
        let address = listener.local_addr()?;
        Ok((door::open(listener, tls), address))
    }

    fn processes(&self) -> io::Result<Box<dyn Processes>> {
        Ok(Box::new(SystemProcesses::new(self.log_format)?))
    }

    fn signals(&self) -> io::Result<mpsc::UnboundedReceiver<StopSignal>> {
        let (came, signals) = mpsc::unbounded_channel();
        let mut kinds = vec![
            (SignalKind::interrupt(), StopSignal::Interrupt),
            (SignalKind::terminate(), StopSignal::Terminate),
        ];
        // Under nohup the user wants the run to outlive the terminal.
        if !hangup_is_ignored() {
            kinds.push((SignalKind::hangup(), StopSignal::Hangup));
        }
        for (kind, stop) in kinds {
            let (mut listener, came) = (signal(kind)?, came.clone());
            // Ends with the shell, which drops the receiver.
            tokio::spawn(async move { while listener.recv().await.is_some() && came.send(stop).is_ok() {} });
        }
        Ok(signals)
    }
}
