//! blake3 of a stream, put together from what several writers know of it, none of whom needs all of it.
//!
//! blake3 is the root of a tree over chunks of 1024 bytes, in which the left child of a node covers the
//! largest power of two of chunks that leaves something to the right (O'Connor et al., 2020, "BLAKE3",
//! section 2.1).
//! Whoever has a stretch of the stream hashes the largest subtrees in it. Of the chunks at its ends, of which
//! others have the rest, it passes the bytes on.

use std::ops::Range;

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use blake3::{CHUNK_LEN, Hasher};

/// Length of a leaf of the tree in bytes.
const CHUNK: u64 = CHUNK_LEN as u64;

/// Hash of a stretch of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    /// Place of its first byte in the stream.
    pub start: u64,
    /// Number of its bytes.
    pub len: u64,
    /// Bytes of the chunks of which it has a part, in order.
    pub ends: Vec<u8>,
    /// Hashes of the largest subtrees in it, in order.
    pub subtrees: Vec<[u8; 32]>,
}

/// Share of one writer in the hash of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Length of the stream in bytes.
    pub total: u64,
    /// Stretches that the writer has.
    pub stretches: Vec<Stretch>,
}

/// Piece of a stretch: bytes, or a subtree as a whole.
struct Piece {
    range: Range<u64>,
    is_subtree: bool,
}

/// Cuts a stretch of a stream of `total` bytes into pieces, in order: the same for writer and reader.
fn pieces(total: u64, stretch: &Range<u64>) -> Vec<Piece> {
    let whole = 0..total;
    let (mut found, mut open) = (Vec::new(), vec![whole]);
    while let Some(node) = open.pop() {
        let common = node.start.max(stretch.start)..node.end.min(stretch.end);
        let len = node.end - node.start;
        if common.is_empty() {
            continue;
        }
        // The root is hashed in a way of its own, and never as a subtree.
        if common == node && len < total {
            found.push(Piece { range: node, is_subtree: true });
        } else if len <= CHUNK {
            found.push(Piece { range: common, is_subtree: false });
        } else {
            let cut = node.start + left_subtree_len(len);
            open.extend([cut..node.end, node.start..cut]);
        }
    }
    found
}

impl Stretch {
    /// Hashes a stretch of a stream of `total` bytes from byte `start` on. It consists of `texts`, one after
    /// the other.
    ///
    /// # Panics
    /// The stretch goes beyond the stream.
    pub fn of(total: u64, start: u64, texts: &[&[u8]]) -> Stretch {
        let len = texts.iter().map(|text| text.len() as u64).sum();
        assert!(total - start >= len, "{len} bytes from {start} on, of a stream of {total}");
        let mut stretch = Stretch { start, len, ..Stretch::default() };
        let mut texts = Texts { open: &[], next: texts };
        for Piece { range, is_subtree } in pieces(total, &(start..start + len)) {
            let len = range.end - range.start;
            if is_subtree {
                let mut hasher = Hasher::new();
                hasher.set_input_offset(range.start);
                texts.take(len, |bytes| {
                    hasher.update(bytes);
                });
                stretch.subtrees.push(hasher.finalize_non_root());
            } else {
                texts.take(len, |bytes| stretch.ends.extend(bytes));
            }
        }
        stretch
    }

    /// Adds its pieces to those of a stream; `None` if it does not have the pieces that it must have.
    fn give<'a>(&'a self, total: u64, known: &mut Vec<Known<'a>>) -> Option<()> {
        let range = self.start..self.start.checked_add(self.len).filter(|end| *end <= total)?;
        let (mut ends, mut subtrees) = (&self.ends[..], self.subtrees.iter());
        for Piece { range, is_subtree } in pieces(total, &range) {
            let content = if is_subtree {
                Content::Subtree(*subtrees.next()?)
            } else {
                let (bytes, rest) = ends.split_at_checked(usize::try_from(range.end - range.start).ok()?)?;
                ends = rest;
                Content::Bytes(bytes)
            };
            known.push(Known { range, content });
        }
        (ends.is_empty() && subtrees.next().is_none()).then_some(())
    }
}

