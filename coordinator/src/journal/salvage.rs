//! Salvage of a damaged journal: its readable rows, and a new journal from them.
//!
//! 1. The damaged journal is only read.
//! 2. A table is read from both ends up to the damage; a table that was read without an error is whole.
//! 3. Numbers of the new journal lie far above all that the old one can have assigned: its newest rows
//!    may be the lost ones, and no earlier worker, group or coordinator may be taken for a new one.

use std::collections::BTreeMap;
use std::path::Path;

use ganglion_membership::{Backend, Generation, Group, Position, Start};
use rusqlite::types::Value;
use rusqlite::{Connection, params, params_from_iter};
use serde::{Deserialize, Serialize};

use super::{Fact, Journal, JournalError, opening};

/// Gap between the numbers before a recovery and those after it. A run that assigned a number each
/// millisecond would take eleven days to cross it, and a reader sees at a glance which numbers are older.
pub const LEAP: u64 = 1_000_000_000;

/// Tables that are copied into the new journal. The started processes are not: none may be adopted,
/// for they may belong to a newer group than the newest readable one.
const TABLES: [&str; 8] =
    ["facts", "terms", "workers", "generations", "skips", "checkpoints", "evaluations", "set_aside"];
/// Facts of the old journal that are still true.
// Not the closed, invalidated or excluded generation: these name generations that no longer count after
// a recovery.
const FACTS: [Fact; 8] = [
    Fact::Run,
    Fact::Port,
    Fact::HttpPort,
    Fact::Passport,
    Fact::Files,
    Fact::Samples,
    Fact::Shape,
    Fact::Storage,
];

/// Report of a recovery from a journal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// Greatest number that may stem from before the recovery.
    pub floor: u64,
    /// Tables that could not be read as a whole.
    pub lost: Vec<String>,
}

impl Recovery {
    /// Whether a table may lack an earlier row with this number.
    pub fn may_lack(&self, table: &str, number: u64) -> bool {
        number <= self.floor && self.lost.iter().any(|lost| lost == table)
    }
}

/// Readable rows, by table.
#[derive(Debug, Default)]
pub struct Salvaged(BTreeMap<&'static str, Table>);

#[derive(Debug, Default)]
struct Table {
    columns: Vec<String>,
    rows: BTreeMap<i64, Vec<Value>>,
    is_whole: bool,
}

impl Salvaged {
    /// Reads the readable rows of a journal; none if there is no journal.
    pub fn read(file: &Path) -> Salvaged {
        // SQLite would create a missing file.
        let opened = if file.is_file() { opening::to_read(file).ok() } else { None };
        let Some(connection) = opened else { return Salvaged::default() };
        Salvaged(TABLES.into_iter().map(|table| (table, read_table(&connection, table))).collect())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.0.values().map(|table| table.rows.len()).sum()
    }

    /// Tables that were not read as a whole.
    pub fn lost(&self) -> Vec<String> {
        let is_whole = |table: &&str| self.0.get(table).is_some_and(|table| table.is_whole);
        TABLES.into_iter().filter(|table| !is_whole(table)).map(str::to_string).collect()
    }

    /// Value of a fact, if it could be read.
    pub fn fact(&self, fact: Fact) -> Option<String> {
        let texts = self.0.get("facts")?.rows.values();
        let mut values = texts.filter(|row| row.first() == Some(&Value::Text(fact.name().to_string())));
        match values.next()?.get(1)? {
            Value::Text(value) => Some(value.clone()),
            _ => None,
        }
    }

    /// Greatest number of a term, generation or worker in any row.
    pub fn greatest_number(&self) -> u64 {
        let named = |(name, table): (&&str, &Table)| -> Vec<u64> {
            let numbers = ["term", "worker", "generation"];
            let places: Vec<usize> = (0..table.columns.len())
                .filter(|at| *name != "facts" && numbers.contains(&table.columns[*at].as_str()))
                .collect();
            let values = table.rows.values().flat_map(|row| places.iter().map(|at| &row[*at]));
            let number = |value: &Value| match value {
                Value::Integer(number) => u64::try_from(*number).ok(),
                _ => None,
            };
            values.filter_map(number).collect()
        };
        let floor = self.fact(Fact::Floor).and_then(|floor| floor.parse().ok());
        self.0.iter().flat_map(named).chain(floor).max().unwrap_or(0)
    }
}

fn read_table(connection: &Connection, table: &str) -> Table {
    let mut read = Table::default();
    if matches!(connection.table_exists(None, table), Ok(false)) {
        // An earlier version did not have the table. Where the schema is lost this looks the same,
        // so the other tables decide.
        read.is_whole = matches!(connection.table_exists(None, "facts"), Ok(true));
        return read;
    }
    // Each direction stops at the first unreadable page; together they find the rows on both sides of
    // the damage.
    read.is_whole =
        ["ASC", "DESC"].iter().any(|order| read_rows(connection, table, order, &mut read).is_ok());
    read
}

fn read_rows(connection: &Connection, table: &str, order: &str, read: &mut Table) -> rusqlite::Result<()> {
    let mut statement =
        connection.prepare(&format!("SELECT rowid, * FROM {table} ORDER BY rowid {order}"))?;
    read.columns = statement.column_names().skip(1).map(str::to_string).collect();
    let columns = read.columns.len();
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let values = (1..=columns).map(|at| row.get(at)).collect::<rusqlite::Result<_>>()?;
        // By row number, so that a row found from both ends counts once.
        read.rows.insert(row.get(0)?, values);
    }
    Ok(())
}

