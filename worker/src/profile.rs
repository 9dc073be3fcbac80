//! Where the time of a step goes: always measured, since it costs a look at the clock for each part of a phase.

use std::time::{Duration, Instant};

use ganglion_proto::message::Profile;

use crate::state::Module;

/// A part of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Waiting for samples.
    Data,
    /// Forward and backward passes, and adding the leaves up.
    Compute,
    /// Waiting for other members.
    Wait,
    /// Judging and applying what was reduced.
    Commit,
    /// All else.
    Other,
}

/// A stopwatch whose laps are the parts of phases.
pub struct Laps {
    last: Instant,
    module: Module,
    spent: [[Duration; 5]; 2],
}

impl Laps {
    /// Starts.
    pub fn start() -> Laps {
        Laps { last: Instant::now(), module: Module::Discriminator, spent: Default::default() }
    }

    /// A phase of a module begins; what came since the one before belongs to that.
    pub fn begin(&mut self, module: Module) {
        self.lap(Part::Other);
        self.module = module;
    }

    /// A part was done.
    pub fn lap(&mut self, part: Part) {
        let now = Instant::now();
        self.spent[usize::from(self.module == Module::Generator)][part as usize] += now - self.last;
        self.last = now;
    }

    /// The profile of so many steps, which are then forgotten.
    pub fn take(&mut self, steps: u64) -> [Profile; 2] {
        self.lap(Part::Other);
        #[allow(clippy::cast_precision_loss)] // a count of steps
        let steps = steps.max(1) as f64;
        std::mem::take(&mut self.spent).map(|spent| {
            let mean = |part: Part| 1e3 * spent[part as usize].as_secs_f64() / steps;
            Profile {
                data: mean(Part::Data),
                compute: mean(Part::Compute),
                wait: mean(Part::Wait),
                commit: mean(Part::Commit),
                other: mean(Part::Other),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_time_belongs_to_one_part_of_one_module() {
        let mut laps = Laps::start();
        let begun = laps.last;
        for module in [Module::Discriminator, Module::Generator, Module::Discriminator] {
            laps.begin(module);
            for part in [Part::Data, Part::Compute, Part::Wait, Part::Commit] {
                laps.lap(part);
            }
        }
        let [discriminator, generator] = laps.take(2);
        let total = |p: Profile| p.data + p.compute + p.wait + p.commit + p.other;
        let elapsed = 1e3 * (laps.last - begun).as_secs_f64() / 2.0;
        assert!((total(discriminator) + total(generator) - elapsed).abs() < 1e-9);
        assert!(generator.data > 0.0 && generator.other > 0.0);
        let [again, _] = laps.take(1);
        assert!(again.compute == 0.0, "what was taken is forgotten");
    }
}
