//! Job: everything that decides a run's result, as one TOML file.
//!
//! These are the domain types, and serde's derivation is their only other form: a resolved job is
//! the same text in the run directory, on the wire and in a model card (`job/text.rs`). The
//! coordinator reads and checks the file; the worker trains by it. Outside of the coordinator's job
//! reader every value of a [`Job`] is already checked.
//!
//! Sizes are counts of samples or updates, never shares of memory; learning rates and betas are
//! dimensionless.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use ganglion_membership::{Position, StepShape};
use serde::{Deserialize, Serialize};

use crate::evaluation::{Alarms, Evaluation};
use crate::names::display_as_in_the_file;
use crate::stream::Change;

mod family;
mod optimizer;
mod pictures;
#[cfg(test)]
mod sample;
mod text;

pub use family::{Activation, Family, Likelihood, Positions, TransformerSettings, VaeSettings};
pub use optimizer::{CLIP_NORM, Decay, MOMENTUM, OptimizerOptions, PhaseOptimizer, WEIGHT_DECAY};
pub use pictures::{Background, ClassOrder, Fit, NoBackground, Orientation};
#[cfg(test)]
pub(crate) use sample::{
    sample_of_all, sample_of_options, sample_of_package, sample_of_transformer, sample_of_vae,
};
pub use text::TEXT_LIMIT;

/// Resolved training job: defaults filled in, paths absolute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Settings of the run as a whole.
    pub job: General,
    /// Training samples.
    pub data: Data,
    /// Generator and discriminator.
    pub model: Model,
    /// Objective that the two networks minimise.
    pub loss: Loss,
    /// Optimizer of both networks.
    pub optimizer: Optimizer,
    /// Augmentation of samples before the discriminator sees them.
    pub augmentation: Augmentation,
    /// Times and place of checkpoints.
    pub checkpoint: Checkpoint,
    /// Times and size of sample grids.
    pub sample: Sample,
    /// Times of metrics rows.
    pub metrics: Metrics,
    /// Times and metrics of evaluations.
    #[serde(default)]
    pub evaluation: Evaluation,
    /// Alarms about a run that goes wrong.
    #[serde(default)]
    pub alarms: Alarms,
    /// Shape of the steps of the objective that is trained, where it is known; the text does not have it.
    #[serde(skip)]
    pub shape: Option<StepShape>,
}

/// Section `[job]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct General {
    /// Name of the run; the run directory defaults to `runs/<name>`.
    pub name: String,
    /// Seed of every random draw: weights, order of samples, noise.
    pub seed: u64,
    /// Length of training.
    #[serde(flatten)]
    pub length: Length,
    /// V: the fixed number of units of work and of randomness, whatever the number of workers.
    pub data_shards: u32,
    /// b: samples of one data shard in one phase. The global batch size is V x b.
    pub shard_batch: u32,
    /// Threads inside one tensor operation. Part of the job, because it can change the bits.
    pub threads: u32,
    /// Longest time that a silent process is trusted, in seconds. Every other time limit is derived
    /// from it.
    pub failure_deadline: f64,
    /// Treatment of a phase whose reduced gradient, buffer updates or loss is not finite.
    pub non_finite: NonFinite,
    /// Number format of forward and backward passes.
    pub precision: Precision,
    /// Use of TF32 in fp32 passes on GPUs.
    #[serde(default, skip_serializing_if = "Tf32::is_default")]
    pub tf32: Tf32,
    /// Order in which shard gradients are summed.
    pub reduction: Reduction,
    /// Whether only kernels may run that always give the same bits. Without it, two runs may
    /// differ.
    pub deterministic: bool,
}

/// Number format of forward and backward passes. The state and all sums over samples, shard
/// gradients and ranks are fp32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single precision.
    Fp32,
    /// bfloat16 weights and activations, cast from fp32 once a phase; the gradient penalty stays fp32.
    Bf16,
}

