//! Events of a run: the kinds of lines in `events.jsonl`.
//!
//! A new kind is one entry here, and its place in the coordinator that records it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::evaluation::EvaluationRow;
use super::row::is_zero;
use super::schema::{Field, events, record};
use crate::names::names_of;
use crate::record::found::Found;

record! {
    /// Checkpoint that became valid.
    #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(default)]
    pub struct SavedCheckpoint {
        /// Folder in the storage.
        pub folder: String,
        /// Phases done of the step after `step`.
        pub phase: u32,
        /// blake3 of the whole state, in hexadecimal digits.
        pub state_digest: String,
        /// Count of steps done.
        pub step: u64,
    }
}

record! {
    /// Best checkpoint of a run.
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    pub struct BestCheckpoint {
        /// Folder in the storage.
        pub folder: String,
        /// Name of the metric that decided.
        pub metric: String,
        /// Count of steps done.
        pub step: u64,
        /// Value of that metric.
        pub value: f64,
    }
}

/// Member of a generation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemberLine {
    /// Process id of the worker; `None` where it is away.
    pub pid: Option<u32>,
    /// Rank in the generation.
    pub rank: u32,
    /// First data shard, and the one behind the last.
    pub shards: [u32; 2],
    /// Number of the worker.
    pub worker: u64,
}

/// Kind of a fault that a worker reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// A peer, or the link to it, is gone.
    Peer,
    /// A reduce took longer than it may.
    Timeout,
    /// Some members cannot reach each other.
    Links,
    /// The members' states differ.
    Diverged,
    /// The worker cannot go on.
    Internal,
    /// The reduced gradient is not finite.
    NonFinite,
    /// A kind of another version.
    #[default]
    #[serde(other)]
    Unknown,
}

/// Outcome of a coordinator's part of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunOutcome {
    /// The last step is done.
    Complete,
    /// A signal stopped it after a clean checkpoint.
    Stopped,
    /// The user's input is wrong.
    InputError,
    /// The run cannot go on.
    Failed,
    /// An outcome of another version.
    #[default]
    #[serde(other)]
    Unknown,
}

/// Planned change of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlannedChange {
    /// A new generation, after a worker joined or before one leaves.
    Regroup,
    /// The end of the run or of this coordinator's part of it.
    Stop,
    /// A change of another version.
    #[default]
    #[serde(other)]
    Unknown,
}

impl FaultKind {
    /// Kinds that workers report.
    pub const ALL: [FaultKind; 6] = [
        FaultKind::Peer,
        FaultKind::Timeout,
        FaultKind::Links,
        FaultKind::Diverged,
        FaultKind::Internal,
        FaultKind::NonFinite,
    ];

    /// Name in `events.jsonl`.
    pub fn name(self) -> &'static str {
        // serde's names are in the order of the variants, as is this number.
        names_of::<FaultKind>()[self as usize]
    }
}

impl RunOutcome {
    /// Name in `events.jsonl`.
    pub fn name(self) -> &'static str {
        names_of::<RunOutcome>()[self as usize]
    }
}

