//! Opening of the journal, by its writer and by concurrent readers, on any file system.
//!
//! 1. SQLite's write-ahead log needs memory that all processes with the file open share. A file
//!    system of several machines has none, even where it seems to; there, and where the log is
//!    refused, the journal is kept with a rollback journal.
//! 2. Where no file can be locked, SQLite is told to use no locks: the run directory has one
//!    holder, and readers see 3.
//! 3. A reader of a journal without a log takes no lock. It reads a state that the files were in at
//!    one moment, and leaves a rollback to the holder.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::statfs::{self, FsType, statfs};
use rusqlite::{Connection, OpenFlags};

use super::JournalError;

/// Maximum number of attempts of a reader to find a moment without writes, and the pause between.
// One second in all. A commit takes milliseconds, so a reader meets a quiet moment long before.
const LOOKS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// File systems shared by several machines. See statfs(2), and the headers of the kernel's modules
/// for the last four.
const SHARED: [(FsType, &str); 13] = [
    (statfs::NFS_SUPER_MAGIC, "NFS"),
    (statfs::SMB_SUPER_MAGIC, "SMB"),
    (FsType(0xff53_4d42), "CIFS"),
    (FsType(0xfe53_4d42), "SMB"),
    (statfs::AFS_SUPER_MAGIC, "AFS"),
    (statfs::CODA_SUPER_MAGIC, "Coda"),
    (statfs::OCFS2_SUPER_MAGIC, "OCFS2"),
    (FsType(0x0116_1970), "GFS2"),
    (FsType(0x00c3_6400), "Ceph"),
    (FsType(0x0bd0_0bd0), "Lustre"),
    (FsType(0x4750_4653), "GPFS"),
    (FsType(0x1983_0326), "BeeGFS"),
    (FsType(0xaad7_aaea), "PanFS"),
];

/// Opens the journal for writing; also returns a diagnostic message about the shortcomings of its
/// file system.
pub(super) fn to_write(file: &Path) -> Result<(Connection, Option<String>), JournalError> {
    let shared = shared_file_system(file);
    let refused = match shared {
        // Not even tried: a log seems to work there, until two machines use it at once.
        Some(name) => Refused::Shared(name),
        None => match with_log(file) {
            Ok(connection) => return Ok((connection, None)),
            // No journal mode mends damage, and nothing may be written into a damaged file.
            Err(error) if is_damaged(&error) => return Err(error.into()),
            Err(error) => Refused::Log(error),
        },
    };
    match (without_log(file), refused) {
        (Ok((connection, locks)), refused) => Ok((connection, Some(refused.told(locks)))),
        // The first error says more: the second attempt only follows from it.
        (Err(_), Refused::Log(error)) => Err(error.into()),
        (Err(error), Refused::Shared(_)) => Err(error.into()),
    }
}

pub(super) fn is_damaged(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}

/// Reason for the lack of a write-ahead log.
enum Refused {
    Shared(&'static str),
    Log(rusqlite::Error),
}

impl Refused {
    fn told(&self, locks: bool) -> String {
        let why = match self {
            Refused::Shared(name) => format!("it is on {name}"),
            Refused::Log(error) => error.to_string(),
        };
        let and = if locks { "" } else { ", and without locks, since its file system has none" };
        format!("the journal is kept without a write-ahead log ({why}){and}")
    }
}

/// Opens the journal with a write-ahead log. An error may also come from a log that an earlier
/// holder left and that cannot be read here.
fn with_log(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(file)?;
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    // SQLite reports a refused mode by keeping the old one.
    if mode != "wal" {
        return Err(rusqlite::Error::InvalidParameterName(format!("SQLite stays with {mode}")));
    }
    settle(&connection)?;
    Ok(connection)
}

/// Opens the journal with a rollback journal, which each commit truncates. Also returns whether
/// locks are used.
fn without_log(file: &Path) -> rusqlite::Result<(Connection, bool)> {
    let locks = locks_work(file);
    let connection = match locks {
        // With locks where they work: another program that opens the file by SQLite then sees no half of
        // a commit.
        true => Connection::open(file)?,
        // Without locks a commit would fail each time, on a system where the run directory has one
        // holder all the same (2).
        false => Connection::open_with_flags_and_vfs(file, OpenFlags::default(), c"unix-none")?,
    };
    // A connection in exclusive mode can take in a log that an earlier holder left without shared memory.
    connection.query_row("PRAGMA locking_mode = EXCLUSIVE", [], |_| Ok(()))?;
    let mode: String = connection.query_row("PRAGMA journal_mode = TRUNCATE", [], |row| row.get(0))?;
    if mode != "truncate" {
        return Err(rusqlite::Error::InvalidParameterName(format!("SQLite stays with {mode}")));
    }
    // Back to normal: the exclusive lock would shut out every other program for as long as the run goes
    // on.
    connection.query_row("PRAGMA locking_mode = NORMAL", [], |_| Ok(()))?;
    settle(&connection)?;
    Ok((connection, locks))
}

/// Makes a commit durable when it returns, and reads something, which shows whether the file can be
/// read at all.
fn settle(connection: &Connection) -> rusqlite::Result<()> {
    // FULL and not NORMAL: with a log, NORMAL syncs at checkpoints alone, and a power cut could take a
    // decision that was announced (M1).
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.query_row("SELECT COUNT(*) FROM sqlite_schema", [], |_| Ok(()))
}

fn shared_file_system(file: &Path) -> Option<&'static str> {
    let kind = statfs(file.parent()?).ok()?.filesystem_type();
    SHARED.iter().find(|(shared, _)| *shared == kind).map(|(_, name)| *name)
}

