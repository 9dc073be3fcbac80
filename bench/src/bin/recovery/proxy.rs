//! Relay between workers and their coordinator that counts their messages.
//!
//! The relay parses the frames of HTTP/2 (RFC 9113, section 4.1) as they pass and reassembles the gRPC
//! messages in them: a byte of flags and four of length before each. Of a session's message it only
//! reads the kind.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::spawn;

/// Length of a client's connection preface in bytes.
const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;
const DATA: u8 = 0;
const MESSAGE_HEAD: usize = 5;

/// Sender of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Speaker {
    /// A worker.
    Worker,
    /// The coordinator.
    Coordinator,
}

/// Count of messages by sender and kind, the kind's number being that of the wire contract.
pub(crate) type Counts = BTreeMap<(Speaker, u64), u64>;

/// Running relay.
pub(crate) struct Proxy {
    /// Address for the workers.
    pub url: String,
    counts: Arc<Mutex<Counts>>,
}

impl Proxy {
    /// Starts a relay to the coordinator at `url`.
    pub(crate) fn start(url: &str) -> std::io::Result<Proxy> {
        let coordinator = url.trim_start_matches("http://").to_string();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("http://{}", listener.local_addr()?);
        let counts: Arc<Mutex<Counts>> = Arc::default();
        let shared = counts.clone();
        spawn(move || {
            for worker in listener.incoming().flatten() {
                let Ok(onward) = TcpStream::connect(&coordinator) else { return };
                relay(worker, onward, &shared);
            }
        });
        Ok(Proxy { url, counts })
    }

    /// Returns the counts so far.
    pub(crate) fn counts(&self) -> Counts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn relay(worker: TcpStream, coordinator: TcpStream, counts: &Arc<Mutex<Counts>>) {
    for stream in [&worker, &coordinator] {
        let _ = stream.set_nodelay(true);
    }
    let (Ok(from_worker), Ok(to_coordinator)) = (worker.try_clone(), coordinator.try_clone()) else { return };
    let there = Count::new(Speaker::Worker, PREFACE, counts.clone());
    let back = Count::new(Speaker::Coordinator, 0, counts.clone());
    spawn(move || pass_on(from_worker, to_coordinator, there));
    spawn(move || pass_on(coordinator, worker, back));
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, mut count: Count) {
    let mut bytes = [0; 1 << 16];
    while let Ok(read @ 1..) = from.read(&mut bytes) {
        if to.write_all(&bytes[..read]).is_err() {
            break;
        }
        count.take(&bytes[..read]);
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Counter of the messages in one direction of a connection.
struct Count {
    speaker: Speaker,
    counts: Arc<Mutex<Counts>>,
    /// Bytes of an incomplete frame.
    frames: Vec<u8>,
    /// Bytes at the start that are not part of a frame.
    skip: usize,
    /// Bytes of incomplete messages, by stream.
    messages: BTreeMap<u32, Vec<u8>>,
}

impl Count {
    fn new(speaker: Speaker, skip: usize, counts: Arc<Mutex<Counts>>) -> Count {
        Count { speaker, counts, frames: Vec::new(), skip, messages: BTreeMap::new() }
    }

    fn take(&mut self, bytes: &[u8]) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.frames.extend(&bytes[skipped..]);
        while let Some(head) = self.frames.first_chunk::<FRAME_HEAD>() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let (kind, stream) = (head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]));
            if self.frames.len() < FRAME_HEAD + length {
                return;
            }
            let frame: Vec<u8> = self.frames.drain(..FRAME_HEAD + length).skip(FRAME_HEAD).collect();
            if kind == DATA {
                self.messages.entry(stream).or_default().extend(frame);
                self.count(stream);
            }
        }
    }

    fn count(&mut self, stream: u32) {
        let bytes = self.messages.entry(stream).or_default();
        while let Some(head) = bytes.first_chunk::<MESSAGE_HEAD>() {
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            if bytes.len() < MESSAGE_HEAD + length {
                return;
            }
            let message: Vec<u8> = bytes.drain(..MESSAGE_HEAD + length).skip(MESSAGE_HEAD).collect();
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            *counts.entry((self.speaker, kind(&message))).or_default() += 1;
        }
    }
}

/// Returns the number of the field after the term, which is the first field.
fn kind(message: &[u8]) -> u64 {
    let mut rest = message;
    let mut number = || {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, after) = rest.split_first()?;
            rest = after;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    };
    const TERM: u64 = 1 << 3;
    let mut tag = number();
    if tag == Some(TERM) {
        number();
        tag = number();
    }
    tag.unwrap_or_default() >> 3
}
