//! Bridge to the C++ shim for groups and stores. Functions that can throw return a `Result`; the
//! message is parsed by [`Error::from_shim`](crate::Error).

use crate::flight::Signal;
use crate::store::StoreHandle;

// The calls are those of the C++.
#[allow(clippy::too_many_arguments)]
#[cxx::bridge(namespace = "c10d_shim")]
pub(crate) mod shim {
    extern "Rust" {
        type Signal;
        fn complete(self: &Signal, description: &CxxString);

        type StoreHandle;
        fn set(self: &StoreHandle, key: &str, value: &[u8]) -> Result<()>;
        fn get(self: &StoreHandle, key: &str, timeout_ms: u64) -> Result<Vec<u8>>;
        fn get_many(self: &StoreHandle, keys: &[&str], timeout_ms: u64) -> Result<Vec<u8>>;
        fn add(self: &StoreHandle, key: &str, amount: i64) -> Result<i64>;
        fn compare_set(self: &StoreHandle, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>>;
        fn remove(self: &StoreHandle, key: &str) -> Result<bool>;
        fn contains(self: &StoreHandle, keys: &[&str]) -> Result<bool>;
        fn wait(self: &StoreHandle, keys: &[&str], timeout_ms: u64) -> Result<()>;
    }

    /// Time limits of a Gloo group, in milliseconds.
    struct GlooLimits {
        meeting_ms: u64,
        operation_ms: u64,
    }

    unsafe extern "C++" {
        include!("c10d/shim/group.h");
        include!("c10d/shim/nccl.h");
        include!("c10d/shim/store.h");

        #[namespace = "at"]
        type Tensor;

        fn is_flat(tensor: &Tensor) -> bool;
        fn is_exclusive(tensor: &Tensor) -> bool;
        fn byte_length(tensor: &Tensor) -> usize;
        fn data_pointer(tensor: &Tensor) -> Result<*mut u8>;

        type Work;
        fn poll(self: &Work);

        type Group;
        fn close(self: &Group) -> Result<()>;
        fn polls(self: &Group) -> bool;
        fn all_reduce(self: &Group, tensor: &Tensor, op: u8, signal: Box<Signal>) -> Result<UniquePtr<Work>>;
        fn all_to_all(
            self: &Group,
            send: &Tensor,
            send_splits: &[i64],
            receive: &Tensor,
            receive_splits: &[i64],
            signal: Box<Signal>,
        ) -> Result<UniquePtr<Work>>;
        fn exchanges(self: &Group) -> bool;
        fn exchange(
            self: &Group,
            send: &Tensor,
            to: &[i32],
            send_counts: &[i64],
            receive: &Tensor,
            from: &[i32],
            receive_counts: &[i64],
            signal: Box<Signal>,
        ) -> Result<UniquePtr<Work>>;
        fn all_gather(
            self: &Group,
            send: &Tensor,
            receive: &Tensor,
            signal: Box<Signal>,
        ) -> Result<UniquePtr<Work>>;
        fn broadcast(
            self: &Group,
            tensor: &Tensor,
            root: i64,
            signal: Box<Signal>,
        ) -> Result<UniquePtr<Work>>;
        fn barrier(self: &Group, signal: Box<Signal>) -> Result<UniquePtr<Work>>;

        #[cfg(feature = "cuda")]
        fn nccl_group(
            rank: i32,
            world_size: i32,
            timeout_ms: u64,
            device: i8,
            store: Box<StoreHandle>,
            prefix: &str,
        ) -> Result<UniquePtr<Group>>;

        fn prepare_gloo() -> Result<()>;
        fn gloo_group(
            rank: i32,
            world_size: i32,
            limits: &GlooLimits,
            hostname: &str,
            interface: &str,
            store: Box<StoreHandle>,
            prefix: &str,
        ) -> Result<UniquePtr<Group>>;

        fn live_handles() -> usize;
        fn wait_for_handles(timeout_ms: u64) -> usize;

        type TcpStore;
        fn port(self: &TcpStore) -> u16;
        fn set(self: &TcpStore, key: &str, value: &[u8]) -> Result<()>;
        fn get(self: &TcpStore, key: &str, timeout_ms: u64) -> Result<Vec<u8>>;
        fn add(self: &TcpStore, key: &str, amount: i64) -> Result<i64>;
        fn compare_set(self: &TcpStore, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>>;
        fn remove(self: &TcpStore, key: &str) -> Result<bool>;
        fn contains(self: &TcpStore, keys: &[&str]) -> Result<bool>;
        fn tcp_store(host: &str, port: u16, is_server: bool, timeout_ms: u64) -> Result<UniquePtr<TcpStore>>;
    }
}

// SAFETY: a Group's members may be called from any thread: launches are serialised by its own
// mutex, `close` only touches connections that lock themselves, and its destructor may run on any
// thread.
unsafe impl Send for shim::Group {}
// SAFETY: as above.
unsafe impl Sync for shim::Group {}
// SAFETY: a Work is only polled, under its own mutex, and destroyed, and c10d's works are built to
// be inspected by other threads.
unsafe impl Send for shim::Work {}
// SAFETY: as above.
unsafe impl Sync for shim::Work {}
// SAFETY: c10d::TCPStore serialises its operations with its own mutex.
unsafe impl Send for shim::TcpStore {}
// SAFETY: as above.
unsafe impl Sync for shim::TcpStore {}

/// Casts tch's tensor to the shim's type.
pub(crate) fn at_tensor(tensor: &tch::Tensor) -> &shim::Tensor {
    // SAFETY: tch keeps a valid, non-null `torch::Tensor*` (the same type as `at::Tensor*`) for as long as
    // the `tch::Tensor` lives, and the reference returned borrows it.
    unsafe { &*tensor.as_ptr().cast::<shim::Tensor>() }
}
