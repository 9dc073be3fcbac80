//! Process groups and their collectives.
//!
//! 1. All ranks of a group launch the same operations in the same order; the group cannot check that.
//! 2. Arguments are checked before anything is lent, and a refusal gives the buffers back.
//! 3. A group that is dropped with operations in flight is aborted; one that is idle is closed gently.

use std::sync::Arc;
use std::time::Duration;

use cxx::UniquePtr;
use tch::{Device, Kind};

use crate::core::Core;
use crate::error::Refused;
use crate::ffi::{at_tensor, shim};
use crate::flight::Signal;
use crate::pending::{Aborter, Lent, Pending};
use crate::staging::{Staged, Use};
use crate::store::{KeyValueStore, StoreHandle};
use crate::sync::milliseconds;
use crate::{Buffer, Error};

/// Lets groups over Gloo meet by few calls of their store: as many as ranks rather than as their square. All
/// ranks of a group must do so, or none. Must be called before another thread may read the environment.
///
/// # Errors
/// None in practice.
pub fn prepare_gloo() -> Result<(), Error> {
    Ok(shim::prepare_gloo()?)
}

/// Address at which its peers reach a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GlooAddress {
    /// A host name or IP address of this machine.
    Hostname(String),
    /// A network interface of this machine, such as `eth0`.
    Interface(String),
}

/// Parameters of a Gloo group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlooOptions {
    /// Rank of this process in the group, from 0.
    pub rank: usize,
    /// Number of ranks, at least 1.
    pub world_size: usize,
    /// Time limit for finding the peers.
    pub timeout: Duration,
    /// Gloo's own time limit for each operation. It also bounds how long an aborted group winds
    /// down.
    pub operation_timeout: Duration,
    /// Address at which the peers reach this rank.
    pub address: GlooAddress,
}

/// Elementwise reduction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// a + b, in the backend's own order.
    Sum,
    /// a * b.
    Product,
    /// Elementwise minimum.
    Min,
    /// Elementwise maximum.
    Max,
}

impl ReduceOp {
    /// Returns the value of `c10d::ReduceOp::RedOpType`.
    fn code(self) -> u8 {
        match self {
            // 1 is the average, which Gloo does not have.
            ReduceOp::Sum => 0,
            ReduceOp::Product => 2,
            ReduceOp::Min => 3,
            ReduceOp::Max => 4,
        }
    }
}

/// Element types that both Gloo and NCCL carry.
const KINDS: [Kind; 8] =
    [Kind::Uint8, Kind::Int8, Kind::Int, Kind::Int64, Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double];

/// Operation in flight, or the reason why it was not started, with the buffers back.
pub type Launch<T> = Result<Pending<T>, Refused<T>>;

/// Set of processes (or threads) that exchange buffers. See the crate's documentation for an
/// example.
pub struct Group {
    core: Arc<Core>,
    rank: usize,
    world_size: usize,
    device: Device,
    /// Whether copies of the buffers are sent in their place.
    staged: bool,
}

type Started = Result<UniquePtr<shim::Work>, cxx::Exception>;

impl Group {
    /// Forms a group over Gloo, for buffers on CPUs. Blocks until all ranks have connected to each
    /// other. The prefix separates the groups in one store and must be new for each.
    ///
    /// # Errors
    /// [`Error::Invalid`] for invalid options, [`Error::Timeout`] if a rank did not come,
    /// [`Error::PeerLost`] if one went away meanwhile, [`Error::Fatal`] for an unusable address, or
    /// the store's own error.
    pub fn gloo(options: GlooOptions, store: Arc<dyn KeyValueStore>, prefix: &str) -> Result<Group, Error> {
        let GlooOptions { rank, world_size, timeout, operation_timeout, address } = options;
        // c10d takes a limit of zero for none, and every wait here is limited.
        let (small_rank, small_size) = check_ranks(rank, world_size, timeout.min(operation_timeout))?;
        let (hostname, interface) = match &address {
            GlooAddress::Hostname(name) => (name.as_str(), ""),
            GlooAddress::Interface(name) => ("", name.as_str()),
        };
        // An empty text stands for "not given" on the side of C++.
        if hostname.is_empty() && interface.is_empty() {
            return Err(Error::Invalid("an empty address".into()));
        }
        let store = Box::new(StoreHandle(store));
        let limits = shim::GlooLimits {
            meeting_ms: milliseconds(timeout),
            operation_ms: milliseconds(operation_timeout),
        };
        let group = shim::gloo_group(small_rank, small_size, &limits, hostname, interface, store, prefix)?;
        Ok(Group::new(group, rank, world_size, Device::Cpu))
    }

