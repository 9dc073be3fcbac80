//! Archives: zip and tar files whose members are read in place.
//!
//! 1. Opening reads the directory of a zip, or the headers of a tar; memory holds names and offsets, and no
//!    content.
//! 2. Claims of an archive about a member are checked against the archive's length before anything is
//!    allocated.
//! 3. Few archives are open at a time, however many a data set has. One that is opened again must be
//!    unchanged.
//! 4. The names of members stay below the archive. A member with another name is left out, and counted.

use std::fs::{File, Metadata};
use std::io::{BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ganglion_proto::job::ArchiveKind;
use ganglion_proto::printable_start;
use ganglion_proto::record::found::Found;
use ganglion_storage::RelativeName;

use super::place::Content;
use super::{DataError, MAX_FILE_BYTES, open_plain};

/// Maximum number of open archives: well below the usual limit of descriptors, which sockets need too.
const OPEN_LIMIT: usize = 64;
/// Maximum ratio of expansion by deflate.
const DEFLATE_RATIO: u64 = 1032;
/// Maximum number of characters of a name in a message.
const SHOWN_CHARACTERS: usize = 200;

/// Open archives of a data set, the most recently used last.
#[derive(Debug, Default)]
pub(super) struct OpenArchives {
    count: AtomicUsize,
    open: Mutex<Vec<(usize, Arc<File>)>>,
}

/// Archive of a data set.
#[derive(Debug)]
struct Archive {
    path: PathBuf,
    /// Index among the archives of the data set.
    number: usize,
    /// Identity that detects another file under the same name.
    identity: (u64, i64, i64),
    length: u64,
    all: Arc<OpenArchives>,
}

/// File in an archive.
#[derive(Clone, Debug)]
pub(super) struct Member {
    archive: Arc<Archive>,
    /// Name, with `/` between folders.
    pub(super) name: RelativeName,
    /// Offset of its first byte in the archive.
    offset: u64,
    /// Length in the archive, in bytes.
    packed: u64,
    /// Length of its content, in bytes.
    pub(super) length: u64,
    deflated: bool,
}

impl OpenArchives {
    /// Opens an archive for the first time.
    fn add(self: &Arc<Self>, path: &Path) -> Result<(Arc<Archive>, Arc<File>), DataError> {
        let (file, length) = open_plain(path, u64::MAX)?;
        let file = Arc::new(file);
        let metadata = file.metadata().map_err(|error| DataError::reading(path, error))?;
        let archive = Archive {
            path: path.to_path_buf(),
            // A number is only a name here, so no order with other memory is needed.
            number: self.count.fetch_add(1, Ordering::Relaxed),
            identity: identity(&metadata),
            length,
            all: self.clone(),
        };
        self.put(archive.number, &file);
        Ok((Arc::new(archive), file))
    }

    fn get(&self, number: usize) -> Option<Arc<File>> {
        // Held for a look-up; files are opened without it.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let at = open.iter().position(|(other, _)| *other == number)?;
        let entry = open.remove(at);
        let file = entry.1.clone();
        open.push(entry);
        Some(file)
    }

    fn put(&self, number: usize, file: &Arc<File>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // The one that was not used for the longest time. Readers that still have it keep it open.
        if open.len() >= OPEN_LIMIT {
            open.remove(0);
        }
        open.push((number, file.clone()));
    }
}

/// Identity of a file, changed by every write. Inode numbers are left out: some network file systems give
/// another one at each opening.
fn identity(metadata: &Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

impl Archive {
    fn file(&self) -> Result<Arc<File>, DataError> {
        if let Some(file) = self.all.get(self.number) {
            return Ok(file);
        }
        // Opened again after others took its place: it must be the same file as at the start (invariant
        // 3).
        let (file, _) = open_plain(&self.path, u64::MAX)?;
        let metadata = file.metadata().map_err(|error| DataError::reading(&self.path, error))?;
        if identity(&metadata) != self.identity {
            return Err(DataError::Input(format!(
                "{}: another file than at the start; do not change data in use",
                self.path.display()
            )));
        }
        let file = Arc::new(file);
        self.all.put(self.number, &file);
        Ok(file)
    }
}

/// Description of a member by the archive, not verified yet.
struct Claim {
    name: String,
    offset: u64,
    packed: u64,
    length: u64,
    deflated: bool,
}

/// Returns the files in an archive, in its order. Others are counted in `found`, with names below
/// `relative`.
pub(super) fn members(
    path: &Path,
    relative: &str,
    all: &Arc<OpenArchives>,
    found: &mut Found,
) -> Result<Vec<Member>, DataError> {
    let (archive, file) = all.add(path)?;
    let shown = |name: &str| format!("{relative}{}", printable_start(name, SHOWN_CHARACTERS));
    let special = |name: &str| found.leave_out("links and special members of archives", shown(name));
    let claims = match ArchiveKind::of(path) {
        Some(ArchiveKind::Zip) => in_zip(&file),
        // What is no zip is a tar, by its name; if it is none, its headers do not fit.
        _ => in_tar(&file, special),
    };
    let claims = claims.map_err(|wrong| {
        DataError::Input(format!("{}: cannot be read, {wrong}; make it again", path.display()))
    })?;
    let mut members = Vec::with_capacity(claims.len());
    for claim in claims {
        let wrong = |what: &str| {
            DataError::Input(format!(
                "{}: {}: {what}; make the archive again",
                path.display(),
                printable_start(&claim.name, SHOWN_CHARACTERS)
            ))
        };
        // Both come from the archive, and may be any numbers.
        if claim.offset.checked_add(claim.packed).is_none_or(|end| end > archive.length) {
            return Err(wrong("it ends beyond the archive, which is cut off"));
        }
        if !claim.deflated && claim.length != claim.packed {
            return Err(wrong("the archive gives it two lengths"));
        }
        // More is not possible in deflate, so more is a lie.
        let most = if claim.deflated { claim.packed.saturating_mul(DEFLATE_RATIO) } else { claim.packed };
        if claim.length > most {
            let what = format!("it claims {} bytes, more than its {} can hold", claim.length, claim.packed);
            return Err(wrong(&what));
        }
        match RelativeName::parse(&claim.name) {
            Ok(name) => members.push(Member {
                archive: archive.clone(),
                name,
                offset: claim.offset,
                packed: claim.packed,
                length: claim.length,
                deflated: claim.deflated,
            }),
            Err(_) => found.leave_out("members whose names lead out of their archive", shown(&claim.name)),
        }
    }
    Ok(members)
}

fn in_zip(file: &File) -> Result<Vec<Claim>, String> {
    /// Flag of a local header: the content is encrypted.
    const ENCRYPTED: u8 = 1;
    let mut zip = zip::ZipArchive::new(BufReader::new(file)).map_err(|error| error.to_string())?;
    let mut claims = Vec::with_capacity(zip.len());
    for index in 0..zip.len() {
        let entry = zip.by_index_raw(index).map_err(|error| error.to_string())?;
        if entry.is_dir() {
            continue;
        }
        let shown = printable_start(entry.name(), SHOWN_CHARACTERS);
        let deflated = match entry.compression() {
            zip::CompressionMethod::Stored => false,
            zip::CompressionMethod::Deflated => true,
            other => return Err(format!("{shown} is compressed by {other}, expected stored or deflated")),
        };
        // The library does not show this flag for entries that it gives raw.
        let mut flags = [0];
        file.read_exact_at(&mut flags, entry.header_start() + 6).map_err(|error| error.to_string())?;
        if flags[0] & ENCRYPTED != 0 {
            return Err(format!("{shown} is encrypted"));
        }
        claims.push(Claim {
            name: entry.name().to_string(),
            offset: entry.data_start(),
            packed: entry.compressed_size(),
            length: entry.size(),
            deflated,
        });
    }
    Ok(claims)
}

fn in_tar(file: &File, mut special: impl FnMut(&str)) -> Result<Vec<Claim>, String> {
    let mut tar = tar::Archive::new(file);
    let mut claims = Vec::new();
    for entry in tar.entries_with_seek().map_err(|error| error.to_string())? {
        let entry = entry.map_err(|error| error.to_string())?;
        let kind = entry.header().entry_type();
        // A description of the archive, and no member.
        if kind.is_dir() || kind.is_pax_global_extensions() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if !kind.is_file() {
            special(&name);
            continue;
        }
        claims.push(Claim {
            // `tar` writes it before all names if it was given a folder.
            name: name.trim_start_matches("./").to_string(),
            offset: entry.raw_file_position(),
            packed: entry.size(),
            length: entry.size(),
            deflated: false,
        });
    }
    Ok(claims)
}

impl Member {
    /// Path of the archive with the name of the member, diagnostic only.
    pub(super) fn shown(&self) -> PathBuf {
        self.name.below(&self.archive.path)
    }

    /// Opens the content for reading.
    pub(super) fn open(&self) -> Result<Content, DataError> {
        let file = self.archive.file()?;
        if !self.deflated {
            return Ok(Content::Part { file, offset: self.offset, length: self.length });
        }
        // The packed bytes are held in memory as a whole.
        if self.packed > MAX_FILE_BYTES {
            return Err(self.corrupt("it is too long"));
        }
        let mut packed = vec![0; usize::try_from(self.packed).map_err(|_| self.corrupt("it is too long"))?];
        let read = file.read_exact_at(&mut packed, self.offset);
        read.map_err(|error| DataError::reading(&self.archive.path, error))?;
        let mut content = Vec::new();
        let decoder = flate2::read::DeflateDecoder::new(packed.as_slice());
        // One byte more than the archive says, to notice that more follow.
        let unpacked = decoder.take(self.length.saturating_add(1)).read_to_end(&mut content);
        unpacked.map_err(|error| self.corrupt(&error.to_string()))?;
        if content.len() as u64 != self.length {
            return Err(self.corrupt("its content is not as long as the archive says"));
        }
        Ok(Content::Bytes(content))
    }

    fn corrupt(&self, wrong: &str) -> DataError {
        DataError::Input(format!("{}: {wrong}; make the archive again", self.shown().display()))
    }
}
