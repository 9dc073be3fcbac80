//! Packages: objectives written in PyTorch, compiled ahead of time with their backward passes.
//!
//! 1. No compiled code is loaded before the manifest was compared with this machine and with the job.
//! 2. A graph takes views of the state, the shard's samples, and draws of one generator in the manifest's
//!    order, keyed by (seed, step, phase, shard). Each output is copied once, into the shard gradient.
//! 3. Before training each graph runs twice on substitutes for samples (`probe.rs`).

mod graphs;
mod probe;
mod samples;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ganglion_proto::job::Job;
use ganglion_proto::package::{self, Batch, Machine, Manifest, Output, Package, SampleSpec};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use tch::{Device, Tensor, no_grad};

use self::graphs::{Given, Graphs, Prepared, Values, places, signed};
pub(crate) use self::samples::{Drawn, PackageSamples, in_turn};
use self::samples::{averages, views};
use super::{
    BatchSums, BufferId, Compute, Evaluator, NamedNetwork, NetworkId, NetworkSet, Objective, Optimizer,
    Phase, Reads, ScalarRole, ScalarSpec, Setting, ShardAt, ShardBatch, ShardGrad, Unsuitable, annealing,
    optimizer,
};
use crate::checkpoint::{Snapshot, WeightsFile};
use crate::data::{DataSet, ImageShape, SampleShape, TokenShape};
use crate::nn::broken::Watchdog;
use crate::nn::tensor_bytes::from_bytes;
use crate::nn::{self, Init, TensorSpec};
use crate::random::{Draws, Key, Purpose};
use crate::sampling::{CLASS_NAMES, Sampler, WEIGHTS_FILE};
use crate::state::{State, StateLayout};

/// The objective of a package. Copies share it.
#[derive(Clone)]
pub(crate) struct Packaged(Arc<Inner>);

struct Inner {
    job: Job,
    package: Package,
    device: Device,
    networks: Vec<NamedNetwork>,
    phases: Vec<PhaseGraph>,
    sample: Option<Arc<Prepared>>,
    evaluate: Option<Prepared>,
    /// Names of the data's classes; empty where they are numbers.
    class_names: Vec<String>,
}

/// A phase with its graph.
struct PhaseGraph {
    phase: Phase,
    graph: Prepared,
    /// Places of the graph's outputs in a shard gradient.
    targets: Vec<Target>,
    /// Buffers that the phase updates, in the order of a shard gradient.
    follows: Vec<BufferId>,
    scalars: Vec<ScalarSpec>,
}

/// Place of an output in a shard gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Gradient(usize),
    Statistic(usize),
    Scalar(usize),
}

/// Makes the objective of a job that trains a package, for its data.
///
/// # Errors
/// The package cannot be read, or does not fit the job, the data or this machine.
pub(super) fn make(job: &Job, data: &DataSet, device: Device) -> Result<Arc<dyn Objective>, Unsuitable> {
    let path = job.model.path.as_deref().ok_or_else(|| Unsuitable("model.path: missing".to_string()))?;
    let wrong = |what: String| Unsuitable(format!("model.path: {}: {what}", path.display()));
    let package = Package::read(path).map_err(|error| wrong(error.to_string()))?;
    check_job(job, &package, path).map_err(wrong)?;
    check_data(&package.manifest, data).map_err(wrong)?;
    // From here on compiled code runs, which may not end.
    let _watchdog = Watchdog::over(&path.display().to_string());
    let graphs = open(&package, device).map_err(wrong)?;
    let objective = Packaged::new(job, package, &graphs, data.class_names().to_vec()).map_err(wrong)?;
    probe::check(&objective).map_err(wrong)?;
    drop(graphs);
    Ok(Arc::new(objective))
}

/// Loads the graphs of a package, once it is known that this machine may run them.
fn open(package: &Package, device: Device) -> Result<Graphs, String> {
    let machine = machine(device)?;
    package.manifest.check_machine(&machine).map_err(|error| error.to_string())?;
    Graphs::load(package, device)
}

/// Properties of this machine that compiled code depends on.
fn machine(device: Device) -> Result<Machine, String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo");
    let cpuinfo =
        cpuinfo.map_err(|error| format!("cannot be compared with this machine: /proc/cpuinfo: {error}"))?;
    let torch = c10d::aten::libtorch_version().map_err(|error| error.to_string())?;
    Ok(Machine {
        torch,
        arch: std::env::consts::ARCH.to_string(),
        features: package::features(&cpuinfo),
        accelerator: crate::device::accelerator(device).map_err(|error| error.to_string())?,
    })
}

