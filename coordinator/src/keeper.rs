//! Keeping checkpoints: a task that writes manifests and removes old checkpoints, so that the shell's loop never waits for
//! a storage.
//!
//! 1. Checkpoints become valid one after the other, in the order in which they were ordered; so `latest` never goes back.
//! 2. What the storage refuses is tried again until it is done. Nothing is given up while the task lives.
//! 3. A checkpoint is told of once it is valid and the old ones are removed.
//! 4. `best.json` names a checkpoint that is valid, and the model card beside it tells of the same one.

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
    /// The storage refused to have the best checkpoint named; it is tried again.
    BestDelayed(u64, String),
}

/// What is written of the best checkpoint.
#[derive(Clone, Debug)]
pub struct BestFiles {
    /// Its step.
    pub step: u64,
    /// The content of `best.json`.
    pub named: String,
    /// The model card.
    pub card: String,
}

/// What there is to do; with each the folders that must not be removed.
enum Order {
    /// Make a checkpoint valid.
    Commit(Checkpoint, Vec<String>),
    /// Name the best one.
    Best(BestFiles, Vec<String>),
    /// Remove what need not be kept any more.
    Prune(Vec<String>),
}

/// The shell's end of the task, which ends with it.
pub struct Keeper {
    address: String,
    orders: UnboundedSender<Order>,
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

    /// Orders a checkpoint whose files are all there to be made valid. The folders in `protected` are not removed.
    pub fn order(&self, checkpoint: Checkpoint, protected: Vec<String>) {
        // The task ends after this.
        let _ = self.orders.send(Order::Commit(checkpoint, protected));
    }

    /// Orders the best checkpoint to be named.
    pub fn order_best(&self, files: BestFiles, protected: Vec<String>) {
        let _ = self.orders.send(Order::Best(files, protected));
    }

    /// Orders old checkpoints to be removed, since some may have waited for their evaluation.
    pub fn order_pruning(&self, protected: Vec<String>) {
        let _ = self.orders.send(Order::Prune(protected));
    }

    /// Lets the task do what was ordered, at most this long; returns whether it did.
    pub async fn finish(&mut self, limit: Duration) -> bool {
        let (closed, _) = mpsc::unbounded_channel();
        self.orders = closed;
        tokio::time::timeout(limit, &mut self.task).await.is_ok()
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
    mut ordered: UnboundedReceiver<Order>,
    telling: UnboundedSender<Kept>,
) {
    while let Some(order) = ordered.recv().await {
        let begun = trace::now();
        let mut pauses = Pauses::new(PAUSES[0], PAUSES[1]);
        let (Order::Commit(_, protected) | Order::Best(_, protected) | Order::Prune(protected)) = &order;
        loop {
            let (done, delayed): (_, Box<dyn Fn(String) -> Kept + Send>) = match &order {
                Order::Commit(checkpoint, _) => {
                    let delayed = |reason| Kept::Delayed(checkpoint.clone(), reason);
                    (checkpoints.commit(checkpoint).await, Box::new(delayed))
                }
                Order::Best(BestFiles { step, named, card }, _) => {
                    let delayed = |reason| Kept::BestDelayed(*step, reason);
                    (checkpoints.name_best(named, card).await, Box::new(delayed))
                }
                Order::Prune(_) => break,
            };
            let Err(error) = done else { break };
            let _ = telling.send(delayed(reason(&error)));
            tokio::time::sleep(pauses.draw()).await;
        }
        if let Err(error) = checkpoints.prune(keep_last, protected).await {
            tracing::warn!("cannot remove old checkpoints: {}", reason(&error));
        }
        if let Order::Commit(checkpoint, _) = order {
            let _ = telling.send(Kept::Valid(checkpoint, begun));
        }
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
        keeper.order(checkpoint(3), Vec::new());
        keeper.order(checkpoint(4), Vec::new());
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

    /// Invariant 4, and that the best is not removed.
    #[tokio::test]
    async fn the_best_is_named_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let address = folder.path().display().to_string();
        let checkpoints = Checkpoints::open(&address, "run", &Patience::silent()).await.unwrap();
        let mut keeper = Keeper::start(checkpoints.clone(), 1);
        let best = vec![checkpoint(3).folder()];
        keeper.order(checkpoint(3), Vec::new());
        let (named, card) = ("named".to_string(), "card".to_string());
        keeper.order_best(BestFiles { step: 3, named, card }, best.clone());
        keeper.order(checkpoint(4), best.clone());
        keeper.order(checkpoint(5), best);
        assert!(keeper.finish(Duration::from_secs(60)).await);
        let kept = [3, 5].map(|step| checkpoint(step).folder());
        assert_eq!(checkpoints.storage().checkpoints().await.unwrap(), kept);
        let read = |file: &str| std::fs::read_to_string(folder.path().join(file)).unwrap();
        assert_eq!((read("best.json"), read("model-card.md")), ("named".to_string(), "card".to_string()));
    }
}
