//! An append-only file of lines that survives the death of its writer.
//!
//! 1. Each line is there as a whole, its newline included, or is cut off: at the next opening where the writer died,
//!    at once where the disk was full.
//! 2. The file never gets shorter otherwise, so that an offset of a line stays good.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;

/// Who is shown every line of a file once, in its order: those that are there when it is opened, then those that are added.
pub type Watcher = Box<dyn FnMut(&[u8]) + Send>;

/// See the module.
pub(super) struct LineFile {
    file: File,
    watcher: Watcher,
    /// The offset in bytes behind the last whole line.
    end: u64,
}

impl LineFile {
    /// Opens or creates a file, gives each whole line to `visit` with its offset in bytes, and cuts off a torn last one.
    pub(super) fn open(
        path: &Path,
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
        file.set_len(end)?;
        Ok(LineFile { file, watcher, end })
    }

    /// Adds a line, given without its newline, and returns its offset in bytes.
    pub(super) fn append(&mut self, mut line: Vec<u8>) -> io::Result<u64> {
        debug_assert!(!line.contains(&b'\n'), "a line holds no newline");
        line.push(b'\n');
        let start = self.end;
        if let Err(error) = self.file.write_all(&line) {
            // Should this fail too, the next opening cuts what is left of the line.
            self.file.set_len(start).ok();
            return Err(error);
        }
        self.end += line.len() as u64;
        (self.watcher)(&line[..line.len() - 1]);
        Ok(start)
    }

    /// The line at an offset that `open` or `append` told, without its newline.
    pub(super) fn line_at(&mut self, offset: u64) -> io::Result<Vec<u8>> {
        self.file.seek(SeekFrom::Start(offset))?;
        let mut line = Vec::new();
        BufReader::new(&self.file).read_until(b'\n', &mut line)?;
        line.pop();
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_of(path: &Path) -> Vec<(u64, String)> {
        let mut lines = Vec::new();
        LineFile::open(path, Box::new(|_| ()), |offset, line| {
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
        let mut file = LineFile::open(&path, Box::new(|_| ()), |_, _| Ok(())).unwrap();
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
        let mut file = LineFile::open(&path, watcher, |_, _| Ok(())).unwrap();
        file.append(b"three".to_vec()).unwrap();
        assert_eq!(shown.try_iter().collect::<Vec<_>>(), ["one", "two", "three"]);
    }
}
