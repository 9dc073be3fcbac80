//! The journal: what a later coordinator must know, in SQLite.
//!
//! 1. A row is durable when the call that wrote it returns; the coordinator writes it before it acts.
//! 2. Terms, generations and workers' numbers only grow.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use ganglion_membership::{Checkpoint, Generation, Group, Passport, Term, WorkerId};
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::json;

/// The tables. A newer layout gets a new `user_version`.
const SCHEMA: &str = "
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS terms (
        term INTEGER PRIMARY KEY, started REAL NOT NULL, pid INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS workers (
        worker INTEGER PRIMARY KEY, term INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS generations (
        generation INTEGER PRIMARY KEY, term INTEGER NOT NULL, position INTEGER NOT NULL,
        start TEXT NOT NULL, members TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS checkpoints (
        step INTEGER NOT NULL, phase INTEGER NOT NULL, position INTEGER NOT NULL,
        state_digest TEXT NOT NULL, PRIMARY KEY (step, phase));
    PRAGMA user_version = 1;
";

/// The journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("journal.sqlite: {0}")]
pub struct JournalError(#[from] rusqlite::Error);

/// An open journal.
pub struct Journal {
    connection: Connection,
}

/// A fact about the run that is not a row of its own.
#[derive(Clone, Copy, Debug)]
pub enum Fact {
    /// Identifies the run directory.
    Run,
    /// The port of the last term.
    Port,
    /// The passport that the run was started with, as JSON.
    Passport,
    /// Samples in the data set.
    Samples,
}

impl Fact {
    fn name(self) -> &'static str {
        match self {
            Fact::Run => "run",
            Fact::Port => "port",
            Fact::Passport => "passport",
            Fact::Samples => "samples",
        }
    }
}

impl Journal {
    /// Opens or creates the journal.
    pub fn open(file: &Path) -> Result<Journal, JournalError> {
        let connection = Connection::open(file)?;
        connection.execute_batch(SCHEMA)?;
        Ok(Journal { connection })
    }

    /// Takes the next term.
    pub fn begin_term(&mut self) -> Result<Term, JournalError> {
        let next = "INSERT INTO terms SELECT COALESCE(MAX(term), 0) + 1, ?1, ?2 FROM terms";
        self.connection.execute(next, params![now(), std::process::id()])?;
        let newest = "SELECT MAX(term) FROM terms";
        Ok(Term(self.connection.query_row(newest, [], |row| row.get(0))?))
    }

    /// Gives a worker its number.
    pub fn admit(&mut self, term: Term, host: &str, pid: u32) -> Result<WorkerId, JournalError> {
        let next = "INSERT INTO workers SELECT COALESCE(MAX(worker), 0) + 1, ?1, ?2, ?3 FROM workers";
        self.connection.execute(next, params![term.0, host, pid])?;
        let newest = "SELECT MAX(worker) FROM workers";
        Ok(WorkerId(self.connection.query_row(newest, [], |row| row.get(0))?))
    }

    /// Records a generation.
    pub fn form(&mut self, term: Term, group: &Group) -> Result<(), JournalError> {
        let members: Vec<_> = group
            .members
            .iter()
            .map(|member| json!({ "worker": member.worker.0, "shards": [member.shards.start, member.shards.end] }))
            .collect();
        self.connection.execute(
            "INSERT INTO generations VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                group.generation.0,
                term.0,
                group.position.0,
                format!("{:?}", group.start),
                json!(members).to_string()
            ],
        )?;
        Ok(())
    }

    /// The newest generation; 0 before the first.
    pub fn last_generation(&self) -> Result<Generation, JournalError> {
        let newest = "SELECT COALESCE(MAX(generation), 0) FROM generations";
        Ok(Generation(self.connection.query_row(newest, [], |row| row.get(0))?))
    }

    /// Records that a checkpoint is about to be made valid. Repeating it does no harm.
    pub fn commit(&mut self, checkpoint: &Checkpoint) -> Result<(), JournalError> {
        self.connection.execute(
            "INSERT OR REPLACE INTO checkpoints VALUES (?1, ?2, ?3, ?4)",
            params![checkpoint.step, checkpoint.phase, checkpoint.position.0, checkpoint.state_digest],
        )?;
        Ok(())
    }

    /// Reads a fact.
    pub fn fact(&self, fact: Fact) -> Result<Option<String>, JournalError> {
        let query = "SELECT value FROM facts WHERE name = ?1";
        Ok(self.connection.query_row(query, [fact.name()], |row| row.get(0)).optional()?)
    }

    /// Records a fact.
    pub fn set_fact(&mut self, fact: Fact, value: &str) -> Result<(), JournalError> {
        self.connection
            .execute("INSERT OR REPLACE INTO facts VALUES (?1, ?2)", params![fact.name(), value])?;
        Ok(())
    }

    /// The passport that the run was started with.
    pub fn passport(&self) -> Result<Option<Passport>, JournalError> {
        let text = self.fact(Fact::Passport)?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()).map(Passport))
    }
}

/// Seconds since the Unix epoch.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_and_workers_grow_across_openings_and_facts_stay() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let mut journal = Journal::open(&file).unwrap();
        assert_eq!(journal.begin_term().unwrap(), Term(1));
        assert_eq!(journal.admit(Term(1), "h", 7).unwrap(), WorkerId(1));
        journal.set_fact(Fact::Port, "7000").unwrap();
        drop(journal);
        let mut journal = Journal::open(&file).unwrap();
        assert_eq!(journal.begin_term().unwrap(), Term(2));
        assert_eq!(journal.admit(Term(2), "h", 8).unwrap(), WorkerId(2));
        assert_eq!(journal.fact(Fact::Port).unwrap().as_deref(), Some("7000"));
        assert_eq!(journal.fact(Fact::Run).unwrap(), None);
        assert_eq!(journal.last_generation().unwrap(), Generation(0));
    }
}
