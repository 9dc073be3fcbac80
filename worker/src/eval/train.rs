//! Training the digit classifier: `worker train-classifier`.
//!
//! 1. The weights are a function of (images, labels, seed, epochs) and of the environment's machine and
//!    build (`passport`), as a run's are: all draws have keys, and one thread computes.
//! 2. No image of a test set is trained on: test images are given apart, and only counted.

use std::path::Path;

use c10d::aten::{Adam, Step, fused_adam};
use ganglion_proto::evaluation::NOT_FINITE;
use ganglion_proto::progress::Progress;
use ganglion_proto::stream::SampleStream;
use ganglion_proto::words::counted;
use tch::{Device, Kind, Tensor, no_grad};

use super::digits::{CLASSES, Digits, SHAPE, forward, specs};
use super::{EvalError, images};
use crate::checkpoint::serialize_floats;
use crate::data::{DataSet, read_labels};
use crate::random::{Key, Purpose};
use crate::state::{Layout, initial_values, narrow};

/// Number of digits in one update.
const BATCH: u64 = 128;
/// Maximum shift of a batch in pixels, to each side: MNIST's digits keep four pixels of margin.
const SHIFT: f32 = 2.0;
/// Initial learning rate of Adam; it falls linearly to 0.
const LEARNING_RATE: f64 = 2e-3;

/// Digits with their labels.
#[derive(Debug)]
pub(crate) struct Labelled {
    /// Images (n, 1, 28, 28) in [-1, 1].
    pub images: Tensor,
    /// Labels (n), from 0 to 9.
    pub labels: Tensor,
}

impl Labelled {
    /// Reads images, and their labels from a file.
    ///
    /// # Errors
    /// They are no digits of MNIST's form, or do not belong together.
    pub(crate) fn read(data: &DataSet, file: &Path) -> Result<Labelled, EvalError> {
        if data.shape().image() != Some(SHAPE) {
            return Err(EvalError::Input(format!("the samples are {}, not images of {SHAPE}", data.shape())));
        }
        let labels = labels(file)?;
        let (found, wanted) = (labels.size()[0], data.len());
        // A label too few would shift all others.
        if usize::try_from(found) != Ok(wanted) {
            let what =
                format!("{}: {} for {}", file.display(), counted(found, "label"), counted(wanted, "image"));
            return Err(EvalError::Input(what));
        }
        Ok(Labelled { images: images(data, &(0..wanted).collect::<Vec<_>>())?, labels })
    }

    /// Share of digits that a classifier classifies correctly.
    pub(crate) fn accuracy(&self, digits: &Digits) -> f64 {
        let right = |(images, labels): (Tensor, Tensor)| {
            let told = digits.look(&images).logits.argmax(-1, false);
            told.eq_tensor(&labels).to_kind(Kind::Double).sum(Kind::Double).double_value(&[])
        };
        // Accuracy is a count, so any size gives the same.
        let parts = self.images.split(1000, 0).into_iter().zip(self.labels.split(1000, 0));
        let count = i32::try_from(self.labels.size()[0]).map_or(f64::from(i32::MAX), f64::from);
        parts.map(right).sum::<f64>() / count
    }
}

/// Reads an IDX file of digits' labels.
///
/// # Errors
/// The file is no IDX file of labels, or a label is no digit.
pub(crate) fn labels(path: &Path) -> Result<Tensor, EvalError> {
    let labels: Vec<i64> = read_labels(path)?.into_iter().map(i64::from).collect();
    if labels.iter().any(|label| *label >= CLASSES) {
        return Err(EvalError::Input(format!("{}: a label is no digit", path.display())));
    }
    Ok(Tensor::from_slice(&labels))
}

