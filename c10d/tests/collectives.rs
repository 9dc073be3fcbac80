//! Each collective gives the right result, for every size of group, in threads.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use c10d::{Buffer, ReduceOp};
use common::{LONG, buffer_of, checks, groups, on_ranks, values_of};
use tch::{Device, Kind};

#[test]
fn every_collective_is_right_with_one_to_four_ranks() {
    for world_size in 1..=4 {
        on_ranks(world_size, checks::every_collective);
    }
}

/// Path of a GPU's buffers, with the CPU in place of the GPU.
#[test]
fn copies_of_buffers_travel_as_well() {
    for world_size in 1..=3 {
        let groups = groups(world_size, LONG);
        std::thread::scope(|scope| {
            for group in groups {
                scope.spawn(move || checks::every_collective(&group.staged(Device::Cpu)));
            }
        });
    }
}

#[test]
fn where_copies_travel_the_buffers_come_back_and_are_never_lent() {
    let [group] = <[_; 1]>::try_from(groups(1, LONG)).unwrap();
    let group = group.staged(Device::Cpu);
    let send = buffer_of(&[1.0, 2.0]);
    let receive = buffer_of(&[7.0, 7.0]);
    let places = [send.tensor().data_ptr(), receive.tensor().data_ptr()];
    let pending = group.all_gather(send, receive).unwrap();
    let (send, receive) = pending.wait(LONG).unwrap();
    assert_eq!([send.tensor().data_ptr(), receive.tensor().data_ptr()], places);
    assert_eq!((values_of(&send), values_of(&receive)), (vec![1.0, 2.0], vec![1.0, 2.0]));
    group.aborter().abort();
    let refused = group.all_gather(send, receive).unwrap_err();
    assert_eq!(refused.error, c10d::Error::Aborted);
    assert_eq!(refused.buffers.0.tensor().data_ptr(), places[0]);
}

#[test]
fn one_buffer_can_be_lent_again_at_once() {
    on_ranks(3, |group| {
        let mut buffer = buffer_of(&[1.0; 100]);
        let mut receive = Buffer::zeros(300, Kind::Float, Device::Cpu).unwrap();
        for _ in 0..200 {
            buffer = group.all_reduce(buffer, ReduceOp::Max).unwrap().wait(LONG).unwrap();
            (buffer, receive) = group.all_gather(buffer, receive).unwrap().wait(LONG).unwrap();
        }
        assert_eq!(values_of(&receive), [1.0; 300]);
    });
}

#[test]
fn every_kind_travels() {
    let kinds = [
        Kind::Uint8,
        Kind::Int8,
        Kind::Int,
        Kind::Int64,
        Kind::Half,
        Kind::BFloat16,
        Kind::Float,
        Kind::Double,
    ];
    on_ranks(2, |group| {
        for kind in kinds {
            let make = |numel| {
                let mut buffer = Buffer::zeros(numel, kind, Device::Cpu).unwrap();
                let _ = buffer.update(|tensor| tensor.fill_(3));
                buffer
            };
            let is = |buffer: &Buffer, value: f64| buffer.tensor().eq(value).all().int64_value(&[]) == 1;
            let sum = group.all_reduce(make(100), ReduceOp::Sum).unwrap().wait(LONG).unwrap();
            assert!(is(&sum, 6.0), "{kind:?}");
            let (_, all) = group.all_gather(sum, make(200)).unwrap().wait(LONG).unwrap();
            assert!(is(&all, 6.0), "{kind:?}");
            let splits = if group.rank() == 0 { [[50, 150], [50, 50]] } else { [[50, 150], [150, 150]] };
            let receive = make(splits[1].iter().sum());
            let (_, part) =
                group.all_to_all(all, &splits[0], receive, &splits[1]).unwrap().wait(LONG).unwrap();
            assert!(is(&part, 6.0), "{kind:?}");
            let copy = group.broadcast(make(10), 1).unwrap().wait(LONG).unwrap();
            assert!(is(&copy, 3.0), "{kind:?}");
        }
    });
}

/// The root may close its group as soon as its own part is done: its data still arrives.
#[test]
fn an_idle_group_is_closed_gently() {
    for _ in 0..10 {
        let mut groups = common::groups(2, common::GLOO_LIMIT);
        let (last, first) = (groups.pop().unwrap(), groups.pop().unwrap());
        let length = 1 << 20;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let pending = first.broadcast(buffer_of(&vec![5.0; length]), 0).unwrap();
                pending.wait(LONG).unwrap();
                drop(first);
            });
            scope.spawn(move || {
                let pending = last.broadcast(buffer_of(&vec![0.0; length]), 0).unwrap();
                assert_eq!(values_of(&pending.wait(LONG).unwrap()), vec![5.0; length]);
            });
        });
    }
}
