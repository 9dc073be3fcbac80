//! Lifetime of a coordinator, from its command line to its exit code.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ganglion_membership::{Checkpoint, Generation, Limits, Outcome, Recovered, Term};
use ganglion_proto::job::Job;
use ganglion_proto::log;
use ganglion_proto::trace::Trace;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tonic::transport::server::Connected;

use crate::api::grpc::guard::Guard;
use crate::api::grpc::tls::Acceptor;
use crate::api::grpc::{Store, serve};
use crate::api::http;
use crate::api::security::Security;
use crate::checkpoints::best::Judged;
use crate::checkpoints::catalog::Checkpoints;
use crate::checkpoints::retry::Patience;
use crate::commands::cli::{Cli, Workers};
use crate::control::detach::Launch;
use crate::control::{Change, Ended, Parts, Shell, ShellError, StopSignal, records::Records};
use crate::error::Failure;
use crate::job_file::{self, Source};
use crate::journal::{Fact, Journal};
use crate::records::disk::Disk;
use crate::records::mirror::Mirror;
use crate::records::progress::Screen;
use crate::records::timeline::Timeline;
use crate::run_dir::access::{ACCESS_FILE, Access};
use crate::run_dir::{RunDir, Settled};
use crate::startup::exclusion;
use crate::startup::host::Host;
use crate::startup::mend::open_records;
use crate::startup::resume::{self, Asked, known_samples, storage_failed};
use crate::system::node::Node;
use crate::workers::{Adoption, Exited, Processes, Supervisor, new_token};

/// Capacity of the shell's input queue.
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
        if let Some(line) = live(&cli, host, screen.clone(), launch.take()).await? {
            return Ok(line);
        }
    }
}

/// Runs one term. Returns `None` if another term must follow: this one quiesced the members of
/// earlier ones, for a change of the job that they must not learn of while they train.
async fn live(
    cli: &Cli,
    host: &impl Host,
    screen: Screen,
    mut launch: Option<Launch>,
) -> Result<Option<String>, Failure> {
    let job = read_job(cli)?;
    let processes = host.processes().map_err(Failure::other)?;
    let (local_workers, reason) = local_workers(cli, &job, &*processes)?;
    cli.listen_address(None).map_err(Failure::Input)?;
    let security = Security::of(&cli.security)?;

    let run_dir = hold(cli, &job, &screen, launch.as_mut())?;
    let TakenOver {
        job,
        done,
        change,
        run,
        mut journal,
        mut records,
        mut supervisor,
        exited,
        recovered,
        checkpoints,
        lost,
        patience,
    } = take_over(cli, job, &run_dir, processes, &screen, &host.disk()).await?;
    let mirror =
        Mirror::start(cli.mirror.as_deref(), &run, run_dir.folder(), &screen).map_err(Failure::Input)?;
    if done.is_none() {
        records.timeline = prepare_to_train(cli, local_workers, &supervisor)?;
    }
    if let Some(line) = done.as_ref().filter(|_| !cli.stay) {
        mirror.finish().await;
        return Ok(Some(line.clone()));
    }
    let winding_down = change == Change::Waits;
    let life = Life { found_complete: done.is_some(), samples: known_samples(&journal)?, stay: cli.stay };
    let term = begin_term(&mut journal, &run_dir, &job)?;
    let (incoming, url, access) = be_found(cli, host, &mut journal, &security).await?;
    supervisor.environment = security.environment(access.tls_name.as_deref());
    let (publisher, view) = watch::channel(None);
    let site = http::Content { view, chronicle: records.chronicle.clone(), job: &job, run: &run };
    let wanted = http::Wanted { address: cli.http.as_deref(), is_insecure: cli.insecure };
    let dashboard = http::start(wanted, &security, &mut journal, &run_dir, site).await?;
    leave_access(&run_dir, &access)?;
    let invitation = format!("{url}{}", security.invitation(access.tls_name.as_deref()));
    announce(&mut records, &job, term, &url, &invitation, dashboard.url().as_deref(), reason.as_deref());
    let parts = Parts {
        judged: judged(&journal, &checkpoints, &job, &mut records, &patience).await?,
        store: Store::new(term),
        folder: run_dir.folder().to_path_buf(),
        job: job.clone(),
        term,
        run,
        journal,
        checkpoints,
        recovered,
        lost,
        local_workers,
        change,
        url,
        publisher,
        records,
        supervisor,
        exited,
        launch,
    };
    let (signals, guard) = (host.signals().map_err(Failure::other)?, security.guard(&access.token));
    // Waits as long as the run lasts. A newer claim to the run directory ends it.
    let ended = while_held(&run_dir, supervise(parts, life, incoming, signals, guard)).await?;
    // Both are bounded and independent, so their limits run at the same time.
    tokio::join!(mirror.finish(), dashboard.farewell());
    match winding_down && ended.signal.is_none() && ended.outcome != Outcome::Complete {
        true => rested(&ended, &run_dir, &screen).map(|()| None),
        false => done.map_or_else(|| conclude(ended, &job, &run_dir), Ok).map(Some),
    }
}

