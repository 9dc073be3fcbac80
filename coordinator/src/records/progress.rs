//! Progress of a run on standard error: a bar on a terminal, elsewhere a line every few seconds.
//!
//! 1. Rows drive the bar. Times come from the rows, which carry the time of their step's commit;
//!    there is no thread and no sleep in here. For how long nothing was shown is noted, so that the
//!    shell can tell of a run that stands still.
//! 2. All other output to standard error goes through a [`Screen`], so that it does not tear the bar.
//! 3. A closed terminal is not a failure: output to it is dropped.
//! 4. The bar and its text fit a terminal of any width. Where there is little room the bar goes, and
//!    the last parts of the text.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use console::Term;
use ganglion_proto::job::DataKind;
use ganglion_proto::log;
use ganglion_proto::out::{Stderr, fitting};
use ganglion_proto::progress::{grouped, short};
use ganglion_proto::record::MetricsRow;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use super::scalars;

/// Interval between two plain lines, in seconds of training.
// Enough for a log that is read later.
const PLAIN_PERIOD_SECONDS: f64 = 10.0;
/// Weight of the newest row in the moving average of the pace.
const PACE_WEIGHT: f64 = 0.1;
/// Columns of the bar, and of the space behind it.
const BAR_WIDTH: usize = 25;
/// Style with a bar.
const WITH_BAR: &str = "{bar:24.cyan/dim} {wide_msg}";
/// Between the parts of a line.
const BETWEEN: &str = "  ";
/// Style without one.
const WITHOUT_BAR: &str = "{wide_msg}";

/// Standard error, shared by the bar and all other output.
///
/// Each write lifts the bar for a moment. A tracing subscriber writes an event at once, so that
/// `with_writer(move || screen.clone())` keeps the log and the bar apart.
#[derive(Clone, Debug)]
pub struct Screen {
    bars: MultiProgress,
    is_terminal: bool,
    is_silent: bool,
    /// Time at which something was shown last.
    shown: Arc<Mutex<Instant>>,
    /// File that receives a copy of all lines.
    copy: Arc<Mutex<Option<File>>>,
}

impl Screen {
    /// Screen on standard error, with a bar only if it is a terminal.
    pub fn stderr(is_terminal: bool) -> Self {
        let target = match is_terminal {
            true => terminal(Term::buffered_stderr()),
            false => ProgressDrawTarget::hidden(),
        };
        Screen {
            bars: MultiProgress::with_draw_target(target),
            is_terminal,
            is_silent: false,
            shown: Arc::new(Mutex::new(Instant::now())),
            copy: Arc::default(),
        }
    }

    /// Screen that shows nothing.
    pub fn silent() -> Self {
        Screen { is_silent: true, ..Screen::stderr(false) }
    }

    /// Runs a closure that writes to the terminal, with the bar out of its way.
    pub fn suspend<R>(&self, write: impl FnOnce() -> R) -> R {
        self.bars.suspend(write)
    }

    /// Prints a line above the bar, in the form that messages have, without the characters that would
    /// control the terminal. A closed standard error is ignored: it cannot be reported, and training
    /// does not depend on it.
    pub fn print(&self, line: &str) {
        if !self.is_silent {
            self.note_shown();
            let line = log::message(line) + "\n";
            self.suspend(|| Stderr.write_all(line.as_bytes())).ok();
            self.write_copy(line.as_bytes());
        }
    }

