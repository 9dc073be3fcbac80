//! Workers' sessions: admission and messages.

use ganglion_membership::{Event, Fault, Generation, LoadedFacts, Loss, Progress, WorkerId};
use ganglion_proto::message::{FromWorker, Hello, Resume, ToWorker, Usage, Welcome};
use ganglion_proto::record::found::Found;
use ganglion_proto::record::{FaultKind, RunEvent};
use tokio::time::Instant;

use super::budget::Budget;
use super::stuck::Held;
use super::unlike::Newcomer;
use super::{Connected, Shell, ShellError};
use crate::api::grpc::refusal::NotAdmitted;
use crate::api::grpc::{Input, Outbox, SessionId};

/// Maximum number of ranks that a fault's event names; beyond that it gives their number.
const NAMED_RANKS: usize = 64;

impl Shell {
    /// Admits a worker, under its earlier number if it may resume; the inner error is the reason of
    /// a refusal.
    pub(super) fn admit(
        &mut self,
        hello: Hello,
        session: SessionId,
        outbox: Outbox,
    ) -> Result<Result<WorkerId, NotAdmitted>, ShellError> {
        // First: a worker of another run, or one that has seen a newer term (M1), leaves no trace in
        // this journal.
        if let Some(refusal) = self.refusal(&hello) {
            return Ok(Err(refusal));
        }
        // A number that the machine has forgotten is a stranger's: that worker joins anew, under another
        // one.
        let known = |resume: &&Resume| self.machine.knows(resume.worker, resume.generation);
        let resume = hello.resume.as_ref().filter(known).cloned();
        let token = hello.spawn_token.as_deref();
        // This process has a number here already, and comes without it.
        if resume.is_none()
            && let Some(worker) = token.and_then(|token| self.supervisor.number(token))
        {
            return Ok(Ok(self.let_go_again(worker, &outbox)));
        }
        // Worker numbers are no secret. The place of a local worker is for the process that holds its
        // token.
        if resume.as_ref().is_some_and(|resume| !self.supervisor.may_be(resume.worker, token)) {
            return Ok(Err(NotAdmitted::WithoutToken));
        }
        // A hello that was delayed on its way. Admitting it would close the newer session, which the
        // worker uses.
        if resume.as_ref().is_some_and(|resume| self.attempts.is_given_up(resume.worker, hello.attempt)) {
            return Ok(Err(NotAdmitted::GivenUp));
        }
        // A token names a process that a coordinator of this run started: one that is unknown here and
        // elsewhere is made up, or from another run directory. Such a worker uses up no number.
        if token.is_some_and(|token| !self.supervisor.has_token(token)) {
            return Ok(Err(NotAdmitted::StrangeToken));
        }
        let worker = match &resume {
            Some(resume) => resume.worker,
            // Durable before the worker learns its number, so that no coordinator ever assigns it again
            // (M1).
            None => self.journal.admit(self.term, &hello.host, hello.pid, token)?,
        };
        let local = token.is_some_and(|token| self.supervisor.claim(token, worker));
        let (host, pid) = (hello.host.clone(), hello.pid);
        // Before the machine hears of the worker: its answer may be an assignment, which must not be
        // read before the welcome that names term and number.
        self.welcomed(worker, hello, session, outbox);
        let number = worker.0;
        self.records.event(&match resume {
            Some(_) => RunEvent::WorkerResumed { host, local, pid, worker: number },
            None => RunEvent::WorkerJoined { host, local, pid, worker: number },
        });
        self.handle(match resume {
            Some(Resume { generation, rest, .. }) => Event::Resumed { worker, generation, rest },
            None => Event::Hello { worker, local },
        })?;
        Ok(Ok(worker))
    }

