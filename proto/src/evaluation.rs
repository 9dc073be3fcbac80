//! Evaluations: their settings in a job, the names of the metrics, and the choice of the best.
//!
//! 1. An evaluation is a function of (job, state): its metrics do not depend on who computed it, or
//!    when.
//! 2. No key of `[evaluation]` and `[alarms]` moves a bit of the state.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::names::display_as_in_the_file;
pub use crate::record::EvaluationRow;

/// Section `[evaluation]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Period of evaluations in steps; 0 for never.
    pub every_steps: u64,
    /// Whether each checkpoint is evaluated.
    pub with_checkpoints: bool,
    /// Number of generated samples in an evaluation.
    pub samples: u32,
    /// Number of real samples that they are compared with; 0 for all.
    pub reference: u32,
    /// Feature space of the metrics.
    pub features: Features,
    /// File or folder of real samples that are not trained on, of the kind of `[data]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out: Option<PathBuf>,
    /// Metric by which the best checkpoint is chosen.
    pub best_by: BestBy,
    /// Whether the least or the greatest value is the best; by the metric where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_goal: Option<Goal>,
}

impl Default for Evaluation {
    /// No evaluations.
    fn default() -> Self {
        Evaluation {
            every_steps: 0,
            with_checkpoints: false,
            samples: 2000,
            reference: 10_000,
            features: Features::Auto,
            held_out: None,
            best_by: BestBy::Auto,
            best_goal: None,
        }
    }
}

/// Feature space of the metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Features {
    /// The digit classifier for images of 28 x 28 grey pixels, otherwise the pixels.
    Auto,
    /// The digit classifier that comes with the worker.
    Digits,
    /// The pixels themselves.
    Pixels,
    /// A TorchScript file: a module from images (n, c, h, w) in [-1, 1] to features (n, d).
    File(PathBuf),
}

impl From<String> for Features {
    fn from(text: String) -> Self {
        match text.as_str() {
            "auto" => Features::Auto,
            "digits" => Features::Digits,
            "pixels" => Features::Pixels,
            _ => Features::File(text.into()),
        }
    }
}

impl From<Features> for String {
    fn from(features: Features) -> Self {
        features.to_string()
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Features::Auto => f.write_str("auto"),
            Features::Digits => f.write_str("digits"),
            Features::Pixels => f.write_str("pixels"),
            Features::File(file) => file.display().fmt(f),
        }
    }
}

/// Metric by which the best checkpoint is chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum BestBy {
    /// The Fréchet distance, or the sliced Wasserstein distance where the features are the pixels; the first
    /// scalar of an objective that draws no samples.
    Auto,
    /// A metric, or a scalar by which the objective evaluates held-out samples.
    Named(String),
}

impl From<String> for BestBy {
    fn from(text: String) -> Self {
        if text == "auto" { BestBy::Auto } else { BestBy::Named(text) }
    }
}

impl From<BestBy> for String {
    fn from(best_by: BestBy) -> Self {
        match best_by {
            BestBy::Auto => "auto".to_owned(),
            BestBy::Named(name) => name,
        }
    }
}

/// Value of a metric that is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// The least.
    Min,
    /// The greatest.
    Max,
}

impl Evaluation {
    /// Returns the name and value of the deciding metric of a row; `None` if the row does not have
    /// it.
    pub fn deciding<'a>(&'a self, row: &'a EvaluationRow) -> Option<(&'a str, f64)> {
        // A distance of a collapsed state may have no value, and must not count as the best.
        let of = |name: &'a str| Some((name, row.get(name).filter(|value| value.is_finite())?));
        match &self.best_by {
            BestBy::Named(name) => of(name),
            // In this order: features say more than pixels, where there are any.
            BestBy::Auto => {
                let of_samples = [names::FRECHET, names::WASSERSTEIN];
                let draws = of_samples.iter().any(|name| row.get(name).is_some());
                let first = row.metrics.iter().next().map(|(name, _)| name);
                if draws { of_samples.into_iter().find_map(of) } else { first.and_then(of) }
            }
        }
    }

    /// Whether the value `one` of the named metric is better than `other`.
    pub fn is_better(&self, name: &str, one: f64, other: f64) -> bool {
        let goal = self.best_goal.unwrap_or(if names::MORE_IS_BETTER.contains(&name) {
            Goal::Max
        } else {
            Goal::Min
        });
        match goal {
            Goal::Min => one < other,
            Goal::Max => one > other,
        }
    }
}

