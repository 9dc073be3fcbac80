//! All ranks of a group in one thread, round by round, with messages in memory.

use std::collections::HashMap;

use ganglion_membership::shard_ranges;
use proptest::prelude::*;

use super::*;
use crate::engine::reduce::tests::{awkward, definition, layout};

/// Ranks of a group whose sums have `chunk` floats a chunk.
struct Group {
    ranks: Vec<Butterfly>,
    means: Vec<Mean>,
}

impl Group {
    /// Each rank with the sums of its shards, `leaves`.
    fn new(world_size: u32, leaves: &[Vec<f32>], chunk: usize) -> Group {
        let data_shards = u32::try_from(leaves.len()).unwrap();
        let ranges = shard_ranges(data_shards, world_size);
        let rank = |rank: usize| {
            let shards = ShardMap { data_shards, ranges: ranges.clone(), rank };
            let mut butterfly = Butterfly::with(Plan::new(&shards), rank, chunk, Device::Cpu).unwrap();
            let layout = layout(1);
            let mut sum = super::super::TreeSum::new(data_shards);
            for shard in shards.own() {
                let grad = ShardGrad::new(&layout, butterfly.len().max(layout.len()), Device::Cpu);
                let leaf = &leaves[shard as usize];
                let leaf = &leaf[..leaf.len().min(butterfly.len())];
                narrow(&grad.flat, 0..leaf.len()).copy_(&Tensor::from_slice(leaf));
                sum.push(Node::leaf(shard), grad);
            }
            let ledger = 1 << (rank % 60);
            let header = Header { generation: 1, position: 2, fingerprint: 3, plan: 4, ledger };
            let sums = sum.take();
            butterfly.begin(sums, header);
            butterfly
        };
        let ranks: Vec<Butterfly> = (0..world_size as usize).map(rank).collect();
        let mean = |rank: &Butterfly| Mean {
            flat: Tensor::full([i64::try_from(rank.len()).unwrap()], f64::NAN, (Kind::Float, Device::Cpu)),
            divisor: Tensor::from(24.0_f32),
        };
        let means = ranks.iter().map(mean).collect();
        Group { ranks, means }
    }

    /// Sends and takes the messages of one round. Returns the number that each rank sent.
    fn round(&mut self, place: usize, back: bool) -> Vec<usize> {
        let way = |mean| if back { Way::Back(mean) } else { Way::Towards };
        let mut mail = HashMap::new();
        let mut sent = Vec::new();
        for (rank, mean) in self.ranks.iter().zip(&self.means) {
            let messages = &rank.round(place, way(mean)).sends;
            sent.push(messages.len());
            let lens: Vec<usize> = messages.iter().map(|message| floats(message, rank.chunk)).collect();
            let out = zeros(lens.iter().sum());
            rank.pack(messages, way(mean), &out);
            let mut at = 0;
            for (message, len) in messages.iter().zip(lens) {
                let before = mail.insert((rank.rank, message.rank), narrow(&out, at..at + len).copy());
                assert!(before.is_none(), "one message between two ranks");
                at += len;
            }
        }
        for (rank, mean) in self.ranks.iter_mut().zip(&self.means) {
            let mut headers = Vec::new();
            for message in &rank.round(place, way(mean)).receives {
                let came = mail.remove(&(message.rank, rank.rank)).expect("a message that was sent");
                assert_eq!(came.numel(), floats(message, rank.chunk));
                headers.extend(rank.unpack(message, way(mean), &came));
            }
            rank.headers.extend(headers);
            if !back {
                rank.join(place);
            }
        }
        assert!(mail.is_empty(), "each message is received");
        sent
    }

