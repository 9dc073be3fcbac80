//! What is trained here: a job whose state after any number of commits is a pure function, and its files.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use ganglion_membership::{Checkpoint, Position, Share, StoredFile, Stretch, WorkerId, WrittenPart};
use ganglion_proto::job::Job;
use ganglion_proto::message::MetricsRow;
use ganglion_proto::stream::{SampleStream, StreamShape, ledger_term};
use ganglion_proto::{manifest, rows};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::mix::mix;

/// Samples in the data set.
pub(crate) const SAMPLES: u64 = 50;
/// Files of a checkpoint.
const FILES: u32 = 2;

/// What a worker holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub position: Position,
    pub ledger: u64,
    pub value: u64,
}

impl State {
    /// The state that the seed gives.
    pub(crate) fn fresh(seed: u64) -> State {
        State { position: Position(0), ledger: 0, value: mix(seed, 1) }
    }

    /// What members compare.
    pub(crate) fn fingerprint(&self) -> u64 {
        mix(mix(self.value, self.ledger), self.position.0)
    }

    /// What one data shard gives to the phase after this state. It depends on the state, as a gradient does.
    pub(crate) fn leaf(&self, shard: u32) -> u64 {
        mix(self.fingerprint(), u64::from(shard))
    }

    /// Applies a reduced phase.
    pub(crate) fn commit(&mut self, sum: u64, ledger: u64) {
        self.value = mix(self.value, sum);
        self.ledger = self.ledger.wrapping_add(ledger);
        self.position.0 += 1;
    }

    /// The step and phase after this state.
    pub(crate) fn place(&self, job: &Job) -> (u64, u32) {
        let per_step = job.phases_per_step();
        (self.position.0 / per_step, u32::try_from(self.position.0 % per_step).expect("few phases"))
    }
}

/// The ledger's share of some data shards in the phase at a position.
pub(crate) fn ledger(
    job: &Job,
    stream: &mut SampleStream,
    position: Position,
    shards: std::ops::Range<u32>,
) -> u64 {
    let per_step = job.phases_per_step();
    let phase = u32::try_from(position.0 % per_step).expect("few phases");
    let phases = job.loss.discriminator_steps;
    if phase >= phases {
        return 0;
    }
    let (shard_batch, data_shards) = (job.job.shard_batch, job.job.data_shards);
    let shape = StreamShape { phases, data_shards, shard_batch };
    let first = |shard| shape.first(position.0 / per_step, phase, shard);
    let numbers = shards.flat_map(|shard| first(shard)..first(shard) + u64::from(shard_batch));
    numbers.fold(0, |sum: u64, number| sum.wrapping_add(ledger_term(number, stream.sample(number))))
}

/// The states of an undisturbed run, by position.
pub(crate) fn lineage(job: &Job) -> Vec<State> {
    let mut stream = SampleStream::new(job.job.seed, SAMPLES);
    let mut state = State::fresh(job.job.seed);
    let mut states = vec![state];
    let shards = 0..job.job.data_shards;
    for _ in 0..job.last_step(SAMPLES) * job.phases_per_step() {
        let sum = shards.clone().fold(0, |sum: u64, shard| sum.wrapping_add(state.leaf(shard)));
        let ledger = ledger(job, &mut stream, state.position, shards.clone());
        state.commit(sum, ledger);
        states.push(state);
    }
    states
}

fn tensors(state: &State) -> BTreeMap<&'static str, [u8; 8]> {
    [
        ("counters.ledger", state.ledger.to_le_bytes()),
        ("counters.position", state.position.0.to_le_bytes()),
        ("model.value", state.value.to_le_bytes()),
    ]
    .into()
}

/// Records of the tensors of each file, one after the other: all of them together give the digest.
fn records(state: &State) -> [Vec<u8>; FILES as usize] {
    let mut records = [const { Vec::new() }; FILES as usize];
    for (name, bytes) in tensors(state) {
        let one = 1_u64.to_le_bytes();
        let record = [name.as_bytes(), b"\0I64\0", &one, &one, &bytes].concat();
        records[file_of(name) as usize].extend(record);
    }
    records
}

