//! Failpoints: places where a test can kill a process or stop one of its threads.
//!
//! With `GANGLION_FAILPOINT=POINT@NUMBER:FILE` in its environment, the first process of a run that
//! reaches the point with that number (an update index, a generation or a step; each point says
//! which) creates the file and kills itself. The others find the file and go on. With the prefix
//! `hang:`, only the thread at the point stops, for ever. Without the variable a point costs one
//! comparison.

use std::fs::OpenOptions;
use std::sync::OnceLock;

/// Environment variable with the failpoint.
pub const VARIABLE: &str = "GANGLION_FAILPOINT";

/// Failpoint requested by the environment.
struct Wanted {
    hang: bool,
    point: String,
    number: u64,
    file: String,
}

/// Marks a failpoint: kills the process or stops the thread if the environment asks for it here.
pub fn reached(point: &str, number: u64) {
    static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
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
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
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
}
