//! Evaluation of held-out samples by the objective's own scalars.

use std::sync::Arc;

use ganglion_proto::words::counted;
use tch::Tensor;

use super::EvalError;
use crate::checkpoint::Snapshot;
use crate::data::DataSet;
use crate::objective::{Model, Samples, ShardBatch};
use crate::random::{Key, Purpose};

/// Held-out samples, in batches as large as a data shard's.
#[derive(Debug)]
pub(crate) struct HeldOut {
    data: Arc<DataSet>,
    batch: usize,
}

impl HeldOut {
    /// Batches of `batch` samples of a data set. Samples beyond whole batches are left out.
    ///
    /// # Errors
    /// There are fewer samples than a batch has, or they are of another kind than those of the training.
    pub(crate) fn new(data: Arc<DataSet>, training: &DataSet, batch: u32) -> Result<HeldOut, EvalError> {
        check_held_out(&data, training)?;
        let batch = batch as usize;
        if data.len() < batch {
            return Err(EvalError::Input(format!(
                "evaluation.held_out has {}, fewer than the {batch} of a batch (job.shard_batch); give more, or leave it out",
                counted(data.len() as u64, "sample")
            )));
        }
        Ok(HeldOut { data, batch })
    }

    /// Number of samples that are evaluated.
    pub(crate) fn samples(&self) -> usize {
        self.data.len() / self.batch * self.batch
    }

    /// Evaluates a state by the scalars of the objective's evaluator: means over the samples, by name.
    ///
    /// # Errors
    /// A sample cannot be read, or the objective fails.
    pub(crate) fn evaluate(
        &self,
        model: &Model,
        seed: u64,
        snapshot: &Snapshot,
    ) -> Result<Vec<(String, f64)>, EvalError> {
        let Some(evaluator) = model.objective.evaluator() else { return Ok(Vec::new()) };
        let names = evaluator.scalars();
        let mut sums = Vec::new();
        let mut evaluate = evaluator.begin(&model.layout, snapshot)?;
        // In order, as a sum of floats depends on it.
        for (shard, first) in (0..).zip((0..self.samples()).step_by(self.batch)) {
            let batch = self.read(first)?;
            // The same draws in each evaluation, and none that the sampler has.
            let key = Key { seed, step: 0, phase: 1, shard, purpose: Purpose::Evaluation };
            let terms = evaluate(&batch, key)?;
            sums.resize(terms.len(), 0.0);
            for (sum, term) in sums.iter_mut().zip(terms) {
                *sum += term;
            }
        }
        #[allow(clippy::cast_precision_loss)] // a count of samples
        let samples = self.samples() as f64;
        let figures = evaluator.figures(sums, samples, &self.data);
        Ok(names.into_iter().map(std::borrow::Cow::into_owned).zip(figures).collect())
    }

    fn read(&self, first: usize) -> Result<ShardBatch, EvalError> {
        let indices: Vec<usize> = (first..first + self.batch).collect();
        let classes: Vec<i64> = indices
            .iter()
            .filter_map(|index| self.data.labels().get(*index))
            .map(|class| i64::from(*class))
            .collect();
        let classes = (!classes.is_empty()).then(|| Tensor::from_slice(&classes));
        let values = self.data.read_all(&indices)?;
        let samples =
            Samples::new(&values, self.data.shape(), &[i64::try_from(self.batch).expect("a batch is small")]);
        Ok(ShardBatch { samples, classes })
    }
}

/// Checks that held-out samples are of the kind of the training data.
pub(super) fn check_held_out(held_out: &DataSet, data: &DataSet) -> Result<(), EvalError> {
    let refused = |what: String| Err(EvalError::Input(format!("evaluation.held_out: {what}")));
    let (own, of_data) = (held_out.shape(), data.shape());
    if own != of_data {
        return refused(format!("its samples are {own}, and those of the data {of_data}"));
    }
    let (own, of_data) = (held_out.classes(), data.classes());
    // Fewer are allowed: a held-out set may lack a class, but not have one that the networks do not know.
    if own > of_data {
        return refused(format!("it has {}, and the data {of_data}", counted(own, "class")));
    }
    Ok(())
}
