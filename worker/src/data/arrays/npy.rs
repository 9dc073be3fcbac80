//! NumPy's `.npy` files: the header, and what there is to know of the numbers after it.
//!
//! The form is NumPy's own (`numpy.lib.format`): a magic string, a version, the length of a header, the
//! header as a literal of Python, then the numbers.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use ganglion_proto::array::ElementKind;
use ganglion_proto::printable_start;

use crate::data::{DataError, input};

/// First bytes of each file.
const MAGIC: &[u8] = b"\x93NUMPY";
/// Most bytes of a header. NumPy's own are of some 100.
const MAX_HEADER_BYTES: u32 = 1 << 16;
/// Most axes.
const MAX_AXES: usize = 16;
/// Bytes that are checked at once.
const BLOCK_BYTES: usize = 1 << 20;
/// Most bytes of one sample of one array.
const MAX_SAMPLE_BYTES: u64 = 1 << 30;

/// An array in a file, row by row.
#[derive(Debug)]
pub(super) struct Npy {
    pub(super) path: PathBuf,
    file: File,
    /// Place of the first number.
    start: u64,
    /// Length and time of the last change at the opening.
    seen: (u64, i64, i64),
    stored: Stored,
    /// Kind as samples have it.
    pub(super) kind: ElementKind,
    /// Number of rows, at least 1.
    pub(super) rows: u64,
    /// Shape of a row.
    pub(super) shape: Vec<u64>,
}

/// Kind of the numbers in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stored {
    size: usize,
    big_endian: bool,
}

/// The header's content.
#[derive(Debug, Default)]
struct Header {
    descr: Option<String>,
    fortran_order: Option<bool>,
    shape: Option<Vec<u64>>,
}

impl Npy {
    /// Opens a file and checks its header against its length.
    pub(super) fn open(path: &Path) -> Result<Npy, DataError> {
        let failed = |error| DataError::reading(path, error);
        let about = std::fs::metadata(path).map_err(failed)?;
        // Before opening: opening a pipe waits for its writer.
        if !about.is_file() {
            return Err(input(path, "is no file, expected an array as numpy.save writes it"));
        }
        let mut file = File::open(path).map_err(failed)?;
        let (header, start) = header(&mut file).map_err(|problem| input(path, &problem))?;
        let about = file.metadata().map_err(failed)?;
        let seen = (about.len(), about.mtime(), about.mtime_nsec());
        let (stored, kind, sizes) = settle(&header).map_err(|problem| input(path, &problem))?;
        let (rows, shape) = (sizes[0], sizes[1..].to_vec());
        let (expected, found) = (rows * row_bytes(stored, &shape), about.len() - start);
        if expected != found {
            return Err(input(
                path,
                &format!(
                    "has {found} bytes of numbers, and by its header {expected}; save it again with numpy.save"
                ),
            ));
        }
        Ok(Npy { path: path.to_owned(), file, start, seen, stored, kind, rows, shape })
    }

    /// Reads as many rows from one on as `out` has room for, as numbers of [`kind`](Self::kind) in the
    /// machine's order of bytes.
    pub(super) fn read(&self, row: u64, out: &mut [u8]) -> Result<(), DataError> {
        let failed = |error| DataError::reading(&self.path, error);
        let about = self.file.metadata().map_err(failed)?;
        // Other numbers in the same place would be trained on without a word.
        if (about.len(), about.mtime(), about.mtime_nsec()) != self.seen {
            return Err(input(
                &self.path,
                "was changed while it was in use; put it back as it was, and give the same command again",
            ));
        }
        let offset = self.start + row * row_bytes(self.stored, &self.shape);
        if self.stored.size == self.kind.size() {
            self.file.read_exact_at(out, offset).map_err(failed)?;
            self.stored.to_native(out);
            return Ok(());
        }
        let mut narrow = vec![0; out.len() / self.kind.size() * self.stored.size];
        self.file.read_exact_at(&mut narrow, offset).map_err(failed)?;
        self.stored.to_native(&mut narrow);
        // Unsigned numbers, little-endian: zeros make them wider.
        for (from, to) in narrow.chunks_exact(self.stored.size).zip(out.chunks_exact_mut(self.kind.size())) {
            to[..from.len()].copy_from_slice(from);
            to[from.len()..].fill(0);
        }
        Ok(())
    }

