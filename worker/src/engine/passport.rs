//! Numeric fingerprint of the environment (`passport`): everything that this worker's bits depend on, with
//! hashes that prove it.

use std::collections::HashSet;
use std::time::Instant;

use c10d::aten::fingerprint;
use ganglion_membership::{self as membership, Passport};
use ganglion_proto::job::Job;
use tch::Device;

use crate::data::DataSet;
use crate::device;
use crate::engine::commit::commit;
use crate::objective::{Model, Phase, ScalarRole, ShardAt, ShardBatch, ShardGrad, Unsuitable};
use crate::state::{State, narrow};

/// Version of this program's arithmetic: two builds with the same number compute the same bits, and may
/// train together.
///
/// Raise it with every change that moves a bit of any job. `make golden` fails where bits differ from those
/// of the commit before and this number does not. It is no hash of the sources, so that a run can go on with
/// a newer build that computes the same. Builds before there was this number have the first.
pub(crate) const NUMERICS: u32 = 7;

/// The objective by which the machine is identified, laid out.
///
/// # Errors
/// The objective cannot be laid out.
pub(crate) fn probe(job: &Job, model: &Model, device: Device) -> Result<Model, Unsuitable> {
    let samples = samples(job, model, device);
    Model::new(model.objective.probe(samples).into(), job.job.precision)
}

/// Number of samples of the probe.
fn samples(job: &Job, model: &Model, device: Device) -> u32 {
    let shard_batch = job.job.shard_batch;
    // A GPU's libraries choose kernels by the exact shapes.
    if device.is_cuda() { shard_batch } else { model.objective.probe_batch(shard_batch) }
}

/// Computes the fingerprint of the environment: the number of the build's arithmetic, the kind of machine,
/// and hashes of this job's arithmetic on it.
pub(crate) fn take(
    job: &Job,
    probe: &Model,
    data: &DataSet,
    device: Device,
) -> Result<Passport, c10d::Error> {
    let small = samples(job, probe, device);
    let batch = stand_ins(job, small, data, device);
    let (forward_backward, commits) = hashes(probe, job.job.seed, &batch, device)?;
    device::check_memory(device)?;
    let exclusions = job.data.exclusions_hash().map(|hash| ("exclusions".to_string(), hash));
    let items = [
        ("c_library", c10d::aten::c_library_version()?),
        ("cpu_capability", c10d::aten::cpu_capability()?),
        // The first 16 digits: enough to tell two hashes apart, short enough to read.
        ("data", blake3::Hash::from_bytes(data.fingerprint()).to_hex()[..16].to_string()),
        ("data_names", data.names()),
        ("device", if device.is_cuda() { "cuda" } else { "cpu" }.to_string()),
        ("hash_commit", commits),
        ("hash_forward_backward", forward_backward),
        ("libtorch", c10d::aten::libtorch_version()?),
        (membership::NUMERICS, NUMERICS.to_string()),
        ("threads", job.job.threads.to_string()),
    ];
    let items = items.into_iter().map(|(item, value)| (item.to_string(), value));
    let gpu = device::gpu_facts(device)?.into_iter().map(|(item, value)| (item.to_string(), value));
    Ok(Passport(items.chain(gpu).chain(exclusions).chain(probe.objective.fingerprint()).collect()))
}

/// Substitutes for samples of a job's data, on the device.
pub(crate) fn stand_ins(job: &Job, samples: u32, data: &DataSet, device: Device) -> ShardBatch {
    let classes = if data.labels().is_empty() { 0 } else { data.classes() };
    ShardBatch::stand_ins(job.job.seed, samples, data.shape(), classes).to(device)
}

/// Hashes the gradients of [each phase](each_phase), and the state after their commits.
fn hashes(
    model: &Model,
    seed: u64,
    batch: &ShardBatch,
    device: Device,
) -> Result<(String, String), c10d::Error> {
    let mut gradients = 0;
    let state = each_phase(model, seed, batch, device, |state, phase, gradient, _| {
        let layout = model.gradient(phase);
        // Diagnostics decide nothing: a build that has others computes the same bits.
        for (at, scalar) in layout.scalar_range().zip(layout.scalars()) {
            if scalar.role == ScalarRole::Diagnostic {
                let _ = narrow(&gradient.flat, at..at + 1).zero_();
            }
        }
        // Each seeds the next one's.
        gradients = fingerprint(&gradient.flat, gradients)?;
        commit(model, state, phase, &gradient.flat, 0)
    })?;
    Ok((hex(gradients), hex(fingerprint(&state.flat, 0)?)))
}

/// Computes the first phase of each name once, from a [stand-in](State::stand_in) for the initial state, and
/// hands its gradient to `then`, which may commit it, with the time at which it began; returns the state.
///
/// # Errors
/// The gradient cannot be computed, or `then` fails.
pub(crate) fn each_phase(
    model: &Model,
    seed: u64,
    batch: &ShardBatch,
    device: Device,
    mut then: impl FnMut(&mut State, Phase, &ShardGrad, Instant) -> Result<(), c10d::Error>,
) -> Result<State, c10d::Error> {
    let mut state = State::stand_in(model.layout.clone(), seed, device);
    let mut compute = model.objective.begin();
    let mut names = HashSet::new();
    for phase in model.phases().iter().copied().filter(|phase| names.insert(model.name(*phase))) {
        let layout = model.gradient(phase);
        let mut gradient = ShardGrad::new(layout, layout.len(), device);
        device::wait(device)?;
        let begun = Instant::now();
        compute.gradient(ShardAt { phase, step: 0, shard: 0 }, &state, Some(batch), &mut gradient)?;
        then(&mut state, phase, &gradient, begun)?;
    }
    Ok(state)
}

fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}