/// Arithmetic that GPUs do in TF32 instead of fp32: numbers with 10 bits of precision, several times as fast.
/// CPUs compute all of it in fp32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tf32 {
    /// Nothing.
    Off,
    /// Convolutions, as PyTorch does by default.
    #[default]
    Convolutions,
    /// Convolutions and products of matrices.
    All,
}

impl Tf32 {
    fn is_default(&self) -> bool {
        *self == Tf32::default()
    }
}

/// Order in which shard gradients are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// One fixed binary tree over the data shards: the same bits for any number of workers.
    Tree,
    /// The backend's own all-reduce: the bits depend on the number of workers.
    Ring,
}

/// Treatment of a phase whose reduced gradient is an infinity or a NaN. Part of the job, because it
/// changes the result.
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

/// Length of training, in steps or in passes over the data.
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
    /// Path of a file or a folder, by kind. `None` only for data bundled with the worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Pixels of the shorter side that each image is scaled to; `None` leaves its size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize: Option<u32>,
    /// Pixels a side of the central square that is cut out after scaling. Defaults to `resize`
    /// where only that is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<u32>,
    /// Colour channels of images read from a folder, 1 or 3. Other kinds of images have a fixed number, and
    /// other samples none.
    #[serde(default, skip_serializing_if = "has_none")]
    pub channels: u32,
    /// File name extension of the pictures to train on in a folder or archive, without its first
    /// dot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_extension: Option<String>,
    /// Treatment of the orientation in the pictures' EXIF data.
    #[serde(default, skip_serializing_if = "Orientation::is_followed")]
    pub orientation: Orientation,
    /// Way in which a scaled picture becomes a square.
    #[serde(default, skip_serializing_if = "Fit::is_crop")]
    pub fit: Fit,
    /// Colour behind transparent parts. `None` in jobs that began before this setting, and for data without
    /// any: as [`Background::Stored`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<Background>,
    /// Order of the folders that are classes. `None` in jobs that began before this setting, and for data
    /// without folders: as [`ClassOrder::Bytes`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_order: Option<ClassOrder>,
    /// Tokens of text that a sample predicts. `None` for other data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// Tokenizer of text, a `tokenizer.json`. `None` for bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// blake3 of the tokenizer's file, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_hash: Option<String>,
    /// Names of the arrays to train on. `None` for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<Vec<String>>,
    /// Samples that are left out, and from which step on, in that order.
    #[serde(default, rename = "exclusion", skip_serializing_if = "Vec::is_empty")]
    pub exclusions: Vec<Exclusion>,
}

impl Data {
    /// Tokens that a sample of text predicts by default.
    pub const CONTEXT: u32 = 128;

    /// Returns the section for the digits that are bundled with the worker.
    pub fn bundled_digits() -> Data {
        Data::plain(DataKind::Mnist10k, None, 1)
    }

    /// Returns the section of a new job for data of a kind, with all defaults.
    pub fn plain(kind: DataKind, path: Option<PathBuf>, channels: u32) -> Data {
        let has_folders = kind == DataKind::Folder;
        Data {
            kind,
            path,
            resize: None,
            crop: None,
            channels,
            image_extension: None,
            orientation: Orientation::default(),
            fit: Fit::default(),
            background: has_folders.then_some(Background::WHITE),
            class_order: has_folders.then_some(ClassOrder::Natural),
            context: (kind == DataKind::Text).then_some(Data::CONTEXT),
            tokenizer: None,
            tokenizer_hash: None,
            names: None,
            exclusions: Vec::new(),
        }
    }

    /// Takes over from the record of a run that began before a setting existed that it had none. A setting
    /// that was given with another value than the default stays, and so differs from the record.
    pub fn resume(&mut self, recorded: &Data) {
        let new = Data::plain(self.kind, None, self.channels);
        if recorded.background.is_none() && self.background == new.background {
            self.background = None;
        }
        if recorded.class_order.is_none() && self.class_order == new.class_order {
            self.class_order = None;
        }
    }

