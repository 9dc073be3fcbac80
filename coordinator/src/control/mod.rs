//! The shell around the membership machine: one loop that feeds events to the machine and carries
//! out its decisions.
//!
//! 1. A decision is journaled before anything acts on it. While the journal cannot be written
//!    nothing is decided (`stuck.rs`).
//! 2. The loop never waits for a worker: a worker that does not read its messages loses its session.
//! 3. A file that cannot be written is retried while training goes on; nothing is acknowledged that
//!    is not written. The loop waits neither for the checkpoint storage, which has a task of its
//!    own (`checkpoints::writer`), nor for a sync of the records.
//! 4. Only a worker's newest session is served: the one that the worker opened last, in whatever
//!    order they arrive.

mod actions;
mod admin;
mod after_completion;
mod attempts;
mod budget;
mod delays;
pub(crate) mod detach;
mod evaluations;
pub(crate) mod records;
mod sessions;
mod still;
mod stuck;
#[cfg(test)]
mod tests;
mod unlike;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::Duration;

use ganglion_membership::{
    Action, Checkpoint, Event, Limits, Machine, Outcome, Position, Progress, Recovered, Settings, StepShape,
    Term, Time, WorkerId,
};
use ganglion_proto::evaluation::AlarmPolicy;
use ganglion_proto::failpoint;
use ganglion_proto::job::{Exclusion, Job};
use ganglion_proto::message::{ToWorker, Usage};
use ganglion_proto::record::RunEvent;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::api::grpc::{Input, Outbox, SessionId, Store};
use crate::checkpoints::best::{Best, Judged};
use crate::checkpoints::catalog::Checkpoints;
use crate::checkpoints::writer::Keeper;
use crate::control::detach::Launch;
use crate::journal::{Fact, Journal, JournalError, Spawned, shape_text};
use crate::records::alarms::Watch;
use crate::records::view::Publisher;
use crate::workers::{EXIT_LIMIT, Exited, Supervisor, new_token};
use attempts::Attempts;
use budget::Budget;
use delays::Delays;
use records::Records;
use still::Still;
use stuck::Held;
use unlike::Newcomer;

/// Interval at which pending writes are retried and recorded rows are acknowledged.
// The dashboard wants a view a second: `/readyz` calls the loop stuck after five without a new one.
const CHORES: Duration = Duration::from_secs(1);
/// Time limit, at the end, for the last orders to the checkpoint storage.
// A group that closes has its last manifest before the end (M11), so what is cut short here is at most
// the naming of the best checkpoint and the removal of old ones.
const KEEPER_LIMIT: Duration = Duration::from_secs(10);
/// Signals this close together count as one request: a launcher may signal a process and then its
/// whole group.
const ONE_REQUEST: Duration = Duration::from_secs(1);

/// A term's plan for the samples that the job asks to leave out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// No change is requested.
    None,
    /// This term only quiesces members of earlier terms; the next term makes the change.
    Waits,
    /// This term trains with the change.
    Made(Exclusion),
}

/// Signal that asked for a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGINT, Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// SIGHUP: the terminal was closed.
    Hangup,
}

impl StopSignal {
    /// Exit code of a process that this signal stopped: 128 plus the signal's number.
    pub fn exit_code(self) -> u8 {
        match self {
            StopSignal::Interrupt => 130,
            StopSignal::Terminate => 143,
            StopSignal::Hangup => 129,
        }
    }
}

/// How this coordinator's part of the run ended.
#[derive(Debug)]
pub struct Ended {
    /// Outcome reported by the machine.
    pub outcome: Outcome,
    /// The signal that caused a stop.
    pub signal: Option<StopSignal>,
    /// Shape of the run's steps.
    pub shape: StepShape,
    /// Alarms whose causes last: their names, each with its reason.
    pub alarms: BTreeMap<String, String>,
}

/// Inputs of [`Shell::new`].
pub struct Parts {
    /// The resolved job.
    pub job: Job,
    /// Term of this coordinator.
    pub term: Term,
    /// The run directory.
    pub folder: PathBuf,
    /// Unique name of the run.
    pub run: String,
    /// The open journal.
    pub journal: Journal,
    /// The checkpoint storage.
    pub checkpoints: Checkpoints,
    /// State recovered from earlier terms.
    pub recovered: Recovered,
    /// Message for a run whose checkpoints are lost while no living member holds a state either.
    pub lost: Option<String>,
    /// Recorded evaluations.
    pub judged: Judged,
    /// Number of local workers to start.
    pub local_workers: u32,
    /// Samples to leave out from now on.
    pub change: Change,
    /// Address at which local workers connect.
    pub url: String,
    /// Address for other workers, with the options that they need.
    pub invitation: String,
    /// Receives a view of the run each second.
    pub publisher: Publisher,
    /// The group's key-value store.
    pub store: Store,
    /// Metrics, events and progress.
    pub records: Records,
    /// Supervisor of the local workers, including those of earlier terms that are still running.
    pub supervisor: Supervisor,
    /// Receives the exits of local workers.
    pub exited: mpsc::UnboundedReceiver<Exited>,
    /// The launcher that waits for the start of the run, with `--detach`.
    pub launch: Option<Launch>,
}

