use std::time::Duration;

use super::*;
use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, StoredFile, WrittenPart};
use crate::digest::Share;
use crate::events::{GroupMember, PlanKind};

#[derive(Clone, Debug, PartialEq, Eq)]
struct StepRow(u64);

impl Row for StepRow {
    fn step(&self) -> u64 {
        self.0
    }
}

type Commands = Vec<Command<StepRow>>;

/// A member in a group of two, with 2 phases in a step and 5 steps.
struct Test {
    member: Member<StepRow>,
    now: Time,
}

fn seconds(seconds: u64) -> Time {
    Duration::from_secs(seconds)
}

fn limits() -> Limits {
    Limits::derive(seconds(5))
}

fn group(generation: u64, position: u64, start: Start) -> Group {
    let member = |worker| GroupMember { worker: WorkerId(worker), shards: 0..1, writes_parts: true };
    Group {
        generation: Generation(generation),
        members: vec![member(1), member(2)],
        position: Position(position),
        start,
        skips: Vec::new(),
        backend: Backend::Gloo,
    }
}

fn healed(generation: u64, position: u64) -> Group {
    group(generation, position, Start::Healed(Rank(0)))
}

fn checkpoint(step: u64) -> Checkpoint {
    let position = Position(2 * step);
    Checkpoint { position, step, phase: 0, files: Vec::new(), state_digest: "d".to_string() }
}

fn part(step: u64) -> WrittenPart {
    let file = StoredFile { file: "state-0".to_string(), bytes: 1, blake3: "h".to_string() };
    WrittenPart { step, phase: 0, index: 0, count: 1, file, fingerprint: 7, share: Share::default() }
}

fn rest(position: u64) -> Rested {
    Rested { position: Some(Position(position)), finished: None }
}

const NOTHING: Rested = Rested { position: None, finished: None };

impl Test {
    /// A member that has joined.
    fn joined() -> Test {
        let mut test = Test { member: Member::new(Time::ZERO, limits()), now: Time::ZERO };
        test.welcome(1, 1, 0);
        assert_eq!(test.take(Event::Loaded { sees_storage: true }), [Command::Tell(Report::Loaded)]);
        test
    }

    /// A member that trains in generation 1, from the start of the job.
    fn training() -> Test {
        let mut test = Test::joined();
        test.take(Event::Assigned(group(1, 0, Start::Fresh)));
        assert_eq!(test.take(Event::Formed), [Command::SyncState]);
        assert_eq!(test.synced(), [Command::Run { until: Position(10) }]);
        test
    }

    fn take(&mut self, event: Event<StepRow>) -> Commands {
        let mut commands = Vec::new();
        self.member.handle(self.now, event, &mut commands);
        commands
    }

    fn welcome(&mut self, term: u64, worker: u64, condemned: u64) -> Commands {
        let (term, worker, condemned) = (Term(term), WorkerId(worker), Generation(condemned));
        self.take(Event::Welcomed(Welcome { term, worker, condemned, limits: limits() }))
    }

    fn synced(&mut self) -> Commands {
        self.take(Event::Synced(Schedule { end: Position(10), phases_per_step: 2 }))
    }

    /// Commits a phase for which all proposed the plan that this member proposes.
    fn commit(&mut self, position: u64) -> Commands {
        let agreed = self.member.propose();
        self.take(Event::Committed { position: Position(position), agreed })
    }

    /// The training thread comes to rest with the state that was committed last.
    fn stop(&mut self, fault: Option<Fault>) -> Commands {
        let held = self.member.held();
        self.take(Event::Stopped { held, fault })
    }

    fn row(&mut self, step: u64) -> Commands {
        self.take(Event::Row(StepRow(step)))
    }

    /// Time passes, and each timer fires when it is due.
    fn pass(&mut self, time: Duration) -> Commands {
        let (until, mut commands) = (self.now + time, Vec::new());
        while let Some(next) = self.member.next_deadline().filter(|next| *next <= until) {
            self.now = self.now.max(next);
            commands.extend(self.take(Event::Tick));
        }
        self.now = until;
        commands
    }

    /// Loses the session and says hello again.
    fn hello(&mut self) -> Resume {
        assert_eq!(self.take(Event::Disconnected), []);
        let commands = self.pass(limits().heartbeat);
        let [Command::Connect(hello)] = &commands[..] else { panic!("{commands:?}") };
        hello.resume.expect("it was welcomed before")
    }

