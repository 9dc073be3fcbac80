//! Real processes, each with a file descriptor as its handle.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ganglion_proto::log;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::mpsc::UnboundedSender;

use crate::records::logging::LogFormat;
use crate::system::node::start_time;

use super::{Exited, Process, Processes, Spawned, StartOrder};

/// Time limit of `worker gpus`: a driver may have to be loaded first.
// A user waits for this at the prompt, so it errs on the long side.
const COUNT_LIMIT: Duration = Duration::from_secs(60);
/// Maximum length of a line of a worker's log, in bytes; the rest is dropped.
// A worker's panic with a backtrace fits; a binary file that was printed by mistake must not fill this
// process.
const LINE_LIMIT: usize = 16 << 10;
/// Interval at which the end of `worker gpus` is polled.
const LOOK: Duration = Duration::from_millis(5);

/// Launcher of the `worker` program next to this one.
pub struct SystemProcesses {
    program: PathBuf,
    log_format: LogFormat,
}

impl SystemProcesses {
    /// Looks up this program's own folder.
    pub fn new(log_format: LogFormat) -> io::Result<SystemProcesses> {
        Ok(SystemProcesses { program: beside_this()?, log_format })
    }
}

/// Expected path of the `worker` program.
fn beside_this() -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.canonicalize()?.with_file_name("worker"))
}

/// Path of the `worker` program next to this one.
///
/// # Errors
/// The program does not exist.
pub fn worker_program() -> io::Result<PathBuf> {
    let program = beside_this()?;
    check(&program).map(|()| program)
}

fn check(program: &Path) -> io::Result<()> {
    if program.is_file() {
        return Ok(());
    }
    let what = format!("{}: no such program; build it with `cargo build --release`", program.display());
    Err(io::Error::new(io::ErrorKind::NotFound, what))
}

impl Processes for SystemProcesses {
    fn check_program(&self) -> io::Result<()> {
        check(&self.program)
    }

