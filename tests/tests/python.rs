//! Runs read by Python's own readers: safetensors and TensorBoard.
#![allow(clippy::unwrap_used)] // a test may panic

use std::path::{Path, PathBuf};
use std::process::Command;

use ganglion_tests::{Run, SMALL_DCGAN};

const READ: &str = r#"
import glob, hashlib, json, os, sys
import numpy
from safetensors import safe_open
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

run = sys.argv[1]
folder = os.path.join(run, "checkpoints", open(os.path.join(run, "checkpoints", "latest")).read().strip())
index = json.load(open(os.path.join(folder, "state.safetensors.index.json")))
tensors = {}
for part in sorted(set(index["weight_map"].values())):
    tensors.update(load_file(os.path.join(folder, part)))
assert set(tensors) == set(index["weight_map"]), "the index names every tensor"
assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
assert tensors["counters.position"].tolist() == [6], tensors["counters.position"]
generator = load_file(os.path.join(folder, "generator_ema.safetensors"))
for name, tensor in generator.items():
    assert numpy.array_equal(tensor, tensors["ema." + name]), name
with safe_open(os.path.join(folder, "generator_ema.safetensors"), "numpy") as file:
    assert file.metadata()["model"] == "dcgan-28", file.metadata()

events = EventAccumulator(os.path.join(run, "tensorboard")).Reload()
rows = [json.loads(line) for line in open(os.path.join(run, "metrics.jsonl"))]
scalars = events.Scalars("loss/generator")
assert [scalar.step for scalar in scalars] == [row["step"] for row in rows] == [1, 2, 3], scalars
for scalar, row in zip(scalars, rows):
    assert scalar.value == numpy.float32(row["loss_generator"])
[picture] = events.Images("samples")
file = os.path.join(run, "samples", "step-00000003.png")
assert picture.encoded_image_string == open(file, "rb").read()
print("read", len(tensors), "tensors")
"#;

/// The folder that `make test` installs Python's readers into.
fn packages() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/python")
}

#[test]
fn python_reads_checkpoints_and_tensorboard_files() {
    if !packages().join("safetensors").exists() {
        eprintln!("SKIPPED: Python's readers are not in .tools/python; `make test` installs them");
        return;
    }
    let run = Run::new(&[SMALL_DCGAN, &["job.steps=3", "job.data_shards=3", "metrics.every_steps=1"]]);
    run.complete(2);
    let mut python = Command::new(std::env::var("PYTHON").unwrap_or("python3".to_string()));
    let output = python.args(["-c", READ]).arg(run.path("")).env("PYTHONPATH", packages()).output().unwrap();
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("tensors"), "{out}{error}");
}
