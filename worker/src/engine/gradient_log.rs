//! Log of shard gradients, by which two builds are compared (`make golden`).
//!
//! With `GANGLION_SHARD_GRADIENTS=FILE` in its environment a worker appends a line of JSON for each shard
//! gradient that it computes, before that enters the sum: the update's index, the phase, the network, the
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
use tch::Tensor;

use crate::nn::tensor_bytes::to_bytes;
use crate::objective::{Phase, ShardGrad};

/// Environment variable with the path of the log.
pub const VARIABLE: &str = "GANGLION_SHARD_GRADIENTS";

/// Error of a log that cannot be opened or written.
#[derive(Debug, thiserror::Error)]
#[error("{VARIABLE}: cannot write {}: {source}", path.display())]
pub struct LogError {
    path: PathBuf,
    source: io::Error,
}

/// File that receives the hashes of shard gradients.
pub struct GradientLog {
    path: PathBuf,
    file: File,
}

impl GradientLog {
    /// Opens the log that the environment names, if it names one.
    pub fn from_environment() -> Result<Option<GradientLog>, LogError> {
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
    pub fn record(
        &self,
        update: u64,
        phase: Phase,
        shard: u32,
        gradient: &ShardGrad,
    ) -> Result<(), LogError> {
        let [gradients, buffers, scalars] = gradient.contents().map(hash);
        let line = json!({
            "update": update,
            "phase": phase.index,
            "network": phase.module.name(),
            "shard": shard,
            "gradient": gradients,
            "buffers": buffers,
            "scalars": scalars,
        });
        let written = (&self.file).write_all(format!("{line}\n").as_bytes());
        written.map_err(|source| LogError { path: self.path.clone(), source })
    }
}

/// The first 16 digits: enough to tell two builds apart, short enough to read.
fn hash(tensors: Vec<&Tensor>) -> String {
    let mut hasher = blake3::Hasher::new();
    for tensor in tensors {
        hasher.update(&to_bytes(tensor));
    }
    hasher.finalize().to_hex()[..16].to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tch::Device;

    use super::*;
    use crate::nn::{Init, TensorSpec};
    use crate::objective::{GradLayout, Reads};
    use crate::state::{Layout, Module};

    const PHASE: Phase = Phase { index: 1, module: Module::Generator, reads: Reads::Nothing };

    /// A buffer of one parameter and one of a network's buffers, each of three elements.
    fn buffer(capacity: usize) -> ShardGrad {
        let of = |name: &str| {
            Layout::new(vec![TensorSpec::parameter(name.to_string(), &[3], Init::Constant(0.0))])
        };
        let layout = GradLayout::of(of("weight"), of("mean"), 1);
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
        log.record(7, PHASE, 2, &buffer(0)).unwrap();
        for section in 0..3 {
            let changed = buffer(64);
            let mut at = changed.contents()[section][0].get(0);
            let _ = at.fill_(f64::from(f32::from_bits(1)));
            log.record(7, PHASE, 2, &changed).unwrap();
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