    fn abort(&mut self, generation: u64, probe: bool, condemned: bool) -> Commands {
        self.take(Event::Aborted { generation: Generation(generation), probe, condemned })
    }

    fn plan(&mut self, number: u64, kind: PlanKind) {
        assert_eq!(self.take(Event::Planned(Plan { number, kind })), []);
    }
}

fn quiesced(generation: u64, rest: Rested) -> Command<StepRow> {
    Command::Tell(Report::Quiesced(Generation(generation), rest))
}

fn fault(generation: u64, fault: Fault) -> Command<StepRow> {
    Command::Tell(Report::Fault(Generation(generation), fault))
}

#[test]
fn a_member_is_quiesced_only_once_its_training_thread_stopped() {
    let mut test = Test::training();
    assert_eq!(test.commit(1), []);
    assert_eq!(test.abort(1, false, false), [Command::Abort(Generation(1))]);
    // The worker may be in a commit, which is never interrupted.
    assert_eq!(test.hello().rest, None);
    test.welcome(1, 1, 0);
    assert_eq!(test.commit(2), [Command::ReportStep(Reported::Committed)]);
    assert_eq!(test.stop(None), [quiesced(1, rest(2))]);
    assert_eq!(test.hello().rest, Some(rest(2)));
}

#[test]
fn nothing_is_committed_past_the_lease_which_counts_from_the_newest_answered_heartbeat() {
    let (mut test, lease) = (Test::training(), limits().lease);
    assert_eq!(test.member.lease(), Some(lease), "it counts from the hello");
    assert_eq!(test.pass(limits().heartbeat), [Command::Heartbeat, Command::Heartbeat]);
    // The first was sent at the welcome; the answer to the second counts from when that was sent.
    test.take(Event::Pulse);
    test.take(Event::Pulse);
    assert_eq!(test.member.lease(), Some(limits().heartbeat + lease));
    assert!(test.member.may_commit(lease) && !test.member.may_commit(limits().heartbeat + lease));
    let commands = test.pass(lease * 2);
    assert!(commands.ends_with(&[Command::Abort(Generation(1))]), "{commands:?}");
    test.commit(1);
    assert_eq!(test.stop(None), [Command::SaveAlone]);
    assert_eq!(test.take(Event::SavedAlone), [Command::Exit(End::Lost)]);
}

#[test]
fn a_coordinator_that_does_not_answer_is_given_up_and_looked_for_with_growing_pauses() {
    let mut test = Test::joined();
    let before = test.pass(limits().deadline - Duration::from_millis(1));
    assert!(before.iter().all(|command| *command == Command::Heartbeat));
    let after = test.pass(limits().deadline);
    assert_eq!(after[0], Command::Disconnect);
    let attempts = |commands: &Commands| {
        commands.iter().filter(|command| matches!(command, Command::Connect(_))).count()
    };
    assert_eq!(attempts(&after), 2, "an attempt takes half a deadline: {after:?}");
    let none = test.welcome(0, 1, 0);
    assert_eq!(none, [Command::Disconnect], "its term is older");
}

#[test]
fn rows_files_and_evaluations_are_told_until_they_are_recorded_rows_before_files() {
    let mut test = Test::training();
    test.commit(1);
    test.commit(2);
    let (row, file) = (|step| Command::Tell(Report::Row(StepRow(step))), part(1));
    let file_of = |file: &WrittenPart| Command::Tell(Report::Part(Generation(1), file.clone()));
    assert_eq!(test.row(1), [row(1)]);
    assert_eq!(test.row(2), [row(2)]);
    assert_eq!(test.take(Event::PartWritten(Generation(1), file.clone())), [file_of(&file)]);
    test.take(Event::Evaluation(StepRow(1)));
    test.hello();
    let again = test.welcome(1, 1, 0);
    assert_eq!(again, [Command::Tell(Report::Loaded), row(1), row(2), row(1), file_of(&file)]);
    test.take(Event::RowsRecorded(1));
    test.take(Event::EvaluationsRecorded(vec![1]));
    test.take(Event::CheckpointRecorded(1, 0));
    test.hello();
    assert_eq!(test.welcome(1, 1, 0), [Command::Tell(Report::Loaded), row(2)]);
    assert_eq!(test.take(Event::RowsWanted(2)), [row(2)]);
    assert!(test.member.is_evaluated(1) && !test.member.is_evaluated(2));
    // A late report of a recorded one is ignored.
    assert_eq!(test.take(Event::Evaluation(StepRow(1))), []);
    assert_eq!(test.take(Event::PartWritten(Generation(1), file)), []);
}

