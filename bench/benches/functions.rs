//! Benchmarks of what runs for each gradient, update, checkpoint, sample or event.

use std::hint::black_box;
use std::time::Duration;

use c10d::aten::{Adam, Step, fused_adam};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ganglion_coordinator::job_file::{self, Source};
use ganglion_coordinator::journal::Journal;
use ganglion_proto::job::Job;
use ganglion_worker::checkpoint::{Snapshot, state_digest};
use ganglion_worker::data::DataSet;
use ganglion_worker::engine::reduce::tree::{Node, TreeSum};
use ganglion_worker::nn::Models;
use ganglion_worker::objective::gan::networks;
use ganglion_worker::set_threads;
use ganglion_worker::state::{Counters, StateLayout};
use tch::{Device, Kind, Tensor};

/// Floats of a gradient: about those of the default job's discriminator.
const FLOATS: i64 = 270_336;

fn default_job(overrides: &[&str]) -> Job {
    let overrides: Vec<String> = overrides.iter().map(|setting| (*setting).to_string()).collect();
    job_file::read(&Source::Embedded, &overrides).expect("the built-in job is right")
}

fn floats() -> Tensor {
    Tensor::ones([FLOATS], (Kind::Float, Device::Cpu))
}

/// Sum of the gradients of eight data shards, as one worker alone adds them.
fn tree_sum(criterion: &mut Criterion) {
    const SHARDS: u32 = 8;
    set_threads(1); // as in a worker
    let mut group = criterion.benchmark_group("reduce");
    group.throughput(Throughput::Bytes(u64::from(SHARDS) * FLOATS.unsigned_abs() * 4));
    let gradients = || (0..SHARDS).map(|_| floats()).collect::<Vec<_>>();
    group.bench_function("tree sum of 8 shards", |bencher| {
        let sum = |gradients: Vec<Tensor>| {
            let mut sum = TreeSum::new(SHARDS);
            for (shard, gradient) in (0..).zip(gradients) {
                sum.push(Node::leaf(shard), gradient);
            }
            sum
        };
        bencher.iter_batched(gradients, sum, BatchSize::LargeInput);
    });
}

/// An update of all parameters of a network by one kernel.
fn adam(criterion: &mut Criterion) {
    let [mut params, grads, mut exp_avg, mut exp_avg_sq] = [(); 4].map(|()| floats());
    let settings = Adam { lr: 2e-4, beta1: 0.5, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    let mut group = criterion.benchmark_group("update");
    group.throughput(Throughput::Elements(FLOATS.unsigned_abs()));
    group.bench_function("fused Adam", |bencher| {
        let mut step = 0;
        bencher.iter(|| {
            step += 1;
            let of_all = Step::whole(&mut params, &grads);
            fused_adam(of_all, [&mut exp_avg, &mut exp_avg_sq], step, settings).expect("it fits");
        });
    });
}

/// The digest of the default job's state, as each checkpoint has it.
fn digest(criterion: &mut Criterion) {
    let job = default_job(&[]);
    let data = DataSet::open(&job.data).expect("the bundled digits");
    let models = Models::new(&job.model, data.shape().image().expect("digits are images"))
        .expect("the networks fit the digits");
    let layout = StateLayout::new(&networks(&models), &[], job.job.precision);
    let flat = vec![1; 4 * layout.len];
    let snapshot = Snapshot::whole((1, 0), flat.into(), Counters::default());
    let mut group = criterion.benchmark_group("checkpoint");
    group.throughput(Throughput::Bytes(4 * layout.len as u64));
    group.bench_function("state digest", |bencher| {
        bencher.iter(|| state_digest(&layout, black_box(&snapshot)))
    });
}

/// A sample as the networks get it, from one that is framed and one that is not.
fn framing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sample");
    for (name, overrides) in
        [("unframed", &[][..]), ("scaled to 32 and cut to 28", &["data.resize=32", "data.crop=28"])]
    {
        let data = DataSet::open(&default_job(overrides).data).expect("the bundled digits");
        let (mut sample, mut index) =
            (vec![0.0; data.shape().image().expect("digits are images").numel()], 0);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                index = (index + 1) % data.len();
                data.read(index, &mut sample).expect("a sample of the bundled digits");
            });
        });
    }
}

/// A durable line of the journal: a worker is admitted.
fn journal(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut journal = Journal::open(&folder.path().join("journal.db")).expect("a new journal");
    let term = journal.begin_term(100).expect("the first term");
    criterion.bench_function("journal/append", |bencher| {
        bencher.iter(|| journal.admit(term, "host", 1, None).expect("the disk takes it"));
    });
}

criterion_group! {
    name = functions;
    config = Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    targets = tree_sum, adam, digest, framing, journal
}
criterion_main!(functions);
