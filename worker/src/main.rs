//! The `worker` program: joins a run, or draws samples from a checkpoint.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use ganglion_proto::credentials::TlsFiles;
use ganglion_proto::dial::Credentials;
use ganglion_proto::log::{self, JsonLines};
use ganglion_proto::trace::Trace;
use ganglion_storage::{Address, Blocking, Bytes, LATEST, Path as StoragePath, Storage, reason};
use ganglion_worker::device::{DeviceChoice, gpus};
use ganglion_worker::eval::commands::{Eval, TrainClassifier, eval, train_classifier};
use ganglion_worker::random::Purpose;
use ganglion_worker::run::{Failure, Released, SPAWN_TOKEN, run};
use ganglion_worker::sample::{Generator, SampleError, grid};
use ganglion_worker::stay::Stay;
use tracing_subscriber::EnvFilter;

/// The averaged generator's file in a checkpoint's folder.
const GENERATOR: &str = "generator_ema.safetensors";

/// Trains with the other workers of a run, or draws samples from a checkpoint.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    join: Option<Join>,
}

#[derive(Args)]
struct Join {
    /// The run's coordinator, such as https://10.0.0.1:7000, or http:// for one without TLS.
    #[arg(long, value_name = "URL")]
    coordinator: String,
    /// Speak TLS, also with other workers, with the ca.crt, tls.crt and tls.key of this folder.
    #[arg(long, value_name = "DIR", env = "GANGLION_TLS_DIR")]
    tls_dir: Option<PathBuf>,
    /// The name that the coordinator's certificate is for, if that is not the one in its address.
    #[arg(long, value_name = "NAME", env = "GANGLION_TLS_NAME")]
    tls_name: Option<String>,
    /// The file with the coordinator's join token. GANGLION_JOIN_TOKEN may hold the token itself.
    #[arg(long, value_name = "FILE", env = "GANGLION_JOIN_TOKEN_FILE")]
    join_token_file: Option<PathBuf>,
    /// Where to compute: auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// When the run is complete, give all memory back and stay until SIGTERM or Ctrl-C.
    #[arg(long)]
    stay: bool,
    /// Write a timeline of what this worker does, for ui.perfetto.dev. A coordinator has an option of the same name.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// How logs are written: text, or json for an object a line.
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"], env = log::VARIABLE)]
    log_format: String,
}

#[derive(Subcommand)]
enum Command {
    /// Draws samples from the generator's moving average.
    Sample(SampleArguments),
    /// Judges the samples of a checkpoint.
    Eval(Eval),
    /// Prints how many GPUs this program can use here.
    Gpus,
    /// Trains the digit classifier that metrics use, again or anew.
    TrainClassifier(TrainClassifier),
}

#[derive(Args)]
struct SampleArguments {
    /// A checkpoint's folder, a run's folder, or a generator_ema.safetensors. The place may be in an object store.
    #[arg(long, value_name = "PATH|URL")]
    checkpoint: String,
    /// The TorchScript file of the generator, of a run with networks of its own, if it is not where it was.
    #[arg(long, value_name = "FILE")]
    generator: Option<PathBuf>,
    /// How many samples.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Draw this class only, of a conditional model. By default one class follows the other.
    #[arg(long, value_name = "N")]
    class: Option<u32>,
    /// The picture to write, a PNG file.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.join.as_ref().is_some_and(|join| join.log_format == "json"));
    let result = match (cli.command, cli.join) {
        (Some(Command::Sample(arguments)), _) => sample(&arguments),
        (Some(Command::Gpus), _) => {
            let _ = writeln!(std::io::stdout(), "{}", gpus());
            Ok(())
        }
        (Some(Command::Eval(arguments)), _) => evaluate(&arguments),
        (Some(Command::TrainClassifier(arguments)), _) => train_classifier(&arguments),
        (None, Some(arguments)) => join(&arguments),
        (None, None) => Err(Failure::Input("nothing to do; see --help".to_string())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if spawned() {
                // The coordinator tells people.
                tracing::error!("{failure}");
            } else {
                let _ = writeln!(std::io::stderr(), "error: {failure}");
            }
            ExitCode::from(if matches!(failure, Failure::Input(_)) { 2 } else { 1 })
        }
    }
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
    let result = run(&arguments.coordinator, credentials, arguments.device, &trace);
    trace.finish();
    if let (Released::Complete, Some(stay)) = (result?, stay) {
        tracing::info!("the run is complete; staying until SIGTERM or Ctrl-C, as --stay says");
        stay.until_asked_to_end().map_err(|error| Failure::Other(error.to_string()))?;
    }
    Ok(())
}

