//! Background saving: a thread that writes checkpoint files and draws sample grids while training goes on.
//!
//! 1. Training waits for this thread only when two checkpoints are already waiting, or a large one is not
//!    stored, and never while the storage fails. One that lets training wait for half a deadline without
//!    an answer fails.
//! 2. A failing storage is retried until it works or a newer checkpoint is waiting. The last one is never
//!    given up.
//! 3. A thread that waits for a storage counts as paused, and is not late.
//! 4. The thread has a low priority while it saves: training comes first where cores are few.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use c10d::HostCopy;
use ganglion_membership::Generation;
use ganglion_proto::job::Job;
use ganglion_proto::message::{FromWorker, SampleGrid};
use ganglion_proto::trace::{Nothing, Track, now};
use ganglion_proto::{MESSAGE_LIMIT, failpoint};
use ganglion_storage::{Pauses, reason};
use serde::Serialize;

use crate::checkpoint::storage::{PAUSES, RunStorage};
use crate::checkpoint::{CheckpointError, Fingerprints, Snapshot};
use crate::data::DataSet;
use crate::nn::broken::{contained, spawn_awaited};
use crate::objective::Model;
use crate::sampling;
use crate::session::Session;
use crate::session::monitor::Monitor;

/// Maximum number of waiting checkpoints.
const WAITING_LIMIT: usize = 2;

/// Size from which on a snapshot waits until the one before is stored, in bytes: memory for one of them
/// may be all that is left.
const LARGE: usize = 64 << 20;

/// Work on one snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    /// Generation that trained to the snapshot.
    pub generation: Generation,
    /// Tensors to save and draw from.
    pub snapshot: Arc<Snapshot>,
    /// Files of its checkpoint to write, by index.
    pub files: Vec<usize>,
    /// Fingerprints of the state, for the files' reports.
    pub fingerprints: Option<Fingerprints>,
    /// Whether to draw a sample grid.
    pub samples: bool,
}

/// Work of the thread.
enum Task {
    /// Save and draw a state.
    Save(Order),
    /// Draw real samples.
    Real(Arc<DataSet>),
    /// Get memory for the first snapshot, of so many floats.
    Prepare(usize),
}

/// Arguments of the thread's slices in a trace.
#[derive(Clone, Copy, Serialize)]
struct Of {
    step: u64,
    /// Index of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<usize>,
}

/// Dependencies of the background thread.
pub(crate) struct Context {
    /// The job.
    pub job: Job,
    /// The model.
    pub model: Arc<Model>,
    /// The checkpoint storage.
    pub storage: Arc<RunStorage>,
    /// Session for the reports.
    pub session: Arc<Session>,
    /// Trace track of the thread.
    pub track: Track,
}

/// Handle of the training thread to the background thread.
pub(crate) struct Archive {
    shared: Arc<Monitor<Queue>>,
    session: Arc<Session>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Order>,
    /// Data set of which a grid of real samples is to be drawn.
    real: Option<Arc<DataSet>>,
    /// Number of floats that memory is to be got for.
    prepare: Option<usize>,
    /// Whether it was asked for.
    is_prepared: bool,
    busy: bool,
    failing: bool,
    /// Whether the order under way is discarded, so that its files are not reported.
    void: bool,
    closed: bool,
}

impl Queue {
    /// Whether another snapshot of `bytes` has to wait.
    fn is_full(&self, bytes: usize) -> bool {
        let has_one = self.busy || !self.waiting.is_empty();
        self.waiting.len() >= WAITING_LIMIT || bytes >= LARGE && has_one
    }
}

impl Context {
    /// Draws a grid of real samples. Takes no random number, and touches no state.
    fn draw_real(&self, data: &DataSet) {
        let draw = || contained(|| sampling::grid_of_real(data, self.job.sample.count));
        match self.track.during("draw real samples", Nothing {}, draw) {
            Ok(grid) => grid.into_iter().for_each(|grid| self.send(grid)),
            Err(error) => tracing::warn!("no real samples: {error}"),
        }
    }