#[test]
fn a_new_group_hears_all_kept_rows_but_those_that_are_computed_again() {
    let mut test = Test::training();
    (1..=3).for_each(|step| drop(test.row(step)));
    test.abort(1, false, false);
    test.stop(None);
    let commands = test.take(Event::Assigned(healed(2, 4)));
    assert!(matches!(&commands[..], [Command::Begin { .. }, Command::Form]), "{commands:?}");
    test.take(Event::Formed);
    let row = |step| Command::Tell(Report::Row(StepRow(step)));
    let again = [row(1), row(2), Command::ReportStep(Reported::Again), Command::Run { until: Position(10) }];
    assert_eq!(test.synced(), again);
    assert_eq!(test.take(Event::RowOfOthers(StepRow(2))), [], "it keeps that one");
    assert_eq!(test.take(Event::RowOfOthers(StepRow(3))), [row(3)]);
}

#[test]
fn a_stop_ends_the_step_and_a_regroup_the_phase_once_all_agree() {
    let mut test = Test::training();
    test.plan(7, PlanKind::Stop);
    // Not all proposed it.
    assert_eq!(test.member.propose(), 7);
    assert_eq!(test.take(Event::Committed { position: Position(1), agreed: 0 }), []);
    assert_eq!(
        test.commit(2),
        [Command::ReportStep(Reported::Last { stopping: true }), Command::Save { complete: false }]
    );
    assert_eq!(test.take(Event::Saved), [Command::Leave]);
    let finished = Rested { position: Some(Position(2)), finished: Some(false) };
    assert_eq!(test.stop(None), [quiesced(1, finished)]);

    let mut test = Test::training();
    test.plan(7, PlanKind::Regroup);
    assert_eq!(test.member.propose(), 7);
    // The plan of the header counts, not the one that is known when the reduce ends.
    test.plan(8, PlanKind::Stop);
    assert_eq!(test.take(Event::Committed { position: Position(1), agreed: 7 }), [Command::Leave]);
    assert_eq!(test.stop(None), [quiesced(1, rest(1))]);
}

#[test]
fn a_stop_in_the_middle_of_a_step_runs_to_its_end() {
    let mut test = Test::training();
    test.plan(7, PlanKind::Stop);
    assert_eq!(test.commit(1), [Command::Run { until: Position(2) }]);
    let last = [Command::ReportStep(Reported::Last { stopping: true }), Command::Save { complete: false }];
    assert_eq!(test.commit(2), last);
}

#[test]
fn the_end_of_the_job_is_saved_and_told_whatever_is_planned() {
    let mut test = Test::training();
    (1..10).for_each(|position| drop(test.commit(position)));
    test.plan(7, PlanKind::Regroup);
    let last = [Command::ReportStep(Reported::Last { stopping: false }), Command::Save { complete: true }];
    assert_eq!(test.commit(10), last);
    test.take(Event::Saved);
    let finished = Rested { position: Some(Position(10)), finished: Some(true) };
    assert_eq!(test.stop(None), [quiesced(1, finished)]);
    assert_eq!(
        test.take(Event::Dismissed(End::Complete)),
        [Command::Disconnect, Command::Exit(End::Complete)]
    );
}

#[test]
fn what_diverged_is_dropped_and_told_before_the_rest() {
    let mut test = Test::training();
    test.commit(1);
    test.take(Event::PartWritten(Generation(1), part(1)));
    let differs = Fault::Diverged("rank 0 and rank 1".to_string());
    let told = [fault(1, differs.clone()), Command::DropState, quiesced(1, NOTHING)];
    assert_eq!(test.stop(Some(differs.clone())), told);
    assert_eq!(test.take(Event::PartWritten(Generation(1), part(1))), []);
    // In a new session too: the hello says nothing of a rest.
    assert_eq!(test.hello().rest, None);
    let again = [Command::Tell(Report::Loaded), fault(1, differs), quiesced(1, NOTHING)];
    assert_eq!(test.welcome(1, 1, 1), again);
}

