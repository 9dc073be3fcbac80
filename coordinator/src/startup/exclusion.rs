//! Exclusion of samples from a run that has begun: a change of its job, from its newest state on.
//!
//! 1. A change takes effect only where no record exists: not before the newest row of metrics, the
//!    newest evaluation and the newest checkpoint. So all steps that are computed again up to there
//!    get the same bits.
//! 2. The journal has a change before any worker, and job.toml has it once a group has formed with it.
//!    Until then it can be replaced by another: a mistake in it costs nothing.
//! 3. Members of earlier terms are quiesced, or past their lease, before a change is decided.

use ganglion_membership::OF_SAMPLES;
use ganglion_proto::job::{Exclusion, Job};

use crate::control::records::Records;
use crate::journal::{Journal, JournalError};

/// Item of the fingerprint of the environment that identifies the data set's names.
const NAMES: &str = "data_names";

/// Decides from which update on samples are left out.
pub(crate) fn decide(
    files: Vec<String>,
    job: &Job,
    journal: &Journal,
    records: &Records,
) -> Result<Exclusion, JournalError> {
    let phases = job.phases_per_step();
    let evaluated = journal.evaluations()?.last().map_or(0, |row| row.step);
    let saved = journal.checkpoints()?.last().map_or(0, |last| last.checkpoint.position.0);
    let newest = saved.max(records.last_step().max(evaluated) * phases);
    let exclusions = &job.data.exclusions;
    let earlier = exclusions.last().map_or(0, |last| last.after_step * phases + last.after_phase);
    // Never before the last exclusion: job.toml has the tables in this order.
    let from = newest.max(earlier);
    // Workers compare this: the same names must mean the same files, or another sample would be left
    // out.
    let names = journal.passport()?.and_then(|passport| passport.0.get(NAMES).cloned());
    Ok(Exclusion { after_step: from / phases, after_phase: from % phases, names, files })
}

/// Adds an exclusion to the job, and journals it.
pub(crate) fn write(exclusion: &Exclusion, job: &mut Job, journal: &mut Journal) -> Result<(), JournalError> {
    job.data.exclusions.push(exclusion.clone());
    // Samples left out from the start are not a part of the run, so all items about samples are
    // reported anew.
    let forgotten = if exclusion.is_from_the_start() { &OF_SAMPLES[..] } else { &["data", "exclusions"] };
    journal.exclude(job.data.exclusions.len(), forgotten)
}
