//! Counter-based generator of every random draw.
//!
//! A draw depends on its [`Key`] alone: not on earlier draws, nor on the worker, thread or device that
//! asks. libtorch's global generators are never used. ChaCha8 is counter-based, so a key costs one hash and
//! no warm-up. So draws can be made ahead, by another thread: [`Draws`].

use std::collections::HashMap;

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal, Uniform};
use tch::{Device, Tensor};

/// Purpose of a draw. The numbers are part of every run's result: never change or reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// Initial weights; `phase` is the index of the network, `shard` that of the tensor.
    Weights = 1,
    /// Noise of generated images.
    Noise = 2,
    /// Points between real and generated images for the gradient penalty.
    Interpolation = 3,
    /// Noise of the sample grids; `step` is the sample's index.
    Samples = 4,
    /// Substitutes for real images while the environment's fingerprint (`passport`) is taken.
    Probe = 5,
    /// Classes of generated samples.
    Classes = 6,
    /// Augmentation of each sample.
    Augmentation = 7,
    /// A network's own draws; `phase` tells the passes of a shard gradient apart.
    Network = 9,
    /// Noise of evaluations; `step` is the sample's index.
    Evaluation = 10,
    /// Training of the digit classifier: `step` 0 for the weights (`shard` is the tensor's index), then the
    /// shifts of each batch.
    Classifier = 11,
    /// All draws of a package's graph, in the order of its manifest.
    Graph = 12,
    /// Noise of the latent vectors that a VAE is trained with.
    Posterior = 13,
    /// Binarisation of a VAE's images.
    Binarisation = 14,
}

/// Key of a draw: its place in the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Seed of the job.
    pub seed: u64,
    /// Number of steps done before.
    pub step: u64,
    /// Index of the phase within the step.
    pub phase: u32,
    /// Data shard.
    pub shard: u32,
    /// Purpose of the draw.
    pub purpose: Purpose,
}

impl Key {
    fn generator(&self) -> ChaCha8Rng {
        let mut hasher = blake3::Hasher::new_derive_key("ganglion 2026 keyed draws");
        hasher.update(&self.seed.to_le_bytes());
        hasher.update(&self.step.to_le_bytes());
        hasher.update(&self.phase.to_le_bytes());
        hasher.update(&self.shard.to_le_bytes());
        hasher.update(&[self.purpose as u8]);
        ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
    }

    /// Returns a number to seed another generator with.
    pub fn number(&self) -> u64 {
        self.generator().next_u64()
    }

    /// Returns all draws of this key, one after the other.
    pub(crate) fn stream(&self) -> Stream {
        Stream(self.generator())
    }

    /// Returns `count` draws of N(0, 1), as a flat tensor of f32 on the CPU.
    pub fn normal(&self, count: usize) -> Tensor {
        Tensor::from_slice(&self.stream().normal(count))
    }

    /// Returns `count` draws of U[low, high), as a flat tensor of f32 on the CPU.
    pub fn uniform(&self, low: f32, high: f32, count: usize) -> Tensor {
        Tensor::from_slice(&self.stream().uniform(low, high, count))
    }

    /// Returns `count` draws from 0 to `below` - 1.
    pub fn indices(&self, below: u32, count: usize) -> Vec<u32> {
        let mut generator = self.generator();
        let range = Uniform::new(0, below).expect("there is something to choose from");
        (0..count).map(|_| range.sample(&mut generator)).collect()
    }
}

/// Draws that were made before they are needed, by their keys. To find them here saves time, and changes no
/// bit: of each key there is one use in a job, which draws the same now.
#[derive(Debug, Default)]
pub struct Draws(HashMap<Key, Vec<Tensor>>);

impl Draws {
    /// Draws of these keys.
    pub fn of(made: impl IntoIterator<Item = (Key, Vec<Tensor>)>) -> Draws {
        Draws(made.into_iter().collect())
    }

    /// Returns the draws of a key on a device: those that were made, or else what `make` makes on the CPU.
    /// The same bits on all devices (D2).
    pub(crate) fn all(&self, key: Key, device: Device, make: impl FnOnce() -> Vec<Tensor>) -> Vec<Tensor> {
        let there = |tensor: &Tensor| tensor.to_device(device);
        self.0
            .get(&key)
            .map_or_else(|| make().iter().map(there).collect(), |made| made.iter().map(there).collect())
    }

    /// The same of a key with one tensor.
    pub(crate) fn get(&self, key: Key, device: Device, make: impl FnOnce() -> Tensor) -> Tensor {
        self.all(key, device, || vec![make()]).swap_remove(0)
    }

    /// All tensors, to be replaced by the same on another device.
    pub(crate) fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.0.values_mut().flatten()
    }

    /// Adds newer draws, and forgets those of steps before the last one.
    pub(crate) fn add(&mut self, newer: Draws) {
        // Those of the step under way are in use while the next one's come.
        if let Some(step) = newer.0.keys().map(|key| key.step).max() {
            self.0.retain(|key, _| key.step + 1 >= step);
        }
        self.0.extend(newer.0);
    }
}

/// Draws of one key in their order: each kind takes up where the one before ended.
pub(crate) struct Stream(ChaCha8Rng);

/// Bytes that are drawn at once.
const BLOCK: usize = 4096;

