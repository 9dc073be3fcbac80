//! Samples of a package. Its graph draws a fixed number at once: sample i is sample i mod n of the draw that
//! is keyed by i div n.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ganglion_proto::evaluation::NOT_FINITE;
use ganglion_proto::package::{self, Draw, Manifest, Package, SampleGraph};
use ganglion_proto::progress::Progress;
use safetensors::SafeTensors;
use tch::{Device, Tensor, no_grad};

use super::graphs::{Given, Prepared, Values, signed};
use super::{Packaged, open};
use crate::checkpoint::{EARLIER, Snapshot};
use crate::data::ImageShape;
use crate::nn::is_finite;
use crate::nn::tensor_bytes::from_bytes;
use crate::random::Key;
use crate::sampling::{CLASS_NAMES, SampleError, Sampler, WEIGHTS_FILE, metadata};
use crate::state::{Sections, StateLayout};

/// Random numbers of one run of the graph.
pub(crate) type Drawn = Vec<Tensor>;

/// The graph that draws samples, with the weights of a state.
pub(crate) struct PackageSamples {
    graph: Arc<Prepared>,
    values: Held,
    steps: u64,
    /// Number of samples that a run draws.
    at_once: u32,
    classes: u32,
    class_names: Vec<String>,
    shape: ImageShape,
}

impl PackageSamples {
    /// Samples of a package's graph, with these values of its tensors.
    fn new(
        manifest: &Manifest,
        graph: Arc<Prepared>,
        values: Vec<[Vec<Tensor>; 2]>,
    ) -> Option<PackageSamples> {
        let sample = manifest.sample.as_ref()?;
        Some(PackageSamples {
            graph,
            values,
            steps: 0,
            at_once: sample.count,
            classes: sample.classes,
            class_names: Vec::new(),
            shape: shape_of(sample),
        })
    }

    /// Samples of a state.
    fn of_snapshot(
        objective: &Packaged,
        layout: &StateLayout,
        snapshot: &Snapshot,
    ) -> Option<PackageSamples> {
        let values = averages(layout, snapshot, objective.0.device);
        let graph = objective.0.sample.clone()?;
        let samples = PackageSamples::new(&objective.0.package.manifest, graph, values)?;
        Some(PackageSamples { steps: snapshot.step, ..samples })
    }

    /// Reads the bytes of a [`WEIGHTS_FILE`]. `file` names it in errors; `package` is the package that it
    /// belongs to, if that is not where it was.
    pub(crate) fn read(
        file: &str,
        bytes: &[u8],
        package: Option<&Path>,
    ) -> Result<PackageSamples, SampleError> {
        let input = |what: String| SampleError::Input(format!("{file}: {what}"));
        let wanted = format!("a package's weights; give a {WEIGHTS_FILE}");
        let about = metadata(bytes, &wanted).map_err(input)?;
        let text = |key: &str| about.get(key).ok_or_else(|| input(format!("it has no {key} in its header")));
        let path =
            package.map_or_else(|| text("package").map(PathBuf::from), |path| Ok(path.to_path_buf()))?;
        let wrong = |what: String| {
            input(format!(
                "it belongs to a package: {}: {what}{}",
                path.display(),
                if package.is_none() { "; if it has moved, give its place with --package FILE" } else { "" }
            ))
        };
        let package = Package::read(&path).map_err(|error| wrong(error.to_string()))?;
        if *text("package_hash")? != package.hash {
            return Err(wrong("is another package: it was changed since the run".to_string()));
        }
        if package.manifest.sample.is_none() {
            return Err(wrong(
                "draws no samples: give its objective a method sample(self, draw, n), export it again, and train that"
                    .to_string(),
            ));
        }
        let graphs = open(&package, Device::Cpu).map_err(wrong)?;
        let values = values(&package, bytes).map_err(input)?;
        let names = about.get(CLASS_NAMES).map_or("[]", String::as_str);
        let class_names = serde_json::from_str(names)
            .map_err(|error| input(format!("its {CLASS_NAMES} cannot be read: {error}")))?;
        let steps = text("step")?.parse().map_err(|_| input("its step is not a number".to_string()))?;
        let sample = package.manifest.sample.as_ref().expect("a package without one was refused");
        let graph = graphs.prepare(&package.manifest, &sample.graph, &sample.inputs, &sample.draws);
        let samples = PackageSamples::new(&package.manifest, Arc::new(graph), values);
        let samples = samples.expect("a package without a graph for samples was refused");
        Ok(PackageSamples { steps, class_names, ..samples })
    }

    /// Number of classes that samples are drawn of; 0 if they have none.
    pub(crate) fn classes(&self) -> u32 {
        self.classes
    }

    /// Names of the classes by their numbers; empty where they are numbers.
    pub(crate) fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// Shape of the samples.
    pub(crate) fn shape(&self) -> ImageShape {
        self.shape
    }

    /// Number of samples that are drawn at once.
    pub(crate) fn at_once(&self) -> u32 {
        self.at_once
    }

    /// Whether all random numbers are normal, so that there is a way from one sample to another.
    pub(crate) fn is_normal(&self) -> bool {
        let draws = self.graph.draws();
        !draws.is_empty() && draws.iter().all(|draw| matches!(draw, Draw::Normal { .. }))
    }

