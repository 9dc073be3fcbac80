//! Execution of the machine's decisions.

use std::cmp::Ordering;
use std::io;

use ganglion_membership::{
    Action, Backend, Cause, Checkpoint, Difference, Event, Generation, Group, GroupMember, Outcome, Passport,
    Plan, PlanKind, Rejection, Start, WorkerId,
};
use ganglion_proto::job::{Exclusion, ModelKind};
use ganglion_proto::message::{Assignment, MetricsRow, ToWorker};
use ganglion_proto::record::found::FileFound;
use ganglion_proto::record::{MemberLine, PlannedChange, RunEvent};
use ganglion_proto::words::counted;
use ganglion_proto::{failpoint, log};

use super::stuck::Held;
use super::unlike::{OfTheRun, SampleFiles, other_bits};
use super::{Change, Shell, ShellError};
use crate::checkpoints::writer::Kept;
use crate::journal::{Fact, JournalError};
use crate::run_dir::write_job;

impl Shell {
    pub(super) fn act(&mut self, action: Action) -> Result<(), ShellError> {
        match action {
            Action::Reject(worker, rejection) => self.reject(worker, &rejection),
            Action::AdoptPassport(passport) => self.adopt(&passport)?,
            Action::Condemn(generation) => {
                // D10: durable before anything else follows from it. A coordinator that starts between
                // this and the regroup must know that these states do not count.
                self.journal.set_fact(Fact::Condemned, &generation.to_string())?;
                self.records.event(&RunEvent::Condemned { generation: generation.0 });
                // A storage that was away may still take one, and the run would go on from a wrong
                // state.
                self.give_up_checkpoints();
            }
            Action::Close(generation) => {
                // Durable before the releases that follow: else the next coordinator would wait a lease
                // for members that have exited.
                self.journal.set_fact(Fact::Closed, &generation.to_string())?;
            }
            Action::AllowSkip(position) => {
                // Durable before the group that may skip is formed. A coordinator that has lost it would
                // form a group that rolls back at the same phase again.
                self.journal.allow_skip(position)?;
                self.records.event(&RunEvent::SkipAllowed { position: position.0 });
            }
            Action::Form(group, cause) => self.form(&group, &cause)?,
            Action::Assign(worker) => self.assign(worker),
            Action::Abort { generation, workers, cause, probe } => {
                self.abort(generation, &workers, &cause, probe);
            }
            Action::Announce { plan, workers } => self.announce(plan, &workers),
            Action::Commit(checkpoint) => self.commit(checkpoint)?,
            Action::Search => self.keeper.search(),
            Action::AbandonCheckpoint(step) => {
                self.records.event(&RunEvent::CheckpointAbandoned { step });
            }
            Action::Spawn => self.spawn()?,
            Action::GiveUpReplacing(reason) => {
                self.records.message(&format!("warning: not replacing local workers any more: {reason}"));
                self.records.event(&RunEvent::ReplacingGivenUp { reason });
            }
            Action::Keep => self.keep(),
            Action::Lose(worker, loss) => self.lose(worker, &loss),
            Action::Release(worker) => {
                let complete = self.is_complete;
                self.send(worker, ToWorker::Release { complete });
                // The session ends once the worker has read the release.
                self.workers.remove(&worker);
            }
            Action::Drop(worker) => {
                // A worker on another machine cannot be killed; its session ends, and its lease stops it
                // (M4).
                self.supervisor.kill(worker);
                self.records.event(&RunEvent::WorkerDropped { worker: worker.0 });
                // The entry stays for `lose`, which takes the process number from it.
                if let Some(connected) = self.workers.get_mut(&worker) {
                    connected.outbox = None;
                }
            }
            Action::End(outcome) => self.end(outcome),
        }
        Ok(())
    }

