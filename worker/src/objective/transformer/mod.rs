//! Autoregressive transformers (Vaswani et al., 2017; Radford et al., 2019), pre-norm, over tokens of text or
//! over quantised pixels in raster order (Chen et al., 2020).
//!
//! 1. A prediction follows from the tokens before it alone.
//! 2. The loss of a sample is the mean negative log-likelihood of its tokens, in nats.
//! 3. Random draws are those of dropout, by the shard's key, and those of samples (`writer.rs`).

mod choice;
mod drawing;
mod dropout;
mod gradient;
mod network;
mod pass;
mod pixels;
#[cfg(test)]
mod tests;
mod text;
mod writer;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::f64::consts::LN_2;
use std::sync::Arc;

use ganglion_proto::job::Job;
use tch::{Device, Kind, Tensor, no_grad};

pub(crate) use self::choice::Choice;
use self::drawing::Weights;
pub(crate) use self::drawing::{Drawing, Pen};
use self::dropout::Dropout;
use self::gradient::Tokens;
use self::network::{Constants, Parts, Sizes};
use self::pass::Network;
pub(crate) use self::pixels::{Pixels, Wanted as PixelsWanted};
pub(crate) use self::text::Prose;
use super::batch::tokens_of;
use super::{
    BatchSums, Compute, Evaluator, NamedNetwork, NetworkId, Objective, Optimizer, Phase, Reads, ScalarRole,
    ScalarSpec, Setting, ShardAt, ShardBatch, ShardGrad, State, Unsuitable, optimizer,
};
use crate::checkpoint::{Snapshot, WeightsFile};
use crate::data::{DataSet, SampleShape, Text};
use crate::random::{Draws, Key, Purpose};
use crate::sampling::{Sampler, TextSampler, WEIGHTS_FILE};
use crate::state::StateLayout;

/// The only network.
const NETWORK: NetworkId = NetworkId(0);
/// Name of the network.
const NAME: &str = "transformer";

/// The transformer of a job.
#[derive(Clone)]
pub(crate) struct Transformer {
    job: Job,
    sizes: Sizes,
    samples: Source,
    /// Bits a byte, or a dimension, for a nat a token.
    bits_of_a_nat: f64,
    device: Device,
}

/// Samples that a transformer learns.
#[derive(Clone)]
pub(crate) enum Source {
    /// Text, and its tokens a byte.
    Text(Prose),
    /// Images.
    Pixels(Pixels),
}

/// Makes the transformer of a job, for its data.
///
/// # Errors
/// The data are neither text nor images.
pub(super) fn make(job: &Job, data: &DataSet, device: Device) -> Result<Arc<dyn Objective>, Unsuitable> {
    let settings = job.model.transformer.as_ref();
    let settings = settings.ok_or_else(|| Unsuitable("model.layers: missing".to_string()))?;
    let (samples, vocabulary, inputs, context) = if let SampleShape::Image(shape) = data.shape() {
        let classes = if job.model.conditional { data.classes() } else { 0 };
        let names = if job.model.conditional { data.class_names().to_vec() } else { Vec::new() };
        let pixels = Pixels::new(*shape, settings.levels.unwrap_or(256), classes, names);
        let (levels, context) = (pixels.levels(), pixels.tokens());
        // One token in front of each image, or one for each class.
        (Source::Pixels(pixels), levels, levels + i64::from(classes.max(1)), context)
    } else {
        let shape = tokens_of(job, data)?;
        let text = data.text().ok_or_else(|| Unsuitable("the data are no text".to_string()))?;
        let prose = Prose { codec: text.codec().clone(), tokenizer: job.data.tokenizer.clone() };
        let context = i64::try_from(shape.context).expect("the job has it with 32 bits");
        (Source::Text(prose), shape.vocabulary.into(), shape.vocabulary.into(), context)
    };
    let sizes = Sizes {
        vocabulary,
        inputs,
        context,
        layers: settings.layers.into(),
        heads: settings.heads.into(),
        width: job.model.width.into(),
        positions: settings.positions,
        activation: settings.activation,
    };
    let (job, bits_of_a_nat) = (job.clone(), bits_of_a_nat(data));
    Ok(Arc::new(Transformer { job, sizes, samples, bits_of_a_nat, device }))
}

