//! Checkpoint task: writes manifests and removes old checkpoints, so that the shell's loop never
//! waits for the storage.
//!
//! 1. Checkpoints become valid one after the other, in the order in which they were ordered; so
//!    `latest` never moves back.
//! 2. A refused order is retried until it is done, or until the shell gives it up: then the
//!    checkpoint is not valid. A checkpoint that `latest` names by then, or is about to, counts as
//!    valid before.
//! 3. A checkpoint is reported once it is valid and the old ones are removed.
//! 4. `best.json` names a valid checkpoint, and the model card beside it describes the same one.

use std::time::Duration;

use ganglion_membership::Checkpoint;
use ganglion_proto::message::MetricsRow;
use ganglion_proto::trace;
use ganglion_storage::{Pauses, reason};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::checkpoints::catalog::Checkpoints;

/// The first pause after a failure, and the longest.
// A store that is down for hours is asked twice a minute, and one that hiccups soon again.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// Report of the task to the shell.
#[derive(Debug)]
pub(crate) enum Kept {
    /// A checkpoint is valid; writing began at this time of the trace.
    Valid(Checkpoint, Duration),
    /// The checkpoint of a step was given up before it was valid.
    GivenUp(u64),
    /// The storage refused the checkpoint, for this reason; it is retried.
    Delayed(Checkpoint, String),
    /// The storage refused to have the best checkpoint named; it is retried.
    BestDelayed(u64, String),
    /// The newest whole checkpoint that the storage has, and the rows that workers left up to its step.
    Found(Option<Checkpoint>, Vec<MetricsRow>),
    /// The storage cannot be searched, for this reason; it is retried.
    SearchDelayed(String),
}

/// Files that describe the best checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct BestFiles {
    /// Step of the checkpoint.
    pub step: u64,
    /// Content of `best.json`.
    pub named: String,
    /// Content of the model card.
    pub card: String,
}

/// Order of the shell; the last field lists the folders that must not be removed.
enum Order {
    /// Make a checkpoint valid, unless all orders up to this number are given up.
    Commit(u64, Checkpoint, Vec<String>),
    /// Name the best checkpoint.
    Best(BestFiles, Vec<String>),
    /// Remove checkpoints beyond the retention limit.
    Prune(Vec<String>),
    /// Find the newest whole checkpoint.
    Search,
}

/// Handle of the task. Dropping it aborts the task.
pub(crate) struct Keeper {
    address: String,
    orders: UnboundedSender<Order>,
    /// Number of checkpoints ordered so far.
    ordered: u64,
    /// Orders up to this number are given up, unless they are valid.
    given_up: watch::Sender<u64>,
    told: UnboundedReceiver<Kept>,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Starts the task; it keeps the newest `keep_last` checkpoints, 0 for all.
    pub(crate) fn start(checkpoints: Checkpoints, keep_last: u64) -> Keeper {
        let (orders, ordered) = mpsc::unbounded_channel();
        let (telling, told) = mpsc::unbounded_channel();
        let address = checkpoints.storage().address().to_string();
        let (given_up, heard) = watch::channel(0);
        let task = tokio::spawn(keep(checkpoints, keep_last, ordered, telling, heard));
        Keeper { address, orders, ordered: 0, given_up, told, task }
    }

    /// Address of the storage, for workers.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Orders a checkpoint whose files are all there to be made valid. The folders in `protected`
    /// are not removed.
    pub(crate) fn order(&mut self, checkpoint: Checkpoint, protected: Vec<String>) {
        self.ordered += 1;
        // Sending fails only after the task has ended.
        let _ = self.orders.send(Order::Commit(self.ordered, checkpoint, protected));
    }

    /// Gives up the ordered checkpoints that are not valid yet.
    pub(crate) fn give_up(&self) {
        self.given_up.send_replace(self.ordered);
    }

    /// Orders the best checkpoint to be named.
    pub(crate) fn order_best(&self, files: BestFiles, protected: Vec<String>) {
        let _ = self.orders.send(Order::Best(files, protected));
    }

    /// Orders old checkpoints to be removed, since some may have waited for their evaluation.
    pub(crate) fn order_pruning(&self, protected: Vec<String>) {
        let _ = self.orders.send(Order::Prune(protected));
    }

    /// Orders a search for the newest whole checkpoint.
    pub(crate) fn search(&self) {
        let _ = self.orders.send(Order::Search);
    }

    /// Closes the queue and waits for the task, at most `limit`; returns whether it has finished.
    pub(crate) async fn finish(&mut self, limit: Duration) -> bool {
        let (closed, _) = mpsc::unbounded_channel();
        // Dropping the sender closes the queue: the task ends after its last order.
        self.orders = closed;
        // Bounded, for an order that is retried ends only with its storage. The rest is dropped with the
        // task.
        tokio::time::timeout(limit, &mut self.task).await.is_ok()
    }