fn check_job(job: &Job, package: &Package, path: &Path) -> Result<(), String> {
    if let Some(hash) = job.model.package_hash.as_ref().filter(|hash| **hash != package.hash) {
        return Err(format!(
            "is another package than the run's: its hash begins with {}, and the run's with {}; put the same file at {} on \
             each machine, as it was when the run began",
            &package.hash[..12],
            hash.get(..12).unwrap_or(hash),
            path.display()
        ));
    }
    let (own, of_job) = (package.manifest.shard_batch, job.job.shard_batch);
    if own != of_job {
        return Err(format!(
            "was exported for job.shard_batch = {own}, and the job has {of_job}; export it again"
        ));
    }
    Ok(())
}

/// The samples that a package takes.
fn data_shape(manifest: &Manifest) -> SampleShape {
    match &manifest.data.samples {
        SampleSpec::Images(images) => {
            let [channels, height, width] =
                [images.channels, images.height, images.width].map(|size| size as usize);
            SampleShape::Image(ImageShape { channels, height, width })
        }
        SampleSpec::Tokens(tokens) => SampleShape::Tokens(TokenShape {
            context: tokens.context as usize,
            vocabulary: tokens.vocabulary,
        }),
        SampleSpec::Arrays(arrays) => SampleShape::Arrays(arrays.clone()),
    }
}

fn check_data(manifest: &Manifest, data: &DataSet) -> Result<(), String> {
    check_shape(&data_shape(manifest), data.shape())?;
    let (wanted, found) = (manifest.data.classes, data.classes());
    if wanted > 0 && wanted != found {
        return Err(format!(
            "was exported for data of {wanted} classes, and the data has {found}; export it again with classes={found}"
        ));
    }
    Ok(())
}

/// Checks that samples are such as a package takes.
fn check_shape(wanted: &SampleShape, found: &SampleShape) -> Result<(), String> {
    match (wanted, found) {
        (wanted, found) if wanted == found => Ok(()),
        (SampleShape::Image(wanted), SampleShape::Image(found)) => Err(format!(
            "takes images of {wanted} (channels, height, width), and the data has {found}; set data.resize and data.crop, or \
             export it again for such images with ganglion.images(...)"
        )),
        (SampleShape::Tokens(wanted), SampleShape::Tokens(found)) if wanted.context == found.context => {
            let (own, other) = (wanted.vocabulary, found.vocabulary);
            // A larger vocabulary has tokens that never come.
            if other <= own {
                return Ok(());
            }
            Err(format!(
                "takes tokens below {own}, and the data has {other} different ones; export it again with \
                 ganglion.text(vocabulary={other}, ...), or train on text of its own tokenizer"
            ))
        }
        (SampleShape::Arrays(wanted), SampleShape::Arrays(found)) => wanted.iter().try_for_each(|array| {
            let other = found.iter().find(|other| other.name == array.name);
            match other {
                Some(other) if other == array => Ok(()),
                Some(other) => Err(format!(
                    "takes the array {array}, and the data has {other}; save it so, or export it again with \
                     ganglion.arrays(...)"
                )),
                None => Err(format!("takes the array {array}, and the data has none of this name")),
            }
        }),
        (wanted, found) => {
            Err(format!("takes {wanted}, and the data has {found}; set data.kind and data.context to such"))
        }
    }
}

impl Packaged {
    fn new(
        job: &Job,
        package: Package,
        graphs: &Graphs,
        class_names: Vec<String>,
    ) -> Result<Packaged, String> {
        let manifest = &package.manifest;
        let networks = networks(&package)?;
        let phases = (0..).zip(&manifest.phases);
        let phases = phases.map(|(index, phase)| PhaseGraph::new(manifest, graphs, index, phase)).collect();
        let sample = manifest.sample.as_ref();
        let sample = sample.map(|own| graphs.prepare(manifest, &own.graph, &own.inputs, &own.draws));
        let evaluate = manifest.evaluate.as_ref();
        let evaluate = evaluate.map(|own| graphs.prepare(manifest, &own.graph, &own.inputs, &own.draws));
        Ok(Packaged(Arc::new(Inner {
            job: job.clone(),
            device: graphs.device(),
            networks,
            phases,
            sample: sample.map(Arc::new),
            evaluate,
            class_names,
            package,
        })))
    }