    /// Sends without waiting; a worker whose queue is full has stopped reading and loses its session.
    pub(super) fn send(&mut self, worker: WorkerId, message: ToWorker) {
        let Some(connected) = self.workers.get_mut(&worker) else { return };
        let Some(outbox) = &connected.outbox else { return };
        // Never `send().await`: one worker that does not read would hold the loop, and with it all
        // others.
        if outbox.try_send(message).is_err() {
            tracing::warn!("worker {worker} does not read its messages; closing its session");
            connected.outbox = None;
            // The machine hears of it in `handle`, when the actions at hand are done.
            self.deaf.push(worker);
        }
    }

    pub(super) fn send_to_all(&mut self, message: &ToWorker) {
        let workers: Vec<WorkerId> = self.workers.keys().copied().collect();
        workers.into_iter().for_each(|worker| self.send(worker, message.clone()));
    }

    fn abort(&mut self, generation: Generation, workers: &[WorkerId], cause: &Cause, probe: bool) {
        self.records.message(&format!("regrouping: {cause}"));
        self.records.event(&RunEvent::Regroup { generation: generation.0, reason: cause.to_string() });
        // With this a member gives up its own state when it quiesces (D10), and reports ready with none.
        let condemned = self.machine.condemned() == Some(generation);
        for worker in workers {
            let reason = cause.to_string();
            self.send(*worker, ToWorker::Abort { generation, reason, probe, condemned });
        }
    }

    fn keep(&mut self) {
        let Some(group) = self.machine.group() else { return };
        let (generation, world_size) = (group.generation, group.members.len());
        let (workers, verb) =
            (counted(world_size, "worker"), if world_size == 1 { "trains" } else { "train" });
        self.records.message(&format!("took over generation {generation}: {workers} {verb} on"));
        self.has_started();
        self.records.event(&RunEvent::GenerationKept {
            generation: generation.0,
            term: self.term.0,
            world_size: world_size as u64,
        });
    }

    fn reject(&mut self, worker: WorkerId, rejection: &Rejection) {
        let reason = match rejection {
            Rejection::Ending => "the run is ending".to_string(),
            Rejection::Passport(differences) => self.other_bits(worker, differences),
        };
        self.records.message(&format!("refused worker {worker}: {reason}"));
        self.records.event(&RunEvent::WorkerRefused { reason: reason.clone(), worker: worker.0 });
        self.send(worker, ToWorker::Reject(reason));
        self.workers.remove(&worker);
    }

    /// Message about a worker that would compute other bits. It is also the reason of the run's end, if
    /// nobody is left to train.
    fn other_bits(&mut self, worker: WorkerId, differences: &[Difference]) -> String {
        self.newcomer.is_local = self.supervisor.has(worker);
        let files = self.recorded_files();
        let has_modules = self.job.model.kind == ModelKind::Script;
        let run = OfTheRun { samples: self.machine.samples().or(self.samples), files, has_modules };
        let told = other_bits(differences, &self.newcomer, &run);
        self.refusal = Some(told.clone());
        told
    }

    /// Files of the run's data set, if their list can be read.
    fn recorded_files(&self) -> Option<SampleFiles> {
        // The list explains a change and decides nothing: without it the numbers are told.
        let text = self.journal.fact(Fact::Files).ok().flatten()?;
        serde_json::from_str(&text).ok()
    }

    /// Records the files of the run's data set, unless they are recorded.
    pub(super) fn note_files(&mut self, data: &str, files: &[FileFound]) {
        // The list is long, so it is read only where there is one to compare.
        if files.is_empty() || self.recorded_files().is_some_and(|known| known.are_of(data)) {
            return;
        }
        let text = serde_json::to_string(&SampleFiles::new(data, files)).map_err(std::io::Error::from);
        let noted =
            text.map_err(JournalError::File).and_then(|text| self.journal.set_fact(Fact::Files, &text));
        if let Err(error) = noted {
            tracing::warn!("the names of the samples' files are not recorded: {error}");
        }
    }

