//! The journal: the durable decisions and facts that a later coordinator needs, in SQLite.
//!
//! 1. A row is durable when the call that wrote it returns; the coordinator writes it before it acts.
//! 2. Terms, generations and worker numbers only grow.
//! 3. Journaled rows do not change; a checkpoint is final once it is valid: one that was given up
//!    before leaves its place to another state.
//! 4. Nothing is written once another coordinator has taken over the run directory.
//! 5. A column that an earlier version did not have is added with a value that means "not known".

mod history;
#[cfg(test)]
mod layouts;
mod opening;
mod salvage;

use std::path::{Path, PathBuf};

use ganglion_membership::{
    Backend, Cause, Checkpoint, Generation, Group, GroupMember, Passport, Position, Start, StepShape, Term,
    WorkerId,
};
use ganglion_proto::evaluation::EvaluationRow;
pub use history::{CheckpointRow, GenerationRow, History, TermRow};
use rusqlite::{Connection, OptionalExtension, params};
pub use salvage::{LEAP, Recovery, Salvaged};
use serde::{Deserialize, Serialize};

use crate::records::damage::SetAside;
use crate::run_dir::ownership::Ownership;
use crate::system::clock::now;
use crate::system::node::Node;

/// Definitions of the tables.
const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS terms (
        term INTEGER PRIMARY KEY, started REAL NOT NULL, pid INTEGER NOT NULL,
        metrics_every_steps INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE IF NOT EXISTS workers (
        worker INTEGER PRIMARY KEY, term INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL,
        token TEXT);
    CREATE TABLE IF NOT EXISTS children (
        token TEXT PRIMARY KEY, term INTEGER NOT NULL, local_rank INTEGER NOT NULL,
        pid INTEGER, started INTEGER, ended INTEGER NOT NULL DEFAULT 0,
        host TEXT NOT NULL DEFAULT '', boot TEXT NOT NULL DEFAULT '', pids TEXT NOT NULL DEFAULT '');
    CREATE TABLE IF NOT EXISTS generations (
        generation INTEGER PRIMARY KEY, term INTEGER NOT NULL, position INTEGER NOT NULL,
        start TEXT NOT NULL, members TEXT NOT NULL, cause TEXT NOT NULL DEFAULT '',
        backend TEXT NOT NULL DEFAULT 'Gloo');
    CREATE TABLE IF NOT EXISTS skips (position INTEGER PRIMARY KEY);
    CREATE TABLE IF NOT EXISTS checkpoints (
        step INTEGER NOT NULL, phase INTEGER NOT NULL, position INTEGER NOT NULL,
        state_digest TEXT NOT NULL, generation INTEGER NOT NULL DEFAULT 0,
        valid INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (step, phase));
    CREATE TABLE IF NOT EXISTS set_aside (
        file TEXT NOT NULL, aside TEXT NOT NULL, found TEXT NOT NULL, PRIMARY KEY (file, aside));
    CREATE TABLE IF NOT EXISTS evaluations (step INTEGER PRIMARY KEY, row BLOB NOT NULL);
";

/// Version of the tables' layout. Tables and columns are added without a new one, since an earlier
/// version leaves them alone; a new one means that earlier versions must not write the journal, and
/// they refuse it.
const LAYOUT: u32 = 2;

/// Error of reading or writing the journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Error reported by SQLite.
    #[error("journal.sqlite: {0}")]
    Sqlite(rusqlite::Error),
    /// The content of the file is not what SQLite wrote.
    #[error(
        "{}: damaged: {reason}; make a new one from the checkpoints and from what can be read of it, with: coordinator \
         recover {}",
        file.display(), file.parent().unwrap_or(Path::new(".")).display()
    )]
    Damaged {
        /// The journal's file.
        file: PathBuf,
        /// Finding of SQLite.
        reason: String,
    },
    /// Error of the system.
    #[error("journal.sqlite: {0}")]
    File(#[source] std::io::Error),
    /// The journal was written all the time while it was read.
    #[error("journal.sqlite: a coordinator writes it all the time; try again")]
    Busy,
    /// Nothing was written: the fence refused the commit because another coordinator has taken over.
    #[error("journal.sqlite: another coordinator has taken this run over")]
    Superseded,
    /// A later version of this program wrote the journal.
    #[error(
        "journal.sqlite: its layout is {0}, and this version of the coordinator knows none above {LAYOUT}: the run belongs \
         to a newer version; go on with that one, or choose another --run-dir"
    )]
    Newer(u32),
}

