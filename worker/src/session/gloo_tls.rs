//! TLS tunnels for reduces over Gloo.
//!
//! Gloo has a transport of its own that should encrypt. In libtorch 2.11 it reads the certificates and then
//! makes plain connections: `tcp::Context::createAndConnectAllPairs` does not ask the encrypting context
//! for its pairs. So each member's Gloo listens on the loopback interface alone, and tunnels connect them:
//!
//! ```text
//! Gloo of rank 2 -> entry on rank 2's loopback  ==TLS==>  exit of rank 0 -> Gloo of rank 0, on its loopback
//! ```
//!
//! 1. All traffic between machines goes over TLS 1.3 with certificates on both ends. The accepting end
//!    shows a certificate for the name that it published to the group.
//! 2. A connection reaches only the group whose secret it presents. Secrets are in the group's store, which
//!    members alone read.
//! 3. A group is used only once each of its connections came through a tunnel.
//! 4. When one end of a tunnel breaks, the other is closed.
//!
//! Gloo's ranks find each other's addresses in the store, so the store is where entries are substituted. Of
//! two ranks the one with the greater address connects to the other: ranks listen, and have their entries,
//! on 127.64.0.1, 127.64.0.2, ... .

use std::collections::BTreeMap;
use std::future::pending;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as Listener};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use c10d::{KeyValueStore, StoreError};
use ganglion_proto::credentials::{CredentialError, TlsFiles};
use ganglion_proto::listen::{Limits, Place, Room, accept_loop, accept_one};
use ganglion_proto::throttle::Throttle;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// ALPN protocol inside of TLS.
const PROTOCOL: &[u8] = b"ganglion-tunnel";
/// Limit on each of connecting, the handshake, and the secret.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// Connection limits: in total; per address, of those that have presented no secret yet and of those that
/// have sent nothing; and the grace before these lose their places to others.
const LIMITS: Limits =
    Limits { all: 4096, strangers_of_address: 384, idle_of_address: 256, grace: Duration::from_secs(2) };
/// Number of log lines about one address in a row, and the pause for each further one.
const COMPLAINTS: (u32, Duration) = (60, Duration::from_secs(10));
/// Size of the buffer for copying, in bytes.
const CHUNK: usize = 256 << 10;
/// Address family of IPv4, on Linux.
const AF_INET: u16 = 2;

/// Secret that identifies a group's connections.
type Secret = [u8; 32];

/// Tunnel endpoints of this process.
pub struct Tunnels {
    shared: Arc<Shared>,
    /// Threads of its own: encryption must not delay the session's heartbeats.
    runtime: Runtime,
}

struct Shared {
    files: TlsFiles,
    /// Address at which other workers reach the exits.
    address: SocketAddr,
    groups: Mutex<BTreeMap<Secret, Exit>>,
    complaints: Throttle,
}

/// Exit of a group's connections.
#[derive(Clone)]
struct Exit {
    gloo: SocketAddr,
    progress: Arc<Progress>,
}

/// Number of a group's established connections, and the reason if one failed.
#[derive(Default)]
struct Progress {
    state: Mutex<(usize, Option<String>)>,
    changed: Condvar,
}

impl Progress {
    fn note(&self, joined: Result<(), String>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match joined {
            Ok(()) => state.0 += 1,
            Err(why) => state.1 = Some(why),
        }
        self.changed.notify_all();
    }
}

impl Tunnels {
    /// Opens the listener of the exits, on an address by which other workers reach this machine.
    pub fn open(files: TlsFiles, address: IpAddr) -> io::Result<Tunnels> {
        let runtime =
            Builder::new_multi_thread().worker_threads(2).thread_name("tunnel").enable_all().build()?;
        let listener = Listener::bind((address, 0))?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            files,
            address: listener.local_addr()?,
            groups: Mutex::default(),
            complaints: Throttle::new(COMPLAINTS.0, COMPLAINTS.1),
        });
        let entered = runtime.enter();
        tokio::spawn(shared.clone().serve(TcpListener::from_std(listener)?));
        drop(entered);
        Ok(Tunnels { shared, runtime })
    }

    /// Returns the store of a group, through which this rank's tunnels are made. It must live as long as
    /// the group.
    pub fn group(&self, rank: usize, store: Arc<dyn KeyValueStore>) -> io::Result<Arc<Tunnelled>> {
        let mut secret = Secret::default();
        io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut secret)?;
        let (shared, runtime) = (self.shared.clone(), self.runtime.handle().clone());
        let (progress, tasks) = (Arc::default(), Mutex::default());
        Ok(Arc::new(Tunnelled { shared, runtime, store, rank, secret, progress, tasks }))
    }
}

