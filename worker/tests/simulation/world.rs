//! The world: hosts, a network between them, what goes wrong, and an operator who starts again what ended.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use ganglion_coordinator::commands::audit::audit;
use ganglion_coordinator::commands::cli::Cli;
use ganglion_coordinator::error::Failure;
use ganglion_coordinator::records::progress::Screen;
use ganglion_coordinator::startup::run::run;
use ganglion_proto::job::Job;
use ganglion_proto::progress::Progress;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tokio::sync::mpsc;
use turmoil::Sim;

use crate::faults::{self, Mishap, Scenario};
use crate::job;
use crate::machine::Machine;
use crate::operator;
use crate::worker::{Shared, Start, live};

/// The coordinator's port.
const PORT: u16 = 7000;
/// The coordinator's host.
pub(crate) const COORDINATOR: &str = "coordinator";
/// How long a run may take once nothing goes wrong any more.
const PATIENCE: Duration = Duration::from_secs(120);

/// A worker's process that runs.
pub(crate) struct Worker {
    /// Its number on the coordinator's machine, if it runs there.
    pub pid: Option<u32>,
    pub hangs_until: Arc<AtomicU64>,
    pub asks: Arc<Mutex<Option<mpsc::UnboundedSender<()>>>>,
    /// Whether it was asked to end.
    pub leaves: bool,
}

/// What is due at a time.
pub(crate) enum Due {
    Mishap(Mishap),
    StartCoordinator,
    StartRemote,
    Release(String, String),
    Repair(String, String),
    StorageUp,
    /// The coordinator's disk is full, or has room again.
    Disk {
        is_full: bool,
    },
    Quiet,
    /// The operator sees to it that there are workers.
    Staff,
}

type Outcome = Arc<Mutex<Option<Result<String, Failure>>>>;

pub(crate) struct World<'a> {
    pub sim: Sim<'a>,
    pub rng: ChaCha8Rng,
    pub scenario: Scenario,
    pub machine: Machine,
    pub shared: Arc<Shared>,
    pub workers: BTreeMap<String, Worker>,
    pub folder: std::path::PathBuf,
    pub quiet: bool,
    /// Whether each row of metrics must be there at the end: no worker dies with one that nobody else has.
    pub keeps_rows: bool,
    pub log: Option<Vec<String>>,
    outcome: Outcome,
    due: BTreeMap<(Duration, u64), Due>,
    started: u64,
    coordinator_is_up: bool,
}