    fn own(&self, phase: Phase) -> &PhaseGraph {
        &self.0.phases[phase.index as usize]
    }

    fn about(&self, phase: Phase) -> &package::Phase {
        &self.0.package.manifest.phases[phase.index as usize]
    }

    fn key(&self, at: ShardAt) -> Key {
        let ShardAt { phase, step, shard } = at;
        Key { seed: self.0.job.job.seed, step, phase: phase.index, shard, purpose: Purpose::Graph }
    }

    /// Number of samples that a step reads.
    fn per_step(&self) -> u64 {
        let reads = self.0.phases.iter().filter(|own| own.phase.reads == Reads::Next).count();
        self.0.job.global_batch().saturating_mul(reads as u64)
    }
}

/// Networks with the first values of their tensors.
fn networks(package: &Package) -> Result<Vec<NamedNetwork>, String> {
    const AGAIN: &str = "export it again with ganglion.export(...)";
    let bytes = package.weights().map_err(|error| error.to_string())?;
    let damaged = |what: String| format!("has first weights that do not fit its manifest: {what}; {AGAIN}");
    let weights = SafeTensors::deserialize(&bytes).map_err(|error| damaged(error.to_string()))?;
    let mut unused: Vec<&str> = weights.names();
    let mut named =
        |network: &package::Network, tensor: &package::TensorSpec| -> Result<TensorSpec, String> {
            let name = format!("{}.{}", network.name, tensor.name);
            let value = weights.tensor(&name).map_err(|error| damaged(error.to_string()))?;
            let shape: Vec<u64> = value.shape().iter().map(|size| *size as u64).collect();
            if value.dtype() != Dtype::F32 || shape != tensor.shape {
                return Err(damaged(format!("{name} is {:?} of shape {shape:?}", value.dtype())));
            }
            unused.retain(|other| *other != name);
            let values = Vec::<f32>::try_from(from_bytes(value.data())).map_err(|error| error.to_string())?;
            let shape: Vec<i64> = tensor.shape.iter().map(|size| signed(*size)).collect();
            let spec = TensorSpec::moved(tensor.name.clone(), &shape, Init::Given(values.into()));
            Ok(TensorSpec { decays: tensor.decays.unwrap_or(nn::decays(&shape)), ..spec })
        };
    let mut networks = Vec::new();
    for network in &package.manifest.networks {
        let mut all = |tensors: &[package::TensorSpec]| -> Result<Vec<TensorSpec>, String> {
            tensors.iter().map(|tensor| named(network, tensor)).collect()
        };
        let (parameters, buffers) = (all(&network.parameters)?, all(&network.buffers)?);
        let average = network.average.as_ref().map(|average| average.name.clone().into());
        networks.push(NamedNetwork { name: network.name.clone().into(), parameters, buffers, average });
    }
    match unused.first() {
        Some(name) => Err(damaged(format!("{name} is no tensor of any network"))),
        None => Ok(networks),
    }
}

