//! Claims about the checkpoints on the storage.
//!
//! 1. A checkpoint that is removed while it is read is ignored. It loses its manifest first, which
//!    identifies this case.
//! 2. A checkpoint with a damaged file takes part in no other claim: its state is not the saved one.
//!
//! Memory: the files of one checkpoint at a time.

use std::collections::BTreeMap;

use ganglion_membership::Checkpoint;
use ganglion_proto::progress::Progress;
use ganglion_proto::record::{RunEvent, SavedCheckpoint};
use ganglion_proto::words::counted;
use ganglion_storage::{Bytes, Error, MANIFEST, Storage, in_folder, reason};
use safetensors::tensor::{SafeTensors, TensorView};

use super::evidence::{Evidence, silent};
use super::{Claim, NoRun};

/// All checkpoints that have a manifest, by folder.
pub(super) struct Whole(Vec<(String, Found)>);

enum Found {
    /// Removed while it was read.
    Gone,
    /// Damaged files, with a description of each.
    Damaged(Vec<String>),
    /// All files agree with the manifest.
    Intact { files: usize, bytes: u64, state: Result<State, String> },
}

/// State read from a checkpoint's files.
pub(super) struct State {
    /// `state_digest`: blake3 over all tensors.
    pub(super) digest: String,
    /// Update index stored in the state itself.
    pub(super) position: u64,
    /// Sample checksum (`ledger`) stored in the state itself.
    pub(super) ledger: u64,
}

impl Whole {
    /// Reads every file of every checkpoint.
    pub(super) fn read(evidence: &Evidence, progress: &Progress) -> Result<Whole, NoRun> {
        progress.part("checkpoints read", evidence.manifests.len() as u64);
        let storage = evidence.storage.storage();
        let read = evidence.storage.wait(async {
            let mut all = Vec::new();
            for (folder, manifest) in &evidence.manifests {
                let found = match manifest {
                    Ok(checkpoint) => Found::read(storage, folder, checkpoint).await?,
                    Err(reason) => Found::Damaged(vec![reason.clone()]),
                };
                // Asked after the files were read: a removal begins with the manifest, so damage that is
                // only a removal shows here (1).
                let gone = !storage.exists(&in_folder(folder, MANIFEST)).await?;
                all.push((folder.clone(), if gone { Found::Gone } else { found }));
                progress.add(1);
            }
            Ok(Whole(all))
        });
        read.map_err(|error| silent(storage, &error))
    }

    /// Readable states, by folder.
    pub(super) fn states(&self) -> impl Iterator<Item = (&str, &State)> {
        self.0.iter().filter_map(|(folder, found)| match found {
            Found::Intact { state: Ok(state), .. } => Some((folder.as_str(), state)),
            _ => None,
        })
    }
}

impl Found {
    async fn read(storage: &Storage, folder: &str, checkpoint: &Checkpoint) -> Result<Found, Error> {
        let (mut damaged, mut parts, mut bytes) = (Vec::new(), Vec::new(), 0);
        for file in &checkpoint.files {
            let content = match read_inside(storage, folder, &file.file).await? {
                Ok(content) => content,
                Err(wrong) => {
                    damaged.push(format!("{}: {wrong}", file.file));
                    continue;
                }
            };
            if content.len() as u64 != file.bytes || blake3::hash(&content).to_hex().as_str() != file.blake3 {
                damaged.push(format!("{} does not have the manifest's hash", file.file));
            } else if file.file.starts_with("state-") {
                parts.push(content);
                bytes += file.bytes;
            } else {
                bytes += file.bytes;
            }
        }
        if !damaged.is_empty() {
            return Ok(Found::Damaged(damaged));
        }
        Ok(Found::Intact { files: checkpoint.files.len(), bytes, state: State::of(&parts) })
    }
}

/// Reads a file of a folder; the inner error describes the damage. A manifest that names a path
/// outside the folder is not followed there.
async fn read_inside(storage: &Storage, folder: &str, file: &str) -> Result<Result<Bytes, String>, Error> {
    if file.contains('/') || file == ".." {
        return Ok(Err("not a name of a file in the folder".to_string()));
    }
    match storage.read(&in_folder(folder, file)).await {
        Err(error) if storage.is_away(&error) => Err(error),
        read => Ok(read.map_err(|error| reason(&error))),
    }
}

impl State {
    /// Reads the state from the content of these parts.
    pub(super) fn of(parts: &[Bytes]) -> Result<State, String> {
        let mut tensors: BTreeMap<String, TensorView<'_>> = BTreeMap::new();
        for part in parts {
            let part = SafeTensors::deserialize(part).map_err(|error| error.to_string())?;
            for (name, tensor) in part.tensors() {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(format!("{name} is in two parts"));
                }
            }
        }
        let counter = |name: &str| {
            let tensor = tensors.get(name).ok_or_else(|| format!("no part has {name}"))?;
            tensor.data().try_into().map(u64::from_le_bytes).map_err(|_| format!("{name} is not one number"))
        };
        let (position, ledger) = (counter("counters.position")?, counter("counters.ledger")?);
        Ok(State { digest: digest(&tensors), position, ledger })
    }
}

/// blake3 over all tensors by name, in hex: name, NUL, dtype, NUL, rank and shape as u64, elements;
/// little-endian.
fn digest(tensors: &BTreeMap<String, TensorView<'_>>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, tensor) in tensors {
        hasher
            .update(name.as_bytes())
            .update(&[0])
            .update(tensor.dtype().to_string().as_bytes())
            .update(&[0]);
        hasher.update(&(tensor.shape().len() as u64).to_le_bytes());
        for size in tensor.shape() {
            hasher.update(&(*size as u64).to_le_bytes());
        }
        hasher.update(tensor.data());
    }
    hasher.finalize().to_hex().to_string()
}

