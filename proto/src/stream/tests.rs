//! Tests of the order of samples.

use std::collections::BTreeMap;
use std::ops::Range;

use proptest::prelude::*;

use super::*;

/// Numbers that the shards of a range read in one phase.
fn numbers(step: u64, phase: u32, job: [u32; 3], shards: Range<u32>) -> Vec<u64> {
    let [phases, data_shards, batch] = job;
    shards
        .flat_map(|shard| {
            let first = StreamShape { phases, data_shards, shard_batch: batch }.first(step, phase, shard);
            first..first + u64::from(batch)
        })
        .collect()
}

#[test]
fn positions_count_without_gaps() {
    let mut next = 0;
    for step in 0..3 {
        for phase in 0..2 {
            for q in numbers(step, phase, [2, 5, 7], 0..5) {
                assert_eq!(q, next);
                next += 1;
            }
        }
    }
    let shape = StreamShape { phases: 2, data_shards: 8, shard_batch: 64 };
    assert_eq!(shape.first(1_000_000, 1, 3), ((1_000_000 * 2 + 1) * 8 + 3) * 64);
}

#[test]
#[should_panic(expected = "fewer than 2^64 samples")]
fn positions_do_not_wrap() {
    StreamShape { phases: 4, data_shards: 1, shard_batch: 1 }.first(u64::MAX / 2, 0, 0);
}

proptest! {
    /// Invariant 1 of the stream, whether or not the batch divides the number of samples.
    #[test]
    fn every_epoch_is_a_permutation(seed: u64, len in 1..300_u64, batch in 1..70_u32) {
        let mut stream = SampleStream::new(seed, len);
        let job = [1, 1, batch];
        let steps = (3 * len).div_ceil(u64::from(batch));
        let taken = (0..steps).flat_map(|step| numbers(step, 0, job, 0..1));
        let samples: Vec<u64> = taken.map(|q| stream.sample(q)).collect();
        let len = usize::try_from(len).unwrap();
        for epoch in samples.chunks_exact(len) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            prop_assert!(sorted.iter().copied().eq(0..len as u64));
        }
    }

    /// Invariant 2 of the stream: a split over workers changes neither a shard's batch nor the whole.
    #[test]
    fn no_split_changes_the_samples(
        seed: u64,
        len in 1..100_u64,
        data_shards in 1..17_u32,
        batch in 1..5_u32,
        phases in 1..4_u32,
        step in 0..1000_u64,
        mut cuts in prop::collection::vec(0..17_u32, 0..6),
    ) {
        let job = [phases, data_shards, batch];
        let phase = phases - 1;
        let mut alone = SampleStream::new(seed, len);
        let all = numbers(step, phase, job, 0..data_shards);
        let whole: Vec<u64> = all.into_iter().map(|q| alone.sample(q)).collect();

        cuts.iter_mut().for_each(|cut| *cut = (*cut).min(data_shards));
        cuts.extend([0, data_shards]);
        cuts.sort_unstable();
        let mut split = Vec::new();
        for range in cuts.windows(2) {
            // Each worker has its own stream, which has seen its own shards only.
            let mut stream = SampleStream::new(seed, len);
            let share = numbers(step, phase, job, range[0]..range[1]);
            split.extend(share.into_iter().map(|q| stream.sample(q)));
        }
        prop_assert_eq!(split, whole);
    }

    /// Invariant 2 of the stream: earlier calls do not matter.
    #[test]
    fn a_stream_has_no_memory(
        seed: u64,
        len in 1..50_u64,
        asked in prop::collection::vec(0..500_u64, 1..50),
    ) {
        let mut stream = SampleStream::new(seed, len);
        for q in asked {
            prop_assert_eq!(stream.sample(q), SampleStream::new(seed, len).sample(q));
        }
    }
}

/// Invariant 3 of the stream: computed once, by another program, from the description in the
/// module.
#[test]
fn the_order_never_changes() {
    let mut stream = SampleStream::new(42, 10);
    let samples: Vec<u64> = (0..20).map(|q| stream.sample(q)).collect();
    assert_eq!(samples[..10], [8, 1, 9, 7, 0, 6, 5, 4, 2, 3]);
    assert_eq!(samples[10..], [4, 0, 8, 2, 9, 3, 1, 5, 7, 6]);
    assert_eq!(ledger_term(1, 2), 0x7ef6_99fc_cf6d_3265);
    let mut long = SampleStream::new(7, 10_000);
    let samples = [0, 1, 2, 9_998, 9_999].map(|place| long.sample(30_000 + place));
    assert_eq!(samples, [3083, 3786, 284, 4165, 5413]);
}

#[test]
fn other_seeds_and_epochs_give_other_orders() {
    let order = |seed, epoch: u64| {
        let mut stream = SampleStream::new(seed, 1000);
        (0..1000).map(|place| stream.sample(epoch * 1000 + place)).collect::<Vec<u64>>()
    };
    assert_ne!(order(1, 0), order(2, 0));
    assert_ne!(order(1, 0), order(1, 1));
    assert_eq!(order(1, 1), order(1, 1));
}

