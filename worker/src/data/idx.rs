//! IDX files, the format of MNIST. Images: a header of four big-endian `u32` (magic number, images, rows,
//! columns), then one byte for each pixel. Labels: two such numbers (magic number, labels), then one byte
//! for each. Plain or compressed with gzip, told apart by their first bytes.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use ganglion_proto::words::counted;

use flate2::bufread::MultiGzDecoder;

use super::labels::Labels;
use super::memory::Memory;
use super::{DataError, MAX_BYTES_IN_MEMORY, MAX_SIDE, input, open_plain};

/// Magic number of images: unsigned bytes in three dimensions.
const MAGIC_IMAGES: u32 = 0x0000_0803;
/// Magic number of labels: unsigned bytes in one dimension.
const MAGIC_LABELS: u32 = 0x0000_0801;
const HEADER_BYTES: usize = 16;
const LABELS_HEADER_BYTES: usize = 8;
/// Maximum content of a small compressed file, in bytes.
const FREE_BYTES: u64 = 256 << 20;
/// Maximum compression ratio beyond that. MNIST's images reach 5, and blank pictures 1000.
const MAX_RATIO: u64 = 100;

/// The 10,000 test digits of MNIST.
static BUNDLED: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-images-idx3-ubyte.gz"));

/// Reads the bundled digits.
pub(super) fn bundled() -> Result<Memory, DataError> {
    unpacked(BUNDLED, BUNDLED.len() as u64, Path::new("the bundled t10k-images-idx3-ubyte.gz"), decode)
}

/// Labels of the bundled digits.
static BUNDLED_LABELS: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../data/mnist-10k/t10k-labels-idx1-ubyte.gz"));

/// Reads the labels of the bundled digits.
pub(super) fn bundled_labels() -> Result<Labels, DataError> {
    let path = Path::new("the bundled t10k-labels-idx1-ubyte.gz");
    unpacked(BUNDLED_LABELS, BUNDLED_LABELS.len() as u64, path, decode_labels)
}

/// Returns a file itself, or the file of a folder that holds the training images.
pub(super) fn file_of(path: &Path) -> Result<PathBuf, DataError> {
    let is_folder = fs::metadata(path).map_err(|error| DataError::reading(path, error))?.is_dir();
    if is_folder { choose(path) } else { Ok(path.to_path_buf()) }
}

/// Reads a file of images.
pub(super) fn open(path: &Path) -> Result<Memory, DataError> {
    // No limit here: the header is held against the length below.
    let (file, length) = open_plain(path, u64::MAX)?;
    unpacked(BufReader::new(file), length, path, decode)
}

/// Reads a file of labels.
pub(super) fn labels(path: &Path) -> Result<Labels, DataError> {
    let (file, length) = open_plain(path, u64::MAX)?;
    unpacked(BufReader::new(file), length, path, decode_labels)
}