events! {
    records {
        /// A checkpoint became valid.
        "checkpoint" Checkpoint(SavedCheckpoint),
        /// An evaluation was recorded.
        "evaluation" Evaluation(EvaluationRow),
        /// Another checkpoint is the best one now.
        "best_checkpoint" BestCheckpoint(BestCheckpoint),
    }
    events {
        /// A coordinator started.
        "coordinator_started" CoordinatorStarted {
            /// Address for workers.
            address: String,
            /// Address of the dashboard, without a token; null without a dashboard.
            dashboard: Option<String>,
            /// Number of the format of both records from here on; 1 if it is absent.
            #[serde(skip_serializing_if = "Option::is_none")]
            format: Option<u32>,
            /// Process id of the coordinator.
            pid: u32,
            /// Number of this start.
            term: u64,
        }
        /// A coordinator's part of the run ended.
        "run_ended" RunEnded {
            /// Signal or error; empty where the run is complete.
            detail: String,
            /// Outcome.
            outcome: RunOutcome,
        }
        /// A signal or an operator asked the run to stop.
        "stop_requested" StopRequested {}
        /// A complete run's coordinator stays until a signal ends it.
        "staying" Staying {}
        /// The data set as a worker found it.
        "data" Data {
            /// Size, shape, classes, and files that were left out; [its keys](#the-data-set) are below.
            found: Found,
        }
        /// The run took over the fingerprint of the environment: all its workers must have it.
        "passport" Passport {
            /// Items of the fingerprint, by name.
            items: BTreeMap<String, String>,
        }
        /// A local worker was started.
        "worker_started" WorkerStarted {
            /// Number of its place on this machine, by which it chooses a GPU.
            local_rank: u32,
            /// Process id.
            pid: u32,
        }
        /// The process of a local worker ended.
        "worker_exited" WorkerExited {
            /// Process id.
            pid: u32,
            /// Exit status or signal.
            status: String,
            /// Number of the worker; null if it never joined.
            worker: Option<u64>,
        }
        /// A worker joined.
        "worker_joined" WorkerJoined {
            /// Name of its machine.
            host: String,
            /// Whether this coordinator started it.
            local: bool,
            /// Process id on that machine.
            pid: u32,
            /// Number of the worker.
            worker: u64,
        }
        /// A worker is back in a new session.
        "worker_resumed" WorkerResumed {
            /// Name of its machine.
            host: String,
            /// Whether this coordinator started it.
            local: bool,
            /// Process id on that machine.
            pid: u32,
            /// Number of the worker.
            worker: u64,
        }
        /// The session of a worker ended; the worker may be back.
        "worker_disconnected" WorkerDisconnected {
            /// Number of the worker.
            worker: u64,
        }
        /// A worker is lost.
        "worker_lost" WorkerLost {
            /// Process id; null if it was not in session.
            pid: Option<u32>,
            /// Reason.
            reason: String,
            /// Number of the worker.
            worker: u64,
        }
        /// A worker's machine wants it to end.
        "worker_leaves" WorkerLeaves {
            /// Number of the worker.
            worker: u64,
        }
        /// A worker was told to end, and is killed if it is local.
        "worker_dropped" WorkerDropped {
            /// Number of the worker.
            worker: u64,
        }
        /// A worker was refused.
        "worker_refused" WorkerRefused {
            /// Reason.
            reason: String,
            /// Number of the worker.
            worker: u64,
        }
        /// Lost local workers are not replaced any more.
        "replacing_given_up" ReplacingGivenUp {
            /// Reason.
            reason: String,
        }
        /// An operator asked a worker to leave.
        "drain_requested" DrainRequested {
            /// Number of the worker.
            worker: u64,
        }
        /// An operator asked for a number of local workers.
        "scale_requested" ScaleRequested {
            /// Number of local workers.
            workers: u32,
        }
        /// A generation of the group was formed.
        "generation_formed" GenerationFormed {
            /// Backend of its reduces: `gloo` or `nccl`.
            backend: String,
            /// Reason.
            cause: String,
            /// Number of the generation.
            generation: u64,
            /// Members in the order of their ranks, each with `pid`, `rank`, `shards` (the first data
            /// shard and the one behind the last) and `worker`.
            members: Vec<MemberLine>,
            /// Update index from which it trains: the count of committed phases.
            position: u64,
            /// Origin of its state: `fresh`, a rank, or the folder of a checkpoint.
            start: String,
            /// Number of members.
            world_size: u64,
        }
        /// A new coordinator took over a generation that trained on.
        "generation_kept" GenerationKept {
            /// Number of the generation.
            generation: u64,
            /// Term of the new coordinator.
            term: u64,
            /// Number of members.
            world_size: u64,
        }
        /// A generation broke; its members regroup.
        "regroup" Regroup {
            /// Number of the generation.
            generation: u64,
            /// Reason.
            reason: String,
        }
        /// The states of a generation are invalidated.
        "condemned" Condemned {
            /// Number of the generation.
            generation: u64,
        }
        /// A change was announced to the members, who make it at the same update index.
        "plan" Plan {
            /// Change.
            change: PlannedChange,
            /// Number of the plan.
            plan: u64,
        }
        /// A member reported a fault.
        "fault" Fault {
            /// Details, such as the ranks that it cannot reach.
            detail: String,
            /// Kind of the fault.
            fault: FaultKind,
            /// Number of the generation.
            generation: u64,
            /// Number of the worker.
            worker: u64,
        }
        /// A phase was skipped because its reduced gradient is not finite.
        "phase_skipped" PhaseSkipped {
            /// Update index at which the phase started.
            position: u64,
            /// Value that is not finite.
            reason: String,
            /// Step of the phase, counted from 1.
            step: u64,
        }
        /// The run was rolled back, and a replay may skip the phase that was not finite.
        "skip_allowed" SkipAllowed {
            /// Update index at which the phase starts.
            position: u64,
        }
        /// Samples are left out from some step on.
        "samples_excluded" SamplesExcluded {
            /// Phases done of the next step when it takes effect.
            after_phase: u64,
            /// Count of steps done when it takes effect.
            after_step: u64,
            /// Files or indices of the samples.
            files: Vec<String>,
        }
        /// A file of a checkpoint could not be written; it is tried again.
        "checkpoint_delayed" CheckpointDelayed {
            /// Name of the file.
            file: String,
            /// Number of such events that were left out before this one; absent for none.
            #[serde(skip_serializing_if = "is_zero")]
            left_out: u64,
            /// Reason.
            reason: String,
            /// Step of the checkpoint.
            step: u64,
            /// Number of the worker; absent where it is the coordinator's file.
            #[serde(skip_serializing_if = "Option::is_none")]
            worker: Option<u64>,
        }
        /// A checkpoint was given up before it became valid.
        "checkpoint_abandoned" CheckpointAbandoned {
            /// Step of the checkpoint.
            step: u64,
        }
        /// A checkpoint is damaged, and another state is used.
        "checkpoint_damaged" CheckpointDamaged {
            /// Folder in the storage.
            folder: String,
            /// State that is used instead.
            instead: String,
            /// Damage.
            reason: String,
        }
        /// The newest checkpoint is not in the storage, and another state is used.
        "checkpoint_missing" CheckpointMissing {
            /// Folder in the storage.
            folder: String,
            /// State that is used instead.
            instead: String,
            /// Address of the storage.
            place: String,
            /// Step of the checkpoint.
            step: u64,
        }
        /// A grid of samples was stored.
        "samples" Samples {
            /// Path in the run directory.
            file: String,
            /// Count of steps done.
            step: u64,
        }
        /// A grid of real samples was stored, as the networks see them.
        "real_samples" RealSamples {
            /// Path in the run directory.
            file: String,
        }
        /// An evaluation was computed again with another result: equal results are not kept.
        "evaluation_breach" EvaluationBreach {
            /// Description.
            detail: String,
            /// Step of the evaluation.
            step: u64,
        }
        /// An alarm was raised.
        "alarm" Alarm {
            /// Name of the alarm.
            alarm: String,
            /// Reason.
            detail: String,
            /// Step of the row or evaluation that raised it.
            step: u64,
        }
        /// The cause of an alarm has gone.
        "alarm_over" AlarmOver {
            /// Name of the alarm.
            alarm: String,
            /// Step of the row or evaluation.
            step: u64,
        }
        /// A step was computed again with another result: equal results are not kept.
        "metrics_breach" MetricsBreach {
            /// Both results.
            detail: String,
        }
        /// Metrics rows are lost with the workers that had them.
        "metrics_lost" MetricsLost {
            /// Number of rows.
            count: u64,
            /// Step of the first.
            first: u64,
            /// Step of the last.
            last: u64,
        }
        /// Events found no room while the disk was full.
        "events_dropped" EventsDropped {
            /// Number of events.
            count: u64,
        }
        /// A damaged record was set aside, and a file with its readable lines took its place.
        "record_set_aside" RecordSetAside {
            /// Name of the damaged file now; empty where there was none.
            aside: String,
            /// Name of the record.
            file: String,
            /// Number of readable lines.
            kept: u64,
            /// Number of damaged places.
            lost: u64,
            /// First and last step of each range whose rows may be lost.
            steps: Vec<(u64, u64)>,
        }
        /// A new journal was made for the run.
        "journal_recovered" JournalRecovered {
            /// Greatest number of a term, generation or worker of before.
            floor: u64,
            /// Tables that could not be read as a whole.
            lost: Vec<String>,
        }
    }
}

