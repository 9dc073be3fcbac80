//! Data in an object store: fetched to this machine once, and read from the local copy.
//!
//! 1. A file appears whole, with the length that the store gives, and is noted after that, with its hash.
//!    So a noted file is whole; one that differs from its note is fetched again.
//! 2. The workers of a machine share what is fetched. One fetches, the others wait for it. On a file system
//!    without locks several may fetch at once: each file still appears whole, and none of them removes what
//!    another is writing.
//! 3. A file that has changed in the store is fetched again; one that is gone from it is removed here.
//! 4. Notes lie beside the folder of the files, where no object's name leads. An object whose name cannot
//!    be a file's is left out, and counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use ganglion_proto::job::{ArchiveKind, Data, DataKind};
use ganglion_proto::printable_start;
use ganglion_proto::record::found::Found;
use ganglion_storage::{
    Address, Blocking, Path as StoragePath, Pauses, RelativeName, Storage, Version, reason, whole,
};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{DataError, arrays, text};

/// Environment variable with the folder for fetched data.
pub(super) const CACHE: &str = "GANGLION_CACHE_DIR";
/// Folder of the files, within the folder of an address.
const FILES: &str = "files";
/// File with a note for each complete file, within the folder of an address.
const NOTES: &str = "fetched.jsonl";
/// Lock file of the worker that fetches, within the folder of an address.
const LOCK: &str = "lock";

/// Limit on the wait for a store that is away.
const PATIENCE: Duration = Duration::from_secs(600);
/// Age without a change after which a draft's writer counts as dead: far longer than a store is waited for.
const DRAFT_LIMIT: Duration = Duration::from_secs(3600);
/// Interval of progress messages.
const TOLD: Duration = Duration::from_secs(5);
/// First and longest pause between two attempts.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(10)];

/// Returns the same data by a local path; fetches it first if it lies in an object store.
pub(super) fn here(source: &Data, found: &mut Found) -> Result<Data, DataError> {
    let Some(text) = source.path.as_deref().and_then(Path::to_str) else {
        return Ok(source.clone());
    };
    let wrong = |what: &str| {
        let shown = if Address::is_secret(text) { "an address" } else { text };
        DataError::Input(format!("data.path: {shown}: {what}"))
    };
    let path = match Address::parse(text).map_err(|what| wrong(&what.to_string()))? {
        Address::Folder(folder) => folder,
        Address::Cloud(_) => {
            // Known by its ending; anything else is a folder of files.
            // Only the last part: a prefix may have a dot in it.
            let (root, file) = match text.rsplit_once('/') {
                Some((root, file)) if is_file(source.kind, Path::new(file)) => (root, Some(file)),
                _ => (text, None),
            };
            let address = Address::parse(root).map_err(|what| wrong(&what.to_string()))?;
            let storage = Storage::open(&address).map_err(|what| wrong(&what))?;
            // A folder for each address, whatever characters it has.
            let folder = cache()?.join(&blake3::hash(root.as_bytes()).to_hex()[..16]);
            let chosen = |name: &str| file.is_none_or(|file| file == name);
            fetch(storage, &folder, chosen, found, &wrong)?;
            let files = folder.join(FILES);
            file.map_or(files.clone(), |file| files.join(file))
        }
    };
    Ok(Data { path: Some(path), ..source.clone() })
}

/// Whether a name is that of a file with data of a kind, and not of a folder.
fn is_file(kind: DataKind, name: &Path) -> bool {
    match kind {
        DataKind::Text => text::is_document(name),
        DataKind::Arrays => name.extension().is_some_and(|ending| ending == arrays::ENDING),
        _ => ArchiveKind::of(name).is_some(),
    }
}

/// Returns the folder for fetched data, and for what is made of data that lie where nothing can be written.
pub(super) fn cache() -> Result<PathBuf, DataError> {
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

/// Object to fetch.
struct Wanted {
    name: RelativeName,
    /// Path of the object in the store.
    path: StoragePath,
    version: Version,
}

/// Record of a complete local file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    name: String,
    /// Version in the store.
    version: String,
    bytes: u64,
    /// blake3 of the content, in hex.
    blake3: String,
    /// Time of the last change (ctime) by the clock of the file system: seconds, nanoseconds.
    changed: (i64, i64),
}

