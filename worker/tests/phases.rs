//! Phases that update several networks, follow buffers of others, and run every few steps: the same bits for
//! any number of members, and the numbers of a plain computation.
#![allow(clippy::unwrap_used)] // a test may panic

#[path = "common/three.rs"]
mod three;

use std::sync::Arc;

use c10d::aten::Adam;
use ganglion_membership::{Position, shard_ranges};
use ganglion_proto::job::{NonFinite, Precision};
use ganglion_worker::engine::commit::{commit, pass, skip};
use ganglion_worker::engine::finite::{Rules, Verdict, judge};
use ganglion_worker::engine::reduce::tree::{Summand, TreeSum};
use ganglion_worker::nn::tensor_bytes::to_bytes;
use ganglion_worker::objective::{
    Model, NetworkId, Objective, Optimizer, Phase, Reads, Rule, ShardAt, ShardBatch, ShardGrad, State,
};
use ganglion_worker::random::{Key, Purpose};
use ganglion_worker::state::Counters;
use tch::{Device, Kind, Tensor, no_grad};

use three::{CRITIC, DECAY, ENCODER, FIT, HEAD, Inputs, MOMENTUM, PLAIN, Three, features, loss, noise};

const SHARDS: u32 = 5;
const BATCH: i64 = 3;
/// Three rounds of the slowest cadence, and a part of the next.
const STEPS: u64 = 13;

fn model() -> Model {
    Model::new(Arc::new(Three), Precision::Fp32).unwrap()
}

fn images(step: u64, shard: u32) -> Tensor {
    let key = Key { seed: 2, step, phase: 0, shard, purpose: Purpose::Probe };
    key.uniform(-1.0, 1.0, usize::try_from(BATCH * 16).unwrap()).view([BATCH, 1, 4, 4])
}

struct Sum(ShardGrad);

impl Summand for Sum {
    fn add(&mut self, right: &Sum) {
        let _ = no_grad(|| self.0.flat.g_add_(&right.0.flat));
    }
}

/// Trains as a group of `members` would: each sums its shards, and all sums are added in the tree's order.
fn train(members: u32) -> State {
    let model = model();
    let mut state = State::initial(model.layout.clone(), 1, Device::Cpu);
    let mut compute = model.objective.begin();
    for (step, phase) in (0..STEPS).flat_map(|step| model.phases().iter().map(move |phase| (step, *phase))) {
        assert_eq!(model.place(state.counters.position), (step, phase));
        if !phase.runs_in(step) {
            pass(&model, &mut state, phase);
            continue;
        }
        let layout = model.gradient(phase);
        let mut total = TreeSum::new(SHARDS);
        for range in shard_ranges(SHARDS, members) {
            let mut own = TreeSum::new(SHARDS);
            for shard in range {
                let batch = ShardBatch::of_images(images(step, shard), None);
                let batch = Some(&batch).filter(|_| phase.reads != Reads::Nothing);
                let mut grad = ShardGrad::new(layout, layout.len(), Device::Cpu);
                compute.gradient(ShardAt { phase, step, shard }, &state, batch, &mut grad).unwrap();
                own.push(ganglion_worker::engine::reduce::tree::Node::leaf(shard), Sum(grad));
            }
            own.take().into_iter().for_each(|(node, sum)| total.push(node, sum));
        }
        let samples = if phase.reads == Reads::Nothing { 5 } else { BATCH };
        let mean = &total.take().remove(0).1.0.flat / (f64::from(SHARDS) * samples as f64);
        commit(&model, &mut state, phase, &mean, u64::from(phase.reads == Reads::Next)).unwrap();
    }
    state
}

#[test]
fn any_number_of_members_has_the_same_bits() {
    let alone = train(1);
    assert_eq!((alone.counters.position, alone.counters.ledger), (Position(4 * STEPS), STEPS));
    for members in [2, 3] {
        let state = train(members);
        assert!(to_bytes(&alone.flat) == to_bytes(&state.flat), "{members} members");
        assert_eq!(alone.counters, state.counters);
    }
}

/// A network computed plainly: its parameters with their moments, and the number of its updates.
struct Plain {
    parameters: Vec<Tensor>,
    moments: Vec<[Tensor; 2]>,
    updates: i32,
}

impl Plain {
    fn of(state: &State, network: NetworkId) -> Plain {
        let copies = state.frozen(network).iter().map(|tensor| tensor.to_kind(PLAIN).copy());
        let parameters: Vec<Tensor> = copies.map(|copy| copy.set_requires_grad(true)).collect();
        let zeros = |parameter: &Tensor| [parameter.zeros_like(), parameter.zeros_like()];
        let moments = no_grad(|| parameters.iter().map(zeros).collect());
        Plain { parameters, moments, updates: 0 }
    }

