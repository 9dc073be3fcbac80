use ganglion_proto::job::{Model, ModelKind};

use super::*;
use crate::data::ImageShape;
use crate::nn::Models;
use crate::objective::gan::{GENERATOR, networks};

fn layout(kind: ModelKind, side: usize) -> StateLayout {
    layout_of(&Model::plain(kind, 10, 8), side)
}

fn layout_of(model: &Model, side: usize) -> StateLayout {
    let shape = ImageShape { channels: 1, height: side, width: side };
    StateLayout::new(&networks(&Models::new(model, shape).unwrap()), &[], Precision::Fp32)
}

#[test]
fn tensors_are_named_once_aligned_and_apart() {
    for (kind, side) in [(ModelKind::Mlp28, 28), (ModelKind::Dcgan28, 28), (ModelKind::Dcgan64, 64)] {
        let layout = layout(kind, side);
        let tensors = layout.tensors();
        let mut names: Vec<&String> = tensors.iter().map(|tensor| &tensor.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), tensors.len());
        let mut end = 0;
        for tensor in &tensors {
            assert_eq!(tensor.range.start, align(end), "{}", tensor.name);
            end = tensor.range.end;
        }
        assert_eq!(align(end), layout.len);
    }
}

#[test]
fn the_initial_state_depends_on_the_seed_alone() {
    let state = |seed| State::initial(layout(ModelKind::Dcgan28, 28), seed, Device::Cpu).flat;
    assert!(state(1).equal(&state(1)));
    assert!(!state(1).equal(&state(2)));
}

#[test]
fn a_stand_in_repeats_the_first_numbers_of_each_tensor() {
    let layout = || layout_of(&Model::plain(ModelKind::Mlp28, 10, 200), 28);
    let of = |make: fn(StateLayout, u64, Device) -> State| make(layout(), 1, Device::Cpu);
    let (initial, stand_in) = (of(State::initial), of(State::stand_in));
    let largest = initial.layout.tensors().into_iter().max_by_key(|tensor| tensor.range.len()).unwrap().range;
    let period = 65_521;
    assert!(largest.len() > 2 * period, "this test needs a tensor that repeats");
    let at = |state: &State, from: usize, len: usize| {
        let start = largest.start + from;
        narrow(&state.flat, start..start + len)
    };
    assert!(at(&stand_in, 0, period).equal(&at(&initial, 0, period)));
    assert!(!at(&stand_in, period, 1000).equal(&at(&initial, period, 1000)));
    assert!(at(&stand_in, period, 1000).equal(&at(&stand_in, 0, 1000)));
    let end = largest.len() - 10;
    assert!(at(&stand_in, end, 10).equal(&at(&stand_in, end % period, 10)));
}

#[test]
fn views_share_the_buffer() {
    let state = State::initial(layout(ModelKind::Mlp28, 28), 1, Device::Cpu);
    let first = state.layout.network(GENERATOR).parameter_range().start;
    let _ = tch::no_grad(|| narrow(&state.flat, first..first + 1).fill_(42.0));
    assert_eq!(state.frozen(GENERATOR)[0].double_value(&[0, 0]), 42.0);
    assert_eq!(state.trainable(GENERATOR)[0].double_value(&[0, 0]), 42.0);
}