/// Makes a folder hold the chosen files of a storage, and no others.
fn fetch(
    storage: Storage,
    folder: &Path,
    chosen: impl Fn(&str) -> bool,
    found: &mut Found,
    wrong: &dyn Fn(&str) -> DataError,
) -> Result<(), DataError> {
    let system = |source: io::Error| DataError::System { path: folder.to_path_buf(), source };
    let files = folder.join(FILES);
    whole::create_folders(&files).map_err(system)?;
    let lock = File::create(folder.join(LOCK)).map_err(system)?;
    // Held until the end of this function: the lock goes with the file handle.
    let is_alone = take_turn(folder, |operation| flock(&lock, operation)).map_err(system)?;
    let store = Store { storage: Blocking::new(storage).map_err(system)?, pauses: PAUSES, wrong };
    let wanted = wanted(&store, &chosen, found)?;
    let names: BTreeSet<&str> = wanted.iter().map(|object| object.name.as_str()).collect();
    let unwanted = |name: &str| chosen(name) && !names.contains(name);
    // Before anything is fetched, as a name may now be a folder's.
    sweep(&files, "", &unwanted, is_alone).map_err(system)?;
    let have = notes(folder);
    let is_here = |object: &Wanted| {
        let note = have.get(object.name.as_str());
        // Another version in the store is fetched again (invariant 3); another content here is damage.
        note.is_some_and(|note| note.version == object.version.text && note.holds(&object.name.below(&files)))
    };
    // Decided once: with the lock nobody else writes here, and without it a file is fetched twice at
    // worst.
    let missing: Vec<&Wanted> = wanted.iter().filter(|object| !is_here(object)).collect();
    let mut told: Option<Instant> = None;
    for (done, object) in missing.iter().enumerate() {
        if told.is_none_or(|told| told.elapsed() >= TOLD) {
            let (name, all) = (&object.name, missing.len());
            tracing::info!("fetching {name}, file {} of {all}, to {}", done + 1, files.display());
            told = Some(Instant::now());
        }
        // One file after the other, each with the limit of `patiently`; a killed worker goes on where it
        // was.
        let note = fetch_one(&store, object, &files)?;
        // After the file is whole, and before the next (invariant 1).
        append(folder, &note).map_err(system)?;
    }
    Ok(())
}

