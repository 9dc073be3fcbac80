//! Fixtures of all cells: a finished run, one that goes on, data, a full disk.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use ganglion_tests::disk::Disk;
use ganglion_tests::{Process, Run, SMALL_MLP, send};
use image::{GrayImage, Luma};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// Workers of the run that goes on: one leaves in each cell in which one may.
const WORKERS: u32 = 2;

pub(crate) struct Fixture {
    root: TempDir,
    finished: Run,
    live: Run,
    staying: Run,
    /// Coordinators of the two runs above.
    _processes: [Process; 2],
    drained: AtomicU64,
    /// Disk without a free byte; `None` where none can be mounted.
    disk: Option<Disk>,
    /// Device that is full, none of the machine's; `None` where none can be made.
    pub(crate) device: Option<PathBuf>,
}

impl Fixture {
    pub(crate) fn new() -> Fixture {
        let root = tempfile::tempdir().unwrap();
        let finished = Run::new(&[SMALL_MLP, &["job.steps=2", "job.data_shards=2"]]);
        finished.complete(1);
        let live = Run::new(&[SMALL_MLP, &["job.steps=10000000", "job.failure_deadline=600"]]);
        let trains = live.start(WORKERS);
        let staying = Run::new(&[SMALL_MLP, &["job.steps=2", "job.data_shards=2"]]);
        copy(&finished.path(""), &staying.path(""));
        let stays = staying.start_with(&["--workers", "0", "--stay", "--listen", "127.0.0.1:0"]);
        staying.wait_for("staying", |_| true);
        live.wait_for("generation_formed", |event| event["world_size"] == WORKERS);
        // They would take the processors from all cells, and their coordinator answers all the same.
        live.pids(1).into_iter().for_each(|pid| send(pid, Signal::SIGSTOP));
        let device = root.path().join("device");
        let made = Command::new("mknod").arg(&device).args(["c", "1", "7"]).status();
        let device = made.is_ok_and(|made| made.success()).then_some(device);
        if device.is_none() {
            println!("SKIPPED: a device needs the right to make one (root)");
        }
        let disk = Disk::mount_of("64m", root.path().join("disk"));
        if let Some(disk) = &disk {
            // Each cell needs a run there, and its old output; then there is no room at all.
            for number in 0..crate::ROWS.len() {
                let own = disk.folder.join(number.to_string());
                copy(&finished.path(""), &own.join("run"));
                fs::write(own.join("out"), OLD).unwrap();
            }
            disk.fill_up();
        }
        data(root.path());
        let processes = [trains, stays];
        Fixture {
            root,
            finished,
            live,
            staying,
            _processes: processes,
            drained: AtomicU64::new(0),
            disk,
            device,
        }
    }

    /// A file or folder that all cells share.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Folder on the full disk with a run and an old output.
    pub(crate) fn on_full_disk(&self, row: usize) -> Option<PathBuf> {
        Some(self.disk.as_ref()?.folder.join(row.to_string()))
    }

    /// The run that goes on.
    pub(crate) fn live(&self) -> PathBuf {
        self.live.path("")
    }

    /// A worker of it that no other cell lets leave.
    pub(crate) fn worker(&self) -> u64 {
        self.drained.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Address of a coordinator whose run is complete.
    pub(crate) fn url(&self) -> String {
        let started = self.staying.events().into_iter().rfind(|event| event["kind"] == "coordinator_started");
        started.unwrap()["address"].as_str().unwrap().to_string()
    }

    /// Copies the finished run.
    pub(crate) fn copy_run(&self, to: &Path) {
        copy(&self.finished.path(""), to);
    }
}

/// Content of an output file before the command.
pub(crate) const OLD: &str = "an old file of the user's\n";

/// Copies a folder, its links as links.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy(&path, &target),
            kind if kind.is_symlink() => {
                std::os::unix::fs::symlink(fs::read_link(&path).unwrap(), target).unwrap();
            }
            _ => drop(fs::copy(path, target).unwrap()),
        }
    }
}

/// Writes `pictures`, a folder with a picture that is cut off, and the digits that a classifier needs.
fn data(root: &Path) {
    let pictures = root.join("pictures");
    fs::create_dir(&pictures).unwrap();
    for number in 0..3 {
        GrayImage::from_pixel(28, 28, Luma([number * 50]))
            .save(pictures.join(format!("{number}.png")))
            .unwrap();
    }
    let whole = fs::read(pictures.join("2.png")).unwrap();
    fs::write(pictures.join("2.png"), &whole[..whole.len() / 2]).unwrap();
    let count = 256u32;
    let mut images = File::create(root.join("images")).unwrap();
    let mut labels = File::create(root.join("labels")).unwrap();
    for number in [0x803, count, 28, 28] {
        images.write_all(&number.to_be_bytes()).unwrap();
    }
    for number in [0x801, count] {
        labels.write_all(&number.to_be_bytes()).unwrap();
    }
    for number in 0..count {
        let digit = u8::try_from(number % 10).unwrap();
        images.write_all(&[digit * 20; 28 * 28]).unwrap();
        labels.write_all(&[digit]).unwrap();
    }
}
