//! Claims about the positions of generations: each goes on from what the ones before it had committed.
//!
//! 1. A **fresh** start is at position 0.
//! 2. A start from a **checkpoint** is at the position of one that was journaled before, with the same
//!    digest. It may lie anywhere: all that held more are lost, or the checkpoint holds the most.
//! 3. A **healed** start is at most one phase behind what any of its members is known to have held since the
//!    last start that was not healed: as the source of a start, or as a member of a generation that reported
//!    a step. One phase, because members of a group differ by one at most. What only the lost have held is
//!    lost with them.
//! 4. Steps beyond a start that goes back are computed again. The coordinator compares each such row with the
//!    recorded one, and an event tells of a difference.

use std::collections::BTreeMap;

use super::Claim;
use super::evidence::Evidence;
use crate::journal::{GenerationRow, RecordedStart};

/// Each generation starts from a position that follows from where its state came from.
pub(super) fn starts_follow(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("each generation starts where its state was");
    let recorded = recorded(evidence);
    let mut held: Vec<Held> = Vec::new();
    let [mut fresh, mut healed, mut restored] = [0; 3];
    for row in &evidence.history.generations {
        if ["generations", "checkpoints"].iter().any(|table| evidence.may_lack(table, row.generation)) {
            // What it followed may be what is lost.
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
        if !matches!(row.start, Some(RecordedStart::Healed { .. })) {
            held.clear();
        }
        held.extend(Held::of(row, recorded.get(&row.generation).copied()));
    }
    claim.of(format!("{fresh} fresh, {healed} healed by a member, {restored} from a checkpoint"))
}

/// What is wrong with a start from a checkpoint.
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
    let late = known.generation >= row.generation;
    late.then(|| format!("the checkpoint of step {step}, phase {phase} was journaled later"))
}

/// A position, and the workers that held its state.
struct Held {
    position: u64,
    workers: Vec<u64>,
}

impl Held {
    /// What is known of a generation: its start was its source's, and what it reported was all its members'.
    fn of(row: &GenerationRow, recorded: Option<u64>) -> impl Iterator<Item = Held> {
        let all = || row.members.iter().map(|member| member.worker);
        let source = match row.start {
            Some(RecordedStart::Healed { rank } | RecordedStart::Checkpoint { rank, .. }) => {
                Some(rank as usize)
            }
            _ => None,
        };
        let workers = match source {
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

/// The end of the newest step that was recorded for each generation.
fn recorded(evidence: &Evidence) -> BTreeMap<u64, u64> {
    let mut newest = BTreeMap::new();
    for row in &evidence.rows.whole {
        let known = newest.entry(row.generation).or_insert(0);
        *known = evidence.end_of(row.step).max(*known);
    }
    newest
}

/// No step that was computed again gave another row.
pub(super) fn recomputed_steps_are_equal(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("steps that were computed again gave the same rows");
    for event in evidence.events_of("metrics_breach") {
        claim.breach(event.detail.clone().unwrap_or_else(|| "an event tells of another row".to_string()));
    }
    let back = |row: &&GenerationRow| !matches!(row.start, Some(RecordedStart::Healed { .. }));
    let starts: Vec<&GenerationRow> = evidence.history.generations.iter().filter(back).collect();
    let again = evidence.rows.whole.iter().filter(|row| {
        let end = evidence.end_of(row.step);
        starts.iter().any(|start| row.generation < start.generation && end > start.position)
    });
    claim.of(format!("{} rows lie beyond a later start from a checkpoint", again.count()))
}
