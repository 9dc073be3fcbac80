//! The run directory: its lock, its files, and the job that it belongs to.
//!
//! 1. One coordinator holds a run directory at a time, by a lock that the system frees when the
//!    process ends, and by a claim (`ownership.rs`), since on some file systems locks do not reach
//!    other machines, or do not exist.
//! 2. A run directory belongs to one job for ever; only settings that cannot change the result may change.
//! 3. Secrets in it are readable by its user only, whatever files had their names before.

pub mod access;
pub(crate) mod ownership;

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ganglion_proto::job::Job;
use ganglion_storage::whole;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::job_file;
use crate::run_dir::ownership::{ClaimError, Fence, Ownership, recorded_holder};

/// Maximum number of attempts to take the lock of a run directory, and the pause between.
// A check by `coordinator runs` holds the lock for an instant, and 80 ms outlast several of them.
const LOCK_ATTEMPTS: u32 = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Reason why a run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The user's choice is wrong: exit code 2.
    #[error("{0}")]
    Input(String),
    /// A system call failed for a reason that has nothing to do with the choice: exit code 1.
    #[error("{0}; once that is mended, the same command goes on, and nothing is lost")]
    System(String),
    /// Another coordinator holds the directory: exit code 1.
    #[error("run directory {}: held by another coordinator ({holder}); stop that one, or choose another --run-dir", folder.display())]
    Held {
        /// The run directory.
        folder: PathBuf,
        /// Self-description of the holder.
        holder: String,
    },
}

impl RunDirError {
    /// Classifies a system error at a place: a choice that cannot work, or a machine that is full
    /// or failing.
    fn of(place: &dyn std::fmt::Display, error: std::io::Error) -> RunDirError {
        if whole::is_mistake(&error) {
            RunDirError::Input(format!("{place}: {error}; choose a folder that this user can write to"))
        } else {
            RunDirError::System(format!("{place}: {error}"))
        }
    }
}

/// A run directory held by this process.
pub struct RunDir {
    folder: PathBuf,
    ownership: Ownership,
    /// Freed when the process ends, however it ends. Dropped after `ownership`, which marks the
    /// claim as released.
    _lock: Option<Flock<File>>,
}

impl RunDir {
    /// Creates the directory if necessary and takes it.
    pub fn hold(folder: &Path) -> Result<RunDir, RunDirError> {
        RunDir::hold_telling(folder, &|line| tracing::warn!("{line}"))
    }

    /// Like [`RunDir::hold`]; `tell` receives reasons for waiting and shortcomings of the file system.
    pub fn hold_telling(folder: &Path, tell: &dyn Fn(&str)) -> Result<RunDir, RunDirError> {
        let named = format!("--run-dir {}", folder.display());
        let unusable = |error: std::io::Error| RunDirError::of(&named, error);
        create(folder).map_err(unusable)?;
        // One name for one place: links may change while the run goes on.
        let folder = folder.canonicalize().map_err(unusable)?;
        let held = |holder: String| RunDirError::Held { folder: folder.clone(), holder };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(folder.join("lock"));
        let lock = match lock(file.map_err(unusable)?) {
            Locking::Taken(lock) => Some(lock),
            Locking::Held => return Err(held(recorded_holder(&folder))),
            Locking::Fails(errno) => {
                tell(&format!(
                    "warning: files in {} cannot be locked ({errno}); this run is kept to one coordinator by its claims in \
                     owners/ alone",
                    folder.display()
                ));
                None
            }
        };
        // May block for PATIENCE: nothing of this coordinator runs yet that could wait for it.
        let ownership = Ownership::claim(&folder, lock.is_some(), tell).map_err(|error| match error {
            ClaimError::Held(holder) => held(holder),
            ClaimError::Unusable { error, .. } => unusable(error),
        })?;
        let run_dir = RunDir { folder, ownership, _lock: lock };
        // Only with the claim: two coordinators that start at once would make and sweep each other's
        // files.
        for folder in ["samples", "tensorboard"] {
            whole::create_folders(&run_dir.path(folder)).map_err(unusable)?;
        }
        // Temporary files of earlier coordinators; no other process writes here.
        for folder in ["", "samples"] {
            whole::sweep(&run_dir.path(folder)).map_err(unusable)?;
        }
        Ok(run_dir)
    }