    /// Reads all rows but those that are left out; returns the hash of their numbers.
    ///
    /// # Errors
    /// A number is not finite, or a truth value neither 0 nor 1; names the place.
    pub(super) fn check(&self, is_left_out: impl Fn(u64) -> bool) -> Result<blake3::Hash, DataError> {
        let mut hasher = blake3::Hasher::new();
        let bytes = row_bytes(self.stored, &self.shape) / self.stored.size as u64 * self.kind.size() as u64;
        let bytes = usize::try_from(bytes).expect("the bytes of a sample are bounded");
        let at_once = (BLOCK_BYTES / bytes).max(1);
        for first in (0..self.rows).step_by(at_once) {
            let rows = usize::try_from(self.rows - first).unwrap_or(at_once).min(at_once);
            let mut block = vec![0; rows * bytes];
            self.read(first, &mut block)?;
            let kept = (first..).zip(block.chunks_exact(bytes)).filter(|(row, _)| !is_left_out(*row));
            for (row, numbers) in kept {
                hasher.update(numbers);
                let Some((element, found)) = self.wrong(numbers) else { continue };
                return Err(DataError::Input(format!(
                    "{}: the number at [{}] is {found}; mend it, or leave sample {row} out with data.exclude",
                    self.path.display(),
                    self.place(row, element)
                )));
            }
        }
        Ok(hasher.finalize())
    }

    /// Finds the first number of a row that cannot be trained on.
    fn wrong(&self, row: &[u8]) -> Option<(usize, String)> {
        let wide = |bytes: &[u8]| -> f64 {
            match *bytes {
                [a, b] => half(u16::from_le_bytes([a, b])),
                [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).into(),
                _ => f64::from_le_bytes(bytes.try_into().expect("a float has 2, 4 or 8 bytes")),
            }
        };
        if self.kind == ElementKind::Bool {
            let at = row.iter().position(|byte| *byte > 1)?;
            return Some((at, format!("{}, and a truth value is 0 or 1", row[at])));
        }
        if !self.kind.is_float() {
            return None;
        }
        let mut numbers = row.chunks_exact(self.kind.size()).map(wide).enumerate();
        numbers.find(|(_, number)| !number.is_finite()).map(|(at, number)| (at, number.to_string()))
    }

    /// Index of a number, as NumPy writes it.
    fn place(&self, row: u64, element: usize) -> String {
        let (mut rest, mut place) = (element as u64, Vec::new());
        for size in self.shape.iter().rev() {
            place.push((rest % size).to_string());
            rest /= size;
        }
        place.push(row.to_string());
        place.reverse();
        place.join(", ")
    }
}

impl Stored {
    /// Puts the bytes of each number in the machine's order.
    fn to_native(self, numbers: &mut [u8]) {
        if self.big_endian {
            numbers.chunks_exact_mut(self.size).for_each(<[u8]>::reverse);
        }
    }
}

fn row_bytes(stored: Stored, shape: &[u64]) -> u64 {
    stored.size as u64 * shape.iter().product::<u64>()
}

/// An IEEE 754 number of 16 bits; only whether it is finite counts.
fn half(bits: u16) -> f64 {
    match (bits & 0x7c00, bits & 0x03ff) {
        (0x7c00, 0) if bits & 0x8000 == 0 => f64::INFINITY,
        (0x7c00, 0) => f64::NEG_INFINITY,
        (0x7c00, _) => f64::NAN,
        _ => 0.0,
    }
}

/// Reads the header, and returns it with the place after it.
fn header(file: &mut File) -> Result<(Header, u64), String> {
    const NO_ARRAY: &str = "is no array as numpy.save writes it";
    let short = |_| NO_ARRAY.to_owned();
    let mut start = [0; 8];
    file.read_exact(&mut start).map_err(short)?;
    if !start.starts_with(MAGIC) {
        return Err(match start.starts_with(b"PK") {
            true => "is an .npz archive; unpack it, each array is an .npy file in it".to_owned(),
            false => NO_ARRAY.to_owned(),
        });
    }
    let (length, fixed) = match start[6] {
        1 => {
            let mut length = [0; 2];
            file.read_exact(&mut length).map_err(short)?;
            (u32::from(u16::from_le_bytes(length)), 10)
        }
        2 | 3 => {
            let mut length = [0; 4];
            file.read_exact(&mut length).map_err(short)?;
            (u32::from_le_bytes(length), 12)
        }
        version => return Err(format!("has version {version} of the .npy format, and 1 to 3 are known")),
    };
    if length > MAX_HEADER_BYTES {
        return Err(format!(
            "has a header of {length} bytes, and at most {MAX_HEADER_BYTES} are read; {NO_ARRAY}"
        ));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text)
        .map_err(|_| "ends within its header; save it again with numpy.save".to_owned())?;
    let text = String::from_utf8(text).map_err(|_| format!("has a header that is no text; {NO_ARRAY}"))?;
    let parsed = parse(&text);
    let parsed =
        parsed.ok_or_else(|| format!("has a header that cannot be read: {}", printable_start(&text, 200)))?;
    Ok((parsed, u64::from(length) + fixed))
}

