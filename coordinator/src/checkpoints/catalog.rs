//! The run's checkpoint storage: manifests, the newest valid checkpoint, and retention.
//!
//! 1. A folder without a manifest is not a checkpoint.
//! 2. A manifest is created once, after all its files are there; `latest` moves after that, and is
//!    only a hint.
//! 3. Before a run starts from a checkpoint, every file is read and its hash compared.
//! 4. An unreachable storage proves nothing about its contents: nothing is called damaged or absent
//!    because of it.

use ganglion_membership::{Checkpoint, StoredFile};
use ganglion_proto::record::MetricsRow;
use ganglion_proto::{failpoint, manifest, rows};
use ganglion_storage::{
    Address, BEST, Claim, Error, LATEST, MANIFEST, MODEL_CARD, Path, PutPayload, Storage, in_folder, reason,
    whole,
};

use crate::checkpoints::retry::Patience;

/// The checkpoint storage of one run.
#[derive(Clone)]
pub struct Checkpoints {
    storage: Storage,
}

/// A checkpoint that cannot be used, and the reason.
#[derive(Debug)]
pub struct Damaged {
    /// Folder of the checkpoint.
    pub folder: String,
    /// Description of the damage.
    pub reason: String,
}

/// Contents of a checkpoint's folder.
enum Contents {
    /// All files of the manifest.
    Whole(Checkpoint),
    /// No manifest: the checkpoint was never valid.
    Unfinished,
    /// Something else; with the damage.
    Damaged(String),
}

/// Reason why a run cannot use a storage.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// The user's choice is wrong.
    #[error("checkpoint.url {0}")]
    Input(String),
    /// The storage was unreachable for too long.
    #[error("checkpoint.url {0}")]
    Away(String),
}

impl Checkpoints {
    /// Opens a storage for a run and marks it as the run's. A folder is created; an object store
    /// that is unreachable is waited for.
    pub async fn open(address: &str, run: &str, patience: &Patience) -> Result<Checkpoints, Unusable> {
        let input =
            |address: &dyn std::fmt::Display, what: &str| Unusable::Input(format!("{address}: {what}"));
        let address = Address::parse(address).map_err(|wrong| Unusable::Input(wrong.to_string()))?;
        let is_folder = matches!(address, Address::Folder(_));
        let unusable = |what: &str| match &address {
            Address::Folder(folder) => {
                let what = format!("{what}; choose a folder that this user can write to");
                input(&folder.display(), &what)
            }
            Address::Cloud(url) => {
                let what =
                    format!("{what}; name a bucket that is there, and credentials that may write to it");
                input(url, &what)
            }
        };
        if let Address::Folder(folder) = &address {
            whole::create_folders(folder).map_err(|error| unusable(&error.to_string()))?;
        }
        let storage = Storage::open(&address)
            .map_err(|what| if is_folder { unusable(&what) } else { input(&address, &what) })?;
        let claimed = patience.wait_for(&storage, async || storage.claim(run).await).await;
        match claimed {
            Ok(Claim::Granted) => {
                // Only after the claim: another run's files must not be touched.
                if let Err(error) = storage.sweep().await {
                    tracing::warn!(
                        "{address}: unfinished files of writers that were killed cannot be removed: {}",
                        reason(&error)
                    );
                }
                Ok(Checkpoints { storage })
            }
            Ok(Claim::Taken) => Err(input(&address, "holds another run's checkpoints; choose another place")),
            Ok(Claim::Unsafe) => Err(input(
                &address,
                "its server replaces files that it was asked to keep (it ignores If-None-Match); use one that does not",
            )),
            Err(error) if storage.is_away(&error) => Err(Unusable::Away(patience.over(&storage, &error))),
            Err(error) if storage.is_failing(&error) => Err(Unusable::Away(format!(
                "{address}: {}; once that is mended, the same command goes on, and nothing is lost",
                reason(&error)
            ))),
            Err(error) => Err(unusable(&reason(&error))),
        }
    }

    /// Reason why a storage cannot hold anything of a run, if there is one. Nothing is created or
    /// written there.
    pub async fn absence(address: &str, patience: &Patience) -> Result<Option<String>, Unusable> {
        let address = Address::parse(address).map_err(|wrong| Unusable::Input(wrong.to_string()))?;
        if let Address::Folder(folder) = &address
            && !folder.exists()
        {
            return Ok(Some("there is no such folder".to_string()));
        }
        let storage =
            Storage::open(&address).map_err(|what| Unusable::Input(format!("{address}: {what}")))?;
        let look = async || Ok(storage.owner().await?.is_none() && storage.checkpoints().await?.is_empty());
        match patience.wait_for(&storage, look).await {
            Ok(empty) => Ok(empty.then(|| "there is nothing of any run".to_string())),
            Err(error) if storage.is_away(&error) => Err(Unusable::Away(patience.over(&storage, &error))),
            Err(error) => Err(Unusable::Input(format!("{address}: {}", reason(&error)))),
        }
    }

