//! Compiled graphs of a package, loaded once, with the tensors that they take.

use std::collections::BTreeMap;
use std::sync::Arc;

use c10d::package::Graph;
use ganglion_proto::package::{BatchPart, Draw, Input, Manifest, Package};
use tch::{Device, Tensor};
use tempfile::TempDir;

use crate::nn::broken::BrokenModule;
use crate::objective::ShardBatch;
use crate::random::Key;

/// Where an input of a graph comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// A network's parameter, by both indices.
    Parameter(usize, usize),
    /// A network's buffer.
    Buffer(usize, usize),
    Images,
    /// Classes of the samples that were read.
    Classes,
    Tokens,
    /// Array of a name.
    Array(String),
    Draw(usize),
    Steps,
    /// Classes of the samples to draw.
    Wanted,
}

/// A graph with the tensors that it takes.
pub(super) struct Prepared {
    graph: Arc<Graph>,
    /// Path of the package, for error messages.
    file: String,
    inputs: Vec<Source>,
    draws: Vec<Draw>,
    device: Device,
}

/// Parameters and buffers of each network.
pub(super) type Values<'a> = Vec<[&'a [Tensor]; 2]>;

/// Inputs of a run of a graph beside its draws.
pub(super) struct Given<'a> {
    /// Tensors of the networks.
    pub values: Values<'a>,
    /// Samples of a shard.
    pub batch: Option<&'a ShardBatch>,
    /// Classes of the samples to draw, (count) of int64.
    pub wanted: Option<&'a Tensor>,
    /// Number of steps done before.
    pub steps: u64,
    /// Part of the work, for error messages, such as `in training`.
    pub part: &'static str,
}

/// Graphs of a package by their names, loaded once each. On a GPU a graph reads its kernels when it first
/// runs: keep this until each has run.
pub(super) struct Graphs {
    graphs: BTreeMap<String, Arc<Graph>>,
    file: String,
    device: Device,
    _folders: Vec<TempDir>,
}

impl Graphs {
    /// Loads all graphs of a package whose manifest fits this machine.
    ///
    /// # Errors
    /// They cannot be unpacked or loaded; says why, and how to mend it.
    pub(super) fn load(package: &Package, device: Device) -> Result<Graphs, String> {
        let (mut graphs, mut folders) = (BTreeMap::new(), Vec::new());
        for name in package.manifest.graphs() {
            if !graphs.contains_key(name) {
                let (graph, folder) = load(package, name, device)?;
                graphs.insert(name.to_string(), Arc::new(graph));
                // A processor's code is in memory by now, and so nothing is left behind by whatever ends this
                // process.
                folders.extend(device.is_cuda().then_some(folder));
            }
        }
        Ok(Graphs { graphs, file: package.path().display().to_string(), device, _folders: folders })
    }

    /// Device that the graphs run on.
    pub(super) fn device(&self) -> Device {
        self.device
    }

    /// A graph with its inputs and draws.
    pub(super) fn prepare(
        &self,
        manifest: &Manifest,
        name: &str,
        inputs: &[Input],
        draws: &[Draw],
    ) -> Prepared {
        let places = places(manifest);
        let at = |name: &String| places[name];
        let source = |input: &Input| match input {
            Input::Parameter(name) => Source::Parameter(at(name).0, at(name).1),
            Input::Buffer(name) => Source::Buffer(at(name).0, at(name).1),
            Input::Batch(BatchPart::Images) => Source::Images,
            Input::Batch(BatchPart::Classes) => Source::Classes,
            Input::Batch(BatchPart::Tokens) => Source::Tokens,
            Input::Batch(BatchPart::Array(name)) => Source::Array(name.clone()),
            Input::Draw(number) => Source::Draw(*number),
            Input::Step(_) => Source::Steps,
            Input::Classes(_) => Source::Wanted,
        };
        Prepared {
            graph: self.graphs[name].clone(),
            file: self.file.clone(),
            inputs: inputs.iter().map(source).collect(),
            draws: draws.to_vec(),
            device: self.device,
        }
    }
}

/// Network and index within its parameters or buffers of each tensor, by its name in the state.
pub(super) fn places(manifest: &Manifest) -> BTreeMap<String, (usize, usize)> {
    let mut places = BTreeMap::new();
    for (network, about) in manifest.networks.iter().enumerate() {
        let count = about.parameters.len();
        for (index, (name, _)) in about.tensors().enumerate() {
            places.insert(name, (network, if index < count { index } else { index - count }));
        }
    }
    places
}

