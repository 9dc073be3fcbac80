//! The workers that this coordinator starts itself.
//!
//! 1. A worker runs in a process group of its own, so an interrupt from the terminal reaches the coordinator alone.
//! 2. Each has a token that it shows in its hello; nobody else can take its place.
//! 3. Nothing a worker writes is lost: each line goes to the coordinator's log with the worker's rank.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ganglion_membership::WorkerId;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::mpsc::UnboundedSender;

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
    pid: u32,
    /// Its number on this machine, by which it chooses a GPU.
    local_rank: u32,
    name: Arc<Mutex<String>>,
    worker: Option<WorkerId>,
}

impl Supervisor {
    /// Finds the `worker` program next to this one. Ends of processes go to `exits`.
    pub fn new(exits: UnboundedSender<Exited>) -> io::Result<Supervisor> {
        let own = std::env::current_exe()?.canonicalize()?;
        let program = own.with_file_name("worker");
        if !program.is_file() {
            let what =
                format!("{}: no such program; build it with `cargo build --release`", program.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, what));
        }
        Ok(Supervisor { program, exits, children: BTreeMap::new() })
    }

    /// Starts a worker that connects to `url`; returns its process and its number on this machine, the lowest free one.
    pub fn spawn(&mut self, url: &str) -> io::Result<(u32, u32)> {
        let token = new_token()?;
        let taken: Vec<u32> = self.children.values().map(|child| child.local_rank).collect();
        let local_rank =
            (0..).find(|rank| !taken.contains(rank)).expect("there are fewer children than numbers");
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
        self.children
            .insert(token.clone(), ChildHandle { pid, local_rank, name: name.clone(), worker: None });
        tokio::spawn(watch(child, lines, name, token, self.exits.clone()));
        Ok((pid, local_rank))
    }

    /// Notes which worker showed `token`; returns whether it is one of ours and still alone with it.
    pub fn claim(&mut self, token: &str, worker: WorkerId) -> bool {
        match self.children.get_mut(token) {
            Some(child) if child.worker.is_none() => {
                child.worker = Some(worker);
                true
            }
            _ => false,
        }
    }

    /// Names a worker in the log from now on.
    pub fn rename(&self, worker: WorkerId, name: &str) {
        let child = self.children.values().find(|child| child.worker == Some(worker));
        if let Some(child) = child {
            *child.name.lock().unwrap_or_else(PoisonError::into_inner) = name.to_string();
        }
    }

    /// Takes note of an exit; returns the worker that it was, if it had said hello.
    pub fn reaped(&mut self, token: &str) -> Option<WorkerId> {
        self.children.remove(token).and_then(|child| child.worker)
    }

    /// Kills a worker if it is ours.
    pub fn kill(&self, worker: WorkerId) {
        let ours = self.children.values().filter(|child| child.worker == Some(worker));
        ours.for_each(|child| signal(child.pid, Signal::SIGKILL));
    }

    /// Kills all that are left.
    pub fn kill_all(&self) {
        self.children.values().for_each(|child| signal(child.pid, Signal::SIGKILL));
    }

    /// Whether any is left.
    pub fn is_empty(&self) -> bool {
        self.children.is_empty()
    }
}

fn signal(pid: u32, signal: Signal) {
    // A child keeps its number until it is reaped, and a reaped child is not in the table.
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
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
