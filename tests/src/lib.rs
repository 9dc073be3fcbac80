//! What the end-to-end tests share: real coordinators and workers, each run in a folder of its own.
//!
//! 1. Nothing sleeps and hopes: a test waits for an event of the run, at most [`LIMIT`].
//! 2. Nothing is left behind: processes are killed and folders removed when their owner is dropped, the local
//!    workers of a run too, which outlive their coordinator.
#![forbid(unsafe_code)]

pub mod disk;
pub mod measured;
pub mod wire;

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take before a test gives up on it.
pub const LIMIT: Duration = Duration::from_secs(120);
/// How often a file or a process is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// How many lines of a file are looked at again and again: what is waited for is about to happen.
const RECENT: usize = 1000;

/// A multi-layer perceptron that trains in a millisecond or two a step.
pub const SMALL_MLP: &[&str] = &["model.width=16", "model.latent_dim=8", "job.shard_batch=2"];
/// A convolutional pair with batch normalisation, as small.
pub const SMALL_DCGAN: &[&str] =
    &["model.kind=dcgan-28", "model.width=4", "model.latent_dim=8", "job.shard_batch=2"];

/// The program of that name: in the folder `GANGLION_BIN`, or next to this program. For tests it is built if
/// need be.
pub fn program(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| std::env::var_os("GANGLION_BIN").map_or_else(own_folder, PathBuf::from)).join(name)
}

fn own_folder() -> PathBuf {
    let own = std::env::current_exe().expect("a process knows its program");
    let folder = own.parent().expect("a program is in a folder");
    match folder.parent() {
        Some(profile) if folder.ends_with("deps") => {
            build(profile.ends_with("release"));
            profile.to_path_buf()
        }
        _ => folder.to_path_buf(),
    }
}

fn build(release: bool) {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "-p", "ganglion-coordinator", "-p", "ganglion-worker"]);
    if release {
        build.arg("--release");
    }
    if cfg!(feature = "cloud") {
        build.args(["--features", "ganglion-coordinator/cloud,ganglion-worker/cloud"]);
    }
    let built = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs tests");
    assert!(built.success(), "the programs do not build");
}

/// A run directory, and the settings of its job.
pub struct Run {
    root: TempDir,
    coordinator: PathBuf,
    settings: Vec<String>,
    events: Mutex<Tail>,
    rows: Mutex<Tail>,
}

impl Run {
    /// A new run of the default job with these settings, each `key=value`.
    pub fn new(settings: &[&[&str]]) -> Run {
        let root = tempfile::tempdir().expect("a temporary folder");
        let settings = settings.concat().into_iter().map(str::to_string).collect();
        let tail = |name: &str| Mutex::new(Tail::new(root.path().join("run").join(name)));
        let (events, rows) = (tail("events.jsonl"), tail("metrics.jsonl"));
        Run { root, coordinator: program("coordinator"), settings, events, rows }
    }

    /// The same run by the programs of another folder.
    pub fn by(mut self, programs: &Path) -> Run {
        self.coordinator = programs.join("coordinator");
        self
    }

    /// Asks this run's coordinator for something.
    pub fn ask(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new(&self.coordinator);
        command.args(arguments).arg("--run-dir").arg(self.path(""));
        Process::start(command).wait()
    }

    /// Audits the run from its files.
    pub fn audit(&self) -> Ended {
        let mut command = Command::new(&self.coordinator);
        command.arg("audit").arg(self.path(""));
        Process::start(command).wait()
    }

    /// Proves the run from its files.
    #[track_caller]
    pub fn assert_audited(&self) {
        let audited = self.audit();
        assert_eq!(audited.code, Some(0), "{}", audited.output);
    }

    /// Changes a setting, for coordinators started from now on.
    pub fn set(&mut self, setting: &str) {
        self.settings.push(setting.to_string());
    }

    /// Leaves the folder where it is when this is dropped, for people to look at; returns the run directory.
    pub fn keep(&mut self) -> PathBuf {
        self.root.disable_cleanup(true);
        self.path("")
    }