#[test]
fn a_state_that_was_condemned_while_nobody_listened_is_dropped_with_the_welcome() {
    let mut test = Test::training();
    test.commit(1);
    test.abort(1, false, false);
    test.stop(None);
    assert_eq!(test.hello().rest, Some(rest(1)));
    assert_eq!(test.welcome(2, 1, 1), [Command::DropState, Command::Tell(Report::Loaded)]);
    assert_eq!(test.hello().rest, Some(NOTHING));

    // A member that still trains drops it once quiesced.
    let mut test = Test::training();
    test.commit(1);
    assert_eq!(test.abort(1, false, true), [Command::Abort(Generation(1))]);
    assert_eq!(test.stop(None), [Command::DropState, quiesced(1, NOTHING)]);
}

#[test]
fn a_group_that_starts_elsewhere_or_further_back_drops_the_state() {
    for (next, drops) in [
        (healed(2, 2), false),
        (healed(2, 3), false),
        (healed(2, 1), true),
        (group(2, 2, Start::Checkpoint(Rank(1), checkpoint(1))), true),
    ] {
        let mut test = Test::training();
        test.commit(1);
        test.commit(2);
        test.stop(Some(Fault::Peer));
        let commands = test.take(Event::Assigned(next));
        assert_eq!(commands[0] == Command::DropState, drops, "{commands:?}");
        assert_eq!(test.member.held().is_none(), drops);
    }
}

#[test]
fn the_source_of_a_checkpoint_reads_it_before_it_meets_the_others() {
    let mut test = Test::joined();
    let from = group(1, 6, Start::Checkpoint(Rank(0), checkpoint(3)));
    let commands = test.take(Event::Assigned(from));
    let [Command::DropState, Command::Begin { .. }, Command::Read(read)] = &commands[..] else {
        panic!("{commands:?}")
    };
    assert_eq!(*read, checkpoint(3));
    assert_eq!(test.take(Event::Read), [Command::Form]);
    assert_eq!(test.member.held(), Some(Position(6)));
    test.take(Event::Formed);
    // The row was reported before the checkpoint was recorded; an evaluation may be missing.
    assert_eq!(test.synced()[0], Command::ReportStep(Reported::FromCheckpoint));
}

#[test]
fn a_newer_generation_takes_the_place_of_one_whose_abort_was_missed() {
    let mut test = Test::training();
    test.commit(1);
    assert_eq!(test.take(Event::Assigned(healed(1, 0))), [], "it has that one");
    assert_eq!(test.take(Event::Assigned(healed(3, 1))), [Command::Abort(Generation(1))]);
    test.plan(9, PlanKind::Regroup);
    let commands = test.stop(Some(Fault::Timeout));
    let [Command::Begin { group, rank, .. }, Command::Form] = &commands[..] else { panic!("{commands:?}") };
    assert_eq!((group.generation, *rank), (Generation(3), Rank(0)));
    test.take(Event::Formed);
    test.synced();
    assert_eq!(test.member.propose(), 9, "the plan was of the newer one");
}

#[test]
fn the_reason_for_leaving_is_told_again_until_there_is_another_generation() {
    let mut test = Test::training();
    test.commit(1);
    let lost = Fault::NonFinite { position: Position(1), detail: "a loss".to_string(), stop: false };
    let told = [fault(1, lost.clone()), quiesced(1, rest(1))];
    assert_eq!(test.stop(Some(lost.clone())), told);
    for _ in 0..2 {
        assert_eq!(test.hello().rest, Some(rest(1)));
        assert_eq!(test.welcome(1, 1, 0), [Command::Tell(Report::Loaded), fault(1, lost.clone())]);
    }
    test.take(Event::Assigned(healed(2, 1)));
    test.hello();
    assert_eq!(test.welcome(1, 1, 0), [Command::Tell(Report::Loaded)]);
}

#[test]
fn a_stranger_gives_its_group_up_before_it_says_that_it_has_loaded() {
    let mut test = Test::training();
    test.commit(1);
    assert_eq!(test.hello().worker, WorkerId(1));
    assert_eq!(test.welcome(2, 8, 0), [Command::Abort(Generation(1))]);
    assert_eq!(test.stop(Some(Fault::Peer)), [Command::Tell(Report::Loaded)]);
    assert_eq!((test.hello().worker, test.hello().rest), (WorkerId(8), Some(rest(1))));
}

