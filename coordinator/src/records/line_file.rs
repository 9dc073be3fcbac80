//! An append-only file of lines that survives the death of its writer, and a power cut up to the
//! last sync.
//!
//! 1. Each line is there as a whole, its newline included, or is cut off: at the next opening where
//!    the writer died, at once where the disk was full.
//! 2. The file never gets shorter otherwise, so the offset of a line stays valid.
//! 3. After a failed sync the system may have dropped the data and report success for the next
//!    sync. So everything written since the last successful one is kept, and written again.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::Disk;

/// Callback invoked once for every line of a file, in order: those that are there when it is
/// opened, then those that are appended.
pub(crate) type Watcher = Box<dyn FnMut(&[u8]) + Send>;

/// An open file of lines. See the module documentation.
pub(crate) struct LineFile {
    path: PathBuf,
    file: Arc<File>,
    disk: Arc<dyn Disk>,
    watcher: Watcher,
    /// Offset behind the last whole line, in bytes.
    end: u64,
    /// Offset up to which the file is durable, in bytes.
    synced: u64,
    /// Bytes from the offset `end - recent.len()` on.
    recent: Vec<u8>,
    /// Whether the file may differ from `recent` there: bytes may be lost after a failed sync, and a
    /// part of a line may be left after a failed write.
    is_shaken: bool,
    /// Whether the file's directory entry is durable.
    is_named: bool,
}

/// Sync of a file up to its current end, for a thread that may wait for the disk.
#[derive(Debug)]
pub(crate) struct Sync {
    path: PathBuf,
    file: Arc<File>,
    disk: Arc<dyn Disk>,
    end: u64,
    is_named: bool,
}

impl Sync {
    /// Waits until the file is durable up to its end at the creation of this sync.
    ///
    /// # Errors
    /// Error of the system.
    pub(crate) fn run(&self) -> io::Result<()> {
        self.disk.sync(&self.path, &self.file)?;
        // Once for each file: the name of a new one is an entry of the folder, which has a sync of its
        // own.
        if self.is_named { Ok(()) } else { self.disk.sync_name(&self.path) }
    }
}

