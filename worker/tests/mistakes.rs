//! Six mistakes that a first GAN makes, each of which would still let the program run.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::sync::Arc;

use common::{Bench, bits, job};
use ganglion_proto::job::{LossKind, ModelKind, Precision};
use ganglion_storage::Storage;
use ganglion_worker::checkpoint::Snapshot;
use ganglion_worker::data::{DataSet, Plan, Prefetcher};
use ganglion_worker::nn::Pass;
use ganglion_worker::nn::tensor_bytes::to_bytes;
use ganglion_worker::objective::gan::loss;
use ganglion_worker::objective::gan::{DISCRIMINATOR, GENERATOR, Input, Point, phases};
use ganglion_worker::objective::{Phase, ShardAt, ShardGrad};
use ganglion_worker::random::{Draws, Key, Purpose};
use safetensors::SafeTensors;
use tch::{Device, Kind, Tensor, no_grad};

const EVERY_ARITHMETIC: [(ModelKind, Precision); 5] = [
    (ModelKind::Mlp28, Precision::Fp32),
    (ModelKind::Mlp28, Precision::Bf16),
    (ModelKind::Dcgan28, Precision::Fp32),
    (ModelKind::Dcgan28, Precision::Bf16),
    (ModelKind::Dcgan64, Precision::Fp32),
];

const KINDS: [LossKind; 5] = [
    LossKind::NonSaturating,
    LossKind::Minimax,
    LossKind::LeastSquares,
    LossKind::Hinge,
    LossKind::WassersteinGp,
];

/// 1. A discriminator that ends in as many outputs as an image has pixels.
#[test]
fn a_discriminator_gives_one_logit_an_image() {
    for kind in [ModelKind::Mlp28, ModelKind::Dcgan28, ModelKind::Dcgan64] {
        let bench = Bench::new(job(kind, LossKind::NonSaturating));
        let frozen = bench.state.frozen(DISCRIMINATOR);
        let key = Key { seed: 1, step: 0, phase: 0, shard: 0, purpose: Purpose::Network };
        let mut pass = Pass::batch(frozen, bench.state.buffers(DISCRIMINATOR), key);
        let logits = bench.models.discriminator.forward(bench.real().images(), &mut pass);
        assert_eq!(logits.size(), [3, 1], "{kind}");
    }
}

/// 2. A loss that takes logits for probabilities: it has no value outside of [0, 1].
#[test]
fn the_loss_takes_any_logit_and_is_the_cross_entropy_of_its_sigmoid() {
    let (real, fake) = (Tensor::from_slice(&[2.0f32, -0.5]), Tensor::from_slice(&[-1.0f32, 3.0]));
    let cross_entropy = -real.sigmoid().log().sum(Kind::Float) - fake.neg().sigmoid().log().sum(Kind::Float);
    let found = loss::discriminator(LossKind::NonSaturating, &real, &fake);
    assert!((found - cross_entropy).abs().double_value(&[]) < 1e-5);
    for far in [-300.0f32, 300.0] {
        let logit = Tensor::from_slice(&[far]).set_requires_grad(true);
        for kind in KINDS {
            let sum = loss::discriminator(kind, &logit, &logit) + loss::generator(kind, &logit);
            let gradients = Tensor::run_backward(&[&sum], &[&logit], false, false);
            let finite = sum.isfinite().int64_value(&[]) & gradients[0].isfinite().all().int64_value(&[]);
            assert_eq!(finite, 1, "{kind} at {far}: {sum:?} {:?}", gradients[0]);
        }
    }
}

/// 3. A generator that is trained on the labels of fakes: it learns to be detected.
#[test]
fn a_generator_learns_to_be_taken_for_real() {
    for kind in KINDS {
        let logits = Tensor::from_slice(&[-2.0f32, 0.0, 0.5]).set_requires_grad(true);
        let gradients = Tensor::run_backward(&[loss::generator(kind, &logits)], &[&logits], false, false);
        // Less loss with a greater logit, for every sample.
        assert!(gradients[0].max().double_value(&[]) < 0.0, "{kind}: {:?}", gradients[0]);
        // And the discriminator learns the opposite of fakes that it takes for real.
        let fake = Tensor::from_slice(&[0.5f32, 1.0, 2.0]).set_requires_grad(true);
        let of_d = loss::discriminator(kind, &Tensor::from_slice(&[0.0f32]), &fake);
        let gradients = Tensor::run_backward(&[of_d], &[&fake], false, false);
        assert!(gradients[0].min().double_value(&[]) > 0.0, "{kind}: {:?}", gradients[0]);
    }
}

