//! Journals of earlier versions, as these wrote them: each must open, get what it lacks, and go on.

use std::path::Path;

use ganglion_membership::{Backend, Cause, Generation, Position, Rank, Start, Term, WorkerId};
use rusqlite::Connection;

use super::*;

/// Layouts of earlier versions, oldest first: what the newest change of each brought, the tables
/// with their rows, and the facts that a reader of today finds in them.
const LAYOUTS: [(&str, &str); 7] = [
    ("the first", FIRST),
    ("cadence, cause, generation of a checkpoint", WITH_CAUSES),
    ("sessions that resume", WITH_CHILDREN),
    ("backend of a group", WITH_BACKENDS),
    ("evaluations", WITH_EVALUATIONS),
    ("validity of a checkpoint, records set aside", WITH_VALIDITY),
    ("machine of a process", WITH_NODES),
];

/// Facts of all versions.
const FACTS: &str = "
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    INSERT INTO facts VALUES ('run', 'r-7'), ('port', '7000'), ('samples', '64'),
        ('passport', '{\"build\":\"0.1.0\",\"cpu\":\"x\"}');
";

const FIRST: &str = "
    CREATE TABLE terms (term INTEGER PRIMARY KEY, started REAL NOT NULL, pid INTEGER NOT NULL);
    CREATE TABLE workers (
        worker INTEGER PRIMARY KEY, term INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL);
    CREATE TABLE generations (
        generation INTEGER PRIMARY KEY, term INTEGER NOT NULL, position INTEGER NOT NULL,
        start TEXT NOT NULL, members TEXT NOT NULL);
    CREATE TABLE checkpoints (
        step INTEGER NOT NULL, phase INTEGER NOT NULL, position INTEGER NOT NULL,
        state_digest TEXT NOT NULL, PRIMARY KEY (step, phase));
    INSERT INTO terms VALUES (1, 1.5, 70), (2, 2.5, 71);
    INSERT INTO workers VALUES (1, 1, 'h', 80), (2, 2, 'h', 81);
    INSERT INTO generations VALUES
        (1, 1, 0, 'Fresh', '[{\"shards\":[0,8],\"worker\":1}]'),
        (2, 2, 8, 'Healed(Rank(0))', '[{\"shards\":[0,4],\"worker\":1},{\"shards\":[4,8],\"worker\":2}]');
    INSERT INTO checkpoints VALUES (4, 0, 8, 'd');
    PRAGMA user_version = 1;
";

