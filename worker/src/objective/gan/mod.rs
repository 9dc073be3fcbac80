//! Generative adversarial networks (Goodfellow et al., 2014): the discriminator's phases, then the
//! generator's.
//!
//! 1. The generator's samples carry no gradient into a discriminator phase, and the discriminator is a
//!    constant in the generator's phase.
//! 2. The samples of a step's last discriminator phase are those of its generator phase too, as in DCGAN's
//!    training loop. Whether they are kept from the one to the other or drawn again changes no bit.
//!
//! The scalars of a gradient are the summed loss; in a discriminator's, its outputs for the real samples and
//! for the generator's, and the signs of the former. Nothing is decided by the outputs.

mod ahead;
pub(crate) mod augment;
mod discriminator;
mod generator;
pub mod loss;
mod penalties;
pub(crate) mod schedule;
mod together;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use c10d::aten::{PlacedGradients, add_all, copy_all, is_in_place};
use ganglion_proto::job::{Job, PhaseOptimizer};
use ganglion_proto::words::counted;
use serde_json::json;
use tch::{Device, Kind, Tensor, no_grad};

use self::augment::{Probability, augment};
use self::schedule::{AUGMENTATION, Schedule};
use super::{
    Compute, NamedNetwork, NetworkId, Objective, Optimizer, Phase, Reads, ScalarRole, ScalarSpec, Setting,
    ShardAt, ShardBatch, ShardGrad, ShardsAt, Unsuitable, images_of, optimizer,
};
use crate::checkpoint::{Snapshot, WeightsFile};
use crate::data::DataSet;
use crate::nn::{Init, Models, Network, Pass, TensorSpec, first_layers, layers};
use crate::random::{Draws, Key, Purpose};
use crate::sampling::{CLASS_NAMES, Critic, Generator, Sampler};
use crate::state::{State, StateLayout};

/// Noise to images.
pub const GENERATOR: NetworkId = NetworkId(0);
/// Images to logits.
pub const DISCRIMINATOR: NetworkId = NetworkId(1);

/// Index of the controller of adaptive augmentation among the objective's own tensors: the probability, and
/// the sum that decides its next change.
const CONTROLLER: usize = 0;

/// Number of scalars beside the loss: the D outputs for real and for generated samples, and the signs of
/// the logits of real samples, the input of adaptive augmentation.
const SCORES: usize = 3;
/// Place of the signs among all scalars.
const SIGNS: i64 = 3;

/// Maximum number of data shards whose generated samples are kept, with all that their backward pass needs,
/// from the discriminator's phase to the generator's. Those of other shards are drawn again. A larger
/// number takes more memory.
// A graph of a shard is many times as large as its samples.
const KEPT: usize = 8;

type Scores = [Option<Tensor>; SCORES];

/// Passes of a shard gradient; each has its own key for the networks' own draws.
#[derive(Clone, Copy)]
pub(super) enum PassId {
    /// The generator's forward pass.
    Drawing = 0,
    /// The discriminator on real samples, or on all at once.
    Real = 1,
    /// The discriminator on generated samples.
    Fake = 2,
    /// The discriminator, for a penalty.
    Penalty = 3,
}

/// Shard whose gradient is computed, and the state that it is computed at.
#[derive(Clone, Copy)]
pub struct Point<'a> {
    /// The shard, with step and phase.
    pub at: ShardAt,
    /// The state.
    pub state: &'a State,
    /// Draws that were made ahead.
    pub draws: &'a Draws,
}

/// Generated samples of neighbouring data shards, with the graph for a backward pass.
pub struct FakeBatch {
    /// The data shards, whose samples lie one after the other.
    pub shards: Range<u32>,
    fake: Tensor,
    /// Classes of the samples, where the model is conditional.
    classes: Option<Tensor>,
    statistics: Vec<Tensor>,
}

/// Summand of a shard gradient. The discriminator's summands come from real samples, from generated ones,
/// and from the penalty.
pub struct GradPart {
    loss: Tensor,
    /// Sums of D outputs for real and for generated samples, and of signs, where this part has them.
    scores: Scores,
    gradients: Vec<Tensor>,
    statistics: Vec<Tensor>,
}

