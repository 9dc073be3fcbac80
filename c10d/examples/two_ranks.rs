//! Two ranks, each a thread of this process, sum what they have.
//!
//!     cargo run --release -p c10d --example two_ranks
//!
//! Ranks in different processes do the same with a [`TcpStore`](c10d::TcpStore) in the place of the shared
//! [`MemoryStore`](c10d::MemoryStore), and ranks of a program with a channel of its own with a
//! [`KeyValueStore`](c10d::KeyValueStore) over that.

use std::error::Error;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use c10d::{Buffer, GlooAddress, GlooOptions, Group, KeyValueStore, MemoryStore, ReduceOp};
use tch::{Device, Kind};

const LIMIT: Duration = Duration::from_secs(30);
const WORLD_SIZE: usize = 2;

/// Joins the group and returns the first element of the sum.
fn rank(rank: usize, store: Arc<dyn KeyValueStore>) -> Result<f64, c10d::Error> {
    let options = GlooOptions {
        rank,
        world_size: WORLD_SIZE,
        timeout: LIMIT,
        operation_timeout: LIMIT,
        address: GlooAddress::Hostname("127.0.0.1".to_string()),
    };
    let group = Group::gloo(options, store, "generation 1")?;
    let mut gradient = Buffer::zeros(1024, Kind::Float, Device::Cpu)?;
    let value = if rank == 0 { 1.0 } else { 2.0 };
    let _ = gradient.update(|tensor| tensor.fill_(value));
    // The buffer is lent to the collective and comes back with its result. Until then the rank may compute.
    let pending = group.all_reduce(gradient, ReduceOp::Sum)?;
    let sum = pending.wait(LIMIT)?;
    // No rank may leave while another still receives.
    group.barrier()?.wait(LIMIT)?;
    Ok(sum.tensor().double_value(&[0]))
}

fn main() -> Result<(), Box<dyn Error>> {
    let store: Arc<dyn KeyValueStore> = MemoryStore::new();
    let ranks: Vec<_> = (0..WORLD_SIZE)
        .map(|number| {
            let store = store.clone();
            thread::spawn(move || rank(number, store))
        })
        .collect();
    for (number, rank) in ranks.into_iter().enumerate() {
        let sum = rank.join().map_err(|_| "a rank panicked")??;
        println!("rank {number}: 1 + 2 = {sum}");
        assert!((sum - 3.0).abs() < f64::EPSILON, "each rank has the same sum");
    }
    Ok(())
}