/// Decides what the numbers of a header are as samples: how they are stored, their kind, and the array's
/// shape.
fn settle(header: &Header) -> Result<(Stored, ElementKind, Vec<u64>), String> {
    let Header { descr: Some(descr), fortran_order: Some(fortran_order), shape: Some(shape) } = header else {
        return Err(
            "has a header without descr, fortran_order or shape; save it again with numpy.save".to_owned()
        );
    };
    let (stored, kind) = kind(descr)?;
    if shape.is_empty() || shape.len() > MAX_AXES {
        return Err(format!(
            "has {} axes, expected 1 to {MAX_AXES}: the first counts the samples",
            shape.len()
        ));
    }
    if shape.contains(&0) {
        return Err(format!("has shape {shape:?}, and is empty"));
    }
    // An array with one axis, or with but one that is longer than 1, lies the same both ways.
    if *fortran_order && shape.iter().filter(|size| **size > 1).count() > 1 {
        return Err(
            "is in Fortran order, in which a sample does not lie in one piece; save numpy.ascontiguousarray(...) of it"
                .to_owned(),
        );
    }
    let row = shape[1..].iter().try_fold(8_u64, |bytes, size| bytes.checked_mul(*size));
    let all = row.filter(|bytes| *bytes <= MAX_SAMPLE_BYTES).and_then(|bytes| bytes.checked_mul(shape[0]));
    if all.is_none_or(|bytes| bytes > 1 << 62) || shape[0] > u64::from(u32::MAX) {
        return Err(format!(
            "has shape {shape:?}: a sample takes at most {MAX_SAMPLE_BYTES} bytes, and there are at most 2^32 - 1"
        ));
    }
    Ok((stored, kind, shape.clone()))
}

/// The kind of numbers that NumPy's `descr` names.
fn kind(descr: &str) -> Result<(Stored, ElementKind), String> {
    const SAVE: &str = "save it as numbers, such as with .astype(\"float32\")";
    let mut letters = descr.chars();
    let (order, letter) = (letters.next().unwrap_or(' '), letters.next().unwrap_or(' '));
    let size: usize = letters.as_str().parse().unwrap_or(0);
    let kind = match (letter, size) {
        ('b', 1) => ElementKind::Bool,
        ('u', 1) => ElementKind::Uint8,
        ('i', 1) => ElementKind::Int8,
        ('i', 2) => ElementKind::Int16,
        // PyTorch computes with no such kinds: the next wider one holds the same numbers.
        ('u', 2) | ('i', 4) => ElementKind::Int32,
        ('u', 4) | ('i', 8) => ElementKind::Int64,
        ('u', 8) => {
            return Err("holds uint64, which PyTorch does not compute with; save it as int64".to_owned());
        }
        ('f', 2) => ElementKind::Float16,
        ('f', 4) => ElementKind::Float32,
        ('f', 8) => ElementKind::Float64,
        ('O', _) => return Err(format!("holds Python objects (pickle), which are never read; {SAVE}")),
        _ => {
            return Err(format!(
                "holds {}, which are no numbers of a known kind; {SAVE}",
                printable_start(descr, 50)
            ));
        }
    };
    if !['<', '>', '|', '='].contains(&order) {
        return Err(format!(
            "holds {}, which are no numbers of a known kind; {SAVE}",
            printable_start(descr, 50)
        ));
    }
    Ok((Stored { size, big_endian: order == '>' && size > 1 }, kind))
}

/// Parses the header: a dict of Python with strings, truth values and tuples of numbers.
fn parse(text: &str) -> Option<Header> {
    let mut rest = text.trim().strip_prefix('{')?.strip_suffix('}')?.trim();
    let mut header = Header::default();
    while !rest.is_empty() {
        let (key, after) = quoted(rest)?;
        let value = after.trim_start().strip_prefix(':')?.trim_start();
        rest = match key {
            "descr" if value.starts_with('[') => {
                // Names and kinds of fields: records, and no numbers.
                header.descr = Some("records of fields".to_owned());
                value.rsplit_once(']')?.1
            }
            "descr" => {
                let (descr, after) = quoted(value)?;
                header.descr = Some(descr.to_owned());
                after
            }
            "fortran_order" => {
                let is_true = value.strip_prefix("True");
                header.fortran_order = Some(is_true.is_some());
                is_true.or_else(|| value.strip_prefix("False"))?
            }
            "shape" => {
                let (sizes, after) = value.strip_prefix('(')?.split_once(')')?;
                let sizes = sizes.split(',').map(str::trim).filter(|size| !size.is_empty());
                // Python 2 wrote long numbers with an L.
                header.shape =
                    Some(sizes.map(|size| size.trim_end_matches('L').parse().ok()).collect::<Option<_>>()?);
                after
            }
            _ => return None,
        };
        rest = rest.trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
    }
    Some(header)
}

/// Splits a quoted text off.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|quote| ['\'', '"'].contains(quote))?;
    text[1..].split_once(quote)
}
