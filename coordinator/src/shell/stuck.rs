//! A journal that cannot be written: what was decided waits, in order, and nothing more is decided until it
//! can be.
//!
//! 1. A decision that is not journaled is not acted on, and nothing that was decided after it.
//! 2. Workers that train are answered meanwhile, so that none runs out of its lease; what else they say
//!    waits, so much of it as [`LIMIT`] allows, and the rest in their sessions.
//! 3. Each attempt is made anew with the chores. People are told once, and once more when it is over.

use ganglion_membership::WorkerId;
use ganglion_proto::message::{FromWorker, ToWorker};

use super::{Shell, ShellError};
use crate::keeper::Kept;
use crate::server::{AdminInput, Input, SessionId};
use crate::supervisor::Exited;

/// How much of what comes in waits here.
pub(super) const LIMIT: usize = 4096;

/// Something that came in and waits for the journal.
pub(super) enum Held {
    /// From a client.
    Input(Input),
    /// The end of a local process.
    Exit(Exited),
    /// From the checkpoint storage.
    Kept(Kept),
}

impl Shell {
    /// Carries out what was decided, as far as that can be journaled.
    pub(super) fn carry_out(&mut self) -> Result<(), ShellError> {
        while !self.is_stuck
            && let Some(action) = self.undone.pop_front()
        {
            if let Err(error) = self.act(action.clone()) {
                self.stick(error)?;
                self.undone.push_front(action);
            }
        }
        Ok(())
    }

    /// Waits for the journal if that may be written later.
    pub(super) fn stick(&mut self, error: ShellError) -> Result<(), ShellError> {
        match error {
            ShellError::Journal(error) if error.may_mend() => {
                self.is_stuck = true;
                if !std::mem::replace(&mut self.told_stuck, true) {
                    self.records.message(&format!(
                        "warning: {error}; workers train on, and nothing is decided until the journal can be written"
                    ));
                }
                Ok(())
            }
            other => Err(other),
        }
    }

    /// Tries what waits, in its order.
    pub(super) fn unstick(&mut self) -> Result<(), ShellError> {
        if !std::mem::take(&mut self.is_stuck) {
            return Ok(());
        }
        self.carry_out()?;
        while !self.is_stuck
            && let Some(held) = self.held.pop_front()
        {
            match held {
                Held::Input(input) => self.take(input)?,
                Held::Exit(exit) => self.reaped(exit)?,
                Held::Kept(kept) => self.kept(kept)?,
            }
        }
        if !self.is_stuck && std::mem::take(&mut self.told_stuck) {
            self.records.message("journal.sqlite is written again");
        }
        Ok(())
    }

    /// Keeps what comes in until the journal can be written, but for what needs no decision.
    pub(super) fn hold(&mut self, input: Input) -> Result<(), ShellError> {
        match input {
            Input::Message(session, worker, message) if !needs_decision(&message) => {
                self.take_aside(session, worker, message)
            }
            Input::Admin(input @ (AdminInput::Status(_) | AdminInput::Stop(_))) => self.administer(input),
            input => {
                self.held.push_back(Held::Input(input));
                Ok(())
            }
        }
    }

    fn take_aside(
        &mut self,
        session: SessionId,
        worker: WorkerId,
        message: FromWorker,
    ) -> Result<(), ShellError> {
        match message {
            FromWorker::Heartbeat(progress, usage) => {
                if self.is_current(session, worker) {
                    self.note_heartbeat(worker, progress, usage);
                    self.send(worker, ToWorker::Pulse);
                }
                Ok(())
            }
            report => self.take_message(session, worker, report),
        }
    }
}

/// Whether something may come of a message that has to be journaled.
fn needs_decision(message: &FromWorker) -> bool {
    !matches!(
        message,
        FromWorker::Heartbeat(..)
            | FromWorker::Metrics(_)
            | FromWorker::Samples(_)
            | FromWorker::PhaseSkipped(..)
            | FromWorker::PartDelayed(..)
    )
}
