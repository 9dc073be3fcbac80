//! The job: everything that decides a run's result, as one TOML file.
//!
//! These are the domain types, shared by the coordinator, which reads and checks the file, and the worker,
//! which trains by it. Every value is already checked when a [`Job`] exists outside of the coordinator's job
//! reader.
//!
//! Sizes are counts of samples or updates, shares of memory never; learning rates and betas are
//! dimensionless.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::evaluation::{Alarms, Evaluation};
use crate::stream::Change;

/// A training job, resolved: defaults filled in, paths absolute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// The run as a whole.
    pub job: General,
    /// The training samples.
    pub data: Data,
    /// The two networks.
    pub model: Model,
    /// What the two networks minimise.
    pub loss: Loss,
    /// How both are updated.
    pub optimizer: Optimizer,
    /// What samples go through before the discriminator sees them.
    pub augmentation: Augmentation,
    /// When state is saved, and where.
    pub checkpoint: Checkpoint,
    /// When pictures are drawn.
    pub sample: Sample,
    /// When metrics are reported.
    pub metrics: Metrics,
    /// When what is drawn is judged, and how.
    #[serde(default)]
    pub evaluation: Evaluation,
    /// What is told of a run that goes wrong.
    #[serde(default)]
    pub alarms: Alarms,
}

/// Section `[job]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct General {
    /// Names the run; the run directory defaults to `runs/<name>`.
    pub name: String,
    /// Seed of every random draw: weights, order of samples, noise.
    pub seed: u64,
    /// How long to train.
    #[serde(flatten)]
    pub length: Length,
    /// V: the fixed number of units of work and of randomness, whatever the number of workers.
    pub data_shards: u32,
    /// b: samples of one data shard in one phase. The global batch size is V x b.
    pub shard_batch: u32,
    /// Threads inside one tensor operation. Part of the job, because it can change the bits.
    pub threads: u32,
    /// How long a silent process is trusted, in seconds. Every other time limit is derived from it.
    pub failure_deadline: f64,
    /// What to do with a phase whose reduced gradient, statistics or loss is not finite.
    pub non_finite: NonFinite,
    /// What forward and backward passes compute in.
    pub precision: Precision,
    /// In which order leaves are summed.
    pub reduction: Reduction,
    /// Whether only kernels may run that always give the same bits. Without it, two runs may differ.
    pub deterministic: bool,
}

/// What forward and backward passes compute in. The state and all sums over samples, leaves and ranks are
/// fp32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single precision.
    Fp32,
    /// bfloat16 weights and activations, cast from fp32 once a phase; the gradient penalty stays fp32.
    Bf16,
}

/// In which order leaves are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// One fixed binary tree over the data shards: the same bits for any number of workers.
    Tree,
    /// The backend's own all-reduce: the bits depend on the number of workers.
    Ring,
}

/// What to do with a phase that reduced to an infinity or a NaN. Part of the job, because it changes the
/// result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NonFinite {
    /// Commit the phase without changing the networks.
    Skip,
    /// Compute the phase again, from the newest checkpoint on, and skip it only if it is not finite again.
    RollBack,
    /// End the run.
    Stop,
}

/// How long a job trains: in steps or in passes over the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Length {
    /// Whole GAN iterations.
    Steps(u64),
    /// Passes over the data set, rounded up to a whole step.
    Epochs(u64),
}

/// Section `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// The format of the samples.
    pub kind: DataKind,
    /// A file or a folder, by kind. `None` only for data bundled with the worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Scale each image so that its shorter side has this many pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize: Option<u32>,
    /// Then cut the central square of this many pixels a side. Follows `resize` where that alone is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<u32>,
    /// Colour channels of images read from a folder, 1 or 3. The other kinds know their own.
    pub channels: u32,
    /// The ending of the files of a folder or archive that are pictures to train on, without its first dot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_extension: Option<String>,
    /// Whether pictures are turned as their EXIF data say.
    #[serde(default, skip_serializing_if = "Orientation::is_followed")]
    pub orientation: Orientation,
    /// Samples that are left out, and from when on, in that order.
    #[serde(default, rename = "exclusion", skip_serializing_if = "Vec::is_empty")]
    pub exclusions: Vec<Exclusion>,
}