/// 4. Nothing detached: each network's update leaks into the other's gradient.
#[test]
fn a_phase_computes_gradients_of_its_own_network_only() {
    for (model, loss) in [
        (ModelKind::Mlp28, LossKind::NonSaturating),
        (ModelKind::Dcgan28, LossKind::NonSaturating),
        (ModelKind::Mlp28, LossKind::WassersteinGp),
    ] {
        let bench = Bench::new(job(model, loss));
        let phases = phases(&bench.job);
        let (of_d, of_g) = (phases[0], phases[2]);
        let d_leaf = bench.leaf(of_d, 1);
        let untouched = |module| bench.state.trainable(module).iter().all(|p| !p.grad().defined());
        assert!(untouched(GENERATOR), "{model}: a discriminator phase reached the generator");
        let before = bits(&d_leaf.flat);
        let g_leaf = bench.leaf(of_g, 1);
        assert!(bits(&d_leaf.flat) == before, "{model}: the generator's phase reached the discriminator");
        for (leaf, phase) in [(&d_leaf, of_d), (&g_leaf, of_g)] {
            let gradient =
                leaf.flat.narrow(0, 0, i64::try_from(bench.model.gradient(phase).gradient().end).unwrap());
            assert!(gradient.abs().sum(Kind::Float).double_value(&[]) > 0.0, "{model}, {phase:?}");
        }
    }
}

/// A shard gradient is a function of its key and the state: computed again, after others, it has
/// the same bits.
#[test]
fn a_leaf_has_the_same_bits_whatever_was_computed_before() {
    for kind in [ModelKind::Mlp28, ModelKind::Dcgan28] {
        let bench = Bench::new(job(kind, LossKind::NonSaturating));
        for phase in phases(&bench.job) {
            let first = bits(&bench.leaf(phase, 2).flat);
            let other = bits(&bench.leaf(phase, 3).flat);
            assert!(first != other, "{kind}: two data shards with the same noise");
            assert!(bits(&bench.leaf(phase, 2).flat) == first, "{kind}, {phase:?}");
        }
    }
}

/// A generator's phase starts with the samples of the last discriminator phase. It does not matter
/// whether they were kept or drawn again, with or without their graph.
#[test]
fn samples_are_the_same_kept_or_drawn_again() {
    for (kind, precision) in EVERY_ARITHMETIC {
        let mut job = job(kind, LossKind::NonSaturating);
        job.job.precision = precision;
        let bench = Bench::new(job);
        let leaves = &bench.gan;
        let phases = phases(&bench.job);
        let draws = Draws::default();
        let spot =
            |phase| Point { at: ShardAt { phase, step: 0, shard: 1 }, state: &bench.state, draws: &draws };
        let leaf = |phase: Phase, input: Input<'_>| {
            let layout = bench.model.gradient(phase);
            let mut out = ShardGrad::new(layout, layout.len(), Device::Cpu);
            leaves.compute(spot(phase), input, &mut out).unwrap();
            bits(&out.flat)
        };
        let real = bench.real();
        let kept = leaves.draw(spot(phases[1]), Some(&real));
        let drawn = no_grad(|| leaves.draw(spot(phases[1]), Some(&real)));
        let with_kept = leaf(phases[1], Input::Samples(&real, None, &kept));
        assert!(with_kept == leaf(phases[1], Input::Samples(&real, None, &drawn)), "{kind}, {precision}");
        if leaves.tells_real_apart() {
            let ahead = leaves.real_part(spot(phases[1]), &real).unwrap();
            let with_ahead = leaf(phases[1], Input::Samples(&real, Some(ahead), &drawn));
            assert!(with_ahead == with_kept, "{kind}, {precision}: computed ahead");
        }
        let again = leaf(phases[2], Input::Fake(leaves.draw(spot(phases[2]), Some(&real)), Some(&real)));
        assert!(
            leaf(phases[2], Input::Fake(kept, Some(&real))) == again,
            "{kind}, {precision}: the generator's"
        );
    }
}

