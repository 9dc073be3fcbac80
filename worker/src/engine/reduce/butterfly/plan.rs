//! Rounds of the butterfly: who sends whom which chunks of which node's sum.
//!
//! Of each node the rank of one leaf below it holds a chunk of its sum: which leaf follows from the bits of
//! the chunk's number, one for each level. So of a node's two children one has the parent's chunk on the
//! rank that holds it, and the other sends its own. With one leaf a rank each round halves what it holds.
//!
//! 1. Every chunk of every node is made by one addition, left child plus right child: the tree's order.
//! 2. A rank that covers a whole node holds all of it, so what happens below needs no message.
//! 3. On the way back each rank gets each chunk once.

use std::ops::Range;

use super::super::ShardMap;
use super::super::tree::{Node, cover};

/// Chunks of a node's sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The node.
    pub node: Node,
    /// Index of its buffer on this rank, among those of the nodes that this rank sums alone.
    pub buffer: usize,
    /// Chunks, one after the other.
    pub chunks: Range<usize>,
}

/// Parts that one rank sends another in a round. Both order them by node, then by chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// The other rank.
    pub rank: usize,
    /// Parts in it. Of a received one the buffers are those that they are added to.
    pub parts: Vec<Part>,
}

impl Message {
    /// Parts of each node.
    pub(super) fn by_node(&self) -> impl Iterator<Item = &[Part]> {
        self.parts.chunk_by(|a, b| a.node == b.node)
    }
}

/// One round. On the way back from the root there are only messages.
#[derive(Clone, Debug, Default)]
pub(super) struct Round {
    /// Messages to the ranks that add what this one has, or that lack it.
    pub sends: Vec<Message>,
    /// Messages with what this rank adds to its own, or lacks.
    pub receives: Vec<Message>,
    /// Chunks that this rank keeps, and the buffer with those of the sibling.
    pub adds: Vec<(Part, usize)>,
    /// Nodes of which this rank has a part of the parent, and whether their siblings have leaves.
    pub joins: Vec<(Node, bool)>,
}

/// All rounds of one rank.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Number of chunks, a power of two.
    pub chunks: usize,
    /// The node over all leaves.
    pub root: Node,
    /// Rounds towards the root.
    pub towards: Vec<Round>,
    /// Chunks of the root's sum that this rank finishes.
    pub finished: Vec<Part>,
    /// Rounds back.
    pub back: Vec<Round>,
}

/// Holders of the chunks of each node's sum.
struct Holders<'a> {
    shards: &'a ShardMap,
    /// Number of levels below the root.
    levels: u32,
    /// Level from which on nodes cover about what a rank has, and sums are cut. Below it only the ends of
    /// the ranks' ranges meet, and a sum goes to the left as a whole.
    first: u32,
}

impl Holders<'_> {
    fn new(shards: &ShardMap) -> Holders<'_> {
        let levels = Node::root(shards.data_shards).level;
        let ranks = u32::try_from(shards.world_size()).expect("ranks are counted in u32");
        let first = levels.saturating_sub(ranks.next_power_of_two().trailing_zeros());
        Holders { shards, levels, first }
    }

    /// Whether the right child of a node of `level + 1` holds the chunk of their parent.
    fn is_right(&self, chunk: usize, level: u32) -> bool {
        // The first cut has the highest bit, so that the chunks of a message lie together.
        level >= self.first && chunk >> (self.levels - 1 - level) & 1 == 1
    }

    /// Rank that holds a chunk of the sum under a node.
    fn holder(&self, mut node: Node, chunk: usize) -> usize {
        while node.level > 0 {
            let [left, right] = node.children();
            let is_right = self.is_right(chunk, left.level) && !self.is_empty(right);
            node = if is_right { right } else { left };
        }
        self.shards.ranges.partition_point(|range| range.end <= node.index)
    }

    fn is_empty(&self, node: Node) -> bool {
        node.leaves(self.shards.data_shards).is_empty()
    }

    /// Whether a rank holds a chunk of any node of a level.
    fn holds(&self, rank: usize, chunk: usize, level: u32) -> bool {
        let range = &self.shards.ranges[rank];
        let (first, last) = (range.start >> level, (range.end - 1) >> level);
        // Of a node between these two it has all leaves.
        let is_held = |index| self.holder(Node { level, index }, chunk) == rank;
        last - first > 1 || is_held(first) || is_held(last)
    }
}

/// Other side of a part in a round: the same chunks of the node's sibling.
#[derive(Clone, Copy, PartialEq)]
enum Other {
    /// On another rank.
    Rank(usize),
    /// On this rank, in this buffer.
    Here(usize),
}

/// A part in a round.
struct Turn {
    part: Part,
    other: Other,
    /// Whether this side gets the parent's chunks.
    keeps: bool,
}