    /// Check that the directory still belongs to this process.
    pub fn fence(&self) -> &Fence {
        self.ownership.fence()
    }

    /// Claim of this process.
    pub fn ownership(&self) -> &Ownership {
        &self.ownership
    }

    /// Path of a file or folder in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The directory's path.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a file that only this user can read, in place of any file of that name.
    pub fn write_secret(&self, name: &str, text: &str) -> Result<(), RunDirError> {
        let file = self.path(name);
        whole::write_secret(&file, text.as_bytes())
            .map_err(|error| RunDirError::Input(format!("{}: {error}", file.display())))
    }

    /// Reads a file that [`RunDir::write_secret`] wrote; `None` if others could have read or
    /// written it.
    pub fn read_secret(&self, name: &str) -> Option<String> {
        let mut file = File::open(self.path(name)).ok()?;
        // The opened file's own metadata: an exchange of the name in between cannot show another file's
        // mode.
        let (about, link) = (file.metadata().ok()?, fs::symlink_metadata(self.path(name)).ok()?);
        let is_own = about.uid() == nix::unistd::geteuid().as_raw() && about.mode() & 0o077 == 0;
        // A link, or a file of another user's, may have been put there to be read as a secret of ours.
        if !link.is_file() || !is_own {
            return None;
        }
        let mut text = String::new();
        file.read_to_string(&mut text).ok()?;
        Some(text)
    }

    /// Restricts a file that holds secrets, and that other libraries write, to this user. Creates
    /// it if it does not exist.
    pub fn keep_private(&self, name: &str) -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(self.path(name))?;
        // Takes rights away and never adds any: a journal that its user made read-only stays so.
        let mode = file.metadata()?.mode() & 0o700;
        file.set_permissions(Permissions::from_mode(mode))
    }

    /// Checks the job against a run that has begun: no setting that decides its result may differ,
    /// except for samples to leave out and for places, whose content workers compare. Exclusion number
    /// `unused`, which no group has trained with yet, is not a part of the run.
    pub fn check_job(&self, job: Job, begun: bool, unused: Option<usize>) -> Result<Settled, RunDirError> {
        let file = self.path("job.toml");
        let input = |what: String| RunDirError::Input(format!("{}: {what}", file.display()));
        let mut settled = Settled { job, recorded: None, asked: Vec::new() };
        // Before the first group any job is right: nothing was computed by another one.
        if begun && file.exists() {
            let text = fs::read_to_string(&file).map_err(|error| input(error.to_string()))?;
            let mut recorded = job_file::parse_resolved(&text)
                .map_err(|error| input(format!("not a job of this version:\n{error}")))?;
            let on_disk = recorded.clone();
            // Nothing was computed with it, so a mistake in it may be taken back.
            if unused == Some(recorded.data.exclusions.len()) {
                recorded.data.exclusions.pop();
            }
            settled.job.data.resume(&recorded.data);
            let mut differences = job_file::differences(&recorded, &settled.job);
            match job_file::asked(&recorded, &settled.job) {
                Ok(asked) => settled.asked = asked,
                Err(difference) => differences.push(difference),
            }
            if !differences.is_empty() {
                let lines: Vec<String> =
                    differences.iter().map(|difference| format!("  {difference}")).collect();
                return Err(input(format!(
                    "this run directory belongs to another job:\n{}\n  to train this job as a run of its own, give it a \
                     name: --set job.name={}-2 (without --run-dir), or another --run-dir; to go on with the run that is \
                     here, restore these settings",
                    lines.join("\n"),
                    settled.job.job.name
                )));
            }
            settled.job.data.exclusions = recorded.data.exclusions;
            settled.recorded = Some(on_disk);
        }
        Ok(settled)
    }

    /// Writes the resolved job.
    pub fn write_job(&self, job: &Job) -> Result<(), RunDirError> {
        write_job(&self.folder, job).map_err(|error| RunDirError::of(&self.path("job.toml").display(), error))
    }
}

