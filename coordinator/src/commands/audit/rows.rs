//! Claims about the rows of metrics.
//!
//! A step must have a row if it is a multiple of the cadence of a generation that is known to have
//! committed it. `metrics.every_steps` may change from term to term, so each term's is journaled.
//! Of a generation all steps are known from its start up to the greatest of
//! - the update index at which a member was the source of the next generation's state,
//! - the end of a step that was recorded for it,
//! - the update index of a checkpoint that was committed while it was the newest.
//!
//! The last step of a run that ended as complete must have a row too. Other rows are allowed: a
//! stop reports its step.

use std::collections::{BTreeMap, BTreeSet};

use ganglion_proto::record::{MetricsRow, RunEvent, RunOutcome};
use ganglion_proto::words::counted;

use super::Claim;
use super::aside::may_have_held;
use super::evidence::Evidence;
use crate::journal::{GenerationRow, RecordedStart};

/// Claims that every step that was to be reported has exactly one row.
pub(super) fn every_step_has_one(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("every reported step has one row");
    claim.breaches.extend(evidence.rows.damaged.iter().cloned());
    let mut steps = BTreeSet::new();
    for row in &evidence.rows.whole {
        claim.expect(steps.insert(row.step), || format!("metrics.jsonl has step {} twice", row.step));
    }
    let mut due = BTreeSet::new();
    let reached = reached(evidence);
    for row in &evidence.history.generations {
        let every = cadence(evidence, row);
        let phases = evidence.job.phases_per_step();
        let (first, last) = (row.position / phases + 1, reached[&row.generation] / phases);
        // A term of an older version did not journal its cadence, so nothing is known to be due in it.
        if every > 0 {
            let multiples = (first.div_ceil(every)..=last / every).map(|multiple| multiple * every);
            // More steps than there are rows need not be listed: one is missing then, however far a
            // damaged number reaches.
            due.extend(multiples.take(steps.len() + 1));
        }
    }
    due.extend(last_step(evidence));
    let missing = due.difference(&steps).copied();
    // Rows of a damaged record are told as lost by another claim; they are no breach here.
    let (lost, missing): (Vec<u64>, Vec<u64>) = missing.partition(|step| may_have_held(evidence, *step));
    if let [first, ..] = missing.as_slice() {
        claim.breach(format!("metrics.jsonl lacks step {first}{}", others(missing.len() - 1)));
    }
    let unknown = evidence.history.terms.iter().filter(|row| row.metrics_every_steps == 0).count();
    let last = steps.last().copied().unwrap_or(0);
    let lost = match lost.len() {
        0 => String::new(),
        count => format!("; {count} that were due are lost with a damaged record"),
    };
    claim.of(format!(
        "{} up to step {last}, {} of them due; {} did not journal which are{lost}",
        counted(steps.len(), "row"),
        due.len(),
        counted(unknown, "term")
    ))
}

fn others(count: usize) -> String {
    if count == 0 { String::new() } else { format!(" and {count} more that were due") }
}

fn cadence(evidence: &Evidence, row: &GenerationRow) -> u64 {
    let term = evidence.history.terms.iter().find(|term| term.term == row.term);
    term.map_or(0, |term| term.metrics_every_steps)
}

/// Update index that each generation is known to have reached.
fn reached(evidence: &Evidence) -> BTreeMap<u64, u64> {
    let history = &evidence.history;
    let mut reached: BTreeMap<u64, u64> =
        history.generations.iter().map(|row| (row.generation, row.position)).collect();
    let mut raise = |generation: u64, position: u64| {
        reached.entry(generation).and_modify(|known| *known = position.max(*known));
    };
    for pair in history.generations.windows(2) {
        // The source held this state, and was a member of the generation before.
        if let Some(RecordedStart::Healed { .. }) = pair[1].start {
            raise(pair[0].generation, pair[1].position);
        }
    }
    evidence.rows.whole.iter().for_each(|row| raise(row.generation, evidence.end_of(row.step)));
    history.checkpoints.iter().for_each(|row| raise(row.generation, row.position));
    reached
}

/// Step of the newest checkpoint, if the run ended as complete.
fn last_step(evidence: &Evidence) -> Option<u64> {
    let last = evidence.events.whole.last()?;
    let complete = matches!(last, Some(RunEvent::RunEnded { outcome: RunOutcome::Complete, .. }));
    let newest = evidence.history.checkpoints.last()?;
    complete.then_some(newest.step)
}

/// Claims that each row is one that its generation can have committed: after its start, and with as
/// many workers as it has; and that it counts the images that the job takes up to its step.
pub(super) fn are_of_their_generation(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("each row is of a generation that can have committed it");
    let generations: BTreeMap<u64, &GenerationRow> =
        evidence.history.generations.iter().map(|row| (row.generation, row)).collect();
    let mut seen = BTreeSet::new();
    for row in &evidence.rows.whole {
        let MetricsRow { step, generation, .. } = row;
        seen.insert(generation);
        match generations.get(generation) {
            None if evidence.may_lack("generations", *generation) => {}
            None => {
                claim.breach(format!("step {step} is of generation {generation}, which was never formed"))
            }
            Some(formed) => {
                // A step that ended before the start belongs to an earlier generation.
                claim.expect(evidence.end_of(*step) > formed.position, || {
                    let start = formed.position;
                    format!("step {step} is of generation {generation}, which started after it, at position {start}")
                });
                let workers = formed.members.len();
                claim.expect(row.world_size as usize == workers, || {
                    format!(
                        "step {step} tells of {}, generation {generation} had {workers}",
                        counted(row.world_size, "worker")
                    )
                });
            }
        }
        let images = step.saturating_mul(evidence.job.samples_per_step());
        claim.expect(row.images_seen == images, || {
            format!("step {step} tells of {} images, the job takes {images}", row.images_seen)
        });
    }
    let (rows, generations) = (evidence.rows.whole.len(), seen.len());
    claim.of(format!("{} of {}", counted(rows, "row"), counted(generations, "generation")))
}
