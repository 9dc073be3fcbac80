//! The worker's side of its session with the coordinator.
//!
//! A thread of its own keeps the stream alive and answers at once, whatever the training thread does: it
//! receives assignments, aborts a group that it is told to leave, sends heartbeats, and reconnects to the
//! coordinator when the stream ends. The training thread asks for its next assignment when it is quiesced,
//! and reads the newest plan at each reduce.
//!
//! 1. An abort reaches the group of its generation even when it arrives before that group was formed.
//! 2. Metrics rows and reports of written files are kept until the coordinator says that they are recorded.
//! 3. Training goes on without a coordinator until the lease is over, and no further:
//!    [`Session::may_commit`].
//! 4. A worker refuses a coordinator of an older term than it has known, and one of another run.
//! 5. A worker that its coordinator no longer knows gives its group up before it reports that it has
//!    loaded.

mod client;
pub mod gloo_tls;
mod lease;
pub mod monitor;
mod probe;
mod store;

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use c10d::{Aborter, KeyValueStore};
use ganglion_membership::{
    Activity, Fault, Generation, Limits, LoadedFacts, Plan, Position, Progress, Rank, Rested, Term,
    WrittenPart,
};
use ganglion_proto::dial::Credentials;
use ganglion_proto::evaluation::EvaluationRow;
use ganglion_proto::found::Found;
use ganglion_proto::message::{Assignment, FromWorker, GpuUse, MetricsRow, Resume, Welcome};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::device::gpu::GpuWatch;
pub use client::{Connect, ConnectError, Connecting, Host};
pub use lease::Clock;
use lease::Lease;
pub use probe::unreachable;
use store::GrpcStore;

use crate::session::gloo_tls::Tunnels;

/// Number of recorded evaluations' steps that are remembered.
const RECORDED_LIMIT: usize = 64;
/// Maximum number of unrecorded rows that a worker keeps: about 60 MB.
const ROWS_LIMIT: usize = 1 << 18;
/// Interval at which a wait checks the conditions that do not wake it.
const LOOK: Duration = Duration::from_millis(100);

/// End of a worker's part in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Released by the coordinator: the worker is no longer needed.
    Released,
    /// The run is complete: neither it nor another in its place is needed any more.
    Complete,
    /// Refused by the coordinator, with the reason.
    Rejected(String),
    /// The coordinator is gone for longer than the lease.
    Lost(String),
}

/// An open session.
pub struct Session {
    shared: Arc<Shared>,
    outbox: UnboundedSender<FromWorker>,
    runtime: tokio::runtime::Handle,
    /// The address under which this machine reaches the coordinator.
    local_address: std::net::IpAddr,
    credentials: Credentials,
    /// TLS tunnels for Gloo; `None` without TLS.
    tunnels: Option<Tunnels>,
}

/// State shared by the training thread and the session's thread.
struct Shared {
    inbox: Mutex<Inbox>,
    changed: Condvar,
    /// Newest aborted generation; the store's waits end when it changes.
    aborted: watch::Sender<Generation>,
    lease: Lease,
    position: AtomicU64,
    activity: AtomicU8,
    leaves: AtomicU64,
    slowest_leaf_us: AtomicU64,
    /// Sampler of the GPU's use; unset on a CPU.
    gpu: OnceLock<GpuWatch>,
}

struct Inbox {
    welcome: Welcome,
    channel: Channel,
    /// The newest assignment's generation, and the term that gave it.
    assigned: (Generation, Term),
    assignment: Option<Assignment>,
    plan: Option<Plan>,
    /// Whether the newest abort asks for a probe.
    probe: bool,
    group: Option<(Generation, Aborter)>,
    /// State at which the training thread is quiesced; `None` while it may commit.
    rest: Option<Rested>,
    /// Reason for leaving the newest generation, sent again with each new session.
    fault: Option<Fault>,
    /// Whether the state that this worker holds is invalidated.
    void: bool,
    facts: Option<(LoadedFacts, Option<Box<Found>>)>,
    /// Whether `facts` are held back from the coordinator until the training thread is quiesced.
    introduce: bool,
    end: Option<End>,
    rows: VecDeque<MetricsRow>,
    /// Whether this member (rank 0) sends the rows to the coordinator.
    reports_rows: bool,
    parts: VecDeque<(Generation, WrittenPart)>,
    evaluations: Evaluations,
}

