//! Conditions that an objective must meet to be trained. They are checked before training, where a message
//! can still name what is wrong.

use std::borrow::Cow;
use std::collections::BTreeSet;

use ganglion_membership::StepShape;
use ganglion_proto::evaluation::names;
use ganglion_proto::record::{NAME_BYTES, SCALARS, check_metric, check_scalar};
use ganglion_proto::{NETWORKS, PHASES};

use super::{NamedNetwork, NetworkId, Objective, Phase, Reads, Unsuitable};
use crate::state::{Moments, StateLayout};

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

/// Returns what the optimizers of each network keep for its parameters.
pub(super) fn moments(
    objective: &dyn Objective,
    networks: &[NamedNetwork],
    phases: &[Phase],
) -> Result<Vec<Moments>, Unsuitable> {
    let of_network = |(index, network): (usize, &NamedNetwork)| {
        let updating = phases.iter().filter(|phase| phase.updates.contains(NetworkId(index)));
        let all = updating.map(|phase| objective.optimizer(*phase, 0).rule.moments());
        let all: BTreeSet<Moments> = all.collect();
        if all.contains(&Moments::Adam) && all.len() > 1 {
            return Err(Unsuitable(format!(
                "{} is updated by Adam in one phase and by SGD in another, of which each would undo the other's averages;                  give all phases that update it optimizers of one kind (\"adam\" and \"adamw\" are one)",
                network.name
            )));
        }
        Ok(all.last().copied().unwrap_or_default())
    };
    networks.iter().enumerate().map(of_network).collect()
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
    let names: Vec<&str> = names.collect();
    names.iter().try_for_each(|name| check_scalar(name)).map_err(|error| Unsuitable(error.0))?;
    let count = names.len();
    // Both are shown as the loss of one thing.
    let loss_of = |name: &str| name.strip_prefix("loss_").map(|of| format!("{of}_loss"));
    if let Some(name) =
        names.iter().find(|name| loss_of(name).is_some_and(|other| names.contains(&other.as_str())))
    {
        return Err(Unsuitable(format!(
            "the scalars {name} and {} have one meaning",
            loss_of(name).unwrap_or_default()
        )));
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

#[cfg(test)]
mod tests {
    use ganglion_proto::job::Precision;

    use super::*;
    use crate::state::NamedNetwork;

    fn told<T>(checked: Result<T, Unsuitable>) -> String {
        checked.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn scalars_have_names_of_their_own_and_room() {
        let many: Vec<String> = (0..=SCALARS).map(|at| format!("s{at}")).collect();
        assert_eq!(told(scalars(["loss_d", "r1_loss", "loss"].into_iter())), "");
        assert!(told(scalars(["d_loss", "loss_d"].into_iter())).contains("loss_d and d_loss"));
        assert!(told(scalars(["epoch"].into_iter())).contains("epoch"));
        assert!(told(scalars(many.iter().map(String::as_str))).contains("room for 64"));
        let own = |names: &[&'static str]| {
            told(evaluated(&names.iter().map(|name| (*name).into()).collect::<Vec<_>>()))
        };
        assert_eq!(own(&["nll", "accuracy"]), "");
        for names in [&["kid"][..], &["nll", "nll"], &["a b"]] {
            assert!(!own(names).is_empty(), "{names:?}");
        }
        assert!(own(&["s"; 53]).contains("room for 52"));
    }

    #[test]
    fn phases_are_named_and_those_with_a_cadence_each_by_its_own() {
        let names = |names: &[&str], named: usize| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            told(phase_names(&names, |index| index == named))
        };
        assert_eq!(names(&["d", "d", "g"], 2), "");
        assert!(names(&["d", "d", "g"], 1).contains("phase 1 of the objective does not run in every step"));
        assert!(
            names(&["d", ""], 9).contains("is no name")
                && names(&[&"x".repeat(65)], 9).contains("is no name")
        );
        let many: Vec<String> = (0..=NETWORKS).map(|at| at.to_string()).collect();
        assert!(told(phase_names(&many, |_| false)).contains("more than 64 names"));
    }

    #[test]
    fn two_tensors_of_one_name_are_unsuitable() {
        let network = |name: &'static str, average: &'static str| NamedNetwork {
            name: name.into(),
            parameters: vec![crate::nn::TensorSpec::parameter(
                "w".into(),
                &[1],
                crate::nn::Init::Constant(0.0),
            )],
            buffers: Vec::new(),
            average: Some(average.into()),
        };
        let check =
            |networks: &[NamedNetwork]| told(tensor_names(&StateLayout::new(networks, &[], Precision::Fp32)));
        assert_eq!(check(&[network("a", "ema_a"), network("b", "ema_b")]), "");
        assert!(check(&[network("a", "b"), network("b", "c")]).contains("are called b.w"));
    }
}
