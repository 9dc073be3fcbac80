//! Lookup of a generator's weights.

use std::path::{Path, PathBuf};

use clap::Args;
use ganglion_storage::{Address, Blocking, Bytes, Error, LATEST, Path as StoragePath, Storage, reason};

use crate::commands::error::Failure;
use crate::sampling::Generator;

/// Name of the averaged generator's file in a checkpoint's folder.
const GENERATOR: &str = "generator_ema.safetensors";

/// Which generator draws.
#[derive(Args, Clone, Debug)]
pub(crate) struct Weights {
    /// A checkpoint's folder, a run's folder, or a generator_ema.safetensors. The place may be in an object
    /// store.
    #[arg(long, value_name = "PATH|URL")]
    pub checkpoint: String,
    /// The TorchScript file of the generator, of a run with networks of its own, if it is not where it was.
    #[arg(long, value_name = "FILE")]
    pub generator: Option<PathBuf>,
}

impl Weights {
    /// Finds and reads the weights: returns the name of the file, and the generator.
    ///
    /// # Errors
    /// There are no weights, or they cannot be read.
    pub(crate) fn open(&self) -> Result<(String, Generator), Failure> {
        let (name, bytes) = find(&self.checkpoint)?;
        let generator = Generator::read(&name, &bytes, self.generator.as_deref())?;
        Ok((name, generator))
    }
}

/// Finds the weights under a file, a checkpoint's folder, a storage, or a run's folder.
fn find(place: &str) -> Result<(String, Bytes), Failure> {
    let shown = if Address::is_secret(place) { "..." } else { place };
    let input = |what: &str| Failure::Input(format!("--checkpoint {shown}: {what}"));
    if Path::new(place).is_file() {
        let bytes = std::fs::read(place).map_err(|error| input(&error.to_string()))?;
        return Ok((place.to_string(), bytes.into()));
    }
    let absent =
        || input(&format!("no {GENERATOR} there; give a folder such as runs/NAME/checkpoints/step-00001000"));
    let (root, file) = match place.rsplit_once('/') {
        Some((root, file)) if file.ends_with(".safetensors") => (root, Some(file)),
        _ => (place, None),
    };
    let address = Address::parse(root).map_err(|what| input(&what.to_string()))?;
    if matches!(&address, Address::Folder(folder) if !folder.is_dir()) {
        return Err(absent());
    }
    let storage = Storage::open(&address).map_err(|what| input(&what))?;
    let storage = Blocking::new(storage).map_err(Failure::other)?;
    let found = storage.wait(find_in(storage.storage(), file));
    let (name, bytes) = found.map_err(|error| input(&reason(&error)))?.ok_or_else(absent)?;
    Ok((format!("{root}/{name}"), bytes))
}

async fn find_in(storage: &Storage, file: Option<&str>) -> Result<Option<(String, Bytes)>, Error> {
    let mut places = vec![file.unwrap_or(GENERATOR).to_string()];
    for root in ["", "checkpoints/"] {
        let latest = StoragePath::from(format!("{root}{LATEST}"));
        if let (None, Some(folder)) = (file, storage.text(&latest).await?) {
            places.push(format!("{root}{}/{GENERATOR}", folder.trim()));
        }
    }
    for place in places {
        match storage.read(&StoragePath::from(place.as_str())).await {
            Ok(bytes) => return Ok(Some((place, bytes))),
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
