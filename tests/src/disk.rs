//! File systems and system calls that fail on demand.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::eventually;

/// Bytes left free on a full disk: less than a part of a state.
const LEFT: u64 = 16 << 10;

/// Small file system of its own, a tmpfs.
pub struct Disk {
    /// Mount point.
    pub folder: PathBuf,
}

impl Disk {
    /// Mounts a tmpfs of 8 MB at a folder; prints the reason if that is not possible here.
    pub fn mount(folder: PathBuf) -> Option<Disk> {
        Disk::mount_of("8m", folder)
    }

    /// The same for a size as `mount` reads it.
    pub fn mount_of(size: &str, folder: PathBuf) -> Option<Disk> {
        fs::create_dir_all(&folder).expect("a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&folder);
        if !mount.output().is_ok_and(|output| output.status.success()) {
            eprintln!("SKIPPED: a disk of its own needs the right to mount a tmpfs (root)");
            return None;
        }
        Some(Disk { folder })
    }

    /// Fills the file system except for a few kilobytes.
    pub fn fill(&self) {
        let filler = self.fill_up();
        let length = filler.metadata().expect("its length").len();
        filler.set_len(length - LEFT).expect("it gets shorter");
    }

    /// Fills the file system up; returns the file that does.
    pub fn fill_up(&self) -> File {
        let chunk = vec![0u8; 64 << 10];
        let mut filler = File::create(self.folder.join("filler")).expect("a file");
        while filler.write_all(&chunk).is_ok() {}
        filler
    }

    /// Makes space again.
    pub fn free(&self) {
        fs::remove_file(self.folder.join("filler")).expect("it was filled");
    }

    /// Makes the file system read-only, or writable again. Root ignores the modes of folders, but
    /// not those of mounts.
    pub fn set_read_only(&self, read_only: bool) {
        let mode = if read_only { "remount,ro" } else { "remount,rw" };
        eventually("remount", || {
            // Remounting is refused while a file is open for writing.
            let mut mount = Command::new("mount");
            mount.args(["-o", mode]).arg(&self.folder);
            mount.output().is_ok_and(|output| output.status.success()).then_some(())
        });
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

/// System calls that fail on demand, by a preloaded library (`faults.c`).
pub struct Faults {
    folder: TempDir,
}

impl Faults {
    /// Compiles the library; prints the reason if that is not possible here.
    pub fn compile() -> Option<Faults> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/faults.c");
        let mut compile = Command::new("cc");
        compile.args(["-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o"]);
        compile.arg(folder.path().join("faults.so")).arg(source);
        match compile.output() {
            Ok(compiled) if compiled.status.success() => Some(Faults { folder }),
            Ok(compiled) => panic!("{}", String::from_utf8_lossy(&compiled.stderr)),
            Err(error) => {
                eprintln!("SKIPPED: faults of single calls need a C compiler: {error}");
                None
            }
        }
    }

    /// Environment variables for a program under test.
    pub fn variables(&self) -> [(&'static str, String); 2] {
        let text = |path: PathBuf| path.display().to_string();
        [("LD_PRELOAD", text(self.folder.path().join("faults.so"))), ("GANGLION_FAULTS", text(self.switch()))]
    }

    /// Makes an operation (sync, rename, link, write) fail with an error on paths that contain
    /// `part`.
    pub fn set(&self, operation: &str, error: nix::errno::Errno, part: &str) {
        // Renamed into place, so that no program reads half of it.
        let new = self.folder.path().join("new");
        fs::write(&new, format!("{operation} {} {part}\n", error as i32)).expect("a file");
        fs::rename(new, self.switch()).expect("a name");
    }

    /// Lets all calls succeed again.
    pub fn clear(&self) {
        fs::remove_file(self.switch()).expect("there are faults");
    }

    fn switch(&self) -> PathBuf {
        self.folder.path().join("faults")
    }
}
