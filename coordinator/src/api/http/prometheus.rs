//! `/metrics`: the run for Prometheus. Rendered anew for each scrape, so that a worker that is gone
//! has no figures.
//!
//! Counters come from the events of the run, those of earlier coordinators included, so a restart
//! sets none of them back.

use std::fmt;
use std::sync::atomic::AtomicU64;

use ganglion_proto::job;
use ganglion_proto::record::{EventKind, FaultKind, MetricsRow};
use ganglion_proto::wire::WorkerStatus;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

use super::View;
use crate::records::alarms::Alarm;
use crate::records::chronicle::{Chronicle, Known};
use crate::records::scalars::{GROUPS, Shown};
use crate::system::clock::now;

/// Exposition format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' own text format.
    Text,
}

/// Stages of a group; exactly one holds.
// As `Machine::stage` names them.
const STAGES: [&str; 6] = ["gathering", "reconnecting", "training", "regrouping", "closing", "ended"];

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;

impl Form {
    /// Chooses the format for a client with this `Accept` header.
    pub(super) fn accepted(types: &str) -> Form {
        if types.contains("application/openmetrics-text") { Form::OpenMetrics } else { Form::Text }
    }

    /// Content type of the format.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Form::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Form::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Renders all metrics of the moment.
pub(super) fn render(
    view: &View,
    chronicle: &Chronicle,
    family: job::Family,
    form: Form,
) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("ganglion");
    of_run(&mut registry, view);
    {
        let known = chronicle.look();
        of_history(&mut registry, &known);
        if let Some(row) = &known.newest {
            of_row(&mut registry, row);
        }
    }
    of_workers(&mut registry, &view.status.workers);
    of_evaluations(&mut registry, &chronicle.look(), family);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(if form == Form::Text { plain(&text) } else { text })
}

/// Converts OpenMetrics to the older format, which names a counter in full and has no units and no
/// end marker.
fn plain(text: &str) -> String {
    let mut counters = Vec::new();
    let mut lines = String::with_capacity(text.len());
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("# TYPE ").and_then(|rest| rest.strip_suffix(" counter")) {
            counters.push(name);
        }
    }
    for line in text.lines().filter(|line| *line != "# EOF" && !line.starts_with("# UNIT ")) {
        let described = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "));
        let name = described.and_then(|rest| rest.split(' ').next()).filter(|name| counters.contains(name));
        match name {
            Some(name) => lines.push_str(&line.replacen(name, &format!("{name}_total"), 1)),
            None => lines.push_str(line),
        }
        lines.push('\n');
    }
    lines
}

#[allow(clippy::cast_precision_loss)] // Prometheus knows no other numbers
fn float(count: u64) -> f64 {
    count as f64
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: f64) {
    registry.register(name, help, ConstGauge::new(value));
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register(name, help, ConstCounter::new(value));
}

/// Registers one gauge, with a value for each set of labels.
fn gauges(registry: &mut Registry, name: &str, help: &str, values: impl IntoIterator<Item = (Labels, f64)>) {
    let family = Gauges::default();
    for (labels, value) in values {
        family.get_or_create(&labels).set(value);
    }
    registry.register(name, help, family);
}

fn of_run(registry: &mut Registry, view: &View) {
    let status = &view.status;
    let info = vec![
        ("name", status.name.clone()),
        ("run", status.run.clone()),
        ("version", env!("CARGO_PKG_VERSION").to_string()),
    ];
    gauges(registry, "run_info", "Name of the run and version of this program, always 1", [(info, 1.0)]);
    gauge(registry, "step", "Steps recorded", float(status.step));
    gauge(registry, "last_step", "Last step of the run; 0 while it is unknown", float(status.last_step));
    gauge(registry, "term", "Number of starts of a coordinator of this run (term)", float(status.term));
    gauge(
        registry,
        "generation",
        "Number of the newest group of workers (generation)",
        float(status.generation),
    );
    gauge(registry, "world_size", "Workers in the newest group", status.world_size.into());
    gauge(registry, "workers", "Workers connected to the coordinator", float(status.workers.len() as u64));
    gauge(
        registry,
        "data_shards",
        "Data shards of the job, which its workers share",
        status.data_shards.into(),
    );
    gauge(
        registry,
        "failure_deadline_seconds",
        "Time for which a worker may be silent, job.failure_deadline",
        status.failure_deadline,
    );
    let age = view.at.elapsed().as_secs_f64();
    gauge(
        registry,
        "loop_age_seconds",
        "Time since the coordinator last completed a round of its main loop",
        age,
    );
    let finished = f64::from(u8::from(status.outcome == "complete"));
    gauge(registry, "finished", "Whether the run is complete", finished);
    let stages =
        STAGES.map(|stage| (vec![("stage", stage.to_string())], f64::from(u8::from(stage == status.stage))));
    gauges(registry, "stage", "Stage of the group: 1 for the current one", stages);
    gauge(
        registry,
        "checkpoint_step",
        "Step of the newest checkpoint; 0 before the first",
        float(status.checkpoint_step),
    );
}

