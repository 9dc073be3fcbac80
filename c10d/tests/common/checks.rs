//! Expected results of every collective, in whole numbers, so that sums are exact in any order.

use c10d::{Buffer, Group, ReduceOp};
use tch::{Device, Kind};

use super::{LONG, buffer_of, values_of};

/// Runs each collective and compares its result with a plain computation.
pub(crate) fn every_collective(group: &Group) {
    reduces(group);
    swaps(group);
    exchanges(group);
    gathers(group);
    broadcasts(group);
    group.barrier().unwrap().wait(LONG).unwrap();
}

pub(crate) fn sample(rank: usize, length: usize) -> Vec<f32> {
    (0..length).map(|i| ((rank * 7 + i) % 11) as f32).collect()
}

fn combine(group: &Group, length: usize, with: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    let all: Vec<_> = (0..group.world_size()).map(|rank| sample(rank, length)).collect();
    (0..length).map(|i| all.iter().map(|values| values[i]).reduce(&with).unwrap()).collect()
}

fn reduces(group: &Group) {
    for length in [1, 5, 1000, 70_001] {
        let mine = || buffer_of(&sample(group.rank(), length));
        let sum = group.all_reduce(mine(), ReduceOp::Sum).unwrap();
        let max = group.all_reduce(mine(), ReduceOp::Max).unwrap();
        let min = group.all_reduce(mine(), ReduceOp::Min).unwrap();
        let product = group.all_reduce(mine(), ReduceOp::Product).unwrap();
        assert_eq!(values_of(&sum.wait(LONG).unwrap()), combine(group, length, |a, b| a + b));
        assert_eq!(values_of(&max.wait(LONG).unwrap()), combine(group, length, f32::max));
        assert_eq!(values_of(&min.wait(LONG).unwrap()), combine(group, length, f32::min));
        assert_eq!(values_of(&product.wait(LONG).unwrap()), combine(group, length, |a, b| a * b));
    }
}

/// Data from rank `from` to rank `to`: some pairs exchange nothing, and no two ranks receive equal
/// amounts.
fn split(from: usize, to: usize) -> usize {
    (from * 3 + to * 5) % 4 * 10
}

fn swaps(group: &Group) {
    let (rank, ranks) = (group.rank(), 0..group.world_size());
    let send_splits: Vec<_> = ranks.clone().map(|to| split(rank, to)).collect();
    let receive_splits: Vec<_> = ranks.clone().map(|from| split(from, rank)).collect();
    let tag = |from: usize, to: usize, i: usize| (from * 10_000 + to * 1000 + i) as f32;
    let sent: Vec<_> =
        ranks.clone().flat_map(|to| (0..split(rank, to)).map(move |i| tag(rank, to, i))).collect();
    let wanted: Vec<_> =
        ranks.flat_map(|from| (0..split(from, rank)).map(move |i| tag(from, rank, i))).collect();
    let receive = Buffer::zeros(wanted.len(), Kind::Float, Device::Cpu).unwrap();
    let pending = group.all_to_all(buffer_of(&sent), &send_splits, receive, &receive_splits).unwrap();
    let (send, receive) = pending.wait(LONG).unwrap();
    assert_eq!(values_of(&send), sent);
    assert_eq!(values_of(&receive), wanted);
}

/// Each rank sends the next two of a circle, and one of them another length.
fn exchanges(group: &Group) {
    let (rank, size) = (group.rank(), group.world_size());
    let partners = |step: fn(usize, usize, usize) -> usize| -> Vec<(usize, usize)> {
        (1..size.min(3)).map(|far| (step(rank, far, size), 100 * far)).collect()
    };
    let to = partners(|rank, far, size| (rank + far) % size);
    let from = partners(|rank, far, size| (rank + size - far) % size);
    let value = |rank: usize, far: usize| vec![(10 * rank + far) as f32; 100 * far];
    let sent: Vec<f32> = (1..size.min(3)).flat_map(|far| value(rank, far)).collect();
    let wanted: Vec<f32> = from.iter().flat_map(|(rank, count)| value(*rank, count / 100)).collect();
    // Longer than what comes: the rest stays as it is.
    let receive = buffer_of(&vec![-1.0; wanted.len() + 7]);
    // Two in a row, the second before the first is waited for.
    let first = group.exchange(buffer_of(&sent), &to, receive, &from).unwrap();
    let receive = buffer_of(&vec![-1.0; wanted.len() + 7]);
    let second = group.exchange(buffer_of(&sent), &to, receive, &from).unwrap();
    for pending in [first, second] {
        let (send, receive) = pending.wait(LONG).unwrap();
        assert_eq!(values_of(&send), sent);
        assert_eq!(values_of(&receive), [wanted.clone(), vec![-1.0; 7]].concat());
    }
}

fn gathers(group: &Group) {
    let send = buffer_of(&sample(group.rank(), 33));
    let receive = Buffer::zeros(33 * group.world_size(), Kind::Float, Device::Cpu).unwrap();
    let (_, receive) = group.all_gather(send, receive).unwrap().wait(LONG).unwrap();
    let wanted: Vec<_> = (0..group.world_size()).flat_map(|rank| sample(rank, 33)).collect();
    assert_eq!(values_of(&receive), wanted);
}

fn broadcasts(group: &Group) {
    for root in 0..group.world_size() {
        let pending = group.broadcast(buffer_of(&sample(group.rank(), 777)), root).unwrap();
        assert_eq!(values_of(&pending.wait(LONG).unwrap()), sample(root, 777));
    }
}
