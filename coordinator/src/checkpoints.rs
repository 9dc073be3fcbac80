//! The checkpoint storage: manifests, the newest valid one, and how many are kept.
//!
//! 1. A folder without a manifest is no checkpoint.
//! 2. A manifest is written once, after all its files are there; `latest` moves after that, and is only a hint.
//! 3. Before a run starts from a checkpoint, every file is read and its hash compared.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use ganglion_membership::{Checkpoint, StoredFile};
use ganglion_proto::message::MetricsRow;
use ganglion_proto::{failpoint, manifest, rows};

use crate::run_dir::write_whole;

/// A folder of checkpoints.
pub struct Checkpoints {
    folder: PathBuf,
}

/// A checkpoint that cannot be used, and why.
#[derive(Debug)]
pub struct Damaged {
    /// Its folder.
    pub folder: String,
    /// What is wrong.
    pub reason: String,
}

impl Checkpoints {
    /// Opens a storage for a run, marking it as the run's. `address` is a folder or a `file://` address.
    pub fn open(address: &str, run: &str) -> Result<Checkpoints, String> {
        let folder = PathBuf::from(address.strip_prefix("file://").unwrap_or(address));
        let unusable = |error: io::Error| {
            format!(
                "checkpoint.url {}: {error}; choose a folder that this user can write to",
                folder.display()
            )
        };
        fs::create_dir_all(&folder).map_err(unusable)?;
        let marker = folder.join(".run");
        match fs::read_to_string(&marker) {
            Ok(owner) if owner == run => {}
            Ok(_) => {
                let folder = folder.display();
                return Err(format!(
                    "checkpoint.url {folder}: holds another run's checkpoints; choose another folder"
                ));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                write_whole(&marker, run.as_bytes()).map_err(unusable)?;
            }
            Err(error) => return Err(unusable(error)),
        }
        let folder = folder.canonicalize().map_err(unusable)?;
        Ok(Checkpoints { folder })
    }

    /// The storage's address for workers.
    pub fn address(&self) -> String {
        format!("file://{}", self.folder.display())
    }

    /// Makes a checkpoint valid: its manifest, then `latest`. Repeating it does no harm.
    pub fn commit(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        let text = manifest::render(checkpoint);
        let folder = checkpoint.folder();
        write_whole(&self.folder.join(&folder).join("manifest.json"), text.as_bytes())?;
        // Numbered by step: the checkpoint is valid, and `latest` does not name it.
        failpoint::reached("manifest", checkpoint.step);
        write_whole(&self.folder.join("latest"), format!("{folder}\n").as_bytes())
    }

    /// The folder that `latest` names.
    pub fn latest(&self) -> Option<String> {
        let text = fs::read_to_string(self.folder.join("latest")).ok()?;
        Some(text.trim().to_string())
    }

    /// The newest checkpoint whose files are whole, and the newer ones that are not.
    pub fn newest_valid(&self) -> io::Result<(Option<Checkpoint>, Vec<Damaged>)> {
        let mut damaged = Vec::new();
        for folder in self.folders()?.into_iter().rev() {
            match self.read(&folder) {
                Ok(Some(checkpoint)) => return Ok((Some(checkpoint), damaged)),
                Ok(None) => {}
                Err(reason) => damaged.push(Damaged { folder, reason }),
            }
        }
        Ok((None, damaged))
    }

    /// The rows that workers left which ended without a coordinator, up to a step.
    pub fn left_rows(&self, last_step: u64) -> io::Result<Vec<MetricsRow>> {
        let mut found = Vec::new();
        for folder in self.folders()? {
            for entry in fs::read_dir(self.folder.join(folder))? {
                let entry = entry?;
                if rows::is_file(&entry.file_name().to_string_lossy()) {
                    // One that is torn is of a worker that died on the way; others may have left the same rows.
                    found.extend(rows::decode(&fs::read(entry.path())?).unwrap_or_default());
                }
            }
        }
        found.retain(|row| row.step <= last_step);
        found.sort_by_key(|row| row.step);
        Ok(found)
    }

