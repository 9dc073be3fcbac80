//! The command line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Parser, Subcommand};
use ganglion_proto::job::Job;
use ganglion_proto::out;
use ganglion_proto::words::counted;
use ganglion_storage::run::{self, Chosen, RunError, RunName};
use tracing::Level;

use crate::api::address::{ListenError, Listener, loopback};
use crate::api::security::SecurityArguments;
use crate::commands::certs::CertsCommand;
use crate::commands::data_check::Check;
use crate::error::Failure;
use crate::records::logging::LogFormat;

/// Trains a generative model data-parallel on many workers, with the same result for any number of them.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// Task other than training.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Job file (TOML), such as those in configs/. Default: a small GAN on the bundled handwritten digits.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Number of workers to start on this machine; auto starts one for each GPU, or one if there is no GPU. 0
    /// starts none and waits for workers that are started elsewhere.
    #[arg(long, default_value = "1", value_name = "N|auto")]
    pub workers: Workers,
    /// Folder for the run's records, samples and checkpoints. A folder that holds the run already resumes it.
    /// Default: runs/NAME, with the job's name.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Train again from step 0 if all checkpoints of the run are lost. The result has the same bits. Without
    /// this option such a start is refused.
    #[arg(long)]
    pub from_start: bool,
    /// Set one key of the job, such as --set job.steps=500. Can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Address to which workers and operators connect. Default: a free port of 127.0.0.1, the same one when
    /// the run resumes.
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// Address of the dashboard, of /metrics for Prometheus and of /healthz; off for none. Default: a free
    /// port of 127.0.0.1, the same one when the run resumes.
    #[arg(long, value_name = "HOST:PORT|off")]
    pub http: Option<String>,
    /// Allow --listen and --http on addresses that other machines can reach, although nothing is encrypted.
    /// Anybody on the network can then read along, and join the run unless --join-token-file is given.
    #[arg(long)]
    pub insecure: bool,
    /// Authentication of workers and operators.
    #[command(flatten)]
    pub security: SecurityArguments,
    /// Keep the dashboard up when the run is complete, until SIGTERM or Ctrl-C.
    #[arg(long)]
    pub stay: bool,
    /// Train in the background: return once the run has started. Its messages go to coordinator.log in the
    /// run directory.
    #[arg(long)]
    pub detach: bool,
    /// Said by --detach to the process that trains.
    #[arg(long, hide = true, requires = "detach")]
    pub detached: bool,
    /// Write a timeline of the coordinator and its local workers to this file, for ui.perfetto.dev; it ends
    /// at 128 MiB.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Copy metrics, events, samples and TensorBoard's files to this place in the background: a folder,
    /// s3://, gs:// or az://.
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
    /// Format of messages and log lines, also those of local workers: text, or json for one object per line.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = ganglion_proto::log::VARIABLE)]
    pub log_format: LogFormat,
}

