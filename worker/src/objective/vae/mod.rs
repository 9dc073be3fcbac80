//! Variational autoencoders: Kingma and Welling (2013), "Auto-encoding variational Bayes", equation 10, with
//! one draw of the latent vector for each image; with `loss.beta` the objective of Higgins et al. (2017).
//!
//! 1. A step has one phase, which updates encoder and decoder.
//! 2. The loss of an image is -log p(x|z) + beta KL(q(z|x) || p(z)) in nats, with z = mean + deviation * noise
//!    and the KL divergence of two normal distributions in closed form.
//! 3. Pixels are in [0, 1] here. With `loss.binarise` each pixel is 1 with the probability of its value,
//!    drawn anew for each use of an image (Burda et al., 2015, section 5).

mod bound;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use c10d::aten::{PlacedGradients, copy_all};
use ganglion_proto::job::{Job, VaeSettings};
use serde_json::json;
use tch::{Device, Tensor, no_grad};

use super::{
    Compute, Evaluator, NamedNetwork, NetworkId, NetworkSet, Objective, Optimizer, Phase, Reads, ScalarRole,
    ScalarSpec, Setting, ShardAt, ShardBatch, ShardGrad, Unsuitable, annealing, images_of, optimizer,
};
use crate::checkpoint::{Snapshot, WeightsFile};
use crate::data::DataSet;
use crate::nn::{Autoencoder, Network, Pass};
use crate::random::{Draws, Key, Purpose};
use crate::sampling::{AUTOENCODER, CLASS_NAMES, Generator, Sampler, WEIGHTS_FILE};
use crate::state::{Sections, State, StateLayout};

/// Images to the posterior of the latent vector.
pub const ENCODER: NetworkId = NetworkId(0);
/// Latent vectors to images.
pub const DECODER: NetworkId = NetworkId(1);

/// The VAE of a job.
#[derive(Clone)]
pub struct Vae {
    job: Job,
    settings: VaeSettings,
    networks: Autoencoder,
    /// Names of the classes; empty where they are numbers.
    class_names: Vec<String>,
    device: Device,
}

/// Encoder and decoder with parameters.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// Parameters of the encoder.
    pub encoder: &'a [Tensor],
    /// Parameters of the decoder.
    pub decoder: &'a [Tensor],
}

/// Summands of the loss of each image, (n), in nats.
pub struct Terms {
    /// Negative logarithm of the likelihood of the image, given a draw of its latent vector.
    pub recon: Tensor,
    /// KL divergence of the posterior from the prior.
    pub kl: Tensor,
}

/// Posterior of latent vectors: normal, with independent elements. Both are (n, latent).
pub(crate) struct Posterior {
    pub(crate) mean: Tensor,
    pub(crate) log_variance: Tensor,
}

impl Posterior {
    /// KL divergence from N(0, 1) in each element, (n): Kingma and Welling (2013), appendix B.
    fn divergence(&self) -> Tensor {
        let Posterior { mean, log_variance } = self;
        let of_elements = (mean * mean + log_variance.exp() - log_variance - 1.0) * 0.5;
        of_elements.sum_dim_intlist([1i64].as_slice(), false, None)
    }

    /// Latent vectors for draws of N(0, 1), (..., n, latent).
    fn at(&self, noise: &Tensor) -> Tensor {
        &self.mean + (&self.log_variance * 0.5).exp() * noise
    }
}

/// Makes the VAE of a job, for its data.
///
/// # Errors
/// The networks do not fit the data.
pub(super) fn make(job: &Job, data: &DataSet, device: Device) -> Result<Arc<dyn Objective>, Unsuitable> {
    let shape = images_of(job, data)?;
    let networks = Autoencoder::new(&job.model, shape, data.classes());
    let networks = networks.map_err(|error| Unsuitable(error.to_string()))?;
    Ok(Arc::new(Vae::new(job, networks, data.class_names().to_vec(), device)))
}

impl Vae {
    /// The VAE of a job with these networks.
    ///
    /// # Panics
    /// The job trains another family.
    pub fn new(job: &Job, networks: Autoencoder, class_names: Vec<String>, device: Device) -> Vae {
        let settings = job.model.vae.clone().expect("networks of a VAE belong to a job of one");
        Vae { job: job.clone(), settings, networks, class_names, device }
    }

    fn key(&self, at: ShardAt, purpose: Purpose) -> Key {
        let ShardAt { phase, step, shard } = at;
        Key { seed: self.job.job.seed, step, phase: phase.index, shard, purpose }
    }

