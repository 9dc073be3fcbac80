//! Feature extractors: from images to the inputs of metrics.

use std::path::Path;

use c10d::script::Script;
use ganglion_proto::evaluation::{Features, NOT_FINITE};
use ganglion_proto::progress::Progress;
use tch::{Kind, Tensor, no_grad};

use super::digits::{Digits, FEATURES, SHAPE};
use super::{EvalError, images, some_of};
use crate::data::{DataSet, ImageShape};
use crate::nn::is_finite;
use crate::nn::module_file;

/// Number of images in one pass. Fixed, because a kernel's rounding may depend on the batch size.
const BATCH: usize = 100;

/// Feature extractor.
#[derive(Debug)]
pub(crate) enum Extractor {
    /// The bundled digit classifier.
    Digits(Digits),
    /// No features: metrics of pixels only.
    Pixels,
    /// A TorchScript module, the hash of its file, and the number of its features.
    File(Script, String, i64),
}

/// Features of samples.
#[derive(Debug)]
pub(crate) struct Looked {
    /// Features (n, d) in f64; `None` for pixels.
    pub features: Option<Tensor>,
    /// Class probabilities (n, classes) in f64; `None` without a classifier.
    pub probabilities: Option<Tensor>,
}

impl Looked {
    /// Refuses features or probabilities that are not finite; `of` names the samples.
    ///
    /// # Errors
    /// Some are NaN or infinite.
    pub(crate) fn check(&self, of: &str) -> Result<(), EvalError> {
        match [&self.features, &self.probabilities].into_iter().flatten().all(is_finite) {
            true => Ok(()),
            false => Err(EvalError::Input(format!("the features of the {of} are {NOT_FINITE}"))),
        }
    }
}

impl Extractor {
    /// Opens the extractor of a job, for images of a shape.
    ///
    /// # Errors
    /// The images do not suit it, or the file is no such module.
    pub(crate) fn open(features: &Features, shape: ImageShape) -> Result<Extractor, EvalError> {
        match features {
            // The classifier is of use for 28 x 28 grey images only; other data have pixels.
            Features::Auto if shape == SHAPE => Ok(Extractor::Digits(Digits::bundled()?)),
            Features::Auto | Features::Pixels => Ok(Extractor::Pixels),
            Features::Digits if shape == SHAPE => Ok(Extractor::Digits(Digits::bundled()?)),
            Features::Digits => Err(EvalError::Input(format!(
                "evaluation.features: \"digits\" looks at images of {SHAPE}, and the data has {shape}; choose \"pixels\" or a \
                 TorchScript file"
            ))),
            Features::File(file) => open_file(file, shape),
        }
    }

    /// Name of the extractor, and the hash of its weights.
    pub(crate) fn describe(&self) -> String {
        match self {
            Extractor::Digits(_) => format!("digits {}", Digits::hash()),
            Extractor::Pixels => "pixels".to_string(),
            Extractor::File(_, hash, _) => format!("file {hash}"),
        }
    }

    /// Number of features of an image; `None` where pixels are compared.
    pub(crate) fn dimensions(&self) -> Option<usize> {
        match self {
            Extractor::Digits(_) => usize::try_from(FEATURES).ok(),
            Extractor::Pixels => None,
            Extractor::File(.., dimensions) => usize::try_from(*dimensions).ok(),
        }
    }

    /// Extracts features of images (n, c, h, w) in [-1, 1], batch by batch.
    ///
    /// # Errors
    /// The module of a file fails.
    pub(crate) fn look(&self, images: &Tensor, progress: &Progress) -> Result<Looked, EvalError> {
        let batch = i64::try_from(BATCH).expect("a small number");
        // Batches of one size, so that the same image gets the same bits (see BATCH).
        self.gather(images.split(batch, 0).into_iter().map(Ok), progress)
    }

    /// Extracts features of samples of a data set.
    ///
    /// # Errors
    /// A sample cannot be read, or the module of a file fails.
    pub(crate) fn look_at(
        &self,
        data: &DataSet,
        indices: &[usize],
        progress: &Progress,
    ) -> Result<Looked, EvalError> {
        self.gather(indices.chunks(BATCH).map(|chunk| Ok(images(data, chunk)?)), progress)
    }

    fn gather(
        &self,
        batches: impl Iterator<Item = Result<Tensor, EvalError>>,
        progress: &Progress,
    ) -> Result<Looked, EvalError> {
        let (mut features, mut probabilities) = (Vec::new(), Vec::new());
        for images in batches {
            match self {
                Extractor::Digits(digits) => {
                    let seen = digits.look(&images?);
                    probabilities.push(Digits::probabilities(&seen));
                    features.push(seen.features.to_kind(Kind::Double));
                }
                // There are no features: metrics of pixels take the images themselves.
                Extractor::Pixels => break,
                Extractor::File(module, ..) => features.push(features_of(module, &images?)?),
            }
            progress.add(BATCH as u64);
        }
        let whole = |parts: Vec<Tensor>| (!parts.is_empty()).then(|| Tensor::cat(&parts, 0));
        Ok(Looked { features: whole(features), probabilities: whole(probabilities) })
    }
}

fn open_file(file: &Path, shape: ImageShape) -> Result<Extractor, EvalError> {
    let wrong = |what: String| EvalError::Input(format!("evaluation.features {}: {what}", file.display()));
    let bytes = module_file::read(file).map_err(wrong)?;
    let script =
        Script::load(&bytes).map_err(|error| wrong(format!("cannot be loaded as TorchScript: {error}")))?;
    // Two images, so that a module that mixes them up is noticed by its shape.
    let sizes = [2, shape.channels, shape.height, shape.width];
    let sizes = sizes.map(|n| i64::try_from(n).expect("an image is small"));
    let probe = Tensor::zeros(sizes, (Kind::Float, tch::Device::Cpu));
    let mut looked = Ok(0);
    // The result of an evaluation must depend on the images alone (invariant 1 of `eval`).
    let draws = Script::draws(|| {
        looked = features_of(&script, &probe).map(|features| features.size()[1]);
        Ok(())
    });
    let dimensions = looked.map_err(|error| wrong(error.to_string()))?;
    if draws? {
        return Err(wrong(
            "it draws random numbers, and features must depend on the images alone".to_string(),
        ));
    }
    Ok(Extractor::File(script, blake3::hash(&bytes).to_hex().to_string(), dimensions))
}

fn features_of(script: &Script, images: &Tensor) -> Result<Tensor, EvalError> {
    let samples = images.size()[0];
    let features =
        no_grad(|| script.evaluate(images)).map_err(|error| EvalError::Input(error.to_string()))?;
    // One row for each image, whatever the shape of a row.
    if features.size().first() != Some(&samples) {
        let what = format!(
            "its output for {samples} images has the shape {:?}; it must be ({samples}, d)",
            features.size()
        );
        return Err(EvalError::Input(what));
    }
    Ok(features.flatten(1, -1).to_kind(Kind::Double).to_device(tch::Device::Cpu))
}

/// Chooses `count` samples of a data set, all if it has fewer, and none that the job leaves out.
pub(crate) fn chosen(data: &DataSet, count: usize) -> Vec<usize> {
    let left = data.left();
    let places = some_of(left.len(), if count == 0 { left.len() } else { count });
    places.into_iter().map(|place| left[place]).collect()
}
