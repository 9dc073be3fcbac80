//! Tests of the network: its gradient, its order in time, its cache.

use std::sync::Arc;

use ganglion_proto::job::{Activation, Model, ModelKind, Positions, TransformerSettings as Settings};
use tch::{Device, Kind, Tensor, no_grad};

use super::choice::{Choice, PLAIN};
use super::dropout::Dropout;
use super::gradient::Tokens;
use super::network::{Constants, Parts, Sizes};
use super::pass::{Cache, Network};
use super::pixels::Pixels;
use super::writer::{self, Writer};
use super::{Source, Transformer};
use crate::data::ImageShape;
use crate::nn::Init;
use crate::objective::test_job::{check_draws_ahead, small_job};
use crate::objective::{Objective, ShardBatch};
use crate::random::{Key, Purpose};
use crate::state::initial_values;

const KEY: Key = Key { seed: 3, step: 1, phase: 0, shard: 2, purpose: Purpose::Network };

/// Every form of the network. Contexts are longer than a group of queries, and no multiple of it.
fn forms() -> Vec<Sizes> {
    let plain = Sizes {
        vocabulary: 11,
        inputs: 13,
        context: 70,
        layers: 2,
        heads: 2,
        width: 8,
        positions: Positions::Learned,
        activation: Activation::Gelu,
    };
    let rotary = Sizes { positions: Positions::Rotary, inputs: 11, ..plain.clone() };
    let swiglu = Sizes { activation: Activation::Swiglu, ..plain.clone() };
    vec![plain, rotary, swiglu]
}

fn weights(sizes: &Sizes, kind: Kind) -> Vec<Tensor> {
    let specs = sizes.parameters();
    let draw = |(shard, spec): (u32, &crate::nn::TensorSpec)| {
        let key = Key { shard, purpose: Purpose::Weights, ..KEY };
        let values = initial_values(key, spec).view(spec.shape.as_slice()).to_kind(kind);
        // Larger than at the start, so that attention prefers some tokens to others.
        if matches!(spec.init, Init::Normal { .. }) { values * 20.0 } else { values }
    };
    (0..).zip(&specs).map(draw).collect()
}

fn tokens(sizes: &Sizes, samples: i64, count: i64) -> [Tensor; 2] {
    let all = samples * (count + 1);
    let drawn = KEY.indices(u32::try_from(sizes.vocabulary).unwrap(), usize::try_from(all).unwrap());
    let drawn: Vec<i64> = drawn.into_iter().map(i64::from).collect();
    let rows = Tensor::from_slice(&drawn).view([samples, count + 1]);
    [rows.narrow(1, 0, count).contiguous(), rows.narrow(1, 1, count).contiguous()]
}

