//! Lifetime of a coordinator, from its command line to its exit code.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ganglion_membership::{Outcome, Term};
use ganglion_proto::job::Job;
use ganglion_proto::log;
use ganglion_proto::trace::Trace;
use ganglion_storage::run::RUNS;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tonic::transport::server::Connected;

use crate::api::grpc::guard::Guard;
use crate::api::grpc::{Services, Store, serve};
use crate::api::security::Security;
use crate::checkpoints::best::Judged;
use crate::commands::cli::{Cli, Workers};
use crate::control::detach::Launch;
use crate::control::{Change, Ended, Parts, Shell, ShellError, StopSignal};
use crate::error::Failure;
use crate::job_file::{self, Source};
use crate::journal::{Fact, Journal};
use crate::records::alarms;
use crate::records::mirror::Mirror;
use crate::records::progress::Screen;
use crate::records::timeline::Timeline;
use crate::records::view::Publisher;
use crate::run_dir::RunDir;
use crate::startup::host::Host;
use crate::startup::listen::{self, Doors};
use crate::startup::resume::known_samples;
use crate::startup::take_over::{TakenOver, Wanted, judged, open_journal, storage_of, take_over};
use crate::workers::{Processes, Supervisor};

/// Capacity of the shell's input queue.
// As many as there may be sessions (`SESSIONS` in api/grpc): a message of each fits. A full queue leaves
// the next ones in their connections.
const INPUTS: usize = 4096;
/// Time limit, at the end, for clients to read their last messages.
const FAREWELL: Duration = Duration::from_secs(2);

impl From<ShellError> for Failure {
    fn from(error: ShellError) -> Self {
        Failure::Other(error.to_string())
    }
}

/// Runs a coordinator on a machine until its run ends. Returns the last line to print.
pub async fn run(
    cli: Cli,
    host: &impl Host,
    screen: Screen,
    mut launch: Option<Launch>,
) -> Result<String, Failure> {
    loop {
        if let Some(line) = live(&cli, host, screen.clone(), &mut launch).await? {
            return Ok(line);
        }
    }
}

/// Runs one term. Returns `None` if another term must follow: this one quiesced the members of
/// earlier ones, for a change of the job that they must not learn of while they train. A launcher
/// that was not told of a start waits for that of the next term.
async fn live(
    cli: &Cli,
    host: &impl Host,
    screen: Screen,
    launch: &mut Option<Launch>,
) -> Result<Option<String>, Failure> {
    let job = read_job(cli)?;
    let warning = job_file::warmup_is_cut(&job);
    // Whatever the user got wrong is found before the run directory exists, so a mistake leaves no
    // folder behind.
    let processes = host.processes().map_err(Failure::other)?;
    let (local_workers, reason) = local_workers(cli, &job, &*processes)?;
    // Only the check: the port of the last term is read from the journal, once that is open.
    cli.listen_address(None).map_err(Failure::input)?;
    let security = Security::of(&cli.security)?;

    let run_dir = hold(cli, &job, &screen, launch.as_mut())?;
    let (disk, from_start) = (host.disk(), cli.from_start);
    let wanted = Wanted { run_dir: &run_dir, screen: &screen, disk, processes, from_start };
    // Waits for a storage that is away, five minutes at most (checkpoints/retry.rs).
    let mut taken = take_over(wanted, job).await?;
    let mirror = Mirror::start(cli.mirror.as_deref(), &taken.run, run_dir.folder(), &screen)
        .map_err(Failure::input)?;
    let done = taken.done.clone();
    // No term is taken for a start that finds nothing to do.
    if done.is_some() && !cli.stay {
        mirror.finish().await;
        return Ok(done);
    }
    if done.is_none() {
        // It may be meant: a trial of a job is short.
        warning.iter().for_each(|text| taken.records.message(&format!("warning: {text}")));
        taken.records.timeline = prepare_to_train(cli, local_workers, &taken.supervisor)?;
    }
    let job = taken.job.clone();
    let winding_down = taken.change == Change::Waits;
    let samples = known_samples(&taken.journal)?;
    let life = Life { found_complete: done.is_some(), samples, stay: cli.stay };
    // Before the doors open: no client may hear of a term that is not durable (M1).
    let term = begin_term(&mut taken.journal, &run_dir, &job)?;
    let doors = listen::open(cli, host, &security, &run_dir, &mut taken).await?;
    // Before the first spawn: a worker without these variables could not pass the guard.
    taken.supervisor.environment = security.environment(doors.access.tls_name.as_deref());
    doors.announce(term, reason.as_deref(), &mut taken);
    // Waits for the storage as above. Clients that connect meanwhile wait to be served.
    let judged = judged(&mut taken).await?;
    let Doors { incoming, url, invitation, access, dashboard, publisher } = doors;
    let folder = run_dir.folder().to_path_buf();
    let parts = parts(
        taken,
        Begun { term, folder, url, invitation, publisher, judged, local_workers, launch: launch.take() },
    );
    let (signals, guard) = (host.signals().map_err(Failure::other)?, security.guard(&access.token));
    // Waits as long as the run lasts. A newer claim to the run directory ends it.
    let (ended, waiting) = while_held(&run_dir, supervise(parts, life, incoming, signals, guard)).await?;
    *launch = waiting;
    // Both are bounded and independent, so their limits run at the same time.
    tokio::join!(mirror.finish(), dashboard.farewell());
    // A term that only quiesced the members is followed by the one that makes the change, unless the
    // user or the end of the run came first.
    match winding_down && ended.signal.is_none() && ended.outcome != Outcome::Complete {
        true => rested(&ended, &run_dir, &screen).map(|()| None),
        false => done.map_or_else(|| conclude(ended, &job, &run_dir), Ok).map(Some),
    }
}

