//! Subcommands of the `worker` program for evaluation.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use ganglion_proto::evaluation::{BestBy, Evaluation, Features};
use ganglion_proto::job::{Data, DataKind};
use ganglion_proto::out;
use ganglion_proto::progress::Progress;
use ganglion_storage::whole::Draft;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::commands::error::Failure;
use crate::commands::generator_file::{Found, Weights};
use crate::commands::restored::Restored;
use crate::commands::sample::{say_beside, try_out};
use crate::data::{DataSet, ImageShape};
use crate::eval::EvalError;
use crate::eval::digits::Digits;
use crate::eval::judge::{Judge, Means};
use crate::eval::rungs::{Rung, rungs};
use crate::eval::train::{Labelled, train};
use crate::random::Purpose;

/// Arguments of `worker eval`.
#[derive(Args)]
pub(crate) struct Eval {
    #[command(flatten)]
    weights: Weights,
    /// Evaluate reference samples instead, as a scale for the figures: real ones, few classes, blurred,
    /// noise.
    #[arg(long, requires = "held_out")]
    rungs: bool,
    /// Real samples to compare with: a data.kind, and for most kinds a path, such as
    /// idx:/data/train-images-idx3-ubyte.gz. Default: the data of the run.
    #[arg(long, value_name = "KIND[:PATH]")]
    data: Option<Source>,
    /// Real samples of the same kind that were not trained on. Models with a likelihood, or a bound of one,
    /// are evaluated by it. Default for transformers: those of the run.
    #[arg(long, value_name = "PATH")]
    held_out: Option<PathBuf>,
    /// Number of samples to generate.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    samples: u32,
    /// Number of real samples to compare them with; 0 for all.
    #[arg(long, default_value_t = 0)]
    reference: u32,
    /// Features for the metrics: auto, digits, pixels, or a TorchScript file from images (n, c, h, w) in
    /// [-1, 1] to features (n, d).
    #[arg(long, default_value = "auto")]
    features: String,
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of threads to compute with.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Data source as named on the command line.
#[derive(Clone, Debug)]
pub(crate) struct Source(DataKind, Option<PathBuf>);

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, path) =
            text.split_once(':').map_or((text, None), |(kind, path)| (kind, Some(path.into())));
        let kind = serde_json::from_value(Value::from(kind));
        kind.map(|kind| Source(kind, path)).map_err(|error| error.to_string())
    }
}

/// Part of a run's job file that the evaluation reads.
#[derive(Deserialize)]
struct RunJob {
    data: Data,
}

/// Evaluates a checkpoint's samples, or reference samples of known quality, and prints the metrics.
///
/// # Errors
/// The input is wrong, or samples cannot be read.
pub(crate) fn eval(arguments: &Eval) -> Result<(), Failure> {
    crate::set_threads(arguments.threads);
    let progress = Progress::start("reading weights and data");
    if arguments.rungs && arguments.weights.is_given() {
        return Err(Failure::Input("--rungs judges no run; leave one of the two out".to_string()));
    }
    if !arguments.rungs && arguments.weights.transformer().is_some() {
        return of_transformer(arguments, progress);
    }
    let found = (!arguments.rungs).then(|| arguments.weights.open()).transpose()?;
    let shape = found.as_ref().map(|found| found.painter.shape());
    let job = found.as_ref().and_then(|found| found.job.as_ref());
    let source = real_data(arguments.data.as_ref(), shape, job)?;
    let job_text = job.map(|(_, text)| text.clone());
    let open = |data: &Data, option: &str| {
        DataSet::open(data)
            .map_err(|error| error.in_words_of(option, "the kind of --data"))
            .map_err(EvalError::from)
    };
    let held_out = || -> Result<Option<DataSet>, EvalError> {
        let path = arguments.held_out.clone();
        path.map(|path| open(&source.elsewhere(path), "--held-out")).transpose()
    };
    let data = open(&source, "--data")?;
    if let Some(drawn) = shape.filter(|drawn| Some(*drawn) != data.shape().image()) {
        return Err(Failure::Input(format!(
            "the checkpoint draws images of {drawn}, and the data has {}; give such data with --data",
            data.shape()
        )));
    }
    let (samples, reference) = (arguments.samples, arguments.reference);
    let features = Features::from(arguments.features.clone());
    let settings =
        Evaluation { samples, reference, features, best_by: BestBy::Auto, ..Evaluation::default() };
    let judge = Means::open(&settings, &data, held_out()?.map(Arc::new))?.judge(&data, &progress)?;
    let judged = match found {
        Some(Found { name, painter, .. }) => {
            progress.part("samples", samples.into());
            let images = painter.draw_counted(Purpose::Evaluation, arguments.seed, samples, &progress);
            let mut metrics = judge.metrics(&images, None, &progress)?;
            metrics.extend(own_scalars(arguments, job_text.as_deref(), &progress)?);
            vec![(name, metrics)]
        }
        None => {
            let held_out = held_out()?
                .ok_or_else(|| Failure::Input("give a run, or --rungs with --held-out".to_string()))?;
            of_rungs(&judge, &data, &held_out, &progress)?
        }
    };
    let count = if reference == 0 { data.len() } else { data.len().min(reference as usize) };
    let text =
        if arguments.json { as_json(&judge, count, &judged) } else { as_table(&judge, count, &judged) };
    drop(progress);
    Ok(out::print(&text)?)
}

