//! Facts that the engine takes from an objective: networks, phases, scalars and averages, of any number.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::sync::Arc;

use c10d::aten::Adam;
use ganglion_membership::{Position, StepShape};
use ganglion_proto::job::{AugmentationKind, EmaSchedule, Job, LossKind, ModelKind, Precision};
use ganglion_worker::engine::commit::commit;
use ganglion_worker::nn::{Init, TensorSpec};
use ganglion_worker::objective::{
    Compute, Model, NamedNetwork, NetworkId, Objective, Optimizer, Phase, Reads, ScalarRole, ScalarSpec,
    Setting, State,
};
use ganglion_worker::state::narrow;
use tch::{Device, Kind, Tensor, no_grad};

use common::{Bench, job};

const ENCODER: NetworkId = NetworkId(0);
const DECODER: NetworkId = NetworkId(1);
const CRITIC: NetworkId = NetworkId(2);

/// Three networks, two of them averaged, in five phases.
struct Three;

impl Objective for Three {
    fn networks(&self) -> Vec<NamedNetwork> {
        let network = |name: &'static str, average: Option<&'static str>| NamedNetwork {
            name: name.into(),
            parameters: vec![TensorSpec::parameter("weight".into(), &[3], Init::Constant(1.0))],
            buffers: vec![TensorSpec::buffer("mean".into(), &[3], Init::Constant(0.0), 1.0)],
            average: average.map(Into::into),
        };
        vec![
            network("encoder", Some("slow_encoder")),
            network("decoder", None),
            network("critic", Some("slow_critic")),
        ]
    }

    fn own_tensors(&self) -> Vec<TensorSpec> {
        vec![TensorSpec::parameter("controller.gain".into(), &[2], Init::Constant(0.0))]
    }

    fn phases(&self) -> Vec<Phase> {
        let phases = [
            (ENCODER, Reads::Next),
            (DECODER, Reads::Same),
            (CRITIC, Reads::Nothing),
            (ENCODER, Reads::Same),
            (CRITIC, Reads::Next),
        ];
        (0..).zip(phases).map(|(index, (network, reads))| Phase::of(index, network, reads)).collect()
    }

    fn scalars(&self, phase: Phase) -> Vec<ScalarSpec> {
        let loss = |name: &'static str| ScalarSpec::new(name, ScalarRole::Loss);
        match phase.updates.first() {
            Some(ENCODER) => vec![loss("reconstruction"), ScalarSpec::new("kl", ScalarRole::Diagnostic)],
            Some(DECODER) => vec![loss("reconstruction")],
            _ => vec![loss("critic"), ScalarSpec::new("margin", ScalarRole::Internal)],
        }
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        unreachable!("no gradient is computed here")
    }

    fn optimizer(&self, phase: Phase, _steps: u64) -> Optimizer {
        let lr = if phase.updates.contains(DECODER) { 0.0 } else { 0.5 };
        Adam { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }.into()
    }

    fn average_decay(&self, network: NetworkId, _steps: u64) -> f64 {
        if network == ENCODER { 0.75 } else { 0.0 }
    }

    fn settings(&self) -> Vec<Setting<'_>> {
        let value = |steps: u64, state: &State| {
            f64::from(u32::try_from(steps).unwrap()) + state.own(0).double_value(&[1])
        };
        vec![Setting { name: "gain".into(), value: Box::new(value) }]
    }

    /// Keeps the count of updates, and the margin.
    fn after_update(&self, phase: Phase, updates: u64, scalars: &Tensor, state: &State) {
        if phase.updates.contains(CRITIC) {
            let _ = state.own(0).narrow(0, 0, 1).fill_(f64::from(u32::try_from(updates).unwrap()));
            state.own(0).narrow(0, 1, 1).copy_(&scalars.narrow(0, 1, 1));
        }
    }

    fn probe(&self, _shard_batch: u32) -> Box<dyn Objective> {
        Box::new(Three)
    }
}

fn model() -> Model {
    Model::new(Arc::new(Three), Precision::Fp32).unwrap()
}

