//! Conversion between the wire and the domain. The only module that knows both.

use std::time::Duration;

use ganglion_membership::{
    Activity, Backend, Checkpoint, Fault, Generation, Group, GroupMember, LoadedFacts, Passport, Plan,
    PlanKind, Position, Progress, Rank, Rested, Share, Start, StepShape, StoredFile, Stretch, Term, WorkerId,
    WrittenPart, shard_ranges,
};

use crate::bounds::{self, count, list, name, text, within};
use crate::error::{Malformed, malformed};
use crate::evaluation::EvaluationRow;
use crate::job::Job;
use crate::message::{
    Assignment, FromWorker, GpuUse, Hello, Resume, SampleGrid, SampleTexts, ToWorker, Usage, Welcome,
};
use crate::record::found::Found;
use crate::record::{self, MetricsRow, Profile};
use crate::wire;

/// Upper bound of a reported time for one shard gradient (`leaf`); longer ones are clamped to it.
const SLOWEST_LEAF: Duration = Duration::from_secs(3600);

fn required<T>(field: Option<T>, name: &str) -> Result<T, Malformed> {
    field.ok_or_else(|| Malformed(format!("{name} is missing")))
}

// ---- A worker's messages

impl FromWorker {
    /// Converts the message to the wire.
    pub fn to_wire(self, term: Term) -> wire::SessionRequest {
        use wire::session_request::Message;
        let message = match self {
            FromWorker::Hello(hello) => Message::Hello(hello_to_wire(hello)),
            FromWorker::Loaded(facts, data) => Message::Loaded(wire::Loaded {
                passport: facts.passport.0,
                samples: facts.samples,
                sees_storage: facts.sees_storage,
                // The wire bounds it when it is read.
                phases_per_step: u32::try_from(facts.shape.phases()).unwrap_or(u32::MAX),
                data_phases: facts.shape.readers().to_vec(),
                gpu: facts.gpu.unwrap_or_default(),
                host: facts.host.unwrap_or_default(),
                data: data.map(|data| data.to_wire()),
                left_out: facts.left_out,
            }),
            FromWorker::Ready(generation, position) => Message::Ready(wire::Ready {
                generation: generation.0,
                position: position.map(|position| position.0),
            }),
            FromWorker::Fault(generation, fault) => fault_to_wire(generation, fault),
            FromWorker::AddressesWanted(generation) => {
                Message::AddressesWanted(wire::AddressesWanted { generation: generation.0 })
            }
            FromWorker::Heartbeat(progress, usage) => Message::Heartbeat(wire::Heartbeat {
                position: progress.position.0,
                activity: activity_to_wire(progress.activity).into(),
                leaves: progress.leaves,
                // A longer time than the type can hold is clamped, and then again by the reader.
                slowest_leaf_us: u64::try_from(progress.slowest_leaf.as_micros()).unwrap_or(u64::MAX),
                resident_bytes: usage.resident_bytes,
                gpu_memory_bytes: usage.gpu.memory_bytes,
                gpu_utilisation: usage.gpu.utilisation,
            }),
            FromWorker::Metrics(row) => Message::Metrics(row_to_wire(row)),
            FromWorker::PartWritten(generation, part) => Message::PartWritten(wire::PartWritten {
                generation: generation.0,
                step: part.step,
                phase: part.phase,
                index: part.index,
                count: part.count,
                file: Some(file_to_wire(part.file)),
                fingerprint: part.fingerprint,
                digest_bytes: part.share.total,
                stretches: part.share.stretches.into_iter().map(stretch_to_wire).collect(),
            }),
            FromWorker::PartDelayed(step, file, detail) => {
                Message::PartDelayed(wire::PartDelayed { step, file, detail })
            }
            FromWorker::Samples(grid) => Message::Samples(wire::SampleGrid {
                real: grid.real,
                step: grid.step,
                png: grid.png,
                width: grid.width,
                height: grid.height,
                channels: grid.channels,
            }),
            FromWorker::Texts(SampleTexts { step, text }) => Message::Texts(wire::SampleTexts { step, text }),
            FromWorker::Evaluation(row) => Message::Evaluation(row.to_wire()),
            FromWorker::PhaseSkipped(position, detail) => {
                Message::PhaseSkipped(wire::PhaseSkipped { position: position.0, detail })
            }
            FromWorker::Finished(generation, position, complete) => {
                Message::Finished(wire::Finished { generation: generation.0, position: position.0, complete })
            }
            FromWorker::InputError(detail) => Message::InputError(wire::InputError { detail }),
            FromWorker::Leave => Message::Leave(wire::Leave {}),
        };
        wire::SessionRequest { term: term.0, message: Some(message) }
    }

