//! Each test writes a small run that holds, breaks one thing of it, and expects exactly that to be found.
//!
//! The run: 1 term, 4 data shards of 2 samples, 2 phases a step, a row of each step, 20 samples.
//! Generation 1 starts fresh with two workers and commits steps 1 to 4; worker 2 is lost, and
//! generation 2 takes its state from worker 1 and commits steps 5 and 6; then all are lost, and
//! generation 3 starts from the checkpoint of step 6 and commits steps 7 and 8.

use std::fs;
use std::path::PathBuf;

use ganglion_membership::{
    Backend, Cause, Checkpoint, Generation, Group, GroupMember, Position, Rank, Start, StoredFile, Term,
    WorkerId,
};
use ganglion_proto::job::Job;
use ganglion_proto::progress::Progress;
use ganglion_proto::stream::{SampleStream, ledger_term};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::checkpoints::State;
use super::*;
use crate::checkpoints::catalog::Checkpoints;
use crate::checkpoints::retry::Patience;
use crate::job_file::{self, Source};
use crate::journal::{Fact, History, Journal, LEAP};
use crate::records::damage::SetAside;
use crate::startup::recover::recover;

const SAMPLES: u64 = 20;
const PART: &str = "state-00001-of-00001.safetensors";

/// Description of a run, from which its files are written.
struct Story {
    folder: tempfile::TempDir,
    /// `metrics.every_steps` of each term.
    terms: Vec<u64>,
    /// Groups, each with the term that formed it.
    groups: Vec<(u64, Group)>,
    rows: Vec<Value>,
    saved: Vec<Saved>,
    /// Additional events at the end.
    events: Vec<Value>,
}

/// A checkpoint, with its deliberate faults.
struct Saved {
    step: u64,
    /// Newest generation when it was committed.
    generation: u64,
    position: u64,
    ledger: u64,
    /// Digest that replaces the one of its state.
    digest: Option<String>,
    /// Digest in the journal that replaces the manifest's.
    journaled: Option<String>,
}

fn job() -> Job {
    let settings = ["job.steps=8", "job.data_shards=4", "job.shard_batch=2", "metrics.every_steps=1"];
    job_file::read(&Source::Embedded, &settings.map(str::to_string)).unwrap()
}

fn ledger_after(step: u64) -> u64 {
    let mut stream = SampleStream::new(job().job.seed, SAMPLES);
    (0..8 * step).fold(0, |sum: u64, q| sum.wrapping_add(ledger_term(q, stream.sample(q))))
}

fn group(generation: u64, position: u64, start: Start, workers: &[u64]) -> Group {
    let each = 4 / u32::try_from(workers.len()).unwrap();
    let member = |(rank, worker): (u32, &u64)| GroupMember {
        worker: WorkerId(*worker),
        shards: rank * each..(rank + 1) * each,
        writes_parts: true,
    };
    let members = (0..).zip(workers).map(member).collect();
    Group {
        generation: Generation(generation),
        members,
        position: Position(position),
        start,
        skips: Vec::new(),
        backend: Backend::Gloo,
    }
}

fn row(step: u64, generation: u64, world_size: u64) -> Value {
    json!({ "step": step, "images_seen": 8 * step, "ledger": format!("{:016x}", ledger_after(step)),
            "generation": generation, "world_size": world_size, "time": 1.5 })
}

impl Saved {
    fn new(step: u64, generation: u64) -> Saved {
        Saved {
            step,
            generation,
            position: 2 * step,
            ledger: ledger_after(step),
            digest: None,
            journaled: None,
        }
    }

    fn part(&self) -> Vec<u8> {
        let (position, ledger) = (self.position.to_le_bytes(), self.ledger.to_le_bytes());
        let view = |dtype, bytes| TensorView::new(dtype, vec![bytes_of(dtype)], bytes).unwrap();
        let tensors = [
            ("counters.position", view(Dtype::I64, &position[..])),
            ("counters.ledger", view(Dtype::I64, &ledger[..])),
            ("generator.weight", view(Dtype::F32, &[7; 8][..])),
        ];
        safetensors::serialize(tensors, None).unwrap()
    }

