//! Files of metrics rows, which a worker that ends without a coordinator leaves beside its
//! checkpoint for the next coordinator.
//!
//! The content is a sequence of wire messages, each preceded by its length: numbers keep their
//! bits, as they would not as text.

use prost::Message;

use crate::convert::{row_from_wire, row_to_wire};
use crate::error::Malformed;
use crate::message::MetricsRow;
use crate::wire;

/// Returns the file name for a worker.
pub fn file_of(worker: u64) -> String {
    format!("rows-{worker}.pb")
}

/// Whether a file name is one of these.
pub fn is_file(name: &str) -> bool {
    name.starts_with("rows-") && name.ends_with(".pb")
}

/// Encodes the content of a file.
pub fn encode(rows: &[MetricsRow]) -> Vec<u8> {
    rows.iter().flat_map(|row| row_to_wire(row.clone()).encode_length_delimited_to_vec()).collect()
}

/// Decodes the content of a file.
pub fn decode(mut content: &[u8]) -> Result<Vec<MetricsRow>, Malformed> {
    let mut rows = Vec::new();
    while !content.is_empty() {
        let row = wire::MetricsRow::decode_length_delimited(&mut content);
        rows.push(row_from_wire(row.map_err(|error| Malformed(error.to_string()))?)?);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::GpuUse;

    #[test]
    fn rows_come_back_with_their_bits_and_a_torn_file_is_refused() {
        let row = |step: u64| MetricsRow {
            step,
            time: 1e9 + 0.1,
            generation: 3,
            world_size: 2,
            loss_discriminator: f64::from_bits(0x3ff1_2345_6789_abcd),
            loss_generator: -0.0,
            images_per_second: 1e3,
            images_seen: 64 * step,
            ledger: u64::MAX - step,
            skipped: 0,
            profile: None,
            gpu: GpuUse { memory_bytes: Some(1), utilisation: None },
            scores: Some([0.1 + 0.2, f64::INFINITY]),
        };
        let rows: Vec<MetricsRow> = (1..4).map(row).collect();
        let content = encode(&rows);
        assert_eq!(decode(&content).unwrap(), rows);
        assert!(decode(&content[..content.len() - 1]).is_err());
        assert!(is_file(&file_of(7)) && !is_file("state-00001-of-00001.safetensors"));
    }
}