    /// Converts a message from the wire, with its term.
    pub fn from_wire(request: wire::SessionRequest) -> Result<(Term, FromWorker), Malformed> {
        use wire::session_request::Message;
        // Without a message it is of a kind that this build does not know; fields alone would be
        // ignored.
        let message = match required(request.message, "message")? {
            Message::Hello(hello) => FromWorker::Hello(hello_from_wire(hello)?),
            Message::Loaded(mut loaded) => {
                // Taken out first: the rest becomes the facts by which a worker is judged, this one is
                // diagnostic.
                let data = loaded.data.take().map(Found::from_wire).transpose()?;
                FromWorker::Loaded(loaded_from_wire(loaded)?, data.map(Box::new))
            }
            Message::Ready(ready) => {
                FromWorker::Ready(generation(ready.generation)?, ready.position.map(position).transpose()?)
            }
            Message::Fault(fault) => {
                FromWorker::Fault(generation(fault.generation)?, fault_from_wire(fault)?)
            }
            Message::AddressesWanted(wanted) => FromWorker::AddressesWanted(generation(wanted.generation)?),
            Message::Heartbeat(heartbeat) => heartbeat_from_wire(&heartbeat)?,
            Message::Metrics(row) => FromWorker::Metrics(row_from_wire(row)?),
            Message::PartWritten(part) => {
                let generation = generation(part.generation)?;
                let files = 1..=bounds::FILES as u64;
                let is_placed = part.phase < bounds::PHASES && part.index < part.count;
                if !is_placed || !files.contains(&u64::from(part.count)) {
                    return Err(Malformed("a file of a checkpoint without its place".to_string()));
                }
                let part = WrittenPart {
                    step: count(part.step, "step")?,
                    phase: part.phase,
                    index: part.index,
                    count: part.count,
                    file: file_from_wire(required(part.file, "file")?)?,
                    fingerprint: part.fingerprint,
                    share: share_from_wire(part.digest_bytes, part.stretches)?,
                };
                FromWorker::PartWritten(generation, part)
            }
            Message::PartDelayed(part) => FromWorker::PartDelayed(
                count(part.step, "step")?,
                name(part.file, "file")?,
                text(part.detail),
            ),
            Message::Samples(grid) => FromWorker::Samples(samples_from_wire(grid)?),
            Message::Texts(texts) => FromWorker::Texts(texts_from_wire(texts)?),
            Message::Evaluation(row) => FromWorker::Evaluation(EvaluationRow::from_wire(row)?),
            Message::PhaseSkipped(skipped) => {
                FromWorker::PhaseSkipped(position(skipped.position)?, text(skipped.detail))
            }
            Message::Finished(finished) => FromWorker::Finished(
                generation(finished.generation)?,
                position(finished.position)?,
                finished.complete,
            ),
            Message::InputError(error) => FromWorker::InputError(text(error.detail)),
            Message::Leave(_) => FromWorker::Leave,
        };
        Ok((Term(count(request.term, "term")?), message))
    }
}

fn generation(number: u64) -> Result<Generation, Malformed> {
    count(number, "generation").map(Generation)
}

fn position(number: u64) -> Result<Position, Malformed> {
    count(number, "position").map(Position)
}

