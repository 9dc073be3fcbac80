//! Operators' client of a running coordinator, over its own gRPC: status, drain, scale, stop.
//!
//! A coordinator leaves its address and a token in its run directory, in a file that only its user
//! can read.

use std::path::Path;
use std::time::{Duration, Instant};

use ganglion_proto::checked_status;
use ganglion_proto::dial::DialError;
use ganglion_proto::wire::admin_service_client::AdminServiceClient;
use ganglion_proto::wire::{DrainRequest, GetStatusRequest, GetStatusResponse, ScaleRequest, StopRequest};
use ganglion_proto::words::counted;
use tonic::Request;
use tonic::transport::Channel;

use crate::commands::inspect::{Overview, Standing, as_json, is_held, overview};
use crate::error::Failure;
use crate::records::status;
use crate::records::table::{Table, size};
use crate::run_dir::access::{ACCESS_FILE, Access};

/// Time limit for a coordinator's answer.
// A healthy loop answers within milliseconds; one whose journal is stuck does not answer changes at all.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Interval at which a stopping run is polled.
const LOOK: Duration = Duration::from_millis(100);

/// Request of an operator.
#[derive(Debug)]
pub(crate) enum Question {
    /// Shows the status of the run.
    Status {
        /// Whether to print JSON.
        json: bool,
    },
    /// Drains the worker with this number.
    Drain(u64),
    /// Sets the number of local workers.
    Scale(u32),
    /// Stops the run, and waits at most this long.
    Stop(Duration),
}

/// Sends a request to the coordinator of a run, and returns the text to print.
pub(crate) async fn operate(folder: &Path, question: Question) -> Result<String, Failure> {
    match question {
        Question::Status { json } => status(folder, json).await,
        Question::Drain(worker) => drain(worker, folder).await,
        Question::Scale(workers) => scale(workers, folder).await,
        Question::Stop(limit) => stop(limit, folder).await,
    }
}

/// Returns the status of a run. If no coordinator holds it, the status is read from its files.
async fn status(folder: &Path, json: bool) -> Result<String, Failure> {
    // Asked of the directory and not of the address: another program may have the port by now.
    if !is_held(folder) {
        let run = overview(folder)?;
        return Ok(if json { as_json(&run) } else { at_rest(&run) });
    }
    let (mut client, access) = reach(folder).await?;
    let answer = client.get_status(authorised(GetStatusRequest {}, &access)?).await.map_err(refused)?;
    // An operator's terminal shows names that workers chose, so they are cleaned like all input.
    let answer = checked_status(answer.into_inner()).map_err(Failure::other)?;
    Ok(if json { as_json(&status_json(&answer)) } else { table(&answer) })
}

fn at_rest(run: &Overview) -> String {
    let of = run.last_step.map_or(String::new(), |step| format!(" of {step}"));
    let saved =
        run.checkpoint_step.map_or("no checkpoint".to_string(), |step| format!("checkpoint of step {step}"));
    let next = match run.standing {
        Standing::Complete => "it is complete".to_string(),
        standing => format!("it is {}; the same command goes on with it", standing.name()),
    };
    format!("run {}: step {}{of}, {saved}; {next}", run.name, run.step)
}

async fn drain(worker: u64, folder: &Path) -> Result<String, Failure> {
    let (mut client, access) = reach(folder).await?;
    client.drain(authorised(DrainRequest { worker }, &access)?).await.map_err(refused)?;
    Ok(format!("worker {worker} leaves once the update that it computes is done; nothing is computed again"))
}

async fn scale(workers: u32, folder: &Path) -> Result<String, Failure> {
    let (mut client, access) = reach(folder).await?;
    client.scale(authorised(ScaleRequest { workers }, &access)?).await.map_err(refused)?;
    Ok(format!("the coordinator runs {} on its machine from now on", counted(workers, "worker")))
}