/// Evaluations made by this worker, and the steps of those already recorded.
#[derive(Default)]
struct Evaluations {
    /// Rows that the coordinator has not acknowledged.
    rows: VecDeque<EvaluationRow>,
    /// Newest steps whose evaluation is recorded, at most [`RECORDED_LIMIT`].
    recorded: BTreeSet<u64>,
}

impl Session {
    /// Connects to the coordinator, sends the hello, and waits for the welcome. `device` names the compute
    /// device; it is diagnostic only.
    pub fn open(
        url: &str,
        credentials: Credentials,
        spawn_token: Option<String>,
        device: String,
    ) -> Result<Session, ConnectError> {
        client::open(url, credentials, spawn_token, device)
    }

    /// The same on a given host, as a task of the calling runtime.
    pub async fn open_on(
        host: Host,
        url: &str,
        spawn_token: Option<String>,
    ) -> Result<Session, ConnectError> {
        client::begin(url, spawn_token, host).await
    }

    /// The coordinator's newest welcome.
    pub fn welcome(&self) -> Welcome {
        self.shared.lock().welcome.clone()
    }

    /// The time limits of the run.
    pub fn limits(&self) -> Limits {
        self.shared.lock().limits()
    }

    /// The address under which other machines of the run find this one.
    pub fn local_address(&self) -> std::net::IpAddr {
        self.local_address
    }

    /// Sends a message. After the session's end it is dropped, and [`Session::end`] tells of the end.
    pub fn send(&self, message: FromWorker) {
        let _ = self.outbox.send(message);
    }

    /// Reports to the coordinator that this worker has loaded and can train.
    pub fn loaded(&self, facts: LoadedFacts, found: Option<Box<Found>>) {
        self.shared.lock().facts = Some((facts.clone(), found.clone()));
        self.send(FromWorker::Loaded(facts, found));
    }

    /// The next generation, or the end, if it is there.
    pub fn try_next_assignment(&self) -> Option<Result<Assignment, End>> {
        self.set_activity(Activity::Resting);
        self.shared.lock().next()
    }

