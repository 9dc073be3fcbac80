//! Phases and their leaves: what one data shard contributes to one update.
//!
//! 1. A leaf is a function of (job, state, phase, shard, the shard's real samples): it reads state and writes
//!    none.
//! 2. It has a buffer of its own, and parameters keep no gradient, so that autograd never adds one leaf to
//!    another.
//! 3. The generator's samples carry no gradient into a discriminator phase, and the discriminator is a
//!    constant in the generator's phase.
//! 4. The samples of a step's last discriminator phase are those of its generator phase too, as in DCGAN's
//!    training loop. Whether they are kept from the one to the other or drawn again changes no bit.
//!
//! A leaf's buffer holds, in this order: the gradient of the summed loss, laid out as the module's
//! parameters; b times the batch statistics of each pass, laid out as its buffers (for others of its buffers
//! b times what they shall follow); the summed loss; in a discriminator's, what it says of the real samples
//! and of the generator's, and the signs of the former. All become means over the global batch when the sum
//! of the leaves is divided by V x b. The scores are for people: nothing is decided by them.

use std::ops::Range;

use ganglion_proto::job::Job;
use tch::{Device, Kind, Tensor, no_grad};

use crate::augment::{self, Probability, augment};
use crate::loss;
use crate::nn::{Models, Pass, first_layers};
use crate::random::{Key, Purpose};
use crate::schedule::Schedule;
use crate::state::{ALIGNMENT, Layout, Module, State, StateLayout, narrow};

/// One update of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Its place in the step.
    pub index: u32,
    /// What it updates.
    pub module: Module,
}

/// Where a leaf belongs: its draws are keyed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    /// The phase.
    pub phase: Phase,
    /// Steps done before.
    pub step: u64,
    /// The data shard.
    pub shard: u32,
}

/// The passes of a leaf whose networks' own draws must differ.
#[derive(Clone, Copy)]
enum Look {
    /// The generator, as it draws.
    Drawing = 0,
    /// The discriminator, at real samples or at all in one.
    Real = 1,
    /// The discriminator, at the generator's samples.
    Fake = 2,
    /// The discriminator, for a penalty.
    Penalty = 3,
}

/// The real samples of a data shard.
#[derive(Debug)]
pub struct Real {
    /// (b, c, h, w), in [-1, 1].
    pub images: Tensor,
    /// Their classes, (b) of int64, where the model is conditional.
    pub classes: Option<Tensor>,
}

/// The phases of every step, in order: the discriminator's, then the generator's.
pub fn phases(job: &Job) -> Vec<Phase> {
    let discriminator =
        (0..job.loss.discriminator_steps).map(|index| Phase { index, module: Module::Discriminator });
    let last = Phase { index: job.loss.discriminator_steps, module: Module::Generator };
    discriminator.chain([last]).collect()
}

/// Where things lie in a leaf of one module's phases, in floats.
#[derive(Clone, Debug, PartialEq)]
pub struct LeafLayout {
    parameters: Layout,
    buffers: Layout,
    passes: usize,
}

impl LeafLayout {
    /// The layout of `module`'s leaves.
    pub fn new(models: &Models, layout: &StateLayout, module: Module) -> LeafLayout {
        let sections = layout.module(module);
        // With batch normalisation the discriminator sees real and fake samples apart.
        let passes = match module {
            Module::Discriminator if models.discriminator.sees_batch() => 2,
            _ => 1,
        };
        LeafLayout::of(sections.parameters.clone(), sections.buffers.clone(), passes)
    }

    /// A layout for these parameters, and for the batch statistics of so many passes.
    pub fn of(parameters: Layout, buffers: Layout, passes: usize) -> LeafLayout {
        LeafLayout { parameters, buffers, passes }
    }

    /// Place of the gradient.
    pub fn gradient(&self) -> Range<usize> {
        0..self.parameters.len()
    }

    /// Places of the batch statistics, pass by pass.
    pub fn statistics(&self) -> impl Iterator<Item = Range<usize>> {
        let (start, len) = (self.parameters.len(), self.buffers.len());
        (0..self.passes).map(move |pass| start + pass * len..start + (pass + 1) * len)
    }

