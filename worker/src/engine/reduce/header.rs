//! Reduce header: sent with each reduced gradient, so that ranks detect a disagreement before they commit.

use tch::{Kind, Tensor};

use crate::state::ALIGNMENT;

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

    fn words(self) -> [u64; 8] {
        // Room up to 64 bytes, by which a later version may send more.
        [self.generation, self.position, self.fingerprint, self.plan, self.ledger, 0, 0, 0]
    }

    /// Encodes the header as [`ALIGNMENT`] floats, which are only ever copied.
    pub fn to_tensor(self) -> Tensor {
        let bytes: Vec<u8> = self.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        // Bits and not numbers: no kernel may compute with them, as NaNs would lose their payload.
        Tensor::from_slice(&bytes).view_dtype(Kind::Float)
    }

    /// Decodes one header from each [`ALIGNMENT`] floats.
    pub fn from_tensor(tensor: &Tensor) -> Vec<Header> {
        let bytes = Vec::<u8>::try_from(tensor.flatten(0, -1).view_dtype(Kind::Uint8));
        let bytes = bytes.expect("a contiguous tensor of bytes on the CPU");
        let word = |row: &[u8], at: usize| {
            // All processes write little-endian, whatever the machine.
            u64::from_le_bytes(row[8 * at..8 * (at + 1)].try_into().expect("8 bytes"))
        };
        let header = |row: &[u8]| Header {
            generation: word(row, 0),
            position: word(row, 1),
            fingerprint: word(row, 2),
            plan: word(row, 3),
            ledger: word(row, 4),
        };
        bytes.chunks_exact(4 * ALIGNMENT).map(header).collect()
    }
}
