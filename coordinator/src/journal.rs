//! The journal: what a later coordinator must know, in SQLite.
//!
//! 1. A row is durable when the call that wrote it returns; the coordinator writes it before it acts.
//! 2. Terms, generations and workers' numbers only grow.
//! 3. What was journaled stays as it was: a checkpoint's first commit is the one that is kept.
//! 4. A column that an earlier version did not know is added with a value that says "not known".

mod history;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use ganglion_membership::{Checkpoint, Generation, Group, Passport, Start, Term, WorkerId};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

pub use history::{CheckpointRow, GenerationRow, History, TermRow};

/// The tables. A newer layout gets a new `user_version`.
const SCHEMA: &str = "
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS terms (
        term INTEGER PRIMARY KEY, started REAL NOT NULL, pid INTEGER NOT NULL,
        metrics_every_steps INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE IF NOT EXISTS workers (
        worker INTEGER PRIMARY KEY, term INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS generations (
        generation INTEGER PRIMARY KEY, term INTEGER NOT NULL, position INTEGER NOT NULL,
        start TEXT NOT NULL, members TEXT NOT NULL, cause TEXT NOT NULL DEFAULT '');
    CREATE TABLE IF NOT EXISTS checkpoints (
        step INTEGER NOT NULL, phase INTEGER NOT NULL, position INTEGER NOT NULL,
        state_digest TEXT NOT NULL, generation INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (step, phase));
    PRAGMA user_version = 1;
";

/// The columns that came after the tables: table, column, definition.
const ADDED: [(&str, &str, &str); 3] = [
    ("terms", "metrics_every_steps", "INTEGER NOT NULL DEFAULT 0"),
    ("generations", "cause", "TEXT NOT NULL DEFAULT ''"),
    ("checkpoints", "generation", "INTEGER NOT NULL DEFAULT 0"),
];

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
        for (table, column, definition) in ADDED {
            if !connection.column_exists(None, table, column)? {
                connection.execute_batch(&format!("ALTER TABLE {table} ADD COLUMN {column} {definition}"))?;
            }
        }
        Ok(Journal { connection })
    }

    /// Takes the next term, in which a metrics row is due after every so many steps.
    pub fn begin_term(&mut self, metrics_every_steps: u64) -> Result<Term, JournalError> {
        let next = "INSERT INTO terms (term, started, pid, metrics_every_steps)
                    SELECT COALESCE(MAX(term), 0) + 1, ?1, ?2, ?3 FROM terms";
        self.connection.execute(next, params![now(), std::process::id(), metrics_every_steps])?;
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
        let members = group.members.iter().map(|member| RecordedMember {
            worker: member.worker.0,
            shards: [member.shards.start, member.shards.end],
        });
        let members: Vec<RecordedMember> = members.collect();
        self.connection.execute(
            "INSERT INTO generations (generation, term, position, start, members) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                group.generation.0,
                term.0,
                group.position.0,
                to_json(&RecordedStart::of(&group.start)),
                to_json(&members)
            ],
        )?;
        Ok(())
    }

    /// The newest generation; 0 before the first.
    pub fn last_generation(&self) -> Result<Generation, JournalError> {
        let newest = "SELECT COALESCE(MAX(generation), 0) FROM generations";
        Ok(Generation(self.connection.query_row(newest, [], |row| row.get(0))?))
    }

    /// Records that a checkpoint is about to be made valid, and the newest generation at that moment. Repeating it does
    /// no harm.
    pub fn commit(&mut self, checkpoint: &Checkpoint) -> Result<(), JournalError> {
        self.connection.execute(
            "INSERT INTO checkpoints (step, phase, position, state_digest, generation)
             SELECT ?1, ?2, ?3, ?4, COALESCE(MAX(generation), 0) FROM generations WHERE TRUE
             ON CONFLICT DO NOTHING",
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

/// Where a generation's state came from, as the journal has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "lowercase")]
pub enum RecordedStart {
    /// The job's seed.
    Fresh,
    /// A member that had it.
    Healed {
        /// Its rank.
        rank: u32,
    },
    /// A checkpoint.
    Checkpoint {
        /// The rank of the member that reads it.
        rank: u32,
        /// Steps done in it.
        step: u64,
        /// Phases done of the next step.
        phase: u32,
        /// blake3 of the state, in hex.
        state_digest: String,
    },
}

impl RecordedStart {
    fn of(start: &Start) -> RecordedStart {
        match start {
            Start::Fresh => RecordedStart::Fresh,
            Start::Healed(rank) => RecordedStart::Healed { rank: rank.0 },
            Start::Checkpoint(rank, checkpoint) => RecordedStart::Checkpoint {
                rank: rank.0,
                step: checkpoint.step,
                phase: checkpoint.phase,
                state_digest: checkpoint.state_digest.clone(),
            },
        }
    }
}

/// A member's place in a generation, as the journal has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedMember {
    /// The worker.
    pub worker: u64,
    /// Its data shards: the first, and the one behind the last.
    pub shards: [u32; 2],
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("numbers and texts can be written as JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ganglion_membership::{Member, Position, Rank};

    #[test]
    fn terms_and_workers_grow_across_openings_and_facts_stay() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let mut journal = Journal::open(&file).unwrap();
        assert_eq!(journal.begin_term(1).unwrap(), Term(1));
        assert_eq!(journal.admit(Term(1), "h", 7).unwrap(), WorkerId(1));
        journal.set_fact(Fact::Port, "7000").unwrap();
        drop(journal);
        let mut journal = Journal::open(&file).unwrap();
        assert_eq!(journal.begin_term(1).unwrap(), Term(2));
        assert_eq!(journal.admit(Term(2), "h", 8).unwrap(), WorkerId(2));
        assert_eq!(journal.fact(Fact::Port).unwrap().as_deref(), Some("7000"));
        assert_eq!(journal.fact(Fact::Run).unwrap(), None);
        assert_eq!(journal.last_generation().unwrap(), Generation(0));
    }

    fn group(generation: u64, start: Start) -> Group {
        let member = |worker, shards| Member { worker: WorkerId(worker), shards, writes_parts: true };
        let members = vec![member(1, 0..2), member(2, 2..4)];
        Group { generation: Generation(generation), members, position: Position(6), start }
    }

    fn saved(state_digest: &str) -> Checkpoint {
        let state_digest = state_digest.to_string();
        Checkpoint { position: Position(6), step: 3, phase: 0, files: Vec::new(), state_digest }
    }

    /// Invariant 3, and that a reader finds what was written, while the journal is open and afterwards.
    #[test]
    fn the_history_is_what_was_journaled() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let mut journal = Journal::open(&file).unwrap();
        let term = journal.begin_term(5).unwrap();
        let worker = journal.admit(term, "h", 7).unwrap();
        journal.set_fact(Fact::Samples, "100").unwrap();
        journal.form(term, &group(1, Start::Fresh)).unwrap();
        journal.commit(&saved("d")).unwrap();
        journal.form(term, &group(2, Start::Healed(Rank(1)))).unwrap();
        journal.commit(&saved("e")).unwrap();
        journal.form(term, &group(3, Start::Checkpoint(Rank(0), saved("d")))).unwrap();
        for open in [true, false] {
            if !open {
                journal = Journal::open(&folder.path().join("other.sqlite")).unwrap();
            }
            let history = History::read(&file).unwrap();
            assert_eq!(history.samples, Some(100));
            assert_eq!((history.terms[0].term, history.terms[0].metrics_every_steps), (term.0, 5));
            assert_eq!(history.workers.get(&worker.0), Some(&term.0));
            let starts: Vec<_> = history.generations.iter().map(|row| row.start.clone().unwrap()).collect();
            let state_digest = "d".to_string();
            let from = RecordedStart::Checkpoint { rank: 0, step: 3, phase: 0, state_digest };
            assert_eq!(starts, [RecordedStart::Fresh, RecordedStart::Healed { rank: 1 }, from]);
            assert_eq!(history.generations[1].members[1], RecordedMember { worker: 2, shards: [2, 4] });
            let [kept] = history.checkpoints.as_slice() else { panic!("one checkpoint") };
            assert_eq!((kept.state_digest.as_str(), kept.generation, kept.position), ("d", 1, 6));
        }
        drop(journal);
        let files = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(files, 2, "reading leaves nothing behind");
    }

    /// Invariant 4.
    #[test]
    fn an_older_journal_gets_the_columns_that_it_lacks() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let older = Connection::open(&file).unwrap();
        older
            .execute_batch(
                "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
                 CREATE TABLE terms (term INTEGER PRIMARY KEY, started REAL NOT NULL, pid INTEGER NOT NULL);
                 CREATE TABLE workers (worker INTEGER PRIMARY KEY, term INTEGER NOT NULL);
                 CREATE TABLE generations (generation INTEGER PRIMARY KEY, term INTEGER NOT NULL,
                     position INTEGER NOT NULL, start TEXT NOT NULL, members TEXT NOT NULL);
                 CREATE TABLE checkpoints (step INTEGER NOT NULL, phase INTEGER NOT NULL, position INTEGER NOT NULL,
                     state_digest TEXT NOT NULL, PRIMARY KEY (step, phase));
                 INSERT INTO terms VALUES (1, 0.5, 7);
                 INSERT INTO generations VALUES (1, 1, 0, 'Fresh', '[]');",
            )
            .unwrap();
        drop(older);
        assert_eq!(History::read(&file).unwrap().terms[0].metrics_every_steps, 0);
        for _ in 0..2 {
            let mut journal = Journal::open(&file).unwrap();
            journal.begin_term(3).unwrap();
        }
        let history = History::read(&file).unwrap();
        let cadences: Vec<u64> = history.terms.iter().map(|row| row.metrics_every_steps).collect();
        assert_eq!(cadences, [0, 3, 3]);
        assert_eq!((history.generations[0].cause.as_str(), &history.generations[0].start), ("", &None));
    }
}