/// The samples that a shard's gradient is computed from.
pub enum Input<'a> {
    /// Discriminator phase: real samples, their part of the gradient if known, and generated samples.
    Samples(&'a ShardBatch, Option<GradPart>, &'a FakeBatch),
    /// Generator phase: generated samples, and the real samples of the step's last discriminator phase for
    /// a pairwise objective.
    Fake(FakeBatch, Option<&'a ShardBatch>),
}

/// The GAN of a job.
pub struct Gan {
    /// The job.
    pub job: Job,
    /// Generator and discriminator.
    pub models: Models,
    /// The class of each sample of the data, where the model is conditional.
    pub labels: Vec<u32>,
    /// Names of the classes; empty where they are numbers.
    pub class_names: Vec<String>,
    /// Compute device.
    pub device: Device,
}

/// Makes the GAN of a job, for its data.
///
/// # Errors
/// The networks do not fit the data or the job.
pub(super) fn make(job: &Job, data: &DataSet, device: Device) -> Result<Arc<dyn Objective>, Unsuitable> {
    let models = Models::with_classes(&job.model, images_of(job, data)?, data.classes());
    let models = models.map_err(|error| Unsuitable(error.to_string()))?;
    // A number beyond is most likely a mistake: there are no such layers.
    let (wanted, there) = (job.model.freeze_discriminator, layers(&models.discriminator.parameters()));
    if wanted > there {
        return Err(Unsuitable(format!(
            "model.freeze_discriminator is {wanted}, but the discriminator has {}; choose at most {there}",
            counted(there, "layer")
        )));
    }
    let (labels, class_names) = (data.labels().to_vec(), data.class_names().to_vec());
    Ok(Arc::new(Gan { job: job.clone(), models, labels, class_names, device }))
}

/// Networks of a GAN: the generator, whose average draws samples, then the discriminator.
pub fn networks(models: &Models) -> Vec<NamedNetwork> {
    let named = |name: &'static str, network: &dyn Network, average: Option<&'static str>| NamedNetwork {
        name: name.into(),
        parameters: network.parameters(),
        buffers: network.buffers(),
        average: average.map(Into::into),
    };
    vec![
        named("generator", &*models.generator, Some("ema")),
        named("discriminator", &*models.discriminator, None),
    ]
}

/// Phases of every step, in order: the discriminator's, then the generator's.
pub fn phases(job: &Job) -> Vec<Phase> {
    let updates = job.loss.discriminator_steps;
    let discriminator = (0..updates).map(|index| Phase::of(index, DISCRIMINATOR, Reads::Next));
    // The pairs of the generator's loss are those of the discriminator's last phase.
    let reads = if job.loss.kind.pairs() { Reads::Same } else { Reads::Nothing };
    discriminator.chain([Phase::of(updates, GENERATOR, reads)]).collect()
}

impl Objective for Gan {
    fn networks(&self) -> Vec<NamedNetwork> {
        let mut networks = networks(&self.models);
        let parameters = &mut networks[DISCRIMINATOR.0].parameters;
        let frozen = first_layers(parameters, self.job.model.freeze_discriminator);
        // Layers that stay as they began: a weight decay would move them without a gradient.
        parameters[..frozen].iter_mut().for_each(|spec| spec.decays = false);
        networks
    }

    fn own_tensors(&self) -> Vec<TensorSpec> {
        let controller =
            || TensorSpec::parameter("augmentation.controller".to_string(), &[2], Init::Constant(0.0));
        // A part of the state, so that a resumed run goes on with the same probability.
        if self.job.augmentation.adaptive { vec![controller()] } else { Vec::new() }
    }

    fn phases(&self) -> Vec<Phase> {
        phases(&self.job)
    }

    fn scalars(&self, phase: Phase) -> Vec<ScalarSpec> {
        if phase.updates.contains(GENERATOR) {
            return vec![ScalarSpec::new("loss_generator", ScalarRole::Loss)];
        }
        vec![
            ScalarSpec::new("loss_discriminator", ScalarRole::Loss),
            ScalarSpec::new("score_real", ScalarRole::Diagnostic),
            ScalarSpec::new("score_fake", ScalarRole::Diagnostic),
            ScalarSpec::new("signs", ScalarRole::Internal),
        ]
    }

