//! Jobs of the comparison: those of `configs/`, and some for arithmetic that these do not cover, at
//! sizes that take a second.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ganglion_tests::{Run, failpoint};
use image::{ImageFormat, RgbImage};

use crate::bits::Bits;

/// Environment variable with a worker's log of shard gradients.
const LOG: &str = "GANGLION_SHARD_GRADIENTS";
/// Settings of every job. Three steps: the last gradients depend on the updates and averages of
/// two.
const SHRUNK: &[&str] = &[
    "job.steps=3",
    "job.shard_batch=2",
    "model.width=8",
    "checkpoint.every_steps=0",
    "sample.every_steps=0",
    "evaluation.with_checkpoints=false",
    "metrics.every_steps=1",
];
/// Further setting of models that have it: all but transformers.
const LATENT: &str = "model.latent_dim=8";
/// Jobs for arithmetic that no file of `configs/` uses, as settings of the embedded one.
const FURTHER: &[(&str, &[&str])] = &[
    (
        "wasserstein-gp",
        &[
            "loss.kind=wasserstein-gp",
            "loss.discriminator_steps=2",
            "augmentation.flip=true",
            "augmentation.kinds=flip,translation",
            "augmentation.probability=0.5",
        ],
    ),
    (
        "least-squares",
        &[
            "model.kind=dcgan-28",
            "loss.kind=least-squares",
            "loss.r1=0.5",
            "loss.r2=0.5",
            "loss.penalty_every=2",
        ],
    ),
    (
        "adaptive-classes",
        &[
            "model.kind=sngan-32",
            "model.conditional=true",
            "data.resize=32",
            "loss.kind=hinge",
            "augmentation.kinds=rotate90,color,cutout",
            "augmentation.adaptive=true",
            "augmentation.adjust_images=40",
        ],
    ),
];
/// Additional setting where values of the job change with the images seen: it makes them change
/// within the three steps.
const SCHEDULED: &str = "optimizer.decay_images=64";
/// Job in which a worker is killed: its discriminator computes real samples ahead, and has buffer
/// updates.
const KILLED: &str = "mnist-dcgan";
/// Failpoint: a worker dies in update 3, when it has the others' sums and before they have its
/// chunk of the reduced gradient.
const DEATH: &str = "gather@3";
/// Number of pictures or records in the data sets that stand in for those that are not bundled.
const SAMPLES: u32 = 64;

/// Number format of the networks' passes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Precision {
    /// 32 bits.
    Fp32,
    /// 16 bits, with weights of 32.
    Bf16,
}

impl Precision {
    /// All values.
    pub(crate) const ALL: [Precision; 2] = [Precision::Fp32, Precision::Bf16];

    /// Name in a job file.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Precision::Fp32 => "fp32",
            Precision::Bf16 => "bf16",
        }
    }
}

/// Cluster that runs a job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Way {
    /// One worker.
    Alone,
    /// Three workers, whose ranges of data shards are ragged.
    Three,
    /// Three workers, of which one is killed.
    Killed,
}

impl Way {
    /// All values.
    pub(crate) const ALL: [Way; 3] = [Way::Alone, Way::Three, Way::Killed];

    /// Name in the table.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Alone => "1 worker",
            Way::Three => "3 workers",
            Way::Killed => "1 of 3 killed",
        }
    }
}

/// Result of a run that neither failed nor hung.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    /// The job completed.
    Done(Bits),
    /// The build refuses the job, for this reason.
    Refused(String),
}

/// Job of the comparison.
pub(crate) struct Job {
    /// Name of its file, or its purpose.
    pub name: String,
    file: Option<PathBuf>,
    settings: Vec<String>,
}

/// Reads all jobs, those of a folder of job files first, or only those whose names contain `only`.
/// Data that are not bundled come from the folder `data`.
pub(crate) fn read_all(folder: &Path, data: &Path, only: Option<&str>) -> Result<Vec<Job>, String> {
    let wrong = |error: io::Error| format!("{}: {error}", folder.display());
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(wrong)?;
    let mut files: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    let mut jobs =
        files.into_iter().map(|file| Job::read(file, data)).collect::<io::Result<Vec<_>>>().map_err(wrong)?;
    jobs.extend(FURTHER.iter().map(|(name, settings)| Job::further(name, settings)));
    jobs.retain(|job| only.is_none_or(|only| job.name.contains(only)));
    if jobs.is_empty() { Err("--only: no such job".to_string()) } else { Ok(jobs) }
}

