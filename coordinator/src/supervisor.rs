//! The workers that run on the coordinator's machine because a coordinator of this run started them.
//!
//! 1. A worker runs in a process group of its own, so an interrupt from the terminal reaches the coordinator alone.
//! 2. Each has a token that it shows in its hello; nobody else can take its place. The token is journaled before the
//!    process exists, so a later coordinator knows it.
//! 3. A worker outlives a crash of its coordinator; the next one takes it over, by process number and time of start.
//! 4. What a worker writes goes to the coordinator's log with the worker's rank. One that was taken over has lost its
//!    pipe: what it has to say of itself it says in its session.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ganglion_membership::WorkerId;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::mpsc::UnboundedSender;

use crate::journal::ChildRow;

/// How long a worker that was told to exit may take.
pub const EXIT_LIMIT: Duration = Duration::from_secs(10);

/// A worker's process ended.
#[derive(Debug)]
pub struct Exited {
    /// Its token.
    pub token: String,
    /// Its process.
    pub pid: u32,
    /// How, for people.
    pub status: String,
    /// Whether it says that the user's input is wrong.
    pub input_error: bool,
}

/// Starts workers and watches them.
pub struct Supervisor {
    program: PathBuf,
    exits: UnboundedSender<Exited>,
    children: BTreeMap<String, ChildHandle>,
}

struct ChildHandle {
    /// The process itself: its number may be given to another once it was reaped.
    process: Option<Arc<OwnedFd>>,
    /// Its number on this machine, by which it chooses a GPU.
    local_rank: u32,
    name: Arc<Mutex<String>>,
    worker: Option<WorkerId>,
    /// Whether this coordinator gave it that number, or knows it by it.
    numbered: bool,
}

/// A process that was started.
pub struct Spawned {
    /// Its number.
    pub pid: u32,
    /// When it was started, by the system's clock.
    pub started: u64,
}

impl Supervisor {
    /// Ends of processes go to `exits`.
    pub fn new(exits: UnboundedSender<Exited>) -> io::Result<Supervisor> {
        let own = std::env::current_exe()?.canonicalize()?;
        Ok(Supervisor { program: own.with_file_name("worker"), exits, children: BTreeMap::new() })
    }

    /// Whether the `worker` program is where it is looked for, next to this one.
    pub fn check_program(&self) -> io::Result<()> {
        if self.program.is_file() {
            return Ok(());
        }
        let what =
            format!("{}: no such program; build it with `cargo build --release`", self.program.display());
        Err(io::Error::new(io::ErrorKind::NotFound, what))
    }

    /// The lowest number on this machine that no worker has.
    pub fn free_rank(&self) -> u32 {
        let taken: Vec<u32> = self.children.values().map(|child| child.local_rank).collect();
        (0..).find(|rank| !taken.contains(rank)).expect("there are fewer children than numbers")
    }

