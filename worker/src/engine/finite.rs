//! Handling of reduced gradients that are not finite, before they are committed.
//!
//! 1. The verdict is a function of (job, counters, reduced gradient, skips), and all members hold the same
//!    of each, so all skip or fault at the same update index.
//! 2. A phase that is not finite is never committed: it is skipped, or the group ends before it.
//! 3. A phase that is finite is always committed, also one whose position is among the skips. These only
//!    *allow* a skip. A rolled-back position may have failed because of its own arithmetic, and then the
//!    replay fails at it with the same bits and it is skipped; or because a device erred once, and then the
//!    replay shows what the job really gives. Skipping it all the same would write the device's error into
//!    the result, and the run would end with other bits than one in which nothing failed. So with "roll-back"
//!    the result is a function of the job alone, and where no device errs it is that of "skip". With "skip"
//!    the first reading counts, as with any other wrong number of a device.
//! 4. More than [`LIMIT`] phases in a row that are not finite end the run: a state that skipping does not
//!    change gives nothing but more of them.

use ganglion_membership::Position;
use ganglion_proto::job::NonFinite as Policy;
use tch::Tensor;

use crate::objective::{Model, Phase};
use crate::state::{Counters, narrow};

/// Maximum number of consecutive phases that may be skipped.
pub const LIMIT: u64 = 100;

/// Decision on a reduced gradient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Finite: commit it.
    Commit,
    /// Not finite: the run goes on without it. The string says what is not finite.
    Skip(String),
    /// Not finite: the group ends before it.
    End(NonFinite),
}

/// A reduced gradient that is not finite and may not be skipped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct NonFinite {
    /// Update index: the number of phases committed before.
    pub position: Position,
    /// Description of what is not finite, and in which step.
    pub detail: String,
    /// Whether the run ends, instead of going on from the newest checkpoint.
    pub stop: bool,
}

/// Treatment of phases that are not finite.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// Policy of the job.
    pub policy: Policy,
    /// Update indices by which the run was rolled back.
    pub skips: &'a [Position],
}

/// Decides on the reduced gradient of a phase.
pub fn judge(
    rules: Rules<'_>,
    model: &Model,
    phase: Phase,
    counters: Counters,
    mean: &Tensor,
) -> Result<Verdict, c10d::Error> {
    if c10d::aten::all_finite(&narrow(mean, model.gradient(phase).decisive()))? {
        return Ok(Verdict::Commit);
    }
    let position = counters.position;
    let what = describe(model, phase, position, mean)?;
    let end = |detail, stop| Verdict::End(NonFinite { position, detail, stop });
    Ok(match rules.policy {
        Policy::Stop => {
            let advice = "unless a device erred, a run that goes on meets it again";
            end(format!("{what}, and job.non_finite is \"stop\"; {advice}"), true)
        }
        Policy::RollBack if !rules.skips.contains(&position) => end(what, false),
        Policy::RollBack | Policy::Skip if counters.skipped >= LIMIT => {
            let advice = "start a new run with a smaller optimizer.learning_rate";
            end(format!("{what}, as in {LIMIT} phases before it: skipping does not help; {advice}"), true)
        }
        Policy::RollBack | Policy::Skip => Verdict::Skip(what),
    })
}

/// Describes what is not finite.
fn describe(model: &Model, phase: Phase, position: Position, mean: &Tensor) -> Result<String, c10d::Error> {
    let layout = model.gradient(phase);
    let finite = |range| c10d::aten::all_finite(&narrow(mean, range));
    let what = if !finite(layout.gradient())? {
        "gradient"
    } else if !finite(layout.losses())? {
        "loss"
    } else {
        "batch statistics"
    };
    let (name, step) = (model.name(phase), model.steps(position) + 1);
    let is_network = model.layout.networks().iter().any(|network| network.name == name);
    let whose = if is_network { name.to_string() } else { format!("{name} phase") };
    let verb = if what == "batch statistics" { "are" } else { "is" };
    Ok(format!("the {whose}'s {what} of step {step} {verb} not finite"))
}