    /// Place of the loss.
    pub fn loss(&self) -> usize {
        self.parameters.len() + self.passes * self.buffers.len()
    }

    /// Places of the scores of real samples and of the generator's.
    pub fn scores(&self) -> Range<usize> {
        self.loss() + 1..self.loss() + 3
    }

    /// Place of the signs of the logits of real samples, which a controller of augmentation goes by.
    pub fn signs(&self) -> Range<usize> {
        self.loss() + 3..self.loss() + 4
    }

    /// Floats that decide something.
    pub fn decisive(&self) -> Range<usize> {
        0..self.loss() + 1
    }

    /// Floats in a leaf: a multiple of [`ALIGNMENT`].
    pub fn len(&self) -> usize {
        self.loss() + ALIGNMENT
    }

    /// Never: a leaf has its loss at least.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// What a leaf tells besides its loss: the scores of real samples and of the generator's, and the signs.
const SCORES: usize = 3;
type Scores = [Option<Tensor>; SCORES];

/// Memory for one leaf.
pub struct LeafBuffer {
    /// All of it, and room to spare behind it.
    pub flat: Tensor,
    gradients: Vec<Tensor>,
    statistics: Vec<Tensor>,
    loss: Tensor,
    scores: [Tensor; SCORES],
}

impl LeafBuffer {
    /// A buffer of `capacity` floats, at least the layout's.
    pub fn new(layout: &LeafLayout, capacity: usize, device: Device) -> LeafBuffer {
        assert!(capacity >= layout.len(), "a leaf needs {} floats", layout.len());
        let capacity = i64::try_from(capacity).expect("fewer than 2^63 floats");
        let flat = Tensor::zeros([capacity], (Kind::Float, device));
        let statistics = layout.statistics();
        LeafBuffer {
            gradients: layout.parameters.views(&narrow(&flat, layout.gradient())),
            statistics: statistics.flat_map(|range| layout.buffers.views(&narrow(&flat, range))).collect(),
            loss: narrow(&flat, layout.loss()..layout.loss() + 1),
            scores: std::array::from_fn(|at| layout.scores().start + at).map(|at| narrow(&flat, at..at + 1)),
            flat,
        }
    }

    /// All of the contribution: the gradient, the buffer updates, the scalars.
    pub fn contents(&self) -> [Vec<&Tensor>; 3] {
        let scalars = std::iter::once(&self.loss).chain(&self.scores);
        [self.gradients.iter().collect(), self.statistics.iter().collect(), scalars.collect()]
    }
}

/// What the generator has drawn for a data shard, and how, so that a gradient can go back through it.
pub struct Drawn {
    /// The data shard.
    pub shard: u32,
    fake: Tensor,
    /// The classes that they are of, where the model is conditional.
    classes: Option<Tensor>,
    statistics: Vec<Tensor>,
}

/// A part of a leaf: of the discriminator's, what comes from real samples, from the generator's, and from the
/// penalty.
pub struct LeafPart {
    loss: Tensor,
    /// Of real samples and of the generator's, where it looks at them.
    scores: Scores,
    gradients: Vec<Tensor>,
    statistics: Vec<Tensor>,
}

/// What a leaf is computed from.
pub enum Input<'a> {
    /// Real samples, what is known of their part, and the generator's samples, in a discriminator's phase.
    Samples(&'a Real, Option<LeafPart>, &'a Drawn),
    /// What the generator has drawn, in its phase, and the real samples of the step's last discriminator
    /// phase where the objective looks at pairs.
    Drawn(Drawn, Option<&'a Real>),
}

/// Computes leaves of a job.
pub struct Leaves<'a> {
    /// The job.
    pub job: &'a Job,
    /// Its networks.
    pub models: &'a Models,
    /// The class of each sample of the data, where the model is conditional.
    pub labels: &'a [u32],
    /// Where to compute.
    pub device: Device,
}

