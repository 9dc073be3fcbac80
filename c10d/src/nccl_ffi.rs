//! The bridge to the C++ shim for NCCL.

use crate::store::StoreHandle;

#[cxx::bridge(namespace = "c10d_shim")]
pub(crate) mod shim {
    extern "Rust" {
        type StoreHandle;
    }

    unsafe extern "C++" {
        include!("c10d/shim/nccl.h");

        type Group = crate::ffi::shim::Group;

        fn nccl_group(
            rank: i32,
            world_size: i32,
            timeout_ms: u64,
            device: i8,
            store: Box<StoreHandle>,
            prefix: &str,
        ) -> Result<UniquePtr<Group>>;
    }
}
