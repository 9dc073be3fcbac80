//! The claim about the samples: each number of the stream was committed once, and was the sample
//! that the job determines.
//!
//! The sample checksum (`ledger`) is the sum mod 2^64 of a hash of (number, sample) over all
//! samples that a state was trained on. Here it is computed from the job alone: the seed, the size
//! of the data set, the samples that the job leaves out from some step on, and how many numbers an
//! update takes. A number that was left out, taken twice, or taken as another sample changes the
//! sum, but for a chance of 2^-64.

use ganglion_proto::job::Exclusion;
use ganglion_proto::stream::{SampleStream, ledger_term};
use ganglion_proto::words::counted;

use super::Claim;
use super::checkpoints::Whole;
use super::evidence::Evidence;

/// A sample checksum found in the run's files.
struct Told {
    /// Count of numbers, from 0 on, that it must cover.
    numbers: u64,
    ledger: u64,
    place: String,
}

/// Claims that the sample checksum in every row and in every state is that of the numbers from 0 up
/// to its update index.
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
    // One pass over the stream serves all of them: it is as long as the run.
    told.sort_by_key(|told| told.numbers);
    let Some(mut stream) = stream(evidence, samples, &told, &mut claim) else {
        return claim.of("not computed".to_string());
    };
    let (mut number, mut ledger) = (0, 0_u64);
    for Told { numbers, ledger: found, place } in &told {
        // Rows and states at one update index share the sum.
        while number < *numbers {
            ledger = ledger.wrapping_add(ledger_term(number, stream.sample(number)));
            number += 1;
        }
        claim.expect(*found == ledger, || {
            format!("{place} has {found:016x}, the job gives {ledger:016x} for the first {numbers} numbers")
        });
    }
    #[allow(clippy::cast_precision_loss)] // for people
    let epochs = number as f64 / samples as f64;
    let exclusions = evidence.job.data.exclusions.iter().map(|one| format!("; left out {one}"));
    claim.of(format!(
        "{}, {epochs:.3} epochs of {}, in {} and {}{}",
        counted(number, "number"),
        counted(samples, "sample"),
        counted(evidence.rows.whole.len(), "row"),
        counted(whole.states().count(), "checkpoint"),
        exclusions.collect::<String>()
    ))
}

/// Builds the job's stream, as far as the journal has the samples left out; `None` if the files
/// reach beyond that.
fn stream(evidence: &Evidence, samples: u64, told: &[Told], claim: &mut Claim) -> Option<SampleStream> {
    let (job, known) = (&evidence.job, &evidence.history.left_out);
    let mut changes = job.changes(known.iter().copied());
    let later: Vec<&Exclusion> =
        job.data.exclusions.iter().filter(|exclusion| !exclusion.is_from_the_start()).collect();
    let whole =
        changes.iter().zip(&later).take_while(|(change, one)| change.left_out.len() == one.files.len());
    let whole = whole.count();
    changes.truncate(whole);
    let unknown = later.get(whole).map(|exclusion| job.number_of(exclusion));
    let newest = told.last().map_or(0, |told| told.numbers);
    let left: std::collections::BTreeSet<u64> =
        changes.iter().flat_map(|change| change.left_out.clone()).collect();
    // Summed with samples that were left out, every later checksum would look like a breach of training.
    if unknown.is_some_and(|from| newest > from)
        || left.last().is_some_and(|last| *last >= samples)
        || left.len() as u64 >= samples
    {
        claim.breach("the journal does not know which samples the job leaves out".to_string());
        return None;
    }
    Some(SampleStream::with_changes(job.job.seed, samples, &changes))
}

fn told(evidence: &Evidence, whole: &Whole) -> Vec<Told> {
    let rows = evidence.rows.whole.iter().map(|row| Told {
        numbers: evidence.job.samples_before(evidence.end_of(row.step)),
        ledger: row.ledger,
        place: format!("metrics.jsonl, step {},", row.step),
    });
    let states = whole.states().map(|(folder, state)| Told {
        numbers: evidence.job.samples_before(state.position),
        ledger: state.ledger,
        place: format!("checkpoint {folder}"),
    });
    rows.chain(states).collect()
}