impl Journal {
    /// Copies the readable rows of another journal, and skips all numbers that it may have
    /// assigned. `before` describes earlier recoveries.
    pub fn take_over(&mut self, salvaged: &Salvaged, before: Recovery) -> Result<Recovery, JournalError> {
        for fact in FACTS {
            if let Some(value) = salvaged.fact(fact) {
                self.set_fact(fact, &value)?;
            }
        }
        let change = self.connection.transaction()?;
        for (table, read) in salvaged.0.iter().filter(|(table, _)| **table != "facts") {
            let mut known = Vec::new();
            for (at, column) in read.columns.iter().enumerate() {
                // A journal of a newer version may have columns that this one does not know.
                if change.column_exists(None, *table, column.as_str())? {
                    known.push((at, column.as_str()));
                }
            }
            let columns: Vec<&str> = known.iter().map(|(_, column)| *column).collect();
            let places = vec!["?"; columns.len()].join(", ");
            let insert = format!("INSERT OR IGNORE INTO {table} ({}) VALUES ({places})", columns.join(", "));
            for row in read.rows.values() {
                change.execute(&insert, params_from_iter(known.iter().map(|(at, _)| &row[*at])))?;
            }
        }
        change.commit()?;
        // The next multiple of `LEAP`, above all that was ever seen.
        let floor = (before.floor.max(salvaged.greatest_number()) / LEAP + 1) * LEAP;
        let mut lost = [before.lost, salvaged.lost()].concat();
        lost.sort();
        lost.dedup();
        let recovery = Recovery { floor, lost };
        // Last: until it is there, the draft has no numbers to give, and it is not exchanged.
        self.set_fact(Fact::Floor, &floor.to_string())?;
        self.set_fact(Fact::Recovered, &super::to_json(&recovery))?;
        Ok(recovery)
    }

    /// Number above which all new numbers are; 0 in a journal that was never recovered.
    pub(super) fn floor(&self) -> Result<u64, JournalError> {
        Ok(self.fact(Fact::Floor)?.and_then(|floor| floor.parse().ok()).unwrap_or(0))
    }

    /// Placeholder for all groups before a recovery: no member of it can come back.
    pub(super) fn group_before(floor: u64) -> Group {
        Group {
            generation: Generation(floor),
            members: Vec::new(),
            position: Position(0),
            start: Start::Fresh,
            skips: Vec::new(),
            backend: Backend::default(),
        }
    }

    /// Records a checkpoint that was found on the storage.
    pub fn found(&mut self, checkpoint: &ganglion_membership::Checkpoint) -> Result<(), JournalError> {
        let row = "INSERT INTO checkpoints (step, phase, position, state_digest, generation, valid)
            VALUES (?1, ?2, ?3, ?4, 0, 1) ON CONFLICT DO UPDATE SET valid = 1";
        let position = checkpoint.position.0;
        self.connection
            .execute(row, params![checkpoint.step, checkpoint.phase, position, checkpoint.state_digest])?;
        Ok(())
    }
}
