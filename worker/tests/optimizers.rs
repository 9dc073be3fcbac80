//! Updates by each optimizer: the rule, clipping, the tensors that decay, and what the state keeps for it.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::sync::Arc;

use c10d::aten::{Adam, Sgd};
use ganglion_proto::job::{LossKind, ModelKind, OptimizerKind, Precision};
use ganglion_worker::engine::commit::{commit, skip};
use ganglion_worker::nn::{Init, TensorSpec};
use ganglion_worker::objective::{
    Compute, Model, NamedNetwork, NetworkId, NetworkSet, Objective, Optimizer, Phase, Reads, Rule,
    ScalarRole, ScalarSpec, ShardGrad, State,
};
use ganglion_worker::state::narrow;
use tch::{Device, Kind, Tensor, no_grad};

use common::{Bench, job};

const ADAM: Adam = Adam { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.2 };
const SGD: Sgd = Sgd { lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.05 };

/// Two networks that each phase updates, by this optimizer; and the name of a scalar of theirs.
struct Pair(Vec<Optimizer>, &'static str);

impl Pair {
    fn model(optimizers: &[Optimizer]) -> Model {
        Model::new(Arc::new(Pair(optimizers.to_vec(), "loss")), Precision::Fp32).unwrap()
    }
}

impl Objective for Pair {
    fn networks(&self) -> Vec<NamedNetwork> {
        let one = Init::Uniform { bound: 1.0 };
        let parameters = [
            TensorSpec::embedding("table".into(), &[5, 3], one.clone()),
            TensorSpec::parameter("weight".into(), &[3, 7], one.clone()),
            TensorSpec::parameter("other".into(), &[3, 7], one.clone()),
            TensorSpec::parameter("bias".into(), &[7], one),
        ];
        let network = |name: &'static str, count: usize| NamedNetwork {
            name: name.into(),
            parameters: parameters[..count].to_vec(),
            buffers: Vec::new(),
            average: None,
        };
        vec![network("large", 4), network("small", 2)]
    }

    fn phases(&self) -> Vec<Phase> {
        let updates = NetworkSet::of([NetworkId(0), NetworkId(1)]);
        (0..).zip(&self.0).map(|(index, _)| Phase { index, updates, reads: Reads::Next, every: 1 }).collect()
    }

    fn scalars(&self, _phase: Phase) -> Vec<ScalarSpec> {
        vec![ScalarSpec::new(self.1, ScalarRole::Loss)]
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        unreachable!("no gradient is computed here")
    }

    fn optimizer(&self, phase: Phase, _steps: u64) -> Optimizer {
        self.0[phase.index as usize]
    }

    fn probe(&self, _shard_batch: u32) -> Box<dyn Objective> {
        Box::new(Pair(self.0.clone(), self.1))
    }
}

/// Gradient of an update: other numbers for each tensor and step, and zeros in the gaps between tensors.
fn reduced(model: &Model, phase: Phase, step: u32) -> ShardGrad {
    let layout = model.gradient(phase);
    let mut grad = ShardGrad::new(layout, layout.len(), Device::Cpu);
    let scale = if step.is_multiple_of(2) { 0.2 } else { 1.0 };
    for (at, place) in (0_u32..).zip(&mut grad.gradients) {
        let count = i64::try_from(place.numel()).unwrap();
        let angles = Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.37 + f64::from(step) * 1.3;
        place.copy_(&((angles + f64::from(at)).sin() * scale).view_as(place));
    }
    grad
}

fn initial(model: &Model) -> State {
    State::initial(model.layout.clone(), 1, Device::Cpu)
}

/// The parameters of both networks.
fn parameters(state: &State) -> Vec<Tensor> {
    let of = |network| state.frozen(NetworkId(network)).iter().map(Tensor::shallow_clone);
    of(0).chain(of(1)).collect()
}

/// An update rule in double precision, as PyTorch's documentation writes it.
fn plain(
    rule: Rule,
    parameter: &mut Tensor,
    gradient: &Tensor,
    [first, second]: &mut [Tensor; 2],
    (count, decays): (i32, bool),
) {
    match rule {
        Rule::Adam(Adam { lr, beta1, beta2, eps, weight_decay }) => {
            *parameter = &*parameter * (1.0 - if decays { lr * weight_decay } else { 0.0 });
            *first = &*first * beta1 + gradient * (1.0 - beta1);
            *second = &*second * beta2 + gradient.square() * (1.0 - beta2);
            let root = (&*second / (1.0 - beta2.powi(count))).sqrt() + eps;
            *parameter -= &*first / (1.0 - beta1.powi(count)) / root * lr;
        }
        Rule::Sgd(Sgd { lr, momentum, nesterov, weight_decay }) => {
            let gradient = gradient + &*parameter * if decays { weight_decay } else { 0.0 };
            *first = &*first * momentum + &gradient;
            *parameter -= if nesterov { gradient + &*first * momentum } else { first.copy() } * lr;
        }
    }
}