/// Facts that begin with this term.
struct Begun {
    term: Term,
    folder: PathBuf,
    url: String,
    invitation: String,
    publisher: Publisher,
    judged: Judged,
    local_workers: u32,
    launch: Option<Launch>,
}

/// Inputs of the shell: the run as it was taken over, and this term.
fn parts(taken: TakenOver, begun: Begun) -> Parts {
    Parts {
        job: taken.job,
        term: begun.term,
        folder: begun.folder,
        run: taken.run,
        journal: taken.journal,
        checkpoints: taken.checkpoints,
        recovered: taken.recovered,
        lost: taken.lost,
        judged: begun.judged,
        local_workers: begun.local_workers,
        change: taken.change,
        url: begun.url,
        invitation: begun.invitation,
        publisher: begun.publisher,
        store: Store::new(begun.term),
        records: taken.records,
        supervisor: taken.supervisor,
        exited: taken.exited,
        launch: begun.launch,
    }
}

fn read_job(cli: &Cli) -> Result<Job, Failure> {
    let source = cli.config.clone().map_or(Source::Embedded, Source::File);
    job_file::read(&source, &cli.overrides).map_err(Failure::input)
}

/// Records that all members are quiesced. If members stopped at an unreadable sample, that is the
/// reason of the pending exclusion.
fn rested(ended: &Ended, run_dir: &RunDir, screen: &Screen) -> Result<(), Failure> {
    match &ended.outcome {
        // The next term decides a change only where no member may train on (startup/exclusion.rs, 3).
        Outcome::Stopped(_) => {
            let mut journal = open_journal(run_dir, screen)?;
            let newest = journal.last_generation()?;
            Ok(journal.set_fact(Fact::Closed, &newest.to_string())?)
        }
        Outcome::InputWrong(_) | Outcome::Refused | Outcome::Complete => Ok(()),
        Outcome::Failed(reason) => Err(Failure::Other(reason.clone())),
    }
}

/// Takes the run directory, and opens the log of a run that leaves its terminal.
fn hold(cli: &Cli, job: &Job, screen: &Screen, launch: Option<&mut Launch>) -> Result<RunDir, Failure> {
    let folder = cli.run_dir.clone().unwrap_or_else(|| Path::new(RUNS).join(&job.job.name));
    // Everything that is written from here on is fenced by this claim (M1).
    let run_dir = RunDir::hold_telling(&folder, &|line| screen.print(line))?;
    if let Some(launch) = launch {
        launch.open_log(run_dir.folder())?;
    }
    Ok(run_dir)
}

/// Runs until the end of the run or until another coordinator takes over the directory. In the
/// latter case nothing is sent to the workers: they belong to the other.
async fn while_held<T>(
    run_dir: &RunDir,
    run: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    // Cancels the shell at any await. That is safe, since its decisions are durable before they are
    // told.
    tokio::select! {
        // The fence may have refused a commit before its loss was reported.
        ended = run => ended.map_err(|failure| run_dir.fence().check().err().map_or(failure, Failure::other)),
        superseded = run_dir.fence().lost() => Err(Failure::other(superseded)),
    }
}

