//! Optimizers of phases, and the settings that jobs have only where they are of use or given: older jobs keep
//! their text.

use std::ops::{Range, RangeInclusive};

use serde::{Deserialize, Serialize};

use super::{Optimizer, OptimizerKind};

/// Range of a weight decay.
pub const WEIGHT_DECAY: RangeInclusive<f64> = 0.0..=10.0;
/// Range of a momentum.
pub const MOMENTUM: Range<f64> = 0.0..1.0;
/// Largest norm to clip at; the least is above 0.
pub const CLIP_NORM: f64 = 1e9;

/// Table `[optimizer.PHASE]`: the optimizer of one phase of a package.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseOptimizer {
    /// Update rule.
    pub kind: OptimizerKind,
    /// Step size.
    pub learning_rate: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Term added to the root of the second moment.
    pub epsilon: f64,
    /// Step size after `optimizer.decay_images`.
    pub final_learning_rate: f64,
    /// Decay rate of the second moment after `optimizer.decay_images`.
    pub final_beta2: f64,
    /// Samples over which settings move to their final values, in place of `optimizer.decay_images`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_images: Option<u64>,
    /// Further settings; those of the schedule take the place of `optimizer`'s.
    #[serde(flatten)]
    pub options: OptimizerOptions,
}

/// Settings of an optimizer beside its step size and Adam's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OptimizerOptions {
    /// Decay of weights: decoupled from the gradient with `adamw` (Loshchilov and Hutter, 2019), an L2 penalty
    /// with `sgd`. Biases, normalisations and embeddings do not decay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Share of the momentum that stays in an update, for `sgd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Whether an update looks ahead along the momentum, for `sgd` (Sutskever et al., 2013).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,
    /// Largest norm of the gradient of a phase; a longer one is scaled down to it (Pascanu et al., 2013).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Samples over which the learning rate rises linearly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_images: Option<u64>,
    /// Shape of the way to final values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay: Option<Decay>,
}

/// Shape of the way from an initial to a final value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// Half a cosine.
    #[default]
    Cosine,
    /// A line.
    Linear,
}

impl Optimizer {
    /// The settings that hold for each phase, or for all but the discriminator's.
    pub fn of_all(&self) -> PhaseOptimizer {
        PhaseOptimizer {
            kind: self.kind,
            learning_rate: self.learning_rate,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            final_learning_rate: self.final_learning_rate,
            final_beta2: self.final_beta2,
            decay_images: None,
            options: self.options,
        }
    }
}