/// Section `[alarms]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alarms {
    /// Consequence of an alarm.
    pub policy: AlarmPolicy,
    /// Number of real images seen in training before evaluations may raise an alarm: at first all
    /// samples are alike.
    pub after_images: u64,
    /// Collapse: threshold of the diversity of generated samples, and of their labels, as a share
    /// of that of the real ones.
    pub collapse: f64,
    /// Overfitting of the discriminator: threshold as a share of the distance from held-out to
    /// training samples.
    pub overfitting: f64,
    /// Loss of balance: number of consecutive metrics rows with a saturated discriminator output.
    pub saturated_rows: u64,
}

impl Default for Alarms {
    fn default() -> Self {
        Alarms {
            // The alarms are heuristics: they tell, and do not end a run unless asked to.
            policy: AlarmPolicy::Warn,
            after_images: 25_000,
            collapse: 0.3,
            overfitting: 0.8,
            saturated_rows: 100,
        }
    }
}

/// Consequence of an alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlarmPolicy {
    /// Alarms are not computed.
    Off,
    /// The alarm is reported.
    Warn,
    /// The alarm is reported, and the run ends.
    Stop,
}

display_as_in_the_file!(Goal, AlarmPolicy);

/// Words of each message about numbers that are infinite or NaN, by which an alarm knows them.
pub const NOT_FINITE: &str = "not finite";

/// Names of the metrics in rows and in files.
#[allow(missing_docs)] // docs/metrics.md says what each is
pub mod names {
    pub const FRECHET: &str = "frechet_distance";
    pub const SCORE: &str = "classifier_score";
    pub const MODES: &str = "modes";
    pub const LABEL_KL: &str = "label_kl";
    pub const LABEL_ENTROPY: &str = "label_entropy";
    pub const KID: &str = "kid";
    pub const PRECISION: &str = "precision";
    pub const RECALL: &str = "recall";
    pub const MEMORISED: &str = "memorised";
    pub const WASSERSTEIN: &str = "sliced_wasserstein";
    pub const DIVERSITY: &str = "diversity";
    pub const OVERFITTING: &str = "discriminator_overfitting";

    /// All metrics of generated samples.
    pub const ALL: [&str; 12] = [
        FRECHET,
        KID,
        PRECISION,
        RECALL,
        MEMORISED,
        SCORE,
        MODES,
        LABEL_KL,
        LABEL_ENTROPY,
        WASSERSTEIN,
        DIVERSITY,
        OVERFITTING,
    ];
    /// Metrics of which more is better.
    pub const MORE_IS_BETTER: [&str; 6] = [SCORE, PRECISION, RECALL, MODES, LABEL_ENTROPY, DIVERSITY];
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(metrics: &[(&str, f64)]) -> EvaluationRow {
        EvaluationRow { step: 3, metrics: metrics.iter().copied().collect(), ..EvaluationRow::default() }
    }

    fn by(name: &str) -> Evaluation {
        Evaluation { best_by: BestBy::from(name.to_string()), ..Evaluation::default() }
    }

    #[test]
    fn the_best_is_by_the_figure_that_a_row_has() {
        let of_digits = row(&[(names::WASSERSTEIN, 0.5), (names::FRECHET, 2.0), ("nll", 7.0)]);
        assert_eq!(by("auto").deciding(&of_digits), Some((names::FRECHET, 2.0)));
        assert_eq!(by("nll").deciding(&of_digits), Some(("nll", 7.0)));
        assert_eq!(by("kid").deciding(&of_digits), None);
        let of_pixels = row(&[("nll", 7.0), (names::WASSERSTEIN, 0.5)]);
        assert_eq!(by("auto").deciding(&of_pixels), Some((names::WASSERSTEIN, 0.5)));
        assert_eq!(by("auto").deciding(&row(&[("nll", 7.0), ("kl", 1.0)])), Some(("nll", 7.0)));
        let nothing = f64::NAN;
        assert_eq!(by(names::FRECHET).deciding(&row(&[(names::FRECHET, nothing)])), None);
        assert_eq!(by("auto").deciding(&row(&[("nll", 7.0), (names::WASSERSTEIN, nothing)])), None);
    }

    #[test]
    fn more_is_better_where_the_metric_or_the_job_says_so() {
        let better = |evaluation: Evaluation, name: &str| evaluation.is_better(name, 1.0, 2.0);
        assert!(better(by("auto"), names::FRECHET) && better(by("nll"), "nll"));
        assert!(!better(by("auto"), names::SCORE) && !better(by(names::RECALL), names::RECALL));
        let goal = |goal| Evaluation { best_goal: Some(goal), ..by("accuracy") };
        assert!(!better(goal(Goal::Max), "accuracy") && better(goal(Goal::Min), names::SCORE));
    }

    #[test]
    fn features_are_named_as_the_file_has_them() {
        for text in ["auto", "digits", "pixels", "/a/inception.pt"] {
            assert_eq!(Features::from(text.to_string()).to_string(), text);
        }
    }
}
