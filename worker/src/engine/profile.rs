//! Profile of a step. Always measured: it costs a reading of the clock for each part of a phase. A trace
//! shows the same laps.

use std::time::Duration;

use ganglion_proto::message::Profile;
use ganglion_proto::trace::{Track, now};
use serde::Serialize;

/// Part of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Waiting for samples.
    Data,
    /// Forward and backward passes, and the sum of the shard gradients.
    Compute,
    /// Waiting for other ranks.
    Wait,
    /// Checking and applying the reduced gradient.
    Commit,
    /// Everything else.
    Other,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Data => "data",
            Part::Compute => "compute",
            Part::Wait => "wait",
            Part::Commit => "commit",
            Part::Other => "other",
        }
    }
}

/// A stopwatch whose laps are the parts of phases.
pub struct Laps {
    last: Duration,
    /// Index of the current phase's name among `spent`.
    current: usize,
    /// Time spent on the phases of each name.
    spent: Vec<(String, [Duration; 5])>,
    track: Track,
    place: Place,
    /// Step whose slice is open on the track.
    step: Option<u64>,
}

/// Arguments of a step in a trace.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Place {
    /// Number of the generation.
    pub generation: u64,
    /// Rank of the worker in it.
    pub rank: u32,
}

/// Arguments of a phase in a trace.
#[derive(Serialize)]
struct At {
    position: u64,
}

/// Arguments of a part in a trace.
#[derive(Serialize)]
struct Of {
    #[serde(skip_serializing_if = "Option::is_none")]
    shard: Option<u32>,
}

impl Laps {
    /// Starts the stopwatch, for phases of these names.
    pub fn start(track: Track, place: Place, names: &[&str]) -> Laps {
        let spent = names.iter().map(|name| ((*name).to_string(), Default::default())).collect();
        Laps { last: now(), current: 0, spent, track, place, step: None }
    }

    /// Begins a phase of this name, at an update index. Steps count from 1. The time since the last lap belongs
    /// to the phase before.
    pub fn begin(&mut self, name: &str, step: u64, position: u64) {
        self.lap(Part::Other);
        let known = self.spent.iter().position(|(known, _)| known == name);
        self.current = known.expect("the stopwatch knows all phases");
        if !self.track.is_on() {
            return;
        }
        if self.step.is_some() {
            self.track.end(self.last);
        }
        if self.step != Some(step) {
            if self.step.replace(step).is_some() {
                self.track.end(self.last);
            }
            self.track.begin(self.last, &format!("step {step}"), self.place);
        }
        self.track.begin(self.last, name, At { position });
    }

    /// Books the time since the last lap to a part, and returns it.
    pub fn lap(&mut self, part: Part) -> Duration {
        self.pass(part, None)
    }

    /// Books the time of a shard gradient (`leaf`), with its addition to the sum; returns the time since
    /// the last lap.
    pub fn leaf(&mut self, shard: u32) -> Duration {
        self.pass(Part::Compute, Some(shard))
    }

    fn pass(&mut self, part: Part, shard: Option<u32>) -> Duration {
        let (last, now) = (self.last, now());
        let took = now.saturating_sub(last);
        self.spent[self.current].1[part as usize] += took;
        self.last = now;
        // Time before the first phase belongs to none.
        if self.step.is_some() {
            self.track.slice(last, now, part.name(), Of { shard });
        }
        took
    }

    /// Ends the current phase; none follows for now.
    pub fn rest(&mut self) {
        self.lap(Part::Other);
        if self.step.take().is_some() {
            self.track.end(self.last);
            self.track.end(self.last);
        }
    }

    /// Returns the mean profile of `steps` steps by the names of phases, and resets it.
    pub fn take(&mut self, steps: u64) -> impl Iterator<Item = (String, Profile)> {
        self.lap(Part::Other);
        #[allow(clippy::cast_precision_loss)] // a count of steps
        let steps = steps.max(1) as f64;
        self.spent.iter_mut().map(move |(name, spent)| {
            let spent = std::mem::take(spent);
            let mean = |part: Part| 1e3 * spent[part as usize].as_secs_f64() / steps;
            let profile = Profile {
                data: mean(Part::Data),
                compute: mean(Part::Compute),
                wait: mean(Part::Wait),
                commit: mean(Part::Commit),
                other: mean(Part::Other),
            };
            (name.clone(), profile)
        })
    }
}

impl Drop for Laps {
    fn drop(&mut self) {
        self.rest();
    }
}

#[cfg(test)]
mod tests {
    use ganglion_proto::trace::Trace;

    use super::*;

    #[test]
    fn all_time_belongs_to_one_part_of_phases_of_one_name() {
        let track = Trace::off().track(1, "training");
        let place = Place { generation: 1, rank: 0 };
        let mut laps = Laps::start(track, place, &["discriminator", "generator"]);
        let begun = laps.last;
        for (position, name) in (0..).zip(["discriminator", "discriminator", "generator"]) {
            laps.begin(name, 1, position);
            for part in [Part::Data, Part::Compute, Part::Wait, Part::Commit] {
                laps.lap(part);
            }
        }
        let profiles: Vec<_> = laps.take(2).collect();
        let [(one, first), (other, second)] = profiles.as_slice() else { panic!("two names: {profiles:?}") };
        assert_eq!([one, other], ["discriminator", "generator"]);
        let total = |p: &Profile| p.data + p.compute + p.wait + p.commit + p.other;
        let elapsed = 1e3 * (laps.last - begun).as_secs_f64() / 2.0;
        assert!((total(first) + total(second) - elapsed).abs() < 1e-9);
        assert!(first.data > 0.0 && first.other > 0.0);
        assert!(laps.take(1).all(|(_, again)| again.compute == 0.0), "what was taken is forgotten");
    }
}
