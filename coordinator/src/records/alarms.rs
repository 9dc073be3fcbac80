//! Alarms: signs of a failing run in its rows of metrics and its evaluations.
//!
//! 1. Pure: an alarm is a function of the rows, in their order, and of the job.
//! 2. An alarm is raised once, and again only after its cause has gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ganglion_proto::evaluation::{AlarmPolicy, Alarms, EvaluationRow, NOT_FINITE, names};
use ganglion_proto::job::{Family, Job, LossKind};
use ganglion_proto::record::MetricsRow;
use ganglion_proto::words::{counted, were};

use super::losses::Losses;

/// Kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Alarm {
    /// Mode collapse: samples are all alike, or of few classes.
    Collapse,
    /// The discriminator has memorised its samples.
    Overfitting,
    /// One network has won: the other one no longer learns.
    Balance,
    /// A loss has grown beyond all that it was.
    Explosion,
    /// Numbers are infinite or NaN.
    NonFinite,
}

impl Alarm {
    /// All kinds.
    pub(crate) const ALL: [Alarm; 5] =
        [Alarm::Collapse, Alarm::Overfitting, Alarm::Balance, Alarm::Explosion, Alarm::NonFinite];

    /// Whether the alarm can be raised in a job of a family; of a package that is not known.
    pub(crate) fn concerns(self, family: Family) -> bool {
        match self {
            Alarm::Overfitting | Alarm::Balance => matches!(family, Family::Gan | Family::Package),
            Alarm::Collapse | Alarm::Explosion | Alarm::NonFinite => true,
        }
    }

    /// Name of the alarm in events and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Alarm::Collapse => "collapse",
            Alarm::Overfitting => "discriminator_overfitting",
            Alarm::Balance => "loss_of_balance",
            Alarm::Explosion => "exploding_loss",
            Alarm::NonFinite => "non_finite",
        }
    }
}

impl fmt::Display for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().replace('_', " "))
    }
}

/// Words for the end of a run about the alarms whose causes last, by name with their reasons; empty
/// without any.
pub(crate) fn at_the_end(alarms: &BTreeMap<String, String>) -> String {
    if alarms.is_empty() {
        return String::new();
    }
    let told = alarms.iter().map(|(name, reason)| format!("{}: {reason}", name.replace('_', " ")));
    let told: Vec<String> = told.collect();
    format!("; finished with {}: {}", counted(alarms.len(), "alarm"), told.join("; "))
}

/// Change of an alarm's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The alarm begins, for this reason.
    Raised(Alarm, String),
    /// The cause of the alarm has gone.
    Over(Alarm),
}

/// Detector: a state machine over the rows.
#[derive(Debug)]
pub(crate) struct Watch {
    settings: Alarms,
    /// Loss by which scores are read; `None` for a package, whose scores mean what its author says.
    loss: Option<LossKind>,
    images_per_step: u64,
    raised: BTreeSet<Alarm>,
    /// Number of consecutive rows whose scores (D outputs) were saturated.
    saturated: u64,
    losses: Losses,
    /// Reason why the newest row, and the newest evaluation, are not finite.
    not_finite: [Option<String>; 2],
}

impl Watch {
    /// Creates the detector of a job.
    pub(crate) fn new(job: &Job) -> Watch {
        Watch {
            settings: job.alarms.clone(),
            loss: (job.model.kind.family() == Family::Gan).then_some(job.loss.kind),
            images_per_step: job.samples_per_step(),
            raised: BTreeSet::new(),
            saturated: 0,
            losses: Losses::default(),
            not_finite: [None, None],
        }
    }