/// Whether a byte range of a file can be locked, as SQLite does it.
fn locks_work(beside: &Path) -> bool {
    let probe = suffixed(beside, "-probe");
    let ask = || -> io::Result<()> {
        // The probe exists to be locked, and is removed again.
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&probe)?;
        let lock = nix::libc::flock {
            l_type: i16::try_from(nix::libc::F_WRLCK).expect("a constant of one digit"),
            l_whence: 0,
            l_start: 0,
            l_len: 1,
            l_pid: 0,
        };
        // The call that SQLite makes; some file systems offer `flock` and not this.
        fcntl(&file, FcntlArg::F_SETLK(&lock))?;
        Ok(())
    };
    let works = ask().is_ok();
    // Errors are ignored: an old probe is reused by the next check.
    let _ = fs::remove_file(probe);
    works
}

/// Opens the journal for reading, without creating any file.
pub(super) fn to_read(file: &Path) -> Result<Connection, JournalError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if suffixed(file, "-wal").exists() {
        return Ok(Connection::open_with_flags(file, flags)?);
    }
    // SQLite would create files beside the journal even to read it, which a folder may not allow.
    let escaped = file.to_string_lossy().replace('%', "%25").replace('?', "%3f").replace('#', "%23");
    let uri = format!("file:{escaped}?immutable=1");
    Ok(Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_URI)?)
}

/// Reads the journal while another process may write it.
pub(super) fn snapshot<T>(
    file: &Path,
    mut read: impl FnMut(&mut Connection) -> Result<T, JournalError>,
) -> Result<T, JournalError> {
    if suffixed(file, "-wal").exists() {
        return to_read(file).and_then(|mut connection| read(&mut connection)).or_else(|error| {
            // The log cannot be shared from here. A copy of the files has a log of its own.
            copied(file, &mut read)?.ok_or(error)
        });
    }
    let mut last = None;
    for _ in 0..LOOKS {
        let before = Look::at(file)?;
        // A write in progress would be read half: nothing is locked.
        if before.is_quiet {
            let result = to_read(file).and_then(|mut connection| read(&mut connection));
            // SQLite's counter in the header grows with each commit, so an equal header means that none
            // came in between.
            if Look::at(file)? == before {
                return result;
            }
            last = Some(result);
        }
        std::thread::sleep(PAUSE);
    }
    // A holder that died left a transaction to roll back, or one writes all the time.
    match (copied(file, &mut read)?, last) {
        (Some(read), _) => Ok(read),
        (None, Some(Err(error))) => Err(error),
        (None, _) => Err(JournalError::Busy),
    }
}

/// State of a journal without a log, as far as it distinguishes one moment from another.
#[derive(PartialEq, Eq)]
struct Look {
    /// Whether no write is in progress and no rollback is pending.
    is_quiet: bool,
    /// First 100 bytes of the file: SQLite's header with its counter of transactions.
    head: Vec<u8>,
    length: u64,
}

impl Look {
    fn at(file: &Path) -> Result<Look, JournalError> {
        let rollback = fs::metadata(suffixed(file, "-journal"));
        let opened = File::open(file).map_err(JournalError::File)?;
        let length = opened.metadata().map_err(JournalError::File)?.len();
        let mut head = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(opened, 100), &mut head).map_err(JournalError::File)?;
        Ok(Look { is_quiet: !rollback.is_ok_and(|file| file.len() > 0), head, length })
    }
}

