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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BestBy {
    /// The Fréchet distance, or the sliced Wasserstein distance where the features are the pixels.
    Auto,
    /// The lower the better.
    FrechetDistance,
    /// The lower the better.
    Kid,
    /// The higher the better.
    ClassifierScore,
    /// The lower the better.
    SlicedWasserstein,
}

impl BestBy {
    /// Returns the name and value of the deciding metric of a row; `None` if the row does not have
    /// it.
    pub fn of(self, row: &EvaluationRow) -> Option<(&'static str, f64)> {
        let candidates: &[&'static str] = match self {
            // In this order: features say more than pixels, where there are any.
            BestBy::Auto => &[names::FRECHET, names::WASSERSTEIN],
            BestBy::FrechetDistance => &[names::FRECHET],
            BestBy::Kid => &[names::KID],
            BestBy::ClassifierScore => &[names::SCORE],
            BestBy::SlicedWasserstein => &[names::WASSERSTEIN],
        };
        // A distance of a collapsed state may have no value, and must not count as the best.
        let found = |name: &&'static str| Some((*name, row.get(name).filter(|value| value.is_finite())?));
        candidates.iter().find_map(found)
    }

    /// Whether the value `one` of the named metric is better than `other`.
    pub fn is_better(name: &str, one: f64, other: f64) -> bool {
        // The only metric of which more is better.
        if name == names::SCORE { one > other } else { one < other }
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

display_as_in_the_file!(BestBy, AlarmPolicy);

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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(metrics: &[(&str, f64)]) -> EvaluationRow {
        let metrics = metrics.iter().copied().collect();
        EvaluationRow { step: 3, metrics, features: "digits 0a".to_string(), seconds: 0.5 }
    }

    #[test]
    fn the_best_is_by_the_figure_that_a_row_has() {
        let of_digits = row(&[(names::WASSERSTEIN, 0.5), (names::FRECHET, 2.0)]);
        assert_eq!(BestBy::Auto.of(&of_digits), Some((names::FRECHET, 2.0)));
        assert_eq!(BestBy::Auto.of(&row(&[(names::WASSERSTEIN, 0.5)])), Some((names::WASSERSTEIN, 0.5)));
        assert_eq!(BestBy::Kid.of(&of_digits), None);
        assert_eq!(BestBy::FrechetDistance.of(&row(&[(names::FRECHET, f64::NAN)])), None);
        assert!(BestBy::is_better(names::FRECHET, 1.0, 2.0) && !BestBy::is_better(names::SCORE, 1.0, 2.0));
    }

    #[test]
    fn features_are_named_as_the_file_has_them() {
        for text in ["auto", "digits", "pixels", "/a/inception.pt"] {
            assert_eq!(Features::from(text.to_string()).to_string(), text);
        }
    }
}
