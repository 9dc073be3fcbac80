//! Misuse gives typed errors that return the buffers, and never a panic.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::sync::Arc;
use std::time::Duration;

use c10d::{Buffer, Error, GlooAddress, Group, KeyValueStore, MemoryStore, ReduceOp, StoreError};
use common::{GLOO_LIMIT, LONG, buffer_of, groups, options, values_of};
use tch::{Device, Kind, Tensor};

fn alone() -> Group {
    groups(1, GLOO_LIMIT).remove(0)
}

fn invalid<T: c10d::Lent>(result: c10d::Launch<T>) -> T {
    let refused = result.expect_err("refused");
    assert!(matches!(refused.error, Error::Invalid(_)), "{:?}", refused.error);
    refused.buffers
}

#[test]
fn an_aliased_buffer_is_refused_until_the_alias_is_gone() {
    let group = alone();
    let aliases: [fn(&Buffer) -> Tensor; 4] = [
        |buffer| buffer.tensor().shallow_clone(),
        |buffer| buffer.tensor().view([2, 2]),
        |buffer| buffer.tensor().narrow(0, 1, 2),
        |buffer| buffer.tensor().detach(),
    ];
    for make in aliases {
        let buffer = buffer_of(&[1.0, 2.0, 3.0, 4.0]);
        let alias = make(&buffer);
        let refused = group.all_reduce(buffer, ReduceOp::Sum).unwrap_err();
        assert_eq!(refused.error, Error::Aliased);
        let mut buffer = refused.buffers;
        assert_eq!(buffer.as_bytes().map(drop), Err(Error::Aliased));
        drop(alias);
        let buffer = group.all_reduce(buffer, ReduceOp::Sum).unwrap().wait(LONG).unwrap();
        assert_eq!(values_of(&buffer), [1.0, 2.0, 3.0, 4.0]);
    }
}

#[test]
fn a_buffer_that_is_no_longer_flat_is_refused() {
    let group = alone();
    let mut buffer = buffer_of(&[1.0; 4]);
    buffer.update(|tensor| *tensor = Tensor::zeros([2, 2], (Kind::Float, Device::Cpu)));
    let mut buffer = invalid(group.all_reduce(buffer, ReduceOp::Sum));
    buffer.update(|tensor| *tensor = Tensor::zeros([4], (Kind::Float, Device::Cpu)).set_requires_grad(true));
    drop(invalid(group.all_reduce(buffer, ReduceOp::Sum)));
    let matrix = Buffer::from_tensor(Tensor::zeros([2, 2], (Kind::Float, Device::Cpu))).unwrap_err();
    assert!(matches!(matrix.error, Error::Invalid(_)));
    assert_eq!(matrix.buffers.size(), [2, 2]);
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let group = alone();
    let of = |length: usize| buffer_of(&vec![1.0; length]);
    let doubles = Buffer::zeros(4, Kind::Double, Device::Cpu).unwrap();
    let flags = Buffer::zeros(4, Kind::Bool, Device::Cpu).unwrap();
    drop(invalid(group.all_reduce(of(0), ReduceOp::Sum)));
    drop(invalid(group.all_reduce(flags, ReduceOp::Max)));
    drop(invalid(group.broadcast(of(4), 1)));
    drop(invalid(group.broadcast(of(4), usize::MAX)));
    drop(invalid(group.all_gather(of(4), of(5))));
    let (send, receive) = invalid(group.all_gather(of(4), doubles));
    assert_eq!((send.numel(), receive.kind()), (4, Kind::Double));
    drop(invalid(group.all_to_all(of(4), &[4], of(4), &[3])));
    drop(invalid(group.all_to_all(of(4), &[5], of(4), &[4])));
    drop(invalid(group.all_to_all(of(4), &[2, 2], of(4), &[4])));
    drop(invalid(group.all_to_all(of(4), &[], of(4), &[4])));
    drop(invalid(group.exchange(of(4), &[(0, 4)], of(4), &[])));
    drop(invalid(group.exchange(of(4), &[(1, 4)], of(4), &[])));
    drop(invalid(group.exchange(of(4), &[], of(4), &[(usize::MAX, usize::MAX)])));
    // None of these broke the group.
    let (_, receive) = group.all_to_all(of(4), &[4], of(4), &[4]).unwrap().wait(LONG).unwrap();
    assert_eq!(values_of(&receive), [1.0; 4]);
    // Nothing to exchange is fine too.
    drop(group.all_to_all(of(0), &[0], of(0), &[0]).unwrap().wait(LONG).unwrap());
    assert!(matches!(Buffer::zeros(usize::MAX, Kind::Float, Device::Cpu), Err(Error::Invalid(_))));
    assert!(matches!(Buffer::zeros(1 << 60, Kind::Float, Device::Cpu), Err(Error::Fatal(_))));
}

