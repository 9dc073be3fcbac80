//! Files of a checkpoint: content, writing and reading.
//!
//! 1. Every file is a function of (job, state): its content does not depend on the writer or the number of
//!    workers, so a checkpoint of any cluster has the same bytes.
//! 2. A file appears whole or not at all. An existing file with the same content counts as written.
//! 3. A reader accepts no file whose hash is not the manifest's, and no state whose digest is not.

mod fingerprints;
pub mod init_weights;
mod records;
mod snapshot;
pub(crate) mod storage;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bytes::Bytes;
use ganglion_membership::{Checkpoint, Position, Share, StoredFile, WorkerId, WrittenPart};
use ganglion_proto::message::MetricsRow;
use ganglion_proto::{manifest, rows};
use ganglion_storage::{MANIFEST, PutPayload, Storage, in_folder};
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use tch::Tensor;

pub use self::fingerprints::Fingerprints;
use self::records::Records;
pub use self::snapshot::{Snapshot, joined, weights};
use crate::nn::tensor_bytes::{from_bytes, to_bytes};
use crate::nn::{Constant, TensorSpec};
use crate::state::{Counters, Layout, NamedTensor, StateLayout};

/// Approximate size of a state part, within the limits of [`part_count`].
const PART_BYTES: usize = 64 << 20;
/// Advice for a checkpoint whose numbers are not finite.
pub(crate) const EARLIER: &str = "training had failed before this checkpoint was saved: take an earlier one, or train anew with a smaller \
     optimizer.learning_rate";

/// A file of a checkpoint beside the state, with the weights that samples are drawn with.
#[derive(Clone, Debug)]
pub struct WeightsFile {
    /// Name of the file.
    pub name: String,
    /// Beginnings of tensors' names in the state, each with the one that takes its place in the file.
    pub sections: Vec<(String, String)>,
    /// Integer tensors of the file.
    pub constants: Vec<Constant>,
    /// Metadata beside the format and the step: enough to draw samples without the job.
    pub about: BTreeMap<String, String>,
}

impl WeightsFile {
    /// Name in the file of a tensor of the state, if it is in it.
    fn name_of(&self, tensor: &str) -> Option<String> {
        self.sections.iter().find_map(|(from, to)| Some(format!("{to}{}", tensor.strip_prefix(from)?)))
    }
}

/// Errors of a checkpoint's files.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The storage failed; the same operation may work later.
    #[error("{file}: {source}")]
    Storage {
        /// Path of the file.
        file: String,
        /// Error of the storage.
        source: ganglion_storage::Error,
    },
    /// A file, or the whole checkpoint, has unexpected content.
    #[error("{0}")]
    Corrupt(String),
}

/// A file of the checkpoint with its content.
struct Planned {
    name: String,
    content: Content,
}

enum Content {
    State { tensors: Vec<NamedTensor>, with_counters: bool },
    Weights(Vec<NamedTensor>),
    Index(BTreeMap<String, String>),
}

impl Content {
    /// Tensors of the state that it is made from.
    fn tensors(&self) -> &[NamedTensor] {
        match self {
            Content::State { tensors, .. } | Content::Weights(tensors) => tensors,
            Content::Index(_) => &[],
        }
    }
}

