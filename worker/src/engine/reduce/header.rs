//! Reduce header: sent with each reduced gradient, so that ranks detect a disagreement before they commit.

use tch::{Kind, Tensor};

use crate::state::ALIGNMENT;

/// Number of words of an encoded header.
const WORDS: usize = ALIGNMENT / 2;
/// Word with the number of a rank, in folded headers.
const RANK: usize = 5;
/// Number of floats that folded headers take.
pub(super) const FOLDED: usize = 2 * ALIGNMENT;

/// Reduce header of one rank. All ranks must agree on the first three fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Generation that the rank trains in.
    pub generation: u64,
    /// Update index: the number of phases it has committed.
    pub position: u64,
    /// Fingerprint of the parameters that its last commit updated.
    pub fingerprint: u64,
    /// Number of the planned change that it knows of; 0 for none. A change happens when all ranks name the
    /// same.
    pub plan: u64,
    /// Sample checksum of the real samples in its shards' gradients of this phase.
    pub ledger: u64,
}

impl Header {
    /// Whether two headers agree in generation, update index and fingerprint.
    pub fn agrees(&self, other: &Header) -> bool {
        let place = |header: &Header| (header.generation, header.position, header.fingerprint);
        place(self) == place(other)
    }

    fn words(self) -> [u64; WORDS] {
        // Room up to 64 bytes, by which a later version may send more.
        [self.generation, self.position, self.fingerprint, self.plan, self.ledger, 0, 0, 0]
    }

    fn from_words(words: [u64; WORDS]) -> Header {
        let [generation, position, fingerprint, plan, ledger, ..] = words;
        Header { generation, position, fingerprint, plan, ledger }
    }

    /// Encodes the header as [`ALIGNMENT`] floats, which are only ever copied.
    pub fn to_tensor(self) -> Tensor {
        encode(&self.words())
    }

    /// Decodes one header from each [`ALIGNMENT`] floats.
    pub fn from_tensor(tensor: &Tensor) -> Vec<Header> {
        decode(tensor).into_iter().map(Header::from_words).collect()
    }
}

/// Headers of several ranks, as one: what a reduce has to know of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Folded {
    /// Header of the first rank, with the sum of all ledgers, and the plan that all name, or 0.
    pub header: Header,
    /// The first rank.
    pub rank: usize,
    /// A rank that does not agree with the first one, and its header, if there is any.
    pub other: Option<(usize, Header)>,
}

impl Folded {
    /// The header of one rank.
    pub(super) fn of(rank: usize, header: Header) -> Folded {
        Folded { header, rank, other: None }
    }

    /// Folds the headers of later ranks in.
    #[must_use]
    pub(super) fn fold(&self, later: &Folded) -> Folded {
        let Folded { header, rank, other } = *self;
        let differs = (!later.header.agrees(&header)).then_some((later.rank, later.header));
        // Only if all propose it does a change happen, so that all act at the same update index.
        let plan = if header.plan == later.header.plan { header.plan } else { 0 };
        // Each rank has counted its own shards: the sum is that of all samples.
        let ledger = header.ledger.wrapping_add(later.header.ledger);
        Folded { header: Header { plan, ledger, ..header }, rank, other: other.or(differs).or(later.other) }
    }

    /// Encodes it as [`FOLDED`] floats.
    pub(super) fn to_tensor(self) -> Tensor {
        let [mut first, mut second] = [self.header, self.other.unwrap_or_default().1].map(Header::words);
        first[RANK] = self.rank as u64;
        // Counted from 1, as 0 says that all agree.
        second[RANK] = self.other.map_or(0, |(rank, _)| rank as u64 + 1);
        encode(&[first, second].concat())
    }

    /// Decodes [`FOLDED`] floats.
    pub(super) fn from_tensor(tensor: &Tensor) -> Folded {
        let words = decode(tensor);
        let rank = |words: [u64; WORDS]| usize::try_from(words[RANK]).expect("64 bits");
        let other = rank(words[1]).checked_sub(1).map(|rank| (rank, Header::from_words(words[1])));
        Folded { header: Header::from_words(words[0]), rank: rank(words[0]), other }
    }
}

fn encode(words: &[u64]) -> Tensor {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    // Bits and not numbers: no kernel may compute with them, as NaNs would lose their payload.
    Tensor::from_slice(&bytes).view_dtype(Kind::Float)
}

fn decode(tensor: &Tensor) -> Vec<[u64; WORDS]> {
    let bytes = Vec::<u8>::try_from(tensor.contiguous().flatten(0, -1).view_dtype(Kind::Uint8));
    let bytes = bytes.expect("a contiguous tensor of bytes on the CPU");
    // All processes write little-endian, whatever the machine.
    let words: Vec<u64> = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    words.as_chunks().0.to_vec()
}