/// Waits until no other worker of this machine fetches into a folder; returns whether that is certain.
/// `ask` requests the lock.
fn take_turn(folder: &Path, mut ask: impl FnMut(FlockOperation) -> Result<(), Errno>) -> io::Result<bool> {
    let mut operation = FlockOperation::NonBlockingLockExclusive;
    loop {
        match ask(operation) {
            Ok(()) => return Ok(true),
            // A signal came in between; the request is made again.
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) => {
                tracing::info!("another worker of this machine fetches the data; waiting for it");
                // Bounded: the system releases the lock when its holder ends, and the holder's wait for its
                // store is limited.
                operation = FlockOperation::LockExclusive;
            }
            // Errors of file systems without locks, and of those whose lock service is away.
            Err(error @ (Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOLCK | Errno::INVAL)) => {
                tracing::warn!(
                    "files in {} cannot be locked ({error}), so each worker of this machine may fetch the data; a {CACHE} on a \
                     local disk saves that",
                    folder.display()
                );
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Store, with the context for messages about the user's mistakes.
struct Store<'a> {
    storage: Blocking,
    pauses: [Duration; 2],
    wrong: &'a dyn Fn(&str) -> DataError,
}

/// Reasons why a fetch failed.
enum Failed {
    /// Error of the store, which may be temporary.
    Store(ganglion_storage::Error),
    /// Error of this machine.
    System(io::Error),
    Data(DataError),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::System(error)
    }
}

impl From<ganglion_storage::Error> for Failed {
    fn from(error: ganglion_storage::Error) -> Failed {
        match error {
            // An error of the local file being written, not of the store.
            ganglion_storage::Error::Generic { store: "file", source } => match source.downcast() {
                Ok(error) => Failed::System(*error),
                Err(source) => Failed::Store(ganglion_storage::Error::Generic { store: "file", source }),
            },
            other => Failed::Store(other),
        }
    }
}

impl Store<'_> {
    /// Retries work while the store is away. `what` is diagnostic only, `place` is the file or folder of
    /// the work.
    fn patiently<T>(
        &self,
        what: &str,
        place: &Path,
        mut work: impl FnMut() -> Result<T, Failed>,
    ) -> Result<T, DataError> {
        let begun = Instant::now();
        let mut pauses = Pauses::new(self.pauses[0], self.pauses[1]);
        let system = |source| DataError::System { path: place.to_path_buf(), source };
        loop {
            let error = match work() {
                Ok(done) => return Ok(done),
                // The store has answered: the file changed, or came short.
                Err(Failed::Data(error)) => return Err(error),
                Err(Failed::System(error)) => return Err(system(error)),
                Err(Failed::Store(error)) => error,
            };
            let why = format!("{what}: {}", reason(&error));
            // Another error is the user's to mend, such as an address without rights.
            if !self.storage.storage().is_away(&error) {
                return Err((self.wrong)(&why));
            }
            // The coordinator waits for this worker; a store that stays away is told to the user.
            if begun.elapsed() > PATIENCE {
                return Err(system(io::Error::other(why)));
            }
            tracing::warn!("{why}; trying again");
            // At most ten seconds, with jitter, so that workers of many machines do not come back at
            // once.
            thread::sleep(pauses.draw());
        }
    }
}

/// Lists the chosen objects whose names can be those of files. The others are counted.
fn wanted(
    store: &Store<'_>,
    chosen: &impl Fn(&str) -> bool,
    found: &mut Found,
) -> Result<Vec<Wanted>, DataError> {
    let list = || Ok(store.storage.wait(store.storage.storage().versions())?);
    let listed = store.patiently("cannot be listed", Path::new(""), list)?;
    let folders: BTreeSet<&str> = listed
        .keys()
        .flat_map(|path| path.as_ref().match_indices('/').map(|(at, _)| &path.as_ref()[..at]))
        .collect();
    let mut wanted = Vec::new();
    for (path, version) in listed.iter().filter(|(path, _)| chosen(path.as_ref())) {
        // A name that is also a folder's cannot be a file's.
        let is_folder = folders.contains(path.as_ref());
        match RelativeName::parse(path.as_ref()) {
            // Web consoles make an empty object for a folder.
            Ok(_) if is_folder && version.bytes == 0 => {}
            Ok(name) if !is_folder => {
                wanted.push(Wanted { name, path: path.clone(), version: version.clone() });
            }
            _ => found.leave_out(
                "objects whose names cannot be those of files",
                printable_start(path.as_ref(), 200),
            ),
        }
    }
    if wanted.is_empty() {
        return Err((store.wrong)("there is nothing there, expected files below it, or one zip or tar file"));
    }
    Ok(wanted)
}

