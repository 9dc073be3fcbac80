//! Claims about terms, generations and their members.

use std::collections::{BTreeMap, BTreeSet};

use ganglion_proto::record::{RunEvent, SavedCheckpoint};
use ganglion_proto::words::counted;

use super::Claim;
use super::evidence::Evidence;
use crate::journal::GenerationRow;

/// Claims that terms and generations are numbered in the order in which they came, and that no
/// generation is of a term that is unknown or older than the one of the generation before.
pub(super) fn numbers_grow(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("terms and generations only grow");
    let history = &evidence.history;
    let known: BTreeSet<u64> = history.terms.iter().map(|row| row.term).collect();
    let mut newest = 0;
    for row in &history.generations {
        let GenerationRow { generation, term, .. } = row;
        claim.expect(known.contains(term) || evidence.may_lack("terms", *term), || {
            format!("generation {generation} is of term {term}, which never began")
        });
        // One term forms many generations, so equal is right.
        claim.expect(*term >= newest, || {
            format!("generation {generation} is of term {term}, the one before it of term {newest}")
        });
        newest = newest.max(*term);
    }
    // Events are in the file in the order in which they happened.
    let numbers = |number: fn(&RunEvent) -> Option<u64>| evidence.events().filter_map(number).collect();
    let started: Vec<u64> = numbers(|event| match event {
        RunEvent::CoordinatorStarted { term, .. } => Some(*term),
        _ => None,
    });
    let formed: Vec<u64> = numbers(|event| match event {
        RunEvent::GenerationFormed { generation, .. } => Some(*generation),
        _ => None,
    });
    for (what, numbers) in [("term", started), ("generation", formed)] {
        for pair in numbers.windows(2).filter(|pair| pair[0] >= pair[1]) {
            claim.breach(format!("events.jsonl has {what} {} after {what} {}", pair[1], pair[0]));
        }
    }
    let (terms, generations) = (history.terms.len(), history.generations.len());
    let workers = counted(history.workers.len(), "worker");
    claim.of(format!("{}, {}, {workers}", counted(terms, "term"), counted(generations, "generation")))
}

/// Claims that in each generation every data shard has one owner: the ranges of the ranks follow on
/// each other from 0 to the last, and each rank is another worker, admitted in that term or before.
pub(super) fn shards_are_dealt(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("each generation deals every data shard to one worker");
    let shards = evidence.job.job.data_shards;
    for row in &evidence.history.generations {
        let GenerationRow { generation, members, .. } = row;
        let mut next = 0;
        for (rank, member) in members.iter().enumerate() {
            let [first, end] = member.shards;
            claim.expect(first == next && first < end, || {
                format!("generation {generation} deals shards {first}..{end} to rank {rank}, where {next} is the next")
            });
            next = end;
        }
        claim.expect(next == shards, || {
            format!("generation {generation} deals shards up to {next} of {shards}")
        });
        expect_workers(&mut claim, evidence, row);
    }
    let largest = evidence.history.generations.iter().map(|row| row.members.len()).max().unwrap_or(0);
    let generations = evidence.history.generations.len();
    let (shards, generations) = (counted(shards, "data shard"), counted(generations, "generation"));
    claim.of(format!("{shards} in {generations} of up to {}", counted(largest, "worker")))
}

fn expect_workers(claim: &mut Claim, evidence: &Evidence, row: &GenerationRow) {
    let mut seen = BTreeSet::new();
    for member in &row.members {
        let (generation, worker) = (row.generation, member.worker);
        claim.expect(seen.insert(worker), || format!("generation {generation} has worker {worker} twice"));
        let admitted = evidence.history.workers.get(&worker).is_some_and(|term| *term <= row.term);
        claim.expect(admitted || evidence.may_lack("workers", worker), || {
            format!("generation {generation} has worker {worker}, who was not admitted")
        });
    }
}

/// Claims that events agree with the journal. An event may be missing where a coordinator died
/// before it wrote it; no event may report anything else.
pub(super) fn events_agree(evidence: &Evidence) -> Claim {
    let mut claim = Claim::new("events agree with the journal");
    claim.breaches.extend(evidence.events.damaged.iter().cloned());
    let history = &evidence.history;
    let generations: BTreeMap<u64, &GenerationRow> =
        history.generations.iter().map(|row| (row.generation, row)).collect();
    let (mut formed, mut saved) = (0, 0);
    for event in evidence.events() {
        match event {
            RunEvent::GenerationFormed { generation, position, world_size, .. } => {
                formed += 1;
                let row = generations.get(generation);
                // A row that the recovery could not read proves nothing against the event.
                let is_lost = row.is_none() && evidence.may_lack("generations", *generation);
                let same = |row: &&GenerationRow| {
                    (*position, *world_size) == (row.position, row.members.len() as u64)
                };
                claim.expect(is_lost || row.is_some_and(same), || {
                    let journaled = row.map_or("nothing".to_string(), |row| {
                        format!("position {}, {}", row.position, counted(row.members.len(), "worker"))
                    });
                    format!(
                        "events.jsonl has generation {generation} otherwise: position {position}, {}; journaled is \
                         {journaled}",
                        counted(*world_size, "worker")
                    )
                });
            }
            RunEvent::Checkpoint(SavedCheckpoint { step, phase, state_digest, .. }) => {
                saved += 1;
                let mut rows = history.checkpoints.iter().filter(|row| row.step == *step).peekable();
                let is_lost = rows.peek().is_none() && evidence.may_lack("checkpoints", 0);
                let same =
                    rows.any(|row| row.phase == u64::from(*phase) && row.state_digest == *state_digest);
                claim.expect(is_lost || same, || {
                    format!("events.jsonl has a checkpoint of step {step} that was not journaled so")
                });
            }
            _ => {}
        }
    }
    let journaled = history.generations.len() + history.checkpoints.len();
    let missing = journaled.saturating_sub(formed + saved);
    claim.of(format!(
        "{formed} of generations and {saved} of checkpoints; {missing} in the journal without an event"
    ))
}
