//! Packages: training steps written in PyTorch, compiled ahead of time into one archive (`.pt2`).
//!
//! Beside the compiled graphs the archive has a manifest, which says what each graph reads, draws and
//! returns, and the first weights. Both programs read the manifest; only the worker loads the graphs.
//!
//! 1. A [`Manifest`] that [`Package::read`] returns is whole and consistent: what it names is there, once.
//! 2. No compiled code is loaded before [`Manifest::check_machine`] has passed: code for another machine
//!    ends the process.

mod check;
mod data;
mod machine;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zip::ZipArchive;

pub use self::data::{DataSpec, ImageSpec, SampleSpec, TokenSpec};
pub use self::machine::{Accelerator, Machine, features};
use crate::archive::{PACKAGE, PACKAGE_MANIFEST as MANIFEST, check_claims, is_member, kind_of};
use crate::job::OptimizerKind;

/// Path of the first weights in a package, below the archive's top folder.
pub const WEIGHTS: &str = "ganglion/weights.safetensors";
/// Folder of the compiled graphs in a package, below the archive's top folder; each has a folder of its own.
const GRAPHS: &str = "data/aotinductor/";
/// Number of the manifest's format that this build reads.
pub const FORMAT: u32 = 1;
/// Largest manifest, in bytes.
const MANIFEST_LIMIT: u64 = 64 << 20;

/// Reason why a file is not a package that this build can train; the text says how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PackageError(pub String);

/// Contents of a package.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Number of the format.
    pub format: u32,
    /// Version of PyTorch that compiled the graphs.
    pub torch: String,
    /// Device that the graphs run on.
    pub device: Device,
    /// Compute capability of the GPU, such as `9.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability: Option<String>,
    /// Version of CUDA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda: Option<String>,
    /// Processor that the graphs were compiled for.
    pub cpu: Cpu,
    /// Samples of one data shard: shapes are fixed when a graph is captured.
    pub shard_batch: u32,
    /// Data that the graphs read.
    pub data: DataSpec,
    /// Networks, in the order of the state's sections.
    pub networks: Vec<Network>,
    /// Further names of tied tensors in Python, each with the first; of no meaning here.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub aliases: BTreeMap<String, String>,
    /// Updates, in the order of a step.
    pub phases: Vec<Phase>,
    /// Graph that draws samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<SampleGraph>,
    /// Graph that evaluates held-out samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluate: Option<EvaluationGraph>,
}

/// Kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The processor.
    Cpu,
    /// A GPU of NVIDIA's.
    Cuda,
}

/// Processor that code was compiled for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Architecture, such as `x86_64`.
    pub arch: String,
    /// Features that the code may use, by their names in `/proc/cpuinfo`.
    pub features: Vec<String>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Name in messages and files.
    pub name: String,
    /// Tensors that some phase trains.
    pub parameters: Vec<TensorSpec>,
    /// All else that the graphs read: buffers, and parameters of frozen networks.
    pub buffers: Vec<TensorSpec>,
    /// Moving average of both, for a network that has one.
    #[serde(default)]
    pub average: Option<Average>,
}

/// A tensor of a network, f32 in the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// Name within the network.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// Whether a weight decay shrinks it; by default if it has two dimensions or more. Exports mark embeddings
    /// and normalisations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decays: Option<bool>,
}

/// A moving average.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Average {
    /// Name in files.
    pub name: String,
    /// Samples after which half of an old value is left.
    pub half_life_samples: f64,
}

/// An update of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// Name of the phase.
    pub name: String,
    /// Name of its graph.
    pub graph: String,
    /// Networks whose parameters it updates.
    pub updates: Vec<String>,
    /// Cadence: it runs in the steps s, counted from 0, with s % every = 0.
    #[serde(default = "one")]
    pub every: u64,
    /// Samples that it reads.
    pub batch: Batch,
    /// Default settings of its optimizer.
    pub optimizer: Optimizer,
    /// Tensors that the graph takes, in order.
    pub inputs: Vec<Input>,
    /// Random draws among them, from one generator, in order.
    #[serde(default)]
    pub draws: Vec<Draw>,
    /// Tensors that the graph returns, in order.
    pub outputs: Vec<Output>,
    /// Scalar that is the phase's loss.
    pub loss: String,
}