#[test]
fn phases_of_a_network_share_a_layout_and_scalars_are_named_once() {
    let model = model();
    assert_eq!(model.reduces().len(), 3);
    let phases = model.phases();
    assert_eq!(model.reduce_of(phases[0], 0), model.reduce_of(phases[3], 0));
    assert_eq!(model.reduce_of(phases[2], 0), model.reduce_of(phases[4], 0));
    assert_eq!(model.reported(), ["reconstruction", "critic", "kl"], "losses first");
}

/// Phases with these reads, and a scalar with this name.
struct Odd(&'static [Reads], &'static str);

impl Objective for Odd {
    fn networks(&self) -> Vec<NamedNetwork> {
        Three.networks()
    }

    fn phases(&self) -> Vec<Phase> {
        (0..).zip(self.0).map(|(index, reads)| Phase::of(index, CRITIC, *reads)).collect()
    }

    fn scalars(&self, _phase: Phase) -> Vec<ScalarSpec> {
        vec![ScalarSpec::new(self.1, ScalarRole::Loss)]
    }

    fn begin(&self) -> Box<dyn Compute + '_> {
        unreachable!("no gradient is computed here")
    }

    fn optimizer(&self, phase: Phase, steps: u64) -> Optimizer {
        Three.optimizer(phase, steps)
    }

    fn probe(&self, _shard_batch: u32) -> Box<dyn Objective> {
        Box::new(Odd(self.0, self.1))
    }
}

#[test]
fn an_objective_without_samples_or_with_names_for_no_column_is_unsuitable() {
    let laid_out = |reads, name| Model::new(Arc::new(Odd(reads, name)), Precision::Fp32);
    assert!(laid_out(&[Reads::Nothing, Reads::Next], "loss").is_ok());
    for reads in [&[][..], &[Reads::Nothing], &[Reads::Same], &[Reads::Next; 1025]] {
        let told = laid_out(reads, "loss").err().unwrap().to_string();
        assert!(told.contains("1 to 1024 phases"), "{told}");
    }
    let told = laid_out(&[Reads::Next], "Loss!").err().unwrap().to_string();
    assert!(told.contains("Loss!"), "{told}");
}

#[test]
fn positions_and_batches_follow_from_the_phases() {
    let model = model();
    let phases = model.phases();
    assert_eq!(model.place(Position(7)), (1, phases[2]));
    assert!(model.is_last(phases[4]) && !model.is_last(phases[3]));
    assert_eq!(model.updates_before(2, phases[3], ENCODER), 5);
    assert_eq!(model.updates_before(2, phases[1], DECODER), 2);
    assert_eq!(model.batches_per_step(), 2);
    assert_eq!(model.shape(), &StepShape::new(5, vec![0, 4]).unwrap());
    let readers = [Some(0), Some(1), Some(3), Some(3), Some(4), None];
    for (index, reader) in (0..).zip(readers) {
        assert_eq!(model.next_reader(0, index).map(|phase| phase.index), reader, "from phase {index}");
    }
    let batches: Vec<u32> = [0, 1, 3, 4].map(|phase| model.batch_of(phases[phase])).to_vec();
    assert_eq!(batches, [0, 0, 0, 1]);
}

#[test]
fn every_tensor_has_its_name() {
    let names: Vec<String> = model().layout.tensors().into_iter().map(|tensor| tensor.name).collect();
    let of = |name: &str| {
        let tensors = [format!("{name}.weight"), format!("{name}.mean")];
        let moment = |kind: &str| format!("optimizer.{name}.{kind}.weight");
        [tensors.as_slice(), &[moment("exp_avg"), moment("exp_avg_sq")]].concat()
    };
    let averages = ["slow_encoder.weight", "slow_encoder.mean", "slow_critic.weight", "slow_critic.mean"];
    let mut expected = [of("encoder"), of("decoder"), of("critic")].concat();
    expected.extend(averages.map(String::from));
    expected.push("controller.gain".to_string());
    assert_eq!(names, expected);
}

