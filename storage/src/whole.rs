//! Atomic writes of local files: a file appears whole or not at all.
//!
//! 1. A reader finds the old content or the new one, also after a power cut: the content is on the
//!    disk before the name is, and the name before the call returns.
//! 2. An error leaves the old file and removes the draft. A killed process leaves its draft, which
//!    has a name of its own and which [`sweep`] removes.
//! 3. Of several writers of one name the last one to finish wins, or the first, for files that are
//!    created; their contents are never mixed.
//! 4. A symbolic link is followed, so that its target gets the content, except for secrets: their
//!    link is replaced. A file that is not a plain one, such as `/dev/full` or a pipe, is written to
//!    and never replaced. So is an open file, such as `/dev/stdout`.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with, statvfs};
use rustix::io::Errno;
use tempfile::{Builder, NamedTempFile};

/// Suffix of a draft's name: no file of a user's has it. Its prefix is a dot.
const DRAFT: &str = ".ganglion.new";
/// Folders in which this process's open files are.
const OPEN_FILES: [&str; 2] = ["/dev/fd", "/proc/self/fd"];
/// Longest chain of symbolic links; a longer one is a loop.
const LINKS_LIMIT: u32 = 40;
/// Time after which an empty file that reserves a name counts as a dead writer's.
const CLAIM_LIMIT: Duration = Duration::from_secs(5);
/// Interval at which such a file is checked.
const CLAIM_LOOK: Duration = Duration::from_millis(50);

/// Writes a file, replacing an existing one.
///
/// # Errors
/// The system's.
pub fn write(file: &Path, content: &[u8]) -> io::Result<()> {
    let written = write_by(file, |mut draft| draft.write_all(content));
    match follow(file).and_then(|file| is_special(&file)) {
        // A device has no room that could be told.
        Ok(true) => written,
        // Explained here, where the size of the content is known.
        _ => written.map_err(|error| explain(error, content.len(), file)),
    }
}

/// Writes a file that only this user can read, replacing whatever exists, also a symbolic link.
///
/// # Errors
/// The system's.
pub fn write_secret(file: &Path, content: &[u8]) -> io::Result<()> {
    // The mode is that of the draft, so the secret is at no time readable by others.
    let draft = Draft::secret_beside(file)?;
    draft.file().write_all(content)?;
    draft.put()
}

/// Creates a file with this mode, limited by the user's umask.
///
/// # Errors
/// The system's; [`ErrorKind::AlreadyExists`] if something is there.
pub fn create(file: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let draft = Draft::open(file.to_path_buf(), mode)?;
    draft.file().write_all(content)?;
    draft.put_new()
}

/// Lets `fill` write a file's content, then puts it in place of an existing file.
///
/// # Errors
/// The system's, or that of `fill`; then the old file stays.
pub fn write_by<T, E: From<io::Error>>(
    file: &Path,
    fill: impl FnOnce(&File) -> Result<T, E>,
) -> Result<T, E> {
    // Before the draft: it must lie beside the target, on the same file system, to be renamed.
    let file = &follow(file)?;
    // A device or a pipe would be replaced by a plain file.
    if is_special(file)? {
        return fill(&open_special(file)?);
    }
    let draft = Draft::beside(file)?;
    let filled = fill(draft.file())?;
    draft.put()?;
    Ok(filled)
}

/// Checks whether a file can be written, before work is done for it. An existing file stays
/// unchanged.
///
/// # Errors
/// The system's, as a write would return it.
pub fn try_out(file: &Path) -> io::Result<()> {
    let file = follow(file)?;
    match fs::metadata(&file) {
        // A pipe that is opened twice has an end for its reader in between.
        Ok(found) if found.file_type().is_fifo() => Ok(()),
        _ if is_special(&file)? => open_special(&file).map(drop),
        _ => Draft::beside(&file).map(drop),
    }
}