fn one() -> u64 {
    1
}

/// Samples that a phase reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Batch {
    /// The next samples of the stream.
    Next,
    /// The newest samples that a phase of the step has read.
    Same,
    /// No samples.
    None,
}

/// Settings of an optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// Update rule.
    pub kind: OptimizerKind,
    /// Step size.
    pub learning_rate: f64,
    /// Decay rate of the first moment; of no meaning for `sgd`, as the two after it.
    #[serde(default)]
    pub beta1: f64,
    /// Decay rate of the second moment.
    #[serde(default)]
    pub beta2: f64,
    /// Term added to the root of the second moment.
    #[serde(default)]
    pub epsilon: f64,
    /// Decay of weights, for `adamw` and `sgd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Share of the momentum that stays in an update, for `sgd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Whether an update looks ahead along the momentum, for `sgd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,
    /// Largest norm of the gradient.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
}

/// An input of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// A parameter, by its name in the state.
    Parameter(String),
    /// A buffer, by its name in the state.
    Buffer(String),
    /// Samples of the data.
    Batch(BatchPart),
    /// Number of a draw.
    Draw(usize),
    /// Number of steps done before, f32 without dimensions. Always true.
    Step(bool),
    /// Classes of the samples to draw, int64 (count). Always true.
    Classes(bool),
}

/// A part of the samples of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BatchPart {
    /// f32 (b, c, h, w), in [-1, 1].
    Images,
    /// int64 (b).
    Classes,
    /// int64 (b, context + 1).
    Tokens,
    /// Array of a name, (b, shape...) of its kind.
    Array(String),
}

/// A tensor of random numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
#[allow(missing_docs)] // the fields say it by their names
pub enum Draw {
    /// f32, N(0, 1).
    Normal { shape: Vec<u64> },
    /// f32, from `low` up to and without `high`.
    Uniform { low: f32, high: f32, shape: Vec<u64> },
    /// int64, from `low` to `high` - 1.
    Integers { low: i64, high: i64, shape: Vec<u64> },
    /// f32, 1 with probability `p` and else 0.
    Bernoulli { p: f64, shape: Vec<u64> },
}

impl Draw {
    /// Dimensions of the tensor.
    pub fn shape(&self) -> &[u64] {
        match self {
            Draw::Normal { shape }
            | Draw::Uniform { shape, .. }
            | Draw::Integers { shape, .. }
            | Draw::Bernoulli { shape, .. } => shape,
        }
    }
}

/// An output of a phase's graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// Gradient of the summed loss, of a parameter by its name in the state.
    Gradient(String),
    /// Change of a buffer by its name in the state.
    Buffer(String),
    /// A scalar, summed over the samples.
    Scalar(String),
}

/// Graph that draws samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleGraph {
    /// Name of the graph.
    pub graph: String,
    /// Number of samples that one run draws.
    pub count: u32,
    /// Number of classes that samples are drawn of; 0 if it takes none.
    #[serde(default)]
    pub classes: u32,
    /// Tensors that the graph takes, in order. Parameters are those of the average, where there is one.
    pub inputs: Vec<Input>,
    /// Random draws among them.
    #[serde(default)]
    pub draws: Vec<Draw>,
    /// Dimensions of the samples, f32 (count, c, h, w), in [-1, 1]: those of the data, where these are
    /// images.
    pub output: Vec<u64>,
}

/// Graph that evaluates held-out samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationGraph {
    /// Name of the graph.
    pub graph: String,
    /// Tensors that the graph takes, in order. Parameters are those of the average, where there is one.
    pub inputs: Vec<Input>,
    /// Random draws among them.
    #[serde(default)]
    pub draws: Vec<Draw>,
    /// Scalars, each summed over a batch of held-out samples.
    pub outputs: Vec<Output>,
}

