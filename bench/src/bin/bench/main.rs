//! Measures training: against PyTorch's (the same networks, data, batches and arithmetic, on the
//! same machine, in turns), with and without the cost of the promise, and as jobs and clusters
//! grow. Prints tables and writes them into a page.
//!
//! 1. Compared runs alternate, so that a busy moment of the machine hits both; a ratio is the
//!    median of the ratios of neighbours.
//! 2. A missed target is shown as missed. Only a run that fails makes the exit code 1, and the others go on.
#![forbid(unsafe_code)]

mod chart;
mod contenders;
mod figures;
mod growth;
mod job;
mod losses;
mod options;
mod packages;
mod promise;
mod rows;
mod table;

use std::process::ExitCode;

use ganglion_storage::whole;
use ganglion_tests::measured::{date, load, machine, now, try_part, write_part};
use options::{Options, Part};

const END: &str = "<!-- Written by hand again. -->";

fn main() -> ExitCode {
    let options = Options::parse(std::env::args().skip(1));
    let options = match options.and_then(|options| check(&options).map(|()| options)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("bench: {problem}");
            return ExitCode::from(2);
        }
    };
    let mut code = ExitCode::SUCCESS;
    for part in &options.parts {
        for problem in carry_out(*part, &options).unwrap_or_else(|problem| vec![problem]) {
            eprintln!("bench: {}: {}", part.name(), problem.trim_end());
            code = ExitCode::FAILURE;
        }
    }
    code
}

/// Checks the options before time is spent.
fn check(options: &Options) -> Result<(), String> {
    for part in &options.parts {
        match part {
            Part::Rows => drop(rows::wanted(options)?),
            Part::Promise => drop(promise::wanted(options)?),
            Part::Packages => drop(packages::wanted(options)?),
            Part::Growth | Part::Losses => {}
        }
    }
    for part in &options.parts {
        if let Some(page) = &options.page {
            try_part(page, &begin(*part), END)
                .map_err(|error| format!("--page {}: {error}", page.display()))?;
        }
        if let (Some(name), Some(folder)) = (part.picture(), &options.pictures) {
            let tried = whole::try_out(&folder.join(name));
            tried.map_err(|error| format!("--pictures {}: {error}", folder.display()))?;
        }
    }
    Ok(())
}

/// Measures a part and writes it into the page; returns the failures of its runs.
fn carry_out(part: Part, options: &Options) -> Result<Vec<String>, String> {
    let (load_before, begun) = (load(), now());
    let report = match part {
        Part::Rows => rows::measure(options),
        Part::Promise => promise::measure(options),
        Part::Growth => growth::measure(options),
        Part::Losses => losses::measure(options),
        Part::Packages => packages::measure(options),
    }?;
    let peer = match part {
        Part::Rows | Part::Losses | Part::Packages => {
            format!(" PyTorch is {}.", contenders::version(&options.python_path))
        }
        Part::Promise | Part::Growth => String::new(),
    };
    let mut text = format!(
        "Measured {} on {}, by `{}`, in {:.0} minutes; load average {load_before} before, {} after.{peer}\n\n{}",
        date(),
        machine(),
        options.command(part),
        (now() - begun) / 60.0,
        load(),
        report.text.trim_end(),
    );
    println!("{text}\n");
    if let (Some(name), Some(folder)) = (part.picture(), &options.pictures) {
        let path = folder.join(name);
        whole::write(&path, chart::draw(&report.panels)?.as_bytes())
            .map_err(|error| format!("{}: {error}", path.display()))?;
        text = format!("{text}\n\n![The same as a picture](../docs/{name})");
    }
    if let Some(page) = &options.page {
        write_part(page, &begin(part), END, &text).map_err(|error| format!("{}: {error}", page.display()))?;
    }
    Ok(report.problems)
}

/// Returns the line of the page after which a part is written.
fn begin(part: Part) -> String {
    format!("<!-- Written by `make bench PARTS={}`; changes below this line are lost. -->", part.name())
}
