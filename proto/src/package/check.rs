//! Consistency of a manifest: each name is known, once, and each rule of a step holds.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Batch, BatchPart, DataSpec, Device, Draw, EvaluationGraph, ImageSpec, Input, Manifest, Optimizer, Output,
    Phase, SampleGraph, SampleSpec, TokenSpec,
};
use crate::bounds::{NETWORKS, PHASES};
use crate::job::{CLIP_NORM, MOMENTUM, OptimizerKind, WEIGHT_DECAY};
use crate::record::{SCALARS, check_scalar};

/// Longest name of a network, phase or graph, in bytes.
const NAME_BYTES: usize = 64;
/// Longest name of a tensor, in bytes.
const TENSOR_BYTES: usize = 512;
/// Most dimensions of a tensor.
const DIMENSIONS: usize = 16;
/// Most elements of a tensor.
const ELEMENTS: u64 = 1 << 40;
/// Most arrays of a sample.
const ARRAYS: usize = 256;
/// Longest side of an image, in pixels.
const SIDE: u32 = 1 << 12;
/// Scalars of a row that are left for settings that move.
const FOR_SETTINGS: usize = 16;
/// Beginnings of names in the state that are not networks'.
const TAKEN: [&str; 3] = ["optimizer", "counters", "scalars"];

/// Keys of the section `[optimizer]` of a job.
const OPTIMIZER_KEYS: [&str; 19] = [
    "kind",
    "learning_rate",
    "discriminator_learning_rate",
    "beta1",
    "beta2",
    "epsilon",
    "decay_images",
    "final_learning_rate",
    "final_discriminator_learning_rate",
    "final_beta2",
    "weight_decay",
    "momentum",
    "nesterov",
    "clip_norm",
    "warmup_images",
    "warmup_steps",
    "decay",
    "decay_steps",
    "phases",
];

type Checked = Result<(), String>;

/// Checks a whole manifest.
pub(super) fn check(manifest: &Manifest) -> Checked {
    let Manifest { shard_batch, networks, phases, .. } = manifest;
    ensure((1..=65_536).contains(shard_batch), || format!("shard_batch is {shard_batch}"))?;
    ensure((1..=NETWORKS).contains(&networks.len()), || format!("it has {} networks", networks.len()))?;
    let most = PHASES as usize;
    ensure((1..=most).contains(&phases.len()), || format!("it has {} phases", phases.len()))?;
    check_device(manifest)?;
    check_data(manifest)?;
    let tensors = Tensors::of(manifest)?;
    check_names(phases.iter().map(|phase| phase.name.as_str()), "phase")?;
    for phase in phases {
        // Each has a table of its own among them.
        ensure(!OPTIMIZER_KEYS.contains(&phase.name.as_str()), || {
            format!("a phase is named {}, as a setting of optimizers is; give it another name", phase.name)
        })?;
    }
    for (at, phase) in phases.iter().enumerate() {
        check_phase(manifest, &tensors, phase)
            .map_err(|what| format!("phases[{at}] (\"{}\"): {what}", phase.name))?;
    }
    check_updated(manifest)?;
    check_batches(phases)?;
    check_scalars(phases)?;
    if let Some(sample) = &manifest.sample {
        check_sample(manifest, &tensors, sample).map_err(|what| format!("sample: {what}"))?;
    }
    if let Some(evaluate) = &manifest.evaluate {
        check_evaluation(manifest, &tensors, evaluate).map_err(|what| format!("evaluate: {what}"))?;
    }
    Ok(())
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(what()) }
}

fn check_device(manifest: &Manifest) -> Checked {
    let is_told = manifest.capability.is_some() && manifest.cuda.is_some();
    ensure(manifest.device == Device::Cpu || is_told, || {
        "device \"cuda\" needs capability and cuda".to_owned()
    })
}