    fn settings(&self) -> Vec<Setting<'_>> {
        let (job, augmentation) = (&self.job, &self.job.augmentation);
        let probability = |_: u64, state: &State| state.own(CONTROLLER).double_value(&[0]);
        let adaptive = augmentation
            .adaptive
            .then(|| Setting { name: AUGMENTATION.into(), value: Box::new(probability) });
        // A schedule of a probability that applies to nothing, or that the controller sets, moves nothing.
        let has_schedule = !augmentation.adaptive && !augmentation.kinds.is_empty();
        let scheduled = Schedule::moving(job).filter(|(name, _)| *name != AUGMENTATION || has_schedule);
        let scheduled = scheduled.map(|(name, value)| Setting {
            name: name.into(),
            value: Box::new(move |steps, _: &State| value(&Schedule::after(job, steps))),
        });
        scheduled.chain(adaptive).collect()
    }

    /// With batch normalisation the discriminator sees real and generated samples apart.
    fn passes(&self, phase: Phase) -> usize {
        if phase.updates.contains(DISCRIMINATOR) && self.models.discriminator.sees_batch() { 2 } else { 1 }
    }

    fn draws(&self, at: ShardAt) -> Vec<(Key, Vec<Tensor>)> {
        self.draws_of(at)
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        Box::new(Course { gan: self, draws: Draws::default(), drawn: Vec::new(), ahead: None })
    }

    fn optimizer(&self, phase: Phase, steps: u64) -> Optimizer {
        let of_all = &self.job.optimizer;
        let own = of_all.of_all();
        // Two learning rates, as in Heusel et al. (2017).
        let own = if phase.updates.contains(GENERATOR) {
            own
        } else {
            PhaseOptimizer {
                learning_rate: of_all.discriminator_learning_rate,
                final_learning_rate: of_all.final_discriminator_learning_rate,
                ..own
            }
        };
        optimizer::scheduled(&own, of_all, steps, self.job.samples_per_step())
    }

    fn average_decay(&self, _network: NetworkId, steps: u64) -> f64 {
        Schedule::after(&self.job, steps).average_decay()
    }

    fn after_update(&self, phase: Phase, updates: u64, scalars: &Tensor, state: &State) {
        // The signs are those of its logits for real samples.
        if self.job.augmentation.adaptive && phase.updates.contains(DISCRIMINATOR) {
            augment::adjust(&self.job, &state.own(CONTROLLER), &scalars.narrow(0, SIGNS, 1), updates);
        }
    }

    fn sampler(&self) -> Option<&dyn Sampler> {
        Some(self)
    }

    fn weights_file(&self) -> Option<WeightsFile> {
        let (job, models) = (&self.job, &self.models);
        let script = job.model.generator.as_ref().map(|path| ("generator", path.display().to_string()));
        let items = [
            ("model", job.model.kind.to_string()),
            ("latent_dim", job.model.latent_dim.to_string()),
            ("width", job.model.width.to_string()),
            ("classes", models.classes.to_string()),
            ("channels", models.shape.channels.to_string()),
            ("height", models.shape.height.to_string()),
        ];
        let (height, width) = (models.shape.height, models.shape.width);
        // Only where it is another: the bytes of square ones stay as they always were.
        let side = (width != height).then(|| ("image_width", width.to_string()));
        let names =
            (!self.class_names.is_empty()).then(|| (CLASS_NAMES, json!(self.class_names).to_string()));
        let items = items
            .into_iter()
            .chain(side)
            .chain(names)
            .chain(script)
            .map(|(key, value)| (key.to_string(), value));
        Some(WeightsFile {
            name: "generator_ema.safetensors".to_string(),
            sections: vec![("ema.".to_string(), String::new())],
            constants: models.generator.constants().to_vec(),
            about: items.collect::<BTreeMap<_, _>>(),
        })
    }

    /// The classes of generated samples are drawn from each class once.
    fn probe(&self, shard_batch: u32) -> Box<dyn Objective> {
        let (mut job, models) = (self.job.clone(), self.models.clone());
        job.job.shard_batch = shard_batch;
        // The data are substituted, so their frequencies must not enter the fingerprint of the
        // environment.
        let (labels, class_names) = ((0..models.classes).collect(), Vec::new());
        Box::new(Gan { job, labels, class_names, models, device: self.device })
    }
}

