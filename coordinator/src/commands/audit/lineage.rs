//! Claims about the update indices at which generations start: each follows from what the earlier
//! ones had committed.
//!
//! 1. A **fresh** start is at update index 0.
//! 2. A start from a **checkpoint** is at the update index of one that was journaled before, with
//!    the same digest. The index may be any: either all members that held more are lost, or the
//!    checkpoint holds the most.
//! 3. A **healed** start (state sync) is at most one phase behind what any of its members is known
//!    to have held since the last start that was not healed: as the source of a start, or as a
//!    member of a generation that reported a step. One phase, because members of a group differ by
//!    one at most. A state that only lost members held is lost with them.
//! 4. Steps beyond a start that goes back are computed again. The coordinator compares each such
//!    row with the recorded one, and reports a difference as an event.

use std::collections::BTreeMap;

use ganglion_proto::record::RunEvent;
use ganglion_proto::words::counted;

use super::Claim;
use super::evidence::Evidence;
use crate::journal::{GenerationRow, RecordedStart};

/// Claims that each generation starts at an update index that follows from the source of its state.
pub(super) fn starts_follow(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("each generation starts where its state was");
    let recorded = recorded(evidence);
    let mut held: Vec<Held> = Vec::new();
    let [mut fresh, mut healed, mut restored] = [0; 3];
    for row in &evidence.history.generations {
        if ["generations", "checkpoints"].iter().any(|table| evidence.may_lack(table, row.generation)) {
            // Its predecessor may be among the lost rows.
            continue;
        }
        let wrong = match &row.start {
            Some(RecordedStart::Fresh) => {
                fresh += 1;
                (row.position != 0).then(|| "a fresh start is at 0".to_string())
            }
            Some(RecordedStart::Checkpoint { step, phase, state_digest, rank }) => {
                restored += 1;
                let journaled = committed(evidence, row, (*step, u64::from(*phase)), state_digest);
                journaled.or_else(|| without_rank(row, *rank))
            }
            Some(RecordedStart::Healed { rank }) => {
                healed += 1;
                behind(row, &held).or_else(|| without_rank(row, *rank))
            }
            None => Some("its start cannot be read".to_string()),
        };
        if let Some(wrong) = wrong {
            claim.breach(format!("generation {} at position {}: {wrong}", row.generation, row.position));
        }
        // States from before the return to a checkpoint are computed again, and bound nothing any more
        // (3).
        if !matches!(row.start, Some(RecordedStart::Healed { .. })) {
            held.clear();
        }
        held.extend(Held::of(row, recorded.get(&row.generation).copied()));
    }
    claim.of(format!("{fresh} from step 0, {healed} from a member's state, {restored} from a checkpoint"))
}

/// Describes the fault of a start from a checkpoint, if there is one.
fn committed(evidence: &Evidence, row: &GenerationRow, at: (u64, u64), digest: &str) -> Option<String> {
    let (step, phase) = at;
    let position = evidence.end_of(step) + phase;
    if row.position != position {
        return Some(format!("the checkpoint of step {step}, phase {phase} is at {position}"));
    }
    let rows = &evidence.history.checkpoints;
    let Some(known) = rows.iter().find(|known| (known.step, known.phase) == at) else {
        return Some(format!("a checkpoint of step {step}, phase {phase} was never journaled"));
    };
    if known.state_digest != digest {
        return Some(format!("the checkpoint of step {step}, phase {phase} has another digest"));
    }
    // A checkpoint that was committed under this generation cannot be its source.
    let late = known.generation >= row.generation;
    late.then(|| format!("the checkpoint of step {step}, phase {phase} was journaled later"))
}

/// An update index, and the workers that held its state.
struct Held {
    position: u64,
    workers: Vec<u64>,
}

impl Held {
    /// States that a generation is known to have held: its start, held by the source, and its
    /// reported steps, held by all members.
    fn of(row: &GenerationRow, recorded: Option<u64>) -> impl Iterator<Item = Held> {
        let all = || row.members.iter().map(|member| member.worker);
        let source = match row.start {
            Some(RecordedStart::Healed { rank } | RecordedStart::Checkpoint { rank, .. }) => {
                Some(rank as usize)
            }
            _ => None,
        };
        let workers = match source {
            // The source alone: the others may have died before they received it.
            Some(rank) => all().skip(rank).take(1).collect(),
            None => all().collect(),
        };
        let start = Held { position: row.position, workers };
        std::iter::once(start).chain(recorded.map(|position| Held { position, workers: all().collect() }))
    }
}

fn behind(row: &GenerationRow, held: &[Held]) -> Option<String> {
    if held.is_empty() {
        return Some("nobody before it can have held a state".to_string());
    }
    let is_member = |worker: &u64| row.members.iter().any(|member| member.worker == *worker);
    let by_members = held.iter().filter(|held| held.workers.iter().any(is_member));
    let reached = by_members.map(|held| held.position).max().unwrap_or(0);
    // Invariant 3.
    let behind = row.position + 1 < reached;
    behind.then(|| format!("the ones before it had reached {reached}, and it is from no checkpoint"))
}

fn without_rank(row: &GenerationRow, rank: u32) -> Option<String> {
    let ranks = row.members.len();
    (rank as usize >= ranks).then(|| format!("its state is from rank {rank} of {ranks}"))
}

/// End of the newest recorded step of each generation.
fn recorded(evidence: &Evidence) -> BTreeMap<u64, u64> {
    let mut newest = BTreeMap::new();
    for row in &evidence.rows.whole {
        let known = newest.entry(row.generation).or_insert(0);
        *known = evidence.end_of(row.step).max(*known);
    }
    newest
}

/// Claims that no recomputed step differed from its recorded row.
pub(super) fn recomputed_steps_are_equal(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("steps that were computed again gave the same rows");
    for event in evidence.events() {
        if let RunEvent::MetricsBreach { detail } = event {
            claim.breach(detail.clone());
        }
    }
    let back = |row: &&GenerationRow| !matches!(row.start, Some(RecordedStart::Healed { .. }));
    let starts: Vec<&GenerationRow> = evidence.history.generations.iter().filter(back).collect();
    let again = evidence.rows.whole.iter().filter(|row| {
        let end = evidence.end_of(row.step);
        starts.iter().any(|start| row.generation < start.generation && end > start.position)
    });
    claim.of(format!(
        "{} computed again after a start from an earlier checkpoint",
        counted(again.count(), "row")
    ))
}
