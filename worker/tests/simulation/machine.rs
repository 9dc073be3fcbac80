//! The coordinator's machine: its processes, its signals, its port.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use ganglion_coordinator::api::grpc::tls::Acceptor;
use ganglion_coordinator::control::StopSignal;
use ganglion_coordinator::journal::Spawned;
use ganglion_coordinator::records::disk::{Disk, SystemDisk};
use ganglion_coordinator::startup::host::Host;
use ganglion_coordinator::workers::{Exited, Process, Processes, StartOrder};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use tokio::sync::mpsc;

use crate::net::{self, Connection};

/// The processes of workers on the coordinator's machine, and what is to be done to them.
#[derive(Default)]
pub(crate) struct Table {
    last_pid: u32,
    running: BTreeMap<u32, Running>,
    /// Who listens to signals of the coordinator that runs.
    stops: Option<mpsc::UnboundedSender<StopSignal>>,
    /// Processes that shall be there, with their token.
    pub to_start: Vec<(u32, String)>,
    pub to_kill: Vec<u32>,
    pub to_ask: Vec<u32>,
}

struct Running {
    token: String,
    exits: mpsc::UnboundedSender<Exited>,
}

impl Table {
    /// A process has ended: the coordinator that runs hears of it.
    pub(crate) fn ended(&mut self, pid: u32) {
        if let Some(Running { token, exits }) = self.running.remove(&pid) {
            let _ =
                exits.send(Exited { token, pid, status: "a simulated end".to_string(), input_error: false });
        }
    }

    /// Sends a signal to the coordinator.
    pub(crate) fn stop(&mut self, signal: StopSignal) {
        if let Some(stops) = &self.stops {
            let _ = stops.send(signal);
        }
    }
}

/// The coordinator's machine.
#[derive(Clone, Default)]
pub(crate) struct Machine(Arc<Mutex<Table>>, Arc<Platter>);

impl Machine {
    pub(crate) fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().expect("nothing panics with it")
    }

    /// The disk of the run directory is full from now on, or has room again. Records go there; for the
    /// journal there is room left.
    pub(crate) fn fill_disk(&self, is_full: bool) {
        self.1.is_full.store(is_full, Ordering::Relaxed);
    }

    /// The power fails: of what was written and not synced anything may be gone. Checkpoints and the journal
    /// are synced when they are written.
    pub(crate) fn lose_power(&self, run: &Path, rng: &mut ChaCha8Rng) -> String {
        let reached = self.1.reached.lock().expect("nothing panics with it");
        let mut lost = Vec::new();
        for name in ["metrics.jsonl", "events.jsonl"] {
            let path = run.join(name);
            let Ok(file) = File::options().write(true).open(&path) else { continue };
            let written = file.metadata().expect("it is open").len();
            let synced = reached.synced.get(&path).copied().unwrap_or(0).min(written);
            if !reached.named.contains(&path) && rng.random_bool(0.5) {
                fs::remove_file(&path).expect("it is there");
                lost.push(format!("{name} as a whole"));
            } else {
                let all_lost = rng.random_bool(0.5);
                let kept = if all_lost { synced } else { rng.random_range(synced..=written) };
                file.set_len(kept).expect("it is open");
                lost.push(format!("{} of {written} bytes of {name}", written - kept));
            }
        }
        for entry in fs::read_dir(run.join("tensorboard")).into_iter().flatten() {
            let file = File::options().write(true).open(entry.expect("it is there").path());
            let file = file.expect("it is a file");
            let written = file.metadata().expect("it is open").len();
            file.set_len(rng.random_range(0..=written)).expect("it is open");
        }
        lost.join(", ")
    }
}

/// Bytes of the records that are on the disk.
#[derive(Debug, Default)]
struct Platter {
    reached: Mutex<Reached>,
    is_full: AtomicBool,
}

#[derive(Debug, Default)]
struct Reached {
    synced: BTreeMap<PathBuf, u64>,
    named: BTreeSet<PathBuf>,
}

impl Disk for Platter {
    fn append(&self, path: &Path, file: &File, bytes: &[u8]) -> io::Result<()> {
        if self.is_full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        SystemDisk.append(path, file, bytes)
    }

    fn sync(&self, path: &Path, file: &File) -> io::Result<()> {
        let written = file.metadata()?.len();
        self.reached.lock().expect("nothing panics with it").synced.insert(path.to_path_buf(), written);
        Ok(())
    }

    fn sync_name(&self, path: &Path) -> io::Result<()> {
        self.reached.lock().expect("nothing panics with it").named.insert(path.to_path_buf());
        Ok(())
    }

    /// So few that workers are asked again for what found no room.
    fn rows_that_wait(&self) -> usize {
        2
    }
}

impl Host for Machine {
    type Connection = Connection;

    async fn listen(
        &self,
        wanted: SocketAddr,
        _tls: Option<Arc<Acceptor>>,
    ) -> io::Result<(mpsc::Receiver<Connection>, SocketAddr)> {
        Ok((net::listen(wanted.port()).await?, wanted))
    }

    fn processes(&self) -> io::Result<Box<dyn Processes>> {
        Ok(Box::new(self.clone()))
    }

    fn disk(&self) -> Arc<dyn Disk> {
        self.1.clone()
    }

    fn signals(&self) -> io::Result<mpsc::UnboundedReceiver<StopSignal>> {
        let (stops, signals) = mpsc::unbounded_channel();
        self.table().stops = Some(stops);
        Ok(signals)
    }
}

impl Processes for Machine {
    fn check_program(&self) -> io::Result<()> {
        Ok(())
    }

    fn count_gpus(&self) -> io::Result<u32> {
        Ok(0)
    }

    fn start(&mut self, order: StartOrder) -> io::Result<(Box<dyn Process>, Spawned)> {
        let mut table = self.table();
        table.last_pid += 1;
        let pid = table.last_pid;
        table.to_start.push((pid, order.token.clone()));
        table.running.insert(pid, Running { token: order.token, exits: order.exits });
        Ok((Box::new(Handle { pid, machine: self.clone() }), Spawned { pid, started: pid.into() }))
    }

    fn find(
        &mut self,
        token: &str,
        process: Spawned,
        exits: mpsc::UnboundedSender<Exited>,
    ) -> Option<Box<dyn Process>> {
        let mut table = self.table();
        let running = table.running.get_mut(&process.pid).filter(|running| running.token == token)?;
        running.exits = exits;
        Some(Box::new(Handle { pid: process.pid, machine: self.clone() }))
    }
}

struct Handle {
    pid: u32,
    machine: Machine,
}

impl Process for Handle {
    fn kill(&self) {
        self.machine.table().to_kill.push(self.pid);
    }

    fn ask_to_end(&self) {
        self.machine.table().to_ask.push(self.pid);
    }
}