    /// Time for which nothing was shown.
    pub fn quiet_for(&self) -> Duration {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    fn note_shown(&self) {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Sets the file that receives a copy of all lines, or none.
    pub fn copy_to(&self, file: Option<File>) {
        *self.copy.lock().unwrap_or_else(PoisonError::into_inner) = file;
    }

    /// Errors are ignored: a failing copy is no reason to keep the line from the screen.
    fn write_copy(&self, bytes: &[u8]) {
        if let Some(file) = &mut *self.copy.lock().unwrap_or_else(PoisonError::into_inner) {
            file.write_all(bytes).ok();
        }
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.suspend(|| Stderr.write(bytes))?;
        self.write_copy(&bytes[..written]);
        Ok(written)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Before the terminal: the copy must have a line that a closed terminal refuses.
        self.write_copy(bytes);
        self.suspend(|| Stderr.write_all(bytes))
    }

    /// A single write, so that the bar does not come back in the middle of a line.
    fn write_fmt(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        self.write_all(text.to_string().as_bytes())
    }

    fn flush(&mut self) -> io::Result<()> {
        Stderr.flush()
    }
}

/// Draw target on a terminal, with at most 20 updates a second.
fn terminal(term: impl TermLike + 'static) -> ProgressDrawTarget {
    ProgressDrawTarget::term_like_with_hz(Box::new(Closable(term)), 20)
}

/// A terminal that may be closed at any moment; its errors are hidden, since the bar's library
/// would panic on them.
#[derive(Debug)]
struct Closable<T>(T);

impl<T: TermLike> TermLike for Closable<T> {
    fn width(&self) -> u16 {
        self.0.width()
    }

    fn height(&self) -> u16 {
        self.0.height()
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_up(n).or(Ok(()))
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_down(n).or(Ok(()))
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_right(n).or(Ok(()))
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_left(n).or(Ok(()))
    }

    fn write_line(&self, s: &str) -> io::Result<()> {
        self.0.write_line(s).or(Ok(()))
    }

    fn write_str(&self, s: &str) -> io::Result<()> {
        self.0.write_str(s).or(Ok(()))
    }

    fn clear_line(&self) -> io::Result<()> {
        self.0.clear_line().or(Ok(()))
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush().or(Ok(()))
    }
}

/// Progress display of one run. See the module documentation.
#[derive(Debug)]
pub struct Progress {
    screen: Screen,
    bar: Option<ProgressBar>,
    total_steps: u64,
    /// Name of the job's samples.
    samples: &'static str,
    pace: Pace,
    /// Time of the row that was last printed as a plain line, in seconds of Unix time.
    printed: Option<f64>,
}

impl Progress {
    /// Creates the display of a run of `total_steps` that continues from `start_step`.
    pub fn new(screen: &Screen, total_steps: u64, start_step: u64, data: DataKind) -> Self {
        let bar = screen.is_terminal.then(|| {
            let bar = screen.bars.add(ProgressBar::new(total_steps));
            bar.set_style(layout().0);
            bar.set_position(start_step);
            bar.set_message(format!("step {start_step}/{total_steps}"));
            bar
        });
        let samples = if data.is_images() { "images" } else { "samples" };
        Progress { screen: screen.clone(), bar, total_steps, samples, pace: Pace::default(), printed: None }
    }

    /// Shows a row of metrics. Rows that were shown before a fault may come again.
    pub fn row(&mut self, row: &MetricsRow) {
        self.pace.add(row.step, row.time);
        let line = self.line(row);
        // Also of one between two plain lines: the next line is near.
        self.screen.note_shown();
        if let Some(bar) = &self.bar {
            // The terminal may have another width than at the last row.
            let (style, room) = layout();
            bar.set_style(style);
            bar.set_position(row.step);
            let parts: Vec<String> = line.split(BETWEEN).map(str::to_string).collect();
            bar.set_message(fitting(&parts, BETWEEN, room));
        } else if self.is_due(row) {
            self.screen.print(&line);
        }
    }

    /// Removes the bar.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Whether a plain line is due: for the first row, the last, and those in between that are far
    /// enough apart. A clock that was set back counts as far enough.
    fn is_due(&mut self, row: &MetricsRow) -> bool {
        let is_near =
            self.printed.is_some_and(|time| (time..time + PLAIN_PERIOD_SECONDS).contains(&row.time));
        let is_due = !is_near || row.step >= self.total_steps;
        if is_due {
            self.printed = Some(row.time);
        }
        is_due
    }

    fn line(&self, row: &MetricsRow) -> String {
        let total = self.total_steps;
        let percent = u128::from(row.step) * 100 / u128::from(total.max(1));
        let rest = total.saturating_sub(row.step);
        let eta = match self.pace.duration_of(rest) {
            Some(eta) if rest > 0 => format!("  ETA {}", short(eta)),
            _ => String::new(),
        };
        // The most important first (4).
        format!(
            "step {}/{total}  {percent}%{eta}  {} {}/s{}  workers {}",
            row.step,
            rounded(row.images_per_second),
            self.samples,
            scalars::in_words(&row.scalars),
            row.world_size,
        )
    }
}

/// Style for the terminal's present width, and the columns that are left for the text.
fn layout() -> (ProgressStyle, usize) {
    let width = usize::from(Term::stderr().size().1);
    let (template, room) = match width.checked_sub(BAR_WIDTH) {
        // Text of at least twice a bar's width beside it.
        Some(room) if room > 2 * BAR_WIDTH => (WITH_BAR, room),
        _ => (WITHOUT_BAR, width),
    };
    (ProgressStyle::with_template(template).expect("the template is well formed"), room)
}

/// Time per step: a moving average over the rows in which the newest weighs most.
#[derive(Debug, Default)]
struct Pace {
    last: Option<(u64, f64)>,
    seconds_per_step: Option<f64>,
}

impl Pace {
    /// Adds that `step` was committed at `time`. Repeated steps, and a clock that was set back, are ignored.
    fn add(&mut self, step: u64, time: f64) {
        let last = self.last.replace((step, time));
        let Some((last_step, last_time)) = last else {
            return;
        };
        // A repeated step says nothing about the pace, and a negative duration would turn the estimate
        // around.
        if step <= last_step || time < last_time {
            return;
        }
        let newest = (time - last_time) / as_f64(step - last_step);
        let average = self.seconds_per_step.unwrap_or(newest);
        self.seconds_per_step = Some(average + PACE_WEIGHT * (newest - average));
    }

    /// Estimated duration of a number of steps; `None` before the second row.
    fn duration_of(&self, steps: u64) -> Option<Duration> {
        let seconds = self.seconds_per_step? * as_f64(steps);
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// Converts a count for estimates, where the last digits of a huge one do not matter.
fn as_f64(count: u64) -> f64 {
    count as f64
}

/// Renders a number rounded to an integer, its digits grouped by three.
fn rounded(number: f64) -> String {
    let digits = format!("{number:.0}");
    digits.parse().map_or(digits, grouped)
}

#[cfg(test)]
mod tests {
    use super::super::metrics::row_of;
    use super::*;

    fn progress(total_steps: u64) -> Progress {
        Progress::new(&Screen::stderr(false), total_steps, 0, DataKind::Mnist10k)
    }

    fn row(step: u64, time: f64) -> MetricsRow {
        MetricsRow { time, ..row_of(step) }
    }

    #[test]
    fn a_line_tells_all() {
        let mut progress = progress(20_000);
        progress.pace.add(1190, 100.0);
        progress.pace.add(1200, 100.05);
        assert_eq!(
            progress.line(&row_of(1200)),
            "step 1200/20000  6%  ETA 1m 34s  8,123 images/s  loss D 1.250 G 0.300  workers 2"
        );
        assert!(!progress.line(&row_of(20_000)).contains("ETA"));
    }

    /// Invariant 1.
    #[test]
    fn plain_lines_are_spaced_by_the_time_of_the_rows() {
        let mut progress = progress(100);
        let mut due = |step, time| progress.is_due(&row(step, time));
        assert!(due(1, 1000.0));
        assert!(!due(2, 1009.9));
        assert!(due(3, 1010.0));
        assert!(!due(4, 1015.0));
        // The clock was set back.
        assert!(due(5, 500.0));
        assert!(!due(6, 501.0));
        assert!(due(100, 502.0));
    }

    #[test]
    fn the_pace_follows_the_rows_and_survives_repetitions() {
        let mut pace = Pace::default();
        assert_eq!(pace.duration_of(10), None);
        pace.add(10, 100.0);
        pace.add(20, 105.0);
        assert_eq!(pace.duration_of(10), Some(Duration::from_secs(5)));
        pace.add(10, 106.0);
        pace.add(10, 50.0);
        assert_eq!(pace.duration_of(10), Some(Duration::from_secs(5)));
        pace.add(20, 60.0);
        assert_eq!(pace.duration_of(10), Some(Duration::from_millis(5500)));
    }

    #[test]
    fn a_terminal_shows_a_bar_and_nothing_panics() {
        for is_terminal in [false, true] {
            let screen = Screen::stderr(is_terminal);
            let mut progress = Progress::new(&screen, 10, 2, DataKind::Mnist10k);
            for step in 3..=10 {
                progress.row(&row_of(step));
            }
            screen.print("a message");
            writeln!(screen.clone(), "a log line").unwrap();
            progress.finish();
        }
    }

    /// A terminal that was closed.
    #[derive(Debug)]
    struct Closed;

    impl TermLike for Closed {
        fn width(&self) -> u16 {
            80
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn move_cursor_down(&self, n: usize) -> io::Result<()> {
            self.move_cursor_up(n)
        }
        fn move_cursor_right(&self, n: usize) -> io::Result<()> {
            self.move_cursor_up(n)
        }
        fn move_cursor_left(&self, n: usize) -> io::Result<()> {
            self.move_cursor_up(n)
        }
        fn write_line(&self, _: &str) -> io::Result<()> {
            self.move_cursor_up(1)
        }
        fn write_str(&self, _: &str) -> io::Result<()> {
            self.move_cursor_up(1)
        }
        fn clear_line(&self) -> io::Result<()> {
            self.move_cursor_up(1)
        }
        fn flush(&self) -> io::Result<()> {
            self.move_cursor_up(1)
        }
    }

    /// Invariant 3.
    #[test]
    fn a_terminal_that_is_closed_ends_nothing() {
        let bars = MultiProgress::with_draw_target(terminal(Closed));
        let screen = Screen { bars, is_terminal: true, ..Screen::stderr(false) };
        let mut progress = Progress::new(&screen, 10, 2, DataKind::Mnist10k);
        progress.row(&row_of(3));
        screen.print("a message");
        progress.finish();
    }

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([8123.4, 999.6, 12.0].map(rounded), ["8,123", "1,000", "12"]);
        assert_eq!(rounded(f64::NAN), "NaN");
    }
}