impl PhaseGraph {
    fn new(manifest: &Manifest, graphs: &Graphs, index: u32, phase: &package::Phase) -> PhaseGraph {
        let places = places(manifest);
        // In the order of the state; what is frozen as a whole is updated by nobody.
        let is_updated = |network: &package::Network| {
            phase.updates.contains(&network.name) && !network.parameters.is_empty()
        };
        let networks = (0..).zip(&manifest.networks).filter(|(_, network)| is_updated(network));
        let updated: Vec<usize> = networks.map(|(index, _)| index).collect();
        // A shard gradient has the parameters of one network after the other.
        let parameters = updated.iter().flat_map(|network| {
            (0..manifest.networks[*network].parameters.len()).map(move |index| (*network, index))
        });
        let parameters: Vec<(usize, usize)> = parameters.collect();
        let buffers = phase.outputs.iter().filter_map(|output| match output {
            Output::Buffer(name) => Some(places[name]),
            _ => None,
        });
        let mut buffers: Vec<(usize, usize)> = buffers.collect();
        // Neighbours in the state are neighbours in the gradient: one operation for all of them.
        buffers.sort_unstable();
        let scalars = scalars(phase);
        let index_of = |all: &[(usize, usize)], name: &String| {
            all.iter()
                .position(|place| *place == places[name])
                .expect("outputs were checked with the manifest")
        };
        let target = |output: &Output| match output {
            Output::Gradient(name) => Target::Gradient(index_of(&parameters, name)),
            Output::Buffer(name) => Target::Statistic(index_of(&buffers, name)),
            Output::Scalar(name) => {
                let place = scalars.iter().position(|scalar| scalar.name == *name);
                Target::Scalar(place.expect("each scalar has a place"))
            }
        };
        let reads = match phase.batch {
            Batch::Next => Reads::Next,
            Batch::Same => Reads::Same,
            Batch::None => Reads::Nothing,
        };
        let every = u32::try_from(phase.every).expect("cadences were checked with the manifest");
        let updates = NetworkSet::of(updated.into_iter().map(NetworkId));
        PhaseGraph {
            phase: Phase { index, updates, reads, every },
            graph: graphs.prepare(manifest, &phase.graph, &phase.inputs, &phase.draws),
            targets: phase.outputs.iter().map(target).collect(),
            follows: buffers
                .into_iter()
                .map(|(network, index)| BufferId { network: NetworkId(network), index })
                .collect(),
            scalars,
        }
    }
}

/// Scalars of a phase: its loss, then the others.
fn scalars(phase: &package::Phase) -> Vec<ScalarSpec> {
    let names = phase.outputs.iter().filter_map(|output| match output {
        Output::Scalar(name) if *name != phase.loss => Some(name),
        _ => None,
    });
    let others = names.map(|name| ScalarSpec::new(name.clone(), ScalarRole::Diagnostic));
    std::iter::once(ScalarSpec::new(phase.loss.clone(), ScalarRole::Loss)).chain(others).collect()
}

/// Parameters and buffers of each network of a state.
fn values_of(state: &State) -> Values<'_> {
    let networks = (0..state.layout.networks().len()).map(NetworkId);
    networks.map(|network| [state.frozen(network), state.buffers(network)]).collect()
}

impl Objective for Packaged {
    fn networks(&self) -> Vec<NamedNetwork> {
        self.0.networks.clone()
    }

    fn phases(&self) -> Vec<Phase> {
        self.0.phases.iter().map(|own| own.phase).collect()
    }

    fn phase_name(&self, phase: Phase) -> Cow<'_, str> {
        self.about(phase).name.as_str().into()
    }

    fn follows(&self, phase: Phase) -> Vec<BufferId> {
        self.own(phase).follows.clone()
    }

    fn scalars(&self, phase: Phase) -> Vec<ScalarSpec> {
        self.own(phase).scalars.clone()
    }

    fn settings(&self) -> Vec<Setting<'_>> {
        let (shared, per_step) = (&self.0.job.optimizer, self.per_step());
        let phases = shared.phases.iter();
        phases
            .flat_map(|(phase, own)| optimizer::moving(own, shared, per_step, &format!("_{phase}")))
            .collect()
    }

    fn draws(&self, at: ShardAt) -> Vec<(Key, Vec<Tensor>)> {
        let (graph, key) = (&self.own(at.phase).graph, self.key(at));
        let numbers = graph.draws().iter().map(|draw| draw.shape().iter().product::<u64>()).sum::<u64>();
        if (1..=MOST_AHEAD).contains(&numbers) { vec![(key, graph.drawn(key))] } else { Vec::new() }
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        Box::new(Computing { package: self, draws: Draws::default() })
    }

    fn optimizer(&self, phase: Phase, steps: u64) -> Optimizer {
        let own = &self.0.job.optimizer.phases[&self.about(phase).name];
        optimizer::scheduled(own, &self.0.job.optimizer, steps, self.per_step())
    }

    fn average_decay(&self, network: NetworkId, steps: u64) -> f64 {
        let average = self.0.package.manifest.networks[network.0].average.as_ref();
        let full = average.map_or(0.0, |average| average.half_life_samples);
        #[allow(clippy::cast_precision_loss)] // counts of samples are far below 2^53
        let (batch, steps) = (self.0.job.global_batch() as f64, steps as f64);
        annealing::decay(batch, annealing::ramped_up(full, batch * steps))
    }

    fn sampler(&self) -> Option<&dyn Sampler> {
        self.0.sample.as_ref().map(|_| self as &dyn Sampler)
    }

    fn evaluator(&self) -> Option<&dyn Evaluator> {
        self.0.evaluate.as_ref().map(|_| self as &dyn Evaluator)
    }

    fn weights_file(&self) -> Option<WeightsFile> {
        let networks = &self.0.package.manifest.networks;
        let section = |network: &package::Network| {
            let own = network.average.as_ref().map_or(&network.name, |average| &average.name);
            (format!("{own}."), format!("{}.", network.name))
        };
        let path = self.0.package.path().display().to_string();
        let names =
            (!self.0.class_names.is_empty()).then(|| (CLASS_NAMES, json!(self.0.class_names).to_string()));
        let about = [
            ("model", "package".to_string()),
            ("package", path),
            ("package_hash", self.0.package.hash.clone()),
        ];
        let about = about.into_iter().chain(names).map(|(key, value)| (key.to_string(), value));
        Some(WeightsFile {
            name: WEIGHTS_FILE.to_string(),
            sections: networks.iter().map(section).collect(),
            constants: Vec::new(),
            about: about.collect::<BTreeMap<_, _>>(),
        })
    }

    fn fingerprint(&self) -> Vec<(String, String)> {
        vec![("package".to_string(), self.0.package.hash[..16].to_string())]
    }

    /// The shapes of its graphs are fixed.
    fn probe_batch(&self, shard_batch: u32) -> u32 {
        shard_batch
    }

    fn probe(&self, _shard_batch: u32) -> Box<dyn Objective> {
        Box::new(self.clone())
    }
}

