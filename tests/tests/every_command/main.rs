//! Every command of both programs under every condition that its user may meet: the table of outcomes.
//!
//! 1. The commands are those of `--help`, so a new one without a row fails this test.
//! 2. Whatever the table says: no command panics; one that fails says why on standard error, and leaves
//!    the file that it would have written as it was, and no draft beside it; a closed pipe ends it
//!    quietly; nothing is drawn on a terminal that cannot draw, and no drawn line is wider than the
//!    terminal.
#![allow(clippy::unwrap_used)] // a test may panic

mod cell;
mod fixture;
mod table;

use std::collections::{BTreeSet, VecDeque};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use cell::{Cell, Seen};
use fixture::Fixture;
use ganglion_tests::program;
use table::{CONDITIONS, Condition, ROWS, Row};

/// Cells that run at once.
const AT_ONCE: usize = 4;

#[test]
fn every_command_has_a_row() {
    let known: BTreeSet<String> = ROWS.iter().map(|row| row.command.to_string()).collect();
    let mut found = BTreeSet::new();
    for name in ["coordinator", "worker"] {
        // The program itself trains, or joins.
        found.insert(name.to_string());
        collect(name, &[], &mut found);
    }
    assert_eq!(known, found, "each command of the programs has a row in table.rs, and each row a command");
}

/// Adds the commands below one, as its help lists them.
fn collect(name: &str, path: &[&str], found: &mut BTreeSet<String>) {
    let help = Command::new(program(name)).args(path).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let Some((_, commands)) = help.split_once("\nCommands:\n") else { return };
    let lines = commands.lines().take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.strip_prefix("  ")).filter(|line| !line.starts_with(' '));
    for below in names.filter_map(|line| line.split(' ').next()).filter(|below| *below != "help") {
        let path = [path, &[below]].concat();
        let before = found.len();
        collect(name, &path, found);
        // One that only holds others is none itself.
        if found.len() == before {
            found.insert(format!("{name} {}", path.join(" ")));
        }
    }
}

#[test]
fn every_command_ends_as_the_table_says_under_every_condition() {
    let begun = Instant::now();
    let fixture = Fixture::new();
    println!("the runs are there after {:.1} s", begun.elapsed().as_secs_f64());
    let cells = ROWS.iter().flat_map(|row| CONDITIONS.iter().map(move |condition| (row, *condition)));
    let cells = Mutex::new(cells.filter(|(row, condition)| row.expected(*condition) != "-").collect());
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((row, condition)) = next(&cells) {
                    let seen = Cell::new(&fixture, row, condition).map(Cell::run);
                    done.lock().unwrap().push((row, condition, seen));
                }
            });
        }
    });
    let done = done.into_inner().unwrap();
    print_table(&done);
    let wrong = done.iter().filter_map(|(row, condition, seen)| {
        let seen = seen.as_ref()?;
        let faults = seen.faults(row.expected(*condition), *condition).join("; ");
        (!faults.is_empty()).then(|| format!("{} under {condition:?}: {faults}\n{seen}", row.command))
    });
    let wrong: Vec<String> = wrong.collect();
    println!("{} cells in {:.1} s", done.len(), begun.elapsed().as_secs_f64());
    assert!(wrong.is_empty(), "{} cells are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

fn next<'a>(cells: &Mutex<VecDeque<(&'a Row, Condition)>>) -> Option<(&'a Row, Condition)> {
    cells.lock().unwrap().pop_front()
}

/// Prints the exit codes, and what each failure said first.
fn print_table(done: &[(&Row, Condition, Option<Seen>)]) {
    let of = |row: &Row, condition: Condition| {
        done.iter().find(|(known, at, _)| known.command == row.command && *at == condition)
    };
    let names: Vec<String> = CONDITIONS.iter().map(|condition| format!("{condition:?}")).collect();
    println!("{:<26} {}", "", names.join(" "));
    for row in ROWS {
        let codes = CONDITIONS.iter().zip(&names).map(|(condition, name)| {
            let seen = of(row, *condition).and_then(|(_, _, seen)| seen.as_ref());
            format!(
                "{:>width$}",
                seen.map_or("-".to_string(), |seen| seen.code.to_string()),
                width = name.len()
            )
        });
        println!("{:<26} {}", row.command, codes.collect::<Vec<_>>().join(" "));
    }
    for row in ROWS {
        for condition in CONDITIONS {
            if let Some((_, _, Some(seen))) = of(row, *condition)
                && seen.code != 0
            {
                println!(
                    "{:<26} {:<14} {} {}",
                    row.command,
                    format!("{condition:?}"),
                    seen.code,
                    seen.first_words()
                );
            }
        }
    }
    let mut slow: Vec<_> = done
        .iter()
        .filter_map(|(row, condition, seen)| Some((seen.as_ref()?.seconds, row.command, condition)))
        .collect();
    slow.sort_by(|one, other| other.0.total_cmp(&one.0));
    for (seconds, command, condition) in slow.iter().take(5) {
        println!("{seconds:.1} s: {command} under {condition:?}");
    }
}