    /// The underlying storage.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Makes a checkpoint valid: its manifest, then `latest`. Idempotent. Returns whether it is
    /// valid: a checkpoint that is no longer wanted once the manifest is written is withdrawn.
    pub async fn commit(&self, checkpoint: &Checkpoint, is_wanted: impl Fn() -> bool) -> Result<bool, Error> {
        let text = manifest::render(checkpoint);
        let hash = blake3::hash(text.as_bytes()).to_hex();
        let folder = checkpoint.folder();
        // A manifest of another state may lie there. It is evidence, and `create` replaces it.
        self.set_aside_other(checkpoint).await?;
        self.storage.create(&in_folder(&folder, MANIFEST), &PutPayload::from(text), hash.as_str()).await?;
        // Numbered by step: the checkpoint is valid, and `latest` does not name it.
        failpoint::reached("manifest", checkpoint.step);
        // It may have been given up while the storage took the manifest. Asked before `latest` moves,
        // since a checkpoint that `latest` names stays.
        if !is_wanted() {
            return self.withdraw(checkpoint).await.map(|()| false);
        }
        // After the manifest, so that `latest` never names a folder without one.
        self.storage.replace(&Path::from(LATEST), &PutPayload::from(format!("{folder}\n"))).await?;
        Ok(true)
    }

    /// Removes the manifest of a checkpoint that must not count, where it was written. `latest`
    /// does not name it yet.
    pub async fn withdraw(&self, checkpoint: &Checkpoint) -> Result<(), Error> {
        let folder = checkpoint.folder();
        let there = self.storage.text(&in_folder(&folder, MANIFEST)).await?;
        let is_it = there.and_then(|text| manifest::parse(&text).ok());
        // Another state's manifest in the same place may be a valid one.
        match is_it.is_some_and(|there| there.state_digest == checkpoint.state_digest) {
            true => self.storage.withdraw(&folder).await,
            false => Ok(()),
        }
    }

    /// Copies the manifest of another state that lies where a checkpoint's is to be written to a name
    /// of its own.
    async fn set_aside_other(&self, checkpoint: &Checkpoint) -> Result<(), Error> {
        let (folder, digest) = (checkpoint.folder(), &checkpoint.state_digest);
        let Some(text) = self.storage.text(&in_folder(&folder, MANIFEST)).await? else { return Ok(()) };
        let there = manifest::parse(&text).ok().filter(|there| there.state_digest != *digest);
        let Some(there) = there else { return Ok(()) };
        let aside = format!("manifest-{:.16}.json", there.state_digest);
        tracing::warn!(
            "{folder} has a manifest of another state, which is kept as {aside}: {}",
            there.state_digest
        );
        // An earlier attempt may have written the copy already.
        match self.storage.put_new(&in_folder(&folder, &aside), &PutPayload::from(text)).await {
            Err(Error::AlreadyExists { .. }) => Ok(()),
            kept => kept,
        }
    }

    /// Finds the newest checkpoint whose files are whole; also returns the newer ones that are not.
    pub async fn newest_valid(&self) -> Result<(Option<Checkpoint>, Vec<Damaged>), Error> {
        let mut damaged = Vec::new();
        // Newest first, by step: `latest` is not asked, because it may lag behind or be damaged.
        for folder in self.storage.checkpoints().await?.into_iter().rev() {
            match self.read(&folder).await? {
                Contents::Whole(checkpoint) => return Ok((Some(checkpoint), damaged)),
                // Not damage: its writers died, or its manifest was still to come.
                Contents::Unfinished => {}
                Contents::Damaged(reason) => damaged.push(Damaged { folder, reason }),
            }
        }
        Ok((None, damaged))
    }

