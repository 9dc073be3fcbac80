//! The shell around the membership machine: one loop that takes what happens in and carries decisions out.
//!
//! 1. A decision is journaled before anybody hears of it. While that cannot be done nothing is decided
//!    (`stuck.rs`).
//! 2. The loop never waits for a worker: a worker that does not read its messages loses its session.
//! 3. A file that cannot be written is tried again while training goes on; nothing is acknowledged that is
//!    not written. The loop does not wait for the checkpoint storage: a task of its own does (`keeper.rs`);
//!    nor for a sync of the records.
//! 4. Only a worker's newest session is listened to: the one that the worker opened last, in whatever order
//!    they arrive.

mod actions;
mod admin;
mod attempts;
mod budget;
mod delays;
mod judging;
pub mod records;
mod sessions;
mod stay;
mod stuck;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::Duration;

use ganglion_membership::{
    Action, Checkpoint, Event, Limits, Machine, Outcome, Position, Progress, Recovered, Settings, Term, Time,
    WorkerId,
};
use ganglion_proto::evaluation::AlarmPolicy;
use ganglion_proto::failpoint;
use ganglion_proto::job::{Exclusion, Job};
use ganglion_proto::message::{ToWorker, Usage};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::alarms::Watch;
use crate::checkpoints::Checkpoints;
use crate::detach::Launch;
use crate::journal::{Fact, Journal, JournalError, Spawned};
use crate::judged::{Best, Judged};
use crate::keeper::Keeper;
use crate::report::view::Publisher;
use crate::server::{Input, Outbox, SessionId, Store};
use crate::supervisor::{EXIT_LIMIT, Exited, Supervisor, new_token};
use attempts::Attempts;
use budget::Budget;
use delays::Delays;
use records::Records;
use stuck::Held;

/// How often waiting writes are tried again and recorded rows are acknowledged.
const CHORES: Duration = Duration::from_secs(1);
/// How long the last things may take that the checkpoint storage is told at the end.
const KEEPER_LIMIT: Duration = Duration::from_secs(10);
/// Signals this close are one request: a launcher may signal a process and then its whole group.
const ONE_REQUEST: Duration = Duration::from_secs(1);

/// Plan of a term for the samples that the job asks to leave out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing is asked.
    None,
    /// Only brings members of earlier terms to rest; the next term makes the change.
    Waits,
    /// Trains with it.
    Made(Exclusion),
}

/// Which signal asked for a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// SIGHUP: the terminal was closed.
    Hangup,
}

impl StopSignal {
    /// The exit code of a process that it stopped: 128 and its number.
    pub fn exit_code(self) -> u8 {
        match self {
            StopSignal::Interrupt => 130,
            StopSignal::Terminate => 143,
            StopSignal::Hangup => 129,
        }
    }
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
    /// Message for a run whose checkpoints are lost while no living member holds a state either.
    pub lost: Option<String>,
    /// What is known of evaluations.
    pub judged: Judged,
    /// Workers to start.
    pub local_workers: u32,
    /// Samples to leave out from now on.
    pub change: Change,
    /// Where local workers find this coordinator.
    pub url: String,
    /// Who is told how things are, each second.
    pub publisher: Publisher,
    /// The store of the group.
    pub store: Store,
    /// Logs and progress.
    pub records: Records,
    /// Local workers, those of earlier terms that run on included.
    pub supervisor: Supervisor,
    /// Where it tells of their ends.
    pub exited: mpsc::UnboundedReceiver<Exited>,
    /// Waiters for the start of the run.
    pub launch: Option<Launch>,
}

