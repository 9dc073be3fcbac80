//! Background evaluation: a thread of low priority that evaluates snapshots during training.
//!
//! 1. Training never waits for it, except once at its end, for the evaluation of the last state.
//! 2. Every member keeps the snapshot of an evaluation until the coordinator has recorded the result. The
//!    first member makes it. After a change of the group the state of unrecorded ones is unknown, so every
//!    member that holds one makes it; two members make the same row.
//! 3. Evaluations queue. If more than `WAITING_LIMIT` wait, the oldest is left out, with a warning. The
//!    last never is.
//! 4. A failed evaluation is reported as a row without figures, so that nothing waits for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use ganglion_proto::evaluation::EvaluationRow;
use ganglion_proto::job::Job;
use ganglion_proto::progress::Progress;
use ganglion_proto::trace::Track;
use serde::Serialize;

use super::EvalError;
use super::inputs::Inputs;
use super::judge::{Judge, Means};
use crate::checkpoint::Snapshot;
use crate::data::DataSet;
use crate::nn::broken::{contained, spawn_awaited};
use crate::objective::Model;
use crate::random::{Key, Purpose};
use crate::session::Session;
use crate::session::monitor::Monitor;

/// Maximum number of waiting evaluations: each holds a state.
const WAITING_LIMIT: usize = 4;

/// Dependencies of the evaluation thread.
pub(crate) struct Context {
    /// The job.
    pub job: Job,
    /// The model, whose objective draws samples.
    pub model: Arc<Model>,
    /// The training samples.
    pub data: Arc<DataSet>,
    /// Inputs of the evaluations.
    pub inputs: Inputs,
    /// Session for the reports.
    pub session: Arc<Session>,
    /// Trace track of the thread.
    pub track: Track,
}

/// Handle of the training thread to the evaluation thread.
pub(crate) struct Evaluations {
    shared: Arc<Monitor<Queue>>,
    session: Arc<Session>,
}

#[derive(Default)]
struct Queue {
    /// Unrecorded evaluations by step.
    held: BTreeMap<u64, Held>,
    closed: bool,
}

/// An evaluation that is not recorded yet.
struct Held {
    snapshot: Arc<Snapshot>,
    /// Whether this member makes it.
    ours: bool,
    /// Whether this member has begun to make it.
    begun: bool,
}

#[derive(Clone, Copy, Serialize)]
struct Of {
    step: u64,
}

impl Evaluations {
    /// Starts the thread, unless a job without evaluations needs none.
    ///
    /// # Errors
    /// The system has no thread left.
    pub(crate) fn start(context: Option<Context>, session: &Arc<Session>) -> std::io::Result<Evaluations> {
        let shared = Arc::new(Monitor::<Queue>::default());
        // A job without evaluations needs no thread, and `push` then does nothing.
        if let Some(context) = context {
            let theirs = shared.clone();
            spawn_awaited("evaluation", move || theirs.serve(context))?;
        } else {
            // So that nobody waits for a thread that was not started.
            shared.lock().closed = true;
        }
        Ok(Evaluations { shared, session: session.clone() })
    }

    /// Holds a snapshot until its evaluation is recorded, and makes the evaluation if it is `ours`.
    pub(crate) fn push(&self, snapshot: Arc<Snapshot>, ours: bool) {
        let mut queue = self.shared.lock();
        if queue.closed {
            return;
        }
        // Here too, as the thread may be busy with one evaluation for long.
        queue.forget(|step| self.session.is_evaluated(step));
        // A second push of the same step, after a change of the group, may only add the duty.
        queue.held.entry(snapshot.step).or_insert(Held { snapshot, ours, begun: false }).ours |= ours;
        let waiting = queue.held.values().filter(|held| !held.begun).count();
        // The one under way is not given up: its work would be lost.
        let oldest = queue.held.iter().find(|(_, held)| !held.begun).map(|(step, held)| (*step, held.ours));
        if let Some((step, ours)) = oldest.filter(|_| waiting > WAITING_LIMIT) {
            queue.held.remove(&step);
            if ours {
                tracing::warn!(
                    "the evaluation of step {step} is left out: they take longer than evaluation.every_steps"
                );
            }
        }
        // After the change, under the lock: the thread waits for exactly this.
        self.shared.notify();
    }

    /// Makes all held evaluations on this member, after a change of the group.
    pub(crate) fn take_over(&self) {
        self.shared.lock().held.values_mut().for_each(|held| held.ours = true);
        self.shared.notify();
    }

    /// Drops the states after a step: they are computed again.
    pub(crate) fn discard_after(&self, step: u64) {
        // A roll-back: another state of the same step will be pushed (D10).
        self.shared.lock().held.retain(|held, _| *held <= step);
    }