fn read_job(cli: &Cli) -> Result<Job, Failure> {
    let source = cli.config.clone().map_or(Source::Embedded, Source::File);
    job_file::read(&source, &cli.overrides).map_err(Failure::input)
}

/// Opens the gRPC listener; also returns the URL and the access record for workers and operators.
async fn be_found<H: Host>(
    cli: &Cli,
    host: &H,
    journal: &mut Journal,
    security: &Security,
) -> Result<(mpsc::Receiver<H::Connection>, String, Access), Failure> {
    let (incoming, address) = listen(cli, host, journal, security.acceptor.clone()).await?;
    let address = SocketAddr::new(reachable(address.ip()), address.port());
    let token = new_token().map_err(Failure::other)?;
    Ok((incoming, format!("{}://{address}", security.scheme()), security.access(address, token)?))
}

/// Records that all members are quiesced. If members stopped at an unreadable sample, that is the
/// reason of the pending exclusion.
fn rested(ended: &Ended, run_dir: &RunDir, screen: &Screen) -> Result<(), Failure> {
    match &ended.outcome {
        Outcome::Stopped(_) => {
            let mut journal = open_journal(run_dir, screen)?;
            let newest = journal.last_generation()?;
            Ok(journal.set_fact(Fact::Closed, &newest.to_string())?)
        }
        Outcome::InputWrong(_) | Outcome::Complete => Ok(()),
        Outcome::Failed(reason) => Err(Failure::Other(reason.clone())),
    }
}

/// Takes the run directory, and opens the log of a run that leaves its terminal.
fn hold(cli: &Cli, job: &Job, screen: &Screen, launch: Option<&mut Launch>) -> Result<RunDir, Failure> {
    let folder = cli.run_dir.clone().unwrap_or_else(|| PathBuf::from("runs").join(&job.job.name));
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
    tokio::select! {
        // The fence may have refused a commit before its loss was reported.
        ended = run => ended.map_err(|failure| run_dir.fence().check().err().map_or(failure, Failure::other)),
        superseded = run_dir.fence().lost() => Err(Failure::other(superseded)),
    }
}

/// State of the run as taken over from earlier coordinators.
struct TakenOver {
    /// The job, including the samples that the run leaves out.
    job: Job,
    /// Final line of a run that is already finished; `None` if there is work left.
    done: Option<String>,
    change: Change,
    run: String,
    journal: Journal,
    records: Records,
    supervisor: Supervisor,
    exited: mpsc::UnboundedReceiver<Exited>,
    recovered: Recovered,
    checkpoints: Checkpoints,
    lost: Option<String>,
    patience: Patience,
}

