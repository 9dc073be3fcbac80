//! CIFAR-10, binary version: records of a label and 3 x 32 x 32 bytes of pixels, one plane for each
//! channel.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use ganglion_proto::printable_start;

use super::labels::{Labels, NAME_CHARACTERS};
use super::memory::Memory;
use super::{DataError, MAX_BYTES_IN_MEMORY, input, open_plain};

const SIDE: u32 = 32;
const PLANE_BYTES: usize = 32 * 32;
const CHANNELS: usize = 3;
const RECORD_BYTES: usize = 1 + CHANNELS * PLANE_BYTES;
const LABELS: u8 = 10;
/// File with the names of the classes, beside the records.
const NAMES_FILE: &str = "batches.meta.txt";
/// Maximum length of that file.
const NAMES_LIMIT: u64 = 1 << 20;
/// Names of CIFAR-10's classes, in their order.
const NAMES: [&str; LABELS as usize] =
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];

/// Reads one file, or the five training files of a folder.
pub(super) fn open(path: &Path) -> Result<(Memory, Labels), DataError> {
    let is_folder = fs::metadata(path).map_err(|error| DataError::reading(path, error))?.is_dir();
    let files = if is_folder { batches(path)? } else { vec![path.to_path_buf()] };
    let (mut bytes, mut labels) = (Vec::new(), Vec::new());
    for file in &files {
        append(file, &mut bytes, &mut labels)?;
    }
    let labels = Labels::new(labels, "label in each record", path.display().to_string());
    let folder = if is_folder { path } else { path.parent().unwrap_or(Path::new("")) };
    let labels = match names(&folder.join(NAMES_FILE))? {
        // Somebody else's classes in the same format.
        Some(names) if names != NAMES => labels.named_apart(names),
        _ => labels.named(NAMES.map(str::to_owned).to_vec()),
    };
    Ok((Memory { width: SIDE, height: SIDE, channels: CHANNELS, bytes }, labels))
}

/// Reads the names of the classes, one a line; `None` if there is no file of as many names as classes.
fn names(path: &Path) -> Result<Option<Vec<String>>, DataError> {
    if !path.is_file() {
        return Ok(None);
    }
    let (file, length) = open_plain(path, NAMES_LIMIT)?;
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text).map_err(|error| DataError::reading(path, error))?;
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let names: Vec<String> = lines.map(|line| printable_start(line, NAME_CHARACTERS)).collect();
    Ok((names.len() == LABELS as usize).then_some(names))
}

/// Returns the training files of a folder, in their order.
fn batches(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let files: Vec<PathBuf> = (1..=5).map(|batch| folder.join(format!("data_batch_{batch}.bin"))).collect();
    let missing: Vec<String> = files
        .iter()
        .filter(|file| !file.is_file())
        .map(|file| file.file_name().unwrap_or_default().display().to_string())
        .collect();
    if missing.is_empty() {
        return Ok(files);
    }
    Err(DataError::Input(format!(
        "{}: {} missing, expected data_batch_1.bin to data_batch_5.bin; set data.path to the \
         folder that the binary version of CIFAR-10 unpacks to (cifar-10-batches-bin), or to one \
         such file",
        folder.display(),
        missing.join(", ")
    )))
}

/// Reads a file's records and adds their labels, and their pixels, height x width x channels.
fn append(path: &Path, pixels: &mut Vec<u8>, labels: &mut Vec<u32>) -> Result<(), DataError> {
    let (file, length) = open_plain(path, u64::MAX)?;
    // All files together have to fit.
    let room = MAX_BYTES_IN_MEMORY.saturating_sub(pixels.len() as u64);
    if length > room {
        let wrong = format!("found {length} bytes, which do not fit into memory; use data.kind = \"folder\"");
        return Err(input(path, &wrong));
    }
    let mut records = Vec::new();
    file.take(length).read_to_end(&mut records).map_err(|error| DataError::reading(path, error))?;
    check(&records).map_err(|wrong| input(path, &wrong))?;
    // A little more than needed, by the labels; far less than doubling.
    pixels.reserve_exact(records.len());
    for record in records.chunks_exact(RECORD_BYTES) {
        labels.push(u32::from(record[0]));
        for at in 1..=PLANE_BYTES {
            // From planes to pixels: an image is height x width x channels here (invariant 3 of `data`).
            pixels.extend([record[at], record[at + PLANE_BYTES], record[at + 2 * PLANE_BYTES]]);
        }
    }
    Ok(())
}

/// Checks a file's content.
fn check(records: &[u8]) -> Result<(), String> {
    let found = records.len();
    if records.starts_with(&[0x1f, 0x8b]) {
        return Err("found a gzip archive, expected the files inside; unpack it".to_owned());
    }
    if found == 0 {
        return Err("found an empty file, expected CIFAR-10 records; get the file again".to_owned());
    }
    if !found.is_multiple_of(RECORD_BYTES) {
        return Err(format!(
            "found {found} bytes, expected a multiple of {RECORD_BYTES} (a label and 3 x 32 x 32 \
             pixels); the file is cut off or not CIFAR-10's binary version"
        ));
    }
    // The labels also detect a file of another format whose length happens to fit.
    match records
        .chunks_exact(RECORD_BYTES)
        .map(|record| record[0])
        .enumerate()
        .find(|&(_, label)| label >= LABELS)
    {
        Some((record, label)) => Err(format!(
            "found label {label} in record {record}, expected 0 to 9; the file is damaged or not \
             CIFAR-10's binary version"
        )),
        None => Ok(()),
    }
}