    /// Draws the random numbers of run `index` of the graph, for the seed and purpose of a key.
    pub(crate) fn draws(&self, key: Key, index: u32) -> Drawn {
        self.graph.draw(Key { step: u64::from(index), phase: 0, shard: 0, ..key })
    }

    /// Runs the graph: the first samples of a run, one for each class given, (n, c, h, w) in [-1, 1].
    pub(crate) fn images(&self, draws: &Drawn, classes: &[u32]) -> Tensor {
        let count = self.at_once as usize;
        // A full run, whatever is asked for: the graph's shapes are fixed.
        let of_all: Vec<i64> =
            (0..count).map(|index| classes.get(index).copied().unwrap_or_default().into()).collect();
        let wanted = Tensor::from_slice(&of_all).to_device(self.graph.device());
        let given = Given {
            values: views(&self.values),
            batch: None,
            wanted: Some(&wanted),
            steps: self.steps,
            part: "in drawing samples",
        };
        let images = no_grad(|| self.graph.run(&given, draws)).swap_remove(0);
        let most = i64::try_from(classes.len()).expect("a run draws few samples");
        images.narrow(0, 0, most).to_device(Device::Cpu)
    }

    /// Draws samples for the seed and purpose of a key, from number `from` on, one for each class given.
    pub(crate) fn draw(&self, key: Key, from: u32, classes: &[u32], progress: &Progress) -> Tensor {
        let (mut images, mut at) = (Vec::new(), from);
        let end = from + u32::try_from(classes.len()).expect("fewer than 2^32 samples");
        while at < end {
            let (run, skipped) = (at / self.at_once, at % self.at_once);
            let next = ((run + 1) * self.at_once).min(end);
            // The samples of the run before `at` were drawn earlier, or are not wanted.
            let mut own = vec![0; skipped as usize];
            own.extend(&classes[(at - from) as usize..(next - from) as usize]);
            let drawn = self.images(&self.draws(key, run), &own);
            images.push(drawn.narrow(0, skipped.into(), (next - at).into()));
            progress.add((next - at).into());
            at = next;
        }
        Tensor::cat(&images, 0)
    }
}

/// Parameters and buffers of each network, beside a state.
pub(super) type Held = Vec<[Vec<Tensor>; 2]>;

/// The averages of a state's networks, and the weights of networks without one, on a device.
pub(super) fn averages(layout: &StateLayout, snapshot: &Snapshot, device: Device) -> Held {
    let of = |sections: &Sections| {
        let range = sections.average_range().unwrap_or_else(|| sections.weight_range());
        let (parameters, buffers) = sections.views(&snapshot.floats(range).to_device(device));
        [parameters, buffers]
    };
    layout.networks().iter().map(of).collect()
}

/// The same tensors, as a graph takes them.
pub(super) fn views(held: &Held) -> Values<'_> {
    held.iter().map(|[parameters, buffers]| [&parameters[..], &buffers[..]]).collect()
}

/// A class for each of `count` samples, in turn.
pub(crate) fn in_turn(classes: u32, count: u32) -> Vec<u32> {
    // Without classes there is nothing to take in turn.
    (0..count).map(|index| index % classes.max(1)).collect()
}

/// Shape of the samples that a graph draws.
fn shape_of(sample: &SampleGraph) -> ImageShape {
    let size =
        |axis: usize| usize::try_from(sample.output[axis]).expect("sizes were checked with the manifest");
    ImageShape { channels: size(1), height: size(2), width: size(3) }
}

/// Values of a package's tensors in a [`WEIGHTS_FILE`].
fn values(package: &Package, bytes: &[u8]) -> Result<Held, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let read = |network: &package::Network, tensor: &package::TensorSpec| {
        let name = format!("{}.{}", network.name, tensor.name);
        let found = file.tensor(&name).map_err(|error| error.to_string())?;
        let shape: Vec<i64> = tensor.shape.iter().map(|size| signed(*size)).collect();
        if found.data().len() != 4 * usize::try_from(shape.iter().product::<i64>()).unwrap_or(usize::MAX) {
            return Err(format!("{name} does not have the package's shape"));
        }
        let value = from_bytes(found.data()).view(shape.as_slice());
        if is_finite(&value) { Ok(value) } else { Err(format!("{name} is {NOT_FINITE}; {EARLIER}")) }
    };
    let all = |network: &package::Network, tensors: &[package::TensorSpec]| -> Result<Vec<Tensor>, String> {
        tensors.iter().map(|tensor| read(network, tensor)).collect()
    };
    let networks = package.manifest.networks.iter();
    networks.map(|own| Ok([all(own, &own.parameters)?, all(own, &own.buffers)?])).collect()
}

impl Sampler for Packaged {
    fn draw(&self, layout: &StateLayout, snapshot: &Snapshot, key: Key, count: u32) -> Tensor {
        let samples = PackageSamples::of_snapshot(self, layout, snapshot);
        let samples = samples.expect("a package without a graph for samples has no sampler");
        let classes = in_turn(samples.classes, count);
        samples.draw(key, 0, &classes, &Progress::off())
    }

    fn classes(&self) -> u32 {
        self.0.package.manifest.sample.as_ref().map_or(0, |sample| sample.classes)
    }
}
