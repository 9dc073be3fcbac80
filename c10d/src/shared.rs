//! Memory that the ranks of one host share: each writes a part of its own, and reads those of all.
//!
//! The memory is anonymous (memfd): it has no name that could be left behind, and is gone with the last
//! process that maps it, however that ends. It does not count against the size of /dev/shm.
//!
//! 1. A rank writes its own segment alone, and maps those of the others for reading alone.
//! 2. A segment has two slots, used in turns. A rank writes a slot only after all ranks have published the
//!    round before, and a rank publishes a round only after it has read the one before that: nobody writes
//!    what somebody may still read.
//! 3. Segments belong to one group and are never used again.
//! 4. No wait is longer than its limit. It ends within a millisecond of the death of a rank that it waits for,
//!    or of an abort.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::yield_now;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::futex;
use tch::Tensor;

use crate::Error;
use crate::aten_ffi::{Keep, shim};
use crate::sync::deadline;

/// Bytes in front of the slots: the number of rounds published, whether the rank has left, and a key that no
/// other segment has.
const HEAD: usize = 64;
const KEY: usize = 16;
/// Start of the name that the kernel shows for such memory.
const NAME: &str = "ganglion-ranks";
/// Time for which a waiter keeps its core. A round takes about as long where all ranks have a core.
const SPIN: Duration = Duration::from_micros(200);
/// Longest sleep of a waiter. After each it looks for an abort, and for the death of the rank.
const NAP: Duration = Duration::from_millis(1);

/// Number of `u64` by which a rank tells the others of its segment.
pub const OFFER_WORDS: usize = 4;

/// Mapped memory of one segment.
struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is shared between processes anyway; what orders its uses is the protocol of rounds,
// whatever the thread.
unsafe impl Send for Memory {}
// SAFETY: as above; through a shared reference only the atomic counter is touched.
unsafe impl Sync for Memory {}

impl Memory {
    fn map(file: &File, bytes: usize, writable: bool) -> Result<Memory, Error> {
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory. The file is
        // sealed at its size, so no access within `bytes` faults.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, file.as_fd(), 0)
        };
        let start = start.map_err(|error| failed("map", error.into()))?;
        Ok(Memory { start: NonNull::new(start.cast()).expect("a mapping is never at 0"), bytes })
    }

    /// Number of rounds published.
    fn rounds(&self) -> &AtomicU32 {
        self.word(0)
    }

    /// Not 0 once the rank has left the exchange.
    fn left(&self) -> &AtomicU32 {
        self.word(1)
    }

    fn word(&self, index: usize) -> &AtomicU32 {
        // SAFETY: the first bytes of a segment are aligned, live as long as the mapping, and only ever used
        // as these atomics.
        unsafe { self.start.cast::<AtomicU32>().add(index).as_ref() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more: each tensor over it keeps a reference to it.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Segment of this rank, before it knows those of the others.
pub struct Segment {
    memory: Arc<Memory>,
    file: File,
    len: usize,
    key: [u8; KEY],
}

impl Segment {
    /// Allocates a segment whose slots hold `len` floats each.
    ///
    /// # Errors
    /// [`Error::Fatal`] if the kernel refuses, for instance for want of memory.
    pub fn new(len: usize) -> Result<Segment, Error> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create(NAME, flags).map_err(|error| failed("make", error.into()))?;
        let (file, bytes) = (File::from(file), size(len)?);
        file.set_len(bytes as u64).map_err(|error| failed("size", error))?;
        // A file that shrank under a reader would end it by SIGBUS.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|error| failed("seal", error.into()))?;
        let memory = Memory::map(&file, bytes, true)?;
        let mut key = [0; KEY];
        File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut key))
            .map_err(|error| failed("name", error))?;
        // SAFETY: the key lies behind the counter and in front of the slots, in memory that no other
        // process knows yet.
        unsafe { std::ptr::copy_nonoverlapping(key.as_ptr(), memory.start.as_ptr().add(KEY), KEY) };
        Ok(Segment { memory: Arc::new(memory), file, len, key })
    }

    /// Words by which the other ranks find this segment.
    pub fn offer(&self) -> [u64; OFFER_WORDS] {
        let [low, high] =
            [0, 8].map(|at| u64::from_le_bytes(self.key[at..at + 8].try_into().expect("8 bytes")));
        let fd = u64::try_from(self.file.as_raw_fd()).expect("an open file has a number");
        [u64::from(std::process::id()), fd, low, high]
    }

    /// Maps the segment that another rank offered. It must have slots as long as this one's.
    ///
    /// # Errors
    /// [`Error::Fatal`] where it cannot be reached: the rank is on another host, in another container, or
    /// of another user.
    fn find(&self, offer: &[u64; OFFER_WORDS]) -> Result<Peer, Error> {
        let [pid, fd, low, high] = *offer;
        // Before the key is compared: a process that took over the number since has no such memory.
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let process = number.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let process = process.transpose().map_err(|error| failed("find", error.into()))?;
        let path = format!("/proc/{pid}/fd/{fd}");
        // On another host the number may be that of any file, and opening some files has effects.
        let target = std::fs::read_link(&path).map_err(|error| failed("find", error))?;
        if !target.to_string_lossy().starts_with(&format!("/memfd:{NAME}")) {
            return Err(Error::Fatal("another rank's memory is not on this host".into()));
        }
        let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let file = File::from(file.map_err(|error| failed("open", error.into()))?);
        let bytes = size(self.len)?;
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|error| failed("check", error.into()))?;
        let about = file.metadata().map_err(|error| failed("check", error))?;
        if about.len() != bytes as u64 || !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(Error::Fatal("another rank's memory has another size".into()));
        }
        let memory = Memory::map(&file, bytes, false)?;
        let mut key = [0; KEY];
        // SAFETY: the key of a sealed segment of the right size, which its owner wrote before the offer.
        unsafe { std::ptr::copy_nonoverlapping(memory.start.as_ptr().add(KEY), key.as_mut_ptr(), KEY) };
        if key != *[low.to_le_bytes(), high.to_le_bytes()].concat() {
            return Err(Error::Fatal("another rank's memory is not on this host".into()));
        }
        Ok(Peer { memory: Arc::new(memory), process })
    }
}

