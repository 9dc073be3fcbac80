//! The claim about the samples: each number of the stream was committed once, and was the sample that the job says.
//!
//! A ledger is the sum mod 2^64 of a hash of (number, sample) over all samples that a state was trained on. Here it is
//! computed from the job alone: the seed, the size of the data set, and how many numbers a position takes. A number that
//! was left out, taken twice, or taken as another sample changes the sum, but for a chance of 2^-64.

use ganglion_proto::stream::{SampleStream, ledger_term};

use super::Claim;
use super::checkpoints::Whole;
use super::evidence::Evidence;

/// A ledger that the run tells of.
struct Told {
    /// How many numbers, from 0 on, it must cover.
    numbers: u64,
    ledger: Option<u64>,
    place: String,
}

/// The ledger in every row and in every state is that of the numbers from 0 up to its position.
pub(super) fn every_sample_was_committed_once(evidence: &Evidence, whole: &Whole) -> Claim {
    let mut claim = Claim::new("every number of the sample stream was committed once, as its sample");
    let mut told = told(evidence, whole);
    let Some(samples) =
        evidence.history.samples.filter(|samples| (1..=u64::from(u32::MAX)).contains(samples))
    else {
        claim.expect(told.is_empty() || evidence.may_lack("facts", 0), || {
            "the journal does not know how many samples the data set has".to_string()
        });
        return claim
            .of("no worker has loaded the data yet, or the journal does not tell any more".to_string());
    };
    told.sort_by_key(|told| told.numbers);
    let mut stream = SampleStream::new(evidence.job.job.seed, samples);
    let (mut number, mut ledger) = (0, 0_u64);
    for Told { numbers, ledger: found, place } in &told {
        while number < *numbers {
            ledger = ledger.wrapping_add(ledger_term(number, stream.sample(number)));
            number += 1;
        }
        claim.expect(*found == Some(ledger), || {
            let found = found.map_or("no ledger".to_string(), |found| format!("{found:016x}"));
            format!("{place} has {found}, the job gives {ledger:016x} for the first {numbers} numbers")
        });
    }
    #[allow(clippy::cast_precision_loss)] // for people
    let epochs = number as f64 / samples as f64;
    claim.of(format!(
        "{number} numbers, {epochs:.3} epochs of {samples} samples, in {} rows and {} checkpoints",
        evidence.rows.whole.len(),
        whole.states().count()
    ))
}

fn told(evidence: &Evidence, whole: &Whole) -> Vec<Told> {
    let rows = evidence.rows.whole.iter().map(|row| Told {
        numbers: evidence.job.samples_before(evidence.end_of(row.step)),
        ledger: Some(&row.ledger)
            .filter(|text| text.len() == 16)
            .and_then(|text| u64::from_str_radix(text, 16).ok()),
        place: format!("metrics.jsonl, step {},", row.step),
    });
    let states = whole.states().map(|(folder, state)| Told {
        numbers: evidence.job.samples_before(state.position),
        ledger: Some(state.ledger),
        place: format!("checkpoint {folder}"),
    });
    rows.chain(states).collect()
}