/// Driver of the membership machine. See the module documentation.
pub struct Shell {
    job: Job,
    term: Term,
    run: String,
    journal: Journal,
    keeper: Keeper,
    machine: Machine,
    url: String,
    invitation: String,
    publisher: Publisher,
    store: Store,
    records: Records,
    supervisor: Supervisor,
    exited: mpsc::UnboundedReceiver<Exited>,
    workers: BTreeMap<WorkerId, Connected>,
    /// Attempts by which workers opened their newest sessions.
    attempts: Attempts,
    /// Journaled size of the data set.
    samples: Option<u64>,
    /// Journaled indices of the samples that the job leaves out.
    left_out: Vec<u64>,
    /// Samples to leave out, until a group has formed without them.
    change: Change,
    /// Whether job.toml may be of an earlier term: no group has formed in this one.
    unrecorded: bool,
    /// Workers whose sessions were closed because they do not read their messages.
    deaf: Vec<WorkerId>,
    /// Checkpoints that could not be journaled yet, or whose rows are not durable.
    unjournaled: Vec<Checkpoint>,
    /// Local processes whose process numbers could not be journaled yet, by token.
    unnumbered: Vec<(String, Spawned)>,
    /// Whether the size of the data set still has to be journaled.
    size_waits: bool,
    /// Whether the journal cannot be written. Nothing is decided then.
    is_stuck: bool,
    /// Whether the user was told about the stuck journal.
    told_stuck: bool,
    /// Decisions not carried out yet.
    undone: VecDeque<Action>,
    /// Events received while the journal is stuck.
    held: VecDeque<Held>,
    /// Newest heartbeats that were answered while the journal is stuck and that the machine does not
    /// know.
    unheard: BTreeMap<WorkerId, Progress>,
    /// Warnings already given about checkpoints that cannot be written.
    delays: Delays,
    /// Update index of the newest checkpoint ordered from the keeper.
    ordered: Option<Position>,
    /// Message for a run that may not start from step 0; `None` if it may.
    lost: Option<String>,
    /// The row requested from the workers, and the time of the request.
    asked: Option<(u64, Instant)>,
    /// Time for which a worker may be disconnected.
    lease: Duration,
    signal: Option<StopSignal>,
    /// Time at which `signal` arrived.
    signalled: Instant,
    started: Instant,
    outcome: Option<Outcome>,
    /// Whether the job's last step is done and saved.
    is_complete: bool,
    /// Recorded evaluations.
    judged: Judged,
    /// The best checkpoint, as last sent to the keeper.
    best: Option<Best>,
    /// Raises alarms.
    watch: Watch,
    /// Step of the newest row of metrics checked for alarms.
    watched: u64,
    /// Lines told of a run that shows nothing new.
    still: Still,
    /// The launcher that waits for the start of the run.
    launch: Option<Launch>,
    /// Data of the worker whose facts are being judged.
    newcomer: Newcomer,
    /// Reason of the newest refusal of a worker that would compute other bits.
    refusal: Option<String>,
}

/// A worker known to the machine.
struct Connected {
    session: SessionId,
    /// Queue of messages to the worker; `None` while it has no session.
    outbox: Option<Outbox>,
    host: String,
    pid: u32,
    /// Address at which other workers test whether they reach it.
    address: String,
    /// Device that the worker computes on.
    device: String,
    /// Events that the worker may still cause.
    budget: Budget,
    /// Time and content of the newest heartbeat.
    heard: Option<(Instant, Progress, Usage)>,
}

/// Failure of this process or its machine that ends the run here.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The journal failed: without it nothing may be decided.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A system call failed.
    #[error("{0}")]
    System(#[from] std::io::Error),
}

