//! Handling of operators' requests.

use std::collections::BTreeMap;
use std::sync::Arc;

use ganglion_membership::{Event, GroupMember, WorkerId};
use ganglion_proto::activity_to_wire;
use ganglion_proto::record::{RunEvent, RunOutcome};
use ganglion_proto::wire::{GetStatusResponse, WorkerStatus};
use tokio::time::Instant;

use super::records::recorded;
use super::{Connected, Shell, ShellError, StopSignal};
use crate::api::grpc::AdminInput;
use crate::api::grpc::refusal::NotChanged;
use crate::records::view::View;

impl Shell {
    pub(super) fn administer(&mut self, input: AdminInput) -> Result<(), ShellError> {
        match input {
            // The operator may have gone meanwhile; then nobody needs the answer.
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
                // A repeated request has no further effect: a second signal would stop at once.
                match self.signal {
                    // There is no machine left to ask: `stay` looks at the signal after each request.
                    None if self.is_complete => self.signal = Some(StopSignal::Terminate),
                    None => self.stop(StopSignal::Terminate)?,
                    Some(_) => {}
                }
                let _ = answer.send(());
            }
        }
        Ok(())
    }

    fn drain(&mut self, worker: WorkerId) -> Result<Result<(), NotChanged>, ShellError> {
        if self.is_complete {
            return Ok(Err(NotChanged::Complete));
        }
        // Checked before the event is recorded, so the log has no request that had no effect.
        if !self.machine.workers().any(|known| known == worker) {
            let known = self.machine.workers().collect();
            return Ok(Err(NotChanged::NoWorker { worker, known }));
        }
        self.records.event(&RunEvent::DrainRequested { worker: worker.0 });
        // Before the number of local workers shrinks: else the machine would shed one of its own choice.
        self.handle(Event::Leave(worker))?;
        if self.supervisor.has(worker) {
            // An operator who drains a local worker wants its place to stay free.
            self.handle(Event::Scale(self.machine.local_workers().saturating_sub(1)))?;
        }
        Ok(Ok(()))
    }

    fn scale(&mut self, workers: u32) -> Result<Result<(), NotChanged>, ShellError> {
        if self.is_complete {
            return Ok(Err(NotChanged::Complete));
        }
        let shards = self.job.job.data_shards;
        // A worker without a data shard could only wait as a spare.
        if workers > shards {
            return Ok(Err(NotChanged::TooManyWorkers { workers, shards }));
        }
        self.records.event(&RunEvent::ScaleRequested { workers });
        self.handle(Event::Scale(workers))?;
        Ok(Ok(()))
    }

    /// Publishes a view for all readers, without waiting for any.
    pub(super) fn publish(&self) {
        // `send_replace` keeps only the newest view, so a slow reader costs nothing.
        if self.publisher.receiver_count() > 0 {
            let view = View { status: self.status(), at: Instant::now() };
            self.publisher.send_replace(Some(Arc::new(view)));
        }
    }

    /// Status of the run.
    fn status(&self) -> GetStatusResponse {
        let (group, checkpoint) = (self.machine.group(), self.machine.checkpoint());
        let world_size = group.map_or(0, |group| group.members.len());
        let samples = self.machine.samples().or(self.samples);
        let complete = self.is_complete.then_some(RunOutcome::Complete.name());
        let outcome = self.outcome.as_ref().map(|outcome| recorded(outcome).name());
        let members = (0u32..).zip(group.map_or(&[][..], |group| &group.members));
        let places: BTreeMap<WorkerId, (u32, &GroupMember)> =
            members.map(|(rank, member)| (member.worker, (rank, member))).collect();
        let worker = |(worker, known): (&WorkerId, &Connected)| {
            self.worker_status(*worker, known, places.get(worker).copied())
        };
        GetStatusResponse {
            name: self.job.job.name.clone(),
            run: self.run.clone(),
            term: self.term.0,
            generation: group.map_or(0, |group| group.generation.0),
            step: self.records.last_step(),
            last_step: samples.map_or(0, |samples| self.job.last_step(samples)),
            checkpoint_step: checkpoint.map_or(0, |checkpoint| checkpoint.step),
            state_digest: checkpoint.map_or(String::new(), |checkpoint| checkpoint.state_digest.clone()),
            stage: complete.map_or_else(|| self.machine.stage().to_string(), |_| "ended".to_string()),
            outcome: outcome.or(complete).unwrap_or_default().to_string(),
            data_shards: self.job.job.data_shards,
            phases_per_step: self.job.phases_per_step(),
            world_size: u32::try_from(world_size).unwrap_or(u32::MAX),
            failure_deadline: self.job.job.failure_deadline,
            workers: self.workers.iter().map(worker).collect(),
        }
    }

    fn worker_status(
        &self,
        worker: WorkerId,
        known: &Connected,
        place: Option<(u32, &GroupMember)>,
    ) -> WorkerStatus {
        let shards = place.map_or(0..0, |(_, member)| member.shards.clone());
        let (progress, usage) =
            known.heard.map_or_else(Default::default, |(_, progress, usage)| (progress, usage));
        WorkerStatus {
            worker: worker.0,
            host: known.host.clone(),
            pid: known.pid,
            rank: place.map(|(rank, _)| rank),
            device: known.device.clone(),
            first_shard: shards.start,
            shards: shards.end - shards.start,
            local: self.supervisor.has(worker),
            connected: known.outbox.is_some(),
            heartbeat_age: known.heard.map(|(at, ..)| at.elapsed().as_secs_f64()),
            position: progress.position.0,
            activity: activity_to_wire(progress.activity).into(),
            resident_bytes: usage.resident_bytes,
            gpu_memory_bytes: usage.gpu.memory_bytes,
            gpu_utilisation: usage.gpu.utilisation,
        }
    }
}
