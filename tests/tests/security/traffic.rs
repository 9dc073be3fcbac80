//! Secrecy of the traffic: over TLS none of the patterns can be read in either plane. Without TLS
//! they are found, so the search works.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, spawn};

use ganglion_tests::{LIMIT, OVER_GLOO, Process, Run, SMALL_MLP, eventually};
use rustix::net::sockopt::{Timeout, set_socket_recv_buffer_size_force, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};

use crate::secrets::{Secrets, start, url, worker};

/// Name of the job, which the coordinator sends to each worker.
const NAME: &str = "a-name-that-nobody-else-has";

fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    bytes.windows(pattern.len()).any(|window| window == pattern)
}

/// Relays connections to a coordinator and keeps all bytes.
struct Relay {
    address: String,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Relay {
    fn start(url: &str) -> Relay {
        let onward = url.split("://").nth(1).unwrap().to_string();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heard: Arc<Mutex<Vec<u8>>> = Arc::default();
        let keep = heard.clone();
        spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&onward) else { return };
                let (back, forth) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                for (from, to) in [(client, forth), (server, back)] {
                    let keep = keep.clone();
                    spawn(move || pass_on(from, to, &keep));
                }
            }
        });
        Relay { address, heard }
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, heard: &Mutex<Vec<u8>>) {
    let mut bytes = [0; 1 << 16];
    while let Ok(read @ 1..) = from.read(&mut bytes) {
        heard.lock().unwrap().extend(&bytes[..read]);
        if to.write_all(&bytes[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[test]
fn what_workers_and_coordinator_say_is_not_to_be_read() {
    let name = format!("job.name={NAME}");
    let settings = [SMALL_MLP, &["job.steps=3", name.as_str()]];
    let trained_through = |run: &Run, coordinator: Process, secrets: Option<&Secrets>| {
        let relay = Relay::start(&url(run));
        let worker = match secrets {
            Some(secrets) => secrets.worker(&format!("https://{}", relay.address)),
            None => worker(&format!("http://{}", relay.address), &[]),
        };
        for process in [worker, coordinator] {
            let ended = process.wait();
            assert_eq!(ended.code, Some(0), "{}", ended.output);
        }
        let heard = relay.heard.lock().unwrap();
        heard.clone()
    };
    let run = Run::new(&settings);
    let heard = trained_through(&run, run.start(0), None);
    let storage = run.path("checkpoints").display().to_string();
    for said in [NAME, &storage, "state-00001-of-"] {
        assert!(contains(&heard, said.as_bytes()), "{said} is said, and not to be read without TLS");
    }
    let run = Run::new(&settings);
    let secrets = Secrets::new(&run, "certs");
    let heard = trained_through(&run, start(&run, &secrets, 0), Some(&secrets));
    let storage = run.path("checkpoints").display().to_string();
    assert!(heard.len() > 2000, "{} bytes", heard.len());
    for said in [NAME, &storage, "state-00001-of-", "ganglion.v1", "Bearer", &secrets.token()] {
        assert!(!contains(&heard, said.as_bytes()), "{said} can be read over TLS");
    }
}

/// Searches for patterns in all traffic of this machine's interfaces, from its start to its end.
struct Capture {
    looking: JoinHandle<(usize, Vec<bool>)>,
    marks: Arc<Marks>,
}

/// Packets that mark the begin and the end of a capture: all earlier packets have been seen by then.
struct Marks {
    begin: String,
    end: String,
}

impl Marks {
    /// No other capture on this machine has the same.
    fn new() -> Marks {
        static CAPTURES: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}.{}", std::process::id(), CAPTURES.fetch_add(1, Ordering::Relaxed));
        Marks { begin: format!("capture {name} begins"), end: format!("capture {name} ends") }
    }
}

fn send(mark: &str) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(mark.as_bytes(), socket.local_addr().unwrap()).unwrap();
}

impl Capture {
    /// `None` without the right to capture.
    fn start(patterns: Vec<Vec<u8>>) -> Option<Capture> {
        let protocol = Some(eth::ALL);
        let socket =
            socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, protocol).ok()?;
        // The buffer must hold all packets that arrive while this thread is not running.
        let _ = set_socket_recv_buffer_size_force(&socket, 256 << 20);
        set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT)).unwrap();
        let marks = Arc::new(Marks::new());
        let (begins, begun) = channel();
        let known = marks.clone();
        let looking = spawn(move || look(&socket, &Patterns::new(patterns), &known, &begins));
        send(&marks.begin);
        begun.recv_timeout(LIMIT).expect("the capture sees what is sent");
        Some(Capture { looking, marks })
    }

    /// The bytes that were seen, and which patterns were among them.
    fn end(self) -> (usize, Vec<bool>) {
        // Again and again: the packets of other processes may leave no room for one.
        eventually("end of the capture", || {
            send(&self.marks.end);
            self.looking.is_finished().then_some(())
        });
        self.looking.join().unwrap()
    }
}