    /// Pass of a network without buffers or draws of its own.
    fn pass<'a>(parameters: &'a [Tensor], classes: Option<&'a Tensor>) -> Pass<'a> {
        let key = Key { seed: 0, step: 0, phase: 0, shard: 0, purpose: Purpose::Network };
        Pass::batch(parameters, &[], key).of(classes)
    }

    /// Classes of samples, for a conditional model.
    fn classes<'a>(&self, batch: &'a ShardBatch) -> Option<&'a Tensor> {
        batch.classes.as_ref().filter(|_| self.networks.classes > 0)
    }

    /// Images (n, c, h, w) in [0, 1] of samples; `uniform` has a draw of U[0, 1) for each pixel where they are
    /// binarised.
    fn pixels(&self, batch: &ShardBatch, uniform: impl FnOnce(usize) -> Tensor) -> Tensor {
        let images = (batch.images() + 1.0) * 0.5;
        if !self.settings.binarise {
            return images;
        }
        let drawn = uniform(images.numel()).view(images.size().as_slice()).to_device(images.device());
        drawn.lt_tensor(&images).to_kind(images.kind())
    }

    fn posterior(&self, images: &Tensor, weights: Weights<'_>, classes: Option<&Tensor>) -> Posterior {
        let seen = self.networks.encoder.forward(images, &mut Vae::pass(weights.encoder, classes));
        let mut halves = seen.chunk(2, 1);
        let log_variance = halves.pop().expect("two halves");
        Posterior { mean: halves.pop().expect("two halves"), log_variance }
    }

    /// log p(x|z) of images in nats, (n), given latent vectors.
    fn log_likelihood(
        &self,
        images: &Tensor,
        latent: &Tensor,
        weights: Weights<'_>,
        classes: Option<&Tensor>,
    ) -> Tensor {
        let (decoder, pass) = (&self.networks.decoder, Vae::pass(weights.decoder, classes));
        decoder.log_likelihood(images, &decoder.logits(latent, &pass), &pass)
    }

    /// Summands of the loss of images (n, c, h, w) in [0, 1], for draws (n, latent) of N(0, 1).
    pub fn terms(
        &self,
        images: &Tensor,
        noise: &Tensor,
        weights: Weights<'_>,
        classes: Option<&Tensor>,
    ) -> Terms {
        let posterior = self.posterior(images, weights, classes);
        let recon = -self.log_likelihood(images, &posterior.at(noise), weights, classes);
        Terms { recon, kl: posterior.divergence() }
    }

    /// Loss of each image, (n).
    pub fn loss(&self, terms: &Terms) -> Tensor {
        &terms.recon + &terms.kl * self.settings.beta
    }

    /// Number of elements of the latent vectors of images.
    fn latent_numel(&self, images: &Tensor) -> usize {
        usize::try_from(images.size()[0]).expect("a batch is small") * self.networks.latent_dim
    }

    /// Number of images that a number of steps sees.
    fn seen(&self, steps: u64) -> u64 {
        steps.saturating_mul(self.job.global_batch())
    }

    /// The average of a network in a snapshot, on the CPU or another device.
    fn average(sections: &Sections, snapshot: &Snapshot, device: Device) -> Vec<Tensor> {
        let range = sections.average_range().unwrap_or_else(|| sections.weight_range());
        sections.views(&snapshot.floats(range).to_device(device)).0
    }
}

impl Objective for Vae {
    fn networks(&self) -> Vec<NamedNetwork> {
        let named = |name: &'static str, network: &dyn Network, average: &'static str| NamedNetwork {
            name: name.into(),
            parameters: network.parameters(),
            buffers: network.buffers(),
            average: Some(average.into()),
        };
        vec![
            named("encoder", &self.networks.encoder, "ema_encoder"),
            named("decoder", &self.networks.decoder, "ema_decoder"),
        ]
    }

    fn phases(&self) -> Vec<Phase> {
        vec![Phase { index: 0, updates: NetworkSet::of([ENCODER, DECODER]), reads: Reads::Next, every: 1 }]
    }