impl Plan {
    /// Plans the rounds of one rank.
    pub(super) fn new(shards: &ShardMap) -> Plan {
        let holders = Holders::new(shards);
        let (leaves, chunks) = (shards.data_shards, 1 << (holders.levels - holders.first));
        let own = cover(shards.own(), leaves);
        let whole = |(buffer, node): (usize, &Node)| Part { node: *node, buffer, chunks: 0..chunks };
        let waiting: Vec<Part> = own.iter().enumerate().map(whole).collect();
        let (mut held, mut towards, mut back) = (Vec::new(), Vec::new(), Vec::new());
        for level in 0..holders.levels {
            // Sums of this rank's own shards come in at their level.
            held.extend(waiting.iter().filter(|part| part.node.level == level).cloned());
            held.sort_by_key(|part| (part.node, part.chunks.start));
            let (turns, alone) = turns(shards.rank, &holders, &held);
            towards.push(round_towards(&turns, &alone));
            back.push(round_back(shards.rank, &holders, level, &turns));
            let kept = turns.into_iter().filter(|turn| turn.keeps).map(|turn| turn.part);
            held = kept.chain(alone).map(raised).collect();
        }
        held.extend(waiting.into_iter().filter(|part| part.node.level == holders.levels));
        back.reverse();
        Plan { chunks, root: Node::root(leaves), towards, finished: held, back }
    }
}

fn raised(part: Part) -> Part {
    Part { node: part.node.parent(), ..part }
}

/// Splits parts where the other side or the keeper changes. Parts whose sibling has no leaf stay as they are.
fn turns(rank: usize, holders: &Holders<'_>, held: &[Part]) -> (Vec<Turn>, Vec<Part>) {
    let (mut turns, mut alone) = (Vec::<Turn>::new(), Vec::new());
    for part in held {
        let sibling = part.node.sibling();
        if holders.is_empty(sibling) {
            alone.push(part.clone());
            continue;
        }
        let is_right = part.node.is_right();
        for chunk in part.chunks.clone() {
            let keeps = holders.is_right(chunk, part.node.level) == is_right;
            let has = |held: &&Part| held.node == sibling && held.chunks.contains(&chunk);
            let other = match holders.holder(sibling, chunk) {
                other if other != rank => Other::Rank(other),
                _ => Other::Here(held.iter().find(has).expect("this rank holds the chunk").buffer),
            };
            let chunks = chunk..chunk + 1;
            match turns.last_mut() {
                Some(last)
                    if (last.part.node, last.part.buffer, last.part.chunks.end, last.other, last.keeps)
                        == (part.node, part.buffer, chunk, other, keeps) =>
                {
                    last.part.chunks.end = chunks.end;
                }
                _ => turns.push(Turn { part: Part { chunks, ..part.clone() }, other, keeps }),
            }
        }
    }
    (turns, alone)
}

/// The round towards the root: children become parents.
fn round_towards(turns: &[Turn], alone: &[Part]) -> Round {
    let mut round = Round::default();
    for Turn { part, other, keeps } in turns {
        match (*other, keeps) {
            (Other::Here(from), true) => round.adds.push((part.clone(), from)),
            // Added by the side that keeps the chunks.
            (Other::Here(_), false) => {}
            // What comes is the sibling's.
            (Other::Rank(rank), true) => {
                push(&mut round.receives, rank, Part { node: part.node.sibling(), ..part.clone() });
            }
            (Other::Rank(rank), false) => push(&mut round.sends, rank, part.clone()),
        }
    }
    let kept = turns.iter().filter(|turn| turn.keeps).map(|turn| (turn.part.node, true));
    round.joins = kept.chain(alone.iter().map(|part| (part.node, false))).collect();
    round.joins.dedup();
    sort(&mut round.sends);
    sort(&mut round.receives);
    round
}

/// The round back: chunks go the way that they came, but to no rank that has them already.
fn round_back(own_rank: usize, holders: &Holders<'_>, level: u32, turns: &[Turn]) -> Round {
    let mut round = Round::default();
    for Turn { part, other, keeps } in turns {
        let Other::Rank(other) = *other else { continue };
        // One order for both sides: that of the node whose holder gets the chunk.
        let (messages, receiver, node) = if *keeps {
            (&mut round.sends, other, part.node.sibling())
        } else {
            (&mut round.receives, own_rank, part.node)
        };
        for chunk in part.chunks.clone().filter(|chunk| !holders.holds(receiver, *chunk, level + 1)) {
            push(messages, other, Part { node, buffer: part.buffer, chunks: chunk..chunk + 1 });
        }
    }
    sort(&mut round.sends);
    sort(&mut round.receives);
    round
}

/// Adds a part to the message of a rank; neighbours become one.
fn push(messages: &mut Vec<Message>, rank: usize, part: Part) {
    let message = match messages.iter().position(|message| message.rank == rank) {
        Some(at) => &mut messages[at],
        None => {
            messages.push(Message { rank, parts: Vec::new() });
            messages.last_mut().expect("it was just pushed")
        }
    };
    match message.parts.last_mut() {
        Some(last)
            if last.chunks.end == part.chunks.start
                && (last.node, last.buffer) == (part.node, part.buffer) =>
        {
            last.chunks.end = part.chunks.end;
        }
        _ => message.parts.push(part),
    }
}

/// The order in which both sides lay messages and their parts out.
fn sort(messages: &mut [Message]) {
    messages.sort_by_key(|message| message.rank);
    for message in messages {
        message.parts.sort_by_key(|part| (part.node, part.chunks.start));
    }
}