    fn checkpoint(&self) -> Checkpoint {
        let content = self.part();
        let digest =
            self.digest.clone().unwrap_or_else(|| State::of(&[content.clone().into()]).unwrap().digest);
        let blake3 = blake3::hash(&content).to_hex().to_string();
        let file = StoredFile { file: PART.to_string(), bytes: content.len() as u64, blake3 };
        Checkpoint {
            position: Position(2 * self.step),
            step: self.step,
            phase: 0,
            files: vec![file],
            state_digest: digest,
        }
    }

    /// The checkpoint as it is journaled and announced.
    fn journaled(&self) -> Checkpoint {
        let checkpoint = self.checkpoint();
        let state_digest = self.journaled.clone().unwrap_or(checkpoint.state_digest.clone());
        Checkpoint { state_digest, ..checkpoint }
    }
}

/// Number of elements in 8 bytes.
fn bytes_of(dtype: Dtype) -> usize {
    if dtype == Dtype::I64 { 1 } else { 2 }
}

impl Story {
    fn new() -> Story {
        let saved = vec![Saved::new(2, 1), Saved::new(6, 2), Saved::new(8, 3)];
        let restored = Start::Checkpoint(Rank(0), saved[1].checkpoint());
        Story {
            folder: tempfile::tempdir().unwrap(),
            terms: vec![1],
            groups: vec![
                (1, group(1, 0, Start::Fresh, &[1, 2])),
                (1, group(2, 8, Start::Healed(Rank(0)), &[1])),
                (1, group(3, 12, restored, &[3])),
            ],
            rows: [(1..=4, 1, 2), (5..=6, 2, 1), (7..=8, 3, 1)]
                .into_iter()
                .flat_map(|(steps, generation, size)| steps.map(move |step| row(step, generation, size)))
                .collect(),
            saved,
            events: vec![json!({ "time": 1.0, "kind": "run_ended", "outcome": "complete" })],
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes the run directory.
    fn write(&self) {
        fs::write(self.path("job.toml"), job_file::render(&job())).unwrap();
        let mut journal = Journal::open(&self.path("journal.sqlite")).unwrap();
        journal.set_fact(Fact::Samples, &SAMPLES.to_string()).unwrap();
        let mut events = Vec::new();
        for every in &self.terms {
            let term = journal.begin_term(*every).unwrap();
            events.push(json!({ "time": 1.0, "kind": "coordinator_started", "term": term.0 }));
        }
        for _ in 0..3 {
            journal.admit(Term(1), "h", 7, None).unwrap();
        }
        for (term, group) in &self.groups {
            journal.form(Term(*term), group, &Cause::Gathered).unwrap();
            events.push(json!({ "time": 1.0, "kind": "generation_formed", "generation": group.generation.0,
                "position": group.position.0, "world_size": group.members.len() }));
            for saved in self.saved.iter().filter(|saved| saved.generation == group.generation.0) {
                self.save(saved);
                let checkpoint = saved.journaled();
                journal.commit(&checkpoint).unwrap();
                events.push(json!({ "time": 1.0, "kind": "checkpoint", "step": saved.step, "phase": 0,
                    "state_digest": checkpoint.state_digest }));
            }
        }
        events.extend(self.events.iter().cloned());
        self.write_lines("events.jsonl", &events);
        self.write_lines("metrics.jsonl", &self.rows);
    }

    fn save(&self, saved: &Saved) {
        let address = self.path("checkpoints").display().to_string();
        let checkpoint = saved.checkpoint();
        let folder = self.path("checkpoints").join(checkpoint.folder());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(PART), saved.part()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let storage = Checkpoints::open(&address, "run", &Patience::silent()).await.unwrap();
            storage.commit(&checkpoint, || true).await.unwrap();
        });
    }

    fn write_lines(&self, name: &str, lines: &[Value]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(self.path(name), text).unwrap();
    }

    fn report(&self) -> Report {
        judge(&Evidence::read(self.folder.path()).unwrap(), &Progress::off()).unwrap()
    }

    #[track_caller]
    fn holds(&self) -> String {
        let report = self.report();
        assert!(report.holds(), "{report}");
        report.to_string()
    }

    /// Asserts that exactly one claim is broken, and for this reason.
    #[track_caller]
    fn breaks(&self, statement: &str, what: &str) {
        let report = self.report();
        let broken: Vec<&Claim> = report.0.iter().filter(|claim| !claim.breaches.is_empty()).collect();
        let statements: Vec<&str> = broken.iter().map(|claim| claim.statement).collect();
        assert_eq!(statements, [statement], "{report}");
        assert!(broken[0].breaches[0].contains(what), "{what:?} is not in {:?}", broken[0].breaches[0]);
    }
}

