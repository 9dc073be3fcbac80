//! Timeline of a run (a trace), for ui.perfetto.dev and chrome://tracing.
//!
//! The file has the array form of Chrome's Trace Event Format, one event per line. The coordinator
//! creates it, and all its local workers append to it.
//!
//! 1. The file begins with a bracket and an event; each later line begins with a comma. So only the
//!    closing bracket is missing while processes write or after they were killed, and the format
//!    allows that.
//! 2. A process hands over whole lines, a block of them in one call, and the system appends each
//!    block to the file. No lock is shared between processes: a process that stands still delays no
//!    other.
//! 3. Times are whole microseconds of [`now`], rounded down. Consecutive slices share one reading
//!    of the clock, so slices of a track do not overlap.
//! 4. A trace never stops a run: when it cannot be written or has reached [`LIMIT`], that is logged
//!    once and the trace ends.
//! 5. An older trace stays until the first block of the new one is written.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use tempfile::Builder;

/// Approximate limit of a trace's size in bytes: viewers hold all of it in memory.
pub const LIMIT: u64 = 128 << 20;
/// Size in bytes at which a block of lines is handed over.
const BLOCK: usize = 16 << 10;
/// Upper bound of the number of tracks of a process.
const TRACKS: u32 = 8;

/// Current time of a clock that all processes of this machine share: `CLOCK_MONOTONIC`.
pub fn now() -> Duration {
    // In a release build a trace with zeros is better than a run that ends for it.
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    debug_assert!(time > Duration::ZERO, "every system has a monotonic clock");
    time
}

/// Writer of this process's part of a timeline; it may be off.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Shared>>);

struct Shared {
    path: PathBuf,
    pid: u32,
    limit: u64,
    /// Lock on the file, held by the process that created it. The system frees it when the process
    /// ends, however it ends.
    maker: Option<Flock<File>>,
    is_on: AtomicBool,
    sink: Mutex<Sink>,
}

struct Sink {
    file: File,
    block: Vec<u8>,
}

/// Track of the timeline: its slices follow each other or nest.
#[derive(Clone)]
pub struct Track {
    trace: Trace,
    number: u32,
}

/// Empty set of arguments.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Nothing {}

#[derive(Serialize)]
struct Event<'a, A> {
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
    ph: &'static str,
    ts: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<u64>,
    pid: u32,
    tid: u32,
    /// The last field, so that a viewer finds the others without reading past it.
    args: A,
}

impl<'a, A> Event<'a, A> {
    /// Event of a phase `ph`, a letter of the format. [`Trace::push`] fills process and thread in.
    fn at(time: Duration, ph: &'static str, name: &'a str, args: A) -> Event<'a, A> {
        Event { name, ph, ts: microseconds(time), dur: None, pid: 0, tid: 0, args }
    }
}

#[derive(Serialize)]
struct Name<'a> {
    name: &'a str,
}

/// Content of a file that shall become a trace.
enum Content {
    Nothing,
    /// Trace whose coordinator was killed.
    Unfinished,
    /// Trace that is finished, full or torn.
    Old,
    Other,
}

impl Trace {
    /// Returns a trace that writes nothing.
    pub fn off() -> Trace {
        Trace(None)
    }

    /// Creates the file for a process of that name and for those that [`join`](Trace::join) it. An
    /// unfinished trace is continued, an older one replaced.
    ///
    /// # Errors
    /// The file cannot be written, is not a trace, or another process has created it and still
    /// runs.
    pub fn create(path: &Path, process: &str) -> io::Result<Trace> {
        Trace::create_up_to(LIMIT, path, process)
    }

    fn create_up_to(limit: u64, path: &Path, process: &str) -> io::Result<Trace> {
        // The system moves to the end at each write, so that blocks of several processes do not
        // overwrite each other.
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let lock = lock(&file)?;
        let begins = match look(&mut file, limit)? {
            Content::Other => {
                return Err(wrong("the file is there and is no trace; choose another one"));
            }
            // The lock on the old file is held until the new one is in its place.
            Content::Old => return Trace::replace(limit, path, process),
            // The rest of a run whose coordinator was killed: the same timeline goes on.
            Content::Unfinished => false,
            Content::Nothing => true,
        };
        // Kept for as long as the trace, by its only creator.
        let trace = Trace::write_to(file, path, limit, Some(lock))?;
        if begins {
            trace.begin_file(process)?;
        } else {
            trace.name(process);
        }
        Ok(trace)
    }

    /// Creates the file beside an older trace, and puts it in its place once it has begun.
    fn replace(limit: u64, path: &Path, process: &str) -> io::Result<Trace> {
        // Of a link, the target.
        let path = path.canonicalize()?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let mut builder = Builder::new();
        builder.prefix(".trace.").suffix(".new").append(true);
        builder.permissions(std::fs::metadata(&path)?.permissions());
        let draft = builder.tempfile_in(folder)?;
        let file = draft.as_file().try_clone()?;
        let lock = lock(&file)?;
        let trace = Trace::write_to(file, &path, limit, Some(lock))?;
        trace.begin_file(process)?;
        draft.persist(&path)?;
        Ok(trace)
    }