/// Treatment of the orientation in a picture's EXIF data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Orientation {
    /// The picture is turned and mirrored as viewers do.
    #[default]
    Follow,
    /// The picture stays as its pixels are stored.
    Ignore,
}

impl Orientation {
    fn is_followed(&self) -> bool {
        *self == Orientation::Follow
    }
}

impl Data {
    /// The digits that are bundled with the worker.
    pub fn bundled_digits() -> Data {
        Data {
            kind: DataKind::Mnist10k,
            path: None,
            resize: None,
            crop: None,
            channels: 1,
            image_extension: None,
            orientation: Orientation::default(),
            exclusions: Vec::new(),
        }
    }

    /// Identifies the exclusions; `None` if there are none.
    pub fn exclusions_hash(&self) -> Option<String> {
        let mut hasher = blake3::Hasher::new();
        for Exclusion { after_step, after_phase, files, .. } in &self.exclusions {
            hasher.update(format!("{after_step} {after_phase} {files:?}\n").as_bytes());
        }
        (!self.exclusions.is_empty()).then(|| hasher.finalize().to_hex()[..16].to_string())
    }

    /// Other samples of the same kind, read likewise: what is left out here says nothing of them.
    pub fn elsewhere(&self, path: PathBuf) -> Data {
        Data { path: Some(path), exclusions: Vec::new(), ..self.clone() }
    }
}

/// Table `[[data.exclusion]]`: samples left out from a point of the run on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exclusion {
    /// So many steps are trained with them; 0: they are left out from the start, as if they were not there.
    pub after_step: u64,
    /// And so many phases of the next step.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub after_phase: u64,
    /// Hash of the names of all samples of the run, where that is known: names another data set is refused
    /// by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<String>,
    /// Names of the samples: relative paths of files, or the numbers of images, from 0 on, of data in one
    /// file.
    pub files: Vec<String>,
}

impl Exclusion {
    /// Whether the samples take no part in the run at all.
    pub fn is_from_the_start(&self) -> bool {
        (self.after_step, self.after_phase) == (0, 0)
    }
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.after_step, self.after_phase) {
            (0, 0) => write!(f, "from the start")?,
            (step, 0) => write!(f, "after step {step}")?,
            (step, phase) => write!(f, "after step {step} and phase {phase} of the next")?,
        }
        write!(f, ": {}", self.files.join(", "))
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// The formats of samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataKind {
    /// The 10,000 test digits of MNIST, bundled with the worker.
    #[serde(rename = "mnist-10k")]
    Mnist10k,
    /// IDX image files as MNIST's, plain or gzip-compressed.
    Idx,
    /// CIFAR-10's binary version: `data_batch_1.bin` to `data_batch_5.bin`.
    #[serde(rename = "cifar-10")]
    Cifar10,
    /// A folder of pictures, searched recursively, or archives of them.
    Folder,
}

/// The formats of files that hold pictures, in place of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveKind {
    /// `.zip`.
    Zip,
    /// `.tar`.
    Tar,
}

impl ArchiveKind {
    /// By a file's ending; `None` if it is another.
    pub fn of(file: &Path) -> Option<ArchiveKind> {
        let ending = file.extension()?.to_str()?;
        match ending.to_ascii_lowercase().as_str() {
            "zip" => Some(ArchiveKind::Zip),
            "tar" => Some(ArchiveKind::Tar),
            _ => None,
        }
    }
}

