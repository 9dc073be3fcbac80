//! Consequences of evaluations and alarms.

use ganglion_membership::Outcome;
use ganglion_proto::evaluation::{AlarmPolicy, EvaluationRow};
use ganglion_proto::message::ToWorker;
use ganglion_proto::record::{BestCheckpoint, MetricsRow, RunEvent};
use ganglion_storage::BEST_FORMAT;
use serde_json::json;

use super::{Shell, ShellError};
use crate::checkpoints::best::{Best, Known, folder};
use crate::checkpoints::model_card::{self, Subject};
use crate::checkpoints::writer::BestFiles;
use crate::records::alarms::Change;

impl Shell {
    /// Takes an evaluation: journals it, records it, and updates best checkpoint and alarms.
    pub(super) fn take_evaluation(&mut self, row: EvaluationRow) -> Result<(), ShellError> {
        let step = row.step;
        // Each session tells first what its worker has loaded, so without a size nothing was evaluated.
        let last = self.samples.map_or(0, |samples| self.job.last_step(samples));
        if step > last {
            tracing::warn!("dropped an evaluation of step {step}, which the run does not have");
            return Ok(());
        }
        match self.judged.know(&row) {
            Known::New => {
                // First: best checkpoint and alarms follow from it, and a later coordinator must draw
                // the same conclusions.
                self.journal.evaluated(&row)?;
                self.records.evaluation(&row);
                let changes = self.watch.evaluation(&row);
                self.judged.evaluated(row);
                // Either order prunes. The checkpoint of this step was kept for its figures, and may go
                // now.
                if !self.order_best() {
                    self.keeper.order_pruning(self.judged.protected(self.samples));
                }
                self.note_alarms(step, changes);
            }
            // The acknowledgement was lost, or another member made the evaluation as well.
            Known::Same => {}
            Known::Breach => {
                let detail = format!(
                    "step {step} was evaluated again with another result, so the promise of equal results is broken"
                );
                self.records.message(&format!("warning: {detail}"));
                self.records.event(&RunEvent::EvaluationBreach { detail, step });
            }
        }
        // For a breach too: a report that is never acknowledged would come again for ever.
        self.send_to_all(&ToWorker::EvaluationsRecorded(vec![step]));
        Ok(())
    }

    /// Takes a row of metrics.
    pub(super) fn take_row(&mut self, row: MetricsRow) {
        // A row that is reported again raises no alarm again.
        let changes = if row.step > self.watched { self.watch.row(&row) } else { Vec::new() };
        let step = row.step;
        self.watched = self.watched.max(step);
        self.records.take_row(row);
        self.note_alarms(step, changes);
    }

    fn note_alarms(&mut self, step: u64, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Raised(alarm, detail) => {
                    self.records.message(&format!("alarm: {alarm}: {detail}"));
                    let name = alarm.name().to_string();
                    self.records.event(&RunEvent::Alarm { alarm: name, detail: detail.clone(), step });
                    // The first reason to end stays.
                    if self.job.alarms.policy == AlarmPolicy::Stop && self.outcome.is_none() {
                        let best = self.judged.best().map(|(best, _)| folder(best.step));
                        let kept =
                            best.map(|best| format!("; the best checkpoint is {best}")).unwrap_or_default();
                        self.outcome = Some(Outcome::Failed(format!(
                            "alarm: {alarm}: {detail}, and alarms.policy is \"stop\"{kept}; the same job gives the same again, \
                             so start a new run with another seed or a smaller learning rate, or let this one go on with \
                             alarms.policy = \"warn\""
                        )));
                    }
                }
                Change::Over(alarm) => {
                    self.records.message(&format!("no {alarm} any more, as of step {step}"));
                    self.records.event(&RunEvent::AlarmOver { alarm: alarm.name().to_string(), step });
                }
            }
        }
    }

    /// Orders the best checkpoint to be named, if it has changed; returns whether it has. Naming
    /// prunes as well.
    pub(super) fn order_best(&mut self) -> bool {
        let Some((best, row)) = self.judged.best().filter(|(best, _)| self.best.as_ref() != Some(*best))
        else {
            return false;
        };
        let (best, files) = (best.clone(), self.best_files(best, row));
        self.records.event(&RunEvent::BestCheckpoint(BestCheckpoint {
            folder: folder(best.step),
            metric: best.metric.clone(),
            step: best.step,
            value: best.value,
        }));
        self.keeper.order_best(files, self.judged.protected(self.samples));
        self.best = Some(best);
        true
    }

    fn best_files(&self, best: &Best, row: &EvaluationRow) -> BestFiles {
        let named = json!({
            "format": BEST_FORMAT, "folder": folder(best.step), "step": best.step, "metric": best.metric, "value": best.value,
            "features": row.features, "metrics": row.metrics, "held_out": row.held_out,
        });
        // The card is for readers. A journal that cannot be read just now costs it a line, and not the
        // run.
        let passport = self.journal.passport().ok().flatten();
        let found = self.records.chronicle.look().data.clone();
        let card = model_card::render(&Subject {
            job: &self.job,
            found: found.as_ref(),
            run: &self.run,
            counts: self.journal.counts().unwrap_or_default(),
            passport: passport.as_ref(),
            samples: self.samples,
            best,
            row,
        });
        BestFiles { step: best.step, named: format!("{named:#}\n"), card }
    }
}