    /// Waits for the next report of the task. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Kept> {
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
    mut given_up: watch::Receiver<u64>,
) {
    // Ends when the shell closes the queue, after the orders in it.
    while let Some(order) = ordered.recv().await {
        let begun = trace::now();
        // New for each order: the last one's failures say nothing about this one.
        let mut pauses = Pauses::new(PAUSES[0], PAUSES[1]);
        let mut is_valid = false;
        loop {
            let done = match &order {
                Order::Commit(number, checkpoint, _) => {
                    let is_wanted = || *number > *given_up.borrow();
                    let done = commit(&checkpoints, checkpoint, is_wanted).await;
                    done.map(|valid| is_valid = valid)
                        .map_err(|e| Kept::Delayed(checkpoint.clone(), reason(&e)))
                }
                Order::Best(BestFiles { step, named, card }, _) => {
                    let done = checkpoints.name_best(named, card).await;
                    done.map_err(|error| Kept::BestDelayed(*step, reason(&error)))
                }
                Order::Prune(_) => Ok(()),
                Order::Search => match search(&checkpoints).await {
                    Ok((newest, rows)) => {
                        let _ = telling.send(Kept::Found(newest, rows));
                        Ok(())
                    }
                    Err(error) => Err(Kept::SearchDelayed(reason(&error))),
                },
            };
            let Err(delayed) = done else { break };
            // Fails only if the shell has ended; the order is still carried out, up to the limit of
            // `finish`.
            let _ = telling.send(delayed);
            // A checkpoint that is given up need not wait for its storage, so the pause ends early.
            let _ = tokio::time::timeout(pauses.draw(), given_up.changed()).await;
        }
        let (Order::Commit(_, _, protected) | Order::Best(_, protected) | Order::Prune(protected)) = &order
        else {
            continue;
        };
        // Not retried: the next order prunes as well.
        if let Err(error) = checkpoints.prune(keep_last, protected).await {
            tracing::warn!("cannot remove old checkpoints: {}", reason(&error));
        }
        if let Order::Commit(_, checkpoint, _) = order {
            // After the pruning: a run that ends with this report leaves no checkpoint too many (3).
            let kept = if is_valid { Kept::Valid(checkpoint, begun) } else { Kept::GivenUp(checkpoint.step) };
            let _ = telling.send(kept);
        }
    }
}

/// The newest whole checkpoint, with the rows that workers left up to its step.
async fn search(
    checkpoints: &Checkpoints,
) -> Result<(Option<Checkpoint>, Vec<MetricsRow>), ganglion_storage::Error> {
    let Some(newest) = checkpoints.newest_valid().await?.0 else { return Ok((None, Vec::new())) };
    let rows = checkpoints.left_rows(newest.step).await?;
    Ok((Some(newest), rows))
}

/// Makes a checkpoint valid as long as it is wanted; returns whether it is valid.
async fn commit(
    checkpoints: &Checkpoints,
    checkpoint: &Checkpoint,
    is_wanted: impl Fn() -> bool,
) -> Result<bool, ganglion_storage::Error> {
    match is_wanted() {
        true => checkpoints.commit(checkpoint, is_wanted).await,
        // An earlier attempt may have written the manifest and never received the answer.
        false => checkpoints.withdraw(checkpoint).await.map(|()| false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoints::retry::Patience;
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

    /// Invariant 2: an order that is given up while its storage is away leaves no checkpoint behind, not even
    /// where an attempt has written the manifest, and another state of the same step can take its place.
    #[tokio::test]
    async fn what_is_given_up_is_not_valid_and_another_state_takes_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let address = folder.path().display().to_string();
        let checkpoints = Checkpoints::open(&address, "run", &Patience::silent()).await.unwrap();
        let other = Checkpoint { state_digest: "e".repeat(64), ..checkpoint(3) };
        let latest = folder.path().join("latest");
        // The manifest can be written, and `latest` cannot.
        std::fs::create_dir_all(latest.join("in the way")).unwrap();
        let mut keeper = Keeper::start(checkpoints.clone(), 0);
        keeper.order(checkpoint(3), Vec::new());
        let Some(Kept::Delayed(..)) = keeper.next().await else { panic!("it is delayed") };
        keeper.give_up();
        let Some(Kept::GivenUp(3)) = keeper.next().await else { panic!("it is given up") };
        assert_eq!(checkpoints.newest_valid().await.unwrap().0, None);
        std::fs::remove_dir_all(&latest).unwrap();
        keeper.order(other.clone(), Vec::new());
        let Some(Kept::Valid(valid, _)) = keeper.next().await else { panic!("it is valid") };
        assert_eq!(valid, other);
        assert_eq!(checkpoints.newest_valid().await.unwrap().0, Some(other));
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