fn check_data(manifest: &Manifest) -> Checked {
    let DataSpec { samples, classes } = &manifest.data;
    match samples {
        SampleSpec::Images(images) => return check_images(*images),
        SampleSpec::Tokens(TokenSpec { context, vocabulary }) => {
            ensure((1..=1 << 20).contains(context), || format!("data.tokens has a context of {context}"))?;
            ensure((1..=1 << 24).contains(vocabulary), || {
                format!("data.tokens has a vocabulary of {vocabulary}")
            })?;
        }
        SampleSpec::Arrays(arrays) => {
            ensure((1..=ARRAYS).contains(&arrays.len()), || format!("data has {} arrays", arrays.len()))?;
            check_names(arrays.iter().map(|array| array.name.as_str()), "array")?;
            for array in arrays {
                check_shape(&array.shape).map_err(|what| format!("the array {}: {what}", array.name))?;
            }
        }
    }
    ensure(*classes == 0, || format!("data has {classes} classes, and these belong to images"))
}

fn check_images(images: ImageSpec) -> Checked {
    ensure(matches!(images.channels, 1 | 3), || {
        format!("data.images has {} channels; images have 1 or 3", images.channels)
    })?;
    for side in [images.height, images.width] {
        ensure((1..=SIDE).contains(&side), || format!("data.images has a side of {side} pixels"))?;
    }
    Ok(())
}

/// Tensors of the state, by their names in it.
struct Tensors<'a> {
    /// Parameters, and the name of their network.
    parameters: BTreeMap<String, &'a str>,
    buffers: BTreeSet<String>,
}

impl<'a> Tensors<'a> {
    fn of(manifest: &'a Manifest) -> Result<Tensors<'a>, String> {
        let averages = manifest.networks.iter().filter_map(|network| network.average.as_ref());
        let names = manifest.networks.iter().map(|network| network.name.as_str());
        check_names(names.chain(averages.map(|average| average.name.as_str())), "network or average")?;
        let mut tensors = Tensors { parameters: BTreeMap::new(), buffers: BTreeSet::new() };
        for network in &manifest.networks {
            let half_life = network.average.as_ref().map_or(1.0, |average| average.half_life_samples);
            ensure(half_life.is_finite() && half_life > 0.0, || {
                format!("the average of {} has a half-life of {half_life} samples", network.name)
            })?;
            for (at, (name, shape)) in network.tensors().enumerate() {
                ensure(is_tensor_name(&name), || format!("{name:?} is not the name of a tensor"))?;
                check_shape(shape).map_err(|what| format!("{name}: {what}"))?;
                ensure(!tensors.has(&name), || format!("the tensor {name} comes twice"))?;
                if at < network.parameters.len() {
                    tensors.parameters.insert(name, &network.name);
                } else {
                    tensors.buffers.insert(name);
                }
            }
        }
        Ok(tensors)
    }

    fn has(&self, name: &str) -> bool {
        self.parameters.contains_key(name) || self.buffers.contains(name)
    }
}

/// Checks names of networks, phases or graphs: each an identifier, and each once.
fn check_names<'a>(names: impl Iterator<Item = &'a str>, what: &str) -> Checked {
    let mut known = BTreeSet::new();
    for name in names {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let is_name = (1..=NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed);
        ensure(is_name && !TAKEN.contains(&name), || {
            format!(
                "{name:?} is not the name of a {what}: 1 to {NAME_BYTES} letters, digits and underscores, and none of {TAKEN:?}"
            )
        })?;
        ensure(known.insert(name), || format!("the {what} {name} comes twice"))?;
    }
    Ok(())
}

fn is_tensor_name(name: &str) -> bool {
    name.len() <= TENSOR_BYTES && !name.ends_with('.') && name.bytes().all(|byte| byte.is_ascii_graphic())
}

fn check_shape(shape: &[u64]) -> Checked {
    let elements = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
    let is_shape = shape.len() <= DIMENSIONS && elements.is_some_and(|count| (1..=ELEMENTS).contains(&count));
    ensure(is_shape, || format!("{shape:?} is no shape of a tensor that holds numbers"))
}

