//! Start state of a run: the newest checkpoint, compared with the journal.
//!
//! 1. Missing state is never taken for no state. A run whose journal has a valid checkpoint goes on
//!    from a checkpoint or from living members, or it is refused; step 0 is only for users who ask
//!    for it.
//! 2. A refusal changes nothing: no record, and nothing in the storage.
//! 3. An older checkpoint in place of a missing or damaged one gives the same bits, so the run goes
//!    on from it, and reports which steps are computed again.

use ganglion_membership::{Checkpoint, StepShape};
use ganglion_proto::record::RunEvent;
use ganglion_proto::words::counted;

use crate::checkpoints::catalog::{Checkpoints, Damaged};
use crate::checkpoints::retry::Patience;
use crate::control::records::Records;
use crate::error::Failure;
use crate::journal::{Fact, Journal, JournalError, parse_shape};
use crate::records::chronicle::Chronicle;

/// Inputs of the search, from a run that starts.
pub(crate) struct Asked<'a> {
    /// Address of the storage, from the job.
    pub place: &'a str,
    /// Unique name of the run.
    pub run: &'a str,
    /// Whether members of the newest generation may be alive.
    pub may_live: bool,
    /// Whether the user allows step 0 where all checkpoints are lost.
    pub from_start: bool,
}

/// Result of the search for checkpoints.
pub(crate) struct Found {
    /// The storage, marked as the run's.
    pub checkpoints: Checkpoints,
    /// The newest whole checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// Message for a run that may not start from step 0 unless a member that holds a state comes
    /// back; `None` if it may.
    pub lost: Option<String>,
}

/// Finds the newest checkpoint, and reports those that are missing or damaged.
pub(crate) async fn find(
    asked: &Asked<'_>,
    journal: &mut Journal,
    records: &mut Records,
    patience: &Patience,
) -> Result<Found, Failure> {
    let known = newest_known(journal, &records.chronicle)?;
    let before = journal.fact(Fact::Storage)?;
    let refusal = |reason: &str| {
        let known = known.as_ref()?;
        Some(refusal(known, asked.place, before.as_deref(), reason))
    };
    // While members may live, one that comes back may hold the state; only without any the loss is
    // final.
    let stops = |lost: &Option<String>| match lost {
        Some(lost) if !asked.may_live && !asked.from_start => Err(Failure::Input(lost.clone())),
        _ => Ok(()),
    };
    if known.is_some() {
        // Before the storage is opened: that would create a folder that is only not mounted, and the run
        // would go on in the wrong place.
        let absence = Checkpoints::absence(asked.place, patience).await?;
        stops(&absence.and_then(|reason| refusal(&reason)))?;
    }
    // From here on the storage may be written: it is marked as the run's.
    let checkpoints = Checkpoints::open(asked.place, asked.run, patience).await?;
    let storage = checkpoints.storage();
    // Reads every file of the newest checkpoint, however long that takes; only a storage that is away
    // has a limit.
    let newest = patience.wait_for(storage, async || checkpoints.newest_valid().await).await;
    let (checkpoint, damaged) = newest.map_err(|error| storage_failed(&checkpoints, patience, &error))?;
    let mut lost = match checkpoint {
        Some(_) => None,
        None => refusal(&none_whole(&damaged)),
    };
    stops(&lost)?;
    if let Some(checkpoint) = checkpoint.as_ref().filter(|_| asked.from_start && known.is_some()) {
        return Err(Failure::Input(format!(
            "--from-start: the run has {} in {}, and goes on from there without it; to begin anew, name another \
             run, with --set job.name=NAME or --run-dir",
            checkpoint.folder(),
            asked.place
        )));
    }
    // The user has consented to step 0.
    if asked.from_start {
        lost = None;
    }
    let told = Told { known: known.as_ref(), found: checkpoint.as_ref(), lives: lost.is_some() };
    told.tell(&damaged, asked.place, records);
    if let Some(checkpoint) = &checkpoint {
        settle(journal, &checkpoints, records, checkpoint, patience).await?;
    }
    let address = storage.address().to_string();
    if before.as_ref() != Some(&address) {
        journal.set_fact(Fact::Storage, &address)?;
    }
    Ok(Found { checkpoints, checkpoint, lost })
}

/// The newest checkpoint that was valid. Earlier versions did not journal validity; their events
/// have it.
fn newest_known(journal: &Journal, chronicle: &Chronicle) -> Result<Option<Checkpoint>, JournalError> {
    let mut journaled = journal.checkpoints()?;
    let known = chronicle.look();
    let told = |digest: &str| known.checkpoints.iter().any(|saved| saved.record.state_digest == digest);
    // A checkpoint that was decided on and never valid is no loss.
    journaled.retain(|row| row.valid || told(&row.checkpoint.state_digest));
    Ok(journaled.pop().map(|row| row.checkpoint))
}