/// A coordinator's own worker adds to its trace, and works without one if that cannot be. Others have traces of their own.
fn open_trace(file: &Path) -> Result<Trace, Failure> {
    let opened = if spawned() { Trace::join(file) } else { Trace::create(file, "worker") };
    match opened {
        Err(error) if spawned() => {
            tracing::warn!("no trace in {}: {error}", file.display());
            Ok(Trace::off())
        }
        opened => opened.map_err(|error| Failure::Input(format!("--trace {}: {error}", file.display()))),
    }
}

/// Whether a coordinator started this worker. It then adds the time and who we are to our log.
fn spawned() -> bool {
    std::env::var_os(SPAWN_TOKEN).is_some()
}

/// Logs to standard error.
fn start_log(structured: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        // A dead coordinator takes the pipe along; complaining about that would need the pipe.
        .log_internal_errors(false);
    if structured {
        log.event_format(JsonLines).init();
    } else if spawned() {
        log.without_time().init();
    } else {
        log.init();
    }
}

fn sample(arguments: &SampleArguments) -> Result<(), Failure> {
    let (name, bytes) = generator(&arguments.checkpoint)?;
    let failed = |error: SampleError| match error {
        SampleError::Input(detail) => Failure::Input(detail),
        other => Failure::Other(other.to_string()),
    };
    let generator = Generator::read(&name, &bytes, arguments.generator.as_deref()).map_err(failed)?;
    let images = match (arguments.class, generator.classes()) {
        (None, _) => generator.draw(arguments.seed, arguments.count),
        (Some(class), classes) if class < classes => {
            generator.draw_classes(Purpose::Samples, arguments.seed, arguments.count, |_| class)
        }
        (Some(class), 0) => {
            let what = format!("--class {class}: the generator knows no classes; leave --class out");
            return Err(Failure::Input(what));
        }
        (Some(class), classes) => {
            let what =
                format!("--class {class}: the generator knows classes 0 to {}; choose one", classes - 1);
            return Err(Failure::Input(what));
        }
    };
    let picture = grid(&images, 0).map_err(failed)?;
    std::fs::write(&arguments.out, picture.png)
        .map_err(|error| Failure::Input(format!("--out {}: {error}", arguments.out.display())))?;
    let _ = writeln!(std::io::stdout(), "{}", arguments.out.display());
    Ok(())
}

fn evaluate(arguments: &Eval) -> Result<(), Failure> {
    let found = arguments.checkpoint.as_deref().map(generator).transpose()?;
    eval(arguments, found.as_ref().map(|(name, bytes)| (name.clone(), &bytes[..])))
}

/// Finds and reads the weights under a file, a checkpoint's folder, a storage, or a run's folder.
fn generator(place: &str) -> Result<(String, Bytes), Failure> {
    let shown = if Address::is_secret(place) { "..." } else { place };
    let input = |what: &str| Failure::Input(format!("--checkpoint {shown}: {what}"));
    if Path::new(place).is_file() {
        let bytes = std::fs::read(place).map_err(|error| input(&error.to_string()))?;
        return Ok((place.to_string(), bytes.into()));
    }
    let absent =
        || input(&format!("no {GENERATOR} there; give a folder such as runs/NAME/checkpoints/step-00001000"));
    let (root, file) = match place.rsplit_once('/') {
        Some((root, file)) if file.ends_with(".safetensors") => (root, Some(file)),
        _ => (place, None),
    };
    let address = Address::parse(root).map_err(|what| input(&what))?;
    if matches!(&address, Address::Folder(folder) if !folder.is_dir()) {
        return Err(absent());
    }
    let storage = Storage::open(&address).map_err(|what| input(&what))?;
    let storage = Blocking::new(storage).map_err(|error| Failure::Other(error.to_string()))?;
    let found = storage.wait(find(storage.storage(), file));
    let (name, bytes) = found.map_err(|error| input(&reason(&error)))?.ok_or_else(absent)?;
    Ok((format!("{root}/{name}"), bytes))
}

async fn find(
    storage: &Storage,
    file: Option<&str>,
) -> Result<Option<(String, Bytes)>, ganglion_storage::Error> {
    let mut places = vec![file.unwrap_or(GENERATOR).to_string()];
    for root in ["", "checkpoints/"] {
        let latest = StoragePath::from(format!("{root}{LATEST}"));
        if let (None, Some(folder)) = (file, storage.text(&latest).await?) {
            places.push(format!("{root}{}/{GENERATOR}", folder.trim()));
        }
    }
    for place in places {
        match storage.read(&StoragePath::from(place.as_str())).await {
            Ok(bytes) => return Ok(Some((place, bytes))),
            Err(ganglion_storage::Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