fn check_phase(manifest: &Manifest, tensors: &Tensors<'_>, phase: &Phase) -> Checked {
    check_graph_name(&phase.graph)?;
    let mut trains = false;
    for (at, name) in phase.updates.iter().enumerate() {
        let network = manifest.networks.iter().find(|network| network.name == *name);
        let network = network.ok_or_else(|| format!("updates {name}, which is no network"))?;
        ensure(!phase.updates[..at].contains(name), || format!("updates {name} twice"))?;
        // Some of several networks may be frozen as a whole.
        trains |= !network.parameters.is_empty();
    }
    ensure(trains, || "updates no network that has parameters; name one in updates".to_owned())?;
    ensure((1..=1_000_000_000).contains(&phase.every), || {
        format!("every is {}; it counts steps from 1", phase.every)
    })?;
    check_optimizer(&phase.optimizer)?;
    let reads = phase.batch != Batch::None;
    let inputs = Inputs { inputs: &phase.inputs, draws: &phase.draws, reads, classes: 0 };
    check_inputs(manifest, tensors, &inputs)?;
    check_outputs(tensors, phase)
}

fn check_optimizer(optimizer: &Optimizer) -> Checked {
    let Optimizer { kind, learning_rate, beta1, beta2, epsilon, weight_decay, momentum, nesterov, clip_norm } =
        *optimizer;
    let is_adam = kind != OptimizerKind::Sgd;
    let within = (0.0..=10.0).contains(&learning_rate)
        && (0.0..1.0).contains(&beta1)
        && (0.0..1.0).contains(&beta2)
        && (!is_adam || (1e-16..=1.0).contains(&epsilon));
    ensure(within, || {
        format!(
            "its optimizer has learning_rate {learning_rate}, beta1 {beta1}, beta2 {beta2}, epsilon {epsilon}; they must be \
             at most 10, below 1, below 1, and from 1e-16 to 1"
        )
    })?;
    let within = weight_decay.is_none_or(|decay| WEIGHT_DECAY.contains(&decay))
        && momentum.is_none_or(|momentum| MOMENTUM.contains(&momentum))
        && clip_norm.is_none_or(|norm| norm > 0.0 && norm <= CLIP_NORM);
    ensure(within, || {
        format!(
            "its optimizer has weight_decay {weight_decay:?}, momentum {momentum:?}, clip_norm {clip_norm:?}; they must be \
             at most {}, below {}, and above 0",
            WEIGHT_DECAY.end(),
            MOMENTUM.end
        )
    })?;
    let of_another = [
        ("weight_decay", weight_decay.is_some() && kind == OptimizerKind::Adam),
        ("momentum", momentum.is_some() && is_adam),
        ("nesterov", nesterov.is_some() && is_adam),
    ];
    match of_another.into_iter().find(|(_, is_wrong)| *is_wrong) {
        Some((name, _)) => Err(format!("its optimizer is {kind} and has a {name}")),
        None => Ok(()),
    }
}

/// Inputs of a graph, and what there is for them.
struct Inputs<'a> {
    inputs: &'a [Input],
    draws: &'a [Draw],
    /// Whether there are samples.
    reads: bool,
    /// Number of classes that samples are drawn of.
    classes: u32,
}

/// Checks a graph's inputs and draws.
fn check_inputs(manifest: &Manifest, tensors: &Tensors<'_>, graph: &Inputs<'_>) -> Checked {
    let Inputs { inputs, draws, reads, classes } = *graph;
    for input in inputs {
        let known = match input {
            Input::Parameter(name) => tensors.parameters.contains_key(name),
            Input::Buffer(name) => tensors.buffers.contains(name),
            Input::Batch(part) => reads && has(&manifest.data, part),
            Input::Draw(number) => *number < draws.len(),
            Input::Step(is) => *is,
            Input::Classes(is) => *is && classes > 0,
        };
        ensure(known, || match input {
            Input::Parameter(name) => format!("its input {name} is no parameter of any network"),
            Input::Buffer(name) => format!("its input {name} is no buffer of any network"),
            Input::Batch(_) if !reads => "it takes samples, and reads none: its batch is \"none\"".to_owned(),
            Input::Batch(BatchPart::Classes) => "it takes classes, and data.classes is 0".to_owned(),
            Input::Batch(part) => format!("it takes {part:?} of the samples, and data has none"),
            Input::Draw(number) => format!("it takes draw {number} of {}, counted from 0", draws.len()),
            Input::Step(_) => "an input {\"step\": false} is none".to_owned(),
            Input::Classes(_) => "it takes classes to draw samples of, and there are none".to_owned(),
        })?;
    }
    for (at, draw) in draws.iter().enumerate() {
        check_draw(draw).map_err(|what| format!("draw {at}: {what}"))?;
    }
    Ok(())
}

