//! Support of the end-to-end tests: real coordinators and workers, each run in a folder of its own.
//!
//! 1. No test sleeps for a fixed time and hopes: it waits for an event of the run, at most
//!    [`LIMIT`].
//! 2. Nothing is left behind: processes are killed and folders removed when their owner is dropped,
//!    also the local workers of a run, which outlive their coordinator.
#![forbid(unsafe_code)]

pub mod disk;
pub mod failpoint;
pub mod measured;
pub mod package;
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

/// Time limit of every wait of a test.
pub const LIMIT: Duration = Duration::from_secs(120);
/// Interval at which a file or a process is polled.
const LOOK: Duration = Duration::from_millis(10);
/// Number of recent lines that are searched again on each poll: the awaited line is about to come.
const RECENT: usize = 1000;

/// Variable of workers whose groups reduce over Gloo on one machine too, as between machines.
pub const OVER_GLOO: (&str, &str) = ("GANGLION_SHARED_MEMORY", "off");

/// Multi-layer perceptron that trains in a millisecond or two per step.
pub const SMALL_MLP: &[&str] = &["model.width=16", "model.latent_dim=8", "job.shard_batch=2"];
/// Convolutional pair with batch normalisation, equally small.
pub const SMALL_DCGAN: &[&str] =
    &["model.kind=dcgan-28", "model.width=4", "model.latent_dim=8", "job.shard_batch=2"];

/// Returns the path of a program: in the folder `GANGLION_BIN`, or next to this program. For tests
/// it is built if need be.
pub fn program(name: &str) -> PathBuf {
    folder_of_programs().join(name)
}

fn folder_of_programs() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| std::env::var_os("GANGLION_BIN").map_or_else(own_folder, PathBuf::from))
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
    build.args(["-p", "ganglion-failing", "--bins", "--examples"]);
    if release {
        build.arg("--release");
    }
    if cfg!(feature = "cloud") {
        build.args(["--features", "ganglion-coordinator/cloud,ganglion-worker/cloud"]);
    }
    let built = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs tests");
    assert!(built.success(), "the programs do not build");
}

/// Run directory, with the settings of its job.
pub struct Run {
    root: TempDir,
    coordinator: PathBuf,
    settings: Vec<String>,
    events: Mutex<Tail>,
    rows: Mutex<Tail>,
}

impl Run {
    /// Creates a run of the default job with these settings, each `key=value`.
    pub fn new(settings: &[&[&str]]) -> Run {
        let root = tempfile::tempdir().expect("a temporary folder");
        let settings = settings.concat().into_iter().map(str::to_string).collect();
        let tail = |name: &str| Mutex::new(Tail::new(root.path().join("run").join(name)));
        let (events, rows) = (tail("events.jsonl"), tail("metrics.jsonl"));
        Run { root, coordinator: program("coordinator"), settings, events, rows }
    }

    /// Uses the programs of another folder.
    pub fn by(mut self, programs: &Path) -> Run {
        self.coordinator = programs.join("coordinator");
        self
    }

    /// Uses the programs with failpoints.
    pub fn with_failpoints(self) -> Run {
        let folder = failpoint::programs(folder_of_programs());
        assert_ne!(folder, folder_of_programs(), "there are no programs with failpoints: `make build-tests`");
        self.by(&folder)
    }

    /// Runs the coordinator's program with these arguments for this run.
    pub fn ask(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new(&self.coordinator);
        command.args(arguments).arg(self.path(""));
        Process::start(command).wait()
    }

    /// Audits the run from its files.
    pub fn audit(&self) -> Ended {
        let mut command = Command::new(&self.coordinator);
        command.arg("audit").arg(self.path(""));
        Process::start(command).wait()
    }

    /// Asserts that the audit of the run's files succeeds.
    #[track_caller]
    pub fn assert_audited(&self) {
        let audited = self.audit();
        assert_eq!(audited.code, Some(0), "{}", audited.output);
    }

    /// Changes a setting, for coordinators started from now on.
    pub fn set(&mut self, setting: &str) {
        self.settings.push(setting.to_string());
    }

    /// Keeps the folder on drop, for inspection; returns the run directory.
    pub fn keep(&mut self) -> PathBuf {
        self.root.disable_cleanup(true);
        self.path("")
    }

    /// Process ids of the run's workers that are alive.
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

