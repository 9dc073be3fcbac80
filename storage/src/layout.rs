//! Layout of a storage: the only module that knows its names.
//!
//! `.run` names the run that the storage belongs to, `latest` the newest checkpoint, and
//! `best.json` the best one, which `model-card.md` describes. A checkpoint is a folder
//! `step-00001000`, and counts as one once it has its `manifest.json`. The formats of the manifest
//! and of the workers' metrics rows are defined in the `proto` crate.

use std::collections::BTreeMap;
use std::io;
use std::time::SystemTime;

use futures_util::TryStreamExt;
use ganglion_membership::Checkpoint;
use object_store::path::Path;
use object_store::{Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, Result};

use crate::{Storage, whole};

/// File with the run that a storage belongs to.
const MARKER: &str = ".run";
/// File with the newest checkpoint's folder and a newline. A hint only.
pub const LATEST: &str = "latest";
/// File that names the best checkpoint.
pub const BEST: &str = "best.json";
/// Number of the format of [`BEST`] that this version writes, and the newest that it reads.
pub const BEST_FORMAT: u32 = 1;
/// File that describes the best checkpoint.
pub const MODEL_CARD: &str = "model-card.md";
/// File with a checkpoint's manifest, in its folder.
pub const MANIFEST: &str = "manifest.json";

/// Returns the path of a file in a folder of a storage.
pub fn in_folder(folder: &str, file: &str) -> Path {
    Path::from(folder).join(file)
}

/// Result of a run's claim to a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The storage belongs to the run.
    Granted,
    /// The storage belongs to another run.
    Taken,
    /// The storage belongs to the run, but its server replaces files that it was asked not to
    /// replace.
    Unsafe,
}

/// Version of a file: differs if the content differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Length in bytes.
    pub bytes: u64,
    /// Identifier that differs for other contents of the same file.
    pub text: String,
}

fn version(file: &ObjectMeta) -> Version {
    let written = file.last_modified.to_rfc3339();
    // Without a tag, which a server may leave out, the time of writing has to do.
    let text = format!("{} {}", file.size, file.e_tag.as_deref().unwrap_or(&written));
    Version { bytes: file.size, text }
}

impl Storage {
    /// Returns the run that the storage belongs to; `None` if it belongs to none yet.
    pub async fn owner(&self) -> Result<Option<String>> {
        self.text(&Path::from(MARKER)).await
    }

