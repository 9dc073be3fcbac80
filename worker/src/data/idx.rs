//! IDX files of images, the format of MNIST: a header of four big-endian `u32` (magic number, images, rows, columns), then
//! one byte for each pixel. Files of labels: two such numbers (magic number, labels), then one byte for each. Plain or compressed with gzip, told apart by their first bytes.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use super::{DataError, Labels, MAX_BYTES_IN_MEMORY, MAX_SIDE, Memory};

/// Unsigned bytes in three dimensions.
const MAGIC_IMAGES: u32 = 0x0000_0803;
/// Unsigned bytes in one dimension.
const MAGIC_LABELS: u32 = 0x0000_0801;
const HEADER_BYTES: usize = 16;
const LABELS_HEADER_BYTES: usize = 8;

/// The 10,000 test digits of MNIST.
static BUNDLED: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-images-idx3-ubyte.gz"));

/// The digits that come with the worker.
pub(super) fn bundled() -> Result<Memory, DataError> {
    read(BUNDLED, Path::new("the bundled t10k-images-idx3-ubyte.gz"))
}

/// Their labels.
static BUNDLED_LABELS: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-labels-idx1-ubyte.gz"));

/// The labels of the digits that come with the worker.
pub(super) fn bundled_labels() -> Result<Labels, DataError> {
    read_labels(BUNDLED_LABELS, Path::new("the bundled t10k-labels-idx1-ubyte.gz"))
}

/// A file itself, or the file of a folder that holds the training images.
pub(super) fn file_of(path: &Path) -> Result<PathBuf, DataError> {
    let is_folder = fs::metadata(path).map_err(|error| DataError::reading(path, error))?.is_dir();
    if is_folder { choose(path) } else { Ok(path.to_path_buf()) }
}

/// Reads a file of images.
pub(super) fn open(path: &Path) -> Result<Memory, DataError> {
    let file = File::open(path).map_err(|error| DataError::reading(path, error))?;
    read(BufReader::new(file), path)
}

/// Reads a file of labels.
pub(super) fn labels(path: &Path) -> Result<Labels, DataError> {
    let file = File::open(path).map_err(|error| DataError::reading(path, error))?;
    read_labels(BufReader::new(file), path)
}

/// Reads the file of labels that belongs to a file of images by its name, plain or compressed.
pub(super) fn labels_beside(images: &Path) -> Result<Labels, DataError> {
    let name = images.file_name().unwrap_or_default().to_string_lossy();
    let wanted = plain(&name).replace("images", "labels").replace("idx3", "idx1");
    let places = [wanted.clone(), format!("{wanted}.gz")].map(|name| images.with_file_name(name));
    let found = places.iter().find(|place| wanted != plain(&name) && place.is_file());
    let Some(path) = found else {
        return Err(DataError::Input(format!(
            "{}: found no file of labels {wanted} or {wanted}.gz beside it, which model.conditional needs; put it \
             there, or set model.conditional = false",
            images.display()
        )));
    };
    labels(path)
}

/// The file of a folder to train on: the training images by name, else the only file of images.
fn choose(folder: &Path) -> Result<PathBuf, DataError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(|error| DataError::reading(folder, error))? {
        let entry = entry.map_err(|error| DataError::reading(folder, error))?;
        // Some archives unpack to a folder of the file's own name.
        if entry.path().is_file() {
            names.extend(entry.file_name().into_string());
        }
    }
    names.retain(|name| is_images(plain(name)));
    names.sort();
    // A file next to its own compressed form is one file; sorting put the plain one first.
    names.dedup_by(|later, earlier| plain(later) == plain(earlier));
    let train = names.iter().find(|name| plain(name).starts_with("train-images"));
    match (train, names.as_slice()) {
        (Some(train), _) => Ok(folder.join(train)),
        (None, [only]) => Ok(folder.join(only)),
        (None, []) => Err(DataError::Input(format!(
            "{}: found no IDX file of images, expected train-images-idx3-ubyte or another \
             *-images-idx3-ubyte or *.idx3-ubyte, plain or .gz; set data.path to the file",
            folder.display()
        ))),
        (None, several) => Err(DataError::Input(format!(
            "{}: found several IDX files of images ({}), none of them train-images-idx3-ubyte; \
             set data.path to one of them",
            folder.display(),
            several.join(", ")
        ))),
    }
}

/// A file's name without the ending of compression.
fn plain(name: &str) -> &str {
    name.strip_suffix(".gz").unwrap_or(name)
}

fn is_images(name: &str) -> bool {
    name.ends_with("-images-idx3-ubyte") || name.ends_with(".idx3-ubyte")
}

/// Reads a whole file of images, whatever its compression. `path` is for messages.
fn read(reader: impl BufRead, path: &Path) -> Result<Memory, DataError> {
    unpacked(reader, path, decode)
}

/// Reads a whole file of labels, whatever its compression.
fn read_labels(reader: impl BufRead, path: &Path) -> Result<Labels, DataError> {
    unpacked(reader, path, decode_labels)
}

