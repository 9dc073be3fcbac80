//! `--mirror`: copies a run's metrics, events, samples and TensorBoard files to another storage
//! while it goes on.
//!
//! 1. A thread of its own reads the run directory and sends; nothing waits for it but the run's
//!    end, for a bounded time.
//! 2. A file is sent again once its length or its modification time differs. One that an earlier
//!    coordinator sent is sent again if its length differs, or if it was modified after its copy was
//!    written, by the clocks of the two. A file that grows is sent as far as it was.
//! 3. A failure is reported once and retried. A storage that belongs to another run is left alone.
//!
//! Passes over the files take at most a tenth of the time: object stores cannot append, so a long
//! file is sent whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ganglion_storage::{Address, AddressError, Blocking, Claim, Path as Place, Storage, reason};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout};

use crate::records::progress::Screen;

/// Interval between two passes.
const EVERY: Duration = Duration::from_secs(30);
/// Interval between two attempts at the end.
const AGAIN: Duration = Duration::from_secs(2);
/// Time for which the end of a run waits.
// The run is done; an operator or an orchestrator waits for the process to end.
const LAST: Duration = Duration::from_secs(60);
/// Length of the pause after a long pass, as a multiple of that pass.
// A pass of one part work and nine parts rest: a tenth of the time.
const REST: u32 = 9;

/// Single files that are copied; job.toml, which may change without growing, first.
const FILES: [&str; 3] = ["job.toml", "events.jsonl", "metrics.jsonl"];
/// Folders whose files are copied.
const FOLDERS: [&str; 2] = ["samples", "tensorboard"];

/// A running mirror, if `--mirror` is given.
pub(crate) struct Mirror(Option<Working>);

struct Working {
    /// Set to true when the run has ended.
    ending: watch::Sender<bool>,
    done: oneshot::Receiver<()>,
    address: Address,
    screen: Screen,
}

/// Error: a run's directory cannot be copied to the given place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MirrorError {
    /// The text is no address.
    #[error("--mirror: the address {0}")]
    Address(#[from] AddressError),
    /// The place cannot be opened.
    #[error("--mirror {address}: {reason}")]
    Unusable {
        /// The place.
        address: Address,
        /// Finding of the system or the store.
        reason: String,
    },
}

impl Mirror {
    /// Starts to copy a run's directory to `url`.
    ///
    /// # Errors
    /// See [`MirrorError`].
    pub(crate) fn start(
        url: Option<&str>,
        run: &str,
        folder: &Path,
        screen: &Screen,
    ) -> Result<Mirror, MirrorError> {
        let Some(url) = url else { return Ok(Mirror(None)) };
        let address = Address::parse(url)?;
        let wrong = |reason| MirrorError::Unusable { address: address.clone(), reason };
        if let Address::Folder(target) = &address {
            fs::create_dir_all(target).map_err(|error| wrong(error.to_string()))?;
        }
        let storage = Storage::open(&address).map_err(wrong)?;
        // A runtime of its own in the thread: a store that hangs cannot hold the coordinator's.
        let storage = Blocking::new(storage).map_err(|error| wrong(error.to_string()))?;
        let (ending, ended) = watch::channel(false);
        let (finished, done) = oneshot::channel();
        let mut copier = Copier {
            run: run.to_string(),
            folder: folder.to_path_buf(),
            screen: screen.clone(),
            sent: None,
            failing: false,
        };
        let thread = std::thread::Builder::new().name("mirror".to_string());
        let work = move || {
            storage.wait(copier.serve(storage.storage(), ended));
            let _ = finished.send(());
        };
        thread.spawn(work).map_err(|error| wrong(error.to_string()))?;
        Ok(Mirror(Some(Working { ending, done, address, screen: screen.clone() })))
    }

    /// Copies the last changes, if the storage takes them in time.
    pub(crate) async fn finish(self) {
        let Some(Working { ending, done, address, screen }) = self.0 else { return };
        let _ = ending.send(true);
        // The thread is not joined: a storage that hangs would hold the run's end.
        if timeout(LAST, done).await.is_err() {
            screen.print(&format!(
                "warning: --mirror {address}: not all was copied in {} s; the same command copies the rest",
                LAST.as_secs()
            ));
        }
    }
}

