//! Recorded evaluations, the best checkpoint, and the checkpoints that must not be removed yet.
//!
//! 1. Pure: the state follows from the journal and from the contents of the storage, so a later
//!    coordinator comes to the same state.
//! 2. The best checkpoint is the one with the best figure among the evaluated checkpoints that were
//!    valid; of two with the same figure the earlier one.
//! 3. The best checkpoint is never removed, nor is one that waits for its evaluation.

use std::collections::{BTreeMap, BTreeSet};

use ganglion_membership::{Checkpoint, StepShape};
use ganglion_proto::evaluation::EvaluationRow;
use ganglion_proto::job::Job;

/// Maximum number of evaluated steps sent to a worker that joins.
// As many as a worker remembers (`EVALUATED_LIMIT` in membership/src/member/reports.rs).
const TOLD: usize = 64;

/// Evaluations of a run, and what follows from them. See the module documentation.
#[derive(Debug)]
pub struct Judged {
    job: Job,
    rows: BTreeMap<u64, EvaluationRow>,
    /// Steps of the checkpoints that were ordered and are not known to be valid yet.
    ordered: BTreeSet<u64>,
    /// Steps of the checkpoints known to be valid.
    saved: BTreeSet<u64>,
    best: Option<Best>,
}

/// The best checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    /// Step of the checkpoint.
    pub step: u64,
    /// Name of the metric that decided.
    pub metric: String,
    /// Value of that metric.
    pub value: f64,
}

/// Result of comparing an incoming evaluation with the recorded one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// No evaluation of this step is recorded.
    New,
    /// The recorded evaluation of this step is equal.
    Same,
    /// The recorded evaluation of this step differs: the promise of equal results is broken.
    Breach,
}

impl Judged {
    /// Builds the state from recorded evaluations and from the folders of the checkpoints on the storage.
    pub fn new(job: Job, rows: Vec<EvaluationRow>, folders: &[String]) -> Judged {
        let (steps, saved) = (rows.into_iter().map(|row| (row.step, row)), BTreeSet::new());
        let ordered = BTreeSet::new();
        let mut judged = Judged { job, rows: steps.collect(), ordered, saved, best: None };
        let steps: Vec<u64> = judged.rows.keys().copied().collect();
        for step in steps.into_iter().filter(|step| folders.contains(&folder(*step))) {
            judged.saved(step);
        }
        judged
    }

    /// Recorded evaluations, ordered by step.
    pub fn rows(&self) -> impl Iterator<Item = &EvaluationRow> {
        self.rows.values()
    }

    /// Compares an incoming evaluation with the recorded ones.
    pub fn know(&self, row: &EvaluationRow) -> Known {
        match self.rows.get(&row.step) {
            None => Known::New,
            Some(known) if known.agrees(row) => Known::Same,
            Some(_) => Known::Breach,
        }
    }

    /// Adds a recorded evaluation.
    pub fn evaluated(&mut self, row: EvaluationRow) {
        let step = row.step;
        self.rows.insert(step, row);
        self.consider(step);
    }

    /// Notes that the checkpoint of a step was ordered: it may be valid before that is known here.
    pub fn ordered(&mut self, step: u64) {
        self.ordered.insert(step);
    }

    /// Notes that the checkpoint of a step is valid.
    pub fn saved(&mut self, step: u64) {
        self.ordered.remove(&step);
        self.saved.insert(step);
        self.consider(step);
    }

    fn consider(&mut self, step: u64) {
        // Evaluation and checkpoint arrive in either order; the later of the two decides.
        let Some(row) = self.rows.get(&step).filter(|_| self.saved.contains(&step)) else { return };
        let evaluation = &self.job.evaluation;
        let Some((metric, value)) = evaluation.deciding(row) else { return };
        // The earlier one of equals, whatever order they became known in: another coordinator must name
        // the same (1).
        let is_best = self.best.as_ref().is_none_or(|best| {
            evaluation.is_better(metric, value, best.value) || (value == best.value && step < best.step)
        });
        if is_best {
            self.best = Some(Best { step, metric: metric.to_owned(), value });
        }
    }

    /// Counts samples by the shape of the objective that is trained.
    pub fn learn_shape(&mut self, shape: &StepShape) {
        self.job.shape = Some(shape.clone());
    }

    /// The best checkpoint and its evaluation.
    pub fn best(&self) -> Option<(&Best, &EvaluationRow)> {
        let best = self.best.as_ref()?;
        Some((best, self.rows.get(&best.step)?))
    }

    /// Newest recorded steps, at most `TOLD` of them.
    pub fn told(&self) -> Vec<u64> {
        self.rows.keys().rev().take(TOLD).copied().collect()
    }