/// Takes over a run, or begins one if there is none.
async fn take_over(
    cli: &Cli,
    job: Job,
    run_dir: &RunDir,
    processes: Box<dyn Processes>,
    screen: &Screen,
    disk: &Arc<dyn Disk>,
) -> Result<TakenOver, Failure> {
    let mut journal = open_journal(run_dir, screen)?;
    // Nothing was trained before the first group formed, so a mistake in the job may still be mended.
    let begun = journal.last_generation()? > Generation(0);
    let Settled { mut job, changed, asked } = run_dir.check_job(job, begun, journal.unused_exclusion()?)?;
    let run = run_name(&mut journal)?;
    let patience = Patience::new(screen.clone());
    let mut records = open_records(&job, run_dir.folder(), screen, disk, &mut journal)?;
    let mut recovered = left_behind(&journal, changed)?;
    let (exits, exited) = mpsc::unbounded_channel();
    let mut supervisor = Supervisor::new(processes, exits);
    adopt(&mut journal, &mut supervisor, &mut recovered)?;
    let place = storage_of(&job, run_dir);
    let wanted =
        Asked { place: &place, run: &run, may_live: may_live(&recovered), from_start: cli.from_start };
    let found = resume::find(&wanted, &mut journal, &mut records, &patience).await?;
    recovered.checkpoint = found.checkpoint;
    run_dir.write_job(&job)?;
    let done = finished(&journal, &job, recovered.checkpoint.as_ref(), run_dir)?;
    if done.is_some() {
        // Workers may be left of a coordinator that died before it could release them.
        supervisor.ask_all_to_end();
    }
    let change = match done {
        None if !asked.is_empty() && may_live(&recovered) => Change::Waits,
        None if !asked.is_empty() => {
            let exclusion = exclusion::decide(asked, &job, &journal, &records)?;
            exclusion::write(&exclusion, &mut job, &mut journal, run_dir)?;
            recovered.passport = if recovered.group.is_some() { journal.passport()? } else { None };
            Change::Made(exclusion)
        }
        _ => Change::None,
    };
    Ok(TakenOver {
        job,
        done,
        change,
        run,
        journal,
        records,
        supervisor,
        exited,
        recovered,
        checkpoints: found.checkpoints,
        lost: found.lost,
        patience,
    })
}

/// Number of workers to start, with a line that explains it.
fn local_workers(cli: &Cli, job: &Job, processes: &dyn Processes) -> Result<(u32, Option<String>), Failure> {
    let gpus = if cli.workers == Workers::Auto { count_gpus(processes)? } else { 0 };
    cli.local_workers(job, gpus).map_err(Failure::Input)
}

/// Takes the next term, and publishes it in the claim.
fn begin_term(journal: &mut Journal, run_dir: &RunDir, job: &Job) -> Result<Term, Failure> {
    let term = journal.begin_term(job.metrics.every_steps)?;
    run_dir.ownership().begun(term.0);
    log::note("run", job.job.name.as_str());
    log::note("term", term.0);
    Ok(term)
}

/// Writes the access record for operators.
fn leave_access(run_dir: &RunDir, access: &Access) -> Result<(), Failure> {
    let text = serde_json::to_string(access).map_err(Failure::other)?;
    Ok(run_dir.write_secret(ACCESS_FILE, &text)?)
}

/// Checks and files needed only by an unfinished run; a finished one keeps its trace.
fn prepare_to_train(cli: &Cli, local_workers: u32, supervisor: &Supervisor) -> Result<Timeline, Failure> {
    if local_workers > 0 {
        supervisor.check_program().map_err(Failure::other)?;
    }
    open_trace(cli)
}

/// Prints and records the addresses and settings of this coordinator.
fn announce(
    records: &mut Records,
    job: &Job,
    term: Term,
    url: &str,
    invitation: &str,
    dashboard: Option<&str>,
    reason: Option<&str>,
) {
    let fields = json!({ "term": term.0, "pid": std::process::id(), "address": url, "dashboard": dashboard });
    records.event("coordinator_started", fields);
    let (name, folder) = (&job.job.name, records.folder().display());
    let join = format!("run {name} in {folder}; other workers join with: worker --coordinator {invitation}");
    let dashboard = dashboard.map(|dashboard| format!("dashboard {dashboard}"));
    let limits = Limits::derive(Duration::from_secs_f64(job.job.failure_deadline)).to_string();
    let lines = [Some(join), dashboard, reason.map(str::to_string), Some(limits)];
    lines.into_iter().flatten().for_each(|line| records.message(&line));
}