/// Tensors that hold the integer state, by name.
fn counter_tensors(counters: &Counters) -> [(&'static str, [u8; 8]); 3] {
    [
        ("counters.ledger", counters.ledger.to_le_bytes()),
        ("counters.position", counters.position.0.to_le_bytes()),
        ("counters.skipped", counters.skipped.to_le_bytes()),
    ]
}

/// Number of parts that hold the state: a function of the job, and not of the workers that write them.
fn part_count(layout: &StateLayout, data_shards: u32) -> usize {
    // At least four, so that several members share the work, but no more than shards, as a group is no
    // larger. More of a large state, so that each member copies and hashes about as much as the others.
    (4 * layout.len).div_ceil(PART_BYTES).max(data_shards.min(4) as usize).min(layout.tensors().len())
}

fn part_name(index: usize, parts: usize) -> String {
    format!("state-{:05}-of-{parts:05}.safetensors", index + 1)
}

fn plan(layout: &StateLayout, weights: Option<&WeightsFile>, data_shards: u32) -> Vec<Planned> {
    let parts = part_count(layout, data_shards);
    let mut dealt: Vec<(usize, Vec<NamedTensor>)> = vec![(0, Vec::new()); parts];
    let mut tensors = layout.tensors();
    // The largest first, each to the part with the least; a stable sort keeps this a function of the layout.
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.range.len()));
    for tensor in tensors {
        let least = dealt.iter_mut().min_by_key(|(floats, _)| *floats).expect("at least one part");
        least.0 += tensor.range.len();
        least.1.push(tensor);
    }
    let mut weight_map: BTreeMap<String, String> =
        // The counters are in the first part, whatever tensors it has.
        counter_tensors(&Counters::default()).map(|(name, _)| (name.to_string(), part_name(0, parts))).into();
    let mut files = Vec::new();
    for (index, (_, tensors)) in dealt.into_iter().enumerate() {
        let name = part_name(index, parts);
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        files.push(Planned { name, content: Content::State { tensors, with_counters: index == 0 } });
    }
    if let Some(file) = weights {
        let tensors = layout.tensors().into_iter().filter(|tensor| file.name_of(&tensor.name).is_some());
        let content = Content::Weights(tensors.collect());
        files.push(Planned { name: file.name.clone(), content });
    }
    let index = "state.safetensors.index.json".to_string();
    files.push(Planned { name: index, content: Content::Index(weight_map) });
    files
}

/// Number of files of a checkpoint.
pub fn file_count(layout: &StateLayout, weights: Option<&WeightsFile>, data_shards: u32) -> usize {
    part_count(layout, data_shards) + usize::from(weights.is_some()) + 1
}

/// Digest of the whole state, of which this is a snapshot: blake3 over the records of its tensors, in hex.
pub fn state_digest(layout: &StateLayout, snapshot: &Snapshot) -> String {
    Records::new(layout, &snapshot.counters).digest(snapshot)
}

fn bytes_of(tensor: &NamedTensor) -> Range<usize> {
    4 * tensor.range.start..4 * tensor.range.end
}

/// A tensor of a safetensors file.
struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<i64>,
    bytes: Bytes,
}

/// Writer and reader of a job's checkpoint files.
pub struct Files<'a> {
    /// Storage of the checkpoints.
    pub storage: &'a Storage,
    /// V: number of data shards of the job.
    pub data_shards: u32,
    /// Layout of the state.
    pub layout: &'a StateLayout,
    /// File of weights to draw samples with, for an objective that has one.
    pub weights: Option<&'a WeightsFile>,
}

