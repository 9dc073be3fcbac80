//! Shared support of the tests: small jobs, and everything to compute one phase.
#![allow(dead_code)] // each test program uses its own share

use std::collections::BTreeMap;

use std::sync::Arc;

use ganglion_membership::{Assembly, Checkpoint as Saved, StepShape};
use ganglion_proto::evaluation::{Alarms, Evaluation};
use ganglion_proto::job::{
    Augmentation, Checkpoint, Data, General, Job, Length, Loss, LossKind, Metrics, Model, ModelKind,
    NonFinite, Optimizer, OptimizerKind, OptimizerOptions, Precision, Reduction, Sample, Tf32,
};
use ganglion_storage::{Storage, in_folder};
use ganglion_worker::checkpoint::{Files, Fingerprints, Snapshot, file_count};
use ganglion_worker::data::ImageShape;
use ganglion_worker::nn::Models;
use ganglion_worker::objective::gan::{DISCRIMINATOR, Gan, Input, Point};
use ganglion_worker::objective::{Model as Objective, Phase, ShardAt, ShardBatch, ShardGrad};
use ganglion_worker::random::{Draws, Key, Purpose};
use ganglion_worker::state::{State, StateLayout};
use tch::{Device, Kind, Tensor};

/// A job small enough to compute in milliseconds.
pub(crate) fn job(model: ModelKind, loss: LossKind) -> Job {
    Job {
        job: General {
            name: "small".to_string(),
            seed: 7,
            length: Length::Steps(4),
            data_shards: 4,
            shard_batch: 3,
            threads: 1,
            failure_deadline: 5.0,
            non_finite: NonFinite::Skip,
            precision: Precision::Fp32,
            tf32: Tf32::default(),
            reduction: Reduction::Tree,
            deterministic: true,
        },
        data: Data::bundled_digits(),
        model: Model {
            ema_half_life_images: 1000,
            ..Model::plain(
                model,
                5,
                if matches!(model, ModelKind::R3gan28 | ModelKind::R3gan32) { 8 } else { 4 },
            )
        },
        loss: Loss {
            kind: loss,
            discriminator_steps: 2,
            gradient_penalty: 10.0,
            r1: 0.0,
            final_r1: 0.0,
            r2: 0.0,
            final_r2: 0.0,
            penalty_every: 1,
        },
        optimizer: Optimizer {
            kind: OptimizerKind::Adam,
            learning_rate: 2e-4,
            discriminator_learning_rate: 2e-4,
            beta1: 0.5,
            beta2: 0.999,
            epsilon: 1e-8,
            decay_images: 0,
            final_learning_rate: 2e-4,
            final_discriminator_learning_rate: 2e-4,
            final_beta2: 0.999,
            options: OptimizerOptions::default(),
            phases: BTreeMap::new(),
        },
        augmentation: Augmentation {
            flip: false,
            kinds: Vec::new(),
            probability: 1.0,
            final_probability: 1.0,
            adaptive: false,
            target: 0.6,
            adjust_images: 1000,
        },
        checkpoint: Checkpoint { every_steps: 2, every_epochs: 0, keep_last: 3, url: None },
        sample: Sample { every_steps: 2, count: 4 },
        metrics: Metrics { every_steps: 1 },
        evaluation: Evaluation::default(),
        alarms: Alarms::default(),
        shape: None,
    }
}

/// Everything that one worker needs to compute phases of a job.
pub(crate) struct Bench {
    pub job: Job,
    pub models: Models,
    pub gan: Arc<Gan>,
    pub model: Objective,
    pub state: State,
}

impl Bench {
    /// The state of the job's seed.
    pub(crate) fn new(job: Job) -> Bench {
        let side = job.model.kind.side().unwrap() as usize;
        let shape = ImageShape { channels: 1, height: side, width: side };
        let models = Models::with_classes(&job.model, shape, 3).unwrap();
        let labels = vec![0, 1, 1, 2];
        let gan = Gan {
            job: job.clone(),
            models: models.clone(),
            labels,
            class_names: Vec::new(),
            device: Device::Cpu,
        };
        let gan = Arc::new(gan);
        let model = Objective::new(gan.clone(), job.job.precision).unwrap();
        let state = State::initial(model.layout.clone(), job.job.seed, Device::Cpu);
        Bench { job, models, gan, model, state }
    }

    /// The files of the job's checkpoints.
    pub(crate) fn files<'a>(&'a self, storage: &'a Storage) -> Files<'a> {
        self.model.files(storage, self.job.job.data_shards)
    }

    /// Stand-ins for a shard's real samples.
    pub(crate) fn real(&self) -> ShardBatch {
        let (shape, batch) = (self.models.shape, self.job.job.shard_batch as usize);
        let key = Key { seed: 1, step: 0, phase: 0, shard: 0, purpose: Purpose::Probe };
        let signed = |n: usize| i64::try_from(n).unwrap();
        let sizes = [signed(batch), signed(shape.channels), signed(shape.height), signed(shape.width)];
        let classes = (self.models.classes > 0)
            .then(|| Tensor::arange(sizes[0], (Kind::Int64, Device::Cpu)).remainder(3));
        ShardBatch::of_images(key.uniform(-1.0, 1.0, batch * shape.numel()).view(sizes), classes)
    }

    /// Computes a shard's gradient in a phase of step 0.
    pub(crate) fn leaf(&self, phase: Phase, shard: u32) -> ShardGrad {
        let layout = self.model.gradient(phase);
        let mut leaf = ShardGrad::new(layout, layout.len(), Device::Cpu);
        let real = self.real();
        let spot = ShardAt { phase, step: 0, shard };
        let draws = Draws::default();
        let point = Point { at: spot, state: &self.state, draws: &draws };
        let drawn = self.gan.draw(point, Some(&real));
        let input = if phase.updates.contains(DISCRIMINATOR) {
            Input::Samples(&real, None, &drawn)
        } else {
            Input::Fake(drawn, Some(&real))
        };
        self.gan.compute(point, input, &mut leaf).unwrap();
        leaf
    }
}

/// A flat tensor's floats, as bits.
pub(crate) fn bits(tensor: &Tensor) -> Vec<u32> {
    Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap().into_iter().map(f32::to_bits).collect()
}

/// Fingerprints of a snapshot of a whole state.
pub(crate) fn fingerprints(layout: &StateLayout, snapshot: &Snapshot) -> Fingerprints {
    Fingerprints::of(layout, &snapshot.floats(0..layout.len)).unwrap()
}

/// Writes all files of a checkpoint.
pub(crate) async fn save(files: &Files<'_>, snapshot: &Snapshot) -> Saved {
    let fingerprints = fingerprints(files.layout, snapshot);
    let mut assembly = Assembly::default();
    // A small job's.
    let shape = StepShape::new(3, vec![0, 1]).unwrap();
    let mut saved = None;
    for index in 0..file_count(files.layout, files.weights, files.data_shards) {
        let part = files.write(snapshot, &fingerprints, index).await.unwrap();
        saved = assembly.add(part, &shape).unwrap();
    }
    saved.expect("the last file completes the checkpoint")
}

/// The content of a file of a checkpoint.
pub(crate) async fn content(storage: &Storage, checkpoint: &Saved, file: &str) -> Vec<u8> {
    storage.read(&in_folder(&checkpoint.folder(), file)).await.unwrap().to_vec()
}