/// Each average moves at the end of a step, by its own decay; the objective's own tensors by its hook.
#[test]
fn a_step_updates_each_network_and_average_by_what_the_objective_says() {
    let model = model();
    let mut state = State::initial(model.layout.clone(), 1, Device::Cpu);
    let weight = |state: &State, network| state.parameters(network).double_value(&[0]);
    let average = |state: &State, network| {
        let range = state.layout.network(network).average_range().unwrap();
        state.section(range).double_value(&[0])
    };
    for phase in model.phases() {
        assert_eq!([average(&state, ENCODER), average(&state, CRITIC)], [1.0; 2], "before the step's end");
        let layout = model.gradient(*phase);
        let len = i64::try_from(layout.len()).unwrap();
        let mean = Tensor::zeros([len], (Kind::Float, Device::Cpu));
        let _ = no_grad(|| narrow(&mean, layout.gradient()).fill_(2.0));
        let _ = no_grad(|| narrow(&mean, layout.scalar_range()).fill_(0.25));
        commit(&model, &mut state, *phase, &mean, 1).unwrap();
    }
    // Adam moves by its rate in each of two updates of equal gradients.
    assert!(weight(&state, ENCODER).abs() < 1e-6, "{}", weight(&state, ENCODER));
    assert_eq!(weight(&state, DECODER), 1.0);
    assert!((average(&state, ENCODER) - 0.75).abs() < 1e-6, "{}", average(&state, ENCODER));
    assert_eq!(average(&state, CRITIC), weight(&state, CRITIC));
    assert_eq!(Vec::<f32>::try_from(state.own(0)).unwrap(), [2.0, 0.25]);
    assert_eq!((state.counters.position, state.counters.ledger), (Position(5), 5));
    assert_eq!(model.settings(&state), [("setting_gain".to_string(), 1.25)], "after one step, of this state");
}

/// A row has the settings that change over the run, whatever changes them, and no others.
#[test]
fn a_gan_reports_the_settings_that_change() {
    let settings = |change: &dyn Fn(&mut Job)| {
        let mut job = job(ModelKind::Mlp28, LossKind::NonSaturating);
        change(&mut job);
        let Bench { model, mut state, .. } = Bench::new(job);
        // 24 real images are seen in a step, in two phases.
        state.counters.position = Position(3 * 100);
        model.settings(&state)
    };
    let named =
        |of: &[(&str, f64)]| of.iter().map(|(name, value)| ((*name).to_string(), *value)).collect::<Vec<_>>();
    let ramp = ("setting_ema_half_life_images", 0.05 * 1200.0);
    assert_eq!(settings(&|_| ()), named(&[ramp]));
    let scheduled = |job: &mut Job| {
        job.optimizer.decay_images = 2400;
        job.optimizer.final_learning_rate = 0.0;
        job.optimizer.final_beta2 = 0.5;
        (job.loss.final_r1, job.loss.final_r2) = (0.1, 0.2);
        job.augmentation.final_probability = 0.0;
        job.model.ema_schedule = EmaSchedule::Cosine;
    };
    // At the end of the schedule.
    let finals = named(&[
        ("setting_learning_rate_generator", 0.0),
        ("setting_beta2", 0.5),
        ("setting_r1", 0.1),
        ("setting_r2", 0.2),
        ("setting_ema_half_life_images", 1000.0),
    ]);
    assert_eq!(settings(&scheduled), finals, "the probability applies to nothing");
    let augmented = |job: &mut Job| {
        job.augmentation.kinds = vec![AugmentationKind::Color];
        job.augmentation.final_probability = 0.25;
        job.optimizer.decay_images = 2400;
    };
    let probability = |value| ("setting_augmentation_probability", value);
    assert_eq!(settings(&augmented), named(&[probability(0.25), ramp]));
    let adaptive = |job: &mut Job| {
        augmented(job);
        job.augmentation.adaptive = true;
    };
    assert_eq!(settings(&adaptive), named(&[ramp, probability(0.0)]), "the controller begins at 0");
}