    fn adopt(&mut self, passport: &Passport) -> Result<(), ShellError> {
        let text = serde_json::to_string(&passport.0).map_err(std::io::Error::from)?;
        // D11: durable before a group trains by it. The next coordinator must refuse the same workers,
        // or a run would mix two kinds of bits.
        self.journal.set_fact(Fact::Passport, &text)?;
        self.records.event(&RunEvent::Passport { items: passport.0.clone() });
        Ok(())
    }

    fn form(&mut self, group: &Group, cause: &Cause) -> Result<(), ShellError> {
        if let Some(lost) = self.lost.take_if(|_| group.start == Start::Fresh) {
            // No member that holds a state came back, so a fresh start would drop the trained steps.
            self.outcome = Some(Outcome::InputWrong(lost));
            return Ok(());
        }
        // M1: durable before any member hears of it. A coordinator that died after telling one, and
        // before this, would be followed by one that uses the number again.
        self.journal.form(self.term, group, cause)?;
        // Behind it, so that job.toml never has what no group trains by; and before a member hears of the
        // group, so that the next coordinator knows what the members train by.
        if std::mem::take(&mut self.unrecorded) {
            write_job(self.records.folder(), &self.job)
                .map_err(|error| io::Error::new(error.kind(), format!("job.toml: {error}")))?;
        }
        self.records.formed(group.position);
        // Numbered by generation: journaled, and no member was told.
        failpoint::reached("form", group.generation.0);
        if let Change::Made(exclusion) = self.change.clone() {
            self.change = Change::None;
            self.records.message(&format!("left out {exclusion}"));
            let Exclusion { after_step, after_phase, files, .. } = exclusion;
            self.records.event(&RunEvent::SamplesExcluded { after_phase, after_step, files });
        }
        // Before any assignment: a member looks for its peers at once, and the store refuses a
        // generation that it does not serve (M6).
        self.store.begin(group.generation);
        log::note("generation", group.generation.0);
        self.tell_group(group, cause);
        self.has_started();
        for (rank, member) in (0u32..).zip(&group.members) {
            self.supervisor.rename(member.worker, &format!("rank {rank}"));
            self.assign(member.worker);
            // Numbered by generation: perhaps one member was told, and the others were not.
            failpoint::reached("assign", group.generation.0);
        }
        Ok(())
    }

    /// Records and prints a new group.
    fn tell_group(&mut self, group: &Group, cause: &Cause) {
        let start = match &group.start {
            Start::Fresh => "fresh".to_string(),
            Start::Healed(rank) => format!("rank {rank}"),
            Start::Checkpoint(_, checkpoint) => checkpoint.folder(),
        };
        let member = |(rank, member): (u32, &GroupMember)| MemberLine {
            pid: self.workers.get(&member.worker).map(|connected| connected.pid),
            rank,
            shards: [member.shards.start, member.shards.end],
            worker: member.worker.0,
        };
        let members = (0u32..).zip(&group.members).map(member).collect();
        self.records.event(&RunEvent::GenerationFormed {
            backend: group.backend.to_string(),
            cause: cause.to_string(),
            generation: group.generation.0,
            members,
            position: group.position.0,
            start: start.clone(),
            world_size: group.members.len() as u64,
        });
        self.records.message(&format!(
            "generation {}: {} from {start}, over {}{}",
            group.generation,
            counted(group.members.len(), "worker"),
            group.backend,
            if self.is_exposed(group) { ", which does not encrypt: fence its network" } else { "" },
        ));
    }

    /// Whether other machines could read a group's reduces, though this coordinator uses TLS.
    fn is_exposed(&self, group: &Group) -> bool {
        group.backend == Backend::Nccl && group.members.len() > 1 && self.url.starts_with("https://")
    }

    /// Sends a member its place in the newest group.
    fn assign(&mut self, worker: WorkerId) {
        let Some(group) = self.machine.group().cloned() else { return };
        let Some(rank) = group.members.iter().position(|member| member.worker == worker) else { return };
        let rank = u32::try_from(rank).expect("a rank is below V");
        self.send(worker, ToWorker::Assignment(Assignment { group, rank }));
    }