fn of_history(registry: &mut Registry, known: &Known) {
    for (name, help, kind) in [
        ("regroups", "Groups that ended because a worker was lost, joined or left", EventKind::Regroup),
        ("generations", "Groups that were formed", EventKind::GenerationFormed),
        ("workers_lost", "Workers that were lost", EventKind::WorkerLost),
        (
            "skipped_phases",
            "Updates that were left out because they were not finite",
            EventKind::PhaseSkipped,
        ),
        ("checkpoints", "Checkpoints that were saved", EventKind::Checkpoint),
        (
            "checkpoint_delays",
            "Failed attempts to write a file of a checkpoint",
            EventKind::CheckpointDelayed,
        ),
        ("metrics_breaches", "Steps that were computed again with another result", EventKind::MetricsBreach),
        ("coordinator_starts", "Starts of a coordinator of this run", EventKind::CoordinatorStarted),
    ] {
        counter(registry, name, help, known.count(kind));
    }
    let faults: Family<Labels, Counter> = Family::default();
    // Each kind has a series from the start: a rate needs a 0 before the first fault.
    for kind in FaultKind::ALL.iter().chain(known.faults.keys()) {
        let count = known.faults.get(kind).copied().unwrap_or(0);
        let counter = faults.get_or_create_owned(&vec![("kind", kind.name().to_string())]);
        // A kind comes twice, from both lists, and must count once.
        counter.inc_by(count.saturating_sub(counter.get()));
    }
    registry.register("faults", "Faults that workers reported", faults);
    if let Some(checkpoint) = known.checkpoints.back() {
        let time = checkpoint.time;
        gauge(
            registry,
            "checkpoint_timestamp_seconds",
            "Unix time at which the newest checkpoint was saved",
            time,
        );
        gauge(
            registry,
            "checkpoint_age_seconds",
            "Time since the newest checkpoint was saved",
            // A clock that was set back must not give a negative age.
            (now() - time).max(0.0),
        );
    }
}

fn of_row(registry: &mut Registry, row: &MetricsRow) {
    for group in &GROUPS {
        let shown = row.scalars.iter().map(|(name, value)| (Shown::new(name), value));
        let of_group = shown.filter(|(shown, value)| shown.group == group && value.is_finite());
        let values: Vec<_> =
            of_group.map(|(shown, value)| (vec![(group.key, shown.of.to_string())], value)).collect();
        if !values.is_empty() {
            gauges(registry, group.name, group.help, values);
        }
    }
    if row.images_per_second.is_finite() {
        gauge(registry, "images_per_second", "Real images trained on per second", row.images_per_second);
    }
    counter(registry, "images", "Real images trained on since the start of the run", row.images_seen);
    gauge(registry, "epoch", "Passes over the data since the start of the run", row.epoch);
    gauge(registry, "row_timestamp_seconds", "Unix time of the newest recorded step", row.time);
    let parts = row.profile.iter().flat_map(|(network, profile)| {
        let labels = move |part: &str| vec![("module", network.to_string()), ("part", part.to_string())];
        profile.parts().map(|(part, milliseconds)| (labels(part), milliseconds / 1000.0))
    });
    if !row.profile.is_empty() {
        gauges(
            registry,
            "step_part_seconds",
            "Time of a step by module and part, on the worker that reports",
            parts,
        );
    }
}

fn of_evaluations(registry: &mut Registry, known: &Known, family: job::Family) {
    let raised = |alarm: &Alarm| f64::from(u8::from(known.alarms.contains_key(alarm.name())));
    let alarms = Alarm::ALL.iter().filter(|alarm| alarm.concerns(family));
    let alarms = alarms.map(|alarm| (vec![("alarm", alarm.name().to_string())], raised(alarm)));
    gauges(
        registry,
        "alarm",
        "Whether an alarm is raised: 1 from its event until its cause has gone",
        alarms,
    );
    let Some(newest) = known.evaluations.values().next_back() else { return };
    let figures = newest.record.metrics.iter().filter(|(_, value)| value.is_finite());
    let figures = figures.map(|(name, value)| (vec![("metric", name.to_string())], value));
    gauges(registry, "evaluation", "Figures of the newest evaluation; docs/metrics.md defines them", figures);
    gauge(registry, "evaluation_step", "Step of the newest evaluation", float(newest.record.step));
    gauge(registry, "evaluation_seconds", "Time that the newest evaluation took", newest.record.seconds);
    if let Some(best) = &known.best {
        gauge(registry, "best_checkpoint_step", "Step of the best checkpoint", float(best.step));
    }
}