impl World<'_> {
    pub(crate) fn new(seed: u64, folder: &Path, keep_log: bool) -> World<'static> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (scenario, mishaps) = faults::draw(&mut rng);
        let mut builder = turmoil::Builder::new();
        builder
            .rng_seed(seed)
            .simulation_duration(Duration::from_secs(3600))
            .max_message_latency(Duration::from_millis(scenario.delay))
            .tcp_capacity(4096);
        let mut world = World {
            sim: builder.build(),
            shared: Arc::new(Shared { lineage: job::lineage(&scenario.job()), ..Shared::default() }),
            rng,
            scenario,
            machine: Machine::default(),
            workers: BTreeMap::new(),
            folder: folder.to_path_buf(),
            quiet: false,
            keeps_rows: false,
            log: keep_log.then(Vec::new),
            outcome: Outcome::default(),
            due: BTreeMap::new(),
            started: 0,
            coordinator_is_up: true,
        };
        world.prepare(mishaps);
        world
    }

    fn prepare(&mut self, mishaps: Vec<(Duration, Mishap)>) {
        self.note(format!("{:?}", self.scenario));
        for (time, mishap) in mishaps {
            self.at(time, Due::Mishap(mishap));
        }
        self.at(self.scenario.quiet_at, Due::Quiet);
        for _ in 0..self.scenario.remotes {
            let wait = self.rng.random_range(0..500);
            self.at(Duration::from_millis(wait), Due::StartRemote);
        }
        let (machine, arguments) = (self.machine.clone(), self.scenario.arguments(&self.folder, PORT));
        let outcome = self.outcome.clone();
        self.sim.host(COORDINATOR, move || {
            let (machine, arguments, outcome) = (machine.clone(), arguments.clone(), outcome.clone());
            async move {
                let cli = Cli::try_parse_from(arguments)?;
                let ended = run(cli, &machine, Screen::silent(), None).await;
                *outcome.lock().expect("nothing panics with it") = Some(ended);
                Ok(())
            }
        });
    }

    /// Nothing goes wrong but what is asked for from now on.
    pub(crate) fn calm(&mut self) {
        self.due.retain(|_, due| !matches!(due, Due::Mishap(_)));
    }

    pub(crate) fn now(&self) -> Duration {
        self.sim.elapsed()
    }

    pub(crate) fn at(&mut self, time: Duration, due: Due) {
        self.started += 1;
        self.due.insert((time, self.started), due);
    }

    pub(crate) fn after(&mut self, wait: u64, due: Due) {
        self.at(self.now() + Duration::from_millis(wait), due);
    }

    pub(crate) fn note(&mut self, line: String) {
        let now = self.now();
        if let Some(log) = &mut self.log {
            log.push(format!("{:>8.3} {line}", now.as_secs_f64()));
        }
    }

    /// Lets everything happen until the run is complete; then looks at what it left.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        let mut quiet_at = None;
        loop {
            self.sim.step().map_err(|error| error.to_string())?;
            self.tend_processes();
            while let Some((&(time, number), _)) = self.due.first_key_value()
                && time <= self.now()
            {
                let due = self.due.remove(&(time, number)).expect("it is the first");
                self.happen(due);
            }
            if let Some(breach) = self.shared.breach.lock().expect("nothing panics with it").take() {
                return Err(breach);
            }
            if self.tend_coordinator()? {
                return self.judge();
            }
            if self.quiet && self.now() > *quiet_at.get_or_insert(self.now()) + PATIENCE {
                return Err(format!("the run does not end: {}", self.state()));
            }
        }
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Mishap(mishap) => faults::strike(self, &mishap),
            Due::StartCoordinator => {
                self.note("the coordinator starts again".to_string());
                self.sim.bounce(COORDINATOR);
                self.coordinator_is_up = true;
            }
            Due::StartRemote => self.start_worker(None, None),
            Due::Release(a, b) => self.sim.release(a, b),
            Due::Repair(a, b) => self.sim.repair(a, b),
            Due::StorageUp => self.shared.storage_down.store(false, Ordering::Relaxed),
            Due::Disk { is_full } => {
                self.note(format!("disk {}", if is_full { "full" } else { "with room" }));
                self.machine.fill_disk(is_full && !self.quiet);
            }
            Due::Quiet => self.calm_down(),
            Due::Staff => self.staff(),
        }
    }

    // ---- Processes -------------------------------------------------------------------------------------------

    fn start_worker(&mut self, pid: Option<u32>, token: Option<String>) {
        self.started += 1;
        let name = format!("{}{}", if pid.is_some() { "local" } else { "remote" }, self.started);
        self.note(format!("{name} starts, process {pid:?}"));
        let worker = Worker { pid, hangs_until: Arc::default(), asks: Arc::default(), leaves: false };
        let start = Start {
            name: name.clone(),
            seed: self.rng.random(),
            url: format!("http://{}:{PORT}", self.sim.lookup(COORDINATOR)),
            token,
            address: self.sim.lookup(name.clone()),
            leaf: self.scenario.leaf,
            shared: self.shared.clone(),
            hangs_until: worker.hangs_until.clone(),
            asks: worker.asks.clone(),
        };
        self.sim.host(name.clone(), move || {
            let start = start.clone();
            async move {
                live(start).await;
                Ok(())
            }
        });
        self.workers.insert(name, worker);
    }

    /// Does to processes what the coordinator wants, and sees which have ended.
    fn tend_processes(&mut self) {
        let (start, kill, ask) = {
            let mut table = self.machine.table();
            (
                std::mem::take(&mut table.to_start),
                std::mem::take(&mut table.to_kill),
                std::mem::take(&mut table.to_ask),
            )
        };
        for (pid, token) in start {
            self.start_worker(Some(pid), Some(token));
        }
        for name in self.names_of(&kill) {
            self.kill(&name);
        }
        for name in self.names_of(&ask) {
            self.ask(&name);
        }
        let names: Vec<String> = self.workers.keys().cloned().collect();
        for name in names {
            if !self.sim.is_host_running(name.clone()) {
                self.ended(&name);
            }
        }
    }

    fn names_of(&self, pids: &[u32]) -> Vec<String> {
        let is = |worker: &Worker| worker.pid.is_some_and(|pid| pids.contains(&pid));
        self.workers.iter().filter(|(_, worker)| is(worker)).map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn kill(&mut self, name: &str) {
        if self.workers.contains_key(name) {
            self.note(format!("{name} is killed"));
            self.sim.crash(name);
            self.ended(name);
        }
    }

    /// Asks a worker to end.
    pub(crate) fn ask(&mut self, name: &str) {
        if let Some(worker) = self.workers.get_mut(name) {
            worker.leaves = true;
            if let Some(asks) = &*worker.asks.lock().expect("nothing panics with it") {
                let _ = asks.send(());
            }
        }
    }

    fn ended(&mut self, name: &str) {
        let Some(worker) = self.workers.remove(name) else { return };
        self.note(format!("{name} has ended"));
        match worker.pid {
            Some(pid) => self.machine.table().ended(pid),
            None if !worker.leaves || self.nobody_is_left() => {
                let wait = self.rng.random_range(300..3000);
                self.after(wait, Due::StartRemote);
            }
            None => {}
        }
    }

    fn nobody_is_left(&self) -> bool {
        self.scenario.locals == 0 && self.workers.is_empty()
    }

    pub(crate) fn crash_coordinator(&mut self) {
        if self.coordinator_is_up {
            self.note("the coordinator is killed".to_string());
            self.sim.crash(COORDINATOR);
            self.start_again_later();
        }
    }

    /// Cuts the power of the coordinator's machine, or of all.
    pub(crate) fn cut_power(&mut self, all: bool) {
        let is_hit = |(name, worker): (&String, &Worker)| (all || worker.pid.is_some()).then(|| name.clone());
        let hit: Vec<String> = self.workers.iter().filter_map(is_hit).collect();
        self.crash_coordinator();
        hit.iter().for_each(|name| self.kill(name));
        let lost = self.machine.lose_power(&self.folder, &mut self.rng);
        self.note(format!("the power cut took {lost}"));
    }

    fn start_again_later(&mut self) {
        self.coordinator_is_up = false;
        let slow = !self.quiet && self.rng.random_bool(0.1);
        let wait = self.rng.random_range(20..if slow { 15_000 } else { 2_500 });
        self.after(wait, Due::StartCoordinator);
    }

    /// Starts a coordinator again that has ended; tells whether the run is complete.
    fn tend_coordinator(&mut self) -> Result<bool, String> {
        let ended = self.outcome.lock().expect("nothing panics with it").take();
        match ended {
            None => Ok(false),
            Some(Ok(line)) => {
                let line = line.replace(&self.folder.display().to_string(), "RUN");
                self.note(format!("the coordinator ends: {line}"));
                Ok(true)
            }
            Some(Err(Failure::Input(reason))) => Err(format!("the coordinator refuses: {reason}")),
            Some(Err(other)) => {
                self.note(format!("the coordinator ends: {other}"));
                self.start_again_later();
                Ok(false)
            }
        }
    }

    // ---- The end ---------------------------------------------------------------------------------------------

    /// The faults stop and what they did is repaired.
    fn calm_down(&mut self) {
        self.note("the faults stop".to_string());
        self.quiet = true;
        self.shared.storage_down.store(false, Ordering::Relaxed);
        self.machine.fill_disk(false);
        let names = self.hosts();
        for (index, a) in names.iter().enumerate() {
            for b in &names[index + 1..] {
                self.sim.release(a.clone(), b.clone());
                self.sim.repair(a.clone(), b.clone());
            }
        }
        for worker in self.workers.values() {
            worker.hangs_until.store(0, Ordering::Relaxed);
        }
        self.after(100, Due::Staff);
    }

    fn staff(&mut self) {
        self.after(5_000, Due::Staff);
        if self.nobody_is_left() {
            self.start_worker(None, None);
        } else if self.workers.is_empty() {
            // All were drained, or scaled away.
            operator::scale(self, self.scenario.locals);
        }
    }

    /// All hosts that run.
    pub(crate) fn hosts(&self) -> Vec<String> {
        self.workers.keys().cloned().chain([COORDINATOR.to_string()]).collect()
    }

    /// The last checkpoint is that of an undisturbed run, and the audit finds nothing.
    fn judge(&self) -> Result<(), String> {
        let storage = self.folder.join("checkpoints");
        let read = |file: &Path| {
            std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))
        };
        let latest = read(&storage.join("latest"))?;
        let manifest = read(&storage.join(latest.trim()).join("manifest.json"))?;
        let checkpoint = ganglion_proto::manifest::parse(&manifest).map_err(|error| error.to_string())?;
        let last = self.shared.lineage.last().expect("a run has a first state");
        if (checkpoint.position, &checkpoint.state_digest) != (last.position, &job::digest(last)) {
            return Err(format!("{latest} is not the end of an undisturbed run"));
        }
        let events = read(&self.folder.join("events.jsonl"))?;
        if self.keeps_rows && events.contains(r#""kind":"metrics_lost""#) {
            return Err("rows are lost".to_string());
        }
        let report = audit(&self.folder, &Progress::off()).map_err(|error| error.to_string())?;
        if report.holds() { Ok(()) } else { Err(format!("the audit finds a breach:\n{report}")) }
    }

    fn state(&self) -> String {
        let events = std::fs::read_to_string(self.folder.join("events.jsonl")).unwrap_or_default();
        let last: Vec<&str> = events.lines().rev().take(5).collect();
        format!(
            "position {}, workers {:?}, last events {last:?}",
            self.shared.furthest.load(Ordering::Relaxed),
            self.hosts()
        )
    }
}

impl Scenario {
    /// The coordinator's command line.
    fn arguments(&self, folder: &Path, port: u16) -> Vec<String> {
        let mut arguments = ["coordinator", "--insecure", "--http", "off"].map(str::to_string).to_vec();
        let mut add = |key: &str, value: String| arguments.extend([key.to_string(), value]);
        add("--run-dir", folder.display().to_string());
        add("--listen", format!("{}:{port}", "192.168.0.1"));
        add("--workers", self.locals.to_string());
        for (key, value) in &self.settings {
            add("--set", format!("{key}={value}"));
        }
        arguments
    }

    /// The job that they make.
    fn job(&self) -> Job {
        let overrides: Vec<String> =
            self.settings.iter().map(|(key, value)| format!("{key}={value}")).collect();
        ganglion_coordinator::job_file::read(&ganglion_coordinator::job_file::Source::Embedded, &overrides)
            .unwrap_or_else(|errors| panic!("the scenario's job is wrong: {errors}"))
    }
}
