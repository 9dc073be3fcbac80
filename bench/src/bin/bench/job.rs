//! Jobs of the measurements.

use ganglion_tests::measured::cores;

use crate::options::Options;

/// Number format of the networks' passes; the optimizer's state stays in fp32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Precision {
    Fp32,
    Bf16,
}

impl Precision {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Precision::Fp32 => "fp32",
            Precision::Bf16 => "bf16",
        }
    }
}

/// Job, with the number of workers that train it.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub model: &'static str,
    pub width: u32,
    pub precision: Precision,
    pub workers: u32,
    pub data_shards: u32,
    pub shard_batch: u32,
    pub steps: u64,
    /// Count of the first steps, which are not measured.
    pub warm_up: usize,
    /// Additional settings for Ganglion's programs only, `key=value`.
    pub settings: &'static [&'static str],
    /// Columns of the losses that are compared.
    pub losses: [&'static str; 2],
    pub seed: u64,
}

pub(crate) const MLP: Job = Job {
    model: "mlp-28",
    width: 256,
    precision: Precision::Fp32,
    workers: 1,
    data_shards: 1,
    shard_batch: 64,
    steps: 400,
    warm_up: 50,
    settings: &[],
    losses: ["loss_discriminator", "loss_generator"],
    seed: 0,
};
pub(crate) const DCGAN_28: Job = Job { model: "dcgan-28", width: 64, steps: 12, warm_up: 2, ..MLP };
pub(crate) const DCGAN_64: Job = Job { model: "dcgan-64", steps: 6, warm_up: 1, ..DCGAN_28 };

/// VAE with the settings of `configs/mnist-vae.toml` but for the learning rate, which stays
/// (`bench/python/vae_peer.py`).
pub(crate) const VAE: Job = Job {
    model: "vae-28",
    width: 16,
    settings: &["model.latent_dim=32", "loss.binarise=true", "optimizer.learning_rate=0.001"],
    losses: ["recon", "kl"],
    ..MLP
};

/// Transformer over the pixels of digits of 8 x 8 pixels (`bench/python/gpt.py`); only packages have it.
pub(crate) const GPT: Job =
    Job { model: "gpt", shard_batch: 12, steps: 60, warm_up: 10, settings: &["data.resize=8"], ..MLP };

/// The built-in transformer, of 0.8 million parameters, over the bytes of the bundled text.
pub(crate) const TRANSFORMER: Job = Job {
    model: "transformer",
    width: 128,
    shard_batch: 12,
    steps: 120,
    warm_up: 20,
    settings: &["data.context=64"],
    losses: ["nll"; 2],
    ..MLP
};

impl Job {
    /// Returns the job on this number of workers, one data shard each.
    pub(crate) const fn on(self, workers: u32) -> Job {
        Job { workers, data_shards: workers, ..self }
    }

    pub(crate) fn name(&self) -> String {
        let plural = if self.workers == 1 { "" } else { "s" };
        format!("{}, {} worker{plural}", self.model, self.workers)
    }

    /// Number of images of all workers in one step.
    pub(crate) fn global_batch(&self) -> u32 {
        self.data_shards * self.shard_batch
    }

    /// Returns the images per second at a step time in milliseconds.
    pub(crate) fn images_per_second(&self, step: f64) -> f64 {
        1e3 * f64::from(self.global_batch()) / step
    }

    /// Whether the workers share cores of this machine.
    pub(crate) fn is_oversubscribed(&self) -> bool {
        self.workers > cores()
    }

    /// Returns the job with the number of steps that the options ask for.
    pub(crate) fn asked(self, options: &Options) -> Job {
        match options.steps {
            0 => self,
            steps => {
                Job { steps, warm_up: self.warm_up.min(usize::try_from(steps / 4).unwrap_or(0)), ..self }
            }
        }
    }
}
