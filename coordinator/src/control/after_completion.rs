//! Service after completion: every worker that connects is told that the run is complete, until a
//! signal ends this coordinator.

use ganglion_membership::{Outcome, WorkerId};
use ganglion_proto::message::{Hello, ToWorker};
use ganglion_proto::record::RunEvent;
use tokio::sync::mpsc;

use super::{CHORES, Ended, Shell, ShellError, StopSignal};
use crate::api::grpc::refusal::NotAdmitted;
use crate::api::grpc::{Input, Outbox};

/// Number of workers that connect after the end. Numbers from the journal are higher.
const NOBODY: WorkerId = WorkerId(0);

impl Shell {
    /// Marks a run as complete before this coordinator started; `samples` is the size of the data set.
    pub fn found_complete(&mut self, samples: Option<u64>) -> Ended {
        (self.is_complete, self.samples) = (true, samples);
        let alarms = self.records.chronicle.look().alarms.clone();
        Ended { outcome: Outcome::Complete, signal: None, shape: self.job.shape(), alarms }
    }

    /// Answers requests until a signal arrives.
    pub async fn stay(
        &mut self,
        inputs: &mut mpsc::Receiver<Input>,
        signals: &mut mpsc::UnboundedReceiver<StopSignal>,
    ) -> Result<(), ShellError> {
        self.records.message(&format!(
            "run {} is complete; staying until SIGTERM or Ctrl-C, as --stay says",
            self.job.job.name
        ));
        self.records.event(&RunEvent::Staying {});
        self.has_started();
        let mut chores = tokio::time::interval(CHORES);
        loop {
            tokio::select! {
                // A signal goes before a flood of requests.
                biased;
                _ = signals.recv() => return Ok(()),
                // Records that a full disk held back are still written.
                _ = chores.tick() => {
                    self.publish();
                    self.records.catch_up();
                }
                () = self.records.synced() => {}
                Some(input) = inputs.recv() => self.answer(input)?,
            }
            // Set by an operator's `stop` in `administer`.
            if self.signal.is_some() {
                return Ok(());
            }
        }
    }

    fn answer(&mut self, input: Input) -> Result<(), ShellError> {
        match input {
            Input::Hello { hello, outbox, answer, .. } => drop(answer.send(self.turn_away(&hello, &outbox))),
            Input::Admin(input) => self.administer(input)?,
            // Sessions from before the end. Nothing that they report can change a run that is complete.
            Input::Message(..) | Input::Closed(..) => {}
        }
        Ok(())
    }

    fn turn_away(&self, hello: &Hello, outbox: &Outbox) -> Result<WorkerId, NotAdmitted> {
        // A worker of another run must not take this run's completion for its own.
        if let Some(refusal) = self.refusal(hello) {
            return Err(refusal);
        }
        // Cannot fail: a new outbox has room.
        let _ = outbox.try_send(ToWorker::Release { complete: true });
        Ok(hello.resume.as_ref().map_or(NOBODY, |resume| resume.worker))
    }
}