/// Lets `decode` read what a file holds.
fn unpacked<T>(
    mut reader: impl BufRead,
    path: &Path,
    decode: impl FnOnce(&mut dyn Read, &Path) -> Result<T, DataError>,
) -> Result<T, DataError> {
    let start = reader.fill_buf().map_err(|error| DataError::reading(path, error))?;
    if start.starts_with(&[0x1f, 0x8b]) {
        decode(&mut MultiGzDecoder::new(reader), path).map_err(|error| match error {
            DataError::System { source, .. } if is_corruption(&source) => DataError::Input(format!(
                "{}: the gzip data are corrupt or cut off ({source}); get the file again",
                path.display()
            )),
            other => other,
        })
    } else {
        decode(&mut reader, path)
    }
}

/// Whether a decompressor complains about its input, not about reading it.
fn is_corruption(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    matches!(error.kind(), InvalidData | InvalidInput | UnexpectedEof)
}

/// Reads the uncompressed bytes of a file and checks all that its header says.
fn decode(mut reader: &mut dyn Read, path: &Path) -> Result<Memory, DataError> {
    let name = path.display();
    let failed = |source| DataError::System { path: path.to_path_buf(), source };
    let mut header = Vec::with_capacity(HEADER_BYTES);
    Read::by_ref(&mut reader).take(HEADER_BYTES as u64).read_to_end(&mut header).map_err(failed)?;
    let [images, height, width] =
        parse_header(&header).map_err(|wrong| DataError::Input(format!("{name}: {wrong}")))?;

    let expected = u64::from(images) * u64::from(height) * u64::from(width);
    if expected > MAX_BYTES_IN_MEMORY {
        return Err(DataError::Input(format!(
            "{name}: its header announces {images} images of {width} x {height} pixels, \
             {expected} bytes, expected at most {MAX_BYTES_IN_MEMORY}; use data.kind = \"folder\" \
             for data that do not fit into memory"
        )));
    }
    // One byte more than announced tells whether anything follows. Memory grows with what is really there.
    let mut bytes = Vec::new();
    reader.take(expected + 1).read_to_end(&mut bytes).map_err(failed)?;
    let found = bytes.len() as u64;
    if found < expected {
        return Err(DataError::Input(format!(
            "{name}: found {found} bytes of pixels, expected {expected} ({images} images of \
             {width} x {height}); the file is cut off, get it again"
        )));
    }
    if found > expected {
        return Err(DataError::Input(format!(
            "{name}: found more than the {expected} bytes of pixels that its header announces \
             ({images} images of {width} x {height}); the file is damaged, get it again"
        )));
    }
    Ok(Memory { width, height, channels: 1, bytes })
}

/// Reads the uncompressed bytes of a file of labels.
fn decode_labels(reader: &mut dyn Read, path: &Path) -> Result<Labels, DataError> {
    let name = path.display();
    let failed = |source| DataError::System { path: path.to_path_buf(), source };
    let limit = LABELS_HEADER_BYTES as u64 + u64::from(u32::MAX) + 1;
    let mut bytes = Vec::new();
    reader.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    let header = bytes.first_chunk::<LABELS_HEADER_BYTES>().map(|header| {
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        (word(0), word(4) as usize)
    });
    let labels = &bytes[LABELS_HEADER_BYTES.min(bytes.len())..];
    match header {
        Some((MAGIC_LABELS, count)) if count == labels.len() => {
            Ok(Labels::new(labels.iter().map(|label| u32::from(*label)).collect(), name.to_string()))
        }
        Some((MAGIC_LABELS, count)) => Err(DataError::Input(format!(
            "{name}: its header announces {count} labels and {} follow; the file is cut off or damaged, get it again",
            labels.len()
        ))),
        _ => Err(DataError::Input(format!(
            "{name}: found no IDX file of labels, expected magic number 0x{MAGIC_LABELS:08x}; get the file again"
        ))),
    }
}

/// The numbers of images, rows and columns, or what is wrong with the header.
fn parse_header(header: &[u8]) -> Result<[u32; 3], String> {
    let Ok(header) = <[u8; HEADER_BYTES]>::try_from(header) else {
        return Err(format!(
            "found {} bytes, expected a header of {HEADER_BYTES}; the file is cut off or not an \
             IDX file",
            header.len()
        ));
    };
    let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let [magic, images, height, width] = [word(0), word(4), word(8), word(12)];
    match magic {
        MAGIC_IMAGES => {}
        MAGIC_LABELS => {
            return Err(
                "found labels, expected images; set data.path to the *-images-idx3-ubyte file".to_owned()
            );
        }
        _ => {
            return Err(format!(
                "found magic number 0x{magic:08x}, expected 0x{MAGIC_IMAGES:08x} (IDX, bytes in \
                 three dimensions); set data.kind to the format of this file"
            ));
        }
    }
    if images == 0 {
        return Err("found no images, expected at least one; set data.path to another file".to_owned());
    }
    if !(1..=MAX_SIDE).contains(&height) || !(1..=MAX_SIDE).contains(&width) {
        return Err(format!(
            "found images of {width} x {height} pixels, expected 1 to {MAX_SIDE} a side; the \
             header is damaged, get the file again"
        ));
    }
    Ok([images, height, width])
}