impl Files<'_> {
    /// Renders the content of a planned file.
    fn render(&self, snapshot: &Snapshot, planned: &Planned) -> PutPayload {
        let text = |key: &str, value: String| (key.to_string(), value);
        match &planned.content {
            Content::State { tensors, with_counters } => {
                let counters = counter_tensors(&snapshot.counters);
                let counters = counters.into_iter().filter(|_| *with_counters).map(|(name, bytes)| {
                    let bytes = Bytes::copy_from_slice(&bytes);
                    Entry { name: name.to_string(), dtype: Dtype::I64, shape: vec![1], bytes }
                });
                let named = tensors.iter().map(|tensor| floats(snapshot, tensor, tensor.name.clone()));
                let about = [
                    // What PyTorch's readers of safetensors expect.
                    text("format", "pt".to_string()),
                    text("step", snapshot.step.to_string()),
                    text("phase", snapshot.phase.to_string()),
                ];
                serialize(counters.chain(named).collect(), &about.into())
            }
            Content::Weights(tensors) => {
                let file = self.weights.expect("a file is planned for an objective that has one");
                let named = tensors.iter().map(|tensor| {
                    let name = file.name_of(&tensor.name).expect("the file's tensors were chosen by it");
                    floats(snapshot, tensor, name)
                });
                let constants = file.constants.iter().map(|one| {
                    let bytes = little_endian(&one.values).into();
                    Entry { name: one.name.clone(), dtype: Dtype::I64, shape: one.shape.clone(), bytes }
                });
                let about = [text("format", "pt".to_string()), text("step", snapshot.step.to_string())];
                let about = file.about.clone().into_iter().chain(about).collect();
                serialize(named.chain(constants).collect(), &about)
            }
            Content::Index(weight_map) => {
                let named: usize = self.layout.tensors().iter().map(|tensor| 4 * tensor.range.len()).sum();
                let counters = counter_tensors(&snapshot.counters);
                let total_size = named + 8 * counters.len();
                let index = serde_json::json!({
                    "metadata": { "total_size": total_size },
                    "weight_map": weight_map,
                });
                PutPayload::from(format!("{index:#}\n"))
            }
        }
    }

    /// Ranges of the state's buffer that these files are written from, by their indices.
    pub fn ranges(&self, files: &[usize]) -> Vec<Range<usize>> {
        let planned = plan(self.layout, self.weights, self.data_shards);
        let tensors = files.iter().flat_map(|index| planned[*index].content.tensors());
        tensors.map(|tensor| tensor.range.clone()).collect()
    }

    /// Writes file `index` of a checkpoint and returns its report. The fingerprints are of the state that the
    /// snapshot was taken of.
    pub async fn write(
        &self,
        snapshot: &Snapshot,
        fingerprints: &Fingerprints,
        index: usize,
    ) -> Result<WrittenPart, CheckpointError> {
        let planned = plan(self.layout, self.weights, self.data_shards);
        let (count, planned) = (planned.len(), &planned[index]);
        let tensors = planned.content.tensors();
        let fingerprint = fingerprints.with_copies(snapshot, tensors);
        let fingerprint = fingerprint.map_err(|error| CheckpointError::Corrupt(error.to_string()))?;
        let file = self.store(snapshot, planned).await?;
        let small = |n: usize| u32::try_from(n).expect("a checkpoint has few files");
        Ok(WrittenPart {
            step: snapshot.step,
            phase: snapshot.phase,
            index: small(index),
            count: small(count),
            file,
            fingerprint,
            share: self.share(snapshot, &planned.content),
        })
    }

    /// Share of a file in the state digest.
    fn share(&self, snapshot: &Snapshot, content: &Content) -> Share {
        // The other files are derived from the state.
        let Content::State { tensors, with_counters } = content else { return Share::default() };
        let mut own: BTreeSet<&str> = tensors.iter().map(|tensor| &tensor.name[..]).collect();
        let counters = counter_tensors(&snapshot.counters);
        own.extend(counters.iter().filter(|_| *with_counters).map(|(name, _)| *name));
        Records::new(self.layout, &snapshot.counters).share(snapshot, |name| own.contains(name))
    }

    /// Writes a file.
    async fn store(&self, snapshot: &Snapshot, planned: &Planned) -> Result<StoredFile, CheckpointError> {
        // Rendered anew for each file: the content of all of them would be a second state in memory.
        let content = self.render(snapshot, planned);
        let (file, bytes) = (planned.name.clone(), content.content_length() as u64);
        let file = StoredFile { file, bytes, blake3: hash(&content) };
        let path = in_folder(&Checkpoint::folder_of(snapshot.step, snapshot.phase), &file.file);
        // An existing file is fine: another worker, or an earlier process of the run, wrote it, and the
        // same state gives the same bytes.
        // Waits for the storage: not bounded here, but each request is (`storage`), and the caller tries
        // again while training goes on.
        let written = self.storage.create(&path, &content, &file.blake3).await;
        written.map_err(|source| CheckpointError::Storage { file: path.to_string(), source })?;
        Ok(file)
    }

    /// Writes a whole checkpoint, its manifest last. Existing files stay, except damaged ones. Returns its
    /// folder.
    ///
    /// # Errors
    /// The storage's, or a whole checkpoint of another state exists: one of the two is wrong, and the
    /// existing one stays.
    pub async fn write_whole(&self, snapshot: &Snapshot) -> Result<String, CheckpointError> {
        let digest = state_digest(self.layout, snapshot);
        // Before anything is written: a whole checkpoint must not get files of another state.
        self.refuse_other(snapshot, &digest).await?;
        let mut files = Vec::new();
        for planned in plan(self.layout, self.weights, self.data_shards) {
            // One after the other, so that memory holds one file beside the state.
            files.push(self.store(snapshot, &planned).await?);
        }
        let position = snapshot.counters.position;
        let (step, phase) = (snapshot.step, snapshot.phase);
        let checkpoint = Checkpoint { position, step, phase, files, state_digest: digest };
        let path = in_folder(&checkpoint.folder(), MANIFEST);
        let content = PutPayload::from(manifest::render(&checkpoint));
        // Last (invariant 2): with it the folder counts as a checkpoint.
        match self.storage.create(&path, &content, &hash(&content)).await {
            Ok(()) => Ok(checkpoint.folder()),
            Err(source) => Err(CheckpointError::Storage { file: path.to_string(), source }),
        }
    }

    /// Fails if a whole checkpoint of another state exists in the same folder.
    async fn refuse_other(&self, snapshot: &Snapshot, digest: &str) -> Result<(), CheckpointError> {
        let folder = Checkpoint::folder_of(snapshot.step, snapshot.phase);
        let failed = |source| CheckpointError::Storage { file: folder.clone(), source };
        let text = self.storage.text(&in_folder(&folder, MANIFEST)).await.map_err(failed)?;
        let there = text.and_then(|text| manifest::parse(&text).ok());
        let Some(there) = there.filter(|there| there.state_digest != digest) else { return Ok(()) };
        for file in &there.files {
            match self.storage.hash(&in_folder(&folder, &file.file)).await {
                // By content: only a checkpoint that is whole can contradict this one.
                Ok(found) if found == file.blake3 => {}
                Err(source) if self.storage.is_away(&source) => return Err(failed(source)),
                // A damaged file is written again.
                Ok(_) | Err(_) => return Ok(()),
            }
        }
        Err(CheckpointError::Corrupt(format!(
            "{folder} is there and whole, and holds another state: {}, where this worker holds {digest}; it is left as it is",
            there.state_digest
        )))
    }

    /// Writes the unrecorded rows into the folder of a checkpoint that a worker writes alone.
    pub async fn write_rows(
        &self,
        snapshot: &Snapshot,
        worker: WorkerId,
        rows: &[MetricsRow],
    ) -> Result<(), CheckpointError> {
        let folder = Checkpoint::folder_of(snapshot.step, snapshot.phase);
        let path = in_folder(&folder, &rows::file_of(worker.0));
        // The file is this worker's own: nobody else writes it.
        let written = self.storage.replace(&path, &PutPayload::from(rows::encode(rows))).await;
        written.map_err(|source| CheckpointError::Storage { file: path.to_string(), source })
    }

    /// Reads and verifies the state of a checkpoint.
    pub async fn read(&self, checkpoint: &Checkpoint) -> Result<Snapshot, CheckpointError> {
        let (mut flat, mut counters) = (vec![0; 4 * self.layout.len], Counters::default());
        let mut missing: BTreeMap<String, NamedTensor> =
            self.layout.tensors().into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        // One after the other, so that memory holds the state and one file.
        for file in checkpoint.state_files() {
            let path = in_folder(&checkpoint.folder(), &file.file);
            let failed = |source| CheckpointError::Storage { file: path.to_string(), source };
            let bytes = self.storage.read(&path).await.map_err(failed)?;
            // Before the file is parsed: what is damaged may not even be safetensors.
            if blake3::hash(&bytes).to_hex().to_string() != file.blake3 {
                return Err(CheckpointError::Corrupt(format!("{path} does not have the manifest's hash")));
            }
            let corrupt = |error| CheckpointError::Corrupt(format!("{path}: {error}"));
            let tensors = SafeTensors::deserialize(&bytes).map_err(|error| corrupt(error.to_string()))?;
            for (name, tensor) in tensors.iter() {
                take_tensor((&mut flat, &mut counters), &mut missing, name, tensor.data())
                    .map_err(corrupt)?;
            }
        }
        // A tensor that no file has would stay zero.
        if let Some(name) = missing.keys().next() {
            return Err(CheckpointError::Corrupt(format!("{} lacks {name}", checkpoint.folder())));
        }
        let Checkpoint { step, phase, .. } = *checkpoint;
        let snapshot = Snapshot::whole((step, phase), flat.into(), counters);
        // The files are each whole, and may still be of different states (invariant 3).
        if state_digest(self.layout, &snapshot) != checkpoint.state_digest {
            let what = format!("{} does not have the manifest's state digest", checkpoint.folder());
            return Err(CheckpointError::Corrupt(what));
        }
        Ok(snapshot)
    }
}

