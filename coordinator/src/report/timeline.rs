//! The coordinator's part of a trace: events as they are recorded, the life of each group, the curves.

use std::path::Path;
use std::time::Duration;

use ganglion_proto::trace::{Nothing, Trace, Track, now};
use serde::Serialize;
use serde_json::{Value, json};

use super::metrics::Row;

/// See the module.
pub struct Timeline {
    trace: Trace,
    events: Track,
    groups: Track,
    storage: Track,
    /// Whether a group is shown that trains, or regroups.
    is_open: bool,
}

#[derive(Serialize)]
struct Told<'a, F> {
    time: f64,
    #[serde(flatten)]
    fields: &'a F,
}

impl Timeline {
    /// The tracks of a trace.
    pub fn new(trace: &Trace) -> Timeline {
        Timeline {
            events: trace.track(1, "events"),
            groups: trace.track(2, "groups"),
            storage: trace.track(3, "storage"),
            trace: trace.clone(),
            is_open: false,
        }
    }

    /// Where local workers add their part.
    pub fn path(&self) -> Option<&Path> {
        self.trace.path()
    }

    /// Shows an event, which was recorded at `time`, and what it says of the group.
    pub fn event(&mut self, time: f64, kind: &str, fields: &impl Serialize) {
        if !self.events.is_on() {
            return;
        }
        self.events.instant(kind, Told { time, fields });
        let generation = || {
            let fields = serde_json::to_value(fields).unwrap_or_default();
            let number = |field: &str| fields[field].as_u64().unwrap_or_default();
            format!("generation {}, world size {}", number("generation"), number("world_size"))
        };
        match kind {
            "generation_formed" | "generation_kept" => self.turn_to(Some(&generation())),
            "regroup" => self.turn_to(Some("regroup")),
            "run_ended" => self.turn_to(None),
            _ => {}
        }
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

    /// Shows work on the storage that began at a time and is done now.
    pub fn stored(&self, name: &str, begun: Duration) {
        self.storage.slice(begun, now(), name, Nothing {});
    }

    /// Shows a row's losses and rate.
    pub fn row(&self, row: &Row) {
        if !self.events.is_on() {
            return;
        }
        for (curve, values) in [
            ("loss", json!({ "discriminator": row.loss_discriminator, "generator": row.loss_generator })),
            ("rate", json!({ "images_per_second": row.images_per_second })),
        ] {
            // JSON has no form for what is not finite.
            let is_whole = values.as_object().is_some_and(|values| values.values().all(Value::is_number));
            if is_whole {
                self.events.values(curve, values);
            }
        }
    }

    /// Hands over what waits.
    pub fn flush(&self) {
        self.trace.flush();
    }

    /// Ends the trace. All local workers have ended.
    pub fn finish(&self) {
        self.trace.finish();
    }
}
