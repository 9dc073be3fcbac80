//! The worker's side of its session with the coordinator.
//!
//! A thread of its own keeps the stream alive and answers at once, whatever the training thread does: it
//! receives assignments, aborts a group that it is told to leave, sends heartbeats, and reconnects to the
//! coordinator when the stream ends. The training thread asks for its next assignment when it is quiesced,
//! and reads the newest plan at each reduce.
//!
//! The decisions are those of the protocol's [`Member`]: both threads tell it what happened, under one lock, and
//! carry its commands out. What concerns the session's thread and the group's waits is done at once; the
//! training thread takes its orders one by one.
//!
//! 1. An abort reaches the group of its generation even when it arrives before that group was formed.
//! 2. Messages leave in the order in which the member wants them told.
//! 3. The lease is asked for before each commit: [`Session::may_commit`].

mod client;
mod clock;
pub(crate) mod gloo_tls;
pub(crate) mod monitor;
mod probe;
mod store;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use c10d::{Aborter, KeyValueStore};
pub use ganglion_membership::member::End;
use ganglion_membership::member::{self, Command, Event, Report};
use ganglion_membership::{
    Activity, Fault, Generation, Limits, LoadedFacts, Member, Position, Progress, Rank, Term, WrittenPart,
};
use ganglion_proto::dial::Credentials;
use ganglion_proto::evaluation::EvaluationRow;
use ganglion_proto::message::{Assignment, FromWorker, GpuUse, MetricsRow, Welcome};
use ganglion_proto::record::found::Found;
use ganglion_proto::wire::store_service_client::StoreServiceClient;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{oneshot, watch};
use tonic::transport::Channel;

use crate::device::gpu::GpuWatch;
pub use client::{Connect, ConnectError, Connecting, Host};
pub use clock::Clock;
pub use probe::unreachable;
use store::GrpcStore;

use crate::session::gloo_tls::Tunnels;

/// Interval at which a wait checks the conditions that do not wake it.
const LOOK: Duration = Duration::from_millis(100);

/// Order to the training thread. Each is documented at [`Command`].
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Drop the held state and everything still to be saved of it.
    DropState,
    /// Take up the part in a new generation, and end with [`Session::stopped`].
    Begin(Assignment),
    /// Find out which members of the last group do not answer, and end with [`Session::probe`].
    Probe,
    /// Save the held state and the kept rows alone.
    SaveAlone,
    /// End the process.
    Exit(End),
    /// A piece of work for the generation that has begun.
    Work(Work),
}

/// Work of the training thread for one generation. Each is documented at [`Command`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Read the checkpoint that the group starts from.
    Read,
    /// Meet the other members.
    Form,
    /// Give all members the state of the group's update index.
    SyncState,
    /// Report a step that ends at the held state.
    ReportStep(member::Reported),
    /// Train until the update index.
    Run(Position),
    /// Save the held state, and wait until it is stored; with whether the job's last step is done.
    Save(bool),
    /// Leave the group in order.
    Leave,
}

/// Row that a worker keeps until it is recorded.
#[derive(Clone, Debug, PartialEq)]
pub enum ReportRow {
    /// Row of metrics.
    Metrics(Box<MetricsRow>),
    /// Row of an evaluation.
    Evaluation(EvaluationRow),
}

impl member::Row for ReportRow {
    fn step(&self) -> u64 {
        match self {
            ReportRow::Metrics(row) => row.step,
            ReportRow::Evaluation(row) => row.step,
        }
    }
}

/// An open session.
pub struct Session {
    shared: Arc<Shared>,
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
    /// Clock of leases.
    clock: Clock,
    position: AtomicU64,
    activity: AtomicU8,
    leaves: AtomicU64,
    slowest_leaf_us: AtomicU64,
    /// Sampler of the GPU's use; unset on a CPU.
    gpu: OnceLock<GpuWatch>,
}

struct Inbox {
    member: Member<ReportRow>,
    /// Orders that the training thread has not taken yet.
    orders: VecDeque<Order>,
    /// Commands for the session's thread.
    dial: VecDeque<Dialling>,
    outbox: UnboundedSender<FromWorker>,
    welcome: Welcome,
    channel: Channel,
    /// Question where the members of a generation are probed, until it is answered or given up.
    asked: Option<(Generation, oneshot::Sender<Vec<Option<String>>>)>,
    /// Generation under way, and the term that gave it.
    begun: (Generation, Term),
    group: Option<(Generation, Aborter)>,
    facts: Option<(LoadedFacts, Option<Box<Found>>)>,
    /// Why the coordinator was lost.
    lost: String,
}