    /// The folders of checkpoints and of attempts at one, oldest first.
    fn folders(&self) -> io::Result<Vec<String>> {
        let mut folders = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with("step-") {
                folders.push(name);
            }
        }
        folders.sort();
        Ok(folders)
    }

    /// Reads a folder's manifest and checks its files; `None` where there is no manifest.
    fn read(&self, folder: &str) -> Result<Option<Checkpoint>, String> {
        let path = self.folder.join(folder);
        let text = match fs::read_to_string(path.join("manifest.json")) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("manifest.json: {error}")),
        };
        let checkpoint = manifest::parse(&text).map_err(|error| error.to_string())?;
        if checkpoint.folder() != folder {
            return Err(format!("manifest.json is of {}", checkpoint.folder()));
        }
        check_files(&path, &checkpoint)?;
        Ok(Some(checkpoint))
    }

    /// Removes all but the newest `keep` checkpoints (0 keeps all), and what failed attempts before them left.
    pub fn prune(&self, keep: u64) -> io::Result<()> {
        let has_manifest = |folder: &String| self.folder.join(folder).join("manifest.json").exists();
        let folders = self.folders()?;
        let Some(newest) = folders.iter().rposition(has_manifest) else { return Ok(()) };
        let mut kept = 0;
        for folder in folders[..=newest].iter().rev() {
            if has_manifest(folder) {
                kept += 1;
                if keep == 0 || kept <= keep {
                    continue;
                }
                // Without its manifest it is no checkpoint any more, should the rest of the removal fail.
                fs::remove_file(self.folder.join(folder).join("manifest.json"))?;
            }
            fs::remove_dir_all(self.folder.join(folder))?;
        }
        Ok(())
    }
}

/// Whether all files of a checkpoint in a folder are there and have the manifest's hashes; otherwise what is wrong.
pub fn check_files(folder: &Path, checkpoint: &Checkpoint) -> Result<(), String> {
    checkpoint.files.iter().try_for_each(|file| check(folder, file))
}

fn check(folder: &Path, file: &StoredFile) -> Result<(), String> {
    let failed = |error: io::Error| format!("{}: {error}", file.file);
    let opened = File::open(folder.join(&file.file)).map_err(failed)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(opened).map_err(failed)?;
    if hasher.finalize().to_hex().as_str() == file.blake3 {
        Ok(())
    } else {
        Err(format!("{} does not have the manifest's hash", file.file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ganglion_membership::Position;

    fn storage() -> (tempfile::TempDir, Checkpoints) {
        let folder = tempfile::tempdir().unwrap();
        let storage = Checkpoints::open(&folder.path().display().to_string(), "run").unwrap();
        (folder, storage)
    }

    fn save(storage: &Checkpoints, step: u64) -> Checkpoint {
        let content = format!("content of {step}");
        let file = StoredFile {
            file: "state-00001-of-00001.safetensors".to_string(),
            bytes: content.len() as u64,
            blake3: blake3::hash(content.as_bytes()).to_hex().to_string(),
        };
        let state_digest = "d".repeat(64);
        let checkpoint =
            Checkpoint { position: Position(2 * step), step, phase: 0, files: vec![file], state_digest };
        let folder = storage.folder.join(checkpoint.folder());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(&checkpoint.files[0].file), content).unwrap();
        storage.commit(&checkpoint).unwrap();
        checkpoint
    }

    #[test]
    fn the_newest_whole_checkpoint_is_found_and_damage_is_reported() {
        let (folder, storage) = storage();
        let old = save(&storage, 10);
        let new = save(&storage, 20);
        assert_eq!(storage.newest_valid().unwrap().0, Some(new.clone()));
        let part = folder.path().join(new.folder()).join(&new.files[0].file);
        fs::write(part, "content of 2O").unwrap();
        let (found, damaged) = storage.newest_valid().unwrap();
        assert_eq!(found, Some(old));
        assert!(damaged[0].reason.contains("hash"), "{damaged:?}");
    }

    #[test]
    fn a_folder_without_a_manifest_is_no_checkpoint() {
        let (folder, storage) = storage();
        fs::create_dir(folder.path().join("step-00000009")).unwrap();
        let (found, damaged) = storage.newest_valid().unwrap();
        assert!(found.is_none() && damaged.is_empty());
    }

    #[test]
    fn pruning_keeps_the_newest_and_later_attempts() {
        let (folder, storage) = storage();
        for step in [10, 20, 30] {
            save(&storage, step);
        }
        for attempt in ["step-00000015", "step-00000040"] {
            fs::create_dir(folder.path().join(attempt)).unwrap();
        }
        storage.prune(2).unwrap();
        assert_eq!(storage.folders().unwrap(), ["step-00000020", "step-00000030", "step-00000040"]);
        assert_eq!(fs::read_to_string(folder.path().join("latest")).unwrap(), "step-00000030\n");
    }

    #[test]
    fn a_storage_of_another_run_is_refused() {
        let (folder, _storage) = storage();
        let error = Checkpoints::open(&folder.path().display().to_string(), "other").err().unwrap();
        assert!(error.contains("another run"), "{error}");
    }
}
