//! Interface to the disk: the few calls that a test may count, refuse, or revert.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Disk below append-only files.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Appends bytes to a file.
    ///
    /// # Errors
    /// Error of the system; any part of the bytes may have been appended.
    fn append(&self, path: &Path, file: &File, bytes: &[u8]) -> io::Result<()>;

    /// Waits until all appended bytes of a file survive a power cut.
    ///
    /// # Errors
    /// Error of the system; bytes appended since the last sync may be lost then, even if a later
    /// call succeeds.
    fn sync(&self, path: &Path, file: &File) -> io::Result<()>;

    /// Waits until a file's name survives a power cut.
    ///
    /// # Errors
    /// Error of the system.
    fn sync_name(&self, path: &Path) -> io::Result<()>;

    /// Maximum number of rows that wait while the disk takes none. Workers keep them too, and are
    /// asked for those that found no room.
    fn rows_that_wait(&self) -> usize {
        // A quarter of what each worker keeps (`ROWS_LIMIT` in membership/src/member.rs).
        1 << 16
    }
}

/// The machine's disk.
#[derive(Debug)]
pub struct SystemDisk;

impl Disk for SystemDisk {
    fn append(&self, _: &Path, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    fn sync(&self, _: &Path, file: &File) -> io::Result<()> {
        // The data and the length; times of change need not survive.
        file.sync_data()
    }

    fn sync_name(&self, path: &Path) -> io::Result<()> {
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// A disk that may be full, and records its syncs.
    #[derive(Debug, Default)]
    pub(crate) struct FullDisk {
        is_full: AtomicBool,
        synced: Mutex<BTreeMap<PathBuf, u64>>,
    }

    impl FullDisk {
        pub(crate) fn fill(&self) {
            self.is_full.store(true, Ordering::Relaxed);
        }

        pub(crate) fn free(&self) {
            self.is_full.store(false, Ordering::Relaxed);
        }

        /// Offset up to which a file was synced.
        pub(crate) fn synced(&self, path: &Path) -> u64 {
            self.synced.lock().unwrap().get(path).copied().unwrap_or(0)
        }
    }

    impl Disk for FullDisk {
        fn append(&self, path: &Path, file: &File, bytes: &[u8]) -> io::Result<()> {
            if self.is_full.load(Ordering::Relaxed) {
                // Half of the bytes found room.
                SystemDisk.append(path, file, &bytes[..bytes.len() / 2])?;
                return Err(io::ErrorKind::StorageFull.into());
            }
            SystemDisk.append(path, file, bytes)
        }

        fn sync(&self, path: &Path, file: &File) -> io::Result<()> {
            self.synced.lock().unwrap().insert(path.to_path_buf(), file.metadata()?.len());
            Ok(())
        }

        fn sync_name(&self, _: &Path) -> io::Result<()> {
            Ok(())
        }

        fn rows_that_wait(&self) -> usize {
            100
        }
    }
}
