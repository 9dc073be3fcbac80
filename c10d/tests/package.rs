//! Compiled graphs: loaded from a library, run on tensors of the caller's, failing without a crash.
#![allow(clippy::unwrap_used)] // a test may panic

use std::path::PathBuf;
use std::process::Command;

use c10d::Error;
use c10d::package::Graph;
use tch::{Device, Kind, Tensor};

/// A linear classifier (`tests/src/graph.c`), with a fault.
fn compile(folder: &tempfile::TempDir, fault: u32) -> PathBuf {
    let library = folder.path().join(format!("{fault}.so"));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/src/graph.c");
    let mut compile = Command::new("cc");
    compile
        .args(["-O1", "-shared", "-fPIC", "-Wall", "-D", "GRAPH=0"])
        .args(["-D", &format!("FAULT={fault}")]);
    let compiled = compile.arg("-o").arg(&library).arg(source).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    library
}

fn inputs() -> Vec<Tensor> {
    let float = (Kind::Float, Device::Cpu);
    let ramp = |count: i64| Tensor::arange(count, float) / count as f64;
    vec![
        ramp(7840).view([10, 784]).set_requires_grad(true),
        ramp(10),
        Tensor::zeros([784], float),
        ramp(4 * 784).view([4, 1, 28, 28]),
        Tensor::from_slice(&[3i64, 1, 4, 1]),
        Tensor::ones([4, 784], float),
        Tensor::from(7.0f32),
    ]
}

#[test]
fn a_graph_runs_on_the_callers_tensors_and_its_file_may_go() {
    let folder = tempfile::tempdir().unwrap();
    let graph = Graph::load(&compile(&folder, 0), Device::Cpu).unwrap();
    drop(folder);
    let inputs = inputs();
    let [first, second] = [0, 1].map(|_| graph.run(&inputs).unwrap());
    let shapes: Vec<Vec<i64>> = first.iter().map(Tensor::size).collect();
    assert_eq!(shapes, [vec![10, 784], vec![10], vec![784], vec![], vec![]]);
    for (first, second) in first.iter().zip(&second) {
        assert!(first.equal(second) && !first.requires_grad());
    }
    // Half the squared error, by autograd.
    let images = inputs[3].view([4, 784]);
    let error = images.matmul(&inputs[0].tr()) + &inputs[1] - inputs[4].one_hot(10);
    let loss = error.square().sum(Kind::Float) / 2.0;
    let gradient = Tensor::run_backward(&[&loss], &[&inputs[0]], false, false);
    assert!(gradient[0].allclose(&first[0], 1e-4, 1e-4, false));
    assert!(loss.detach().allclose(&first[3], 1e-5, 0.0, false));
}

#[test]
fn threads_take_turns() {
    let folder = tempfile::tempdir().unwrap();
    let graph = Graph::load(&compile(&folder, 0), Device::Cpu).unwrap();
    let losses: Vec<f64> = std::thread::scope(|scope| {
        let run = || graph.run(&inputs()).unwrap()[3].double_value(&[]);
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(losses.iter().all(|loss| *loss == losses[0]), "{losses:?}");
}

#[test]
fn what_cannot_be_loaded_or_fails_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let graph = Graph::load(&compile(&folder, 1), Device::Cpu).unwrap();
    let failed = graph.run(&inputs()).unwrap_err();
    assert_eq!(failed, Error::Fatal("the compiled graph failed; standard error has its reason".into()));
    let text = folder.path().join("text.so");
    std::fs::write(&text, "no library").unwrap();
    for path in [text, folder.path().join("absent.so")] {
        let refused = Graph::load(&path, Device::Cpu).unwrap_err();
        assert!(matches!(&refused, Error::Fatal(what) if what.contains("dlopen")), "{refused}");
    }
    // A library, and none of a graph.
    let other = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/libm.so.6"];
    if let Some(path) = other.iter().find(|path| std::path::Path::new(path).exists()) {
        assert!(matches!(Graph::load(path.as_ref(), Device::Cpu), Err(Error::Fatal(_))));
    }
    assert!(matches!(Graph::load("x.so".as_ref(), Device::Mps), Err(Error::Invalid(_))));
}
