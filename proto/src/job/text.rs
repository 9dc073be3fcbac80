//! Text form of a resolved job: the only form in which a job leaves its process.
//!
//! 1. Reading the output of [`Job::to_toml`] gives the same job, each number with its bits.
//! 2. A job is understood whole or refused: a key that this build does not know, or reads as
//!    something else, is named.

use ganglion_membership::Limits;
use serde::Deserialize;
use toml::{Table, Value};

use super::Job;
use super::family;
use crate::bounds::{PHASES, name};
use crate::error::{Malformed, malformed};

/// Largest text of a job, in bytes; a message of the session holds it.
// Half, so that the rest of the welcome fits beside it.
pub const TEXT_LIMIT: usize = crate::MESSAGE_LIMIT / 2;

impl Job {
    /// Renders the job as TOML.
    pub fn to_toml(&self) -> String {
        const HOLDS: &str = "a checked job has UTF-8 paths and numbers that TOML can hold";
        let table = self.to_table();
        if !family::is_plain(&table) {
            let mut sections: Vec<(String, Value)> = table.into_iter().collect();
            // A table does not keep the order of the declarations; a reader looks for these first.
            let first = |name: &str| {
                ["job", "data", "model", "loss", "optimizer"].iter().position(|known| *known == name)
            };
            sections.sort_by_key(|(name, _)| first(name).unwrap_or(usize::MAX));
            let texts = sections
                .into_iter()
                .map(|section| toml::to_string(&Table::from_iter([section])).expect(HOLDS));
            return texts.collect::<Vec<_>>().join("\n");
        }
        toml::to_string(self).expect(HOLDS)
    }

    /// Converts the job to a table of its sections.
    pub fn to_table(&self) -> Table {
        let table = Table::try_from(self);
        let mut table = table.expect("a checked job has UTF-8 paths and numbers that TOML can hold");
        family::shorten(&mut table);
        table
    }

    /// Parses the output of [`Job::to_toml`] of a process that may be of another build.
    ///
    /// # Errors
    /// The text is too long or no job, or has settings that this build does not know.
    pub fn from_toml(text: &str) -> Result<Job, Malformed> {
        if text.len() > TEXT_LIMIT {
            let length = text.len();
            return Err(Malformed(format!(
                "the job has {length} bytes, and at most {TEXT_LIMIT} are allowed"
            )));
        }
        // Read twice: serde passes over keys that it does not know, and the second reading shows them.
        let sent: Table = toml::from_str(text).map_err(|error| unreadable(text, &error))?;
        let job = match family::family_of(&sent) {
            Some(family) if !family::is_plain(&sent) => {
                let mut completed = sent.clone();
                family::complete(&mut completed, family);
                Job::deserialize(Value::Table(completed))
            }
            // Serde's form, whose errors have places.
            _ => toml::from_str(text),
        };
        let job = job.map_err(|error| unreadable(text, &error))?;
        let unknown = not_understood(&sent, &job.to_table());
        if !unknown.is_empty() {
            return Err(Malformed(format!(
                "the job has settings that this build does not know: {}; use one build of the coordinator and its workers",
                unknown.join(", ")
            )));
        }
        job.check()?;
        Ok(job)
    }

    /// Checks what the arithmetic of samples, steps and times relies on. All else was checked by
    /// the reader of the job file.
    fn check(&self) -> Result<(), Malformed> {
        // Its own form: the name is a part of paths and of lines on a terminal.
        let is_shown_as_it_is = name(self.job.name.clone(), "job.name")? == self.job.name;
        if !is_shown_as_it_is {
            return Err(malformed("a job's name with control characters"));
        }
        // The divisors of the stream's numbers and of steps.
        if self.job.data_shards == 0 || self.job.shard_batch == 0 {
            return Err(malformed("a job without data shards or samples in them"));
        }
        if !(0.0..=Limits::LONGEST.as_secs_f64()).contains(&self.job.failure_deadline) {
            return Err(malformed("a failure deadline that is no time"));
        }
        if self.loss.discriminator_steps == 0 || self.loss.penalty_every == 0 {
            return Err(malformed("a step without a discriminator phase, or penalties in every 0 of them"));
        }
        let per_step = self.global_batch().checked_mul(u64::from(self.loss.discriminator_steps));
        // A step's samples are multiplied by steps later; here it is known that at least one step can be
        // counted.
        per_step.map(|_| ()).ok_or_else(|| malformed("a step with more samples than can be counted"))?;
        // As for a worker's report: a shape lists its phases.
        if self.loss.discriminator_steps >= PHASES {
            return Err(Malformed(format!("a step with more than {PHASES} phases")));
        }
        Ok(())
    }
}

/// Error of the TOML parser in one line, with the line that it is about.
fn unreadable(text: &str, error: &toml::de::Error) -> Malformed {
    let line = error.span().and_then(|span| {
        // Counted by line ends before the place of the error.
        let line_at = text.get(..span.start)?.matches('\n').count();
        text.lines().nth(line_at)
    });
    let line = line.unwrap_or_default().trim();
    Malformed(format!("the job cannot be read at \"{line}\": {}", error.message().trim()))
}

/// Full keys of the settings of `sent` that `understood` does not have with the same value.
fn not_understood(sent: &Table, understood: &Table) -> Vec<String> {
    let mut unknown = Vec::new();
    for (key, value) in sent {
        match (value, understood.get(key)) {
            // Section by section, so that the message names the key and not only its section.
            (Value::Table(sent), Some(Value::Table(understood))) => {
                unknown.extend(not_understood(sent, understood).iter().map(|below| format!("{key}.{below}")));
            }
            // A NaN equals nothing, and an infinity is no setting either.
            (Value::Float(number), _) if !number.is_finite() => unknown.push(format!("{key} = {number}")),
            // Understood with another value counts as not understood: a default in its place would
            // change the result.
            (value, Some(other)) if value == other => {}
            _ => unknown.push(key.clone()),
        }
    }
    unknown
}

#[cfg(test)]
mod tests;