    /// Goes on where an earlier coordinator stopped: with the magnitudes of the losses so far, and the alarms
    /// that it reported and that are not over.
    pub(crate) fn resume<'a>(&mut self, losses: Losses, raised: impl IntoIterator<Item = &'a String>) {
        self.losses = losses;
        let known = |name: &String| Alarm::ALL.into_iter().find(|alarm| alarm.name() == name);
        self.raised.extend(raised.into_iter().filter_map(known));
    }

    /// Counts images by the shape of the job's steps.
    pub(crate) fn learn_shape(&mut self, job: &Job) {
        self.images_per_step = job.samples_per_step();
    }

    /// Processes an evaluation; returns the alarms that change.
    pub(crate) fn evaluation(&mut self, row: &EvaluationRow) -> Vec<Change> {
        if self.settings.policy == AlarmPolicy::Off {
            return Vec::new();
        }
        let is_broken = |(name, value): &(&str, f64)| match *name {
            // Infinite where samples are of a class that no real sample has.
            names::LABEL_KL => value.is_nan(),
            _ => !value.is_finite(),
        };
        let broken = row.metrics.iter().find(is_broken).map(|(name, _)| name.to_string());
        // An evaluation that failed for another reason says nothing of the numbers.
        let failed = row.metrics.is_empty() && row.features.contains(NOT_FINITE);
        let broken = broken.or_else(|| failed.then(|| row.features.clone()));
        if broken.is_some() || !row.metrics.is_empty() {
            self.not_finite[1] =
                broken.map(|what| format!("the evaluation of step {} is {NOT_FINITE}: {what}", row.step));
        }
        let non_finite = self.non_finite();
        let non_finite = self.settle(Alarm::NonFinite, non_finite);
        // All generators look collapsed before they have learned anything.
        let is_early = row.step * self.images_per_step < self.settings.after_images;
        if row.metrics.is_empty() || is_early {
            return non_finite.into_iter().collect();
        }
        let overfitting = row.get(names::OVERFITTING).filter(|value| *value > self.settings.overfitting);
        let overfitting = overfitting.map(|value| {
            let limit = self.settings.overfitting;
            format!(
                "at step {} the discriminator takes held-out samples for generated ones: {value:.2} of the way, more than \
                 {limit}",
                row.step
            )
        });
        let collapse = self.collapse(row);
        let [collapse, overfitting] =
            [self.settle(Alarm::Collapse, collapse), self.settle(Alarm::Overfitting, overfitting)];
        [collapse, overfitting, non_finite].into_iter().flatten().collect()
    }

    /// Reason to call the samples collapsed, if there is one.
    fn collapse(&self, row: &EvaluationRow) -> Option<String> {
        let limit = self.settings.collapse;
        let share = |name: &str| row.get(name).filter(|share| *share < limit);
        let (step, limit) = (row.step, 100.0 * limit);
        // Diversity first: it needs no classes.
        if let Some(share) = share(names::DIVERSITY) {
            let share = 100.0 * share;
            return Some(format!(
                "at step {step} the samples are {share:.0} % as far apart as real ones, less than {limit:.0} %"
            ));
        }
        let share = 100.0 * share(names::LABEL_ENTROPY)?;
        Some(format!(
            "at step {step} the entropy of the samples' classes is {share:.0} % of the real ones', less than {limit:.0} %"
        ))
    }

    fn non_finite(&self) -> Option<String> {
        self.not_finite.iter().flatten().next().cloned()
    }

    /// Processes a row of metrics; returns the alarms that change.
    pub(crate) fn row(&mut self, row: &MetricsRow) -> Vec<Change> {
        if self.settings.policy == AlarmPolicy::Off {
            return Vec::new();
        }
        let broken = row.scalars.iter().find(|(_, value)| !value.is_finite());
        self.not_finite[0] = if row.skipped > 0 {
            Some(format!(
                "up to step {} {} in a row {NOT_FINITE} and left out",
                row.step,
                format_args!("{} {}", counted(row.skipped, "update"), were(row.skipped))
            ))
        } else {
            broken.map(|(name, _)| format!("{name} of step {} is {NOT_FINITE}", row.step))
        };
        let scores = row.scalars.get("score_real").zip(row.scalars.get("score_fake"));
        let saturated = scores.zip(self.loss).and_then(|((real, fake), loss)| saturated(loss, [real, fake]));
        // Healthy runs have single saturated rows; several one after the other are a sign.
        self.saturated = if saturated.is_some() { self.saturated + 1 } else { 0 };
        let balance = saturated.filter(|_| self.saturated >= self.settings.saturated_rows).map(|what| {
            format!("{what} in the last {} up to step {}", counted(self.saturated, "metrics row"), row.step)
        });
        self.losses.add(row);
        let (exploded, non_finite) = (self.losses.exploded(row.step), self.non_finite());
        [(Alarm::Balance, balance), (Alarm::Explosion, exploded), (Alarm::NonFinite, non_finite)]
            .into_iter()
            .filter_map(|(alarm, reason)| self.settle(alarm, reason))
            .collect()
    }

    fn settle(&mut self, alarm: Alarm, reason: Option<String>) -> Option<Change> {
        match reason {
            // The set makes an alarm one event, however long its cause lasts (2).
            Some(reason) => self.raised.insert(alarm).then_some(Change::Raised(alarm, reason)),
            None => self.raised.remove(&alarm).then_some(Change::Over(alarm)),
        }
    }
}

