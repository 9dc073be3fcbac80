//! Phases and their leaves: what one data shard contributes to one update.
//!
//! 1. A leaf is a function of (job, state, phase, shard, the shard's real samples): it reads state and writes none.
//! 2. It has a buffer of its own, and parameters keep no gradient, so that autograd never adds one leaf to another.
//! 3. The generator's samples carry no gradient into a discriminator phase, and the discriminator is a constant in the
//!    generator's phase.
//! 4. The samples of a step's last discriminator phase are those of its generator phase too, as in DCGAN's training loop.
//!    Whether they are kept from the one to the other or drawn again changes no bit.
//!
//! A leaf's buffer holds, in this order: the gradient of the summed loss, laid out as the module's parameters; b times
//! the batch statistics of each pass, laid out as its buffers (for others of its buffers b times what they shall follow); the summed loss; in a discriminator's, what it says of the
//! real samples and of the generator's. All become means over the global batch when the sum of the leaves is divided by
//! V x b. The scores are for people: nothing is decided by them.

use std::ops::Range;

use ganglion_proto::job::Job;
use tch::{Device, Kind, Tensor, no_grad};

use crate::loss;
use crate::nn::{Models, Pass};
use crate::random::{Key, Purpose};
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

/// Memory for one leaf.
pub struct LeafBuffer {
    /// All of it, and room to spare behind it.
    pub flat: Tensor,
    gradients: Vec<Tensor>,
    statistics: Vec<Tensor>,
    loss: Tensor,
    scores: [Tensor; 2],
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
            scores: [0, 1].map(|at| layout.scores().start + at).map(|at| narrow(&flat, at..at + 1)),
            flat,
        }
    }
}

/// What the generator has drawn for a data shard, and how, so that a gradient can go back through it.
pub struct Drawn {
    /// The data shard.
    pub shard: u32,
    fake: Tensor,
    statistics: Vec<Tensor>,
}

/// A part of a leaf: of the discriminator's, what comes from real samples, from the generator's, and from the penalty.
pub struct LeafPart {
    loss: Tensor,
    /// Of real samples and of the generator's, where it looks at them.
    scores: [Option<Tensor>; 2],
    gradients: Vec<Tensor>,
    statistics: Vec<Tensor>,
}

/// What a leaf is computed from.
pub enum Input<'a> {
    /// Real samples, what is known of their part, and the generator's samples, in a discriminator's phase.
    Samples(&'a Real, Option<LeafPart>, &'a Drawn),
    /// What the generator has drawn, in its phase.
    Drawn(Drawn),
}

/// Computes leaves of a job.
pub struct Leaves<'a> {
    /// The job.
    pub job: &'a Job,
    /// Its networks.
    pub models: &'a Models,
    /// Where to compute.
    pub device: Device,
}

