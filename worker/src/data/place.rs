//! Places of files, in a folder or an archive: reading, and hashes that detect changes.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::packed::Member;
use super::{DataError, MAX_FILE_BYTES, input, open_plain};

/// Maximum length of files that are hashed whole.
const WHOLE_BYTES: u64 = 1 << 20;
/// Length of each of the [`BLOCKS`] blocks that are hashed of a longer file.
const BLOCK_BYTES: u64 = 64 << 10;
/// Number of blocks. The first begins the file, the last one ends it, the others lie evenly between.
const BLOCKS: u64 = 16;

/// Place of a file.
#[derive(Debug)]
pub(super) enum Place {
    Alone(PathBuf),
    Packed(Member),
}

/// Content of a file, ready for reading.
pub(super) enum Content {
    /// Range of a file, from `offset` on.
    Part { file: Arc<File>, offset: u64, length: u64 },
    /// Bytes in memory, because they had to be unpacked.
    Bytes(Vec<u8>),
}

/// First bytes of a file, with a hash that identifies all of it.
pub(super) struct Head {
    /// First bytes; the whole file if it is short.
    pub(super) bytes: Vec<u8>,
    /// Length of the whole file in bytes.
    pub(super) length: u64,
    /// blake3 of a short file, or of a long file's blocks.
    pub(super) hash: blake3::Hash,
}

impl Place {
    /// Path for messages.
    pub(super) fn shown(&self) -> PathBuf {
        match self {
            Place::Alone(path) => path.clone(),
            Place::Packed(member) => member.shown(),
        }
    }

    fn open(&self) -> Result<Content, DataError> {
        match self {
            Place::Alone(path) => {
                let (file, length) = open_plain(path, MAX_FILE_BYTES)?;
                Ok(Content::Part { file: Arc::new(file), offset: 0, length })
            }
            Place::Packed(member) => {
                // Before it is opened, which may unpack it.
                check_length(&member.shown(), member.length, MAX_FILE_BYTES)?;
                member.open()
            }
        }
    }

    /// Reads the whole file.
    pub(super) fn read(&self) -> Result<Vec<u8>, DataError> {
        let content = self.open()?;
        let length = content.length();
        content.range(0, length).map_err(|error| DataError::reading(&self.shown(), error))
    }

    /// Reads the whole file, which must be within `limit`.
    pub(super) fn read_small(&self, limit: u64) -> Result<Vec<u8>, DataError> {
        let content = self.open()?;
        check_length(&self.shown(), content.length(), limit)?;
        content.range(0, content.length()).map_err(|error| DataError::reading(&self.shown(), error))
    }

    /// Reads the beginning of the file, and hashes it.
    pub(super) fn head(&self) -> Result<Head, DataError> {
        let failed = |error| DataError::reading(&self.shown(), error);
        let content = self.open()?;
        let length = content.length();
        // Most pictures are shorter: they are read once for outline and hash.
        if length <= WHOLE_BYTES {
            let bytes = content.range(0, length).map_err(failed)?;
            return Ok(Head { hash: blake3::hash(&bytes), bytes, length });
        }
        let mut hasher = blake3::Hasher::new();
        let mut bytes = Vec::new();
        for block in 0..BLOCKS {
            // Evenly from 0 to the last block, which ends the file.
            let offset = block * (length - BLOCK_BYTES) / (BLOCKS - 1);
            let read = content.range(offset, BLOCK_BYTES).map_err(failed)?;
            hasher.update(&read);
            if block == 0 {
                bytes = read;
            }
        }
        Ok(Head { hash: hasher.finalize(), bytes, length })
    }
}

impl Content {
    fn length(&self) -> u64 {
        match self {
            Content::Part { length, .. } => *length,
            Content::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// Reads bytes from an offset on. If the file became shorter, that is an error.
    fn range(self: &Content, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let wanted = usize::try_from(length).map_err(io::Error::other)?;
        match self {
            Content::Part { file, offset: start, .. } => {
                let mut bytes = vec![0; wanted];
                // By position, so that several threads can read one file at once.
                file.read_exact_at(&mut bytes, start + offset)?;
                Ok(bytes)
            }
            Content::Bytes(bytes) => {
                let mut read = Vec::with_capacity(wanted);
                let from = usize::try_from(offset).map_err(io::Error::other)?;
                // Bytes that end before are returned as they are: lengths were checked when they were
                // unpacked.
                bytes.get(from..).unwrap_or_default().take(length).read_to_end(&mut read)?;
                Ok(read)
            }
        }
    }
}

/// Refuses a file longer than `limit`.
pub(super) fn check_length(path: &Path, length: u64, limit: u64) -> Result<(), DataError> {
    if length <= limit {
        return Ok(());
    }
    Err(input(path, &format!("found {length} bytes, expected at most {limit}; remove it")))
}