fn of_workers(registry: &mut Registry, workers: &[WorkerStatus]) {
    let labels =
        |worker: &WorkerStatus| vec![("worker", worker.worker.to_string()), ("host", worker.host.clone())];
    let mut each = |name: &str, help: &str, of: fn(&WorkerStatus) -> Option<f64>| {
        gauges(registry, name, help, workers.iter().filter_map(|worker| Some((labels(worker), of(worker)?))));
    };
    each("worker_position", "Updates that the worker's state contains (update index)", |worker| {
        worker.heartbeat_age.map(|_| float(worker.position))
    });
    each("worker_shards", "Data shards of the worker", |worker| Some(worker.shards.into()));
    each("worker_heartbeat_age_seconds", "Time since the worker's newest heartbeat", |worker| {
        worker.heartbeat_age
    });
    each("worker_resident_memory_bytes", "Memory of the worker's process (resident set)", |worker| {
        worker.resident_bytes.map(float)
    });
    each("worker_gpu_memory_bytes", "Memory in use on the worker's GPU", |worker| {
        worker.gpu_memory_bytes.map(float)
    });
    each("worker_gpu_utilisation_ratio", "Share of the time in which the worker's GPU was busy", |worker| {
        worker.gpu_utilisation.map(|percent| f64::from(percent) / 100.0)
    });
    let infos = workers.iter().map(|worker| {
        let rank = worker.rank.map_or(String::new(), |rank| rank.to_string());
        let mut labels = labels(worker);
        labels.extend([("rank", rank), ("pid", worker.pid.to_string()), ("device", worker.device.clone())]);
        (labels, 1.0)
    });
    gauges(registry, "worker_info", "Rank, process and device of the worker, always 1", infos);
}

#[cfg(test)]
mod tests {
    use super::super::tests::{chronicle, view};
    use super::*;

    fn text(form: Form) -> String {
        render(&view(), &chronicle(), job::Family::Gan, form).unwrap()
    }

    #[test]
    fn the_run_and_its_workers_have_figures() {
        let text = text(Form::Text);
        for line in [
            "ganglion_step 30",
            "ganglion_stage{stage=\"training\"} 1",
            "ganglion_stage{stage=\"regrouping\"} 0",
            "ganglion_loss{module=\"discriminator\"} 1.25",
            "ganglion_score{of=\"fake\"} 0.25",
            "ganglion_scalar{name=\"grad_norm\"} 0.5",
            "ganglion_setting{name=\"r1\"} 0.25",
            "ganglion_faults_total{kind=\"peer\"} 1",
            "ganglion_faults_total{kind=\"timeout\"} 0",
            "ganglion_coordinator_starts_total 1",
            "ganglion_step_part_seconds{module=\"generator\",part=\"wait\"} 0.001",
            "ganglion_worker_position{worker=\"3\",host=\"node \\\"7\\\"\\n\"} 41",
            "ganglion_worker_gpu_utilisation_ratio{worker=\"3\",host=\"node \\\"7\\\"\\n\"} 0.87",
        ] {
            assert!(
                text.lines().any(|known| known.strip_suffix(".0").unwrap_or(known) == line),
                "{line}\n{text}"
            );
        }
        assert!(!text.contains("ganglion_loss{module=\"generator\"}"), "what is not finite has no figure");
    }

    #[test]
    fn a_worker_that_is_gone_has_no_figures() {
        let mut view = view();
        view.status.workers.clear();
        let text = render(&view, &chronicle(), job::Family::Gan, Form::Text).unwrap();
        assert!(!text.contains("worker=\"3\""), "{text}");
    }

    #[test]
    fn both_forms_name_a_counter_as_they_should() {
        let (old, new) = (text(Form::Text), text(Form::OpenMetrics));
        assert!(old.contains("# TYPE ganglion_regroups_total counter\n") && !old.contains("# EOF"));
        assert!(new.contains("# TYPE ganglion_regroups counter\n") && new.ends_with("# EOF\n"));
        for text in [&old, &new] {
            assert!(text.contains("\nganglion_regroups_total 0\n"), "{text}");
        }
        assert_eq!(Form::accepted("application/openmetrics-text;version=1.0.0;q=0.5"), Form::OpenMetrics);
        assert_eq!(Form::accepted("*/*"), Form::Text);
    }

    /// The deployed alerts and dashboards use existing metrics.
    #[test]
    fn alerts_and_dashboards_name_metrics_that_exist() {
        let text = text(Form::Text);
        let known: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split(['{', ' ']).next())
            .collect();
        let deploy = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy");
        for file in ["prometheus/alerts.yml", "prometheus/alerts_test.yml", "grafana/ganglion.json"] {
            let text = std::fs::read_to_string(format!("{deploy}/{file}")).unwrap();
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let names =
                text.match_indices("ganglion_").map(|(at, _)| text[at..].split(|c| !is_name(c)).next());
            let mut count = 0;
            for name in names.flatten() {
                assert!(known.contains(&name), "{file}: there is no metric {name}");
                count += 1;
            }
            assert!(count > 5, "{file}");
        }
        let board = std::fs::read_to_string(format!("{deploy}/grafana/ganglion.json")).unwrap();
        let board: serde_json::Value = serde_json::from_str(&board).unwrap();
        assert!(board["panels"].as_array().is_some_and(|panels| panels.len() > 10));
    }
}
