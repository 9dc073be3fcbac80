//! Reduces over real groups, its ranks on threads of this process.

use std::sync::Arc;
use std::thread;

use c10d::shared::{Exchange, Segment};
use c10d::{GlooAddress, GlooOptions, MemoryStore};
use ganglion_membership::shard_ranges;
use ganglion_proto::job::Precision;
use ganglion_proto::trace::Trace;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::*;
use crate::engine::profile::Place;
use crate::nn::{Init, TensorSpec};
use crate::objective::{NamedNetwork, NetworkId, NetworkSet, ScalarRole, ScalarSpec};
use crate::state::{StateLayout, narrow};

const LIMIT: Duration = Duration::from_secs(30);
/// Not a power of two, so that the division rounds.
const GLOBAL_BATCH: u64 = 24;

/// Layout of a shard gradient with one parameter.
pub(super) fn layout(numel: usize) -> GradLayout {
    let shape = vec![signed(numel)];
    let spec = TensorSpec::parameter("p".to_string(), &shape, Init::Constant(0.0));
    let (name, buffers) = ("network".into(), Vec::new());
    let network = NamedNetwork { name, parameters: vec![spec], buffers, average: None };
    let state = StateLayout::new(&[network], &[], Precision::Fp32);
    let loss = vec![ScalarSpec::new("loss", ScalarRole::Loss)];
    GradLayout::new(&state, NetworkSet::of([NetworkId(0)]), &[], 1, loss)
}

/// Floats of the longest gradient of these tests. What is not touched takes no memory.
const LONGEST: usize = LARGE + (1 << 12);

/// Which ranks of a test share memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Over {
    Network,
    Memory,
    /// The first two of three neighbours with each other, the third with nobody.
    Neighbours,
    /// Every second rank with every second.
    InTurns,
}

const OVER: [Over; 4] = [Over::Network, Over::Memory, Over::Neighbours, Over::InTurns];

/// Ranks with which each rank shares memory.
fn hosts(over: Over, world_size: usize) -> Vec<Vec<usize>> {
    let host = |rank: usize| match over {
        Over::Network => rank,
        Over::Memory => 0,
        Over::Neighbours => rank - usize::from(rank % 3 == 1),
        Over::InTurns => rank % 2,
    };
    let with = |rank| (0..world_size).filter(|other| host(*other) == host(rank)).collect();
    (0..world_size).map(with).collect()
}

/// Sharing of each rank.
fn sharings(over: Over, of_rank: impl Fn(usize) -> ShardMap, world_size: usize) -> Vec<Sharing> {
    let hosts = hosts(over, world_size);
    let nobody = || hosts.iter().map(|_| Sharing::None).collect();
    if hosts.iter().all(|ranks| ranks.len() == 1) {
        return nobody();
    }
    let segment = |ranks: &Vec<usize>| Segment::new(Memory::slot(&of_rank(0), ranks, LONGEST)).unwrap();
    let segments: Vec<Segment> = hosts.iter().map(segment).collect();
    let offers: Vec<_> = segments.iter().map(Segment::offer).collect();
    let ranks = segments.into_iter().enumerate().zip(&hosts);
    ranks
        .map(|((rank, own), ranks)| {
            let place = ranks.iter().position(|other| *other == rank).unwrap();
            let offers: Vec<_> = ranks.iter().map(|rank| offers[*rank]).collect();
            let memory = || Memory::new(Exchange::join(own, place, &offers).unwrap(), ranks);
            match ranks.len() {
                1 => Sharing::Some(None),
                all if all == world_size => Sharing::All(memory()),
                _ => Sharing::Some(Some(memory())),
            }
        })
        .collect()
}