/// Whether samples have a part.
fn has(data: &DataSpec, part: &BatchPart) -> bool {
    match (part, &data.samples) {
        (BatchPart::Classes, _) => data.classes > 0,
        (BatchPart::Images, SampleSpec::Images(_)) | (BatchPart::Tokens, SampleSpec::Tokens(_)) => true,
        (BatchPart::Array(name), SampleSpec::Arrays(arrays)) => {
            arrays.iter().any(|array| array.name == *name)
        }
        _ => false,
    }
}

fn check_draw(draw: &Draw) -> Checked {
    check_shape(draw.shape())?;
    match draw {
        Draw::Normal { .. } => Ok(()),
        Draw::Uniform { low, high, .. } => ensure(low < high && (high - low).is_finite(), || {
            format!("from {low} to {high} is no range to draw from")
        }),
        Draw::Integers { low, high, .. } => {
            // The width fits a word as well, from which the draws are made.
            ensure(low < high && high.checked_sub(*low).is_some(), || {
                format!("from {low} to {high} is no range to draw from")
            })
        }
        Draw::Bernoulli { p, .. } => ensure((0.0..=1.0).contains(p), || format!("{p} is no probability")),
    }
}

fn check_graph_name(name: &str) -> Checked {
    check_names(std::iter::once(name), "graph")
}

fn check_outputs(tensors: &Tensors<'_>, phase: &Phase) -> Checked {
    let mut missing: BTreeSet<&str> = tensors
        .parameters
        .iter()
        .filter(|(_, network)| phase.updates.iter().any(|update| update == *network))
        .map(|(name, _)| name.as_str())
        .collect();
    let mut seen = BTreeSet::new();
    for output in &phase.outputs {
        match output {
            Output::Gradient(name) => {
                ensure(missing.remove(name.as_str()), || {
                    match tensors.parameters.contains_key(name) && seen.contains(name.as_str()) {
                        true => format!("it returns the gradient of {name} twice"),
                        false => format!("it returns the gradient of {name}, which it does not update"),
                    }
                })?;
            }
            Output::Buffer(name) => {
                ensure(tensors.buffers.contains(name), || {
                    format!("its output {name} is no buffer of any network")
                })?;
                ensure(!seen.contains(name.as_str()), || format!("it returns the change of {name} twice"))?;
            }
            Output::Scalar(name) => check_scalar_name(name)?,
        }
        let (Output::Gradient(name) | Output::Buffer(name) | Output::Scalar(name)) = output;
        // Scalars have no dot in their names, and so are none of the tensors.
        ensure(seen.insert(name.as_str()), || format!("it returns the scalar {name} twice"))?;
    }
    if let Some(name) = missing.first() {
        return Err(format!("it updates {name}, and returns no gradient of it"));
    }
    let is_loss = |output: &Output| matches!(output, Output::Scalar(name) if *name == phase.loss);
    ensure(phase.outputs.iter().any(is_loss), || {
        format!("its loss is {:?}, and it returns no such scalar", phase.loss)
    })
}

fn check_scalar_name(name: &str) -> Checked {
    check_scalar(name).map_err(|error| error.0)?;
    ensure(!name.starts_with("setting_"), || {
        format!("the scalar {name} begins as settings do; give it another name")
    })
}

