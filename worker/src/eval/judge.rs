//! Evaluator: computes all metrics that the features allow, against a reference of real samples that is
//! prepared once.

use std::sync::Arc;

use ganglion_proto::evaluation::{BestBy, Evaluation, names};
use ganglion_proto::progress::Progress;
use ganglion_proto::words::counted;
use tch::{Kind, TchError, Tensor, no_grad};

use super::features::{Extractor, Looked, chosen};
use super::held_out::check_held_out;
use super::metrics::{
    Labels, Manifold, Moments, diversity, frechet_distance, kernel_distance, memorised, nearest,
    precision_and_recall, sliced_wasserstein, threshold,
};
use super::{EvalError, image_shape, images, some_of};
use crate::data::DataSet;
use crate::nn::Pass;
use crate::random::{Key, Purpose};
use crate::sampling::{Critic, finite};

/// Number of samples of each kind that a critic rates.
const ASKED: usize = 1000;

/// Evaluator of generated samples.
#[derive(Debug)]
pub(crate) struct Judge {
    extractor: Extractor,
    samples: usize,
    reference: Reference,
}

/// Statistics of real samples.
#[derive(Debug)]
struct Reference {
    /// As many real images as are generated.
    images: Tensor,
    /// Samples from the training set and from the held-out set, if there is one.
    asked: Option<[Asked; 2]>,
    features: Option<OfFeatures>,
    labels: Option<Labels>,
}

#[derive(Debug)]
struct OfFeatures {
    all: Tensor,
    /// Manifold of as many samples as are generated.
    some: Manifold,
    moments: Moments,
    /// Distance below which a sample counts as memorised. See [`memorised`].
    threshold: f64,
}

/// Mean rating of samples.
fn opinion(critic: &Critic, asked: &Asked) -> f64 {
    // A fixed size, as for features.
    let parts = |tensor: &Tensor| tensor.split(100, 0);
    let classes = asked.classes.as_ref().map(parts).unwrap_or_default();
    let say = |(shard, part): (u32, &Tensor)| {
        // A network that draws in inference gets the same draws in each evaluation.
        let key = Key { seed: 0, step: 0, phase: 3, shard, purpose: Purpose::Network };
        let pass = Pass::running(&critic.weights, &critic.buffers, key);
        critic.network.forward(part, &mut pass.of(classes.get(shard as usize)))
    };
    let said: Vec<Tensor> = no_grad(|| (0..).zip(&parts(&asked.images)).map(say).collect());
    Tensor::cat(&said, 0).mean(Kind::Double).double_value(&[])
}

/// Generated samples for a critic, from a generator that draws the classes in turn.
fn generated(critic: &Critic, images: &Tensor) -> Asked {
    let count = images.size()[0].min(i64::try_from(ASKED).expect("a small number"));
    let in_turn =
        // As `Generator::draw_for` deals the classes.
        || Tensor::arange(count, (Kind::Int64, images.device())).remainder(i64::from(critic.classes));
    Asked { images: images.narrow(0, 0, count), classes: (critic.classes > 0).then(in_turn) }
}

/// Samples that a critic rates, with their classes for a conditional model.
#[derive(Debug)]
struct Asked {
    images: Tensor,
    classes: Option<Tensor>,
}

impl Asked {
    fn of(data: &DataSet) -> Result<Asked, EvalError> {
        let indices = chosen(data, ASKED);
        let labels = data.labels();
        let classes: Vec<i64> =
            indices.iter().filter_map(|index| labels.get(*index)).map(|class| i64::from(*class)).collect();
        let classes = (!classes.is_empty()).then(|| Tensor::from_slice(&classes));
        Ok(Asked { images: images(data, &indices)?, classes })
    }
}

/// Inputs of evaluations that do not depend on generated samples: opened and checked before training, read
/// later.
#[derive(Debug)]
pub(crate) struct Means {
    settings: Evaluation,
    extractor: Extractor,
    held_out: Option<Arc<DataSet>>,
}

/// Whether features of this kind do not give a metric of this name.
fn lacks(extractor: &Extractor, name: &str) -> bool {
    let of_labels = [names::SCORE, names::MODES, names::LABEL_KL, names::LABEL_ENTROPY];
    let of_features = [names::FRECHET, names::KID, names::PRECISION, names::RECALL, names::MEMORISED];
    match extractor {
        Extractor::Pixels => of_features.contains(&name) || of_labels.contains(&name),
        Extractor::File(..) => of_labels.contains(&name),
        Extractor::Digits(..) => false,
    }
}

