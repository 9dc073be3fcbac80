//! Optimizers of updates, and the schedules of their settings.

use c10d::aten::{Adam, Sgd};
use ganglion_proto::job::{self, Job, OptimizerKind, PhaseOptimizer};

use super::Setting;
use super::annealing::Schedule;
use crate::state::{Moments, State};

/// Settings of an update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    /// Update rule.
    pub rule: Rule,
    /// Largest norm of the update's gradient, over all networks that it changes: a longer gradient is scaled
    /// down to it (Pascanu et al., 2013, algorithm 1). `None` leaves every gradient as it is.
    pub clip_norm: Option<f64>,
}

/// Update rule with its settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Adam, or AdamW where parameters decay.
    Adam(Adam),
    /// Stochastic gradient descent.
    Sgd(Sgd),
}

impl From<Adam> for Optimizer {
    fn from(adam: Adam) -> Optimizer {
        Optimizer { rule: Rule::Adam(adam), clip_norm: None }
    }
}

impl From<Sgd> for Optimizer {
    fn from(sgd: Sgd) -> Optimizer {
        Optimizer { rule: Rule::Sgd(sgd), clip_norm: None }
    }
}

impl Rule {
    /// Tensors that the rule keeps for each parameter.
    pub(crate) fn moments(&self) -> Moments {
        match self {
            Rule::Adam(_) => Moments::Adam,
            Rule::Sgd(Sgd { momentum, .. }) if *momentum != 0.0 => Moments::Momentum,
            Rule::Sgd(_) => Moments::None,
        }
    }

    /// Weight decay of the tensors that decay.
    pub(crate) fn weight_decay(&self) -> f64 {
        match self {
            Rule::Adam(Adam { weight_decay, .. }) | Rule::Sgd(Sgd { weight_decay, .. }) => *weight_decay,
        }
    }

    /// The same rule for tensors that do not decay.
    pub(crate) fn without_decay(self) -> Rule {
        match self {
            Rule::Adam(adam) => Rule::Adam(Adam { weight_decay: 0.0, ..adam }),
            Rule::Sgd(sgd) => Rule::Sgd(Sgd { weight_decay: 0.0, ..sgd }),
        }
    }
}

/// The optimizer of a phase with settings of its `own`, `steps` steps of `per_step` samples after the start.
pub(super) fn scheduled(
    own: &PhaseOptimizer,
    shared: &job::Optimizer,
    steps: u64,
    per_step: u64,
) -> Optimizer {
    let schedule = Schedule::new(own, shared, per_step);
    let seen = steps.saturating_mul(per_step);
    let lr = schedule.rate(own.learning_rate, own.final_learning_rate, seen);
    let options = &own.options;
    let weight_decay = options.weight_decay.unwrap_or(0.0);
    let rule = match own.kind {
        OptimizerKind::Adam | OptimizerKind::Adamw => Rule::Adam(Adam {
            lr,
            beta1: own.beta1,
            beta2: schedule.between(own.beta2, own.final_beta2, seen),
            eps: own.epsilon,
            weight_decay,
        }),
        OptimizerKind::Sgd => Rule::Sgd(Sgd {
            lr,
            momentum: options.momentum.unwrap_or(0.0),
            nesterov: options.nesterov.unwrap_or(false),
            weight_decay,
        }),
    };
    Optimizer { rule, clip_norm: options.clip_norm }
}

/// Value of a setting after a number of samples.
type Value = Box<dyn Fn(u64) -> f64>;

/// The settings of a phase's optimizer that change over a run; their names end in `suffix`.
pub(super) fn moving(
    own: &PhaseOptimizer,
    shared: &job::Optimizer,
    per_step: u64,
    suffix: &str,
) -> Vec<Setting<'static>> {
    let (own, schedule) = (*own, Schedule::new(own, shared, per_step));
    let rate = move |seen| schedule.rate(own.learning_rate, own.final_learning_rate, seen);
    let beta2 = move |seen| schedule.between(own.beta2, own.final_beta2, seen);
    let all: [(&str, Value); 2] = [("learning_rate", Box::new(rate)), ("beta2", Box::new(beta2))];
    let moves = |value: &dyn Fn(u64) -> f64| schedule.turns().into_iter().any(|seen| value(seen) != value(0));
    let moving = all.into_iter().filter(|(_, value)| moves(value));
    let setting = |(name, value): (&str, Value)| Setting {
        name: format!("{name}{suffix}").into(),
        value: Box::new(move |steps, _: &State| value(steps.saturating_mul(per_step))),
    };
    moving.map(setting).collect()
}

/// The optimizer of a job's only phase, `steps` steps after the start.
pub(super) fn of_job(job: &Job, steps: u64) -> Optimizer {
    scheduled(&job.optimizer.of_all(), &job.optimizer, steps, job.samples_per_step())
}

/// The settings of that optimizer that change over a run.
pub(super) fn moving_of_job(job: &Job) -> Vec<Setting<'static>> {
    moving(&job.optimizer.of_all(), &job.optimizer, job.samples_per_step(), "")
}