#[test]
fn an_untouched_run_holds() {
    let story = Story::new();
    story.write();
    let report = story.holds();
    let lines: Vec<&str> = report.lines().collect();
    assert!(lines.iter().all(|line| line.starts_with("ok    ")), "{report}");
    for figures in [
        "1 term, 3 generations, 3 workers",
        "1 from step 0, 1 from a member's state, 1 from a checkpoint",
        "8 rows up to step 8, 8 of them due",
        "64 numbers, 3.200 epochs of 20 samples, in 8 rows and 3 checkpoints",
        "3 present; 0 removed since",
    ] {
        assert!(report.contains(figures), "{figures:?} is not in\n{report}");
    }
}

const TERMS: &str = "terms and generations only grow";

#[test]
fn records_of_a_newer_version_are_not_judged() {
    let story = Story::new();
    story.write();
    let mut events = fs::read_to_string(story.path("events.jsonl")).unwrap();
    events.push_str("{\"time\":9.0,\"kind\":\"coordinator_started\",\"term\":9,\"format\":2}\n");
    fs::write(story.path("events.jsonl"), events).unwrap();
    let refused = Evidence::read(&story.path("")).err().unwrap().to_string();
    assert!(refused.contains("their format is 2, and this version knows none above 1"), "{refused}");
}

#[test]
fn steps_are_counted_by_the_journal_and_in_an_earlier_one_as_the_jobs_gan_takes_them() {
    let story = Story::new();
    story.write();
    let per_step = || Evidence::read(&story.path("")).unwrap().job.samples_per_step();
    let earlier = per_step();
    story.holds();
    let mut journal = Journal::open(&story.path("journal.sqlite")).unwrap();
    for (shape, expected) in [("[2,[0]]", earlier), ("[2,[0,1]]", 2 * earlier), ("[2,[2]]", earlier)] {
        journal.set_fact(Fact::Shape, shape).unwrap();
        assert_eq!(per_step(), expected, "{shape}");
    }
    story.holds();
}

#[test]
fn a_generation_of_an_unknown_term_is_found() {
    let mut story = Story::new();
    story.groups[2].0 = 2;
    story.write();
    story.breaks(TERMS, "generation 3 is of term 2, which never began");
}

#[test]
fn a_term_that_goes_back_is_found() {
    let mut story = Story::new();
    story.terms = vec![1, 1];
    story.groups[1].0 = 2;
    story.write();
    story.breaks(TERMS, "generation 3 is of term 1, the one before it of term 2");
}

const SHARDS: &str = "each generation deals every data shard to one worker";

#[test]
fn a_gap_between_shards_is_found() {
    let mut story = Story::new();
    story.groups[0].1.members[1].shards = 3..4;
    story.write();
    story.breaks(SHARDS, "generation 1 deals shards 3..4 to rank 1, where 2 is the next");
}

#[test]
fn a_shard_that_is_left_over_is_found() {
    let mut story = Story::new();
    story.groups[1].1.members[0].shards = 0..3;
    story.write();
    story.breaks(SHARDS, "generation 2 deals shards up to 3 of 4");
}

#[test]
fn a_member_that_was_not_admitted_or_is_there_twice_is_found() {
    let mut story = Story::new();
    story.groups[2].1.members[0].worker = WorkerId(9);
    story.write();
    story.breaks(SHARDS, "worker 9, who was not admitted");
    let mut story = Story::new();
    story.groups[0].1.members[1].worker = WorkerId(1);
    story.write();
    story.breaks(SHARDS, "generation 1 has worker 1 twice");
}

const EVENTS: &str = "events agree with the journal";

#[test]
fn an_event_that_tells_of_something_else_is_found_and_a_missing_one_is_counted() {
    for (find, instead) in [("\"position\":8", "\"position\":9"), ("\"world_size\":2", "\"world_size\":1")] {
        let story = Story::new();
        story.write();
        let text = fs::read_to_string(story.path("events.jsonl")).unwrap();
        fs::write(story.path("events.jsonl"), text.replace(find, instead)).unwrap();
        story.breaks(EVENTS, "events.jsonl has generation");
    }
    let story = Story::new();
    story.write();
    let text = fs::read_to_string(story.path("events.jsonl")).unwrap();
    let fewer: Vec<&str> = text.lines().filter(|line| !line.contains("\"generation\":2")).collect();
    fs::write(story.path("events.jsonl"), fewer.join("\n") + "\n").unwrap();
    assert!(
        story.holds().contains("2 of generations and 3 of checkpoints; 1 in the journal without an event")
    );
}