fn samples_from_wire(grid: wire::SampleGrid) -> Result<SampleGrid, Malformed> {
    // It goes to readers of pictures, as TensorBoard, which take sizes on trust.
    let is_picture = (1..=bounds::SIDE).contains(&grid.width)
        && (1..=bounds::SIDE).contains(&grid.height)
        && (1..=4).contains(&grid.channels);
    if !is_picture {
        let wire::SampleGrid { width, height, channels, .. } = grid;
        return Err(Malformed(format!("{width} x {height} pixels of {channels} channels are no picture")));
    }
    Ok(SampleGrid {
        real: grid.real,
        step: count(grid.step, "step")?,
        png: grid.png,
        width: grid.width,
        height: grid.height,
        channels: grid.channels,
    })
}

fn texts_from_wire(texts: wire::SampleTexts) -> Result<SampleTexts, Malformed> {
    let wire::SampleTexts { step, mut text } = texts;
    let end = (0..=bounds::SAMPLE_TEXT.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    text.truncate(end.unwrap_or(0));
    // A file is shown on terminals: of control characters it has the ends of lines and tabulators alone.
    let is_shown = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    let text = text.chars().map(|c| if is_shown(c) { c } else { char::REPLACEMENT_CHARACTER }).collect();
    Ok(SampleTexts { step: count(step, "step")?, text })
}

fn hello_to_wire(hello: Hello) -> wire::Hello {
    let rested = |rest: Rested| wire::Rested {
        position: rest.position.map(|position| position.0),
        finished: rest.finished,
    };
    wire::Hello {
        protocol: hello.protocol,
        spawn_token: hello.spawn_token.unwrap_or_default(),
        host: hello.host,
        pid: hello.pid,
        address: hello.address,
        resume: hello.resume.map(|resume| wire::Resume {
            run: resume.run,
            worker: resume.worker.0,
            term: resume.term.0,
            generation: resume.generation.0,
            rested: resume.rest.map(rested),
        }),
        device: hello.device,
        attempt: hello.attempt,
    }
}

fn hello_from_wire(hello: wire::Hello) -> Result<Hello, Malformed> {
    // Safe to show like a name; the tokens that a coordinator gives are not changed by that.
    let token = name(hello.spawn_token, "spawn_token")?;
    Ok(Hello {
        protocol: hello.protocol,
        // Empty stands for none: on the wire the field is a plain text.
        spawn_token: Some(token).filter(|token| !token.is_empty()),
        host: name(hello.host, "host")?,
        pid: hello.pid,
        address: name(hello.address, "address")?,
        resume: hello.resume.map(resume_from_wire).transpose()?,
        device: name(hello.device, "device")?,
        attempt: count(hello.attempt, "attempt")?,
    })
}

fn resume_from_wire(resume: wire::Resume) -> Result<Resume, Malformed> {
    let rested = |rest: wire::Rested| {
        let position = rest.position.map(position).transpose()?;
        Ok(Rested { position, finished: rest.finished })
    };
    Ok(Resume {
        run: name(resume.run, "run")?,
        worker: WorkerId(count(resume.worker, "worker")?),
        term: Term(count(resume.term, "term")?),
        generation: generation(resume.generation)?,
        rest: resume.rested.map(rested).transpose()?,
    })
}

fn loaded_from_wire(loaded: wire::Loaded) -> Result<LoadedFacts, Malformed> {
    // Both are divisors later: of the stream's numbers, and of update indices.
    if loaded.samples == 0 || !(1..=bounds::PHASES).contains(&loaded.phases_per_step) {
        return Err(Malformed(format!("loaded without samples, or without 1 to {} phases", bounds::PHASES)));
    }
    // An empty one would become the run's, and all later workers would be refused (D11).
    if loaded.passport.is_empty() || loaded.passport.len() > bounds::PASSPORT {
        return Err(Malformed(format!("a passport has 1 to {} items", bounds::PASSPORT)));
    }
    // Refused rather than cut off: two different items must not become equal.
    let item = |(item, value)| {
        Ok((
            name(item, "an item of the passport")?,
            text(within(value, bounds::TEXT, "a value of the passport")?),
        ))
    };
    Ok(LoadedFacts {
        // The worker may be of an earlier build and may have joined before this coordinator was
        // restarted.
        passport: Passport(loaded.passport.into_iter().map(item).collect::<Result<_, Malformed>>()?)
            .numbered(),
        samples: count(loaded.samples, "samples")?,
        sees_storage: loaded.sees_storage,
        shape: shape_from_wire(loaded.phases_per_step, loaded.data_phases)?,
        gpu: Some(name(loaded.gpu, "gpu")?).filter(|gpu| !gpu.is_empty()),
        host: Some(name(loaded.host, "host")?).filter(|host| !host.is_empty()),
        left_out: list(loaded.left_out, bounds::LEFT_OUT, "samples left out")?,
    })
}

fn shape_from_wire(phases: u32, readers: Vec<u32>) -> Result<StepShape, Malformed> {
    let readers = match readers.is_empty() {
        // A build that tells no readers knows GANs alone, whose last phase is the generator's.
        true => (0..phases.saturating_sub(1)).collect(),
        false => list(readers, bounds::PHASES as usize, "phases that read samples")?,
    };
    let shape = StepShape::new(phases, readers);
    shape.ok_or_else(|| malformed("a step in which no phase reads samples, or one that it does not have"))
}

fn fault_to_wire(generation: Generation, fault: Fault) -> wire::session_request::Message {
    // Only this fault is about one phase.
    let at = match &fault {
        Fault::NonFinite { position, .. } => position.0,
        _ => 0,
    };
    let (kind, detail, ranks) = match fault {
        Fault::Peer => (wire::FaultKind::Peer, String::new(), Vec::new()),
        Fault::Timeout => (wire::FaultKind::Timeout, String::new(), Vec::new()),
        Fault::Links(ranks) => (wire::FaultKind::Links, String::new(), ranks),
        Fault::Diverged(detail) => (wire::FaultKind::Diverged, detail, Vec::new()),
        Fault::Internal(detail) => (wire::FaultKind::Internal, detail, Vec::new()),
        Fault::NonFinite { detail, stop: false, .. } => (wire::FaultKind::NonFinite, detail, Vec::new()),
        Fault::NonFinite { detail, stop: true, .. } => (wire::FaultKind::NonFiniteStop, detail, Vec::new()),
    };
    let ranks = ranks.into_iter().map(|rank| rank.0).collect();
    let fault = wire::Fault { generation: generation.0, kind: kind.into(), detail, ranks, position: at };
    wire::session_request::Message::Fault(fault)
}

fn fault_from_wire(fault: wire::Fault) -> Result<Fault, Malformed> {
    Ok(match fault.kind() {
        wire::FaultKind::Peer => Fault::Peer,
        wire::FaultKind::Timeout => Fault::Timeout,
        wire::FaultKind::Links => {
            // The coordinator looks each rank up among the members.
            let ranks = list(fault.ranks, bounds::MEMBERS, "ranks")?;
            Fault::Links(ranks.into_iter().map(Rank).collect())
        }
        wire::FaultKind::Diverged => Fault::Diverged(text(fault.detail)),
        wire::FaultKind::Internal => Fault::Internal(text(fault.detail)),
        kind @ (wire::FaultKind::NonFinite | wire::FaultKind::NonFiniteStop) => Fault::NonFinite {
            position: position(fault.position)?,
            detail: text(fault.detail),
            stop: kind == wire::FaultKind::NonFiniteStop,
        },
        // A newer build's fault: refused, as its consequence is not known here.
        wire::FaultKind::Unspecified => return Err(malformed("unknown kind of fault")),
    })
}

fn heartbeat_from_wire(heartbeat: &wire::Heartbeat) -> Result<FromWorker, Malformed> {
    let progress = Progress {
        position: position(heartbeat.position)?,
        leaves: count(heartbeat.leaves, "leaves")?,
        activity: activity_from_wire(heartbeat.activity())?,
        // Ten times this is how long a member may be late (M8): a wrong clock must not make that
        // endless.
        slowest_leaf: Duration::from_micros(heartbeat.slowest_leaf_us).min(SLOWEST_LEAF),
    };
    let gpu = GpuUse { memory_bytes: heartbeat.gpu_memory_bytes, utilisation: heartbeat.gpu_utilisation };
    Ok(FromWorker::Heartbeat(progress, Usage { resident_bytes: heartbeat.resident_bytes, gpu }))
}

/// Converts an activity to the wire.
pub fn activity_to_wire(activity: Activity) -> wire::Activity {
    match activity {
        Activity::Computing => wire::Activity::Computing,
        Activity::Waiting => wire::Activity::Waiting,
        Activity::Resting => wire::Activity::Resting,
        Activity::Paused => wire::Activity::Paused,
    }
}

fn activity_from_wire(activity: wire::Activity) -> Result<Activity, Malformed> {
    Ok(match activity {
        wire::Activity::Computing => Activity::Computing,
        wire::Activity::Waiting => Activity::Waiting,
        wire::Activity::Resting => Activity::Resting,
        wire::Activity::Paused => Activity::Paused,
        wire::Activity::Unspecified => return Err(malformed("unknown activity")),
    })
}

pub(crate) fn row_to_wire(row: MetricsRow) -> wire::MetricsRow {
    wire::MetricsRow {
        step: row.step,
        time: row.time,
        generation: row.generation,
        world_size: row.world_size,
        images_per_second: row.images_per_second,
        images_seen: row.images_seen,
        ledger: row.ledger,
        skipped: row.skipped,
        gpu_memory_bytes: row.gpu_memory_bytes,
        gpu_utilisation: row.gpu_utilisation,
        scalars: record::to_wire(&row.scalars),
        profiles: row.profile.iter().map(profile_to_wire).collect(),
        epoch: row.epoch,
    }
}

fn finite(number: f64, what: &str) -> Result<f64, Malformed> {
    // Steps are compared and sorted by it, which a NaN would spoil.
    if number.is_finite() { Ok(number) } else { Err(Malformed(format!("{what} is {number}"))) }
}

fn profile_to_wire((network, profile): (&str, Profile)) -> wire::Profile {
    let Profile { data, compute, wait, commit, other } = profile;
    wire::Profile { data, compute, wait, commit, other, network: network.to_string() }
}

fn profile_from_wire(profile: wire::Profile) -> Result<(String, Profile), Malformed> {
    let wire::Profile { data, compute, wait, commit, other, network } = profile;
    Ok((name(network, "a network of a profile")?, Profile { data, compute, wait, commit, other }))
}

pub(crate) fn row_from_wire(row: wire::MetricsRow) -> Result<MetricsRow, Malformed> {
    let profiles = list(row.profiles, bounds::NETWORKS, "profiles")?;
    Ok(MetricsRow {
        step: count(row.step, "step")?,
        time: finite(row.time, "time")?,
        generation: count(row.generation, "generation")?,
        world_size: row.world_size,
        images_per_second: row.images_per_second,
        images_seen: count(row.images_seen, "images_seen")?,
        ledger: row.ledger,
        skipped: count(row.skipped, "skipped")?,
        scalars: record::of_row(row.scalars)?,
        epoch: finite(row.epoch, "epoch")?,
        profile: profiles.into_iter().map(profile_from_wire).collect::<Result<_, _>>()?,
        gpu_memory_bytes: row.gpu_memory_bytes,
        gpu_utilisation: row.gpu_utilisation,
    })
}

fn file_to_wire(file: StoredFile) -> wire::StoredFile {
    wire::StoredFile { file: file.file, bytes: file.bytes, blake3: file.blake3 }
}

fn file_from_wire(file: wire::StoredFile) -> Result<StoredFile, Malformed> {
    // The name becomes part of a path on the coordinator's machine.
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let file_name = within(file.file, bounds::NAME, "file")?;
    // A dot would begin a hidden file or a draft, and `..` leads out of the folder.
    if file_name.is_empty() || file_name.starts_with('.') || !file_name.chars().all(allowed) {
        return Err(Malformed(format!("{file_name:?} is not the name of a checkpoint's file")));
    }
    Ok(StoredFile { file: file_name, bytes: count(file.bytes, "bytes")?, blake3: digest(file.blake3)? })
}

fn digest(hex: String) -> Result<String, Malformed> {
    // One form only: digests are compared as texts.
    let is_digest = hex.len() == 64 && hex.bytes().all(|c| c.is_ascii_hexdigit());
    is_digest.then_some(hex).ok_or_else(|| malformed("a digest is 64 hexadecimal digits"))
}

fn stretch_to_wire(stretch: Stretch) -> wire::Stretch {
    let Stretch { start, len, ends, subtrees } = stretch;
    wire::Stretch { start, bytes: len, ends, subtrees: subtrees.into_flattened() }
}

fn share_from_wire(total: u64, stretches: Vec<wire::Stretch>) -> Result<Share, Malformed> {
    let stretches = list(stretches, bounds::STRETCHES, "stretches")?.into_iter().map(stretch_from_wire);
    Ok(Share { total: count(total, "digest_bytes")?, stretches: stretches.collect::<Result<_, _>>()? })
}

fn stretch_from_wire(stretch: wire::Stretch) -> Result<Stretch, Malformed> {
    let (hashes, []) = stretch.subtrees.as_chunks() else {
        return Err(malformed("hashes of subtrees that are not 32 bytes each"));
    };
    Ok(Stretch {
        start: count(stretch.start, "start")?,
        len: count(stretch.bytes, "bytes")?,
        subtrees: list(hashes.to_vec(), bounds::SUBTREES, "subtrees")?,
        ends: list(stretch.ends, bounds::ENDS, "ends")?,
    })
}

// ---- The coordinator's messages

impl ToWorker {
    /// Converts the message to the wire.
    pub fn to_wire(self, term: Term) -> wire::SessionResponse {
        use wire::session_response::Message;
        let message = match self {
            ToWorker::Welcome(welcome) => Message::Welcome(wire::Welcome {
                worker: welcome.worker.0,
                run: welcome.run,
                job_toml: welcome.job.to_toml(),
                storage: welcome.storage,
                condemned: welcome.condemned.0,
            }),
            ToWorker::Assignment(assignment) => Message::Assignment(assignment_to_wire(assignment)),
            ToWorker::Plan(plan) => {
                let kind = match plan.kind {
                    PlanKind::Regroup => wire::PlanKind::Regroup,
                    PlanKind::Stop => wire::PlanKind::Stop,
                };
                Message::Plan(wire::Plan { number: plan.number, kind: kind.into() })
            }
            ToWorker::Abort { generation, reason, probe, condemned } => {
                Message::Abort(wire::Abort { generation: generation.0, reason, probe, condemned })
            }
            ToWorker::Addresses(generation, addresses) => Message::Addresses(wire::Addresses {
                generation: generation.0,
                addresses: addresses.into_iter().map(Option::unwrap_or_default).collect(),
            }),
            ToWorker::MetricsRecorded(step) => Message::MetricsRecorded(wire::MetricsRecorded { step }),
            ToWorker::MetricsWanted(step) => Message::MetricsWanted(wire::MetricsWanted { step }),
            ToWorker::Reject(reason) => Message::Reject(wire::Reject { reason }),
            ToWorker::Release { complete } => Message::Release(wire::Release { complete }),
            ToWorker::EvaluationsRecorded(steps) => {
                Message::EvaluationsRecorded(wire::EvaluationsRecorded { steps })
            }
            ToWorker::Pulse => Message::Pulse(wire::Pulse {}),
            ToWorker::CheckpointRecorded(step, phase) => {
                Message::CheckpointRecorded(wire::CheckpointRecorded { step, phase })
            }
        };
        wire::SessionResponse { term: term.0, message: Some(message) }
    }

    /// Converts a message from the wire, with its term.
    pub fn from_wire(response: wire::SessionResponse) -> Result<(Term, ToWorker), Malformed> {
        use wire::session_response::Message;
        let term = Term(response.term);
        let message = match required(response.message, "message")? {
            Message::Welcome(welcome) => ToWorker::Welcome(Box::new(Welcome {
                term,
                worker: WorkerId(count(welcome.worker, "worker")?),
                run: name(welcome.run, "run")?,
                // Whole or not at all: a setting that is not understood would change the result in
                // silence.
                job: Job::from_toml(&welcome.job_toml)?,
                // Not made safe to show: it is an address that has to stay as it is.
                storage: within(welcome.storage, bounds::PATH, "storage")?,
                condemned: generation(welcome.condemned)?,
            })),
            Message::Assignment(assignment) => ToWorker::Assignment(assignment_from_wire(assignment)?),
            Message::Plan(plan) => {
                let kind = match plan.kind() {
                    wire::PlanKind::Regroup => PlanKind::Regroup,
                    wire::PlanKind::Stop => PlanKind::Stop,
                    wire::PlanKind::Unspecified => return Err(malformed("unknown kind of plan")),
                };
                ToWorker::Plan(Plan { number: count(plan.number, "plan")?, kind })
            }
            Message::Abort(abort) => ToWorker::Abort {
                generation: generation(abort.generation)?,
                reason: text(abort.reason),
                probe: abort.probe,
                condemned: abort.condemned,
            },
            Message::Addresses(told) => {
                let addresses = list(told.addresses, bounds::MEMBERS, "addresses")?;
                // Empty stands for none: on the wire the items are plain texts.
                let address = |told: String| Ok(Some(name(told, "address")?).filter(|told| !told.is_empty()));
                let addresses = addresses.into_iter().map(address).collect::<Result<_, Malformed>>()?;
                ToWorker::Addresses(generation(told.generation)?, addresses)
            }
            Message::MetricsRecorded(recorded) => ToWorker::MetricsRecorded(count(recorded.step, "step")?),
            Message::MetricsWanted(wanted) => ToWorker::MetricsWanted(count(wanted.step, "step")?),
            Message::Reject(reject) => ToWorker::Reject(text(reject.reason)),
            Message::Release(release) => ToWorker::Release { complete: release.complete },
            Message::Pulse(_) => ToWorker::Pulse,
            Message::EvaluationsRecorded(recorded) => {
                ToWorker::EvaluationsRecorded(list(recorded.steps, bounds::EVALUATIONS, "steps")?)
            }
            Message::CheckpointRecorded(at) => {
                ToWorker::CheckpointRecorded(count(at.step, "step")?, at.phase)
            }
        };
        Ok((term, message))
    }
}

fn assignment_to_wire(assignment: Assignment) -> wire::Assignment {
    use wire::assignment::Start as WireStart;
    let group = assignment.group;
    let start = match group.start {
        Start::Fresh => WireStart::Fresh(wire::FreshStart {}),
        Start::Healed(source) => WireStart::Healed(wire::HealedStart { source: source.0 }),
        Start::Checkpoint(source, checkpoint) => WireStart::Checkpoint(wire::CheckpointStart {
            source: source.0,
            step: checkpoint.step,
            phase: checkpoint.phase,
            files: checkpoint.files.into_iter().map(file_to_wire).collect(),
            state_digest: checkpoint.state_digest,
        }),
    };
    let without_parts = (0u32..).zip(&group.members).filter(|(_, member)| !member.writes_parts);
    wire::Assignment {
        generation: group.generation.0,
        rank: assignment.rank,
        // Of each member as little as possible: all members are told of all, so what a regroup sends grows
        // with the square of the group.
        workers: group.members.iter().map(|member| member.worker.0).collect(),
        data_shards: group.members.last().map_or(0, |member| member.shards.end),
        without_parts: without_parts.map(|(rank, _)| rank).collect(),
        position: group.position.0,
        start: Some(start),
        skips: group.skips.into_iter().map(|position| position.0).collect(),
        backend: backend_to_wire(group.backend).into(),
    }
}

fn backend_to_wire(backend: Backend) -> wire::Backend {
    match backend {
        Backend::Gloo => wire::Backend::Gloo,
        Backend::Nccl => wire::Backend::Nccl,
    }
}

fn backend_from_wire(backend: wire::Backend) -> Result<Backend, Malformed> {
    match backend {
        wire::Backend::Gloo => Ok(Backend::Gloo),
        wire::Backend::Nccl => Ok(Backend::Nccl),
        wire::Backend::Unspecified => Err(malformed("unknown backend")),
    }
}

fn assignment_from_wire(assignment: wire::Assignment) -> Result<Assignment, Malformed> {
    use wire::assignment::Start as WireStart;
    let position = position(assignment.position)?;
    let backend = backend_from_wire(assignment.backend())?;
    let start = match required(assignment.start, "start")? {
        WireStart::Fresh(_) => Start::Fresh,
        WireStart::Healed(healed) => Start::Healed(Rank(healed.source)),
        WireStart::Checkpoint(from) => {
            let files = list(from.files, bounds::FILES, "files")?;
            let files: Result<_, _> = files.into_iter().map(file_from_wire).collect();
            let checkpoint = Checkpoint {
                position,
                step: count(from.step, "step")?,
                phase: from.phase,
                files: files?,
                state_digest: digest(from.state_digest)?,
            };
            Start::Checkpoint(Rank(from.source), checkpoint)
        }
    };
    let (workers, data_shards) = (assignment.workers, assignment.data_shards);
    let members = members_from_wire(workers, data_shards, &assignment.without_parts)?;
    let source = match &start {
        Start::Healed(source) | Start::Checkpoint(source, _) => source.0,
        Start::Fresh => 0,
    };
    // Both are used as indices into the members.
    if assignment.rank.max(source) as usize >= members.len() {
        return Err(malformed("a rank beyond the group"));
    }
    let skips = list(assignment.skips, bounds::SKIPS, "skips")?;
    Ok(Assignment {
        group: Group {
            generation: generation(assignment.generation)?,
            members,
            position,
            start,
            skips: skips.into_iter().map(Position).collect(),
            backend,
        },
        rank: assignment.rank,
    })
}

fn members_from_wire(
    workers: Vec<u64>,
    data_shards: u32,
    without_parts: &[u32],
) -> Result<Vec<GroupMember>, Malformed> {
    let workers = list(workers, bounds::MEMBERS, "workers")?;
    // Each rank has a shard: `shard_ranges` cuts up no fewer shards than ranks.
    let Some(world_size) = u32::try_from(workers.len()).ok().filter(|size| (1..=data_shards).contains(size))
    else {
        let size = workers.len();
        return Err(Malformed(format!("{size} workers cannot share {data_shards} data shards")));
    };
    let is_ascending = without_parts.is_sorted_by(|rank, next| rank < next);
    if !is_ascending || without_parts.last().is_some_and(|last| *last >= world_size) {
        return Err(malformed("the ranks without parts are not ascending ranks of the group"));
    }
    let ranks = (0..world_size).zip(workers).zip(shard_ranges(data_shards, world_size));
    let member = |((rank, worker), shards)| {
        let writes_parts = without_parts.binary_search(&rank).is_err();
        Ok(GroupMember { worker: WorkerId(count(worker, "worker")?), shards, writes_parts })
    };
    ranks.map(member).collect()
}

// ---- An operator's messages

/// Checks a coordinator's status and makes its texts safe to show.
///
/// # Errors
/// A name or a list in it is too long.
pub fn checked_status(mut status: wire::GetStatusResponse) -> Result<wire::GetStatusResponse, Malformed> {
    for (text, what) in [
        (&mut status.name, "name"),
        (&mut status.run, "run"),
        (&mut status.stage, "stage"),
        (&mut status.outcome, "outcome"),
        (&mut status.state_digest, "state_digest"),
    ] {
        *text = name(std::mem::take(text), what)?;
    }
    // An operator's program shows these texts in a terminal.
    let workers = list(status.workers, bounds::MEMBERS, "workers")?.into_iter();
    let worker = |worker: wire::WorkerStatus| {
        let (host, device) = (name(worker.host, "host")?, name(worker.device, "device")?);
        Ok(wire::WorkerStatus { host, device, ..worker })
    };
    Ok(wire::GetStatusResponse { workers: workers.map(worker).collect::<Result<_, Malformed>>()?, ..status })
}

#[cfg(test)]
mod tests;