/// Over 20 updates; only the second and the third tensor of a network decay. The norm of most gradients is above
/// the limit, and that of some is not.
#[test]
fn an_update_is_that_of_a_plain_computation() {
    let sgd = |momentum, nesterov| Sgd { momentum, nesterov, ..SGD };
    let rules = [
        Rule::Adam(ADAM),
        Rule::Adam(Adam { weight_decay: 0.0, ..ADAM }),
        Rule::Sgd(sgd(0.0, false)),
        Rule::Sgd(sgd(0.9, false)),
        Rule::Sgd(SGD),
    ];
    for (rule, clip_norm) in rules.into_iter().flat_map(|rule| [(rule, None), (rule, Some(2.0))]) {
        let model = Pair::model(&[Optimizer { rule, clip_norm }]);
        let (phase, mut state) = (model.phases()[0], initial(&model));
        let double = |tensor: &Tensor| tensor.to_kind(Kind::Double).copy();
        let mut expected: Vec<Tensor> = parameters(&state).iter().map(double).collect();
        let mut kept: Vec<[Tensor; 2]> =
            expected.iter().map(|of| [of.zeros_like(), of.zeros_like()]).collect();
        let mut clipped = 0;
        for step in 1..=20 {
            let grad = reduced(&model, phase, step);
            let gradients: Vec<Tensor> = grad.gradients.iter().map(double).collect();
            let squares = gradients.iter().map(|of| of.square().sum(Kind::Double).double_value(&[]));
            let norm = squares.sum::<f64>().sqrt();
            let scale = clip_norm.map_or(1.0, |clip| (clip / norm).min(1.0));
            clipped += i32::from(scale < 1.0);
            for (at, gradient) in gradients.iter().enumerate() {
                let (decays, count) = ([1, 2, 5].contains(&at), i32::try_from(step).unwrap());
                plain(rule, &mut expected[at], &(gradient * scale), &mut kept[at], (count, decays));
            }
            commit(&model, &mut state, phase, &grad.flat, 0).unwrap();
            if let Some(place) = model.gradient(phase).norm() {
                let told = grad.flat.double_value(&[i64::try_from(place).unwrap()]);
                assert!((told - norm).abs() < 1e-5 * norm, "{told} and {norm}");
            }
        }
        assert!(clip_norm.is_none() || (1..20).contains(&clipped), "{clipped} of 20 are clipped");
        for (found, expected) in parameters(&state).iter().zip(&expected) {
            let distance = (double(found) - expected).abs().max().double_value(&[]);
            assert!(distance < 5e-6, "{rule:?}, clipped at {clip_norm:?}: {distance}");
        }
        let gaps = state.parameters(NetworkId(0)).narrow(0, 15, 1).double_value(&[0]);
        assert_eq!(gaps.to_bits(), 0, "gaps hold zeros for ever");
    }
}

/// A gradient that is short enough is not touched: its update has the bits of one that is not clipped at all.
#[test]
fn a_limit_that_no_gradient_reaches_changes_no_bit() {
    for rule in [Rule::Adam(ADAM), Rule::Sgd(SGD)] {
        let states = [None, Some(1e6)].map(|clip_norm| {
            let model = Pair::model(&[Optimizer { rule, clip_norm }]);
            let mut state = initial(&model);
            for step in 1..=3 {
                let grad = reduced(&model, model.phases()[0], step);
                commit(&model, &mut state, model.phases()[0], &grad.flat, 0).unwrap();
            }
            Vec::<f32>::try_from(&state.flat).unwrap()
        });
        assert!(states[0] == states[1], "{rule:?}");
    }
}

#[test]
fn the_state_has_what_the_optimizer_keeps() {
    let names = |optimizer: Optimizer| {
        let tensors = Pair::model(&[optimizer]).layout.tensors().into_iter().map(|tensor| tensor.name);
        tensors.filter_map(|name| Some(name.strip_prefix("optimizer.small.")?.to_owned())).collect::<Vec<_>>()
    };
    assert_eq!(
        names(ADAM.into()),
        ["exp_avg.table", "exp_avg.weight", "exp_avg_sq.table", "exp_avg_sq.weight"]
    );
    assert_eq!(names(SGD.into()), ["momentum_buffer.table", "momentum_buffer.weight"]);
    assert_eq!(names(Sgd { momentum: 0.0, nesterov: false, ..SGD }.into()), [""; 0]);
}