#[test]
fn a_torn_last_line_is_no_breach_and_a_damaged_one_is() {
    let story = Story::new();
    story.write();
    for name in ["events.jsonl", "metrics.jsonl"] {
        let text = fs::read_to_string(story.path(name)).unwrap();
        fs::write(story.path(name), format!("{text}{{\"step\":9,")).unwrap();
        story.holds();
        fs::write(story.path(name), &text).unwrap();
    }
    let text = fs::read_to_string(story.path("events.jsonl")).unwrap();
    fs::write(story.path("events.jsonl"), format!("garbage\n{text}")).unwrap();
    story.breaks(EVENTS, "events.jsonl:1 cannot be read");
}

const STARTS: &str = "each generation starts where its state was";

#[test]
fn a_position_that_goes_back_without_a_checkpoint_is_found() {
    let mut story = Story::new();
    story.groups[1].1.position = Position(4);
    story.write();
    story.breaks(STARTS, "generation 2 at position 4: the ones before it had reached 8");
}

/// All members that had more are gone.
#[test]
fn a_healed_start_may_be_behind_what_only_the_lost_have_held() {
    let mut story = Story::new();
    story.groups[1].1.position = Position(4);
    for (number, member) in (100..).zip(&mut story.groups[1].1.members) {
        member.worker = WorkerId(number);
    }
    story.write();
    let report = story.report().to_string();
    assert!(!report.contains("had reached"), "{report}");
}

/// The member that was one phase ahead reported a step and was lost.
#[test]
fn a_healed_start_may_be_one_phase_behind() {
    let mut story = Story::new();
    story.groups[1].1.position = Position(7);
    story.write();
    story.holds();
    story.groups[1].1.position = Position(6);
    let mut again = Story::new();
    again.groups[1].1.position = Position(6);
    again.write();
    again.breaks(STARTS, "had reached 8");
}

#[test]
fn a_start_that_nobody_can_have_had_is_found() {
    let broken = |start: Start, position: u64, what: &str| {
        let mut story = Story::new();
        story.groups[2].1.start = start;
        story.groups[2].1.position = Position(position);
        story.write();
        story.breaks(STARTS, what);
    };
    broken(Start::Fresh, 12, "a fresh start is at 0");
    broken(Start::Healed(Rank(1)), 12, "its state is from rank 1 of 1");
    let of = |step, generation| Start::Checkpoint(Rank(0), Saved::new(step, generation).checkpoint());
    broken(of(5, 2), 10, "a checkpoint of step 5, phase 0 was never journaled");
    broken(of(6, 2), 10, "the checkpoint of step 6, phase 0 is at 12");
    let other = Checkpoint { state_digest: "e".repeat(64), ..Saved::new(6, 2).checkpoint() };
    broken(Start::Checkpoint(Rank(0), other), 12, "has another digest");
    let mut story = Story::new();
    story.saved[1].generation = 3;
    story.write();
    story.breaks(STARTS, "the checkpoint of step 6, phase 0 was journaled later");
    let mut story = Story::new();
    story.groups[0].1.start = Start::Healed(Rank(0));
    story.write();
    story.breaks(STARTS, "nobody before it can have held a state");
}

#[test]
fn a_start_from_an_older_checkpoint_holds_and_what_it_repeats_is_counted() {
    let mut story = Story::new();
    story.groups[2].1 = group(3, 4, Start::Checkpoint(Rank(0), Saved::new(2, 1).checkpoint()), &[3]);
    story.write();
    assert!(story.holds().contains("4 rows computed again after a start from an earlier checkpoint"));
    story.events.insert(
        0,
        json!({ "time": 1.0, "kind": "metrics_breach", "detail": "step 5 was recomputed otherwise" }),
    );
    let again = Story { folder: tempfile::tempdir().unwrap(), ..story };
    again.write();
    again.breaks("steps that were computed again gave the same rows", "step 5 was recomputed otherwise");
}

const ROWS: &str = "every reported step has one row";

