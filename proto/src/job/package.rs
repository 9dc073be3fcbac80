//! Text form of a job that trains a package, which has losses, networks and defaults of its own: the settings
//! of built-in objectives are not in it, and each phase's optimizer is a table beside the shared settings.

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::{Job, ModelKind, OptimizerKind};

/// Table `[optimizer.PHASE]`: the optimizer of one phase of a package.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
}

/// Settings that mean nothing to a package, with the values that a [`Job`] then has.
const UNUSED: &str = r#"
[model]
latent_dim = 0
width = 0
ema_half_life_images = 0
ema_schedule = "ramp-up"
freeze_discriminator = 0

[loss]
kind = "non-saturating"
discriminator_steps = 1
gradient_penalty = 0.0
r1 = 0.0
final_r1 = 0.0
r2 = 0.0
final_r2 = 0.0
penalty_every = 1

[optimizer]
kind = "adam"
learning_rate = 0.0
discriminator_learning_rate = 0.0
beta1 = 0.0
beta2 = 0.0
epsilon = 0.0
final_learning_rate = 0.0
final_discriminator_learning_rate = 0.0
final_beta2 = 0.0

[augmentation]
flip = false
kinds = []
probability = 0.0
final_probability = 0.0
adaptive = false
target = 0.0
adjust_images = 0
"#;

/// Name of the phases' optimizers in serde's form, where they are a table of their own.
const PHASES: &str = "phases";

fn unused() -> Table {
    UNUSED.parse().expect("the text is TOML")
}

/// Whether a table of a job's sections is of a job that trains a package.
pub(super) fn is_of_package(job: &Table) -> bool {
    let kind = job.get("model").and_then(|model| model.get("kind")).and_then(Value::as_str);
    kind == Some("package")
}

/// Serde's form of a job to that of its text.
pub(super) fn shorten(job: &mut Table) {
    if !is_of_package(job) {
        return;
    }
    for (section, keys) in unused() {
        let (Value::Table(unused), Some(Value::Table(own))) = (keys, job.get_mut(&section)) else { continue };
        own.retain(|key, _| !unused.contains_key(key));
        if own.is_empty() {
            job.remove(&section);
        }
    }
    if let Some(Value::Table(optimizer)) = job.get_mut("optimizer")
        && let Some(Value::Table(phases)) = optimizer.remove(PHASES)
    {
        optimizer.extend(phases);
    }
}

/// The form of a job's text to serde's.
pub(super) fn complete(job: &mut Table) {
    let mut phases = Table::new();
    if let Some(Value::Table(optimizer)) = job.get_mut("optimizer") {
        let (tables, settings): (Table, Table) =
            std::mem::take(optimizer).into_iter().partition(|(_, value)| value.is_table());
        (phases, *optimizer) = (tables, settings);
    }
    for (section, keys) in unused() {
        let Value::Table(unused) = keys else { continue };
        let own = job.entry(section).or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(own) = own {
            // What a package has no use for has no other value.
            own.extend(unused);
        }
    }
    if let Some(Value::Table(optimizer)) = job.get_mut("optimizer") {
        optimizer.insert(PHASES.to_owned(), Value::Table(phases));
    }
}

impl Job {
    /// The same job, without the settings that mean nothing to a package, for one that trains a package.
    pub fn without_unused(self) -> Job {
        if self.model.kind != ModelKind::Package {
            return self;
        }
        let mut table = self.to_table();
        complete(&mut table);
        let job = Job::deserialize(Value::Table(table)).expect("all keys that a job needs are there");
        Job { shape: self.shape, ..job }
    }
}
