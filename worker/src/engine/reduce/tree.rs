//! The one order in which shard gradients are summed: the leaves of a binary tree.
//!
//! Node (level j, index i) covers the leaves [i 2^j, (i + 1) 2^j) of `leaves`; the root covers them all. A
//! node's sum is its left child's plus its right child's; a child that covers no leaf is skipped, not added
//! as zero. Floating-point addition is not associative, so this order *is* the result: it must not depend
//! on how leaves are dealt to ranks.
//!
//! 1. A [`TreeSum`] over all leaves, pushed one by one, defines the sum.
//! 2. Given the sums of any set of nodes that covers the leaves once, in order, the result is the same to
//!    the bit.
//! 3. [`cover`] splits a range of leaves into its maximal nodes, at most two of a level. A sum over the
//!    leaves of the range ends with exactly these.

use std::ops::Range;

use tch::{Tensor, no_grad};

/// Node of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node {
    /// Height above the leaves.
    pub level: u32,
    /// Index within the level.
    pub index: u32,
}

impl Node {
    /// Returns the node that covers all of `leaves`, which is at least 1.
    pub fn root(leaves: u32) -> Node {
        // The root covers the next power of two; what lies beyond the leaves is skipped.
        Node { level: leaves.next_power_of_two().trailing_zeros(), index: 0 }
    }

    /// Returns the node of a single leaf.
    pub fn leaf(index: u32) -> Node {
        Node { level: 0, index }
    }

    /// Returns the leaves under this node, in a tree of `leaves`.
    pub fn leaves(self, leaves: u32) -> Range<u32> {
        let end = |index: u64| {
            // In 64 bits, as the end of the last node may lie beyond 2^32.
            u32::try_from((index << self.level).min(u64::from(leaves))).expect("at most u32 leaves")
        };
        end(u64::from(self.index))..end(u64::from(self.index) + 1)
    }

    /// Returns the two nodes below.
    pub fn children(self) -> [Node; 2] {
        let child = |index| Node { level: self.level - 1, index };
        [child(2 * self.index), child(2 * self.index + 1)]
    }

    /// Returns the node above.
    pub fn parent(self) -> Node {
        Node { level: self.level + 1, index: self.index / 2 }
    }

    /// Returns the other child of its parent.
    pub fn sibling(self) -> Node {
        Node { index: self.index ^ 1, ..self }
    }

    /// Whether it is the right child of its parent.
    pub fn is_right(self) -> bool {
        self.index & 1 == 1
    }
}