impl Evaluator for Packaged {
    fn scalars(&self) -> Vec<Cow<'static, str>> {
        let outputs = self.0.package.manifest.evaluate.iter().flat_map(|evaluate| &evaluate.outputs);
        let name = |output: &Output| match output {
            Output::Scalar(name) => Some(name.clone().into()),
            _ => None,
        };
        outputs.filter_map(name).collect()
    }

    fn begin<'a>(
        &'a self,
        layout: &'a StateLayout,
        snapshot: &'a Snapshot,
    ) -> Result<BatchSums<'a>, c10d::Error> {
        let held = averages(layout, snapshot, self.0.device);
        let graph = self.0.evaluate.as_ref().expect("a package without a graph for it has no evaluator");
        Ok(Box::new(move |batch, key| {
            let (values, part) = (views(&held), "in evaluation");
            let given = Given { values, batch: Some(batch), wanted: None, steps: snapshot.step, part };
            let outputs = no_grad(|| graph.run(&given, &graph.draw(key)));
            Ok(outputs.iter().map(|output| output.double_value(&[])).collect())
        }))
    }
}

/// Largest number of draws of a shard gradient that are made ahead.
const MOST_AHEAD: u64 = 1 << 20;

/// Computation of one member's gradients.
struct Computing<'a> {
    package: &'a Packaged,
    /// Draws that were made ahead.
    draws: Draws,
}

impl Compute for Computing<'_> {
    fn keep(&mut self, draws: Draws) {
        self.draws.add(draws);
    }

    fn gradient(
        &mut self,
        at: ShardAt,
        state: &State,
        batch: Option<&ShardBatch>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let Computing { package, draws } = self;
        let (own, job, key) = (package.own(at.phase), &package.0.job, package.key(at));
        let draws = draws.all(key, package.0.device, || own.graph.drawn(key));
        let (values, part) = (values_of(state), "in training");
        let given = Given { values, batch, wanted: None, steps: at.step, part };
        let outputs = own.graph.run(&given, &draws);
        let samples = i64::from(job.job.shard_batch);
        let mut gradients = vec![None; out.gradients.len()];
        no_grad(|| {
            for (output, target) in outputs.iter().zip(&own.targets) {
                match *target {
                    Target::Gradient(index) => gradients[index] = Some(output),
                    // The sum over the shards is divided by the global batch, and a shard has one update.
                    Target::Statistic(index) => out.statistics[index].copy_(&(output * samples)),
                    Target::Scalar(index) => out.scalars[index].copy_(output),
                }
            }
        });
        let places = out.gradients.iter_mut().zip(gradients);
        c10d::aten::copy_all(places.filter_map(|(place, gradient)| Some((place, gradient?))))
    }
}