    /// Opens an admitted worker's session, and tells it where the run stands.
    fn welcomed(&mut self, worker: WorkerId, hello: Hello, session: SessionId, outbox: Outbox) {
        let Hello { host, pid, address, device, attempt, .. } = hello;
        // Any generation will do: whether a worker is known does not depend on it.
        self.attempts.opened(worker, attempt, |worker| self.machine.knows(worker, Generation(0)));
        let connected = Connected {
            session,
            outbox: Some(outbox),
            host,
            pid,
            address,
            device,
            budget: Budget::new(),
            heard: None,
        };
        self.workers.insert(worker, connected);
        self.send(worker, ToWorker::Welcome(Box::new(self.welcome(worker))));
        // A worker keeps a snapshot until it knows that its figures are journaled; the acknowledgement
        // may have been lost with its last session.
        self.send(worker, ToWorker::EvaluationsRecorded(self.judged.told()));
    }

    fn welcome(&self, worker: WorkerId) -> Welcome {
        Welcome {
            term: self.term,
            worker,
            run: self.run.clone(),
            job: self.job.clone(),
            storage: self.keeper.address().to_string(),
            condemned: self.machine.condemned().unwrap_or_default(),
        }
    }

    /// Repeats the release of a local process. Such a process keeps one number as long as this
    /// coordinator lives. A process that was released or given up, and has not received that, receives
    /// it now: under a second number the end of the first one's process would go unnoticed.
    fn let_go_again(&self, worker: WorkerId, outbox: &Outbox) -> WorkerId {
        let _ = outbox.try_send(ToWorker::Welcome(Box::new(self.welcome(worker))));
        let _ = outbox.try_send(ToWorker::Release { complete: false });
        worker
    }

    pub(super) fn refusal(&self, hello: &Hello) -> Option<NotAdmitted> {
        let resume = hello.resume.as_ref()?;
        if resume.run != self.run {
            return Some(NotAdmitted::OtherRun);
        }
        let (newer, own) = (resume.term, self.term);
        (newer > own).then_some(NotAdmitted::TakenOver { newer, own })
    }