/// Passes in bf16 compute what passes in fp32 do, as exactly as bf16 can; the penalty is fp32 in both.
#[test]
fn bf16_stays_near_fp32() {
    for (kind, loss) in [
        (ModelKind::Mlp28, LossKind::NonSaturating),
        (ModelKind::Mlp28, LossKind::WassersteinGp),
        (ModelKind::Dcgan28, LossKind::NonSaturating),
    ] {
        let leaf = |precision, network| {
            let mut job = job(kind, loss);
            job.job.precision = precision;
            let bench = Bench::new(job);
            let phase = phases(&bench.job).into_iter().find(|phase| phase.updates.contains(network)).unwrap();
            bench.leaf(phase, 0).flat
        };
        for network in [DISCRIMINATOR, GENERATOR] {
            let [exact, rounded] =
                [Precision::Fp32, Precision::Bf16].map(|precision| leaf(precision, network));
            let relative = (&rounded - &exact).norm().double_value(&[]) / exact.norm().double_value(&[]);
            assert!(relative > 0.0, "{kind}, {loss}, {network:?}: bf16 rounds");
            // Eight bits, and batch normalisation over three samples.
            assert!(relative < 0.1, "{kind}, {loss}, {network:?}: off by {relative}");
        }
    }
}

/// 5. A new iterator in every step: all steps see the first batch.
#[test]
fn each_step_sees_other_samples_until_the_epoch_is_over() {
    let job = job(ModelKind::Mlp28, LossKind::NonSaturating);
    let data = Arc::new(DataSet::open(&job.data).unwrap());
    let plan = Plan {
        seed: job.job.seed,
        data_shards: 4,
        shard_batch: 25,
        phases: 1,
        shards: 0..4,
        first_step: 0,
        first_phase: 0,
        end_step: 200,
        depth: 2,
        changes: Vec::new(),
    };
    let numel = data.shape().image().unwrap().numel();
    let mut batches = Prefetcher::start(data, plan);
    let mut epochs = [Vec::new(), Vec::new()];
    for step in 0..200 {
        let batch = batches.next().unwrap();
        let bytes = |image: &[f32]| image.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let hashes =
            batch.values.pixels().chunks_exact(numel).map(|image| blake3::hash(&bytes(image)).to_hex());
        epochs[step / 100].extend(hashes);
        batches.recycle(batch);
    }
    assert!(epochs[0] != epochs[1], "each epoch has an order of its own");
    epochs.iter_mut().for_each(|epoch| epoch.sort());
    assert!(epochs[0] == epochs[1], "each epoch has the same 10,000 images");
}

/// 6. A checkpoint under an invalid name, so that nothing finds it again.
#[tokio::test]
async fn a_checkpoint_names_every_tensor_and_brings_the_state_back() {
    let bench = Bench::new(job(ModelKind::Mlp28, LossKind::NonSaturating));
    let storage = Storage::in_memory();
    let files = bench.files(&storage);
    let (flat, counters) = (to_bytes(&bench.state.flat).into(), bench.state.counters);
    let snapshot = Snapshot::whole((0, 0), flat, counters);
    let checkpoint = common::save(&files, &snapshot).await;
    let mut names = Vec::new();
    for file in checkpoint.state_files() {
        let bytes = common::content(&storage, &checkpoint, &file.file).await;
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        names.extend(tensors.names().into_iter().map(str::to_string));
    }
    for wanted in [
        "generator.0.weight",
        "discriminator.5.bias",
        "optimizer.generator.exp_avg.0.weight",
        "counters.position",
    ] {
        assert!(names.iter().any(|name| name == wanted), "{wanted} is not in {names:?}");
    }
    assert!(files.read(&checkpoint).await.unwrap() == snapshot);
}
