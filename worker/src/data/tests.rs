//! Tests of the data as the training loop sees them, and of every complaint about a user's files.

mod bombs;
mod cifar_files;
mod digits;
mod folders;
mod framings;
mod idx_files;
mod labelled;
mod leaving_out;
mod left_out;
mod npy_files;
mod orientations;
mod packed_files;
mod prefetching;
mod texts;
mod transparent;

use std::fs;
use std::io::{Cursor, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use ganglion_proto::job::{ClassOrder, Data, DataKind, Orientation};
use image::{DynamicImage, ImageFormat, RgbImage};
use tempfile::TempDir;

use super::*;

fn data(kind: DataKind, path: &Path) -> Data {
    Data::plain(kind, Some(path.to_path_buf()), 3)
}

/// Message of a refusal, which must be an error that the user can fix.
fn refusal<T>(result: Result<T, DataError>) -> String {
    match result.map_err(DataError::into_input) {
        Err(Ok(message)) => message,
        Err(Err(other)) => panic!("expected an error of input, found {other:?}"),
        Ok(_) => panic!("expected an error of input, found none"),
    }
}

/// Asserts that a refusal holds each of the `parts`.
#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

fn shape(dataset: &DataSet) -> ImageShape {
    dataset.shape().image().unwrap()
}

fn read(dataset: &DataSet, index: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; shape(dataset).numel()];
    dataset.read(index, &mut out).unwrap();
    out
}

fn idx_bytes(magic: u32, sizes: [u32; 3], pixels: &[u8]) -> Vec<u8> {
    let header = [magic, sizes[0], sizes[1], sizes[2]].map(u32::to_be_bytes);
    [header.as_flattened(), pixels].concat()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Opens `bytes` as a file of the given kind.
fn open_bytes(kind: DataKind, bytes: &[u8]) -> Result<DataSet, DataError> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("the-file");
    fs::write(&path, bytes).unwrap();
    DataSet::open(&data(kind, &path))
}

/// A picture whose bytes depend on `seed`.
fn picture(width: u32, height: u32, seed: u8) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let [x, y] = [x, y].map(|at| u8::try_from(at * 7 % 251).unwrap());
        image::Rgb([x.wrapping_add(seed), y.wrapping_mul(seed), x ^ y])
    })
}

fn encoded(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::from(image.clone()).write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A folder with PNG files of the given names and sizes.
fn picture_folder(pictures: &[(&str, u32, u32)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (seed, &(name, width, height)) in (1..).zip(pictures) {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, encoded(&picture(width, height, seed), ImageFormat::Png)).unwrap();
    }
    folder
}

/// Channels x height x width of a picture, in [-1, 1].
fn planes(image: &RgbImage) -> Vec<f32> {
    (0..3)
        .flat_map(|channel| image.pixels().map(move |pixel| f32::from(pixel[channel]) / 127.5 - 1.0))
        .collect()
}