    /// Asks the program itself: it counts by the same rules by which it chooses a GPU,
    /// `CUDA_VISIBLE_DEVICES` included, and without a driver or a build for GPUs it reports none.
    fn count_gpus(&self) -> io::Result<u32> {
        self.check_program()?;
        let mut counting = std::process::Command::new(&self.program)
            .arg("gpus")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let end = Instant::now() + COUNT_LIMIT;
        while counting.try_wait()?.is_none() {
            if Instant::now() > end {
                // A driver that hangs would hold the start for ever.
                counting.kill()?;
                counting.wait()?;
                let what = format!("`worker gpus` did not end within {} s", COUNT_LIMIT.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            // Blocking: the coordinator counts before it serves any client.
            std::thread::sleep(LOOK);
        }
        let said = counting.wait_with_output()?;
        let text = String::from_utf8_lossy(&said.stdout);
        text.trim().parse().map_err(|_| {
            let errors = String::from_utf8_lossy(&said.stderr);
            let last = errors.lines().last().or(text.lines().last()).unwrap_or_default();
            io::Error::other(format!("`worker gpus` ended with {}: {last}", said.status))
        })
    }

    fn start(&mut self, order: StartOrder) -> io::Result<(Box<dyn Process>, Spawned)> {
        self.check_program()?;
        let mut child = Command::new(&self.program)
            .args(["--coordinator", &order.url])
            .args(order.trace.iter().flat_map(|file| [OsStr::new("--trace"), file.as_os_str()]))
            .envs(order.environment)
            .env("GANGLION_SPAWN_TOKEN", &order.token)
            .env("LOCAL_RANK", order.local_rank.to_string())
            .env(log::VARIABLE, self.log_format.to_string())
            .stdin(Stdio::null())
            // The coordinator's own standard output has its last line alone.
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Invariant 1: Ctrl-C is for the coordinator, which stops the workers in order.
            .process_group(0)
            .spawn()?;
        let pid = child.id().unwrap_or_default();
        let lines = child.stderr.take();
        // Opened before the process can be reaped, so the number is still its own.
        let handle = Handle(open(pid).map(Arc::new));
        // A start time that cannot be read is 0, which no later look-up matches: the process is not
        // adopted, and never mistaken.
        let spawned = Spawned { pid, started: start_time(pid).unwrap_or_default() };
        // Owns the child from here on: it alone reaps, so the number stays the process's until the exit
        // is reported.
        tokio::spawn(watch(child, lines, order.name, order.token, order.exits));
        Ok((Box::new(handle), spawned))
    }

    fn find(
        &mut self,
        token: &str,
        process: Spawned,
        exits: UnboundedSender<Exited>,
    ) -> Option<Box<dyn Process>> {
        let Spawned { pid, started } = process;
        // The handle is opened before the start time is read: the number cannot be reused in between.
        let handle = Arc::new(open(pid)?);
        // The number was reused: another process must be neither adopted nor killed.
        if start_time(pid) != Some(started) {
            return None;
        }
        tokio::spawn(watch_adopted(handle.clone(), pid, token.to_string(), exits));
        Some(Box::new(Handle(Some(handle))))
    }
}

/// Handle of a process; `None` on a system without pidfds.
struct Handle(Option<Arc<OwnedFd>>);

impl Handle {
    fn send(&self, signal: Signal) {
        if let Some(process) = &self.0 {
            // An error means that the process has ended, which is what the signal is for.
            let _ = pidfd_send_signal(process, signal);
        }
    }
}

impl Process for Handle {
    fn kill(&self) {
        self.send(Signal::KILL);
    }

    fn ask_to_end(&self) {
        self.send(Signal::TERM);
    }
}

fn open(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::NONBLOCK).ok()
}

/// Follows one child: its log lines, then its end.
async fn watch(
    mut child: Child,
    lines: Option<ChildStderr>,
    name: Arc<Mutex<String>>,
    token: String,
    exits: UnboundedSender<Exited>,
) {
    let mut last_words = None;
    if let Some(lines) = lines {
        let mut lines = BufReader::new(lines);
        // Waits as long as the process lives: the pipe ends with its last writer.
        while let Some(line) = next_line(&mut lines).await {
            // Locked per line, since the label changes once the worker has a rank. Not held over an await.
            let name = name.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(error) = forward(&name, &line) {
                last_words = Some(error);
            }
        }
    }
    let pid = child.id().unwrap_or_default();
    // After the end of the log, so that `last_words` has the final error.
    let status = child.wait().await;
    let input_error = status.as_ref().is_ok_and(|status| status.code() == Some(2));
    let mut status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
    if let Some(words) = last_words {
        status = format!("{status}: {words}");
    }
    // Fails only once the shell has ended, which then needs no exit.
    let _ = exits.send(Exited { token, pid, status, input_error });
}

/// Next line of a worker's log, without its end. Any bytes are accepted, since a worker prints
/// names and paths as they are. A line that is too long is cut.
async fn next_line(lines: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    let mut cut = false;
    let mut any = false;
    // An error ends the log as its end does: the pipe gives no more.
    while let Ok(bytes) = lines.fill_buf().await
        && !bytes.is_empty()
    {
        any = true;
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let part = &bytes[..end.unwrap_or(bytes.len())];
        // The rest is read and dropped, so that the worker never blocks on a full pipe.
        let room = LINE_LIMIT - line.len();
        line.extend_from_slice(&part[..part.len().min(room)]);
        cut |= part.len() > room;
        let read = end.map_or(bytes.len(), |end| end + 1);
        lines.consume(read);
        if end.is_some() {
            break;
        }
    }
    let text = String::from_utf8_lossy(&line);
    any.then(|| format!("{}{}", text.trim_end_matches('\r'), if cut { " ..." } else { "" }))
}

/// Waits for the end of a process that is not a child of this one. Only its parent could learn its
/// exit status.
async fn watch_adopted(process: Arc<OwnedFd>, pid: u32, token: String, exits: UnboundedSender<Exited>) {
    let wait = move || {
        let mut ends = [PollFd::new(&process, PollFlags::IN)];
        while poll(&mut ends, None) == Err(Errno::INTR) {}
    };
    // A blocking thread, since `poll` on the pidfd has no limit: it ends with the process.
    let _ = tokio::task::spawn_blocking(wait).await;
    let status = "an unknown status: it was started by an earlier coordinator".to_string();
    let _ = exits.send(Exited { token, pid, status, input_error: false });
}

/// Logs a worker's line at the level that the worker gave it; returns the text of an error.
fn forward(name: &str, line: &str) -> Option<String> {
    if let Some(line) = log::parse(line) {
        return forward_structured(line);
    }
    let (level, text) = line.trim_start().split_once(' ').unwrap_or(("", line));
    let text = text.trim();
    match level {
        "ERROR" => {
            // Logged at a low level: it is reported once, as the reason why the worker ended.
            tracing::debug!(worker = name, "{text}");
            return Some(text.to_string());
        }
        "WARN" => tracing::warn!(worker = name, "{text}"),
        "INFO" => tracing::info!(worker = name, "{text}"),
        "DEBUG" | "TRACE" => tracing::debug!(worker = name, "{text}"),
        _ => tracing::warn!(worker = name, "{}", line.trim_end()),
    }
    None
}

/// Like `forward`, for a line of the structured log, which carries its place in the run.
fn forward_structured(line: log::Line) -> Option<String> {
    let log::Line { level, message, worker, rank, generation, step } = line;
    match level.as_str() {
        "ERROR" => {
            tracing::debug!(worker, rank, generation, step, "{message}");
            return Some(message);
        }
        "WARN" => tracing::warn!(worker, rank, generation, step, "{message}"),
        "INFO" => tracing::info!(worker, rank, generation, step, "{message}"),
        _ => tracing::debug!(worker, rank, generation, step, "{message}"),
    }
    None
}

#[cfg(test)]
mod tests {
    use ganglion_membership::WorkerId;