/// Trains a classifier, and reports the mean loss of each epoch to `tell`. Returns the weights file's
/// bytes.
///
/// # Errors
/// There are fewer images than a batch has, the loss is not finite, or an error of libtorch.
pub(crate) fn train(
    digits: &Labelled,
    seed: u64,
    epochs: u64,
    progress: &Progress,
    mut tell: impl FnMut(u64, f64),
) -> Result<Vec<u8>, EvalError> {
    let layout = Layout::new(specs());
    let len = i64::try_from(layout.len()).expect("the network is small");
    let zeros = || Tensor::zeros([len], (Kind::Float, Device::Cpu));
    let (mut flat, gradient, mut first, mut second) = (zeros(), zeros(), zeros(), zeros());
    for (shard, (spec, offset)) in (0..).zip(layout.entries()) {
        let key = Key { seed, step: 0, phase: 0, shard, purpose: Purpose::Classifier };
        // Into the flat buffer of which the weights are views.
        narrow(&flat, offset..offset + spec.numel()).copy_(&initial_values(key, spec));
    }
    // Leaves of their own over the same memory, as Adam writes to it in place.
    let views = || layout.views(&flat).into_iter().map(|view| view.detach().set_requires_grad(true));
    let (weights, places): (Vec<Tensor>, _) = (views().collect(), layout.views(&gradient));
    let samples = digits.labels.size()[0].unsigned_abs();
    let mut stream = SampleStream::new(seed, samples);
    let (per_epoch, updates) = (samples / BATCH, epochs * (samples / BATCH));
    // Without an update the initial weights would pass for trained ones.
    if updates == 0 {
        let what = format!("{samples} images are too few to train on; give at least {BATCH}");
        return Err(EvalError::Input(what));
    }
    let mut loss_sum = 0.0;
    progress.part("batches", updates);
    for update in 0..updates {
        let (images, labels) = batch(digits, &mut stream, seed, update);
        let loss = forward(&images, &weights).logits.cross_entropy_for_logits(&labels);
        // New tensors each time: a gradient that the weights kept would be added to.
        let gradients = Tensor::f_run_backward(&[&loss], &weights, false, false)?;
        no_grad(|| places.iter().zip(&gradients).for_each(|(place, of)| place.shallow_clone().copy_(of)));
        #[allow(clippy::cast_precision_loss)] // counts of updates are far below 2^53
        let left = 1.0 - update as f64 / updates as f64;
        // Counted from the update at hand, so that it falls to 0 after the last.
        let lr = LEARNING_RATE * left;
        let adam = Adam { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        let step = Step::whole(&mut flat, &gradient);
        fused_adam(step, [&mut first, &mut second], update + 1, adam)?;
        loss_sum += loss.double_value(&[]);
        progress.add(1);
        if (update + 1) % per_epoch == 0 {
            let epoch = (update + 1) / per_epoch;
            #[allow(clippy::cast_precision_loss)]
            let loss = std::mem::take(&mut loss_sum) / per_epoch as f64;
            if !loss.is_finite() {
                return Err(EvalError::Input(format!("the loss of epoch {epoch} is {NOT_FINITE}")));
            }
            tell(epoch, loss);
        }
    }
    let about = [("seed", seed), ("epochs", epochs), ("samples", samples)];
    let about = about.map(|(key, value)| (key.to_string(), value.to_string()));
    Ok(serialize_floats(&layout, &flat, &about.into()))
}

/// Digits of an update, shifted at random.
fn batch(digits: &Labelled, stream: &mut SampleStream, seed: u64, update: u64) -> (Tensor, Tensor) {
    let numbers = update * BATCH..(update + 1) * BATCH;
    let chosen: Vec<i64> = numbers.map(|q| stream.sample(q).cast_signed()).collect();
    let chosen = Tensor::from_slice(&chosen);
    let key = Key { seed, step: update + 1, phase: 0, shard: 0, purpose: Purpose::Classifier };
    // Rounded, so that each whole shift is as frequent.
    let moves = key.uniform(-SHIFT - 0.5, SHIFT + 0.5, 2).round();
    let moves: [i64; 2] = [moves.int64_value(&[0]), moves.int64_value(&[1])];
    (digits.images.index_select(0, &chosen).roll(moves, [2, 3]), digits.labels.index_select(0, &chosen))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stripes() -> Labelled {
        let labels = Tensor::arange(256, (Kind::Int64, Device::Cpu)).remainder(10);
        let images = Tensor::full([256, 1, 28, 28], -1.0, (Kind::Float, Device::Cpu));
        for (index, label) in (0..256).zip(Vec::<i64>::try_from(&labels).unwrap()) {
            let _ = images.get(index).narrow(1, 2 * label + 4, 2).fill_(1.0);
        }
        Labelled { images, labels }
    }

    #[test]
    fn it_learns_and_the_same_again_gives_the_same_weights() {
        let digits = stripes();
        let trained = train(&digits, 3, 2, &Progress::off(), |_, _| {}).unwrap();
        assert_eq!(trained, train(&digits, 3, 2, &Progress::off(), |_, _| {}).unwrap());
        assert_ne!(trained, train(&digits, 4, 2, &Progress::off(), |_, _| {}).unwrap());
        let longer = Digits::read(&train(&digits, 3, 60, &Progress::off(), |_, _| {}).unwrap()).unwrap();
        assert!(digits.accuracy(&longer) > 0.9, "{}", digits.accuracy(&longer));
    }

    #[test]
    fn too_few_images_are_refused() {
        let Labelled { images, labels } = stripes();
        let few = Labelled { images: images.narrow(0, 0, 127), labels: labels.narrow(0, 0, 127) };
        let refused = train(&few, 3, 1, &Progress::off(), |_, _| {}).unwrap_err().to_string();
        assert!(refused.contains("127 images are too few"), "{refused}");
    }

    #[test]
    fn files_that_are_no_labels_of_digits_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("labels");
        for (bytes, what) in [
            (&b"\x00\x00\x08\x03\x00\x00\x00\x01\x00"[..], "use the *-labels-idx1-ubyte file"),
            (b"\x00\x00\x08\x01\x00\x00\x00\x01\x0a", "no digit"),
        ] {
            std::fs::write(&file, bytes).unwrap();
            let refused = labels(&file).unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
        }
    }
}
