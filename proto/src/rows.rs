//! Files of metrics rows, which a worker that ends without a coordinator leaves beside its
//! checkpoint for the next coordinator.
//!
//! The content is a sequence of wire messages, each preceded by its length: numbers keep their
//! bits, as they would not as text.

use prost::Message;

use crate::convert::{row_from_wire, row_to_wire};
use crate::error::{Malformed, malformed};
use crate::record::MetricsRow;
use crate::wire;

/// Fields of rows before scalars had names. Files of such a build are read as well.
#[derive(Clone, PartialEq, Message)]
struct Former {
    #[prost(double, optional, tag = "5")]
    loss_discriminator: Option<f64>,
    #[prost(double, optional, tag = "6")]
    loss_generator: Option<f64>,
    #[prost(double, optional, tag = "15")]
    score_real: Option<f64>,
    #[prost(double, optional, tag = "16")]
    score_fake: Option<f64>,
}

impl Former {
    fn scalars(&self) -> impl Iterator<Item = wire::Scalar> {
        let named = [
            ("loss_discriminator", self.loss_discriminator),
            ("loss_generator", self.loss_generator),
            ("score_real", self.score_real),
            ("score_fake", self.score_fake),
        ];
        named
            .into_iter()
            .filter_map(|(name, value)| Some(wire::Scalar { name: name.to_string(), value: value? }))
    }
}

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
    // With its length before it, so a file that is cut off shows it.
    rows.iter().flat_map(|row| row_to_wire(row.clone()).encode_length_delimited_to_vec()).collect()
}

/// Decodes the content of a file.
pub fn decode(mut content: &[u8]) -> Result<Vec<MetricsRow>, Malformed> {
    let broken = |error: prost::DecodeError| Malformed(error.to_string());
    let mut rows = Vec::new();
    while !content.is_empty() {
        let length = prost::decode_length_delimiter(&mut content).map_err(broken)?;
        let (bytes, rest) =
            // The writer may have been killed: nothing of a torn file is taken.
            content.split_at_checked(length).ok_or_else(|| malformed("the last row is cut off"))?;
        let mut row = wire::MetricsRow::decode(bytes).map_err(broken)?;
        // Each build's fields have tags of their own, so one of the two readings is empty.
        row.scalars.extend(Former::decode(bytes).map_err(broken)?.scalars());
        // Bounded like a message: the file lies where others may write.
        rows.push(row_from_wire(row)?);
        content = rest;
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn rows_come_back_with_their_bits_and_a_torn_file_is_refused() {
        let row = |step: u64| MetricsRow {
            step,
            time: 1e9 + 0.1,
            generation: 3,
            world_size: 2,
            scalars: [("a", f64::from_bits(0x3ff1_2345_6789_abcd)), ("b", -0.0), ("c", f64::INFINITY)]
                .into_iter()
                .collect(),
            epoch: 0.1,
            images_per_second: 1e3,
            images_seen: 64 * step,
            ledger: u64::MAX - step,
            gpu_memory_bytes: Some(1),
            ..MetricsRow::default()
        };
        let rows: Vec<MetricsRow> = (1..4).map(row).collect();
        let content = encode(&rows);
        assert_eq!(decode(&content).unwrap(), rows);
        assert!(decode(&content[..content.len() - 1]).is_err());
        assert!(is_file(&file_of(7)) && !is_file("state-00001-of-00001.safetensors"));
    }

    #[test]
    fn rows_of_before_scalars_had_names_are_read() {
        let row = wire::MetricsRow { step: 7, ..wire::MetricsRow::default() };
        let former = Former {
            loss_discriminator: Some(0.1 + 0.2),
            loss_generator: Some(1.5),
            score_real: Some(0.75),
            score_fake: None,
        };
        let bytes = [row.encode_to_vec(), former.encode_to_vec()].concat();
        let mut content = Vec::new();
        prost::encode_length_delimiter(bytes.len(), &mut content).unwrap();
        content.extend(bytes);
        let read = decode(&content).unwrap();
        let scalars = [("loss_discriminator", 0.1 + 0.2), ("loss_generator", 1.5), ("score_real", 0.75)];
        assert_eq!((read[0].step, &read[0].scalars), (7, &scalars.into_iter().collect()));
    }
}