impl Leaves<'_> {
    /// Draws the generator's samples for a leaf. Under `no_grad` they cannot begin a generator's leaf.
    pub fn draw(&self, spot: Spot, state: &State) -> Drawn {
        // The generator's phase takes the samples of the discriminator's last one.
        let last = self.job.loss.discriminator_steps.saturating_sub(1);
        let phase = Phase { index: spot.phase.index.min(last), ..spot.phase };
        let key = |purpose| self.key(Spot { phase, ..spot }, purpose);
        let latent = signed(self.models.latent_dim);
        let noise = key(Purpose::Noise).normal(self.shard_batch() * self.models.latent_dim);
        let noise = noise.view([-1, latent]).to_device(self.device);
        let (parameters, buffers) = (state.trainable(Module::Generator), state.buffers(Module::Generator));
        let mut pass = Pass::batch(parameters, buffers, own(key(Purpose::Network), Look::Drawing));
        let fake = self.models.generator.forward(&noise, &mut pass);
        Drawn { shard: spot.shard, fake, statistics: pass.statistics }
    }

    /// Fills `out` with the leaf of `spot`.
    pub fn compute(
        &self,
        spot: Spot,
        state: &State,
        input: Input<'_>,
        out: &mut LeafBuffer,
    ) -> Result<(), c10d::Error> {
        let parts = match input {
            Input::Samples(real, of_real, drawn) => {
                self.discriminator(spot, state, real, of_real, &drawn.fake.detach())?
            }
            Input::Drawn(drawn) => vec![self.generator(spot, drawn, state)?],
        };
        no_grad(|| fill(out, &parts, f64::from(self.job.job.shard_batch)));
        Ok(())
    }

    /// Whether the samples that the generator draws in a phase are those of its own phase too.
    pub fn serves_generator(&self, phase: Phase) -> bool {
        phase.index + 1 == self.job.loss.discriminator_steps
    }

    /// Whether the discriminator looks at real samples apart from the generator's.
    pub fn tells_real_apart(&self) -> bool {
        self.models.discriminator.sees_batch()
    }

    /// The part of a discriminator's leaf that comes from real samples, where it looks at them apart. A commit of the
    /// generator does not change it.
    pub fn real_part(&self, spot: Spot, state: &State, real: &Real) -> Result<LeafPart, c10d::Error> {
        let kind = self.job.loss.kind;
        let pass = self.look(spot, state, Look::Real, state.trainable(Module::Discriminator));
        self.seen(pass.of(real.classes.as_ref()), &real.images, |logits| {
            (loss::on_real(kind, logits), [Some(loss::score(kind, logits)), None])
        })
    }

    fn discriminator(
        &self,
        spot: Spot,
        state: &State,
        real: &Real,
        of_real: Option<LeafPart>,
        fake: &Tensor,
    ) -> Result<Vec<LeafPart>, c10d::Error> {
        let objective = &self.job.loss;
        let kind = objective.kind;
        let trainable = state.trainable(Module::Discriminator);
        let mut parts = if self.tells_real_apart() {
            let of_real = of_real.map_or_else(|| self.real_part(spot, state, real), Ok)?;
            let committed = state.buffers(Module::Discriminator);
            let buffers = self.models.discriminator.after(committed, &of_real.statistics);
            let pass = Pass { buffers: &buffers, ..self.look(spot, state, Look::Fake, trainable) };
            let of_fake = self.seen(pass, fake, |logits| {
                (loss::on_fake(kind, logits), [None, Some(loss::score(kind, logits))])
            })?;
            vec![of_real, of_fake]
        } else {
            // Samples do not see each other, so one pass serves real and fake ones.
            let pass = self.look(spot, state, Look::Real, trainable);
            vec![self.seen(pass, &Tensor::cat(&[&real.images, fake], 0), |logits| {
                let halves = logits.chunk(2, 0);
                let scores = [0, 1].map(|half| Some(loss::score(kind, &halves[half])));
                (loss::discriminator(kind, &halves[0], &halves[1]), scores)
            })?]
        };
        if loss::has_gradient_penalty(objective) {
            parts.push(self.penalty(spot, state, &real.images, fake)?);
        }
        Ok(parts)
    }

    /// A pass of the discriminator, by these parameters of it.
    fn look<'a>(&self, spot: Spot, state: &'a State, which: Look, parameters: &'a [Tensor]) -> Pass<'a> {
        let key = own(self.key(spot, Purpose::Network), which);
        Pass::batch(parameters, state.buffers(Module::Discriminator), key)
    }

    /// What the discriminator makes of samples: `judge` tells the loss and the scores from its logits.
    fn seen(
        &self,
        mut pass: Pass<'_>,
        samples: &Tensor,
        judge: impl FnOnce(&Tensor) -> (Tensor, [Option<Tensor>; 2]),
    ) -> Result<LeafPart, c10d::Error> {
        let (loss, scores) = judge(&self.models.discriminator.forward(samples, &mut pass));
        let gradients = Tensor::f_run_backward(&[&loss], pass.parameters, false, false)?;
        Ok(LeafPart { loss, scores, gradients, statistics: pass.statistics })
    }

    /// The gradient penalty, in fp32. The statistics of places between real and fake are not the data's.
    fn penalty(
        &self,
        spot: Spot,
        state: &State,
        real: &Tensor,
        fake: &Tensor,
    ) -> Result<LeafPart, c10d::Error> {
        let key = self.key(spot, Purpose::Interpolation);
        let places = key.uniform(0.0, 1.0, self.shard_batch()).to_device(self.device);
        let parameters = state.master(Module::Discriminator);
        let mut pass = self.look(spot, state, Look::Penalty, parameters);
        let logits = |x: &Tensor| self.models.discriminator.forward(x, &mut pass);
        let weight = self.job.loss.gradient_penalty;
        let loss = loss::gradient_penalty(weight, real, fake, &places, logits);
        let gradients = Tensor::f_run_backward(&[&loss], parameters, false, false)?;
        Ok(LeafPart { loss, scores: [None, None], gradients, statistics: Vec::new() })
    }

    fn generator(&self, spot: Spot, drawn: Drawn, state: &State) -> Result<LeafPart, c10d::Error> {
        let mut pass = self.look(spot, state, Look::Fake, state.frozen(Module::Discriminator));
        let logits = self.models.discriminator.forward(&drawn.fake, &mut pass);
        let loss = loss::generator(self.job.loss.kind, &logits);
        let gradients = Tensor::f_run_backward(&[&loss], state.trainable(Module::Generator), false, false)?;
        Ok(LeafPart { loss, scores: [None, None], gradients, statistics: drawn.statistics })
    }

    fn key(&self, spot: Spot, purpose: Purpose) -> Key {
        let Spot { phase, step, shard } = spot;
        Key { seed: self.job.job.seed, step, phase: phase.index, shard, purpose }
    }

    fn shard_batch(&self) -> usize {
        self.job.job.shard_batch as usize
    }
}

/// Adds the parts of a leaf up, in their order.
fn fill(out: &mut LeafBuffer, parts: &[LeafPart], batch: f64) {
    for (place, at) in out.gradients.iter_mut().zip(0..) {
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

/// Puts a sum where it belongs. A parameter that a part of the loss does not depend on has no gradient from it.
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
