//! Log of shard gradients, by which two builds are compared (`make golden`).
//!
//! With `GANGLION_SHARD_GRADIENTS=FILE` in its environment a worker appends a line of JSON for each shard
//! gradient that it computes, before that enters the sum: the update's index, the phase, its name, the
//! data shard, and a hash each of the gradient, the buffer updates and the scalars.
//!
//! 1. A hash is over the tensors in their order, without the room between them: it does not depend on memory
//!    layout.
//! 2. A line is one write at the file's end, so the workers of a machine can share a file. A shard gradient
//!    that is computed again, after a fault, is logged again.
//! 3. Without the variable a shard gradient costs one comparison.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::nn::tensor_bytes::to_bytes;
use crate::objective::{ShardAt, ShardGrad};

/// Environment variable with the path of the log.
pub(crate) const VARIABLE: &str = "GANGLION_SHARD_GRADIENTS";

/// Minimum number of hashed scalars, with zeros for those that a phase does not have: logs of all builds
/// compare.
const SCALARS: usize = 4;

/// Error of a log that cannot be opened or written.
#[derive(Debug, thiserror::Error)]
#[error("{VARIABLE}: cannot write {}: {source}", path.display())]
pub struct LogError {
    path: PathBuf,
    source: io::Error,
}

/// File that receives the hashes of shard gradients.
pub(crate) struct GradientLog {
    path: PathBuf,
    file: File,
}

impl GradientLog {
    /// Opens the log that the environment names, if it names one.
    pub(crate) fn from_environment() -> Result<Option<GradientLog>, LogError> {
        std::env::var_os(VARIABLE).map(GradientLog::open).transpose()
    }

    fn open(path: OsString) -> Result<GradientLog, LogError> {
        let path = PathBuf::from(path);
        match OpenOptions::new().create(true).append(true).open(&path) {
            Ok(file) => Ok(GradientLog { path, file }),
            Err(source) => Err(LogError { path, source }),
        }
    }

    /// Appends the hashes of a shard gradient.
    pub(crate) fn record(
        &self,
        update: u64,
        at: ShardAt,
        name: &str,
        gradient: &ShardGrad,
    ) -> Result<(), LogError> {
        let (gradients, buffers) = (hash(&gradient.gradients), hash(&gradient.statistics));
        let zero = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        let scalars = gradient.scalars.iter();
        let absent = SCALARS.saturating_sub(scalars.len());
        let scalars = hash(scalars.chain(std::iter::repeat_n(&zero, absent)));
        let line = json!({
            "update": update,
            "phase": at.phase.index,
            "network": name,
            "shard": at.shard,
            "gradient": gradients,
            "buffers": buffers,
            "scalars": scalars,
        });
        let written = (&self.file).write_all(format!("{line}\n").as_bytes());
        written.map_err(|source| LogError { path: self.path.clone(), source })
    }
}

/// The first 16 digits: enough to tell two builds apart, short enough to read.
fn hash<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> String {
    let mut hasher = blake3::Hasher::new();
    for tensor in tensors {
        hasher.update(&to_bytes(tensor));
    }
    hasher.finalize().to_hex()[..16].to_string()
}

#[cfg(test)]
mod tests {
    use ganglion_proto::job::Precision;
    use serde_json::Value;

    use super::*;
    use crate::nn::{Init, TensorSpec};
    use crate::objective::{
        BufferId, GradLayout, NamedNetwork, NetworkId, NetworkSet, Phase, Reads, ScalarRole, ScalarSpec,
    };
    use crate::state::StateLayout;

    const NETWORK: NetworkId = NetworkId(0);

    fn at() -> ShardAt {
        ShardAt { phase: Phase::of(1, NETWORK, Reads::Nothing), step: 3, shard: 2 }
    }

    /// A buffer of one parameter and one of a network's buffers, each of three elements.
    fn buffer(capacity: usize) -> ShardGrad {
        let of = |name: &str| vec![TensorSpec::parameter(name.to_string(), &[3], Init::Constant(0.0))];
        let (name, parameters, buffers) = ("network".into(), of("weight"), of("mean"));
        let network = NamedNetwork { name, parameters, buffers, average: None };
        let state = StateLayout::new(&[network], &[], Precision::Fp32);
        let follows = [BufferId { network: NETWORK, index: 0 }];
        let scalars = vec![ScalarSpec::new("loss", ScalarRole::Loss)];
        let layout = GradLayout::new(&state, NetworkSet::of([NETWORK]), &follows, 1, scalars);
        ShardGrad::new(&layout, layout.len() + capacity, Device::Cpu)
    }

    fn lines(log: &GradientLog) -> Vec<Value> {
        let text = std::fs::read_to_string(&log.path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn one_changed_bit_shows_where_it_is_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let log = GradientLog::open(folder.path().join("log").into()).unwrap();
        log.record(7, at(), "generator", &buffer(0)).unwrap();
        for section in 0..3 {
            let changed = buffer(64);
            let mut place = [&changed.gradients, &changed.statistics, &changed.scalars][section][0].get(0);
            let _ = place.fill_(f64::from(f32::from_bits(1)));
            log.record(7, at(), "generator", &changed).unwrap();
        }
        let lines = lines(&log);
        for (at, line) in lines[1..].iter().enumerate() {
            for (section, name) in ["gradient", "buffers", "scalars"].iter().enumerate() {
                assert_eq!(lines[0][name] == line[name], at != section, "{name} of {line}");
            }
            assert_eq!(line["update"], 7);
            assert_eq!(line["phase"], 1);
            assert_eq!(line["network"], "generator");
            assert_eq!(line["shard"], 2);
        }
    }

    #[test]
    fn a_log_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let wrong = GradientLog::open(folder.path().join("missing/log").into()).err().unwrap().to_string();
        assert!(wrong.contains(VARIABLE) && wrong.contains("missing/log"), "{wrong}");
    }
}