/// Reads the file of labels that belongs to a file of images by its name, plain or compressed.
pub(super) fn labels_beside(images: &Path) -> Result<Labels, DataError> {
    let name = images.file_name().unwrap_or_default().to_string_lossy();
    let wanted = plain(&name).replace("images", "labels").replace("idx3", "idx1");
    // The plain one first, as for images.
    let places = [wanted.clone(), format!("{wanted}.gz")].map(|name| images.with_file_name(name));
    // Without `images` in its name the wanted file would be the file itself.
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

/// Chooses the file of a folder to train on: the training images by name, else the only file of images.
fn choose(folder: &Path) -> Result<PathBuf, DataError> {
    let names = names_of_images(folder).map_err(|error| DataError::reading(folder, error))?;
    // By name: a folder of MNIST has the test images beside them.
    let train = names.iter().find(|name| plain(name).starts_with("train-images"));
    match (train, names.as_slice()) {
        (Some(train), _) => Ok(folder.join(train)),
        (None, [only]) => Ok(folder.join(only)),
        (None, []) => Err(DataError::Input(format!(
            "{}: found no IDX file of images, expected train-images-idx3-ubyte or another \
             *-images-idx3-ubyte or *.idx3-ubyte, plain or .gz; set data.path to the file, or \
             data.kind = \"folder\" for a folder of pictures",
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

/// Returns the names of the files of images in a folder.
fn names_of_images(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // Some archives unpack to a folder of the file's own name.
        if entry.path().is_file() {
            names.extend(entry.file_name().into_string());
        }
    }
    names.retain(|name| is_images(plain(name)));
    names.sort();
    // A file next to its own compressed form is one file; sorting put the plain one first.
    names.dedup_by(|later, earlier| plain(later) == plain(earlier));
    Ok(names)
}

/// Returns a file's name without the extension of compression.
fn plain(name: &str) -> &str {
    name.strip_suffix(".gz").unwrap_or(name)
}

fn is_images(name: &str) -> bool {
    name.ends_with("-images-idx3-ubyte") || name.ends_with(".idx3-ubyte")
}

/// Uncompressed content of a file.
struct Unpacked<'a> {
    reader: &'a mut dyn Read,
    /// Maximum length of the content: that of a plain file, or the limit for a compressed one.
    most: u64,
    packed: bool,
    path: &'a Path,
}

/// Runs `decode` on the content of a file of `length` bytes, uncompressed if necessary. `path` is for
/// messages.
fn unpacked<T>(
    mut reader: impl BufRead,
    length: u64,
    path: &Path,
    decode: impl FnOnce(&mut Unpacked<'_>) -> Result<T, DataError>,
) -> Result<T, DataError> {
    let start = reader.fill_buf().map_err(|error| DataError::reading(path, error))?;
    // The magic number of gzip (RFC 1952): endings of names are often wrong.
    if !start.starts_with(&[0x1f, 0x8b]) {
        return decode(&mut Unpacked { reader: &mut reader, most: length, packed: false, path });
    }
    let most = length.saturating_mul(MAX_RATIO).max(FREE_BYTES);
    // A file may be several gzip members in a row, as some tools write it.
    let mut reader = MultiGzDecoder::new(reader);
    let decoded = decode(&mut Unpacked { reader: &mut reader, most, packed: true, path });
    decoded.map_err(|error| match error {
        // An error of the disk stays the system's: the same file may be read the next time.
        DataError::System { source, .. } if is_corruption(&source) => {
            input(path, &format!("the gzip data are corrupt or cut off ({source}); get the file again"))
        }
        other => other,
    })
}

/// Whether an error of a decompressor is about its input, not about reading it.
fn is_corruption(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    matches!(error.kind(), InvalidData | InvalidInput | UnexpectedEof)
}

impl Unpacked<'_> {
    fn wrong(&self, what: &str) -> DataError {
        input(self.path, what)
    }

    /// Reads the first bytes, fewer if the file ends before.
    fn header(&mut self, length: usize) -> Result<Vec<u8>, DataError> {
        let mut header = Vec::with_capacity(length);
        let read = Read::by_ref(&mut self.reader).take(length as u64).read_to_end(&mut header);
        read.map_err(|error| DataError::System { path: self.path.to_path_buf(), source: error })?;
        Ok(header)
    }

    /// Reads the bytes after the header, which announces `expected` of them. Returns these, or fewer, or
    /// one more as a sign of surplus bytes.
    fn rest(&mut self, expected: u64) -> Result<Vec<u8>, DataError> {
        // Before anything is read: a small file could claim to fill the memory.
        if self.packed && expected > self.most {
            return Err(self.wrong(&format!(
                "its header announces {expected} bytes, more than the {} that a compressed file of its length may \
                 become; if they are meant, unpack it with gunzip",
                self.most
            )));
        }
        let mut bytes = Vec::new();
        // The length of a plain file is known; memory for the content of a compressed one grows with the
        // bytes that are really there.
        let known = if self.packed { 0 } else { expected.saturating_add(1).min(self.most) };
        bytes.reserve_exact(usize::try_from(known).unwrap_or(0));
        // One byte more than announced, to notice that more follow.
        let read = Read::by_ref(&mut self.reader).take(expected.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|source| DataError::System { path: self.path.to_path_buf(), source })?;
        Ok(bytes)
    }

    /// Names the files of images beside this one, for an error message.
    fn images_beside(&self) -> String {
        let folder = self.path.parent().and_then(|folder| names_of_images(folder).ok());
        let own = self.path.file_name().unwrap_or_default().to_string_lossy();
        let mut names = folder.unwrap_or_default();
        names.retain(|name| *name != own);
        names.truncate(3);
        if names.is_empty() { String::new() } else { format!("; beside it lies {}", names.join(", ")) }
    }
}

/// Reads the content of a file of images and checks its header.
fn decode(file: &mut Unpacked<'_>) -> Result<Memory, DataError> {
    let header = file.header(HEADER_BYTES)?;
    let [images, height, width] = parse_header(&header).map_err(|Wrong { what, advise }| match advise {
        true => file.wrong(&format!("{what}{}", file.images_beside())),
        false => file.wrong(&what),
    })?;
    // The header's sides were checked against MAX_SIDE, so the product is below 2^58.
    let expected = u64::from(images) * u64::from(height) * u64::from(width);
    let announced = format!("{images} images of {width} x {height}");
    if expected > MAX_BYTES_IN_MEMORY {
        return Err(file.wrong(&format!(
            "its header announces {announced} pixels, {expected} bytes, expected at most {MAX_BYTES_IN_MEMORY}, for they \
             do not fit into memory; use data.kind = \"folder\" for data of that size"
        )));
    }
    let bytes = file.rest(expected)?;
    let found = bytes.len() as u64;
    if found < expected {
        return Err(file.wrong(&format!(
            "found {found} bytes of pixels, expected {expected} ({announced}); the file is cut off, get it again"
        )));
    }
    if found > expected {
        return Err(file.wrong(&format!(
            "found more than the {expected} bytes of pixels that its header announces ({announced}); the file is \
             damaged, get it again"
        )));
    }
    Ok(Memory { width, height, channels: 1, bytes })
}

/// Reads the content of a file of labels and checks its header.
fn decode_labels(file: &mut Unpacked<'_>) -> Result<Labels, DataError> {
    let header = file.header(LABELS_HEADER_BYTES)?;
    let count = match (word(&header, 0), word(&header, 4)) {
        (Some(MAGIC_LABELS), Some(count)) => u64::from(count),
        (magic, _) => {
            let found = match magic {
                Some(MAGIC_IMAGES) => "found images".to_owned(),
                _ => kind_of(&header).unwrap_or_else(|| "found no IDX file of labels".to_owned()),
            };
            return Err(file.wrong(&format!(
                "{found}, expected magic number 0x{MAGIC_LABELS:08x} (IDX, bytes in one dimension); of the data set use \
                 the *-labels-idx1-ubyte file that belongs to the images"
            )));
        }
    };
    let bytes = file.rest(count)?;
    let found = bytes.len() as u64;
    if found != count {
        let follow = if found > count { format!("more than {count}") } else { found.to_string() };
        return Err(file.wrong(&format!(
            "its header announces {}, but holds {follow}; the file is cut off or damaged, get it again",
            counted(count, "label")
        )));
    }
    let labels = bytes.iter().map(|label| u32::from(*label)).collect();
    Ok(Labels::new(labels, "file of labels", file.path.display().to_string()))
}

/// Returns a number of a header, if the file is that long.
fn word(header: &[u8], at: usize) -> Option<u32> {
    header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes)
}

/// Problem of a header.
struct Wrong {
    what: String,
    /// Whether another file of the data set may be the intended one.
    advise: bool,
}

/// Returns the numbers of images, rows and columns, or the problem of the header.
fn parse_header(header: &[u8]) -> Result<[u32; 3], Wrong> {
    let wrong = |what: String| Wrong { what, advise: false };
    if let Some(magic) = word(header, 0).filter(|magic| *magic != MAGIC_IMAGES) {
        let other = match magic {
            MAGIC_LABELS => "found labels, expected images".to_owned(),
            _ => {
                let kind = kind_of(header).map(|kind| format!("{kind}: ")).unwrap_or_default();
                format!(
                    "{kind}found magic number 0x{magic:08x}, expected 0x{MAGIC_IMAGES:08x} (IDX, bytes in three \
                     dimensions); set data.kind to the format of this file"
                )
            }
        };
        let what = format!(
            "{other}; of an IDX data set set data.path to the *-images-idx3-ubyte file, such as train-images-idx3-ubyte, \
             plain or .gz"
        );
        return Err(Wrong { what, advise: true });
    }
    let (Some(images), Some(height), Some(width)) = (word(header, 4), word(header, 8), word(header, 12))
    else {
        return Err(wrong(format!(
            "found {} bytes, expected a header of {HEADER_BYTES}; the file is cut off or not an IDX file",
            header.len()
        )));
    };
    if images == 0 {
        return Err(Wrong {
            what: "found no images, expected at least one; set data.path to another file".to_owned(),
            advise: true,
        });
    }
    if !(1..=MAX_SIDE).contains(&height) || !(1..=MAX_SIDE).contains(&width) {
        return Err(wrong(format!(
            "found images of {width} x {height} pixels, expected 1 to {MAX_SIDE} a side; the \
             header is damaged, get the file again"
        )));
    }
    Ok([images, height, width])
}

/// Names a format by a file's first bytes, with the data kind that reads it.
fn kind_of(header: &[u8]) -> Option<String> {
    const PICTURES: &[(&[u8], &str)] = &[
        (b"\x89PNG", "PNG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"RIFF", "WebP"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"GIF8", "GIF"),
    ];
    if let Some((_, name)) = PICTURES.iter().find(|(magic, _)| header.starts_with(magic)) {
        return Some(format!(
            "this is a {name} picture, and data.kind = \"folder\" reads folders of pictures"
        ));
    }
    if header.starts_with(b"PK\x03\x04") {
        let what =
            "this is a zip archive; unpack it, or set data.kind = \"folder\" if there are pictures in it";
        return Some(what.to_owned());
    }
    if header.starts_with(&[0x1f, 0x8b]) {
        return Some("this was compressed twice; unpack it with gunzip".to_owned());
    }
    if header.starts_with(b"\x93NUMPY") {
        return Some("this is an array of NumPy".to_owned());
    }
    let [0, 0, kind, dimensions] = *header.get(..4)? else { return None };
    let kind = match kind {
        0x08 => "bytes",
        0x09 => "signed bytes",
        0x0b => "16-bit integers",
        0x0c => "32-bit integers",
        0x0d => "32-bit floating-point numbers",
        0x0e => "64-bit floating-point numbers",
        _ => return None,
    };
    Some(format!("this is an IDX file of {kind} in {dimensions} dimensions"))
}
