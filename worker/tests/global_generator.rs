//! libtorch's global generator never moves. A test program of its own: the generator is the process's.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use c10d::aten::default_generator_state;
use common::{Bench, job};
use ganglion_proto::job::{LossKind, ModelKind};
use ganglion_worker::checkpoint::Snapshot;
use ganglion_worker::engine::commit::commit;
use ganglion_worker::nn::tensor_bytes::to_bytes;
use ganglion_worker::objective::Objective;
use ganglion_worker::sampling::grid_of;

#[test]
fn training_and_sampling_never_draw_from_libtorch() {
    let before = default_generator_state().unwrap();
    let jobs = [
        job(ModelKind::Mlp28, LossKind::NonSaturating),
        job(ModelKind::Mlp28, LossKind::WassersteinGp),
        job(ModelKind::Dcgan28, LossKind::Hinge),
        job(ModelKind::Dcgan64, LossKind::LeastSquares),
    ];
    for job in jobs {
        let mut bench = Bench::new(job);
        for phase in bench.gan.phases() {
            let leaf = bench.leaf(phase, 0);
            commit(&bench.model, &mut bench.state, phase, &leaf.flat, 0).unwrap();
        }
        let (flat, counters) = (to_bytes(&bench.state.flat).into(), bench.state.counters);
        let snapshot = Snapshot::whole((1, 0), flat, counters);
        grid_of(&*bench.gan, &bench.model.layout, &snapshot, 7, 4).unwrap();
        assert!(default_generator_state().unwrap() == before, "{:?}", bench.job.model.kind);
    }
    // The check can fail: a draw does move it.
    let _ = tch::Tensor::rand([1], (tch::Kind::Float, tch::Device::Cpu));
    assert!(default_generator_state().unwrap() != before);
}
