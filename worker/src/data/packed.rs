//! Zip and tar files whose members are read where they lie.
//!
//! 1. Opening reads the directory of a zip, or the headers of a tar; memory holds names and places, and no content.
//! 2. What an archive says of a member is checked against the archive's length before anything is allocated.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ganglion_proto::job::ArchiveKind;

use super::DataError;

/// An open archive.
#[derive(Debug)]
struct Archive {
    path: PathBuf,
    file: File,
}

/// A file in an archive.
#[derive(Clone, Debug)]
pub(super) struct Member {
    archive: Arc<Archive>,
    /// Its name, with `/` between folders.
    pub(super) name: String,
    /// Where it begins in the archive.
    offset: u64,
    /// Bytes that it takes there.
    packed: u64,
    /// Bytes of its content.
    pub(super) length: u64,
    deflated: bool,
}

/// The files in an archive, in its order.
pub(super) fn members(path: &Path) -> Result<Vec<Member>, DataError> {
    let file = File::open(path).map_err(|error| DataError::reading(path, error))?;
    let archive = Arc::new(Archive { path: path.to_path_buf(), file });
    let length = archive.file.metadata().map_err(|error| DataError::reading(path, error))?.len();
    let found = match ArchiveKind::of(path) {
        Some(ArchiveKind::Zip) => in_zip(&archive),
        _ => in_tar(&archive),
    };
    let members = found.map_err(|wrong| {
        DataError::Input(format!("{}: cannot be read, {wrong}; make it again", path.display()))
    })?;
    let beyond = |member: &&Member| member.offset.checked_add(member.packed).is_none_or(|end| end > length);
    match members.iter().find(beyond) {
        Some(member) => Err(member.corrupt("it ends beyond the archive, which is cut off")),
        None => Ok(members),
    }
}

fn in_zip(archive: &Arc<Archive>) -> Result<Vec<Member>, String> {
    let mut zip = zip::ZipArchive::new(&archive.file).map_err(|error| error.to_string())?;
    let mut members = Vec::with_capacity(zip.len());
    for index in 0..zip.len() {
        let entry = zip.by_index_raw(index).map_err(|error| error.to_string())?;
        if entry.is_dir() {
            continue;
        }
        let deflated = match entry.compression() {
            zip::CompressionMethod::Stored => false,
            zip::CompressionMethod::Deflated => true,
            other => {
                return Err(format!(
                    "{} is compressed by {other}, expected stored or deflated",
                    entry.name()
                ));
            }
        };
        members.push(Member {
            archive: archive.clone(),
            name: entry.name().to_string(),
            offset: entry.data_start(),
            packed: entry.compressed_size(),
            length: entry.size(),
            deflated,
        });
    }
    Ok(members)
}

fn in_tar(archive: &Arc<Archive>) -> Result<Vec<Member>, String> {
    let mut tar = tar::Archive::new(&archive.file);
    let mut members = Vec::new();
    for entry in tar.entries_with_seek().map_err(|error| error.to_string())? {
        let entry = entry.map_err(|error| error.to_string())?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        members.push(Member {
            archive: archive.clone(),
            name: name.strip_prefix("./").map_or(name.clone(), str::to_string),
            offset: entry.raw_file_position(),
            packed: entry.size(),
            length: entry.size(),
            deflated: false,
        });
    }
    Ok(members)
}

impl Member {
    /// The archive and the name, for people.
    pub(super) fn shown(&self) -> PathBuf {
        self.archive.path.join(&self.name)
    }

    /// The first bytes of its content, at most `most`.
    pub(super) fn head(&self, most: u64) -> Result<Vec<u8>, DataError> {
        let raw = if self.deflated { self.packed } else { self.packed.min(most) };
        let mut bytes = vec![0; usize::try_from(raw).map_err(|_| self.corrupt("it is too long"))?];
        let read = self.archive.file.read_exact_at(&mut bytes, self.offset);
        read.map_err(|error| DataError::reading(&self.archive.path, error))?;
        if !self.deflated {
            return Ok(bytes);
        }
        let mut content = Vec::new();
        let mut decoder = flate2::read::DeflateDecoder::new(bytes.as_slice()).take(most.min(self.length));
        decoder.read_to_end(&mut content).map_err(|error| self.corrupt(&error.to_string()))?;
        Ok(content)
    }

    fn corrupt(&self, wrong: &str) -> DataError {
        DataError::Input(format!("{}: {wrong}; make the archive again", self.shown().display()))
    }
}
