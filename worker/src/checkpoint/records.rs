//! Records of a state's tensors, by name: the stream whose blake3 is the state digest.
//!
//! A record is name, NUL, dtype, NUL, rank and shape as u64, elements; little-endian.

use std::ops::Range;

use ganglion_membership::{Share, Stretch};
use safetensors::tensor::Dtype;

use super::counter_tensors;
use super::snapshot::Snapshot;
use crate::state::{Counters, StateLayout};

/// Record of a tensor.
struct Record {
    name: String,
    /// All but the elements.
    head: Vec<u8>,
    elements: Elements,
    /// Place of the record in the stream.
    start: u64,
}

/// Elements of a tensor.
enum Elements {
    /// A counter.
    Number([u8; 8]),
    /// Floats of a range of the state's buffer.
    Floats(Range<usize>),
}

impl Record {
    fn new(name: String, (dtype, shape): (Dtype, &[i64]), elements: Elements) -> Record {
        // A NUL ends each text, so that two lists of tensors cannot give the same bytes.
        let mut head = [name.as_bytes(), &[0], dtype.to_string().as_bytes(), &[0]].concat();
        head.extend((shape.len() as u64).to_le_bytes());
        head.extend(shape.iter().flat_map(|size| size.to_le_bytes()));
        Record { name, head, elements, start: 0 }
    }

    fn len(&self) -> u64 {
        let elements = match &self.elements {
            Elements::Number(bytes) => bytes.len(),
            Elements::Floats(range) => 4 * range.len(),
        };
        (self.head.len() + elements) as u64
    }
}

/// Records of a state.
pub(super) struct Records(Vec<Record>);

impl Records {
    /// Records of a state with this layout and these counters.
    pub(super) fn new(layout: &StateLayout, counters: &Counters) -> Records {
        let number = |(name, bytes): (&str, [u8; 8])| {
            Record::new(name.to_string(), (Dtype::I64, &[1]), Elements::Number(bytes))
        };
        let mut records: Vec<Record> = counter_tensors(counters).into_iter().map(number).collect();
        for tensor in layout.tensors() {
            records.push(Record::new(
                tensor.name,
                (Dtype::F32, &tensor.shape),
                Elements::Floats(tensor.range),
            ));
        }
        // By name, so that the digest does not depend on the layout in memory.
        records.sort_by(|left, right| left.name.cmp(&right.name));
        let mut end = 0;
        for record in &mut records {
            record.start = end;
            end += record.len();
        }
        Records(records)
    }

    /// Length of the stream in bytes.
    fn total(&self) -> u64 {
        self.0.last().map_or(0, |last| last.start + last.len())
    }

    /// The state digest of a snapshot of the whole state, in hex.
    pub(super) fn digest(&self, snapshot: &Snapshot) -> String {
        let mut hasher = blake3::Hasher::new();
        for record in &self.0 {
            hasher.update(&record.head);
            match &record.elements {
                Elements::Number(bytes) => hasher.update(bytes),
                Elements::Floats(range) => hasher.update(&snapshot.bytes(range.clone())),
            };
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Share in the digest of the tensors that `is_own` names.
    pub(super) fn share(&self, snapshot: &Snapshot, is_own: impl Fn(&str) -> bool) -> Share {
        let total = self.total();
        // Neighbours in the stream are one stretch.
        let runs = self.0.chunk_by(|left, right| is_own(&left.name) == is_own(&right.name));
        let own = runs.filter(|run| is_own(&run[0].name));
        let stretches = own.map(|run| {
            let texts = run.iter().flat_map(|record| {
                let elements = match &record.elements {
                    Elements::Number(bytes) => bytes.to_vec().into(),
                    Elements::Floats(range) => snapshot.bytes(range.clone()),
                };
                [record.head.clone().into(), elements]
            });
            let texts: Vec<bytes::Bytes> = texts.collect();
            Stretch::of(total, run[0].start, &texts.iter().map(|text| &text[..]).collect::<Vec<_>>())
        });
        Share { total, stretches: stretches.collect() }
    }
}
