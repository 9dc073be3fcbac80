//! Lookup of the weights that draw samples: a generator's, or those of a package.

use std::path::PathBuf;

use clap::Args;
use ganglion_proto::out;
use ganglion_proto::progress::Progress;
use ganglion_storage::run::{self, RunError, RunName};
use safetensors::SafeTensors;
use tch::Tensor;
use tracing::Level;

use crate::commands::error::Failure;
use crate::data::ImageShape;
use crate::objective::package::{PackageSamples, in_turn};
use crate::random::{Key, Purpose};
use crate::sampling::{Generator, WEIGHTS_FILE};

/// File of a transformer's weights.
pub(crate) struct TransformerFile {
    /// Name of the file.
    pub name: String,
    /// Content of the file.
    pub bytes: Vec<u8>,
    /// Name and text of its run's job, if the run is known.
    pub job: Option<(String, String)>,
}

/// Name of the averaged generator's file in a checkpoint's folder.
const GENERATOR: &str = "generator_ema.safetensors";

/// Which generator draws.
#[derive(Args, Clone, Debug)]
pub(crate) struct Weights {
    /// The run: its folder, its name in runs/, or an address; by default the newest in runs/. RUN@best is its
    /// best checkpoint, RUN@5000 that of a step, and RUN the newest. Also a checkpoint's folder or file.
    #[arg(value_name = "RUN[@best|@STEP]")]
    run: Option<RunName>,
    /// The run, as earlier versions had it.
    #[arg(long, value_name = "RUN", hide = true, conflicts_with = "run")]
    checkpoint: Option<RunName>,
    /// TorchScript file of the generator, for a run with networks of your own, if it has moved.
    #[arg(long, value_name = "FILE")]
    generator: Option<PathBuf>,
    /// Package of the run, for a run of one, if it has moved.
    #[arg(long, value_name = "FILE")]
    package: Option<PathBuf>,
}

/// Weights that draw samples.
pub(crate) enum Painter {
    /// A generator.
    Generator(Generator),
    /// The graph of a package.
    Package(PackageSamples),
}

/// Weights that draw samples, and where they were found.
pub(crate) struct Found {
    /// Name of their file.
    pub name: String,
    pub painter: Painter,
    /// Name and text of its run's job, if the run is known.
    pub job: Option<(String, String)>,
}

impl Weights {
    /// Whether anything was named.
    pub(crate) fn is_given(&self) -> bool {
        self.run.is_some() || self.checkpoint.is_some() || self.generator.is_some() || self.package.is_some()
    }

    /// The run, or the place of the weights; `None` for the newest run.
    pub(crate) fn name(&self) -> Option<&RunName> {
        self.run.as_ref().or(self.checkpoint.as_ref())
    }

    /// Finds and reads the weights of a transformer; `None` if there are none.
    pub(crate) fn transformer(&self) -> Option<TransformerFile> {
        let read = run::read(self.name(), WEIGHTS_FILE).ok()?;
        if model_of(&read.bytes).as_deref() != Some("transformer") {
            return None;
        }
        if let Some(told) = read.told {
            out::tell(Level::INFO, &told);
        }
        Some(TransformerFile { name: read.name, bytes: read.bytes.to_vec(), job: read.job })
    }

    /// Finds and reads the weights.
    ///
    /// # Errors
    /// There are no weights, or they cannot be read.
    pub(crate) fn open(&self) -> Result<Found, Failure> {
        if self.transformer().is_some() {
            return Err(Failure::Input(
                "the run trains a transformer, which has no generator; worker sample draws from it, worker eval evaluates it"
                    .to_string(),
            ));
        }
        let name = self.name();
        // A run has one of the two; where it has none, the usual one is told to be missing.
        let read = run::read(name, GENERATOR).or_else(|missing| {
            run::read(name, WEIGHTS_FILE).map_err(|other| match (&missing, &other) {
                (RunError::NoFile(_), RunError::Input(_) | RunError::Storage(_)) => other,
                _ => missing,
            })
        })?;
        if let Some(told) = read.told {
            // Beside the answer: that is for programs as well.
            out::tell(Level::INFO, &told);
        }
        let painter = match is_of_package(&read.bytes) {
            true => Painter::Package(PackageSamples::read(&read.name, &read.bytes, self.package.as_deref())?),
            false => Painter::Generator(Generator::read(&read.name, &read.bytes, self.generator.as_deref())?),
        };
        Ok(Found { name: read.name, painter, job: read.job })
    }
}

/// Whether a file's header says that the weights are a package's.
fn is_of_package(bytes: &[u8]) -> bool {
    model_of(bytes).as_deref() == Some("package")
}

/// Model that a file's header names.
fn model_of(bytes: &[u8]) -> Option<String> {
    let header = SafeTensors::read_metadata(bytes).ok().and_then(|(_, header)| header.metadata().clone());
    header?.remove("model")
}

impl Painter {
    /// Shape of the samples.
    pub(crate) fn shape(&self) -> ImageShape {
        match self {
            Painter::Generator(generator) => generator.shape(),
            Painter::Package(samples) => samples.shape(),
        }
    }

    /// Number of classes that samples are drawn of; 0 for none.
    pub(crate) fn classes(&self) -> u32 {
        match self {
            Painter::Generator(generator) => generator.classes(),
            Painter::Package(samples) => samples.classes(),
        }
    }

    /// Names of the classes by their numbers; empty where they are numbers.
    pub(crate) fn class_names(&self) -> &[String] {
        match self {
            Painter::Generator(generator) => generator.class_names(),
            Painter::Package(samples) => samples.class_names(),
        }
    }

    /// A class for each of `count` samples, in turn.
    pub(crate) fn classes_in_turn(&self, count: u32) -> Vec<u32> {
        in_turn(self.classes(), count)
    }

    /// Draws `count` samples, (count, c, h, w) in [-1, 1], of the classes in turn.
    pub(crate) fn draw_counted(
        &self,
        purpose: Purpose,
        seed: u64,
        count: u32,
        progress: &Progress,
    ) -> Tensor {
        match self {
            Painter::Generator(generator) => generator.draw_counted(purpose, seed, count, progress),
            Painter::Package(samples) => samples.draw(
                Key { seed, step: 0, phase: 0, shard: 0, purpose },
                0,
                &self.classes_in_turn(count),
                progress,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        weights: Weights,
    }

    /// As an argument, and as the option of earlier versions.
    #[test]
    fn a_run_is_named_in_either_way() {
        for arguments in [&["worker", "x@best"][..], &["worker", "--checkpoint", "x@best"]] {
            let Weights { run, checkpoint, .. } = Cli::parse_from(arguments).weights;
            assert_eq!(run.or(checkpoint), "x@best".parse().ok());
        }
        assert!(Cli::try_parse_from(["worker", "a", "--checkpoint", "b"]).is_err());
        assert!(!Cli::parse_from(["worker"]).weights.is_given());
    }
}