impl Sampler for Gan {
    fn draw(&self, layout: &StateLayout, snapshot: &Snapshot, key: Key, count: u32) -> Tensor {
        let generator = Generator::of_average(&self.models, layout.network(GENERATOR), snapshot);
        generator.draw_for(key.purpose, key.seed, count)
    }

    fn classes(&self) -> u32 {
        self.models.classes
    }

    fn critic(&self, layout: &StateLayout, snapshot: &Snapshot) -> Option<Critic> {
        let (network, classes) = (self.models.discriminator.clone(), self.models.classes);
        Some(Critic::of(network, classes, layout.network(DISCRIMINATOR), snapshot))
    }
}

/// Computation of one member's gradients: what is kept from phase to phase.
struct Course<'a> {
    gan: &'a Gan,
    /// Draws that were made ahead.
    draws: Draws,
    /// Generated samples kept for the generator's phase.
    drawn: Vec<FakeBatch>,
    /// The real samples' part of a discriminator gradient in a phase to come.
    ahead: Option<(ShardAt, GradPart)>,
}

impl Compute for Course<'_> {
    fn gradient(
        &mut self,
        at: ShardAt,
        state: &State,
        batch: Option<&ShardBatch>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let Course { gan, draws, drawn, ahead } = self;
        let point = Point { at, state, draws };
        let draw = || gan.draw(point, batch);
        // A phase of the generator may have real samples too, for pairs.
        let Some(real) = batch.filter(|_| at.phase.updates.contains(DISCRIMINATOR)) else {
            // Kept in the discriminator's last phase; else drawn again, with the same key and so the
            // same bits.
            let fake = taken(drawn, &(at.shard..at.shard + 1)).unwrap_or_else(draw);
            return gan.compute(point, Input::Fake(fake, batch), out);
        };
        // Only kept samples need a graph: the discriminator's gradient detaches them.
        let keep = gan.serves_generator(at.phase) && kept(drawn) < KEPT;
        let fake = if keep { draw() } else { no_grad(draw) };
        // Only for exactly this phase: after a regroup it is of no use.
        let of_real = ahead.take_if(|(of, _)| *of == at).map(|(_, part)| part);
        gan.compute(point, Input::Samples(real, of_real, &fake), out)?;
        if keep {
            drawn.push(fake);
        }
        Ok(())
    }

    fn keep(&mut self, draws: Draws) {
        self.draws.add(draws);
    }

    fn most_together(&self, _phase: Phase) -> u32 {
        if self.gan.takes_shards_together() { self.gan.most_together() } else { 1 }
    }

    fn gradients(
        &mut self,
        at: &ShardsAt,
        state: &State,
        batch: Option<&ShardBatch>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let Course { gan, draws, drawn, .. } = self;
        let draw = || gan.draw_together(at, state, draws);
        let Some(real) = batch else {
            let fake = taken(drawn, &at.shards).unwrap_or_else(draw);
            return gan.generator_together(at, state, &fake, out);
        };
        let keep = gan.serves_generator(at.phase) && gan.keeps_together(drawn, at.count());
        let fake = if keep { draw() } else { no_grad(draw) };
        gan.discriminator_together(at, state, (real, &fake), out)?;
        if keep {
            drawn.push(fake);
        }
        Ok(())
    }

    /// With batch normalisation the discriminator sees real samples apart, and the generator's update does
    /// not change their part of the gradient.
    fn looks_ahead(&self) -> bool {
        self.gan.tells_real_apart()
    }

    fn look_ahead(&mut self, at: ShardAt, state: &State, batch: &ShardBatch) -> Result<(), c10d::Error> {
        // One part for one shard: the next gradient uses it, or it is replaced.
        let point = Point { at, state, draws: &self.draws };
        self.ahead = Some((at, self.gan.real_part(point, batch)?));
        Ok(())
    }
}