impl EventKind {
    /// Name in `events.jsonl`.
    pub fn name(self) -> &'static str {
        EventKind::DESCRIBED[self as usize].0
    }

    /// Documentation.
    pub fn doc(self) -> &'static str {
        EventKind::DESCRIBED[self as usize].1.trim()
    }

    /// Keys beside `time` and `kind`.
    pub fn fields(self) -> &'static [Field] {
        EventKind::DESCRIBED[self as usize].2
    }

    /// Kind of a name; `None` for a name of another version.
    pub fn of(name: &str) -> Option<EventKind> {
        EventKind::ALL.iter().copied().find(|kind| kind.name() == name)
    }
}

/// Line of `events.jsonl`.
#[derive(Debug)]
pub struct EventLine {
    /// Time in seconds since the Unix epoch.
    pub time: f64,
    /// Name of the kind, known or not.
    pub kind: String,
    /// The event, or the reason why it is not known.
    pub event: Result<RunEvent, Unread>,
}

/// Reason why the event of a line is not known.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// The kind is one of another version.
    #[error("its kind is of another version")]
    OtherVersion,
    /// The line was too long, and its keys were left out.
    #[error("its keys were left out")]
    LeftOut,
    /// The keys are not those of the kind.
    #[error("{0}")]
    Broken(serde_json::Error),
}