/// Section `[model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// The pair of networks.
    pub kind: ModelKind,
    /// Length of the noise vector that the generator turns into an image.
    pub latent_dim: u32,
    /// Width: hidden units of `mlp-28`, the base number of feature maps of the convolutional models.
    pub width: u32,
    /// Half-life of the generator's exponential moving average, in images seen.
    pub ema_half_life_images: u64,
    /// How it grows to that.
    pub ema_schedule: EmaSchedule,
    /// Whether both networks know the classes of samples.
    pub conditional: bool,
    /// The checkpoint whose weights the run begins with: a folder, or an address of one. Else they are drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<String>,
    /// So many of the discriminator's first layers stay as they are (Mo et al., 2020, FreezeD).
    pub freeze_discriminator: u32,
    /// Of `script`: the file of the generator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generator: Option<PathBuf>,
    /// Of `script`: the file of the discriminator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discriminator: Option<PathBuf>,
}

impl Model {
    /// Networks of a kind and size, with drawn weights and without classes.
    pub fn plain(kind: ModelKind, latent_dim: u32, width: u32) -> Model {
        Model {
            kind,
            latent_dim,
            width,
            ema_half_life_images: 1,
            ema_schedule: EmaSchedule::RampUp,
            conditional: false,
            init_from: None,
            freeze_discriminator: 0,
            generator: None,
            discriminator: None,
        }
    }
}

/// How the half-life of the moving average grows with the images seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmaSchedule {
    /// It is at most a twentieth of the images seen: Karras et al., StyleGAN2-ADA (2020), and its training
    /// loop.
    RampUp,
    /// It goes along half a cosine from 0 over `optimizer.decay_images`: Huang et al., R3GAN (2024), and its
    /// training loop.
    Cosine,
}

/// The pairs of networks on offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelKind {
    /// Multi-layer perceptrons for 28 x 28 images of one channel.
    #[serde(rename = "mlp-28")]
    Mlp28,
    /// DCGAN (Radford et al., 2015) for 28 x 28 images.
    #[serde(rename = "dcgan-28")]
    Dcgan28,
    /// DCGAN for 64 x 64 images.
    #[serde(rename = "dcgan-64")]
    Dcgan64,
    /// Residual networks with spectral normalisation (Miyato et al., 2018) for 32 x 32 images.
    #[serde(rename = "sngan-32")]
    Sngan32,
    /// R3GAN (Huang et al., 2024) for 28 x 28 images.
    #[serde(rename = "r3gan-28")]
    R3gan28,
    /// R3GAN for 32 x 32 images.
    #[serde(rename = "r3gan-32")]
    R3gan32,
    /// Two TorchScript files of the user's.
    #[serde(rename = "script")]
    Script,
}

impl ModelKind {
    /// Pixels a side of the images that it draws; `None` where only its files tell.
    pub fn side(self) -> Option<u32> {
        match self {
            ModelKind::Mlp28 | ModelKind::Dcgan28 | ModelKind::R3gan28 => Some(28),
            ModelKind::Sngan32 | ModelKind::R3gan32 => Some(32),
            ModelKind::Dcgan64 => Some(64),
            ModelKind::Script => None,
        }
    }
}

/// Section `[loss]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// The objective.
    pub kind: LossKind,
    /// Discriminator phases in each step.
    pub discriminator_steps: u32,
    /// Weight of the gradient penalty of `wasserstein-gp`; the other objectives do not read it.
    pub gradient_penalty: f64,
    /// Weight of half the square of the discriminator's gradient at real samples (Mescheder et al., 2018,
    /// equation 9).
    pub r1: f64,
    /// What it is after `optimizer.decay_images`.
    pub final_r1: f64,
    /// The same at the generator's samples.
    pub r2: f64,
    /// What that is after `optimizer.decay_images`.
    pub final_r2: f64,
    /// Penalties are computed in every so many discriminator phases, and weigh as many times more (Karras et
    /// al., StyleGAN2, 2020, section 3.1).
    pub penalty_every: u32,
}

