//! Data in an object store: fetched to this machine once, and read there as if it always had been.
//!
//! 1. A file is fetched under another name and then renamed, and its version is noted after that. So what is noted is whole.
//! 2. The workers of a machine share what is fetched. One fetches, the others wait for it.
//! 3. A file that is another in the store is fetched again; one that is no longer there is no longer here.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ganglion_proto::job::{ArchiveKind, Data};
use ganglion_storage::{Address, Blocking, Path as StoragePath, Storage, reason};
use rustix::fs::{FlockOperation, flock};

use super::DataError;

/// Names the folder that fetched data lie under.
const CACHE: &str = "GANGLION_CACHE_DIR";
/// In the folder of an address: the versions of its files, by name.
const VERSIONS: &str = ".versions.jsonl";
/// In the folder of an address: locked by who fetches.
const LOCK: &str = ".lock";

/// The same data by a path of this machine; fetches them if they lie in an object store.
pub(super) fn here(source: &Data) -> Result<Data, DataError> {
    let Some(text) = source.path.as_deref().and_then(Path::to_str) else {
        return Ok(source.clone());
    };
    let wrong = |what: &str| {
        let shown = if Address::is_secret(text) { "an address" } else { text };
        DataError::Input(format!("data.path: {shown}: {what}"))
    };
    let path = match Address::parse(text).map_err(|what| wrong(&what))? {
        Address::Folder(folder) => folder,
        Address::Cloud(_) => {
            // An archive is a file; all else is a folder of files.
            let (root, file) = match text.rsplit_once('/') {
                Some((root, file)) if ArchiveKind::of(Path::new(file)).is_some() => (root, Some(file)),
                _ => (text, None),
            };
            let address = Address::parse(root).map_err(|what| wrong(&what))?;
            let storage = Storage::open(&address).map_err(|what| wrong(&what))?;
            let folder = cache()?.join(&blake3::hash(root.as_bytes()).to_hex()[..16]);
            let chosen = |name: &str| file.is_none_or(|file| file == name);
            fetch(storage, &folder, chosen, &wrong)?;
            file.map_or(folder.clone(), |file| folder.join(file))
        }
    };
    Ok(Data { path: Some(path), ..source.clone() })
}

/// The folder that fetched data lie under.
fn cache() -> Result<PathBuf, DataError> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    of(CACHE)
        .or_else(|| of("XDG_CACHE_HOME").map(|folder| folder.join("ganglion")))
        .or_else(|| of("HOME").map(|folder| folder.join(".cache/ganglion")))
        .ok_or_else(|| {
            DataError::Input(format!(
                "data.path is fetched to this machine, and there is no home folder; set {CACHE}"
            ))
        })
}

/// Makes a folder hold the chosen files of a storage.
fn fetch(
    storage: Storage,
    folder: &Path,
    chosen: impl Fn(&str) -> bool,
    wrong: &dyn Fn(&str) -> DataError,
) -> Result<(), DataError> {
    let system = |source: io::Error| DataError::System { path: folder.to_path_buf(), source };
    fs::create_dir_all(folder).map_err(system)?;
    let lock = File::create(folder.join(LOCK)).map_err(system)?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        tracing::info!("another worker of this machine fetches the data; waiting for it");
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| system(error.into()))?;
    }
    let storage = Blocking::new(storage).map_err(system)?;
    let failed = |error: &ganglion_storage::Error| wrong(&reason(error));
    let mut wanted = storage.wait(storage.storage().versions()).map_err(|error| failed(&error))?;
    wanted.retain(|name, _| chosen(name));
    if wanted.is_empty() {
        return Err(wrong("there is nothing there"));
    }
    let have = versions(folder);
    for gone in have.keys().filter(|name| chosen(name) && !wanted.contains_key(*name)) {
        drop(fs::remove_file(folder.join(gone)));
    }
    let missing: Vec<_> =
        wanted.into_iter().filter(|(name, version)| have.get(name) != Some(version)).collect();
    for (done, (name, version)) in missing.iter().enumerate() {
        tracing::info!("fetching {name}, {} of {} files, to {}", done + 1, missing.len(), folder.display());
        let place = folder.join(name);
        fs::create_dir_all(place.parent().unwrap_or(folder)).map_err(system)?;
        let beside = folder.join(".fetched");
        let file = File::create(&beside).map_err(system)?;
        let path = StoragePath::from(name.as_str());
        storage.wait(storage.storage().fetch(&path, &file)).map_err(|error| failed(&error))?;
        let now = storage.wait(storage.storage().version(&path)).map_err(|error| failed(&error))?;
        if now != *version {
            return Err(wrong(&format!("{name} was changed while it was fetched; try again")));
        }
        fs::rename(&beside, &place).map_err(system)?;
        note(folder, name, version).map_err(system)?;
    }
    Ok(())
}

/// Notes that a file is here, in a line of its own: there may be a great many.
fn note(folder: &Path, name: &str, version: &str) -> io::Result<()> {
    let mut notes = File::options().create(true).append(true).open(folder.join(VERSIONS))?;
    notes.write_all(format!("{}\n", serde_json::json!([name, version])).as_bytes())
}

/// What is here already, by the last note of each file; a line that cannot be read notes nothing.
fn versions(folder: &Path) -> BTreeMap<String, String> {
    let notes = fs::read_to_string(folder.join(VERSIONS)).unwrap_or_default();
    let notes = notes.lines().filter_map(|line| serde_json::from_str::<(String, String)>(line).ok());
    let mut noted: BTreeMap<String, String> = notes.collect();
    noted.retain(|name, _| folder.join(name).is_file());
    noted
}

#[cfg(test)]
mod tests {
    use super::*;
    use ganglion_storage::PutPayload;

    fn put(storage: &Storage, name: &str, content: &'static [u8]) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let payload = PutPayload::from_static(content);
        runtime.block_on(storage.replace(&StoragePath::from(name), &payload)).unwrap();
    }

    fn fetched(storage: &Storage, folder: &Path) -> Result<(), DataError> {
        fetch(storage.clone(), folder, |name| name != "other", &|what| DataError::Input(what.to_string()))
    }

    #[test]
    fn files_are_fetched_once_and_again_when_they_are_others() {
        let folder = tempfile::tempdir().unwrap();
        let here = |name: &str| fs::read(folder.path().join(name)).ok();
        let storage = Storage::in_memory();
        let error = fetched(&storage, folder.path()).unwrap_err();
        assert!(error.to_string().contains("nothing there"), "{error}");
        put(&storage, "a/1.png", b"one");
        put(&storage, "2.tar", b"two");
        put(&storage, "other", b"not chosen");
        fetched(&storage, folder.path()).unwrap();
        assert_eq!(
            (here("a/1.png"), here("2.tar"), here("other")),
            (Some(b"one".into()), Some(b"two".into()), None)
        );
        // What is noted is not fetched again: nobody looks at it.
        fs::write(folder.path().join("a/1.png"), "mine").unwrap();
        fetched(&storage, folder.path()).unwrap();
        assert_eq!(here("a/1.png"), Some(b"mine".into()));
        put(&storage, "a/1.png", b"another");
        fs::remove_file(folder.path().join("2.tar")).unwrap();
        fetched(&storage, folder.path()).unwrap();
        assert_eq!((here("a/1.png"), here("2.tar")), (Some(b"another".into()), Some(b"two".into())));
    }
}
