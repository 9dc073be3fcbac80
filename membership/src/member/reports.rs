//! Reports that a member keeps until they are recorded (M13).

use std::collections::{BTreeSet, VecDeque};

use super::Report;
use crate::checkpoint::WrittenPart;
use crate::types::Generation;

/// Number of recorded evaluations' steps that are remembered.
const EVALUATED_LIMIT: usize = 64;

/// Row of one step, whose content does not matter to the protocol.
pub trait Row: Clone {
    /// Count of steps done.
    fn step(&self) -> u64;
}

/// Unrecorded reports of a worker.
#[derive(Debug)]
pub(super) struct Reports<R> {
    /// Rows of metrics, in the order of their steps.
    rows: VecDeque<R>,
    /// Whether this member sends the rows: rank 0 does. All others keep them, should it be lost.
    pub(super) sends_rows: bool,
    evaluations: VecDeque<R>,
    /// Newest steps whose evaluation is recorded, at most [`EVALUATED_LIMIT`].
    evaluated: BTreeSet<u64>,
    parts: VecDeque<(Generation, WrittenPart)>,
    /// Step and phase of the newest recorded checkpoint.
    recorded: Option<(u64, u32)>,
}

impl<R> Default for Reports<R> {
    fn default() -> Self {
        Reports {
            rows: VecDeque::new(),
            sends_rows: false,
            evaluations: VecDeque::new(),
            evaluated: BTreeSet::new(),
            parts: VecDeque::new(),
            recorded: None,
        }
    }
}

impl<R: Row> Reports<R> {
    /// Kept rows of metrics.
    pub(super) fn rows(&self) -> impl ExactSizeIterator<Item = &R> {
        self.rows.iter()
    }

    pub(super) fn is_evaluated(&self, step: u64) -> bool {
        self.evaluated.contains(&step)
    }

    /// Keeps a row; returns it if this member sends it.
    pub(super) fn keep_row(&mut self, row: R) -> Option<R> {
        self.rows.push_back(row.clone());
        self.sends_rows.then_some(row)
    }

    pub(super) fn keeps_row_of(&self, step: u64) -> bool {
        self.rows.iter().any(|row| row.step() == step)
    }

    /// Keeps an evaluation; returns it unless that of its step is recorded.
    pub(super) fn keep_evaluation(&mut self, row: R) -> Option<R> {
        // Another member made it, and it is recorded: there is no second one.
        if self.evaluated.contains(&row.step()) {
            return None;
        }
        self.evaluations.push_back(row.clone());
        Some(row)
    }

    /// Keeps a report of a file; returns whether it is of use.
    pub(super) fn keep_part(&mut self, generation: Generation, part: &WrittenPart) -> bool {
        // `None` is below everything: before the first checkpoint all files are of use.
        let wanted = self.recorded < Some((part.step, part.phase));
        if wanted {
            self.parts.push_back((generation, part.clone()));
        }
        wanted
    }

    pub(super) fn rows_recorded(&mut self, step: u64) {
        self.rows.retain(|row| row.step() > step);
    }

    pub(super) fn checkpoint_recorded(&mut self, step: u64, phase: u32) {
        // A late message about an older checkpoint must not bring files back.
        self.recorded = self.recorded.max(Some((step, phase)));
        self.parts.retain(|(_, part)| (part.step, part.phase) > (step, phase));
    }

    pub(super) fn evaluations_recorded(&mut self, steps: &[u64]) {
        self.evaluations.retain(|row| !steps.contains(&row.step()));
        self.evaluated.extend(steps);
        // The oldest go: evaluations under way are of the newest steps.
        while self.evaluated.len() > EVALUATED_LIMIT {
            self.evaluated.pop_first();
        }
    }

    /// Drops the reports of files, whose state is invalidated.
    pub(super) fn invalidate(&mut self) {
        self.parts.clear();
    }

    /// Drops what is computed again from `step` on. After a change of the group nobody knows which rows
    /// arrived and which member has them all: returns all that are kept, to be sent again.
    pub(super) fn begin(&mut self, sends_rows: bool, step: u64) -> Vec<Report<R>> {
        self.sends_rows = sends_rows;
        // Later rows come again, with the same content but for times (M13).
        self.rows.retain(|row| row.step() <= step);
        self.parts.retain(|(_, part)| part.step <= step);
        self.evaluations.retain(|row| row.step() <= step);
        self.rows.iter().chain(&self.evaluations).cloned().map(Report::Row).collect()
    }

    /// Kept rows from a step on.
    pub(super) fn rows_from(&self, step: u64) -> Vec<Report<R>> {
        self.rows.iter().filter(|row| row.step() >= step).cloned().map(Report::Row).collect()
    }

    /// Reports for a new session. Rows go before files: with the last file of the last checkpoint the run
    /// may end.
    pub(super) fn unrecorded(&self) -> Vec<Report<R>> {
        // The others keep theirs, in case rank 0 is lost before its rows are recorded.
        let rows = self.rows.iter().filter(|_| self.sends_rows);
        let parts = self.parts.iter().cloned().map(|(generation, part)| Report::Part(generation, part));
        rows.chain(&self.evaluations).cloned().map(Report::Row).chain(parts).collect()
    }
}
