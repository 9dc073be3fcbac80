//! The endless stream of samples (rule D2): which sample has number q, and which numbers a shard reads.
//!
//! Number q lies in epoch q div N at place q mod N, for N samples. An epoch is a permutation of all samples, drawn by
//! Fisher and Yates's algorithm from a ChaCha8 generator whose key is a hash of (seed, epoch). A batch may straddle epochs.
//!
//! Invariants:
//! 1. Every epoch holds each sample exactly once.
//! 2. The sample of a number is a function of (seed, N, q), of nothing that was asked before, and never of the cluster.
//! 3. The draws are spelled out here, so that no release of a library changes the order of samples.

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};

/// Separates these keys from all other uses of a job's seed.
const CONTEXT: &str = "ganglion 2026 sample permutation";

/// The samples of a job, by their number in the endless stream.
///
/// Keeps the permutations of the two epochs used last, 4 bytes a sample each: two, because a batch may straddle epochs.
#[derive(Clone, Debug)]
pub struct SampleStream {
    seed: u64,
    len: u64,
    /// The epoch used last comes first.
    recent: Vec<(u64, Vec<u32>)>,
}

impl SampleStream {
    /// The stream over `len` samples.
    ///
    /// # Panics
    /// Unless `len` is from 1 to 2^32 - 1.
    pub fn new(seed: u64, len: u64) -> SampleStream {
        assert!((1..=u64::from(u32::MAX)).contains(&len), "a stream over {len} samples");
        SampleStream { seed, len, recent: Vec::with_capacity(2) }
    }

    /// The index, below `len`, of the sample with number `q`.
    pub fn sample(&mut self, q: u64) -> u64 {
        let place = usize::try_from(q % self.len).expect("a place is below 2^32");
        u64::from(self.epoch(q / self.len)[place])
    }

    fn epoch(&mut self, epoch: u64) -> &[u32] {
        match self.recent.iter().position(|&(known, _)| known == epoch) {
            Some(at) => self.recent[..=at].rotate_right(1),
            None => {
                self.recent.truncate(1);
                self.recent.insert(0, (epoch, permutation(self.seed, epoch, self.len)));
            }
        }
        &self.recent[0].1
    }
}

/// The order of samples 0 to `len` - 1 in one epoch.
fn permutation(seed: u64, epoch: u64, len: u64) -> Vec<u32> {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..].copy_from_slice(&epoch.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(blake3::derive_key(CONTEXT, &key));

    let len = u32::try_from(len).expect("a stream has fewer than 2^32 samples");
    let mut order: Vec<u32> = (0..len).collect();
    for last in (1..len).rev() {
        order.swap(last as usize, below(&mut rng, last + 1) as usize);
    }
    order
}

/// An unbiased draw from 0 to `bound` - 1 (Lemire, 2019, "Fast random integer generation in an interval", algorithm 5).
///
/// The upper half of word x bound is the draw. Of the 2^32 words a few are thrown away, so that each draw has as many.
fn below(rng: &mut ChaCha8Rng, bound: u32) -> u32 {
    let thrown_away = u64::from(bound.wrapping_neg() % bound);
    loop {
        let product = u64::from(rng.next_u32()) * u64::from(bound);
        if product & u64::from(u32::MAX) >= thrown_away {
            return u32::try_from(product >> 32).expect("the upper half of a u64 fits into a u32");
        }
    }
}

/// The number in the stream of the first of the `shard_batch` samples that data shard `shard` reads in discriminator
/// phase `phase` of `phases` in step `step`: ((s n + j) V + v) b.
///
/// # Panics
/// If the number is not below 2^64, which no run that ends reaches.
pub fn stream_position(
    step: u64,
    phase: u32,
    phases: u32,
    data_shards: u32,
    shard: u32,
    shard_batch: u32,
) -> u64 {
    let nested =
        |outer: u64, size: u32, inner: u32| outer.checked_mul(u64::from(size))?.checked_add(u64::from(inner));
    nested(step, phases, phase)
        .and_then(|phase| nested(phase, data_shards, shard))
        .and_then(|shard| nested(shard, shard_batch, 0))
        .expect("a run takes fewer than 2^64 samples")
}

/// What reading `sample` as number `q` of the stream adds, mod 2^64, to the ledger (rule D9).
///
/// The first 8 bytes, little-endian, of BLAKE3 over both numbers, 8 bytes each, little-endian.
pub fn ledger_term(q: u64, sample: u64) -> u64 {
    let mut entry = [0; 16];
    entry[..8].copy_from_slice(&q.to_le_bytes());
    entry[8..].copy_from_slice(&sample.to_le_bytes());
    let hash = blake3::hash(&entry);
    let first = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
    u64::from_le_bytes(*first)
}

#[cfg(test)]
mod tests;