#[test]
fn a_missing_row_is_found() {
    // In the middle of a generation, at the end of one that was a source of state, at the end of
    // the run.
    for step in [2, 4, 8] {
        let mut story = Story::new();
        story.rows.remove(step - 1);
        story.write();
        story.breaks(ROWS, &format!("metrics.jsonl lacks step {step}"));
    }
}

#[test]
fn a_doubled_row_is_found() {
    let mut story = Story::new();
    story.rows.push(story.rows[2].clone());
    story.write();
    story.breaks(ROWS, "metrics.jsonl has step 3 twice");
}

#[test]
fn a_row_that_comes_late_holds() {
    let mut story = Story::new();
    story.rows.swap(2, 3);
    story.write();
    story.holds();
}

#[test]
fn each_term_reports_by_its_own_cadence() {
    let mut story = Story::new();
    story.terms = vec![2, 3];
    story.groups[2].0 = 2;
    story.rows.retain(|row| [2, 4, 6, 8].contains(&row["step"].as_u64().unwrap()));
    story.write();
    assert!(story.holds().contains("4 rows up to step 8, 4 of them due"));
    story.rows.remove(1);
    let again = Story { folder: tempfile::tempdir().unwrap(), ..story };
    again.write();
    again.breaks(ROWS, "metrics.jsonl lacks step 4");
}

const OWNERS: &str = "each row is of a generation that can have committed it";

#[test]
fn a_row_of_a_generation_that_cannot_have_committed_it_is_found() {
    let broken = |key: &str, value: u64, what: &str| {
        let mut story = Story::new();
        story.rows[4][key] = json!(value);
        story.write();
        story.breaks(OWNERS, what);
    };
    broken("generation", 3, "step 5 is of generation 3, which started after it, at position 12");
    broken("generation", 9, "step 5 is of generation 9, which was never formed");
    broken("world_size", 2, "step 5 tells of 2 workers, generation 2 had 1");
    broken("images_seen", 41, "step 5 tells of 41 images, the job takes 40");
}

const SAMPLES_ONCE: &str = "every number of the sample stream was committed once, as its sample";

/// The stream after an exclusion covers the remaining samples, and the audit reports the exclusion.
#[test]
fn samples_that_are_left_out_are_reckoned_with_and_told() {
    let job = {
        let out = "data.exclusion=[{after_step = 4, files = [\"b.png\", \"a.png\"]}]".to_string();
        let settings = ["job.steps=8", "job.data_shards=4", "job.shard_batch=2", "metrics.every_steps=1"]
            .map(str::to_string);
        job_file::read(&Source::Embedded, &[&settings[..], &[out]].concat()).unwrap()
    };
    let mut stream = SampleStream::with_changes(0, SAMPLES, &job.changes([7, 3].into_iter()));
    let mut after =
        |step: u64| (0..8 * step).fold(0, |sum: u64, q| sum.wrapping_add(ledger_term(q, stream.sample(q))));
    let mut story = Story::new();
    for (row, step) in story.rows.iter_mut().zip(1..) {
        row["ledger"] = json!(format!("{:016x}", after(step)));
    }
    for saved in &mut story.saved {
        saved.ledger = after(saved.step);
    }
    story.groups[2].1.start = Start::Checkpoint(Rank(0), story.saved[1].checkpoint());
    story.write();
    fs::write(story.path("job.toml"), job_file::render(&job)).unwrap();
    story.breaks(SAMPLES_ONCE, "does not know which samples");
    Journal::open(&story.path("journal.sqlite")).unwrap().set_fact(Fact::LeftOut, "[7,3]").unwrap();
    let report = story.holds();
    assert!(report.contains("3 checkpoints; left out after step 4: b.png, a.png"), "{report}");
    Journal::open(&story.path("journal.sqlite")).unwrap().set_fact(Fact::LeftOut, "[7,4]").unwrap();
    story.breaks(SAMPLES_ONCE, "step 5, has");
}

#[test]
fn a_wrong_ledger_is_found() {
    // A checksum of another step, and one that is none.
    let mut story = Story::new();
    story.rows[2]["ledger"] = json!(format!("{:016x}", ledger_after(2)));
    story.write();
    story.breaks(SAMPLES_ONCE, "metrics.jsonl, step 3, has");
    let mut story = Story::new();
    story.rows[2]["ledger"] = json!("");
    story.write();
    story.breaks(ROWS, "metrics.jsonl:3 cannot be read: a checksum has 16 hexadecimal digits");
    let mut story = Story::new();
    story.saved[0].ledger += 1;
    story.write();
    story.breaks(SAMPLES_ONCE, "checkpoint step-00000002 has");
}