/// Writes the resolved job of the run in a folder.
pub(crate) fn write_job(folder: &Path, job: &Job) -> std::io::Result<()> {
    let (file, text) = (folder.join("job.toml"), job_file::render(job));
    // An equal file is not written again, so a run whose directory is full can go on.
    match fs::read(&file).is_ok_and(|there| there == text.as_bytes()) {
        true => Ok(()),
        false => whole::write(&file, text.as_bytes()),
    }
}

/// Creates a folder for this user only, and its parents with the usual mode. An existing folder is
/// left as it is.
fn create(folder: &Path) -> std::io::Result<()> {
    let above = folder.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    whole::create_folders(above)?;
    // The mode at its creation: there is no moment at which others could open it.
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(_) if folder.is_dir() => Ok(()),
        Err(error) => Err(error),
        // Otherwise a power cut could take the folder with a journal that counted as durable.
        Ok(()) => File::open(above)?.sync_all(),
    }
}

/// The job of a run, after comparison with the recorded one.
#[derive(Debug)]
pub struct Settled {
    /// The given job, with the recorded exclusions of the run.
    pub job: Job,
    /// The job that the newest group trains by; `None` before the first.
    pub recorded: Option<Job>,
    /// Names of samples that the job asks to leave out from now on.
    pub asked: Vec<String>,
}

/// Result of asking for a lock.
enum Locking {
    Taken(Flock<File>),
    /// Another process has the lock.
    Held,
    /// The file system, or its lock service, has no locks.
    Fails(Errno),
}

/// Takes a file's lock. A process that only checks whether a run is held takes the lock for an
/// instant, so one refusal proves nothing.
fn lock(mut file: File) -> Locking {
    for _ in 0..LOCK_ATTEMPTS {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Locking::Taken(lock),
            Err((refused, Errno::EWOULDBLOCK | Errno::EINTR)) => file = refused,
            // Not a refusal: the claim alone must do (ownership.rs).
            Err((_, errno)) => return Locking::Fails(errno),
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Locking::Held
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(file: &Path) -> u32 {
        fs::symlink_metadata(file).unwrap().mode() & 0o777
    }

    /// Invariant 3.
    #[test]
    fn a_secret_is_for_its_user_only_whatever_was_there_before() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::hold(&root.path().join("runs/run")).unwrap();
        assert_eq!(mode(run_dir.folder()), 0o700);
        assert_ne!(mode(&root.path().join("runs")), 0o700, "others may have runs there");
        let (secret, elsewhere) = (run_dir.path("secret"), root.path().join("elsewhere"));
        fs::write(&elsewhere, "theirs").unwrap();
        for before in ["nothing", "open", "link", "dangling"] {
            let _ = fs::remove_file(&secret);
            match before {
                "open" => {
                    fs::write(&secret, "old").unwrap();
                    fs::set_permissions(&secret, Permissions::from_mode(0o644)).unwrap();
                }
                "link" => std::os::unix::fs::symlink(&elsewhere, &secret).unwrap(),
                "dangling" => std::os::unix::fs::symlink(root.path().join("none"), &secret).unwrap(),
                _ => {}
            }
            assert_eq!(run_dir.read_secret("secret"), None, "{before}");
            run_dir.write_secret("secret", "new").unwrap();
            assert_eq!(mode(&secret), 0o600, "{before}");
            assert_eq!(run_dir.read_secret("secret").as_deref(), Some("new"), "{before}");
        }
        assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "theirs");
        assert!(!root.path().join("none").exists());
        run_dir.keep_private("secret").unwrap();
        fs::set_permissions(&secret, Permissions::from_mode(0o664)).unwrap();
        run_dir.keep_private("secret").unwrap();
        run_dir.keep_private("made").unwrap();
        assert_eq!((mode(&secret), mode(&run_dir.path("made"))), (0o600, 0o600));
        assert_eq!(fs::read_to_string(&secret).unwrap(), "new");
    }
}