/// Bits a byte, or a dimension, for a nat a token: of text by the length of the whole, since tokens have
/// different numbers of bytes.
fn bits_of_a_nat(data: &DataSet) -> f64 {
    #[allow(clippy::cast_precision_loss)] // lengths of text
    let per_byte = |text: &Text| text.tokens() as f64 / text.bytes().max(1) as f64;
    data.text().map_or(1.0, per_byte) / LN_2
}

impl Source {
    /// Name of the scalar of bits.
    fn bits(&self) -> &'static str {
        match self {
            Source::Text(_) => "bits_per_byte",
            Source::Pixels(_) => "bits_per_dimension",
        }
    }

    /// Tokens that the network reads, and those that it predicts, (samples, n) each.
    fn tokens(&self, batch: &ShardBatch) -> [Tensor; 2] {
        match self {
            Source::Text(_) => {
                let tokens = batch.tokens();
                let count = tokens.size()[1] - 1;
                [0, 1].map(|first| tokens.narrow(1, first, count).contiguous())
            }
            Source::Pixels(pixels) => pixels.pair(batch.images(), batch.classes.as_ref()),
        }
    }
}

impl Transformer {
    fn constants(&self, device: Device) -> Constants {
        Constants::new(&self.sizes, (Kind::Float, device))
    }

    /// Share of activations that is dropped in training.
    fn dropped(&self) -> f64 {
        self.job.model.transformer.as_ref().map_or(0.0, |settings| settings.dropout)
    }

    fn key(&self, at: ShardAt) -> Key {
        let (seed, step, phase, shard) = (self.job.job.seed, at.step, at.phase.index, at.shard);
        Key { seed, step, phase, shard, purpose: Purpose::Network }
    }

    /// Factors of dropout of a shard.
    fn factors(&self, key: Key) -> Vec<Tensor> {
        Dropout::draw(key, self.dropped(), &self.sizes, self.job.job.shard_batch.into())
    }
}

impl Objective for Transformer {
    fn networks(&self) -> Vec<NamedNetwork> {
        let parameters = self.sizes.parameters();
        vec![NamedNetwork { name: NAME.into(), parameters, buffers: Vec::new(), average: None }]
    }

    fn phases(&self) -> Vec<Phase> {
        vec![Phase::of(0, NETWORK, Reads::Next)]
    }

    fn scalars(&self, _phase: Phase) -> Vec<ScalarSpec> {
        let bits = self.samples.bits();
        vec![ScalarSpec::new("nll", ScalarRole::Loss), ScalarSpec::new(bits, ScalarRole::Diagnostic)]
    }

    fn settings(&self) -> Vec<Setting<'_>> {
        optimizer::moving_of_job(&self.job)
    }

    fn draws(&self, at: ShardAt) -> Vec<(Key, Vec<Tensor>)> {
        let key = self.key(at);
        if self.dropped() > 0.0 { vec![(key, self.factors(key))] } else { Vec::new() }
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        let constants = self.constants(self.device);
        Box::new(Training { objective: self, constants, draws: Draws::default() })
    }

    fn optimizer(&self, _phase: Phase, steps: u64) -> Optimizer {
        optimizer::of_job(&self.job, steps)
    }

    fn sampler(&self) -> Option<&dyn Sampler> {
        matches!(self.samples, Source::Pixels(_)).then_some(self)
    }

    fn text_sampler(&self) -> Option<&dyn TextSampler> {
        matches!(self.samples, Source::Text(_)).then_some(self)
    }

    fn evaluator(&self) -> Option<&dyn Evaluator> {
        Some(self)
    }

    fn weights_file(&self) -> Option<WeightsFile> {
        let mut about = drawing::describe(&self.sizes);
        match &self.samples {
            Source::Text(prose) => prose.describe(&mut about),
            Source::Pixels(pixels) => pixels.describe(&mut about),
        }
        let about: BTreeMap<String, String> =
            about.into_iter().map(|(key, own)| (key.to_string(), own)).collect();
        let section = format!("{NAME}.");
        // Under the names of nanoGPT's `state_dict`.
        let sections = vec![(section.clone(), section)];
        Some(WeightsFile { name: WEIGHTS_FILE.to_string(), sections, constants: Vec::new(), about })
    }

    fn probe(&self, shard_batch: u32) -> Box<dyn Objective> {
        let mut probe = self.clone();
        probe.job.job.shard_batch = shard_batch;
        Box::new(probe)
    }
}