/// The digest of a state, as checkpoints have it.
pub(crate) fn digest(state: &State) -> String {
    blake3::hash(&records(state).concat()).to_hex().to_string()
}

/// The share of a file in the digest.
fn share(state: &State, index: u32) -> Share {
    let (records, index) = (records(state), index as usize);
    let [start, total] = [&records[..index], &records].map(|records| records.concat().len() as u64);
    Share { total, stretches: vec![Stretch::of(total, start, &[&records[index]])] }
}

/// The file that a tensor is in.
fn file_of(name: &str) -> u32 {
    u32::from(!name.starts_with("counters"))
}

/// Which files a member of a group writes, by the indices of its place among the writers.
pub(crate) fn files_of(place: usize, writers: usize) -> Vec<u32> {
    (u32::try_from(place).expect("few members")..FILES).step_by(writers).collect()
}

fn content(state: &State, index: u32) -> (String, Vec<u8>) {
    let name = format!("state-{:05}-of-{FILES:05}.safetensors", index + 1);
    let tensors = tensors(state);
    let mine = tensors.iter().filter(|(name, _)| file_of(name) == index);
    let views = mine.map(|(name, bytes)| {
        (*name, TensorView::new(Dtype::I64, vec![1], bytes.as_slice()).expect("it is one number"))
    });
    (name, safetensors::serialize(views, None).expect("numbers can be written"))
}

/// Writes a file of a checkpoint, if it is not there.
pub(crate) fn write_part(storage: &Path, job: &Job, state: &State, index: u32) -> io::Result<WrittenPart> {
    let (step, phase) = state.place(job);
    let (file, bytes) = content(state, index);
    let folder = storage.join(Checkpoint::folder_of(step, phase));
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(&file), &bytes)?;
    let blake3 = blake3::hash(&bytes).to_hex().to_string();
    let file = StoredFile { file, bytes: bytes.len() as u64, blake3 };
    let (fingerprint, share) = (state.fingerprint(), share(state, index));
    Ok(WrittenPart { step, phase, index, count: FILES, file, fingerprint, share })
}

/// Leaves rows for the next coordinator.
pub(crate) fn write_rows(
    storage: &Path,
    job: &Job,
    state: &State,
    worker: WorkerId,
    rows: &[MetricsRow],
) -> io::Result<()> {
    let (step, phase) = state.place(job);
    let folder = storage.join(Checkpoint::folder_of(step, phase));
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(rows::file_of(worker.0)), rows::encode(rows))
}

/// Writes a whole checkpoint, if there is none of that position.
pub(crate) fn write_whole(storage: &Path, job: &Job, state: &State) -> io::Result<()> {
    let parts: Vec<WrittenPart> =
        (0..FILES).map(|index| write_part(storage, job, state, index)).collect::<Result<_, _>>()?;
    let checkpoint = Checkpoint {
        position: state.position,
        step: parts[0].step,
        phase: parts[0].phase,
        files: parts.iter().map(|part| part.file.clone()).collect(),
        state_digest: digest(state),
    };
    let file = storage.join(checkpoint.folder()).join("manifest.json");
    if !file.exists() {
        fs::write(file, manifest::render(&checkpoint))?;
    }
    Ok(())
}

/// Reads a checkpoint.
pub(crate) fn read(storage: &Path, checkpoint: &Checkpoint) -> io::Result<State> {
    let mut values = BTreeMap::new();
    for file in checkpoint.state_files() {
        let bytes = fs::read(storage.join(checkpoint.folder()).join(&file.file))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(io::Error::other)?;
        for (name, tensor) in tensors.tensors() {
            let bytes = tensor.data().try_into().map_err(io::Error::other)?;
            values.insert(name, u64::from_le_bytes(bytes));
        }
    }
    let value = |name: &str| values.get(name).copied().ok_or_else(|| io::Error::other(name.to_string()));
    Ok(State {
        position: Position(value("counters.position")?),
        ledger: value("counters.ledger")?,
        value: value("model.value")?,
    })
}
