//! The `coordinator` program.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use ganglion_proto::listen::raise_descriptor_limit;
use ganglion_proto::printable;

use crate::commands::admin_client::{Question, operate};
use crate::commands::audit::audit;
use crate::commands::cli::{Cli, Command, DataCommand, RunChoice};
use crate::commands::inspect;
use crate::control::detach::{Launch, Launched, launch};
use crate::error::Failure;
use crate::records::logging::start_log;
use crate::records::progress::Screen;
use crate::startup::host::System;
use crate::startup::recover::recover;
use crate::startup::run::run;

/// Does what the command line says; returns the exit code.
pub fn main() -> ExitCode {
    let mut cli = Cli::parse();
    match cli.command.take() {
        None if cli.detach && !cli.detached => launched(),
        None => train(cli),
        Some(command) => serve(command),
    }
}

fn train(cli: Cli) -> ExitCode {
    let screen = Screen::stderr(std::io::stderr().is_terminal() && !cli.detached);
    start_log(&screen, cli.log_format);
    // Before any socket: limits of connections are set by what the system allows (api/grpc/door.rs).
    raise_descriptor_limit();
    let system = System { log_format: cli.log_format };
    // Before the runtime starts threads: from here on the process belongs to no terminal.
    let launch = cli.detached.then(|| Launch::join(&screen)).transpose();
    let launch = launch.map_err(|error| Failure::Other(format!("--detach: {error}")));
    let ended = launch.and_then(|launch| block_on(run(cli, &system, screen, launch)));
    conclude(ended)
}

/// Launches a coordinator that continues when this process has ended.
fn launched() -> ExitCode {
    match block_on(launch()) {
        Ok(Launched::GoesOn(text)) => conclude(Ok(text)),
        Ok(Launched::Ended(code)) => code,
        Err(failure) => conclude(Err(failure)),
    }
}

/// Runs a command other than training.
fn serve(command: Command) -> ExitCode {
    let ask = |run: &RunChoice, question| conclude(block_on(operate(&run.run_dir, question)));
    match command {
        Command::Audit { run, json } => audited(&run, json),
        Command::Recover { run, json } => conclude(recover(&run, json)),
        Command::Certs(command) => conclude(command.run()),
        Command::Status { run, json } => ask(&run, Question::Status { json }),
        Command::Drain { worker, run } => ask(&run, Question::Drain(worker)),
        Command::Scale { workers, run } => ask(&run, Question::Scale(workers)),
        Command::Stop { run, timeout } => ask(&run, Question::Stop(Duration::from_secs(timeout))),
        Command::Runs { folder, json } => conclude(inspect::runs(&folder, json)),
        Command::Checkpoints { run, verify, json } => {
            conclude(inspect::checkpoints(&run.run_dir, verify, json))
        }
        Command::Data(DataCommand::Check(check)) => conclude(block_on(check.run())),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "coordinator", &mut script);
            say(&mut std::io::stdout(), String::from_utf8_lossy(&script).trim_end());
            ExitCode::SUCCESS
        }
    }
}

fn audited(run: &Path, json: bool) -> ExitCode {
    match audit(run) {
        Ok(report) => {
            let text = if json { inspect::as_json(&report) } else { report.to_string() };
            say(&mut std::io::stdout(), &text);
            if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            say(&mut std::io::stderr(), &format!("error: {error}"));
            ExitCode::from(2)
        }
    }
}

fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    // The shell's loop runs on this thread. Two more serve connections, so that a TLS handshake does not
    // hold up a heartbeat's answer; files and syncs have the pool for blocking calls.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::Other(format!("cannot start: {error}")))?;
    let result = runtime.block_on(future);
    // Not waited for: a client that holds its stream open must not keep the process alive.
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
            let stopped = matches!(failure, Failure::Stopped { .. } | Failure::Interrupted(_));
            let prefix = if stopped { "" } else { "error: " };
            say(&mut std::io::stderr(), &printable(&format!("{prefix}{failure}")));
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Prints a line. A closed terminal or pipe cannot be reported, and the exit code says the same.
fn say(to: &mut impl std::io::Write, line: &str) {
    let _ = writeln!(to, "{line}");
}