/// Address of the storage that holds the run's checkpoints.
fn storage_of(job: &Job, run_dir: &RunDir) -> String {
    job.checkpoint.url.clone().unwrap_or_else(|| run_dir.path("checkpoints").display().to_string())
}

fn open_trace(cli: &Cli) -> Result<Timeline, Failure> {
    let Some(file) = &cli.trace else { return Ok(Timeline::new(&Trace::off())) };
    let trace = Trace::create(file, "coordinator")
        .map_err(|error| Failure::Input(format!("--trace {}: {error}", file.display())))?;
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

/// Runs server and shell until the run ends, and longer with `--stay`.
async fn supervise<C>(
    parts: Parts,
    life: Life,
    incoming: mpsc::Receiver<C>,
    mut signals: mpsc::UnboundedReceiver<StopSignal>,
    guard: Guard,
) -> Result<Ended, Failure>
where
    C: Connected + AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (inputs, mut receiver) = mpsc::channel(INPUTS);
    let (shutdown, stopping) = watch::channel(false);
    let (term, store) = (parts.term, parts.store.clone());
    let views = parts.publisher.subscribe();
    let mut server = tokio::spawn(serve(incoming, term, inputs, store, guard, views, stopping));
    let mut shell = Shell::new(parts);
    let ended = if life.found_complete {
        shell.found_complete(life.samples)
    } else {
        shell.run(&mut receiver, &mut signals).await?
    };
    if life.stay && ended.outcome == Outcome::Complete && ended.signal.is_none() {
        shell.stay(&mut receiver, &mut signals).await?;
    }
    let _ = shutdown.send(true);
    // The last messages to workers on other machines are still on their way; a worker that missed
    // one would wait out its lease.
    let _ = tokio::time::timeout(FAREWELL, &mut server).await;
    server.abort();
    Ok(ended)
}

/// Opens the journal. If it is missing while the run's records exist, the run is refused: it is not new.
fn open_journal(run_dir: &RunDir, screen: &Screen) -> Result<Journal, Failure> {
    let journal = run_dir.path("journal.sqlite");
    let holds = |name: &&str| std::fs::metadata(run_dir.path(name)).is_ok_and(|file| file.len() > 0);
    let records = ["metrics.jsonl", "events.jsonl", "checkpoints/.run"];
    if !holds(&"journal.sqlite")
        && let Some(record) = records.iter().find(|name| holds(name))
    {
        let folder = run_dir.folder().display();
        return Err(Failure::Input(format!(
            "{}: missing or empty, though {folder} holds the {record} of a run; restore it, or make a new one from the \
             checkpoints with: coordinator recover {folder}; to begin anew, choose another --run-dir",
            journal.display()
        )));
    }
    // The journal holds the tokens by which local workers authenticate.
    if let Err(error) = run_dir.keep_private("journal.sqlite") {
        tracing::debug!("{}: its mode stays as it is: {error}", journal.display());
    }
    let mut journal = Journal::open(&journal)?;
    journal.guard(run_dir.ownership())?;
    if let Some(lacking) = journal.lacking() {
        screen.print(lacking);
    }
    Ok(journal)
}

fn run_name(journal: &mut Journal) -> Result<String, Failure> {
    if let Some(run) = journal.fact(Fact::Run)? {
        return Ok(run);
    }
    let run = new_token().map_err(Failure::other)?;
    journal.set_fact(Fact::Run, &run)?;
    Ok(run)
}

