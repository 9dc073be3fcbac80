//! Training samples: sources, order, and delivery to the training loop.
//!
//! [`DataSet`] turns an index into pixels. [`SampleStream`](ganglion_proto::stream::SampleStream) turns a
//! number of the job's endless stream into an index. [`Prefetcher`] joins both on a thread of its own, so
//! that the training loop finds its next batch ready.
//!
//! Invariants:
//! 1. The pixels of a sample are a function of the `[data]` section, the files and the sample's index.
//!    Neither the order in which a file system lists its entries nor the time of a read enters.
//! 2. No content of a file causes a panic, nor an allocation larger than the file justifies: a header is
//!    checked against what follows it, and all sizes have limits.
//! 3. An image is bytes, height x width x channels, until its framing writes it as `f32`, channels x height x
//!    width.
//! 4. Labels are read only on request: a data set without them is whole, and its fingerprint does not
//!    depend on them.

mod arrays;
pub(crate) mod check;
mod cifar;
mod classes;
mod data_set;
mod decode;
mod error;
mod folder;
mod framing;
mod idx;
mod labels;
mod left_out;
mod memory;
mod packed;
mod parallel;
mod place;
mod prefetch;
mod remote;
mod search;
mod shape;
#[cfg(test)]
mod tests;
mod text;
mod values;

use std::fs::{self, File};
use std::path::Path;

pub use self::data_set::DataSet;
pub use self::error::DataError;
pub(crate) use self::folder::read_picture;
pub use self::prefetch::{Batch, Beside, Draw, Plan, Prefetcher, Upload};
pub use self::shape::{ImageShape, SampleShape, TokenShape};
pub use self::text::{Text, TextCodec};
pub use self::values::Values;

/// Longest side of an image as the networks see it, in pixels.
const MAX_SIDE: u32 = 8192;

/// Maximum number of bytes of pixels that a data set may keep in memory.
const MAX_BYTES_IN_MEMORY: u64 = 16 << 30;

/// Maximum length of an image file, or member of an archive, that is read.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Opens a regular file for reading, and returns it with its length, which is within `limit`.
fn open_plain(path: &Path, limit: u64) -> Result<(File, u64), DataError> {
    let failed = |error| DataError::reading(path, error);
    // Checked before opening: opening a pipe waits for its writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(input(path, "found neither a file nor a folder, expected a file; remove it"));
    }
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    place::check_length(path, length, limit)?;
    Ok((file, length))
}

/// Returns an input error of the file at a path.
fn input(path: &Path, wrong: &str) -> DataError {
    DataError::Input(format!("{}: {wrong}", path.display()))
}

/// Reads an IDX file of labels, plain or compressed: the class of each sample, by its index.
///
/// # Errors
/// The file cannot be read, or is no IDX file of labels.
pub fn read_labels(path: &Path) -> Result<Vec<u32>, DataError> {
    Ok(idx::labels(path)?.of)
}
