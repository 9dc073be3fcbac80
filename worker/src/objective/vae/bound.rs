//! Bounds of the negative log-likelihood of held-out images, in nats an image.

use std::borrow::Cow;

use tch::{Kind, Tensor, no_grad};

use super::{DECODER, ENCODER, Posterior, Vae, Weights};
use crate::checkpoint::Snapshot;
use crate::objective::{BatchSums, Evaluator, ShardBatch};
use crate::random::Key;
use crate::state::StateLayout;

/// Bound by importance-weighted draws: Burda, Grosse and Salakhutdinov (2015), "Importance weighted
/// autoencoders", equation 8.
const IMPORTANCE_WEIGHTED: &str = "iwae_bound";
/// Bound by single draws: the negative of the evidence lower bound.
const OF_SINGLE_DRAWS: &str = "elbo_bound";
/// Latent vectors that are decoded at once: enough for fast products, and little memory.
const AT_ONCE: usize = 1024;

impl Vae {
    /// Logarithms of the importance weights p(x, z) / q(z|x) of images (n, c, h, w), (k, n) in double
    /// precision, for draws (k, n, latent) of N(0, 1).
    fn log_weights(
        &self,
        images: &Tensor,
        noise: &Tensor,
        weights: Weights<'_>,
        classes: Option<&Tensor>,
    ) -> Tensor {
        let posterior = self.posterior(images, weights, classes);
        let samples = images.size()[0];
        let at_once = i64::try_from(AT_ONCE).expect("a small number") / samples;
        let of_part = |noise: &Tensor| {
            let draws = noise.size()[0];
            let latent = posterior.at(noise);
            let flat = latent.view([draws * samples, -1]);
            let repeated = images.repeat([draws, 1, 1, 1]);
            let classes = classes.map(|classes| classes.repeat([draws]));
            let likelihood = self.log_likelihood(&repeated, &flat, weights, classes.as_ref());
            likelihood.view([draws, samples]).to_kind(Kind::Double) + log_ratio(&posterior, &latent, noise)
        };
        let parts: Vec<Tensor> = noise.split(at_once.max(1), 0).iter().map(of_part).collect();
        Tensor::cat(&parts, 0)
    }
}

/// log p(z) - log q(z|x) of latent vectors that were drawn by `noise`; their constants cancel.
fn log_ratio(posterior: &Posterior, latent: &Tensor, noise: &Tensor) -> Tensor {
    let of_elements = (noise * noise - latent * latent + &posterior.log_variance).to_kind(Kind::Double) * 0.5;
    of_elements.sum_dim_intlist([-1i64].as_slice(), false, None)
}

impl Evaluator for Vae {
    fn scalars(&self) -> Vec<Cow<'static, str>> {
        vec![IMPORTANCE_WEIGHTED.into(), OF_SINGLE_DRAWS.into()]
    }

    fn begin<'a>(
        &'a self,
        layout: &'a StateLayout,
        snapshot: &'a Snapshot,
    ) -> Result<BatchSums<'a>, c10d::Error> {
        let [encoder, decoder] =
            [ENCODER, DECODER].map(|network| Vae::average(layout.network(network), snapshot, self.device));
        Ok(Box::new(move |batch: &ShardBatch, key: Key| {
            let (weights, batch) = (Weights { encoder: &encoder, decoder: &decoder }, batch.to(self.device));
            let mut stream = key.stream();
            let images = self.pixels(&batch, |count| Tensor::from_slice(&stream.uniform(0.0, 1.0, count)));
            let (draws, samples) = (self.settings.importance_samples, images.size()[0]);
            let count = draws as usize * self.latent_numel(&images);
            let noise = Tensor::from_slice(&stream.normal(count)).view([i64::from(draws), samples, -1]);
            let classes = self.classes(&batch);
            let logs = no_grad(|| self.log_weights(&images, &noise.to_device(self.device), weights, classes));
            let of_all = logs.logsumexp([0i64].as_slice(), false) - f64::from(draws).ln();
            let sum = |bounds: Tensor| -bounds.sum(None).double_value(&[]);
            Ok(vec![sum(of_all), sum(logs.mean_dim([0i64].as_slice(), false, None))])
        }))
    }
}