/// Command for the session's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dialling {
    Connect(member::Hello),
    Disconnect,
    Heartbeat,
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

    /// Sends a message that is no matter of the protocol. After the session's end it is dropped, and
    /// [`Session::end`] tells of the end.
    pub fn send(&self, message: FromWorker) {
        self.shared.lock().send(message);
    }

    /// Tells the member what happened.
    pub fn tell(&self, event: Event<ReportRow>) {
        self.shared.feed(event);
    }

    /// The same for an event of the generation that has begun. Returns the work that follows.
    pub fn advance(&self, event: Event<ReportRow>) -> Vec<Work> {
        let mut inbox = self.shared.lock();
        self.shared.take(&mut inbox, event);
        let work = |order| if let Order::Work(work) = order { Some(work) } else { None };
        // No other order is given while a generation is under way.
        inbox.orders.drain(..).filter_map(work).collect()
    }

    /// Reports to the coordinator that this worker has loaded and can train.
    pub fn loaded(&self, facts: LoadedFacts, found: Option<Box<Found>>) {
        let mut inbox = self.shared.lock();
        let sees_storage = facts.sees_storage;
        inbox.facts = Some((facts, found));
        self.shared.take(&mut inbox, Event::Loaded { sees_storage });
    }

    /// The next order, if there is one.
    pub fn try_next_order(&self) -> Option<Order> {
        self.shared.lock().orders.pop_front()
    }

    /// Waits, quiesced, for the next order.
    pub fn next_order(&self) -> Order {
        let mut inbox = self.shared.lock();
        loop {
            if let Some(order) = inbox.orders.pop_front() {
                return order;
            }
            // The session's thread watches the lease, so this wait ends with that at the latest.
            let waited = self.shared.changed.wait_timeout(inbox, Duration::from_secs(1));
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Reports that the training thread is at rest with the state of this update index, and commits nothing
    /// more of the generation under way; with the reason, if it failed.
    pub fn stopped(&self, held: Option<Position>, fault: Option<Fault>) {
        self.come_to_rest(Event::Stopped { held, fault });
    }

    /// The same, because the user's input is wrong.
    pub fn input_wrong(&self, detail: String) {
        self.come_to_rest(Event::InputWrong(detail));
    }

    fn come_to_rest(&self, event: Event<ReportRow>) {
        self.set_activity(Activity::Resting);
        let mut inbox = self.shared.lock();
        inbox.group = None;
        // Work of the generation that was not taken any more.
        inbox.orders.clear();
        self.shared.take(&mut inbox, event);
    }

    /// Finds out which members of the generation that ended do not answer, and reports them. Takes half a
    /// deadline at most to ask the coordinator for their addresses, and as long to probe them.
    pub fn probe(&self) {
        // The coordinator waits for this worker meanwhile, and must not take it for stuck.
        let _pause = self.pause();
        let (addresses, limit) = self.runtime.block_on(self.members_to_probe());
        self.probed(unreachable(&addresses, limit));
    }

    /// Asks the coordinator for the addresses of the generation's members. Returns those that it knows, by
    /// rank, and the longest time to wait for the answer of a member. Without an answer in time there are
    /// none: the coordinator would not hear of the result either.
    pub async fn members_to_probe(&self) -> (Vec<Option<String>>, Duration) {
        let (asked, answer) = oneshot::channel();
        let limit = {
            let mut inbox = self.shared.lock();
            let (generation, _) = inbox.begun;
            inbox.asked = Some((generation, asked));
            inbox.send(FromWorker::AddressesWanted(generation));
            inbox.limits().attempt
        };
        let answer = tokio::time::timeout(limit, answer).await;
        let Ok(Ok(addresses)) = answer else {
            tracing::warn!("the coordinator does not tell where the members are; they are not probed");
            return (Vec::new(), limit);
        };
        (addresses, limit)
    }

    /// Reports the ranks that do not answer.
    pub fn probed(&self, ranks: Vec<usize>) {
        let ranks = ranks.into_iter().filter_map(|rank| u32::try_from(rank).ok()).map(Rank).collect();
        self.tell(Event::Probed(ranks));
    }

    /// End of this worker's part in the run, if it has come.
    pub fn end(&self) -> Option<End> {
        self.shared.lock().member.end().cloned()
    }

    /// Waits for the session's end, at most this long.
    pub fn wait_for_end(&self, limit: Duration) -> Option<End> {
        let inbox = self.shared.lock();
        let goes_on = |inbox: &mut Inbox| inbox.member.end().is_none();
        let waited = self.shared.changed.wait_timeout_while(inbox, limit, goes_on);
        waited.unwrap_or_else(PoisonError::into_inner).0.member.end().cloned()
    }

    /// Why the coordinator was lost, after [`End::Lost`].
    pub fn why_lost(&self) -> String {
        self.shared.lock().lost.clone()
    }

    /// Number of the plan that this worker proposes for the phase under way.
    pub fn propose(&self) -> u64 {
        self.shared.lock().member.propose()
    }

    /// Whether a phase may be committed: while the coordinator answers, and until the lease is over when it
    /// does not.
    pub fn may_commit(&self) -> bool {
        self.shared.lock().member.may_commit((self.shared.clock)())
    }

    /// Whether this worker was told to leave `generation`.
    pub fn is_aborted(&self, generation: Generation) -> bool {
        *self.shared.aborted.borrow() >= generation
    }

    /// Lets an abort of `generation` reach this group from now on; an abort that came earlier does so at
    /// once.
    pub fn watch_group(&self, generation: Generation, aborter: Aborter) {
        let mut inbox = self.shared.lock();
        if self.is_aborted(generation) {
            aborter.abort();
        }
        inbox.group = Some((generation, aborter));
    }

    /// The store in which the members of the generation under way find each other, and its term.
    pub fn store(&self) -> (Arc<dyn KeyValueStore>, Term) {
        let inbox = self.shared.lock();
        let (generation, term) = inbox.begun;
        let store = GrpcStore {
            client: StoreServiceClient::new(inbox.channel.clone()),
            runtime: self.runtime.clone(),
            token: self.credentials.token().unwrap_or_default(),
            term,
            generation,
            aborted: self.shared.aborted.subscribe(),
        };
        (Arc::new(store), term)
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

    /// Keeps a row of metrics until it is recorded; rank 0 sends it as well.
    pub fn report(&self, row: MetricsRow) {
        self.tell(Event::Row(ReportRow::Metrics(Box::new(row))));
    }

    /// Reports the row of a step that other members have reported, unless this worker keeps it already.
    pub fn report_unless_kept(&self, row: MetricsRow) {
        self.tell(Event::RowOfOthers(ReportRow::Metrics(Box::new(row))));
    }

    /// Waits until another row may be kept: an unrecorded row is never dropped. An abort of `generation`,
    /// the end of the lease or of the session ends the wait.
    pub fn wait_for_room(&self, generation: Generation) {
        self.wait_for_room_among(member::ROWS_LIMIT, generation);
    }

    /// The same with at most `limit` rows.
    fn wait_for_room_among(&self, limit: usize, generation: Generation) {
        let is_full = |inbox: &Inbox| inbox.member.rows().len() >= limit && inbox.member.end().is_none();
        let mut inbox = self.shared.lock();
        if !is_full(&inbox) {
            return;
        }
        tracing::warn!("{limit} rows are not recorded; training waits until the coordinator can write them");
        self.set_activity(Activity::Paused);
        let may_commit = |inbox: &Inbox| inbox.member.may_commit((self.shared.clock)());
        while is_full(&inbox) && !self.is_aborted(generation) && may_commit(&inbox) {
            let waited = self.shared.changed.wait_timeout(inbox, LOOK);
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Rows of metrics that no coordinator has acknowledged.
    pub fn kept_rows(&self) -> Vec<MetricsRow> {
        let metrics = |row: &ReportRow| match row {
            ReportRow::Metrics(row) => Some(MetricsRow::clone(row)),
            ReportRow::Evaluation(_) => None,
        };
        self.shared.lock().member.rows().filter_map(metrics).collect()
    }

    /// Reports an evaluation, and keeps the row until it is recorded.
    pub fn report_evaluation(&self, row: EvaluationRow) {
        self.tell(Event::Evaluation(ReportRow::Evaluation(row)));
    }

    /// Whether the coordinator has acknowledged the evaluation of a step.
    pub fn is_evaluated(&self, step: u64) -> bool {
        self.shared.lock().member.is_evaluated(step)
    }

    /// Reports a written checkpoint file of a state that a generation trained to, and keeps the report
    /// until the checkpoint is recorded.
    pub fn report_part(&self, generation: Generation, part: WrittenPart) {
        self.tell(Event::PartWritten(generation, part));
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
    fn limits(&self) -> Limits {
        limits_of(&self.welcome)
    }

    /// Sends a message; after the session's end nobody takes it.
    fn send(&self, message: FromWorker) {
        let _ = self.outbox.send(message);
    }

    fn order(&mut self, order: Order) {
        self.orders.push_back(order);
    }

    /// Message that carries a report; `None` if there is nothing to report.
    fn message(&self, report: Report<ReportRow>) -> Option<FromWorker> {
        Some(match report {
            Report::Loaded => {
                let (facts, found) = self.facts.clone()?;
                FromWorker::Loaded(facts, found)
            }
            Report::Fault(generation, fault) => FromWorker::Fault(generation, fault),
            Report::Quiesced(generation, rest) => match (rest.finished, rest.position) {
                (Some(complete), Some(position)) => FromWorker::Finished(generation, position, complete),
                (_, position) => FromWorker::Ready(generation, position),
            },
            Report::Row(ReportRow::Metrics(row)) => FromWorker::Metrics(*row),
            Report::Row(ReportRow::Evaluation(row)) => FromWorker::Evaluation(row),
            Report::Part(generation, part) => FromWorker::PartWritten(generation, part),
            Report::InputWrong(detail) => FromWorker::InputError(detail),
            Report::Leave => FromWorker::Leave,
        })
    }
}

fn limits_of(welcome: &Welcome) -> Limits {
    Limits::derive(Duration::from_secs_f64(welcome.job.job.failure_deadline))
}

/// A welcome as the member takes it.
fn accepted(welcome: &Welcome) -> Event<ReportRow> {
    Event::Welcomed(member::Welcome {
        term: welcome.term,
        worker: welcome.worker,
        condemned: welcome.condemned,
        limits: limits_of(welcome),
    })
}

impl Shared {
    /// Returns the state of a worker that said its first hello at `since` and was welcomed.
    fn new(
        welcome: Welcome,
        channel: Channel,
        (clock, since): (Clock, Duration),
        outbox: UnboundedSender<FromWorker>,
    ) -> Shared {
        let mut member = Member::new(since, limits_of(&welcome));
        let mut commands = Vec::new();
        member.handle(clock(), accepted(&welcome), &mut commands);
        debug_assert!(commands.is_empty(), "{commands:?}");
        let inbox = Inbox {
            member,
            orders: VecDeque::new(),
            dial: VecDeque::new(),
            outbox,
            begun: (Generation(0), Term(0)),
            welcome,
            channel,
            asked: None,
            group: None,
            facts: None,
            lost: String::new(),
        };
        Shared {
            inbox: Mutex::new(inbox),
            changed: Condvar::new(),
            aborted: watch::Sender::new(Generation(0)),
            clock,
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

    /// Tells the member what happened.
    fn feed(&self, event: Event<ReportRow>) {
        self.take(&mut self.lock(), event);
    }

    /// The same under the lock: commands are carried out in the order in which the member decided.
    fn take(&self, inbox: &mut Inbox, event: Event<ReportRow>) {
        let mut commands = Vec::new();
        inbox.member.handle((self.clock)(), event, &mut commands);
        for command in commands {
            self.carry_out(inbox, command);
        }
        self.changed.notify_all();
    }

    fn carry_out(&self, inbox: &mut Inbox, command: Command<ReportRow>) {
        match command {
            Command::Connect(hello) => inbox.dial.push_back(Dialling::Connect(hello)),
            Command::Disconnect => inbox.dial.push_back(Dialling::Disconnect),
            Command::Heartbeat => inbox.dial.push_back(Dialling::Heartbeat),
            Command::Tell(report) => {
                if let Some(message) = inbox.message(report) {
                    inbox.send(message);
                }
            }
            Command::Abort(generation) => self.abort(inbox, generation),
            Command::Begin { term, group, rank } => {
                inbox.begun = (group.generation, term);
                inbox.order(Order::Begin(Assignment { group, rank: rank.0 }));
            }
            Command::DropState => inbox.order(Order::DropState),
            Command::Probe => inbox.order(Order::Probe),
            Command::SaveAlone => inbox.order(Order::SaveAlone),
            Command::Exit(end) => inbox.order(Order::Exit(end)),
            Command::Read(_) => inbox.order(Order::Work(Work::Read)),
            Command::Form => inbox.order(Order::Work(Work::Form)),
            Command::SyncState => inbox.order(Order::Work(Work::SyncState)),
            Command::ReportStep(reported) => inbox.order(Order::Work(Work::ReportStep(reported))),
            Command::Run { until } => inbox.order(Order::Work(Work::Run(until))),
            Command::Save { complete } => inbox.order(Order::Work(Work::Save(complete))),
            Command::Leave => inbox.order(Order::Work(Work::Leave)),
        }
    }

    fn abort(&self, inbox: &Inbox, generation: Generation) {
        // Waiters of the store see the new value. The aborter is called under the inbox's lock, so that a
        // group set by `watch_group` meanwhile is not missed.
        self.aborted.send_modify(|newest| *newest = generation.max(*newest));
        if let Some((watched, aborter)) = &inbox.group
            && *watched <= generation
        {
            aborter.abort();
        }
    }

    /// Takes over the welcome of a new connection. Returns what the coordinator may not have heard, which
    /// goes before anything else.
    fn welcome_again(&self, welcome: Welcome, channel: Channel) -> Vec<FromWorker> {
        let mut inbox = self.lock();
        let known = inbox.member.worker();
        let mut commands = Vec::new();
        inbox.member.handle((self.clock)(), accepted(&welcome), &mut commands);
        if known != Some(welcome.worker) {
            tracing::info!("the coordinator takes this worker in anew, as worker {}", welcome.worker);
        }
        (inbox.welcome, inbox.channel) = (welcome, channel);
        let mut first = Vec::new();
        for command in commands {
            match command {
                Command::Tell(report) => first.extend(inbox.message(report)),
                command => self.carry_out(&mut inbox, command),
            }
        }
        self.changed.notify_all();
        first
    }

    fn take_assignment(&self, Assignment { group, .. }: Assignment) {
        let mut inbox = self.lock();
        let data_shards = inbox.welcome.job.job.data_shards;
        // With more or fewer the sum would not be that of the job (D2).
        if group.members.last().is_none_or(|last| last.shards.end != data_shards) {
            return tracing::warn!("dropped an assignment of other data shards than the job's {data_shards}");
        }
        self.take(&mut inbox, Event::Assigned(group));
    }

    /// Passes the coordinator's answer on to the training thread, if that still waits for it.
    fn take_addresses(&self, generation: Generation, addresses: Vec<Option<String>>) {
        // An answer that comes late is about a generation that nobody probes any more.
        let asked = self.lock().asked.take_if(|(asked, _)| *asked == generation);
        if let Some((_, waits)) = asked {
            // Without a receiver the wait was over just now.
            let _ = waits.send(addresses);
        }
    }
}

#[cfg(test)]
mod tests {
    use ganglion_membership::{Backend, Group, GroupMember, Start, WorkerId, shard_ranges};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    fn row(step: u64) -> MetricsRow {
        MetricsRow { step, generation: 1, world_size: 2, ..MetricsRow::default() }
    }

    /// A session whose coordinator sends nothing, and what it says.
    fn session(runtime: &tokio::runtime::Runtime) -> (Session, UnboundedReceiver<FromWorker>) {
        use ganglion_coordinator::job_file::{Source, read};
        let _entered = runtime.enter();
        let welcome = Welcome {
            term: Term(1),
            worker: WorkerId(1),
            run: "run".to_string(),
            // Half of the deadline is the limit of an answer.
            job: read(&Source::Embedded, &["job.failure_deadline=2".to_string()]).unwrap(),
            storage: String::new(),
            condemned: Generation(0),
        };
        let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let ((outbox, said), clock) = (unbounded_channel(), clock::boot_clock as Clock);
        let session = Session {
            shared: Arc::new(Shared::new(welcome, channel, (clock, clock()), outbox)),
            runtime: runtime.handle().clone(),
            local_address: std::net::Ipv4Addr::LOCALHOST.into(),
            credentials: Credentials::default(),
            tunnels: None,
        };
        (session, said)
    }

    /// Assignment of the session's worker to a generation of three.
    fn assignment(session: &Session, generation: u64) -> Assignment {
        let data_shards = session.welcome().job.job.data_shards;
        let member = |(worker, shards)| GroupMember { worker: WorkerId(worker), shards, writes_parts: true };
        let group = Group {
            generation: Generation(generation),
            members: (1..).zip(shard_ranges(data_shards, 3)).map(member).collect(),
            position: Position(0),
            start: Start::Fresh,
            skips: Vec::new(),
            backend: Backend::Gloo,
        };
        Assignment { group, rank: 0 }
    }

    /// Lets the session time out in generation 2 and probe. `answer` is called with the question. Returns the
    /// messages from then on until the worker is ready for another generation.
    fn probe(answer: impl FnOnce(&Shared, Generation)) -> Vec<FromWorker> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let (session, mut said) = session(&runtime);
        session.shared.take_assignment(assignment(&session, 2));
        session.stopped(None, Some(Fault::Timeout));
        while session.try_next_order() != Some(Order::Probe) {
            assert!(!session.shared.lock().orders.is_empty(), "it is not to probe");
        }
        std::thread::scope(|scope| {
            scope.spawn(|| session.probe());
            let Some(FromWorker::AddressesWanted(generation)) = said.blocking_recv() else {
                panic!("it does not ask")
            };
            assert_eq!(session.shared.progress().activity, Activity::Paused);
            answer(&session.shared, generation);
        });
        assert_eq!(session.shared.progress().activity, Activity::Resting);
        std::iter::from_fn(|| said.try_recv().ok()).collect()
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
            session.shared.feed(Event::RowsRecorded(0));
            assert!(!wait.is_finished(), "nothing was recorded");
            end(&session.shared);
            wait.join().unwrap();
        });
        session.kept_rows().iter().map(|row| row.step).collect()
    }

    #[test]
    fn a_probe_asks_where_the_members_are_and_names_those_that_do_not_answer() {
        let here = probe::answer(std::net::Ipv4Addr::LOCALHOST.into()).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let said = probe(|shared, generation| {
            // An answer about another generation is not the one.
            shared.take_addresses(Generation(1), vec![Some(free.to_string()); 3]);
            let addresses = [Some(here), None, Some(free)].map(|told| Some(told?.to_string()));
            shared.take_addresses(generation, addresses.to_vec());
        });
        let links = Fault::Links(vec![Rank(2)]);
        assert_eq!(said, [FromWorker::Fault(Generation(2), links), FromWorker::Ready(Generation(2), None)]);
    }

    #[test]
    fn without_an_answer_in_time_a_fault_is_reported_as_without_a_probe() {
        let timed_out =
            [FromWorker::Fault(Generation(2), Fault::Timeout), FromWorker::Ready(Generation(2), None)];
        assert_eq!(probe(|_, _| {}), timed_out, "no answer");
        assert_eq!(
            probe(|shared, generation| shared.take_addresses(generation, Vec::new())),
            timed_out,
            "none known"
        );
    }

    /// D2: the sum is over all data shards of the job.
    #[test]
    fn an_assignment_of_other_data_shards_than_the_jobs_is_dropped() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (session, _said) = session(&runtime);
        let mut fewer = assignment(&session, 1);
        fewer.group.members.pop();
        session.shared.take_assignment(fewer);
        assert_eq!(session.try_next_order(), None);
        session.shared.take_assignment(assignment(&session, 1));
        assert!(session.try_next_order().is_some());
    }

    #[test]
    fn training_pauses_while_no_more_rows_can_be_kept_and_drops_none() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (session, _said) = session(&runtime);
        (1..=3).for_each(|step| session.report(row(step)));
        session.set_activity(Activity::Computing);
        session.wait_for_room_among(4, Generation(3));
        assert_eq!(session.shared.progress().activity, Activity::Computing, "there was room");
        assert_eq!(steps_after_a_wait(&session, 3, |shared| shared.feed(Event::RowsRecorded(1))), [2, 3]);
        assert_eq!(
            steps_after_a_wait(&session, 2, |shared| shared.abort(&shared.lock(), Generation(3))),
            [2, 3]
        );
        session.tell(Event::Dismissed(End::Released));
        session.wait_for_room_among(2, Generation(4));
        assert_eq!(session.kept_rows().len(), 2);
    }
}