/// State of a file's copy.
enum Copied {
    /// Sent by this coordinator: length and modification time of the file before that.
    Sent(u64, Option<SystemTime>),
    /// Found on the storage: length of the copy, and the time at which it was written.
    Found(u64, SystemTime),
}

impl Copied {
    /// Whether a file with this length and modification time is the copy's.
    fn is_of(&self, length: u64, changed: Option<SystemTime>) -> bool {
        match *self {
            Copied::Sent(sent, before) => sent == length && before == changed,
            // A file may be repaired, or cut and grown again, to the length that it had.
            Copied::Found(found, written) => found == length && changed.is_some_and(|time| time <= written),
        }
    }
}

struct Copier {
    run: String,
    folder: PathBuf,
    screen: Screen,
    /// Copies by file name; `None` until the storage was listed.
    sent: Option<BTreeMap<String, Copied>>,
    failing: bool,
}

/// Reason why a pass ended early.
enum Stopped {
    /// A retry may succeed.
    Failed(String),
    /// The storage belongs to another run.
    Taken,
}

impl From<ganglion_storage::Error> for Stopped {
    fn from(error: ganglion_storage::Error) -> Self {
        Stopped::Failed(reason(&error))
    }
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Stopped::Failed(error.to_string())
    }
}

impl Copier {
    async fn serve(&mut self, storage: &Storage, mut ended: watch::Receiver<bool>) {
        loop {
            // Before the pass: a pass that began earlier may have missed the last lines.
            let is_last = *ended.borrow_and_update();
            let begun = Instant::now();
            let failed = match self.pass(storage).await {
                Ok(()) => None,
                Err(Stopped::Failed(reason)) => Some(reason),
                Err(Stopped::Taken) => {
                    let address = storage.address();
                    self.screen.print(&format!(
                        "warning: --mirror {address}: is another run's, so nothing is copied; choose another place"
                    ));
                    return;
                }
            };
            self.tell(storage.address(), failed.as_deref());
            // The last pass was without an error, so all is there.
            if is_last && failed.is_none() {
                return;
            }
            // At the end the user waits, so a failed attempt is repeated soon.
            let pause = if is_last { AGAIN } else { EVERY.max(begun.elapsed() * REST) };
            if let Ok(Err(_)) = timeout(pause, ended.changed()).await {
                // The sender is gone: the coordinator ended some other way.
                return;
            }
        }
    }

    fn tell(&mut self, address: &Address, failed: Option<&str>) {
        match (std::mem::replace(&mut self.failing, failed.is_some()), failed) {
            (false, Some(reason)) => {
                self.screen.print(&format!("warning: --mirror {address}: {reason}; trying again"));
            }
            (true, None) => self.screen.print(&format!("--mirror {address}: works again")),
            _ => {}
        }
    }

    /// Sends the files that have changed.
    async fn pass(&mut self, storage: &Storage) -> Result<(), Stopped> {
        let sent = match &mut self.sent {
            Some(sent) => sent,
            none => {
                // Before the first write: two runs would overwrite each other's files.
                if storage.claim(&self.run).await? == Claim::Taken {
                    return Err(Stopped::Taken);
                }
                let there = storage.lengths().await?.into_iter();
                // job.toml is written by each start, often with the same length, so it is sent once by
                // each, whatever the clocks say.
                let there = there.filter(|(name, _)| name != FILES[0]);
                none.insert(there.map(|(name, (length, at))| (name, Copied::Found(length, at))).collect())
            }
        };
        for name in files(&self.folder)? {
            let file = File::open(self.folder.join(&name))?;
            let about = file.metadata()?;
            let (length, changed) = (about.len(), about.modified().ok());
            if !sent.get(&name).is_some_and(|copied| copied.is_of(length, changed)) {
                storage.send(&Place::from(name.as_str()), file).await?;
                // Of before the copy: a file that grew meanwhile differs, and is sent again.
                sent.insert(name, Copied::Sent(length, changed));
            }
        }
        Ok(())
    }
}

