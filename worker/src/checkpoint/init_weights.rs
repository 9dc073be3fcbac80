//! Initial weights from another run's checkpoint.
//!
//! 1. All networks' parameters and buffers and the moving averages are taken; moments, counters and the
//!    objective's own tensors begin anew.
//! 2. Every file is verified against the manifest's hash. The checkpoint's digest goes into the fingerprint
//!    of the environment (`passport`), so all workers of a run begin with the same one.

use std::collections::BTreeMap;
use std::time::Duration;

use ganglion_proto::evaluation::NOT_FINITE;
use ganglion_proto::manifest;
use ganglion_storage::{Address, Blocking, MANIFEST, Path, Storage, reason};
use safetensors::SafeTensors;
use tch::{Device, no_grad};

use super::EARLIER;
use crate::nn::is_finite;
use crate::nn::tensor_bytes::from_bytes;
use crate::state::{NamedTensor, State, StateLayout, narrow};

/// Limit on the time to read the files from a storage.
const LIMIT: Duration = Duration::from_secs(600);

/// Initial weights of a run.
#[derive(Debug)]
pub struct Beginning {
    tensors: Vec<(NamedTensor, Vec<u8>)>,
    digest: String,
}

impl Beginning {
    /// Reads the checkpoint in the folder `place`, for networks of this layout.
    ///
    /// # Errors
    /// The problem with the place or its content, and how to fix it.
    pub fn read(place: &str, layout: &StateLayout) -> Result<Beginning, String> {
        // The address may hold credentials, which must not be shown.
        let shown = if Address::is_secret(place) { "..." } else { place };
        let wrong = |what: String| format!("model.init_from: {shown}: {what}");
        let address = Address::parse(place).map_err(|error| wrong(error.to_string()))?;
        if matches!(&address, Address::Folder(folder) if !folder.is_dir()) {
            return Err(wrong(
                "is no folder; give that of a checkpoint, such as runs/NAME/checkpoints/step-00001000".into(),
            ));
        }
        let storage = Storage::open(&address).map_err(wrong)?;
        let storage = Blocking::new(storage).map_err(|error| wrong(error.to_string()))?;
        // Nothing of the run is there yet, so there is nothing else to do meanwhile; the limit ends it.
        let read = storage.wait(async { tokio::time::timeout(LIMIT, read_all(storage.storage())).await });
        let read = read.map_err(|_| wrong("the storage does not answer".to_string()))?;
        let (files, digest) = read.map_err(wrong)?;
        let tensors = take(layout, &files).map_err(wrong)?;
        Ok(Beginning { tensors, digest })
    }

    /// Digest of the state that the weights come from.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Returns the state at update index 0 with these weights.
    pub fn state(&self, layout: &StateLayout, seed: u64, device: Device) -> State {
        let state = State::initial(layout.clone(), seed, device);
        no_grad(|| {
            for (tensor, bytes) in &self.tensors {
                // Into the flat buffer; moments and counters stay as `initial` made them.
                narrow(&state.flat, tensor.range.clone()).copy_(&from_bytes(bytes));
            }
        });
        // Passes in bf16 read casts, which have to be of these weights.
        state.cast();
        state
    }
}

/// Reads the files that hold a checkpoint's state, in the manifest's order, and the state's digest.
async fn read_all(storage: &Storage) -> Result<(Vec<Vec<u8>>, String), String> {
    let about = storage.text(&Path::from(MANIFEST)).await.map_err(|error| reason(&error))?;
    let about = about.ok_or_else(|| format!("has no {MANIFEST}; give the folder of a checkpoint"))?;
    let checkpoint = manifest::parse(&about).map_err(|error| format!("{MANIFEST}: {error}"))?;
    let mut files = Vec::new();
    for file in checkpoint.state_files() {
        let bytes = storage.read(&Path::from(file.file.as_str())).await.map_err(|error| reason(&error))?;
        if blake3::hash(&bytes).to_hex().to_string() != file.blake3 {
            return Err(format!("{} does not have the manifest's hash; get it again", file.file));
        }
        files.push(bytes.to_vec());
    }
    Ok((files, checkpoint.state_digest))
}

/// Takes the weights of a layout's networks from files, which must be of the same networks.
fn take(layout: &StateLayout, files: &[Vec<u8>]) -> Result<Vec<(NamedTensor, Vec<u8>)>, String> {
    const MEND: &str = "set model.kind, width, latent_dim and conditional as that run had them";
    let prefixes = layout.weight_prefixes();
    let is_taken = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
    let mut wanted: BTreeMap<String, NamedTensor> =
        layout.tensors().into_iter().map(|t| (t.name.clone(), t)).collect();
    // The objective's own tensors begin anew (invariant 1).
    wanted.retain(|name, _| is_taken(name));
    let mut tensors = Vec::new();
    for file in files {
        let read = SafeTensors::deserialize(file).map_err(|error| error.to_string())?;
        for (name, tensor) in read.iter().filter(|(name, _)| is_taken(name)) {
            let place = wanted
                .remove(name)
                .ok_or_else(|| format!("has {name}, which this job's networks lack; {MEND}"))?;
            let shape: Vec<i64> =
                tensor.shape().iter().filter_map(|size| i64::try_from(*size).ok()).collect();
            // Of f32, whatever type the file claims.
            if shape != place.shape || tensor.data().len() != 4 * place.range.len() {
                return Err(format!(
                    "has {name} of shape {shape:?}, and this job of {:?}; {MEND}",
                    place.shape
                ));
            }
            if !is_finite(&from_bytes(tensor.data())) {
                return Err(format!("has {name} that is {NOT_FINITE}; {EARLIER}"));
            }
            tensors.push((place, tensor.data().to_vec()));
        }
    }
    // A network that is only partly there would be trained from a mixture.
    match wanted.keys().next() {
        Some(name) => Err(format!("lacks {name}; {MEND}")),
        None => Ok(tensors),
    }
}