impl Job {
    fn read(file: PathBuf, data: &Path) -> io::Result<Job> {
        let text = fs::read_to_string(&file)?;
        let name = file.file_stem().unwrap_or_default().display().to_string();
        let mut settings: Vec<String> = SHRUNK.iter().map(ToString::to_string).collect();
        if !text.contains("kind = \"transformer\"") {
            settings.push(LATENT.to_string());
        }
        if text.contains("decay_images") {
            settings.push(SCHEDULED.to_string());
        }
        let stand_ins =
            ["cifar-10", "folder"].iter().find(|kind| text.contains(&format!("kind = \"{kind}\"")));
        settings.extend(stand_ins.map(|kind| format!("data.path={}", data.join(kind).display())));
        Ok(Job { name, file: Some(file), settings })
    }

    fn further(name: &str, settings: &[&str]) -> Job {
        let settings = SHRUNK.iter().chain([&LATENT]).chain(settings).map(ToString::to_string).collect();
        Job { name: name.to_string(), file: None, settings }
    }

    /// Returns the clusters on which this job runs.
    pub(crate) fn ways(&self, precision: Precision) -> &'static [Way] {
        let is_killed = self.name == KILLED && precision == Precision::Fp32;
        if is_killed { &Way::ALL } else { &Way::ALL[..2] }
    }

    /// Runs this job with the programs of a folder.
    pub(crate) fn run(&self, precision: Precision, way: Way, programs: &Path) -> Result<Outcome, String> {
        let precision = format!("job.precision={}", precision.name());
        let settings: Vec<&str> = self.settings.iter().map(String::as_str).chain([&*precision]).collect();
        let failing = (way == Way::Killed).then(|| failpoint::programs(programs));
        let run = Run::new(&[&settings]).by(failing.as_deref().unwrap_or(programs));
        let (log, death) = (run.beside("shard-gradients"), run.beside("death"));
        let workers = if way == Way::Alone { "1" } else { "3" };
        let mut command = run.command(&["--workers", workers]);
        if let Some(file) = &self.file {
            command.arg("--config").arg(file);
        }
        command.env(LOG, &log);
        if way == Way::Killed {
            command.env(failpoint::VARIABLE, format!("{DEATH}:{}", death.display()));
        }
        let ended = ganglion_tests::Process::start(command).wait();
        match ended.code {
            Some(0) if way == Way::Killed && !death.exists() => Err(format!("nobody died at {DEATH}")),
            Some(0) => Ok(Outcome::Done(Bits::read(run.digest(), &log)?)),
            Some(2) => Ok(Outcome::Refused(ended.output.lines().last().unwrap_or_default().to_string())),
            code => Err(format!("ended with {code:?}:\n{}", ended.output)),
        }
    }
}

/// Writes a small CIFAR-10 and a folder of pictures, for the jobs whose data are not bundled.
pub(crate) fn write_data(folder: &Path) -> io::Result<()> {
    let (cifar, pictures) = (folder.join("cifar-10"), folder.join("folder"));
    fs::create_dir_all(&cifar)?;
    // The subfolders are classes, which one of the jobs needs.
    let classes = ["one", "other"].map(|class| pictures.join(class));
    classes.iter().try_for_each(fs::create_dir_all)?;
    let mut noise = Noise(1);
    for batch in 1..=5_u8 {
        let mut record = || std::iter::once(batch).chain((0..3 * 32 * 32).map(|_| noise.byte())).collect();
        let records: Vec<Vec<u8>> = (0..SAMPLES / 4).map(|_| record()).collect();
        fs::write(cifar.join(format!("data_batch_{batch}.bin")), records.concat())?;
    }
    for at in 0..SAMPLES {
        // Of several sizes, so that they are scaled and cropped.
        let picture =
            RgbImage::from_fn(70 + at % 30, 66 + at % 7, |_, _| image::Rgb([(); 3].map(|()| noise.byte())));
        let file = classes[at as usize % 2].join(format!("{at:02}.png"));
        picture.save_with_format(file, ImageFormat::Png).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Reproducible bytes (Knuth's MMIX generator).
struct Noise(u64);

impl Noise {
    fn byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0.to_be_bytes()[0]
    }
}
