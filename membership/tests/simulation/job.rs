//! What is trained: a job whose state after any number of commits is a pure function, and its pieces.

use ganglion_membership::{Limits, Position};
use std::time::Duration;

use crate::mix::mix;

/// Microseconds since the world began.
pub(crate) type Instant = u64;

/// What a worker holds: the committed phases in two halves, so that a state can be torn, and the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub position: Position,
    pub halves: [u64; 2],
    pub ledger: u64,
    /// Whether a flipped bit is in it. Nobody in the world looks at this but the invariants.
    pub tainted: bool,
}

impl State {
    /// The state that the seed gives.
    pub(crate) fn fresh(seed: u64) -> State {
        State { position: Position(0), halves: [mix(seed, 1), mix(seed, 2)], ledger: 0, tainted: false }
    }

    /// What members compare.
    pub(crate) fn fingerprint(&self) -> u64 {
        mix(mix(self.halves[0], self.halves[1]), self.ledger)
    }

    /// The digest that manifests carry.
    pub(crate) fn digest(&self) -> String {
        blake3::hash(&self.fingerprint().to_le_bytes()).to_hex().to_string()
    }

    /// Applies a reduced phase.
    pub(crate) fn commit(&mut self, sum: u64, samples: u64) {
        self.halves = [mix(self.halves[0], sum), mix(self.halves[1], sum.rotate_left(7))];
        self.ledger = self.ledger.wrapping_add(samples);
        self.position.0 += 1;
    }
}

/// What one data shard gives to the phase after a state. It depends on the state, as a gradient does.
pub(crate) fn leaf(state: &State, shard: u32) -> u64 {
    mix(mix(state.position.0, u64::from(shard)), state.fingerprint())
}

/// The ledger's share of one data shard in one phase.
pub(crate) fn samples(position: Position, shard: u32) -> u64 {
    mix(position.0 ^ 0x5a5a, u64::from(shard))
}

/// One training.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub shards: u32,
    pub phases: u64,
    pub steps: u64,
    /// A checkpoint is due each time so many steps are done.
    pub every: u64,
    /// K, the files of a checkpoint.
    pub parts: u32,
    /// The states of an undisturbed run, by position.
    pub lineage: Vec<State>,
}

impl Job {
    /// Adds the states of an undisturbed run.
    pub(crate) fn with_lineage(self, seed: u64) -> Job {
        let mut state = State::fresh(seed);
        let mut lineage = vec![state];
        let shards = self.shards;
        for _ in 0..self.phases * self.steps {
            let sum = (0..shards).fold(0u64, |sum, shard| sum.wrapping_add(leaf(&state, shard)));
            let read = (0..shards).fold(0u64, |sum, v| sum.wrapping_add(samples(state.position, v)));
            state.commit(sum, read);
            lineage.push(state);
        }
        Job { lineage, ..self }
    }

    pub(crate) fn end(&self) -> Position {
        Position(self.phases * self.steps)
    }

    /// What the state of a position must be.
    pub(crate) fn expected(&self, position: Position) -> Option<&State> {
        self.lineage.get(usize::try_from(position.0).ok()?)
    }

    /// Whether a checkpoint is due at a position.
    pub(crate) fn is_due(&self, position: Position) -> bool {
        position.0 > 0 && (position == self.end() || position.0.is_multiple_of(self.phases * self.every))
    }
}

/// The limits of a run in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waits {
    pub heartbeat: u64,
    pub attempt: u64,
    pub meet: u64,
    pub reduce: u64,
}

impl Waits {
    pub(crate) fn of(limits: &Limits) -> Waits {
        Waits {
            heartbeat: micros(limits.heartbeat),
            attempt: micros(limits.attempt),
            meet: micros(limits.meet),
            reduce: micros(limits.reduce),
        }
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).expect("a simulation is short")
}