/// Prints what a transformer's likelihood is of held-out samples.
fn of_transformer(arguments: &Eval, progress: Progress) -> Result<(), Failure> {
    progress.part("held-out samples", 0);
    let restored = Restored::open(arguments.weights.name())?;
    let own = restored.evaluate(arguments.held_out.as_ref())?.ok_or_else(|| {
        let what = "a transformer is evaluated by samples that it was not trained on, and the run has none";
        Failure::Input(format!("{what}; give them with --held-out"))
    })?;
    let about = format!("{} held-out samples of {}", own.samples, own.held_out.display());
    let text = if arguments.json {
        let judged = as_values(&[(restored.name, own.metrics)]);
        let about = json!({ "held_out": own.held_out, "samples": own.samples, "judged": judged });
        format!("{about:#}\n")
    } else {
        format!("{about}\n\n{}", as_list(&restored.name, &own.metrics))
    };
    drop(progress);
    Ok(out::print(&text)?)
}

/// Scalars of the objective's own for the held-out samples that the command names.
fn own_scalars(
    arguments: &Eval,
    job: Option<&str>,
    progress: &Progress,
) -> Result<Vec<(String, f64)>, Failure> {
    if arguments.held_out.is_none() || !job.is_some_and(Restored::may_have_scalars) {
        return Ok(Vec::new());
    }
    progress.part("held-out samples", 0);
    let restored = Restored::open(arguments.weights.name())?;
    Ok(restored.evaluate(arguments.held_out.as_ref())?.map_or_else(Vec::new, |own| own.metrics))
}

type Judged = Vec<(String, Vec<(String, f64)>)>;

fn of_rungs(
    judge: &Judge,
    data: &DataSet,
    held_out: &DataSet,
    progress: &Progress,
) -> Result<Judged, EvalError> {
    let judged = |Rung { name, images }| Ok((name.to_string(), judge.metrics(&images, None, progress)?));
    rungs(judge, data, held_out)?.into_iter().map(judged).collect()
}

/// Returns the section of real data: of the named source, else of the run with this job.
///
/// # Errors
/// There is neither.
pub(crate) fn real_data(
    named: Option<&Source>,
    shape: Option<ImageShape>,
    job: Option<&(String, String)>,
) -> Result<Data, Failure> {
    if let Some(Source(kind, path)) = named {
        let side = shape.filter(|_| *kind == DataKind::Folder).and_then(|s| u32::try_from(s.height).ok());
        let channels = shape.map_or(Ok(3), |shape| u32::try_from(shape.channels)).unwrap_or(3);
        return Ok(Data { resize: side, crop: side, ..Data::plain(*kind, path.clone(), channels) });
    }
    let (file, text) = job.ok_or_else(|| {
        let what = "there is no job.toml beside the checkpoint that tells of its data; give --data, such as --data mnist-10k";
        Failure::Input(what.to_string())
    })?;
    let wrong = |error: toml::de::Error| format!("{file}: {}; give --data", error.message());
    let read: RunJob = toml::from_str(text).map_err(|error| Failure::Input(wrong(error)))?;
    Ok(read.data)
}

fn as_json(judge: &Judge, reference: usize, judged: &Judged) -> String {
    let sets = as_values(judged);
    let about = json!({ "features": judge.describe(), "samples": judge.samples(), "reference": reference, "judged": sets });
    format!("{about:#}\n")
}

fn as_values(judged: &[(String, Vec<(String, f64)>)]) -> Vec<Value> {
    let of_set = |(name, metrics): &(String, Vec<(String, f64)>)| {
        let metrics: serde_json::Map<String, Value> =
            metrics.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        json!({ "samples_of": name, "metrics": metrics })
    };
    judged.iter().map(of_set).collect()
}

/// A metric a line, below the name of what they are of.
fn as_list(name: &str, metrics: &[(String, f64)]) -> String {
    let lines = metrics.iter().map(|(name, value)| format!("  {name:<26} {value:>12.4}\n"));
    format!("{name}\n{}", lines.collect::<String>())
}