/// Fetches a file, and checks that it is complete and still the version that was listed.
fn fetch_one(store: &Store<'_>, object: &Wanted, files: &Path) -> Result<Note, DataError> {
    let Wanted { name, path, version } = object;
    let place = name.below(files);
    let system = |source: io::Error| DataError::System { path: place.clone(), source };
    let wrong = |what: &str| Failed::Data((store.wrong)(&format!("{name}: {what}; try again")));
    let storage = &store.storage;
    whole::create_folders(place.parent().unwrap_or(files)).map_err(system)?;
    let write = || {
        // The file appears under its name only if all checks in here pass.
        whole::write_by(&place, |file| -> Result<(), Failed> {
            storage.wait(storage.storage().fetch(path, file))?;
            // Asked after the fetch: ranges of two versions could have been put together.
            if storage.wait(storage.storage().version(path))? != *version {
                return Err(wrong("it was changed while it was fetched"));
            }
            let (here, there) = (file.metadata()?.len(), version.bytes);
            if here != there {
                return Err(wrong(&format!("{here} of {there} bytes came")));
            }
            Ok(())
        })
    };
    store.patiently(&name.to_string(), &place, write)?;
    // Of what lies on the disk, and not of what came: this is what a later worker compares.
    let blake3 = hash(&place).map_err(system)?;
    let metadata = fs::metadata(&place).map_err(system)?;
    Ok(Note {
        name: name.as_str().to_string(),
        version: version.text.clone(),
        bytes: version.bytes,
        blake3,
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

fn hash(file: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(file)?)?;
    Ok(hasher.finalize().to_hex().to_string())
}

impl Note {
    /// Whether a file still has the noted content. One with another ctime is hashed.
    fn holds(&self, file: &Path) -> bool {
        let Ok(metadata) = fs::symlink_metadata(file) else { return false };
        if !metadata.is_file() || metadata.len() != self.bytes {
            return false;
        }
        // The change time moves with every write, and no call sets it.
        (metadata.ctime(), metadata.ctime_nsec()) == self.changed
            || hash(file).is_ok_and(|found| found == self.blake3)
    }
}

/// Removes unwanted files below a folder, and the leftovers of killed writers. A worker that may not be
/// alone leaves folders, and drafts that may still be written.
fn sweep(
    folder: &Path,
    relative: &str,
    is_unwanted: &impl Fn(&str) -> bool,
    is_alone: bool,
) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{relative}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            sweep(&entry.path(), &format!("{name}/"), is_unwanted, is_alone)?;
            if is_alone {
                // Only if it is empty: a file may have its name now.
                let _ = fs::remove_dir(entry.path());
            }
        } else if !is_alone && is_being_written(&entry) {
            // A draft of another worker.
        } else if is_unwanted(&name) || !entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a file is a draft whose writer may be alive.
fn is_being_written(entry: &fs::DirEntry) -> bool {
    let changed = || entry.metadata()?.modified();
    let age = |changed: SystemTime| changed.elapsed().unwrap_or_default();
    whole::is_draft(&entry.file_name().to_string_lossy()) && changed().is_ok_and(|at| age(at) < DRAFT_LIMIT)
}

/// Appends a note, in a line of its own: there may be very many. A lost line costs a second fetch.
fn append(folder: &Path, note: &Note) -> io::Result<()> {
    let mut notes = File::options().create(true).append(true).open(folder.join(NOTES))?;
    let line = serde_json::to_string(note).map_err(io::Error::other)?;
    // The leading newline keeps a torn line from spoiling this one.
    // One call, so that lines of two workers are not mixed.
    notes.write_all(format!("\n{line}\n").as_bytes())
}

/// Returns the last note of each file; an unreadable line is ignored.
fn notes(folder: &Path) -> BTreeMap<String, Note> {
    let text = fs::read(folder.join(NOTES)).unwrap_or_default();
    let notes =
        text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Note>(line).ok());
    // Later lines replace earlier ones of the same name.
    notes.map(|note| (note.name.clone(), note)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ganglion_proto::clock;
    use ganglion_storage::PutPayload;

    fn put(storage: &Storage, name: &str, content: &[u8]) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let payload = PutPayload::from(content.to_vec());
        runtime.block_on(storage.replace(&StoragePath::parse(name).unwrap(), &payload)).unwrap();
    }

    fn fetched(storage: &Storage, folder: &Path) -> Result<Found, DataError> {
        let mut found = Found::default();
        let wrong = |what: &str| DataError::Input(what.to_string());
        fetch(storage.clone(), folder, |name| name != "other", &mut found, &wrong)?;
        Ok(found)
    }

    fn here(folder: &Path, name: &str) -> Option<Vec<u8>> {
        fs::read(folder.join(FILES).join(name)).ok()
    }

    /// Invariants 1 and 3.
    #[test]
    fn files_are_fetched_once_and_again_when_they_are_others() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let storage = Storage::in_memory();
        let error = fetched(&storage, folder).unwrap_err();
        assert!(error.to_string().contains("nothing there"), "{error}");
        put(&storage, "a/1.png", b"one");
        put(&storage, "a/[2] 100%#.png", b"odd");
        put(&storage, "2.tar", b"two");
        put(&storage, "other", b"not chosen");
        fetched(&storage, folder).unwrap();
        assert_eq!(here(folder, "a/1.png"), Some(b"one".into()));
        assert_eq!(here(folder, "a/[2] 100%#.png"), Some(b"odd".into()));
        assert_eq!((here(folder, "2.tar"), here(folder, "other")), (Some(b"two".into()), None));
        // A file that is what its note says is not written again.
        let inode = |name: &str| fs::metadata(folder.join(FILES).join(name)).unwrap().ino();
        let before = inode("a/1.png");
        fetched(&storage, folder).unwrap();
        assert_eq!(inode("a/1.png"), before);
        // One that somebody changed is none, of another length or of the same.
        for mine in ["mine", "two"] {
            fs::write(folder.join(FILES).join("a/1.png"), mine).unwrap();
            fetched(&storage, folder).unwrap();
            assert_eq!(here(folder, "a/1.png"), Some(b"one".into()));
        }
        put(&storage, "a/1.png", b"another");
        fs::remove_file(folder.join(FILES).join("2.tar")).unwrap();
        fetched(&storage, folder).unwrap();
        assert_eq!(
            (here(folder, "a/1.png"), here(folder, "2.tar")),
            (Some(b"another".into()), Some(b"two".into()))
        );
        // One that is no longer there, or that was never noted, goes.
        fs::write(folder.join(FILES).join("a/old.png"), "old").unwrap();
        let now = Storage::in_memory();
        put(&now, "2.tar", b"two");
        fetched(&now, folder).unwrap();
        assert_eq!((here(folder, "a/1.png"), here(folder, "a/old.png")), (None, None));
        assert_eq!(here(folder, "2.tar"), Some(b"two".into()));
    }

    /// Invariant 4: an object cannot be taken for notes, and a note of any kind removes nothing elsewhere.
    #[test]
    fn no_object_leads_out_of_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let (folder, precious) = (root.path().join("cache/ab"), root.path().join("precious"));
        fs::write(&precious, "kept").unwrap();
        let storage = Storage::in_memory();
        put(&storage, "1.png", b"one");
        let lines: Vec<String> = [precious.to_str().unwrap(), "../../../precious", "../../precious"]
            .iter()
            .map(|name| {
                format!(r#"["{name}","1 x"]"#)
                    + "\n"
                    + &format!(r#"{{"name":"{name}","version":"1 x","bytes":4,"blake3":"","changed":[0,0]}}"#)
            })
            .collect();
        for name in [".versions.jsonl", NOTES, LOCK, "..\\..\\precious"] {
            put(&storage, name, lines.join("\n").as_bytes());
        }
        for _ in 0..3 {
            let found = fetched(&storage, &folder).unwrap();
            assert_eq!(fs::read_to_string(&precious).unwrap(), "kept");
            let left: Vec<_> = found.left_out.values().collect();
            assert_eq!((left.len(), left[0].count), (1, 1));
            assert!(left[0].example.contains("precious"), "{left:?}");
            // Even where somebody wrote such notes.
            fs::write(folder.join(NOTES), lines.join("\n")).unwrap();
        }
        assert!(here(&folder, NOTES).is_some(), "it is a file like any other");
    }

    /// Invariant 2.
    #[test]
    fn a_lock_that_another_has_is_waited_for_and_a_file_system_without_locks_is_no_other_worker() {
        let turn = |answers: &[Result<(), Errno>]| {
            let (mut answers, mut asked) = (answers.iter(), Vec::new());
            let ask = |operation| {
                asked.push(matches!(operation, FlockOperation::LockExclusive));
                *answers.next().expect("asked no more")
            };
            let turn = take_turn(Path::new("/cache"), ask);
            (turn.map_err(|error| Errno::from_io_error(&error)), asked)
        };
        assert_eq!(turn(&[Ok(())]), (Ok(true), vec![false]));
        let (held, signal) = (Err(Errno::WOULDBLOCK), Err(Errno::INTR));
        assert_eq!(turn(&[signal, held, signal, Ok(())]), (Ok(true), vec![false, false, true, true]));
        for none in [Errno::NOSYS, Errno::NOLCK, Errno::OPNOTSUPP] {
            assert_eq!(turn(&[Err(none)]), (Ok(false), vec![false]), "{none}");
        }
        assert_eq!(turn(&[Err(Errno::IO)]).0, Err(Some(Errno::IO)));
        assert_eq!(turn(&[held, Err(Errno::IO)]).0, Err(Some(Errno::IO)));
    }

    /// Invariant 2, without locks: what another worker is writing stays, what a dead one left goes.
    #[test]
    fn who_may_not_be_alone_removes_no_draft_that_is_being_written() {
        let folder = tempfile::tempdir().unwrap();
        let drafts = [".1.png.a.ganglion.new", "a/.2.png.b.ganglion.new"];
        let left = |is_alone: bool, age: Duration| {
            fs::create_dir_all(folder.path().join("a")).unwrap();
            for draft in drafts {
                let file = File::create(folder.path().join(draft)).unwrap();
                file.set_modified(clock::wall_clock() - age).unwrap();
            }
            fs::create_dir_all(folder.path().join("b")).unwrap();
            sweep(folder.path(), "", &|_| true, is_alone).unwrap();
            let there = |name: &&str| folder.path().join(name).exists();
            (drafts.iter().filter(|name| there(name)).count(), there(&"b"))
        };
        assert_eq!(left(false, Duration::ZERO), (2, true));
        assert_eq!(left(false, 2 * DRAFT_LIMIT), (0, true));
        assert_eq!(left(true, Duration::ZERO), (0, false));
    }

    #[test]
    fn a_store_that_is_away_is_waited_for() {
        let storage = Blocking::new(Storage::in_memory()).unwrap();
        let wrong = |what: &str| DataError::Input(what.to_string());
        let store = Store { storage, pauses: [Duration::from_millis(1); 2], wrong: &wrong };
        let failing = |text: &str| ganglion_storage::Error::Generic { store: "S3", source: text.into() };
        let mut attempts = 0;
        let done = store.patiently("x", Path::new("x"), || {
            attempts += 1;
            if attempts < 4 { Err(failing("Connection refused").into()) } else { Ok(attempts) }
        });
        assert_eq!(done.unwrap(), 4);
        // A mistake stays one, and a full disk of this machine is none of the store's.
        let refused = store.patiently("x", Path::new("x"), || -> Result<(), Failed> {
            Err(failing("status code: 403 Forbidden").into())
        });
        assert!(matches!(refused, Err(DataError::Input(_))), "{refused:?}");
        let full = store.patiently("x", Path::new("/there"), || -> Result<(), Failed> {
            let source = io::Error::from(io::ErrorKind::StorageFull).into();
            Err(ganglion_storage::Error::Generic { store: "file", source }.into())
        });
        assert!(matches!(full, Err(DataError::System { .. })), "{full:?}");
    }

    #[test]
    fn an_object_in_the_place_of_a_folder_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::in_memory();
        put(&storage, "a/1.png", b"one");
        put(&storage, "a", b"");
        put(&storage, "b/c/2.png", b"two");
        put(&storage, "b", b"not empty");
        let found = fetched(&storage, folder.path()).unwrap();
        assert_eq!(found.left_out.values().map(|left| left.count).sum::<u64>(), 1);
        assert_eq!(here(folder.path(), "b/c/2.png"), Some(b"two".into()));
    }
}