impl Shared {
    fn groups(&self) -> MutexGuard<'_, BTreeMap<Secret, Exit>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(self: Arc<Shared>, listener: TcpListener) {
        let room = Room::new(LIMITS.within_descriptors());
        let receive = |stream, from, place| drop(tokio::spawn(self.clone().receive(stream, from, place)));
        accept_loop(listener, room, "reduces", pending(), receive).await;
    }

    async fn receive(self: Arc<Shared>, stream: TcpStream, from: SocketAddr, place: Place) {
        let late = |_| Err(io::ErrorKind::TimedOut.into());
        // A silent connection is idle, and may lose its place to another that speaks.
        let spoke = timeout(GREETING_LIMIT, place.keep(stream.peek(&mut [0]))).await;
        if let Err(error) = spoke.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            return self.complain(from, &error);
        }
        // A handshake also waits for this machine: many at once take longer than any grace for silent
        // connections.
        place.engage();
        match timeout(GREETING_LIMIT, self.greet(stream)).await.unwrap_or_else(late) {
            Ok((peer, exit)) => {
                place.trust();
                self.leave(peer, exit).await;
            }
            Err(error) => self.complain(from, &error),
        }
    }

    /// Logs that a connection was closed, at a limited rate for each address.
    fn complain(&self, from: SocketAddr, error: &io::Error) {
        if self.complaints.allows(from.ip()) {
            self.complaints.note(from.ip());
            tracing::warn!("closed a connection from {from} for reduces: {error}");
        }
    }

    /// Performs the handshake, and reads the secret of the group that the peer belongs to.
    async fn greet(&self, stream: TcpStream) -> io::Result<(TlsStream<TcpStream>, Exit)> {
        stream.set_nodelay(true)?;
        let config = self.files.read().and_then(|own| own.server(PROTOCOL)).map_err(io::Error::other)?;
        let mut peer = TlsAcceptor::from(Arc::new(config)).accept(stream).await?;
        if peer.get_ref().1.alpn_protocol() != Some(PROTOCOL) {
            return Err(io::Error::other("it speaks another protocol"));
        }
        let mut secret = Secret::default();
        peer.read_exact(&mut secret).await?;
        let exit = self.groups().get(&secret).cloned();
        let exit = exit.ok_or_else(|| io::Error::other("it comes for a group that is not here"))?;
        Ok((TlsStream::Server(peer), exit))
    }

    /// Connects the end of a tunnel to this process's Gloo.
    async fn leave(&self, peer: TlsStream<TcpStream>, exit: Exit) {
        match TcpStream::connect(exit.gloo).await {
            Ok(gloo) => {
                exit.progress.note(Ok(()));
                join(gloo, peer).await;
            }
            // The group has ended.
            Err(error) => tracing::debug!("no group at the end of a tunnel: {error}"),
        }
    }

    /// Connects to the exit of another worker.
    async fn reach(&self, exit: &Told, secret: Secret) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(exit.address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(exit.name.clone()).map_err(io::Error::other)?;
        let config = self.files.read().and_then(|own| own.client(PROTOCOL)).map_err(io::Error::other)?;
        let mut peer = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        peer.write_all(&secret).await?;
        peer.flush().await?;
        Ok(TlsStream::Client(peer))
    }
}

/// Copies bytes both ways until both sides have ended, or one has broken.
async fn join(mut gloo: TcpStream, mut peer: TlsStream<TcpStream>) {
    if gloo.set_nodelay(true).is_ok() {
        let _ = copy_bidirectional_with_sizes(&mut gloo, &mut peer, CHUNK, CHUNK).await;
    }
}

/// Exit of a member, as published to its group.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    secret: Secret,
    address: SocketAddr,
    /// Name in the member's certificate.
    name: String,
}