    /// Appends to the file that another process has created.
    ///
    /// # Errors
    /// The file does not exist or cannot be written.
    pub fn join(path: &Path) -> io::Result<Trace> {
        let file = OpenOptions::new().append(true).open(path)?;
        Trace::write_to(file, path, LIMIT, None)
    }

    fn write_to(file: File, path: &Path, limit: u64, maker: Option<Flock<File>>) -> io::Result<Trace> {
        let shared = Shared {
            // Workers get the path, and may have another working directory.
            path: path.canonicalize()?,
            pid: std::process::id(),
            limit,
            maker,
            is_on: AtomicBool::new(true),
            sink: Mutex::new(Sink { file, block: Vec::with_capacity(2 * BLOCK) }),
        };
        Ok(Trace(Some(Arc::new(shared))))
    }

    fn begin_file(&self, process: &str) -> io::Result<()> {
        let Some(shared) = &self.0 else { return Ok(()) };
        self.name(process);
        let mut sink = shared.lock();
        // The first event has no comma before it.
        sink.block.splice(..1, *b"[\n");
        sink.hand_over().map(drop)
    }

    /// Path of the file; `None` if nothing is written.
    pub fn path(&self) -> Option<&Path> {
        self.writer().map(|shared| shared.path.as_path())
    }

    /// Sets the name of this process from now on.
    pub fn name(&self, process: &str) {
        self.push(0, Event::at(now(), "M", "process_name", Name { name: process }));
    }

    /// Returns a track of this process. Numbers are below 8.
    pub fn track(&self, number: u32, name: &str) -> Track {
        debug_assert!(number < TRACKS, "a process has few tracks");
        self.push(number, Event::at(now(), "M", "thread_name", Name { name }));
        Track { trace: self.clone(), number }
    }

    /// Hands over the buffered lines.
    pub fn flush(&self) {
        if let Some(shared) = self.writer() {
            shared.hand_over(&mut shared.lock());
        }
    }

    /// Ends this process's part. In the process that created the file it also closes the file: all
    /// other writers have ended by then.
    pub fn finish(&self) {
        let Some(shared) = self.writer() else { return };
        // Held to the end, so that no event of another thread comes behind the bracket.
        let mut sink = shared.lock();
        if shared.maker.is_some() {
            sink.block.extend(b"]\n");
        }
        shared.hand_over(&mut sink);
        // Nothing is ordered by it: the lock guards the file, and a late event is only lost.
        shared.is_on.store(false, Ordering::Relaxed);
    }

    fn writer(&self) -> Option<&Shared> {
        self.0.as_deref().filter(|shared| shared.is_on.load(Ordering::Relaxed))
    }