impl Gan {
    /// Fills `out` with the gradient of a shard.
    pub fn compute(
        &self,
        point: Point<'_>,
        input: Input<'_>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let placed = |out: &mut ShardGrad, network, frozen| {
            let pairs = out.gradients.iter_mut().zip(point.state.trainable(network));
            PlacedGradients::new(pairs.skip(frozen))
        };
        let (parts, frozen) = match input {
            Input::Samples(real, of_real, drawn) => {
                let frozen = self.frozen_tensors();
                let _placed = placed(out, DISCRIMINATOR, frozen)?;
                (self.discriminator(point, real, of_real, drawn)?, frozen)
            }
            // Frozen layers are the discriminator's.
            Input::Fake(drawn, real) => {
                let _placed = placed(out, GENERATOR, 0)?;
                (vec![self.generator(point, drawn, real)?], 0)
            }
        };
        no_grad(|| fill(out, &parts, f64::from(self.job.job.shard_batch), frozen))?;
        Ok(())
    }

    /// Whether the samples generated in a phase are those of the generator's phase too.
    pub fn serves_generator(&self, phase: Phase) -> bool {
        // Its last phase draws by the key that the generator's phase uses (`draw`).
        phase.index + 1 == self.job.loss.discriminator_steps
    }

    /// Whether the objective compares pairs, so that the generator's phase needs real samples.
    pub fn pairs(&self) -> bool {
        self.job.loss.kind.pairs()
    }

    /// Whether the discriminator sees real samples in a pass apart from the generated ones.
    pub fn tells_real_apart(&self) -> bool {
        self.models.discriminator.sees_batch() && !self.pairs()
    }

    /// Forward pass of the discriminator with the given parameters.
    pub(super) fn look<'a>(&self, point: Point<'a>, which: PassId, parameters: &'a [Tensor]) -> Pass<'a> {
        // A key for each pass, as dropout must not repeat its draws in the next one.
        let key = own(self.key(point.at, Purpose::Network), which);
        Pass::batch(parameters, point.state.buffers(DISCRIMINATOR), key)
    }

    /// Logits of the discriminator for images, after augmentation.
    pub(super) fn seen(
        &self,
        point: Point<'_>,
        which: PassId,
        images: &Tensor,
        pass: &mut Pass<'_>,
    ) -> Tensor {
        self.models.discriminator.forward(&self.augmented(point, which, images), pass)
    }

    pub(super) fn augmented(&self, point: Point<'_>, which: PassId, images: &Tensor) -> Tensor {
        let Point { at, state, draws } = point;
        let kinds = &self.job.augmentation.kinds;
        // No draw is made, and no bit of such a job depends on augmentation.
        if kinds.is_empty() {
            return images.shallow_clone();
        }
        let fixed = || Probability::Fixed(Schedule::after(&self.job, at.step).augmentation());
        // By reference to the state, without a wait for a GPU.
        let controlled = || Probability::Adaptive(state.own(CONTROLLER).narrow(0, 0, 1));
        let probability = if self.job.augmentation.adaptive { controlled() } else { fixed() };
        let key = own(self.key(at, Purpose::Augmentation), which);
        let draws = draws.get(key, self.device, || augment::draws(kinds, key, self.shard_batch()));
        augment(kinds, &probability, &draws, images)
    }

    /// Real samples, mirrored at random where the job allows flips.
    pub(super) fn mirrored(&self, point: Point<'_>, real: &ShardBatch) -> Tensor {
        if !self.job.augmentation.flip {
            return real.images().shallow_clone();
        }
        // A pass that augments nothing, so that this key is used once.
        let key = own(self.key(point.at, Purpose::Augmentation), PassId::Drawing);
        let draws = point.draws.get(key, self.device, || augment::mirror_draws(key, self.shard_batch()));
        augment::mirror(&draws, real.images())
    }

    pub(super) fn signs(&self, real: &Tensor) -> Option<Tensor> {
        self.job.augmentation.adaptive.then(|| loss::signs(real))
    }

    /// Number of the discriminator's first tensors that stay frozen.
    pub(super) fn frozen_tensors(&self) -> usize {
        match self.job.model.freeze_discriminator {
            0 => 0,
            layers => first_layers(&self.models.discriminator.parameters(), layers),
        }
    }

    pub(super) fn key(&self, at: ShardAt, purpose: Purpose) -> Key {
        let ShardAt { phase, step, shard } = at;
        Key { seed: self.job.job.seed, step, phase: phase.index, shard, purpose }
    }

    pub(super) fn shard_batch(&self) -> usize {
        self.job.job.shard_batch as usize
    }
}