impl Told {
    fn to_bytes(&self) -> Vec<u8> {
        [&self.secret[..], format!("{} {}", self.address, self.name).as_bytes()].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Told> {
        let (secret, text) = bytes.split_first_chunk()?;
        let (address, name) = std::str::from_utf8(text).ok()?.split_once(' ')?;
        Some(Told { secret: *secret, address: address.parse().ok()?, name: name.to_string() })
    }
}

/// Store of a group that replaces the addresses of other ranks by those of this rank's entries to them.
pub struct Tunnelled {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    store: Arc<dyn KeyValueStore>,
    rank: usize,
    secret: Secret,
    progress: Arc<Progress>,
    /// Tasks of the entries.
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Tunnelled {
    /// Address at which this rank's Gloo listens.
    pub fn loopback(&self) -> IpAddr {
        loopback(self.rank).into()
    }

    /// Waits until `connections` connections are established.
    pub fn wait(&self, connections: usize, limit: Duration) -> Result<(), c10d::Error> {
        let state = self.progress.state.lock().unwrap_or_else(PoisonError::into_inner);
        let pending = |state: &mut (usize, Option<String>)| state.0 < connections && state.1.is_none();
        let waited = self.progress.changed.wait_timeout_while(state, limit, pending);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &state.1 {
            Some(why) => Err(c10d::Error::PeerLost(why.clone())),
            None if state.0 < connections => Err(c10d::Error::Timeout),
            None => Ok(()),
        }
    }

    /// Publishes the exit of this rank, before the other ranks can look for its Gloo.
    fn tell(&self, port: u16) -> Result<(), StoreError> {
        let own = self.shared.files.read().and_then(|own| own.peer_name());
        let name = own.map_err(|error: CredentialError| StoreError::Unreachable(error.to_string()))?;
        let exit = Exit { gloo: (self.loopback(), port).into(), progress: self.progress.clone() };
        self.shared.groups().insert(self.secret, exit);
        let told = Told { secret: self.secret, address: self.shared.address, name };
        self.store.set(&key(self.rank), &told.to_bytes())
    }

    /// Opens an entry to another rank; returns its port.
    fn enter(&self, rank: usize, limit: Duration) -> Result<u16, StoreError> {
        let failed = |what: String| StoreError::Unreachable(format!("no tunnel to rank {rank}: {what}"));
        let told = Told::from_bytes(&self.store.get(&key(rank), limit)?);
        let told = told.ok_or_else(|| failed("it told no address".to_string()))?;
        let open = || {
            let listener = Listener::bind((loopback(rank), 0))?;
            listener.set_nonblocking(true)?;
            Ok((listener.local_addr()?.port(), listener))
        };
        let (port, listener) = open().map_err(|error: io::Error| failed(error.to_string()))?;
        let (shared, progress) = (self.shared.clone(), self.progress.clone());
        let task = self.runtime.spawn(async move {
            let through = async {
                let gloo = accept_one(TcpListener::from_std(listener)?, "a tunnel", limit).await?;
                let peer = timeout(GREETING_LIMIT, shared.reach(&told, told.secret));
                Ok((gloo, peer.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?))
            };
            let through =
                through.await.map_err(|error: io::Error| format!("no tunnel to rank {rank}: {error}"));
            if let Err(why) = &through {
                tracing::warn!("{why}");
            }
            progress.note(through.as_ref().map(drop).map_err(String::clone));
            if let Ok((gloo, peer)) = through {
                join(gloo, peer).await;
            }
        });
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task.abort_handle());
        Ok(port)
    }
}

impl Drop for Tunnelled {
    fn drop(&mut self) {
        self.shared.groups().remove(&self.secret);
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(AbortHandle::abort);
    }
}

impl KeyValueStore for Tunnelled {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        if let Some((at, rank)) = find(value)
            && rank == self.rank
        {
            self.tell(u16::from_be_bytes([value[at], value[at + 1]]))?;
        }
        self.store.set(key, value)
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let mut value = self.store.get(key, timeout)?;
        // The greater address connects; the other waits.
        if let Some((at, rank)) = find(&value)
            && rank < self.rank
        {
            value[at..at + 2].copy_from_slice(&self.enter(rank, timeout)?.to_be_bytes());
        }
        Ok(value)
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError> {
        self.store.add(key, amount)
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.store.compare_set(key, expected, desired)
    }

    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        self.store.delete(key)
    }

    fn contains(&self, keys: &[&str]) -> Result<bool, StoreError> {
        self.store.contains(keys)
    }
}

fn key(rank: usize) -> String {
    format!("tunnel/{rank}")
}

/// Loopback address of a rank: ascending with the rank.
fn loopback(rank: usize) -> Ipv4Addr {
    let first = u32::from(Ipv4Addr::new(127, 64, 0, 1));
    Ipv4Addr::from(first + u32::try_from(rank).expect("there are fewer ranks than loopback addresses"))
}