/// The shell.
pub struct Shell {
    job: Job,
    term: Term,
    run: String,
    journal: Journal,
    keeper: Keeper,
    machine: Machine,
    url: String,
    publisher: Publisher,
    store: Store,
    records: Records,
    supervisor: Supervisor,
    exited: mpsc::UnboundedReceiver<Exited>,
    workers: BTreeMap<WorkerId, Connected>,
    /// By which attempts workers opened their newest sessions.
    attempts: Attempts,
    /// The recorded size of the data set.
    samples: Option<u64>,
    /// The recorded samples that the job leaves out.
    left_out: Vec<u64>,
    /// Samples to leave out, until a group has formed without them.
    change: Change,
    /// Workers whose sessions were closed because they do not read.
    deaf: Vec<WorkerId>,
    /// Checkpoints that could not be journaled yet, or whose rows are not durable.
    unjournaled: Vec<Checkpoint>,
    /// Local processes whose numbers could not be journaled yet, by their tokens.
    unnumbered: Vec<(String, Spawned)>,
    /// Whether the size of the data set could not be journaled yet.
    size_waits: bool,
    /// Whether the journal cannot be written. Then nothing is decided.
    is_stuck: bool,
    /// Whether people were told so.
    told_stuck: bool,
    /// Decisions that are not carried out yet.
    undone: VecDeque<Action>,
    /// Events that came in meanwhile.
    held: VecDeque<Held>,
    /// Warnings given about checkpoints that cannot be written.
    delays: Delays,
    /// The newest that the keeper was told to make valid.
    ordered: Option<Position>,
    /// Why the run may not start from step 0, where it may not.
    lost: Option<String>,
    /// The row that workers are asked for, and since when.
    asked: Option<(u64, Instant)>,
    /// How long a worker may be away.
    lease: Duration,
    signal: Option<StopSignal>,
    /// When `signal` came.
    signalled: Instant,
    started: Instant,
    outcome: Option<Outcome>,
    /// Whether the job's last step is done and saved.
    is_complete: bool,
    /// What is known of evaluations.
    judged: Judged,
    /// The best checkpoint that the keeper was told of.
    best: Option<Best>,
    /// Who raises alarms.
    watch: Watch,
    /// The newest row of metrics that was watched.
    watched: u64,
    /// Waiters for the start of the run.
    launch: Option<Launch>,
}

