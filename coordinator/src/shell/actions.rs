//! Carrying out the machine's decisions.

use std::time::Duration;

use ganglion_membership::{
    Action, Checkpoint, Event, Group, Outcome, Passport, Plan, PlanKind, Rejection, Start, WorkerId,
};
use ganglion_proto::message::{Assignment, ToWorker};
use serde_json::json;

use super::{Shell, ShellError};
use crate::journal::Fact;

impl Shell {
    pub(super) fn act(&mut self, action: Action) -> Result<(), ShellError> {
        match action {
            Action::Reject(worker, rejection) => self.reject(worker, &rejection),
            Action::AdoptPassport(passport) => self.adopt(&passport)?,
            Action::Form(group) => self.form(&group)?,
            Action::Abort { generation, workers, reason } => {
                self.records.message(&format!("regrouping: {reason}"));
                self.records.event("regroup", json!({ "generation": generation.0, "reason": reason }));
                for worker in workers {
                    self.send(worker, ToWorker::Abort(generation, reason.clone()));
                }
            }
            Action::Announce { plan, workers } => self.announce(plan, &workers),
            Action::Commit(checkpoint) => self.commit(checkpoint)?,
            Action::AbandonCheckpoint(step) => {
                self.records.event("checkpoint_abandoned", json!({ "step": step }));
            }
            Action::Spawn => self.replace()?,
            Action::GiveUpReplacing(reason) => {
                self.records.message(&format!("warning: not replacing local workers any more: {reason}"));
                self.records.event("replacing_given_up", json!({ "reason": reason }));
            }
            Action::Release(worker) => self.send(worker, ToWorker::Release),
            Action::Drop(worker) => {
                self.workers.remove(&worker);
                if let Some(supervisor) = &self.supervisor {
                    supervisor.kill(worker);
                }
                self.records.event("worker_dropped", json!({ "worker": worker.0 }));
            }
            Action::End(outcome) => self.end(outcome),
        }
        Ok(())
    }

    /// Sends without waiting; a worker whose queue is full has stopped reading and loses its session.
    pub(super) fn send(&mut self, worker: WorkerId, message: ToWorker) {
        if let Some(connected) = self.workers.get(&worker)
            && connected.outbox.try_send(message).is_err()
        {
            tracing::warn!("worker {worker} does not read its messages; closing its session");
            self.workers.remove(&worker);
        }
    }

    fn reject(&mut self, worker: WorkerId, rejection: &Rejection) {
        let reason = match rejection {
            Rejection::Ending => "the run is ending".to_string(),
            Rejection::Passport(differences) => {
                let items: Vec<String> = differences.iter().map(ToString::to_string).collect();
                format!(
                    "this worker would compute other bits than the run, which was started elsewhere: {}; use the same \
                     build on the same kind of machine",
                    items.join("; ")
                )
            }
        };
        self.records.message(&format!("refused worker {worker}: {reason}"));
        self.records.event("worker_refused", json!({ "worker": worker.0, "reason": reason }));
        self.send(worker, ToWorker::Reject(reason));
        self.workers.remove(&worker);
    }

    fn adopt(&mut self, passport: &Passport) -> Result<(), ShellError> {
        let text = serde_json::to_string(&passport.0).map_err(std::io::Error::from)?;
        self.journal.set_fact(Fact::Passport, &text)?;
        self.records.event("passport", json!({ "items": passport.0 }));
        Ok(())
    }

    fn form(&mut self, group: &Group) -> Result<(), ShellError> {
        self.journal.form(self.term, group)?;
        self.store.begin(group.generation);
        let start = match &group.start {
            Start::Fresh => "fresh".to_string(),
            Start::Healed(rank) => format!("rank {rank}"),
            Start::Checkpoint(_, checkpoint) => checkpoint.folder(),
        };
        let members: Vec<_> = (0u32..)
            .zip(&group.members)
            .map(|(rank, member)| {
                let pid = self.workers.get(&member.worker).map(|connected| connected.pid);
                let shards = [member.shards.start, member.shards.end];
                json!({ "rank": rank, "worker": member.worker.0, "pid": pid, "shards": shards })
            })
            .collect();
        self.records.event(
            "generation_formed",
            json!({
                "generation": group.generation.0, "world_size": group.members.len(),
                "position": group.position.0, "start": start, "members": members,
            }),
        );
        self.records.message(&format!(
            "generation {}: {} worker{} from {start}",
            group.generation,
            group.members.len(),
            if group.members.len() == 1 { "" } else { "s" },
        ));
        for (rank, member) in (0u32..).zip(&group.members) {
            if let Some(supervisor) = &self.supervisor {
                supervisor.rename(member.worker, &format!("rank {rank}"));
            }
            let assignment = Assignment { group: group.clone(), rank, reduce_timeout: self.reduce_timeout() };
            self.send(member.worker, ToWorker::Assignment(assignment));
        }
        Ok(())
    }

    /// Members wait for each other longer than the coordinator waits for any of them: it sees a silent one first.
    fn reduce_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.job.job.failure_deadline * 12.0).max(Duration::from_secs(60))
    }

    fn announce(&mut self, plan: Plan, workers: &[WorkerId]) {
        let kind = match plan.kind {
            PlanKind::Regroup => "regroup",
            PlanKind::Stop => "stop",
        };
        self.records.event("plan", json!({ "plan": plan.number, "change": kind }));
        for worker in workers {
            self.send(*worker, ToWorker::Plan(plan));
        }
    }

    /// Makes a checkpoint valid; if the storage fails, tries again later.
    pub(super) fn commit(&mut self, checkpoint: Checkpoint) -> Result<(), ShellError> {
        let written = self
            .journal
            .commit(&checkpoint)
            .map_err(|error| error.to_string())
            .and_then(|()| self.checkpoints.commit(&checkpoint).map_err(|error| error.to_string()));
        if let Err(reason) = written {
            self.records.message(&format!(
                "warning: the checkpoint of step {} waits for its manifest: {reason}; trying again",
                checkpoint.step
            ));
            let fields = json!({ "step": checkpoint.step, "file": "manifest.json", "reason": reason });
            self.records.event("checkpoint_delayed", fields);
            self.uncommitted.push(checkpoint);
            return Ok(());
        }
        self.records.event(
            "checkpoint",
            json!({
                "step": checkpoint.step, "phase": checkpoint.phase,
                "folder": checkpoint.folder(), "state_digest": checkpoint.state_digest,
            }),
        );
        if let Err(error) = self.checkpoints.prune(self.job.checkpoint.keep_last) {
            tracing::warn!("cannot remove old checkpoints: {error}");
        }
        self.handle(Event::CheckpointCommitted(checkpoint))
    }

    fn end(&mut self, outcome: Outcome) {
        self.records.catch_up();
        self.outcome = Some(outcome);
    }
}