    fn send(&self, grid: SampleGrid) {
        // A message beyond the limit would end the session.
        let (bytes, most) = (grid.png.len(), MESSAGE_LIMIT - (1 << 10));
        if bytes > most {
            tracing::warn!("a grid of samples has {bytes} bytes, more than {most}; lower sample.count");
            return;
        }
        self.session.send(FromWorker::Samples(grid));
    }
}

impl Archive {
    /// Starts the thread.
    pub(crate) fn start(context: Context) -> std::io::Result<Archive> {
        let shared = Arc::new(Monitor::<Queue>::default());
        let (theirs, session) = (shared.clone(), context.session.clone());
        spawn_awaited("archive", move || theirs.serve(&context))?;
        Ok(Archive { shared, session })
    }

    /// Waits until there is room for a snapshot of `bytes`, half a deadline at most, and not while the
    /// storage fails.
    pub(crate) fn make_room(&self, step: u64, bytes: usize) {
        let limit = Instant::now() + self.session.limits().deadline / 2;
        let mut queue = self.shared.lock();
        let pause = queue.is_full(bytes).then(|| self.session.pause());
        while queue.is_full(bytes) && !queue.failing {
            if Instant::now() >= limit {
                queue.failing = true;
                let detail = "the storage takes too long".to_string();
                self.session.send(FromWorker::PartDelayed(step, "its files".to_string(), detail));
                break;
            }
            queue = self.shared.wait(queue);
        }
        drop(pause);
    }

    /// Queues an order. One of samples alone gives way to it in a full queue.
    pub(crate) fn push(&self, order: Order) {
        let mut queue = self.shared.lock();
        if queue.waiting.len() >= WAITING_LIMIT
            && let Some(Order { snapshot, samples: true, .. }) = queue.waiting.pop_back()
        {
            tracing::warn!("no samples of step {}: the storage is behind", snapshot.step);
        }
        queue.waiting.push_back(order);
        self.shared.notify();
    }

    /// Gets memory for the first snapshot, of so many floats, beside training. Does so once.
    pub(crate) fn prepare(&self, numel: usize) {
        let mut queue = self.shared.lock();
        if !std::mem::replace(&mut queue.is_prepared, true) {
            queue.prepare = Some(numel);
        }
        drop(queue);
        self.shared.notify();
    }

    /// Queues a grid of real samples.
    pub(crate) fn push_real(&self, data: Arc<DataSet>) {
        self.shared.lock().real = Some(data);
        self.shared.notify();
    }

    /// Drops the waiting orders, and reports nothing more of the one under way.
    pub(crate) fn discard(&self) {
        let mut queue = self.shared.lock();
        queue.waiting.clear();
        queue.void = queue.busy;
        drop(queue);
        self.shared.notify();
    }

    /// Waits until all is written; returns whether it is. Gives up when `abandon` returns true.
    pub(crate) fn drain(&self, abandon: impl Fn() -> bool) -> bool {
        // A member that waits here counts as paused, and is not late.
        let _pause = self.session.pause();
        let mut queue = self.shared.lock();
        while queue.busy || queue.real.is_some() || !queue.waiting.is_empty() {
            if abandon() {
                return false;
            }
            queue = self.shared.wait(queue);
        }
        true
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.notify();
    }
}