/// Chi-squared test of the sample at the first place: 15 degrees of freedom, fixed seeds.
#[test]
fn each_sample_is_as_likely_at_the_first_place() {
    let mut counts = BTreeMap::<u64, f64>::new();
    for seed in 0..16_000 {
        *counts.entry(SampleStream::new(seed, 16).sample(0)).or_default() += 1.0;
    }
    assert_eq!(counts.len(), 16);
    let chi_squared: f64 = counts.values().map(|count| (count - 1000.0).powi(2) / 1000.0).sum();
    assert!(chi_squared < 37.7, "chi-squared {chi_squared} has a probability below 0.001");
}

/// Returns changes from given numbers on, each of which leaves a few samples out, never all.
fn changes(len: u64, wanted: &[(u64, Vec<u64>)]) -> Vec<Change> {
    let (mut from, mut gone) = (0, std::collections::BTreeSet::new());
    let change = |(after, some): &(u64, Vec<u64>)| {
        from += after;
        let left_out: Vec<u64> = some.iter().map(|sample| sample % len).collect();
        let fits = gone.union(&left_out.iter().copied().collect()).count() < usize::try_from(len).unwrap();
        let left_out = if fits { left_out } else { Vec::new() };
        gone.extend(&left_out);
        Change { from, left_out }
    };
    wanted.iter().map(change).collect()
}

proptest! {
    /// Invariant 1 with changes: between two of them, every epoch holds each remaining sample
    /// exactly once, also where a change comes in the middle of an epoch; and no number before a
    /// change moves.
    #[test]
    fn every_epoch_after_a_change_is_a_permutation_of_what_is_left(
        seed: u64,
        len in 1..120_u64,
        wanted in proptest::collection::vec((0..300_u64, proptest::collection::vec(0..1000_u64, 0..6)), 0..4),
    ) {
        let changes = changes(len, &wanted);
        let mut stream = SampleStream::with_changes(seed, len, &changes);
        let mut gone = std::collections::BTreeSet::new();
        let starts: Vec<u64> = std::iter::once(0).chain(changes.iter().map(|change| change.from)).collect();
        for (at, start) in starts.iter().enumerate() {
            if at > 0 {
                gone.extend(changes[at - 1].left_out.iter().copied());
            }
            let end = starts.get(at + 1).copied().unwrap_or(start + 3 * len);
            let taken: Vec<u64> = (*start..end).map(|q| stream.sample(q)).collect();
            let left: Vec<u64> = (0..len).filter(|sample| !gone.contains(sample)).collect();
            for epoch in taken.chunks(left.len()) {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                prop_assert_eq!(sorted.len(), epoch.len());
                prop_assert!(sorted.iter().all(|sample| left.contains(sample)));
            }
            let mut before = SampleStream::with_changes(seed, len, &changes[..at]);
            prop_assert!((0..*start).step_by(7).all(|q| stream.sample(q) == before.sample(q)));
        }
    }

    /// Invariant 2 with changes: any worker that asks, in any order and for any shards, gets the
    /// same sample.
    #[test]
    fn no_split_changes_the_samples_after_a_change(
        seed: u64, len in 2..80_u64, gone in 0..80_u64, step in 0..40_u64, world in 1..7_u32,
    ) {
        let job = [2, 7, 3];
        let from = StreamShape { phases: 2, data_shards: 7, shard_batch: 3 }.first(5, 1, 0);
        let changes = [Change { from, left_out: vec![gone % len] }];
        let mut whole = SampleStream::with_changes(seed, len, &changes);
        let expected: Vec<u64> = numbers(step, 1, job, 0..7).into_iter().map(|q| whole.sample(q)).collect();
        let split: Vec<u64> = (0..world).flat_map(|rank| {
            let mut own = SampleStream::with_changes(seed, len, &changes);
            let shards = 7 * rank / world..7 * (rank + 1) / world;
            numbers(step, 1, job, shards).into_iter().map(move |q| own.sample(q)).collect::<Vec<_>>()
        }).collect();
        prop_assert_eq!(split, expected);
    }
}

/// A changed order would change the result of runs under way.
#[test]
fn the_order_after_a_change_never_changes() {
    let changes = [Change { from: 12, left_out: vec![3, 7] }, Change { from: 30, left_out: vec![0] }];
    let mut stream = SampleStream::with_changes(7, 10, &changes);
    let order: Vec<u64> = (12..44).map(|q| stream.sample(q)).collect();
    let [first, second, third, last] = [&order[..8], &order[8..18], &order[18..25], &order[25..]];
    assert_eq!(first, [4, 9, 0, 6, 8, 2, 5, 1]);
    assert_eq!(second, [4, 1, 0, 5, 8, 6, 9, 2, 5, 6]);
    assert_eq!(third, [5, 4, 2, 1, 8, 9, 6]);
    assert_eq!(last, [6, 8, 5, 2, 1, 9, 4]);
}
