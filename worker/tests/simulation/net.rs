//! The simulated network as tonic wants it, and the links between workers.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use ganglion_proto::dial::DialError;
use ganglion_worker::session::Connect;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::mpsc;
use tonic::transport::Uri;
use tonic::transport::server::Connected;
use turmoil::net::{TcpListener, TcpStream};

/// Where workers listen for each other.
pub(crate) const LINKS: u16 = 9000;
/// What a worker says to whoever connects.
const GREETING: &[u8; 8] = b"ganglion";

/// A client's connection.
pub(crate) struct Connection(TcpStream);

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Listens on a port of the host that this runs on.
pub(crate) async fn listen(port: u16) -> io::Result<mpsc::Receiver<Connection>> {
    let listener = TcpListener::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)).await?;
    let (let_in, incoming) = mpsc::channel(64);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let_in.send(Connection(stream)).await.is_err() {
                return;
            }
        }
    });
    Ok(incoming)
}

/// Connects to a gRPC server.
pub(crate) fn connector() -> Connect {
    Box::new(|endpoint| {
        Box::pin(async move {
            let connect = |uri: Uri| async move {
                let host: IpAddr = uri.host().unwrap_or_default().parse().map_err(io::Error::other)?;
                let port = uri.port_u16().unwrap_or_default();
                Ok::<_, io::Error>(TokioIo::new(TcpStream::connect((host, port)).await?))
            };
            let connected = endpoint.connect_with_connector(tower::service_fn(connect)).await;
            connected.map_err(|error| DialError::Later(error.to_string()))
        })
    })
}

/// Which link: term, generation, and the rank that opened it.
pub(crate) type LinkName = [u64; 3];

/// Links that others opened, until a team takes them.
#[derive(Clone, Default)]
pub(crate) struct Hub(Arc<Mutex<BTreeMap<LinkName, Link>>>);

impl Hub {
    /// Takes connections as long as the process lives.
    pub(crate) async fn open() -> io::Result<Hub> {
        let (hub, mut incoming) = (Hub::default(), listen(LINKS).await?);
        let theirs = hub.clone();
        tokio::spawn(async move {
            while let Some(connection) = incoming.recv().await {
                tokio::spawn(theirs.clone().receive(connection));
            }
        });
        Ok(hub)
    }

    async fn receive(self, mut connection: Connection) -> io::Result<()> {
        connection.write_all(GREETING).await?;
        let mut link = Link(connection);
        // A probe says nothing and ends here.
        let name = link.receive().await?;
        let name = name.try_into().map_err(|_| io::Error::other("no name of a link"))?;
        self.0.lock().expect("nothing panics with it").insert(name, link);
        Ok(())
    }

    /// Waits for a link.
    pub(crate) async fn take(&self, name: LinkName) -> Link {
        loop {
            if let Some(link) = self.0.lock().expect("nothing panics with it").remove(&name) {
                return link;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A connection between two workers, which carries lists of numbers.
pub(crate) struct Link(Connection);

impl Link {
    /// Opens a link.
    pub(crate) async fn open(address: SocketAddr, name: LinkName) -> io::Result<Link> {
        let mut link = Link(Connection(TcpStream::connect(address).await?));
        link.greeted().await?;
        link.send(&name).await?;
        Ok(link)
    }

    async fn greeted(&mut self) -> io::Result<()> {
        let mut greeting = [0; GREETING.len()];
        self.0.read_exact(&mut greeting).await?;
        if greeting == *GREETING { Ok(()) } else { Err(io::Error::other("no worker")) }
    }

    pub(crate) async fn send(&mut self, words: &[u64]) -> io::Result<()> {
        let count = words.len() as u64;
        let bytes: Vec<u8> =
            std::iter::once(&count).chain(words).flat_map(|word| word.to_le_bytes()).collect();
        self.0.write_all(&bytes).await
    }

    pub(crate) async fn receive(&mut self) -> io::Result<Vec<u64>> {
        let count = self.0.read_u64_le().await?;
        let mut words = Vec::new();
        for _ in 0..count {
            words.push(self.0.read_u64_le().await?);
        }
        Ok(words)
    }
}

/// Whether somebody answers at an address.
pub(crate) async fn answers(address: &str, limit: Duration) -> bool {
    let Ok(address) = address.parse::<SocketAddr>() else { return false };
    let ask = async {
        let mut link = Link(Connection(TcpStream::connect(address).await?));
        link.greeted().await
    };
    tokio::time::timeout(limit, ask).await.is_ok_and(|greeted: io::Result<()>| greeted.is_ok())
}