/// Whether what is written to a file comes out at standard output, where nothing else may come then.
#[allow(clippy::disallowed_methods)] // nothing is written
pub fn is_standard_output(file: &Path) -> bool {
    let own = io::stdout().as_fd().try_clone_to_owned().and_then(|own| File::from(own).metadata());
    match (follow(file).and_then(fs::metadata), own) {
        (Ok(file), Ok(own)) => (file.dev(), file.ino()) == (own.dev(), own.ino()),
        _ => false,
    }
}

/// Renames a file with durable content within its folder, replacing an existing one. After several
/// such renames in a row, a power cut undoes only the last ones.
///
/// # Errors
/// The system's.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_folder(parent(to))
}

/// Creates a folder and its parents, durably.
///
/// # Errors
/// The system's.
pub fn create_folders(folder: &Path) -> io::Result<()> {
    // The end of the recursion: the root, or `.` for a relative path.
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    let above = parent(folder);
    create_folders(above)?;
    match fs::create_dir(folder) {
        // Another process made it in between.
        Err(error) if error.kind() == ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_folder(above),
    }
}

/// Removes the drafts that killed writers left in a folder. No process may write there at the time.
///
/// # Errors
/// The system's.
pub fn sweep(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // A folder with such a name is not ours.
        if entry.file_name().to_str().is_some_and(is_draft) && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a file name is a draft's.
pub fn is_draft(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(DRAFT)
}

/// Whether an error means that the chosen place is wrong, so that another one may be right.
/// Otherwise the machine is full or failing.
pub fn is_mistake(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::AlreadyExists
            | ErrorKind::InvalidInput
            | ErrorKind::IsADirectory
            | ErrorKind::NotADirectory
            | ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
    )
}

/// Adds the needed and the free space in the folder of `file` to an error of the system, if lack of
/// space is the reason.
pub fn explain(error: io::Error, needed: usize, file: &Path) -> io::Error {
    if !matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
        return error;
    }
    // Blocks that an ordinary user may take: a file system reserves some for root.
    let free = statvfs(parent(file)).map(|found| found.f_bavail.saturating_mul(found.f_frsize));
    let free = free.map(|bytes| format!(", free: {}", size(bytes))).unwrap_or_default();
    io::Error::new(error.kind(), format!("{error}: it needs {}{free}", size(needed as u64)))
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} bytes"),
        1_000..1_000_000 => format!("{}.{} kB", bytes / 1_000, bytes % 1_000 / 100),
        _ => format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000),
    }
}

/// File being written under a temporary name. Unless it is put in place, it is removed on drop.
#[derive(Debug)]
pub struct Draft {
    draft: NamedTempFile,
    target: PathBuf,
    /// Device, pipe or open file that gets the content instead of being replaced.
    special: Option<File>,
}

impl Draft {
    /// Begins a file that will be put at `target`.
    ///
    /// # Errors
    /// The system's, or `target` cannot be a plain file.
    pub fn beside(target: &Path) -> io::Result<Draft> {
        let target = follow(target)?;
        if is_special(&target)? {
            return Err(io::Error::new(ErrorKind::InvalidInput, "it is there and is no plain file"));
        }
        // Other users may read it as far as the umask allows.
        Draft::open(target, 0o666)
    }

    /// The same for a target of any kind, for a library that opens files by path. What is no plain
    /// file gets the content when the draft is put.
    ///
    /// # Errors
    /// The system's.
    pub fn for_output(target: &Path) -> io::Result<Draft> {
        let target = follow(target)?;
        if !is_special(&target)? {
            return Draft::beside(&target);
        }
        // Waits for the reader of a pipe.
        let special = Some(open_special(&target)?);
        Ok(Draft { draft: NamedTempFile::new()?, target, special })
    }

    /// Begins a file that only this user can read.
    ///
    /// # Errors
    /// The system's.
    pub fn secret_beside(target: &Path) -> io::Result<Draft> {
        Draft::open(target.to_path_buf(), 0o600)
    }