/// A package on the disk.
#[derive(Clone, Debug)]
pub struct Package {
    /// Contents.
    pub manifest: Manifest,
    /// blake3 of the whole file, in hex.
    pub hash: String,
    path: PathBuf,
}

impl Package {
    /// Reads and checks a package, but for the content of its weights and graphs.
    ///
    /// # Errors
    /// The file cannot be read, is no package, or one that contradicts itself.
    pub fn read(path: &Path) -> Result<Package, PackageError> {
        match kind_of(BufReader::new(open(path)?)) {
            Some(PACKAGE) => {}
            found => {
                let found = found.unwrap_or("a file of an unknown kind");
                return Err(PackageError(format!(
                    "is {found}, not {PACKAGE}; write one with ganglion.export(...)"
                )));
            }
        }
        check_claims(BufReader::new(open(path)?)).map_err(again)?;
        let manifest = Manifest::parse(&member(path, MANIFEST, MANIFEST_LIMIT)?)?;
        let package = Package { manifest, hash: hash(path)?, path: path.to_owned() };
        package.check_members()?;
        Ok(package)
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the first weights: a safetensors file.
    ///
    /// # Errors
    /// The member is damaged, or the file was changed.
    pub fn weights(&self) -> Result<Vec<u8>, PackageError> {
        member(&self.path, WEIGHTS, u64::MAX)
    }

    /// Writes the files of a graph into a folder; returns the path of its library.
    ///
    /// # Errors
    /// The folder cannot be written to; or the package is damaged, with [`io::ErrorKind::InvalidData`].
    pub fn unpack(&self, graph: &str, folder: &Path) -> io::Result<PathBuf> {
        let invalid = |error: zip::result::ZipError| io::Error::new(io::ErrorKind::InvalidData, error);
        let mut archive = ZipArchive::new(BufReader::new(File::open(&self.path)?)).map_err(invalid)?;
        let mut library = None;
        for index in 0..archive.len() {
            let mut member = archive.by_index(index).map_err(invalid)?;
            // Its sources lie beside it, and are of no use here.
            let file = file_of(member.name(), graph).filter(|file| !file.ends_with(".cpp"));
            let Some(file) = file.map(str::to_owned) else { continue };
            let to = folder.join(&file);
            io::copy(&mut member, &mut File::create_new(&to)?)?;
            if is_library(&file) {
                library = Some(to);
            }
        }
        library.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it lacks the graph's library"))
    }

    /// Checks that the weights and the graphs of the manifest are there.
    fn check_members(&self) -> Result<(), PackageError> {
        let archive = ZipArchive::new(BufReader::new(open(&self.path)?));
        let archive = archive.map_err(|error| again(format!("is damaged: {error}")))?;
        if !archive.file_names().any(|name| is_member(name, WEIGHTS)) {
            return Err(again(format!("lacks {WEIGHTS}")));
        }
        for graph in self.manifest.graphs() {
            let files = archive.file_names().filter_map(|name| file_of(name, graph));
            match files.filter(|file| is_library(file)).count() {
                1 => {}
                0 => return Err(again(format!("lacks the compiled graph \"{graph}\""))),
                count => return Err(again(format!("has {count} libraries of the graph \"{graph}\""))),
            }
        }
        Ok(())
    }
}

/// Error that another export mends.
fn again(what: impl std::fmt::Display) -> PackageError {
    PackageError(format!("{what}; write it again with ganglion.export(...)"))
}

fn open(path: &Path) -> Result<File, PackageError> {
    let unreadable = |error: io::Error| PackageError(format!("cannot be read: {error}"));
    // A device has no end, and opening a pipe waits for its writer.
    let about = std::fs::metadata(path).map_err(unreadable)?;
    if !about.is_file() {
        let what = if about.is_dir() { "is a folder" } else { "is no file" };
        return Err(PackageError(format!("{what}, expected the .pt2 file that ganglion.export(...) wrote")));
    }
    File::open(path).map_err(unreadable)
}

fn hash(path: &Path) -> Result<String, PackageError> {
    let mut hasher = blake3::Hasher::new();
    let read = hasher.update_reader(open(path)?);
    read.map_err(|error| PackageError(format!("cannot be read: {error}")))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Bytes of a member of a package, of at most `limit`.
fn member(package: &Path, path: &str, limit: u64) -> Result<Vec<u8>, PackageError> {
    let damaged = |error: &dyn std::fmt::Display| again(format!("its {path} is damaged: {error}"));
    let mut archive = ZipArchive::new(BufReader::new(open(package)?)).map_err(|error| damaged(&error))?;
    let name = archive.file_names().find(|name| is_member(name, path)).map(str::to_owned);
    let name = name.ok_or_else(|| again(format!("lacks {path}")))?;
    let member = archive.by_name(&name).map_err(|error| damaged(&error))?;
    let length = member.size();
    if length > limit {
        return Err(damaged(&format!("it has {length} bytes, and at most {limit} are read")));
    }
    let mut bytes = Vec::new();
    // One byte more than is claimed shows a member that holds more.
    member.take(length + 1).read_to_end(&mut bytes).map_err(|error| damaged(&error))?;
    if bytes.len() as u64 != length {
        return Err(damaged(&format!("it claims {length} bytes, and has {}", bytes.len())));
    }
    Ok(bytes)
}

/// Name of a graph's file by that of its member, for a member of that graph.
fn file_of<'a>(member: &'a str, graph: &str) -> Option<&'a str> {
    let (top, below) = member.split_once(GRAPHS)?;
    let file = below.strip_prefix(graph)?.strip_prefix('/')?;
    // A name alone, so that nothing is written outside of the folder.
    let is_file = !file.is_empty() && !file.contains(['/', '\\', '\0']) && file != "." && file != "..";
    (is_file && (top.is_empty() || top.ends_with('/'))).then_some(file)
}