impl From<rusqlite::Error> for JournalError {
    fn from(error: rusqlite::Error) -> JournalError {
        // The only code that the commit hook of `guard` causes.
        const REFUSED: i32 = rusqlite::ffi::SQLITE_CONSTRAINT_COMMITHOOK;
        match error.sqlite_error() {
            Some(refused) if refused.extended_code == REFUSED => JournalError::Superseded,
            _ => JournalError::Sqlite(error),
        }
    }
}

impl JournalError {
    /// Reclassifies an error of SQLite as damage where it is that.
    fn of(self, file: &Path) -> JournalError {
        match self {
            JournalError::Sqlite(error) if opening::is_damaged(&error) => {
                JournalError::Damaged { file: file.to_path_buf(), reason: error.to_string() }
            }
            other => other,
        }
    }

    /// Whether a retry may succeed: the disk is full or failing, or another process holds the file
    /// for a while.
    pub fn may_mend(&self) -> bool {
        use rusqlite::ErrorCode::{
            CannotOpen, DatabaseBusy, DatabaseLocked, DiskFull, OutOfMemory, ReadOnly, SystemIoFailure,
        };
        let JournalError::Sqlite(error) = self else { return false };
        // Neither damage nor a refused commit is here: to repeat those would hide them.
        let passing =
            [CannotOpen, DatabaseBusy, DatabaseLocked, DiskFull, OutOfMemory, ReadOnly, SystemIoFailure];
        error.sqlite_error_code().is_some_and(|code| passing.contains(&code))
    }
}

/// An open journal.
pub struct Journal {
    connection: Connection,
    node: Node,
    lacking: Option<String>,
    /// Newest term of earlier holders, also of one whose journal was lost.
    earlier_term: u64,
}

/// Key of a fact about the run that has no table of its own.
#[derive(Clone, Copy, Debug)]
pub enum Fact {
    /// Unique name of the run.
    Run,
    /// Port of the last term's gRPC listener.
    Port,
    /// Port of the last term's dashboard.
    HttpPort,
    /// Fingerprint of the environment (the passport) that the run was started with, as JSON.
    Passport,
    /// Number of samples in the data set.
    Samples,
    /// Shape of the objective's steps: number of phases, and indices of those that read, as JSON.
    Shape,
    /// Files of the samples with their hashes, unless there are many, as JSON.
    Files,
    /// Index of each sample that the job leaves out after its start, in the job's order, as JSON.
    LeftOut,
    /// The newest generation when the job's newest exclusion was written, and the number of
    /// exclusions then, as JSON.
    Excluded,
    /// Newest generation whose states are invalidated.
    Condemned,
    /// Newest generation whose members are quiesced for good.
    Closed,
    /// Address of the storage that holds the run's checkpoints.
    Storage,
    /// Number above which all new terms, generations and workers are, after a recovery.
    Floor,
    /// Report of the newest recovery, as JSON.
    Recovered,
}

/// Identity of a process on its machine: unique for all time, also where process numbers are reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spawned {
    /// Process number.
    pub pid: u32,
    /// Time of its start, by the system's clock.
    pub started: u64,
}

/// A local process that a coordinator of the run started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildRow {
    /// Token that the process sends in its hello.
    pub token: String,
    /// Local rank: its number on this machine.
    pub local_rank: u32,
    /// The process and the time of its start; `None` if the coordinator died before it knew them.
    pub process: Option<Spawned>,
    /// Machine on which that number and that time are meaningful.
    pub node: Node,
    /// Newest worker number under which it said hello.
    pub worker: Option<WorkerId>,
    /// Whether its end was observed.
    pub ended: bool,
}

/// A checkpoint that a coordinator decided on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournaledCheckpoint {
    /// The checkpoint; its files are not listed.
    pub checkpoint: Checkpoint,
    /// Whether its manifest is known to have been written; earlier versions did not journal that.
    pub valid: bool,
}

/// Number of rows about a run's coordinators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Starts of a coordinator.
    pub terms: u64,
    /// Memberships of the group.
    pub generations: u64,
    /// Whether no such row was lost in a recovery.
    pub is_whole: bool,
}

impl Fact {
    fn name(self) -> &'static str {
        match self {
            Fact::Run => "run",
            Fact::Port => "port",
            Fact::HttpPort => "http_port",
            Fact::Passport => "passport",
            Fact::Samples => "samples",
            Fact::Shape => "step_shape",
            Fact::Files => "files",
            Fact::LeftOut => "left_out",
            Fact::Excluded => "excluded",
            Fact::Condemned => "condemned",
            Fact::Closed => "closed",
            Fact::Storage => "storage",
            Fact::Floor => "floor",
            Fact::Recovered => "recovered",
        }
    }
}