/// Reader of texts as one.
struct Texts<'a> {
    /// Rest of the text that is being read.
    open: &'a [u8],
    next: &'a [&'a [u8]],
}

impl Texts<'_> {
    /// Passes on the next `len` bytes, which there must be.
    fn take(&mut self, mut len: u64, mut read: impl FnMut(&[u8])) {
        while len > 0 {
            if self.open.is_empty() {
                (self.open, self.next) = (self.next[0], &self.next[1..]);
            }
            let most = usize::try_from(len).unwrap_or(usize::MAX).min(self.open.len());
            let (bytes, rest) = self.open.split_at(most);
            read(bytes);
            (self.open, len) = (rest, len - most as u64);
        }
    }
}

/// Known piece of a stream.
struct Known<'a> {
    range: Range<u64>,
    content: Content<'a>,
}

enum Content<'a> {
    Bytes(&'a [u8]),
    Subtree(ChainingValue),
}

/// Returns blake3 of a stream in hex, from the shares of all its writers; `None` if they are not shares of
/// one stream, or lack some of it or have it twice.
pub(crate) fn whole<'a>(shares: impl IntoIterator<Item = &'a Share>) -> Option<String> {
    let shares: Vec<&Share> = shares.into_iter().filter(|share| !share.stretches.is_empty()).collect();
    let total = shares.first().map_or(0, |share| share.total);
    let mut stretches: Vec<&Stretch> = shares.iter().flat_map(|share| &share.stretches).collect();
    stretches.sort_by_key(|stretch| stretch.start);
    let (mut known, mut end) = (Vec::new(), 0);
    for stretch in stretches {
        if stretch.start != end {
            return None;
        }
        stretch.give(total, &mut known)?;
        end += stretch.len;
    }
    if end != total || shares.iter().any(|share| share.total != total) {
        return None;
    }
    let mut tree = Tree { known: known.into_iter().peekable() };
    let hash = if total <= CHUNK {
        tree.chunk(&Hasher::new(), 0..total)?.finalize()
    } else {
        let cut = left_subtree_len(total);
        merge_subtrees_root(&tree.node(0..cut)?, &tree.node(cut..total)?, Mode::Hash)
    };
    Some(hash.to_hex().to_string())
}

/// Tree of a stream, of which the pieces are known in order.
struct Tree<'a, I: Iterator<Item = Known<'a>>> {
    known: std::iter::Peekable<I>,
}