    /// Kingma and Ba (2015), algorithm 1.
    fn update(&mut self, gradients: &[Tensor], settings: Optimizer) {
        let Rule::Adam(Adam { lr, beta1, beta2, eps, .. }) = settings.rule else {
            unreachable!("it is Adam")
        };
        self.updates += 1;
        for ((parameter, [first, second]), gradient) in
            self.parameters.iter_mut().zip(&mut self.moments).zip(gradients)
        {
            *first = &*first * beta1 + gradient * (1.0 - beta1);
            *second = &*second * beta2 + gradient.square() * (1.0 - beta2);
            let corrected = &*first / (1.0 - beta1.powi(self.updates));
            let root = (&*second / (1.0 - beta2.powi(self.updates))).sqrt() + eps;
            let _ = no_grad(|| parameter.g_sub_(&(corrected / root * lr)));
        }
    }
}

fn assert_close(what: &str, found: &Tensor, expected: &Tensor) {
    let distance = (found.to_kind(PLAIN) - expected).abs().max().double_value(&[]);
    assert!(distance < 2e-5, "{what}: {distance}, of {expected}");
}

/// In double precision, in one batch of all shards, with an optimizer and buffers written out.
#[test]
fn the_numbers_are_those_of_a_plain_computation() {
    let model = model();
    let initial = State::initial(model.layout.clone(), 1, Device::Cpu);
    let mut networks = [ENCODER, HEAD, CRITIC].map(|network| Plain::of(&initial, network));
    let mut buffers = [0, 1].map(|index: usize| initial.buffers(ENCODER)[index].to_kind(PLAIN).copy());
    let mut average: Vec<Tensor> =
        networks[0].parameters.iter().map(|tensor| tensor.detach().copy()).collect();
    let mut losses = [0.0; 4];
    for step in 0..STEPS {
        for (index, phase) in Three.phases().into_iter().enumerate() {
            if step % [1, 4, 1, 3][index] != 0 {
                continue;
            }
            let of_all = |part: &dyn Fn(u32) -> Tensor| {
                Tensor::cat(&(0..SHARDS).map(part).collect::<Vec<_>>(), 0).to_kind(PLAIN)
            };
            let noise = of_all(&|shard| noise(ShardAt { phase, step, shard }, 5));
            let features = Some(of_all(&|shard| features(&images(step, shard))));
            let parameters = [0, 1, 2].map(|network: usize| networks[network].parameters.as_slice());
            let (loss, update) =
                loss(phase.index, &Inputs { parameters, mean: &buffers[0], features, noise });
            let samples = f64::from(SHARDS) * if phase.reads == Reads::Nothing { 5.0 } else { BATCH as f64 };
            let loss = loss / samples;
            losses[index] = loss.double_value(&[]);
            let updated = [&[0, 1][..], &[0], &[2], &[1, 2]][index];
            let of: Vec<&Tensor> =
                updated.iter().flat_map(|network: &usize| &networks[*network].parameters).collect();
            let mut gradients = Tensor::run_backward(&[&loss], &of, false, false);
            for network in updated {
                let rest = gradients.split_off(networks[*network].parameters.len());
                networks[*network].update(&gradients, Three.optimizer(phase, step));
                gradients = rest;
            }
            match update {
                Some(update) if phase.index == FIT => {
                    buffers[0] = &buffers[0] * (1.0 - MOMENTUM) + update * MOMENTUM
                }
                Some(update) => buffers[1] += update,
                None => {}
            }
        }
        for (average, parameter) in average.iter_mut().zip(&networks[0].parameters) {
            *average = &*average * DECAY + parameter.detach() * (1.0 - DECAY);
        }
    }
    let state = train(3);
    for (network, plain) in [ENCODER, HEAD, CRITIC].into_iter().zip(&networks) {
        for (found, expected) in state.frozen(network).iter().zip(&plain.parameters) {
            assert_close(&format!("{network:?}"), found, expected);
        }
    }
    for (found, expected) in state.buffers(ENCODER).iter().zip(&buffers) {
        assert_close("buffer", found, expected);
    }
    let encoder = state.layout.network(ENCODER);
    let (found, _) = encoder.views(&state.section(encoder.average_range().unwrap()));
    found.iter().zip(&average).for_each(|(found, expected)| assert_close("average", found, expected));
    assert_eq!(Vec::<f32>::try_from(&state.buffers(CRITIC)[0]).unwrap(), [2.0; 5], "followed by no phase");
    // The newest losses of the phases with a cadence are part of the state.
    let kept = model.kept_scalars(&state);
    assert_eq!(model.reported(), ["fit_loss", "lazy_loss", "judge_loss", "agree_loss"]);
    for (place, value) in [(1, losses[1]), (3, losses[3])] {
        let found = kept.iter().find(|(at, _)| *at == place).unwrap().1;
        assert!((found - value).abs() < 1e-5, "{found} and {value}");
    }
    assert_eq!(kept.len(), 2);
}