    use super::*;
    use crate::journal::ChildRow;
    use crate::system::node::{Node, Relation};
    use crate::workers::{Adoption, Supervisor};

    fn row(pid: u32, started: u64) -> ChildRow {
        ChildRow {
            token: "t".to_string(),
            local_rank: 1,
            process: Some(Spawned { pid, started }),
            node: Node::here(),
            worker: Some(WorkerId(7)),
            ended: false,
        }
    }

    /// A stand-in for the `worker` program. A shell writes it: a process that another test starts meanwhile
    /// would inherit this process's open file, and a program that is open for writing cannot be executed.
    fn script(folder: &tempfile::TempDir, text: &str) -> SystemProcesses {
        let program = folder.path().join("worker");
        let write = r##"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""##;
        let written = std::process::Command::new("sh").args(["-c", write]).arg(&program).arg(text).status();
        assert!(written.unwrap().success());
        SystemProcesses { program, log_format: LogFormat::Text }
    }

    #[test]
    fn the_worker_program_counts_the_gpus_and_its_failure_is_told() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(script(&folder, "[ \"$1\" = gpus ] && echo 4").count_gpus().unwrap(), 4);
        let failed = script(&folder, "echo 'no libcudart.so' >&2; exit 127").count_gpus().unwrap_err();
        assert!(failed.to_string().contains("127: no libcudart.so"), "{failed}");
        let none = script(&folder, "echo many").count_gpus().unwrap_err();
        assert!(none.to_string().contains("many"), "{none}");
        let missing = SystemProcesses { program: folder.path().join("none"), log_format: LogFormat::Text };
        assert!(missing.count_gpus().unwrap_err().to_string().contains("no such program"));
    }