/// Loads the recorded evaluations, and writes the events that an earlier coordinator's death prevented.
async fn judged(
    journal: &Journal,
    checkpoints: &Checkpoints,
    job: &Job,
    records: &mut Records,
    patience: &Patience,
) -> Result<Judged, Failure> {
    let rows = journal.evaluations()?;
    let untold = rows.iter().filter(|row| !records.chronicle.look().evaluations.contains_key(&row.step));
    let untold: Vec<_> = untold.cloned().collect();
    untold.iter().for_each(|row| records.evaluation(row));
    let storage = checkpoints.storage();
    let folders = match rows.is_empty() {
        true => Ok(Vec::new()),
        false => patience.wait_for(storage, async || storage.checkpoints().await).await,
    };
    let folders = folders.map_err(|error| storage_failed(checkpoints, patience, &error))?;
    Ok(Judged::new(job.clone(), rows, &folders))
}

/// Group of the earlier terms, from the journal.
fn left_behind(journal: &Journal, job_changed: bool) -> Result<Recovered, Failure> {
    let group = journal.last_group()?;
    let passport = if group.is_some() { journal.passport()? } else { None };
    let condemned = known_generation(journal, Fact::Condemned)?;
    let closed = known_generation(journal, Fact::Closed)?;
    let resting = group.iter().filter(|group| closed == Some(group.generation));
    let dead = resting.flat_map(|group| &group.members).map(|member| member.worker).collect();
    let skips = journal.skips()?;
    Ok(Recovered { group, dead, condemned, skips, passport, job_changed, ..Recovered::default() })
}

/// Whether a member that holds a state may be alive.
fn may_live(recovered: &Recovered) -> bool {
    let mut members = recovered.group.iter().flat_map(|group| &group.members);
    members.any(|member| !recovered.dead.contains(&member.worker))
}

fn known_generation(journal: &Journal, fact: Fact) -> Result<Option<Generation>, Failure> {
    Ok(journal.fact(fact)?.and_then(|text| text.parse().ok()).map(Generation))
}

/// Adopts local workers of earlier terms that are still running, and notes the members of the
/// newest group that are not.
fn adopt(
    journal: &mut Journal,
    supervisor: &mut Supervisor,
    recovered: &mut Recovered,
) -> Result<(), Failure> {
    let members: Vec<_> =
        recovered.group.iter().flat_map(|group| &group.members).map(|member| member.worker).collect();
    let here = Node::here();
    let children = journal.children()?;
    let mut ended = Vec::new();
    for child in &children {
        match supervisor.adopt(child, &here) {
            Adoption::Runs => {
                recovered.running += 1;
                recovered.locals.extend(child.worker);
            }
            Adoption::Ended => {
                // A process without a known number may yet say hello; nothing waits for it.
                if child.process.is_some() && !child.ended {
                    ended.push(child.token.as_str());
                }
                recovered.dead.extend(child.worker.filter(|worker| members.contains(worker)));
            }
            // A member has until the end of its lease to come back.
            Adoption::Elsewhere => {}
        }
    }
    Ok(journal.all_ended(&ended)?)
}

/// Final line of a run that has no work left; `None` if there is any.
fn finished(
    journal: &Journal,
    job: &Job,
    checkpoint: Option<&Checkpoint>,
    run_dir: &RunDir,
) -> Result<Option<String>, Failure> {
    let samples = known_samples(journal)?;
    let (Some(samples), Some(checkpoint)) = (samples, checkpoint) else { return Ok(None) };
    let last_step = job.last_step(samples);
    if checkpoint.step < last_step {
        return Ok(None);
    }
    Ok(Some(format!(
        "run {} in {} is finished: step {} of {last_step}, state_digest {}; raise job.steps to train on",
        job.job.name,
        run_dir.folder().display(),
        checkpoint.step,
        checkpoint.state_digest
    )))
}