/// Checks that each network's parameters are updated by some phase.
fn check_updated(manifest: &Manifest) -> Checked {
    for network in &manifest.networks {
        let is_updated = manifest.phases.iter().any(|phase| phase.updates.contains(&network.name));
        ensure(is_updated || network.parameters.is_empty(), || {
            format!("no phase updates {}; its parameters belong to its buffers", network.name)
        })?;
    }
    Ok(())
}

/// Checks the samples that the phases of a step read.
fn check_batches(phases: &[Phase]) -> Checked {
    let mut has_read = false;
    for (at, phase) in phases.iter().enumerate() {
        let wrong = |what: &str| Err(format!("phases[{at}] (\"{}\"): {what}", phase.name));
        match phase.batch {
            Batch::Next if phase.every != 1 => {
                return wrong(
                    "takes the next samples, and does not run in every step; set batch to \"same\", or every to 1",
                );
            }
            Batch::Next => has_read = true,
            Batch::Same if !has_read => {
                return wrong(
                    "takes the samples of an earlier phase, and none has read any; set batch to \"next\"",
                );
            }
            Batch::Same | Batch::None => {}
        }
    }
    ensure(has_read, || "no phase reads the next samples; set batch of one to \"next\"".to_owned())
}

/// Checks the scalars of all phases together: they are columns of one row.
fn check_scalars(phases: &[Phase]) -> Checked {
    let mut graphs: BTreeMap<&str, &str> = BTreeMap::new();
    for phase in phases {
        for output in &phase.outputs {
            let Output::Scalar(name) = output else { continue };
            // A phase that runs several times in a step reports the last.
            let graph = *graphs.entry(name).or_insert(&phase.graph);
            ensure(graph == phase.graph, || {
                format!(
                    "the graphs {graph} and {} both return a scalar {name}; give them names of their own",
                    phase.graph
                )
            })?;
        }
    }
    let most = SCALARS - FOR_SETTINGS;
    ensure(graphs.len() <= most, || {
        format!("it returns {} scalars, and at most {most} fit into a row", graphs.len())
    })
}

fn check_sample(manifest: &Manifest, tensors: &Tensors<'_>, sample: &SampleGraph) -> Checked {
    check_graph_name(&sample.graph)?;
    ensure((1..=65_536).contains(&sample.count), || format!("count is {}", sample.count))?;
    let (own, of_data) = (sample.classes, manifest.data.classes);
    ensure(own == 0 || own == of_data, || format!("it draws {own} classes, and the data has {of_data}"))?;
    let inputs = Inputs { inputs: &sample.inputs, draws: &sample.draws, reads: false, classes: own };
    check_inputs(manifest, tensors, &inputs)?;
    let output = &sample.output;
    if let SampleSpec::Images(images) = &manifest.data.samples {
        let expected = [sample.count, images.channels, images.height, images.width].map(u64::from);
        return ensure(*output == expected, || {
            format!("it returns samples of shape {output:?}, and not {expected:?} as the data")
        });
    }
    let sides = 1..=u64::from(SIDE);
    let are_images = matches!(output[..], [count, 1 | 3, height, width]
        if count == u64::from(sample.count) && sides.contains(&height) && sides.contains(&width));
    ensure(are_images, || format!("it returns samples of shape {output:?}, which are no images"))
}

fn check_evaluation(manifest: &Manifest, tensors: &Tensors<'_>, evaluate: &EvaluationGraph) -> Checked {
    check_graph_name(&evaluate.graph)?;
    let inputs = Inputs { inputs: &evaluate.inputs, draws: &evaluate.draws, reads: true, classes: 0 };
    check_inputs(manifest, tensors, &inputs)?;
    let mut names = BTreeSet::new();
    for output in &evaluate.outputs {
        let Output::Scalar(name) = output else {
            return Err("it returns a tensor that is no scalar".to_owned());
        };
        check_scalar_name(name)?;
        ensure(names.insert(name), || format!("it returns the scalar {name} twice"))?;
    }
    ensure((1..=SCALARS / 2).contains(&names.len()), || format!("it returns {} scalars", names.len()))
}
