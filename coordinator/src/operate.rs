//! What operators ask of a running coordinator, over its own gRPC: status, drain, scale.
//!
//! A coordinator leaves its address and a token in its run directory, in a file that only its user can read.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use ganglion_proto::wire::admin_service_client::AdminServiceClient;
use ganglion_proto::wire::{DrainRequest, GetStatusRequest, GetStatusResponse, ScaleRequest};
use serde::{Deserialize, Serialize};
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::run::Failure;

/// The file in the run directory.
pub const ACCESS_FILE: &str = "admin.json";
/// How long a coordinator may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How a run's coordinator is reached by those who may read its directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Access {
    /// Where it listens.
    pub address: String,
    /// What changes to the run need.
    pub token: String,
}

/// What is asked.
#[derive(Debug)]
pub enum Question {
    /// How things are.
    Status,
    /// That a worker leaves.
    Drain(u64),
    /// So many local workers.
    Scale(u32),
}

/// Asks the coordinator of a run, and returns what to print.
pub async fn operate(folder: &Path, question: Question) -> Result<String, Failure> {
    match question {
        Question::Status => status(folder).await,
        Question::Drain(worker) => drain(worker, folder).await,
        Question::Scale(workers) => scale(workers, folder).await,
    }
}

async fn status(folder: &Path) -> Result<String, Failure> {
    let (mut client, _) = reach(folder).await?;
    let answer = client.get_status(Request::new(GetStatusRequest {})).await.map_err(refused)?;
    Ok(table(&answer.into_inner()))
}

async fn drain(worker: u64, folder: &Path) -> Result<String, Failure> {
    let (mut client, access) = reach(folder).await?;
    client.drain(authorised(DrainRequest { worker }, &access)?).await.map_err(refused)?;
    Ok(format!("worker {worker} leaves at the next phase"))
}

async fn scale(workers: u32, folder: &Path) -> Result<String, Failure> {
    let (mut client, access) = reach(folder).await?;
    client.scale(authorised(ScaleRequest { workers }, &access)?).await.map_err(refused)?;
    Ok(format!("the coordinator runs {workers} workers from now on"))
}

async fn reach(folder: &Path) -> Result<(AdminServiceClient<Channel>, Access), Failure> {
    let file = folder.join(ACCESS_FILE);
    let missing = |reason: String| {
        Failure::Input(format!(
            "--run-dir {}: {reason}; give the folder of a run whose coordinator is running",
            folder.display()
        ))
    };
    let text = std::fs::read_to_string(&file).map_err(|error| missing(format!("{ACCESS_FILE}: {error}")))?;
    let access: Access =
        serde_json::from_str(&text).map_err(|error| missing(format!("{ACCESS_FILE}: {error}")))?;
    let endpoint = Endpoint::from_shared(access.address.clone())
        .map_err(|error| missing(format!("{ACCESS_FILE}: {error}")))?
        .connect_timeout(ANSWER_LIMIT)
        .timeout(ANSWER_LIMIT);
    let channel = endpoint.connect().await.map_err(|_| {
        Failure::Other(format!("no coordinator answers at {}; is the run still going on?", access.address))
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

fn table(status: &GetStatusResponse) -> String {
    let mut text = format!(
        "run {}: step {} of {}, checkpoint of step {}, generation {}, term {}\n{:>6}  {:>4}  {:>8}  host",
        status.name,
        status.step,
        status.last_step,
        status.checkpoint_step,
        status.generation,
        status.term,
        "worker",
        "rank",
        "process",
    );
    for worker in &status.workers {
        let rank = worker.rank.map_or("-".to_string(), |rank| rank.to_string());
        let _ = write!(text, "\n{:>6}  {rank:>4}  {:>8}  {}", worker.worker, worker.pid, worker.host);
    }
    text
}