/// Runs `part` as each rank of a group that shares `data_shards`; the results come in rank order.
fn as_ranks<R: Send>(
    data_shards: u32,
    world_size: u32,
    over: Over,
    part: impl Fn(Peers) -> R + Sync,
) -> Vec<R> {
    let store = MemoryStore::new();
    let ranges = shard_ranges(data_shards, world_size);
    let of_rank = |rank: usize| ShardMap { data_shards, ranges: ranges.clone(), rank };
    let rank_part = |rank: usize, sharing: Sharing| {
        let shards = of_rank(rank);
        let options = GlooOptions {
            rank,
            world_size: world_size as usize,
            timeout: LIMIT,
            operation_timeout: LIMIT,
            address: GlooAddress::Hostname("127.0.0.1".to_string()),
        };
        let group = Group::gloo(options, Arc::clone(&store) as Arc<_>, "test").unwrap();
        part(Peers { group: Arc::new(group), timeout: LIMIT, shards, device: Device::Cpu, sharing })
    };
    let rank_part = &rank_part;
    thread::scope(|scope| {
        let spawn = |(rank, sharing)| scope.spawn(move || rank_part(rank, sharing));
        let sharings = sharings(over, of_rank, world_size as usize);
        let ranks: Vec<_> = sharings.into_iter().enumerate().map(spawn).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn all_reduce(peers: Peers, layout: &GradLayout, reduction: Reduction) -> AllReduce {
    AllReduce::new(peers, std::slice::from_ref(layout), GLOBAL_BATCH, reduction).unwrap()
}

/// Reduces shard gradients that `fill` writes.
fn reduce(
    all_reduce: &mut AllReduce,
    layout: &GradLayout,
    header: Header,
    fill: impl Fn(u32, &Tensor),
) -> Result<Reduced, ReduceError> {
    let mut laps = Laps::start(Trace::off().track(1, "test"), Place { generation: 1, rank: 0 }, &["phase"]);
    all_reduce.begin(0)?;
    for shard in all_reduce.peers.shards.own() {
        let grad = all_reduce.buffer(layout, shard);
        fill(shard, &grad.flat);
        all_reduce.add(Node::leaf(shard), grad);
    }
    all_reduce.send(header)?;
    all_reduce.wait(&mut laps)
}

fn floats(tensor: &Tensor, len: usize) -> Vec<f32> {
    Vec::try_from(narrow(tensor, 0..len)).unwrap()
}

/// The definition, element by element and level by level from the shards up.
pub(super) fn definition(leaves: &[Vec<f32>]) -> Vec<u32> {
    let element = |at: usize| {
        let mut level: Vec<f32> = leaves.iter().map(|leaf| leaf[at]).collect();
        while level.len() > 1 {
            let pair = |pair: &[f32]| if let [a, b] = pair { a + b } else { pair[0] };
            level = level.chunks(2).map(pair).collect();
        }
        (level[0] / 24.0).to_bits()
    };
    (0..leaves[0].len()).map(element).collect()
}

/// Values whose sums depend on the order: all magnitudes, both zeros, denormals.
pub(super) fn awkward() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => any::<f32>().prop_filter("finite", |value| value.is_finite()),
        3 => -1.0f32..1.0,
        1 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => (1u32..1 << 23).prop_map(f32::from_bits),
        1 => (1u32..1 << 23).prop_map(|bits| -f32::from_bits(bits)),
    ]
}

/// Module invariant: the same bits for any number of ranks, on real groups.
#[test]
fn any_world_size_gives_the_bits_of_the_definition() {
    let mut runner = TestRunner::deterministic();
    for data_shards in 1..=16 {
        // 1, 14, 27, ...: lengths that fill no chunk evenly.
        let layout = layout(13 * data_shards as usize - 12);
        let len = layout.len();
        let leaf = prop::collection::vec(awkward(), len);
        let tree = prop::collection::vec(leaf, data_shards as usize).new_tree(&mut runner).unwrap();
        let leaves = tree.current();
        let expected = definition(&leaves);
        // Each group takes a moment to meet.
        let over = if data_shards % 5 == 1 { &OVER[..] } else { &OVER[..2] };
        for (world_size, over) in
            (1..=data_shards).flat_map(|size| over.iter().map(move |over| (size, *over)))
        {
            let means = as_ranks(data_shards, world_size, over, |peers| {
                let mut all_reduce = all_reduce(peers, &layout, Reduction::Tree);
                // Often enough that each slot of shared memory is used again.
                let mut means = (0..3).map(|turn| {
                    let fill = |shard: u32, out: &Tensor| {
                        narrow(out, 0..len).copy_(&Tensor::from_slice(&leaves[shard as usize]));
                        let _ = narrow(out, 0..len).g_mul_scalar_(if turn == 1 { 0.0 } else { 1.0 });
                    };
                    let reduced = reduce(&mut all_reduce, &layout, Header::default(), fill).unwrap();
                    floats(&reduced.mean, len).into_iter().map(f32::to_bits).collect::<Vec<_>>()
                });
                let (first, zeros, third) = (means.next(), means.next().unwrap(), means.next());
                assert!(first == third && zeros.iter().all(|bits| bits << 1 == 0), "of plus or minus 0");
                first.unwrap()
            });
            for (rank, mean) in means.iter().enumerate() {
                let which = format!("rank {rank} of {world_size} with {data_shards} data shards");
                assert!(*mean == expected, "{which} over {over:?}");
            }
        }
    }
}

/// Ways of two ranks to reduce.
const WAYS: [(Reduction, Over); 3] =
    [(Reduction::Tree, Over::Network), (Reduction::Tree, Over::Memory), (Reduction::Ring, Over::Network)];

/// Two ranks whose headers are made by `header`, and what each gets from one reduce.
fn reduce_with(
    (reduction, over): (Reduction, Over),
    header: impl Fn(usize) -> Header + Sync,
) -> Vec<Result<(u64, u64), String>> {
    as_ranks(2, 2, over, |peers| {
        let ours = header(peers.shards.rank);
        let mut all_reduce = all_reduce(peers, &layout(5), reduction);
        let reduced = reduce(&mut all_reduce, &layout(5), ours, |_, _| ());
        reduced.map(|reduced| (reduced.ledger, reduced.agreed_plan)).map_err(|error| error.to_string())
    })
}

/// Module invariant 2.
#[test]
fn headers_that_differ_are_an_error_on_both_ranks() {
    let agreed = Header { generation: 3, position: 7, fingerprint: 9, plan: 0, ledger: 0 };
    let others = [
        Header { generation: 4, ..agreed },
        Header { position: 8, ..agreed },
        Header { fingerprint: 8, ..agreed },
    ];
    for (other, way) in others.into_iter().flat_map(|other| WAYS.map(|way| (other, way))) {
        let results = reduce_with(way, |rank| if rank == 0 { agreed } else { other });
        for result in results {
            let error = result.unwrap_err();
            assert!(error.contains("rank 0") && error.contains("rank 1"), "{way:?}: {error}");
        }
    }
}

#[test]
fn a_plan_counts_once_all_know_it_and_ledgers_add_up() {
    let header = |plan, ledger| Header { plan, ledger, ..Header::default() };
    for way in WAYS {
        let one_knows = reduce_with(way, |rank| header(rank as u64, u64::MAX));
        assert_eq!(one_knows, [Ok((u64::MAX - 1, 0)), Ok((u64::MAX - 1, 0))], "{way:?}");
        let all_know = reduce_with(way, |rank| header(5, rank as u64));
        assert_eq!(all_know, [Ok((1, 5)), Ok((1, 5))], "{way:?}");
    }
}

/// In the backend's order the bits may be others, but all ranks have the same, and the sum is that
/// of all shard gradients.
#[test]
fn a_ring_gives_all_ranks_the_same_mean_of_all_leaves() {
    let layout = layout(1000);
    let len = layout.len();
    let leaf = |shard: u32| Tensor::arange(signed(len), (Kind::Float, Device::Cpu)) * f64::from(shard + 1);
    for world_size in [1, 2, 3, 5] {
        let means = as_ranks(5, world_size, Over::Network, |peers| {
            let mut all_reduce = all_reduce(peers, &layout, Reduction::Ring);
            let fill = |shard: u32, out: &Tensor| {
                narrow(out, 0..len).copy_(&leaf(shard));
            };
            let reduced = reduce(&mut all_reduce, &layout, Header::default(), fill).unwrap();
            floats(&reduced.mean, len)
        });
        assert!(means.iter().all(|mean| *mean == means[0]), "{world_size} ranks");
        // 1 + 2 + ... + 5 over the global batch: small whole numbers, so that every order gives the same.
        let expected: Vec<f32> =
            (0..u16::try_from(len).unwrap()).map(|at| f32::from(at) * 15.0 / 24.0).collect();
        assert_eq!(means[0], expected, "{world_size} ranks");
    }
}

/// Module invariant 3, and the end of a group is reported as such.
#[test]
fn a_failed_reduce_leaves_nothing_to_reduce_with() {
    let ranks = |peers: Peers| {
        let (rank, group) = (peers.shards.rank, peers.group.clone());
        let mut all_reduce = all_reduce(peers, &layout(5), Reduction::Tree);
        if rank == 1 {
            // Its gradient could not be computed: it never sends.
            all_reduce.begin(0).unwrap();
            group.aborter().abort();
        } else {
            let first = reduce(&mut all_reduce, &layout(5), Header::default(), |_, _| ());
            assert!(matches!(first.err(), Some(ReduceError::Collective(_))));
        }
        let again = reduce(&mut all_reduce, &layout(5), Header::default(), |_, _| ()).err().unwrap();
        assert!(matches!(again, ReduceError::Collective(c10d::Error::Aborted)), "{again:?}");
    };
    OVER.iter().for_each(|over| drop(as_ranks(2, 2, *over, ranks)));
}

/// Phases of the same networks with other scalars share the buffers: none sees another's.
#[test]
fn gradients_that_are_alike_but_for_their_scalars_share_a_reduce() {
    let with = |scalars: usize| {
        let spec = TensorSpec::parameter("p".to_string(), &[100], Init::Constant(0.0));
        let network = NamedNetwork {
            name: "network".into(),
            parameters: vec![spec],
            buffers: Vec::new(),
            average: None,
        };
        let state = StateLayout::new(&[network], &[], Precision::Fp32);
        let scalars = (0..scalars).map(|at| ScalarSpec::new(format!("s{at}"), ScalarRole::Loss)).collect();
        GradLayout::new(&state, NetworkSet::of([NetworkId(0)]), &[], 1, scalars)
    };
    let (most, few) = (with(20), with(3));
    assert!(most.is_alike(&few) && !most.is_alike(&layout(5)));
    let part = |peers: Peers| {
        let mut all_reduce = all_reduce(peers, &most, Reduction::Tree);
        let mut means = Vec::new();
        for (at, layout) in (1..).zip([&most, &few, &most]) {
            let fill = |shard: u32, out: &Tensor| {
                let _ = narrow(out, 0..layout.len()).fill_(f64::from(at * (shard + 1)));
            };
            let reduced = reduce(&mut all_reduce, layout, Header::default(), fill).unwrap();
            let first = all_reduce.peers.shards.own().start;
            assert_eq!(all_reduce.buffer(layout, first).scalars.len(), layout.scalars().len());
            means.push(floats(&reduced.mean, layout.scalar_range().end));
        }
        means
    };
    for mean in OVER.into_iter().flat_map(|over| as_ranks(5, 3, over, part)) {
        for (at, (mean, layout)) in (1_u8..).zip(mean.iter().zip([&most, &few, &most])) {
            assert_eq!(*mean, vec![f32::from(at) * 15.0 / 24.0; layout.scalar_range().end]);
        }
    }
}

/// Large gradients of all layouts take turns in the same memory, as do those in memory that ranks share: none
/// sees another's, not even in its gaps.
#[test]
fn large_gradients_of_different_layouts_share_memory_and_nothing_else() {
    let numels = [LARGE + 1, LARGE + 1000];
    let layouts = numels.map(layout);
    let part = |peers: Peers| {
        let mut laps =
            Laps::start(Trace::off().track(1, "test"), Place { generation: 1, rank: 0 }, &["phase"]);
        let mut all_reduce = AllReduce::new(peers, &layouts, GLOBAL_BATCH, Reduction::Tree).unwrap();
        let mut places = [Vec::new(), Vec::new()];
        for (time, index) in (1_u8..).zip([0, 1, 0, 1]) {
            let layout = &layouts[index];
            all_reduce.begin(index).unwrap();
            for shard in all_reduce.peers.shards.own() {
                let mut grad = all_reduce.buffer(layout, shard);
                places[usize::from(time > 2)].push(grad.flat.data_ptr().addr());
                let value = f64::from(time) * f64::from(shard + 1);
                for tensor in grad.gradients.iter_mut().chain(&mut grad.scalars) {
                    let _ = no_grad(|| tensor.fill_(value));
                }
                all_reduce.add(Node::leaf(shard), grad);
            }
            all_reduce.send(Header::default()).unwrap();
            let reduced = all_reduce.wait(&mut laps).unwrap();
            let mean = floats(&reduced.mean, layout.len());
            for (at, value) in mean.into_iter().enumerate() {
                let is_taken = at < numels[index] || layout.scalar_range().contains(&at);
                let expected = if is_taken { f32::from(time) * 10.0 / 24.0 } else { 0.0 };
                assert_eq!(value.to_bits(), expected.to_bits(), "float {at} of layout {index}");
            }
        }
        let [first, later] = places;
        assert!(later.iter().all(|place| first.contains(place)), "a buffer was allocated anew");
    };
    for (world_size, over) in
        [1, 2, 3].into_iter().flat_map(|size| OVER[..2].iter().map(move |over| (size, *over)))
    {
        as_ranks(4, world_size, over, part);
    }
}

/// Over a number of ranks that is a power of two, and over others.
#[test]
fn words_of_all_ranks_come_by_rank() {
    for world_size in 1..=9_u32 {
        let words = |rank: u64| [rank + 1, u64::MAX - rank, rank << 40];
        let gathered = |peers: Peers| gather(&peers, &words(peers.shards.rank as u64)).unwrap();
        for all in as_ranks(16, world_size, Over::Network, gathered) {
            assert_eq!(all, (0..u64::from(world_size)).map(words).collect::<Vec<_>>());
        }
    }
}
