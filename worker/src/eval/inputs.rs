//! Inputs of a job's evaluations: opened and checked before training.

use std::sync::Arc;

use ganglion_proto::evaluation::{BestBy, Evaluation, names};
use ganglion_proto::job::{Data, Job};

use super::EvalError;
use super::held_out::HeldOut;
use super::judge::Means;
use crate::data::{DataError, DataSet};
use crate::objective::{Evaluator, Model};

/// Inputs of evaluations.
pub(crate) struct Inputs {
    /// Feature extractor, settings and held-out samples, for an objective that draws samples.
    pub means: Option<Means>,
    /// Held-out samples, for an objective with scalars of its own for them.
    pub held_out: Option<HeldOut>,
}

impl Inputs {
    /// Opens the inputs, if the job has evaluations. `open` opens held-out samples as the training data are
    /// opened.
    ///
    /// # Errors
    /// The settings do not fit the objective or the data; says which.
    pub(crate) fn open(
        job: &Job,
        model: &Model,
        data: &DataSet,
        open: impl Fn(&Data) -> Result<DataSet, DataError>,
    ) -> Result<Option<Inputs>, EvalError> {
        let settings = &job.evaluation;
        let wanted = settings.every_steps != 0 || settings.with_checkpoints;
        check(settings, model, data, wanted).map_err(EvalError::Input)?;
        if !wanted {
            return Ok(None);
        }
        let held_out = settings.held_out.clone().map(|path| open(&job.data.elsewhere(path))).transpose();
        let held_out = held_out.map_err(|error| error.in_words_of("evaluation.held_out", "data.kind"))?;
        let held_out = held_out.map(Arc::new);
        let means = model
            .objective
            .sampler()
            .filter(|_| data.shape().image().is_some())
            .map(|_| Means::open(settings, data, held_out.clone()));
        let own = held_out.filter(|_| model.objective.evaluator().is_some());
        let own = own.map(|held_out| HeldOut::new(held_out, data, job.job.shard_batch));
        Ok(Some(Inputs { means: means.transpose()?, held_out: own.transpose()? }))
    }
}

/// Checks that the objective can be evaluated as the settings ask for.
fn check(settings: &Evaluation, model: &Model, data: &DataSet, wanted: bool) -> Result<(), String> {
    // Metrics compare images.
    let draws = model.objective.sampler().is_some() && data.shape().image().is_some();
    let given = settings.held_out.is_some();
    let own = model.objective.evaluator().map(Evaluator::scalars).unwrap_or_default();
    if wanted && !draws && (own.is_empty() || !given) {
        let held_out = "set evaluation.held_out to samples that it evaluates itself, or ";
        let held_out = if own.is_empty() { "" } else { held_out };
        return Err(format!(
            "the objective draws no samples to evaluate; {held_out}set evaluation.every_steps = 0 and \
             evaluation.with_checkpoints = false"
        ));
    }
    let BestBy::Named(name) = &settings.best_by else { return Ok(()) };
    let is_own = own.iter().any(|known| known == name);
    if is_own && wanted && !given {
        let mend = "set evaluation.held_out";
        return Err(format!("evaluation.best_by: {name} is a scalar of held-out samples; {mend}"));
    }
    let metrics = if draws { &names::ALL[..] } else { &[] };
    if is_own || metrics.contains(&name.as_str()) {
        return Ok(());
    }
    let known: Vec<&str> = metrics.iter().copied().chain(own.iter().map(AsRef::as_ref)).collect();
    let known = if known.is_empty() { String::new() } else { format!(" or one of {}", known.join(", ")) };
    Err(format!("evaluation.best_by: there is no {name:?}; choose \"auto\"{known}"))
}
