//! Programs that can be killed at a failpoint, or stopped there.
//!
//! They are the programs that users run, with a function for the failpoints: with
//! `GANGLION_FAILPOINT=POINT@NUMBER:FILE` in its environment, the first process of a run that reaches the point with
//! that number creates the file and kills itself. The others find the file and go on. With the prefix `hang:`, only
//! the thread at the point stops, for ever. With `GANGLION_PAUSE=POINT:MILLISECONDS` each thread sleeps
//! whenever it is there.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, raise};

/// Environment variable with the failpoint.
pub const VARIABLE: &str = "GANGLION_FAILPOINT";
/// Environment variable with a pause.
pub const PAUSE: &str = "GANGLION_PAUSE";

/// Returns the folder of the programs with failpoints that belong to those of another folder: the folder itself for
/// builds of a time when all programs had failpoints.
///
/// # Panics
/// If the folder cannot be written to.
pub fn programs(of: &Path) -> PathBuf {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let names = ["coordinator", "worker"];
    if names.iter().any(|name| !of.join(format!("failing-{name}")).exists()) {
        return of.to_path_buf();
    }
    // A coordinator starts the program named `worker` that lies beside it.
    let folder = of.join("failing");
    fs::create_dir_all(&folder).expect("the folder of the programs can be written to");
    for name in names {
        let new = folder.join(format!("{name}.{}", std::process::id()));
        let _ = fs::remove_file(&new);
        fs::hard_link(of.join(format!("failing-{name}")), &new).expect("a second name for a program");
        fs::rename(&new, folder.join(name)).expect("a second name for a program");
        // Where both names are of one file already, a rename does nothing and leaves both.
        let _ = fs::remove_file(&new);
    }
    folder
}

/// Failpoint requested by the environment.
struct Wanted {
    hang: bool,
    point: String,
    number: u64,
    file: String,
}

/// Kills the process or stops the thread if the environment asks for it at this failpoint.
pub fn obey(point: &str, number: u64) {
    static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
    static PAUSES: OnceLock<Option<(String, Duration)>> = OnceLock::new();
    let pause = || {
        let text = std::env::var(PAUSE).ok()?;
        let (point, time) = text.split_once(':')?;
        Some((point.to_string(), Duration::from_millis(time.parse().ok()?)))
    };
    if let Some((_, time)) = PAUSES.get_or_init(pause).as_ref().filter(|(at, _)| at == point) {
        std::thread::sleep(*time);
    }
    // Read once: this is on the path of each phase.
    let Some(wanted) = WANTED.get_or_init(|| parse(&std::env::var(VARIABLE).ok()?)) else { return };
    if wanted.number == number && wanted.point == point {
        // Creating the file decides which process is the first.
        let first = OpenOptions::new().write(true).create_new(true).open(&wanted.file).is_ok();
        if first && wanted.hang {
            loop {
                // In a loop, since a park may end by itself.
                std::thread::park();
            }
        }
        if first {
            // The effect of `kill -9`: nothing is flushed and no peer is told.
            let _ = raise(Signal::SIGKILL);
        }
    }
}

fn parse(text: &str) -> Option<Wanted> {
    let (hang, text) = text.strip_prefix("hang:").map_or((false, text), |rest| (true, rest));
    let (at, file) = text.split_once(':')?;
    let (point, number) = at.split_once('@')?;
    Some(Wanted { hang, point: point.to_string(), number: number.parse().ok()?, file: file.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_named_with_its_number_and_file() {
        let wanted = parse("commit@12:/tmp/a:b").unwrap();
        assert_eq!((wanted.point.as_str(), wanted.number, wanted.file.as_str()), ("commit", 12, "/tmp/a:b"));
        assert!(!wanted.hang && parse("hang:commit@12:/tmp/a").unwrap().hang);
        assert!(parse("commit").is_none() && parse("commit@x:/f").is_none());
    }

    #[test]
    fn programs_without_others_beside_them_are_their_own() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(programs(folder.path()), folder.path());
        for name in ["failing-coordinator", "failing-worker"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        for _ in 0..2 {
            let found = programs(folder.path());
            assert_eq!(fs::read_to_string(found.join("worker")).unwrap(), "failing-worker");
            assert_eq!(fs::read_dir(found).unwrap().count(), 2);
        }
    }
}