/// Segment of a rank, and the process that writes it.
struct Peer {
    memory: Arc<Memory>,
    /// `None` for this rank's own.
    process: Option<OwnedFd>,
}

impl Peer {
    /// Whether the rank can publish nothing more.
    fn is_gone(&self) -> bool {
        let Some(process) = &self.process else { return false };
        // Readable once the process has ended.
        let mut ended = [PollFd::new(process, PollFlags::IN)];
        let now = rustix::fs::Timespec::default();
        self.memory.left().load(Ordering::Acquire) != 0
            || poll(&mut ended, Some(&now)).is_ok_and(|count| count > 0)
    }
}

/// Segments of all ranks of a group that share a host.
pub struct Exchange {
    /// By rank.
    peers: Vec<Peer>,
    /// Open as long as the others may still map it.
    _file: File,
    rank: usize,
    len: usize,
    /// Number of the round under way, from 1.
    round: u32,
}

impl Exchange {
    /// Maps the segments of all ranks, by the offers that they made, in the order of the ranks.
    ///
    /// # Errors
    /// [`Error::Fatal`] where one cannot be reached; then some other exchange has to serve.
    pub fn join(own: Segment, rank: usize, offers: &[[u64; OFFER_WORDS]]) -> Result<Exchange, Error> {
        let peers = offers.iter().enumerate().map(|(place, offer)| {
            if place == rank {
                Ok(Peer { memory: own.memory.clone(), process: None })
            } else {
                own.find(offer)
            }
        });
        let peers = peers.collect::<Result<Vec<_>, Error>>()?;
        if rank >= peers.len() {
            return Err(Error::Invalid(format!("rank {rank} of {}", peers.len())));
        }
        Ok(Exchange { peers, _file: own.file, rank, len: own.len, round: 1 })
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.peers.len()
    }