/// Claims that every file of a checkpoint has the length and the hash in its manifest.
pub(super) fn files_are_whole(whole: &Whole) -> Claim {
    let mut claim = Claim::new("every file of a checkpoint has its manifest's hash");
    let [mut checkpoints, mut all_files, mut gone] = [0; 3];
    let mut all_bytes = 0;
    for (folder, found) in &whole.0 {
        match found {
            Found::Gone => gone += 1,
            Found::Damaged(reasons) => {
                reasons.iter().for_each(|reason| claim.breach(format!("checkpoint {folder}: {reason}")));
            }
            Found::Intact { files, bytes, .. } => {
                checkpoints += 1;
                all_files += files;
                all_bytes += bytes;
            }
        }
    }
    let removed = if gone == 0 { String::new() } else { format!("; {gone} removed meanwhile") };
    let (files, checkpoints) = (counted(all_files, "file"), counted(checkpoints, "checkpoint"));
    claim.of(format!("{files}, {}, of {checkpoints}{removed}", counted(all_bytes, "byte")))
}

/// Claims that the state in a checkpoint's parts has the manifest's digest and update index, and
/// that this index is the end of its step and phases.
pub(super) fn states_have_their_digests(evidence: &Evidence, whole: &Whole) -> Claim {
    let mut claim = Claim::new("every state in a checkpoint has its manifest's digest and position");
    let mut judged = 0;
    for ((folder, found), (_, manifest)) in whole.0.iter().zip(&evidence.manifests) {
        let (Found::Intact { state, .. }, Ok(checkpoint)) = (found, manifest) else { continue };
        judged += 1;
        let state = match state {
            Ok(state) => state,
            Err(reason) => {
                claim.breach(format!("checkpoint {folder}: {reason}"));
                continue;
            }
        };
        claim.expect(state.digest == checkpoint.state_digest, || {
            format!("checkpoint {folder}: its tensors give {}, not {}", state.digest, checkpoint.state_digest)
        });
        let position = evidence.end_of(checkpoint.step).saturating_add(u64::from(checkpoint.phase));
        claim.expect(state.position == checkpoint.position.0 && state.position == position, || {
            format!(
                "checkpoint {folder}: its state is at position {}, its manifest at {}, its step and phase at {position}",
                state.position, checkpoint.position
            )
        });
    }
    claim.of(counted(judged, "state"))
}

/// Claims that each checkpoint that a coordinator announced was journaled before, with the same
/// update index and digest. Workers that lost their coordinator write others; these are journaled
/// when a coordinator continues from them.
pub(super) fn journal_agrees(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("every checkpoint is as it was journaled");
    let [mut present, mut alone] = [0; 2];
    let told = |step: u64, phase: u32| {
        let same = |saved: &SavedCheckpoint| (saved.step, saved.phase) == (step, phase);
        evidence.events().any(|event| matches!(event, RunEvent::Checkpoint(saved) if same(saved)))
    };
    for (folder, manifest) in &evidence.manifests {
        let Ok(checkpoint) = manifest else { continue };
        claim.expect(checkpoint.folder() == *folder, || {
            format!("checkpoint {folder} has the manifest of {}", checkpoint.folder())
        });
        let at = (checkpoint.step, u64::from(checkpoint.phase));
        let row = evidence.history.checkpoints.iter().find(|row| (row.step, row.phase) == at);
        match row {
            None => {
                // Workers past their lease write without a coordinator (M11).
                alone += 1;
                let is_told = told(checkpoint.step, checkpoint.phase);
                claim.expect(!is_told && evidence.latest.as_ref() != Some(folder), || {
                    format!("checkpoint {folder} was never journaled")
                });
            }
            Some(row) => {
                present += 1;
                claim.expect(row.state_digest == checkpoint.state_digest, || {
                    format!("checkpoint {folder} is journaled with digest {}", row.state_digest)
                });
                claim.expect(row.position == checkpoint.position.0, || {
                    format!("checkpoint {folder} is journaled at position {}", row.position)
                });
            }
        }
    }
    let absent = evidence.history.checkpoints.len().saturating_sub(present);
    claim.of(format!(
        "{present} present; {absent} removed since, or not written yet; {alone} written by workers without a coordinator"
    ))
}

/// Claims that `latest` names an existing checkpoint, and that no newer one was announced. A
/// manifest may be newer by the moment between the two writes, in which a coordinator can also die.
/// Where a start found the newest checkpoint damaged or missing, and reported that, earlier
/// announcements no longer count.
pub(super) fn latest_is_newest(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("latest names the newest checkpoint");
    let mut told = None;
    for event in evidence.events() {
        match event {
            // The run went back behind it with the user's knowledge, and may announce lower ones now.
            RunEvent::CheckpointDamaged { .. } | RunEvent::CheckpointMissing { .. } => told = None,
            RunEvent::Checkpoint(saved) => {
                told = told.max(Some(evidence.end_of(saved.step).saturating_add(saved.phase.into())));
            }
            _ => {}
        }
    }
    let Some(latest) = &evidence.latest else {
        claim.expect(told.is_none(), || "there is no latest, though a checkpoint was committed".to_string());
        return claim.of("no checkpoint yet".to_string());
    };
    let named = evidence.checkpoints().find(|checkpoint| checkpoint.folder() == *latest);
    match named {
        None => claim.breach(format!("latest names {latest}, which is no checkpoint")),
        Some(named) => claim.expect(told.is_none_or(|told| told <= named.position.0), || {
            let told = told.unwrap_or(0);
            format!(
                "latest names {latest} at position {}, though one at {told} was committed",
                named.position
            )
        }),
    }
    claim.of(latest.clone())
}
