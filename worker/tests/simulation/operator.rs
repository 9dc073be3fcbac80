//! What an operator asks of the coordinator, over gRPC, as `coordinator drain` and `coordinator scale` do.

use std::path::PathBuf;
use std::time::Duration;

use ganglion_coordinator::run_dir::access::{ACCESS_FILE, Access};
use ganglion_proto::wire::admin_service_client::AdminServiceClient;
use ganglion_proto::wire::{DrainRequest, GetStatusRequest, ScaleRequest};
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::net;
use crate::world::World;

/// How long a coordinator may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Asks for the first worker to be drained.
pub(crate) fn drain(world: &mut World<'_>) {
    ask(world, |folder| async move {
        let (mut client, access) = reach(folder).await?;
        let status = client.get_status(Request::new(GetStatusRequest {})).await?.into_inner();
        if let Some(worker) = status.workers.first() {
            client.drain(authorised(DrainRequest { worker: worker.worker }, &access)?).await?;
        }
        Ok(())
    });
}

/// Asks for so many local workers.
pub(crate) fn scale(world: &mut World<'_>, workers: u32) {
    // A run without local workers gets none: nobody would end them with it.
    if world.scenario.locals > 0 {
        ask(world, move |folder| async move {
            let (mut client, access) = reach(folder).await?;
            client.scale(authorised(ScaleRequest { workers }, &access)?).await?;
            Ok(())
        });
    }
}

/// It may well be refused, or not answered: the coordinator may not be there.
fn ask<F>(world: &mut World<'_>, ask: impl FnOnce(PathBuf) -> F)
where
    F: Future<Output = Result<()>> + 'static,
{
    let asked = ask(world.folder.clone());
    let name = format!("operator-{}", world.now().as_millis());
    world.sim.client(name, async move {
        let _ = tokio::time::timeout(LIMIT, asked).await;
        Ok(())
    });
}

async fn reach(folder: PathBuf) -> Result<(AdminServiceClient<Channel>, Access)> {
    let access: Access = serde_json::from_str(&std::fs::read_to_string(folder.join(ACCESS_FILE))?)?;
    let channel = (net::connector())(Endpoint::from_shared(access.address.clone())?).await?;
    Ok((AdminServiceClient::new(channel), access))
}

fn authorised<T>(message: T, access: &Access) -> Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {}", access.token).parse()?);
    Ok(request)
}
