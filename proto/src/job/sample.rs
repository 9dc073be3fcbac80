//! Job for tests, in which no setting has its default.

use super::*;

fn loss() -> Loss {
    Loss {
        kind: LossKind::WassersteinGp,
        discriminator_steps: 5,
        gradient_penalty: 10.0,
        r1: 1.0,
        final_r1: 0.1,
        r2: 2.0,
        final_r2: 0.2,
        penalty_every: 4,
    }
}

fn exclusion() -> Exclusion {
    let files = vec!["a b.png".into(), "c".into()];
    Exclusion { after_step: 7, after_phase: 1, names: Some("9f".into()), files }
}

fn data() -> Data {
    Data {
        kind: DataKind::Cifar10,
        path: Some("/data/a b".into()),
        resize: Some(64),
        crop: None,
        channels: 3,
        image_extension: Some("jpg".into()),
        orientation: Orientation::Ignore,
        fit: Fit::Pad,
        background: Some(Background::BLACK),
        class_order: Some(ClassOrder::Bytes),
        // Of data that are no images.
        context: None,
        tokenizer: None,
        tokenizer_hash: None,
        names: None,
        exclusions: vec![exclusion()],
    }
}

/// Returns settings of `sgd` with a value in every place.
pub(crate) fn sample_of_options() -> OptimizerOptions {
    OptimizerOptions {
        weight_decay: Some(0.1),
        momentum: Some(0.9),
        nesterov: Some(true),
        clip_norm: Some(1.5),
        warmup_images: Some(90),
        decay: Some(Decay::Linear),
    }
}

/// Returns a job with a value in every place.
pub(crate) fn sample_of_all() -> Job {
    Job {
        job: General {
            name: "n".into(),
            seed: i64::MAX.unsigned_abs(),
            length: Length::Epochs(3),
            data_shards: 6,
            shard_batch: 4,
            threads: 1,
            failure_deadline: 5.0,
            non_finite: NonFinite::RollBack,
            precision: Precision::Bf16,
            tf32: Tf32::All,
            reduction: Reduction::Ring,
            deterministic: true,
        },
        data: data(),
        model: Model {
            kind: ModelKind::Dcgan64,
            latent_dim: 100,
            width: 64,
            ema_half_life_images: 10,
            ema_schedule: EmaSchedule::Cosine,
            conditional: true,
            init_from: Some("runs/a b".into()),
            freeze_discriminator: 3,
            generator: Some("/networks/G.pt".into()),
            discriminator: Some("/networks/D.pt".into()),
            path: None,
            package_hash: None,
            vae: None,
            transformer: None,
        },
        loss: loss(),
        optimizer: Optimizer {
            kind: OptimizerKind::Adam,
            learning_rate: 0.1 + 0.2,
            discriminator_learning_rate: 1e-4,
            beta1: 0.5,
            beta2: 0.999,
            epsilon: 1e-8,
            decay_images: 1000,
            final_learning_rate: 0.1,
            final_discriminator_learning_rate: 1e-5,
            final_beta2: 0.99,
            options: OptimizerOptions::default(),
            phases: BTreeMap::new(),
        },
        augmentation: Augmentation {
            flip: true,
            kinds: vec![AugmentationKind::Rotate90, AugmentationKind::Cutout],
            probability: 0.5,
            final_probability: 0.25,
            adaptive: true,
            target: 0.6,
            adjust_images: 500,
        },
        checkpoint: Checkpoint { every_steps: 1, every_epochs: 2, keep_last: 3, url: None },
        sample: Sample { every_steps: 7, count: 50 },
        metrics: Metrics { every_steps: 10 },
        evaluation: Evaluation {
            every_steps: 5,
            features: "/inception.pt".to_string().into(),
            held_out: Some("/h".into()),
            ..Evaluation::default()
        },
        alarms: Alarms { saturated_rows: 9, ..Alarms::default() },
        shape: None,
    }
}

/// Returns a job that trains a package.
pub(crate) fn sample_of_package() -> Job {
    let mut job = sample_of_all();
    let model = Model::plain(ModelKind::Package, 1, 1);
    let (path, package_hash) = (Some("/vae.pt2".into()), Some("0a1b".into()));
    job.model = Model { conditional: true, path, package_hash, ..model };
    let phase = PhaseOptimizer {
        kind: OptimizerKind::Adam,
        learning_rate: 0.1 + 0.2,
        beta1: 0.5,
        beta2: 0.999,
        epsilon: 1e-8,
        final_learning_rate: 1e-5,
        final_beta2: 0.99,
        decay_images: None,
        options: OptimizerOptions::default(),
    };
    let other = PhaseOptimizer { learning_rate: 1.0, ..phase };
    job.optimizer.phases = [("encoder".into(), phase), ("critic".into(), other)].into();
    job.without_unused()
}

/// Returns a job that trains a VAE.
pub(crate) fn sample_of_vae() -> Job {
    let mut job = sample_of_all();
    let vae = VaeSettings {
        likelihood: Likelihood::Gaussian,
        beta: 0.1 + 0.2,
        binarise: true,
        importance_samples: 7,
    };
    let model = Model::plain(ModelKind::Vae32, 16, 8);
    job.model = Model { conditional: true, ema_half_life_images: 10, vae: Some(vae), ..model };
    job.without_unused()
}

/// Returns a job that trains a transformer.
pub(crate) fn sample_of_transformer() -> Job {
    let mut job = sample_of_all();
    let transformer = TransformerSettings {
        layers: 3,
        heads: 2,
        positions: Positions::Rotary,
        activation: Activation::Swiglu,
        dropout: 0.25,
        levels: Some(16),
    };
    job.model = Model { transformer: Some(transformer), ..Model::plain(ModelKind::Transformer, 0, 64) };
    job.without_unused()
}
