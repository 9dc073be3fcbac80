//! Supervision of local workers: processes that a coordinator of this run started on this machine.
//!
//! 1. A worker runs in a process group of its own, so an interrupt from the terminal reaches the
//!    coordinator alone.
//! 2. Each worker has a token that it sends in its hello; no other process can take its place. The
//!    token is journaled before the process exists, so a later coordinator knows it.
//! 3. A worker outlives a crash of its coordinator; the next one on that machine adopts it, by
//!    process number and time of start. A coordinator on another machine can neither adopt it nor
//!    see it end: there it is a worker like any remote one.
//! 4. The output of a worker goes to the coordinator's log with the worker's rank. An adopted
//!    worker has lost its pipe: it reports in its session.

mod processes;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ganglion_membership::WorkerId;
use tokio::sync::mpsc::UnboundedSender;

use crate::journal::{ChildRow, Spawned};
use crate::system::node::{Node, Relation};
pub use processes::{SystemProcesses, worker_program};

/// Time limit for a worker to exit after it was asked to.
pub const EXIT_LIMIT: Duration = Duration::from_secs(10);

/// Exit of a worker's process.
#[derive(Debug)]
pub struct Exited {
    /// Token of the worker.
    pub token: String,
    /// Process number.
    pub pid: u32,
    /// Exit status as text, diagnostic only.
    pub status: String,
    /// Whether the exit code reports a mistake in the user's input.
    pub input_error: bool,
}

/// Access to the processes of a machine.
pub trait Processes: Send {
    /// Checks that the `worker` program can be started.
    fn check_program(&self) -> io::Result<()>;
    /// Number of GPUs that the `worker` program can use here.
    fn count_gpus(&self) -> io::Result<u32>;
    /// Starts a worker.
    fn start(&mut self, order: StartOrder) -> io::Result<(Box<dyn Process>, Spawned)>;
    /// Looks up a worker that was started before, and reports its exit to `exits` as well; `None`
    /// if it has ended.
    fn find(
        &mut self,
        token: &str,
        process: Spawned,
        exits: UnboundedSender<Exited>,
    ) -> Option<Box<dyn Process>>;
}

/// Handle of a process. A process number alone may be reused once the process was reaped.
pub trait Process: Send {
    /// Kills the process at once.
    fn kill(&self);
    /// Asks the process to end by itself.
    fn ask_to_end(&self);
}

/// Parameters of a worker process.
pub struct StartOrder {
    /// Address of the coordinator.
    pub url: String,
    /// Token that the worker sends in its hello.
    pub token: String,
    /// Local rank, by which the worker chooses a GPU.
    pub local_rank: u32,
    /// Trace file to append to.
    pub trace: Option<PathBuf>,
    /// Environment variables, in addition to those of this process.
    pub environment: Vec<(&'static str, OsString)>,
    /// Label of the worker's lines in the log.
    pub name: Arc<Mutex<String>>,
    /// Receives the exit of the process.
    pub exits: UnboundedSender<Exited>,
}

/// Starts local workers and follows them.
pub struct Supervisor {
    processes: Box<dyn Processes>,
    exits: UnboundedSender<Exited>,
    children: BTreeMap<String, ChildHandle>,
    /// Workers of earlier coordinators on other machines, by token.
    elsewhere: BTreeMap<String, Option<WorkerId>>,
    /// Environment variables for new workers.
    pub environment: Vec<(&'static str, OsString)>,
}

/// Result of adopting a process of an earlier coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adoption {
    /// Running, and followed from now on.
    Runs,
    /// Ended.
    Ended,
    /// On another machine; its state is unknown.
    Elsewhere,
}

struct ChildHandle {
    process: Box<dyn Process>,
    local_rank: u32,
    name: Arc<Mutex<String>>,
    worker: Option<WorkerId>,
    /// Whether this coordinator assigned the worker's number, or has learned it from a hello.
    numbered: bool,
}

impl Supervisor {
    /// Creates a supervisor without workers. Exits of processes are sent to `exits`.
    pub fn new(processes: Box<dyn Processes>, exits: UnboundedSender<Exited>) -> Supervisor {
        Supervisor {
            processes,
            exits,
            children: BTreeMap::new(),
            elsewhere: BTreeMap::new(),
            environment: Vec::new(),
        }
    }

    /// Checks that the `worker` program can be started.
    pub fn check_program(&self) -> io::Result<()> {
        self.processes.check_program()
    }

    /// Lowest local rank that no worker has.
    pub fn free_rank(&self) -> u32 {
        let taken: Vec<u32> = self.children.values().map(|child| child.local_rank).collect();
        (0..).find(|rank| !taken.contains(rank)).expect("there are fewer children than numbers")
    }