    /// Claims the storage for a run, unless it belongs to another.
    pub async fn claim(&self, run: &str) -> Result<Claim> {
        let (marker, name) = (Path::from(MARKER), PutPayload::from(run.to_string()));
        if self.owner().await?.is_none() {
            match self.put_new(&marker, &name).await {
                // Another run may have come first in between: the name that is there decides.
                Ok(()) | Err(Error::AlreadyExists { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        // If two runs claimed it at once, the first one has it.
        if self.owner().await?.as_deref() != Some(run) {
            return Ok(Claim::Taken);
        }
        if self.folder.is_some() {
            // A folder creates files conditionally, as asked, and needs no test; one that is full now
            // can still be used.
            return Ok(Claim::Granted);
        }
        // An object store that ignores the condition would let two coordinators overwrite each other, so
        // it is tried once.
        match self.put_new(&marker, &name).await {
            Err(Error::AlreadyExists { .. }) => Ok(Claim::Granted),
            other => other.map(|()| Claim::Unsafe),
        }
    }

    /// Returns the folder that `latest` names.
    pub async fn latest(&self) -> Result<Option<String>> {
        let text = self.text(&Path::from(LATEST)).await?;
        // A hint only: a name with other white space around it still names its folder.
        Ok(text.map(|text| text.trim().to_string()))
    }

    /// Returns the folders of complete and incomplete checkpoints by step and phase, the lowest
    /// first.
    pub async fn checkpoints(&self) -> Result<Vec<String>> {
        let listed = self.store.list_with_delimiter(None).await?;
        let names = listed.common_prefixes.iter().filter_map(|path| path.filename());
        let placed = names.filter_map(|name| Some((Checkpoint::place_of(name)?, name.to_string())));
        // By numbers, not by names: from nine digits on, names sort otherwise.
        let ordered: BTreeMap<(u64, u32), String> = placed.collect();
        Ok(ordered.into_values().collect())
    }

    /// Returns the names of the files in a folder; none if it does not exist.
    pub async fn files(&self, folder: &str) -> Result<Vec<String>> {
        let listed = match self.store.list_with_delimiter(Some(&Path::from(folder))).await {
            // A folder appears with its first file, so its absence is no error.
            Err(Error::NotFound { .. }) => return Ok(Vec::new()),
            listed => listed?,
        };
        let names = listed.objects.iter().filter_map(|file| file.location.filename());
        // A draft belongs to a writer that is at work, or was killed.
        Ok(names.filter(|name| !whole::is_draft(name)).map(str::to_string).collect())
    }

    /// Returns the length of every file and the time at which it was last written, by its path from the
    /// storage's root.
    pub async fn lengths(&self) -> Result<BTreeMap<String, (u64, SystemTime)>> {
        let files: Vec<_> = self.store.list(None).try_collect().await?;
        let about =
            files.into_iter().map(|file| (file.location.to_string(), (file.size, file.last_modified.into())));
        Ok(about.collect())
    }

    /// Returns the version of every file, by its path from the storage's root.
    pub async fn versions(&self) -> Result<BTreeMap<Path, Version>> {
        let files: Vec<_> = self.store.list(None).try_collect().await?;
        Ok(files.into_iter().map(|file| (file.location.clone(), version(&file))).collect())
    }

    /// Returns the version of a file.
    pub async fn version(&self, path: &Path) -> Result<Version> {
        Ok(version(&self.store.head(path).await?))
    }

    /// Returns a small file's text; `None` if it does not exist.
    pub async fn text(&self, path: &Path) -> Result<Option<String>> {
        match self.read(path).await {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the time at which a file was last written.
    pub async fn modified(&self, path: &Path) -> Result<SystemTime> {
        Ok(self.store.head(path).await?.last_modified.into())
    }

    /// Removes a checkpoint's manifest, if it exists: the folder no longer counts as a checkpoint,
    /// but its other files stay.
    pub async fn withdraw(&self, checkpoint: &str) -> Result<()> {
        match self.store.delete(&in_folder(checkpoint, MANIFEST)).await {
            // Gone already, as after an attempt whose answer was lost.
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes a checkpoint. The manifest goes first: should the rest fail, the folder no longer
    /// counts as a checkpoint.
    pub async fn remove(&self, checkpoint: &str) -> Result<()> {
        self.withdraw(checkpoint).await?;
        if let Some(root) = &self.folder {
            // Includes the drafts that a killed writer left there.
            let folder = root.join(checkpoint);
            // Awaits the disk on a thread for such work: a network file system may take minutes.
            let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(folder)).await?;
            return match removed {
                // Another attempt has removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed.map_err(|error| Error::Generic { store: "folder", source: error.into() }),
            };
        }
        let files: Vec<_> = self.store.list(Some(&Path::from(checkpoint))).try_collect().await?;
        let files = files.into_iter().map(|file| Ok(file.location));
        let removed = self.store.delete_stream(Box::pin(futures_util::stream::iter(files)));
        removed.try_for_each(|_| std::future::ready(Ok(()))).await
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::btree_set;
    use proptest::prelude::*;

    use super::*;
    use crate::Address;

    async fn write(storage: &Storage, folder: &str, file: &str) {
        storage.replace(&in_folder(folder, file), &PutPayload::from_static(b"x")).await.unwrap();
    }

    fn storages() -> (tempfile::TempDir, [Storage; 2]) {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Folder(folder.path().to_path_buf());
        let storages = [Storage::open(&address).unwrap(), Storage::in_memory()];
        (folder, storages)
    }

    /// Invariant 3 of the crate.
    #[tokio::test]
    async fn a_storage_belongs_to_the_first_run_that_claims_it() {
        let (_folder, storages) = storages();
        for storage in storages {
            assert_eq!(storage.owner().await.unwrap(), None);
            for _ in 0..2 {
                assert_eq!(storage.claim("one").await.unwrap(), Claim::Granted);
                assert_eq!(storage.claim("other").await.unwrap(), Claim::Taken);
            }
            assert_eq!(storage.owner().await.unwrap().as_deref(), Some("one"));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// The order is that of numbers, for any count of digits.
        #[test]
        fn checkpoints_are_ordered_by_step_and_phase(
            places in btree_set((1_000_000..9_999_999_999_999u64, 0..13u32), 1..20),
            shift in 0..7u32,
        ) {
            let places: BTreeSet<_> =
                places.into_iter().map(|(step, phase)| (step / 10u64.pow(shift), phase)).collect();
            let storage = Storage::in_memory();
            let listed = tokio::runtime::Runtime::new().unwrap().block_on(async {
                for (step, phase) in &places {
                    write(&storage, &Checkpoint::folder_of(*step, *phase), MANIFEST).await;
                }
                storage.checkpoints().await.unwrap()
            });
            let expected: Vec<_> =
                places.iter().map(|(step, phase)| Checkpoint::folder_of(*step, *phase)).collect();
            prop_assert_eq!(listed, expected);
        }
    }

    #[tokio::test]
    async fn checkpoints_are_listed_in_order_and_removed_whole() {
        let (folder, storages) = storages();
        for storage in storages {
            for name in ["step-00000020", "step-00000003", "step-00000003-phase-1", "other"] {
                write(&storage, name, MANIFEST).await;
                write(&storage, name, "state").await;
            }
            storage.replace(&Path::from(LATEST), &PutPayload::from_static(b"step-00000020\n")).await.unwrap();
            assert_eq!(storage.latest().await.unwrap().as_deref(), Some("step-00000020"));
            let all = ["step-00000003", "step-00000003-phase-1", "step-00000020"];
            assert_eq!(storage.checkpoints().await.unwrap(), all);
            assert_eq!(storage.files("step-00000003").await.unwrap(), [MANIFEST, "state"]);
            storage.remove("step-00000003").await.unwrap();
            storage.remove("step-00000003").await.unwrap();
            assert_eq!(storage.checkpoints().await.unwrap(), all[1..]);
            assert!(storage.files("step-00000003").await.unwrap().is_empty());
        }
        assert!(!folder.path().join("step-00000003").exists());
    }
}