fn take_tensor(
    (flat, counters): (&mut [u8], &mut Counters),
    missing: &mut BTreeMap<String, NamedTensor>,
    name: &str,
    data: &[u8],
) -> Result<(), String> {
    let number = || data.try_into().map(u64::from_le_bytes).map_err(|_| format!("{name} is not one number"));
    match name {
        // By name, in whichever file they are.
        "counters.position" => counters.position = Position(number()?),
        "counters.ledger" => counters.ledger = number()?,
        "counters.skipped" => counters.skipped = number()?,
        _ => {
            let tensor = missing.remove(name).ok_or_else(|| format!("{name} is not in this job's model"))?;
            let place = &mut flat[bytes_of(&tensor)];
            if place.len() != data.len() {
                return Err(format!("{name} does not have this job's shape"));
            }
            place.copy_from_slice(data);
        }
    }
    Ok(())
}

/// Hash of a file, as in manifests.
fn hash(payload: &PutPayload) -> String {
    let mut hasher = blake3::Hasher::new();
    for chunk in payload {
        hasher.update(chunk);
    }
    hasher.finalize().to_hex().to_string()
}

fn little_endian(numbers: &[i64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A tensor of a state under a name. It shares the snapshot's memory.
fn floats(snapshot: &Snapshot, tensor: &NamedTensor, name: String) -> Entry {
    let bytes = snapshot.bytes(tensor.range.clone());
    Entry { name, dtype: Dtype::F32, shape: tensor.shape.clone(), bytes }
}

/// Lays a safetensors file out as that library does, without a copy of its tensors. The metadata is in order,
/// so that the same tensors give the same bytes: the library keeps it in a hash map, whose order changes from
/// run to run.
fn serialize(mut tensors: Vec<Entry>, about: &BTreeMap<String, String>) -> PutPayload {
    // The library's order: the largest alignment first, then by name.
    tensors.sort_by(|left, right| right.dtype.cmp(&left.dtype).then_with(|| left.name.cmp(&right.name)));
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.bytes.len();
        let shape = tensor.shape.iter().map(|size| usize::try_from(*size).expect("sizes are positive"));
        let (dtype, shape) = (tensor.dtype, shape.collect());
        (tensor.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let infos = Metadata::new(None, infos.collect()).expect("names are unique and sizes fit");
    let infos = serde_json::to_string(&infos).expect("texts and numbers can be written");
    let about = serde_json::to_string(about).expect("texts can be written");
    // The brace of the tensors' table is replaced by the one with the metadata in it.
    let mut header = format!("{{\"__metadata__\":{about},{}", &infos[1..]);
    // Padded with spaces, as the format has it, so that the tensors are aligned.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    // The form of safetensors: 8 bytes with the length of the header, the header, the tensors.
    let mut front = (header.len() as u64).to_le_bytes().to_vec();
    front.extend(header.as_bytes());
    PutPayload::from_iter(std::iter::once(front.into()).chain(tensors.into_iter().map(|tensor| tensor.bytes)))
}

/// Returns the bytes of a safetensors file with the tensors of a flat buffer.
pub fn serialize_floats(layout: &Layout, flat: &Tensor, about: &BTreeMap<String, String>) -> Vec<u8> {
    let bytes = Bytes::from(to_bytes(flat));
    let entries = layout.entries().map(|(spec, offset)| {
        let bytes = bytes.slice(4 * offset..4 * (offset + spec.numel()));
        Entry { name: spec.name.clone(), dtype: Dtype::F32, shape: spec.shape.clone(), bytes }
    });
    serialize(entries.collect(), about).iter().flatten().copied().collect()
}

/// Returns a network's tensor by its name, from a file that holds it.
pub fn named_tensor(file: &SafeTensors<'_>, spec: &TensorSpec, kind: &str) -> Result<Tensor, String> {
    let tensor = file.tensor(&spec.name).map_err(|error| error.to_string())?;
    if tensor.data().len() != 4 * spec.numel() {
        return Err(format!("{} does not have {kind} shape", spec.name));
    }
    Ok(from_bytes(tensor.data()).view(spec.shape.as_slice()))
}
