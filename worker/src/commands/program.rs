//! The `worker` program: joins a run, or draws samples from a checkpoint.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::LazyLock;
use std::thread::available_parallelism;

use clap::{Args, Parser, Subcommand};
use ganglion_proto::credentials::TlsFiles;
use ganglion_proto::data_report::Line;
use ganglion_proto::dial::Credentials;
use ganglion_proto::home;
use ganglion_proto::job::Data;
use ganglion_proto::listen::raise_descriptor_limit;
use ganglion_proto::log::{self, JsonLines};
use ganglion_proto::out::{self, Stderr};
use ganglion_proto::progress::Progress;
use ganglion_proto::trace::Trace;
use tracing::Level;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::commands::error::Failure;
use crate::commands::evaluate::{Eval, TrainClassifier, eval, train_classifier};
use crate::commands::join::{Released, SPAWN_TOKEN, run};
use crate::commands::linger::Stay;
use crate::commands::probe::{Probe, probe};
use crate::commands::sample::{Export, Interpolate, Sample, export, interpolate, sample};
use crate::data::check::{Look, check};
use crate::device::{DeviceChoice, gpus};
use crate::engine::passport::NUMERICS;
use crate::nn::broken::guarded;
use crate::objective;

/// Trains with the other workers of a run, or draws samples from a checkpoint.
#[derive(Parser)]
#[command(version = version(), args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    join: Option<Join>,
    /// How messages are written: text, or json for an object a line.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"], env = log::VARIABLE)]
    log_format: String,
}

#[derive(Args)]
struct Join {
    /// Address of the run's coordinator, as it prints it, such as http://10.0.0.1:7000; https:// with
    /// --tls-dir.
    #[arg(long, value_name = "URL")]
    coordinator: String,
    /// Folder with ca.crt, tls.crt and tls.key, for a coordinator with TLS.
    #[arg(long, value_name = "DIR", env = "GANGLION_TLS_DIR")]
    tls_dir: Option<PathBuf>,
    /// Name on the coordinator's certificate, if it is not the one in the address.
    #[arg(long, value_name = "NAME", env = "GANGLION_TLS_NAME")]
    tls_name: Option<String>,
    /// File with the coordinator's join token. The variable GANGLION_JOIN_TOKEN may hold the token itself.
    #[arg(long, value_name = "FILE", env = "GANGLION_JOIN_TOKEN_FILE")]
    join_token_file: Option<PathBuf>,
    /// Device to compute on: cpu, cuda:N for GPU N, or auto for a GPU if there is one.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Do not end when the run is complete: free the memory and wait for SIGTERM or Ctrl-C.
    #[arg(long)]
    stay: bool,
    /// Write a timeline of this worker to a file, for ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Draws samples from a checkpoint, and writes them as PNG.
    Sample(Sample),
    /// Draws a film (GIF) in which samples turn into one another.
    Interpolate(Interpolate),
    /// Writes the network that draws samples as a TorchScript module, for PyTorch, C++ and ONNX.
    Export(Export),
    /// Compares samples of a checkpoint with real ones: Fréchet distance and other metrics.
    Eval(Eval),
    /// Prints the number of GPUs that workers can use on this machine.
    Gpus,
    /// Computes the gradients of a run's job on a device, and compares them with those of the CPU.
    Probe(Probe),
    /// Reads every sample of a data set, for `coordinator data check`.
    #[command(hide = true)]
    CheckData(CheckData),
    /// Trains the digit classifier whose features the metrics use.
    TrainClassifier(TrainClassifier),
}

/// Version, with the number of the build's arithmetic by which workers may train together.
fn version() -> &'static str {
    static VERSION: LazyLock<String> =
        LazyLock::new(|| format!("{} (numerics {NUMERICS})", env!("CARGO_PKG_VERSION")));
    &VERSION
}

/// Does what the command line says; returns the exit code.
pub fn main() -> ExitCode {
    // Before the command line is read: what is wrong with it is a message as well.
    log::structure(log::is_asked_for());
    let cli = match Cli::try_parse_from(home::arguments()) {
        Ok(cli) => cli,
        Err(error) => {
            let answered = out::usage(error.use_stderr(), &error.to_string(), || error.print());
            return answered.map_or_else(|error| conclude(&error.into()), ExitCode::from);
        }
    };
    log::structure(cli.log_format == "json");
    start_log();
    raise_descriptor_limit();
    let result = guarded(|| obey(cli)).unwrap_or_else(|broken| Err(broken.into()));
    result.map_or_else(|failure| conclude(&failure), |()| ExitCode::SUCCESS)
}

/// Tells of a failure; returns the exit code.
fn conclude(failure: &Failure) -> ExitCode {
    match failure {
        Failure::Closed => {}
        // The coordinator reports it to the user.
        _ if spawned() => tracing::error!("{failure}"),
        _ => out::tell(Level::ERROR, &failure.to_string()),
    }
    ExitCode::from(failure.exit_code())
}