    /// Hash of the exclusions; `None` if there are none.
    pub fn exclusions_hash(&self) -> Option<String> {
        let mut hasher = blake3::Hasher::new();
        for Exclusion { after_step, after_phase, files, .. } in &self.exclusions {
            // Quoted by `Debug`, so that no name can look like two.
            hasher.update(format!("{after_step} {after_phase} {files:?}\n").as_bytes());
        }
        // It tells changes of the job apart, and protects nothing: 64 bits are enough.
        (!self.exclusions.is_empty()).then(|| hasher.finalize().to_hex()[..16].to_string())
    }

    /// Returns the section for other samples of the same kind, read in the same way. The exclusions
    /// do not apply to them.
    pub fn elsewhere(&self, path: PathBuf) -> Data {
        // Names in the job are those of its own data.
        Data { path: Some(path), exclusions: Vec::new(), ..self.clone() }
    }
}

/// Table `[[data.exclusion]]`: samples left out from a step of the run on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exclusion {
    /// Steps that are trained with the samples; 0 leaves them out from the start, as if they did
    /// not exist.
    pub after_step: u64,
    /// Phases of the next step that are also trained with them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub after_phase: u64,
    /// Hash of the names of all samples of the run, where it is known. A data set with other names
    /// is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<String>,
    /// Names of the samples: relative paths of files, or for data in one file the indices of
    /// images, from 0.
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
fn has_none(count: &u32) -> bool {
    *count == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Formats of samples.
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
    /// A file of text, plain or compressed, or a folder of them.
    Text,
    /// NumPy's arrays: a folder of `.npy` files, or one.
    Arrays,
}

impl DataKind {
    /// Whether the samples are images.
    pub fn is_images(self) -> bool {
        !matches!(self, DataKind::Text | DataKind::Arrays)
    }
}

/// Formats of archives that hold pictures, in place of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveKind {
    /// `.zip`.
    Zip,
    /// `.tar`.
    Tar,
}

impl ArchiveKind {
    /// Returns the format of a file by its extension; `None` if it is no archive.
    pub fn of(file: &Path) -> Option<ArchiveKind> {
        let ending = file.extension()?.to_str()?;
        // Systems that ignore case write `.ZIP`.
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
    /// Family and architecture.
    pub kind: ModelKind,
    /// Length of the noise vector that the generator or decoder turns into an image.
    pub latent_dim: u32,
    /// Width: hidden units of `mlp-28`, the base number of feature maps of convolutional models, the length
    /// of a transformer's embeddings.
    pub width: u32,
    /// Half-life of the weights' exponential moving average, in images seen.
    pub ema_half_life_images: u64,
    /// Growth of the half-life up to `ema_half_life_images`.
    pub ema_schedule: EmaSchedule,
    /// Whether the networks are conditioned on the classes of samples.
    pub conditional: bool,
    /// Folder or address of the checkpoint with the initial weights; `None` draws them from the
    /// seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<String>,
    /// Number of the discriminator's first layers that are not updated (Mo et al., 2020, FreezeD).
    pub freeze_discriminator: u32,
    /// File of the generator, for `script` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generator: Option<PathBuf>,
    /// File of the discriminator, for `script` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discriminator: Option<PathBuf>,
    /// File of the package, for `package` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// blake3 of the package in hex, for `package` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package_hash: Option<String>,
    /// Settings of a VAE. In the text they stand in `[loss]` and `[evaluation]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae: Option<VaeSettings>,
    /// Settings of a transformer. In the text they stand in `[model]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transformer: Option<TransformerSettings>,
}

impl Model {
    /// Returns networks of a kind and size, with drawn weights and without classes.
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
            path: None,
            package_hash: None,
            vae: None,
            transformer: None,
        }
    }
}

/// Growth of the moving average's half-life with the images seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmaSchedule {
    /// At most a twentieth of the images seen: Karras et al., StyleGAN2-ADA (2020), and its
    /// training loop.
    RampUp,
    /// Half a cosine from 0 over `optimizer.decay_images`: Huang et al., R3GAN (2024), and its
    /// training loop.
    Cosine,
}