/// Returns the maximal nodes that together cover exactly the leaves of `range`, in order.
pub fn cover(range: Range<u32>, leaves: u32) -> Vec<Node> {
    fn visit(node: Node, range: &Range<u32>, leaves: u32, nodes: &mut Vec<Node>) {
        let own = node.leaves(leaves);
        // Outside of the range, or of the tree.
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

/// Splits a range of leaves into nodes of at most `most` leaves, the largest that there are, in order.
pub fn nodes_of(range: Range<u32>, leaves: u32, most: u32) -> Vec<Node> {
    let mut nodes = Vec::new();
    // The first in order is the last one here.
    let mut rest = cover(range, leaves);
    rest.reverse();
    while let Some(node) = rest.pop() {
        match node.leaves(leaves).len() {
            0 => {}
            count if count <= most.max(1) as usize => nodes.push(node),
            _ => rest.extend(node.children().into_iter().rev()),
        }
    }
    nodes
}

/// Term of a [`TreeSum`].
pub trait Summand {
    /// Adds the right neighbour in place, element by element.
    fn add(&mut self, right: &Self);
}

impl Summand for Tensor {
    fn add(&mut self, right: &Tensor) {
        let _ = no_grad(|| self.g_add_(right));
    }
}

/// Sum in tree order of terms that come one by one, from left to right. Two neighbours are added as soon as
/// both are there, as a binary counter carries its digits, so at most two terms of each level are held.
pub struct TreeSum<T> {
    leaves: u32,
    /// Complete nodes waiting for a neighbour, from left to right.
    open: Vec<(Node, T)>,
    /// Buffers of terms that were added to others.
    spare: Vec<T>,
}

impl<T: Summand> TreeSum<T> {
    /// Returns an empty sum over a tree of `leaves`.
    pub fn new(leaves: u32) -> TreeSum<T> {
        TreeSum { leaves, open: Vec::new(), spare: Vec::new() }
    }

    /// Adds the next term, the sum under `node`. Nodes come from left to right.
    pub fn push(&mut self, mut node: Node, mut sum: T) {
        // Out of order a sum would still come out, with other bits.
        debug_assert!(
            self.open
                .last()
                .is_none_or(|(last, _)| last.leaves(self.leaves).end <= node.leaves(self.leaves).start)
        );
        while node != Node::root(self.leaves) {
            let sibling = node.sibling();
            // A sibling that covers no leaf is skipped, not added as zero: -0.0 + 0.0 has other bits than
            // -0.0.
            if sibling.leaves(self.leaves).is_empty() {
                node = node.parent();
                // The parent of a node without a neighbour has the same sum.
                continue;
            }
            // A left node's sibling is still to come; a right node's sibling may belong to another rank.
            let Some((_, left)) = self.open.pop_if(|(last, _)| *last == sibling && sibling < node) else {
                break;
            };
            // The left term's memory holds the sum; the right one's is free after the addition.
            self.spare.push(std::mem::replace(&mut sum, left));
            sum.add(&self.spare[self.spare.len() - 1]);
            node = node.parent();
        }
        self.open.push((node, sum));
    }

    /// Ends the sum and returns the maximal nodes of its terms, from left to right. The next sum begins
    /// empty.
    pub fn take(&mut self) -> Vec<(Node, T)> {
        std::mem::take(&mut self.open)
    }

    /// Returns a buffer that is no longer in use, if there is one.
    pub fn spare(&mut self) -> Option<T> {
        self.spare.pop()
    }

    /// Returns a buffer to the pool for later terms.
    pub fn recycle(&mut self, term: T) {
        self.spare.push(term);
    }
}

#[cfg(test)]
mod tests {
    use ganglion_membership::shard_ranges;
    use proptest::prelude::*;

    use super::*;

    /// Reference implementation, level by level from the leaves up, on one element.
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

    impl Summand for f32 {
        fn add(&mut self, right: &f32) {
            *self += right;
        }
    }

    /// Sum over all ranks, each of which sums its range of the leaves alone.
    fn reduced(leaves: &[f32], world_size: u32) -> f32 {
        let count = u32::try_from(leaves.len()).unwrap();
        let mut root = TreeSum::new(count);
        for range in shard_ranges(count, world_size) {
            let mut own = TreeSum::new(count);
            range.clone().for_each(|leaf| own.push(Node::leaf(leaf), leaves[leaf as usize]));
            let own = own.take();
            let nodes: Vec<Node> = own.iter().map(|(node, _)| *node).collect();
            assert_eq!(nodes, cover(range, count), "a rank's sums are those of its maximal nodes");
            own.into_iter().for_each(|(node, sum)| root.push(node, sum));
        }
        let [(node, sum)] = root.take()[..] else { panic!("one sum is left") };
        assert_eq!(node, Node::root(count));
        sum
    }

    /// Sum over nodes of at most `most` leaves, each of which was summed as a tree of its own.
    fn by_nodes(leaves: &[f32], most: u32) -> f32 {
        let count = u32::try_from(leaves.len()).unwrap();
        let mut root = TreeSum::new(count);
        for node in nodes_of(0..count, count, most) {
            let under = node.leaves(count);
            let mut own = TreeSum::new(u32::try_from(under.len()).unwrap());
            (0..).zip(under).for_each(|(at, leaf)| own.push(Node::leaf(at), leaves[leaf as usize]));
            let [(_, sum)] = own.take()[..] else { panic!("one sum is left") };
            root.push(node, sum);
        }
        root.take()[0].1
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
                prop_assert_eq!(reduced(&leaves, world_size).to_bits(), expected);
                let most = world_size;
                prop_assert_eq!(by_nodes(&leaves, most).to_bits(), expected);
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
                    for most in [1, 2, 3, 8] {
                        let nodes = nodes_of(start..end, leaves, most);
                        assert!(nodes.iter().all(|node| node.leaves(leaves).len() <= most as usize));
                        let covered = nodes.iter().flat_map(|node| node.leaves(leaves));
                        assert!(covered.eq(start..end), "{nodes:?}");
                    }
                }
            }
        }
    }
}