    fn open(target: PathBuf, mode: u32) -> io::Result<Draft> {
        let name =
            target.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "it names no file"))?;
        // Short enough for any file system, whatever the length of the target's name.
        // 200 bytes at most in UTF-8, and the random part and the suffix fit into 255.
        let begin: String = name.to_string_lossy().chars().take(50).collect();
        let prefix = format!(".{begin}.");
        let mut builder = Builder::new();
        builder.prefix(&prefix).suffix(DRAFT).permissions(Permissions::from_mode(mode));
        let draft = builder.tempfile_in(parent(&target))?;
        Ok(Draft { draft, target, special: None })
    }

    /// Open file handle.
    pub fn file(&self) -> &File {
        self.draft.as_file()
    }

    /// Path of the draft, for a library that opens files itself.
    pub fn path(&self) -> &Path {
        self.draft.path()
    }

    /// Puts the file in its place, replacing an existing one.
    ///
    /// # Errors
    /// The system's. If only making it durable failed, the new file may be in place.
    pub fn put(mut self) -> io::Result<()> {
        if let Some(special) = &mut self.special {
            // By its name: a library may have made the file anew.
            io::copy(&mut File::open(self.draft.path())?, special)?;
            return special.flush();
        }
        // Invariant 1: the content is on the disk before the name is.
        self.file().sync_all()?;
        fs::rename(self.draft.path(), &self.target)?;
        // The draft's name is free, and may be another writer's from now on.
        self.draft.disable_cleanup(true);
        sync_folder(parent(&self.target))
    }

    /// Puts the file in its place unless something exists there.
    ///
    /// # Errors
    /// The system's; [`ErrorKind::AlreadyExists`] if something exists there.
    pub fn put_new(self) -> io::Result<()> {
        let link = |from: &Path, to: &Path| fs::hard_link(from, to);
        self.put_new_by(&Ways { link, rename_new, patience: CLAIM_LIMIT })
    }

    fn put_new_by(self, ways: &Ways) -> io::Result<()> {
        self.file().sync_all()?;
        // Three ways, the best first: a hard link, an exclusive rename, a reserved name. Network file
        // systems refuse some.
        let (from, to) = (self.draft.path(), self.target.as_path());
        match (ways.link)(from, to) {
            // A network file system may have made the link on a request whose answer was lost, and
            // report this to the repetition.
            Err(error) if error.kind() == ErrorKind::AlreadyExists && self.is_there()? => {}
            Err(error) if is_refused(&error) => match (ways.rename_new)(from, to) {
                Err(error) if is_refused(&error) => claim(from, to, ways.patience)?,
                renamed => renamed?,
            },
            linked => linked?,
        }
        sync_folder(parent(to))
    }

    /// Whether this very file is in its place.
    fn is_there(&self) -> io::Result<bool> {
        let (own, there) = (self.file().metadata()?, fs::symlink_metadata(&self.target)?);
        // Inode numbers are unique on one device only.
        Ok((own.dev(), own.ino()) == (there.dev(), there.ino()))
    }
}

/// Operations that move a file to a name that must be free; tests refuse some of them.
struct Ways {
    link: fn(&Path, &Path) -> io::Result<()>,
    rename_new: fn(&Path, &Path) -> io::Result<()>,
    /// Time for which an empty file counts as another live writer's.
    patience: Duration,
}

fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?)
}

/// Whether a file system does not support the operation at all.
fn is_refused(error: &io::Error) -> bool {
    let refusals = [Errno::PERM, Errno::OPNOTSUPP, Errno::NOTSUP, Errno::MLINK, Errno::NOSYS, Errno::INVAL];
    // File systems do not agree on the number by which they say this.
    Errno::from_io_error(error).is_some_and(|error| refusals.contains(&error))
}