    /// Rows up to a step that were left by workers that ended without a coordinator.
    pub async fn left_rows(&self, last_step: u64) -> Result<Vec<MetricsRow>, Error> {
        let mut found = Vec::new();
        for folder in self.storage.checkpoints().await? {
            for file in self.storage.files(&folder).await? {
                if rows::is_file(&file) {
                    let content = self.storage.read(&in_folder(&folder, &file)).await?;
                    // A torn file is of a worker that died while writing; others may have left the
                    // same rows.
                    found.extend(rows::decode(&content).unwrap_or_default());
                }
            }
        }
        // Rows beyond the checkpoint are of steps that are computed again.
        found.retain(|row: &MetricsRow| row.step <= last_step);
        found.sort_by_key(|row| row.step);
        Ok(found)
    }

    /// Reads a folder's manifest and checks its files.
    async fn read(&self, folder: &str) -> Result<Contents, Error> {
        let text = match self.storage.text(&in_folder(folder, MANIFEST)).await {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(Contents::Unfinished),
            Err(error) => return wrong(&self.storage, MANIFEST, error).map(Contents::Damaged),
        };
        let checkpoint = match manifest::parse(&text) {
            Ok(checkpoint) if checkpoint.folder() == folder => checkpoint,
            Ok(other) => return Ok(Contents::Damaged(format!("{MANIFEST} is of {}", other.folder()))),
            Err(error) => return Ok(Contents::Damaged(error.to_string())),
        };
        let damage = check_files(&self.storage, &checkpoint).await?;
        Ok(damage.map_or(Contents::Whole(checkpoint), Contents::Damaged))
    }

    /// Writes `best.json` and the model card.
    pub async fn name_best(&self, named: &str, card: &str) -> Result<(), Error> {
        // The card first: what `best.json` names has its description by then.
        for (file, content) in [(MODEL_CARD, card), (BEST, named)] {
            self.storage.replace(&Path::from(file), &PutPayload::from(content.to_string())).await?;
        }
        Ok(())
    }

    /// Removes all but the newest `keep` checkpoints (0 keeps all) and those in `protected`, and
    /// the remains of failed attempts before them.
    pub async fn prune(&self, keep: u64, protected: &[String]) -> Result<(), Error> {
        let mut kept = 0;
        for folder in self.storage.checkpoints().await?.iter().rev() {
            if keep == 0 && kept == 2 {
                // Remains of failed attempts before these were removed when the older of them was new.
                return Ok(());
            }
            let is_checkpoint = self.storage.exists(&in_folder(folder, MANIFEST)).await?;
            if is_checkpoint && (keep == 0 || kept < keep) {
                kept += 1;
            } else if kept > 0 && !(is_checkpoint && protected.contains(folder)) {
                self.storage.remove(folder).await?;
            }
        }
        Ok(())
    }
}

/// Checks the files of a checkpoint: each must be there and have the manifest's hash. Returns the
/// damage, if there is any.
pub(crate) async fn check_files(storage: &Storage, checkpoint: &Checkpoint) -> Result<Option<String>, Error> {
    for StoredFile { file, blake3, .. } in &checkpoint.files {
        let damage = match storage.hash(&in_folder(&checkpoint.folder(), file)).await {
            Ok(hash) if hash == *blake3 => continue,
            Ok(_) => format!("{file} does not have the manifest's hash"),
            Err(error) => wrong(storage, file, error)?,
        };
        return Ok(Some(damage));
    }
    Ok(None)
}