    /// Folders of the checkpoints that must not be removed. `samples` is the size of the data set.
    pub fn protected(&self, samples: Option<u64>) -> Vec<String> {
        // Evaluations are made in the order of steps: one that is due below the newest will not come any
        // more.
        let newest = self.rows.keys().next_back().copied().unwrap_or(0);
        let due = |step: &u64| samples.is_some_and(|samples| self.job.evaluation_due(*step, samples));
        let waiting = self.saved.iter().copied().filter(|step| *step > newest).filter(due);
        let ordered = self.ordered.iter().copied().filter(|step| self.rows.contains_key(step) || due(step));
        self.best.iter().map(|best| best.step).chain(waiting).chain(ordered).map(folder).collect()
    }
}

/// Folder of a checkpoint that lies between two steps.
pub(crate) fn folder(step: u64) -> String {
    Checkpoint::folder_of(step, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job_file::{Source, read};
    use ganglion_proto::evaluation::names;

    fn job() -> Job {
        read(&Source::Embedded, &["evaluation.every_steps=10".to_string()]).unwrap()
    }

    fn row(step: u64, distance: f64) -> EvaluationRow {
        let metrics = [(names::FRECHET, distance)].into_iter().collect();
        EvaluationRow { step, metrics, features: "f".to_string(), held_out: 0, seconds: 1.0 }
    }

    fn best(judged: &Judged) -> Option<u64> {
        judged.best().map(|(best, _)| best.step)
    }

    /// Invariant 2, in either order of checkpoint and evaluation; and 1.
    #[test]
    fn the_best_is_the_saved_one_with_the_best_figure() {
        let mut judged = Judged::new(job(), Vec::new(), &[]);
        judged.evaluated(row(10, 3.0));
        assert_eq!(best(&judged), None, "nobody saved it");
        judged.saved(10);
        assert_eq!(best(&judged), Some(10));
        judged.saved(20);
        judged.evaluated(row(20, 2.0));
        assert_eq!(best(&judged), Some(20));
        for (step, distance) in [(30, 2.0), (40, 5.0), (50, f64::NAN)] {
            judged.saved(step);
            judged.evaluated(row(step, distance));
            assert_eq!(best(&judged), Some(20));
        }
        let again = Judged::new(job(), judged.rows().cloned().collect(), &[folder(20), folder(40)]);
        assert_eq!(again.best().map(|(best, _)| best.clone()), judged.best().map(|(best, _)| best.clone()));
    }

    #[test]
    fn the_best_may_be_by_a_scalar_of_the_objective() {
        let given = ["evaluation.best_by=accuracy", "evaluation.best_goal=max"].map(str::to_string);
        let mut judged = Judged::new(read(&Source::Embedded, &given).unwrap(), Vec::new(), &[]);
        for (step, accuracy) in [(10, 0.5), (20, 0.75), (30, 0.25)] {
            let metrics = [(names::FRECHET, 1.0), ("accuracy", accuracy)].into_iter().collect();
            judged.saved(step);
            judged.evaluated(EvaluationRow { metrics, ..row(step, 0.0) });
        }
        let expected = Best { step: 20, metric: "accuracy".to_owned(), value: 0.75 };
        assert_eq!(judged.best().map(|(best, _)| best), Some(&expected));
    }

    /// Invariant 3.
    #[test]
    fn the_best_and_those_that_wait_are_protected() {
        let mut judged = Judged::new(job(), Vec::new(), &[]);
        for step in [10, 20, 30, 33, 40] {
            judged.saved(step);
        }
        judged.evaluated(row(10, 1.0));
        judged.evaluated(row(20, 2.0));
        assert_eq!(judged.protected(Some(1000)), [10, 30, 40].map(folder));
        judged.evaluated(row(40, 4.0));
        assert_eq!(judged.protected(Some(1000)), [folder(10)]);
    }

    /// Invariant 3: the next checkpoint may be ordered before the last one is known to be valid.
    #[test]
    fn one_that_was_ordered_is_protected_until_it_is_known_to_be_valid() {
        let mut judged = Judged::new(job(), Vec::new(), &[]);
        judged.ordered(10);
        judged.evaluated(row(10, 1.0));
        judged.ordered(20);
        judged.ordered(25);
        assert_eq!(judged.protected(Some(1000)), [10, 20].map(folder));
        judged.saved(10);
        judged.saved(20);
        judged.evaluated(row(20, 2.0));
        assert_eq!(judged.protected(Some(1000)), [folder(10)]);
    }

    #[test]
    fn a_row_is_known_by_its_figures() {
        let mut judged = Judged::new(job(), Vec::new(), &[]);
        assert_eq!(judged.know(&row(10, 1.0)), Known::New);
        judged.evaluated(row(10, 1.0));
        assert_eq!(judged.know(&EvaluationRow { seconds: 9.0, ..row(10, 1.0) }), Known::Same);
        assert_eq!(judged.know(&row(10, 1.5)), Known::Breach);
    }
}
