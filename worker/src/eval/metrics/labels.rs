//! Metrics of class probabilities.

use tch::{Kind, Tensor};

use super::{float, rows};

/// Minimum ratio of a class's share among generated samples to its share among real ones, for the class to
/// count as covered.
const COVERED: f64 = 0.1;

/// Class probabilities of samples (n, classes), in f64.
#[derive(Debug)]
pub(crate) struct Labels {
    probabilities: Tensor,
}

impl Labels {
    /// Takes the probabilities of at least one sample.
    pub(crate) fn new(probabilities: &Tensor) -> Labels {
        Labels { probabilities: probabilities.to_kind(Kind::Double) }
    }

    /// Share of the samples in each class; a sample belongs to its most likely class.
    pub(crate) fn shares(&self) -> Vec<f64> {
        let classes = self.probabilities.size()[1];
        // With all classes, also empty ones.
        let counts = self.probabilities.argmax(-1, false).bincount(None::<Tensor>, classes);
        let shares = counts.to_kind(Kind::Double) / float(rows(&self.probabilities));
        Vec::try_from(shares).unwrap_or_default()
    }

    /// Classifier score, exp(E KL(p(y|x) || p(y))), from 1 to the number of classes: Salimans et al.
    /// (2016), "Improved techniques for training GANs", section 4, over all samples at once. With Inception
    /// it is the inception score.
    pub(crate) fn score(&self) -> f64 {
        let marginal = self.probabilities.mean_dim([0i64].as_slice(), true, Kind::Double);
        // 0 log 0 counts as 0, where the logarithm alone is infinite.
        let logarithm = |p: &Tensor| p.clamp_min(f64::MIN_POSITIVE).log();
        let divergence = &self.probabilities * (logarithm(&self.probabilities) - logarithm(&marginal));
        divergence
            .sum_dim_intlist([1i64].as_slice(), false, Kind::Double)
            .mean(Kind::Double)
            .exp()
            .double_value(&[])
    }

    /// Number of classes of the real samples that the generated ones cover: mode coverage as in Metz et al.
    /// (2017), "Unrolled generative adversarial networks", section 3.3.1, with a threshold of a tenth of
    /// the real share for noise in labels.
    pub(crate) fn modes(&self, real: &Labels) -> usize {
        let covered = |(own, real): &(f64, f64)| *real > 0.0 && *own >= COVERED * real;
        self.shares().into_iter().zip(real.shares()).filter(covered).count()
    }

    /// KL(generated || real) of the shares of the classes, in nats; the same section. Infinite if samples are
    /// of a class that no real sample has.
    pub(crate) fn divergence(&self, real: &Labels) -> f64 {
        // Likewise: a class that no generated sample is of adds nothing.
        let term = |(own, real): (f64, f64)| if own > 0.0 { own * (own / real).ln() } else { 0.0 };
        self.shares().into_iter().zip(real.shares()).map(term).sum()
    }

    /// Ratio of the entropies of the class shares, generated to real; 0 if all generated samples are of one
    /// class.
    pub(crate) fn relative_entropy(&self, real: &Labels) -> f64 {
        let entropy = |labels: &Labels| -> f64 {
            labels.shares().iter().filter(|share| **share > 0.0).map(|share| -share * share.ln()).sum()
        };
        let of_real = entropy(real);
        // With one class the sum is -0.
        if of_real > 0.0 { entropy(self) / of_real + 0.0 } else { 1.0 }
    }
}