fn obey(cli: Cli) -> Result<(), Failure> {
    match (cli.command, cli.join) {
        (Some(Command::Sample(arguments)), _) => sample(&arguments),
        (Some(Command::Interpolate(arguments)), _) => interpolate(&arguments),
        (Some(Command::Export(arguments)), _) => export(&arguments),
        (Some(Command::Gpus), _) => {
            let progress = Progress::start("asking the driver");
            let count = gpus();
            drop(progress);
            Ok(out::print(&count.to_string())?)
        }
        (Some(Command::Probe(arguments)), _) => probe(&arguments),
        (Some(Command::CheckData(arguments)), _) => check_data(&arguments),
        (Some(Command::Eval(arguments)), _) => eval(&arguments),
        (Some(Command::TrainClassifier(arguments)), _) => train_classifier(&arguments),
        (None, Some(arguments)) => join(&arguments),
        (None, None) => {
            Err(Failure::Input("give a command, or --coordinator URL to join a run; see --help".to_string()))
        }
    }
}

/// Arguments of `worker check-data`.
#[derive(Args)]
struct CheckData {
    /// Section `[data]` of a job, resolved, as JSON.
    #[arg(long)]
    data: String,
    /// Threads that read; all processors by default.
    #[arg(long)]
    threads: Option<usize>,
    /// Let samples have any size.
    #[arg(long)]
    any_size: bool,
}

/// Reports progress and findings on standard output. If the reader is gone, the process exits.
fn check_data(arguments: &CheckData) -> Result<(), Failure> {
    let data: Data =
        serde_json::from_str(&arguments.data).map_err(|error| Failure::Input(format!("--data: {error}")))?;
    let threads = arguments.threads.or_else(|| available_parallelism().ok().map(Into::into)).unwrap_or(1);
    let tell = |line: &Line| {
        let text = serde_json::to_string(line).unwrap_or_default();
        if let Err(error) = out::print(&text) {
            let failure = Failure::from(error);
            conclude(&failure);
            std::process::exit(failure.exit_code().into());
        }
    };
    let look = Look { threads, any_size: arguments.any_size };
    match check(&data, look, |done, of| tell(&Line::Progress { done, of })) {
        Ok(report) => tell(&Line::Report(Box::new(report))),
        Err(error) => match error.into_input() {
            Ok(detail) => tell(&Line::Wrong(detail)),
            Err(other) => return Err(Failure::Other(other.to_string())),
        },
    }
    Ok(())
}

fn join(arguments: &Join) -> Result<(), Failure> {
    let stay = arguments.stay.then(Stay::listen).transpose();
    let stay = stay.map_err(|error| Failure::Other(format!("cannot listen for signals: {error}")))?;
    let trace = arguments.trace.as_deref().map_or(Ok(Trace::off()), open_trace)?;
    let credentials = Credentials {
        tls: arguments.tls_dir.as_deref().map(TlsFiles::new),
        name: arguments.tls_name.clone(),
        token_file: arguments.join_token_file.clone(),
    };
    let result = run(&arguments.coordinator, credentials, arguments.device, &objective::make, &trace);
    trace.finish();
    if let (Released::Complete, Some(stay)) = (result?, stay) {
        tracing::info!("the run is complete; staying until SIGTERM or Ctrl-C, as --stay says");
        stay.until_asked_to_end().map_err(Failure::other)?;
    }
    Ok(())
}

/// Opens the trace. A coordinator's own worker appends to its coordinator's, and works without one if that
/// fails. Other workers have traces of their own.
fn open_trace(file: &Path) -> Result<Trace, Failure> {
    let opened = if spawned() { Trace::join(file) } else { Trace::create(file, "worker") };
    match opened {
        Err(error) if spawned() => {
            tracing::warn!("no trace in {}: {error}", file.display());
            Ok(Trace::off())
        }
        opened => opened.map_err(|error| Failure::unwritable("--trace", file, &error)),
    }
}

/// Whether a coordinator started this worker. The coordinator then adds time and worker to the log lines.
fn spawned() -> bool {
    std::env::var_os(SPAWN_TOKEN).is_some()
}

/// Logs to standard error.
fn start_log() {
    let filter = log::filter(LevelFilter::INFO);
    let log = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(|| Stderr)
        .with_target(false)
        .with_ansi(out::may_colour())
        // A dead coordinator takes the pipe along; complaining about that would need the pipe.
        .log_internal_errors(false);
    if log::is_structured() {
        log.event_format(JsonLines).finish().with(filter).init();
    } else if spawned() {
        log.without_time().finish().with(filter).init();
    } else {
        log.finish().with(filter).init();
    }
}