    /// Tells a member where the members of its generation are probed, as far as that is known.
    pub(super) fn tell_addresses(&mut self, worker: WorkerId, generation: Generation) {
        let address =
            |member: &GroupMember| self.workers.get(&member.worker).map(|known| known.address.clone());
        // About an older generation nobody wants to know any more. An answer without addresses spares the
        // worker its wait.
        let group = self.machine.group().filter(|group| group.generation == generation);
        let addresses = group.iter().flat_map(|group| &group.members).map(address).collect();
        self.send(worker, ToWorker::Addresses(generation, addresses));
    }

    fn announce(&mut self, plan: Plan, workers: &[WorkerId]) {
        let change = match plan.kind {
            PlanKind::Regroup => PlannedChange::Regroup,
            PlanKind::Stop => PlannedChange::Stop,
        };
        self.records.event(&RunEvent::Plan { change, plan: plan.number });
        for worker in workers {
            self.send(*worker, ToWorker::Plan(plan));
        }
    }

    /// Journals a checkpoint and orders it to be made valid.
    pub(super) fn commit(&mut self, checkpoint: Checkpoint) -> Result<(), ShellError> {
        // A new group reports files again, perhaps of a checkpoint that is in progress. `latest`
        // never moves back.
        match self.ordered.map(|newest| checkpoint.position.cmp(&newest)) {
            Some(Ordering::Equal) => return Ok(()),
            Some(Ordering::Less) => return self.act(Action::AbandonCheckpoint(checkpoint.step)),
            Some(Ordering::Greater) | None => {}
        }
        // M13: once a checkpoint counts, nobody computes the rows before it again. A power cut must not
        // take them and leave it.
        if !self.records.are_durable(checkpoint.step) {
            self.records.begin_sync();
            self.postpone(checkpoint);
            return Ok(());
        }
        // Journaled before the manifest is ordered. A failure does not stick the loop: nothing else
        // waits for this checkpoint, and the chores try again.
        if let Err(error) = self.journal.commit(&checkpoint) {
            self.delayed(&checkpoint, &error.to_string());
            self.postpone(checkpoint);
            return Ok(());
        }
        self.ordered = Some(checkpoint.position);
        let (step, protected) = (checkpoint.step, self.judged.protected(self.samples));
        // Only a state between two steps is evaluated, so only its folder can become the best.
        if checkpoint.phase == 0 {
            self.judged.ordered(step);
        }
        self.keeper.order(checkpoint, protected);
        Ok(())
    }

    /// Gives up the checkpoints that are not valid yet. Later ones of the same steps may hold other states.
    fn give_up_checkpoints(&mut self) {
        for checkpoint in std::mem::take(&mut self.unjournaled) {
            self.records.event(&RunEvent::CheckpointAbandoned { step: checkpoint.step });
        }
        self.keeper.give_up();
        // Back to the newest valid one: states that are computed anew have the same steps, and must not
        // count as ordered already.
        self.ordered = self.machine.checkpoint().map(|checkpoint| checkpoint.position);
    }

    /// Keeps a checkpoint for a later attempt, without duplicates.
    fn postpone(&mut self, checkpoint: Checkpoint) {
        // A new group reports its files again, and the machine then decides on the same checkpoint
        // again.
        if !self.unjournaled.iter().any(|known| known.position == checkpoint.position) {
            self.unjournaled.push(checkpoint);
        }
    }

