//! Counter-based generator of every random draw.
//!
//! A draw depends on its [`Key`] alone: not on earlier draws, nor on the worker, thread or device that
//! asks. libtorch's global generators are never used. ChaCha8 is counter-based, so a key costs one hash and
//! no warm-up.

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal, Uniform};
use tch::Tensor;

/// Purpose of a draw. The numbers are part of every run's result: never change or reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

/// Key of a draw: its place in the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

    /// Returns `count` draws of N(0, 1), as a flat tensor of f32 on the CPU.
    pub fn normal(&self, count: usize) -> Tensor {
        let mut generator = self.generator();
        let values: Vec<f32> = (0..count).map(|_| StandardNormal.sample(&mut generator)).collect();
        Tensor::from_slice(&values)
    }

    /// Returns `count` draws of U[low, high), as a flat tensor of f32 on the CPU.
    pub fn uniform(&self, low: f32, high: f32, count: usize) -> Tensor {
        let mut generator = self.generator();
        let range = Uniform::new(low, high).expect("bounds come in order and are finite");
        let values: Vec<f32> = (0..count).map(|_| range.sample(&mut generator)).collect();
        Tensor::from_slice(&values)
    }

    /// Returns `count` draws from 0 to `below` - 1.
    pub fn indices(&self, below: u32, count: usize) -> Vec<u32> {
        let mut generator = self.generator();
        let range = Uniform::new(0, below).expect("there is something to choose from");
        (0..count).map(|_| range.sample(&mut generator)).collect()
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

    const PINNED: [u32; 4] = [0xbf2e_b571, 0xbeaa_a143, 0xbf9a_5bb2, 0xbfa7_c763];
}
