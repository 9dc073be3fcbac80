//! `--detach`: a coordinator that continues without its terminal.
//!
//! 1. The program starts itself once more, in a session of its own. That process prints to the
//!    launcher's output until the run has started; then its lines go to a file in the run
//!    directory.
//! 2. So a failed start prints the same and ends with the same exit code as without `--detach`.
//! 3. The launcher may die at any moment. Signals to the launcher are passed on to the coordinator
//!    only while it waits for the start.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};

use crate::error::Failure;
use crate::records::progress::Screen;

/// Name of the log in the run directory.
pub(crate) const LOG_FILE: &str = "coordinator.log";

/// Message to the launcher: the run has started.
#[derive(Debug, Serialize, Deserialize)]
struct Started {
    name: String,
    folder: PathBuf,
}

/// Result of a launch.
pub(crate) enum Launched {
    /// The run has started; the text is for the user.
    GoesOn(String),
    /// The coordinator ended before, with this exit code.
    Ended(ExitCode),
}

/// Starts a coordinator with this process's arguments, and returns once its run has started or ended.
pub(crate) async fn launch() -> Result<Launched, Failure> {
    if std::process::id() == 1 {
        return Err(Failure::Input(
            "--detach: this is the first process of a container, which would end with it; leave --detach out, and let \
             the container run in the background"
                .to_string(),
        ));
    }
    let failed = |error: io::Error| Failure::Other(format!("--detach: {error}"));
    // The socket takes the place of standard input: a link that exactly one process inherits, without a
    // number on a command line.
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let mut child = Command::new(std::env::current_exe().map_err(failed)?)
        .args(std::env::args_os().skip(1))
        .arg("--detached")
        .stdin(OwnedFd::from(theirs))
        .spawn()
        .map_err(failed)?;
    let process =
        Pid::from_raw(i32::try_from(child.id()).expect("the system's process numbers are positive"));
    // Without a limit: a start may have to wait for an unreachable storage.
    let report = hear(ours, process).await.map_err(failed)?;
    match serde_json::from_slice::<Started>(&report) {
        Ok(Started { name, folder }) => {
            let (log, folder) = (folder.join(LOG_FILE), folder.display());
            let log = log.display();
            Ok(Launched::GoesOn(format!(
                "run {name} goes on without this terminal, as process {process}; its log is {log}\n\
                 look at it with: coordinator status {folder}\n\
                 stop it with: coordinator stop {folder}"
            )))
        }
        Err(_) => Ok(Launched::Ended(code_of(child.wait().map_err(failed)?))),
    }
}

/// Reads until the coordinator closes its end, and passes on signals meanwhile.
async fn hear(from: UnixStream, process: Pid) -> io::Result<Vec<u8>> {
    from.set_nonblocking(true)?;
    let mut from = tokio::net::UnixStream::from_std(from)?;
    // From here on a signal is passed on, and does not end the launcher alone.
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut report = Vec::new();
    let reading = from.read_to_end(&mut report);
    tokio::pin!(reading);
    loop {
        let stop = tokio::select! {
            // Ends when the coordinator closes its end, by starting or by dying: the launcher cannot
            // outwait it.
            read = &mut reading => {
                read?;
                break;
            }
            _ = interrupt.recv() => Signal::SIGINT,
            _ = terminate.recv() => Signal::SIGTERM,
        };
        // The process may just have ended, which the next read shows.
        let _ = kill(process, stop);
    }
    Ok(report)
}

fn code_of(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// Link from a launched coordinator to its launcher, until the run has started.
pub struct Launch {
    launcher: UnixStream,
    screen: Screen,
    log: Option<File>,
}

impl Launch {
    /// Leaves the launcher's session and takes over the link from standard input.
    pub fn join(screen: &Screen) -> io::Result<Launch> {
        // A closed terminal then sends it no SIGHUP, and Ctrl-C reaches the launcher alone.
        setsid()?;
        let launcher = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        Ok(Launch { launcher, screen: screen.clone(), log: None })
    }

    /// Link to a launcher at the other end of a socket.
    #[cfg(test)]
    pub(super) fn to(launcher: UnixStream, screen: &Screen) -> Launch {
        Launch { launcher, screen: screen.clone(), log: None }
    }

    /// Opens the log; all later output goes there as well.
    pub fn open_log(&mut self, folder: &Path) -> Result<(), Failure> {
        let file = folder.join(LOG_FILE);
        let unusable = |error: io::Error| Failure::Input(format!("--detach: {}: {error}", file.display()));
        let mut options = OpenOptions::new();
        let log = options.append(true).create(true).mode(0o600).open(&file).map_err(unusable)?;
        self.screen.copy_to(Some(log.try_clone().map_err(unusable)?));
        self.log = Some(log);
        Ok(())
    }

    /// Reports the start of the run to the launcher, and leaves the terminal.
    pub fn started(self, name: &str, folder: &Path) -> io::Result<()> {
        let Launch { mut launcher, screen, log } = self;
        let log = log.ok_or_else(|| io::Error::other("the log was not opened"))?;
        // Standard error becomes the log itself: a copy would write each line twice.
        screen.copy_to(None);
        let nothing = File::open("/dev/null")?;
        // Before the launcher hears of the start: it returns then, its terminal may be closed at once,
        // and a write there would fail.
        dup2_stdin(&nothing)?;
        dup2_stdout(&log)?;
        dup2_stderr(&log)?;
        let started = Started { name: name.to_string(), folder: folder.to_path_buf() };
        // The write fails if the terminal was closed meanwhile; the run continues all the same.
        let _ = launcher.write_all(serde_json::to_string(&started).map_err(io::Error::from)?.as_bytes());
        Ok(())
    }
}
