//! The worker's side of its session with the coordinator.
//!
//! A thread of its own keeps the stream alive and answers at once, whatever the training thread does: it takes orders
//! in, aborts a group that it is told to leave, and sends heartbeats. The training thread asks for its next order when it
//! is at rest, and looks at the newest plan when it reduces.
//!
//! 1. An abort reaches the group of its generation even when it arrives before that group was formed.
//! 2. Metrics rows are kept until the coordinator says that they are on disk.
//! 3. When the coordinator is gone for the grace period, the group is aborted and the worker ends.

mod client;
mod store;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use c10d::{Aborter, KeyValueStore};
use ganglion_membership::{Generation, Plan, Position, Rank};
use ganglion_proto::message::{Activity, Assignment, FromWorker, MetricsRow, Welcome};
use tokio::sync::mpsc::UnboundedSender;
use tonic::transport::Channel;

pub use client::ConnectError;
use store::GrpcStore;

/// How a worker's part in a run ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It is not needed any more.
    Released,
    /// It may not take part.
    Rejected(String),
    /// The coordinator is gone.
    Lost(String),
}

/// An open session.
pub struct Session {
    welcome: Welcome,
    shared: Arc<Shared>,
    outbox: UnboundedSender<FromWorker>,
    channel: Channel,
    runtime: tokio::runtime::Handle,
    /// The address under which this machine reaches the coordinator.
    local_address: std::net::IpAddr,
}

/// What the training thread and the session's thread share.
#[derive(Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    changed: Condvar,
    position: AtomicU64,
    activity: AtomicU8,
}

#[derive(Default)]
struct Inbox {
    assignment: Option<Assignment>,
    plan: Option<Plan>,
    /// The newest generation that was aborted.
    aborted: Generation,
    group: Option<(Generation, Aborter)>,
    end: Option<End>,
    rows: VecDeque<MetricsRow>,
}

impl Session {
    /// Finds the coordinator, says hello, and waits to be taken in.
    pub fn open(url: &str, spawn_token: Option<String>) -> Result<Session, ConnectError> {
        client::open(url, spawn_token)
    }

    /// What the coordinator said when it took this worker in.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// The address under which other machines of the run find this one.
    pub fn local_address(&self) -> std::net::IpAddr {
        self.local_address
    }

    /// Sends a message; if the session has ended there is nobody to read it, and [`Session::end`] says so.
    pub fn send(&self, message: FromWorker) {
        let _ = self.outbox.send(message);
    }

    /// Waits at rest for the next generation, or the end.
    pub fn next_assignment(&self) -> Result<Assignment, End> {
        self.set_activity(Activity::Resting);
        let mut inbox = self.shared.lock();
        loop {
            if let Some(end) = &inbox.end {
                return Err(end.clone());
            }
            if let Some(assignment) = inbox.assignment.take() {
                return Ok(assignment);
            }
            // The session's thread watches the coordinator, so this wait ends with the grace period at the latest.
            let waited = self.shared.changed.wait_timeout(inbox, Duration::from_secs(1));
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How the session has ended, if it has.
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

    /// Lets an abort of `generation` reach this group from now on; an abort that came earlier does so at once.
    pub fn watch_group(&self, generation: Generation, aborter: Aborter) {
        let mut inbox = self.shared.lock();
        if inbox.aborted >= generation || inbox.end.is_some() {
            aborter.abort();
        }
        inbox.group = Some((generation, aborter));
    }

    /// The store in which the members of `generation` find each other.
    pub fn store(&self, generation: Generation) -> Arc<dyn KeyValueStore> {
        Arc::new(GrpcStore::new(self.channel.clone(), self.runtime.clone(), self.welcome.term, generation))
    }

    /// Tells the heartbeats where training is.
    pub fn set_position(&self, position: Position) {
        self.shared.position.store(position.0, Ordering::Relaxed);
    }

    /// Tells the heartbeats what the training thread does.
    pub fn set_activity(&self, activity: Activity) {
        self.shared.activity.store(activity as u8, Ordering::Relaxed);
    }

    /// Keeps a row until it is recorded; rank 0 sends it as well.
    pub fn report(&self, rank: Rank, row: MetricsRow) {
        if rank == Rank(0) {
            self.send(FromWorker::Metrics(row.clone()));
        }
        self.shared.lock().rows.push_back(row);
    }

    /// Sends all kept rows again. After a change of the group nobody knows which of them arrived, and who has them all.
    pub fn report_kept(&self) {
        let rows: Vec<MetricsRow> = self.shared.lock().rows.iter().cloned().collect();
        rows.into_iter().for_each(|row| self.send(FromWorker::Metrics(row)));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        // Nothing panics while it holds the lock, and an inbox is whole at any time.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn activity(&self) -> Activity {
        let stored = self.activity.load(Ordering::Relaxed);
        let all = [Activity::Computing, Activity::Waiting, Activity::Resting];
        all.into_iter().find(|activity| *activity as u8 == stored).unwrap_or(Activity::Resting)
    }

    fn take_assignment(&self, assignment: Assignment) {
        let mut inbox = self.lock();
        inbox.plan = None;
        inbox.assignment = Some(assignment);
        self.changed.notify_all();
    }

    fn take_plan(&self, plan: Plan) {
        let mut inbox = self.lock();
        if inbox.plan.is_none_or(|known| known.number < plan.number) {
            inbox.plan = Some(plan);
        }
    }

    fn abort(&self, generation: Generation) {
        let mut inbox = self.lock();
        inbox.aborted = inbox.aborted.max(generation);
        if let Some((watched, aborter)) = &inbox.group
            && *watched <= generation
        {
            aborter.abort();
        }
    }

    fn forget_rows(&self, recorded: u64) {
        self.lock().rows.retain(|row| row.step > recorded);
    }

    fn end(&self, end: End) {
        let mut inbox = self.lock();
        if let Some((_, aborter)) = &inbox.group {
            aborter.abort();
        }
        inbox.end.get_or_insert(end);
        self.changed.notify_all();
    }
}