impl LineFile {
    /// Opens or creates a file, calls `visit` with each whole line and its offset in bytes, and
    /// cuts off a torn last one.
    pub(super) fn open(
        path: &Path,
        disk: Arc<dyn Disk>,
        mut watcher: Watcher,
        mut visit: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        let mut end = 0;
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line)? as u64;
            if line.pop() != Some(b'\n') {
                break;
            }
            visit(end, &line)?;
            watcher(&line);
            end += length;
        }
        // Its writer died in the middle, so no caller was told that the line is there.
        file.set_len(end)?;
        let (path, file, recent) = (path.to_path_buf(), Arc::new(file), Vec::new());
        // Nothing counts as durable: an earlier process may have died before its sync.
        Ok(LineFile { path, file, disk, watcher, end, synced: 0, recent, is_shaken: false, is_named: false })
    }

    /// Appends a line, given without its newline, and returns its offset in bytes.
    pub(super) fn append(&mut self, mut line: Vec<u8>) -> io::Result<u64> {
        debug_assert!(!line.contains(&b'\n'), "a line holds no newline");
        line.push(b'\n');
        // Before the new line: its offset must not shift when lost bytes come back.
        self.restore()?;
        let start = self.end;
        if let Err(error) = self.disk.append(&self.path, &self.file, &line) {
            // If this fails too, the rest is cut off before the next line: none may be written behind it.
            self.is_shaken |= self.file.set_len(start).is_err();
            return Err(ganglion_storage::whole::explain(error, line.len(), &self.path));
        }
        self.end += line.len() as u64;
        // Kept until a sync succeeds (3).
        self.recent.extend_from_slice(&line);
        // After the write: what is shown is in the file.
        (self.watcher)(&line[..line.len() - 1]);
        Ok(start)
    }

    /// Writes again the bytes that a failed sync may have lost, in place of whatever is there.
    pub(super) fn restore(&mut self) -> io::Result<()> {
        if !self.is_shaken {
            return Ok(());
        }
        // What the system kept of them is unknown, so they are written from their first byte on.
        self.file.set_len(self.end - self.recent.len() as u64)?;
        self.disk.append(&self.path, &self.file, &self.recent)?;
        self.is_shaken = false;
        Ok(())
    }

    /// Line at an offset returned by `open` or `append`, without its newline.
    pub(super) fn line_at(&mut self, offset: u64) -> io::Result<Vec<u8>> {
        self.restore()?;
        (&*self.file).seek(SeekFrom::Start(offset))?;
        let mut line = Vec::new();
        BufReader::new(&*self.file).read_until(b'\n', &mut line)?;
        line.pop();
        Ok(line)
    }

    /// Offset up to which the file survives a power cut.
    pub(super) fn synced(&self) -> u64 {
        self.synced
    }

    /// Pending sync, if there is anything to sync.
    pub(super) fn to_sync(&self) -> Option<Sync> {
        if self.synced == self.end && self.is_named {
            return None;
        }
        let (path, file, disk) = (self.path.clone(), self.file.clone(), self.disk.clone());
        Some(Sync { path, file, disk, end: self.end, is_named: self.is_named })
    }

    /// Notes the result of a sync.
    pub(super) fn was_synced(&mut self, sync: &Sync, done: &io::Result<()>) {
        match done {
            Ok(()) => {
                // Up to the end that the file had when the sync began; later lines may be in it by
                // chance, and are not counted.
                self.synced = sync.end.max(self.synced);
                self.is_named = true;
                let since = usize::try_from(self.end - self.synced).unwrap_or(usize::MAX);
                self.recent.drain(..self.recent.len().saturating_sub(since));
            }
            Err(_) => self.is_shaken = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::disk::SystemDisk;

    fn open(path: &Path, watcher: Watcher) -> LineFile {
        LineFile::open(path, Arc::new(SystemDisk), watcher, |_, _| Ok(())).unwrap()
    }

    fn lines_of(path: &Path) -> Vec<(u64, String)> {
        let mut lines = Vec::new();
        LineFile::open(path, Arc::new(SystemDisk), Box::new(|_| ()), |offset, line| {
            lines.push((offset, String::from_utf8(line.to_vec()).unwrap()));
            Ok(())
        })
        .unwrap();
        lines
    }

    /// Invariant 1.
    #[test]
    fn a_torn_last_line_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        let whole = "{\"a\":1}\n{\"b\":2}\n";
        for torn in ["", "{", "{\"c\":3}"] {
            std::fs::write(&path, format!("{whole}{torn}")).unwrap();
            let lines = lines_of(&path);
            assert_eq!(lines, [(0, "{\"a\":1}".to_owned()), (8, "{\"b\":2}".to_owned())]);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        }
    }

    #[test]
    fn lines_are_read_back_between_appends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        let mut file = open(&path, Box::new(|_| ()));
        let one = file.append(b"one".to_vec()).unwrap();
        let two = file.append(b"two".to_vec()).unwrap();
        assert_eq!(file.line_at(one).unwrap(), b"one");
        let three = file.append(b"three".to_vec()).unwrap();
        assert_eq!(file.line_at(three).unwrap(), b"three");
        assert_eq!(file.line_at(two).unwrap(), b"two");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\n");
    }

    #[test]
    fn a_watcher_is_shown_old_lines_and_new_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        std::fs::write(&path, "one\ntwo\nto").unwrap();
        let (seen, shown) = std::sync::mpsc::channel();
        let watcher: Watcher =
            Box::new(move |line| seen.send(String::from_utf8_lossy(line).into_owned()).unwrap());
        let mut file = open(&path, watcher);
        file.append(b"three".to_vec()).unwrap();
        assert_eq!(shown.try_iter().collect::<Vec<_>>(), ["one", "two", "three"]);
    }

    /// Invariant 3.
    #[test]
    fn what_a_failed_sync_may_have_lost_is_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        std::fs::write(&path, "one\n").unwrap();
        let mut file = open(&path, Box::new(|_| ()));
        let sync = |file: &mut LineFile, done: io::Result<()>| {
            let sync = file.to_sync().unwrap();
            file.was_synced(&sync, &done);
        };
        sync(&mut file, Ok(()));
        assert!(file.to_sync().is_none());
        file.append(b"two".to_vec()).unwrap();
        let two = file.to_sync().unwrap();
        file.append(b"three".to_vec()).unwrap();
        // The system dropped both, and reported one.
        std::fs::write(&path, "one\n").unwrap();
        file.was_synced(&two, &Err(io::ErrorKind::Other.into()));
        assert_eq!(file.synced(), 4);
        file.append(b"four".to_vec()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\nfour\n");
        assert_eq!(file.line_at(4).unwrap(), b"two");
        sync(&mut file, Ok(()));
        assert_eq!((file.synced(), file.recent.len()), (19, 0));
    }
}