#[test]
fn a_phase_that_does_not_run_changes_nothing_and_ends_no_row_of_skips() {
    let model = model();
    let mut state = State::initial(model.layout.clone(), 1, Device::Cpu);
    let phases = model.phases();
    state.counters.position = Position(4);
    let len = i64::try_from(model.gradient(phases[0]).len()).unwrap();
    let mean = Tensor::zeros([len], (Kind::Float, Device::Cpu));
    skip(&model, &mut state, phases[0], &mean, 7).unwrap();
    let before = to_bytes(&state.flat);
    pass(&model, &mut state, phases[1]);
    assert!(before == to_bytes(&state.flat));
    assert_eq!((state.counters.position, state.counters.ledger, state.counters.skipped), (Position(6), 7, 1));
    let (index, idle) = model.reduce_of(phases[1], 1);
    assert!(index != model.reduce_of(phases[1], 0).0 && model.reduces()[index] == *idle);
    assert_eq!((idle.gradient(), idle.scalars().len(), idle.len()), (0..0, 0, 16));
    // The average moves at the end of a step, whether the last phase runs or not.
    let average =
        |state: &State| to_bytes(&state.section(state.layout.network(ENCODER).average_range().unwrap()));
    let _ = no_grad(|| state.parameters(ENCODER).shallow_clone().fill_(3.0));
    state.counters.position = Position(7);
    let before = average(&state);
    pass(&model, &mut state, phases[3]);
    assert!(before != average(&state));
}

#[test]
fn only_steps_in_which_a_phase_runs_count_as_its_updates() {
    let model = model();
    let phases = model.phases();
    // Steps 0 and 4 have two updates of the encoder, others one.
    let encoder: Vec<u64> = (0..6).map(|step| model.updates_before(step, phases[0], ENCODER)).collect();
    assert_eq!(encoder, [0, 2, 3, 4, 5, 7]);
    assert_eq!(model.updates_before(4, phases[1], ENCODER), 6);
    assert_eq!(model.updates_before(4, phases[2], ENCODER), 7);
    assert_eq!(model.updates_before(4, phases[3], CRITIC), 4 + 2 + 1);
    assert_eq!(model.updates_before(4, phases[3], HEAD), 4 + 2 + 1);
    // Samples that are read again are kept for the next phase that runs.
    assert_eq!(model.next_reader(4, 1).map(|phase| phase.index), Some(1));
    assert_eq!(model.next_reader(5, 1).map(|phase| phase.index), Some(2));
    assert_eq!(model.next_reader(5, 3), None);
}

/// Phases of one network with these reads and cadences, all of one name.
struct Odd(&'static [(Reads, u32)]);

impl Objective for Odd {
    fn networks(&self) -> Vec<ganglion_worker::objective::NamedNetwork> {
        Three.networks()
    }

    fn phases(&self) -> Vec<Phase> {
        let phases = (0..).zip(self.0);
        phases
            .map(|(index, (reads, every))| Phase { every: *every, ..Phase::of(index, HEAD, *reads) })
            .collect()
    }

    fn scalars(&self, _phase: Phase) -> Vec<ganglion_worker::objective::ScalarSpec> {
        Three.scalars(Three.phases()[0])
    }

    fn begin(&self) -> Box<dyn ganglion_worker::objective::Compute + '_> {
        unreachable!("no gradient is computed here")
    }

    fn optimizer(&self, phase: Phase, steps: u64) -> Optimizer {
        Three.optimizer(phase, steps)
    }

    fn probe(&self, _shard_batch: u32) -> Box<dyn Objective> {
        Box::new(Odd(self.0))
    }
}

#[test]
fn phases_that_make_no_step_are_unsuitable() {
    let told =
        |phases| Model::new(Arc::new(Odd(phases)), Precision::Fp32).err().map(|error| error.to_string());
    assert_eq!(told(&[(Reads::Next, 1), (Reads::Same, 1)]), None);
    for (phases, why) in [
        (
            &[(Reads::Next, 2)][..],
            "phase 0 of the objective reads the next samples, but does not run in every step",
        ),
        (
            &[(Reads::Same, 1), (Reads::Next, 1)],
            "phase 0 of the objective reads the samples of a phase before it",
        ),
        (&[(Reads::Next, 1), (Reads::Nothing, 0)], "phase 1 of the objective runs every 0 steps"),
        (&[(Reads::Next, 1), (Reads::Nothing, 2)], "shares the name head with another"),
    ] {
        let told = told(phases).unwrap();
        assert!(told.contains(why), "{told}");
    }
}

/// A network's phases are called by the network, as ever; others by their own name.
#[test]
fn what_is_not_finite_is_told_by_the_name_of_the_phase() {
    let model = model();
    let phase = model.phases()[1];
    let len = i64::try_from(model.gradient(phase).len()).unwrap();
    let mean = Tensor::full([len], f64::NAN, (Kind::Float, Device::Cpu));
    let rules = Rules { policy: NonFinite::Skip, skips: &[] };
    let counters = Counters { position: Position(17), ..Counters::default() };
    let verdict = judge(rules, &model, phase, counters, &mean).unwrap();
    assert_eq!(verdict, Verdict::Skip("the lazy phase's gradient of step 5 is not finite".to_string()));
}