/// A worker that the machine knows.
struct Connected {
    session: SessionId,
    /// Where messages for it go; `None` while its session is away.
    outbox: Option<Outbox>,
    host: String,
    pid: u32,
    /// Where other workers find out whether they reach it.
    address: String,
    /// What it computes on.
    device: String,
    /// Events that it may cause.
    budget: Budget,
    /// When it gave its newest sign of life, and what it said then.
    heard: Option<(Instant, Progress, Usage)>,
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
            term: parts.term,
            local_workers: parts.local_workers,
            data_shards: parts.job.job.data_shards,
            limits: Limits::derive(Duration::from_secs_f64(parts.job.job.failure_deadline)),
        };
        let lease = settings.limits.lease;
        let mut watch = Watch::new(&parts.job);
        // What was told is not told again; but a run that an alarm stopped is stopped by it again.
        if parts.job.alarms.policy != AlarmPolicy::Stop {
            parts.judged.rows().for_each(|row| drop(watch.evaluation(row)));
        }
        Shell {
            watched: parts.records.last_step(),
            watch,
            judged: parts.judged,
            best: None,
            machine: Machine::new(settings, parts.recovered),
            keeper: Keeper::start(parts.checkpoints, parts.job.checkpoint.keep_last),
            job: parts.job,
            term: parts.term,
            run: parts.run,
            journal: parts.journal,
            url: parts.url,
            publisher: parts.publisher,
            store: parts.store,
            records: parts.records,
            supervisor: parts.supervisor,
            exited: parts.exited,
            launch: parts.launch,
            workers: BTreeMap::new(),
            attempts: Attempts::default(),
            samples: None,
            left_out: Vec::new(),
            change: parts.change,
            deaf: Vec::new(),
            unjournaled: Vec::new(),
            unnumbered: Vec::new(),
            size_waits: false,
            is_stuck: false,
            told_stuck: false,
            undone: VecDeque::new(),
            held: VecDeque::new(),
            delays: Delays::default(),
            ordered: None,
            lost: parts.lost,
            asked: None,
            lease,
            signal: None,
            signalled: Instant::now(),
            started: Instant::now(),
            outcome: None,
            is_complete: false,
        }
    }

    /// Runs until the machine has ended the run, then sees the local workers off. The user's signals come by
    /// `signals`.
    pub async fn run(
        &mut self,
        inputs: &mut mpsc::Receiver<Input>,
        signals: &mut mpsc::UnboundedReceiver<StopSignal>,
    ) -> Result<Ended, ShellError> {
        self.handle(Event::Started)?;
        if self.machine.local_workers() == 0 {
            self.has_started();
        }
        let mut chores = tokio::time::interval(CHORES);
        while self.outcome.is_none() {
            let deadline = self.machine.deadline().map(|time| self.started + time);
            let sleep = deadline.unwrap_or_else(|| Instant::now() + CHORES);
            tokio::select! {
                biased;
                Some(signal) = signals.recv() => self.stop(signal)?,
                // Before the messages: a flood of those must not keep rows from being acknowledged.
                _ = chores.tick() => self.do_chores()?,
                Some(input) = inputs.recv(), if self.held.len() < stuck::LIMIT => self.take(input)?,
                Some(exit) = self.exited.recv(), if !self.is_stuck => self.reaped(exit)?,
                Some(kept) = self.keeper.next(), if !self.is_stuck => self.kept(kept)?,
                () = self.records.synced() => self.settle_rows()?,
                () = tokio::time::sleep_until(sleep), if !self.is_stuck => self.handle(Event::Tick)?,
            }
        }
        self.publish();
        self.see_off().await;
        // What was ordered last may be the name of the best checkpoint.
        if !self.keeper.finish(KEEPER_LIMIT).await {
            self.records.message(
                "warning: the checkpoint storage takes too long; best.json may be of an earlier checkpoint",
            );
        }
        let outcome = self.outcome.take().unwrap_or(Outcome::Stopped(None));
        self.records.finish(&outcome, self.signal);
        Ok(Ended { outcome, signal: self.signal })
    }

    /// A group trains, or nobody is started here who could: the run has started, and needs no terminal from
    /// now on.
    pub fn has_started(&mut self) {
        let Some(launch) = self.launch.take() else { return };
        if let Err(error) = launch.started(&self.job.job.name, self.records.folder()) {
            self.records.message(&format!("warning: --detach: cannot leave the terminal: {error}"));
        }
    }

    fn start_worker(&mut self) -> Result<(), ShellError> {
        let (token, local_rank) = (new_token()?, self.supervisor.free_rank());
        self.journal.spawning(self.term, &token, local_rank)?;
        let trace = self.records.timeline.path();
        let spawned = self.supervisor.spawn(&self.url, token.clone(), local_rank, trace)?;
        // Numbered by local rank: a process runs, and the journal has its token and not its number.
        failpoint::reached("spawn", local_rank.into());
        self.unnumbered.push((token, spawned));
        self.number_processes()?;
        self.records.event("worker_started", json!({ "pid": spawned.pid, "local_rank": local_rank }));
        Ok(())
    }

    /// Journals which processes were started. One that cannot be yet runs all the same: its token was
    /// journaled.
    fn number_processes(&mut self) -> Result<(), ShellError> {
        while let Some((token, spawned)) = self.unnumbered.last() {
            match self.journal.spawned(token, *spawned) {
                Err(error) if error.may_mend() => return Ok(()),
                done => done?,
            }
            self.unnumbered.pop();
        }
        Ok(())
    }

    /// Journals the size of the data set, and what of it is left out.
    fn journal_size(&mut self) -> Result<(), ShellError> {
        let Some(samples) = self.samples else { return Ok(()) };
        let left_out = json!(self.left_out).to_string();
        let journaled = self.journal.set_fact(Fact::Samples, &samples.to_string());
        self.size_waits = match journaled.and_then(|()| self.journal.set_fact(Fact::LeftOut, &left_out)) {
            Err(error) if error.may_mend() => true,
            done => done.map(|()| false)?,
        };
        Ok(())
    }

    fn now(&self) -> Time {
        self.started.elapsed()
    }

    /// Lets the machine decide and carries out what it decided.
    fn handle(&mut self, event: Event) -> Result<(), ShellError> {
        let mut actions = Vec::new();
        self.machine.handle(self.now(), event, &mut actions);
        // Whoever is released together with the run's end is told so.
        self.is_complete |= actions.contains(&Action::End(Outcome::Complete));
        self.undone.extend(actions);
        self.carry_out()?;
        while let Some(worker) = self.deaf.pop() {
            self.handle(Event::Disconnected(worker))?;
        }
        if self.change == Change::Waits && !self.machine.is_reconnecting() {
            self.change = Change::None;
            self.handle(Event::StopRequested)?;
        }
        Ok(())
    }

    fn take(&mut self, input: Input) -> Result<(), ShellError> {
        if self.is_stuck {
            return self.hold(input);
        }
        match input {
            Input::Hello { hello, session, outbox, answer } => {
                match self.admit(hello.clone(), session, outbox.clone()) {
                    Ok(admitted) => drop(answer.send(admitted)),
                    Err(error) => {
                        self.stick(error)?;
                        self.held.push_front(Held::Input(Input::Hello { hello, session, outbox, answer }));
                    }
                }
                Ok(())
            }
            Input::Message(session, worker, message) => self.take_message(session, worker, message),
            Input::Closed(session, worker) => self.closed(session, worker),
            Input::Admin(input) => self.administer(input),
        }
    }

    fn reaped(&mut self, exit: Exited) -> Result<(), ShellError> {
        if let Err(error) = self.journal.ended(&exit.token) {
            self.stick(error.into())?;
            self.held.push_front(Held::Exit(exit));
            return Ok(());
        }
        let worker = self.supervisor.reaped(&exit.token);
        if exit.input_error && self.machine.group().is_none() {
            // The worker says so in its session as well; whichever comes first ends the run.
            let detail = exit.status.strip_prefix("exit status: 2: ").unwrap_or(&exit.status);
            return self.handle(Event::InputWrong(detail.to_string()));
        }
        let number = worker.map(|worker| worker.0);
        self.records
            .event("worker_exited", json!({ "worker": number, "pid": exit.pid, "status": exit.status }));
        self.handle(Event::Reaped { worker, status: exit.status })
    }

    /// Starts a local worker; one that cannot be started counts as one that ended at once.
    pub(super) fn spawn(&mut self) -> Result<(), ShellError> {
        match self.start_worker() {
            Err(ShellError::System(error)) => {
                self.handle(Event::Reaped { worker: None, status: format!("no start: {error}") })
            }
            done => done,
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
        self.publish();
        self.records.catch_up();
        self.ask_for_rows();
        self.unstick()?;
        self.number_processes()?;
        if self.size_waits {
            self.journal_size()?;
        }
        self.settle_rows()
    }

    /// Does what waited for rows to be durable.
    fn settle_rows(&mut self) -> Result<(), ShellError> {
        if let Some(step) = self.records.acknowledge() {
            self.send_to_all(&ToWorker::MetricsRecorded(step));
        }
        for checkpoint in std::mem::take(&mut self.unjournaled) {
            self.commit(checkpoint)?;
        }
        Ok(())
    }

    /// Asks the workers for rows that did not come, or found no room. One that nobody has after the longest
    /// time for which a worker may be away is lost.
    fn ask_for_rows(&mut self) {
        let saved = self.unjournaled.iter().map(|checkpoint| checkpoint.step).max();
        let limit = self.records.last_step().max(saved.unwrap_or(0));
        let Some(step) = self.records.missing(limit).filter(|_| self.records.has_room()) else {
            self.asked = None;
            return;
        };
        match self.asked.filter(|(asked, _)| *asked == step) {
            None => self.asked = Some((step, Instant::now())),
            Some((_, since)) if since.elapsed() > self.lease => return self.records.give_up(limit),
            Some(_) => {}
        }
        self.send_to_all(&ToWorker::MetricsWanted(step));
    }

    /// Gives the local workers time to exit, then ends those that are left.
    async fn see_off(&mut self) {
        self.workers.clear();
        if matches!(self.outcome, Some(Outcome::Failed(_))) {
            self.supervisor.kill_all();
        }
        let mut deadline = Instant::now() + EXIT_LIMIT;
        while !self.supervisor.is_empty() {
            match tokio::time::timeout_at(deadline, self.exited.recv()).await {
                Ok(Some(exit)) => {
                    let _ = self.journal.ended(&exit.token);
                    self.supervisor.reaped(&exit.token);
                }
                Ok(None) => return,
                Err(_) => {
                    self.supervisor.kill_all();
                    deadline += EXIT_LIMIT;
                }
            }
        }
    }
}
