//! Acknowledgement of metrics rows: the step up to which workers need keep no rows.
//!
//! 1. Acknowledged steps are a prefix: every received row up to that step is durable, and every row
//!    that was due has been received.
//! 2. A row that cannot be held here stays with the workers and is owed; nothing from its step on
//!    is acknowledged before it has come again.
//!
//! The due rows are known from the first generation on that this term formed: that one reports by
//! this term's cadence.

use std::collections::BTreeSet;

/// State of the acknowledgements. See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct Receipts {
    /// Cadence: a row is due every `every` steps.
    every: u64,
    /// Last step of the run, once it is known; its row is due too.
    last: Option<u64>,
    /// Step after which rows are due; `None` while that is not known.
    floor: Option<u64>,
    /// Step up to which all due rows have been received.
    whole: u64,
    /// Steps whose rows were left with the workers.
    owed: BTreeSet<u64>,
    /// Due steps whose rows are lost.
    lost: BTreeSet<u64>,
    /// Newest step acknowledged to the workers.
    told: Option<u64>,
}

impl Receipts {
    /// Creates the state for a cadence; no row has been received.
    pub(crate) fn new(every: u64) -> Receipts {
        Receipts { every, ..Receipts::default() }
    }

    /// Sets the last step of the run.
    pub(crate) fn ends_with(&mut self, last: u64) {
        self.last = Some(last);
    }

    /// Notes that a generation was formed that goes on after this step.
    pub(crate) fn formed(&mut self, after: u64) {
        // A roll-back goes on from an earlier step: rows from there on are due from this term's
        // generations as well.
        let floor = self.floor.map_or(after, |floor| floor.min(after));
        if self.floor != Some(floor) {
            (self.floor, self.whole) = (Some(floor), floor);
        }
    }

    /// Notes that a row was received and is held here.
    pub(crate) fn took(&mut self, step: u64) {
        self.owed.remove(&step);
        self.lost.remove(&step);
        if self.told >= Some(step) {
            // The sender has not received the acknowledgement, so it is sent again.
            self.told = None;
        }
    }

    /// Notes that a row was received for which there is no room.
    pub(crate) fn refused(&mut self, step: u64) {
        self.owed.insert(step);
    }

    /// First step, up to `limit`, whose row is not held here. `is_known` tells which rows are.
    pub(crate) fn missing(&mut self, limit: u64, is_known: impl Fn(u64) -> bool) -> Option<u64> {
        let owed = self.owed.first().copied().filter(|step| *step <= limit);
        while self.floor.is_some()
            && let Some(next) = self.next_due().filter(|next| *next <= limit)
        {
            // A lost row must not hold acknowledgements back for ever.
            if !is_known(next) && !self.lost.contains(&next) {
                return Some(owed.map_or(next, |owed| owed.min(next)));
            }
            // Remembered, so that each due step is asked about once and the cost does not grow with the
            // run.
            self.whole = next;
        }
        owed
    }

    fn next_due(&self) -> Option<u64> {
        let multiple = (self.every > 0).then(|| (self.whole / self.every + 1) * self.every);
        let last = self.last.filter(|last| *last > self.whole);
        multiple.into_iter().chain(last).min()
    }

    /// Notes that no worker has the row of a step any more.
    pub(crate) fn give_up(&mut self, step: u64) {
        self.owed.remove(&step);
        self.lost.insert(step);
    }

    /// Step to acknowledge once all rows before `bound` are durable and `newest` is the newest row;
    /// `None` if the workers already know it.
    pub(crate) fn acknowledge(&mut self, newest: u64, bound: u64) -> Option<u64> {
        // A prefix (1): nothing from the first unsafe row on may be forgotten by the workers.
        let step = newest.min(bound.saturating_sub(1));
        if step == 0 || self.told >= Some(step) {
            return None;
        }
        self.told = Some(step);
        self.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipts(known: &BTreeSet<u64>, receipts: &mut Receipts, limit: u64) -> Option<u64> {
        receipts.missing(limit, |step| known.contains(&step))
    }

    /// Invariant 1.
    #[test]
    fn a_due_row_that_never_came_is_missing_and_one_of_another_cadence_is_not() {
        let mut known = BTreeSet::from([3, 7, 10, 20, 40]);
        let mut told = Receipts::new(10);
        assert_eq!(receipts(&known, &mut told, 40), None, "an earlier term's cadence is not known");
        told.formed(5);
        assert_eq!(receipts(&known, &mut told, 25), None);
        assert_eq!(receipts(&known, &mut told, 40), Some(30));
        known.insert(30);
        assert_eq!(receipts(&known, &mut told, 44), None);
        told.ends_with(44);
        assert_eq!(receipts(&known, &mut told, 44), Some(44));
        told.give_up(44);
        assert_eq!(receipts(&known, &mut told, 44), None);
        // Going back to before the first one of this term.
        told.formed(0);
        known.remove(&10);
        assert_eq!(receipts(&known, &mut told, 44), Some(10));
    }

    /// Invariant 2.
    #[test]
    fn a_row_that_was_refused_is_missing_until_it_comes_again() {
        let (known, mut told) = (BTreeSet::from([1, 2, 4]), Receipts::new(0));
        told.refused(3);
        assert_eq!(receipts(&known, &mut told, 2), None);
        assert_eq!(receipts(&known, &mut told, 4), Some(3));
        told.took(3);
        assert_eq!(receipts(&known, &mut told, 4), None);
    }

    #[test]
    fn workers_are_told_once_and_again_when_one_has_not_heard() {
        let mut told = Receipts::new(1);
        assert_eq!(told.acknowledge(0, u64::MAX), None);
        assert_eq!(told.acknowledge(5, 1), None);
        assert_eq!(told.acknowledge(5, 4), Some(3));
        assert_eq!(told.acknowledge(5, 4), None);
        assert_eq!(told.acknowledge(5, u64::MAX), Some(5));
        told.took(2);
        assert_eq!(told.acknowledge(5, u64::MAX), Some(5));
        told.took(6);
        assert_eq!(told.acknowledge(6, u64::MAX), Some(6));
    }
}