impl Leaves<'_> {
    /// Draws the generator's samples for a leaf. Under `no_grad` they cannot begin a generator's leaf. `real`
    /// are the shard's real samples, where the objective looks at pairs.
    pub fn draw(&self, spot: Spot, state: &State, real: Option<&Real>) -> Drawn {
        // The generator's phase takes the samples of the discriminator's last one.
        let last = self.job.loss.discriminator_steps.saturating_sub(1);
        let phase = Phase { index: spot.phase.index.min(last), ..spot.phase };
        let key = |purpose| self.key(Spot { phase, ..spot }, purpose);
        let latent = signed(self.models.latent_dim);
        let noise = key(Purpose::Noise).normal(self.shard_batch() * self.models.latent_dim);
        let noise = noise.view([-1, latent]).to_device(self.device);
        let classes = (self.models.classes > 0).then(|| self.classes(key(Purpose::Classes), real));
        let (parameters, buffers) = (state.trainable(Module::Generator), state.buffers(Module::Generator));
        let pass = Pass::batch(parameters, buffers, own(key(Purpose::Network), Look::Drawing));
        let mut pass = pass.of(classes.as_ref());
        let fake = self.models.generator.forward(&noise, &mut pass);
        let statistics = pass.statistics;
        Drawn { shard: spot.shard, fake, classes, statistics }
    }

    /// The classes of the generator's samples: those of the real samples that they are paired with, or else
    /// as often as in the data.
    fn classes(&self, key: Key, real: Option<&Real>) -> Tensor {
        if let Some(classes) = real.filter(|_| self.pairs()).and_then(|real| real.classes.as_ref()) {
            return classes.shallow_clone();
        }
        let below = u32::try_from(self.labels.len()).expect("a data set has fewer than 2^32 samples");
        let drawn = key.indices(below, self.shard_batch());
        let classes: Vec<i64> = drawn.into_iter().map(|at| i64::from(self.labels[at as usize])).collect();
        Tensor::from_slice(&classes).to_device(self.device)
    }

    /// Fills `out` with the leaf of `spot`.
    pub fn compute(
        &self,
        spot: Spot,
        state: &State,
        input: Input<'_>,
        out: &mut LeafBuffer,
    ) -> Result<(), c10d::Error> {
        let (parts, frozen) = match input {
            Input::Samples(real, of_real, drawn) => {
                (self.discriminator(spot, state, real, of_real, drawn)?, self.frozen_tensors())
            }
            Input::Drawn(drawn, real) => (vec![self.generator(spot, drawn, real, state)?], 0),
        };
        no_grad(|| fill(out, &parts, f64::from(self.job.job.shard_batch), frozen));
        Ok(())
    }

    /// Whether the samples that the generator draws in a phase are those of its own phase too.
    pub fn serves_generator(&self, phase: Phase) -> bool {
        phase.index + 1 == self.job.loss.discriminator_steps
    }

    /// Whether the objective looks at pairs, so that the generator's phase needs real samples.
    pub fn pairs(&self) -> bool {
        self.job.loss.kind.pairs()
    }

    /// Whether the discriminator looks at real samples apart from the generator's.
    pub fn tells_real_apart(&self) -> bool {
        self.models.discriminator.sees_batch() && !self.pairs()
    }

    /// The part of a discriminator's leaf that comes from real samples, where it looks at them apart. A
    /// commit of the generator does not change it.
    pub fn real_part(&self, spot: Spot, state: &State, real: &Real) -> Result<LeafPart, c10d::Error> {
        let kind = self.job.loss.kind;
        let parameters = state.trainable(Module::Discriminator);
        let mut pass = self.look(spot, state, Look::Real, parameters).of(real.classes.as_ref());
        let logits = self.seen(spot, state, Look::Real, &self.mirrored(spot, real), &mut pass);
        let scores = [Some(loss::score(kind, &logits)), None, self.signs(&logits)];
        part(loss::on_real(kind, &logits), scores, parameters, pass.statistics)
    }

    fn fake_part(
        &self,
        spot: Spot,
        state: &State,
        drawn: &Drawn,
        of_real: &[Tensor],
    ) -> Result<LeafPart, c10d::Error> {
        let kind = self.job.loss.kind;
        let parameters = state.trainable(Module::Discriminator);
        // Its buffers are where the real samples' pass left them.
        let buffers = self.models.discriminator.after(state.buffers(Module::Discriminator), of_real);
        let pass = self.look(spot, state, Look::Fake, parameters).of(drawn.classes.as_ref());
        let mut pass = Pass { buffers: &buffers, ..pass };
        let logits = self.seen(spot, state, Look::Fake, &drawn.fake.detach(), &mut pass);
        let scores = [None, Some(loss::score(kind, &logits)), None];
        part(loss::on_fake(kind, &logits), scores, parameters, pass.statistics)
    }

    fn discriminator(
        &self,
        spot: Spot,
        state: &State,
        real: &Real,
        of_real: Option<LeafPart>,
        drawn: &Drawn,
    ) -> Result<Vec<LeafPart>, c10d::Error> {
        let [r1, r2] = self.penalties(spot);
        let parameters = state.trainable(Module::Discriminator);
        // Both penalties of samples that do not see each other, in fp32, can share a pass with the loss.
        let shares = r1 > 0.0 && r2 > 0.0 && !self.models.discriminator.sees_batch() && is_single(parameters);
        let mut parts = if self.tells_real_apart() {
            let of_real = of_real.map_or_else(|| self.real_part(spot, state, real), Ok)?;
            let of_fake = self.fake_part(spot, state, drawn, &of_real.statistics)?;
            vec![of_real, of_fake]
        } else {
            vec![self.together(spot, state, real, drawn, shares.then_some([r1, r2]))?]
        };
        if r1 > 0.0 && !shares {
            let classes = real.classes.as_ref();
            parts.push(self.zero_centred(
                spot,
                state,
                Look::Real,
                r1,
                &self.mirrored(spot, real),
                classes,
            )?);
        }
        if r2 > 0.0 && !shares {
            let (fake, classes) = (drawn.fake.detach(), drawn.classes.as_ref());
            parts.push(self.zero_centred(spot, state, Look::Fake, r2, &fake, classes)?);
        }
        if loss::has_gradient_penalty(&self.job.loss) && self.penalty_factor(spot) > 0.0 {
            parts.push(self.penalty(spot, state, real, drawn)?);
        }
        Ok(parts)
    }

    /// The loss of real samples and of the generator's, which one pass serves unless samples see each other.
    fn together(
        &self,
        spot: Spot,
        state: &State,
        real: &Real,
        drawn: &Drawn,
        penalties: Option<[f64; 2]>,
    ) -> Result<LeafPart, c10d::Error> {
        let kind = self.job.loss.kind;
        let parameters = state.trainable(Module::Discriminator);
        let mut images = [self.mirrored(spot, real), drawn.fake.detach()];
        if penalties.is_some() {
            images = images.map(|images| images.detach().set_requires_grad(true));
        }
        let classes = [real.classes.as_ref(), drawn.classes.as_ref()];
        let (logits, statistics) = self.both_seen(spot, state, parameters, &images, classes);
        let scores = logits.each_ref().map(|logits| Some(loss::score(kind, logits)));
        let [of_real, of_fake] = scores;
        let mut sum = loss::discriminator(kind, &logits[0], &logits[1]);
        for side in 0..2 {
            if let Some(weights) = penalties {
                sum = sum.g_add(&loss::zero_centred_penalty(weights[side], &images[side], &logits[side]));
            }
        }
        part(sum, [of_real, of_fake, self.signs(&logits[0])], parameters, statistics)
    }

    /// The logits of real samples and of the generator's, and the statistics of all passes that these took.
    fn both_seen(
        &self,
        spot: Spot,
        state: &State,
        parameters: &[Tensor],
        images: &[Tensor; 2],
        classes: [Option<&Tensor>; 2],
    ) -> ([Tensor; 2], Vec<Tensor>) {
        let look = |which| self.look(spot, state, which, parameters);
        let shown = |at: usize, which| self.augmented(spot, state, which, &images[at]);
        let [real, fake] = [shown(0, Look::Real), shown(1, Look::Fake)];
        if self.models.discriminator.sees_batch() {
            let mut of_real = look(Look::Real).of(classes[0]);
            let of_real_logits = self.models.discriminator.forward(&real, &mut of_real);
            let buffers =
                self.models.discriminator.after(state.buffers(Module::Discriminator), &of_real.statistics);
            let mut of_fake = Pass { buffers: &buffers, ..look(Look::Fake).of(classes[1]) };
            let logits = [of_real_logits, self.models.discriminator.forward(&fake, &mut of_fake)];
            let mut statistics = of_real.statistics;
            statistics.extend(of_fake.statistics);
            return (logits, statistics);
        }
        let classes = classes[0].zip(classes[1]).map(|(real, fake)| Tensor::cat(&[real, fake], 0));
        let mut pass = look(Look::Real).of(classes.as_ref());
        let logits = self.models.discriminator.forward(&Tensor::cat(&[real, fake], 0), &mut pass);
        let halves = logits.chunk(2, 0);
        ([0, 1].map(|half| halves[half].shallow_clone()), pass.statistics)
    }

    /// A pass of the discriminator, by these parameters of it.
    fn look<'a>(&self, spot: Spot, state: &'a State, which: Look, parameters: &'a [Tensor]) -> Pass<'a> {
        let key = own(self.key(spot, Purpose::Network), which);
        Pass::batch(parameters, state.buffers(Module::Discriminator), key)
    }

    /// The discriminator's logits of images, once they are augmented.
    fn seen(&self, spot: Spot, state: &State, which: Look, images: &Tensor, pass: &mut Pass<'_>) -> Tensor {
        self.models.discriminator.forward(&self.augmented(spot, state, which, images), pass)
    }

    fn augmented(&self, spot: Spot, state: &State, which: Look, images: &Tensor) -> Tensor {
        let kinds = &self.job.augmentation.kinds;
        if kinds.is_empty() {
            return images.shallow_clone();
        }
        let fixed = || Probability::Fixed(Schedule::after(self.job, spot.step).augmentation());
        let probability = augment::controlled(state).map_or_else(fixed, Probability::Adaptive);
        augment(kinds, &probability, own(self.key(spot, Purpose::Augmentation), which), images)
    }

    /// The real samples, mirrored at random where left and right mean nothing.
    fn mirrored(&self, spot: Spot, real: &Real) -> Tensor {
        if !self.job.augmentation.flip {
            return real.images.shallow_clone();
        }
        augment::mirror(own(self.key(spot, Purpose::Augmentation), Look::Drawing), &real.images)
    }

    fn signs(&self, real: &Tensor) -> Option<Tensor> {
        self.job.augmentation.adaptive.then(|| loss::signs(real))
    }

    /// How much the penalties of a phase weigh: as many times more as phases go without them.
    fn penalty_factor(&self, spot: Spot) -> f64 {
        let every = self.job.loss.penalty_every;
        let update = spot.step * u64::from(self.job.loss.discriminator_steps) + u64::from(spot.phase.index);
        if update.is_multiple_of(u64::from(every)) { f64::from(every) } else { 0.0 }
    }

    /// The weights of R1 and R2 in a phase.
    fn penalties(&self, spot: Spot) -> [f64; 2] {
        let weights = Schedule::after(self.job, spot.step).penalties();
        weights.map(|weight| weight * self.penalty_factor(spot))
    }

    /// R1 or R2, in fp32, in a pass of its own.
    fn zero_centred(
        &self,
        spot: Spot,
        state: &State,
        which: Look,
        weight: f64,
        images: &Tensor,
        classes: Option<&Tensor>,
    ) -> Result<LeafPart, c10d::Error> {
        let parameters = state.master(Module::Discriminator);
        let images = images.detach().set_requires_grad(true);
        let mut pass = self.look(spot, state, Look::Penalty, parameters).of(classes);
        let logits = self.seen(spot, state, which, &images, &mut pass);
        part(loss::zero_centred_penalty(weight, &images, &logits), [None, None, None], parameters, Vec::new())
    }

    /// The gradient penalty, in fp32. The statistics of places between real and fake are not the data's.
    fn penalty(
        &self,
        spot: Spot,
        state: &State,
        real: &Real,
        drawn: &Drawn,
    ) -> Result<LeafPart, c10d::Error> {
        let key = self.key(spot, Purpose::Interpolation);
        let places = key.uniform(0.0, 1.0, self.shard_batch()).to_device(self.device);
        let parameters = state.master(Module::Discriminator);
        let mut pass = self.look(spot, state, Look::Penalty, parameters).of(real.classes.as_ref());
        let logits = |x: &Tensor| self.models.discriminator.forward(x, &mut pass);
        let weight = self.job.loss.gradient_penalty * self.penalty_factor(spot);
        let real = self.augmented(spot, state, Look::Real, &self.mirrored(spot, real));
        let fake = self.augmented(spot, state, Look::Fake, &drawn.fake.detach());
        let loss = loss::gradient_penalty(weight, &real, &fake, &places, logits);
        part(loss, [None, None, None], parameters, Vec::new())
    }

    fn generator(
        &self,
        spot: Spot,
        drawn: Drawn,
        real: Option<&Real>,
        state: &State,
    ) -> Result<LeafPart, c10d::Error> {
        let frozen = state.frozen(Module::Discriminator);
        let mut pass = self.look(spot, state, Look::Fake, frozen).of(drawn.classes.as_ref());
        let fake = self.seen(spot, state, Look::Fake, &drawn.fake, &mut pass);
        let loss = match real.filter(|_| self.pairs()) {
            Some(real) => {
                let mut pass = self.look(spot, state, Look::Real, frozen).of(real.classes.as_ref());
                let images = self.mirrored(spot, real);
                let real = no_grad(|| self.seen(spot, state, Look::Real, &images, &mut pass));
                loss::generator_of_pairs(&real, &fake)
            }
            None => loss::generator(self.job.loss.kind, &fake),
        };
        part(loss, [None, None, None], state.trainable(Module::Generator), drawn.statistics)
    }

    /// So many of the discriminator's first tensors stay as they are.
    fn frozen_tensors(&self) -> usize {
        match self.job.model.freeze_discriminator {
            0 => 0,
            layers => first_layers(&self.models.discriminator.parameters(), layers),
        }
    }

    fn key(&self, spot: Spot, purpose: Purpose) -> Key {
        let Spot { phase, step, shard } = spot;
        Key { seed: self.job.job.seed, step, phase: phase.index, shard, purpose }
    }

    fn shard_batch(&self) -> usize {
        self.job.job.shard_batch as usize
    }
}