    /// Starts a worker that connects to `url` and appends to `trace`, if there is one.
    pub fn spawn(
        &mut self,
        url: &str,
        token: String,
        local_rank: u32,
        trace: Option<&Path>,
    ) -> io::Result<Spawned> {
        // A name for the lines before the worker has a rank.
        let name = Arc::new(Mutex::new(format!("local worker {local_rank}")));
        let order = StartOrder {
            url: url.to_string(),
            token: token.clone(),
            local_rank,
            trace: trace.map(Path::to_path_buf),
            // Secrets go this way as names of files: a command line is readable by all users of the
            // machine.
            environment: self.environment.clone(),
            name: name.clone(),
            exits: self.exits.clone(),
        };
        let (process, spawned) = self.processes.start(order)?;
        let handle = ChildHandle { process, local_rank, name, worker: None, numbered: false };
        self.children.insert(token, handle);
        Ok(spawned)
    }

    /// Adopts a process of an earlier coordinator, if it runs on this machine.
    pub fn adopt(&mut self, row: &ChildRow, here: &Node) -> Adoption {
        // Without a process number there is nothing to look up. Such a process, if it exists, says hello
        // with its token.
        let Some(spawned) = row.process.filter(|_| !row.ended) else { return Adoption::Ended };
        // A process number means nothing on another boot or in another container.
        match here.relation(&row.node) {
            Relation::Same => {}
            Relation::Before => return Adoption::Ended,
            // Remembered by its token, so that it may say hello here although nobody can look it up.
            Relation::Elsewhere => {
                self.elsewhere.insert(row.token.clone(), row.worker);
                return Adoption::Elsewhere;
            }
        }
        let Some(process) = self.processes.find(&row.token, spawned, self.exits.clone()) else {
            return Adoption::Ended;
        };
        let handle = ChildHandle {
            process,
            local_rank: row.local_rank,
            name: Arc::default(),
            worker: row.worker,
            // It has not said hello here: a hello without a number to resume is not yet a second one.
            numbered: false,
        };
        self.children.insert(row.token.clone(), handle);
        Adoption::Runs
    }

    /// Notes which worker sent `token`; returns whether it is a local one.
    pub fn claim(&mut self, token: &str, worker: WorkerId) -> bool {
        let Some(child) = self.children.get_mut(token) else { return false };
        (child.worker, child.numbered) = (Some(worker), true);
        true
    }

    /// Worker number of the process with `token`, if it has said hello to this coordinator.
    pub fn number(&self, token: &str) -> Option<WorkerId> {
        self.children.get(token).filter(|child| child.numbered)?.worker
    }

    /// Sets the label of a worker in the log.
    pub fn rename(&self, worker: WorkerId, name: &str) {
        let child = self.children.values().find(|child| child.worker == Some(worker));
        if let Some(child) = child {
            // Held for one assignment. The reader of the worker's log takes it for one copy a line.
            *child.name.lock().unwrap_or_else(PoisonError::into_inner) = name.to_string();
        }
    }

    /// Whether a client with `token` may act as `worker`: a local worker must show its own token.
    pub fn may_be(&self, worker: WorkerId, token: Option<&str>) -> bool {
        let here = self.children.iter().map(|(token, child)| (token, child.worker));
        let elsewhere = self.elsewhere.iter().map(|(token, worker)| (token, *worker));
        let mut tokens = here.chain(elsewhere).filter(|(_, own)| *own == Some(worker));
        // A number without a token belongs to a worker that no coordinator started; for that one the
        // guard's credentials are enough.
        tokens.next().is_none_or(|(own, _)| Some(own.as_str()) == token)
    }

    /// Whether `token` belongs to a local worker, or to one that an earlier coordinator started on
    /// another machine.
    pub fn has_token(&self, token: &str) -> bool {
        self.children.contains_key(token) || self.elsewhere.contains_key(token)
    }

    /// Removes a process that exited; returns its worker, if it had said hello.
    pub fn reaped(&mut self, token: &str) -> Option<WorkerId> {
        self.children.remove(token).and_then(|child| child.worker)
    }

    /// Kills a worker if it is a local one.
    pub fn kill(&self, worker: WorkerId) {
        self.children
            .values()
            .filter(|child| child.worker == Some(worker))
            .for_each(|child| child.process.kill());
    }

    /// Asks all local workers to end by themselves.
    pub fn ask_all_to_end(&self) {
        self.children.values().for_each(|child| child.process.ask_to_end());
    }

    /// Kills all remaining local workers.
    pub fn kill_all(&self) {
        self.children.values().for_each(|child| child.process.kill());
    }

    /// Whether a worker is a local one.
    pub fn has(&self, worker: WorkerId) -> bool {
        self.children.values().any(|child| child.worker == Some(worker))
    }

    /// Number of local workers.
    pub fn len(&self) -> usize {
        self.children.len()
    }

    /// Whether no local worker is left.
    pub fn is_empty(&self) -> bool {
        self.children.is_empty()
    }
}

/// Generates a token that cannot be guessed.
pub fn new_token() -> io::Result<String> {
    // 128 bits, from the kernel: no number of guesses finds one.
    let mut bytes = [0u8; 16];
    std::io::Read::read_exact(&mut std::fs::File::open(Path::new("/dev/urandom"))?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
