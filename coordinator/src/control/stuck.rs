//! Handling of a journal that cannot be written: decisions wait, in order, and no further one is
//! made until it can be.
//!
//! 1. A decision that is not journaled is not acted on, nor is any later one.
//! 2. Workers that train get their heartbeat acknowledgements meanwhile, so that none runs out of its
//!    lease, and the machine hears of them before it judges anybody. Their other messages wait, up to
//!    [`LIMIT`] of them here, and the rest in their sessions.
//! 3. The journal is retried with the chores. The user is told once, and once more when it is over.

use ganglion_membership::WorkerId;
use ganglion_proto::message::{FromWorker, ToWorker};

use super::{Shell, ShellError};
use crate::api::grpc::{AdminInput, Input, SessionId};
use crate::checkpoints::writer::Kept;
use crate::workers::Exited;

/// Maximum number of inputs that wait here.
// As much again as the shell's own queue holds (`INPUTS` in startup/run.rs).
pub(super) const LIMIT: usize = 4096;

/// An input that waits for the journal.
pub(super) enum Held {
    /// Input from a client.
    Input(Input),
    /// End of a local process.
    Exit(Exited),
    /// Report of the checkpoint task.
    Kept(Kept),
}

impl Shell {
    /// Carries out decisions as far as they can be journaled.
    pub(super) fn carry_out(&mut self) -> Result<(), ShellError> {
        while !self.is_stuck
            && let Some(action) = self.undone.pop_front()
        {
            // An action writes to the journal before it does anything else, so one that fails here has
            // done nothing, and is repeated as a whole.
            if let Err(error) = self.act(action.clone()) {
                self.stick(error)?;
                // First again: later actions may be told to workers only after it (M1).
                self.undone.push_front(action);
            }
        }
        Ok(())
    }

    /// Suspends decisions if the journal may be writable later; otherwise returns the error.
    pub(super) fn stick(&mut self, error: ShellError) -> Result<(), ShellError> {
        match error {
            ShellError::Journal(error) if error.may_mend() => {
                self.is_stuck = true;
                // Once for the whole time: the chores try again each second.
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

    /// Retries the waiting decisions and inputs, in order.
    pub(super) fn unstick(&mut self) -> Result<(), ShellError> {
        // Taken for mended; the first write that fails says otherwise.
        if !std::mem::take(&mut self.is_stuck) {
            return Ok(());
        }
        // Decisions before inputs: an input is judged by what was decided before it came.
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

    /// Holds an input until the journal can be written, unless it needs no decision.
    pub(super) fn hold(&mut self, input: Input) -> Result<(), ShellError> {
        match input {
            Input::Message(session, worker, message) if !needs_decision(&message) => {
                self.take_aside(session, worker, message)
            }
            // A stop reaches the machine, and its actions wait in `undone` like all others.
            Input::Admin(input @ (AdminInput::Status(_) | AdminInput::Stop(_))) => self.administer(input),
            input => {
                // Bounded by the loop, which stops reading its queue at `LIMIT`.
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
            // Not for the machine yet: what it decides of a heartbeat would have to be journaled. It
            // hears of the newest before the next event that reaches it.
            FromWorker::Heartbeat(progress, usage) => {
                if self.is_current(session, worker) {
                    self.note_heartbeat(worker, progress, usage);
                    self.unheard.insert(worker, progress);
                    self.send(worker, ToWorker::Pulse);
                }
                Ok(())
            }
            report => self.take_message(session, worker, report),
        }
    }
}

/// Whether a message may lead to a decision that has to be journaled.
fn needs_decision(message: &FromWorker) -> bool {
    !matches!(
        message,
        FromWorker::Heartbeat(..)
            | FromWorker::Metrics(_)
            | FromWorker::Samples(_)
            | FromWorker::Texts(_)
            | FromWorker::PhaseSkipped(..)
            | FromWorker::PartDelayed(..)
            | FromWorker::AddressesWanted(_)
    )
}