    #[tokio::test]
    async fn a_log_of_any_bytes_is_read_to_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let text = r"printf 'WARN caf\351.png is left out\n' >&2
            head -c 300000 /dev/zero | tr '\0' x >&2
            printf '\nERROR no such file: \377.png' >&2
            exit 2";
        let (exits, mut exited) = tokio::sync::mpsc::unbounded_channel();
        let mut supervisor = Supervisor::new(Box::new(script(&folder, text)), exits);
        supervisor.spawn("http://x", "t".to_string(), 0, None).unwrap();
        let exit = exited.recv().await.unwrap();
        assert!(exit.input_error);
        assert_eq!(exit.status, "exit status: 2: no such file: \u{fffd}.png");
    }

    #[tokio::test]
    async fn a_line_of_a_log_is_bounded() {
        let log = [&[b'a'; 3 * LINE_LIMIT][..], b"\n\r\n\xff\nend"].concat();
        // A buffer that cuts lines anywhere.
        let mut lines = BufReader::with_capacity(7, &log[..]);
        let long = next_line(&mut lines).await.unwrap();
        assert_eq!((long.len(), &long[LINE_LIMIT..]), (LINE_LIMIT + 4, " ..."));
        for line in ["", "\u{fffd}", "end"] {
            assert_eq!(next_line(&mut lines).await.as_deref(), Some(line));
        }
        assert_eq!(next_line(&mut lines).await, None);
    }

    /// A number frees its GPU for the next one, and no two workers have the same.
    #[test]
    fn a_replacement_takes_the_number_of_the_one_that_ended() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        let (exits, mut exited) = tokio::sync::mpsc::unbounded_channel();
        let processes = script(&folder, "echo \"WARN rank $LOCAL_RANK\" >&2; exec sleep 60");
        let mut supervisor = Supervisor::new(Box::new(processes), exits);
        for (rank, token) in ["a", "b", "c", "d"].iter().enumerate() {
            assert_eq!(supervisor.free_rank() as usize, rank);
            supervisor.spawn("http://x", token.to_string(), supervisor.free_rank(), None).unwrap();
            supervisor.claim(token, WorkerId(rank as u64));
        }
        for rank in [2, 1] {
            supervisor.kill(WorkerId(rank));
            let exit = runtime.block_on(exited.recv()).unwrap();
            assert!(supervisor.free_rank() == 4 || rank == 1, "a process that was not reaped keeps its GPU");
            supervisor.reaped(&exit.token);
        }
        assert_eq!(supervisor.free_rank(), 1);
        supervisor.spawn("http://x", "e".to_string(), 1, None).unwrap();
        assert_eq!(supervisor.free_rank(), 2);
        supervisor.kill_all();
        while !supervisor.is_empty() {
            let exit = runtime.block_on(exited.recv()).unwrap();
            supervisor.reaped(&exit.token);
        }
    }

    #[tokio::test]
    async fn a_process_of_an_earlier_coordinator_is_known_by_number_and_start() {
        let mut process = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = process.id();
        let started = start_time(pid).unwrap();
        let (exits, mut exited) = tokio::sync::mpsc::unbounded_channel();
        let mut supervisor = Supervisor::new(Box::new(SystemProcesses::new(LogFormat::Text).unwrap()), exits);
        let here = Node::here();
        let mut adopt = |row: ChildRow| supervisor.adopt(&row, &here);
        assert_eq!(adopt(row(pid, started + 1)), Adoption::Ended, "another process has its number now");
        let rebooted = Node { boot: "another".to_string(), ..here.clone() };
        let before = adopt(ChildRow { node: rebooted.clone(), ..row(pid, started) });
        assert_eq!(before == Adoption::Ended, here.relation(&rebooted) == Relation::Before);
        let moved = Node { host: "another".to_string(), ..rebooted };
        assert_eq!(adopt(ChildRow { node: moved, ..row(pid, started) }), Adoption::Elsewhere);
        assert!(supervisor.has_token("t"), "it may say hello with its token");
        assert!(supervisor.may_be(WorkerId(7), Some("t")) && !supervisor.may_be(WorkerId(7), None));
        assert!(supervisor.is_empty(), "and is none of this machine's");
        assert_eq!(supervisor.adopt(&row(pid, started), &here), Adoption::Runs);
        assert_eq!(supervisor.free_rank(), 0);
        supervisor.kill(WorkerId(7));
        let exit = exited.recv().await.unwrap();
        assert_eq!((supervisor.reaped(&exit.token), exit.pid), (Some(WorkerId(7)), pid));
        process.wait().unwrap();
        assert_eq!(supervisor.adopt(&row(pid, started), &here), Adoption::Ended);
    }
}