    /// Handles a report of the checkpoint task.
    pub(super) fn kept(&mut self, kept: Kept) -> Result<(), ShellError> {
        match kept {
            Kept::Delayed(checkpoint, reason) => {
                self.delayed(&checkpoint, &reason);
                Ok(())
            }
            Kept::BestDelayed(step, reason) => {
                if self.delays.is_news("best.json", &reason) {
                    self.records.message(&format!(
                        "warning: the checkpoint of step {step} is the best, and best.json cannot be written: {reason}; \
                         trying again"
                    ));
                }
                Ok(())
            }
            Kept::SearchDelayed(reason) => {
                if self.delays.is_news("checkpoints", &reason) {
                    self.records.message(&format!(
                        "warning: no member is left, and the checkpoints cannot be read: {reason}; trying again"
                    ));
                }
                Ok(())
            }
            Kept::Found(newest, rows) => self.found(newest, rows),
            Kept::GivenUp(step) => {
                self.records.event(&RunEvent::CheckpointAbandoned { step });
                Ok(())
            }
            Kept::Valid(checkpoint, begun) => {
                // Before the workers hear of it: an acknowledged worker may exit (M11). A coordinator
                // that follows, and finds no checkpoint, must know that there was one and refuse to
                // start from step 0.
                if let Err(error) = self.journal.made_valid(&checkpoint) {
                    self.stick(error.into())?;
                    self.held.push_front(Held::Kept(Kept::Valid(checkpoint, begun)));
                    return Ok(());
                }
                // A checkpoint that was given up and had become valid by then is reported after
                // `ordered` went back.
                self.ordered = self.ordered.max(Some(checkpoint.position));
                self.records.timeline.stored("write manifest", begun);
                // There is a checkpoint again, so no group of this term can start fresh any more.
                self.lost = None;
                self.records.checkpoint(&checkpoint);
                if self.delays.end() {
                    let step = checkpoint.step;
                    self.records
                        .message(&format!("checkpoints are written again: that of step {step} is saved"));
                }
                self.send_to_all(&ToWorker::CheckpointRecorded(checkpoint.step, checkpoint.phase));
                if checkpoint.phase == 0 {
                    let was_protected = self.judged.protected(self.samples);
                    self.judged.saved(checkpoint.step);
                    let protected = self.judged.protected(self.samples);
                    // A pruning since it was ordered has left it for as long as it might be the best.
                    if !self.order_best() && protected != was_protected {
                        self.keeper.order_pruning(protected);
                    }
                }
                // Last: it may end the run, and a release must not overtake the acknowledgement above.
                self.handle(Event::CheckpointCommitted(checkpoint))
            }
        }
    }

    /// Takes over a checkpoint that members saved by themselves, if it is newer than the newest known one,
    /// with the rows that they left beside it.
    fn found(&mut self, newest: Option<Checkpoint>, rows: Vec<MetricsRow>) -> Result<(), ShellError> {
        let known = self.machine.checkpoint().map(|checkpoint| checkpoint.position);
        let newer = newest.filter(|newest| known.is_none_or(|known| known < newest.position));
        let position = newer.as_ref().map(|checkpoint| checkpoint.position);
        if let Some(checkpoint) = newer {
            self.records.message(&format!(
                "going on from {}, which workers saved when they were cut off",
                checkpoint.folder()
            ));
            self.records.take_left_rows(rows, self.samples);
            // Journals it, once its rows are durable.
            self.commit(checkpoint)?;
        }
        self.handle(Event::Searched(position))
    }

    fn delayed(&mut self, checkpoint: &Checkpoint, reason: &str) {
        let step = checkpoint.step;
        if self.delays.is_news("manifest.json", reason) {
            self.records.message(&format!(
                "warning: the checkpoint of step {step} waits for its manifest: {reason}; trying again until it is written"
            ));
        }
        let (file, reason) = ("manifest.json".to_string(), reason.to_string());
        self.records.event(&RunEvent::CheckpointDelayed { file, left_out: 0, reason, step, worker: None });
    }

    fn end(&mut self, outcome: Outcome) {
        self.records.catch_up();
        self.outcome = Some(match outcome {
            // The user's data, machine or build are other ones: no restart helps.
            Outcome::Refused => Outcome::InputWrong(self.refusal.take().unwrap_or_default()),
            other => other,
        });
    }
}