/// Text of a shape as a fact.
pub fn shape_text(shape: &StepShape) -> String {
    serde_json::json!([shape.phases(), shape.readers()]).to_string()
}

/// Parses the text of a shape; `None` where it is damaged.
pub fn parse_shape(text: &str) -> Option<StepShape> {
    let (phases, readers) = serde_json::from_str(text).ok()?;
    StepShape::new(phases, readers)
}

impl Journal {
    /// Opens or creates the journal. The whole file is read once, so damage is found before any
    /// decision depends on it.
    pub fn open(file: &Path) -> Result<Journal, JournalError> {
        Journal::open_checked(file).map_err(|error| error.of(file))
    }

    fn open_checked(file: &Path) -> Result<Journal, JournalError> {
        let (connection, lacking) = opening::to_write(file)?;
        let finding: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if finding != "ok" {
            return Err(JournalError::Damaged { file: file.to_path_buf(), reason: finding });
        }
        // Before any table is touched: a newer version's journal stays as that version wrote it.
        let layout: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if layout > LAYOUT {
            return Err(JournalError::Newer(layout));
        }
        connection.execute_batch(SCHEMA)?;
        add_columns(&connection)?;
        // Last: a death before this has only added what an older version ignores.
        connection.pragma_update(None, "user_version", LAYOUT)?;
        Ok(Journal { connection, node: Node::here(), lacking, earlier_term: 0 })
    }

    /// Shortcoming of the journal's file system, diagnostic only.
    pub fn lacking(&self) -> Option<&str> {
        self.lacking.as_deref()
    }

    /// Makes all later writes fail, as on a full disk, or work again.
    #[cfg(test)]
    pub(crate) fn refuse_writes(&self, refuse: bool) {
        self.connection.pragma_update(None, "query_only", refuse).unwrap();
    }

    /// Makes each commit check first whether this process still owns the run directory.
    pub fn guard(&mut self, ownership: &Ownership) -> Result<(), JournalError> {
        let fence = ownership.fence().clone();
        self.earlier_term = ownership.earlier_term();
        // The hook is the last thing before a commit, and turns it into a rollback where it returns
        // true. So a write that was begun before the claim was lost is refused as well.
        Ok(self.connection.commit_hook(Some(move || fence.check().is_err()))?)
    }

    /// Takes the next term. A row of metrics is due in it every `metrics_every_steps` steps.
    pub fn begin_term(&mut self, metrics_every_steps: u64) -> Result<Term, JournalError> {
        let next = "INSERT INTO terms (term, started, pid, metrics_every_steps)
                    SELECT MAX(COALESCE(MAX(term), 0), ?4) + 1, ?1, ?2, ?3 FROM terms";
        // Above the claims' terms too: a journal that was restored from a copy must not hand out a term
        // again (M1).
        let floor = self.floor()?.max(self.earlier_term);
        // One statement, and so one transaction: no death leaves a number that is taken and not
        // recorded.
        self.connection.execute(next, params![now(), std::process::id(), metrics_every_steps, floor])?;
        let newest = "SELECT MAX(term) FROM terms";
        Ok(Term(self.connection.query_row(newest, [], |row| row.get(0))?))
    }

    /// Assigns a number to a worker.
    pub fn admit(
        &mut self,
        term: Term,
        host: &str,
        pid: u32,
        token: Option<&str>,
    ) -> Result<WorkerId, JournalError> {
        let next = "INSERT INTO workers (worker, term, host, pid, token)
            SELECT MAX(COALESCE(MAX(worker), 0), ?5) + 1, ?1, ?2, ?3, ?4 FROM workers";
        self.connection.execute(next, params![term.0, host, pid, token, self.floor()?])?;
        // Safe in a second statement, since this is the only writer.
        let newest = "SELECT MAX(worker) FROM workers";
        Ok(WorkerId(self.connection.query_row(newest, [], |row| row.get(0))?))
    }

    /// Records that a process is about to be started.
    pub fn spawning(&mut self, term: Term, token: &str, local_rank: u32) -> Result<(), JournalError> {
        let row = "INSERT INTO children (token, term, local_rank) VALUES (?1, ?2, ?3)";
        self.connection.execute(row, params![token, term.0, local_rank])?;
        Ok(())
    }

