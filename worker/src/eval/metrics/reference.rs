// What numpy and scipy make of the metrics: written by tests/python/metrics.py, which says how.

pub(super) const FRECHET: f64 = 0.7018121527505814;
pub(super) const FRECHET_OF_THE_SAME: f64 = 7.299716386910404e-15;
pub(super) const KID: f64 = 4.911121025716206;
pub(super) const KID_IN_BLOCKS_OF_80: f64 = 4.4400111909462225;
pub(super) const PRECISION: f64 = 0.9625;
pub(super) const RECALL: f64 = 0.8458333333333333;
pub(super) const SCORE: f64 = 2.19093465926004;
pub(super) const LABEL_KL: f64 = 0.12218036230158444;
pub(super) const RELATIVE_ENTROPY: f64 = 0.9582949258719164;
pub(super) const MODES: f64 = 9.0;
pub(super) const NEAREST: f64 = 0.4891019126169729;
pub(super) const WASSERSTEIN_OF_A_COLUMN: f64 = 0.22462296450111238;
pub(super) const DIVERSITY: f64 = 0.7927112682228599;