/// Reads a copy of the files of one moment, on which SQLite may do a rollback or recover a log.
/// `None` if there was no moment without writes.
fn copied<T>(
    file: &Path,
    read: &mut impl FnMut(&mut Connection) -> Result<T, JournalError>,
) -> Result<Option<T>, JournalError> {
    let files = [PathBuf::from(file), suffixed(file, "-journal"), suffixed(file, "-wal")];
    let contents = || files.clone().map(|file| fs::read(file).unwrap_or_default());
    let mut before = contents();
    for _ in 0..LOOKS {
        let after = contents();
        // Two equal readings: the files were of one moment, unless a writer undid its own bytes in
        // between.
        if before == after {
            let folder = tempfile::tempdir().map_err(JournalError::File)?;
            let copy = folder.path().join("journal.sqlite");
            for (ending, content) in ["", "-journal", "-wal"].into_iter().zip(&after) {
                if !content.is_empty() {
                    // A private and temporary copy: the folder is removed after this read.
                    fs::write(suffixed(&copy, ending), content).map_err(JournalError::File)?;
                }
            }
            let mut connection = Connection::open(&copy)?;
            return read(&mut connection).map(Some);
        }
        before = after;
        std::thread::sleep(PAUSE);
    }
    Ok(None)
}

fn suffixed(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_os_string();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(file: &Path) -> u64 {
        let count = |connection: &mut Connection| {
            Ok(connection.query_row("SELECT COUNT(*) FROM t", [], |row| row.get(0))?)
        };
        snapshot(file, count).unwrap()
    }

    /// Invariant 3, in every journal mode, and whatever a writer that died left behind.
    #[test]
    fn a_reader_finds_each_commit_and_leaves_all_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let names = || {
            let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<_> = names.collect();
            names.sort();
            names
        };
        with_log(&file).unwrap().execute_batch("CREATE TABLE t (x); INSERT INTO t VALUES (1);").unwrap();
        let (writer, locks) = without_log(&file).unwrap();
        assert!(locks);
        for count in 2..20 {
            writer.execute_batch("INSERT INTO t VALUES (2)").unwrap();
            let before = names();
            assert_eq!(rows(&file), count);
            assert_eq!(names(), before);
        }
        // A transaction that began to write and did not end.
        writer.execute_batch("PRAGMA cache_size = 1; PRAGMA cache_spill = 1; BEGIN").unwrap();
        for _ in 0..2000 {
            writer.execute("INSERT INTO t VALUES (?1)", [vec![7u8; 500]]).unwrap();
        }
        assert!(!Look::at(&file).unwrap().is_quiet);
        assert_eq!(rows(&file), 19);
        writer.execute_batch("ROLLBACK").unwrap();
        drop(writer);
        // Back on a file system of one machine.
        let writer = with_log(&file).unwrap();
        writer.execute_batch("INSERT INTO t VALUES (3)").unwrap();
        assert_eq!(rows(&file), 20);
    }

    #[test]
    fn a_commit_while_a_reader_reads_makes_it_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let (writer, _) = without_log(&file).unwrap();
        writer.execute_batch("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
        let mut seen = Vec::new();
        let last: u64 = snapshot(&file, |connection| {
            let count = connection.query_row("SELECT COUNT(*) FROM t", [], |row| row.get(0))?;
            seen.push(count);
            if seen.len() == 1 {
                writer.execute_batch("INSERT INTO t VALUES (2)")?;
            }
            Ok(count)
        })
        .unwrap();
        assert_eq!((seen.as_slice(), last), (&[1, 2][..], 2));
    }

    /// A reader never finds half of a commit.
    #[test]
    fn readers_beside_a_writer_without_a_log_see_whole_commits() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let (writer, _) = without_log(&file).unwrap();
        writer.execute_batch("CREATE TABLE t (x)").unwrap();
        std::thread::scope(|scope| {
            let write = scope.spawn(move || {
                for _ in 0..200 {
                    writer
                        .execute_batch("BEGIN; INSERT INTO t VALUES (1); INSERT INTO t VALUES (2); COMMIT")
                        .unwrap();
                }
            });
            let mut last = 0;
            while !write.is_finished() {
                let now = rows(&file);
                assert!(now.is_multiple_of(2) && now >= last, "{now} after {last}");
                last = now;
            }
        });
        assert_eq!(rows(&file), 400);
    }
}
