//! The workers that run on the coordinator's machine because a coordinator of this run started them.
//!
//! 1. A worker runs in a process group of its own, so an interrupt from the terminal reaches the coordinator
//!    alone.
//! 2. Each has a token that it shows in its hello; nobody else can take its place. The token is journaled
//!    before the process exists, so a later coordinator knows it.
//! 3. A worker outlives a crash of its coordinator; the next one on that machine takes it over, by process
//!    number and time of start. One on another machine can neither do that nor see it end: there it is a
//!    worker like those of others.
//! 4. What a worker writes goes to the coordinator's log with the worker's rank. One that was taken over has
//!    lost its pipe: what it has to say of itself it says in its session.

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
use crate::node::{Node, Relation};
pub use processes::{SystemProcesses, worker_program};

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

/// The processes of a machine.
pub trait Processes: Send {
    /// Whether the `worker` program can be started.
    fn check_program(&self) -> io::Result<()>;
    /// How many GPUs the `worker` program can use here.
    fn count_gpus(&self) -> io::Result<u32>;
    /// Starts a worker.
    fn start(&mut self, order: StartOrder) -> io::Result<(Box<dyn Process>, Spawned)>;
    /// Finds a worker that was started before, and tells `exits` of its end as well; `None` if it has ended.
    fn find(
        &mut self,
        token: &str,
        process: Spawned,
        exits: UnboundedSender<Exited>,
    ) -> Option<Box<dyn Process>>;
}

/// A process that a handle is held of: its number may be given to another once it was reaped.
pub trait Process: Send {
    /// Ends it at once.
    fn kill(&self);
    /// Asks it to end by itself.
    fn ask_to_end(&self);
}

/// What a worker is started with.
pub struct StartOrder {
    /// Where it finds the coordinator.
    pub url: String,
    /// What it shows in its hello.
    pub token: String,
    /// Its number on this machine, by which it chooses a GPU.
    pub local_rank: u32,
    /// Where it adds to a trace.
    pub trace: Option<PathBuf>,
    /// Variables of its environment, besides those of this process.
    pub environment: Vec<(&'static str, OsString)>,
    /// What its lines in the log are marked with.
    pub name: Arc<Mutex<String>>,
    /// Where its end is told.
    pub exits: UnboundedSender<Exited>,
}

/// Starts workers and watches them.
pub struct Supervisor {
    processes: Box<dyn Processes>,
    exits: UnboundedSender<Exited>,
    children: BTreeMap<String, ChildHandle>,
    /// Workers of earlier coordinators on other machines, by token.
    elsewhere: BTreeMap<String, Option<WorkerId>>,
    /// Variables that workers find in their environment.
    pub environment: Vec<(&'static str, OsString)>,
}

/// Fate of a process of an earlier coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adoption {
    /// Running, and watched from now on.
    Runs,
    /// Ended.
    Ended,
    /// On another machine: whether it runs will show.
    Elsewhere,
}

struct ChildHandle {
    process: Box<dyn Process>,
    local_rank: u32,
    name: Arc<Mutex<String>>,
    worker: Option<WorkerId>,
    /// Whether this coordinator gave it that number, or knows it by it.
    numbered: bool,
}

impl Supervisor {
    /// Ends of processes go to `exits`.
    pub fn new(processes: Box<dyn Processes>, exits: UnboundedSender<Exited>) -> Supervisor {
        Supervisor {
            processes,
            exits,
            children: BTreeMap::new(),
            elsewhere: BTreeMap::new(),
            environment: Vec::new(),
        }
    }

    /// Whether the `worker` program can be started.
    pub fn check_program(&self) -> io::Result<()> {
        self.processes.check_program()
    }

    /// The lowest number on this machine that no worker has.
    pub fn free_rank(&self) -> u32 {
        let taken: Vec<u32> = self.children.values().map(|child| child.local_rank).collect();
        (0..).find(|rank| !taken.contains(rank)).expect("there are fewer children than numbers")
    }

    /// Starts a worker that connects to `url` and adds to a trace, if there is one.
    pub fn spawn(
        &mut self,
        url: &str,
        token: String,
        local_rank: u32,
        trace: Option<&Path>,
    ) -> io::Result<Spawned> {
        let name = Arc::new(Mutex::new(format!("local worker {local_rank}")));
        let order = StartOrder {
            url: url.to_string(),
            token: token.clone(),
            local_rank,
            trace: trace.map(Path::to_path_buf),
            environment: self.environment.clone(),
            name: name.clone(),
            exits: self.exits.clone(),
        };
        let (process, spawned) = self.processes.start(order)?;
        let handle = ChildHandle { process, local_rank, name, worker: None, numbered: false };
        self.children.insert(token, handle);
        Ok(spawned)
    }

    /// Takes over a process of an earlier coordinator, if it runs on this machine.
    pub fn adopt(&mut self, row: &ChildRow, here: &Node) -> Adoption {
        let Some(spawned) = row.process.filter(|_| !row.ended) else { return Adoption::Ended };
        match here.relation(&row.node) {
            Relation::Same => {}
            Relation::Before => return Adoption::Ended,
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
            numbered: false,
        };
        self.children.insert(row.token.clone(), handle);
        Adoption::Runs
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
        let here = self.children.iter().map(|(token, child)| (token, child.worker));
        let elsewhere = self.elsewhere.iter().map(|(token, worker)| (token, *worker));
        let mut tokens = here.chain(elsewhere).filter(|(_, own)| *own == Some(worker));
        tokens.next().is_none_or(|(own, _)| Some(own.as_str()) == token)
    }

    /// Whether `token` is of a worker that an earlier coordinator started on another machine.
    pub fn is_elsewhere(&self, token: &str) -> bool {
        self.elsewhere.contains_key(token)
    }

    /// Takes note of an exit; returns the worker that it was, if it had said hello.
    pub fn reaped(&mut self, token: &str) -> Option<WorkerId> {
        self.children.remove(token).and_then(|child| child.worker)
    }

    /// Kills a worker if it is ours.
    pub fn kill(&self, worker: WorkerId) {
        self.children
            .values()
            .filter(|child| child.worker == Some(worker))
            .for_each(|child| child.process.kill());
    }

    /// Asks all to end by themselves.
    pub fn ask_all_to_end(&self) {
        self.children.values().for_each(|child| child.process.ask_to_end());
    }

    /// Kills all that are left.
    pub fn kill_all(&self) {
        self.children.values().for_each(|child| child.process.kill());
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

/// A token that nobody can guess.
pub fn new_token() -> io::Result<String> {
    let mut bytes = [0u8; 16];
    std::io::Read::read_exact(&mut std::fs::File::open(Path::new("/dev/urandom"))?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
