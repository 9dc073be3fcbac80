//! `make golden`: this tree computes the bits that another commit computes, or each difference is named.
//!
//! Both builds run every job of `configs/`, shrunk, in both precisions, on one and on three workers, and one
//! job while a worker is killed. Compared are the digest of the last state and a hash of each shard gradient,
//! the tensors that a data shard contributes to an update, before any sum.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)] // it is for people

mod base;
mod bits;
mod job;
mod options;
mod row;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;

use ganglion_tests::measured::computes_bf16;
use ganglion_tests::program;

use crate::job::{Precision, Way};
use crate::options::Options;
use crate::row::Row;
use crate::verdict::{Found, verdict};

/// Folders of the two builds' programs.
pub struct Builds {
    /// Folder of the build to compare with.
    pub base: PathBuf,
    /// Folder of this tree's build.
    pub here: PathBuf,
}

fn main() -> ExitCode {
    let judged = compare().and_then(|found| {
        let all = found.differences.iter().chain(&found.failures);
        all.for_each(|what| println!("- {what}"));
        verdict(&found)
    });
    match judged {
        Ok(says) => {
            println!("{says}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs all jobs with both builds.
fn compare() -> Result<Found, String> {
    let options = Options::parse(std::env::args().skip(1))?;
    let base = match options.base_programs {
        Some(folder) => folder,
        None => base::programs(options.base.as_deref())?,
    };
    let here = program("coordinator").with_file_name("");
    let builds = Builds { base, here };
    let data = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
    job::write_data(data.path()).map_err(|error| format!("cannot write data: {error}"))?;
    let jobs = job::read_all(&base::root().join("configs"), data.path(), options.only.as_deref())?;
    let precisions = if computes_bf16() { &Precision::ALL[..] } else { &Precision::ALL[..1] };
    if !computes_bf16() {
        println!("bf16 is left out: this CPU has no instructions for it");
    }
    print_line("job", "", Way::ALL.map(Way::name), "shard gradients");
    let numerics = [base::numerics(&builds.base)?, base::numerics(&builds.here)?];
    let mut found = Found { numerics, ..Found::default() };
    for job in &jobs {
        for precision in precisions {
            let Row { cells, gradients, differences, failures } = row::run(job, *precision, &builds);
            print_line(&job.name, precision.name(), cells, &gradients);
            found.differences.extend(differences);
            found.failures.extend(failures);
        }
    }
    Ok(found)
}

fn print_line(job: &str, precision: &str, ways: [&str; Way::ALL.len()], gradients: &str) {
    let [alone, three, killed] = ways;
    println!("{job:<22}{precision:<6}{alone:<11}{three:<11}{killed:<15}{gradients}");
}