/// Takes the samples of exactly these shards, if they were kept.
fn taken(drawn: &mut Vec<FakeBatch>, shards: &Range<u32>) -> Option<FakeBatch> {
    let kept = drawn.iter().position(|drawn| drawn.shards == *shards)?;
    Some(drawn.swap_remove(kept))
}

/// Number of shards whose samples are kept.
fn kept(drawn: &[FakeBatch]) -> usize {
    drawn.iter().map(|drawn| drawn.shards.len()).sum()
}

/// Returns a part with the gradient of its loss.
fn part(
    loss: Tensor,
    scores: Scores,
    parameters: &[Tensor],
    statistics: Vec<Tensor>,
) -> Result<GradPart, c10d::Error> {
    // New tensors for each part: what autograd keeps in parameters would be added in its own order (D3).
    let gradients = Tensor::f_run_backward(&[&loss], parameters, false, false)?;
    Ok(GradPart { loss, scores, gradients, statistics })
}

/// Whether all these parameters are fp32.
fn is_single(parameters: &[Tensor]) -> bool {
    parameters.iter().all(|parameter| parameter.kind() == Kind::Float)
}

/// Adds the parts of a shard's gradient up, in their order. The first `frozen` tensors have no gradient: with
/// moments of zero every optimizer leaves them exactly as they are.
fn fill(out: &mut ShardGrad, parts: &[GradPart], batch: f64, frozen: usize) -> Result<(), c10d::Error> {
    // One of a tensor's first two parts may be there already: their sum has the same bits in either order.
    let is_there = |(at, place): (usize, &Tensor)| {
        parts.iter().any(|part| part.gradients.get(at).is_some_and(|gradient| is_in_place(place, gradient)))
    };
    let mut written: Vec<bool> = out.gradients.iter().enumerate().map(is_there).collect();
    for part in parts {
        // A parameter that a part of the loss does not depend on has no gradient from that part.
        let pairs = out.gradients.iter_mut().zip(&part.gradients).zip(&mut written).skip(frozen);
        let pairs =
            pairs.filter(|((place, gradient), _)| gradient.defined() && !is_in_place(place, gradient));
        let (mut copied, mut added) = (Vec::new(), Vec::new());
        for (pair, written) in pairs {
            // Copied at first, and not added to zeros: -0.0 + 0.0 has other bits.
            if std::mem::replace(written, true) { added.push(pair) } else { copied.push(pair) }
        }
        copy_all(copied.into_iter())?;
        add_all(added.into_iter())?;
    }
    for (place, _) in out.gradients.iter_mut().zip(written).filter(|(_, written)| !written) {
        let _ = place.zero_();
    }
    let statistics = parts.iter().flat_map(|part| &part.statistics);
    for (place, statistic) in out.statistics.iter_mut().zip(statistics) {
        // Updates are means over the b samples of a shard; times b the division by V x b makes them a
        // mean over shards.
        place.copy_(&(statistic * batch));
    }
    if let Some((loss, scores)) = out.scalars.split_first_mut() {
        sum_into(loss, parts.iter().map(|part| &part.loss));
        for (of, place) in scores.iter_mut().enumerate() {
            sum_into(place, parts.iter().filter_map(|part| part.scores[of].as_ref()));
        }
    }
    Ok(())
}

/// Writes a sum to its place, zero without terms.
fn sum_into<'a>(place: &mut Tensor, mut terms: impl Iterator<Item = &'a Tensor>) {
    match terms.next() {
        Some(first) => place.copy_(first),
        None => drop(place.zero_()),
    }
    for term in terms {
        let _ = place.g_add_(term);
    }
}

/// Key of a network's own draws in one pass of a gradient.
fn own(key: Key, look: PassId) -> Key {
    // Four passes for each phase, so no two have the same key.
    Key { phase: 4 * key.phase + look as u32, ..key }
}

fn signed(n: usize) -> i64 {
    i64::try_from(n).expect("a small count")
}
