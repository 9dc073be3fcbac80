//! The shell around the membership machine: one loop that takes what happens in and carries decisions out.
//!
//! 1. A decision is journaled before anybody hears of it.
//! 2. The loop never waits for a worker: a worker that does not read its messages is dropped.
//! 3. A file that cannot be written is tried again while training goes on; nothing is acknowledged that is not written.

mod actions;
pub mod records;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ganglion_membership::{
    Checkpoint, Event, Fault, Loss, Machine, Outcome, Recovered, Settings, Term, Time, WorkerId,
};
use ganglion_proto::job::Job;
use ganglion_proto::message::{FromWorker, Hello, ToWorker, Welcome};
use ganglion_proto::wire::{GetStatusResponse, WorkerStatus};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::checkpoints::Checkpoints;
use crate::journal::{Fact, Journal, JournalError};
use crate::server::{Input, Outbox, Store};
use crate::supervisor::{EXIT_LIMIT, Exited, Supervisor};
use records::Records;

/// How often waiting writes are tried again and recorded rows are acknowledged.
const CHORES: Duration = Duration::from_secs(1);
/// Signals this close are one request: a launcher may signal a process and then its whole group.
const ONE_REQUEST: Duration = Duration::from_secs(1);

/// Which signal asked for a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
}

/// How the run ended for this coordinator.
#[derive(Debug)]
pub struct Ended {
    /// The machine's word.
    pub outcome: Outcome,
    /// The signal behind a stop.
    pub signal: Option<StopSignal>,
}

/// What the shell is built from.
pub struct Parts {
    /// The job, resolved.
    pub job: Job,
    /// This coordinator's term.
    pub term: Term,
    /// The run directory.
    pub folder: PathBuf,
    /// The run's name for itself.
    pub run: String,
    /// The journal.
    pub journal: Journal,
    /// The checkpoint storage.
    pub checkpoints: Checkpoints,
    /// What earlier terms left behind.
    pub recovered: Recovered,
    /// Workers to start.
    pub local_workers: u32,
    /// Where local workers find this coordinator.
    pub url: String,
    /// The store of the group.
    pub store: Store,
    /// Logs and progress.
    pub records: Records,
}

/// The shell.
pub struct Shell {
    job: Job,
    term: Term,
    run: String,
    journal: Journal,
    checkpoints: Checkpoints,
    machine: Machine,
    local_workers: u32,
    url: String,
    store: Store,
    records: Records,
    supervisor: Option<Supervisor>,
    workers: BTreeMap<WorkerId, Connected>,
    /// Manifests that could not be written yet.
    uncommitted: Vec<Checkpoint>,
    signal: Option<StopSignal>,
    /// When `signal` came.
    signalled: Instant,
    started: Instant,
    outcome: Option<Outcome>,
}

struct Connected {
    outbox: Outbox,
    host: String,
    pid: u32,
}

/// The run cannot go on, because of this process or its machine.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The journal failed: without it nothing may be decided.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The system refused something.
    #[error("{0}")]
    System(#[from] std::io::Error),
}

impl Shell {
    /// Puts a shell together.
    pub fn new(parts: Parts) -> Shell {
        let settings = Settings {
            local_workers: parts.local_workers,
            data_shards: parts.job.job.data_shards,
            failure_deadline: Duration::from_secs_f64(parts.job.job.failure_deadline),
        };
        Shell {
            machine: Machine::new(settings, parts.recovered),
            job: parts.job,
            term: parts.term,
            run: parts.run,
            journal: parts.journal,
            checkpoints: parts.checkpoints,
            local_workers: parts.local_workers,
            url: parts.url,
            store: parts.store,
            records: parts.records,
            supervisor: None,
            workers: BTreeMap::new(),
            uncommitted: Vec::new(),
            signal: None,
            signalled: Instant::now(),
            started: Instant::now(),
            outcome: None,
        }
    }

    /// Runs until the machine has ended the run, then sees the local workers off.
    pub async fn run(mut self, mut inputs: mpsc::Receiver<Input>) -> Result<Ended, ShellError> {
        let (exits, mut exited) = mpsc::unbounded_channel();
        self.start_workers(exits)?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut chores = tokio::time::interval(CHORES);
        while self.outcome.is_none() {
            let deadline = self.machine.deadline().map(|time| self.started + time);
            let sleep = deadline.unwrap_or_else(|| Instant::now() + CHORES);
            tokio::select! {
                biased;
                () = received(&mut interrupt) => self.stop(StopSignal::Interrupt)?,
                () = received(&mut terminate) => self.stop(StopSignal::Terminate)?,
                Some(input) = inputs.recv() => self.take(input)?,
                Some(exit) = exited.recv() => self.reaped(exit)?,
                _ = chores.tick() => self.do_chores()?,
                () = tokio::time::sleep_until(sleep.into()) => self.handle(Event::Tick)?,
            }
        }
        self.see_off(&mut exited).await;
        let outcome = self.outcome.take().unwrap_or(Outcome::Stopped(None));
        self.records.finish(&outcome, self.signal);
        Ok(Ended { outcome, signal: self.signal })
    }

