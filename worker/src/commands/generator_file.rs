//! Lookup of a generator's weights.

use std::path::PathBuf;

use clap::Args;
use ganglion_proto::out;
use ganglion_storage::run::{self, RunName};
use tracing::Level;

use crate::commands::error::Failure;
use crate::sampling::Generator;

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
}

/// A generator, and where it was found.
pub(crate) struct Found {
    /// Name of its file.
    pub name: String,
    pub generator: Generator,
    /// Name and text of its run's job, if the run is known.
    pub job: Option<(String, String)>,
}

impl Weights {
    /// Whether anything was named.
    pub(crate) fn is_given(&self) -> bool {
        self.run.is_some() || self.checkpoint.is_some() || self.generator.is_some()
    }

    /// Finds and reads the weights.
    ///
    /// # Errors
    /// There are no weights, or they cannot be read.
    pub(crate) fn open(&self) -> Result<Found, Failure> {
        let read = run::read(self.run.as_ref().or(self.checkpoint.as_ref()), GENERATOR)?;
        if let Some(told) = read.told {
            // Beside the answer: that is for programs as well.
            out::tell(Level::INFO, &told);
        }
        let generator = Generator::read(&read.name, &read.bytes, self.generator.as_deref())?;
        Ok(Found { name: read.name, generator, job: read.job })
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