    /// The processes of the run's workers that are alive.
    pub fn live_workers(&self) -> Vec<i32> {
        let mut events = locked(&self.events);
        let known = events.lines().iter().filter_map(|event| {
            let kind = event["kind"].as_str()?;
            let pid =
                event["pid"].as_i64().filter(|_| kind == "worker_started" || kind == "worker_joined")?;
            i32::try_from(pid).ok()
        });
        let mut pids: Vec<i32> = known.filter(|pid| is_worker(*pid)).collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// A file or folder of the run directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("run").join(name)
    }

    /// A file or folder beside the run directory.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Starts a coordinator with so many local workers.
    pub fn start(&self, workers: u32) -> Process {
        self.start_with(&["--workers", &workers.to_string()])
    }

    /// Starts a coordinator with these arguments.
    pub fn start_with(&self, arguments: &[&str]) -> Process {
        Process::start(self.command(arguments))
    }

    /// Starts a coordinator with so many local workers and these variables in their environment.
    pub fn start_in(&self, workers: u32, variables: &[(&str, String)]) -> Process {
        let mut command = self.command(&["--workers", &workers.to_string()]);
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        Process::start(command)
    }

    /// The command of a coordinator with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.coordinator);
        command.arg("--run-dir").arg(self.path("")).args(arguments);
        for setting in &self.settings {
            command.args(["--set", setting]);
        }
        command
    }

    /// Trains to the end with so many local workers; returns the digest of the last state.
    pub fn complete(&self, workers: u32) -> String {
        let ended = self.start(workers).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        self.digest()
    }

    /// The digest of the newest checkpoint.
    pub fn digest(&self) -> String {
        let manifest = fs::read(self.newest_checkpoint().join("manifest.json")).expect("a manifest");
        let manifest: Value = serde_json::from_slice(&manifest).expect("a manifest is JSON");
        manifest["state_digest"].as_str().expect("a digest is text").to_string()
    }

    /// The folder of the newest checkpoint.
    pub fn newest_checkpoint(&self) -> PathBuf {
        let latest = fs::read_to_string(self.path("checkpoints/latest")).expect("a checkpoint");
        self.path("checkpoints").join(latest.trim())
    }

    /// All events so far.
    pub fn events(&self) -> Vec<Value> {
        lines(&self.path("events.jsonl"))
    }

    /// All rows of metrics so far.
    pub fn rows(&self) -> Vec<Value> {
        lines(&self.path("metrics.jsonl"))
    }

    /// Waits for an event of a kind that `is` wanted.
    pub fn wait_for(&self, kind: &str, is: impl Fn(&Value) -> bool) -> Value {
        let wanted = |event: &&Value| event["kind"] == kind && is(event);
        eventually(kind, || locked(&self.events).lines().iter().find(wanted).cloned())
    }

    /// Waits until a step was reported, and returns the newest that was.
    pub fn wait_for_step(&self, step: u64) -> u64 {
        let newest = || locked(&self.rows).lines().iter().filter_map(|row| row["step"].as_u64()).max();
        eventually("a step", || newest().filter(|newest| *newest >= step))
    }

    /// The process ids of the members of a generation, by rank.
    pub fn pids(&self, generation: u64) -> Vec<i32> {
        let formed = self.wait_for("generation_formed", |event| event["generation"] == generation);
        let members = formed["members"].as_array().expect("members");
        members
            .iter()
            .map(|member| i32::try_from(member["pid"].as_i64().expect("a pid")).expect("a pid"))
            .collect()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        for pid in self.live_workers() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Whether a process runs our program: its number may be another process's by now.
fn is_worker(pid: i32) -> bool {
    is_running(pid) && fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("worker"))
}

/// A digest that must be the same for all, and what it was computed by.
pub struct Reference {
    what: String,
    digest: String,
}

impl Reference {
    /// The digest that `what` gave.
    pub fn new(what: &str, digest: String) -> Reference {
        Reference { what: what.to_string(), digest }
    }

    /// The digest of an undisturbed run of a job.
    pub fn of(settings: &[&[&str]]) -> Reference {
        Reference::new("an undisturbed run", Run::new(settings).complete(1))
    }