impl Shell {
    /// Builds a shell. Nothing runs before [`Shell::run`].
    pub fn new(parts: Parts) -> Shell {
        let settings = Settings {
            term: parts.term,
            local_workers: parts.local_workers,
            data_shards: parts.job.job.data_shards,
            limits: Limits::derive(Duration::from_secs_f64(parts.job.job.failure_deadline)),
        };
        let lease = settings.limits.lease;
        let mut watch = Watch::new(&parts.job);
        // Alarms reported by earlier coordinators are not reported again; but a run that an alarm
        // stopped is stopped by it again.
        if parts.job.alarms.policy != AlarmPolicy::Stop {
            parts.judged.rows().for_each(|row| drop(watch.evaluation(row)));
            let known = parts.records.chronicle.look();
            watch.resume(known.losses.clone(), known.alarms.keys());
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
            invitation: parts.invitation,
            still: Still::default(),
            publisher: parts.publisher,
            store: parts.store,
            records: parts.records,
            supervisor: parts.supervisor,
            exited: parts.exited,
            launch: parts.launch,
            newcomer: Newcomer::default(),
            refusal: None,
            workers: BTreeMap::new(),
            attempts: Attempts::default(),
            samples: None,
            left_out: Vec::new(),
            change: parts.change,
            unrecorded: true,
            deaf: Vec::new(),
            unjournaled: Vec::new(),
            unnumbered: Vec::new(),
            size_waits: false,
            is_stuck: false,
            told_stuck: false,
            undone: VecDeque::new(),
            held: VecDeque::new(),
            unheard: BTreeMap::new(),
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

    /// Runs until the machine ends the run, then waits for the local workers to exit. `signals`
    /// delivers the user's signals.
    pub async fn run(
        &mut self,
        inputs: &mut mpsc::Receiver<Input>,
        signals: &mut mpsc::UnboundedReceiver<StopSignal>,
    ) -> Result<Ended, ShellError> {
        // Before any input: the machine takes nothing else as its first event.
        self.handle(Event::Started)?;
        // Workers of other machines may come in an hour or never; a launcher cannot hold its terminal
        // for that.
        if self.machine.local_workers() == 0 {
            self.has_started();
        }
        let mut chores = tokio::time::interval(CHORES);
        while self.outcome.is_none() {
            let deadline = self.machine.deadline().map(|time| self.started + time);
            // `select!` needs some sleep; a tick that no limit asked for changes nothing.
            let sleep = deadline.unwrap_or_else(|| Instant::now() + CHORES);
            tokio::select! {
                // Polled in this order: signals first; the machine's timer last, so that heartbeats
                // in the queue are handled before any worker is judged late.
                biased;
                Some(signal) = signals.recv() => self.stop(signal)?,
                // Before the messages: a flood of them must not keep rows from being acknowledged.
                _ = chores.tick() => self.do_chores()?,
                // While the journal is stuck, input stays in the channel beyond this limit:
                // back-pressure to the sessions.
                Some(input) = inputs.recv(), if self.held.len() < stuck::LIMIT => self.take(input)?,
                // The end of a process is journaled before the machine hears of it, so exits stay in
                // their channel until that is possible again.
                Some(exit) = self.exited.recv(), if !self.is_stuck => self.reaped(exit)?,
                // A checkpoint that is valid is journaled as such before workers hear of it, so reports
                // wait as well.
                Some(kept) = self.keeper.next(), if !self.is_stuck => self.kept(kept)?,
                // Dropping this future loses nothing: the sync runs in a thread of its own.
                () = self.records.synced() => self.settle_rows()?,
                // While the journal is stuck, messages wait. A tick would have the machine judge workers
                // that have answered; without one it takes the gap for an oversleep of its own (M9).
                () = tokio::time::sleep_until(sleep), if !self.is_stuck => self.handle(Event::Tick)?,
            }
        }
        self.publish();
        // Waits for local workers, EXIT_LIMIT before they are killed; remote ones are not waited for.
        self.see_off().await;
        // The last order may be the naming of the best checkpoint.
        if !self.keeper.finish(KEEPER_LIMIT).await {
            self.records.message(
                "warning: the checkpoint storage takes too long; best.json may be of an earlier checkpoint",
            );
        }
        let outcome = self.outcome.take().unwrap_or(Outcome::Stopped(None));
        self.records.finish(&outcome, self.signal);
        let alarms = self.records.chronicle.look().alarms.clone();
        Ok(Ended { outcome, signal: self.signal, shape: self.job.shape(), alarms })
    }

    /// Reports the start of the run to the launcher: a group trains, or no local worker exists that
    /// could. From now on no terminal is needed.
    pub fn has_started(&mut self) {
        let Some(launch) = self.launch.take() else { return };
        if let Err(error) = launch.started(&self.job.job.name, self.records.folder()) {
            self.records.message(&format!("warning: --detach: cannot leave the terminal: {error}"));
        }
    }

    /// The launcher, if it was not told of a start: it waits for the next term's.
    pub fn waiting_launch(&mut self) -> Option<Launch> {
        self.launch.take()
    }

    fn start_worker(&mut self) -> Result<(), ShellError> {
        let (token, local_rank) = (new_token()?, self.supervisor.free_rank());
        // M12: the token is durable before the process exists. A coordinator that follows one that dies
        // in between knows whom to expect; the other order would leave a worker whose token nobody
        // knows.
        self.journal.spawning(self.term, &token, local_rank)?;
        let trace = self.records.timeline.path();
        let spawned = self.supervisor.spawn(&self.url, token.clone(), local_rank, trace)?;
        // Numbered by local rank: a process runs, and the journal has its token and not its process number.
        failpoint::reached("spawn", local_rank.into());
        self.unnumbered.push((token, spawned));
        self.number_processes()?;
        self.records.event(&RunEvent::WorkerStarted { local_rank, pid: spawned.pid });
        Ok(())
    }

    /// Journals the process numbers of started workers. A process whose number cannot be journaled
    /// yet runs all the same: its token was journaled.
    fn number_processes(&mut self) -> Result<(), ShellError> {
        // Only looked at until the number is durable: an entry that cannot be journaled stays for the
        // next chore.
        while let Some((token, spawned)) = self.unnumbered.last() {
            match self.journal.spawned(token, *spawned) {
                Err(error) if error.may_mend() => return Ok(()),
                done => done?,
            }
            self.unnumbered.pop();
        }
        Ok(())
    }

    /// Journals the size of the data set, the shape of a step, and the indices of the samples left out.
    fn journal_size(&mut self) -> Result<(), ShellError> {
        let Some(samples) = self.samples else { return Ok(()) };
        let left_out = json!(self.left_out).to_string();
        let mut journaled = self.journal.set_fact(Fact::Samples, &samples.to_string());
        if let (Ok(()), Some(shape)) = (&journaled, &self.job.shape) {
            journaled = self.journal.set_fact(Fact::Shape, &shape_text(shape));
        }
        // No decision of this term depends on the size being durable, so a failure here does not stick
        // the loop; the chores try again.
        self.size_waits = match journaled.and_then(|()| self.journal.set_fact(Fact::LeftOut, &left_out)) {
            Err(error) if error.may_mend() => true,
            done => done.map(|()| false)?,
        };
        Ok(())
    }

    /// Takes the shape of a step over from the machine, which has it from the first worker that loads.
    fn learn_shape(&mut self) {
        let news = self.machine.shape().filter(|shape| self.job.shape.as_ref() != Some(*shape));
        let Some(shape) = news.cloned() else { return };
        self.records.learn_shape(&shape);
        self.judged.learn_shape(&shape);
        self.job.shape = Some(shape);
        self.watch.learn_shape(&self.job);
    }

    fn now(&self) -> Time {
        self.started.elapsed()
    }

    /// Passes an event to the machine and carries out its decisions.
    fn handle(&mut self, event: Event) -> Result<(), ShellError> {
        let (now, mut actions) = (self.now(), Vec::new());
        // Before any event: each call of the machine judges who is silent, and what it has not heard of
        // was answered all the same. Those answers renewed leases (M4).
        for (worker, progress) in std::mem::take(&mut self.unheard) {
            self.machine.handle(now, Event::Heartbeat(worker, progress), &mut actions);
        }
        self.machine.handle(now, event, &mut actions);
        // Before the actions, which count steps by it.
        self.learn_shape();
        // Workers released together with the run's end are told that it is complete.
        self.is_complete |= actions.contains(&Action::End(Outcome::Complete));
        // Behind the actions that still wait for the journal: carried out in any other order, a later
        // decision would be announced before an earlier one is durable (M1).
        self.undone.extend(actions);
        self.carry_out()?;
        // Told here and not in `send`, which is called in the middle of an action: the rest of that
        // action would come after decisions that follow from the loss.
        while let Some(worker) = self.deaf.pop() {
            self.handle(Event::Disconnected(worker))?;
        }
        // The wait for members of earlier terms is over. The present ones are stopped in order, and the
        // next term makes the change.
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
                // Cloned, since a hello that meets a stuck journal must be tried again exactly as it
                // came.
                match self.admit(hello.clone(), session, outbox.clone()) {
                    Ok(admitted) => drop(answer.send(admitted)),
                    Err(error) => {
                        self.stick(error)?;
                        // In front: while `unstick` empties the queue, later inputs are still in it.
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
        // Journaled before the machine acts on it. A later coordinator on another machine cannot look
        // the process up, and would wait for the end of its lease.
        if let Err(error) = self.journal.ended(&exit.token) {
            self.stick(error.into())?;
            self.held.push_front(Held::Exit(exit));
            return Ok(());
        }
        let worker = self.supervisor.reaped(&exit.token);
        if exit.input_error && self.machine.group().is_none() {
            // The worker reports this in its session as well; whichever comes first ends the run.
            let detail = exit.status.strip_prefix("exit status: 2: ").unwrap_or(&exit.status);
            return self.handle(Event::InputWrong(detail.to_string()));
        }
        self.records.event(&RunEvent::WorkerExited {
            pid: exit.pid,
            status: exit.status.clone(),
            worker: worker.map(|worker| worker.0),
        });
        self.handle(Event::Reaped { worker, status: exit.status })
    }

    /// Starts a local worker. A worker that cannot be started counts as one that ended at once.
    pub(super) fn spawn(&mut self) -> Result<(), ShellError> {
        match self.start_worker() {
            // Through the machine, which knows how to pace and when to give up replacements; a retry
            // here would spin.
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
        // No checkpoint is waited for: a second request means that the user does not want to wait for
        // one. The next start goes on from the newest that is valid.
        if self.signal.is_some() {
            self.outcome = Some(Outcome::Failed(
                "stopped at once by a second signal; the same command goes on from the newest checkpoint"
                    .to_string(),
            ));
            return Ok(());
        }
        (self.signal, self.signalled) = (Some(signal), Instant::now());
        self.records.message("stopping: saving a checkpoint after this step (once more to stop at once)");
        self.records.event(&RunEvent::StopRequested {});
        self.handle(Event::StopRequested)
    }

    fn do_chores(&mut self) -> Result<(), ShellError> {
        self.publish();
        self.tell_if_still();
        self.records.catch_up();
        self.ask_for_rows();
        self.unstick()?;
        self.number_processes()?;
        if self.size_waits {
            self.journal_size()?;
        }
        self.settle_rows()
    }

    /// Completes the work that waited for rows to be durable.
    fn settle_rows(&mut self) -> Result<(), ShellError> {
        if let Some(step) = self.records.acknowledge() {
            self.send_to_all(&ToWorker::MetricsRecorded(step));
        }
        // A decision that waits may give these checkpoints up (D10), and was made after them; `Condemn`
        // must find them here.
        if self.is_stuck {
            return Ok(());
        }
        // All at once, since `commit` puts back each one that cannot be journaled yet.
        for checkpoint in std::mem::take(&mut self.unjournaled) {
            self.commit(checkpoint)?;
        }
        Ok(())
    }

    /// Requests rows that did not arrive, or found no room, from the workers. A row that no worker
    /// has after the longest time for which a worker may be away is lost.
    fn ask_for_rows(&mut self) {
        let saved = self.unjournaled.iter().map(|checkpoint| checkpoint.step).max();
        // A checkpoint that waits needs all rows up to its step, also where no later row has shown that
        // one is missing.
        let limit = self.records.last_step().max(saved.unwrap_or(0));
        // With rows still waiting for the disk, requested ones would only be refused again.
        let Some(step) = self.records.missing(limit).filter(|_| self.records.has_room()) else {
            self.asked = None;
            return;
        };
        match self.asked.filter(|(asked, _)| *asked == step) {
            None => self.asked = Some((step, Instant::now())),
            // A member out of sight may still bring it, until its lease ends.
            Some((_, since)) if since.elapsed() > self.lease => return self.records.give_up(limit),
            Some(_) => {}
        }
        self.send_to_all(&ToWorker::MetricsWanted(step));
    }

    /// Gives the local workers time to exit, then kills the rest.
    async fn see_off(&mut self) {
        // Drops the outboxes: a session ends once its worker has read what was sent before, a release
        // included.
        self.workers.clear();
        // A failure may end the loop without any release. The workers would train on until the end of
        // their lease, for nobody.
        if matches!(self.outcome, Some(Outcome::Failed(_))) {
            self.supervisor.kill_all();
        }
        let mut deadline = Instant::now() + EXIT_LIMIT;
        while !self.supervisor.is_empty() {
            match tokio::time::timeout_at(deadline, self.exited.recv()).await {
                Ok(Some(exit)) => {
                    // A failure costs the next start a look at a process that is gone.
                    let _ = self.journal.ended(&exit.token);
                    self.supervisor.reaped(&exit.token);
                }
                // Cannot happen while the supervisor lives, for it holds a sender.
                Ok(None) => return,
                Err(_) => {
                    self.supervisor.kill_all();
                    // A killed process is still waited for, so that its end is journaled.
                    deadline += EXIT_LIMIT;
                }
            }
        }
    }
}