/// Supported models.
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
    /// VAE (Kingma and Welling, 2013) with convolutional networks for 28 x 28 images.
    #[serde(rename = "vae-28")]
    Vae28,
    /// VAE for 32 x 32 images.
    #[serde(rename = "vae-32")]
    Vae32,
    /// Autoregressive transformer (Vaswani et al., 2017) over text or quantised pixels.
    #[serde(rename = "transformer")]
    Transformer,
    /// Two TorchScript files of the user.
    #[serde(rename = "script")]
    Script,
    /// A package: an objective written in PyTorch.
    #[serde(rename = "package")]
    Package,
}

impl ModelKind {
    /// Family of the model.
    pub fn family(self) -> Family {
        match self {
            ModelKind::Vae28 | ModelKind::Vae32 => Family::Vae,
            ModelKind::Transformer => Family::Transformer,
            ModelKind::Package => Family::Package,
            ModelKind::Mlp28 | ModelKind::Dcgan28 | ModelKind::Dcgan64 | ModelKind::Script => Family::Gan,
            ModelKind::Sngan32 | ModelKind::R3gan28 | ModelKind::R3gan32 => Family::Gan,
        }
    }

    /// Pixels a side of the model's images; `None` where the data or files of the user's define it.
    pub fn side(self) -> Option<u32> {
        match self {
            ModelKind::Mlp28 | ModelKind::Dcgan28 | ModelKind::R3gan28 | ModelKind::Vae28 => Some(28),
            ModelKind::Sngan32 | ModelKind::R3gan32 | ModelKind::Vae32 => Some(32),
            ModelKind::Dcgan64 => Some(64),
            ModelKind::Script | ModelKind::Transformer | ModelKind::Package => None,
        }
    }
}

/// Section `[loss]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// Kind of the objective.
    pub kind: LossKind,
    /// Discriminator phases in each step.
    pub discriminator_steps: u32,
    /// Weight of the gradient penalty of `wasserstein-gp`; other objectives ignore it.
    pub gradient_penalty: f64,
    /// Weight of half the square of the discriminator's gradient at real samples (Mescheder et al., 2018,
    /// equation 9).
    pub r1: f64,
    /// Value of `r1` after `optimizer.decay_images`.
    pub final_r1: f64,
    /// Weight of the same penalty at the generator's samples.
    pub r2: f64,
    /// Value of `r2` after `optimizer.decay_images`.
    pub final_r2: f64,
    /// Period of the penalties in discriminator phases; their weight is multiplied by it (Karras et
    /// al., StyleGAN2, 2020, section 3.1).
    pub penalty_every: u32,
}

/// Supported objectives.
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
    /// Jolicoeur-Martineau (2019) in the form of Huang et al. (2024), equation 2: each real sample
    /// is paired with one of the generator's.
    RelativisticPairing,
}

impl LossKind {
    /// Whether the objective compares pairs of a real and a generated sample, in the generator's
    /// phase too.
    pub fn pairs(self) -> bool {
        self == LossKind::RelativisticPairing
    }
}

/// Section `[optimizer]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// Update rule.
    pub kind: OptimizerKind,
    /// Step size of the generator, and of the discriminator unless it has its own.
    pub learning_rate: f64,
    /// Step size of the discriminator.
    pub discriminator_learning_rate: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Term added to the root of the second moment.
    pub epsilon: f64,
    /// Images over which every setting with a final value moves to it; 0 keeps the initial values. The
    /// learning rate does so after its warm-up.
    pub decay_images: u64,
    /// Final step size of the generator.
    pub final_learning_rate: f64,
    /// Final step size of the discriminator.
    pub final_discriminator_learning_rate: f64,
    /// Final decay rate of the second moment.
    pub final_beta2: f64,
    /// Further settings.
    #[serde(flatten)]
    pub options: OptimizerOptions,
    /// Optimizers of a package's phases, by their names; they take the place of the settings above, but for the
    /// schedule: `decay_images`, `decay` and `warmup_images`. In the text each is a table `[optimizer.PHASE]`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phases: BTreeMap<String, PhaseOptimizer>,
}