    fn start_workers(&mut self, exits: mpsc::UnboundedSender<Exited>) -> Result<(), ShellError> {
        if self.local_workers == 0 {
            return Ok(());
        }
        self.supervisor = Some(Supervisor::new(exits)?);
        for _ in 0..self.local_workers {
            self.start_worker()?;
        }
        Ok(())
    }

    fn start_worker(&mut self) -> std::io::Result<()> {
        let Some(supervisor) = &mut self.supervisor else { return Ok(()) };
        let (pid, local_rank) = supervisor.spawn(&self.url)?;
        self.records.event("worker_started", json!({ "pid": pid, "local_rank": local_rank }));
        Ok(())
    }

    fn now(&self) -> Time {
        self.started.elapsed()
    }

    /// Lets the machine decide and carries out what it decided.
    fn handle(&mut self, event: Event) -> Result<(), ShellError> {
        let mut actions = Vec::new();
        self.machine.handle(self.now(), event, &mut actions);
        for action in actions {
            self.act(action)?;
        }
        Ok(())
    }

    fn take(&mut self, input: Input) -> Result<(), ShellError> {
        match input {
            Input::Hello(hello, outbox, answer) => {
                let worker = self.admit(hello, outbox)?;
                let _ = answer.send(worker);
                Ok(())
            }
            Input::Message(worker, message) => self.take_message(worker, message),
            Input::Closed(worker) => self.lose(worker, Loss::Session),
            Input::Status(answer) => {
                let _ = answer.send(self.status());
                Ok(())
            }
        }
    }

    fn admit(&mut self, hello: Hello, outbox: Outbox) -> Result<WorkerId, ShellError> {
        let worker = self.journal.admit(self.term, &hello.host, hello.pid)?;
        let token = hello.spawn_token.as_deref();
        let local = match (token, &mut self.supervisor) {
            (Some(token), Some(supervisor)) => supervisor.claim(token, worker),
            _ => false,
        };
        if token.is_some() && !local {
            // A worker of an earlier term, or one that shows another's token.
            let _ = outbox.try_send(ToWorker::Reject("its token is not of this term".to_string()));
            return Ok(worker);
        }
        let welcome = Welcome {
            term: self.term,
            worker,
            run: self.run.clone(),
            job: self.job.clone(),
            storage: self.checkpoints.address(),
        };
        let _ = outbox.try_send(ToWorker::Welcome(Box::new(welcome)));
        self.records.event(
            "worker_joined",
            json!({ "worker": worker.0, "host": hello.host, "pid": hello.pid, "local": local }),
        );
        self.workers.insert(worker, Connected { outbox, host: hello.host, pid: hello.pid });
        self.handle(Event::Hello { worker, local })?;
        Ok(worker)
    }

    fn take_message(&mut self, worker: WorkerId, message: FromWorker) -> Result<(), ShellError> {
        if !self.workers.contains_key(&worker) {
            return Ok(());
        }
        match message {
            FromWorker::Hello(_) => self.lose(worker, Loss::Session),
            FromWorker::Loaded(facts) => {
                self.journal.set_fact(Fact::Samples, &facts.samples.to_string())?;
                self.records.loaded(facts.samples, self.machine.checkpoint());
                self.handle(Event::Loaded(worker, facts))
            }
            FromWorker::Ready(generation, position) => {
                self.handle(Event::Ready(worker, generation, position))
            }
            FromWorker::Fault(generation, fault) => {
                self.note_fault(worker, generation.0, &fault);
                self.handle(Event::Fault(worker, generation, fault))
            }
            FromWorker::Heartbeat(..) => self.handle(Event::Heartbeat(worker)),
            FromWorker::Metrics(row) => {
                self.records.take_row(row);
                Ok(())
            }
            FromWorker::PartWritten(part) => self.handle(Event::PartWritten(worker, part)),
            FromWorker::PartDelayed(step, file, detail) => {
                self.records.message(&format!(
                    "warning: the checkpoint of step {step} waits: worker {worker} cannot write {file}: {detail}; trying again"
                ));
                let fields = json!({ "worker": worker.0, "step": step, "file": file, "reason": detail });
                self.records.event("checkpoint_delayed", fields);
                Ok(())
            }
            FromWorker::Samples(grid) => {
                self.records.take_samples(grid);
                Ok(())
            }
            FromWorker::Finished(generation, position, complete) => {
                self.handle(Event::Finished { worker, generation, position, complete })
            }
            FromWorker::InputError(detail) => self.handle(Event::InputWrong(detail)),
        }
    }