    /// Records the process number of a started process.
    pub fn spawned(&mut self, token: &str, process: Spawned) -> Result<(), JournalError> {
        let row =
            "UPDATE children SET pid = ?2, started = ?3, host = ?4, boot = ?5, pids = ?6 WHERE token = ?1";
        // With the number: it means something only on this boot and in this PID namespace.
        let Node { host, boot, pids } = &self.node;
        self.connection.execute(row, params![token, process.pid, process.started, host, boot, pids])?;
        Ok(())
    }

    /// Records the end of a process.
    pub fn ended(&mut self, token: &str) -> Result<(), JournalError> {
        self.all_ended(&[token])
    }

    /// Records the end of several processes, with one wait for the disk.
    pub fn all_ended(&mut self, tokens: &[&str]) -> Result<(), JournalError> {
        // One commit is one wait for the disk, and a run of weeks may have had thousands of processes.
        let change = self.connection.transaction()?;
        for token in tokens {
            change.execute("UPDATE children SET ended = 1 WHERE token = ?1 AND ended = 0", [token])?;
        }
        Ok(change.commit()?)
    }

    /// All processes that coordinators of the run started.
    pub fn children(&self) -> Result<Vec<ChildRow>, JournalError> {
        let mut rows = self.connection.prepare(
            "SELECT token, local_rank, pid, started, ended,
                (SELECT MAX(worker) FROM workers WHERE workers.token = children.token), host, boot, pids
                FROM children",
        )?;
        let rows = rows.query_map([], |row| {
            let (pid, started): (Option<u32>, Option<u64>) = (row.get(2)?, row.get(3)?);
            Ok(ChildRow {
                token: row.get(0)?,
                local_rank: row.get(1)?,
                // Both or neither: a number without its start time could be any process's by now.
                process: pid.zip(started).map(|(pid, started)| Spawned { pid, started }),
                node: Node { host: row.get(6)?, boot: row.get(7)?, pids: row.get(8)? },
                ended: row.get(4)?,
                worker: row.get::<_, Option<u64>>(5)?.map(WorkerId),
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Records a generation.
    pub fn form(&mut self, term: Term, group: &Group, cause: &Cause) -> Result<(), JournalError> {
        let members = group.members.iter().map(|member| RecordedMember {
            worker: member.worker.0,
            shards: [member.shards.start, member.shards.end],
            writes_parts: member.writes_parts,
        });
        let members: Vec<RecordedMember> = members.collect();
        self.connection.execute(
            "INSERT INTO generations (generation, term, position, start, members, cause, backend)
                VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![
                group.generation.0,
                term.0,
                group.position.0,
                to_json(&RecordedStart::of(&group.start)),
                to_json(&members),
                cause.to_string(),
                group.backend.to_string()
            ],
        )?;
        Ok(())
    }

    /// The newest generation, without the source of its state, which is not needed any more.
    pub fn last_group(&self) -> Result<Option<Group>, JournalError> {
        let query =
            "SELECT generation, position, members, backend FROM generations ORDER BY generation DESC LIMIT 1";
        let row = self.connection.query_row(query, [], |row| {
            Ok((
                row.get::<_, u64>(0)?,
                row.get::<_, u64>(1)?,
                row.get::<_, String>(2)?,
                row.get::<_, String>(3)?,
            ))
        });
        let (row, floor) = (row.optional()?, self.floor()?);
        // Rows that were read from a damaged journal may not be its newest: their members are not waited
        // for, and none may come back under its number.
        let Some((generation, position, members, backend)) = row.filter(|(newest, ..)| *newest > floor)
        else {
            return Ok((floor > 0).then(|| Journal::group_before(floor)));
        };
        let is = |known: &Backend| known.to_string() == backend;
        let members: Vec<RecordedMember> = serde_json::from_str(&members).unwrap_or_default();
        let member = |row: RecordedMember| GroupMember {
            worker: WorkerId(row.worker),
            shards: row.shards[0]..row.shards[1],
            writes_parts: row.writes_parts,
        };
        Ok(Some(Group {
            generation: Generation(generation),
            members: members.into_iter().map(member).collect(),
            position: Position(position),
            start: Start::Fresh,
            skips: Vec::new(),
            // An unknown text is of another version; Gloo works on all machines.
            backend: Some(Backend::Nccl).filter(is).unwrap_or_default(),
        }))
    }

    /// Records that a phase may be skipped. Idempotent.
    pub fn allow_skip(&mut self, position: Position) -> Result<(), JournalError> {
        self.connection.execute("INSERT OR IGNORE INTO skips VALUES (?1)", [position.0])?;
        Ok(())
    }

    /// Update indices of the phases that may be skipped.
    pub fn skips(&self) -> Result<Vec<Position>, JournalError> {
        let mut rows = self.connection.prepare("SELECT position FROM skips ORDER BY position")?;
        let rows = rows.query_map([], |row| Ok(Position(row.get(0)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Number of the newest generation; 0 before the first.
    pub fn last_generation(&self) -> Result<Generation, JournalError> {
        let newest = "SELECT COALESCE(MAX(generation), 0) FROM generations";
        let newest: u64 = self.connection.query_row(newest, [], |row| row.get(0))?;
        Ok(Generation(newest.max(self.floor()?)))
    }

    /// Counts the starts of a coordinator and the memberships of the group. Their numbers do not: these
    /// leap in a recovery.
    pub fn counts(&self) -> Result<Counts, JournalError> {
        let query = "SELECT (SELECT COUNT(*) FROM terms), (SELECT COUNT(*) FROM generations)";
        let (terms, generations) = self.connection.query_row(query, [], |row| row.try_into())?;
        let recovery = self.fact(Fact::Recovered)?.map(|text| serde_json::from_str::<Recovery>(&text));
        let lost = |table: &str| match &recovery {
            Some(Ok(recovery)) => recovery.lost.iter().any(|lost| lost == table),
            // A report that cannot be read rules nothing out.
            Some(Err(_)) => true,
            None => false,
        };
        Ok(Counts { terms, generations, is_whole: !lost("terms") && !lost("generations") })
    }

    /// Records that a checkpoint is about to be made valid, and the newest generation at that
    /// moment. Idempotent.
    pub fn commit(&mut self, checkpoint: &Checkpoint) -> Result<(), JournalError> {
        self.connection.execute(
            "INSERT INTO checkpoints (step, phase, position, state_digest, generation)
             SELECT ?1, ?2, ?3, ?4, COALESCE(MAX(generation), 0) FROM generations WHERE TRUE
             ON CONFLICT DO UPDATE SET state_digest = excluded.state_digest, generation = excluded.generation
                 WHERE valid = 0 AND state_digest <> excluded.state_digest",
            params![checkpoint.step, checkpoint.phase, checkpoint.position.0, checkpoint.state_digest],
        )?;
        Ok(())
    }

    /// Records that a checkpoint is valid: from now on the run does not start without it unless the
    /// user asks for that. Idempotent.
    pub fn made_valid(&mut self, checkpoint: &Checkpoint) -> Result<(), JournalError> {
        // `AND valid = 0` saves the wait for the disk where nothing changes.
        let change = "UPDATE checkpoints SET valid = 1 WHERE step = ?1 AND phase = ?2 AND valid = 0";
        self.connection.execute(change, params![checkpoint.step, checkpoint.phase])?;
        Ok(())
    }

    /// All journaled checkpoints, ordered by update index. Their files are not listed.
    pub fn checkpoints(&self) -> Result<Vec<JournaledCheckpoint>, JournalError> {
        let query = "SELECT step, phase, position, state_digest, valid FROM checkpoints ORDER BY position";
        let mut rows = self.connection.prepare(query)?;
        let rows = rows.query_map([], |row| {
            let checkpoint = Checkpoint {
                step: row.get(0)?,
                phase: row.get(1)?,
                position: Position(row.get(2)?),
                files: Vec::new(),
                state_digest: row.get(3)?,
            };
            Ok(JournaledCheckpoint { checkpoint, valid: row.get(4)? })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Records that a diagnostic record was set aside, or is missing, and the loss.
    pub fn set_aside(&mut self, found: &SetAside) -> Result<(), JournalError> {
        let row = "INSERT OR REPLACE INTO set_aside VALUES (?1, ?2, ?3)";
        self.connection.execute(row, params![found.file, found.aside, to_json(found)])?;
        Ok(())
    }

    /// All records that were set aside.
    pub fn set_asides(&self) -> Result<Vec<SetAside>, JournalError> {
        history::set_asides(&self.connection)
    }

    /// The furthest update index that was decided on: that of a checkpoint, or the start of a generation.
    pub fn newest_position(&self) -> Result<Position, JournalError> {
        let query = "SELECT COALESCE(MAX(position), 0) FROM
            (SELECT position FROM checkpoints UNION ALL SELECT position FROM generations)";
        Ok(Position(self.connection.query_row(query, [], |row| row.get(0))?))
    }

    /// Records an evaluation. The first one of a step is kept.
    pub fn evaluated(&mut self, row: &EvaluationRow) -> Result<(), JournalError> {
        // The first one stays: another result for the same step is a breach, which is reported and not
        // stored.
        let insert = "INSERT INTO evaluations VALUES (?1, ?2) ON CONFLICT DO NOTHING";
        self.connection.execute(insert, params![row.step, row.encode()])?;
        Ok(())
    }

    /// Recorded evaluations, ordered by step. An unreadable one is skipped.
    pub fn evaluations(&self) -> Result<Vec<EvaluationRow>, JournalError> {
        let mut rows = self.connection.prepare("SELECT row FROM evaluations ORDER BY step")?;
        let rows = rows.query_map([], |row| row.get::<_, Vec<u8>>(0))?.collect::<Result<Vec<_>, _>>()?;
        // A later version may have written it; no decision depends on having them all.
        Ok(rows.iter().filter_map(|row| EvaluationRow::decode(row).ok()).collect())
    }

    /// Reads a fact; `None` if it was never recorded.
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

    /// Fingerprint of the environment that the run was started with.
    pub fn passport(&self) -> Result<Option<Passport>, JournalError> {
        let text = self.fact(Fact::Passport)?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()).map(|items| Passport(items).numbered()))
    }

    /// Prepares the journal for a job that leaves out samples that it had: records that this is its
    /// exclusion number `count`, which no group has trained with yet, and drops these items of the
    /// fingerprint of the environment, which the next worker reports anew.
    pub fn exclude(&mut self, count: usize, forgotten: &[&str]) -> Result<(), JournalError> {
        let mut passport = self.passport()?.unwrap_or_default();
        // Forgotten, and not recomputed: only a worker that has loaded the changed data knows the new
        // values.
        passport.0.retain(|item, _| !forgotten.contains(&item.as_str()));
        let excluded = to_json(&(self.last_generation()?.0, count));
        // Both facts at once: a job whose samples changed must never meet the old fingerprint.
        let moment = self.connection.transaction()?;
        let row = "INSERT OR REPLACE INTO facts VALUES (?1, ?2)";
        moment.execute(row, params![Fact::Excluded.name(), excluded])?;
        if !passport.0.is_empty() {
            moment.execute(row, params![Fact::Passport.name(), to_json(&passport.0)])?;
        }
        Ok(moment.commit()?)
    }

    /// Number of the job's newest exclusion, if no group has trained with it.
    pub fn unused_exclusion(&self) -> Result<Option<usize>, JournalError> {
        let fact = self.fact(Fact::Excluded)?.and_then(|text| serde_json::from_str(&text).ok());
        let Some((generation, count)): Option<(u64, usize)> = fact else { return Ok(None) };
        // A group that formed since has trained with it, so it is a part of the run.
        Ok((self.last_generation()?.0 == generation).then_some(count))
    }
}

/// Adds the columns that the tables of an earlier version lack, as the schema defines them.
fn add_columns(connection: &Connection) -> Result<(), JournalError> {
    // The schema is the only list of columns: one that is added there reaches old journals as well.
    let model = Connection::open_in_memory()?;
    model.execute_batch(SCHEMA)?;
    let mut columns = model.prepare(
        "SELECT tables.name, columns.name, columns.type || iif(columns.\"notnull\", ' NOT NULL', '')
             || coalesce(' DEFAULT ' || columns.dflt_value, '')
         FROM sqlite_master AS tables, pragma_table_info(tables.name) AS columns WHERE tables.type = 'table'",
    )?;
    let mut columns = columns.query([])?;
    while let Some(column) = columns.next()? {
        let (table, name, definition): (String, String, String) = column.try_into()?;
        if !connection.column_exists(None, table.as_str(), name.as_str())? {
            connection.execute_batch(&format!("ALTER TABLE {table} ADD COLUMN {name} {definition}"))?;
        }
    }
    Ok(())
}

/// Source of a generation's state, as journaled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "lowercase")]
pub enum RecordedStart {
    /// Initialised from the job's seed.
    Fresh,
    /// State sync from a member.
    Healed {
        /// Rank of the source.
        rank: u32,
    },
    /// Read from a checkpoint.
    Checkpoint {
        /// Rank of the member that reads it.
        rank: u32,
        /// Number of completed steps.
        step: u64,
        /// Number of committed phases of the next step.
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

/// A member's place in a generation, as journaled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedMember {
    /// Worker number.
    pub worker: u64,
    /// Range of its data shards: the first, and the one past the last.
    pub shards: [u32; 2],
    /// Whether the member writes checkpoint files.
    #[serde(default)]
    pub writes_parts: bool,
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("numbers and texts can be written as JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ganglion_membership::{GroupMember, Position, Rank};

    #[test]
    fn terms_and_workers_grow_across_openings_and_facts_stay() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let mut journal = Journal::open(&file).unwrap();
        assert_eq!(journal.begin_term(1).unwrap(), Term(1));
        assert_eq!(journal.admit(Term(1), "h", 7, None).unwrap(), WorkerId(1));
        journal.set_fact(Fact::Port, "7000").unwrap();
        drop(journal);
        let mut journal = Journal::open(&file).unwrap();
        assert_eq!(journal.begin_term(1).unwrap(), Term(2));
        assert_eq!(journal.admit(Term(2), "h", 8, None).unwrap(), WorkerId(2));
        assert_eq!(journal.fact(Fact::Port).unwrap().as_deref(), Some("7000"));
        assert_eq!(journal.fact(Fact::Run).unwrap(), None);
        assert_eq!(journal.last_generation().unwrap(), Generation(0));
    }

    /// A checkpoint that was given up before it was valid leaves its place to another state of the
    /// same step.
    #[test]
    fn what_is_counted_does_not_leap_in_a_recovery() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&folder.path().join("journal.sqlite")).unwrap();
        journal.begin_term(1).unwrap();
        journal.form(Term(1), &group(1, Start::Fresh), &Cause::Gathered).unwrap();
        let recovery = Recovery { floor: LEAP, lost: vec!["workers".to_string()] };
        journal.set_fact(Fact::Floor, &LEAP.to_string()).unwrap();
        journal.set_fact(Fact::Recovered, &to_json(&recovery)).unwrap();
        let term = journal.begin_term(1).unwrap();
        assert_eq!(term, Term(LEAP + 1));
        journal.form(term, &group(LEAP + 1, Start::Fresh), &Cause::Gathered).unwrap();
        assert_eq!(journal.counts().unwrap(), Counts { terms: 2, generations: 2, is_whole: true });
        let recovery = Recovery { lost: vec!["generations".to_string()], ..recovery };
        journal.set_fact(Fact::Recovered, &to_json(&recovery)).unwrap();
        assert!(!journal.counts().unwrap().is_whole);
    }

    #[test]
    fn another_state_takes_the_place_of_a_checkpoint_until_that_is_valid() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&folder.path().join("journal.sqlite")).unwrap();
        let of = |digest: &str| Checkpoint {
            position: Position(8),
            step: 4,
            phase: 0,
            files: Vec::new(),
            state_digest: digest.to_string(),
        };
        for (digest, kept) in
            [("condemned", "condemned"), ("good", "good"), ("good", "good"), ("late", "good")]
        {
            journal.commit(&of(digest)).unwrap();
            let [row] = &journal.checkpoints().unwrap()[..] else { panic!("one checkpoint") };
            assert_eq!(row.checkpoint.state_digest, kept);
            if digest == "good" {
                journal.made_valid(&of(digest)).unwrap();
            }
        }
    }

    /// A newer version may give its rows another meaning.
    #[test]
    fn a_journal_of_a_newer_version_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let journal = Journal::open(&file).unwrap();
        journal.connection.pragma_update(None, "user_version", LAYOUT + 1).unwrap();
        drop(journal);
        for _ in 0..2 {
            let error = Journal::open(&file).err().unwrap();
            assert!(matches!(error, JournalError::Newer(layout) if layout == LAYOUT + 1), "{error}");
        }
    }

    #[test]
    fn a_damaged_journal_is_named_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let mut journal = Journal::open(&file).unwrap();
        (0..300).for_each(|number| journal.spawning(Term(1), &format!("{number:0100}"), 0).unwrap());
        drop(journal);
        let whole = std::fs::read(&file).unwrap();
        for page in 0..whole.len() / 4096 {
            let mut bytes = whole.clone();
            bytes[page * 4096..(page + 1) * 4096].fill(0);
            std::fs::write(&file, bytes).unwrap();
            let told = Journal::open(&file).err().map(|error| error.to_string());
            let is_told = told.as_ref().is_some_and(|told| told.contains("coordinator recover /"));
            assert!(is_told, "page {page}: {told:?}");
        }
    }

    #[test]
    fn the_newest_group_and_its_processes_are_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("journal.sqlite");
        let mut journal = Journal::open(&file).unwrap();
        journal.spawning(Term(1), "t", 3).unwrap();
        let process = Spawned { pid: 77, started: 5 };
        journal.spawned("t", process).unwrap();
        journal.spawning(Term(1), "u", 4).unwrap();
        let worker = journal.admit(Term(1), "h", 77, Some("t")).unwrap();
        let members = vec![GroupMember { worker, shards: 0..8, writes_parts: true }];
        let group = Group {
            generation: Generation(4),
            members,
            position: Position(9),
            start: Start::Fresh,
            skips: Vec::new(),
            backend: Backend::Nccl,
        };
        journal.form(Term(1), &group, &Cause::Gathered).unwrap();
        drop(journal);
        let mut journal = Journal::open(&file).unwrap();
        assert_eq!(journal.last_group().unwrap(), Some(group));
        let [t, u] = &journal.children().unwrap()[..] else { panic!() };
        assert_eq!((t.process, t.worker, t.local_rank, t.ended), (Some(process), Some(worker), 3, false));
        assert_eq!((u.process, u.worker), (None, None));
        journal.ended("t").unwrap();
        assert!(journal.children().unwrap()[0].ended);
    }

    #[test]
    fn a_run_that_began_before_arithmetic_had_a_number_has_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&dir.path().join("journal.sqlite")).unwrap();
        let mut read = |text: &str| {
            journal.set_fact(Fact::Passport, text).unwrap();
            journal.passport().unwrap().unwrap()
        };
        assert_eq!(read(r#"{"build":"0.1.0","cpu":"x"}"#), read(r#"{"cpu":"x","numerics":"1"}"#));
        assert_eq!(read(r#"{"cpu":"x","numerics":"2"}"#).0["numerics"], "2");
    }

    #[test]
    fn an_exclusion_is_unused_until_a_group_has_formed() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&dir.path().join("journal.sqlite")).unwrap();
        journal.set_fact(Fact::Passport, r#"{"cpu":"x","data":"y"}"#).unwrap();
        journal.form(Term(1), &group(4, Start::Fresh), &Cause::Gathered).unwrap();
        assert_eq!(journal.unused_exclusion().unwrap(), None);
        journal.exclude(2, &["data"]).unwrap();
        assert_eq!(journal.unused_exclusion().unwrap(), Some(2));
        assert_eq!(journal.passport().unwrap().unwrap().0.into_keys().collect::<Vec<_>>(), ["cpu"]);
        journal.form(Term(1), &group(5, Start::Fresh), &Cause::Gathered).unwrap();
        assert_eq!(journal.unused_exclusion().unwrap(), None);
    }

    fn group(generation: u64, start: Start) -> Group {
        let member = |worker, shards| GroupMember { worker: WorkerId(worker), shards, writes_parts: true };
        let members = vec![member(1, 0..2), member(2, 2..4)];
        Group {
            generation: Generation(generation),
            members,
            position: Position(6),
            start,
            skips: Vec::new(),
            backend: Backend::Gloo,
        }
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
        let worker = journal.admit(term, "h", 7, None).unwrap();
        journal.set_fact(Fact::Samples, "100").unwrap();
        let shape = StepShape::new(3, vec![0, 2]);
        journal.set_fact(Fact::Shape, &shape_text(shape.as_ref().unwrap())).unwrap();
        journal.form(term, &group(1, Start::Fresh), &Cause::Gathered).unwrap();
        journal.commit(&saved("d")).unwrap();
        journal.made_valid(&saved("d")).unwrap();
        journal.form(term, &group(2, Start::Healed(Rank(1))), &Cause::Gathered).unwrap();
        journal.commit(&saved("e")).unwrap();
        journal.form(term, &group(3, Start::Checkpoint(Rank(0), saved("d"))), &Cause::Gathered).unwrap();
        for open in [true, false] {
            if !open {
                journal = Journal::open(&folder.path().join("other.sqlite")).unwrap();
            }
            let history = History::read(&file).unwrap();
            assert_eq!((history.samples, &history.shape), (Some(100), &shape));
            assert_eq!((history.terms[0].term, history.terms[0].metrics_every_steps), (term.0, 5));
            assert_eq!(history.workers.get(&worker.0), Some(&term.0));
            let starts: Vec<_> = history.generations.iter().map(|row| row.start.clone().unwrap()).collect();
            let state_digest = "d".to_string();
            let from = RecordedStart::Checkpoint { rank: 0, step: 3, phase: 0, state_digest };
            assert_eq!(starts, [RecordedStart::Fresh, RecordedStart::Healed { rank: 1 }, from]);
            assert_eq!(
                history.generations[1].members[1],
                RecordedMember { worker: 2, shards: [2, 4], writes_parts: true }
            );
            let [kept] = history.checkpoints.as_slice() else { panic!("one checkpoint") };
            assert_eq!((kept.state_digest.as_str(), kept.generation, kept.position), ("d", 1, 6));
        }
        drop(journal);
        let files = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(files, 2, "reading leaves nothing behind");
    }
}
