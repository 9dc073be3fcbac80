//! Numeric fingerprint of the environment (`passport`): everything that this worker's bits depend on, with
//! hashes that prove it.

use ganglion_membership::{self as membership, Passport};
use ganglion_proto::job::Job;
use tch::{Device, Kind, Tensor, no_grad};

use crate::data::DataSet;
use crate::engine::commit::commit;
use crate::nn::Models;
use crate::nn::tensor_bytes::to_bytes;
use crate::objective::gan::{Gan, Input, grad_layout, phases};
use crate::objective::{ShardAt, ShardBatch, ShardGrad};
use crate::random::{Key, Purpose};
use crate::state::{Module, State, StateLayout};

/// Version of this program's arithmetic: two builds with the same number compute the same bits, and may
/// train together.
///
/// Raise it with every change that moves a bit of any job. `make golden` fails where bits differ from those
/// of the commit before and this number does not. It is no hash of the sources, so that a run can go on with
/// a newer build that computes the same. Builds before there was this number have the first.
pub const NUMERICS: u32 = 1;

/// Computes the fingerprint of the environment: the number of the build's arithmetic, the kind of machine,
/// and hashes of this job's arithmetic on it.
pub fn take(
    job: &Job,
    models: &Models,
    layout: &StateLayout,
    data: &DataSet,
    device: Device,
) -> Result<Passport, c10d::Error> {
    let (forward_backward, commits) = probe(job, models, layout, device)?;
    let exclusions = job.data.exclusions_hash().map(|hash| ("exclusions".to_string(), hash));
    let items = [
        ("c_library", c10d::aten::c_library_version()?),
        ("cpu_capability", c10d::aten::cpu_capability()?),
        ("data", hex(&data.fingerprint())),
        ("data_names", data.names()),
        ("device", if device.is_cuda() { "cuda" } else { "cpu" }.to_string()),
        ("hash_commit", commits),
        ("hash_forward_backward", forward_backward),
        ("libtorch", c10d::aten::libtorch_version()?),
        (membership::NUMERICS, NUMERICS.to_string()),
        ("threads", job.job.threads.to_string()),
    ];
    let items = items.into_iter().map(|(item, value)| (item.to_string(), value));
    Ok(Passport(items.chain(exclusions).collect()))
}

/// Maximum batch size of a probe: enough for kernels that take several samples at a time, and little work.
const SAMPLES: u32 = 8;

/// Runs each kind of phase once from the initial state, on substitutes for a few images, and hashes the
/// gradients and the state after the commits.
fn probe(
    job: &Job,
    models: &Models,
    layout: &StateLayout,
    device: Device,
) -> Result<(String, String), c10d::Error> {
    let mut job = job.clone();
    job.job.shard_batch = job.job.shard_batch.min(SAMPLES);
    let job = &job;
    let mut state = State::initial(layout.clone(), job.job.seed, device);
    let labels: Vec<u32> = (0..models.classes).collect();
    let leaves = Gan { job, models, labels: &labels, device };
    let mut leaf_hash = blake3::Hasher::new();
    for phase in phases(job) {
        let first_of_its_kind = phase.index == 0 || phase.module == Module::Generator;
        if !first_of_its_kind {
            continue;
        }
        let leaf_layout = grad_layout(models, layout, phase.module);
        let mut leaf = ShardGrad::new(&leaf_layout, leaf_layout.len(), device);
        let real = stand_ins(job, models, device);
        let spot = ShardAt { phase, step: 0, shard: 0 };
        let drawn = leaves.draw(spot, &state, Some(&real));
        let input = match phase.module {
            Module::Discriminator => Input::Samples(&real, None, &drawn),
            Module::Generator => Input::Fake(drawn, Some(&real)),
        };
        leaves.compute(spot, &state, input, &mut leaf)?;
        // D outputs are diagnostic only: a build that has others computes the same bits.
        let scores = leaf_layout.scores().map(|at| i64::try_from(at).expect("a leaf is small"));
        scores.for_each(|at| drop(leaf.flat.get(at).zero_()));
        leaf_hash.update(&to_bytes(&leaf.flat));
        commit(job, &mut state, phase, &leaf_layout, &leaf.flat, 0)?;
    }
    let state_hash = blake3::hash(&to_bytes(&state.flat));
    Ok((hex(leaf_hash.finalize().as_bytes()), hex(state_hash.as_bytes())))
}

fn stand_ins(job: &Job, models: &Models, device: Device) -> ShardBatch {
    let (shape, batch) = (models.shape, job.job.shard_batch as usize);
    let key = Key { seed: job.job.seed, step: 0, phase: 0, shard: 0, purpose: Purpose::Probe };
    let signed = |n: usize| i64::try_from(n).expect("an image is small");
    let sizes = [signed(batch), signed(shape.channels), signed(shape.height), signed(shape.width)];
    let images = no_grad(|| key.uniform(-1.0, 1.0, batch * shape.numel()).view(sizes).to_device(device));
    let classes = (models.classes > 0).then(|| {
        let count = i64::from(models.classes);
        Tensor::arange(i64::from(job.job.shard_batch), (Kind::Int64, device)).remainder(count)
    });
    ShardBatch { images, classes }
}

/// The first 16 digits: enough to tell two hashes apart, short enough to read.
fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*hash).to_hex()[..16].to_string()
}
