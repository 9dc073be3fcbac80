//! Evaluation: metrics of generated samples, and an objective's own scalars of held-out ones.
//!
//! 1. A metric is a function of features; features are a function of images and of fixed weights; the
//!    images of an evaluation are a function of (job, state), and so are an objective's own scalars. So an
//!    evaluation has one result, on any member and at any time.
//! 2. Nothing here writes state or anything that training reads: libtorch's settings stay as the worker set
//!    them.
//! 3. During training it never holds a step up: see [`beside`].

pub(crate) mod beside;
pub(crate) mod digits;
pub(crate) mod features;
pub(crate) mod held_out;
pub(crate) mod inputs;
pub(crate) mod judge;
pub(crate) mod metrics;
pub(crate) mod rungs;
pub(crate) mod train;

use ganglion_proto::stream::SampleStream;
use tch::Tensor;

use crate::data::{DataError, DataSet, ImageShape};
use crate::sampling::SampleError;

/// Reasons why there are no metrics.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The user's input is wrong; the message says what, where and how to fix it.
    #[error("{0}")]
    Input(String),
    /// The classifier's weights cannot be used.
    #[error("the weights of the digit classifier cannot be used: {0}")]
    Classifier(String),
    /// The samples cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The generator cannot be read.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// An error of libtorch.
    #[error("{0}")]
    Torch(#[from] tch::TchError),
    /// An error of libtorch by way of c10d.
    #[error("{0}")]
    C10d(#[from] c10d::Error),
}

/// Reads images of a data set, (n, c, h, w) in [-1, 1], in the order of the indices: a metric over pairs
/// depends on it.
///
/// # Errors
/// A sample cannot be read.
pub(crate) fn images(data: &DataSet, indices: &[usize]) -> Result<Tensor, DataError> {
    let shape = data.shape().image().expect("metrics are opened for images alone");
    let sizes = [indices.len(), shape.channels, shape.height, shape.width];
    let values = data.read_all(indices)?;
    Ok(Tensor::from_slice(values.pixels()).view(sizes.map(|n| i64::try_from(n).expect("an image is small"))))
}

/// The shape of images that metrics look at.
///
/// # Errors
/// The samples are no images.
pub(crate) fn image_shape(data: &DataSet) -> Result<ImageShape, EvalError> {
    let none = || format!("metrics of samples look at images, and the data has {}", data.shape());
    data.shape().image().ok_or_else(|| EvalError::Input(none()))
}

/// Chooses `count` of the numbers below `len`, all if there are fewer, in order. The choice is random with
/// a fixed seed: a data set may be sorted, or come from sources that take turns, as MNIST's digits do.
pub(crate) fn some_of(len: usize, count: usize) -> Vec<usize> {
    if count >= len {
        return (0..len).collect();
    }
    // A fixed seed, as the choice must be the same for every run that is compared.
    let mut stream = SampleStream::new(0, len as u64);
    let drawn =
        (0..count as u64).map(|place| usize::try_from(stream.sample(place)).expect("an index in memory"));
    let mut drawn: Vec<usize> = drawn.collect();
    // In order, so that files are read as they lie.
    drawn.sort_unstable();
    drawn
}