fn look(socket: &OwnedFd, patterns: &Patterns, marks: &Marks, begins: &Sender<()>) -> (usize, Vec<bool>) {
    let (mut bytes, mut seen, mut found) = (vec![0; 1 << 17], 0, vec![false; patterns.whole.len()]);
    loop {
        let (read, _) = recv(socket, &mut bytes[..], RecvFlags::empty()).expect("the end is marked");
        let packet = &bytes[..read];
        if packet.ends_with(marks.begin.as_bytes()) {
            let _ = begins.send(());
        } else if packet.ends_with(marks.end.as_bytes()) {
            return (seen, found);
        } else if !is_inside(packet) {
            seen += read;
            patterns.find(packet, &mut found);
        }
    }
}

/// Patterns, indexed by their first bytes. One pass finds all of them: a capture that falls behind loses
/// packets.
struct Patterns {
    whole: Vec<Vec<u8>>,
    starting: HashMap<[u8; 4], Vec<usize>>,
    /// The first two bytes of each pattern.
    may_start: Vec<bool>,
}

impl Patterns {
    fn new(whole: Vec<Vec<u8>>) -> Patterns {
        let mut starting: HashMap<[u8; 4], Vec<usize>> = HashMap::new();
        let mut may_start = vec![false; 1 << 16];
        for (number, pattern) in whole.iter().enumerate() {
            starting.entry(pattern[..4].try_into().unwrap()).or_default().push(number);
            may_start[usize::from(u16::from_le_bytes([pattern[0], pattern[1]]))] = true;
        }
        Patterns { whole, starting, may_start }
    }

    /// Notes which patterns a packet contains.
    fn find(&self, packet: &[u8], found: &mut [bool]) {
        for (at, start) in packet.windows(4).enumerate() {
            if self.may_start[usize::from(u16::from_le_bytes([start[0], start[1]]))] {
                for number in self.starting.get(start).into_iter().flatten() {
                    found[*number] |= packet[at..].starts_with(&self.whole[*number]);
                }
            }
        }
    }
}

/// Whether a packet is of Gloo's plain ends of the tunnels, which never leave a machine: in 127.64.0.0/10.
fn is_inside(packet: &[u8]) -> bool {
    let is_v4 = packet.first().is_some_and(|first| first >> 4 == 4);
    let is_plain_end = |address: &[u8]| address[0] == 127 && address[1] & 0xc0 == 64;
    is_v4 && packet.len() >= 20 && (is_plain_end(&packet[12..16]) || is_plain_end(&packet[16..20]))
}

/// Pieces of a checkpoint's tensors.
fn pieces(run: &Run) -> Vec<Vec<u8>> {
    let files = fs::read_dir(run.newest_checkpoint()).unwrap().flatten();
    let parts = files.filter(|file| file.file_name().to_string_lossy().starts_with("state-"));
    let tensors: Vec<u8> = parts
        .flat_map(|file| {
            let bytes = fs::read(file.path()).unwrap();
            let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
            bytes[8 + header..].to_vec()
        })
        .collect();
    let zeros = |piece: &[u8]| piece.iter().filter(|byte| **byte == 0).count();
    let pieces = tensors.chunks_exact(64).filter(|piece| zeros(piece) < 8);
    let all: Vec<Vec<u8>> = pieces.map(<[u8]>::to_vec).collect();
    let apart = all.len() / 16;
    all.into_iter().step_by(apart.max(1)).collect()
}

/// Trains a little with one worker, then on with two, of whom one sends the other all weights and moments.
fn weights_on_the_way(secrets: Option<&str>) -> Option<(usize, usize)> {
    // No other process on this machine trains these weights.
    let mut run = Run::new(&[SMALL_MLP, &["job.steps=3", "job.seed=918273645", "job.data_shards=4"]]);
    let secrets = secrets.map(|name| Secrets::new(&run, name));
    run.complete(1);
    let pieces = pieces(&run);
    assert!(pieces.len() >= 8, "{}", pieces.len());
    run.set("job.steps=6");
    let capture = Capture::start(pieces)?;
    let coordinator = match &secrets {
        Some(secrets) => start(&run, secrets, 2),
        None => run.start_in(2, &[(OVER_GLOO.0, OVER_GLOO.1.to_string())]),
    };
    let ended = coordinator.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    run.wait_for("generation_formed", |event| event["world_size"] == 2);
    let (seen, found) = capture.end();
    Some((seen, found.into_iter().filter(|found| *found).count()))
}

#[test]
fn weights_and_gradients_are_not_to_be_read() {
    let Some((_, found)) = weights_on_the_way(None) else {
        eprintln!("not tested: this process may not look at the network's packets (CAP_NET_RAW)");
        return;
    };
    assert!(found > 0, "weights are sent, and not to be read without TLS");
    let (seen, found) = weights_on_the_way(Some("certs")).unwrap();
    assert!(seen > 100_000, "{seen} bytes");
    assert_eq!(found, 0, "pieces of the weights can be read over TLS");
}
