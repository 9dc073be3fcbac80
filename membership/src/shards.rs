//! Assignment of data shards to ranks.

use std::ops::Range;

/// Returns the data shards of each rank: contiguous, in rank order, as even as possible.
///
/// # Panics
/// If there are no ranks, or more ranks than shards.
pub fn shard_ranges(data_shards: u32, world_size: u32) -> Vec<Range<u32>> {
    assert!(
        (1..=data_shards).contains(&world_size),
        "{world_size} ranks cannot share {data_shards} data shards"
    );
    // In 64 bits the product of a rank and the number of shards cannot overflow.
    let (shards, ranks) = (u64::from(data_shards), u64::from(world_size));
    let cut =
        |rank: u64| u32::try_from(rank * shards / ranks).expect("a cut is at most the number of shards");
    // A cut is the end of one range and the start of the next, so no shard is left out or dealt twice.
    (0..ranks).map(|rank| cut(rank)..cut(rank + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_all_shards_once_and_evenly() {
        for shards in 1..=24 {
            for ranks in 1..=shards {
                let ranges = shard_ranges(shards, ranks);
                assert_eq!(ranges[0].start, 0);
                assert_eq!(ranges[ranges.len() - 1].end, shards);
                assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
                let sizes: Vec<u32> = ranges.iter().map(|r| r.end - r.start).collect();
                let (low, high) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
                assert!(*low >= 1 && high - low <= 1, "{shards} in {ranks}: {sizes:?}");
            }
        }
    }
}