    fn note_fault(&mut self, worker: WorkerId, generation: u64, fault: &Fault) {
        let (kind, detail) = match fault {
            Fault::Peer => ("peer", String::new()),
            Fault::Timeout => ("timeout", String::new()),
            Fault::Diverged(detail) => ("diverged", detail.clone()),
            Fault::Internal(detail) => ("internal", detail.clone()),
        };
        let fields = json!({ "worker": worker.0, "generation": generation, "fault": kind, "detail": detail });
        self.records.event("fault", fields);
    }

    fn lose(&mut self, worker: WorkerId, loss: Loss) -> Result<(), ShellError> {
        self.forget(worker, &loss);
        self.handle(Event::Lost(worker, loss))
    }

    /// Notes that a worker is gone, if it was still there.
    fn forget(&mut self, worker: WorkerId, loss: &Loss) {
        let Some(lost) = self.workers.remove(&worker) else { return };
        let how = match loss {
            Loss::Session => "its session ended",
            Loss::Exited(status) | Loss::Failed(status) => status,
            Loss::Silent => "it was silent for too long",
        };
        self.records.event("worker_lost", json!({ "worker": worker.0, "pid": lost.pid, "reason": how }));
    }

    fn reaped(&mut self, exit: Exited) -> Result<(), ShellError> {
        let Some(supervisor) = &mut self.supervisor else { return Ok(()) };
        let worker = supervisor.reaped(&exit.token);
        if exit.input_error && self.machine.group().is_none() {
            // The worker says so in its session as well; whichever comes first ends the run.
            let detail = exit.status.split_once(": ").map_or(exit.status.as_str(), |(_, detail)| detail);
            return self.handle(Event::InputWrong(detail.to_string()));
        }
        let number = worker.map(|worker| worker.0);
        self.records
            .event("worker_exited", json!({ "worker": number, "pid": exit.pid, "status": exit.status }));
        if let Some(worker) = worker {
            self.forget(worker, &Loss::Exited(exit.status.clone()));
        }
        self.handle(Event::Reaped { worker, status: exit.status })
    }

    /// Replaces a local worker; one that cannot be started counts as one that ended at once.
    pub(super) fn replace(&mut self) -> Result<(), ShellError> {
        match self.start_worker() {
            Ok(()) => Ok(()),
            Err(error) => self.handle(Event::Reaped { worker: None, status: format!("no start: {error}") }),
        }
    }

    fn stop(&mut self, signal: StopSignal) -> Result<(), ShellError> {
        if self.signal.is_some() && self.signalled.elapsed() < ONE_REQUEST {
            return Ok(());
        }
        if self.signal.is_some() {
            self.outcome = Some(Outcome::Failed("stopped at once by a second signal".to_string()));
            return Ok(());
        }
        (self.signal, self.signalled) = (Some(signal), Instant::now());
        self.records.message("stopping: saving a checkpoint after this step (once more to stop at once)");
        self.records.event("stop_requested", json!({}));
        self.handle(Event::StopRequested)
    }

    fn do_chores(&mut self) -> Result<(), ShellError> {
        if let Some(step) = self.records.catch_up() {
            let outboxes: Vec<WorkerId> = self.workers.keys().copied().collect();
            for worker in outboxes {
                self.send(worker, ToWorker::MetricsRecorded(step));
            }
        }
        for checkpoint in std::mem::take(&mut self.uncommitted) {
            self.commit(checkpoint)?;
        }
        Ok(())
    }

    /// Gives the local workers time to exit, then ends those that are left.
    async fn see_off(&mut self, exited: &mut mpsc::UnboundedReceiver<Exited>) {
        self.workers.clear();
        let Some(supervisor) = &mut self.supervisor else { return };
        if matches!(self.outcome, Some(Outcome::Failed(_))) {
            supervisor.kill_all();
        }
        let deadline = tokio::time::Instant::now() + EXIT_LIMIT;
        while !supervisor.is_empty() {
            match tokio::time::timeout_at(deadline, exited.recv()).await {
                Ok(Some(exit)) => drop(supervisor.reaped(&exit.token)),
                Ok(None) => return,
                Err(_) => return supervisor.kill_all(),
            }
        }
    }

    fn status(&self) -> GetStatusResponse {
        let group = self.machine.group();
        let rank = |worker: WorkerId| {
            let rank = group?.members.iter().position(|member| member.worker == worker)?;
            u32::try_from(rank).ok()
        };
        let workers = self.workers.iter().map(|(worker, connected)| WorkerStatus {
            worker: worker.0,
            host: connected.host.clone(),
            pid: connected.pid,
            rank: rank(*worker),
        });
        GetStatusResponse {
            name: self.job.job.name.clone(),
            term: self.term.0,
            generation: group.map_or(0, |group| group.generation.0),
            step: self.records.last_step(),
            last_step: self.machine.samples().map_or(0, |samples| self.job.last_step(samples)),
            checkpoint_step: self.machine.checkpoint().map_or(0, |checkpoint| checkpoint.step),
            workers: workers.collect(),
        }
    }
}

async fn received(signal: &mut Signal) {
    if signal.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}