/// Turns a storage error into a statement about a file, unless the error only says that the storage
/// is unreachable.
fn wrong(storage: &Storage, file: &str, error: Error) -> Result<String, Error> {
    if storage.is_away(&error) { Err(error) } else { Ok(format!("{file}: {}", reason(&error))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use ganglion_membership::Position;

    async fn open(folder: &std::path::Path, run: &str) -> Result<Checkpoints, Unusable> {
        Checkpoints::open(&folder.display().to_string(), run, &Patience::silent()).await
    }

    async fn storage() -> (tempfile::TempDir, Checkpoints) {
        let folder = tempfile::tempdir().unwrap();
        let storage = open(folder.path(), "run").await.unwrap();
        (folder, storage)
    }

    async fn save(folder: &tempfile::TempDir, storage: &Checkpoints, step: u64) -> Checkpoint {
        let content = format!("content of {step}");
        let file = StoredFile {
            file: "state-00001-of-00001.safetensors".to_string(),
            bytes: content.len() as u64,
            blake3: blake3::hash(content.as_bytes()).to_hex().to_string(),
        };
        let state_digest = "d".repeat(64);
        let checkpoint =
            Checkpoint { position: Position(2 * step), step, phase: 0, files: vec![file], state_digest };
        let folder = folder.path().join(checkpoint.folder());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(&checkpoint.files[0].file), content).unwrap();
        storage.commit(&checkpoint, || true).await.unwrap();
        checkpoint
    }

    #[tokio::test]
    async fn the_newest_whole_checkpoint_is_found_and_damage_is_reported() {
        let (folder, storage) = storage().await;
        let old = save(&folder, &storage, 10).await;
        let new = save(&folder, &storage, 20).await;
        assert_eq!(storage.newest_valid().await.unwrap().0, Some(new.clone()));
        let part = folder.path().join(new.folder()).join(&new.files[0].file);
        fs::write(&part, "content of 2O").unwrap();
        for expected in ["hash", "No such file"] {
            let (found, damaged) = storage.newest_valid().await.unwrap();
            assert_eq!(found, Some(old.clone()));
            assert!(damaged[0].reason.contains(expected), "{damaged:?}");
            let _ = fs::remove_file(&part);
        }
    }

    #[tokio::test]
    async fn a_manifest_of_another_state_is_set_aside() {
        let (folder, storage) = storage().await;
        let one = save(&folder, &storage, 20).await;
        let other = Checkpoint { state_digest: "e".repeat(64), ..one.clone() };
        storage.commit(&other, || true).await.unwrap();
        storage.commit(&other, || true).await.unwrap();
        assert_eq!(storage.newest_valid().await.unwrap().0, Some(other));
        let aside = folder.path().join(one.folder()).join(format!("manifest-{}.json", "d".repeat(16)));
        assert_eq!(manifest::parse(&fs::read_to_string(aside).unwrap()).unwrap(), one);
    }

    /// Folders are ordered by step: those with more digits come later, though not by name.
    #[tokio::test]
    async fn pruning_keeps_the_newest_beyond_eight_digits() {
        let (folder, storage) = storage().await;
        for step in [99_999_998, 99_999_999, 100_000_000, 100_000_001] {
            save(&folder, &storage, step).await;
            storage.prune(2, &[]).await.unwrap();
        }
        let kept = ["step-100000000", "step-100000001"];
        assert_eq!(storage.storage().checkpoints().await.unwrap(), kept);
        assert_eq!(storage.storage().latest().await.unwrap().as_deref(), Some(kept[1]));
        assert_eq!(storage.newest_valid().await.unwrap().0.map(|newest| newest.step), Some(100_000_001));
    }

    /// A damaged checkpoint that is computed again becomes valid again.
    #[tokio::test]
    async fn a_damaged_manifest_is_written_again() {
        let (folder, storage) = storage().await;
        let new = save(&folder, &storage, 20).await;
        fs::write(folder.path().join(new.folder()).join(MANIFEST), "{").unwrap();
        let (found, damaged) = storage.newest_valid().await.unwrap();
        assert!(found.is_none() && damaged[0].reason.starts_with("manifest.json: "), "{damaged:?}");
        storage.commit(&new, || true).await.unwrap();
        assert_eq!(storage.newest_valid().await.unwrap().0, Some(new));
    }

    #[tokio::test]
    async fn a_folder_without_a_manifest_is_no_checkpoint() {
        let (folder, storage) = storage().await;
        fs::create_dir(folder.path().join("step-00000009")).unwrap();
        let (found, damaged) = storage.newest_valid().await.unwrap();
        assert!(found.is_none() && damaged.is_empty());
    }

    #[tokio::test]
    async fn pruning_keeps_the_newest_and_later_attempts() {
        let (folder, storage) = storage().await;
        for step in [10, 20, 30] {
            save(&folder, &storage, step).await;
        }
        for attempt in ["step-00000015", "step-00000025", "step-00000040"] {
            fs::create_dir(folder.path().join(attempt)).unwrap();
        }
        storage.prune(2, &["step-00000010".to_string()]).await.unwrap();
        assert!(folder.path().join("step-00000010").exists(), "it is protected");
        storage.prune(2, &[]).await.unwrap();
        let kept = ["step-00000020", "step-00000030", "step-00000040"];
        assert_eq!(storage.storage().checkpoints().await.unwrap(), kept);
        assert_eq!(storage.storage().latest().await.unwrap().as_deref(), Some("step-00000030"));
        storage.prune(0, &[]).await.unwrap();
        assert_eq!(storage.storage().checkpoints().await.unwrap(), kept);
    }

    #[tokio::test]
    async fn a_storage_of_another_run_is_refused() {
        let (folder, _storage) = storage().await;
        let error = open(folder.path(), "other").await.err().unwrap().to_string();
        assert!(error.contains("another run"), "{error}");
    }
}