    /// Handles the end of a session. The machine is told only if it was the worker's newest.
    pub(super) fn closed(&mut self, session: SessionId, worker: WorkerId) -> Result<(), ShellError> {
        match self.workers.get_mut(&worker) {
            // The late end of an older session must not disconnect the worker's newer one.
            Some(connected) if connected.session == session && connected.outbox.is_some() => {
                connected.outbox = None;
                self.records.event(&RunEvent::WorkerDisconnected { worker: worker.0 });
                self.handle(Event::Disconnected(worker))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn take_message(
        &mut self,
        session: SessionId,
        worker: WorkerId,
        message: FromWorker,
    ) -> Result<(), ShellError> {
        let is_current = |current: &&mut Connected| current.session == session && current.outbox.is_some();
        // Invariant 4 of the loop: input of an older session tells of a time that the machine has left
        // behind.
        let Some(current) = self.workers.get_mut(&worker).filter(is_current) else { return Ok(()) };
        let left_out = if is_costly(&message) { current.budget.spend() } else { Some(0) };
        let Some(left_out) = left_out else { return self.spent(session, worker, &message) };
        match message {
            FromWorker::Hello(_) => {
                tracing::warn!("worker {worker} says hello twice; closing its session");
                self.closed(session, worker)
            }
            FromWorker::Loaded(facts, found) => self.loaded(worker, facts, found.map(|found| *found)),
            FromWorker::Ready(generation, position) => {
                self.handle(Event::Ready(worker, generation, position))
            }
            FromWorker::Fault(generation, fault) => {
                // A worker outside the group has no generation that could fail.
                if self.machine.has_trained(worker) {
                    self.note_fault(worker, generation.0, &fault);
                }
                self.handle(Event::Fault(worker, generation, fault))
            }
            FromWorker::Heartbeat(progress, usage) => {
                self.note_heartbeat(worker, progress, usage);
                // Answered before the machine decides anything: the answer renews the worker's lease,
                // and the worker measures its deadline by it.
                self.send(worker, ToWorker::Pulse);
                self.handle(Event::Heartbeat(worker, progress))
            }
            FromWorker::Finished(generation, position, complete) => {
                self.handle(Event::Finished { worker, generation, position, complete })
            }
            FromWorker::Leave => {
                self.records.event(&RunEvent::WorkerLeaves { worker: worker.0 });
                self.handle(Event::Leave(worker))
            }
            FromWorker::InputError(detail) => self.input_wrong(worker, detail),
            FromWorker::PartWritten(generation, part) => {
                self.handle(Event::PartWritten(worker, generation, part))
            }
            // Below is what only members have to say. A worker that was never one has computed nothing of the
            // run, so its rows and figures can only be wrong.
            _ if !self.machine.has_trained(worker) => {
                tracing::warn!("dropped a message of worker {worker}, which has not trained");
                Ok(())
            }
            FromWorker::AddressesWanted(generation) => {
                self.tell_addresses(worker, generation);
                Ok(())
            }
            FromWorker::Evaluation(row) => {
                // An evaluation is journaled, since it decides which checkpoint is the best; so it can
                // meet a stuck journal.
                let Err(error) = self.take_evaluation(row.clone()) else { return Ok(()) };
                self.stick(error)?;
                let again = Input::Message(session, worker, FromWorker::Evaluation(row));
                self.held.push_front(Held::Input(again));
                Ok(())
            }
            report => {
                self.take_report(worker, report, left_out);
                Ok(())
            }
        }
    }

    /// Handles one event beyond the budget. A storage that fails again and again is reported now
    /// and then; a healthy worker sends nothing else that often.
    fn spent(
        &mut self,
        session: SessionId,
        worker: WorkerId,
        message: &FromWorker,
    ) -> Result<(), ShellError> {
        let is_trusted = self.machine.has_trained(worker);
        if is_trusted && matches!(message, FromWorker::PartDelayed(..)) {
            return Ok(());
        }
        tracing::warn!("worker {worker} causes too many events; closing its session");
        // A member may reconnect and train on. A stranger is sent away for good, or it would be back at
        // once.
        if !is_trusted {
            self.send(worker, ToWorker::Reject("it causes too many events".to_string()));
        }
        self.closed(session, worker)
    }

    /// Whether a session is the worker's newest, and open.
    pub(super) fn is_current(&self, session: SessionId, worker: WorkerId) -> bool {
        let current = self.workers.get(&worker);
        current.is_some_and(|current| current.session == session && current.outbox.is_some())
    }

    pub(super) fn note_heartbeat(&mut self, worker: WorkerId, progress: Progress, usage: Usage) {
        if let Some(connected) = self.workers.get_mut(&worker) {
            connected.heard = Some((Instant::now(), progress, usage));
        }
    }

    fn loaded(
        &mut self,
        worker: WorkerId,
        facts: LoadedFacts,
        mut found: Option<Found>,
    ) -> Result<(), ShellError> {
        let later = self.job.data.exclusions.iter().filter(|exclusion| !exclusion.is_from_the_start());
        let expected: usize = later.map(|exclusion| exclusion.files.len()).sum();
        // All members must leave out the same samples, or they would read different streams (D2).
        let known = facts.left_out.len() == expected
            && facts.left_out.iter().all(|at| *at < facts.samples)
            // A worker that loaded before the newest change has another sample stream.
            && facts.passport.0.get("exclusions") == self.job.data.exclusions_hash().as_ref();
        if !known {
            let detail = "it does not know which samples the job leaves out".to_string();
            self.send(worker, ToWorker::Reject(detail.clone()));
            return self.handle(Event::Unable(worker, detail));
        }
        let files = found.as_mut().map(|found| std::mem::take(&mut found.files)).unwrap_or_default();
        let data = facts.passport.0.get("data").cloned().unwrap_or_default();
        self.newcomer = Newcomer { samples: facts.samples, files, is_local: false };
        self.handle(Event::Loaded(worker, facts))?;
        let Newcomer { files, .. } = std::mem::take(&mut self.newcomer);
        // Only what the machine took in is shown as the run's data.
        if let Some(found) = found.filter(|_| self.machine.has_loaded(worker)) {
            self.note_files(&data, &files);
            self.records.data_found(&found);
        }
        // The data of a worker with another fingerprint of the environment says nothing about the run.
        let samples = self.machine.samples().filter(|samples| self.samples != Some(*samples));
        if let Some(samples) = samples {
            self.samples = Some(samples);
            self.journal_size()?;
            self.records.loaded(samples, self.machine.checkpoint());
        }
        if let Some(left_out) = self.machine.left_out().filter(|left_out| *left_out != self.left_out) {
            self.left_out = left_out.to_vec();
            self.journal_size()?;
        }
        Ok(())
    }

    /// Handles wrong input on a worker's machine. Once others train, a mistake on the machine of a
    /// newcomer concerns that worker alone.
    fn input_wrong(&mut self, worker: WorkerId, detail: String) -> Result<(), ShellError> {
        let is_needed = self.machine.has_trained(worker) || self.supervisor.has(worker);
        // A member or a local worker reads what the run was given; its mistake is the run's.
        if is_needed || self.machine.group().is_none() {
            return self.handle(Event::InputWrong(detail));
        }
        self.send(worker, ToWorker::Reject(detail.clone()));
        self.handle(Event::Unable(worker, detail))
    }

    /// Takes a diagnostic report, which decides nothing.
    fn take_report(&mut self, worker: WorkerId, report: FromWorker, left_out: u64) {
        let samples = self.machine.samples().or(self.samples);
        // Bounds what a worker may claim: a row far beyond the end would stay the newest one for ever.
        let last = samples.map_or(u64::MAX, |samples| self.job.last_step(samples));
        let last_position = last.saturating_mul(self.job.phases_per_step());
        match report {
            FromWorker::Metrics(row) if row.step <= last => self.take_row(row),
            FromWorker::Samples(grid) if grid.step <= last => self.records.take_samples(grid),
            FromWorker::Texts(texts) if texts.step <= last => self.records.take_samples(texts),
            FromWorker::PhaseSkipped(position, detail) if position.0 < last_position => {
                self.records.phase_skipped(position, &detail);
            }
            FromWorker::PartDelayed(step, file, detail) => {
                if self.delays.is_news(&format!("worker {worker}"), &detail) {
                    self.records.message(&format!(
                        "warning: the checkpoint of step {step} waits: worker {worker} cannot write {file}: {detail}; \
                         trying again until it can"
                    ));
                }
                let worker = Some(worker.0);
                self.records.event(&RunEvent::CheckpointDelayed {
                    file,
                    left_out,
                    reason: detail,
                    step,
                    worker,
                });
            }
            _ => tracing::warn!("dropped a report of worker {worker} of a step that the run does not have"),
        }
    }

    fn note_fault(&mut self, worker: WorkerId, generation: u64, fault: &Fault) {
        let (kind, detail) = match fault {
            Fault::Peer => (FaultKind::Peer, String::new()),
            Fault::Timeout => (FaultKind::Timeout, String::new()),
            Fault::Links(ranks) => {
                let named: Vec<String> =
                    ranks.iter().take(NAMED_RANKS).map(|rank| rank.0.to_string()).collect();
                let more = ranks.len().saturating_sub(NAMED_RANKS);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                (FaultKind::Links, format!("[{}]{more}", named.join(", ")))
            }
            Fault::Diverged(detail) => (FaultKind::Diverged, detail.clone()),
            Fault::Internal(detail) => (FaultKind::Internal, detail.clone()),
            Fault::NonFinite { detail, .. } => (FaultKind::NonFinite, detail.clone()),
        };
        self.records.event(&RunEvent::Fault { detail, fault: kind, generation, worker: worker.0 });
    }

    /// Notes that a worker is lost, if it was still connected.
    pub(super) fn lose(&mut self, worker: WorkerId, loss: &Loss) {
        // Removes the worker's outbox too, which ends its session if it is only slow.
        let pid = self.workers.remove(&worker).map(|lost| lost.pid);
        self.records.event(&RunEvent::WorkerLost { pid, reason: loss.to_string(), worker: worker.0 });
    }
}

/// Whether a message counts against its session's budget: it writes a line to events.jsonl, which is kept for
/// ever, or its answer is as long as the group is large.
fn is_costly(message: &FromWorker) -> bool {
    matches!(
        message,
        FromWorker::Loaded(..)
            | FromWorker::Fault(..)
            | FromWorker::Leave
            | FromWorker::PartDelayed(..)
            | FromWorker::AddressesWanted(_)
    )
}