#[test]
fn groups_that_cannot_be_formed_say_why() {
    let form = |options| Group::gloo(options, MemoryStore::new(), "group").map(drop);
    assert!(matches!(form(options(1, 1, LONG)), Err(Error::Invalid(_))));
    assert!(matches!(form(options(0, 0, LONG)), Err(Error::Invalid(_))));
    assert!(matches!(form(options(0, 1, Duration::ZERO)), Err(Error::Invalid(_))));
    assert!(matches!(form(options(0, usize::MAX, LONG)), Err(Error::Invalid(_))));
    let with = |address| c10d::GlooOptions { address, ..options(0, 1, LONG) };
    assert!(matches!(form(with(GlooAddress::Hostname(String::new()))), Err(Error::Invalid(_))));
    let nowhere = form(with(GlooAddress::Interface("no-such-interface".into())));
    assert!(matches!(&nowhere, Err(Error::Fatal(detail)) if !detail.contains('\n')), "{nowhere:?}");
    assert!(form(with(GlooAddress::Interface("lo".into()))).is_ok());
    // No other rank comes.
    assert_eq!(form(options(0, 2, Duration::from_millis(100))), Err(Error::Timeout));
}

/// A store that answers every operation with one error.
struct Broken(StoreError);

impl KeyValueStore for Broken {
    fn set(&self, _: &str, _: &[u8]) -> Result<(), StoreError> {
        Err(self.0.clone())
    }
    fn get(&self, _: &str, _: Duration) -> Result<Vec<u8>, StoreError> {
        Err(self.0.clone())
    }
    fn add(&self, _: &str, _: i64) -> Result<i64, StoreError> {
        Err(self.0.clone())
    }
    fn compare_set(&self, _: &str, _: &[u8], _: &[u8]) -> Result<Vec<u8>, StoreError> {
        Err(self.0.clone())
    }
    fn delete(&self, _: &str) -> Result<bool, StoreError> {
        Err(self.0.clone())
    }
    fn contains(&self, _: &[&str]) -> Result<bool, StoreError> {
        Err(self.0.clone())
    }
}

#[test]
fn a_stores_error_arrives_as_it_was_sent() {
    let form = |error| Group::gloo(options(0, 2, LONG), Arc::new(Broken(error)), "group").map(drop);
    assert_eq!(form(StoreError::Timeout), Err(Error::Timeout));
    assert_eq!(form(StoreError::Aborted), Err(Error::Aborted));
    assert_eq!(form(StoreError::Fatal("odd".into())), Err(Error::Fatal("odd".into())));
    assert!(matches!(form(StoreError::Unreachable("away".into())), Err(Error::PeerLost(_))));
}

#[test]
fn bytes_are_the_elements() {
    let mut buffer = Buffer::zeros(2, Kind::Int, Device::Cpu).unwrap();
    buffer.as_bytes_mut().unwrap().copy_from_slice(&[1, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(Vec::<i32>::try_from(buffer.tensor()).unwrap(), [1, 256]);
    let _ = buffer.update(|tensor| tensor.fill_(-1));
    assert_eq!(buffer.as_bytes().unwrap(), [255; 8]);
    assert_eq!(Buffer::zeros(0, Kind::Int, Device::Cpu).unwrap().as_bytes().map(<[u8]>::len), Ok(0));
}
