//! Measures the cost of a death, on real processes: of a worker, of the coordinator, and for
//! comparison of a process of other trainers. Prints a table and writes it into a page.
//!
//! 1. A figure comes from the times that the processes themselves recorded, not from when this
//!    program polled.
//! 2. A missed target is marked as missed. Only a broken promise, such as a repeated step, makes
//!    the exit code 1.
#![forbid(unsafe_code)]

mod coordinator;
mod figures;
mod healthy;
mod options;
mod page;
mod peers;
mod proxy;
mod workers;

use std::process::ExitCode;

use figures::Section;
use options::Options;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)).and_then(checked) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("recovery: {problem}");
            return ExitCode::from(2);
        }
    };
    let sections = measure(&options);
    if let Some(path) = &options.page
        && let Err(error) = page::write(path, &page::render(&options, &sections))
    {
        eprintln!("recovery: {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    let broken: Vec<&String> = sections.iter().flat_map(|section| &section.broken).collect();
    broken.iter().for_each(|promise| eprintln!("broken: {promise}"));
    if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Checks that the page can be written, before hours are spent on measurements.
fn checked(options: Options) -> Result<Options, String> {
    match &options.page {
        Some(path) => {
            page::try_out(path).map_err(|error| format!("--page {}: {error}", path.display()))?;
            Ok(options)
        }
        None => Ok(options),
    }
}

/// Runs all requested measurements; each section is printed as soon as it is done.
fn measure(options: &Options) -> Vec<Section> {
    let mut sections = Vec::new();
    let mut done = |section: Section| {
        println!("{}", section.render());
        sections.push(section);
    };
    let mut ours = None;
    if options.kills > 0 {
        let measured = workers::measure(options);
        done(measured.section());
        ours = Some(measured);
    }
    if options.restarts > 0 {
        done(coordinator::measure(options));
    }
    if options.seconds > 0 {
        done(healthy::measure(options));
    }
    if options.peer_kills > 0 {
        done(peers::measure(options, ours.as_ref()));
    }
    sections
}
