//! `coordinator audit`: proves from a run's files alone that nothing was lost, doubled or changed.
//!
//! 1. Nothing is written, and no coordinator or worker is asked: the files are the evidence, and
//!    the job is the measure.
//! 2. Files that are written later are read first: the records before the checkpoints, these before
//!    the journal, which has each decision before any other file. So on a directory in use no file
//!    mentions a decision that this reading of the journal lacks.
//! 3. An operation in progress is not a breach: on a run that goes on, a breach must show again
//!    some seconds later.
//! 4. A claim says what it was shown for. Anything that the files do not decide is counted, never
//!    passed over.

mod aside;
mod checkpoints;
pub(crate) mod evidence;
mod groups;
mod ledger;
mod lineage;
mod rows;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;
use std::time::Duration;

use evidence::Evidence;
pub use evidence::NoRun;
use ganglion_proto::progress::Progress;
use serde::Serialize;

/// Pause before a breach is checked again: longer than a coordinator takes to write its decisions,
/// and than its workers take to repeat a report.
const SECOND_LOOK: Duration = Duration::from_secs(3);

/// Result of an audit, one claim a line.
#[derive(Debug, Serialize)]
pub struct Report(Vec<Claim>);

/// A statement about the run, with the evidence for and against it.
#[derive(Debug, Serialize)]
struct Claim {
    statement: &'static str,
    /// Figures that it was shown for.
    figures: String,
    /// Contradictions found.
    breaches: Vec<String>,
}

/// Audits a run directory.
pub fn audit(run: &Path, progress: &Progress) -> Result<Report, NoRun> {
    let evidence = Evidence::read(run)?;
    let report = judge(&evidence, progress)?;
    // Nobody writes any more after an end, so a second look could only find the same.
    if report.holds() || evidence.ended() {
        return Ok(report);
    }
    // Everything is read again: a decision that was being written is then in all files (3).
    std::thread::sleep(SECOND_LOOK);
    judge(&Evidence::read(run)?, progress)
}

fn judge(evidence: &Evidence, progress: &Progress) -> Result<Report, NoRun> {
    // Once for all claims, since it reads and hashes gigabytes.
    let whole = checkpoints::Whole::read(evidence, progress)?;
    Ok(Report(vec![
        groups::numbers_grow(evidence),
        groups::shards_are_dealt(evidence),
        groups::events_agree(evidence),
        lineage::starts_follow(evidence),
        lineage::recomputed_steps_are_equal(evidence),
        rows::every_step_has_one(evidence),
        rows::are_of_their_generation(evidence),
        ledger::every_sample_was_committed_once(evidence, &whole),
        checkpoints::files_are_whole(&whole),
        checkpoints::states_have_their_digests(evidence, &whole),
        checkpoints::journal_agrees(evidence),
        checkpoints::latest_is_newest(evidence),
        aside::losses_are_told(evidence),
    ]))
}

impl Report {
    /// Whether all claims hold.
    pub fn holds(&self) -> bool {
        self.breaches() == 0
    }

    /// Number of claims that do not hold.
    pub fn breaches(&self) -> usize {
        self.0.iter().filter(|claim| !claim.breaches.is_empty()).count()
    }
}

impl Claim {
    fn new(statement: &'static str) -> Claim {
        Claim { statement, figures: String::new(), breaches: Vec::new() }
    }

    /// Adds a contradiction.
    fn breach(&mut self, what: String) {
        self.breaches.push(what);
    }

    /// Adds a contradiction unless a condition holds.
    fn expect(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.breach(otherwise());
        }
    }

    /// Completes the claim with the figures that it was shown for.
    fn of(mut self, figures: String) -> Claim {
        self.figures = figures;
        self
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Claim { statement, figures, breaches } = self;
        match breaches.as_slice() {
            [] => write!(f, "ok    {statement}: {figures}"),
            [only] => write!(f, "BREACH {statement}: {only}"),
            [first, others @ ..] => write!(f, "BREACH {statement}: {first} (and {} more)", others.len()),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(Claim::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}
