//! Losses of records, and the claims that can no longer be proven because of them. The journal has
//! each loss.

use super::Claim;
use super::evidence::Evidence;
use crate::journal::Recovery;
use crate::records::damage::SetAside;

/// Whether the row of a step may have been in a record that was set aside.
pub(super) fn may_have_held(evidence: &Evidence, step: u64) -> bool {
    let mut stretches = evidence.history.set_aside.iter().flat_map(|found| &found.steps);
    stretches.any(|(first, last)| (*first..=*last).contains(&step))
}

/// Reports every loss of records, and what it leaves unproven. This claim always holds.
pub(super) fn losses_are_told(evidence: &Evidence) -> Claim {
    let claim = Claim::new("what was lost of the records is told");
    let mut told: Vec<String> = evidence.history.set_aside.iter().map(SetAside::describe).collect();
    if let Some(Recovery { floor, lost }) = &evidence.history.recovery {
        let lost = if lost.is_empty() { "nothing".to_string() } else { lost.join(", ") };
        told.push(format!(
            "the journal was recovered: terms, generations and workers up to {floor} are of before; not read, or not as a \
             whole, and not proven up to there: {lost}"
        ));
    }
    claim.of(if told.is_empty() { "nothing was".to_string() } else { told.join("; ") })
}