    /// Returns the part of the group that its operations share.
    #[cfg(test)]
    pub(crate) fn into_core(self) -> Arc<Core> {
        let core = Arc::clone(&self.core);
        // Its `drop` would close the core.
        std::mem::forget(self);
        core
    }

    pub(crate) fn new(
        group: UniquePtr<shim::Group>,
        rank: usize,
        world_size: usize,
        device: Device,
    ) -> Group {
        Group { core: Core::new(group), rank, world_size, device, staged: false }
    }

    /// Returns the same group, for buffers on `device` from now on. Their content goes through
    /// copies in the CPU's memory, made when an operation is launched and read when it is waited
    /// for, both on the calling thread. So Gloo serves GPUs too, slower than NCCL, also where ranks
    /// share one.
    #[must_use]
    pub fn staged(mut self, device: Device) -> Group {
        (self.device, self.staged) = (device, true);
        self
    }

    /// Rank of this process in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Device of the buffers that this group accepts.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether the group still accepts operations.
    pub fn is_open(&self) -> bool {
        self.core.is_open()
    }

    /// Returns a handle that ends this group's operations from any thread.
    pub fn aborter(&self) -> Aborter {
        Aborter::new(&self.core)
    }

    /// Combines the ranks' buffers element by element; each rank gets the result in its buffer.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Aliased`] or [`Error::Aborted`], with the buffer back.
    pub fn all_reduce(&self, buffer: Buffer, op: ReduceOp) -> Launch<Buffer> {
        // All checks come before the launch: what is refused here was never lent, and comes back.
        let check = self.check(&[&buffer]).and_then(|()| check_filled(&buffer));
        self.launch(buffer, &[Use::Both], check, |group, buffers, signal| {
            group.all_reduce(at_tensor(buffers[0].tensor()), op.code(), signal)
        })
    }

    /// Sends `send_splits[r]` elements to each rank r, in order, and receives `receive_splits[r]`
    /// from it. The splits may be ragged or 0; the count that rank a sends to b must be the one
    /// that b expects from a.
    ///
    /// # Errors
    /// As for [`all_reduce`](Group::all_reduce), with both buffers back.
    pub fn all_to_all(
        &self,
        send: Buffer,
        send_splits: &[usize],
        receive: Buffer,
        receive_splits: &[usize],
    ) -> Launch<(Buffer, Buffer)> {
        let splits = self.check(&[&send, &receive]).and_then(|()| {
            let send_splits = self.check_splits("send", &send, send_splits)?;
            let receive_splits = self.check_splits("receive", &receive, receive_splits)?;
            Ok((send_splits, receive_splits))
        });
        let (check, (send_splits, receive_splits)) = match splits {
            Ok(splits) => (Ok(()), splits),
            // The splits are not used: the launch is refused before it needs them.
            Err(error) => (Err(error), Default::default()),
        };
        self.launch((send, receive), &[Use::Read, Use::Written], check, |group, buffers, signal| {
            let [send, receive] = [0, 1].map(|i: usize| at_tensor(buffers[i].tensor()));
            group.all_to_all(send, &send_splits, receive, &receive_splits, signal)
        })
    }

    /// Whether the backend has [`exchange`](Group::exchange).
    pub fn exchanges(&self) -> bool {
        self.core.exchanges()
    }

