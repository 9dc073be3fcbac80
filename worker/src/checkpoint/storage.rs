//! Checkpoint storage of the run, from a worker's side.
//!
//! 1. Nothing is written before the storage was verified to be the run's.
//! 2. A storage that is away or fails when a worker joins is taken for the run's until it answers:
//!    otherwise a worker that replaces a lost one meanwhile would write no checkpoint for as long as it
//!    lives.
//! 3. A checkpoint is read on a thread of its own: the training thread stops waiting when it is told to
//!    leave its group, and the next group continues with the same reading.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ganglion_membership::Checkpoint;
use ganglion_storage::{Address, Blocking, Pauses, Storage, reason};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::checkpoint::{CheckpointError, Snapshot};

/// Limit on the first answer that a joining worker waits for. A refusal takes no longer, including one for
/// lack of credentials.
const FIRST_LIMIT: Duration = Duration::from_secs(40);
/// Limit on retries of a failing storage where nothing else can be done.
const LIMIT: Duration = Duration::from_secs(600);
/// First and longest pause between two attempts.
pub(crate) const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];

/// Checkpoint storage, with what is known of its owner.
pub(crate) struct RunStorage {
    blocking: Blocking,
    run: String,
    /// Whether the storage was verified to be the run's.
    known: AtomicBool,
    /// Whether this worker can write to the storage, as far as is known.
    pub seen: bool,
}

impl RunStorage {
    /// Opens the storage at an address and asks for its owner.
    ///
    /// # Errors
    /// The address cannot be used by this program at all; the message says why, and how to fix it.
    pub(crate) fn open(address: &str, run: &str) -> Result<RunStorage, String> {
        let wrong = |what: String| format!("checkpoint.url {address}: {what}");
        let parsed = Address::parse(address).map_err(|error| wrong(error.to_string()))?;
        // A folder that is not here may be mounted on other workers only. Another address must be
        // usable.
        let opened = match (&parsed, Storage::open(&parsed)) {
            // The folder does not exist on this machine.
            (Address::Folder(_), Err(_)) => None,
            (_, opened) => Some(opened.map_err(wrong)?),
        };
        let is_there = opened.is_some();
        // In place of a storage, so that all calls have one; `seen` keeps this worker from writing.
        let blocking = Blocking::new(opened.unwrap_or_else(Storage::in_memory));
        let blocking = blocking.map_err(|error| wrong(error.to_string()))?;
        let mut storage =
            RunStorage { blocking, run: run.to_string(), known: AtomicBool::new(false), seen: false };
        storage.seen = is_there && storage.ask();
        Ok(storage)
    }

    fn ask(&self) -> bool {
        let storage = self.storage();
        // Before the worker joins, so nobody waits for it but its own coordinator.
        match self.wait(async { timeout(FIRST_LIMIT, storage.owner()).await }) {
            Ok(Ok(owner)) => {
                let is_ours = owner.as_ref() == Some(&self.run);
                // Only ever set once it is known; a reader that sees it late asks once more.
                self.known.store(is_ours, Ordering::Relaxed);
                is_ours
            }
            // Such as a lack of rights: waiting does not help, so the others write.
            Ok(Err(error)) if !storage.may_mend(&error) => {
                let (address, reason) = (storage.address(), reason(&error));
                tracing::warn!("this worker writes no checkpoints: {address}: {reason}");
                false
            }
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(
                    "{} does not answer; it is asked again before something is written",
                    storage.address()
                );
                true
            }
        }
    }

    /// The underlying storage.
    pub(crate) fn storage(&self) -> &Storage {
        self.blocking.storage()
    }

    /// Blocks until an operation on the storage is done.
    pub(crate) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.blocking.wait(work)
    }

    /// Verifies that the storage is the run's, before something is written.
    pub(crate) async fn check(&self) -> Result<(), CheckpointError> {
        if self.known.load(Ordering::Relaxed) {
            return Ok(());
        }
        let failed = |source| CheckpointError::Storage { file: "the run's marker".to_string(), source };
        // Each time until it is known: a wrong storage must not get one file (invariant 1).
        if self.storage().owner().await.map_err(failed)?.as_ref() != Some(&self.run) {
            let what = format!("{} is not this run's storage", self.storage().address());
            return Err(CheckpointError::Corrupt(what));
        }
        self.known.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Retries an operation while waiting may help, up to 600 s. Each reason is logged once.
    pub(crate) async fn patiently<T>(
        &self,
        work: impl AsyncFn() -> Result<T, CheckpointError>,
    ) -> Result<T, CheckpointError> {
        let (started, mut pauses) = (Instant::now(), Pauses::new(PAUSES[0], PAUSES[1]));
        let mut told = String::new();
        loop {
            match work().await {
                Err(CheckpointError::Storage { file, source })
                    // Waits of the storage have limits of their own; this bounds their sum.
                    if self.storage().may_mend(&source) && started.elapsed() < LIMIT =>
                {
                    let reason = reason(&source);
                    // The same reason again would fill the log.
                    if told != reason {
                        let limit = LIMIT.as_secs();
                        tracing::warn!("{file}: {reason}; trying again for {limit} s at most");
                    }
                    told = reason;
                    sleep(pauses.draw()).await;
                }
                done => {
                    if done.is_ok() && !told.is_empty() {
                        tracing::warn!("{} works again", self.storage().address());
                    }
                    return done;
                }
            }
        }
    }
}

