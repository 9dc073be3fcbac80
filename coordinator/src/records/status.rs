//! Status of a run as JSON: the same for the page, for scripts and for operators.

use ganglion_proto::wire::{Activity, GetStatusResponse, WorkerStatus};
use serde_json::{Value, json};

/// Renders the status as a JSON object.
pub(crate) fn json(status: &GetStatusResponse) -> Value {
    let outcome = Some(&status.outcome).filter(|outcome| !outcome.is_empty());
    let digest = Some(&status.state_digest).filter(|digest| !digest.is_empty());
    let workers: Vec<Value> =
        status.workers.iter().map(|worker| worker_json(worker, status.failure_deadline)).collect();
    json!({
        "name": status.name,
        "run": status.run,
        "term": status.term,
        "generation": status.generation,
        "world_size": status.world_size,
        "step": status.step,
        "last_step": status.last_step,
        "stage": status.stage,
        "outcome": outcome,
        "finished": status.outcome == "complete",
        "data_shards": status.data_shards,
        "phases_per_step": status.phases_per_step,
        "failure_deadline": status.failure_deadline,
        "checkpoint_step": status.checkpoint_step,
        "state_digest": digest,
        "workers": workers,
    })
}

fn worker_json(worker: &WorkerStatus, failure_deadline: f64) -> Value {
    let heard = worker.heartbeat_age.is_some();
    json!({
        "worker": worker.worker,
        "rank": worker.rank,
        "host": worker.host,
        "pid": worker.pid,
        "device": worker.device,
        "local": worker.local,
        "health": health(worker, failure_deadline),
        "heartbeat_age": worker.heartbeat_age,
        "first_shard": worker.first_shard,
        "shards": worker.shards,
        "position": heard.then_some(worker.position),
        "activity": heard.then(|| activity(worker.activity())),
        "resident_bytes": worker.resident_bytes,
        "gpu_memory_bytes": worker.gpu_memory_bytes,
        "gpu_utilisation": worker.gpu_utilisation,
    })
}

/// Health of a worker, as a word. Five heartbeats are due within a failure deadline, so three
/// missed ones are reported.
pub(crate) fn health(worker: &WorkerStatus, failure_deadline: f64) -> &'static str {
    match worker.heartbeat_age {
        // First: the age of a heartbeat says nothing once the session has ended.
        _ if !worker.connected => "away",
        None => "new",
        Some(age) if age > 0.6 * failure_deadline => "silent",
        Some(_) => "well",
    }
}

/// Activity of a worker's training thread, as a word.
pub(crate) fn activity(activity: Activity) -> &'static str {
    match activity {
        Activity::Computing => "computing",
        Activity::Waiting => "waiting",
        Activity::Resting => "resting",
        Activity::Paused => "paused",
        Activity::Unspecified => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(connected: bool, heartbeat_age: Option<f64>) -> WorkerStatus {
        WorkerStatus { worker: 3, connected, heartbeat_age, position: 9, ..WorkerStatus::default() }
    }

    #[test]
    fn a_workers_health_follows_from_its_heartbeats() {
        for (connected, age, expected) in [
            (true, None, "new"),
            (true, Some(0.0), "well"),
            (true, Some(3.0), "well"),
            (true, Some(3.1), "silent"),
            (false, Some(0.1), "away"),
            (false, None, "away"),
        ] {
            assert_eq!(health(&worker(connected, age), 5.0), expected);
        }
    }

    #[test]
    fn what_is_not_known_is_null() {
        let before =
            json(&GetStatusResponse { workers: vec![worker(true, None)], ..GetStatusResponse::default() });
        for unknown in [&before["outcome"], &before["state_digest"], &before["workers"][0]["position"]] {
            assert!(unknown.is_null(), "{before}");
        }
        assert_eq!((&before["workers"][0]["rank"], &before["finished"]), (&Value::Null, &false.into()));
        let after = GetStatusResponse {
            outcome: "complete".to_string(),
            workers: vec![worker(true, Some(0.5))],
            ..GetStatusResponse::default()
        };
        let after = json(&after);
        assert_eq!((&after["finished"], &after["workers"][0]["position"]), (&true.into(), &9.into()));
    }
}
