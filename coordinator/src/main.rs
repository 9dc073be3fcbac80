//! The `coordinator` program.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use ganglion_coordinator::audit::audit;
use ganglion_coordinator::cli::{Cli, Command};
use ganglion_coordinator::host::System;
use ganglion_coordinator::operate::{Question, operate};
use ganglion_coordinator::report::progress::Screen;
use ganglion_coordinator::run::{Failure, run, start_log};

fn main() -> ExitCode {
    let mut cli = Cli::parse();
    match cli.command.take() {
        None => {
            let screen = Screen::stderr(std::io::stderr().is_terminal());
            start_log(&screen, cli.log_format);
            conclude(block_on(run(cli, &System, screen)))
        }
        Some(Command::Audit { run }) => match audit(&run) {
            Ok(report) => {
                say(&mut std::io::stdout(), &report.to_string());
                if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
            }
            Err(error) => {
                say(&mut std::io::stderr(), &format!("error: {error}"));
                ExitCode::from(2)
            }
        },
        Some(Command::Status(run)) => conclude(block_on(operate(&run.run_dir, Question::Status))),
        Some(Command::Drain { worker, run }) => {
            conclude(block_on(operate(&run.run_dir, Question::Drain(worker))))
        }
        Some(Command::Scale { workers, run }) => {
            conclude(block_on(operate(&run.run_dir, Question::Scale(workers))))
        }
    }
}

fn block_on(future: impl Future<Output = Result<String, Failure>>) -> Result<String, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::Other(format!("cannot start: {error}")))?;
    let result = runtime.block_on(future);
    // A client that holds its stream open does not keep the process.
    runtime.shutdown_background();
    result
}

fn conclude(result: Result<String, Failure>) -> ExitCode {
    match result {
        Ok(line) => {
            say(&mut std::io::stdout(), &line);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            let prefix = if matches!(failure, Failure::Stopped { .. }) { "" } else { "error: " };
            say(&mut std::io::stderr(), &format!("{prefix}{failure}"));
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Prints a line. Nobody can be told if the terminal or the pipe is gone, and the exit code says the same.
fn say(to: &mut impl std::io::Write, line: &str) {
    let _ = writeln!(to, "{line}");
}
