//! Read access to the journal, also while a coordinator writes it.
//!
//! 1. Nothing is written: no table, no column, and no file beside the journal that was not there.
//! 2. All tables are read at one moment.

use std::collections::BTreeMap;
use std::path::Path;

use ganglion_membership::StepShape;
use rusqlite::{Connection, OptionalExtension, Row};

use super::opening::snapshot;
use super::{Fact, JournalError, RecordedMember, RecordedStart, Recovery, parse_shape};
use crate::records::damage::SetAside;

/// All decisions of a run's coordinators, oldest first.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Number of samples in the data set, once a worker has loaded it.
    pub samples: Option<u64>,
    /// Shape of the objective's steps, once a worker has loaded it; earlier versions did not journal it.
    pub shape: Option<StepShape>,
    /// Index of each sample that the job leaves out after its start, in the job's order, as far as
    /// that is known.
    pub left_out: Vec<u64>,
    /// All terms.
    pub terms: Vec<TermRow>,
    /// Term in which each worker was admitted, by worker.
    pub workers: BTreeMap<u64, u64>,
    /// All generations.
    pub generations: Vec<GenerationRow>,
    /// Checkpoints that were committed.
    pub checkpoints: Vec<CheckpointRow>,
    /// Records that were set aside.
    pub set_aside: Vec<SetAside>,
    /// Report of the newest recovery, in a journal that was recovered.
    pub recovery: Option<Recovery>,
}

/// One start of a coordinator.
#[derive(Clone, Debug)]
pub struct TermRow {
    /// Number of the term.
    pub term: u64,
    /// Cadence of the metrics rows in steps; 0 where that is not known.
    pub metrics_every_steps: u64,
}

/// One membership of the group.
#[derive(Clone, Debug)]
pub struct GenerationRow {
    /// Number of the generation.
    pub generation: u64,
    /// Term that formed it.
    pub term: u64,
    /// Update index from which it trained.
    pub position: u64,
    /// Source of its state; `None` where the text cannot be parsed.
    pub start: Option<RecordedStart>,
    /// Members ordered by rank; empty where the text cannot be parsed.
    pub members: Vec<RecordedMember>,
    /// Reason why it was formed; empty where that is not known.
    pub cause: String,
}

/// One committed checkpoint.
#[derive(Clone, Debug)]
pub struct CheckpointRow {
    /// Number of completed steps.
    pub step: u64,
    /// Number of committed phases of the next step.
    pub phase: u64,
    /// Update index: number of committed phases.
    pub position: u64,
    /// blake3 of the state, in hex.
    pub state_digest: String,
    /// Newest generation when it was committed; 0 where that is not known.
    pub generation: u64,
}

impl History {
    /// Reads a journal.
    pub fn read(file: &Path) -> Result<History, JournalError> {
        snapshot(file, History::of)
    }

    fn of(connection: &mut Connection) -> Result<History, JournalError> {
        // A read transaction: all tables are of one moment (2).
        let moment = connection.transaction()?;
        let mut history = History::default();
        // A coordinator is about to create the tables.
        if !moment.table_exists(None, "facts")? {
            return Ok(history);
        }
        let fact = |fact: Fact| -> rusqlite::Result<Option<String>> {
            let value = "SELECT value FROM facts WHERE name = ?1";
            moment.query_row(value, [fact.name()], |row| row.get(0)).optional()
        };
        history.samples = fact(Fact::Samples)?.and_then(|samples| samples.parse().ok());
        history.shape = fact(Fact::Shape)?.and_then(|text| parse_shape(&text));
        history.recovery = fact(Fact::Recovered)?.and_then(|text| serde_json::from_str(&text).ok());
        let left_out = fact(Fact::LeftOut)?.and_then(|left_out| serde_json::from_str(&left_out).ok());
        history.left_out = left_out.unwrap_or_default();
        history.terms = rows(&moment, "terms", ["term", "metrics_every_steps"], |row| {
            Ok(TermRow { term: row.get(0)?, metrics_every_steps: row.get(1)? })
        })?;
        let workers = rows(&moment, "workers", ["worker", "term"], |row| Ok((row.get(0)?, row.get(1)?)))?;
        history.workers = workers.into_iter().collect();
        let columns = ["generation", "term", "position", "start", "members", "cause"];
        history.generations = rows(&moment, "generations", columns, generation)?;
        let columns = ["position", "step", "phase", "state_digest", "generation"];
        history.checkpoints = rows(&moment, "checkpoints", columns, checkpoint)?;
        history.set_aside = set_asides(&moment)?;
        Ok(history)
    }
}

/// Records that were set aside; empty in a journal of a version that did not have them.
pub(super) fn set_asides(connection: &Connection) -> Result<Vec<SetAside>, JournalError> {
    if !connection.table_exists(None, "set_aside")? {
        return Ok(Vec::new());
    }
    let texts = rows(connection, "set_aside", ["file", "found"], |row| row.get::<_, String>(1))?;
    Ok(texts.iter().filter_map(|text| serde_json::from_str(text).ok()).collect())
}

/// A table's rows, ordered by its first column. A column that the table does not have reads as 0,
/// not known.
fn rows<T, const N: usize>(
    connection: &Connection,
    table: &str,
    columns: [&str; N],
    read: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, JournalError> {
    let mut known = Vec::new();
    for column in columns {
        // A reader adds no columns (1), so it must do without those of later versions.
        known.push(if connection.column_exists(None, table, column)? { column } else { "0" });
    }
    let query = format!("SELECT {} FROM {table} ORDER BY {}", known.join(", "), columns[0]);
    let mut statement = connection.prepare(&query)?;
    let rows = statement.query_map([], |row| read(row))?.collect::<rusqlite::Result<_>>()?;
    Ok(rows)
}

fn generation(row: &Row<'_>) -> rusqlite::Result<GenerationRow> {
    let (start, members): (String, String) = (row.get(3)?, row.get(4)?);
    Ok(GenerationRow {
        generation: row.get(0)?,
        term: row.get(1)?,
        position: row.get(2)?,
        start: serde_json::from_str(&start).ok(),
        members: serde_json::from_str(&members).unwrap_or_default(),
        cause: row.get(5).unwrap_or_default(),
    })
}

fn checkpoint(row: &Row<'_>) -> rusqlite::Result<CheckpointRow> {
    Ok(CheckpointRow {
        position: row.get(0)?,
        step: row.get(1)?,
        phase: row.get(2)?,
        state_digest: row.get(3)?,
        generation: row.get(4)?,
    })
}