impl<'a, I: Iterator<Item = Known<'a>>> Tree<'a, I> {
    /// Hashes the next pieces, which must be those of one node below the root.
    fn node(&mut self, range: Range<u64>) -> Option<ChainingValue> {
        let known = self.known.peek()?;
        if let Content::Subtree(hash) = known.content
            && known.range == range
        {
            self.known.next();
            return Some(hash);
        }
        if range.end - range.start <= CHUNK {
            let mut hasher = Hasher::new();
            hasher.set_input_offset(range.start);
            return Some(self.chunk(&hasher, range)?.finalize_non_root());
        }
        let cut = range.start + left_subtree_len(range.end - range.start);
        Some(merge_subtrees_non_root(&self.node(range.start..cut)?, &self.node(cut..range.end)?, Mode::Hash))
    }

    /// Hashes the next pieces, which must be the bytes of one chunk.
    fn chunk(&mut self, begun: &Hasher, range: Range<u64>) -> Option<Hasher> {
        let (mut hasher, mut end) = (begun.clone(), range.start);
        while end < range.end {
            let Known { range: piece, content: Content::Bytes(bytes) } = self.known.next()? else {
                return None;
            };
            hasher.update(bytes);
            end = piece.end;
        }
        Some(hasher)
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::ChaCha8Rng;
    use rand::{Rng, RngExt as _, SeedableRng};

    use super::*;

    /// Stretches of a stream, cut at these places, each from two texts.
    fn stretches(stream: &[u8], cuts: &[usize]) -> Vec<Stretch> {
        let all: Vec<usize> = [0].into_iter().chain(cuts.iter().copied()).chain([stream.len()]).collect();
        let of = |ends: &[usize]| {
            let (one, two) = stream[ends[0]..ends[1]].split_at((ends[1] - ends[0]) / 3);
            Stretch::of(stream.len() as u64, ends[0] as u64, &[one, &[], two])
        };
        all.windows(2).map(of).filter(|stretch| stretch.len > 0).collect()
    }

    fn random(seed: u64, len: usize) -> (ChaCha8Rng, Vec<u8>) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut stream = vec![0; len];
        random.fill_bytes(&mut stream);
        (random, stream)
    }

    #[test]
    fn stretches_give_the_hash_of_the_stream_wherever_it_is_cut() {
        let lengths = [0, 1, 1023, 1024, 1025, 3000, 8192, 70_001].into_iter().cycle();
        for (seed, length) in (0..400).zip(lengths) {
            let (mut random, stream) = random(seed, length);
            let mut cuts: Vec<usize> =
                (0..random.random_range(0..12)).map(|_| random.random_range(0..=stream.len())).collect();
            // Often at the edge of a chunk.
            cuts.iter_mut().filter(|_| random.random_bool(0.3)).for_each(|cut| *cut &= !1023);
            cuts.sort_unstable();
            // Dealt to three writers.
            let mut shares = vec![Share { total: stream.len() as u64, stretches: Vec::new() }; 3];
            for stretch in stretches(&stream, &cuts) {
                shares[random.random_range(0..3)].stretches.push(stretch);
            }
            let expected = blake3::hash(&stream).to_hex().to_string();
            assert_eq!(whole(&shares), Some(expected), "seed {seed}, cut at {cuts:?}");
        }
    }

    #[test]
    fn a_stretch_is_told_in_a_few_hashes() {
        let (_, stream) = random(1, 1 << 20);
        for stretch in stretches(&stream, &[5, 300_000, 777_777]) {
            assert!(stretch.ends.len() < 2048 && stretch.subtrees.len() <= 20, "{stretch:?}");
        }
    }

    #[test]
    fn what_does_not_make_up_a_stream_has_no_hash() {
        let (_, stream) = random(2, 5000);
        let good = Share { total: 5000, stretches: stretches(&stream, &[100, 2048, 3000]) };
        assert!(whole([&good]).is_some());
        let wrong = |change: &dyn Fn(&mut Share)| {
            let mut share = good.clone();
            change(&mut share);
            whole([&share])
        };
        assert_eq!(wrong(&|share| drop(share.stretches.remove(1))), None, "a gap");
        assert_eq!(wrong(&|share| drop(share.stretches.pop())), None, "an end that lacks");
        assert_eq!(wrong(&|share| share.stretches.push(share.stretches[1].clone())), None, "twice");
        assert_eq!(wrong(&|share| share.total = 5001), None, "another length");
        assert_eq!(wrong(&|share| share.stretches[0].len += 1), None, "overlap");
        assert_eq!(wrong(&|share| share.stretches[3].len = u64::MAX), None, "beyond all numbers");
        assert_eq!(wrong(&|share| share.stretches[1].ends.truncate(1)), None, "bytes less");
        assert_eq!(wrong(&|share| share.stretches[1].ends.push(0)), None, "a byte more");
        assert_eq!(wrong(&|share| share.stretches[1].subtrees.push([0; 32])), None, "a hash more");
        let other = Share { total: 5001, stretches: vec![Stretch::default()] };
        assert_eq!(whole([&good, &other]), None, "two streams");
        // A wrong hash is another stream's.
        assert_ne!(wrong(&|share| share.stretches[1].subtrees[0][3] ^= 1), whole([&good]));
    }
}
