//! An objective of three small networks, with everything that phases can have: several networks updated by
//! one, buffers of another network, cadences, samples read again, noise, optimizers of their own.

use std::borrow::Cow;

use c10d::aten::Adam;
use ganglion_worker::checkpoint::Snapshot;
use ganglion_worker::nn::{Init, TensorSpec};
use ganglion_worker::objective::{
    BatchSums, BufferId, Compute, Evaluator, NamedNetwork, NetworkId, NetworkSet, Objective, Optimizer,
    Phase, Reads, ScalarRole, ScalarSpec, ShardAt, ShardBatch, ShardGrad, State,
};
use ganglion_worker::random::{Key, Purpose};
use ganglion_worker::state::StateLayout;
use tch::{Kind, Tensor, no_grad};

pub(crate) const ENCODER: NetworkId = NetworkId(0);
pub(crate) const HEAD: NetworkId = NetworkId(1);
pub(crate) const CRITIC: NetworkId = NetworkId(2);

/// Number of features of an image, and of the encoder's code.
const FEATURES: i64 = 4;
const CODE: i64 = 3;
/// Weight by which the mean code follows that of a batch.
pub(crate) const MOMENTUM: f64 = 0.25;
/// Share of the encoder's average that stays.
pub(crate) const DECAY: f64 = 0.5;

/// Phases of a step, in order.
pub(crate) const FIT: u32 = 0;
const LAZY: u32 = 1;
const JUDGE: u32 = 2;

pub(crate) struct Three;

/// Tensors that the loss of a shard is a function of.
pub(crate) struct Inputs<'a> {
    /// Parameters by network.
    pub(crate) parameters: [&'a [Tensor]; 3],
    /// The encoder's mean code.
    pub(crate) mean: &'a Tensor,
    /// Features of the samples, by [`features`].
    pub(crate) features: Option<Tensor>,
    pub(crate) noise: Tensor,
}

/// Loss of a shard, summed over its samples, with the update of the followed buffer if there is one: the mean
/// over the samples.
pub(crate) fn loss(phase: u32, inputs: &Inputs<'_>) -> (Tensor, Option<Tensor>) {
    let [encoder, head, critic] = inputs.parameters;
    let features = || inputs.features.as_ref().expect("the phase reads samples");
    let code = || (features().matmul(&encoder[0]) + &encoder[1]).tanh();
    let mean = |codes: &Tensor| codes.detach().mean_dim([0i64].as_slice(), false, codes.kind());
    match phase {
        FIT => {
            let wanted = features().sum_dim_intlist([1i64].as_slice(), true, features().kind());
            let found = (code() - inputs.mean).matmul(&head[0]);
            ((found - wanted).square().sum(features().kind()), Some(mean(&code())))
        }
        LAZY => (code().square().sum(features().kind()) * 4.0, None),
        JUDGE => {
            let wanted = features().select(1, 0).unsqueeze(1);
            let loss = (code().detach().matmul(&critic[0]) - wanted).square().sum(features().kind());
            (loss, Some(mean(&code().abs())))
        }
        _ => {
            let difference = inputs.noise.matmul(&head[0]) - inputs.noise.matmul(&critic[0]);
            (difference.square().sum(inputs.noise.kind()), None)
        }
    }
}

/// Brightness of an image's quarters: (b, 4).
pub(crate) fn features(images: &Tensor) -> Tensor {
    images.reshape([images.size()[0], FEATURES, -1]).mean_dim([2i64].as_slice(), false, images.kind())
}

/// Noise of a shard of `count` samples.
pub(crate) fn noise(at: ShardAt, count: i64) -> Tensor {
    let ShardAt { phase, step, shard } = at;
    let key = Key { seed: 1, step, phase: phase.index, shard, purpose: Purpose::Noise };
    key.normal(usize::try_from(count * CODE).expect("a small batch")).view([count, CODE])
}

impl Objective for Three {
    fn networks(&self) -> Vec<NamedNetwork> {
        let parameter = |name: &str, shape: &[i64]| {
            TensorSpec::parameter(name.into(), shape, Init::Uniform { bound: 0.5 })
        };
        let mut scale = TensorSpec::parameter("scale".into(), &[CODE], Init::Constant(1.0));
        let mean = TensorSpec::buffer("mean".into(), &[CODE], Init::Constant(0.0), MOMENTUM);
        scale.exact = true;
        let network = |name: &'static str, parameters, buffers, average: Option<&'static str>| NamedNetwork {
            name: name.into(),
            parameters,
            buffers,
            average: average.map(Into::into),
        };
        let encoder = vec![parameter("weight", &[FEATURES, CODE]), parameter("bias", &[CODE])];
        let frozen = vec![TensorSpec::parameter("frozen".into(), &[5], Init::Constant(2.0))];
        vec![
            network("encoder", encoder, vec![mean, scale], Some("slow_encoder")),
            network("head", vec![parameter("weight", &[CODE, 1])], Vec::new(), None),
            network("critic", vec![parameter("weight", &[CODE, 1])], frozen, None),
        ]
    }