/// Section `[augmentation]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Augmentation {
    /// Whether real samples are mirrored at random, left to right.
    pub flip: bool,
    /// Augmentations of both real and generated samples before the discriminator sees them.
    pub kinds: Vec<AugmentationKind>,
    /// Probability of each of `kinds` for a sample.
    pub probability: f64,
    /// Value of `probability` after `optimizer.decay_images`.
    pub final_probability: f64,
    /// Whether the probability instead begins at 0 and follows the discriminator's overfitting
    /// (Karras et al., 2020).
    pub adaptive: bool,
    /// Target of the adaptive controller: the mean of sign D(x) over real samples.
    pub target: f64,
    /// Smallest number of images in which the adaptive probability can go from 0 to 1.
    pub adjust_images: u64,
}

/// Kinds of augmentation of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AugmentationKind {
    /// Mirrors the sample, left to right.
    Flip,
    /// Rotates the sample by a multiple of 90 degrees.
    Rotate90,
    /// Moves the sample by up to an eighth of its side, in each direction.
    Translation,
    /// Changes brightness, saturation and contrast.
    Color,
    /// Blanks a square of half its side.
    Cutout,
}

/// Supported update rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerKind {
    /// Kingma and Ba (2015), algorithm 1.
    Adam,
    /// Loshchilov and Hutter (2019), algorithm 2.
    Adamw,
    /// Stochastic gradient descent, with momentum as Sutskever et al. (2013) have it and PyTorch writes it.
    Sgd,
}

/// Section `[checkpoint]`. The last step is always saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Period of checkpoints in steps; 0 for never.
    pub every_steps: u64,
    /// Period of checkpoints in passes over the data; 0 for never.
    pub every_epochs: u64,
    /// Number of checkpoints to keep; 0 keeps all.
    pub keep_last: u64,
    /// Storage: a `file://` address or a folder; `checkpoints/` in the run directory when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

/// Section `[sample]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Period of sample grids in steps; the last step has one too; 0 for never.
    pub every_steps: u64,
    /// Number of samples in a grid.
    pub count: u32,
}

/// Section `[metrics]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Period of metrics rows in steps; the last step has one too.
    pub every_steps: u64,
}

/// Returns a `--set` argument, quoted for a shell, that leaves samples out.
pub fn exclude_argument(names: &[&str]) -> String {
    let value = match names {
        // The usual case is easy to read and to type.
        [one] => (*one).to_owned(),
        several => serde_json::json!(several).to_string(),
    };
    // What no shell takes for anything but text.
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "._-/+:,@%".contains(letter);
    match value.chars().all(is_plain) {
        true => format!("--set data.exclude={value}"),
        false => format!("--set 'data.exclude={}'", value.replace('\'', "'\\''")),
    }
}

impl Job {
    /// Number of samples of one phase over all data shards.
    pub fn global_batch(&self) -> u64 {
        u64::from(self.job.data_shards) * u64::from(self.job.shard_batch)
    }

    /// Shape of a step: the objective's, or that of its family. A GAN has updates of the discriminator, each
    /// with samples of its own, then one of the generator; other families have one update of all networks.
    pub fn shape(&self) -> StepShape {
        let of_family = || match self.model.kind.family() {
            // Journals of earlier versions have no shape of a package, and their runs trained GANs alone.
            Family::Gan | Family::Package => {
                let updates = self.loss.discriminator_steps;
                StepShape::new(updates.saturating_add(1), (0..updates).collect())
            }
            Family::Vae | Family::Transformer => StepShape::new(1, vec![0]),
        };
        self.shape.clone().or_else(of_family).expect("a step has a phase that reads samples")
    }

    /// Number of updates in one step.
    pub fn phases_per_step(&self) -> u64 {
        self.shape().phases()
    }

    /// Number of real samples that the first `position` phases take from the stream.
    pub fn samples_before(&self, position: u64) -> u64 {
        self.shape().batches_before(Position(position)) * self.global_batch()
    }

    /// Number in the stream of the first sample that an exclusion applies to: that of the next
    /// phase that reads new ones.
    pub fn number_of(&self, exclusion: &Exclusion) -> u64 {
        let shape = self.shape();
        let batches = exclusion.after_step * shape.batches() + shape.batches_of(exclusion.after_phase);
        batches * self.global_batch()
    }

