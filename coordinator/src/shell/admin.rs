//! What operators ask for.

use ganglion_membership::{Event, WorkerId};
use ganglion_proto::wire::{GetStatusResponse, WorkerStatus};
use serde_json::json;

use super::{Shell, ShellError, StopSignal};
use crate::server::AdminInput;

impl Shell {
    pub(super) fn administer(&mut self, input: AdminInput) -> Result<(), ShellError> {
        match input {
            AdminInput::Status(answer) => drop(answer.send(self.status())),
            AdminInput::Drain(worker, answer) => {
                let possible = self.drain(worker)?;
                let _ = answer.send(possible);
            }
            AdminInput::Scale(workers, answer) => {
                let possible = self.scale(workers)?;
                let _ = answer.send(possible);
            }
            AdminInput::Stop(answer) => {
                // Asking twice is no more than asking once: a second signal would stop at once.
                if self.signal.is_none() {
                    self.stop(StopSignal::Terminate)?;
                }
                let _ = answer.send(());
            }
        }
        Ok(())
    }

    fn drain(&mut self, worker: WorkerId) -> Result<Result<(), String>, ShellError> {
        if !self.machine.workers().any(|known| known == worker) {
            let known: Vec<String> = self.machine.workers().map(|worker| worker.to_string()).collect();
            return Ok(Err(format!("there is no worker {worker}; there are: {}", known.join(", "))));
        }
        self.records.event("drain_requested", json!({ "worker": worker.0 }));
        self.handle(Event::Leave(worker))?;
        if self.supervisor.has(worker) {
            // Whoever drains a local worker wants its place to stay free.
            self.handle(Event::Scale(self.machine.local_workers().saturating_sub(1)))?;
        }
        Ok(Ok(()))
    }

    fn scale(&mut self, workers: u32) -> Result<Result<(), String>, ShellError> {
        let shards = self.job.job.data_shards;
        if workers > shards {
            return Ok(Err(format!("{workers} workers are more than the job's {shards} data shards")));
        }
        self.records.event("scale_requested", json!({ "workers": workers }));
        self.handle(Event::Scale(workers))?;
        Ok(Ok(()))
    }

    fn status(&self) -> GetStatusResponse {
        let group = self.machine.group();
        let rank = |worker: WorkerId| {
            let rank = group?.members.iter().position(|member| member.worker == worker)?;
            u32::try_from(rank).ok()
        };
        let workers = self.workers.iter().map(|(worker, connected)| WorkerStatus {
            worker: worker.0,
            host: connected.host.clone(),
            pid: connected.pid,
            rank: rank(*worker),
        });
        GetStatusResponse {
            name: self.job.job.name.clone(),
            term: self.term.0,
            generation: group.map_or(0, |group| group.generation.0),
            step: self.records.last_step(),
            last_step: self.machine.samples().map_or(0, |samples| self.job.last_step(samples)),
            checkpoint_step: self.machine.checkpoint().map_or(0, |checkpoint| checkpoint.step),
            workers: workers.collect(),
        }
    }
}
