//! Packages for tests, without PyTorch: graphs that are compiled from C (`graph.c`), with the manifests that
//! PyTorch's would have.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use zip::write::FileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Fault of the first graph of a package, by its number in `graph.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub enum Fault {
    None = 0,
    Fails = 1,
    Hangs = 2,
    NanGradient = 3,
    /// Returns another gradient each time.
    Forgets = 4,
    WrongShape = 5,
    WrongKind = 6,
    /// Fails after some steps.
    FailsLater = 7,
}

/// A package: its manifest, first weights and graphs.
pub struct Source {
    /// The manifest.
    pub manifest: Value,
    weights: Vec<(&'static str, Vec<usize>, Vec<f32>)>,
    /// Graphs by name, each with its number in `graph.c`.
    graphs: Vec<(&'static str, u32)>,
}

/// Pixels of an image.
const PIXELS: usize = 28 * 28;
/// Samples of a shard.
const BATCH: usize = 4;

/// Numbers between -`size` and `size` that look random.
fn numbers(count: usize, size: f32) -> Vec<f32> {
    (0..count).map(|index| size * (index as f32 * 12.9898).sin()).collect()
}

fn optimizer(learning_rate: f64) -> Value {
    json!({"kind": "adam", "learning_rate": learning_rate, "beta1": 0.5, "beta2": 0.999, "epsilon": 1e-8})
}

fn manifest(classes: u32, networks: &Value, phases: &Value) -> Value {
    json!({
        "format": 1, "torch": "2.11.0", "device": "cpu",
        "cpu": {"arch": std::env::consts::ARCH, "features": []},
        "shard_batch": BATCH,
        "data": {"images": {"channels": 1, "height": 28, "width": 28}, "classes": classes},
        "networks": networks, "phases": phases,
    })
}

/// A linear classifier of digits with dropout, a running mean and an evaluation, beside a frozen network.
pub fn classifier() -> Source {
    let networks = json!([{
        "name": "classifier",
        "parameters": [{"name": "weight", "shape": [10, PIXELS]}, {"name": "bias", "shape": [10]}],
        "buffers": [{"name": "mean", "shape": [PIXELS]}],
        "average": null,
    }, {
        "name": "frozen", "parameters": [], "buffers": [{"name": "weight", "shape": [3]}], "average": null,
    }]);
    let read = |rest: &[Value]| {
        let mut inputs = vec![
            json!({"parameter": "classifier.weight"}),
            json!({"parameter": "classifier.bias"}),
            json!({"buffer": "classifier.mean"}),
            json!({"batch": "images"}),
            json!({"batch": "classes"}),
        ];
        inputs.extend_from_slice(rest);
        inputs
    };
    let phases = json!([{
        "name": "training", "graph": "training", "updates": ["classifier", "frozen"], "every": 1,
        "batch": "next",
        "optimizer": optimizer(1e-3),
        "inputs": read(&[json!({"draw": 0}), json!({"step": true})]),
        "draws": [{"kind": "bernoulli", "p": 0.9, "shape": [BATCH, PIXELS]}],
        "outputs": [{"gradient": "classifier.weight"}, {"gradient": "classifier.bias"},
                    {"buffer": "classifier.mean"}, {"scalar": "loss"}, {"scalar": "accuracy"}],
        "loss": "loss",
    }]);
    let mut manifest = manifest(10, &networks, &phases);
    manifest["evaluate"] = json!({
        "graph": "evaluate", "inputs": read(&[]), "draws": [],
        "outputs": [{"scalar": "held_out_accuracy"}, {"scalar": "squared_error"}],
    });
    Source {
        manifest,
        weights: vec![
            ("classifier.weight", vec![10, PIXELS], numbers(10 * PIXELS, 0.01)),
            ("classifier.bias", vec![10], vec![0.0; 10]),
            ("classifier.mean", vec![PIXELS], vec![0.0; PIXELS]),
            ("frozen.weight", vec![3], numbers(3, 1.0)),
        ],
        graphs: vec![("training", 0), ("evaluate", 4)],
    }
}

/// A linear GAN, whose generator is updated in every second step and has a moving average, with its samples.
pub fn gan() -> Source {
    let networks = json!([
        {"name": "d", "parameters": [{"name": "v", "shape": [PIXELS]}], "buffers": [], "average": null},
        {"name": "g", "parameters": [{"name": "a", "shape": [PIXELS, 4]}, {"name": "c", "shape": [PIXELS]}],
         "buffers": [], "average": {"name": "g_ema", "half_life_samples": 500}},
    ]);
    let of_both = [json!({"parameter": "d.v"}), json!({"parameter": "g.a"}), json!({"parameter": "g.c"})];
    let inputs = |rest: &[Value]| [&of_both[..], rest].concat();
    let noise = json!([{"kind": "normal", "shape": [BATCH, 4]}]);
    let phases = json!([
        {"name": "discriminator", "graph": "discriminator", "updates": ["d"], "every": 1, "batch": "next",
         "optimizer": optimizer(1e-2), "inputs": inputs(&[json!({"batch": "images"}), json!({"draw": 0})]),
         "draws": noise, "outputs": [{"gradient": "d.v"}, {"scalar": "discriminator_loss"}],
         "loss": "discriminator_loss"},
        {"name": "generator", "graph": "generator", "updates": ["g"], "every": 2, "batch": "none",
         "optimizer": optimizer(1e-2), "inputs": inputs(&[json!({"draw": 0})]),
         "draws": noise, "outputs": [{"gradient": "g.a"}, {"gradient": "g.c"}, {"scalar": "generator_loss"}],
         "loss": "generator_loss"},
    ]);
    let mut manifest = manifest(0, &networks, &phases);
    manifest["sample"] = json!({
        "graph": "sample", "count": 20, "classes": 0,
        "inputs": [{"parameter": "g.a"}, {"parameter": "g.c"}, {"draw": 0}],
        "draws": [{"kind": "normal", "shape": [20, 4]}], "output": [20, 1, 28, 28],
    });
    Source {
        manifest,
        weights: vec![
            ("d.v", vec![PIXELS], numbers(PIXELS, 0.01)),
            ("g.a", vec![PIXELS, 4], numbers(PIXELS * 4, 0.3)),
            ("g.c", vec![PIXELS], numbers(PIXELS, 0.1)),
        ],
        graphs: vec![("discriminator", 1), ("generator", 2), ("sample", 3)],
    }
}

/// One network of a weight, that a phase trains on parts of the samples.
fn of_rows(data: Value, parts: &[Value], size: usize, graph: u32) -> Source {
    let networks = json!([{
        "name": "net", "parameters": [{"name": "w", "shape": [size]}], "buffers": [], "average": null,
    }]);
    let inputs = parts.iter().map(|part| json!({"batch": part}));
    let inputs: Vec<Value> = std::iter::once(json!({"parameter": "net.w"})).chain(inputs).collect();
    let phases = json!([{
        "name": "training", "graph": "training", "updates": ["net"], "every": 1, "batch": "next",
        "optimizer": optimizer(1e-2), "inputs": inputs, "draws": [],
        "outputs": [{"gradient": "net.w"}, {"scalar": "loss"}], "loss": "loss",
    }]);
    let mut manifest = manifest(0, &networks, &phases);
    manifest["data"] = data;
    Source {
        manifest,
        weights: vec![("net.w", vec![size], numbers(size, 0.1))],
        graphs: vec![("training", graph)],
    }
}

/// Guesses the next byte of a text by the one before.
pub fn bigrams() -> Source {
    of_rows(json!({"tokens": {"context": 16, "vocabulary": 256}}), &[json!("tokens")], 256, 5)
}

/// Linear regression of arrays: `x` (3) of float32, `y` of int64 and `wide` (2) of float64.
pub fn regression() -> Source {
    let arrays = json!({"arrays": [
        {"name": "x", "kind": "float32", "shape": [3]},
        {"name": "y", "kind": "int64", "shape": []},
        {"name": "wide", "kind": "float64", "shape": [2]},
    ]});
    let parts = ["x", "y", "wide"].map(|name| json!({"array": name}));
    of_rows(arrays, &parts, 3, 6)
}

/// An array as NumPy saves it, with little-endian numbers.
pub fn npy(kind: &str, shape: &str, numbers: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let length = u16::try_from(header.len()).expect("a short header").to_le_bytes();
    [b"\x93NUMPY\x01\x00", length.as_slice(), header.as_bytes(), numbers].concat()
}

impl Source {
    /// Compiles the graphs, and writes the package into a file.
    pub fn write(&self, path: &Path, fault: Fault) {
        let mut archive = ZipWriter::new(File::create(path).expect("a folder for the package"));
        let mut add = |name: &str, content: &[u8]| {
            let stored = FileOptions::default().compression_method(CompressionMethod::Stored);
            archive.start_file(format!("x/{name}"), stored).expect("room for the package");
            archive.write_all(content).expect("room for the package");
        };
        add("archive_format", b"pt2");
        for (name, number) in &self.graphs {
            add(&format!("data/aotinductor/{name}/graph.wrapper.so"), &compiled(*number, fault));
        }
        add("ganglion/manifest.json", self.manifest.to_string().as_bytes());
        let tensors: Vec<(&str, &[usize], Vec<u8>)> = self
            .weights
            .iter()
            .map(|(name, shape, values)| {
                (*name, &shape[..], values.iter().flat_map(|value| value.to_le_bytes()).collect())
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, bytes)| {
            (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("shapes are right"))
        });
        add("ganglion/weights.safetensors", &safetensors::serialize(views, None).expect("names are unique"));
        archive.finish().expect("room for the package");
    }
}

/// Library of a graph, compiled once.
fn compiled(graph: u32, fault: Fault) -> Vec<u8> {
    static KNOWN: Mutex<BTreeMap<(u32, u32), Vec<u8>>> = Mutex::new(BTreeMap::new());
    let fault = if matches!(graph, 0 | 1) { fault as u32 } else { 0 };
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.entry((graph, fault)).or_insert_with(|| compile(graph, fault)).clone()
}

fn compile(graph: u32, fault: u32) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let library: PathBuf = folder.path().join("graph.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/graph.c");
    let mut compile = Command::new("cc");
    compile.args(["-O2", "-shared", "-fPIC", "-Wall", "-Wno-unused-function", "-Werror"]);
    compile.args(["-D", &format!("GRAPH={graph}"), "-D", &format!("FAULT={fault}")]);
    let compiled = compile.arg("-o").arg(&library).arg(source).arg("-lm").output().expect("a C compiler");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    std::fs::read(library).expect("a library")
}