    /// Starts a worker that connects to `url`.
    pub fn spawn(&mut self, url: &str, token: String, local_rank: u32) -> io::Result<Spawned> {
        self.check_program()?;
        let mut child = Command::new(&self.program)
            .args(["--coordinator", url])
            .env("GANGLION_SPAWN_TOKEN", &token)
            .env("LOCAL_RANK", local_rank.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let pid = child.id().unwrap_or_default();
        let name = Arc::new(Mutex::new(format!("local worker {local_rank}")));
        let lines = child.stderr.take();
        let handle = ChildHandle {
            process: open(pid).map(Arc::new),
            local_rank,
            name: name.clone(),
            worker: None,
            numbered: false,
        };
        self.children.insert(token.clone(), handle);
        tokio::spawn(watch(child, lines, name, token, self.exits.clone()));
        Ok(Spawned { pid, started: start_time(pid).unwrap_or_default() })
    }

    /// Takes over a process of an earlier coordinator; returns whether it still runs.
    pub fn adopt(&mut self, row: &ChildRow) -> bool {
        let Some((pid, started)) = row.process else { return false };
        // First the handle, then the look at the clock: the number cannot be given to another in between.
        let Some(process) = open(pid).map(Arc::new) else { return false };
        if row.ended || start_time(pid) != Some(started) {
            return false;
        }
        let handle = ChildHandle {
            process: Some(process.clone()),
            local_rank: row.local_rank,
            name: Arc::default(),
            worker: row.worker,
            numbered: false,
        };
        self.children.insert(row.token.clone(), handle);
        tokio::spawn(watch_adopted(process, pid, row.token.clone(), self.exits.clone()));
        true
    }

    /// Notes which worker showed `token`; returns whether it is one of ours.
    pub fn claim(&mut self, token: &str, worker: WorkerId) -> bool {
        let Some(child) = self.children.get_mut(token) else { return false };
        (child.worker, child.numbered) = (Some(worker), true);
        true
    }

    /// The number that the process with `token` has for this coordinator, if it said hello before.
    pub fn number(&self, token: &str) -> Option<WorkerId> {
        self.children.get(token).filter(|child| child.numbered)?.worker
    }

    /// Names a worker in the log from now on.
    pub fn rename(&self, worker: WorkerId, name: &str) {
        let child = self.children.values().find(|child| child.worker == Some(worker));
        if let Some(child) = child {
            *child.name.lock().unwrap_or_else(PoisonError::into_inner) = name.to_string();
        }
    }

    /// Whether whoever shows `token` may be `worker`: if that is one of ours, only with its own.
    pub fn may_be(&self, worker: WorkerId, token: Option<&str>) -> bool {
        let mut tokens = self.children.iter().filter(|(_, child)| child.worker == Some(worker));
        tokens.next().is_none_or(|(own, _)| Some(own.as_str()) == token)
    }

    /// Takes note of an exit; returns the worker that it was, if it had said hello.
    pub fn reaped(&mut self, token: &str) -> Option<WorkerId> {
        self.children.remove(token).and_then(|child| child.worker)
    }

    /// Kills a worker if it is ours.
    pub fn kill(&self, worker: WorkerId) {
        self.children.values().filter(|child| child.worker == Some(worker)).for_each(ChildHandle::kill);
    }

    /// Asks all to end by themselves.
    pub fn ask_all_to_end(&self) {
        for process in self.children.values().filter_map(|child| child.process.as_ref()) {
            let _ = pidfd_send_signal(process, Signal::TERM);
        }
    }

    /// Kills all that are left.
    pub fn kill_all(&self) {
        self.children.values().for_each(ChildHandle::kill);
    }

    /// Whether a worker is ours.
    pub fn has(&self, worker: WorkerId) -> bool {
        self.children.values().any(|child| child.worker == Some(worker))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.children.len()
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.children.is_empty()
    }
}

impl ChildHandle {
    fn kill(&self) {
        if let Some(process) = &self.process {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }
}

fn open(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::NONBLOCK).ok()
}

/// When a process was started, in the system's ticks since it booted. See proc(5), /proc/pid/stat, field 22.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// Follows one child: its log lines, then its end.
async fn watch(
    mut child: Child,
    lines: Option<ChildStderr>,
    name: Arc<Mutex<String>>,
    token: String,
    exits: UnboundedSender<Exited>,
) {
    let mut last_words = None;
    if let Some(lines) = lines {
        let mut lines = BufReader::new(lines).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let name = name.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(error) = forward(&name, &line) {
                last_words = Some(error);
            }
        }
    }
    let pid = child.id().unwrap_or_default();
    let status = child.wait().await;
    let input_error = status.as_ref().is_ok_and(|status| status.code() == Some(2));
    let mut status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
    if let Some(words) = last_words {
        status = format!("{status}: {words}");
    }
    let _ = exits.send(Exited { token, pid, status, input_error });
}

/// Waits for the end of a process that is not a child of this one. Its exit status is for its parent alone.
async fn watch_adopted(process: Arc<OwnedFd>, pid: u32, token: String, exits: UnboundedSender<Exited>) {
    let wait = move || {
        let mut ends = [PollFd::new(&process, PollFlags::IN)];
        while poll(&mut ends, None) == Err(Errno::INTR) {}
    };
    let _ = tokio::task::spawn_blocking(wait).await;
    let status = "an unknown status: it was started by an earlier coordinator".to_string();
    let _ = exits.send(Exited { token, pid, status, input_error: false });
}

/// Logs a worker's line at the level that the worker gave it; returns the text of an error.
fn forward(name: &str, line: &str) -> Option<String> {
    let (level, text) = line.trim_start().split_once(' ').unwrap_or(("", line));
    let text = text.trim();
    match level {
        "ERROR" => {
            // It is told once, as the reason why the worker ended.
            tracing::debug!(worker = name, "{text}");
            return Some(text.to_string());
        }
        "WARN" => tracing::warn!(worker = name, "{text}"),
        "INFO" => tracing::info!(worker = name, "{text}"),
        "DEBUG" | "TRACE" => tracing::debug!(worker = name, "{text}"),
        _ => tracing::warn!(worker = name, "{}", line.trim_end()),
    }
    None
}

/// A token that nobody can guess.
pub fn new_token() -> io::Result<String> {
    let mut bytes = [0u8; 16];
    std::io::Read::read_exact(&mut std::fs::File::open(Path::new("/dev/urandom"))?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pid: u32, started: u64) -> ChildRow {
        ChildRow {
            token: "t".to_string(),
            local_rank: 1,
            process: Some((pid, started)),
            worker: Some(WorkerId(7)),
            ended: false,
        }
    }

    #[tokio::test]
    async fn a_process_of_an_earlier_coordinator_is_known_by_number_and_start() {
        let mut process = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = process.id();
        let started = start_time(pid).unwrap();
        let (exits, mut exited) = tokio::sync::mpsc::unbounded_channel();
        let mut supervisor = Supervisor::new(exits).unwrap();
        assert!(!supervisor.adopt(&row(pid, started + 1)), "another process has its number now");
        assert!(supervisor.adopt(&row(pid, started)));
        assert_eq!(supervisor.free_rank(), 0);
        supervisor.kill(WorkerId(7));
        let exit = exited.recv().await.unwrap();
        assert_eq!((supervisor.reaped(&exit.token), exit.pid), (Some(WorkerId(7)), pid));
        process.wait().unwrap();
        assert!(!supervisor.adopt(&row(pid, started)), "it has ended");
    }
}