/// Number of workers to start, with a line that explains it.
fn local_workers(cli: &Cli, job: &Job, processes: &dyn Processes) -> Result<(u32, Option<String>), Failure> {
    let gpus = if cli.workers == Workers::Auto { count_gpus(processes)? } else { 0 };
    cli.local_workers(job, gpus).map_err(Failure::input)
}

/// Takes the next term, and publishes it in the claim.
fn begin_term(journal: &mut Journal, run_dir: &RunDir, job: &Job) -> Result<Term, Failure> {
    let term = journal.begin_term(job.metrics.every_steps)?;
    // A holder of a lost journal still finds the term in the claim, and takes a higher one.
    run_dir.ownership().begun(term.0);
    log::note("run", job.job.name.as_str());
    log::note("term", term.0);
    Ok(term)
}

/// Checks and files needed only by an unfinished run; a finished one keeps its trace.
fn prepare_to_train(cli: &Cli, local_workers: u32, supervisor: &Supervisor) -> Result<Timeline, Failure> {
    if local_workers > 0 {
        // Before the term: a missing program would show as workers that end at once.
        supervisor.check_program().map_err(Failure::other)?;
    }
    open_trace(cli)
}

fn open_trace(cli: &Cli) -> Result<Timeline, Failure> {
    let Some(file) = &cli.trace else { return Ok(Timeline::new(&Trace::off())) };
    let trace = Trace::create(file, "coordinator")
        .map_err(|error| Failure::unwritable(format_args!("--trace {}", file.display()), &error))?;
    Ok(Timeline::new(&trace))
}

/// Number of GPUs that workers can use on this machine.
fn count_gpus(processes: &dyn Processes) -> Result<u32, Failure> {
    let advice = "give a number, such as --workers 1";
    processes
        .count_gpus()
        .map_err(|error| Failure::Other(format!("--workers auto: cannot count the GPUs: {error}; {advice}")))
}

/// Task of one term.
struct Life {
    /// Whether the run was already complete.
    found_complete: bool,
    /// Size of the data set, if it is known.
    samples: Option<u64>,
    /// Whether to stay after completion.
    stay: bool,
}

/// Runs server and shell until the run ends, and longer with `--stay`. Returns the launcher too, if it
/// was not told of a start.
async fn supervise<C>(
    parts: Parts,
    life: Life,
    incoming: mpsc::Receiver<C>,
    mut signals: mpsc::UnboundedReceiver<StopSignal>,
    guard: Guard,
) -> Result<(Ended, Option<Launch>), Failure>
where
    C: Connected + AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (inputs, mut receiver) = mpsc::channel(INPUTS);
    let (shutdown, stopping) = watch::channel(false);
    let (store, views) = (parts.store.clone(), parts.publisher.subscribe());
    let services = Services { term: parts.term, inputs, store, guard, views };
    // A task of its own: TLS and HTTP/2 of many clients must not delay the shell's loop.
    let mut server = tokio::spawn(serve(services, incoming, stopping));
    let mut shell = Shell::new(parts);
    let ended = if life.found_complete {
        shell.found_complete(life.samples)
    } else {
        shell.run(&mut receiver, &mut signals).await?
    };
    if life.stay && ended.outcome == Outcome::Complete && ended.signal.is_none() {
        shell.stay(&mut receiver, &mut signals).await?;
    }
    // Fails only if the server has ended before.
    let _ = shutdown.send(true);
    // The last messages to workers on other machines are still on their way; a worker that missed
    // one would wait out its lease.
    let _ = tokio::time::timeout(FAREWELL, &mut server).await;
    // A client that keeps its stream open must not keep the run from ending.
    server.abort();
    Ok((ended, shell.waiting_launch()))
}

fn conclude(ended: Ended, job: &Job, run_dir: &RunDir) -> Result<String, Failure> {
    match ended.outcome {
        Outcome::Complete => Ok(format!(
            "run {} is complete: checkpoints in {}, samples in {}{}",
            job.job.name,
            storage_of(job, run_dir),
            run_dir.path("samples").display(),
            alarms::at_the_end(&ended.alarms)
        )),
        Outcome::Stopped(position) => {
            let code = ended.signal.unwrap_or(StopSignal::Interrupt).exit_code();
            Err(Failure::Stopped { code, step: position.map_or(0, |position| ended.shape.steps(position)) })
        }
        Outcome::InputWrong(detail) => Err(Failure::Input(detail)),
        Outcome::Refused => Err(Failure::input("all workers of this machine were refused")),
        // The reason says the way on: for some there is none.
        Outcome::Failed(reason) => Err(Failure::Other(reason)),
    }
}
