//! Claims about terms, generations and their members.

use std::collections::{BTreeMap, BTreeSet};

use super::Claim;
use super::evidence::{Event, Evidence};
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
        claim.expect(*term >= newest, || {
            format!("generation {generation} is of term {term}, the one before it of term {newest}")
        });
        newest = newest.max(*term);
    }
    // Events are in the file in the order in which they happened.
    let numbers = |kind, number: fn(&Event) -> Option<u64>| evidence.events_of(kind).filter_map(number);
    let started: Vec<u64> = numbers("coordinator_started", |event| event.term).collect();
    let formed: Vec<u64> = numbers("generation_formed", |event| event.generation).collect();
    for (what, numbers) in [("term", started), ("generation", formed)] {
        for pair in numbers.windows(2).filter(|pair| pair[0] >= pair[1]) {
            claim.breach(format!("events.jsonl has {what} {} after {what} {}", pair[1], pair[0]));
        }
    }
    let (terms, generations) = (history.terms.len(), history.generations.len());
    claim.of(format!("{terms} terms, {generations} generations, {} workers", history.workers.len()))
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
    claim.of(format!("{shards} shards in {generations} generations of up to {largest} workers"))
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
    let formed: Vec<&Event> = evidence.events_of("generation_formed").collect();
    for event in &formed {
        let generation = event.generation.unwrap_or(0);
        let is_lost = !generations.contains_key(&generation) && evidence.may_lack("generations", generation);
        let same = is_lost
            || generations.get(&generation).is_some_and(|row| {
                event.position == Some(row.position) && event.world_size == Some(row.members.len() as u64)
            });
        claim.expect(same, || {
            format!(
                "events.jsonl has generation {generation} otherwise: {}",
                told(event, generations.get(&generation))
            )
        });
    }
    let saved: Vec<&Event> = evidence.events_of("checkpoint").collect();
    for event in &saved {
        let is_lost = evidence.may_lack("checkpoints", 0)
            && !history.checkpoints.iter().any(|row| event.step == Some(row.step));
        let same = is_lost
            || history.checkpoints.iter().any(|row| {
                (event.step, event.phase) == (Some(row.step), Some(row.phase))
                    && event.state_digest.as_ref() == Some(&row.state_digest)
            });
        let step = event.step.unwrap_or(0);
        claim.expect(same, || {
            format!("events.jsonl has a checkpoint of step {step} that was not journaled so")
        });
    }
    let missing =
        (history.generations.len() + history.checkpoints.len()).saturating_sub(formed.len() + saved.len());
    claim.of(format!(
        "{} of generations and {} of checkpoints; {missing} journaled ones have none",
        formed.len(),
        saved.len()
    ))
}

fn told(event: &Event, row: Option<&&GenerationRow>) -> String {
    let known = |number: Option<u64>| number.map_or("none".to_string(), |number| number.to_string());
    let journaled = row.map_or("nothing".to_string(), |row| {
        format!("position {}, {} workers", row.position, row.members.len())
    });
    format!(
        "position {}, {} workers; journaled is {journaled}",
        known(event.position),
        known(event.world_size)
    )
}
