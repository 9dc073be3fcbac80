//! The coordinator's part of a trace: events as they are recorded, the lifetime of each group, the curves.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use ganglion_proto::record::{MetricsRow, RunEvent};
use ganglion_proto::trace::{Nothing, Trace, Track, now};
use serde::Serialize;
use serde_json::{Map, Value};

use super::scalars::Shown;

/// Tracks of the coordinator in a trace. See the module documentation.
pub struct Timeline {
    trace: Trace,
    events: Track,
    groups: Track,
    storage: Track,
    /// Whether a span of a group is open: it trains, or regroups.
    is_open: bool,
}

#[derive(Serialize)]
struct Told {
    time: f64,
    #[serde(flatten)]
    keys: Map<String, Value>,
}

impl Timeline {
    /// Creates the tracks of a trace.
    pub fn new(trace: &Trace) -> Timeline {
        Timeline {
            events: trace.track(1, "events"),
            groups: trace.track(2, "groups"),
            storage: trace.track(3, "storage"),
            trace: trace.clone(),
            is_open: false,
        }
    }

    /// Path of the trace, for local workers; `None` without a trace.
    pub fn path(&self) -> Option<&Path> {
        self.trace.path()
    }

    /// Adds an event, recorded at `time`, and the change of the group that it implies.
    pub fn event(&mut self, time: f64, event: &RunEvent) {
        if !self.events.is_on() {
            return;
        }
        self.events.instant(event.kind().name(), Told { time, keys: event.keys() });
        match event {
            RunEvent::GenerationFormed { generation, world_size, .. }
            | RunEvent::GenerationKept { generation, world_size, .. } => {
                self.turn_to(Some(&format!("generation {generation}, world size {world_size}")));
            }
            RunEvent::Regroup { .. } => self.turn_to(Some(event.kind().name())),
            RunEvent::RunEnded { .. } => self.turn_to(None),
            _ => {}
        }
        // A trace is read after a crash as well.
        self.flush();
    }

    fn turn_to(&mut self, next: Option<&str>) {
        let now = now();
        if std::mem::replace(&mut self.is_open, next.is_some()) {
            self.groups.end(now);
        }
        if let Some(name) = next {
            self.groups.begin(now, name, Nothing {});
        }
    }

    /// Adds work on the storage that began at `begun` and has just ended.
    pub fn stored(&self, name: &str, begun: Duration) {
        self.storage.slice(begun, now(), name, Nothing {});
    }

    /// Adds a row's scalars and rate.
    pub fn row(&self, row: &MetricsRow) {
        if !self.events.is_on() {
            return;
        }
        let mut curves: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
        let scalars = row.scalars.iter().map(|(name, value)| (Shown::new(name), value));
        let scalars = scalars.map(|(shown, value)| (shown.group.name, shown.of, value));
        for (curve, of, value) in scalars.chain([("rate", "images_per_second", row.images_per_second)]) {
            // JSON has no form for numbers that are not finite.
            if let Value::Number(number) = value.into() {
                curves.entry(curve).or_default().insert(of.to_string(), number.into());
            }
        }
        curves.into_iter().for_each(|(curve, values)| self.events.values(curve, values));
    }

    /// Hands buffered lines to the system.
    pub fn flush(&self) {
        self.trace.flush();
    }

    /// Closes the trace. All local workers must have ended.
    pub fn finish(&self) {
        self.trace.finish();
    }
}