fn none_whole(damaged: &[Damaged]) -> String {
    if damaged.is_empty() {
        return "there is no checkpoint".to_string();
    }
    let lines: Vec<String> =
        damaged.iter().map(|damage| format!("{}: {}", damage.folder, damage.reason)).collect();
    format!("no checkpoint is whole ({})", lines.join("; "))
}

fn refusal(known: &Checkpoint, place: &str, before: Option<&str>, reason: &str) -> String {
    let (folder, step, digest) = (known.folder(), known.step, &known.state_digest);
    let saved = before.map(|before| format!(", saved in {before}")).unwrap_or_default();
    format!(
        "the run's checkpoints are not there: its journal knows {folder} (state_digest {digest}){saved}, and in {place} \
         {reason}\n  mount or restore them, or name their place with --set checkpoint.url=ADDRESS: the same command then \
         goes on from step {step}\n  to begin anew, name another run, with --set job.name=NAME or --run-dir; to compute \
         {} again in this one, with the same bits, add --from-start",
        counted(step, "step")
    )
}

/// Warnings about checkpoints that are not used.
struct Told<'a> {
    known: Option<&'a Checkpoint>,
    found: Option<&'a Checkpoint>,
    /// Whether the run may only go on from living members.
    lives: bool,
}

impl Told<'_> {
    fn tell(&self, damaged: &[Damaged], place: &str, records: &mut Records) {
        let instead = match self.found {
            Some(checkpoint) => checkpoint.folder(),
            None if self.lives => "members that live".to_string(),
            None => "the start".to_string(),
        };
        for Damaged { folder, reason } in damaged {
            records.message(&format!(
                "warning: checkpoint {folder} is damaged ({reason}); going on from {instead}"
            ));
            records.event(&RunEvent::CheckpointDamaged {
                folder: folder.clone(),
                instead: instead.clone(),
                reason: reason.clone(),
            });
        }
        let Some(known) = self.known else { return };
        let folder = known.folder();
        let newer = self.found.is_none_or(|found| found.position < known.position);
        if !newer || damaged.iter().any(|damage| damage.folder == folder) {
            return;
        }
        let first = self.found.map_or(0, |found| found.step) + 1;
        let again = match self.lives {
            true => "if none of them is back, the run ends".to_string(),
            false => format!("steps {first} to {} are computed again, with the same bits", known.step),
        };
        records.message(&format!(
            "warning: checkpoint {folder}, the newest of this run, is not in {place}; going on from {instead}: {again}"
        ));
        let (place, step) = (place.to_string(), known.step);
        records.event(&RunEvent::CheckpointMissing { folder, instead, place, step });
    }
}

/// Takes over the rows that workers left beside the newest checkpoint, and makes it valid everywhere: an
/// earlier coordinator may have died before announcing it, or workers may have written it without a
/// coordinator.
async fn settle(
    journal: &mut Journal,
    checkpoints: &Checkpoints,
    records: &mut Records,
    checkpoint: &Checkpoint,
    patience: &Patience,
) -> Result<(), Failure> {
    let storage = checkpoints.storage();
    let left = patience.wait_for(storage, async || checkpoints.left_rows(checkpoint.step).await).await;
    let left = left.map_err(|error| storage_failed(checkpoints, patience, &error))?;
    records.take_left_rows(left, known_samples(journal)?);
    // Rows are written before their checkpoint counts, as during training.
    records.finish_writing();
    let latest = patience.wait_for(storage, async || storage.latest().await).await;
    // `latest` is a hint (M11). Where it cannot be read the checkpoint is made valid once more, which
    // changes nothing.
    if latest.ok().flatten().as_deref() != Some(checkpoint.folder().as_str()) {
        // Before the manifest, as during training: the audit expects each announced checkpoint in the
        // journal.
        journal.commit(checkpoint)?;
        let committed =
            patience.wait_for(storage, async || checkpoints.commit(checkpoint, || true).await).await;
        committed.map_err(|error| storage_failed(checkpoints, patience, &error))?;
        records.checkpoint(checkpoint);
    }
    // From here on a start without this checkpoint is refused.
    journal.made_valid(checkpoint)?;
    Ok(())
}

/// Failure of a starting run whose checkpoint storage failed.
pub(crate) fn storage_failed(
    checkpoints: &Checkpoints,
    patience: &Patience,
    error: &ganglion_storage::Error,
) -> Failure {
    let storage = checkpoints.storage();
    Failure::Other(match storage.is_away(error) {
        true => format!("checkpoints: {}", patience.over(storage, error)),
        false => format!("checkpoints: {}", ganglion_storage::reason(error)),
    })
}

/// Shape of the objective's steps, once a worker has loaded it. Earlier versions did not journal it.
pub(crate) fn known_shape(journal: &Journal) -> Result<Option<StepShape>, Failure> {
    Ok(journal.fact(Fact::Shape)?.and_then(|text| parse_shape(&text)))
}

/// Size of the data set, once a worker has loaded it.
pub(crate) fn known_samples(journal: &Journal) -> Result<Option<u64>, Failure> {
    Ok(journal.fact(Fact::Samples)?.and_then(|samples| samples.parse().ok()))
}
