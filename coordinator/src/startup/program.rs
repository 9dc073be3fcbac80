//! The `coordinator` program.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use ganglion_proto::listen::raise_descriptor_limit;
use ganglion_proto::out;
use ganglion_proto::progress::Progress;
use ganglion_proto::{home, log};
use tracing::Level;

use crate::commands::admin_client::{Question, operate};
use crate::commands::audit::audit;
use crate::commands::cli::{Cli, Command, DataCommand, RunChoice};
use crate::commands::inspect;
use crate::control::detach::{Launch, Launched, launch};
use crate::error::Failure;
use crate::records::logging::{LogFormat, start_log};
use crate::records::progress::Screen;
use crate::startup::host::System;
use crate::startup::recover::recover;
use crate::startup::run::run;

/// Does what the command line says; returns the exit code.
pub fn main() -> ExitCode {
    // Before the command line is read: what is wrong with it is a message as well.
    log::structure(log::is_asked_for());
    let mut cli = match Cli::try_parse_from(home::arguments()) {
        Ok(cli) => cli,
        Err(error) => {
            let answered = out::usage(error.use_stderr(), &error.to_string(), || error.print());
            return answered.map_or_else(|error| conclude(Err(error.into())), ExitCode::from);
        }
    };
    log::structure(cli.log_format == LogFormat::Json);
    match cli.command.take() {
        None if cli.detach && !cli.detached => launched(),
        None => train(cli),
        Some(command) => {
            // Of what is out of the ordinary, such as a damaged record.
            start_log(&Screen::stderr(false), cli.log_format);
            conclude(serve(command))
        }
    }
}

fn train(cli: Cli) -> ExitCode {
    let screen = Screen::stderr(out::can_draw() && !cli.detached);
    start_log(&screen, cli.log_format);
    // Before any socket: limits of connections are set by what the system allows (api/grpc/door.rs).
    raise_descriptor_limit();
    let system = System { log_format: cli.log_format };
    // Before the runtime starts threads: from here on the process belongs to no terminal.
    let launch = cli.detached.then(|| Launch::join(&screen)).transpose();
    let launch = launch.map_err(|error| Failure::Other(format!("--detach: {error}")));
    let ended = launch.and_then(|launch| block_on(run(cli, &system, screen, launch)));
    conclude(ended.and_then(|text| Ok(out::say(&text)?)))
}

/// Launches a coordinator that continues when this process has ended.
fn launched() -> ExitCode {
    match block_on(launch()) {
        Ok(Launched::GoesOn(text)) => conclude(out::say(&text).map_err(Failure::from)),
        Ok(Launched::Ended(code)) => code,
        Err(failure) => conclude(Err(failure)),
    }
}

/// Runs a command other than training.
fn serve(command: Command) -> Result<(), Failure> {
    let ask = |folder: PathBuf, question| {
        during("waiting for the run's coordinator", || block_on(operate(&folder, question)))
    };
    let change =
        |run: &RunChoice, question| ask(run.to_change(inspect::is_held, "run that is going on")?, question);
    let recovered = |run: &RunChoice, json| {
        let folder = run.to_change(|_| true, "run")?;
        during("reading what there is of the run", || recover(&folder, json))
    };
    // A result is printed as it is, and a message as messages are.
    let told = |message: Result<String, Failure>| Ok(out::say(&message?)?);
    match command {
        Command::Audit { run, json } => audited(&run.folder()?, json),
        Command::Recover { run, json: false } => told(recovered(&run, false)),
        Command::Recover { run, json: true } => Ok(out::print(&recovered(&run, true)?)?),
        Command::Certs(command) => told(command.run()),
        Command::Status { run, json } => Ok(out::print(&ask(run.folder()?, Question::Status { json })?)?),
        Command::Drain { worker, run } => told(change(&run, Question::Drain(worker))),
        Command::Scale { workers, run } => told(change(&run, Question::Scale(workers))),
        Command::Stop { run, timeout } => told(change(&run, Question::Stop(Duration::from_secs(timeout)))),
        Command::Runs { folder, json } => {
            Ok(out::print(&during("reading the runs", || inspect::runs(&folder, json))?)?)
        }
        Command::Checkpoints { run, verify, json } => inspect::checkpoints(&run.to_read()?, verify, json),
        Command::Data(DataCommand::Check(check)) => block_on(check.run()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "coordinator", &mut script);
            Ok(out::print(&String::from_utf8_lossy(&script))?)
        }
    }
}

/// Does some work that may take long, and shows what it is.
fn during<T>(doing: &str, work: impl FnOnce() -> T) -> T {
    let _progress = Progress::start(doing);
    work()
}

fn audited(run: &Path, json: bool) -> Result<(), Failure> {
    let report = audit(run, &Progress::start("reading the run")).map_err(Failure::input)?;
    out::print(&if json { inspect::as_json(&report) } else { report.to_string() })?;
    match report.breaches() {
        0 => Ok(()),
        1 => Err(Failure::Other("1 claim does not hold".to_string())),
        count => Err(Failure::Other(format!("{count} claims do not hold"))),
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

/// Tells of a failure; returns the exit code.
fn conclude(result: Result<(), Failure>) -> ExitCode {
    let Err(failure) = result else { return ExitCode::SUCCESS };
    match failure {
        Failure::Closed => {}
        Failure::Stopped { .. } | Failure::Interrupted(_) => out::tell(Level::INFO, &failure.to_string()),
        Failure::Input(_) | Failure::Other(_) => out::tell(Level::ERROR, &failure.to_string()),
    }
    ExitCode::from(failure.exit_code())
}