    fn phases(&self) -> Vec<Phase> {
        let phase = |index, updates: &[NetworkId], reads, every| Phase {
            index,
            updates: NetworkSet::of(updates.iter().copied()),
            reads,
            every,
        };
        vec![
            phase(FIT, &[HEAD, ENCODER], Reads::Next, 1),
            phase(LAZY, &[ENCODER], Reads::Same, 4),
            phase(JUDGE, &[CRITIC], Reads::Same, 1),
            phase(3, &[CRITIC, HEAD], Reads::Nothing, 3),
        ]
    }

    fn phase_name(&self, phase: Phase) -> Cow<'_, str> {
        ["fit", "lazy", "judge", "agree"][phase.index as usize].into()
    }

    fn follows(&self, phase: Phase) -> Vec<BufferId> {
        match phase.index {
            FIT => vec![BufferId { network: ENCODER, index: 0 }],
            // Another network's than the one that it updates.
            JUDGE => vec![BufferId { network: ENCODER, index: 1 }],
            _ => Vec::new(),
        }
    }

    fn scalars(&self, phase: Phase) -> Vec<ScalarSpec> {
        vec![ScalarSpec::new(format!("{}_loss", self.phase_name(phase)), ScalarRole::Loss)]
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        Box::new(Three)
    }

    fn optimizer(&self, phase: Phase, steps: u64) -> Optimizer {
        let lr = [0.02, 0.005, 0.03, 0.01][phase.index as usize];
        let beta2 = if phase.index == LAZY { 0.9 } else { 0.99 };
        let lr = if steps < 6 { lr } else { lr / 2.0 };
        Adam { lr, beta1: 0.5, beta2, eps: 1e-3, weight_decay: 0.0 }.into()
    }

    fn average_decay(&self, _network: NetworkId, _steps: u64) -> f64 {
        DECAY
    }

    fn evaluator(&self) -> Option<&dyn Evaluator> {
        Some(self)
    }

    fn probe(&self, _shard_batch: u32) -> Box<dyn Objective> {
        Box::new(Three)
    }
}

/// Scalars of the evaluator: the loss of the first phase by the encoder's average, and its opposite, of which
/// more is better. Noise of each batch's own key enters both.
pub(crate) const EVALUATED: [&str; 2] = ["error", "quality"];

impl Evaluator for Three {
    fn scalars(&self) -> Vec<Cow<'static, str>> {
        EVALUATED.map(Cow::from).to_vec()
    }

    fn begin<'a>(
        &'a self,
        layout: &'a StateLayout,
        snapshot: &'a Snapshot,
    ) -> Result<BatchSums<'a>, c10d::Error> {
        let average = layout.network(ENCODER).average_range().expect("the encoder has one");
        let (encoder, buffers) = layout.network(ENCODER).views(&snapshot.floats(average));
        let (head, _) = layout.network(HEAD).views(&snapshot.floats(layout.network(HEAD).weight_range()));
        Ok(Box::new(move |batch, key| {
            let (features, mean) = (Some(features(batch.images())), &buffers[0]);
            let noise = key.normal(1);
            let parameters = [encoder.as_slice(), &head, &[]];
            let inputs = Inputs { parameters, mean, features, noise: noise.shallow_clone() };
            let error = (loss(FIT, &inputs).0 + noise * 1e-3).double_value(&[0]);
            Ok(vec![error, -error])
        }))
    }
}

impl Compute for Three {
    fn gradient(
        &mut self,
        at: ShardAt,
        state: &State,
        batch: Option<&ShardBatch>,
        out: &mut ShardGrad,
    ) -> Result<(), c10d::Error> {
        let features = batch.map(|batch| features(batch.images()));
        let count = features.as_ref().map_or(5, |features| features.size()[0]);
        let parameters = [ENCODER, HEAD, CRITIC].map(|network| state.trainable(network));
        let (mean, noise) = (&state.buffers(ENCODER)[0], noise(at, count));
        let (loss, update) = loss(at.phase.index, &Inputs { parameters, mean, features, noise });
        let of: Vec<&Tensor> = at.phase.updates.iter().flat_map(|network| state.trainable(network)).collect();
        let gradients = Tensor::f_run_backward(&[&loss], &of, false, false)?;
        no_grad(|| {
            out.gradients.iter_mut().zip(&gradients).for_each(|(place, gradient)| place.copy_(gradient));
            for (place, update) in out.statistics.iter_mut().zip(update) {
                place.copy_(&(update * f64::from(i32::try_from(count).expect("a small batch"))));
            }
            out.scalars[0].copy_(&loss);
        });
        Ok(())
    }
}

/// Kind in which the losses are computed plainly, for comparison.
pub(crate) const PLAIN: Kind = Kind::Double;