    /// Sends parts of a buffer to some ranks, and receives others from some: `to` and `from` have the rank
    /// and the number of elements of each part, one after the other from the start of the buffers. What
    /// rank a sends to b must be what b expects from a, also in number; other ranks need not take part.
    ///
    /// # Errors
    /// As for [`all_reduce`](Group::all_reduce), with both buffers back.
    pub fn exchange(
        &self,
        send: Buffer,
        to: &[(usize, usize)],
        receive: Buffer,
        from: &[(usize, usize)],
    ) -> Launch<(Buffer, Buffer)> {
        let parts = self.check(&[&send, &receive]).and_then(|()| {
            require(self.exchanges(), || "this backend exchanges nothing between two ranks".into())?;
            Ok((self.check_parts("send", &send, to)?, self.check_parts("receive", &receive, from)?))
        });
        let (check, ((to, send_counts), (from, receive_counts))) = match parts {
            Ok(parts) => (Ok(()), parts),
            // The parts are not used: the launch is refused before it needs them.
            Err(error) => (Err(error), Default::default()),
        };
        // A copy of the received buffer is written back as a whole, so it begins as the buffer is.
        self.launch((send, receive), &[Use::Read, Use::Both], check, |group, buffers, signal| {
            let [send, receive] = [0, 1].map(|i: usize| at_tensor(buffers[i].tensor()));
            group.exchange(send, &to, &send_counts, receive, &from, &receive_counts, signal)
        })
    }

    /// Gathers all ranks' `send` buffers on each rank, one after the other, in `receive`, which is
    /// `world_size` times as long.
    ///
    /// # Errors
    /// As for [`all_reduce`](Group::all_reduce), with both buffers back.
    pub fn all_gather(&self, send: Buffer, receive: Buffer) -> Launch<(Buffer, Buffer)> {
        let check = self.check(&[&send, &receive]).and_then(|()| check_filled(&send)).and_then(|()| {
            let (had, needed) = (receive.numel(), self.world_size.saturating_mul(send.numel()));
            require(had == needed, || format!("{had} elements to receive {needed}"))
        });
        self.launch((send, receive), &[Use::Read, Use::Written], check, |group, buffers, signal| {
            let [send, receive] = [0, 1].map(|i: usize| at_tensor(buffers[i].tensor()));
            group.all_gather(send, receive, signal)
        })
    }

    /// Copies the root's buffer to all ranks.
    ///
    /// # Errors
    /// As for [`all_reduce`](Group::all_reduce), with the buffer back.
    pub fn broadcast(&self, buffer: Buffer, root: usize) -> Launch<Buffer> {
        let size = self.world_size;
        let check = self
            .check(&[&buffer])
            .and_then(|()| check_filled(&buffer))
            .and_then(|()| require(root < size, || format!("root {root} in a group of {size}")));
        // A root out of range was refused above.
        let root = i64::try_from(root).unwrap_or(i64::MAX);
        self.launch(buffer, &[Use::Both], check, |group, buffers, signal| {
            group.broadcast(at_tensor(buffers[0].tensor()), root, signal)
        })
    }

    /// Completes when all ranks have launched it.
    ///
    /// # Errors
    /// [`Error::Aborted`].
    pub fn barrier(&self) -> Launch<()> {
        self.launch((), &[], Ok(()), |group, _, signal| group.barrier(signal))
    }

    fn launch<T: Lent>(
        &self,
        lent: T,
        uses: &'static [Use],
        check: Result<(), Error>,
        start: impl FnOnce(&shim::Group, &[Buffer], Box<Signal>) -> Started,
    ) -> Launch<T> {
        if let Err(error) = check {
            return Err(Refused { error, buffers: lent });
        }
        let refused = |(error, buffers)| Refused { error, buffers: T::from_buffers(buffers) };
        let buffers = lent.into_buffers();
        let (staged, travelling) = if self.staged {
            // Out of memory, for example: nothing was sent yet.
            let (staged, copies) = Staged::new(buffers, uses).map_err(refused)?;
            (Some(staged), copies)
        } else {
            (None, buffers)
        };
        match self.core.launch(travelling, start) {
            Ok(launched) => Ok(Pending::new(Arc::clone(&self.core), launched, staged)),
            Err((error, travelling)) => {
                // Only the copies were at risk: the caller's own memory was not lent.
                Err(refused((error, staged.map_or(travelling, Staged::into_buffers))))
            }
        }
    }