/// Table of metrics: a row per set of samples, or a row per metric for a single set.
fn as_table(judge: &Judge, reference: usize, judged: &Judged) -> String {
    let mut text = format!(
        "features {}; {} samples against {reference} real ones\n\n",
        judge.describe(),
        judge.samples()
    );
    let Some((_, first)) = judged.first() else { return text };
    if let [(name, metrics)] = judged.as_slice() {
        return text + &as_list(name, metrics);
    }
    let titles: Vec<String> = first.iter().map(|(name, _)| name.replace('_', " ")).collect();
    let _ = writeln!(text, "| samples | {} |", titles.join(" | "));
    let _ = writeln!(text, "|---|{}", "---|".repeat(titles.len()));
    for (name, metrics) in judged {
        let values: Vec<String> = metrics.iter().map(|(_, value)| format!("{value:.4}")).collect();
        let _ = writeln!(text, "| {name} | {} |", values.join(" | "));
    }
    text
}

/// Arguments of `worker train-classifier`.
#[derive(Args)]
pub(crate) struct TrainClassifier {
    /// Images to train on, an IDX file such as train-images-idx3-ubyte.gz.
    #[arg(long, value_name = "FILE")]
    images: PathBuf,
    /// Labels of --images, an IDX file such as train-labels-idx1-ubyte.gz.
    #[arg(long, value_name = "FILE")]
    labels: PathBuf,
    /// Images that are not trained on, to measure the accuracy with.
    #[arg(long, value_name = "FILE", requires = "test_labels")]
    test_images: Option<PathBuf>,
    /// Labels of --test-images.
    #[arg(long, value_name = "FILE", requires = "test_images")]
    test_labels: Option<PathBuf>,
    /// Seed of the first weights, the order of images and their moves.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of passes over the images.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1000))]
    epochs: u64,
    /// Safetensors file to write the weights to; their blake3 hash goes to a file beside it.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl From<EvalError> for Failure {
    fn from(error: EvalError) -> Self {
        match error {
            EvalError::Input(detail) => Failure::Input(detail),
            EvalError::Data(error) => match error.into_input() {
                Ok(detail) => Failure::Input(detail),
                Err(other) => Failure::Other(other.to_string()),
            },
            EvalError::Sample(error) => error.into(),
            other => Failure::Other(other.to_string()),
        }
    }
}

/// Trains the digit classifier and writes its weights.
///
/// # Errors
/// The files are wrong, or cannot be written.
pub(crate) fn train_classifier(arguments: &TrainClassifier) -> Result<(), Failure> {
    crate::set_threads(1);
    let beside = arguments.out.with_extension("blake3");
    try_out(&arguments.out)?;
    try_out(&beside)?;
    let progress = Progress::start("reading digits");
    let read = |images: &PathBuf, option: &str, labels: &PathBuf| -> Result<Labelled, EvalError> {
        let data = DataSet::open(&Data::plain(DataKind::Idx, Some(images.clone()), 1));
        Labelled::read(&data.map_err(|error| error.in_words_of(option, "the kind"))?, labels)
    };
    let digits = read(&arguments.images, "--images", &arguments.labels)?;
    let test = arguments.test_images.as_ref().zip(arguments.test_labels.as_ref());
    let test = test.map(|(images, labels)| read(images, "--test-images", labels)).transpose()?;
    let say = |line: String| say_beside(&arguments.out, &line);
    let mut said = Ok(());
    let tell = |epoch, loss: f64| {
        // Of the first error: whoever reads has then gone.
        if said.is_ok() {
            said = say(format!("epoch {epoch} of {}: loss {loss:.4}", arguments.epochs));
        }
    };
    let weights = train(&digits, arguments.seed, arguments.epochs, &progress, tell)?;
    drop(progress);
    let hash = blake3::hash(&weights).to_hex();
    if let Some(test) = test {
        let accuracy = 100.0 * test.accuracy(&Digits::read(&weights)?);
        said =
            said.and_then(|()| say(format!("{accuracy:.2} % of the test images are classified correctly")));
    }
    // Also where nobody reads on: the work is done.
    write_both([(&arguments.out, &weights), (&beside, format!("{hash}\n").as_bytes())])
        .map_err(|error| Failure::unwritable("--out", &arguments.out, &error))?;
    said.and_then(|()| say(format!("{} blake3 {hash}", arguments.out.display())))
}

/// Writes files that belong together: both contents are on the disk before either has its name.
fn write_both(files: [(&PathBuf, &[u8]); 2]) -> io::Result<()> {
    let draft = |(file, content): (&PathBuf, &[u8])| -> io::Result<Draft> {
        let draft = Draft::for_output(file)?;
        draft.file().write_all(content)?;
        Ok(draft)
    };
    let [weights, hash] = files.map(draft);
    let (weights, hash) = (weights?, hash?);
    weights.put()?;
    hash.put()
}