async fn listen<H: Host>(
    cli: &Cli,
    host: &H,
    journal: &mut Journal,
    tls: Option<Arc<Acceptor>>,
) -> Result<(mpsc::Receiver<H::Connection>, SocketAddr), Failure> {
    let last_port = journal.fact(Fact::Port)?.and_then(|port| port.parse().ok());
    let wanted = cli.listen_address(last_port).map_err(Failure::Input)?;
    let listening = match host.listen(wanted, tls.clone()).await {
        Err(error) if cli.listen.is_none() && last_port.is_some() => {
            tracing::warn!("port {} of the last time: {error}; taking another", wanted.port());
            host.listen(SocketAddr::new(wanted.ip(), 0), tls).await
        }
        listening => listening,
    };
    let (incoming, address) = listening.map_err(|error| {
        Failure::Input(format!("--listen {wanted}: {error}; choose another port, or 0 for any that is free"))
    })?;
    journal.set_fact(Fact::Port, &address.port().to_string())?;
    Ok((incoming, address))
}

/// Address at which others reach a listener: this machine's own, where it listens on all.
fn reachable(address: IpAddr) -> IpAddr {
    if !address.is_unspecified() {
        return address;
    }
    // Connecting a datagram socket sends nothing; it only chooses a route. The target is reserved for
    // documentation.
    let routed = UdpSocket::bind(("0.0.0.0", 0)).and_then(|socket| {
        socket.connect(("192.0.2.1", 9))?;
        socket.local_addr()
    });
    routed.map_or(IpAddr::from([127, 0, 0, 1]), |local| local.ip())
}

fn conclude(ended: Ended, job: &Job, run_dir: &RunDir) -> Result<String, Failure> {
    match ended.outcome {
        Outcome::Complete => Ok(format!(
            "run {} is complete: checkpoints in {}, samples in {}",
            job.job.name,
            storage_of(job, run_dir),
            run_dir.path("samples").display()
        )),
        Outcome::Stopped(position) => {
            let per_step = job.phases_per_step();
            let code = ended.signal.unwrap_or(StopSignal::Interrupt).exit_code();
            Err(Failure::Stopped { code, step: position.map_or(0, |position| position.0 / per_step) })
        }
        Outcome::InputWrong(detail) => Err(Failure::Input(detail)),
        Outcome::Failed(reason) => Err(Failure::Other(format!(
            "{reason}; once that is mended, the same command goes on from the newest checkpoint"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Spawned;
    use crate::workers::{Process, StartOrder};

    /// A machine on which no process runs any more.
    struct Deserted;

    impl Processes for Deserted {
        fn check_program(&self) -> std::io::Result<()> {
            Ok(())
        }
        fn count_gpus(&self) -> std::io::Result<u32> {
            Ok(0)
        }
        fn start(&mut self, _: StartOrder) -> std::io::Result<(Box<dyn Process>, Spawned)> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
        fn find(
            &mut self,
            _: &str,
            _: Spawned,
            _: mpsc::UnboundedSender<Exited>,
        ) -> Option<Box<dyn Process>> {
            None
        }
    }

    /// Otherwise each start would wait for the disk once for each process that the run ever had.
    #[test]
    fn ends_are_journaled_once_and_together() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&folder.path().join("journal.sqlite")).unwrap();
        let written = || std::fs::metadata(folder.path().join("journal.sqlite-wal")).unwrap().len();
        for pid in 1..=100 {
            let token = format!("token {pid}");
            journal.spawning(Term(1), &token, 0).unwrap();
            journal.spawned(&token, Spawned { pid, started: 1 }).unwrap();
        }
        let (exits, _exited) = mpsc::unbounded_channel();
        let mut start = || {
            let before = written();
            let mut supervisor = Supervisor::new(Box::new(Deserted), exits.clone());
            adopt(&mut journal, &mut supervisor, &mut Recovered::default()).unwrap();
            written() - before
        };
        // One page per child, if each were a transaction.
        let page = 4096;
        assert!((1..50 * page).contains(&start()), "all that ended are noted in one transaction");
        assert_eq!(start(), 0, "and those that were noted are not noted again");
        assert!(journal.children().unwrap().iter().all(|child| child.ended));
    }
}