#[test]
fn broken_links_are_looked_for_before_the_rest_is_told() {
    // After a timeout.
    let mut test = Test::training();
    assert_eq!(test.stop(Some(Fault::Timeout)), [Command::Probe]);
    assert_eq!(test.hello().rest, None);
    test.welcome(1, 1, 0);
    let links = Fault::Links(vec![Rank(1)]);
    assert_eq!(test.take(Event::Probed(vec![Rank(1)])), [fault(1, links), quiesced(1, rest(0))]);
    // After an abort that asks for it; all answer.
    let mut test = Test::training();
    test.abort(1, true, false);
    assert_eq!(test.stop(None), [Command::Probe]);
    assert_eq!(test.take(Event::Probed(Vec::new())), [quiesced(1, rest(0))]);
    // After groups in a row that did not form.
    for generation in 2..2 + u64::from(UNFORMED) {
        test.take(Event::Assigned(healed(generation, 0)));
        let probes = test.stop(Some(Fault::Peer)) == [Command::Probe];
        assert_eq!(probes, generation == 1 + u64::from(UNFORMED), "{generation}");
    }
    // A coordinator that ends the worker does not wait for the answer.
    let released = test.take(Event::Dismissed(End::Released));
    assert_eq!(released, [Command::Disconnect, Command::Exit(End::Released)]);
}

#[test]
fn a_released_worker_exits_once_its_training_thread_is_at_rest() {
    let mut test = Test::training();
    let released = test.take(Event::Dismissed(End::Released));
    assert_eq!(released, [Command::Disconnect, Command::Abort(Generation(1))]);
    assert_eq!(test.stop(None), [Command::Exit(End::Released)]);
    assert_eq!((test.member.next_deadline(), test.commit(1)), (None, vec![]));
}

#[test]
fn a_worker_that_fails_says_so_and_ends_in_time() {
    let mut test = Test::training();
    let internal = Fault::Internal("no memory".to_string());
    let told = [fault(1, internal.clone()), quiesced(1, rest(0))];
    assert_eq!(test.stop(Some(internal)), told);
    let commands = test.pass(limits().attempt);
    assert_eq!(commands.last(), Some(&Command::Exit(End::Failed("no memory".to_string()))));
}

#[test]
fn wrong_input_is_told_until_the_coordinator_ends_the_worker() {
    let mut test = Test::training();
    let wrong = || Command::Tell(Report::InputWrong("no such file".to_string()));
    assert_eq!(test.take(Event::InputWrong("no such file".to_string())), [wrong()]);
    assert_eq!(test.hello().rest, None, "it is no member that the others could follow");
    assert_eq!(test.welcome(1, 1, 0), [Command::Tell(Report::Loaded), wrong()]);
    assert_eq!(test.take(Event::Dismissed(End::Released)).last(), Some(&Command::Exit(End::Released)));
}

#[test]
fn a_worker_that_is_asked_to_end_says_so_again_and_waits_a_deadline_without_a_coordinator() {
    let mut test = Test::training();
    test.commit(1);
    assert_eq!(test.take(Event::LeaveRequested), [Command::Tell(Report::Leave)]);
    test.pass(limits().deadline / 2);
    test.hello();
    let again = [Command::Tell(Report::Loaded), Command::Tell(Report::Leave)];
    assert_eq!(test.welcome(1, 1, 0), again);
    test.take(Event::Disconnected);
    let commands = test.pass(limits().deadline);
    assert!(commands.contains(&Command::Abort(Generation(1))), "{commands:?}");
    assert_eq!(test.stop(None), [Command::SaveAlone]);
}

#[test]
fn what_the_training_thread_holds_at_rest_is_what_it_took_over_and_not_what_it_had() {
    let mut test = Test::training();
    test.commit(1);
    test.stop(None);
    test.take(Event::Assigned(group(2, 3, Start::Healed(Rank(1)))));
    test.take(Event::Formed);
    // It has the source's state, and the source is lost before all have compared theirs.
    let held = Some(Position(3));
    let told = test.take(Event::Stopped { held, fault: Some(Fault::Peer) });
    assert_eq!(told, [fault(2, Fault::Peer), quiesced(2, rest(3))]);
}