/// Names of a run directory's files that are copied.
fn files(folder: &Path) -> io::Result<Vec<String>> {
    let mut files: Vec<String> =
        FILES.into_iter().filter(|name| folder.join(name).is_file()).map(str::to_string).collect();
    for inner in FOLDERS {
        for entry in fs::read_dir(folder.join(inner))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // A file that is being written has another name until it is whole.
            if entry.file_type()?.is_file() && !name.ends_with(".new") {
                files.push(format!("{inner}/{name}"));
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_directory() -> tempfile::TempDir {
        let run = tempfile::tempdir().unwrap();
        for name in FOLDERS {
            fs::create_dir(run.path().join(name)).unwrap();
        }
        for (name, text) in [
            ("job.toml", "a"),
            ("metrics.jsonl", "1\n"),
            ("samples/step-00000001.png", "png"),
            ("samples/step-00000002.png.new", "torn"),
            ("tensorboard/events", "tb"),
            ("admin.json", "secret"),
        ] {
            fs::write(run.path().join(name), text).unwrap();
        }
        run
    }

    fn copier(run: &tempfile::TempDir, name: &str) -> Copier {
        let (folder, screen) = (run.path().to_path_buf(), Screen::silent());
        Copier { run: name.to_string(), folder, screen, sent: None, failing: false }
    }

    #[tokio::test]
    async fn what_is_for_people_is_copied_and_nothing_else() {
        let (run, target) = (run_directory(), tempfile::tempdir().unwrap());
        let url = target.path().join("a/b").display().to_string();
        let mirror = Mirror::start(Some(&url), "run", run.path(), &Screen::silent()).unwrap();
        mirror.finish().await;
        let storage = Storage::open(&Address::parse(&url).unwrap()).unwrap();
        let names: Vec<String> = storage.lengths().await.unwrap().into_keys().collect();
        assert_eq!(
            names,
            [".run", "job.toml", "metrics.jsonl", "samples/step-00000001.png", "tensorboard/events"]
        );
    }

    /// Invariant 2.
    #[tokio::test]
    async fn only_what_has_changed_is_sent_again() {
        let (run, storage) = (run_directory(), Storage::in_memory());
        let read = async |name: &str| storage.text(&Place::from(name)).await.unwrap().unwrap();
        assert!(copier(&run, "run").pass(&storage).await.is_ok());
        // A file that an earlier coordinator sent is known by its length.
        let overwritten = ganglion_storage::PutPayload::from_static(b"gnp");
        storage.replace(&Place::from("samples/step-00000001.png"), &overwritten).await.unwrap();
        let mut later = copier(&run, "run");
        fs::write(run.path().join("metrics.jsonl"), "1\n2\n").unwrap();
        fs::write(run.path().join("job.toml"), "b").unwrap();
        assert!(later.pass(&storage).await.is_ok());
        assert_eq!(read("samples/step-00000001.png").await, "gnp");
        assert_eq!((read("metrics.jsonl").await.as_str(), read("job.toml").await.as_str()), ("1\n2\n", "b"));
        fs::write(run.path().join("metrics.jsonl"), "1\n2\n3\n").unwrap();
        assert!(later.pass(&storage).await.is_ok());
        assert_eq!(read("metrics.jsonl").await, "1\n2\n3\n");
    }

    /// Invariant 2, for lengths that say nothing.
    #[tokio::test]
    async fn a_file_that_was_repaired_to_its_old_length_is_sent_again() {
        let (run, storage) = (run_directory(), Storage::in_memory());
        let picture = "samples/step-00000001.png";
        let repair = |text: &str, later: u64| {
            let path = run.path().join(picture);
            fs::write(&path, text).unwrap();
            // Explicit, since clocks and files have different resolutions.
            let time = fs::metadata(&path).unwrap().modified().unwrap() + Duration::from_secs(later);
            File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
        };
        let read = async || storage.text(&Place::from(picture)).await.unwrap().unwrap();
        assert!(copier(&run, "run").pass(&storage).await.is_ok());
        let mut later = copier(&run, "run");
        repair("gnp", 60);
        assert!(later.pass(&storage).await.is_ok());
        assert_eq!(read().await, "gnp", "before this coordinator looked");
        repair("pgn", 120);
        assert!(later.pass(&storage).await.is_ok());
        assert_eq!(read().await, "pgn", "and while it runs");
    }

    /// Invariant 3.
    #[tokio::test]
    async fn another_runs_place_is_left_alone() {
        let (run, storage) = (run_directory(), Storage::in_memory());
        storage.claim("other").await.unwrap();
        assert!(matches!(copier(&run, "run").pass(&storage).await, Err(Stopped::Taken)));
        assert_eq!(storage.lengths().await.unwrap().len(), 1);
    }
}