    /// Returns the path of a file or folder in the run directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("run").join(name)
    }

    /// Returns the path of a file or folder beside the run directory.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Starts a coordinator with this number of local workers.
    pub fn start(&self, workers: u32) -> Process {
        self.start_with(&["--workers", &workers.to_string()])
    }

    /// Starts a coordinator with these arguments.
    pub fn start_with(&self, arguments: &[&str]) -> Process {
        Process::start(self.command(arguments))
    }

    /// Starts a coordinator with this number of local workers and these variables in their
    /// environment.
    pub fn start_in(&self, workers: u32, variables: &[(&str, String)]) -> Process {
        let mut command = self.command(&["--workers", &workers.to_string()]);
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        Process::start(command)
    }

    /// Returns the command of a coordinator with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.coordinator);
        command.arg("--run-dir").arg(self.path("")).args(arguments);
        for setting in &self.settings {
            command.args(["--set", setting]);
        }
        command
    }

    /// Trains to the end with this number of local workers; returns the digest of the last state.
    pub fn complete(&self, workers: u32) -> String {
        let ended = self.start(workers).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        self.digest()
    }

    /// Trains to the end with this number of local workers, of which one is killed at a failpoint such as
    /// `commit@5`; returns the digest of the last state.
    pub fn complete_with_a_death(&self, workers: u32, at: &str) -> String {
        let once = self.beside("once");
        let death = (failpoint::VARIABLE, format!("{at}:{}", once.display()));
        let ended = self.start_in(workers, &[death]).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.output);
        assert!(once.exists(), "no worker was killed");
        self.digest()
    }

    /// Returns the state digest of the newest checkpoint.
    pub fn digest(&self) -> String {
        let manifest = fs::read(self.newest_checkpoint().join("manifest.json")).expect("a manifest");
        let manifest: Value = serde_json::from_slice(&manifest).expect("a manifest is JSON");
        manifest["state_digest"].as_str().expect("a digest is text").to_string()
    }

    /// Returns the folder of the newest checkpoint.
    pub fn newest_checkpoint(&self) -> PathBuf {
        let latest = fs::read_to_string(self.path("checkpoints/latest")).expect("a checkpoint");
        self.path("checkpoints").join(latest.trim())
    }

    /// Returns all events so far.
    pub fn events(&self) -> Vec<Value> {
        lines(&self.path("events.jsonl"))
    }

    /// Returns all metrics rows so far.
    pub fn rows(&self) -> Vec<Value> {
        lines(&self.path("metrics.jsonl"))
    }

    /// Waits for an event of this kind that `is` accepts.
    pub fn wait_for(&self, kind: &str, is: impl Fn(&Value) -> bool) -> Value {
        let wanted = |event: &&Value| event["kind"] == kind && is(event);
        eventually(kind, || locked(&self.events).lines().iter().find(wanted).cloned())
    }

    /// Waits until this step was reported; returns the newest reported step.
    pub fn wait_for_step(&self, step: u64) -> u64 {
        let newest = || locked(&self.rows).lines().iter().filter_map(|row| row["step"].as_u64()).max();
        eventually("a step", || newest().filter(|newest| *newest >= step))
    }

    /// Process ids of the members of a generation, by rank.
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

/// Whether a process runs the worker's program: its id may have been reused for another process.
fn is_worker(pid: i32) -> bool {
    is_running(pid) && fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("worker"))
}

/// Digest that other ways of computing must reproduce, with the name of its origin.
pub struct Reference {
    what: String,
    digest: String,
}

impl Reference {
    /// Creates a reference from the digest that `what` gave.
    pub fn new(what: &str, digest: String) -> Reference {
        Reference { what: what.to_string(), digest }
    }

    /// Computes the digest of an undisturbed run of a job.
    pub fn of(settings: &[&[&str]]) -> Reference {
        Reference::new("an undisturbed run", Run::new(settings).complete(1))
    }

    /// Asserts that another way gave the same digest.
    #[track_caller]
    pub fn equals(&self, what: &str, digest: &str) {
        assert_eq!(digest, self.digest, "{what} differs from {}", self.what);
    }

    /// Expected digest, in hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

/// Polls until `look` returns a value.
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

/// Reads a file of JSON lines; an incomplete last line is ignored.
fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

/// Locks a tail. Lines once read are kept, so that each poll of a waiting test only reads the new
/// ones.
fn locked(tail: &Mutex<Tail>) -> MutexGuard<'_, Tail> {
    // A panic in a poll ended that test only; the lines are valid all the same.
    tail.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Growing file of JSON lines, of which each line is read once. A truncated or replaced file is
/// read anew.
pub struct Tail {
    path: PathBuf,
    /// Inode of the file; `read` counts its bytes that were read.
    file: u64,
    read: u64,
    lines: Vec<Value>,
}

impl Tail {
    /// Creates a tail that has read nothing yet; the file need not exist.
    pub fn new(path: PathBuf) -> Tail {
        Tail { path, file: 0, read: 0, lines: Vec::new() }
    }

    /// Returns all lines so far.
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

    /// Returns the first value of `is` among the most recent lines, the newest first.
    pub fn newest<T>(&mut self, is: impl Fn(&Value) -> Option<T>) -> Option<T> {
        self.lines().iter().rev().take(RECENT).find_map(is)
    }

    /// Waits for a line for which `is` returns a value.
    pub fn wait_for<T>(&mut self, what: &str, is: impl Fn(&Value) -> Option<T>) -> T {
        let tail = RefCell::new(self);
        eventually(what, || tail.borrow_mut().newest(&is))
    }
}

/// Sends a signal to a process.
pub fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("the process is there");
}

/// Whether a process runs: it exists, and is not only waiting to be reaped.
pub fn is_running(pid: i32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    state.is_some_and(|stat| !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
}

/// Running coordinator or worker.
pub struct Process {
    child: Child,
    output: TempDir,
}

/// Result of a process that ended.
pub struct Ended {
    /// Exit code; `None` if a signal ended the process.
    pub code: Option<i32>,
    /// Output of the process, both streams.
    pub output: String,
}

impl Process {
    /// Starts a command; its output is kept.
    pub fn start(mut command: Command) -> Process {
        let output = tempfile::tempdir().expect("a temporary folder");
        let file = File::create(output.path().join("output")).expect("a file");
        command.stdin(Stdio::null()).stderr(file.try_clone().expect("a handle")).stdout(file);
        Process { child: command.spawn().expect("the program starts"), output }
    }

    /// Starts a worker that joins the run at `url`.
    pub fn worker(url: &str) -> Process {
        Process::worker_with(url, &[])
    }

    /// Starts a worker with additional environment variables.
    pub fn worker_with(url: &str, variables: &[(&str, &str)]) -> Process {
        let mut command = Command::new(program("worker"));
        command.args(["--coordinator", url]).envs(variables.iter().copied());
        Process::start(command)
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// Returns the output so far.
    pub fn output(&self) -> String {
        fs::read_to_string(self.output.path().join("output")).expect("its output")
    }

    /// Whether the process has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_none()
    }

    /// Waits for the process to end.
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
