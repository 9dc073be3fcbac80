//! What is known of evaluations: which are recorded, which checkpoint is the best, which must not be removed
//! yet.
//!
//! 1. Pure: what it knows comes from the journal and from what the storage has, so a later coordinator knows
//!    the same.
//! 2. The best is the checkpoint whose evaluation has the best figure, of those that were there to be
//!    evaluated; of two with the same figure the earlier one.
//! 3. The best is never removed, nor is one that waits for its evaluation.

use std::collections::{BTreeMap, BTreeSet};

use ganglion_membership::Checkpoint;
use ganglion_proto::evaluation::{BestBy, EvaluationRow};
use ganglion_proto::job::Job;

/// Steps that a worker is told of when it comes.
const TOLD: usize = 64;

/// The evaluations of a run. See the module.
#[derive(Debug)]
pub struct Judged {
    job: Job,
    rows: BTreeMap<u64, EvaluationRow>,
    /// Steps of checkpoints that are valid, as far as is known.
    saved: BTreeSet<u64>,
    best: Option<Best>,
}

/// The best checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    /// Steps done in it.
    pub step: u64,
    /// The figure that decided.
    pub metric: &'static str,
    /// Its value.
    pub value: f64,
}

/// What a row is to those that are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Its step has none.
    New,
    /// Its step has the same.
    Same,
    /// Its step has another one: the promise of equal results is broken.
    Breach,
}

impl Judged {
    /// Of the rows and the checkpoints that there are, by folder.
    pub fn new(job: Job, rows: Vec<EvaluationRow>, folders: &[String]) -> Judged {
        let (steps, saved) = (rows.into_iter().map(|row| (row.step, row)), BTreeSet::new());
        let mut judged = Judged { job, rows: steps.collect(), saved, best: None };
        let steps: Vec<u64> = judged.rows.keys().copied().collect();
        for step in steps.into_iter().filter(|step| folders.contains(&folder(*step))) {
            judged.saved(step);
        }
        judged
    }

    /// The rows, by step.
    pub fn rows(&self) -> impl Iterator<Item = &EvaluationRow> {
        self.rows.values()
    }

    /// What a row would be to those that are recorded.
    pub fn know(&self, row: &EvaluationRow) -> Known {
        match self.rows.get(&row.step) {
            None => Known::New,
            Some(known) if known.agrees(row) => Known::Same,
            Some(_) => Known::Breach,
        }
    }

    /// Takes a row that is recorded.
    pub fn evaluated(&mut self, row: EvaluationRow) {
        let step = row.step;
        self.rows.insert(step, row);
        self.consider(step);
    }

    /// The checkpoint of a step is valid.
    pub fn saved(&mut self, step: u64) {
        self.saved.insert(step);
        self.consider(step);
    }

    fn consider(&mut self, step: u64) {
        let Some(row) = self.rows.get(&step).filter(|_| self.saved.contains(&step)) else { return };
        let Some((metric, value)) = self.job.evaluation.best_by.of(row) else { return };
        let is_best = self.best.as_ref().is_none_or(|best| {
            BestBy::is_better(metric, value, best.value) || (value == best.value && step < best.step)
        });
        if is_best {
            self.best = Some(Best { step, metric, value });
        }
    }

    /// The best checkpoint and its row.
    pub fn best(&self) -> Option<(&Best, &EvaluationRow)> {
        let best = self.best.as_ref()?;
        Some((best, self.rows.get(&best.step)?))
    }

    /// The newest recorded steps.
    pub fn told(&self) -> Vec<u64> {
        self.rows.keys().rev().take(TOLD).copied().collect()
    }

    /// The folders that must not be removed, of a run over `samples`.
    pub fn protected(&self, samples: Option<u64>) -> Vec<String> {
        let newest = self.rows.keys().next_back().copied().unwrap_or(0);
        let due = |step: &u64| samples.is_some_and(|samples| self.job.evaluation_due(*step, samples));
        let waiting = self.saved.iter().copied().filter(|step| *step > newest).filter(due);
        self.best.iter().map(|best| best.step).chain(waiting).map(folder).collect()
    }
}

/// The folder of a checkpoint between two steps.
pub fn folder(step: u64) -> String {
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
        let metrics = vec![(names::FRECHET.to_string(), distance)];
        EvaluationRow { step, metrics, features: "f".to_string(), seconds: 1.0 }
    }

    fn best(judged: &Judged) -> Option<u64> {
        judged.best().map(|(best, _)| best.step)
    }

    /// Invariant 2, in whichever order a checkpoint and its evaluation come; and 1.
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

    #[test]
    fn a_row_is_known_by_its_figures() {
        let mut judged = Judged::new(job(), Vec::new(), &[]);
        assert_eq!(judged.know(&row(10, 1.0)), Known::New);
        judged.evaluated(row(10, 1.0));
        assert_eq!(judged.know(&EvaluationRow { seconds: 9.0, ..row(10, 1.0) }), Known::Same);
        assert_eq!(judged.know(&row(10, 1.5)), Known::Breach);
    }
}