/// Describes scores (D outputs) that leave one network nothing to learn from; `None` where they do
/// not, or where the loss has no such point.
fn saturated(loss: LossKind, [real, fake]: [f64; 2]) -> Option<&'static str> {
    // Probabilities; for least squares and hinge the values at which the discriminator's loss is minimal.
    let [won_real, won_fake] = match loss {
        LossKind::NonSaturating | LossKind::Minimax | LossKind::LeastSquares => [0.99, 0.01],
        LossKind::Hinge => [1.0, -1.0],
        _ => return None,
    };
    let won = real > won_real && fake < won_fake;
    // Only where an output is a probability: both are wrong with certainty.
    let lost =
        matches!(loss, LossKind::NonSaturating | LossKind::Minimax) && real < won_fake && fake > won_real;
    match (won, lost) {
        (true, _) => Some("the discriminator tells all samples apart with certainty"),
        (_, true) => Some("the discriminator takes all samples for what they are not"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job_file::{Source, read};

    fn watch(settings: &[&str]) -> Watch {
        let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_string()).collect();
        Watch::new(&read(&Source::Embedded, &settings).unwrap())
    }

    fn evaluation(step: u64, metrics: &[(&str, f64)]) -> EvaluationRow {
        let metrics = metrics.iter().copied().collect();
        EvaluationRow { step, metrics, ..EvaluationRow::default() }
    }

    fn row(step: u64, [real, fake]: [f64; 2]) -> MetricsRow {
        let scalars = [("score_real", real), ("score_fake", fake)].into_iter().collect();
        MetricsRow { step, images_seen: 64 * step, scalars, ..MetricsRow::default() }
    }

    fn raised(changes: &[Change]) -> Vec<Alarm> {
        changes
            .iter()
            .filter_map(|change| if let Change::Raised(alarm, _) = change { Some(*alarm) } else { None })
            .collect()
    }

    #[test]
    fn samples_that_are_alike_or_of_few_classes_have_collapsed() {
        let healthy = [(names::DIVERSITY, 0.9), (names::LABEL_ENTROPY, 0.98)];
        for (name, value) in [(names::DIVERSITY, 0.1), (names::LABEL_ENTROPY, 0.2)] {
            let mut watch = watch(&[]);
            assert_eq!(watch.evaluation(&evaluation(1000, &healthy)), []);
            let worse = healthy.map(|(known, good)| (known, if known == name { value } else { good }));
            assert_eq!(raised(&watch.evaluation(&evaluation(2000, &worse))), [Alarm::Collapse]);
            assert_eq!(watch.evaluation(&evaluation(3000, &worse)), [], "it is told once");
            assert_eq!(watch.evaluation(&evaluation(4000, &healthy)), [Change::Over(Alarm::Collapse)]);
            assert_eq!(raised(&watch.evaluation(&evaluation(5000, &worse))), [Alarm::Collapse]);
        }
    }

    #[test]
    fn at_first_all_samples_are_alike() {
        let collapsed = [(names::DIVERSITY, 0.0)];
        assert_eq!(watch(&[]).evaluation(&evaluation(100, &collapsed)), []);
        let mut watch = watch(&["alarms.after_images=0"]);
        assert_eq!(raised(&watch.evaluation(&evaluation(100, &collapsed))), [Alarm::Collapse]);
    }

    #[test]
    fn a_discriminator_that_knows_its_samples_by_heart_raises_an_alarm() {
        let mut watch = watch(&[]);
        assert_eq!(watch.evaluation(&evaluation(1000, &[(names::OVERFITTING, 0.7)])), []);
        assert_eq!(
            raised(&watch.evaluation(&evaluation(2000, &[(names::OVERFITTING, 0.9)]))),
            [Alarm::Overfitting]
        );
    }

    #[test]
    fn scores_that_stay_saturated_are_a_loss_of_balance() {
        let mut watch = watch(&["alarms.saturated_rows=3"]);
        for step in [1, 2] {
            assert_eq!(watch.row(&row(step, [0.999, 0.001])), []);
        }
        assert_eq!(watch.row(&row(3, [0.8, 0.3])), [], "it begins anew");
        for step in [4, 5] {
            assert_eq!(watch.row(&row(step, [0.999, 0.001])), []);
        }
        assert_eq!(raised(&watch.row(&row(6, [0.999, 0.001]))), [Alarm::Balance]);
        assert_eq!(watch.row(&row(7, [0.8, 0.3])), [Change::Over(Alarm::Balance)]);
        assert!(saturated(LossKind::WassersteinGp, [100.0, -100.0]).is_none());
        let mut of_package = Watch { loss: None, ..watch };
        for step in 8..20 {
            assert_eq!(
                of_package.row(&row(step, [0.999, 0.001])),
                [],
                "a package's scores have their own meaning"
            );
        }
    }

    #[test]
    fn a_loss_that_explodes_raises_an_alarm_that_a_new_coordinator_does_not_repeat() {
        let loss = |step, loss| MetricsRow {
            step,
            scalars: [("loss_discriminator", loss)].into_iter().collect(),
            ..MetricsRow::default()
        };
        let (mut watch, mut losses) = (watch(&[]), Losses::default());
        for (step, magnitude) in (1..).zip([9.0, -20.0, 8.0]) {
            assert_eq!(watch.row(&loss(step, magnitude)), []);
            losses.add(&loss(step, magnitude));
        }
        assert_eq!(watch.row(&loss(4, 5e11)), [], "one row may be an outlier");
        watch.row(&loss(5, 5e11));
        assert_eq!(raised(&watch.row(&loss(6, 5e11))), [Alarm::Explosion]);
        assert_eq!(watch.row(&loss(7, 5e11)), [], "it is told once");
        (4..=7).for_each(|step| losses.add(&loss(step, 5e11)));
        let mut next = self::watch(&[]);
        next.resume(losses, &["exploding_loss".to_string()]);
        assert_eq!(next.row(&loss(8, 2e5)), [], "still more than a thousand times what it was");
        (9..=10).for_each(|step| drop(next.row(&loss(step, 8.0))));
        assert_eq!(next.row(&loss(11, 8.0)), [Change::Over(Alarm::Explosion)]);
    }

    #[test]
    fn an_evaluation_without_figures_because_they_are_not_finite_raises_an_alarm() {
        let mut watch = watch(&[]);
        let failed = |step, why: &str| EvaluationRow { features: why.to_string(), ..evaluation(step, &[]) };
        assert_eq!(watch.evaluation(&failed(1, "failed: the module is gone")), []);
        let broken = failed(2, &format!("failed: the images are {NOT_FINITE}"));
        assert_eq!(raised(&watch.evaluation(&broken)), [Alarm::NonFinite], "also at the beginning");
        assert_eq!(watch.evaluation(&failed(3, "failed: the module is gone")), []);
        let good = evaluation(1000, &[(names::DIVERSITY, 0.9), (names::LABEL_KL, f64::INFINITY)]);
        assert_eq!(watch.evaluation(&good), [Change::Over(Alarm::NonFinite)]);
        let undefined = evaluation(2000, &[(names::KID, f64::NAN)]);
        assert_eq!(raised(&watch.evaluation(&undefined)), [Alarm::NonFinite]);
    }

    #[test]
    fn what_is_not_finite_raises_an_alarm_until_all_is_finite() {
        let mut watch = watch(&[]);
        assert_eq!(
            raised(&watch.evaluation(&evaluation(1000, &[(names::DIVERSITY, f64::NAN)]))),
            [Alarm::NonFinite]
        );
        assert_eq!(watch.row(&row(1001, [0.6, 0.4])), [], "the evaluation was not finite");
        assert_eq!(
            watch.evaluation(&evaluation(2000, &[(names::DIVERSITY, 0.9)])),
            [Change::Over(Alarm::NonFinite)]
        );
        assert_eq!(
            raised(&watch.row(&MetricsRow { skipped: 2, ..row(2001, [0.6, 0.4]) })),
            [Alarm::NonFinite]
        );
        assert_eq!(watch.row(&row(2002, [0.6, 0.4])), [Change::Over(Alarm::NonFinite)]);
        let reason = "score_real of step 2003 is not finite".to_string();
        assert_eq!(watch.row(&row(2003, [f64::NAN, 0.4])), [Change::Raised(Alarm::NonFinite, reason)]);
        let mut off = self::watch(&["alarms.policy=off"]);
        assert_eq!(off.row(&MetricsRow { skipped: 2, ..row(1, [0.6, 0.4]) }), []);
    }
}
