//! Documents: the files of a text, in the order of their names, and their bytes by place.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use ganglion_proto::printable_start;
use ganglion_proto::record::found::Found;

use crate::data::search::walk;
use crate::data::{DataError, input};

/// Extensions of files in a folder that are documents, each also with `.gz` after it.
const ENDINGS: [&str; 12] =
    ["txt", "text", "md", "rst", "tex", "html", "xml", "json", "jsonl", "csv", "tsv", "log"];
/// Extension of compressed files.
const PACKED: &str = "gz";
/// Most bytes that a compressed document unpacks to: it may be a bomb.
pub(super) const MAX_UNPACKED: u64 = 64 << 30;
/// Token between documents whose tokens are bytes.
const SEPARATOR: u8 = 0;

/// A file of text.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) path: PathBuf,
    /// Place of its first byte among the bytes of all documents and the separators between them.
    start: u64,
    /// Length of the file, in bytes.
    pub(super) length: u64,
    /// Time of the last change: seconds, nanoseconds.
    changed: (i64, i64),
    pub(super) is_packed: bool,
}

/// The files of a text, in the order of their names.
#[derive(Debug)]
pub(super) struct Documents(pub(super) Vec<Document>);

impl Documents {
    /// Finds the documents at a path: one file, or those below a folder.
    pub(super) fn find(path: &Path, found: &mut Found) -> Result<Documents, DataError> {
        let mut files = Vec::new();
        let is_folder = path.is_dir();
        if is_folder {
            search(path, found, &mut files)?;
        } else {
            files.push((Vec::new(), path.to_path_buf()));
        }
        // File systems list in any order.
        files.sort();
        let mut documents = Vec::with_capacity(files.len());
        let mut start = 0;
        for (_, path) in files {
            let about = fs::metadata(&path).map_err(|error| DataError::reading(&path, error))?;
            if !about.is_file() {
                return Err(input(&path, "found neither a file nor a folder, expected text; remove it"));
            }
            let is_packed = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case(PACKED));
            let (length, changed) = (about.len(), (about.mtime(), about.mtime_nsec()));
            documents.push(Document { path, start, length, changed, is_packed });
            start += length + 1;
        }
        if documents.is_empty() {
            let endings = ENDINGS.join(", .");
            return Err(input(
                path,
                &format!(
                    "found no text, expected files .{endings} or the same with .gz; name one file to read it whatever its \
                     name is"
                ),
            ));
        }
        found.documents = documents.len() as u64;
        Ok(Documents(documents))
    }

    /// Whether some are compressed.
    pub(super) fn are_packed(&self) -> bool {
        self.0.iter().any(|document| document.is_packed)
    }

    /// Number of tokens, where each byte is one: of all documents, and a separator between each two.
    pub(super) fn tokens(&self) -> u64 {
        self.0.last().map_or(0, |last| last.start + last.length)
    }

    /// Reads all bytes, and returns their number without the separators, and the hash with them.
    pub(super) fn hash(&self) -> Result<(u64, blake3::Hash), DataError> {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = 0;
        for (index, document) in self.0.iter().enumerate() {
            if index > 0 {
                hasher.update(&[SEPARATOR]);
            }
            let length = document.update(&mut hasher)?;
            if length != document.length {
                return Err(document.changed());
            }
            bytes += length;
        }
        Ok((bytes, hasher.finalize()))
    }

    /// Reads bytes from a place on.
    pub(super) fn read(&self, place: u64, out: &mut [u8]) -> Result<(), DataError> {
        let mut at = self.0.partition_point(|document| document.start <= place) - 1;
        let (mut place, mut out) = (place, out);
        while !out.is_empty() {
            let document = &self.0[at];
            let offset = place - document.start;
            let here = usize::try_from(document.length - offset).unwrap_or(usize::MAX).min(out.len());
            let (own, rest) = out.split_at_mut(here);
            document.read(offset, own)?;
            place += here as u64;
            out = rest;
            // The place after a document is the separator's; the next one begins behind it.
            if let Some((separator, rest)) = std::mem::take(&mut out).split_first_mut() {
                *separator = SEPARATOR;
                place += 1;
                at += 1;
                out = rest;
            }
        }
        Ok(())
    }
}

impl Document {
    /// Opens the file's text for reading from its beginning.
    pub(super) fn open(&self) -> Result<Box<dyn Read>, DataError> {
        let file = File::open(&self.path).map_err(|error| DataError::reading(&self.path, error))?;
        Ok(match self.is_packed {
            true => Box::new(MultiGzDecoder::new(BufReader::new(file))),
            false => Box::new(file),
        })
    }

    /// Error in reading the text.
    pub(super) fn unreadable(&self, error: io::Error) -> DataError {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
        match error.kind() {
            InvalidData | InvalidInput | UnexpectedEof if self.is_packed => input(
                &self.path,
                &format!("cannot be unpacked ({error}), expected a whole gzip file; get it again"),
            ),
            _ => DataError::reading(&self.path, error),
        }
    }

    /// Adds the bytes of the file, as it lies there, to a hash; returns their number.
    pub(super) fn update(&self, hasher: &mut blake3::Hasher) -> Result<u64, DataError> {
        let before = hasher.count();
        let read =
            File::open(&self.path).and_then(|file| hasher.update_reader(file).map(|read| read.count()));
        read.map(|after| after - before).map_err(|error| DataError::reading(&self.path, error))
    }

    /// Reads bytes of the file, which must be as it was at the opening.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DataError> {
        if out.is_empty() {
            return Ok(());
        }
        let failed = |error| DataError::reading(&self.path, error);
        let file = File::open(&self.path).map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        // Other text in the same place would be trained on without a word.
        if (about.len(), (about.mtime(), about.mtime_nsec())) != (self.length, self.changed) {
            return Err(self.changed());
        }
        file.read_exact_at(out, offset).map_err(failed)
    }

    fn changed(&self) -> DataError {
        input(
            &self.path,
            "was changed while it was in use; put it back as it was, and give the same command again",
        )
    }
}

/// Adds the documents below a folder, with the parts of their paths from there.
fn search(
    folder: &Path,
    found: &mut Found,
    files: &mut Vec<(Vec<Vec<u8>>, PathBuf)>,
) -> Result<(), DataError> {
    walk(folder, &mut |relative, path| {
        let parts: Vec<Vec<u8>> = relative.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect();
        let shown = || printable_start(&String::from_utf8_lossy(&parts[parts.len() - 1]), 200);
        let Some(path) = path else {
            found.leave_out("hidden", shown());
            return Ok(());
        };
        if is_document(&path) {
            files.push((parts, path));
        } else {
            let ending = path.extension().map(|ending| printable_start(&ending.to_string_lossy(), 20));
            let kind =
                ending.map_or("without an ending".to_owned(), |ending| format!(".{}", ending.to_lowercase()));
            found.leave_out(&kind, shown());
        }
        Ok(())
    })
}

/// Whether a file in a folder is a document, by its name.
pub(in crate::data) fn is_document(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.rsplit_once('.').is_some_and(|(_, ending)| ENDINGS.contains(&ending))
}