/// A checkpoint being read on a thread of its own.
pub(crate) struct Reading {
    checkpoint: Checkpoint,
    result: oneshot::Receiver<Result<Snapshot, CheckpointError>>,
}

impl Reading {
    /// Continues `earlier` if it reads the same checkpoint; else starts a thread that runs `read`.
    pub(crate) fn of(
        earlier: Option<Reading>,
        checkpoint: &Checkpoint,
        read: impl FnOnce() -> Result<Snapshot, CheckpointError> + Send + 'static,
    ) -> std::io::Result<Reading> {
        // Another checkpoint was chosen meanwhile: what was read is of no use.
        if let Some(earlier) = earlier.filter(|earlier| earlier.checkpoint == *checkpoint) {
            return Ok(earlier);
        }
        let (done, result) = oneshot::channel();
        // An error means that nobody waits any more.
        let work = move || drop(done.send(read()));
        thread::Builder::new().name("read".to_string()).spawn(work)?;
        Ok(Reading { checkpoint: checkpoint.clone(), result })
    }

    /// Waits up to 100 ms; returns the result once it is there.
    pub(crate) fn poll(&mut self, storage: &Arc<RunStorage>) -> Option<Result<Snapshot, CheckpointError>> {
        const LOOK: Duration = Duration::from_millis(100);
        let lost = || CheckpointError::Corrupt("the thread that read the checkpoint is gone".to_string());
        // Short, so that an order to leave the group is seen in time; a look that comes too early costs
        // nothing.
        match storage.wait(async { timeout(LOOK, &mut self.result).await }) {
            Ok(Ok(read)) => Some(read),
            Ok(Err(_)) => Some(Err(lost())),
            Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ganglion_membership::Position;
    use std::sync::mpsc;

    fn checkpoint(step: u64) -> Checkpoint {
        Checkpoint {
            step,
            phase: 0,
            position: Position(2 * step),
            state_digest: step.to_string(),
            files: Vec::new(),
        }
    }

    fn read_to_the_end(reading: Reading) -> String {
        let read = reading.result.blocking_recv().expect("its thread says how it went");
        let Err(error) = read else { panic!("the tests read nothing") };
        error.to_string()
    }

    /// Members that wait for a reader give up on it again and again; that must not restart its work.
    #[test]
    fn a_read_goes_on_in_the_next_group_unless_that_starts_from_another_checkpoint() {
        let (go_on, wait) = mpsc::channel::<()>();
        let slow = move || {
            wait.recv().expect("the test goes on");
            Err(CheckpointError::Corrupt("the first".to_string()))
        };
        let mut reading = Reading::of(None, &checkpoint(4), slow).unwrap();
        for _ in 0..3 {
            reading = Reading::of(Some(reading), &checkpoint(4), || panic!("it is read already")).unwrap();
        }
        go_on.send(()).unwrap();
        assert!(read_to_the_end(reading).contains("the first"));
        let other = || Err(CheckpointError::Corrupt("another".to_string()));
        let reading =
            Reading::of(None, &checkpoint(4), || Err(CheckpointError::Corrupt(String::new()))).unwrap();
        let reading = Reading::of(Some(reading), &checkpoint(8), other).unwrap();
        assert!(read_to_the_end(reading).contains("another"));
    }
}
