//! Keeping checkpoints: a task that writes manifests and removes old checkpoints, so that the shell's loop never waits for
//! a storage.
//!
//! 1. Checkpoints become valid one after the other, in the order in which they were ordered; so `latest` never goes back.
//! 2. What the storage refuses is tried again until it is done. Nothing is given up while the task lives.
//! 3. A checkpoint is told of once it is valid and the old ones are removed.

use std::time::Duration;

use ganglion_membership::Checkpoint;
use ganglion_proto::trace;
use ganglion_storage::{Pauses, reason};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinHandle;

use crate::checkpoints::Checkpoints;

/// The first pause after a failure, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// What the task has to say.
#[derive(Debug)]
pub enum Kept {
    /// A checkpoint is valid; the writing began at this time of a trace.
    Valid(Checkpoint, Duration),
    /// The storage refused it; it is tried again.
    Delayed(Checkpoint, String),
}

/// The shell's end of the task, which ends with it.
pub struct Keeper {
    address: String,
    orders: UnboundedSender<Checkpoint>,
    told: UnboundedReceiver<Kept>,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Starts the task; of old checkpoints it keeps so many, 0 for all.
    pub fn start(checkpoints: Checkpoints, keep_last: u64) -> Keeper {
        let (orders, ordered) = mpsc::unbounded_channel();
        let (telling, told) = mpsc::unbounded_channel();
        let address = checkpoints.storage().address().to_string();
        let task = tokio::spawn(keep(checkpoints, keep_last, ordered, telling));
        Keeper { address, orders, told, task }
    }

    /// The storage's address for workers.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Orders a checkpoint whose files are all there to be made valid.
    pub fn order(&self, checkpoint: Checkpoint) {
        // The task ends after this.
        let _ = self.orders.send(checkpoint);
    }

    /// What the task has to say next.
    pub async fn next(&mut self) -> Option<Kept> {
        self.told.recv().await
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(
    checkpoints: Checkpoints,
    keep_last: u64,
    mut ordered: UnboundedReceiver<Checkpoint>,
    telling: UnboundedSender<Kept>,
) {
    while let Some(checkpoint) = ordered.recv().await {
        let begun = trace::now();
        let mut pauses = Pauses::new(PAUSES[0], PAUSES[1]);
        while let Err(error) = checkpoints.commit(&checkpoint).await {
            let _ = telling.send(Kept::Delayed(checkpoint.clone(), reason(&error)));
            tokio::time::sleep(pauses.draw()).await;
        }
        if let Err(error) = checkpoints.prune(keep_last).await {
            tracing::warn!("cannot remove old checkpoints: {}", reason(&error));
        }
        let _ = telling.send(Kept::Valid(checkpoint, begun));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::Patience;
    use ganglion_membership::Position;

    fn checkpoint(step: u64) -> Checkpoint {
        let state_digest = "d".repeat(64);
        Checkpoint { position: Position(2 * step), step, phase: 0, files: Vec::new(), state_digest }
    }

    /// Invariants 1 and 2: the first order fails until its folder can be made, and the second waits for it.
    #[tokio::test]
    async fn a_storage_that_refuses_is_tried_again_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let address = folder.path().display().to_string();
        let checkpoints = Checkpoints::open(&address, "run", &Patience::silent()).await.unwrap();
        let in_the_way = folder.path().join(checkpoint(3).folder());
        std::fs::write(&in_the_way, "a file").unwrap();
        let mut keeper = Keeper::start(checkpoints.clone(), 0);
        keeper.order(checkpoint(3));
        keeper.order(checkpoint(4));
        let Some(Kept::Delayed(delayed, reason)) = keeper.next().await else { panic!("it is delayed") };
        assert!(delayed.step == 3 && !reason.is_empty());
        assert!(!folder.path().join("latest").exists());
        std::fs::remove_file(&in_the_way).unwrap();
        for step in [3, 4] {
            let valid = loop {
                if let Some(Kept::Valid(valid, _)) = keeper.next().await {
                    break valid;
                }
            };
            assert_eq!(valid.step, step);
        }
        assert_eq!(checkpoints.storage().latest().await.unwrap(), Some(checkpoint(4).folder()));
    }
}
