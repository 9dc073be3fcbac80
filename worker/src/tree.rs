//! The one order in which leaves are summed.
//!
//! Node (level j, index i) covers the leaves [i 2^j, (i + 1) 2^j) of `leaves`; the root covers them all. A node's sum is
//! its left child's plus its right child's; a child that covers no leaf is skipped, not added as zero. Floating-point
//! addition is not associative, so this order *is* the result: it must not depend on how leaves are dealt to ranks.
//!
//! 1. [`fold`] over a root, given the leaves, is the definition.
//! 2. Given the sums of any set of nodes that covers the leaves once, it is the same to the bit.
//! 3. [`cover`] splits a range of leaves into its maximal nodes, at most two of a level.

use std::ops::Range;

/// A node of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node {
    /// Distance from the leaves.
    pub level: u32,
    /// Position within the level.
    pub index: u32,
}

impl Node {
    /// The node that covers all of `leaves`, which is at least 1.
    pub fn root(leaves: u32) -> Node {
        Node { level: leaves.next_power_of_two().trailing_zeros(), index: 0 }
    }

    /// The leaves under this node, of a tree of `leaves`.
    pub fn leaves(self, leaves: u32) -> Range<u32> {
        let end = |index: u64| {
            u32::try_from((index << self.level).min(u64::from(leaves))).expect("at most u32 leaves")
        };
        end(u64::from(self.index))..end(u64::from(self.index) + 1)
    }

    fn children(self) -> [Node; 2] {
        let child = |index| Node { level: self.level - 1, index };
        [child(2 * self.index), child(2 * self.index + 1)]
    }
}

/// The maximal nodes under which lie exactly the leaves of `range`, in order.
pub fn cover(range: Range<u32>, leaves: u32) -> Vec<Node> {
    fn visit(node: Node, range: &Range<u32>, leaves: u32, nodes: &mut Vec<Node>) {
        let own = node.leaves(leaves);
        if own.is_empty() || own.end <= range.start || own.start >= range.end {
        } else if range.start <= own.start && own.end <= range.end {
            nodes.push(node);
        } else {
            node.children().into_iter().for_each(|child| visit(child, range, leaves, nodes));
        }
    }
    let mut nodes = Vec::new();
    visit(Node::root(leaves), &range, leaves, &mut nodes);
    nodes
}

/// The sum of what lies under `node`, in tree order.
///
/// `take` gives a node's sum where it is at hand, else `None`; it is asked for a node before its children, and always
/// has the leaves that it is asked for. `add` gives left + right.
pub fn fold<T, E>(
    node: Node,
    leaves: u32,
    take: &mut impl FnMut(Node) -> Result<Option<T>, E>,
    add: &mut impl FnMut(T, T) -> T,
) -> Result<Option<T>, E> {
    if node.leaves(leaves).is_empty() {
        return Ok(None);
    }
    if let Some(sum) = take(node)? {
        return Ok(Some(sum));
    }
    assert!(node.level > 0, "leaf {} is missing", node.index);
    let [left, right] = node.children();
    let left = fold(left, leaves, take, add)?;
    let right = fold(right, leaves, take, add)?;
    Ok(match (left, right) {
        (Some(left), Some(right)) => Some(add(left, right)),
        (one, other) => one.or(other),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    use ganglion_membership::shard_ranges;
    use proptest::prelude::*;

    use super::*;

    /// The definition, written level by level from the leaves up, on one element.
    fn definition(leaves: &[f32]) -> f32 {
        let mut level = leaves.to_vec();
        while level.len() > 1 {
            level = level
                .chunks(2)
                .map(|pair| if pair.len() == 2 { pair[0] + pair[1] } else { pair[0] })
                .collect();
        }
        level[0]
    }

    fn sum(node: Node, count: u32, mut at_hand: impl FnMut(Node) -> Option<f32>) -> f32 {
        let sum: Result<_, Infallible> =
            fold(node, count, &mut |node| Ok(at_hand(node)), &mut |left, right| left + right);
        sum.unwrap().unwrap()
    }

    /// What the ranks of a split of the leaves compute together.
    fn exchanged(leaves: &[f32], world_size: u32) -> f32 {
        let count = u32::try_from(leaves.len()).unwrap();
        let leaf = |node: Node| (node.level == 0).then(|| leaves[node.index as usize]);
        let mut sums = BTreeMap::new();
        for range in shard_ranges(count, world_size) {
            for node in cover(range, count) {
                sums.insert(node, sum(node, count, leaf));
            }
        }
        sum(Node::root(count), count, |node| sums.get(&node).copied())
    }

    /// Values whose sums depend on the order: all magnitudes, both zeros, denormals.
    fn awkward() -> impl Strategy<Value = f32> {
        prop_oneof![
            4 => any::<f32>().prop_filter("finite", |value| value.is_finite()),
            2 => -1.0f32..1.0,
            1 => Just(0.0f32),
            1 => Just(-0.0f32),
            1 => (1u32..1 << 23).prop_map(f32::from_bits),
        ]
    }

    proptest! {
        #[test]
        fn any_number_of_ranks_gives_the_definitions_bits(
            leaves in prop::collection::vec(awkward(), 1..=24),
        ) {
            let expected = definition(&leaves).to_bits();
            let count = u32::try_from(leaves.len()).unwrap();
            for world_size in 1..=count {
                prop_assert_eq!(exchanged(&leaves, world_size).to_bits(), expected);
            }
        }
    }

    #[test]
    fn a_cover_is_exact_and_has_at_most_two_nodes_of_a_level() {
        for leaves in 1..=24 {
            for start in 0..leaves {
                for end in start + 1..=leaves {
                    let nodes = cover(start..end, leaves);
                    let mut covered = Vec::new();
                    nodes.iter().for_each(|node| covered.extend(node.leaves(leaves)));
                    assert_eq!(covered, (start..end).collect::<Vec<_>>());
                    for level in 0..8 {
                        assert!(nodes.iter().filter(|node| node.level == level).count() <= 2);
                    }
                }
            }
        }
    }
}