#[derive(Serialize)]
struct Line<'a> {
    time: f64,
    #[serde(flatten)]
    event: &'a RunEvent,
}

/// Keys of every line.
#[derive(Serialize, Deserialize)]
struct Head<'a> {
    time: f64,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    /// Length of a line that was too long.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_left_out: Option<usize>,
}

impl RunEvent {
    /// Line of the event, without its newline. Of a line beyond `limit` bytes only the length is
    /// left.
    pub fn line(&self, time: f64, limit: usize) -> Vec<u8> {
        let write = "texts and numbers can be written as JSON";
        let line = serde_json::to_vec(&Line { time, event: self }).expect(write);
        // A line that readers cannot hold would stop all of them; its length says that there was one.
        if line.len() <= limit {
            return line;
        }
        let kind = self.kind().name().into();
        serde_json::to_vec(&Head { time, kind, bytes_left_out: Some(line.len()) }).expect(write)
    }

    /// Keys of the event beside `time` and `kind`.
    pub fn keys(&self) -> serde_json::Map<String, serde_json::Value> {
        let value = serde_json::to_value(self).ok();
        let mut keys = value.and_then(|value| value.as_object().cloned()).unwrap_or_default();
        // It is the name of the event, and not one of its keys.
        keys.remove("kind");
        keys
    }
}

impl EventLine {
    /// Parses a line.
    ///
    /// # Errors
    /// The line is no event: it lacks a time or a kind.
    pub fn parse(line: &[u8]) -> Result<EventLine, serde_json::Error> {
        // Read alone first: a kind of another version has keys that are not known here.
        let Head { time, kind, bytes_left_out } = serde_json::from_slice(line)?;
        let event = match (EventKind::of(&kind), bytes_left_out) {
            (None, _) => Err(Unread::OtherVersion),
            // Cut off by `line`: the keys are not there.
            (Some(_), Some(_)) => Err(Unread::LeftOut),
            (Some(_), None) => serde_json::from_slice(line).map_err(Unread::Broken),
        };
        Ok(EventLine { time, kind: kind.into_owned(), event })
    }
}