impl Means {
    /// Opens the extractor and checks that the inputs fit the data.
    ///
    /// # Errors
    /// The settings do not fit the data; says which.
    pub(crate) fn open(
        settings: &Evaluation,
        data: &DataSet,
        held_out: Option<Arc<DataSet>>,
    ) -> Result<Means, EvalError> {
        let extractor = Extractor::open(&settings.features, image_shape(data)?)?;
        held_out.as_deref().map_or(Ok(()), |held_out| check_held_out(held_out, data))?;
        // Before training: a best checkpoint by a metric that no row has would never be found.
        if let BestBy::Named(name) = &settings.best_by
            && lacks(&extractor, name)
        {
            let features = extractor.describe();
            let what = format!(
                "evaluation.best_by: there is no {name} by features of {features}; choose \"auto\" or other \
                 evaluation.features"
            );
            return Err(EvalError::Input(what));
        }
        let counts = Counts::of(settings, data, held_out.as_deref());
        counts.check()?;
        if let Some(warning) = extractor.dimensions().and_then(|dimensions| counts.warning(dimensions)) {
            tracing::warn!("{warning}");
        }
        Ok(Means { settings: settings.clone(), extractor, held_out })
    }

    /// Computes the statistics of the real samples.
    ///
    /// # Errors
    /// A sample cannot be read, or the features cannot be computed.
    pub(crate) fn judge(self, data: &DataSet, progress: &Progress) -> Result<Judge, EvalError> {
        let Means { settings, extractor, held_out } = self;
        let samples = settings.samples as usize;
        // Waits for the disk; on the evaluation thread, so training goes on.
        let look_at = |data, count, what| {
            let chosen = chosen(data, count);
            progress.part(what, chosen.len() as u64);
            extractor.look_at(data, &chosen, progress)
        };
        let looked = look_at(data, settings.reference as usize, "real samples")?;
        looked.check("real samples")?;
        let fresh = held_out.as_deref().map(|held_out| look_at(held_out, samples, "held-out samples"));
        progress.part("statistics of real samples", 0);
        let fresh = fresh.transpose()?.and_then(|looked| looked.features);
        let asked = |held_out: &DataSet| Ok::<_, EvalError>([Asked::of(data)?, Asked::of(held_out)?]);
        let reference = Reference {
            images: images(data, &chosen(data, samples))?,
            asked: held_out.as_deref().map(asked).transpose()?,
            features: looked.features.map(|all| OfFeatures::new(all, samples, fresh.as_ref())),
            labels: looked.probabilities.as_ref().map(Labels::new),
        };
        Ok(Judge { extractor, samples, reference })
    }

    /// Name of the feature extractor, with the hash of its weights.
    pub(crate) fn describe(&self) -> String {
        self.extractor.describe()
    }
}

/// Numbers of samples that an evaluation compares.
#[derive(Clone, Copy, Debug)]
struct Counts {
    generated: usize,
    real: usize,
    held_out: Option<usize>,
}

/// Minimum number of samples of each kind: the third-nearest other sample must exist, and a variance.
const LEAST: usize = 10;

impl Counts {
    fn of(settings: &Evaluation, data: &DataSet, held_out: Option<&DataSet>) -> Counts {
        let generated = settings.samples as usize;
        Counts {
            generated,
            real: chosen(data, settings.reference as usize).len(),
            held_out: held_out.map(|held_out| chosen(held_out, generated).len()),
        }
    }

    /// Checks that each metric is defined.
    fn check(self) -> Result<(), EvalError> {
        let Counts { generated, real, held_out } = self;
        let few = [("generated", Some(generated)), ("real", Some(real)), ("held-out", held_out)];
        let few =
            few.into_iter().find_map(|(kind, count)| Some((kind, count.filter(|count| *count < LEAST)?)));
        few.map_or(Ok(()), |(kind, count)| {
            let what = format!(
                "an evaluation of {}: the metrics need at least {LEAST}",
                counted(count as u64, &format!("{kind} sample"))
            );
            Err(EvalError::Input(what))
        })
    }

    /// Warning where there are too few samples for features of so many dimensions.
    fn warning(self, dimensions: usize) -> Option<String> {
        let Counts { generated, real, .. } = self;
        // Up to here the covariance of the features has no full rank, and the distance is mostly bias.
        let few = generated.min(real) <= dimensions;
        few.then(|| {
            format!(
                "{generated} samples against {real} real ones are too few for {dimensions} features: {} comes out far too \
                 large, and {} and the others vary widely; more than {dimensions} of each are needed, and thousands are usual",
                names::FRECHET,
                names::KID
            )
        })
    }
}

impl OfFeatures {
    fn new(all: Tensor, samples: usize, fresh: Option<&Tensor>) -> OfFeatures {
        let count = usize::try_from(all.size()[0]).unwrap_or_default();
        let places: Vec<i64> =
            some_of(count, samples).into_iter().filter_map(|n| i64::try_from(n).ok()).collect();
        let some = all.index_select(0, &Tensor::from_slice(&places));
        let nearest =
            // Held-out samples are fresh by themselves. Training samples are fresh only to the others.
            fresh.map_or_else(|| nearest_others(&all, &places), |fresh| nearest(fresh, &all, false));
        OfFeatures {
            moments: Moments::of(&all),
            threshold: threshold(&nearest),
            some: Manifold::of(&some),
            all,
        }
    }
}

/// Without held-out samples each training sample counts as fresh to the others.
fn nearest_others(all: &Tensor, places: &[i64]) -> Tensor {
    nearest(&all.index_select(0, &Tensor::from_slice(places)), all, true)
}