/// Task other than training.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Checks from a run's files that nothing was lost, doubled or changed. Only reads; the run may be going
    /// on.
    ///
    /// Prints a line for each claim. Exit code 0: all claims hold; 1: one does not; 2: RUN is no run
    /// directory.
    Audit {
        /// Which run.
        #[command(flatten)]
        run: RunChoice,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Shows the step of a run and, while it is going on, its workers with their numbers.
    Status {
        /// Which run.
        #[command(flatten)]
        run: RunChoice,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Lists the runs in a folder: the step that each has reached, and whether it is going on.
    Runs {
        /// Folder that holds run directories.
        #[arg(default_value = "runs")]
        folder: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Lists a run's checkpoints with their digests; RUN@best, RUN@latest or RUN@5000 lists one of them.
    Checkpoints {
        /// Which run.
        #[command(flatten)]
        run: RunChoice,
        /// Read every file and compare it with its recorded hash; exit code 1 if one is damaged.
        #[arg(long)]
        verify: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Makes a new journal for a run whose own is damaged or missing, from its checkpoints and what else can
    /// be read.
    ///
    /// The journal is the file in which a coordinator records its decisions. The old files stay beside the
    /// new ones. Exit code 0: the run can go on; 1: a coordinator is running it; 2: RUN is no run directory,
    /// or has no checkpoint.
    Recover {
        /// Which run.
        #[command(flatten)]
        run: RunChoice,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Checks data sets before training.
    #[command(subcommand)]
    Data(DataCommand),
    /// Makes certificates and a join token.
    #[command(subcommand)]
    Certs(CertsCommand),
    /// Lets a worker leave a run without loss of work. A worker that the coordinator started is not replaced.
    Drain {
        /// Number of the worker, as `coordinator status` shows it.
        worker: u64,
        /// Which run.
        #[command(flatten)]
        run: RunChoice,
    },
    /// Sets the number of workers that a coordinator runs on its own machine.
    Scale {
        /// Number of workers, at most the job's data shards.
        workers: u32,
        /// Which run.
        #[command(flatten)]
        run: RunChoice,
    },
    /// Stops a run after its step, with a checkpoint, and waits for that. The command that started the run
    /// resumes it.
    Stop {
        /// Which run.
        #[command(flatten)]
        run: RunChoice,
        /// Longest time to wait, in seconds. After it the run still stops, only later.
        #[arg(long, value_name = "SECONDS", default_value_t = 300)]
        timeout: u64,
    },
    /// Prints the completions for a shell, such as `coordinator completions bash >
    /// /etc/bash_completion.d/coordinator`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Work with a data set.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Reads every sample as training would, on all processors, and names those that cannot be used.
    ///
    /// Exit code 0: all can be used; 2: some cannot, and the last line is the option that leaves them out; or
    /// the data set as a whole cannot.
    Check(Check),
}

/// Which run is meant.
#[derive(Debug, clap::Args)]
pub struct RunChoice {
    /// The run: its folder, or its name in runs/. Without it a command that only reads takes the newest run
    /// there, and one that changes a run takes the only one.
    #[arg(value_name = "RUN")]
    run: Option<RunName>,
    /// The run, as earlier versions had it.
    #[arg(long, value_name = "RUN", hide = true, conflicts_with = "run")]
    run_dir: Option<RunName>,
}

impl RunChoice {
    fn name(&self) -> Option<&RunName> {
        self.run.as_ref().or(self.run_dir.as_ref())
    }

    /// The run that a command reads, and perhaps one of its checkpoints.
    pub(crate) fn to_read(&self) -> Result<Chosen, Failure> {
        told(run::chosen(self.name()))
    }

    /// The folder of the run that a command reads as a whole.
    pub(crate) fn folder(&self) -> Result<PathBuf, Failure> {
        as_a_whole(self.to_read()?)
    }

    /// The folder of the run that a command changes; see [`run::only`].
    pub(crate) fn to_change(&self, is_one: impl Fn(&Path) -> bool, what: &str) -> Result<PathBuf, Failure> {
        as_a_whole(told(run::only(self.name(), is_one, what))?)
    }
}

/// Says which run was taken, if none was named.
fn told(chosen: Result<Chosen, RunError>) -> Result<Chosen, Failure> {
    let chosen = chosen?;
    if let Some(told) = &chosen.told {
        // Beside the answer: that is for programs as well.
        out::tell(Level::INFO, told);
    }
    Ok(chosen)
}

fn as_a_whole(chosen: Chosen) -> Result<PathBuf, Failure> {
    match chosen.checkpoint {
        None => Ok(chosen.folder),
        Some(checkpoint) => Err(Failure::Input(format!(
            "@{checkpoint}: this command takes a run as a whole; leave @{checkpoint} out"
        ))),
    }
}

/// Number of workers to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workers {
    /// A fixed number.
    Count(u32),
    /// One per GPU, or one where there is none.
    Auto,
}

impl FromStr for Workers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Workers::Auto),
            _ => text
                .parse()
                .map(Workers::Count)
                .map_err(|_| "give a number of workers, such as 4, or auto".to_string()),
        }
    }
}

/// Error: more workers than the job has data shards.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--workers {count}: more than the job's {}; start at most {shards}, or set job.data_shards, which changes the result",
    counted(*shards, "data shard")
)]
pub struct TooManyWorkers {
    count: u32,
    shards: u32,
}

/// The listener for workers and operators.
static LISTENER: Listener = Listener {
    option: "--listen",
    choice: "HOST:PORT, such as 127.0.0.1:7000",
    advice: "give --tls-dir DIR (`coordinator certs init` makes one), or on a network that you trust --insecure",
};

impl Cli {
    /// Number of workers to start for a job, and for `auto` and for none a line that explains it. `gpus` is
    /// the number of GPUs that workers on this machine can use; only `auto` looks at it.
    pub fn local_workers(&self, job: &Job, gpus: u32) -> Result<(u32, Option<String>), TooManyWorkers> {
        let shards = job.job.data_shards;
        match self.workers {
            Workers::Count(0) => {
                let why = "--workers 0: waiting for workers of other machines; none is started here";
                Ok((0, Some(why.to_string())))
            }
            Workers::Count(count) if count <= shards => Ok((count, None)),
            // More workers than data shards would wait as spares for ever, which nobody asks for on
            // purpose.
            Workers::Count(count) => Err(TooManyWorkers { count, shards }),
            Workers::Auto => {
                // One at least: a machine without a GPU trains on its CPU.
                let workers = gpus.clamp(1, shards);
                Ok((workers, Some(explain(workers, gpus))))
            }
        }
    }