impl Stream {
    /// Returns `count` draws of N(0, 1).
    pub(crate) fn normal(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| StandardNormal.sample(&mut self.0)).collect()
    }

    /// Returns `count` draws of U[low, high).
    pub(crate) fn uniform(&mut self, low: f32, high: f32, count: usize) -> Vec<f32> {
        let range = Uniform::new(low, high).expect("bounds come in order and are finite");
        (0..count).map(|_| range.sample(&mut self.0)).collect()
    }

    /// Returns `count` integers from `low` to `high` - 1.
    pub(crate) fn integers(&mut self, low: i64, high: i64, count: usize) -> Vec<i64> {
        let range = Uniform::new(low, high).expect("bounds come in order");
        (0..count).map(|_| range.sample(&mut self.0)).collect()
    }

    /// Returns `count` numbers that are 1 with probability `p`, and else 0.
    pub(crate) fn bernoulli(&mut self, p: f64, count: usize) -> Vec<f32> {
        // A probability in steps of 2^-32: compared with 32 bits each, many at once, as dropout takes millions.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // from 0 to 2^32
        let threshold = (p.clamp(0.0, 1.0) * 4_294_967_296.0).round() as u64;
        let mut values = Vec::with_capacity(count);
        let mut block = [0; BLOCK];
        while values.len() < count {
            let bytes = &mut block[..BLOCK.min(4 * (count - values.len()))];
            self.0.fill_bytes(bytes);
            let words = bytes
                .chunks_exact(4)
                .map(|word| u32::from_le_bytes(word.try_into().expect("chunks have 4 bytes")));
            values.extend(words.map(|word| if u64::from(word) < threshold { 1.0 } else { 0.0 }));
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(key: Key) -> Vec<f32> {
        Vec::try_from(key.normal(64)).unwrap()
    }

    const KEY: Key = Key { seed: 1, step: 2, phase: 3, shard: 4, purpose: Purpose::Noise };

    #[test]
    fn a_draw_depends_on_each_part_of_its_key_and_on_nothing_else() {
        let others = [
            Key { seed: 0, ..KEY },
            Key { step: 0, ..KEY },
            Key { phase: 0, ..KEY },
            Key { shard: 0, ..KEY },
            Key { purpose: Purpose::Samples, ..KEY },
        ];
        assert_eq!(values(KEY), values(KEY));
        for other in others {
            assert_ne!(values(KEY), values(other), "{other:?}");
        }
    }

    #[test]
    fn normal_draws_have_mean_0_and_deviation_1() {
        let draws = KEY.normal(100_000);
        let (mean, deviation) = (draws.mean(None).double_value(&[]), draws.std(true).double_value(&[]));
        assert!(mean.abs() < 0.02 && (deviation - 1.0).abs() < 0.02, "{mean} {deviation}");
    }

    #[test]
    fn draws_keep_their_values_across_versions() {
        // A change here changes the result of every job.
        let drawn: Vec<u32> = values(KEY)[..4].iter().map(|value| value.to_bits()).collect();
        assert_eq!(drawn, PINNED);
    }

    #[test]
    fn draws_of_a_stream_go_on_where_the_ones_before_ended() {
        let drawn = || {
            let mut stream = KEY.stream();
            let (normal, uniform) = (stream.normal(3), stream.uniform(-2.0, 3.0, 1000));
            let (integers, bernoulli) = (stream.integers(-5, 7, 1000), stream.bernoulli(0.3, 100_001));
            (normal, uniform, integers, bernoulli, stream.normal(2))
        };
        let (normal, uniform, integers, bernoulli, last) = drawn();
        assert_eq!(normal, values(KEY)[..3]);
        assert_ne!(last, values(KEY)[..2]);
        assert!(uniform.iter().all(|value| (-2.0..3.0).contains(value)));
        assert_eq!((integers.iter().min(), integers.iter().max()), (Some(&-5), Some(&6)));
        let ones = bernoulli.iter().filter(|value| **value == 1.0).count();
        assert!((29_500..30_500).contains(&ones), "{ones} of 100,001 with probability 0.3");
        assert_eq!(bernoulli.iter().filter(|value| **value == 0.0).count(), 100_001 - ones);
        assert_eq!(drawn(), (normal, uniform, integers, bernoulli, last));
        let mut stream = KEY.stream();
        assert_eq!(
            (stream.bernoulli(0.0, 5000), stream.bernoulli(1.0, 5000)),
            (vec![0.0; 5000], vec![1.0; 5000])
        );
    }

    /// As for normal draws: packages are trained by them.
    #[test]
    fn draws_of_a_stream_keep_their_values_across_versions() {
        let mut stream = Key { purpose: Purpose::Graph, ..KEY }.stream();
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let drawn = (bits(stream.normal(2)), bits(stream.uniform(0.0, 1.0, 2)), stream.integers(0, 1000, 3));
        let first = (vec![0x3f80_1aef, 0xbff6_ec0e], vec![0x3f0a_2852, 0x3f5e_1c3a], vec![530, 630, 163]);
        let [none, one] = [0.0f32, 1.0].map(f32::to_bits);
        let pinned = (first, vec![none, one, one, one, one, one, one, none]);
        assert_eq!((drawn, bits(stream.bernoulli(0.5, 8))), pinned);
    }

    #[test]
    fn draws_made_ahead_are_kept_for_their_step_and_the_next() {
        let key = |step| Key { step, ..KEY };
        let made = |step| Draws::of([(key(step), vec![Tensor::from(step as f32)])]);
        let mut draws = made(1);
        draws.add(made(2));
        let found = |draws: &Draws, step| {
            draws.get(key(step), Device::Cpu, || Tensor::from(-1.0f32)).double_value(&[])
        };
        assert_eq!([1, 2, 3].map(|step| found(&draws, step)), [1.0, 2.0, -1.0]);
        draws.add(made(3));
        draws.add(Draws::default());
        assert_eq!([1, 2, 3].map(|step| found(&draws, step)), [-1.0, 2.0, 3.0]);
    }

    const PINNED: [u32; 4] = [0xbf2e_b571, 0xbeaa_a143, 0xbf9a_5bb2, 0xbfa7_c763];
}