impl Judge {
    /// Number of generated samples that an evaluation takes.
    pub(crate) fn samples(&self) -> usize {
        self.samples
    }

    /// Name of the feature extractor, with the hash of its weights.
    pub(crate) fn describe(&self) -> String {
        self.extractor.describe()
    }

    /// Returns all metrics of generated images (n, c, h, w) in [-1, 1], and of the critic of the same state.
    ///
    /// # Errors
    /// The module of a file fails.
    pub(crate) fn metrics(
        &self,
        images: &Tensor,
        critic: Option<&Critic>,
        progress: &Progress,
    ) -> Result<Vec<(String, f64)>, EvalError> {
        let mut metrics = Vec::new();
        let mut note = |name: &str, value: f64| metrics.push((name.to_string(), value));
        // Comparisons with NaN are false, and a share of none is a figure like any other.
        let images = &finite(images.to_kind(Kind::Float))?;
        progress.part("features of samples", images.size()[0].unsigned_abs());
        let looked = self.extractor.look(images, progress)?;
        looked.check("generated images")?;
        let Looked { features, probabilities } = looked;
        progress.part("computing the metrics", 0);
        if let (Some(own), Some(real)) = (&features, &self.reference.features) {
            note(names::FRECHET, frechet_or_nothing(real, own));
            note(names::KID, kernel_distance(real.some.samples(), own));
            let [precision, recall] = precision_and_recall(&real.some, &Manifold::of(own));
            note(names::PRECISION, precision);
            note(names::RECALL, recall);
            note(names::MEMORISED, memorised(&nearest(own, &real.all, false), real.threshold));
        }
        if let (Some(own), Some(real)) = (&probabilities, &self.reference.labels) {
            let own = Labels::new(own);
            note(names::SCORE, own.score());
            note(names::MODES, f64::from(u32::try_from(own.modes(real)).unwrap_or(u32::MAX)));
            note(names::LABEL_KL, own.divergence(real));
            note(names::LABEL_ENTROPY, own.relative_entropy(real));
        }
        note(names::WASSERSTEIN, sliced_wasserstein(&self.reference.images, images));
        note(names::DIVERSITY, diversity(&self.reference.images, images));
        if let (Some(critic), Some([seen, held_out])) = (critic, &self.reference.asked) {
            note(names::OVERFITTING, overfitting(critic, seen, held_out, &generated(critic, images)));
        }
        Ok(metrics)
    }
}

/// Overfitting of a critic: 0 if it rates held-out samples as training samples, 1 if as generated
/// ones. Karras et al. (2020), "Training generative adversarial networks with limited data", equation 1,
/// r_v.
fn overfitting(critic: &Critic, seen: &Asked, held_out: &Asked, generated: &Asked) -> f64 {
    of_opinions([seen, held_out, generated].map(|asked| opinion(critic, asked)))
}

fn of_opinions([seen, held_out, generated]: [f64; 3]) -> f64 {
    // A critic that rates all three alike has memorised nothing. One that rates them as NaN is broken.
    if seen.is_finite() && seen == held_out && seen == generated {
        0.0
    } else {
        (seen - held_out) / (seen - generated)
    }
}

/// Fréchet distance; NaN where the features are not finite.
fn frechet_or_nothing(real: &OfFeatures, own: &Tensor) -> f64 {
    let distance = || -> Result<f64, TchError> { frechet_distance(&real.moments, &Moments::of(own)) };
    distance().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_samples_are_refused_and_few_are_warned_of() {
        let counts = |generated, real, held_out| Counts { generated, real, held_out };
        for (few, named) in [
            (counts(1, 100, None), "1 generated sample:"),
            (counts(100, 9, None), "9 real samples:"),
            (counts(100, 100, Some(3)), "3 held-out samples:"),
        ] {
            let refused = few.check().unwrap_err().to_string();
            assert!(refused.contains(named) && refused.contains("at least 10"), "{refused}");
        }
        counts(10, 10, Some(10)).check().unwrap();
        let warned = |generated, real| counts(generated, real, None).warning(64);
        assert_eq!((warned(65, 65), warned(5000, 10_000)), (None, None));
        for (generated, real) in [(20, 10_000), (64, 10_000), (5000, 64)] {
            let warning = warned(generated, real).unwrap();
            assert!(warning.contains(&format!("{generated} samples against {real} real ones")), "{warning}");
            assert!(warning.contains("more than 64 of each"), "{warning}");
        }
    }

    #[test]
    fn a_critic_that_is_not_finite_does_not_pass_for_one_that_has_memorised_nothing() {
        assert_eq!(of_opinions([0.5, 0.5, 0.5]), 0.0);
        assert_eq!(of_opinions([1.0, 0.5, 0.0]), 0.5);
        for broken in [[1.0, f64::NAN, 0.0], [1.0, 0.5, f64::NAN], [f64::INFINITY; 3]] {
            assert!(of_opinions(broken).is_nan(), "{broken:?}");
        }
    }
}
