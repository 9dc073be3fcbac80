//! What is compared, and what it should come to.

/// A job on so many workers, one data shard each.
pub struct Row {
    pub model: &'static str,
    pub width: u32,
    /// Images of one worker in one step.
    pub batch: u32,
    pub workers: u32,
    pub steps: u64,
    /// The first steps, which are not counted.
    pub warm_up: usize,
    /// How often each contender runs.
    pub rounds: usize,
    /// How many times as fast as the usual and the tuned program it should be.
    pub targets: Option<[f64; 2]>,
}

impl Row {
    pub fn name(&self) -> String {
        let plural = if self.workers == 1 { "" } else { "s" };
        format!("{}, {} worker{plural}", self.model, self.workers)
    }
}

const MLP: Row = Row {
    model: "mlp-28",
    width: 256,
    batch: 64,
    workers: 1,
    steps: 400,
    warm_up: 50,
    rounds: 3,
    targets: Some([1.6, 1.25]),
};
const DCGAN_28: Row = Row {
    model: "dcgan-28",
    width: 64,
    batch: 64,
    workers: 1,
    steps: 12,
    warm_up: 2,
    rounds: 2,
    targets: None,
};
const DCGAN_64: Row = Row { model: "dcgan-64", steps: 6, warm_up: 1, ..DCGAN_28 };

/// All rows. Four workers share the cores of a machine with fewer.
pub const ROWS: &[Row] = &[
    MLP,
    Row { workers: 2, targets: Some([2.2, 1.5]), ..MLP },
    Row { workers: 4, targets: None, rounds: 2, ..MLP },
    DCGAN_28,
    Row { workers: 2, targets: Some([1.35, 1.1]), ..DCGAN_28 },
    Row { workers: 2, ..DCGAN_64 },
];