#[test]
fn a_flipped_byte_in_a_part_is_found() {
    let story = Story::new();
    story.write();
    let part = story.path("checkpoints/step-00000006").join(PART);
    let mut content = fs::read(&part).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(&part, content).unwrap();
    story.breaks(
        "every file of a checkpoint has its manifest's hash",
        "checkpoint step-00000006: state-00001-of-00001",
    );
    fs::remove_file(&part).unwrap();
    story.breaks(
        "every file of a checkpoint has its manifest's hash",
        "checkpoint step-00000006: state-00001-of-00001",
    );
}

#[test]
fn a_state_with_another_digest_or_position_is_found() {
    let states = "every state in a checkpoint has its manifest's digest and position";
    let mut story = Story::new();
    story.saved[2].digest = Some("e".repeat(64));
    story.write();
    story.breaks(states, "checkpoint step-00000008: its tensors give");
    let mut story = Story::new();
    // The same numbers were committed after the discriminator's phase of a step and after the step.
    story.saved[2].position -= 1;
    story.write();
    story.breaks(states, "its state is at position 15, its manifest at 16");
}

#[test]
fn a_checkpoint_that_is_not_as_journaled_is_found_and_a_removed_one_is_counted() {
    let journal = "every checkpoint is as it was journaled";
    let mut story = Story::new();
    story.saved[2].journaled = Some("e".repeat(64));
    story.write();
    story.breaks(journal, "checkpoint step-00000008 is journaled with digest eeee");
    let story = Story::new();
    story.write();
    story.save(&Saved::new(9, 3));
    story.breaks(journal, "checkpoint step-00000009 was never journaled");
    fs::remove_dir_all(story.path("checkpoints/step-00000009")).unwrap();
    // Workers that were cut off wrote it, and no coordinator went on from it.
    story.save(&Saved::new(4, 1));
    story.save(&Saved::new(8, 3));
    assert!(story.holds().contains(
        "3 present; 0 removed since, or not written yet; 1 written by workers without a coordinator"
    ));
    fs::remove_dir_all(story.path("checkpoints/step-00000004")).unwrap();
    fs::remove_dir_all(story.path("checkpoints/step-00000002")).unwrap();
    assert!(story.holds().contains("2 present; 1 removed since"));
}

#[test]
fn a_latest_that_is_behind_or_names_nothing_is_found() {
    let latest = "latest names the newest checkpoint";
    let story = Story::new();
    story.write();
    fs::write(story.path("checkpoints/latest"), "step-00000006\n").unwrap();
    story.breaks(latest, "latest names step-00000006 at position 12, though one at 16 was committed");
    fs::write(story.path("checkpoints/latest"), "step-00000007\n").unwrap();
    story.breaks(latest, "latest names step-00000007, which is no checkpoint");
    fs::remove_file(story.path("checkpoints/latest")).unwrap();
    story.breaks(latest, "there is no latest");
}

/// A start reported that the newest was gone, and went on from the one before.
#[test]
fn a_latest_that_went_back_because_the_newest_was_gone_holds() {
    for kind in ["checkpoint_damaged", "checkpoint_missing"] {
        let mut story = Story::new();
        story.events.insert(0, json!({ "time": 1.0, "kind": kind, "folder": "step-00000008" }));
        story.write();
        fs::write(story.path("checkpoints/latest"), "step-00000006\n").unwrap();
        story.holds();
    }
}

#[test]
fn rows_that_were_set_aside_are_told_and_others_are_missing() {
    let aside = |steps: Vec<(u64, u64)>| SetAside {
        file: "metrics.jsonl".to_string(),
        aside: "metrics.jsonl.damaged-1".to_string(),
        kept: 6,
        lost: 1,
        steps,
    };
    let mut story = Story::new();
    story.rows.drain(2..4);
    story.write();
    let journal = || Journal::open(&story.path("journal.sqlite")).unwrap();
    journal().set_aside(&aside(vec![(3, 3)])).unwrap();
    story.breaks(ROWS, "metrics.jsonl lacks step 4");
    journal().set_aside(&aside(vec![(3, 4)])).unwrap();
    let report = story.holds();
    for part in [
        "6 rows up to step 8, 8 of them due",
        "2 that were due are lost",
        "set aside as metrics.jsonl.damaged-1",
    ] {
        assert!(report.contains(part), "{part:?} is not in\n{report}");
    }
}