const WITH_CAUSES: &str = "
    CREATE TABLE terms (term INTEGER PRIMARY KEY, started REAL NOT NULL, pid INTEGER NOT NULL,
        metrics_every_steps INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE workers (
        worker INTEGER PRIMARY KEY, term INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL);
    CREATE TABLE generations (
        generation INTEGER PRIMARY KEY, term INTEGER NOT NULL, position INTEGER NOT NULL,
        start TEXT NOT NULL, members TEXT NOT NULL, cause TEXT NOT NULL DEFAULT '');
    CREATE TABLE checkpoints (
        step INTEGER NOT NULL, phase INTEGER NOT NULL, position INTEGER NOT NULL,
        state_digest TEXT NOT NULL, generation INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (step, phase));
    INSERT INTO terms VALUES (1, 1.5, 70, 1), (2, 2.5, 71, 1);
    INSERT INTO workers VALUES (1, 1, 'h', 80), (2, 2, 'h', 81);
    INSERT INTO generations VALUES
        (1, 1, 0, '{\"from\":\"fresh\"}', '[{\"worker\":1,\"shards\":[0,8]}]', ''),
        (2, 2, 8, '{\"from\":\"healed\",\"rank\":0}',
            '[{\"worker\":1,\"shards\":[0,4]},{\"worker\":2,\"shards\":[4,8]}]', '');
    INSERT INTO checkpoints VALUES (4, 0, 8, 'd', 1);
    PRAGMA user_version = 1;
";

/// Tables of version 2, as far as all later versions have them alike.
const ROWS_OF_2: &str = "
    CREATE TABLE skips (position INTEGER PRIMARY KEY);
    INSERT INTO terms VALUES (1, 1.5, 70, 1), (2, 2.5, 71, 1);
    INSERT INTO workers VALUES (1, 1, 'h', 80, 't'), (2, 2, 'h', 81, NULL);
    INSERT INTO children (token, term, local_rank, pid, started) VALUES ('t', 1, 0, 80, 5), ('u', 2, 1, NULL, NULL);
    INSERT INTO generations (generation, term, position, start, members, cause) VALUES
        (1, 1, 0, '{\"from\":\"fresh\"}', '[{\"worker\":1,\"shards\":[0,8],\"writes_parts\":true}]', 'gathered'),
        (2, 2, 8, '{\"from\":\"healed\",\"rank\":0}',
            '[{\"worker\":1,\"shards\":[0,4],\"writes_parts\":true},{\"worker\":2,\"shards\":[4,8],\"writes_parts\":true}]',
            'joined');
    INSERT INTO checkpoints (step, phase, position, state_digest, generation) VALUES (4, 0, 8, 'd', 1);
    INSERT INTO skips VALUES (6);
    PRAGMA user_version = 2;
";

const WITH_CHILDREN: &str = "
    CREATE TABLE terms (term INTEGER PRIMARY KEY, started REAL NOT NULL, pid INTEGER NOT NULL,
        metrics_every_steps INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE workers (
        worker INTEGER PRIMARY KEY, term INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, token TEXT);
    CREATE TABLE children (
        token TEXT PRIMARY KEY, term INTEGER NOT NULL, local_rank INTEGER NOT NULL,
        pid INTEGER, started INTEGER, ended INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE generations (
        generation INTEGER PRIMARY KEY, term INTEGER NOT NULL, position INTEGER NOT NULL,
        start TEXT NOT NULL, members TEXT NOT NULL, cause TEXT NOT NULL DEFAULT '');
    CREATE TABLE checkpoints (
        step INTEGER NOT NULL, phase INTEGER NOT NULL, position INTEGER NOT NULL,
        state_digest TEXT NOT NULL, generation INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (step, phase));
";

/// Changes to the tables of the version before.
const WITH_BACKENDS: &str = "ALTER TABLE generations ADD COLUMN backend TEXT NOT NULL DEFAULT 'Gloo';";
const WITH_EVALUATIONS: &str = "CREATE TABLE evaluations (step INTEGER PRIMARY KEY, row BLOB NOT NULL);";
const WITH_VALIDITY: &str = "
    ALTER TABLE checkpoints ADD COLUMN valid INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE set_aside (
        file TEXT NOT NULL, aside TEXT NOT NULL, found TEXT NOT NULL, PRIMARY KEY (file, aside));
";
const WITH_NODES: &str = "
    ALTER TABLE children ADD COLUMN host TEXT NOT NULL DEFAULT '';
    ALTER TABLE children ADD COLUMN boot TEXT NOT NULL DEFAULT '';
    ALTER TABLE children ADD COLUMN pids TEXT NOT NULL DEFAULT '';
";

/// Writes the journal of a layout.
fn write(file: &Path, number: usize) {
    let journal = Connection::open(file).unwrap();
    journal.execute_batch(FACTS).unwrap();
    let first_of_2 = 2;
    if number < first_of_2 {
        return journal.execute_batch(LAYOUTS[number].1).unwrap();
    }
    for (_, change) in &LAYOUTS[first_of_2..=number] {
        journal.execute_batch(change).unwrap();
    }
    journal.execute_batch(ROWS_OF_2).unwrap();
}

/// Tables with their columns, types and defaults.
fn tables(file: &Path) -> Vec<(String, String, String)> {
    let journal = Connection::open(file).unwrap();
    let mut columns = journal
        .prepare(
            "SELECT m.name, p.name, p.type || p.\"notnull\" || coalesce(p.dflt_value, '') || p.pk
             FROM sqlite_master m, pragma_table_info(m.name) p WHERE m.type = 'table' ORDER BY m.name, p.name",
        )
        .unwrap();
    let columns = columns.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    columns.map(Result::unwrap).collect()
}

/// Invariant 5.
#[test]
fn a_journal_of_each_earlier_version_opens_and_gets_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let new = folder.path().join("new.sqlite");
    drop(Journal::open(&new).unwrap());
    for (number, (name, _)) in LAYOUTS.iter().enumerate() {
        let file = folder.path().join(format!("{number}.sqlite"));
        write(&file, number);
        // A reader changes nothing, and finds what is there.
        let before = tables(&file);
        let history = History::read(&file).unwrap();
        assert_eq!((history.generations.len(), history.shape), (2, None), "{name}");
        assert_eq!(tables(&file), before, "{name}");
        for _ in 0..2 {
            drop(Journal::open(&file).unwrap());
            assert_eq!(tables(&file), tables(&new), "{name}");
        }
        let layout: u32 = Connection::open(&file)
            .unwrap()
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .unwrap();
        assert_eq!(layout, LAYOUT, "{name}");
    }
}

#[test]
fn a_run_goes_on_with_the_journal_of_each_earlier_version() {
    let folder = tempfile::tempdir().unwrap();
    for (number, (name, _)) in LAYOUTS.iter().enumerate() {
        let file = folder.path().join(format!("{number}.sqlite"));
        write(&file, number);
        let mut journal = Journal::open(&file).unwrap();
        assert_eq!(journal.fact(Fact::Run).unwrap().as_deref(), Some("r-7"), "{name}");
        assert_eq!(journal.passport().unwrap().unwrap().0["numerics"], "1", "{name}");
        let group = journal.last_group().unwrap().unwrap();
        assert_eq!(
            (group.generation, group.position, group.backend),
            (Generation(2), Position(8), Backend::Gloo)
        );
        let shards: Vec<_> =
            group.members.iter().map(|member| (member.worker.0, member.shards.clone())).collect();
        assert_eq!(shards, [(1, 0..4), (2, 4..8)], "{name}");
        let [saved] = &journal.checkpoints().unwrap()[..] else { panic!("{name}: one checkpoint") };
        assert_eq!((saved.checkpoint.state_digest.as_str(), saved.valid), ("d", false), "{name}");
        assert_eq!(journal.newest_position().unwrap(), Position(8), "{name}");
        let is_of_2 = number >= 2;
        assert_eq!(journal.skips().unwrap().len(), usize::from(is_of_2), "{name}");
        let processes: Vec<_> = journal.children().unwrap().iter().map(|child| child.process).collect();
        let known = [Some(Spawned { pid: 80, started: 5 }), None];
        assert_eq!(processes, if is_of_2 { &known[..] } else { &[] }, "{name}");
        assert!(
            journal.evaluations().unwrap().is_empty() && journal.set_asides().unwrap().is_empty(),
            "{name}"
        );

        // It goes on: numbers grow, and every table takes a row.
        assert_eq!(journal.begin_term(5).unwrap(), Term(3), "{name}");
        let worker = journal.admit(Term(3), "h", 90, Some("v")).unwrap();
        assert_eq!(worker, WorkerId(3), "{name}");
        journal.spawning(Term(3), "v", 0).unwrap();
        journal.spawned("v", Spawned { pid: 90, started: 6 }).unwrap();
        assert_eq!(journal.children().unwrap().last().unwrap().worker, Some(worker), "{name}");
        let start = Start::Checkpoint(Rank(0), saved.checkpoint.clone());
        let next = Group { generation: Generation(3), start, ..group };
        journal.form(Term(3), &next, &Cause::Gathered).unwrap();
        journal.made_valid(&saved.checkpoint).unwrap();
        journal.allow_skip(Position(9)).unwrap();
        drop(journal);
        let history = History::read(&file).unwrap();
        assert_eq!(history.terms.last().unwrap().metrics_every_steps, 5, "{name}");
        assert!(
            matches!(history.generations[2].start, Some(RecordedStart::Checkpoint { step: 4, .. })),
            "{name}"
        );
        // The first version wrote starts for people.
        assert_eq!(history.generations[0].start.is_some(), number > 0, "{name}");
        assert!(Journal::open(&file).unwrap().checkpoints().unwrap()[0].valid, "{name}");
    }
}