/// Reserves a name by an empty file, which only one writer can create, and then gives it its
/// content. A writer that died in between is waited for, and its name taken over.
fn claim(from: &Path, to: &Path, patience: Duration) -> io::Result<()> {
    let begun = Instant::now();
    // Only one process can create the empty file: this is what makes the name its own.
    while let Err(error) = File::create_new(to) {
        let is_empty = error.kind() == ErrorKind::AlreadyExists && fs::symlink_metadata(to)?.len() == 0;
        // An empty draft put in place would look like a reservation, so it is refused.
        if !is_empty || fs::metadata(from)?.len() == 0 {
            return Err(error);
        }
        if begun.elapsed() >= patience {
            // The writer that reserved the name counts as dead: its name is taken over.
            break;
        }
        std::thread::sleep(CLAIM_LOOK);
    }
    // Replaces the reservation. Until then a reader finds an empty file, which no checkpoint has.
    fs::rename(from, to)
}

/// Returns the target of a chain of symbolic links, whether or not it exists.
fn follow(target: &Path) -> io::Result<PathBuf> {
    let mut place = target.to_path_buf();
    for _ in 0..LINKS_LIMIT {
        // Its link names what was opened, and that may have another name by now, or none.
        if is_open_file(&place) {
            return Ok(place);
        }
        match fs::read_link(&place) {
            // A relative link counts from its own folder.
            Ok(next) => place = parent(&place).join(next),
            // Not a link, or nothing there: the end of the chain.
            Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::NotFound) => {
                return Ok(place);
            }
            Err(error) => return Err(error),
        }
    }
    Err(Errno::LOOP.into())
}

/// Whether a path names a file that this process has open, such as `/dev/fd/1`.
fn is_open_file(place: &Path) -> bool {
    place.parent().is_some_and(|folder| OPEN_FILES.iter().any(|open| folder == Path::new(open)))
}