impl Monitor<Queue> {
    fn serve(&self, context: &Context) {
        crate::set_threads(context.job.job.threads);
        while let Some(task) = self.next() {
            let order = match task {
                Task::Save(order) => order,
                Task::Real(data) => {
                    context.draw_real(&data);
                    self.rest(context);
                    continue;
                }
                Task::Prepare(numel) => {
                    // A state that finds no memory now says so when it is saved.
                    if let Err(error) = HostCopy::prepare(numel) {
                        tracing::debug!("no memory for the first snapshot yet: {error}");
                    }
                    self.rest(context);
                    continue;
                }
            };
            crate::give_way();
            if let (true, Some(sampler)) = (order.samples, context.model.objective.sampler()) {
                let Context { job, model, track, .. } = context;
                let (seed, count) = (job.job.seed, job.sample.count);
                let grid = || sampling::grid_of(sampler, &model.layout, &order.snapshot, seed, count);
                let draw = || contained(grid);
                match track.during("draw samples", Of { step: order.snapshot.step, file: None }, draw) {
                    Ok(grid) => context.send(grid),
                    Err(error) => tracing::warn!("no samples of step {}: {error}", order.snapshot.step),
                }
            }
            if let (true, Some(sampler)) = (order.samples, context.model.objective.text_sampler()) {
                let Context { job, model, track, .. } = context;
                let (seed, count) = (job.job.seed, job.sample.count);
                let texts = || sampling::texts_of(sampler, &model.layout, &order.snapshot, seed, count);
                let write = || contained(texts);
                match track.during("write texts", Of { step: order.snapshot.step, file: None }, write) {
                    Ok(texts) => context.session.send(FromWorker::Texts(texts)),
                    Err(error) => tracing::warn!("no texts of step {}: {error}", order.snapshot.step),
                }
            }
            // No lock is held here: the training thread may queue, discard or drain meanwhile.
            context.storage.wait(self.write(context, &order));
            // Before training hears of it: the next snapshot goes into its memory.
            drop(order);
            self.rest(context);
        }
    }

    /// Notes that a task is done.
    fn rest(&self, context: &Context) {
        context.track.flush();
        self.lock().busy = false;
        self.notify();
    }

    fn next(&self) -> Option<Task> {
        let mut queue = self.lock();
        loop {
            // First: it is seen before the samples that are compared with it.
            if let Some(data) = queue.real.take() {
                queue.busy = true;
                return Some(Task::Real(data));
            }
            // Too late once there is a snapshot: it has memory of its own.
            if let Some(numel) = queue.prepare.take().filter(|_| queue.waiting.is_empty()) {
                queue.busy = true;
                return Some(Task::Prepare(numel));
            }
            if let Some(order) = queue.waiting.pop_front() {
                (queue.busy, queue.void) = (true, false);
                self.notify();
                return Some(Task::Save(order));
            }
            if queue.closed {
                return None;
            }
            queue = self.wait(queue);
        }
    }

    async fn write(&self, context: &Context, order: &Order) {
        let Some(fingerprints) = &order.fingerprints else { return };
        let of = Of { step: order.snapshot.step, file: None };
        let files = context.model.files(context.storage.storage(), context.job.job.data_shards);
        for index in &order.files {
            let mut pauses = Pauses::new(PAUSES[0], PAUSES[1]);
            loop {
                let begun = now();
                let written = match context.storage.check().await {
                    Ok(()) => files.write(&order.snapshot, fingerprints, *index).await,
                    Err(error) => Err(error),
                };
                context.track.slice(begun, now(), "write file", Of { file: Some(*index), ..of });
                match written {
                    Ok(part) => {
                        // Numbered by step: the file exists, and no report of it was sent.
                        failpoint::reached("checkpoint", part.step);
                        if self.lock().void {
                            return;
                        }
                        context.session.report_part(order.generation, part);
                        break;
                    }
                    Err(error) => {
                        self.report_delay(context, order, &error);
                        if self.give_up(pauses.draw()) {
                            return;
                        }
                    }
                }
            }
        }
        self.lock().failing = false;
    }

    fn report_delay(&self, context: &Context, order: &Order, error: &CheckpointError) {
        let (file, detail) = match error {
            CheckpointError::Storage { file, source } => (file.clone(), reason(source)),
            CheckpointError::Corrupt(what) => (String::new(), what.clone()),
        };
        context.session.send(FromWorker::PartDelayed(order.snapshot.step, file, detail));
    }

    /// Pauses after a failure; returns whether the failed checkpoint is no longer needed: a newer one is
    /// waiting, or its state is invalidated.
    fn give_up(&self, pause: Duration) -> bool {
        let mut queue = self.lock();
        queue.failing = true;
        self.notify();
        let newer = |queue: &Queue| {
            queue.closed || queue.void || queue.waiting.iter().any(|order| !order.files.is_empty())
        };
        let queue = self.wait_while(queue, pause, |queue| !newer(queue));
        newer(&queue)
    }
}
