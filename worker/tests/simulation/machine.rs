//! The coordinator's machine: its processes, its signals, its port.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use ganglion_coordinator::host::Host;
use ganglion_coordinator::server::tls::Acceptor;
use ganglion_coordinator::shell::StopSignal;
use ganglion_coordinator::supervisor::{Exited, Process, Processes, Spawned, StartOrder};
use tokio::sync::mpsc;

use crate::net::{self, Connection};

/// The processes of workers on the coordinator's machine, and what is to be done to them.
#[derive(Default)]
pub struct Table {
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
    pub fn ended(&mut self, pid: u32) {
        if let Some(Running { token, exits }) = self.running.remove(&pid) {
            let _ =
                exits.send(Exited { token, pid, status: "a simulated end".to_string(), input_error: false });
        }
    }

    /// Sends a signal to the coordinator.
    pub fn stop(&mut self, signal: StopSignal) {
        if let Some(stops) = &self.stops {
            let _ = stops.send(signal);
        }
    }
}

/// The coordinator's machine.
#[derive(Clone, Default)]
pub struct Machine(Arc<Mutex<Table>>);

impl Machine {
    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().expect("nothing panics with it")
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