    /// Checks the buffers of any collective.
    fn check(&self, buffers: &[&Buffer]) -> Result<(), Error> {
        for buffer in buffers {
            // Before its device or kind is looked at, since `update` may have changed anything.
            buffer.check()?;
            let (kind, device) = (buffer.kind(), buffer.device());
            require(device == self.device, || {
                format!("a buffer on {device:?} in a group on {:?}", self.device)
            })?;
            require(KINDS.contains(&kind), || format!("elements of kind {kind:?} cannot be exchanged"))?;
            require(kind == buffers[0].kind(), || "buffers of different kinds".into())?;
        }
        Ok(())
    }

    /// Checks parts of a buffer, and returns their ranks and counts in c10d's types.
    fn check_parts(
        &self,
        name: &str,
        buffer: &Buffer,
        parts: &[(usize, usize)],
    ) -> Result<(Vec<i32>, Vec<i64>), Error> {
        let (numel, size) = (buffer.numel(), self.world_size);
        let sum = parts.iter().try_fold(0_usize, |sum, (_, count)| sum.checked_add(*count));
        let is_right = |(rank, count): &(usize, usize)| *rank < size && *rank != self.rank && *count > 0;
        require(parts.iter().all(is_right) && sum.is_some_and(|sum| sum <= numel), || {
            format!("{name} parts {parts:?} of {numel} elements, on rank {} of {size}", self.rank)
        })?;
        let small = |(rank, _): &(usize, usize)| i32::try_from(*rank).unwrap_or(i32::MAX);
        // None exceeds the length of a tensor.
        let count = |(_, count): &(usize, usize)| i64::try_from(*count).unwrap_or(i64::MAX);
        Ok((parts.iter().map(small).collect(), parts.iter().map(count).collect()))
    }

    fn check_splits(&self, name: &str, buffer: &Buffer, splits: &[usize]) -> Result<Vec<i64>, Error> {
        let (count, size) = (splits.len(), self.world_size);
        // c10d takes an empty list of splits for even ones.
        require(count == size, || format!("{count} {name} splits in a group of {size}"))?;
        let sum = splits.iter().try_fold(0_usize, |sum, split| sum.checked_add(*split));
        let numel = buffer.numel();
        require(sum == Some(numel), || format!("{name} splits {splits:?} of {numel} elements"))?;
        // No split exceeds the sum, which is a tensor's length.
        Ok(splits.iter().map(|split| i64::try_from(*split).unwrap_or(i64::MAX)).collect())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A group that is dropped in the middle of an operation is aborted: its peers wait in it, and
        // its destructor would wait for them (invariant 3).
        self.core.close();
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Group { rank, world_size, device, .. } = self;
        write!(formatter, "Group {{ rank: {rank}, world_size: {world_size}, device: {device:?} }}")
    }
}

fn require(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), Error> {
    if condition { Ok(()) } else { Err(Error::Invalid(otherwise())) }
}

fn check_filled(buffer: &Buffer) -> Result<(), Error> {
    require(buffer.numel() > 0, || "an empty buffer".into())
}

/// Converts rank and size to c10d's types.
pub(crate) fn check_ranks(rank: usize, world_size: usize, timeout: Duration) -> Result<(i32, i32), Error> {
    // Else the others would wait for a rank that does not exist, or never get this one.
    require(rank < world_size, || format!("rank {rank} in a group of {world_size}"))?;
    require(!timeout.is_zero(), || "a time limit of zero".into())?;
    let small = |number| i32::try_from(number).map_err(|_| Error::Invalid(format!("{number} ranks")));
    Ok((small(rank)?, small(world_size)?))
}