/// The objectives on offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossKind {
    /// Goodfellow et al. (2014), section 3: G maximises log D(G(z)).
    NonSaturating,
    /// Goodfellow et al. (2014), equation 1.
    Minimax,
    /// Mao et al. (2017), equation 2 with a = 0, b = c = 1.
    LeastSquares,
    /// Lim and Ye (2017), Miyato et al. (2018), equations 16 and 17.
    Hinge,
    /// Gulrajani et al. (2017), equation 3.
    WassersteinGp,
    /// Jolicoeur-Martineau (2019) as Huang et al. (2024) take it, equation 2: each real sample is paired with
    /// one of the generator's.
    RelativisticPairing,
}

impl LossKind {
    /// Whether it looks at pairs of a real sample and one of the generator's, in the generator's phase too.
    pub fn pairs(self) -> bool {
        self == LossKind::RelativisticPairing
    }
}

/// Section `[optimizer]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// The update rule.
    pub kind: OptimizerKind,
    /// Step size of the generator, and of the discriminator unless that has its own.
    pub learning_rate: f64,
    /// Step size of the discriminator.
    pub discriminator_learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Every setting that has a final value goes there along half a cosine over so many images; 0: it stays.
    pub decay_images: u64,
    /// The generator's last step size.
    pub final_learning_rate: f64,
    /// The discriminator's.
    pub final_discriminator_learning_rate: f64,
    /// The last decay of the second moment.
    pub final_beta2: f64,
}

/// Section `[augmentation]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Augmentation {
    /// Whether real samples are mirrored at random, left to right.
    pub flip: bool,
    /// What real samples and the generator's alike go through before the discriminator sees them.
    pub kinds: Vec<AugmentationKind>,
    /// How likely each of these is for a sample.
    pub probability: f64,
    /// What that is after `optimizer.decay_images`.
    pub final_probability: f64,
    /// Whether the probability begins at 0 and follows the discriminator's overfitting instead (Karras et
    /// al., 2020).
    pub adaptive: bool,
    /// The mean of sign D(x) over real samples that it aims at.
    pub target: f64,
    /// It goes from 0 to 1 in so many images at least.
    pub adjust_images: u64,
}

/// What augmentation does to a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AugmentationKind {
    /// Mirrors it, left to right.
    Flip,
    /// Turns it by a multiple of 90 degrees.
    Rotate90,
    /// Moves it by up to an eighth of its side, each way.
    Translation,
    /// Other brightness, saturation and contrast.
    Color,
    /// Blanks a square of half its side.
    Cutout,
}

/// The update rules on offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerKind {
    /// Kingma and Ba (2015), algorithm 1.
    Adam,
}

/// Section `[checkpoint]`. The last step is always saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Save after every so many steps; 0 for never.
    pub every_steps: u64,
    /// Save after every so many passes over the data; 0 for never.
    pub every_epochs: u64,
    /// How many checkpoints to keep; 0 keeps all.
    pub keep_last: u64,
    /// Where: a `file://` address or a folder; `checkpoints/` in the run directory when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

/// Section `[sample]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Draw a grid of samples after every so many steps and after the last; 0 for never.
    pub every_steps: u64,
    /// Samples in a grid.
    pub count: u32,
}

/// Section `[metrics]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Report after every so many steps and after the last.
    pub every_steps: u64,
}

/// A `--set` that leaves samples out, for a shell.
pub fn exclude_argument(names: &[&str]) -> String {
    let value = match names {
        [one] => (*one).to_owned(),
        several => serde_json::json!(several).to_string(),
    };
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "._-/+:,@%".contains(letter);
    match value.chars().all(is_plain) {
        true => format!("--set data.exclude={value}"),
        false => format!("--set 'data.exclude={}'", value.replace('\'', "'\\''")),
    }
}

impl Job {
    /// Samples of one phase over all data shards.
    pub fn global_batch(&self) -> u64 {
        u64::from(self.job.data_shards) * u64::from(self.job.shard_batch)
    }

    /// Updates of one step: those of the discriminator, then one of the generator.
    pub fn phases_per_step(&self) -> u64 {
        u64::from(self.loss.discriminator_steps) + 1
    }

