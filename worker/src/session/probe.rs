//! Probes: detection of the workers that this one cannot reach.
//!
//! A link that drops everything makes a whole group wait, without a sign of which link it is. So each
//! worker listens on a port of its own, on the interface of its reduces, and sends a greeting on each
//! connection.

use std::future::pending;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ganglion_proto::listen::{Limits, Room, accept_loop};

/// Greeting sent on each connection.
const GREETING: &[u8; 8] = b"ganglion";

/// Connection limits. No connection lasts longer than it takes to greet.
const LIMITS: Limits =
    Limits { all: 64, strangers_of_address: 64, idle_of_address: 64, grace: Duration::ZERO };

/// Answers probes on a free port of `address` as long as the process lives; returns the address.
pub(super) fn answer(address: IpAddr) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind((address, 0))?;
    listener.set_nonblocking(true)?;
    let bound = listener.local_addr()?;
    // A runtime on its own thread: probes are answered even while the session is busy.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let entered = runtime.enter();
    let listener = tokio::net::TcpListener::from_std(listener)?;
    drop(entered);
    let serve = move || {
        let greet = |stream: tokio::net::TcpStream, _, _| {
            // Eight bytes fit into any socket's buffer: this does not wait for the peer.
            let _ = stream.try_write(GREETING);
        };
        runtime.block_on(accept_loop(listener, Room::new(LIMITS), "probes", pending(), greet));
    };
    std::thread::Builder::new().name("probe".to_string()).spawn(serve)?;
    Ok(bound)
}

/// Returns the indices of the addresses that do not answer within `limit`, all probed at once. An address
/// that is not known says nothing about the link to it.
pub fn unreachable(addresses: &[Option<String>], limit: Duration) -> Vec<usize> {
    let ask = |(index, address): (usize, &Option<String>)| {
        let address = address.clone()?;
        Some((index, std::thread::Builder::new().spawn(move || answers(&address, limit))))
    };
    // All threads are started before the first is joined, so that the probes run at the same time.
    let asked: Vec<_> = addresses.iter().enumerate().filter_map(ask).collect();
    let heard =
        |thread: std::io::Result<JoinHandle<bool>>| thread.is_ok_and(|thread| thread.join().unwrap_or(false));
    asked.into_iter().filter_map(|(index, thread)| (!heard(thread)).then_some(index)).collect()
}

fn answers(address: &str, limit: Duration) -> bool {
    let Ok(mut addresses) = address.to_socket_addrs() else { return false };
    let Some(address) = addresses.next() else { return false };
    let begun = Instant::now();
    let greeted = TcpStream::connect_timeout(&address, limit).and_then(|mut stream| {
        // One limit for both; zero would mean none.
        let left = limit.saturating_sub(begun.elapsed()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left))?;
        let mut greeting = [0; GREETING.len()];
        stream.read_exact(&mut greeting)?;
        Ok(greeting == *GREETING)
    });
    greeted.unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_that_do_not_answer_are_found() {
        let here = answer(IpAddr::from([127, 0, 0, 1])).unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        // It takes connections and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let [here, free, silent] =
            [here, free, silent.local_addr().unwrap()].map(|address| Some(address.to_string()));
        assert_eq!(unreachable(&[here, None, free, silent], Duration::from_millis(300)), [2, 3]);
    }
}
