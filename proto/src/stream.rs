//! Endless stream of samples (rule D2): the sample of each number q, and the numbers that a shard
//! reads.
//!
//! Number q lies in epoch q div N at place q mod N, for N samples. An epoch is a permutation of all samples,
//! drawn by Fisher and Yates's algorithm from a ChaCha8 generator whose key is a hash of (seed, epoch). A
//! batch may straddle epochs.
//!
//! A [`Change`] leaves samples out from some number on. There the stream begins anew over the
//! remaining samples: epochs count from that number, and it is part of their key. Samples keep
//! their index.
//!
//! Invariants:
//! 1. Every epoch holds each sample exactly once; after a change, each remaining sample.
//! 2. The sample of a number is a function of (seed, N, changes, q) alone: not of earlier calls,
//!    and never of the cluster. A change moves no number before it.
//! 3. The draws are implemented here, so that no release of a library changes the order of samples.

use std::collections::BTreeSet;

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};

/// Domain separation of these keys from all other uses of a job's seed.
const CONTEXT: &str = "ganglion 2026 sample permutation";

/// Domain separation of the keys of epochs after a change from those before any.
const CHANGED_CONTEXT: &str = "ganglion 2026 sample permutation after a change";

/// Change of the stream: samples left out from one of its numbers on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// First number of the stream without the samples.
    pub from: u64,
    /// Indices of the samples that are left out.
    pub left_out: Vec<u64>,
}

/// Samples of a job by their number in the endless stream.
///
/// Keeps the permutations of the two most recent epochs, 4 bytes a sample each: two, because a
/// batch may straddle epochs.
#[derive(Clone, Debug)]
pub struct SampleStream {
    seed: u64,
    len: u64,
    /// Segments in the order of their numbers; the first begins at 0.
    segments: Vec<Segment>,
    /// Permutations by segment and epoch, the most recent first.
    recent: Vec<((usize, u64), Vec<u32>)>,
}

/// Segment of the stream between two changes.
#[derive(Clone, Debug)]
struct Segment {
    from: u64,
    /// Sorted indices of the samples left out, including those of all changes before.
    left_out: BTreeSet<u64>,
}

impl SampleStream {
    /// Creates the stream over `len` samples.
    ///
    /// # Panics
    /// Unless `len` is from 1 to 2^32 - 1.
    pub fn new(seed: u64, len: u64) -> SampleStream {
        SampleStream::with_changes(seed, len, &[])
    }

    /// Creates the stream over `len` samples with changes, in the order of their numbers.
    ///
    /// # Panics
    /// Unless `len` is from 1 to 2^32 - 1, and the changes are in order, name samples below `len`,
    /// and leave one.
    pub fn with_changes(seed: u64, len: u64, changes: &[Change]) -> SampleStream {
        // A permutation holds 4 bytes a sample.
        assert!((1..=u64::from(u32::MAX)).contains(&len), "a stream over {len} samples");
        let mut segments = vec![Segment { from: 0, left_out: BTreeSet::new() }];
        for change in changes {
            let last = segments.last().expect("there is a first segment");
            // Out of order, the first change would not be found by its number.
            assert!(last.from <= change.from, "changes from {} and then from {}", last.from, change.from);
            let mut left_out = last.left_out.clone();
            left_out.extend(&change.left_out);
            assert!(left_out.last().is_none_or(|last| *last < len), "a change beyond {len} samples");
            // An epoch over nothing has no place for any number.
            assert!((left_out.len() as u64) < len, "a change that leaves none of {len} samples");
            segments.push(Segment { from: change.from, left_out });
        }
        SampleStream { seed, len, segments, recent: Vec::with_capacity(2) }
    }

    /// Returns the index, below `len`, of the sample with number `q`.
    pub fn sample(&mut self, q: u64) -> u64 {
        // The last segment that has begun by q; the first begins at 0, so there is one.
        let at = self.segments.partition_point(|segment| segment.from <= q) - 1;
        let Segment { from, left_out } = &self.segments[at];
        // Epochs count from the change on: what was left out earlier moves no place before it (invariant
        // 2).
        let (place, left) = (q - from, self.len - left_out.len() as u64);
        let within = usize::try_from(place % left).expect("a place is below 2^32");
        u64::from(self.epoch(at, place / left)[within])
    }