    /// Number of floats in a slot.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether a slot holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// This rank's slot of the round under way, to be written before [`Exchange::publish`].
    ///
    /// # Errors
    /// libtorch refused.
    pub fn own(&self) -> Result<Tensor, Error> {
        self.slot(self.rank)
    }

    /// Publishes this rank's slot.
    pub fn publish(&self) {
        let rounds = self.peers[self.rank].memory.rounds();
        // Release: whoever sees the number sees what was written before it.
        rounds.store(self.round, Ordering::Release);
        wake(rounds);
    }

    /// Waits until all ranks have published the round under way, calls `read` with their slots in the order
    /// of the ranks, and ends the round. The slots must not be used after `read`.
    ///
    /// # Errors
    /// [`Error::Timeout`]; [`Error::Aborted`] once `is_open` is false; [`Error::PeerLost`]; what `read`
    /// returns. After an error the ranks are out of step, and the exchange must not be used again.
    pub fn finish<T>(
        &mut self,
        timeout: Duration,
        is_open: impl Fn() -> bool,
        read: impl FnOnce(&[Tensor]) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let end = deadline(timeout);
        for (rank, peer) in self.peers.iter().enumerate() {
            self.await_round(peer, end, &is_open).map_err(|error| match error {
                Error::PeerLost(_) => Error::PeerLost(format!("rank {rank} has ended")),
                error => error,
            })?;
        }
        let slots = (0..self.world_size()).map(|rank| self.slot(rank)).collect::<Result<Vec<_>, Error>>()?;
        let result = read(&slots)?;
        // Numbers wrap after 2^32 rounds, which no group lives to see: a run would take years.
        self.round += 1;
        Ok(result)
    }

    fn await_round(&self, peer: &Peer, end: Instant, is_open: impl Fn() -> bool) -> Result<(), Error> {
        let (rounds, begun) = (peer.memory.rounds(), Instant::now());
        loop {
            let published = rounds.load(Ordering::Acquire);
            if published >= self.round {
                return Ok(());
            }
            let now = Instant::now();
            if !is_open() {
                return Err(Error::Aborted);
            }
            if now >= end {
                return Err(Error::Timeout);
            }
            if now - begun < SPIN {
                yield_now();
                continue;
            }
            // A rank that published and ended is not lost: its sums are there.
            if peer.is_gone() && rounds.load(Ordering::Acquire) < self.round {
                return Err(Error::PeerLost(String::new()));
            }
            let nap = NAP.min(end - now).try_into().expect("a short time");
            // Returns at once if the number has changed since it was read.
            let _ = futex::wait(rounds, futex::Flags::empty(), published, Some(&nap));
        }
    }

    /// Slot of a rank in the round under way, as a tensor that keeps its memory mapped.
    fn slot(&self, rank: usize) -> Result<Tensor, Error> {
        let memory = &self.peers[rank].memory;
        let place = HEAD + (self.round as usize % 2) * slot_bytes(self.len)?;
        let address = memory.start.as_ptr() as usize + place;
        crate::aten::owned(shim::floats_at(address, self.len, Box::new(Keep(memory.clone())))?)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        // Ranks that wait for this one learn at once that it publishes nothing more.
        let own = &self.peers[self.rank].memory;
        own.left().store(1, Ordering::Release);
        wake(own.rounds());
    }
}

/// Wakes the sleepers of all processes.
fn wake(word: &AtomicU32) {
    // Nobody to wake costs less than to know that nobody sleeps.
    let _ = futex::wake(word, futex::Flags::empty(), i32::MAX.unsigned_abs());
}

/// Length of a slot in bytes, in whole pages, so that each begins on a 64-byte boundary.
fn slot_bytes(len: usize) -> Result<usize, Error> {
    let bytes = len.checked_mul(4).and_then(|bytes| bytes.checked_next_multiple_of(4096));
    bytes.filter(|bytes| *bytes < 1 << 46).ok_or_else(|| Error::Invalid(format!("slots of {len} floats")))
}

fn size(len: usize) -> Result<usize, Error> {
    Ok(HEAD + 2 * slot_bytes(len)?)
}

fn failed(what: &str, error: std::io::Error) -> Error {
    Error::Fatal(format!("cannot {what} shared memory: {error}"))
}