/// Runs `check` with a network of these sizes and weights.
fn with<T>(sizes: &Sizes, weights: &[Tensor], check: impl FnOnce(&Network<'_>) -> T) -> T {
    // Of the kind of what stays exact, as activations are.
    let kind = weights.last().expect("the last normalisation").kind();
    let constants = Constants::new(sizes, (kind, Device::Cpu));
    let network = Network { sizes, constants: &constants, weights: Parts::new(sizes, weights) };
    no_grad(|| check(&network))
}

fn gradient(sizes: &Sizes, weights: &[Tensor], tokens: &[Tensor; 2], dropout: f64) -> (f64, Vec<Tensor>) {
    // Never zeros: an objective writes every tensor.
    let places: Vec<Tensor> = weights
        .iter()
        .map(|weight| {
            weight.full_like(7.0).to_kind(if weight.kind() == Kind::Double {
                Kind::Double
            } else {
                Kind::Float
            })
        })
        .collect();
    let kind = places.last().expect("the last normalisation").kind();
    let factors = || Dropout::draw(KEY, dropout, sizes, tokens[0].size()[0]);
    let dropout = (dropout > 0.0)
        .then(|| Dropout::new(factors().into_iter().map(|factors| factors.to_kind(kind)).collect()));
    let tokens = Tokens { inputs: &tokens[0], targets: &tokens[1] };
    let loss = with(sizes, weights, |network| {
        network.gradient(&tokens, dropout, &Parts::new(sizes, &places)).unwrap()
    });
    (loss.double_value(&[]), places)
}

/// In double precision, along a random direction of each tensor.
#[test]
fn gradients_are_those_of_finite_differences() {
    for sizes in forms() {
        let (weights, tokens) = (weights(&sizes, Kind::Double), tokens(&sizes, 2, sizes.context));
        for dropout in [0.0, 0.3] {
            let (_, gradients) = gradient(&sizes, &weights, &tokens, dropout);
            for (at, spec) in sizes.parameters().iter().enumerate() {
                let key = Key { shard: u32::try_from(at).unwrap(), purpose: Purpose::Probe, ..KEY };
                let direction = key.normal(spec.numel()).view(spec.shape.as_slice()).to_kind(Kind::Double);
                let loss_at = |step: f64| {
                    let mut moved: Vec<Tensor> = weights.iter().map(Tensor::copy).collect();
                    moved[at] = &weights[at] + &direction * step;
                    gradient(&sizes, &moved, &tokens, dropout).0
                };
                let step = 1e-6;
                let numeric = (loss_at(step) - loss_at(-step)) / (2.0 * step);
                let exact = (&gradients[at] * &direction).sum(Kind::Double).double_value(&[]);
                let within = 1e-7 * exact.abs().max(1.0);
                assert!((numeric - exact).abs() < within, "{sizes:?}, {}: {numeric}, {exact}", spec.name);
            }
        }
    }
}

/// Rounding of products in bf16 is a few thousandths.
#[test]
fn bf16_gradients_are_near_those_of_fp32() {
    for sizes in forms() {
        let (exact, tokens) = (weights(&sizes, Kind::Float), tokens(&sizes, 2, sizes.context));
        let specs = sizes.parameters();
        let cast = |(weight, spec): (&Tensor, &crate::nn::TensorSpec)| {
            if spec.exact { weight.shallow_clone() } else { weight.to_kind(Kind::BFloat16) }
        };
        let rounded: Vec<Tensor> = exact.iter().zip(&specs).map(cast).collect();
        let ((loss, gradients), (near, others)) =
            (gradient(&sizes, &exact, &tokens, 0.0), gradient(&sizes, &rounded, &tokens, 0.0));
        assert!((loss / near - 1.0).abs() < 0.02, "{loss}, {near}");
        for ((one, other), spec) in gradients.iter().zip(&others).zip(&specs) {
            let apart = (one - other).norm().double_value(&[]) / one.norm().double_value(&[]);
            assert!(apart < 0.1, "{}: {apart}", spec.name);
        }
    }
}

/// On busy threads as on a quiet one.
#[test]
fn gradients_have_the_same_bits_each_time() {
    for sizes in forms() {
        let once = || {
            tch::set_num_threads(1);
            let (weights, tokens) = (weights(&sizes, Kind::Float), tokens(&sizes, 3, sizes.context));
            let (loss, gradients) = gradient(&sizes, &weights, &tokens, 0.1);
            let hashed = |gradient: &Tensor| c10d::aten::fingerprint(gradient, 0).unwrap();
            (loss.to_bits(), gradients.iter().map(hashed).collect::<Vec<_>>())
        };
        let first = once();
        let others: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(once)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(others.iter().all(|other| *other == first), "{sizes:?}");
    }
}

#[test]
fn a_later_token_changes_no_earlier_logit() {
    for sizes in forms() {
        let (weights, [inputs, _]) = (weights(&sizes, Kind::Float), tokens(&sizes, 1, sizes.context));
        with(&sizes, &weights, |network| {
            let logits = |inputs: &Tensor| network.logits(&network.infer(inputs, None).unwrap()).unwrap();
            let before = logits(&inputs);
            for changed in [1, 63, 64, sizes.context - 1] {
                let other = inputs.copy();
                let token = (inputs.int64_value(&[0, changed]) + 1) % sizes.vocabulary;
                let _ = other.narrow(1, changed, 1).fill_(token);
                let after = logits(&other);
                let same = |rows: i64| before.narrow(0, 0, rows) == after.narrow(0, 0, rows);
                assert!(same(changed) && !same(changed + 1), "{sizes:?}, token {changed}");
            }
        });
    }
}

/// Beyond the context as well, where each prediction sees the tokens that its place says.
#[test]
fn tokens_are_written_as_without_a_cache() {
    for sizes in forms() {
        let sizes = Sizes { context: 12, ..sizes };
        let weights = weights(&sizes, Kind::Double);
        for choice in [PLAIN, Choice { temperature: 0.7, top_k: Some(4), top_p: 0.9 }] {
            let mut tokens = vec![vec![1], vec![2]];
            let streams = || (0..2).map(|shard| Key { shard, ..KEY }.stream()).collect::<Vec<_>>();
            let written: Vec<Vec<i64>> = with(&sizes, &weights, |network| {
                let network = Network { weights: Parts::new(&sizes, &weights), ..*network };
                let mut writer = Writer::new(network, tokens.clone(), streams(), choice);
                (0..40).map(|_| writer.write().unwrap()).collect()
            });
            let mut draws = streams();
            for new in written {
                for ((tokens, draws), token) in tokens.iter_mut().zip(&mut draws).zip(new) {
                    let seen =
                        Tensor::from_slice(&tokens[writer::dropped(&sizes, tokens.len())..]).unsqueeze(0);
                    let logits = with(&sizes, &weights, |network| {
                        network.logits(&network.infer(&seen, None).unwrap()).unwrap().get(-1)
                    });
                    let logits = Vec::<f32>::try_from(logits.to_kind(Kind::Float)).unwrap();
                    let draw = f64::from(draws.uniform(0.0, 1.0, 1)[0]);
                    assert_eq!(usize::try_from(token).unwrap(), choice.token(&logits, draw), "{sizes:?}");
                    tokens.push(token);
                }
            }
        }
        let dropped = [1, 12, 13, 18, 19, 24, 25].map(|count| writer::dropped(&sizes, count));
        assert_eq!(dropped, [0, 0, 6, 6, 12, 12, 18]);
    }
}

/// In double precision, token by token and in pieces.
#[test]
fn cached_logits_are_the_uncached_ones() {
    for sizes in forms() {
        let (weights, [inputs, _]) = (weights(&sizes, Kind::Double), tokens(&sizes, 3, sizes.context));
        with(&sizes, &weights, |network| {
            let logits = |inputs: &Tensor, cache: Option<&mut Cache>| {
                let x = network.infer(inputs, cache).unwrap();
                network.logits(&x).unwrap().view([3, -1, sizes.vocabulary])
            };
            let whole = logits(&inputs, None);
            for pieces in [vec![1; 70], vec![66, 1, 3], vec![2, 65, 3]] {
                let mut cache = Cache::new(&sizes, 3, network.weights.norm);
                for count in pieces {
                    let past = cache.past;
                    let piece = logits(&inputs.narrow(1, past, count), Some(&mut cache));
                    let apart = (piece - whole.narrow(1, past, count)).abs().max().double_value(&[]);
                    assert!(apart < 1e-10, "{sizes:?}, {past}: {apart}");
                }
            }
        });
    }
}

/// A transformer over images of 8 x 8 pixels with 11 levels, that drops some activations.
fn of_pixels(sizes: Sizes) -> Transformer {
    let (positions, activation) = (sizes.positions, sizes.activation);
    let settings = Settings { layers: 2, heads: 2, positions, activation, dropout: 0.3, levels: Some(11) };
    let job = small_job(Model { transformer: Some(settings), ..Model::plain(ModelKind::Transformer, 0, 8) });
    let shape = ImageShape { channels: 1, height: 8, width: 8 };
    let samples = Source::Pixels(Pixels::new(shape, 11, 0, Vec::new()));
    Transformer { job, sizes, samples, bits_of_a_nat: 1.0, device: Device::Cpu }
}

#[test]
fn draws_made_ahead_change_no_bit_and_are_used() {
    let transformer = of_pixels(Sizes { context: 64, inputs: 12, ..forms().swap_remove(2) });
    let images = KEY.uniform(-1.0, 1.0, 3 * 64).view([3, 1, 8, 8]);
    let objective: Arc<dyn Objective> = Arc::new(transformer);
    let counts = check_draws_ahead(&objective, &ShardBatch::of_images(images, None));
    assert_eq!(counts, [1 + 2 * 3], "of embeddings, and of two blocks");
}