/// Whether a file is written to instead of being replaced.
fn is_special(place: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(place) {
        Ok(found) => Ok(is_open_file(place) || !found.is_file()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[allow(clippy::disallowed_methods)] // the user named it as a file
fn open_special(place: &Path) -> io::Result<File> {
    let number = place.file_name().filter(|_| is_open_file(place));
    match number.and_then(|number| number.to_str()) {
        // The very file: one that was opened anew would be written from its beginning.
        Some("1") => Ok(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
        Some("2") => Ok(File::from(io::stderr().as_fd().try_clone_to_owned()?)),
        Some(_) => File::options().append(true).open(place),
        None => File::options().write(true).open(place),
    }
}

/// Returns the folder of a file.
fn parent(file: &Path) -> &Path {
    match file.parent() {
        // The parent of a bare name is the empty path, which the system does not open.
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => Path::new("/"),
    }
}

/// Makes the names in a folder durable. Some network file systems lack this call, and do not need
/// it.
fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // Some systems do not let a folder that is open for reading be synced.
        Err(error) if is_refused(&error) || Errno::from_io_error(&error) == Some(Errno::BADF) => Ok(()),
        synced => synced,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const REFUSED: fn(&Path, &Path) -> io::Result<()> = |_, _| Err(Errno::PERM.into());
    const UNKNOWN: fn(&Path, &Path) -> io::Result<()> = |_, _| Err(Errno::INVAL.into());

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn put_new(file: &Path, content: &[u8], ways: &Ways) -> io::Result<()> {
        let draft = Draft::beside(file)?;
        draft.file().write_all(content)?;
        draft.put_new_by(ways)
    }

    /// Invariants 1 and 2.
    #[test]
    fn an_error_leaves_the_old_file_and_no_draft() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        write(&file, b"old").unwrap();
        let failed = write_by(&file, |mut draft| {
            draft.write_all(b"ne")?;
            Err::<(), io::Error>(Errno::IO.into())
        });
        assert_eq!(Errno::from_io_error(&failed.unwrap_err()), Some(Errno::IO));
        assert_eq!((fs::read(&file).unwrap(), names(folder.path())), (b"old".to_vec(), vec!["file".into()]));
        write(&file, b"new").unwrap();
        assert_eq!((fs::read(&file).unwrap(), names(folder.path())), (b"new".to_vec(), vec!["file".into()]));
    }

    #[test]
    fn what_a_killed_writer_left_is_swept_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let Draft { draft, .. } = Draft::beside(&file).unwrap();
        draft.keep().unwrap();
        let own = [".file.new", ".file.secret.new", "file.new", "mine.ganglion.new"];
        own.iter().for_each(|own| fs::write(folder.path().join(own), "").unwrap());
        assert_eq!(names(folder.path()).len(), own.len() + 1);
        sweep(folder.path()).unwrap();
        assert_eq!(names(folder.path()), own);
    }

    #[test]
    fn a_secret_is_this_users_alone_whatever_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let [secret, elsewhere] = ["secret", "elsewhere"].map(|name| folder.path().join(name));
        let mode = |file: &Path| fs::symlink_metadata(file).unwrap().permissions().mode() & 0o777;
        fs::write(&elsewhere, "open").unwrap();
        symlink(&elsewhere, &secret).unwrap();
        write_secret(&secret, b"hush").unwrap();
        assert_eq!((mode(&secret), fs::read_to_string(&elsewhere).unwrap()), (0o600, "open".to_string()));
        fs::set_permissions(&secret, Permissions::from_mode(0o644)).unwrap();
        write_secret(&secret, b"hush").unwrap();
        assert_eq!(mode(&secret), 0o600);
        assert_eq!(names(folder.path()), ["elsewhere", "secret"]);
    }

    /// Invariant 4.
    #[test]
    fn links_are_followed_and_devices_stay() {
        let folder = tempfile::tempdir().unwrap();
        let [link, target, null] = ["link", "target", "null"].map(|name| folder.path().join(name));
        symlink("target", &link).unwrap();
        for content in [b"1", b"2"] {
            write(&link, content).unwrap();
            assert_eq!(fs::read(&target).unwrap(), content);
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        }
        symlink("/dev/full", &null).unwrap();
        let full = write(&null, b"1").unwrap_err();
        assert_eq!((full.kind(), full.to_string().contains("free")), (ErrorKind::StorageFull, false));
        assert!(Draft::beside(&null).is_err() && !fs::metadata("/dev/full").unwrap().is_file());
        symlink("loop", folder.path().join("loop")).unwrap();
        assert!(write(&folder.path().join("loop"), b"1").is_err());
        assert_eq!(names(folder.path()), ["link", "loop", "null", "target"]);
    }

    /// Invariant 4, for a pipe and for a library that opens files by path.
    #[test]
    fn a_pipe_gets_the_content_and_is_not_opened_before() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        // Without a reader this would wait.
        try_out(&pipe).unwrap();
        let read = std::thread::scope(|scope| {
            let reader = scope.spawn(|| fs::read(&pipe).unwrap());
            let draft = Draft::for_output(&pipe).unwrap();
            fs::write(draft.path(), "content").unwrap();
            draft.put().unwrap();
            reader.join().unwrap()
        });
        assert_eq!((read, names(folder.path())), (b"content".to_vec(), vec!["pipe".into()]));
        assert!(is_special(&pipe).unwrap());
    }

    #[test]
    fn an_open_file_is_known_by_its_number() {
        for open in ["/dev/stdout", "/dev/stderr", "/dev/fd/2", "/proc/self/fd/1"] {
            let place = follow(Path::new(open)).unwrap();
            assert!(is_open_file(&place) && is_special(&place).unwrap(), "{open}: {}", place.display());
            open_special(&place).unwrap();
        }
        assert!(is_standard_output(Path::new("/dev/stdout")));
        assert!(!is_standard_output(Path::new("/dev/full")) && !is_open_file(Path::new("/dev/fd")));
        let folder = tempfile::tempdir().unwrap();
        assert!(try_out(folder.path()).is_err(), "a folder is no file");
        assert_eq!(try_out(folder.path()).unwrap_err().kind(), ErrorKind::IsADirectory);
    }

    #[test]
    fn a_place_is_tried_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        try_out(&file).unwrap();
        assert!(names(folder.path()).is_empty());
        fs::write(&file, "old").unwrap();
        try_out(&file).unwrap();
        assert_eq!((fs::read(&file).unwrap(), names(folder.path())), (b"old".to_vec(), vec!["file".into()]));
        try_out(Path::new("/dev/null")).unwrap();
        for nowhere in [folder.path().join("none/file"), file.join("below"), folder.path().to_path_buf()] {
            assert!(try_out(&nowhere).is_err(), "{}", nowhere.display());
        }
    }

    /// Invariant 3, by each operation that a file system may support.
    #[test]
    fn a_file_is_created_once_also_where_links_are_refused() {
        let link: fn(&Path, &Path) -> io::Result<()> = |from, to| fs::hard_link(from, to);
        for (link, rename_new) in
            [(link, UNKNOWN), (REFUSED, rename_new as fn(&Path, &Path) -> io::Result<()>), (REFUSED, UNKNOWN)]
        {
            let ways = Ways { link, rename_new, patience: CLAIM_LIMIT };
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("file");
            let created = std::thread::scope(|scope| {
                let create = |who: u8| {
                    let (ways, file) = (&ways, &file);
                    scope.spawn(move || put_new(file, &[who; 100_000], ways))
                };
                let all: Vec<_> = (0..8).map(create).collect();
                all.into_iter().map(|one| one.join().unwrap()).collect::<Vec<_>>()
            });
            let winners: Vec<usize> = (0..8).filter(|who| created[*who].is_ok()).collect();
            assert_eq!(winners.len(), 1);
            let losers = created.iter().filter_map(|created| created.as_ref().err());
            assert!(losers.into_iter().all(|error| error.kind() == ErrorKind::AlreadyExists));
            let content = fs::read(&file).unwrap();
            assert!(content.len() == 100_000 && content.iter().all(|who| usize::from(*who) == winners[0]));
            assert_eq!(names(folder.path()), ["file"]);
        }
    }

    /// A network file system has made the link, its answer was lost, and the repeated request found
    /// the name taken.
    #[test]
    fn a_link_whose_answer_was_lost_is_the_writers_own() {
        let link: fn(&Path, &Path) -> io::Result<()> = |from, to| {
            fs::hard_link(from, to)?;
            fs::hard_link(from, to)
        };
        let ways = Ways { link, rename_new: UNKNOWN, patience: CLAIM_LOOK };
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        put_new(&file, b"first", &ways).unwrap();
        assert_eq!(put_new(&file, b"other", &ways).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(
            (fs::read(&file).unwrap(), names(folder.path())),
            (b"first".to_vec(), vec!["file".into()])
        );
    }

    #[test]
    fn a_name_that_a_dead_writer_took_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let ways = Ways { link: REFUSED, rename_new: UNKNOWN, patience: CLAIM_LOOK };
        put_new(&file, b"content", &ways).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"content");
    }

    #[test]
    fn a_full_disk_is_told_with_the_room_that_is_needed() {
        let told = explain(Errno::NOSPC.into(), 1_234_567, Path::new("/dev/file")).to_string();
        assert!(told.contains("No space left") && told.contains("it needs 1.2 MB, "), "{told}");
        let other = explain(Errno::IO.into(), 1, Path::new("/dev/file"));
        assert_eq!(Errno::from_io_error(&other), Some(Errno::IO));
    }

    #[test]
    fn folders_are_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/b/c");
        create_folders(&inner).unwrap();
        create_folders(&inner).unwrap();
        assert!(inner.is_dir());
        fs::write(folder.path().join("file"), "").unwrap();
        assert!(create_folders(&folder.path().join("file/a")).is_err());
    }
}