    /// Waits until the newest evaluation is recorded; gives up when `abandon` returns true.
    pub(crate) fn drain(&self, abandon: impl Fn() -> bool) {
        let mut queue = self.shared.lock();
        // Only the newest is waited for: it is that of the last state.
        let newest = queue.held.keys().next_back().copied();
        // A member that waits here counts as paused, and is not late.
        let _pause = self.session.pause();
        // Not bounded by a time: an evaluation may take long, and the state is saved already.
        while newest.is_some_and(|newest| queue.held.contains_key(&newest)) && !abandon() {
            // At most 200 ms (`Monitor::wait`), so that an order to leave is seen too.
            queue = self.shared.wait(queue);
            // Asked under the lock again: the record may have come while this slept.
            queue.forget(|step| self.session.is_evaluated(step));
        }
    }
}

impl Drop for Evaluations {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.notify();
    }
}

impl Queue {
    fn forget(&mut self, is_evaluated: impl Fn(u64) -> bool) {
        self.held.retain(|step, _| !is_evaluated(*step));
    }
}

impl Monitor<Queue> {
    fn serve(&self, context: Context) {
        // As many as training has: another number would give other bits in some kernels.
        crate::set_threads(context.job.job.threads);
        crate::give_way();
        let Context { job, model, data, inputs, session, track } = context;
        let Inputs { mut means, held_out } = inputs;
        let draws = means.is_some();
        let features = means.as_ref().map_or_else(|| "none".to_string(), Means::describe);
        let counted = held_out.as_ref().map_or(0, |held_out| held_out.samples() as u64);
        let mut judge: Option<Judge> = None;
        while let Some(snapshot) = self.next(&session) {
            let (began, of) = (Instant::now(), Of { step: snapshot.step });
            let make = || {
                // On this thread, since reading the reference takes long; once for the whole run.
                if let Some(means) = means.take() {
                    judge = Some(means.judge(&data, &Progress::off())?);
                }
                if draws && judge.is_none() {
                    let why = "the evaluations cannot be prepared: see the first one";
                    return Err(EvalError::Input(why.to_string()));
                }
                let seed = job.job.seed;
                let mut metrics = match &judge {
                    Some(judge) => of_samples(&model, seed, judge, &snapshot)?,
                    None => Vec::new(),
                };
                if let Some(held_out) = &held_out {
                    metrics.extend(held_out.evaluate(&model, seed, &snapshot)?);
                }
                Ok(metrics)
            };
            // Whatever fails, training goes on without its figures.
            let metrics = track.during("evaluate", of, || contained(make));
            track.flush();
            let seconds = began.elapsed().as_secs_f64();
            let row = match metrics {
                Ok(metrics) => {
                    let (step, metrics) = (snapshot.step, metrics.into_iter().collect());
                    EvaluationRow { step, metrics, features: features.clone(), held_out: counted, seconds }
                }
                Err(error) => {
                    tracing::warn!("no evaluation of step {}: {error}", snapshot.step);
                    let features = format!("failed: {error}");
                    EvaluationRow { step: snapshot.step, features, seconds, ..EvaluationRow::default() }
                }
            };
            // The state may have been rolled back meanwhile: then its row is not reported.
            if self.holds(&snapshot) {
                session.report_evaluation(row);
            }
        }
    }

    /// Whether a state still waits for its evaluation.
    fn holds(&self, snapshot: &Arc<Snapshot>) -> bool {
        let queue = self.lock();
        // The same step may be held again with another state.
        queue.held.get(&snapshot.step).is_some_and(|held| Arc::ptr_eq(&held.snapshot, snapshot))
    }

    /// Returns the next snapshot to evaluate. It stays held until the result is recorded.
    fn next(&self, session: &Session) -> Option<Arc<Snapshot>> {
        let mut queue = self.lock();
        loop {
            // Before one is chosen: another member may have made it.
            queue.forget(|step| session.is_evaluated(step));
            if let Some(held) = queue.held.values_mut().find(|held| held.ours && !held.begun) {
                held.begun = true;
                return Some(held.snapshot.clone());
            }
            if queue.closed {
                return None;
            }
            queue = self.wait(queue);
        }
    }
}

/// Evaluates the samples that a state draws: returns their metrics by name.
///
/// # Errors
/// Samples cannot be judged, or the objective draws none.
fn of_samples(
    model: &Model,
    seed: u64,
    judge: &Judge,
    snapshot: &Snapshot,
) -> Result<Vec<(String, f64)>, EvalError> {
    let sampler = model.objective.sampler();
    let sampler = sampler.ok_or_else(|| EvalError::Input("the objective draws no samples".to_string()))?;
    let count = u32::try_from(judge.samples()).unwrap_or(u32::MAX);
    // A fixed key: the same noise for each evaluation, so that figures differ by the state alone.
    let key = Key { seed, step: 0, phase: 0, shard: 0, purpose: Purpose::Evaluation };
    let images = sampler.draw(&model.layout, snapshot, key, count);
    judge.metrics(&images, sampler.critic(&model.layout, snapshot).as_ref(), &Progress::off())
}
