//! Conditions that an objective must meet to be trained. They are checked before training, where a message
//! can still name what is wrong.

use std::borrow::Cow;
use std::collections::BTreeSet;

use ganglion_membership::StepShape;
use ganglion_proto::evaluation::names;
use ganglion_proto::record::{NAME_BYTES, SCALARS, check_metric, check_scalar};
use ganglion_proto::{NETWORKS, PHASES};

use super::{Phase, Reads, Unsuitable};
use crate::state::StateLayout;

/// Returns the shape of steps with these phases.
pub(super) fn shape(phases: &[Phase]) -> Result<StepShape, Unsuitable> {
    // Only these move the stream (D2).
    let readers = phases.iter().filter(|phase| phase.reads == Reads::Next).map(|phase| phase.index).collect();
    let count = u32::try_from(phases.len()).ok().filter(|count| *count <= PHASES);
    let shape = count.and_then(|count| StepShape::new(count, readers));
    let shape = shape.ok_or_else(|| {
        Unsuitable(format!(
            "a step of the objective needs 1 to {PHASES} phases with the indices 0, 1 and so on, of which one reads the \
             next samples"
        ))
    })?;
    for phase in phases {
        let wrong = match phase.reads {
            // A step takes the same number of samples from the stream as any other.
            Reads::Next if phase.every != 1 => "reads the next samples, but does not run in every step",
            Reads::Same if shape.batches_of(phase.index.into()) == 0 => {
                "reads the samples of a phase before it, and there is none"
            }
            _ if phase.every == 0 => "runs every 0 steps: it needs a cadence of 1 or more",
            _ => continue,
        };
        return Err(Unsuitable(format!("phase {} of the objective {wrong}", phase.index)));
    }
    Ok(shape)
}

/// Checks the names of the phases, by index. `named` tells which phases need a name of their own.
pub(super) fn phase_names(names: &[String], named: impl Fn(usize) -> bool) -> Result<(), Unsuitable> {
    let bad = names.iter().find(|name| !(1..=NAME_BYTES).contains(&name.len()));
    if let Some(name) = bad {
        return Err(Unsuitable(format!("{name:?} is no name of a phase: it needs 1 to {NAME_BYTES} bytes")));
    }
    let distinct: BTreeSet<&String> = names.iter().collect();
    if distinct.len() > NETWORKS {
        return Err(Unsuitable(format!("the objective's phases have more than {NETWORKS} names")));
    }
    let is_shared = |at: usize| names.iter().filter(|name| **name == names[at]).count() > 1;
    match (0..names.len()).find(|at| named(*at) && is_shared(*at)) {
        Some(at) => Err(Unsuitable(format!(
            "phase {at} of the objective does not run in every step, and shares the name {} with another",
            names[at]
        ))),
        None => Ok(()),
    }
}

/// Checks that all tensors of a state have names of their own.
pub(super) fn tensor_names(layout: &StateLayout) -> Result<(), Unsuitable> {
    let mut names = BTreeSet::new();
    match layout.tensors().into_iter().find(|tensor| !names.insert(tensor.name.clone())) {
        Some(tensor) => {
            Err(Unsuitable(format!("two tensors of the objective's state are called {}", tensor.name)))
        }
        None => Ok(()),
    }
}

/// Checks the names of a row's scalars.
pub(super) fn scalars<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), Unsuitable> {
    let mut count = 0;
    for name in names {
        check_scalar(name).map_err(|error| Unsuitable(error.0))?;
        count += 1;
    }
    if count > SCALARS {
        return Err(Unsuitable(format!(
            "the objective reports {count} scalars; a row has room for {SCALARS}"
        )));
    }
    Ok(())
}

/// Checks the names of the scalars of an evaluator.
pub(super) fn evaluated(scalars: &[Cow<'static, str>]) -> Result<(), Unsuitable> {
    let room = SCALARS - names::ALL.len();
    if scalars.len() > room {
        let count = scalars.len();
        return Err(Unsuitable(format!("the objective evaluates {count} scalars; there is room for {room}")));
    }
    for (at, name) in scalars.iter().enumerate() {
        check_metric(name).map_err(|error| Unsuitable(error.0))?;
        if names::ALL.contains(&&**name) || scalars[..at].contains(name) {
            return Err(Unsuitable(format!("the objective evaluates a scalar {name}, a name that is taken")));
        }
    }
    Ok(())
}