/// Computation of one member's gradients.
struct Training<'a> {
    objective: &'a Transformer,
    constants: Constants,
    /// Draws that were made ahead.
    draws: Draws,
}

impl Compute for Training<'_> {
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
        let Training { objective, constants, draws } = self;
        let Transformer { sizes, samples, device, .. } = objective;
        let [inputs, targets] = samples.tokens(batch.expect("the phase reads samples"));
        let key = objective.key(at);
        let factors = || draws.all(key, *device, || objective.factors(key));
        let dropout = (objective.dropped() > 0.0).then(|| Dropout::new(factors()));
        let weights = Parts::new(sizes, state.frozen(NETWORK));
        let network = Network { sizes, constants, weights };
        no_grad(|| {
            let places = Parts::new(sizes, &out.gradients);
            let tokens = Tokens { inputs: &inputs, targets: &targets };
            let loss = network.gradient(&tokens, dropout, &places)?;
            out.scalars[0].copy_(&loss);
            out.scalars[1].copy_(&(loss * objective.bits_of_a_nat));
            Ok(())
        })
    }
}

impl Evaluator for Transformer {
    fn scalars(&self) -> Vec<Cow<'static, str>> {
        vec!["nll".into(), self.samples.bits().into()]
    }

    fn begin<'a>(
        &'a self,
        layout: &'a StateLayout,
        snapshot: &'a Snapshot,
    ) -> Result<BatchSums<'a>, c10d::Error> {
        let weights = Weights::of_state(&self.sizes, layout, snapshot, self.device);
        Ok(Box::new(move |batch, _| {
            let [inputs, targets] = self.samples.tokens(&batch.to(self.device));
            let loss = no_grad(|| weights.network().loss(&inputs, &targets))?.double_value(&[]);
            Ok(vec![loss])
        }))
    }

    fn figures(&self, sums: Vec<f64>, samples: f64, data: &DataSet) -> Vec<f64> {
        let nll = sums[0] / samples;
        vec![nll, nll * bits_of_a_nat(data)]
    }
}

impl Sampler for Transformer {
    fn draw(&self, layout: &StateLayout, snapshot: &Snapshot, key: Key, count: u32) -> Tensor {
        let Source::Pixels(pixels) = &self.samples else { unreachable!("text has a sampler of its own") };
        let weights = Weights::of_state(&self.sizes, layout, snapshot, self.device);
        let classes = pixels.classes_in_turn(count);
        let drawn =
            pixels.draw(&Pen { weights: &weights, key, choice: choice::PLAIN }, &PixelsWanted::of(&classes));
        drawn.unwrap_or_else(|error| panic!("libtorch refused to draw: {error}"))
    }

    fn classes(&self) -> u32 {
        match &self.samples {
            Source::Pixels(pixels) => pixels.classes(),
            Source::Text(_) => 0,
        }
    }
}

impl TextSampler for Transformer {
    fn write(
        &self,
        layout: &StateLayout,
        snapshot: &Snapshot,
        key: Key,
        count: u32,
    ) -> Result<Vec<String>, c10d::Error> {
        let Source::Text(prose) = &self.samples else { unreachable!("images have a sampler of their own") };
        let weights = Weights::of_state(&self.sizes, layout, snapshot, self.device);
        let pen = Pen { weights: &weights, key, choice: choice::PLAIN };
        (0..count).map(|sample| prose.sample(&pen, sample)).collect()
    }
}
