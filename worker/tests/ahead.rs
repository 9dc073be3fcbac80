//! Draws that are made ahead, by the thread that reads samples: each is used, and has the bits of one that is
//! made when it is needed.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use common::{Bench, bits, job};
use ganglion_proto::job::{AugmentationKind, Job, LossKind, ModelKind};
use ganglion_worker::objective::gan::DISCRIMINATOR;
use ganglion_worker::objective::{ShardAt, ShardGrad};
use ganglion_worker::random::{Draws, Key};
use tch::{Device, Tensor, no_grad};

/// Jobs that draw, together, all that a GAN can.
fn jobs() -> Vec<Job> {
    let gan = |kind, loss| job(kind, loss);
    let mut classes = gan(ModelKind::Dcgan28, LossKind::Hinge);
    classes.model.conditional = true;
    classes.augmentation.flip = true;
    classes.augmentation.kinds = vec![AugmentationKind::Translation, AugmentationKind::Color];
    let mut pairs = classes.clone();
    pairs.loss.kind = LossKind::RelativisticPairing;
    let mut penalty = gan(ModelKind::Mlp28, LossKind::WassersteinGp);
    penalty.loss.gradient_penalty = 10.0;
    vec![gan(ModelKind::Mlp28, LossKind::NonSaturating), classes, pairs, penalty]
}

/// Gradients of all phases of a step, by a computation that is given draws made ahead, or none.
fn gradients(bench: &Bench, ahead: &dyn Fn(ShardAt) -> Vec<(Key, Vec<Tensor>)>) -> Vec<Vec<u32>> {
    let (real, mut compute) = (bench.real(), bench.model.objective.begin());
    let phases = bench.model.phases().iter().copied();
    let of_phase = phases.map(|phase| {
        let layout = bench.model.gradient(phase);
        let (at, mut out) =
            (ShardAt { phase, step: 0, shard: 1 }, ShardGrad::new(layout, layout.len(), Device::Cpu));
        compute.keep(Draws::of(ahead(at)));
        let reads = phase.updates.contains(DISCRIMINATOR) || bench.gan.pairs();
        compute.gradient(at, &bench.state, reads.then_some(&real), &mut out).unwrap();
        bits(&out.flat)
    });
    of_phase.collect()
}

#[test]
fn draws_made_ahead_change_no_bit_and_are_used() {
    for job in jobs() {
        let name = format!("{} {}", job.model.kind, job.loss.kind);
        let bench = Bench::new(job);
        let made = |at| bench.model.objective.draws(at);
        let wanted = gradients(&bench, &|_| Vec::new());
        assert!(gradients(&bench, &made) == wanted, "{name}");
        for phase in bench.model.phases().iter().copied() {
            let at = ShardAt { phase, step: 0, shard: 1 };
            for (key, _) in made(at) {
                // Others in their place show where they are used.
                let other = |at| {
                    let mut draws = made(at);
                    for (_, tensors) in draws.iter_mut().filter(|(own, _)| *own == key) {
                        tensors.iter_mut().for_each(|tensor| *tensor = no_grad(|| tensor.flip([0])));
                    }
                    draws
                };
                assert!(gradients(&bench, &other) != wanted, "{name}: nobody uses the draws of {key:?}");
            }
        }
    }
}