    /// Waits, quiesced, for the next generation or the end.
    pub fn next_assignment(&self) -> Result<Assignment, End> {
        self.set_activity(Activity::Resting);
        let mut inbox = self.shared.lock();
        loop {
            if let Some(next) = inbox.next() {
                return next;
            }
            // The session's thread watches the lease, so this wait ends with that at the latest.
            let waited = self.shared.changed.wait_timeout(inbox, Duration::from_secs(1));
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Reports why this worker leaves a generation, and again with each new session until there is another
    /// generation: without the reason the other members would be expected to quiesce as well. If the
    /// members' states differ, this worker's state is invalidated, and the coordinator hears of that before
    /// it hears that the worker is quiesced.
    pub fn left(&self, generation: Generation, fault: Fault) {
        let mut inbox = self.shared.lock();
        if matches!(fault, Fault::Diverged(_)) {
            inbox.condemn();
        }
        if inbox.assigned.0 == generation {
            inbox.fault = Some(fault.clone());
        }
        self.send(FromWorker::Fault(generation, fault));
    }

    /// Whether the state that this worker holds is invalidated.
    pub fn is_void(&self) -> bool {
        self.shared.lock().void
    }

    /// Notes that the invalidated state has been dropped.
    pub fn void_is_gone(&self) {
        self.shared.lock().void = false;
    }

    /// Reports that the training thread is quiesced and commits nothing more of a generation.
    pub fn rested(&self, generation: Generation, mut rest: Rested) {
        let mut inbox = self.shared.lock();
        inbox.group = None;
        if inbox.void {
            rest = Rested { position: None, finished: None };
        }
        if inbox.assigned.0 == generation {
            inbox.rest = Some(rest);
        }
        let message = match (rest.finished, rest.position) {
            (Some(complete), Some(position)) => FromWorker::Finished(generation, position, complete),
            (_, position) => FromWorker::Ready(generation, position),
        };
        self.send(message);
        if std::mem::take(&mut inbox.introduce)
            && let Some((facts, found)) = inbox.facts.clone()
        {
            self.send(FromWorker::Loaded(facts, found));
        }
    }

    /// Returns the end of the session, if it has ended.
    pub fn end(&self) -> Option<End> {
        self.shared.lock().end.clone()
    }

    /// Waits for the session's end, at most this long.
    pub fn wait_for_end(&self, limit: Duration) -> Option<End> {
        let inbox = self.shared.lock();
        let waited = self.shared.changed.wait_timeout_while(inbox, limit, |inbox| inbox.end.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.end.clone()
    }

    /// The newest plan for the current group.
    pub fn plan(&self) -> Option<Plan> {
        self.shared.lock().plan
    }

    /// Whether a phase may be committed: while the coordinator answers, and until the lease is over when it
    /// does not.
    pub fn may_commit(&self) -> bool {
        self.shared.lease.holds()
    }

    /// Whether this worker was told to leave `generation`.
    pub fn is_aborted(&self, generation: Generation) -> bool {
        *self.shared.aborted.borrow() >= generation
    }

    /// Returns whether a probe of the last group's members was requested, and clears the request.
    pub fn take_probe(&self) -> bool {
        std::mem::take(&mut self.shared.lock().probe)
    }

    /// Lets an abort of `generation` reach this group from now on; an abort that came earlier does so at
    /// once.
    pub fn watch_group(&self, generation: Generation, aborter: Aborter) {
        let mut inbox = self.shared.lock();
        if self.is_aborted(generation) || inbox.end.is_some() {
            aborter.abort();
        }
        inbox.group = Some((generation, aborter));
    }

    /// The store in which the members of the newest generation find each other, and its term.
    pub fn store(&self) -> (Arc<dyn KeyValueStore>, Term) {
        let inbox = self.shared.lock();
        let ((generation, term), channel) = (inbox.assigned, inbox.channel.clone());
        let aborted = self.shared.aborted.subscribe();
        let token = self.credentials.token().unwrap_or_default();
        (Arc::new(GrpcStore::new(channel, self.runtime.clone(), token, term, generation, aborted)), term)
    }

    /// Adds the GPU's use to the heartbeats. A worker has one watch: a second one changes nothing.
    pub fn watch_gpu(&self, watch: GpuWatch) {
        // A second watch is dropped, and its thread ends with it.
        let _ = self.shared.gpu.set(watch);
    }

    /// Current use of the worker's GPU.
    pub fn gpu_use(&self) -> GpuUse {
        self.shared.gpu_use()
    }

    /// TLS tunnels for Gloo; `None` without TLS.
    pub fn tunnels(&self) -> Option<&Tunnels> {
        self.tunnels.as_ref()
    }

    /// Sets the update index (`position`) that heartbeats report.
    pub fn set_position(&self, position: Position) {
        self.shared.position.store(position.0, Ordering::Relaxed);
    }

    /// Sets the training thread's activity that heartbeats report.
    pub fn set_activity(&self, activity: Activity) {
        self.shared.activity.store(activity as u8, Ordering::Relaxed);
    }

    /// Reports in heartbeats, until the returned value is dropped, that training is paused for other work.
    pub fn pause(&self) -> Pause<'_> {
        let activity = &self.shared.activity;
        Pause { activity, before: activity.swap(Activity::Paused as u8, Ordering::Relaxed) }
    }

    /// Counts a computed shard gradient (`leaf`) for the heartbeats, with the time it took.
    pub fn leaf_done(&self, took: Duration) {
        self.shared.leaves.fetch_add(1, Ordering::Relaxed);
        // The maximum decays: one outlier, such as a pause of the machine, is forgotten after some hundred
        // others.
        let known = self.shared.slowest_leaf_us.load(Ordering::Relaxed);
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.shared.slowest_leaf_us.store(took.max(known - known / 256), Ordering::Relaxed);
    }

    /// Keeps a row until it is recorded; rank 0 sends it as well.
    pub fn report(&self, rank: Rank, row: MetricsRow) {
        if rank == Rank(0) {
            self.send(FromWorker::Metrics(row.clone()));
        }
        self.shared.lock().rows.push_back(row);
    }

    /// Waits until another row may be kept: an unrecorded row is never dropped. An abort of `generation`,
    /// the end of the lease or of the session ends the wait.
    pub fn wait_for_room(&self, generation: Generation) {
        self.wait_for_room_among(ROWS_LIMIT, generation);
    }

    /// The same with at most `limit` rows.
    fn wait_for_room_among(&self, limit: usize, generation: Generation) {
        let is_full = |inbox: &Inbox| inbox.rows.len() >= limit && inbox.end.is_none();
        let mut inbox = self.shared.lock();
        if !is_full(&inbox) {
            return;
        }
        tracing::warn!("{limit} rows are not recorded; training waits until the coordinator can write them");
        self.set_activity(Activity::Paused);
        while is_full(&inbox) && !self.is_aborted(generation) && self.may_commit() {
            let waited = self.shared.changed.wait_timeout(inbox, LOOK);
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Reports the row of a step that other members have reported, unless this worker keeps it already.
    pub fn report_unless_kept(&self, rank: Rank, row: MetricsRow) {
        let is_kept = self.shared.lock().rows.iter().any(|kept| kept.step == row.step);
        if !is_kept {
            self.report(rank, row);
        }
    }

    /// Rows that no coordinator has acknowledged.
    pub fn kept_rows(&self) -> Vec<MetricsRow> {
        self.shared.lock().rows.iter().cloned().collect()
    }

    /// Sends all kept rows again, except those of steps after `step`, which are computed again. After a
    /// change of the group nobody knows which rows arrived and which member has them all.
    pub fn report_kept(&self, rank: Rank, step: u64) {
        // Sent under the lock, so that no row comes between: the queue has no limit, and sending does not
        // wait.
        let mut inbox = self.shared.lock();
        inbox.reports_rows = rank == Rank(0);
        inbox.rows.retain(|row| row.step <= step);
        inbox.parts.retain(|(_, part)| part.step <= step);
        inbox.evaluations.rows.retain(|row| row.step <= step);
        inbox.rows.iter().for_each(|row| self.send(FromWorker::Metrics(row.clone())));
        inbox.evaluations.rows.iter().for_each(|row| self.send(FromWorker::Evaluation(row.clone())));
    }

    /// Reports an evaluation, and keeps the row until it is recorded.
    pub fn report_evaluation(&self, row: EvaluationRow) {
        let mut inbox = self.shared.lock();
        if !inbox.evaluations.recorded.contains(&row.step) {
            inbox.evaluations.rows.push_back(row.clone());
            self.send(FromWorker::Evaluation(row));
        }
    }

    /// Whether the coordinator has acknowledged the evaluation of a step.
    pub fn is_evaluated(&self, step: u64) -> bool {
        self.shared.lock().evaluations.recorded.contains(&step)
    }

    /// Reports a written checkpoint file of a state that a generation trained to, and keeps the report
    /// until the checkpoint is recorded.
    pub fn report_part(&self, generation: Generation, part: WrittenPart) {
        self.shared.lock().parts.push_back((generation, part.clone()));
        self.send(FromWorker::PartWritten(generation, part));
    }
}

/// Guard that marks training as paused until it is dropped. See [`Session::pause`].
pub struct Pause<'a> {
    activity: &'a AtomicU8,
    before: u8,
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.activity.store(self.before, Ordering::Relaxed);
    }
}

impl Inbox {
    fn next(&mut self) -> Option<Result<Assignment, End>> {
        self.end.clone().map(Err).or_else(|| self.assignment.take().map(Ok))
    }

    /// Invalidates the held state and every pending report of it.
    fn condemn(&mut self) {
        self.void = true;
        self.parts.clear();
        if let Some(rest) = &mut self.rest {
            *rest = Rested { position: None, finished: None };
        }
    }

    fn limits(&self) -> Limits {
        Limits::derive(Duration::from_secs_f64(self.welcome.job.job.failure_deadline))
    }
}

/// Whether a fault must be reported before the quiesced position that followed it: otherwise that position
/// would be taken for one of a valid state.
fn goes_before_rest(fault: &Fault) -> bool {
    matches!(fault, Fault::Diverged(_))
}

/// Messages to repeat in a new session: the fault of a generation, and the quiesced position that the hello
/// left out because of it.
fn unheard(generation: Generation, fault: Option<Fault>, rest: Option<Rested>) -> Vec<FromWorker> {
    let Some(fault) = fault else { return Vec::new() };
    let untold = rest.filter(|_| goes_before_rest(&fault));
    let ready = untold.map(|rest| FromWorker::Ready(generation, rest.position));
    std::iter::once(FromWorker::Fault(generation, fault)).chain(ready).collect()
}

impl Shared {
    fn new(welcome: Welcome, channel: Channel, lease: Lease) -> Shared {
        let inbox = Inbox {
            welcome,
            channel,
            assigned: (Generation(0), Term(0)),
            assignment: None,
            plan: None,
            probe: false,
            group: None,
            rest: Some(Rested { position: None, finished: None }),
            fault: None,
            void: false,
            facts: None,
            introduce: false,
            end: None,
            rows: VecDeque::new(),
            reports_rows: false,
            parts: VecDeque::new(),
            evaluations: Evaluations::default(),
        };
        Shared {
            inbox: Mutex::new(inbox),
            changed: Condvar::new(),
            aborted: watch::Sender::new(Generation(0)),
            lease,
            position: AtomicU64::new(0),
            activity: AtomicU8::new(Activity::Resting as u8),
            leaves: AtomicU64::new(0),
            slowest_leaf_us: AtomicU64::new(0),
            gpu: OnceLock::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        // Nothing panics while it holds the lock, and an inbox is whole at any time.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gpu_use(&self) -> GpuUse {
        self.gpu.get().map(GpuWatch::newest).unwrap_or_default()
    }

    fn progress(&self) -> Progress {
        let stored = self.activity.load(Ordering::Relaxed);
        let all = [Activity::Computing, Activity::Waiting, Activity::Resting, Activity::Paused];
        Progress {
            position: Position(self.position.load(Ordering::Relaxed)),
            leaves: self.leaves.load(Ordering::Relaxed),
            activity: all.into_iter().find(|activity| *activity as u8 == stored).unwrap_or_default(),
            slowest_leaf: Duration::from_micros(self.slowest_leaf_us.load(Ordering::Relaxed)),
        }
    }

    /// Identity that a reconnecting worker presents in its hello.
    fn resume(&self) -> Resume {
        let inbox = self.lock();
        Resume {
            run: inbox.welcome.run.clone(),
            worker: inbox.welcome.worker,
            term: inbox.welcome.term,
            generation: inbox.assigned.0,
            rest: inbox.rest.filter(|_| !inbox.fault.as_ref().is_some_and(goes_before_rest)),
        }
    }

    /// Takes over the welcome of a new connection, and returns the messages to send again.
    fn welcome_again(&self, welcome: Welcome, channel: Channel) -> Vec<FromWorker> {
        let mut inbox = self.lock();
        let stranger = welcome.worker != inbox.welcome.worker;
        if inbox.assigned.0 > Generation(0) && inbox.assigned.0 <= welcome.condemned {
            inbox.condemn();
        }
        (inbox.welcome, inbox.channel) = (welcome, channel);
        if stranger {
            tracing::info!("the coordinator takes this worker in anew, as worker {}", inbox.welcome.worker);
            // An assignment that the training thread has not taken yet fails at once, and then the thread is
            // quiesced.
            let assigned = inbox.assigned.0;
            self.abort_locked(&inbox, assigned);
            inbox.introduce = inbox.rest.is_none();
            inbox.fault = None;
        }
        let mut again = Vec::new();
        if !inbox.introduce {
            let facts = inbox.facts.clone();
            again.extend(facts.map(|(facts, found)| FromWorker::Loaded(facts, found)));
        }
        again.extend(unheard(inbox.assigned.0, inbox.fault.clone(), inbox.rest));
        // Rows go before files: with the last file of the last checkpoint the run may end.
        if inbox.reports_rows {
            again.extend(inbox.rows.iter().cloned().map(FromWorker::Metrics));
        }
        again.extend(inbox.evaluations.rows.iter().cloned().map(FromWorker::Evaluation));
        let parts = inbox.parts.iter().cloned();
        again.extend(parts.map(|(generation, part)| FromWorker::PartWritten(generation, part)));
        again
    }

    fn take_assignment(&self, term: Term, assignment: Assignment) {
        let mut inbox = self.lock();
        if assignment.group.generation <= inbox.assigned.0 {
            return;
        }
        inbox.assigned = (assignment.group.generation, term);
        inbox.plan = None;
        inbox.rest = None;
        inbox.fault = None;
        inbox.assignment = Some(assignment);
        self.changed.notify_all();
    }

    fn take_plan(&self, plan: Plan) {
        let mut inbox = self.lock();
        if inbox.plan.is_none_or(|known| known.number < plan.number) {
            inbox.plan = Some(plan);
        }
    }

    fn abort(&self, generation: Generation, probe: bool, condemned: bool) {
        let mut inbox = self.lock();
        if inbox.assigned.0 == generation {
            inbox.probe |= probe;
            if condemned {
                inbox.condemn();
            }
        }
        self.abort_locked(&inbox, generation);
    }

    fn abort_locked(&self, inbox: &Inbox, generation: Generation) {
        // Waiters of the store see the new value. The aborter is called under the inbox's lock, so that a
        // group set by `watch_group` meanwhile is not missed.
        self.aborted.send_modify(|newest| *newest = generation.max(*newest));
        if let Some((watched, aborter)) = &inbox.group
            && *watched <= generation
        {
            aborter.abort();
        }
    }

    fn forget_rows(&self, recorded: u64) {
        self.lock().rows.retain(|row| row.step > recorded);
        self.changed.notify_all();
    }

    /// Kept rows from step `first` on.
    fn rows_from(&self, first: u64) -> Vec<MetricsRow> {
        self.lock().rows.iter().filter(|row| row.step >= first).cloned().collect()
    }

    fn forget_parts(&self, recorded: (u64, u32)) {
        self.lock().parts.retain(|(_, part)| (part.step, part.phase) > recorded);
    }

    fn forget_evaluations(&self, steps: &[u64]) {
        let evaluations = &mut self.lock().evaluations;
        evaluations.rows.retain(|row| !steps.contains(&row.step));
        evaluations.recorded.extend(steps);
        while evaluations.recorded.len() > RECORDED_LIMIT {
            evaluations.recorded.pop_first();
        }
    }

    fn end(&self, end: End) {
        let mut inbox = self.lock();
        self.abort_locked(&inbox, Generation(u64::MAX));
        inbox.end.get_or_insert(end);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_session_tells_again_why_the_worker_rests() {
        let (generation, rest) =
            (Generation(3), Some(Rested { position: Some(Position(8)), finished: None }));
        assert!(unheard(generation, None, rest).is_empty());
        let late = unheard(generation, Some(Fault::Timeout), rest);
        assert!(matches!(&late[..], [FromWorker::Fault(Generation(3), Fault::Timeout)]), "{late:?}");
        let differs = Fault::Diverged("rank 0 and rank 1".to_string());
        assert!(goes_before_rest(&differs) && !goes_before_rest(&Fault::Peer));
        let differs = unheard(generation, Some(differs), rest);
        assert!(matches!(&differs[..], [FromWorker::Fault(..), FromWorker::Ready(..)]), "{differs:?}");
    }

    fn row(step: u64) -> MetricsRow {
        MetricsRow { step, generation: 1, world_size: 2, ..MetricsRow::default() }
    }

    /// A session whose coordinator sends nothing.
    fn session(runtime: &tokio::runtime::Runtime) -> Session {
        use ganglion_coordinator::job_file::{Source, read};
        let _entered = runtime.enter();
        let welcome = Welcome {
            term: Term(1),
            worker: ganglion_membership::WorkerId(1),
            run: "run".to_string(),
            job: read(&Source::Embedded, &[]).unwrap(),
            storage: String::new(),
            condemned: Generation(0),
        };
        let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let lease = Lease::new(lease::boot_clock, lease::boot_clock(), Duration::from_secs(600));
        Session {
            shared: Arc::new(Shared::new(welcome, channel, lease)),
            outbox: tokio::sync::mpsc::unbounded_channel().0,
            runtime: runtime.handle().clone(),
            local_address: std::net::Ipv4Addr::LOCALHOST.into(),
            credentials: Credentials::default(),
            tunnels: None,
        }
    }

    /// Begins a wait with at most `limit` rows, ends it by `end`, and returns the steps of the rows kept
    /// then.
    fn steps_after_a_wait(session: &Session, limit: usize, end: impl FnOnce(&Shared)) -> Vec<u64> {
        std::thread::scope(|scope| {
            session.set_activity(Activity::Computing);
            let wait = scope.spawn(|| session.wait_for_room_among(limit, Generation(3)));
            while session.shared.progress().activity != Activity::Paused {
                assert!(!wait.is_finished(), "there was no room");
                std::thread::yield_now();
            }
            // It is woken, and there is no more room than before.
            session.shared.forget_rows(0);
            assert!(!wait.is_finished(), "nothing was recorded");
            end(&session.shared);
            wait.join().unwrap();
        });
        session.kept_rows().iter().map(|row| row.step).collect()
    }

    #[test]
    fn training_pauses_while_no_more_rows_can_be_kept_and_drops_none() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let session = session(&runtime);
        (1..=3).for_each(|step| session.report(Rank(1), row(step)));
        session.set_activity(Activity::Computing);
        session.wait_for_room_among(4, Generation(3));
        assert_eq!(session.shared.progress().activity, Activity::Computing, "there was room");
        assert_eq!(steps_after_a_wait(&session, 3, |shared| shared.forget_rows(1)), [2, 3]);
        assert_eq!(
            steps_after_a_wait(&session, 2, |shared| shared.abort(Generation(3), false, false)),
            [2, 3]
        );
        session.shared.end(End::Released);
        session.wait_for_room_among(2, Generation(4));
        assert_eq!(session.kept_rows().len(), 2);
    }

    #[test]
    fn rows_that_are_asked_for_are_those_that_are_kept_from_there_on() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let session = session(&runtime);
        (1..=5).for_each(|step| session.report(Rank(1), row(step)));
        session.shared.forget_rows(2);
        let steps = |first| session.shared.rows_from(first).iter().map(|row| row.step).collect::<Vec<_>>();
        assert_eq!((steps(1), steps(4), steps(6)), (vec![3, 4, 5], vec![4, 5], vec![]));
    }
}