fn with_journal_read(story: &Story) -> History {
    History::read(&story.path("journal.sqlite")).unwrap()
}

/// Each page of the journal in turn is zeroed, then the whole file is missing.
#[test]
fn a_recovered_run_goes_on_far_above_and_tells_what_is_lost() {
    for page in 0.. {
        let story = Story::new();
        story.write();
        let journal = story.path("journal.sqlite");
        let mut damaged = fs::read(&journal).unwrap();
        let is_last = page * 4096 >= damaged.len();
        if is_last {
            fs::remove_file(&journal).unwrap();
        } else {
            damaged[page * 4096..(page + 1) * 4096].fill(0);
            fs::write(&journal, &damaged).unwrap();
        }
        let told: Value = serde_json::from_str(&recover(story.folder.path(), true).unwrap()).unwrap();
        assert_eq!((told["checkpoints"].as_u64(), told["step"].as_u64()), (Some(3), Some(8)), "{told}");
        let aside = fs::read(story.path("journal.sqlite.damaged-1"));
        assert!(is_last || aside.unwrap() == damaged, "page {page}");
        let report = story.holds();
        assert!(report.contains("the journal was recovered"), "{report}");
        let mut recovered = Journal::open(&journal).unwrap();
        let floor = told["floor"].as_u64().unwrap();
        assert!(floor >= LEAP && recovered.last_generation().unwrap() == Generation(floor));
        let group = recovered.last_group().unwrap().unwrap();
        assert_eq!((group.generation, group.members.len()), (Generation(floor), 0), "nobody is taken over");
        assert_eq!(recovered.begin_term(1).unwrap(), Term(floor + 1));
        assert_eq!(recovered.admit(Term(floor + 1), "h", 7, None).unwrap(), WorkerId(floor + 1));
        assert_eq!(recovered.fact(Fact::Run).unwrap().as_deref(), Some("run"));
        drop(recovered);
        // A second recovery continues above the first.
        let again: Value = serde_json::from_str(&recover(story.folder.path(), true).unwrap()).unwrap();
        assert_eq!(again["floor"].as_u64(), Some(floor + LEAP));
        assert_eq!(with_journal_read(&story).checkpoints.len(), 3);
        if is_last {
            return;
        }
    }
}

#[test]
fn a_run_without_checkpoints_or_with_a_coordinator_is_not_recovered() {
    let story = Story::new();
    story.write();
    let refused = |story: &Story| recover(story.folder.path(), false).unwrap_err();
    let before = fs::read(story.path("journal.sqlite")).unwrap();
    let held = crate::run_dir::RunDir::hold(story.folder.path()).unwrap();
    let refusal = refused(&story);
    assert_eq!((refusal.exit_code(), refusal.to_string().contains("held by another")), (1, true));
    drop(held);
    fs::rename(story.path("checkpoints"), story.path("away")).unwrap();
    let refusal = refused(&story);
    assert_eq!((refusal.exit_code(), refusal.to_string().contains("no checkpoint is there")), (2, true));
    assert!(fs::read(story.path("journal.sqlite")).unwrap() == before);
    fs::rename(story.path("away"), story.path("checkpoints")).unwrap();
    fs::remove_file(story.path("job.toml")).unwrap();
    assert_eq!(refused(&story).exit_code(), 2);
}

#[test]
fn a_folder_that_is_no_run_directory_is_named() {
    let story = Story::new();
    let error = audit(story.folder.path(), &Progress::off()).unwrap_err().to_string();
    for part in ["not a run directory", "job.toml", "runs/mnist-mlp"] {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
    story.write();
    fs::write(story.path("job.toml"), "nonsense").unwrap();
    assert!(
        audit(story.folder.path(), &Progress::off()).unwrap_err().to_string().contains("restore the file")
    );
}

#[test]
fn a_run_without_a_group_holds() {
    let story =
        Story { terms: vec![1], groups: Vec::new(), rows: Vec::new(), saved: Vec::new(), ..Story::new() };
    story.write();
    story.holds();
}
