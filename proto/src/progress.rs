//! Progress of a command, on standard error.
//!
//! 1. A command that is done within [`QUIET`] shows none. From then on one line is drawn over and
//!    over on a terminal; elsewhere a line comes every [`PERIOD`].
//! 2. A thread of its own shows it, so that a command that waits for a disk or another machine is
//!    not silent either.
//! 3. It is gone when the command has ended.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::Level;

use crate::out;

/// Time for which a command may say nothing.
pub const QUIET: Duration = Duration::from_secs(2);
/// Interval between two lines where there is no terminal.
pub const PERIOD: Duration = Duration::from_secs(5);
/// Interval at which the line on a terminal is drawn.
const REDRAW: Duration = Duration::from_millis(200);

/// Progress of one command, until it is dropped.
#[derive(Debug)]
pub struct Progress(Option<(Arc<Shared>, Option<JoinHandle<()>>)>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug)]
struct State {
    /// Name of the part at hand.
    doing: String,
    done: u64,
    /// Count at which the part is done; 0 where nothing is counted.
    of: u64,
    /// Begin of the part.
    since: Instant,
    has_ended: bool,
}

impl Progress {
    /// Progress that nobody sees.
    pub fn off() -> Progress {
        Progress(None)
    }

    /// Begins a command with a part whose work is not counted.
    pub fn start(doing: &str) -> Progress {
        let state =
            State { doing: doing.to_string(), done: 0, of: 0, since: Instant::now(), has_ended: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), ended: Condvar::new() });
        let own = shared.clone();
        // Without a thread there is no progress; the command works all the same.
        let thread = std::thread::Builder::new().name("progress".to_string()).spawn(move || own.show());
        Progress(Some((shared, thread.ok())))
    }

    /// Begins the next part, of `of` pieces; 0 where they are not counted.
    pub fn part(&self, doing: &str, of: u64) {
        self.change(|state| {
            (state.done, state.of, state.since) = (0, of, Instant::now());
            state.doing = doing.to_string();
        });
    }

    /// Adds pieces that are done.
    pub fn add(&self, pieces: u64) {
        self.change(|state| state.done += pieces);
    }

    /// Sets the number of pieces that are done, and of all.
    pub fn set(&self, done: u64, of: u64) {
        self.change(|state| (state.done, state.of) = (done, of));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        if let Some((shared, _)) = &self.0 {
            change(&mut shared.lock());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let Some((shared, thread)) = self.0.take() else { return };
        shared.lock().has_ended = true;
        shared.ended.notify_all();
        // Waited for, so that nothing is drawn behind the command's last words (3).
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self) {
        let (begun, can_draw) = (Instant::now(), out::can_draw());
        let mut pause = QUIET;
        while let Some(parts) = self.parts_after(pause, begun) {
            // Without the lock: a terminal that stands still must not hold the command up.
            pause = if can_draw {
                out::draw(&parts);
                REDRAW
            } else {
                out::tell(Level::INFO, &parts.join(", "));
                PERIOD
            };
        }
        if can_draw {
            out::clear();
        }
    }

    /// Waits, then returns what to show; `None` at the end of the command.
    fn parts_after(&self, pause: Duration, begun: Instant) -> Option<Vec<String>> {
        let waited = self.ended.wait_timeout_while(self.lock(), pause, |state| !state.has_ended);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (!state.has_ended).then(|| state.parts(begun.elapsed()))
    }
}

impl State {
    /// Parts of the line, the most important first: a narrow terminal shows the beginning.
    fn parts(&self, elapsed: Duration) -> Vec<String> {
        let State { doing, done, of, .. } = self;
        let elapsed = short(elapsed);
        if *of == 0 {
            return vec![format!("{doing}: {elapsed}")];
        }
        let percent = u128::from(*done) * 100 / u128::from(*of);
        let counts = format!("{doing}: {} of {} ({percent}%)", grouped(*done), grouped(*of));
        let left = self.left().map(|left| format!("ETA {}", short(left)));
        [Some(counts), left, Some(format!("{elapsed} so far"))].into_iter().flatten().collect()
    }

    /// Time that the rest of the part takes at its pace so far; `None` before there is one.
    fn left(&self) -> Option<Duration> {
        let (part, done) = (self.since.elapsed(), self.done.min(self.of));
        if done == 0 || part < QUIET {
            return None;
        }
        #[allow(clippy::cast_precision_loss)] // an estimate
        let rest = (self.of - done) as f64 / done as f64;
        Duration::try_from_secs_f64(part.as_secs_f64() * rest).ok()
    }
}

/// Renders a count, its digits grouped by three.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Renders a duration in its two largest units.
pub fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {:02}s", seconds % 60),
        3600..86_400 => format!("{hours}h {:02}m", minutes % 60),
        _ => format!("{days}d {:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_the_part_how_far_it_is_and_how_long_it_takes() {
        let since = Instant::now().checked_sub(Duration::from_secs(30)).unwrap();
        let state =
            State { doing: "samples".to_string(), done: 25_000, of: 100_000, since, has_ended: false };
        let line = state.parts(Duration::from_secs(100)).join(", ");
        assert_eq!(line, "samples: 25,000 of 100,000 (25%), ETA 1m 30s, 1m 40s so far");
        let uncounted = State { of: 0, ..state };
        assert_eq!(uncounted.parts(Duration::from_secs(3)), ["samples: 3s"]);
    }

    /// Invariants 1 and 3: what ends soon shows nothing, and its end is not waited for.
    #[test]
    fn a_command_that_ends_soon_is_not_held_up() {
        let begun = Instant::now();
        let progress = Progress::start("nothing");
        progress.part("samples", 3);
        progress.add(1);
        progress.set(2, 3);
        drop(progress);
        Progress::off().add(1);
        assert!(begun.elapsed() < QUIET);
    }

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        let short_of = |seconds| short(Duration::from_secs(seconds));
        assert_eq!([59, 90, 7500, 200_000].map(short_of), ["59s", "1m 30s", "2h 05m", "2d 07h"]);
    }
}