/// Asks a coordinator to stop, and waits until it no longer holds the run.
async fn stop(limit: Duration, folder: &Path) -> Result<String, Failure> {
    let (mut client, access) = reach(folder).await?;
    // A repeated `stop` asks for the same and does not stop at once, as a second signal would.
    client.stop(authorised(StopRequest {}, &access)?).await.map_err(refused)?;
    let started = Instant::now();
    // The coordinator answers at once and stops after its step and checkpoint, so its hold on the
    // directory is polled.
    while is_held(folder) {
        if started.elapsed() > limit {
            let seconds = limit.as_secs();
            return Err(Failure::Other(format!(
                "the run was asked to stop {seconds} s ago, and is still at its step or its checkpoint: it stops once they are \
                 done; `coordinator status` shows it"
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(at_rest(&overview(folder)?))
}

async fn reach(folder: &Path) -> Result<(AdminServiceClient<Channel>, Access), Failure> {
    let file = folder.join(ACCESS_FILE);
    let missing = |reason: String| {
        Failure::Input(format!("{}: {reason}; give a run whose coordinator is running", folder.display()))
    };
    let text = std::fs::read_to_string(&file).map_err(|error| missing(format!("{ACCESS_FILE}: {error}")))?;
    let access = Access::parse(&text).map_err(|error| missing(format!("{ACCESS_FILE}: {error}")))?;
    // Asked of the directory: another program may have the port by now, and would be sent the token.
    if !is_held(folder) {
        let run = folder.display();
        return Err(Failure::Other(format!(
            "no coordinator runs {run}; `coordinator status` says how it stands"
        )));
    }
    let uri = access.address.parse().map_err(|error| missing(format!("{ACCESS_FILE}: {error}")))?;
    let credentials = access.credentials();
    let endpoint = credentials.endpoint(&uri).map_err(|error| missing(error.to_string()))?;
    // Both bounds: a port that nobody serves, and a process that is stopped and still accepts.
    let endpoint = endpoint.connect_timeout(ANSWER_LIMIT).timeout(ANSWER_LIMIT);
    let channel = credentials.connect(endpoint).await.map_err(|error| match error {
        // TLS or its names do not fit: waiting changes nothing.
        DialError::Wrong(what) => Failure::Input(format!("the coordinator at {}: {what}", access.address)),
        DialError::Later(_) => Failure::Other(format!(
            "no coordinator answers at {}; has it ended? `coordinator runs` lists how each run stands",
            access.address
        )),
    })?;
    Ok((AdminServiceClient::new(channel), access))
}

fn authorised<T>(message: T, access: &Access) -> Result<Request<T>, Failure> {
    let mut request = Request::new(message);
    let token = format!("Bearer {}", access.token).parse();
    let token = token.map_err(|_| Failure::Input(format!("{ACCESS_FILE}: the token is no text")))?;
    request.metadata_mut().insert("authorization", token);
    Ok(request)
}

#[allow(clippy::needless_pass_by_value)] // as map_err hands it over
fn refused(status: tonic::Status) -> Failure {
    match status.code() {
        tonic::Code::FailedPrecondition | tonic::Code::InvalidArgument => {
            Failure::Input(status.message().to_string())
        }
        _ => Failure::Other(status.message().to_string()),
    }
}

/// A coordinator's status as JSON for programs.
fn status_json(status: &GetStatusResponse) -> serde_json::Value {
    let mut value = status::json(status);
    value["standing"] = Standing::Running.name().into();
    value
}

fn table(status: &GetStatusResponse) -> String {
    let mut workers = Table::new(&[
        "worker",
        "rank",
        "shards",
        "<device",
        "step",
        "<health",
        "<activity",
        "memory",
        "process",
        "<host",
    ]);
    let dash = || "-".to_string();
    for worker in &status.workers {
        let heard = worker.heartbeat_age.is_some();
        let shards = worker.first_shard..worker.first_shard + worker.shards;
        workers.row([
            worker.worker.to_string(),
            worker.rank.map_or_else(dash, |rank| rank.to_string()),
            if shards.is_empty() { dash() } else { format!("{}-{}", shards.start, shards.end - 1) },
            worker.device.clone(),
            if heard { (worker.position / status.phases_per_step.max(1)).to_string() } else { dash() },
            status::health(worker, status.failure_deadline).to_string(),
            if heard { status::activity(worker.activity()).to_string() } else { dash() },
            worker.resident_bytes.map_or_else(dash, size),
            worker.pid.to_string(),
            worker.host.clone(),
        ]);
    }
    format!(
        "run {}: step {}{}, {}, {}, generation {}, term {}\n{workers}",
        status.name,
        status.step,
        // Unknown until a worker has loaded the data, if the length is in epochs.
        if status.last_step > 0 { format!(" of {}", status.last_step) } else { String::new() },
        status.stage,
        match status.checkpoint_step {
            0 => "no checkpoint yet".to_string(),
            step => format!("checkpoint of step {step}"),
        },
        status.generation,
        status.term,
    )
}