#[test]
fn a_row_has_the_norm_of_each_phase_that_clips() {
    let clips = |rule| Optimizer { rule: Rule::Adam(rule), clip_norm: Some(1.0) };
    assert_eq!(Pair::model(&[ADAM.into()]).reported(), ["loss"]);
    assert_eq!(Pair::model(&[clips(ADAM)]).reported(), ["loss", "gradient_norm"]);
    // Both phases have the name of their first network.
    assert_eq!(Pair::model(&[clips(ADAM), ADAM.into()]).reported(), ["loss", "gradient_norm"]);
    let mut gan = job(ModelKind::Mlp28, LossKind::NonSaturating);
    gan.optimizer.options.clip_norm = Some(1.0);
    let Bench { model, .. } = Bench::new(gan);
    let norms: Vec<_> = model.reported().iter().filter(|name| name.starts_with("gradient_norm")).collect();
    assert_eq!(norms, ["gradient_norm_discriminator", "gradient_norm_generator"]);
    let taken = Pair(vec![clips(ADAM)], "gradient_norm");
    let told = Model::new(Arc::new(taken), Precision::Fp32).err().unwrap().to_string();
    assert!(told.contains("has a scalar gradient_norm"), "{told}");
}

/// Whatever phase used the memory before: else the bits of a shard's gradient would depend on the cluster.
#[test]
fn the_place_of_a_norm_is_zero_in_a_shards_gradient() {
    let model = Pair::model(&[Optimizer { rule: Rule::Sgd(SGD), clip_norm: Some(1.0) }]);
    let layout = model.gradient(model.phases()[0]);
    let used = ShardGrad::new(layout, layout.len(), Device::Cpu);
    let _ = no_grad(|| used.flat.shallow_clone().fill_(1.0));
    let again = used.with_scalars_of(layout);
    assert_eq!(again.scalars.len(), 1, "an objective sees its own");
    let values = Vec::<f32>::try_from(&again.flat).unwrap();
    assert_eq!(values[layout.norm().unwrap()], 0.0);
    assert_eq!(values[layout.losses().start], 1.0);
}

/// An update that is skipped has a norm all the same, and it is as little finite as the gradient.
#[test]
fn a_skipped_update_leaves_a_norm_that_is_not_finite() {
    let model = Pair::model(&[Optimizer { rule: Rule::Sgd(SGD), clip_norm: Some(1.0) }]);
    let (phase, mut state) = (model.phases()[0], initial(&model));
    let grad = reduced(&model, phase, 1);
    let _ = no_grad(|| narrow(&grad.flat, 0..1).fill_(f64::NAN));
    let before = Vec::<f32>::try_from(&state.flat).unwrap();
    skip(&model, &mut state, phase, &grad.flat, 0).unwrap();
    assert!(before == Vec::<f32>::try_from(&state.flat).unwrap());
    let place = i64::try_from(model.gradient(phase).norm().unwrap()).unwrap();
    assert!(grad.flat.double_value(&[place]).is_nan());
}

#[test]
fn one_network_has_one_kind_of_optimizer() {
    let told = |optimizers: &[Optimizer]| {
        let made = Model::new(Arc::new(Pair(optimizers.to_vec(), "loss")), Precision::Fp32);
        made.err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert!(told(&[ADAM.into(), SGD.into()]).starts_with("large is updated by Adam in one phase and by SGD"));
    assert_eq!(told(&[ADAM.into(), Adam { weight_decay: 0.0, ..ADAM }.into()]), "");
    let still = Sgd { momentum: 0.0, nesterov: false, ..SGD };
    assert_eq!(told(&[still.into(), SGD.into()]), "");
    let layout = Pair::model(&[still.into(), SGD.into()]).layout;
    assert!(layout.tensors().iter().any(|tensor| tensor.name == "optimizer.large.momentum_buffer.bias"));
}

/// Layers that FreezeD keeps stay as they were, also where the others decay.
#[test]
fn frozen_layers_do_not_decay() {
    for kind in [OptimizerKind::Adamw, OptimizerKind::Sgd] {
        let mut gan = job(ModelKind::Mlp28, LossKind::NonSaturating);
        gan.model.freeze_discriminator = 1;
        (gan.optimizer.kind, gan.optimizer.options.weight_decay) = (kind, Some(0.5));
        let Bench { model, mut state, .. } = Bench::new(gan);
        let phase = model.phases()[0];
        let network = phase.updates.first().unwrap();
        let weights = |state: &State| {
            let of = |at: usize| Vec::<f32>::try_from(state.frozen(network)[at].flatten(0, -1)).unwrap();
            [of(0), of(2)]
        };
        let before = weights(&state);
        let len = i64::try_from(model.gradient(phase).len()).unwrap();
        let mean = Tensor::zeros([len], (Kind::Float, Device::Cpu));
        commit(&model, &mut state, phase, &mean, 0).unwrap();
        let after = weights(&state);
        assert!(before[0] == after[0] && before[1] != after[1], "{kind}");
    }
}