    /// Real samples that were taken from the stream by the first `position` phases.
    pub fn samples_before(&self, position: u64) -> u64 {
        let (steps, phases) = (position / self.phases_per_step(), position % self.phases_per_step());
        steps * self.samples_per_step() + phases * self.global_batch()
    }

    /// The number of the first sample of the stream that an exclusion holds for: that of the next
    /// discriminator phase.
    pub fn number_of(&self, exclusion: &Exclusion) -> u64 {
        let phases = exclusion.after_phase.min(u64::from(self.loss.discriminator_steps));
        exclusion.after_step * self.samples_per_step() + phases * self.global_batch()
    }

    /// Changes of the stream by the exclusions after the start, given the index of each sample that these
    /// name.
    pub fn changes(&self, mut left_out: impl Iterator<Item = u64>) -> Vec<Change> {
        let later = self.data.exclusions.iter().filter(|exclusion| !exclusion.is_from_the_start());
        let change = |exclusion: &Exclusion| Change {
            from: self.number_of(exclusion),
            left_out: left_out.by_ref().take(exclusion.files.len()).collect(),
        };
        later.map(change).collect()
    }

    /// Real samples that one step takes from the stream.
    pub fn samples_per_step(&self) -> u64 {
        self.global_batch() * u64::from(self.loss.discriminator_steps)
    }

    /// The step that ends the run, for a data set of `samples`.
    pub fn last_step(&self, samples: u64) -> u64 {
        match self.job.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => self.steps_of_epochs(epochs, samples),
        }
    }

    /// The first step after which `epochs` passes over `samples` are complete.
    pub fn steps_of_epochs(&self, epochs: u64, samples: u64) -> u64 {
        epochs.saturating_mul(samples).div_ceil(self.samples_per_step())
    }

    /// Whether a checkpoint is due once `step` steps of a run over `samples` are done.
    pub fn checkpoint_due(&self, step: u64, samples: u64) -> bool {
        let by_steps = due(step, self.checkpoint.every_steps);
        let by_epochs = self.checkpoint.every_epochs != 0 && {
            // An epoch ends inside this step: a multiple of `every_epochs` passes was completed by it and not
            // before.
            let period = samples.saturating_mul(self.checkpoint.every_epochs);
            let seen = step * self.samples_per_step();
            seen / period > (seen - self.samples_per_step()) / period
        };
        step == self.last_step(samples) || by_steps || by_epochs
    }

    /// Whether an evaluation is due once `step` steps of a run over `samples` are done.
    pub fn evaluation_due(&self, step: u64, samples: u64) -> bool {
        let Evaluation { every_steps, with_checkpoints, .. } = self.evaluation;
        let last = step == self.last_step(samples) && (every_steps != 0 || with_checkpoints);
        let by_steps = every_steps != 0 && step != 0 && step.is_multiple_of(every_steps);
        last || by_steps || (with_checkpoints && self.checkpoint_due(step, samples))
    }

    /// Whether a grid of samples is due once `step` steps are done.
    pub fn sample_due(&self, step: u64, samples: u64) -> bool {
        self.sample.every_steps != 0
            && (due(step, self.sample.every_steps) || step == self.last_step(samples))
    }

    /// Whether a metrics row is due once `step` steps are done.
    pub fn metrics_due(&self, step: u64, samples: u64) -> bool {
        due(step, self.metrics.every_steps) || step == self.last_step(samples)
    }
}

/// Whether `step` is a multiple of a period that is not zero.
fn due(step: u64, every: u64) -> bool {
    every != 0 && step.is_multiple_of(every)
}

/// Writes the names of the job file's enumerations as the file has them.
macro_rules! display_as_in_the_file {
    ($($name:ty),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.serialize(f)
            }
        }
    )*};
}

display_as_in_the_file!(
    NonFinite,
    Precision,
    Reduction,
    DataKind,
    Orientation,
    ModelKind,
    EmaSchedule,
    LossKind,
    OptimizerKind,
    AugmentationKind
);
