//! Row of an evaluation: a worker's report, an event, and a row of the journal.

use prost::Message;
use serde::{Deserialize, Serialize};

use super::named::Scalars;
use super::row::{is_zero, nullable};
use super::schema::record;
use crate::error::Malformed;
use crate::wire;

record! {
    /// Metrics of one evaluation.
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    pub struct EvaluationRow {
        /// Name of the feature space, with its hash; the reason of an evaluation without metrics.
        pub features: String,
        /// Number of held-out samples by which the objective's own scalars were computed, if it has any.
        #[serde(default, skip_serializing_if = "is_zero")]
        pub held_out: u64,
        /// Values by name: metrics of generated samples, and the objective's own scalars.
        pub metrics: Scalars,
        /// Duration in seconds; not part of the result.
        #[serde(deserialize_with = "nullable")]
        pub seconds: f64,
        /// Count of steps done in the evaluated state.
        pub step: u64,
    }
}

impl EvaluationRow {
    /// Returns the value of the named metric.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.metrics.get(name)
    }

    /// Whether another row has the same content for the same state. Numbers are compared by their
    /// bits, except for the sign of a zero, which the wire does not carry.
    pub fn agrees(&self, other: &EvaluationRow) -> bool {
        let bits = |row: &EvaluationRow| -> Vec<(String, u64)> {
            // Turns -0.0 into 0.0, which are the same result. By bits otherwise, as NaN equals itself
            // here.
            row.metrics.iter().map(|(name, value)| (name.to_string(), (value + 0.0).to_bits())).collect()
        };
        let about = |row: &EvaluationRow| (row.step, row.features.clone(), row.held_out);
        about(self) == about(other) && bits(self) == bits(other)
    }
}

// ---- On the wire

impl EvaluationRow {
    /// Encodes the row in bytes that keep the bits of its numbers.
    pub fn encode(&self) -> Vec<u8> {
        self.to_wire().encode_to_vec()
    }

    /// Decodes the output of [`EvaluationRow::encode`].
    ///
    /// # Errors
    /// The bytes are not an encoded row.
    pub fn decode(bytes: &[u8]) -> Result<EvaluationRow, Malformed> {
        let read = wire::EvaluationRow::decode(bytes).map_err(|error| Malformed(error.to_string()))?;
        EvaluationRow::from_wire(read)
    }

    pub(crate) fn to_wire(&self) -> wire::EvaluationRow {
        let metric = |(name, value): (&str, f64)| wire::Figure { name: name.to_string(), value };
        wire::EvaluationRow {
            step: self.step,
            figures: self.metrics.iter().map(metric).collect(),
            features: self.features.clone(),
            seconds: self.seconds,
            held_out: self.held_out,
        }
    }

    pub(crate) fn from_wire(row: wire::EvaluationRow) -> Result<EvaluationRow, Malformed> {
        let figures = row.figures.into_iter().map(|figure| (figure.name, figure.value));
        Ok(EvaluationRow {
            step: crate::bounds::count(row.step, "step")?,
            // Names of metrics become keys of JSON, columns and labels of time series.
            metrics: super::checked(figures.collect())?,
            features: crate::bounds::text(row.features),
            seconds: row.seconds,
            held_out: crate::bounds::count(row.held_out, "held_out")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluation::names;

    fn row(metrics: &[(&str, f64)]) -> EvaluationRow {
        let metrics = metrics.iter().copied().collect();
        EvaluationRow { step: 3, metrics, features: "digits 0a".to_string(), held_out: 96, seconds: 0.5 }
    }

    #[test]
    fn a_row_survives_the_wire_with_its_bits() {
        let sent = row(&[(names::FRECHET, 0.1 + 0.2), (names::KID, -0.0), (names::SCORE, f64::NAN)]);
        let read = EvaluationRow::from_wire(sent.to_wire()).unwrap();
        assert!(sent.agrees(&read));
        assert!(sent.agrees(&EvaluationRow::decode(&sent.encode()).unwrap()));
        assert!(sent.agrees(&EvaluationRow { seconds: 9.0, ..read.clone() }));
        assert!(!sent.agrees(&EvaluationRow { step: 4, ..read.clone() }));
        assert!(!sent.agrees(&EvaluationRow { held_out: 95, ..read }));
        assert!(!row(&[(names::KID, 0.1)]).agrees(&row(&[(names::KID, 0.1 + f64::EPSILON)])));
    }

    #[test]
    fn a_row_with_other_names_is_refused() {
        for name in ["", "Name", "a b", "a\"", &"x".repeat(65)] {
            assert!(EvaluationRow::from_wire(row(&[(name, 1.0)]).to_wire()).is_err(), "{name}");
        }
        assert!(EvaluationRow::from_wire(row(&[("a", 1.0), ("a", 1.0)]).to_wire()).is_err(), "twice");
    }
}