    fn phase_name(&self, _phase: Phase) -> Cow<'_, str> {
        "vae".into()
    }

    fn scalars(&self, _phase: Phase) -> Vec<ScalarSpec> {
        vec![
            ScalarSpec::new("loss", ScalarRole::Loss),
            ScalarSpec::new("recon", ScalarRole::Diagnostic),
            ScalarSpec::new("kl", ScalarRole::Diagnostic),
        ]
    }

    fn settings(&self) -> Vec<Setting<'_>> {
        optimizer::moving_of_job(&self.job)
    }

    fn draws(&self, at: ShardAt) -> Vec<(Key, Vec<Tensor>)> {
        let samples = self.job.job.shard_batch as usize;
        let key = self.key(at, Purpose::Binarisation);
        let pixels = self
            .settings
            .binarise
            .then(|| (key, vec![key.uniform(0.0, 1.0, samples * self.networks.shape.numel())]));
        let key = self.key(at, Purpose::Posterior);
        let noise = (key, vec![key.normal(samples * self.networks.latent_dim)]);
        pixels.into_iter().chain([noise]).collect()
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        Box::new(Computing { vae: self, draws: Draws::default() })
    }

    fn optimizer(&self, _phase: Phase, steps: u64) -> Optimizer {
        optimizer::of_job(&self.job, steps)
    }

    fn average_decay(&self, _network: NetworkId, steps: u64) -> f64 {
        annealing::average_decay(&self.job, self.seen(steps), self.seen(steps))
    }

    fn sampler(&self) -> Option<&dyn Sampler> {
        Some(self)
    }

    fn evaluator(&self) -> Option<&dyn Evaluator> {
        Some(self)
    }

    fn weights_file(&self) -> Option<WeightsFile> {
        let (model, networks) = (&self.job.model, &self.networks);
        let items = [
            ("model", model.kind.to_string()),
            ("likelihood", self.settings.likelihood.to_string()),
            ("latent_dim", model.latent_dim.to_string()),
            ("width", model.width.to_string()),
            ("classes", networks.classes.to_string()),
            ("channels", networks.shape.channels.to_string()),
            ("height", networks.shape.height.to_string()),
        ];
        let names =
            (!self.class_names.is_empty()).then(|| (CLASS_NAMES, json!(self.class_names).to_string()));
        let about = items.into_iter().chain(names).map(|(key, value)| (key.to_string(), value));
        Some(WeightsFile {
            name: WEIGHTS_FILE.to_string(),
            sections: AUTOENCODER.map(|own| (format!("ema_{own}"), own.to_string())).to_vec(),
            constants: Vec::new(),
            about: about.collect::<BTreeMap<_, _>>(),
        })
    }

    fn probe(&self, shard_batch: u32) -> Box<dyn Objective> {
        let mut probe = self.clone();
        probe.job.job.shard_batch = shard_batch;
        Box::new(probe)
    }
}

impl Sampler for Vae {
    fn draw(&self, layout: &StateLayout, snapshot: &Snapshot, key: Key, count: u32) -> Tensor {
        let weights = Vae::average(layout.network(DECODER), snapshot, Device::Cpu);
        Generator::of_decoder(&self.networks, weights).draw_for(key.purpose, key.seed, count)
    }

    fn classes(&self) -> u32 {
        self.networks.classes
    }
}

/// Computation of one member's gradients.
struct Computing<'a> {
    vae: &'a Vae,
    /// Draws that were made ahead.
    draws: Draws,
}

impl Compute for Computing<'_> {
    fn keep(&mut self, draws: Draws) {
        self.draws.add(draws);
    }

    fn gradient(
        &mut self,
        at: ShardAt,
        state: &State,
        batch: Option<&ShardBatch>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let Computing { vae, draws } = self;
        let batch = batch.expect("the phase reads samples");
        let key = vae.key(at, Purpose::Binarisation);
        let uniform = |count| draws.get(key, vae.device, || key.uniform(0.0, 1.0, count));
        let images = vae.pixels(batch, uniform);
        let key = vae.key(at, Purpose::Posterior);
        let noise = draws.get(key, vae.device, || key.normal(vae.latent_numel(&images)));
        let noise = noise.view([images.size()[0], -1]);
        let weights = Weights { encoder: state.trainable(ENCODER), decoder: state.trainable(DECODER) };
        let terms = vae.terms(&images, &noise, weights, vae.classes(batch));
        let loss = vae.loss(&terms).sum(None);
        let parameters: Vec<&Tensor> = weights.encoder.iter().chain(weights.decoder).collect();
        // New tensors: what autograd keeps in parameters would be added in its own order (D3).
        let placed = PlacedGradients::new(out.gradients.iter_mut().zip(parameters.iter().copied()))?;
        let gradients = Tensor::f_run_backward(&[&loss], &parameters, false, false)?;
        drop(placed);
        copy_all(out.gradients.iter_mut().zip(&gradients))?;
        no_grad(|| {
            let sums = [loss, terms.recon.sum(None), terms.kl.sum(None)];
            for (place, sum) in out.scalars.iter_mut().zip(&sums) {
                place.copy_(sum);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