    /// Returns the changes of the stream by exclusions after the start. `left_out` gives the index
    /// of each sample that these name.
    pub fn changes(&self, mut left_out: impl Iterator<Item = u64>) -> Vec<Change> {
        let later = self.data.exclusions.iter().filter(|exclusion| !exclusion.is_from_the_start());
        let change = |exclusion: &Exclusion| Change {
            from: self.number_of(exclusion),
            // In the job's order: each change takes as many indices as it names samples.
            left_out: left_out.by_ref().take(exclusion.files.len()).collect(),
        };
        later.map(change).collect()
    }

    /// Number of real samples that one step takes from the stream.
    pub fn samples_per_step(&self) -> u64 {
        self.global_batch() * self.shape().batches()
    }

    /// Last step of the run, for a data set of `samples`.
    pub fn last_step(&self, samples: u64) -> u64 {
        match self.job.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => self.steps_of_epochs(epochs, samples),
        }
    }

    /// First step after which `epochs` passes over `samples` are complete.
    pub fn steps_of_epochs(&self, epochs: u64, samples: u64) -> u64 {
        // A number of epochs beyond any run stays beyond it.
        epochs.saturating_mul(samples).div_ceil(self.samples_per_step())
    }

    /// Whether a checkpoint is due once `step` steps of a run over `samples` are done.
    pub fn checkpoint_due(&self, step: u64, samples: u64) -> bool {
        // Both rules may hold, and the last step is saved by any.
        let by_steps = due(step, self.checkpoint.every_steps);
        let by_epochs = self.checkpoint.every_epochs != 0 && {
            // An epoch ends inside this step: a multiple of `every_epochs` passes was completed by
            // it and not before.
            let period = samples.saturating_mul(self.checkpoint.every_epochs);
            let seen = step * self.samples_per_step();
            seen / period > seen.saturating_sub(self.samples_per_step()) / period
        };
        step == self.last_step(samples) || by_steps || by_epochs
    }

    /// Whether an evaluation is due once `step` steps of a run over `samples` are done.
    pub fn evaluation_due(&self, step: u64, samples: u64) -> bool {
        let Evaluation { every_steps, with_checkpoints, .. } = self.evaluation;
        // A run without evaluations has none at its end either.
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

display_as_in_the_file!(
    NonFinite,
    Precision,
    Reduction,
    DataKind,
    ModelKind,
    EmaSchedule,
    LossKind,
    OptimizerKind,
    Decay,
    AugmentationKind
);

#[cfg(test)]
mod tests {
    use super::*;

    /// All that is counted in steps, phases and samples: of 24 a batch, in a job whose GAN has 5 updates of
    /// the discriminator.
    fn counts(shape: Option<StepShape>) -> [u64; 6] {
        let job = Job { shape, ..sample_of_all() };
        let [here, later] = [1, 4].map(|after_phase| Exclusion {
            after_step: 2,
            after_phase,
            names: None,
            files: Vec::new(),
        });
        [
            job.phases_per_step(),
            job.samples_per_step(),
            job.samples_before(13),
            job.number_of(&here),
            job.number_of(&later),
            job.steps_of_epochs(3, 100),
        ]
    }

    #[test]
    fn samples_are_counted_by_the_objective_or_as_a_gan_takes_them() {
        let batch = 24;
        let gan = [6, 5 * batch, (2 * 5 + 1) * batch, (2 * 5 + 1) * batch, (2 * 5 + 4) * batch, 3];
        assert_eq!(counts(None), gan);
        assert_eq!(counts(StepShape::new(6, (0..5).collect())), gan);
        let one = [1, batch, 13 * batch, 3 * batch, 3 * batch, 13];
        assert_eq!(counts(StepShape::new(1, vec![0])), one);
        let apart = [4, 2 * batch, 6 * batch, 4 * batch, 6 * batch, 7];
        assert_eq!(counts(StepShape::new(4, vec![1, 3])), apart);
    }
}