/// Finds the address of a rank, a `sockaddr_in`, in a value that Gloo writes to the store; returns the
/// offset of its port, and the rank.
fn find(value: &[u8]) -> Option<(usize, usize)> {
    let first = u32::from(loopback(0));
    value.windows(16).enumerate().find_map(|(at, window)| {
        let address = u32::from_be_bytes(*window[4..].first_chunk()?);
        let is_ours = (first..first + (1 << 20)).contains(&address);
        let is_inet = window[..2] == AF_INET.to_ne_bytes() && window[8..] == [0; 8];
        (is_ours && is_inet).then_some((at + 2, (address - first) as usize))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(rank: usize, port: u16) -> Vec<u8> {
        let name = [&7u64.to_ne_bytes()[..], b"machine"].concat();
        let socket =
            [&AF_INET.to_ne_bytes()[..], &port.to_be_bytes(), &loopback(rank).octets(), &[0; 120]].concat();
        [name, socket, vec![1, 2, 3]].concat()
    }

    #[test]
    fn addresses_of_ranks_are_found_and_nothing_else_is() {
        assert!(loopback(0) < loopback(1) && loopback(255) < loopback(256) && loopback(300).is_loopback());
        for rank in [0, 1, 255, 70_000] {
            let bytes = address(rank, 4660);
            let (at, found) = find(&bytes).unwrap();
            assert_eq!((found, &bytes[at..at + 2]), (rank, &[0x12, 0x34][..]));
        }
        let mut other = address(3, 1);
        let at = find(&other).unwrap().0;
        other[at + 3] = 0;
        assert_eq!(find(&other), None, "another address");
        assert_eq!(find(b"7"), None);
        assert_eq!(find(&[0; 500]), None);
    }

    #[test]
    fn what_is_told_is_understood() {
        let told = Told { secret: [7; 32], address: ([10, 1, 2, 3], 4).into(), name: "a.b".to_string() };
        assert_eq!(Told::from_bytes(&told.to_bytes()), Some(told));
        for wrong in [&b""[..], &[1; 32], &[1; 40]] {
            assert_eq!(Told::from_bytes(wrong), None);
        }
    }

    /// Certificates of a new authority for 127.0.0.1, as `coordinator certs init` makes them.
    fn files(folder: &std::path::Path) -> TlsFiles {
        use clap::Parser;
        use ganglion_coordinator::commands::cli::{Cli, Command};
        let made = folder.join("made");
        let cli = Cli::parse_from(["coordinator", "certs", "init", "--dir", made.to_str().unwrap()]);
        let Some(Command::Certs(command)) = cli.command else { panic!("it makes certificates") };
        command.run().unwrap();
        TlsFiles::new(&made.join("worker"))
    }

    /// More greet at once than may be greeting, and strangers that say nothing were there before them.
    #[test]
    fn three_hundred_tunnels_at_once_all_come_through() {
        const TUNNELS: usize = 300;
        ganglion_proto::listen::raise_descriptor_limit();
        let folder = tempfile::tempdir().unwrap();
        let tunnels = Tunnels::open(files(folder.path()), [127, 0, 0, 1].into()).unwrap();
        let silent: Vec<_> = (0..LIMITS.idle_of_address)
            .map(|_| std::net::TcpStream::connect(tunnels.shared.address).unwrap())
            .collect();
        let gloo = Listener::bind("127.0.0.1:0").unwrap();
        let (secret, progress): (Secret, Arc<Progress>) = ([9; 32], Arc::default());
        let exit = Exit { gloo: gloo.local_addr().unwrap(), progress: progress.clone() };
        std::thread::spawn(move || gloo.incoming().collect::<Vec<_>>());
        tunnels.shared.groups().insert(secret, exit);
        let told =
            Arc::new(Told { secret, address: tunnels.shared.address, name: "ganglion-worker".to_string() });
        let reached = tunnels.runtime.block_on(async {
            let mut reaching = tokio::task::JoinSet::new();
            for _ in 0..TUNNELS {
                let (shared, told) = (tunnels.shared.clone(), told.clone());
                reaching.spawn(async move {
                    shared.reach(&told, secret).await.map_err(|error| error.to_string())
                });
            }
            reaching.join_all().await
        });
        let failed: Vec<_> = reached.iter().filter_map(|reached| reached.as_ref().err()).collect();
        assert!(failed.is_empty(), "{} of {TUNNELS} failed: {:?}", failed.len(), failed.first());
        let through = progress.state.lock().unwrap();
        let through = progress.changed.wait_timeout_while(through, GREETING_LIMIT, |state| state.0 < TUNNELS);
        assert_eq!(through.unwrap().0.0, TUNNELS);
        drop(silent);
    }
}