    fn push(&self, track: u32, mut event: Event<'_, impl Serialize>) {
        let Some(shared) = self.writer() else { return };
        event.pid = shared.pid;
        // Viewers expect thread ids to be unique on the whole machine.
        // Process ids are below 2^22 on Linux, so no number saturates.
        event.tid = shared.pid.saturating_mul(TRACKS).saturating_add(track);
        let mut sink = shared.lock();
        // The lock is held over the write of a full block, so that blocks keep their order.
        sink.add(&event);
        if sink.block.len() >= BLOCK {
            shared.hand_over(&mut sink);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Sink> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_over(&self, sink: &mut Sink) {
        let path = self.path.display();
        match sink.hand_over() {
            Ok(length) if length < self.limit => return,
            // All writers reach the limit; the creator of the file logs it for all.
            Ok(_) if self.maker.is_none() => {}
            Ok(_) => tracing::warn!(
                "the trace {path} is full at {} MiB and ends; the run goes on",
                self.limit >> 20
            ),
            Err(error) => tracing::warn!("the trace {path} ends: {error}; the run goes on"),
        }
        self.is_on.store(false, Ordering::Relaxed);
    }
}

impl Sink {
    fn add(&mut self, event: &impl Serialize) {
        let start = self.block.len();
        self.block.push(b',');
        match serde_json::to_writer(&mut self.block, event) {
            Ok(()) => self.block.push(b'\n'),
            // The arguments have no form in JSON: the event is dropped.
            Err(_) => self.block.truncate(start),
        }
    }

    /// Writes the block; returns the length of the file, to which other processes append as well.
    fn hand_over(&mut self) -> io::Result<u64> {
        // One call, so that the system appends the block as a whole (invariant 2).
        // `write_all` would go on after a part, perhaps behind another process's block.
        let (written, whole) = (self.file.write(&self.block), self.block.len());
        // Also after an error: the next block is complete by itself.
        self.block.clear();
        let length = self.file.metadata()?.len();
        let part = written?;
        if part == whole {
            return Ok(length);
        }
        // The disk is full. A torn line would spoil the file; cut it off if nobody has written
        // behind it.
        if self.file.stream_position()? == length {
            // If another process wrote at the same moment, the torn line stays: viewers pass over it, or
            // the trace ends there.
            self.file.set_len(length.saturating_sub(part as u64))?;
        }
        Err(io::ErrorKind::StorageFull.into())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A trace that has ended must not get a last block behind its bracket.
        if self.is_on.load(Ordering::Relaxed) {
            let _ = self.lock().hand_over();
        }
    }
}

impl Track {
    /// Whether events are written.
    pub fn is_on(&self) -> bool {
        self.trace.writer().is_some()
    }

    /// Begins a slice, nested in the one that is open.
    pub fn begin(&self, at: Duration, name: &str, args: impl Serialize) {
        self.trace.push(self.number, Event::at(at, "B", name, args));
    }

    /// Ends the slice that began last.
    pub fn end(&self, at: Duration) {
        self.trace.push(self.number, Event::at(at, "E", "", Nothing {}));
    }

    /// Adds a slice that is over. Slices of less than a microsecond are left out.
    pub fn slice(&self, from: Duration, until: Duration, name: &str, args: impl Serialize) {
        // Rounded ends that are equal would be shown as an instant, which nests in none.
        let length = microseconds(until).saturating_sub(microseconds(from));
        if self.is_on() && length > 0 {
            self.trace.push(self.number, Event { dur: Some(length), ..Event::at(from, "X", name, args) });
        }
    }

    /// Runs `work` and adds its slice.
    pub fn during<T>(&self, name: &str, args: impl Serialize, work: impl FnOnce() -> T) -> T {
        if !self.is_on() {
            return work();
        }
        let begun = now();
        let done = work();
        self.slice(begun, now(), name, args);
        done
    }

    /// Adds an event at the current time.
    pub fn instant(&self, name: &str, args: impl Serialize) {
        self.trace.push(self.number, Event::at(now(), "i", name, args));
    }

    /// Sets the current values of a curve: numbers by name.
    pub fn values(&self, curve: &str, values: impl Serialize) {
        self.trace.push(self.number, Event::at(now(), "C", curve, values));
    }

    /// Hands over the buffered lines of all tracks.
    pub fn flush(&self) {
        self.trace.flush();
    }
}

/// Error of a file that the user should not have chosen.
fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// Locks a file for its creator. A coordinator that still runs is not waited for: the user chose the
/// same file twice.
fn lock(file: &File) -> io::Result<Flock<File>> {
    Flock::lock(file.try_clone()?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => wrong("another process writes a trace there; choose another file"),
        _ => wrong(&format!("it cannot be locked ({errno}); choose a file on another file system")),
    })
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn look(file: &mut File, limit: u64) -> io::Result<Content> {
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(wrong("not a regular file, which several processes can write to; choose another one"));
    }
    if about.len() == 0 {
        return Ok(Content::Nothing);
    }
    let (mut first, mut last) = (Vec::new(), Vec::new());
    file.seek(SeekFrom::Start(0))?;
    // An event follows at once, so these three bytes are never another JSON file's by chance.
    file.take(3).read_to_end(&mut first)?;
    file.seek(SeekFrom::Start(about.len().saturating_sub(2)))?;
    file.take(2).read_to_end(&mut last)?;
    Ok(match (first.as_slice(), last.as_slice()) {
        // Whole lines to the end: nothing was torn, and it was not finished.
        (b"[\n{", b"}\n") if about.len() < limit => Content::Unfinished,
        (b"[\n{", _) => Content::Old,
        _ => Content::Other,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn file() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        (folder, path)
    }

    fn events(text: &str) -> Vec<Value> {
        serde_json::from_str(text).unwrap()
    }

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    fn us(microseconds: u64) -> Duration {
        Duration::from_micros(microseconds)
    }

    #[test]
    fn a_finished_trace_is_json() {
        let (_folder, path) = file();
        let trace = Trace::create(&path, "coordinator").unwrap();
        let track = trace.track(1, "events");
        track.begin(us(10), "step 1", json!({ "generation": 2 }));
        track.slice(us(10), us(17), "compute \"it\"\n", Nothing {});
        track.slice(us(17), us(17) + Duration::from_nanos(900), "too short", Nothing {});
        track.end(us(20));
        track.instant("plan", json!({ "detail": f64::NAN }));
        track.values("loss", json!({ "generator": 0.5 }));
        assert_eq!(track.during("work", Nothing {}, || 5), 5);
        trace.finish();
        track.instant("too late", Nothing {});
        let events = events(&read(&path));
        let kinds: Vec<&str> = events.iter().map(|event| event["ph"].as_str().unwrap()).collect();
        assert_eq!(kinds[..7], ["M", "M", "B", "X", "E", "i", "C"]);
        assert_eq!(events[0]["args"]["name"], "coordinator");
        assert_eq!((&events[3]["ts"], &events[3]["dur"]), (&json!(10), &json!(7)));
        assert_eq!(events[2]["args"]["generation"], 2);
        assert!(events[1..].iter().all(|event| event["tid"] == events[1]["tid"]), "of one track");
    }

    /// Invariant 1. Nothing is flushed by hand: the lines buffered at the kill are lost, as whole
    /// lines.
    #[test]
    fn after_a_kill_only_the_closing_bracket_is_missing() {
        let (_folder, path) = file();
        let trace = Trace::create(&path, "coordinator").unwrap();
        let track = trace.track(1, "events");
        for _ in 0..1000 {
            track.instant("plan", Nothing {});
        }
        let events = events(&format!("{}]", read(&path)));
        assert!((100..1000).contains(&events.len()), "{}", events.len());
    }

    /// Invariant 2, with a file handle of its own for each writer, as processes have.
    #[test]
    fn many_writers_keep_each_others_lines_whole() {
        let (_folder, path) = file();
        let trace = Trace::create(&path, "coordinator").unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    let trace = Trace::join(path).unwrap();
                    let track = trace.track(writer, "training");
                    (0..2000).for_each(|number| track.instant("step", json!({ "number": number })));
                    trace.finish();
                });
            }
        });
        trace.finish();
        let events = events(&read(&path));
        assert_eq!(events.len(), 1 + 4 * 2001);
        for writer in 0..4 {
            let own = events.iter().filter(|event| event["tid"] == std::process::id() * TRACKS + writer);
            let numbers: Vec<u64> = own.filter_map(|event| event["args"]["number"].as_u64()).collect();
            assert!(numbers.iter().copied().eq(0..2000));
        }
    }

    #[test]
    fn an_unfinished_trace_is_continued_and_an_older_one_replaced() {
        let (_folder, path) = file();
        drop(Trace::create(&path, "first").unwrap());
        let second = Trace::create(&path, "second").unwrap();
        assert!(Trace::create(&path, "third").is_err(), "the second one runs");
        second.finish();
        drop(second);
        assert_eq!(events(&read(&path)).len(), 2);
        Trace::create(&path, "third").unwrap().finish();
        assert_eq!(events(&read(&path)).len(), 1);
        std::fs::write(&path, "[\n{\"name\":\"torn").unwrap();
        Trace::create(&path, "fourth").unwrap().finish();
        assert_eq!(events(&read(&path)).len(), 1);
    }

    #[test]
    fn what_is_no_trace_is_left_alone() {
        let (folder, path) = file();
        std::fs::write(&path, "[job]\nname = \"mine\"\n").unwrap();
        assert!(Trace::create(&path, "coordinator").is_err());
        assert_eq!(read(&path), "[job]\nname = \"mine\"\n");
        assert!(Trace::create(folder.path(), "coordinator").is_err());
        assert!(Trace::create(Path::new("/dev/null"), "coordinator").is_err());
        assert!(Trace::join(&folder.path().join("missing")).is_err());
    }

    /// Invariant 4.
    #[test]
    fn a_full_trace_ends_and_is_no_more_than_that() {
        let (_folder, path) = file();
        let trace = Trace::create_up_to(100 << 10, &path, "coordinator").unwrap();
        let track = trace.track(1, "events");
        let mut written = 0;
        while track.is_on() {
            track.instant("step", json!({ "number": written }));
            written += 1;
            assert!(written < 10_000);
        }
        let text = read(&path);
        assert!((100 << 10..(100 << 10) + 2 * BLOCK).contains(&text.len()), "{}", text.len());
        trace.finish();
        assert_eq!(events(&format!("{text}]")).len(), 2 + written);
        assert_eq!(Trace::off().path(), None);
    }

    /// Invariant 5. A limit on the size of files stands for a disk that is full.
    #[test]
    fn an_older_trace_stays_where_a_new_one_cannot_begin() {
        let (folder, path) = file();
        Trace::create(&path, "first").unwrap().finish();
        let old = read(&path);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        Trace::create(&link, "second").unwrap().finish();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(events(&read(&path))[0]["args"]["name"], "second");
        assert_ne!(read(&path), old);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "and no draft is left");
    }

    /// Invariant 4, where the system refuses to write.
    #[test]
    fn a_trace_that_cannot_be_written_ends() {
        let trace = Trace::write_to(File::open("/dev/null").unwrap(), Path::new("/dev/null"), LIMIT, None);
        let track = trace.unwrap().track(1, "events");
        track.flush();
        assert!(!track.is_on());
    }
}