/// A part with the gradient of its loss.
fn part(
    loss: Tensor,
    scores: Scores,
    parameters: &[Tensor],
    statistics: Vec<Tensor>,
) -> Result<LeafPart, c10d::Error> {
    let gradients = Tensor::f_run_backward(&[&loss], parameters, false, false)?;
    Ok(LeafPart { loss, scores, gradients, statistics })
}

/// Whether a pass by these parameters is one in fp32.
fn is_single(parameters: &[Tensor]) -> bool {
    parameters.iter().all(|parameter| parameter.kind() == Kind::Float)
}

/// Adds the parts of a leaf up, in their order. The first `frozen` tensors have no gradient: with moments of
/// zero Adam leaves them exactly as they are.
fn fill(out: &mut LeafBuffer, parts: &[LeafPart], batch: f64, frozen: usize) {
    for (place, at) in out.gradients.iter_mut().zip(0..) {
        if at < frozen {
            let _ = place.zero_();
            continue;
        }
        sum_into(place, parts.iter().map(|part| &part.gradients[at]));
    }
    let statistics = parts.iter().flat_map(|part| &part.statistics);
    for (place, statistic) in out.statistics.iter_mut().zip(statistics) {
        place.copy_(&(statistic * batch));
    }
    sum_into(&mut out.loss, parts.iter().map(|part| &part.loss));
    for (of, place) in out.scores.iter_mut().enumerate() {
        sum_into(place, parts.iter().filter_map(|part| part.scores[of].as_ref()));
    }
}

/// Puts a sum where it belongs. A parameter that a part of the loss does not depend on has no gradient from
/// it.
fn sum_into<'a>(place: &mut Tensor, mut terms: impl Iterator<Item = &'a Tensor>) {
    match terms.find(|term| term.defined()) {
        Some(first) => place.copy_(first),
        None => drop(place.zero_()),
    }
    for term in terms.filter(|term| term.defined()) {
        let _ = place.g_add_(term);
    }
}

/// The key of a network's own draws in one of a leaf's passes.
fn own(key: Key, look: Look) -> Key {
    Key { phase: 4 * key.phase + look as u32, ..key }
}

fn signed(n: usize) -> i64 {
    i64::try_from(n).expect("a small count")
}
