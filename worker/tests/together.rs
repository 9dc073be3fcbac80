//! Gradients of several data shards in one pass: they have the bits of the shards' own, added up as the tree
//! adds them, and only plain objectives give any.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use common::{Bench, bits, job};
use ganglion_proto::job::{AugmentationKind, Job, LossKind, ModelKind, Precision};
use ganglion_worker::engine::reduce::tree::{Node, TreeSum};
use ganglion_worker::objective::gan::DISCRIMINATOR;
use ganglion_worker::objective::{Compute, Phase, ShardAt, ShardBatch, ShardGrad, ShardsAt};
use ganglion_worker::random::{Key, Purpose};
use tch::{Device, Tensor};

const LOSSES: [LossKind; 4] =
    [LossKind::NonSaturating, LossKind::Minimax, LossKind::LeastSquares, LossKind::Hinge];

/// Real samples of each of so many shards.
fn samples(bench: &Bench, count: u32) -> Vec<Tensor> {
    let batch = bench.job.job.shard_batch;
    let key = |shard| Key { seed: 3, step: 0, phase: 0, shard, purpose: Purpose::Probe };
    let own = |shard| key(shard).uniform(-1.0, 1.0, batch as usize * 784);
    (0..count).map(|shard| own(shard).view([i64::from(batch), 1, 28, 28])).collect()
}

/// Gradient of a phase, one shard after the other or all at once.
fn gradient(
    bench: &Bench,
    compute: &mut dyn Compute,
    (phase, at_once): (Phase, bool),
    real: &[Tensor],
) -> Vec<u32> {
    let layout = bench.model.gradient(phase);
    let out = || ShardGrad::new(layout, layout.len(), Device::Cpu);
    let count = u32::try_from(real.len()).unwrap();
    let batch = |images: &[Tensor]| {
        let reads = phase.updates.contains(DISCRIMINATOR);
        reads.then(|| ShardBatch::of_images(Tensor::cat(images, 0), None))
    };
    if at_once {
        let mut sum = out();
        let at = ShardsAt { phase, step: 0, shards: 0..count };
        compute.gradients(&at, &bench.state, batch(real).as_ref(), &mut sum).unwrap();
        return bits(&sum.flat);
    }
    let mut tree = TreeSum::new(count);
    for shard in 0..count {
        let (at, mut own) = (ShardAt { phase, step: 0, shard }, out());
        let batch = batch(&real[shard as usize..=shard as usize]);
        compute.gradient(at, &bench.state, batch.as_ref(), &mut own).unwrap();
        tree.push(Node::leaf(shard), own);
    }
    bits(&tree.take()[0].1.flat)
}

#[test]
fn shards_at_once_have_the_bits_of_one_after_the_other() {
    for (loss, (shard_batch, count)) in
        LOSSES.into_iter().flat_map(|loss| [(1, 40), (3, 5), (8, 16), (20, 2)].map(|sizes| (loss, sizes)))
    {
        let mut job = job(ModelKind::Mlp28, loss);
        job.job.shard_batch = shard_batch;
        let bench = Bench::new(job);
        let real = samples(&bench, count);
        for kept in [false, true] {
            let [mut each, mut all] = [0; 2].map(|_| bench.model.objective.begin());
            assert!(all.most_together(bench.model.phases()[0]) >= count);
            for phase in bench.model.phases().iter().copied() {
                let computed =
                    |at_once, compute: &mut dyn Compute| gradient(&bench, compute, (phase, at_once), &real);
                let (wanted, found) = (computed(false, &mut *each), computed(true, &mut *all));
                assert!(found == wanted, "{loss}, {count} x {shard_batch}, {phase:?}, kept {kept}");
                if !kept {
                    // Without the samples that the phases before drew.
                    [each, all] = [0; 2].map(|_| bench.model.objective.begin());
                }
            }
        }
    }
}

#[test]
fn only_plain_objectives_take_shards_together() {
    let most = |change: &dyn Fn(&mut Job)| {
        let mut job = job(ModelKind::Mlp28, LossKind::NonSaturating);
        change(&mut job);
        let bench = Bench::new(job);
        bench.model.objective.begin().most_together(bench.model.phases()[0])
    };
    assert!(most(&|_| {}) > 1, "this test needs a processor with AVX2");
    assert_eq!(most(&|job| job.job.precision = Precision::Bf16), 1);
    assert_eq!(most(&|job| job.job.shard_batch = 129), 1, "as many rows as oneDNN takes");
    assert_eq!(most(&|job| job.model.width = 1400), 1, "as many weights as oneDNN takes");
    assert_eq!(most(&|job| job.model.kind = ModelKind::Dcgan28), 1, "samples see each other");
    assert_eq!(most(&|job| job.loss.kind = LossKind::WassersteinGp), 1);
    assert_eq!(most(&|job| job.loss.kind = LossKind::RelativisticPairing), 1);
    assert_eq!(most(&|job| job.loss.r1 = 1.0), 1);
    assert_eq!(most(&|job| job.loss.final_r2 = 1.0), 1);
    assert_eq!(most(&|job| job.augmentation.flip = true), 1);
    assert_eq!(most(&|job| job.augmentation.kinds = vec![AugmentationKind::Translation]), 1);
}