    /// All rounds. Returns the number of messages that each rank sent.
    fn reduce(&mut self) -> Vec<usize> {
        let mut sent = vec![0; self.ranks.len()];
        let rounds = self.ranks[0].plan.towards.len();
        for back in [false, true] {
            for place in 0..rounds {
                self.round(place, back).iter().zip(&mut sent).for_each(|(more, sent)| *sent += more);
            }
            if !back {
                self.ranks.iter().zip(&self.means).for_each(|(rank, mean)| rank.divide(mean));
            }
        }
        sent
    }

    /// Asserts that all ranks have this mean, and the headers of all.
    fn assert_mean(mut self, expected: &[u32]) {
        let ledger = (0..self.ranks.len()).fold(0_u64, |sum, rank| sum.wrapping_add(1 << (rank % 60)));
        for (rank, mean) in self.ranks.iter_mut().zip(&self.means) {
            let mean: Vec<f32> = Vec::try_from(narrow(&mean.flat, 0..expected.len())).unwrap();
            let bits: Vec<u32> = mean.into_iter().map(f32::to_bits).collect();
            assert!(bits == expected, "rank {} has another mean", rank.rank);
            let folded = rank.headers[&rank.plan.root];
            assert_eq!((folded.header.plan, folded.header.ledger, folded.other), (4, ledger, None));
        }
    }
}

fn zeros(len: usize) -> Tensor {
    Tensor::zeros([i64::try_from(len).unwrap()], (Kind::Float, Device::Cpu))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_number_of_ranks_gives_the_definitions_bits(
        leaves in (2_usize..40).prop_flat_map(|shards| {
            prop::collection::vec(prop::collection::vec(awkward(), 64), shards)
        }),
        share in 0.0..1.0,
    ) {
        let shards = u32::try_from(leaves.len()).unwrap();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // between 2 and the number of shards
        let world_size = 2 + (f64::from(shards - 1) * share) as u32;
        let mut group = Group::new(world_size, &leaves, 2);
        let lens: Vec<usize> = group.ranks.iter().map(Butterfly::len).collect();
        let len = lens[0].min(64);
        group.reduce();
        let leaves: Vec<Vec<f32>> = leaves.into_iter().map(|leaf| leaf[..len].to_vec()).collect();
        group.assert_mean(&definition(&leaves));
    }
}

/// The largest group that is thought of: its messages grow with the logarithm of its size.
#[test]
fn thousands_of_ranks_send_two_messages_a_level() {
    for (shards, world_size) in [(4096_u32, 4096), (512, 511), (512, 100), (64, 64)] {
        let leaf = |shard: u32| (0..3).map(|at| f32::from_bits(0x3f80_0000 + 7 * shard + at)).collect();
        let leaves: Vec<Vec<f32>> = (0..shards).map(leaf).collect();
        let mut group = Group::new(world_size, &leaves, 1);
        let sent = group.reduce();
        let levels = shards.ilog2() as usize;
        // A rank of several shards takes part in the rounds of two nodes of a level, its first and its last.
        assert!(sent.iter().all(|sent| *sent <= 4 * levels), "{world_size} ranks with {shards} shards");
        if shards == world_size {
            assert!(sent.iter().all(|sent| *sent == 2 * levels));
        }
        group.assert_mean(&definition(&leaves));
    }
}

#[test]
fn a_rank_that_disagrees_is_named_on_all_ranks() {
    for (shards, world_size, odd) in [(8, 8, 0), (8, 8, 5), (7, 5, 4), (6, 3, 2)] {
        let mut group = Group::new(world_size, &vec![vec![1.0; 4]; shards], 1);
        let theirs = &mut group.ranks[odd].headers;
        theirs.values_mut().for_each(|folded| folded.header.fingerprint = 99);
        group.reduce();
        for rank in &group.ranks {
            let folded = rank.headers[&rank.plan.root];
            let named = [
                Some((folded.rank, folded.header.fingerprint)),
                folded.other.map(|(rank, header)| (rank, header.fingerprint)),
            ];
            assert!(named.contains(&Some((odd, 99))), "{named:?} on rank {}", rank.rank);
        }
    }
}
