//! Checks of a package's graphs before training, on substitutes for samples: what they return is what the
//! manifest says, finite, and the same each time.

use ganglion_proto::package::{Manifest, Output, Phase};
use tch::{Device, Kind, Tensor};

use super::graphs::{Given, Prepared, signed};
use super::{Packaged, data_shape, values_of};
use crate::nn::is_finite;
use crate::nn::tensor_bytes::to_bytes;
use crate::objective::{Objective, ShardBatch, State};
use crate::random::{Key, Purpose};
use crate::state::StateLayout;

/// A tensor that a graph returns.
struct Expected {
    what: String,
    shape: Vec<i64>,
}

/// Runs each graph twice.
///
/// # Errors
/// A graph does not do what the manifest says; the text says which, and how to mend it.
pub(super) fn check(objective: &Packaged) -> Result<(), String> {
    let inner = &objective.0;
    let manifest = &inner.package.manifest;
    let layout = StateLayout::new(&objective.networks(), &[], inner.job.job.precision);
    let state = State::initial(layout, inner.job.job.seed, inner.device);
    let (seed, classes) = (inner.job.job.seed, manifest.data.classes);
    let batch = ShardBatch::stand_ins(seed, manifest.shard_batch, &data_shape(manifest), classes);
    let batch = batch.to(inner.device);
    let given = |part| Given { values: values_of(&state), batch: Some(&batch), wanted: None, steps: 0, part };
    for (phase, own) in manifest.phases.iter().zip(&inner.phases) {
        let expected = of_phase(manifest, phase);
        twice(&own.graph, &given("in training"), &expected)
            .map_err(|what| format!("phase \"{}\": {what}", phase.name))?;
    }
    if let (Some(sample), Some(own)) = (&manifest.sample, &inner.sample) {
        let options = (Kind::Int64, inner.device);
        let wanted =
            Tensor::arange(i64::from(sample.count), options).remainder(i64::from(sample.classes.max(1)));
        let given = Given { wanted: Some(&wanted), batch: None, ..given("in drawing samples") };
        let shape = sample.output.iter().map(|size| signed(*size)).collect();
        twice(own, &given, &[Expected { what: "samples".to_string(), shape }])
            .map_err(|what| format!("samples: {what}"))?;
    }
    if let (Some(evaluate), Some(own)) = (&manifest.evaluate, &inner.evaluate) {
        let scalars = evaluate.outputs.iter().map(|output| expected(manifest, output)).collect::<Vec<_>>();
        twice(own, &given("in evaluation"), &scalars).map_err(|what| format!("evaluation: {what}"))?;
    }
    Ok(())
}

fn of_phase(manifest: &Manifest, phase: &Phase) -> Vec<Expected> {
    phase.outputs.iter().map(|output| expected(manifest, output)).collect()
}

fn expected(manifest: &Manifest, output: &Output) -> Expected {
    let (what, name) = match output {
        Output::Gradient(name) => (format!("gradient of {name}"), name),
        Output::Buffer(name) => (format!("change of {name}"), name),
        Output::Scalar(name) => return Expected { what: name.clone(), shape: Vec::new() },
    };
    let mut tensors = manifest.networks.iter().flat_map(|network| network.tensors());
    let shape = tensors.find(|(known, _)| known == name).map(|(_, shape)| shape).expect("names were checked");
    Expected { what, shape: shape.iter().map(|size| signed(*size)).collect() }
}

/// Runs a graph twice, and checks what it returns.
fn twice(graph: &Prepared, given: &Given<'_>, expected: &[Expected]) -> Result<(), String> {
    const AGAIN: &str = "export it again with ganglion.export(...)";
    let key = Key { seed: 0, step: 0, phase: 0, shard: 0, purpose: Purpose::Graph };
    let draws = graph.draw(key);
    let [first, second] = [0, 1].map(|_| graph.run(given, &draws));
    if first.len() != expected.len() {
        return Err(format!(
            "returns {} tensors, and its manifest has {}; {AGAIN}",
            first.len(),
            expected.len()
        ));
    }
    for ((tensor, again), Expected { what, shape }) in first.iter().zip(&second).zip(expected) {
        if tensor.size() != *shape || tensor.kind() != Kind::Float {
            return Err(format!(
                "its {what} is {:?} of shape {:?}, and its manifest has Float of shape {shape:?}; {AGAIN}",
                tensor.kind(),
                tensor.size()
            ));
        }
        if bytes(tensor) != bytes(again) {
            return Err(format!(
                "its {what} is another the second time, with the same inputs: a run could not be repeated; remove what \
                 does not give the same bits each time, and export again"
            ));
        }
        if !is_finite(tensor) {
            return Err(format!(
                "its {what} is not finite at the start, with samples drawn at random: check the loss and the first \
                 weights, and export again"
            ));
        }
    }
    Ok(())
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    to_bytes(&tensor.to_device(Device::Cpu).contiguous().view(-1))
}