    /// Asserts that another way came to the same digest.
    #[track_caller]
    pub fn equals(&self, what: &str, digest: &str) {
        assert_eq!(digest, self.digest, "{what} differs from {}", self.what);
    }

    /// The digest.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

/// Polls until there is something.
pub fn eventually<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "no {what} in {} s", LIMIT.as_secs());
        sleep(LOOK);
    }
}

/// Reads a file of JSON lines; its last line may be under way.
fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

/// Waiting tests poll: the lines that were read are kept, so that a look costs what is new.
fn locked(tail: &Mutex<Tail>) -> MutexGuard<'_, Tail> {
    // A test that failed in a look is over; the lines are right all the same.
    tail.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file of JSON lines that grows, of which each line is read once. One that was cut or replaced is read
/// anew.
pub struct Tail {
    path: PathBuf,
    /// The file's inode, and the bytes of it that were read.
    file: u64,
    read: u64,
    lines: Vec<Value>,
}

impl Tail {
    /// Nothing is read yet, and the file need not be there.
    pub fn new(path: PathBuf) -> Tail {
        Tail { path, file: 0, read: 0, lines: Vec::new() }
    }

    /// All lines so far.
    pub fn lines(&mut self) -> &[Value] {
        if let Ok(new) = self.unread() {
            let whole = new.rfind('\n').map_or("", |end| &new[..=end]);
            self.read += whole.len() as u64;
            self.lines.extend(whole.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")));
        }
        &self.lines
    }

    fn unread(&mut self) -> std::io::Result<String> {
        let mut file = File::open(&self.path)?;
        let about = file.metadata()?;
        if about.ino() != self.file || about.len() < self.read {
            (self.file, self.read) = (about.ino(), 0);
            self.lines.clear();
        }
        file.seek(SeekFrom::Start(self.read))?;
        let mut new = String::new();
        file.read_to_string(&mut new)?;
        Ok(new)
    }

    /// What the newest line gives that gives something, among the most recent lines.
    pub fn newest<T>(&mut self, is: impl Fn(&Value) -> Option<T>) -> Option<T> {
        self.lines().iter().rev().take(RECENT).find_map(is)
    }

    /// Waits for a line that gives something.
    pub fn wait_for<T>(&mut self, what: &str, is: impl Fn(&Value) -> Option<T>) -> T {
        let tail = RefCell::new(self);
        eventually(what, || tail.borrow_mut().newest(&is))
    }
}

/// Sends a signal to a process.
pub fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("the process is there");
}

/// Whether a process runs: there, and not only waiting to be reaped.
pub fn is_running(pid: i32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    state.is_some_and(|stat| !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
}

/// A coordinator or a worker.
pub struct Process {
    child: Child,
    output: TempDir,
}

/// How a process ended.
pub struct Ended {
    /// Its exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// All that it printed.
    pub output: String,
}

impl Process {
    /// Starts a command; what it prints is kept.
    pub fn start(mut command: Command) -> Process {
        let output = tempfile::tempdir().expect("a temporary folder");
        let file = File::create(output.path().join("output")).expect("a file");
        command.stdin(Stdio::null()).stderr(file.try_clone().expect("a handle")).stdout(file);
        Process { child: command.spawn().expect("the program starts"), output }
    }

    /// A worker that joins the run at `url`.
    pub fn worker(url: &str) -> Process {
        Process::worker_with(url, &[])
    }

    /// A worker with variables of the environment of its own.
    pub fn worker_with(url: &str, variables: &[(&str, &str)]) -> Process {
        let mut command = Command::new(program("worker"));
        command.args(["--coordinator", url]).envs(variables.iter().copied());
        Process::start(command)
    }

    /// Its id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(self.output.path().join("output")).expect("its output")
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_none()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return Ended { code: ExitStatus::code(&status), output: self.output() };
            }
            assert!(start.elapsed() < LIMIT, "it does not end; it printed:\n{}", self.output());
            sleep(LOOK);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
