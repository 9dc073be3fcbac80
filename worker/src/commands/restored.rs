//! A run's objective with the state of one of its checkpoints, as its workers had it.

use std::path::PathBuf;
use std::sync::Arc;

use ganglion_proto::job::{Data, Family, Job};
use ganglion_proto::manifest;
use ganglion_storage::run::{self, RunName, Shelf};
use ganglion_storage::{MANIFEST, in_folder};
use tch::Device;

use crate::checkpoint::{CheckpointError, Files, Snapshot};
use crate::commands::error::Failure;
use crate::data::{DataError, DataSet};
use crate::eval::EvalError;
use crate::eval::held_out::HeldOut;
use crate::objective::{self, Model};

/// An objective with a state.
pub(crate) struct Restored {
    /// Name of the checkpoint.
    pub name: String,
    job: Job,
    model: Model,
    data: DataSet,
    snapshot: Snapshot,
}

/// A run, with its job and its data.
pub(crate) struct Chosen {
    run: run::Chosen,
    /// File of the job.
    file: PathBuf,
    /// Job of the run.
    pub job: Job,
    /// Data of the job.
    pub data: DataSet,
}

impl Chosen {
    /// Reads a run's job, and opens its data.
    ///
    /// # Errors
    /// There is no such run, or any of this cannot be read.
    pub(crate) fn open(name: Option<&RunName>) -> Result<Chosen, Failure> {
        // Which run it is was told with its weights.
        let run = run::chosen(name)?;
        let file = run.folder.join("job.toml");
        let shown = file.display();
        let text = std::fs::read_to_string(&file)
            .map_err(|error| Failure::Input(format!("{shown}: {error}; this needs the job of a run")))?;
        let job = Job::from_toml(&text)
            .map_err(|error| Failure::Input(format!("{shown}: {error}; use the version that trained it")))?;
        let data = opened(&job, &job.data).map_err(EvalError::from)?;
        Ok(Chosen { run, file, job, data })
    }
}

/// Scalars of held-out samples, by name.
pub(crate) struct OwnScalars {
    /// The scalars.
    pub metrics: Vec<(String, f64)>,
    /// The held-out samples.
    pub held_out: PathBuf,
    /// Number of them.
    pub samples: usize,
}

impl Restored {
    /// Whether the text of a job may be that of an objective with scalars for held-out samples.
    pub(crate) fn may_have_scalars(job: &str) -> bool {
        Job::from_toml(job).is_ok_and(|job| job.model.kind.family() != Family::Gan)
    }

    /// Reads a run's job, its data and a checkpoint.
    ///
    /// # Errors
    /// There is no such run, or any of this cannot be read.
    pub(crate) fn open(name: Option<&RunName>) -> Result<Restored, Failure> {
        let Chosen { run, file, job, data } = Chosen::open(name)?;
        let shown = file.display();
        let unsuitable = |error: objective::Unsuitable| Failure::Input(format!("{shown}: {error}"));
        let objective = objective::make(&job, &data, Device::Cpu).map_err(unsuitable)?;
        let model = Model::new(objective, job.job.precision).map_err(unsuitable)?;
        let shelf =
            Shelf::open(&run.folder.display().to_string(), &run.folder, job.checkpoint.url.as_deref())?;
        let folder = shelf.checkpoint(run.checkpoint)?;
        let (storage, layout) = (shelf.storage(), &model.layout);
        let files = Files { storage, data_shards: job.job.data_shards, layout, weights: None };
        let read = async {
            let place = in_folder(&folder, MANIFEST);
            let failed = |source| CheckpointError::Storage { file: place.to_string(), source };
            let text = storage.text(&place).await.map_err(failed)?.unwrap_or_default();
            let checkpoint = manifest::parse(&text);
            files
                .read(&checkpoint.map_err(|error| CheckpointError::Corrupt(format!("{place}: {error}")))?)
                .await
        };
        let snapshot = shelf.wait(read).map_err(Failure::other)?;
        Ok(Restored { name: format!("{}/{folder}", run.folder.display()), job, model, data, snapshot })
    }

    /// Evaluates held-out samples by the objective's own scalars: those named, or those of the job. `None`
    /// if the objective has none, or no samples are known.
    ///
    /// # Errors
    /// The samples cannot be read, or are of another kind than the training data.
    pub(crate) fn evaluate(&self, held_out: Option<&PathBuf>) -> Result<Option<OwnScalars>, EvalError> {
        let Some(path) = held_out.or(self.job.evaluation.held_out.as_ref()).cloned() else { return Ok(None) };
        if self.model.objective.evaluator().is_none() {
            return Ok(None);
        }
        let samples = opened(&self.job, &self.job.data.elsewhere(path.clone()))
            .map_err(|error| error.in_words_of("--held-out", "data.kind"))?;
        let samples = HeldOut::new(Arc::new(samples), &self.data, self.job.job.shard_batch)?;
        let metrics = samples.evaluate(&self.model, self.job.job.seed, &self.snapshot)?;
        Ok(Some(OwnScalars { metrics, held_out: path, samples: samples.samples() }))
    }
}

/// Opens samples, with their classes for a conditional model.
pub(crate) fn opened(job: &Job, data: &Data) -> Result<DataSet, DataError> {
    let open = if job.model.conditional { DataSet::open_labelled } else { DataSet::open };
    open(data)
}
