//! Rows of `metrics.jsonl`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::named::{Profiles, Scalars};
use super::schema::record;

/// Number that is written as 16 hexadecimal digits.
pub(super) type Hexadecimal = u64;

record! {
    /// Metrics of one reported step: a line of `metrics.jsonl`. The columns are in the order of the
    /// line: those up to the scalars are a function of the job, the others depend on circumstances.
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    pub struct MetricsRow {
        /// Count of steps done.
        pub step: u64,
        /// Real images consumed since the start of the run.
        pub images_seen: u64,
        /// Sample checksum (`ledger`) of the state after the step: covers all samples committed up to
        /// it. Written as 16 hexadecimal digits: many readers of JSON round numbers beyond 2^53.
        #[serde(with = "hexadecimal")]
        pub ledger: Hexadecimal,
        /// Consecutive skipped phases at the end of the step.
        #[serde(default, skip_serializing_if = "is_zero")]
        pub skipped: u64,
        /// Scalars of the objective: losses and the like, means over the global batch.
        #[serde(flatten)]
        pub scalars: Scalars,
        /// Passes over the data set since the start of the run.
        #[serde(default)]
        pub epoch: f64,
        /// Time of the step's commit, in seconds since the Unix epoch.
        pub time: f64,
        /// Generation that committed the step.
        pub generation: u64,
        /// World size of that generation.
        pub world_size: u32,
        /// Real images consumed per second since the previous row.
        #[serde(default, deserialize_with = "nullable")]
        pub images_per_second: f64,
        /// Memory in use on the GPU of the reporting member, in bytes, by all its processes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub gpu_memory_bytes: Option<u64>,
        /// Recent busy time of that GPU, in percent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub gpu_utilisation: Option<u32>,
        /// Time profile of the phases of each name; empty if it was not measured.
        #[serde(default, skip_serializing_if = "Profiles::is_empty")]
        pub profile: Profiles,
    }
}

record! {
    /// Time profile of the phases of one name on one member: milliseconds per step, mean over the steps
    /// since the previous row. Three decimals are written.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
    pub struct Profile {
        /// Waiting for samples to be read.
        #[serde(serialize_with = "thousandths")]
        pub data: f64,
        /// Forward and backward passes of the member's data shards, and their summation.
        #[serde(serialize_with = "thousandths")]
        pub compute: f64,
        /// Waiting for other members in a reduce.
        #[serde(serialize_with = "thousandths")]
        pub wait: f64,
        /// Checking and applying the reduced gradient.
        #[serde(serialize_with = "thousandths")]
        pub commit: f64,
        /// Everything else.
        #[serde(serialize_with = "thousandths")]
        pub other: f64,
    }
}

impl MetricsRow {
    /// The row's line, without its newline. Numbers that are not finite are null.
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("a struct of numbers can be written as JSON")
    }

    /// Part of a line that is a function of the job.
    pub fn computed(line: &str) -> &str {
        // No scalar has the name of this column, and no value is a text with quotes.
        // A line of an earlier version has no such column: all of it counts as computed.
        line.split(",\"epoch\":").next().unwrap_or(line)
    }
}

impl Profile {
    /// The parts with their names.
    pub fn parts(&self) -> [(&'static str, f64); 5] {
        [
            ("data", self.data),
            ("compute", self.compute),
            ("wait", self.wait),
            ("commit", self.commit),
            ("other", self.other),
        ]
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde hands it over so
pub(super) fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde hands it over so
fn thousandths<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    // Milliseconds to the microsecond: more digits would be noise in each line.
    serializer.serialize_f64((number * 1000.0).round() / 1000.0)
}

/// Reads a number that need not be finite.
pub(crate) fn nullable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

mod hexadecimal {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::{Serialize, Serializer};

    #[allow(clippy::trivially_copy_pass_by_ref)] // serde hands it over so
    pub(super) fn serialize<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        // As text: JSON's numbers are exact up to 2^53 only, in most readers.
        format!("{number:016x}").serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let digits = String::deserialize(deserializer)?;
        // A number that was cut off must not pass for a small one.
        let number = u64::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 16);
        number.ok_or_else(|| D::Error::custom("a checksum has 16 hexadecimal digits"))
    }
}