/// Loads a graph; returns it with the folder that it was unpacked into.
fn load(package: &Package, name: &str, device: Device) -> Result<(Graph, TempDir), String> {
    // Read by nobody else: whoever may write here could run code in this process.
    let folder = tempfile::Builder::new().prefix("ganglion-graph-").tempdir();
    let into = std::env::temp_dir();
    let unwritable = |error: std::io::Error| {
        format!(
            "its graph \"{name}\" cannot be unpacked into {}: {error}; set TMPDIR to a folder with room in which programs \
             may run",
            into.display()
        )
    };
    let folder = folder.map_err(unwritable)?;
    let library = package.unpack(name, folder.path()).map_err(unwritable)?;
    let graph = Graph::load(&library, device).map_err(|error| {
        let text = error.to_string();
        match text.contains("failed to map segment") {
            // The words of the dynamic linker for a file system without the right to run what it holds.
            true => format!(
                "its graph \"{name}\" cannot be run from {}: {text}; set TMPDIR to a folder in which programs may run",
                into.display()
            ),
            false => format!(
                "its graph \"{name}\" cannot be loaded: {text}; export it again with ganglion.export(...)"
            ),
        }
    })?;
    Ok((graph, folder))
}

impl Prepared {
    /// Draws the random numbers of one run, on the device.
    pub(super) fn draw(&self, key: Key) -> Vec<Tensor> {
        self.drawn(key).iter().map(|drawn| drawn.to_device(self.device)).collect()
    }

    /// Draws the random numbers of one run, one after the other, on the CPU.
    pub(super) fn drawn(&self, key: Key) -> Vec<Tensor> {
        let mut stream = key.stream();
        let draw = |draw: &Draw| {
            let shape: Vec<i64> = draw.shape().iter().map(|size| signed(*size)).collect();
            let count = usize::try_from(shape.iter().product::<i64>()).expect("a tensor is in memory");
            let flat = match draw {
                Draw::Normal { .. } => Tensor::from_slice(&stream.normal(count)),
                Draw::Uniform { low, high, .. } => Tensor::from_slice(&stream.uniform(*low, *high, count)),
                Draw::Integers { low, high, .. } => Tensor::from_slice(&stream.integers(*low, *high, count)),
                Draw::Bernoulli { p, .. } => Tensor::from_slice(&stream.bernoulli(*p, count)),
            };
            flat.view(shape.as_slice())
        };
        self.draws.iter().map(draw).collect()
    }

    /// Draws that the graph takes.
    pub(super) fn draws(&self) -> &[Draw] {
        &self.draws
    }

    /// Device that the graph runs on.
    pub(super) fn device(&self) -> Device {
        self.device
    }

    /// Runs the graph; its failure unwinds as that of a user's module.
    pub(super) fn run(&self, given: &Given<'_>, draws: &[Tensor]) -> Vec<Tensor> {
        #[allow(clippy::cast_precision_loss)] // far below 2^24 where the difference matters
        let steps = Tensor::from(given.steps as f32).to_device(self.device);
        let batch = given.batch.map(|batch| batch.to(self.device).map(Tensor::contiguous));
        let batch = batch.as_ref();
        let missing = "the manifest and the job's data were compared";
        let input = |source: &Source| match source {
            Source::Parameter(network, index) => &given.values[*network][0][*index],
            Source::Buffer(network, index) => &given.values[*network][1][*index],
            Source::Images => batch.expect(missing).images(),
            Source::Classes => batch.and_then(|batch| batch.classes.as_ref()).expect(missing),
            Source::Tokens => batch.expect(missing).tokens(),
            Source::Array(name) => batch.expect(missing).array(name),
            Source::Draw(number) => &draws[*number],
            Source::Steps => &steps,
            Source::Wanted => given.wanted.expect(missing),
        };
        self.graph.run(self.inputs.iter().map(input)).unwrap_or_else(|error| {
            let detail = error.to_string();
            BrokenModule { module: self.file.clone(), phase: given.part, detail }.raise()
        })
    }
}

/// A size as libtorch counts it.
pub(super) fn signed(size: u64) -> i64 {
    i64::try_from(size).expect("sizes were checked with the manifest")
}
