//! Measures training beside PyTorch's: the same networks, data, batches and arithmetic, on the same machine, in turns.
//! Prints a table and writes it into a page.
//!
//! 1. What is compared runs in alternation, so that a busy moment of the machine hits both; a ratio is the median of the
//!    ratios of neighbours.
//! 2. A missed target is shown as missed.
#![forbid(unsafe_code)]

mod contenders;
mod rows;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use contenders::Figures;
use ganglion_tests::measured::{date, load, machine, write_part};
use rows::{ROWS, Row};

const BEGIN: &str = "<!-- Written by `make bench`; changes below this line are lost. -->";
const END: &str = "<!-- Written by hand again. -->";

/// What is asked for.
struct Options {
    /// Where PyTorch for Python is.
    python_path: PathBuf,
    page: Option<PathBuf>,
    /// Only rows whose name contains one of these.
    only: Vec<String>,
    /// How often each contender runs; 0 for as often as the row says.
    rounds: usize,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("bench: {problem}");
            return ExitCode::from(2);
        }
    };
    match measure(&options) {
        Ok(text) => {
            println!("{text}");
            let written = options.page.as_ref().map_or(Ok(()), |page| write_part(page, BEGIN, END, &text));
            written.map_or_else(|error| fail(&error.to_string()), |()| ExitCode::SUCCESS)
        }
        Err(problem) => fail(&problem),
    }
}

fn fail(problem: &str) -> ExitCode {
    eprintln!("bench: {problem}");
    ExitCode::FAILURE
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { python_path: ".tools/bench".into(), page: None, only: Vec::new(), rounds: 0 };
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name}: no value"))?;
        match name.as_str() {
            "--python-path" => options.python_path = value.into(),
            "--page" => options.page = Some(value.into()),
            "--only" => options.only.push(value),
            "--rounds" => options.rounds = value.parse().map_err(|_| format!("{name} {value}: no count"))?,
            _ => return Err(format!("{name}: no such option")),
        }
    }
    Ok(options)
}

fn measure(options: &Options) -> Result<String, String> {
    let before = load();
    let mut results = Vec::new();
    let is_wanted = |row: &Row| options.only.iter().any(|only| row.name().contains(only.as_str()));
    for row in ROWS.iter().filter(|row| options.only.is_empty() || is_wanted(row)) {
        results.push((row, run_in_turns(row, options)?));
    }
    let head = format!(
        "Measured {} on {}, by `{}`; load average {before} before, {} after. PyTorch is {}.",
        date(),
        machine(),
        std::env::args().collect::<Vec<_>>().join(" "),
        load(),
        contenders::version(&options.python_path),
    );
    Ok(format!("{head}\n\n{}", table::render(&results)))
}

/// Runs all contenders of a row one after the other, again and again: rounds of (ours, usual, tuned).
fn run_in_turns(row: &Row, options: &Options) -> Result<Vec<[Figures; 3]>, String> {
    let rounds = if options.rounds > 0 { options.rounds } else { row.rounds };
    let mut all = Vec::new();
    for round in 1..=rounds {
        let ours = contenders::ours(row)?;
        let usual = contenders::peer(row, "usual", &options.python_path)?;
        let tuned = contenders::peer(row, "tuned", &options.python_path)?;
        eprintln!(
            "{}, round {round} of {rounds}: ours {:.1} ms, usual {:.1} ms, tuned {:.1} ms a step",
            row.name(),
            ours.step(),
            usual.step(),
            tuned.step(),
        );
        all.push([ours, usual, tuned]);
    }
    Ok(all)
}