    /// Address to listen on: the one given, or a loopback address with `last_port`.
    pub fn listen_address(&self, last_port: Option<u16>) -> Result<SocketAddr, ListenError> {
        // TLS, or the user's word for it.
        let may_be_open = self.insecure || self.security.tls_dir.is_some();
        let given = self.listen.as_deref().map(|text| LISTENER.parse(text, may_be_open));
        given.unwrap_or_else(|| Ok(loopback(last_port)))
    }
}

/// Explains the number that `auto` chose.
fn explain(workers: u32, gpus: u32) -> String {
    let workers_say = counted(workers, "worker");
    match gpus {
        0 => format!("--workers auto: workers can use no GPU here, so {workers_say} on the CPU"),
        _ if gpus > workers => {
            format!("--workers auto: {gpus} GPUs, and {workers_say} for as many data shards")
        }
        _ => format!("--workers auto: {}, so {workers_say}", counted(gpus, "GPU")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cli(arguments: &[&str]) -> Cli {
        Cli::parse_from([&["coordinator"], arguments].concat())
    }

    #[test]
    fn a_command_stands_alone() {
        assert!(cli(&["--workers", "2"]).command.is_none());
        assert!(matches!(cli(&["audit", "runs/x"]).command, Some(Command::Audit { json: false, .. })));
        assert!(Cli::try_parse_from(["coordinator", "--workers", "2", "audit", "runs/x"]).is_err());
    }

    /// As an argument, and as the option of earlier versions.
    #[test]
    fn every_command_on_a_run_takes_its_name() {
        let commands = [
            &["audit"][..],
            &["status"],
            &["checkpoints"],
            &["recover"],
            &["drain", "3"],
            &["scale", "3"],
            &["stop"],
        ];
        for command in commands {
            for name in [&["runs/x@7"][..], &["--run-dir", "runs/x@7"]] {
                let run = match cli(&[command, name].concat()).command {
                    Some(
                        Command::Audit { run, .. }
                        | Command::Status { run, .. }
                        | Command::Checkpoints { run, .. }
                        | Command::Recover { run, .. }
                        | Command::Drain { run, .. }
                        | Command::Scale { run, .. }
                        | Command::Stop { run, .. },
                    ) => run,
                    other => panic!("{other:?}"),
                };
                assert_eq!(run.name(), "runs/x@7".parse().ok().as_ref(), "{command:?}");
            }
            assert!(
                Cli::try_parse_from([&["coordinator"], command, &["a", "--run-dir", "b"]].concat()).is_err()
            );
            assert!(Cli::try_parse_from([&["coordinator"], command, &[""]].concat()).is_err());
        }
    }

    #[test]
    fn auto_starts_a_worker_a_gpu_and_says_so() {
        let job = crate::job_file::read(&crate::job_file::Source::Embedded, &[]).unwrap();
        for (gpus, workers, says) in [
            (0, 1, "no GPU here, so 1 worker on the CPU"),
            (1, 1, "1 GPU, so 1 worker"),
            (4, 4, "4 GPUs, so 4 workers"),
            (16, 8, "16 GPUs, and 8 workers for as many data shards"),
        ] {
            let (count, why) = cli(&["--workers", "auto"]).local_workers(&job, gpus).unwrap();
            assert_eq!(count, workers);
            assert!(why.as_ref().is_some_and(|why| why.ends_with(says)), "{why:?}");
            assert_eq!(cli(&["--workers", "3"]).local_workers(&job, gpus), Ok((3, None)));
        }
    }

    #[test]
    fn workers_are_a_number_or_auto() {
        for wrong in ["", "many", "-1", "1.5", "AUTO", "4294967296"] {
            assert!(Cli::try_parse_from(["coordinator", "--workers", wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_address_that_others_reach_needs_consent() {
        assert!(cli(&["--listen", "0.0.0.0:7000"]).listen_address(None).is_err());
        let consented = cli(&["--listen", "0.0.0.0:7000", "--insecure"]).listen_address(None);
        assert_eq!(consented, Ok(([0, 0, 0, 0], 7000).into()));
        let token = cli(&["--listen", "0.0.0.0:7000", "--join-token-file", "token"]).listen_address(None);
        assert!(matches!(token, Err(ListenError::Open { .. })), "a token alone hides nothing");
        let encrypted = cli(&["--listen", "0.0.0.0:7000", "--tls-dir", "certs"]).listen_address(None);
        assert_eq!(encrypted, Ok(([0, 0, 0, 0], 7000).into()));
        assert_eq!(cli(&[]).listen_address(Some(7001)), Ok(([127, 0, 0, 1], 7001).into()));
        let wrong = cli(&["--listen", "nonsense"]).listen_address(None).unwrap_err().to_string();
        assert!(wrong.starts_with("--listen nonsense: ") && wrong.contains("HOST:PORT"), "{wrong}");
    }
}