    fn epoch(&mut self, segment: usize, epoch: u64) -> &[u32] {
        match self.recent.iter().position(|&(known, _)| known == (segment, epoch)) {
            // Two are kept because a batch may straddle epochs: without the swap, both would be drawn
            // for each batch.
            Some(at) => self.recent[..=at].rotate_right(1),
            None => {
                self.recent.truncate(1);
                // Its cost grows with the data set: in training the thread that reads ahead pays it.
                self.recent.insert(0, ((segment, epoch), self.permutation(segment, epoch)));
            }
        }
        &self.recent[0].1
    }

    /// Draws the order of a segment's samples in one of its epochs.
    fn permutation(&self, segment: usize, epoch: u64) -> Vec<u32> {
        let mut key = [self.seed.to_le_bytes(), epoch.to_le_bytes()].concat();
        let Segment { from, left_out } = &self.segments[segment];
        // Jobs without changes keep the keys that they had before there were any.
        let context = if segment == 0 { CONTEXT } else { CHANGED_CONTEXT };
        if segment > 0 {
            key.extend(from.to_le_bytes());
        }
        // One key for each use of the seed: no other draw of the job can coincide with it.
        let mut rng = ChaCha8Rng::from_seed(blake3::derive_key(context, &key));

        let len = u32::try_from(self.len).expect("a stream has fewer than 2^32 samples");
        let mut order: Vec<u32> = (0..len).filter(|sample| !left_out.contains(&u64::from(*sample))).collect();
        // From the last place down, as Durstenfeld has it (1964, algorithm 235).
        for last in (1..order.len()).rev() {
            let bound = u32::try_from(last + 1).expect("an epoch has fewer than 2^32 samples");
            order.swap(last, below(&mut rng, bound) as usize);
        }
        order
    }
}

/// Unbiased draw from 0 to `bound` - 1 (Lemire, 2019, "Fast random integer generation in an
/// interval", algorithm 5).
///
/// The upper half of word x bound is the draw. A few of the 2^32 words are rejected, so that each
/// result has equally many.
fn below(rng: &mut ChaCha8Rng, bound: u32) -> u32 {
    // (2^32 - bound) mod bound, which is 2^32 mod bound, without 33 bits.
    let thrown_away = u64::from(bound.wrapping_neg() % bound);
    loop {
        let product = u64::from(rng.next_u32()) * u64::from(bound);
        // Words whose lower half is below that would make some results more frequent than others.
        if product & u64::from(u32::MAX) >= thrown_away {
            return u32::try_from(product >> 32).expect("the upper half of a u64 fits into a u32");
        }
    }
}

/// Division of the stream into steps, their reading phases, and the data shards of those.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamShape {
    /// n, the number of phases of a step that read samples.
    pub phases: u32,
    /// V, the number of data shards.
    pub data_shards: u32,
    /// b, the number of samples that a shard reads in a phase.
    pub shard_batch: u32,
}

impl StreamShape {
    /// Number in the stream of the first sample that data shard `shard` reads in reading phase `phase` of
    /// step `step`: ((s n + j) V + v) b.
    ///
    /// # Panics
    /// If the number is not below 2^64, which no finite run reaches.
    pub fn first(&self, step: u64, phase: u32, shard: u32) -> u64 {
        let nested = |outer: u64, size: u32, inner: u32| {
            outer.checked_mul(u64::from(size))?.checked_add(u64::from(inner))
        };
        nested(step, self.phases, phase)
            // From the outside in: step, phase, shard, sample (D2).
            .and_then(|phase| nested(phase, self.data_shards, shard))
            .and_then(|shard| nested(shard, self.shard_batch, 0))
            .expect("a run takes fewer than 2^64 samples")
    }
}

/// Term that reading `sample` as number `q` of the stream adds, mod 2^64, to the sample checksum
/// (`ledger`, rule D9).
///
/// The first 8 bytes, little-endian, of BLAKE3 over both numbers, 8 bytes each, little-endian.
pub fn ledger_term(q: u64, sample: u64) -> u64 {
    let mut entry = [0; 16];
    entry[..8].copy_from_slice(&q.to_le_bytes());
    entry[8..].copy_from_slice(&sample.to_le_bytes());
    // A hash, and not the numbers: two samples that were swapped must not give the same sum.
    let hash = blake3::hash(&entry);
    let first = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
    u64::from_le_bytes(*first)
}

#[cfg(test)]
mod tests;
