//! A line for a run of which nothing was shown for a while: what it does, or waits for.
//!
//! While the line changes, as steps do, it comes every [`PAUSE`]. One that stays the same comes less
//! and less often, so that a night of waiting does not fill a log.

use std::time::Duration;

use super::Shell;

/// Time for which nothing may be shown.
const PAUSE: Duration = Duration::from_secs(5);
/// Longest time between two lines that are the same.
const PAUSE_LIMIT: Duration = Duration::from_secs(600);

/// The newest line.
#[derive(Debug, Default)]
pub(super) struct Still {
    line: String,
    pause: Duration,
}

impl Still {
    /// Whether a line is due after a time in which nothing was shown.
    fn is_due(&mut self, line: &str, quiet: Duration) -> bool {
        if self.line != line {
            *self = Still { line: line.to_string(), pause: PAUSE };
        }
        let is_due = quiet >= self.pause;
        if is_due {
            self.pause = (2 * self.pause).min(PAUSE_LIMIT);
        }
        is_due
    }
}

impl Shell {
    /// Tells the user what happens, if nothing was shown for a while.
    pub(super) fn tell_if_still(&mut self) {
        let quiet = self.records.quiet_for();
        // Most of the time there is no line to make.
        if quiet < PAUSE {
            return;
        }
        let line = self.what_happens();
        if self.still.is_due(&line, quiet) {
            self.records.message(&line);
        }
    }

    fn what_happens(&self) -> String {
        let (local, known) = (self.machine.local_workers(), self.workers.len());
        match self.machine.stage() {
            "gathering" if known == 0 && local == 0 => {
                format!("waiting for workers; start one with: worker --coordinator {}", self.invitation)
            }
            "gathering" if self.machine.samples().is_none() => {
                "waiting for workers to load data and networks".to_string()
            }
            "gathering" => "waiting for workers before training begins".to_string(),
            "reconnecting" => "waiting for the workers that train already to connect".to_string(),
            "regrouping" => "waiting for workers to leave their group".to_string(),
            "closing" => "waiting for the last state to be saved".to_string(),
            _ if self.is_stuck => "waiting for the journal to be written".to_string(),
            stage => self.step_at_work().unwrap_or_else(|| stage.to_string()),
        }
    }

    /// Step of which workers have committed a part, by their heartbeats; `None` before the first.
    fn step_at_work(&self) -> Option<String> {
        let heard = self.workers.values().filter_map(|known| known.heard);
        let furthest = heard.map(|(_, progress, _)| progress.position.0).max()?;
        let step = furthest / self.job.phases_per_step().max(1) + 1;
        let members = self.machine.group().map_or(0, |group| group.members.len());
        let last = self.machine.samples().or(self.samples).map(|samples| self.job.last_step(samples));
        Some(at_work(step, last, members))
    }
}

/// Line of workers that have committed all before a step, of a run with `last` steps.
fn at_work(step: u64, last: Option<u64>, members: usize) -> String {
    match last {
        Some(last) if step > last => "waiting for evaluations, after the last step".to_string(),
        Some(last) => format!("computing step {step} of {last}, workers {members}"),
        None => format!("computing step {step}, workers {members}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_step_behind_the_last_one_is_computed() {
        assert_eq!(at_work(300, Some(300), 2), "computing step 300 of 300, workers 2");
        assert_eq!(at_work(300, None, 2), "computing step 300, workers 2");
        assert!(at_work(301, Some(300), 2).starts_with("waiting for evaluations"));
    }

    #[test]
    fn a_line_that_stays_the_same_comes_less_and_less_often() {
        let (mut still, second) = (Still::default(), Duration::from_secs(1));
        assert!(!still.is_due("step 1", PAUSE - second) && still.is_due("step 1", PAUSE));
        assert!(!still.is_due("step 1", 2 * PAUSE - second) && still.is_due("step 1", 2 * PAUSE));
        assert!(still.is_due("step 2", PAUSE), "it goes on");
        for _ in 0..20 {
            still.is_due("step 2", PAUSE_LIMIT);
        }
        assert!(still.is_due("step 2", PAUSE_LIMIT), "and never ends");
    }
}