fn is_library(file: &str) -> bool {
    file.ends_with(".so")
}

impl Manifest {
    /// Parses and checks the text of a manifest.
    ///
    /// # Errors
    /// The text is no manifest of this format, or contradicts itself.
    pub fn parse(text: &[u8]) -> Result<Manifest, PackageError> {
        #[derive(Deserialize)]
        struct Numbered {
            format: u32,
        }
        let wrong = |error: serde_json::Error| {
            PackageError(format!(
                "its manifest cannot be read: {error}; write it again with the ganglion.export(...) of this version"
            ))
        };
        // First the number alone: another format has other keys.
        let Numbered { format } = serde_json::from_slice(text).map_err(wrong)?;
        if format != FORMAT {
            return Err(PackageError(format!(
                "its manifest has the format {format}, and this build reads {FORMAT}; write it again with the \
                 ganglion.export(...) of this version, or use the version of Ganglion that wrote it"
            )));
        }
        let manifest: Manifest = serde_json::from_slice(text).map_err(wrong)?;
        check::check(&manifest).map_err(|what| {
            PackageError(format!(
                "its manifest contradicts itself: {what}; write it again with ganglion.export(...)"
            ))
        })?;
        Ok(manifest)
    }

    /// Names of all graphs.
    pub fn graphs(&self) -> impl Iterator<Item = &str> {
        let phases = self.phases.iter().map(|phase| phase.graph.as_str());
        let sample = self.sample.iter().map(|sample| sample.graph.as_str());
        phases.chain(sample).chain(self.evaluate.iter().map(|evaluate| evaluate.graph.as_str()))
    }
}

impl Network {
    /// Names in the state and dimensions of all tensors: parameters, then buffers.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &[u64])> {
        let all = self.parameters.iter().chain(&self.buffers);
        all.map(|tensor| (format!("{}.{}", self.name, tensor.name), tensor.shape.as_slice()))
    }
}
