//! Unit tests of the machine by example. Numbers refer to the invariants of the module.

use std::time::Duration;

use super::locals::{ASIDE, FIT};
use super::*;
use crate::backend::Backend;
use crate::checkpoint::{StoredFile, WrittenPart};
use crate::digest::Share;
use crate::events::{GroupMember, Rested, Start};
use crate::limits::Limits;
use crate::shards::shard_ranges;
use crate::types::{Rank, Term};

const DEADLINE: Duration = Duration::from_secs(5);
const PHASES: u32 = 2;

/// A machine with its virtual time.
struct Bench {
    machine: Machine,
    now: Time,
    /// Whether workers that join are the coordinator's own.
    local: bool,
    /// Progress that live workers report.
    progress: Progress,
}

fn settings(local_workers: u32, data_shards: u32) -> Settings {
    Settings { term: Term(1), local_workers, data_shards, limits: Limits::derive(DEADLINE) }
}

fn facts(cpu: &str) -> LoadedFacts {
    let passport = Passport([("cpu".to_string(), cpu.to_string())].into());
    LoadedFacts {
        passport,
        samples: 100,
        sees_storage: true,
        shape: StepShape::new(PHASES, vec![0]).unwrap(),
        gpu: None,
        host: None,
        left_out: Vec::new(),
    }
}

fn file(index: u32) -> StoredFile {
    StoredFile { file: format!("state-{index}"), bytes: 1, blake3: "h".to_string() }
}

/// A file of the state with this fingerprint, which has nothing in it.
fn part(step: u64, index: u32, fingerprint: u64) -> WrittenPart {
    let share = Share::default();
    WrittenPart { step, phase: 0, index, count: 2, file: file(index), fingerprint, share }
}

fn checkpoint(step: u64) -> Checkpoint {
    Checkpoint {
        position: Position(step * u64::from(PHASES)),
        step,
        phase: 0,
        files: vec![file(0), file(1)],
        state_digest: blake3::hash(b"").to_hex().to_string(),
    }
}

impl Bench {
    fn new(local_workers: u32, data_shards: u32, recovered: Recovered) -> Bench {
        let machine = Machine::new(settings(local_workers, data_shards), recovered);
        let mut bench = Bench { machine, now: Time::ZERO, local: false, progress: Progress::default() };
        let spawned = bench.handle(Event::Started);
        assert_eq!(spawned.iter().filter(|action| **action == Action::Spawn).count(), local_workers as usize);
        bench
    }

    /// Returns a bench with a group of workers 1 to `count` in generation 1.
    fn training(count: u32) -> Bench {
        let mut bench = Bench::new(count, 8, Recovered::default());
        for worker in 1..=u64::from(count) {
            bench.join(worker);
        }
        assert_eq!(bench.generation(), Generation(1));
        bench
    }

    fn handle(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.machine.handle(self.now, event, &mut actions);
        actions
    }

    fn join(&mut self, worker: u64) -> Vec<Action> {
        let mut actions = self.handle(Event::Hello { worker: WorkerId(worker), local: self.local });
        actions.extend(self.handle(Event::Loaded(WorkerId(worker), facts("A"))));
        actions
    }

    fn ready(&mut self, worker: u64, position: u64) -> Vec<Action> {
        let generation = self.generation();
        self.handle(Event::Ready(WorkerId(worker), generation, Some(Position(position))))
    }

    fn finished(&mut self, worker: u64, position: u64) -> Vec<Action> {
        let (worker, generation) = (WorkerId(worker), self.generation());
        self.handle(Event::Finished { worker, generation, position: Position(position), complete: true })
    }

    /// A process ends and is reaped.
    fn end(&mut self, worker: u64) -> Vec<Action> {
        self.handle(reaped(worker))
    }

    /// Lets time pass in small increments, as a shell that is awake sees it, while these workers
    /// send heartbeats.
    fn wait(&mut self, time: Duration, alive: &[u64]) -> Vec<Action> {
        let mut actions = Vec::new();
        for _ in 0..10 {
            self.now += time / 10;
            for worker in alive {
                actions.extend(self.handle(Event::Heartbeat(WorkerId(*worker), self.progress)));
            }
            actions.extend(self.handle(Event::Tick));
        }
        actions
    }

    fn generation(&self) -> Generation {
        self.machine.last_generation
    }
}

fn formed(actions: &[Action]) -> Option<&Group> {
    actions.iter().find_map(|action| match action {
        Action::Form(group, _) => Some(group),
        _ => None,
    })
}

fn ended(actions: &[Action]) -> Option<&Outcome> {
    actions.iter().find_map(|action| match action {
        Action::End(outcome) => Some(outcome),
        _ => None,
    })
}

fn members(group: &Group) -> Vec<u64> {
    group.members.iter().map(|member| member.worker.0).collect()
}

#[test]
fn training_begins_when_all_local_workers_are_loaded() {
    let mut bench = Bench::new(2, 8, Recovered::default());
    assert_eq!(formed(&bench.join(1)), None);
    let actions = bench.join(2);
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position, &group.start), (vec![1, 2], Position(0), &Start::Fresh));
    assert_eq!((group.members[0].shards.clone(), group.members[1].shards.clone()), (0..4, 4..8));
}

#[test]
fn without_local_workers_the_first_that_comes_begins() {
    let mut bench = Bench::new(0, 8, Recovered::default());
    assert_eq!(members(formed(&bench.join(9)).unwrap()), [9]);
}

/// Invariant 1.
#[test]
fn generations_go_on_above_the_journals() {
    let recovered = Recovered {
        dead: vec![WorkerId(7)],
        ..Recovered { group: Some(group(41, &[7])), ..Recovered::default() }
    };
    let mut bench = Bench::new(1, 8, recovered);
    assert_eq!(formed(&bench.join(8)).unwrap().generation, Generation(42));
}

#[test]
fn a_run_with_a_checkpoint_starts_from_it() {
    let recovered = Recovered { checkpoint: Some(checkpoint(30)), ..Recovered::default() };
    let mut bench = Bench::new(1, 8, recovered);
    let actions = bench.join(1);
    let group = formed(&actions).unwrap();
    assert_eq!(group.position, Position(60));
    assert_eq!(group.start, Start::Checkpoint(Rank(0), checkpoint(30)));
}

#[test]
fn another_passport_is_refused_and_told_what_differs() {
    let mut bench = Bench::training(2);
    bench.handle(Event::Hello { worker: WorkerId(3), local: false });
    let actions = bench.handle(Event::Loaded(WorkerId(3), facts("B")));
    let [Action::Reject(WorkerId(3), Rejection::Passport(differences))] = actions.as_slice() else {
        panic!("{actions:?}");
    };
    assert_eq!((differences[0].item.as_str(), differences[0].found.as_str()), ("cpu", "B"));
}

#[test]
fn a_worker_whose_steps_have_another_shape_is_refused() {
    let of = |phases, readers: &[u32]| {
        let shape = StepShape::new(phases, readers.to_vec()).unwrap();
        LoadedFacts { shape, ..facts("A") }
    };
    let run = of(3, &[0, 1]);
    let passport = || Some(run.passport.clone());
    let shape = || Some(run.shape.clone());
    // A new run; one whose earlier version journaled no shape; and one that has it.
    for recovered in [
        Recovered::default(),
        Recovered { passport: passport(), ..Recovered::default() },
        Recovered { passport: passport(), shape: shape(), ..Recovered::default() },
    ] {
        let is_known = recovered.shape.is_some();
        let mut bench = Bench::new(0, 8, recovered);
        let mut refused = |worker, facts: LoadedFacts| {
            bench.handle(Event::Hello { worker: WorkerId(worker), local: false });
            let actions = bench.handle(Event::Loaded(WorkerId(worker), facts));
            let reason = actions.into_iter().find_map(|action| match action {
                Action::Reject(_, Rejection::Passport(differences)) => Some(differences[0].item.clone()),
                _ => None,
            });
            reason.unwrap_or_default()
        };
        if is_known {
            assert_eq!(refused(1, of(2, &[0])), "step");
        }
        assert_eq!(refused(2, run.clone()), "");
        for other in [of(3, &[0, 2]), of(4, &[0, 1]), of(2, &[0])] {
            assert_eq!(refused(3, other), "step");
        }
        assert_eq!(bench.machine.shape(), Some(&run.shape));
    }
}

/// A change of the job changes the items of the samples, and nothing else.
#[test]
fn items_of_samples_that_were_forgotten_are_told_anew_by_the_first() {
    let about = |data: &str, cpu: &str| {
        let items = [("data", data), ("exclusions", data), ("cpu", cpu)];
        let items = items.map(|(item, value)| (item.to_string(), value.to_string()));
        LoadedFacts { passport: Passport(items.into()), ..facts(cpu) }
    };
    let recovered = Recovered { passport: Some(facts("A").passport), ..Recovered::default() };
    let mut bench = Bench::new(0, 8, recovered);
    let mut load = |worker, facts: LoadedFacts| {
        bench.handle(Event::Hello { worker: WorkerId(worker), local: false });
        bench.handle(Event::Loaded(WorkerId(worker), facts))
    };
    let refused = |actions: &[Action]| matches!(actions[0], Action::Reject(_, Rejection::Passport(_)));
    assert!(refused(&load(1, about("new", "B"))));
    let other = Passport([("cpu", "A"), ("else", "x")].map(|(a, b)| (a.to_string(), b.to_string())).into());
    assert!(refused(&load(2, LoadedFacts { passport: other, ..facts("A") })), "nothing else may be added");
    assert_eq!(load(3, about("new", "A"))[0], Action::AdoptPassport(about("new", "A").passport));
    assert!(refused(&load(4, about("old", "A"))));
    assert!(refused(&load(5, facts("A"))), "one that does not know of the change");
}

/// Invariants 2 and 3.
#[test]
fn after_a_loss_the_survivors_go_on_from_the_most_advanced() {
    let mut bench = Bench::training(3);
    let actions = bench.end(2);
    let told = |action: &Action| matches!(action, Action::Abort { workers, .. } if *workers == [WorkerId(1), WorkerId(3)]);
    assert!(actions.iter().any(told), "{actions:?}");
    assert_eq!(formed(&bench.ready(1, 10)), None);
    let actions = bench.ready(3, 11);
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position), (vec![1, 3], Position(11)));
    assert_eq!(group.start, Start::Healed(Rank(1)));
    assert_eq!(group.members.iter().map(|m| m.shards.len()).sum::<usize>(), 8);
}

#[test]
fn a_group_whose_members_come_to_share_a_gpu_goes_on_over_gloo() {
    let mut bench = Bench::new(0, 8, Recovered::default());
    let join = |bench: &mut Bench, worker: u64, gpu: &str| {
        bench.handle(Event::Hello { worker: WorkerId(worker), local: false });
        let facts = LoadedFacts { gpu: Some(gpu.to_string()), ..facts("A") };
        bench.handle(Event::Loaded(WorkerId(worker), facts))
    };
    assert_eq!(formed(&join(&mut bench, 1, "a/0")).unwrap().backend, Backend::Nccl);
    join(&mut bench, 2, "a/0");
    let shared = bench.ready(1, 4);
    assert_eq!(
        formed(&shared).map(|group| (members(group), group.backend)),
        Some((vec![1, 2], Backend::Gloo))
    );
    bench.handle(Event::Leave(WorkerId(2)));
    bench.ready(1, 6);
    let apart = bench.ready(2, 6);
    assert_eq!(formed(&apart).map(|group| (members(group), group.backend)), Some((vec![1], Backend::Nccl)));
}

#[test]
fn workers_of_one_machine_have_neighbouring_ranks() {
    let mut bench = Bench::new(5, 8, Recovered::default());
    let mut last = Vec::new();
    for (worker, host) in (1..).map(WorkerId).zip([Some("b"), Some("a"), None, Some("b"), Some("a")]) {
        bench.handle(Event::Hello { worker, local: true });
        let facts = LoadedFacts { host: host.map(str::to_string), ..facts("A") };
        last = bench.handle(Event::Loaded(worker, facts));
    }
    let group = formed(&last).unwrap();
    assert_eq!(members(group), [1, 4, 2, 5, 3]);
    assert!(group.members.windows(2).all(|pair| pair[0].shards.end == pair[1].shards.start));
}

/// Invariant 3.
#[test]
fn a_checkpoint_that_is_newer_than_every_member_goes_first() {
    let mut bench = Bench::training(2);
    bench.handle(Event::CheckpointCommitted(checkpoint(9)));
    bench.end(1);
    let actions = bench.ready(2, 17);
    assert_eq!(formed(&actions).unwrap().start, Start::Checkpoint(Rank(0), checkpoint(9)));
    bench.handle(Event::Fault(WorkerId(2), Generation(2), Fault::Timeout));
    let actions = bench.ready(2, 18);
    assert_eq!(formed(&actions).unwrap().start, Start::Healed(Rank(0)));
}

/// Returns a generation of an earlier coordinator.
fn group(generation: u64, workers: &[u64]) -> Group {
    let ranges = shard_ranges(8, u32::try_from(workers.len()).unwrap());
    let member = |(worker, shards)| GroupMember { worker: WorkerId(worker), shards, writes_parts: true };
    Group {
        generation: Generation(generation),
        members: workers.iter().copied().zip(ranges).map(member).collect(),
        position: Position(10),
        start: Start::Fresh,
        skips: Vec::new(),
        backend: Backend::Gloo,
    }
}

fn resumed(worker: u64, generation: u64, rest: Option<Rested>) -> Event {
    Event::Resumed { worker: WorkerId(worker), generation: Generation(generation), rest }
}

/// Returns a new coordinator of a run whose generation 4 has workers 1 and 2, with the newest
/// checkpoint at update index 8.
fn taking_over() -> Bench {
    let recovered =
        Recovered { group: Some(group(4, &[1, 2])), checkpoint: Some(checkpoint(4)), ..Recovered::default() };
    Bench::new(0, 8, recovered)
}

impl Bench {
    /// A worker is back and reports its loaded state.
    fn resume(&mut self, worker: u64, rest: Option<Rested>) -> Vec<Action> {
        let generation = self.generation();
        assert!(self.machine.knows(WorkerId(worker), generation));
        let mut actions = self.handle(resumed(worker, generation.0, rest));
        actions.extend(self.handle(Event::Loaded(WorkerId(worker), facts("A"))));
        actions
    }
}

/// Invariant 9.
#[test]
fn a_group_that_is_whole_goes_on_under_a_new_coordinator() {
    let mut bench = taking_over();
    assert_eq!(bench.resume(1, None), [Action::AdoptPassport(facts("A").passport)]);
    assert_eq!(bench.resume(2, None), [Action::Keep]);
    assert_eq!(bench.wait(DEADLINE * 2, &[1, 2]), []);
    assert_eq!(bench.generation(), Generation(4));
}

#[test]
fn a_new_coordinator_goes_on_with_those_that_come_back_in_time() {
    let mut bench = taking_over();
    bench.resume(2, None);
    let actions = bench.wait(DEADLINE * 3 / 2, &[2]);
    assert!(matches!(&actions[..], [Action::Abort { cause: Cause::TakenOver, .. }]), "{actions:?}");
    let actions = bench.ready(2, 30);
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position, group.generation), (vec![2], Position(30), Generation(5)));
    assert!(!bench.machine.knows(WorkerId(1), Generation(4)), "too late: a stranger now");
}

#[test]
fn members_that_rested_without_a_coordinator_regroup_at_once() {
    let mut bench = taking_over();
    let rest = |position| Some(Rested { position: Some(Position(position)), finished: None });
    bench.resume(1, rest(20));
    let actions = bench.resume(2, rest(21));
    let group = formed(&actions).unwrap();
    assert_eq!((group.position, &group.start), (Position(21), &Start::Healed(Rank(1))));
}

#[test]
fn members_that_are_back_at_rest_are_heard_out_before_they_regroup() {
    let recovered =
        Recovered { group: Some(group(4, &[1, 2])), dead: vec![WorkerId(2)], ..Recovered::default() };
    let mut bench = Bench::new(0, 8, recovered);
    let rest = Some(Rested { position: Some(Position(20)), finished: None });
    let actions = bench.handle(resumed(1, 4, rest));
    assert!(formed(&actions).is_none() && ended(&actions).is_none(), "{actions:?}");
    let actions = bench.handle(Event::Loaded(WorkerId(1), facts("A")));
    assert_eq!(formed(&actions).unwrap().position, Position(20));
}

/// Invariant 2: a worker of another machine may train on although nothing is heard of it.
#[test]
fn a_new_coordinator_waits_for_the_lease_before_it_goes_back_to_a_checkpoint() {
    let mut bench = taking_over();
    bench.join(3);
    let lease = Limits::derive(DEADLINE).lease;
    assert_eq!(bench.wait(lease - DEADLINE, &[3]), []);
    let actions = bench.wait(DEADLINE * 2, &[3]);
    assert!(actions.contains(&Action::Search) && formed(&actions).is_none(), "{actions:?}");
    let actions = bench.handle(Event::Searched(None));
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position), (vec![3], Position(8)));
}

#[test]
fn a_member_that_never_heard_of_its_generation_makes_a_new_one() {
    let mut bench = taking_over();
    bench.resume(1, None);
    let rest = Some(Rested { position: Some(Position(10)), finished: None });
    bench.handle(resumed(2, 3, rest));
    let actions = bench.handle(Event::Loaded(WorkerId(2), facts("A")));
    assert!(matches!(&actions[..], [Action::Abort { .. }]), "{actions:?}");
    assert_eq!(members(formed(&bench.ready(1, 10)).unwrap()), [1, 2]);
}

#[test]
fn a_run_that_had_finished_is_closed_by_the_new_coordinator() {
    let mut bench = taking_over();
    let rest = Some(Rested { position: Some(Position(20)), finished: Some(true) });
    bench.resume(1, rest);
    bench.resume(2, rest);
    bench.handle(Event::PartWritten(WorkerId(1), Generation(4), part(10, 0, 7)));
    bench.handle(Event::PartWritten(WorkerId(2), Generation(4), part(10, 1, 7)));
    let actions = bench.handle(Event::CheckpointCommitted(checkpoint(10)));
    assert_eq!(ended(&actions), Some(&Outcome::Complete));
}

#[test]
fn a_stop_that_only_the_last_coordinator_wanted_is_no_stop() {
    let mut bench = taking_over();
    let rest = Some(Rested { position: Some(Position(20)), finished: Some(false) });
    bench.resume(1, rest);
    let actions = bench.resume(2, rest);
    assert_eq!(formed(&actions).unwrap().position, Position(20));
}

/// Invariant 7.
#[test]
fn a_member_that_lost_its_session_is_waited_for_and_goes_on() {
    let mut bench = Bench::training(2);
    assert_eq!(bench.handle(Event::Disconnected(WorkerId(1))), []);
    bench.wait(DEADLINE / 2, &[2]);
    assert_eq!(bench.handle(resumed(1, 1, None)), []);
    assert_eq!(bench.wait(DEADLINE * 2, &[1, 2]), []);
}

#[test]
fn a_member_that_lost_its_session_and_a_peer_is_lost_at_once() {
    for fault_first in [false, true] {
        let mut bench = Bench::training(3);
        let fault = Event::Fault(WorkerId(1), Generation(1), Fault::Peer);
        let disconnected = Event::Disconnected(WorkerId(3));
        let events = if fault_first { [fault, disconnected] } else { [disconnected, fault] };
        events.into_iter().for_each(|event| drop(bench.handle(event)));
        bench.ready(1, 4);
        assert_eq!(members(formed(&bench.ready(2, 4)).unwrap()), [1, 2]);
    }
}

/// The coordinator may be the one that is cut off from the network.
#[test]
fn when_all_are_silent_at_once_nobody_is_told_to_stop() {
    let mut bench = Bench::training(2);
    let actions = bench.wait(DEADLINE * 3 / 2, &[]);
    assert!(!actions.iter().any(|action| matches!(action, Action::Abort { .. })), "{actions:?}");
    bench.resume(1, None);
    assert_eq!(bench.resume(2, None), [Action::Keep]);
}

#[test]
fn a_worker_that_leaves_is_let_go_once_the_others_have_its_position() {
    let mut bench = Bench::training(3);
    let actions = bench.handle(Event::Leave(WorkerId(1)));
    assert!(matches!(&actions[..], [Action::Announce { plan, .. }] if plan.kind == PlanKind::Regroup));
    bench.ready(1, 6);
    bench.ready(2, 6);
    let actions = bench.ready(3, 6);
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position), (vec![2, 3], Position(6)));
    assert_eq!(actions.last(), Some(&Action::Release(WorkerId(1))));
}

#[test]
fn the_only_member_heals_a_spare_before_it_leaves() {
    let mut bench = Bench::new(0, 1, Recovered::default());
    bench.join(1);
    bench.join(2);
    bench.handle(Event::Leave(WorkerId(1)));
    let actions = bench.ready(1, 6);
    assert_eq!(members(formed(&actions).unwrap()), [1], "with one data shard there is no room to heal");
}

#[test]
fn the_only_member_heals_a_joiner_before_it_leaves() {
    let mut bench = Bench::new(0, 8, Recovered::default());
    bench.join(1);
    bench.handle(Event::Leave(WorkerId(1)));
    bench.join(2);
    let actions = bench.ready(1, 6);
    assert_eq!(members(formed(&actions).unwrap()), [1, 2]);
    assert!(actions.iter().any(|action| matches!(action, Action::Announce { .. })), "{actions:?}");
    bench.ready(1, 7);
    let actions = bench.ready(2, 7);
    assert_eq!(members(formed(&actions).unwrap()), [2]);
}

#[test]
fn when_all_leave_they_save_first_and_the_run_waits_for_others() {
    let mut bench = Bench::new(0, 8, Recovered::default());
    bench.join(1);
    let actions = bench.handle(Event::Leave(WorkerId(1)));
    assert!(matches!(&actions[..], [Action::Announce { plan, .. }] if plan.kind == PlanKind::Stop));
    let (worker, generation, position) = (WorkerId(1), Generation(1), Position(20));
    bench.handle(Event::Finished { worker, generation, position, complete: false });
    let actions = bench.handle(Event::CheckpointCommitted(checkpoint(10)));
    assert_eq!(actions, [Action::Close(Generation(1)), Action::Release(WorkerId(1))]);
    assert_eq!(formed(&bench.join(2)).unwrap().position, Position(20));
}

#[test]
fn scaling_starts_workers_and_lets_the_newest_go() {
    let mut bench = training_locally(2);
    let actions = bench.handle(Event::Scale(4));
    assert_eq!(actions, [Action::Spawn, Action::Spawn]);
    let actions = bench.handle(Event::Scale(1));
    assert!(matches!(&actions[..], [Action::Announce { .. }]), "{actions:?}");
    bench.ready(1, 6);
    let actions = bench.ready(2, 6);
    assert_eq!(members(formed(&actions).unwrap()), [1]);
    assert_eq!(actions.last(), Some(&Action::Release(WorkerId(2))));
    bench.end(2);
    bench.join(3);
    assert!(
        !bench.machine.workers().any(|worker| worker == WorkerId(3)),
        "one that was under way is not needed"
    );
}

#[test]
fn a_divergence_rolls_all_back_to_the_newest_checkpoint() {
    let mut bench = Bench::training(2);
    bench.handle(Event::CheckpointCommitted(checkpoint(4)));
    let diverged = Fault::Diverged("rank 0 is not rank 1".to_string());
    let actions = bench.handle(Event::Fault(WorkerId(1), Generation(1), diverged));
    assert_eq!(actions[0], Action::Condemn(Generation(1)));
    bench.ready(1, 20);
    let actions = bench.ready(2, 21);
    let group = formed(&actions).unwrap();
    assert_eq!((group.position, &group.start), (Position(8), &Start::Checkpoint(Rank(0), checkpoint(4))));
}

#[test]
fn what_is_not_finite_rolls_all_back_and_may_be_skipped_from_then_on() {
    let mut bench = Bench::training(2);
    let fault = |stop| Fault::NonFinite { position: Position(20), detail: "step 10".to_string(), stop };
    let actions = bench.handle(Event::Fault(WorkerId(1), Generation(1), fault(false)));
    assert_eq!(actions[..2], [Action::AllowSkip(Position(20)), Action::Condemn(Generation(1))]);
    assert_eq!(bench.handle(Event::Fault(WorkerId(2), Generation(1), fault(false))), []);
    bench.ready(1, 20);
    let actions = bench.ready(2, 20);
    let group = formed(&actions).unwrap();
    assert_eq!((&group.start, &group.skips[..]), (&Start::Fresh, &[Position(20)][..]));
    let actions = bench.handle(Event::Fault(WorkerId(1), Generation(2), fault(true)));
    assert_eq!(ended(&actions), Some(&Outcome::Failed("step 10".to_string())));
}

/// Otherwise the result would depend on the number of members: one member reports once.
#[test]
fn the_last_skip_that_is_allowed_is_reported_by_all_members() {
    let mut bench = Bench::training(2);
    for (skip, generation) in (0..1000).zip(1..) {
        let fault = || Fault::NonFinite { position: Position(skip), detail: String::new(), stop: false };
        bench.handle(Event::Fault(WorkerId(1), Generation(generation), fault()));
        let actions = bench.handle(Event::Fault(WorkerId(2), Generation(generation), fault()));
        assert_eq!(actions, [], "skip {skip}");
        bench.ready(1, skip);
        assert!(formed(&bench.ready(2, skip)).is_some(), "skip {skip}");
    }
    let beyond = Fault::NonFinite { position: Position(1000), detail: String::new(), stop: false };
    let actions = bench.handle(Event::Fault(WorkerId(1), Generation(1001), beyond));
    assert!(matches!(ended(&actions), Some(Outcome::Failed(_))), "{actions:?}");
}

/// A new session or group tells of its files again.
#[test]
fn files_told_again_before_the_commit_are_no_abandoned_checkpoint() {
    let mut bench = Bench::training(2);
    let written = |bench: &mut Bench, worker, step, index| {
        bench.handle(Event::PartWritten(WorkerId(worker), Generation(1), part(step, index, 7)))
    };
    written(&mut bench, 1, 3, 0);
    let actions = written(&mut bench, 2, 3, 1);
    let [Action::Commit(checkpoint)] = actions.as_slice() else { panic!("{actions:?}") };
    written(&mut bench, 1, 3, 0);
    bench.handle(Event::CheckpointCommitted(checkpoint.clone()));
    written(&mut bench, 1, 10, 0);
    let actions = written(&mut bench, 2, 10, 1);
    assert!(matches!(actions.as_slice(), [Action::Commit(_)]), "{actions:?}");
}

#[test]
fn a_divergence_is_not_forgotten_by_the_next_coordinator() {
    let recovered = Recovered {
        group: Some(group(4, &[1])),
        condemned: Some(Generation(4)),
        checkpoint: Some(checkpoint(4)),
        ..Recovered::default()
    };
    let mut bench = Bench::new(0, 8, recovered);
    bench.resume(1, None);
    assert_eq!(formed(&bench.ready(1, 30)).unwrap().position, Position(8));
}

#[test]
fn a_member_that_beats_and_computes_nothing_is_dropped() {
    let mut bench = Bench::training(2);
    let progress = |position, activity| Progress {
        position: Position(position),
        leaves: 3,
        activity,
        slowest_leaf: Duration::from_millis(10),
    };
    bench.progress = progress(2, Activity::Waiting);
    bench.wait(DEADLINE / 2, &[1]);
    bench.progress = progress(1, Activity::Computing);
    bench.wait(DEADLINE / 2, &[2]);
    let mut actions = Vec::new();
    for _ in 0..4 {
        for (worker, position, activity) in [(1, 2, Activity::Waiting), (2, 1, Activity::Computing)] {
            bench.progress = progress(position, activity);
            actions.extend(bench.wait(DEADLINE / 4, &[worker]));
        }
    }
    assert!(actions.contains(&Action::Lose(WorkerId(2), Loss::Late)), "{actions:?}");
    assert!(!actions.contains(&Action::Drop(WorkerId(1))));
}

#[test]
fn a_member_that_has_paused_is_never_late_and_the_others_wait_for_it() {
    let progress = |activity| Progress {
        position: Position(2),
        leaves: 9,
        activity,
        slowest_leaf: Duration::from_millis(10),
    };
    let mut bench = Bench::training(2);
    let mut wait = |one: Activity, other: Activity, time: u32| {
        let mut actions = Vec::new();
        for _ in 0..time {
            bench.now += DEADLINE / 5;
            for (worker, activity) in [(1, one), (2, other)] {
                actions.extend(bench.handle(Event::Heartbeat(WorkerId(worker), progress(activity))));
            }
            actions.extend(bench.handle(Event::Tick));
        }
        actions
    };
    assert_eq!(wait(Activity::Paused, Activity::Waiting, 1000), []);
    assert_eq!(wait(Activity::Paused, Activity::Paused, 1000), []);
    // The member continues, and from then on has the usual time.
    assert_eq!(wait(Activity::Computing, Activity::Waiting, 4), []);
    assert!(wait(Activity::Computing, Activity::Waiting, 3).contains(&Action::Drop(WorkerId(1))));
}

#[test]
fn a_member_that_has_paused_and_is_silent_is_lost() {
    let mut bench = Bench::training(2);
    bench.progress = Progress { activity: Activity::Paused, ..Progress::default() };
    bench.wait(DEADLINE, &[1, 2]);
    assert!(bench.wait(DEADLINE * 2, &[2]).contains(&Action::Drop(WorkerId(1))));
}

#[test]
fn when_all_wait_for_each_other_the_broken_link_is_found_and_avoided() {
    let mut bench = Bench::training(3);
    bench.progress = Progress {
        position: Position(1),
        leaves: 3,
        activity: Activity::Waiting,
        slowest_leaf: Duration::from_millis(10),
    };
    let actions = bench.wait(DEADLINE * 3 / 2, &[1, 2, 3]);
    assert!(
        matches!(&actions[..], [Action::Abort { cause: Cause::Stalled, probe: true, .. }]),
        "{actions:?}"
    );
    bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Links(vec![Rank(2)])));
    bench.ready(1, 1);
    bench.ready(2, 1);
    let actions = bench.ready(3, 1);
    assert_eq!(members(formed(&actions).unwrap()), [1, 2], "the newer one of the pair waits");
    bench.progress.position = Position(2);
    let actions = bench.wait(Limits::derive(DEADLINE).lease / 2, &[3]);
    assert!(!actions.iter().any(|action| matches!(action, Action::Announce { .. })), "{actions:?}");
}

fn reaped(worker: u64) -> Event {
    Event::Reaped { worker: Some(WorkerId(worker)), status: "signal: 9".to_string() }
}

/// Returns a group of local workers 1 to `count`, which have trained for a while.
fn training_locally(count: u32) -> Bench {
    let mut bench = Bench::new(count, 8, Recovered::default());
    bench.local = true;
    let ids: Vec<u64> = (1..=u64::from(count)).collect();
    ids.iter().for_each(|id| drop(bench.join(*id)));
    bench.wait(FIT * 2, &ids);
    bench
}

/// Invariant 8.
#[test]
fn a_local_worker_that_ends_is_replaced_while_the_others_go_on() {
    let mut bench = training_locally(2);
    assert!(!bench.handle(reaped(1)).contains(&Action::Spawn), "its start would hold the others up");
    assert_eq!(members(formed(&bench.ready(2, 10)).unwrap()), [2]);
    assert_eq!(bench.wait(ASIDE, &[2]), [Action::Spawn]);
    let actions = bench.join(3);
    assert!(matches!(&actions[..], [Action::Announce { .. }]), "{actions:?}");
    let actions = bench.ready(2, 12);
    assert_eq!(members(formed(&actions).unwrap()), [2, 3]);
}

/// Invariant 2.
#[test]
fn when_all_local_members_are_dead_the_checkpoint_goes_on_once_all_were_reaped() {
    let mut bench = training_locally(2);
    bench.handle(Event::CheckpointCommitted(checkpoint(9)));
    let actions = bench.wait(DEADLINE * 3 / 2, &[]);
    let dropped = [1, 2].map(|worker| Action::Drop(WorkerId(worker)));
    assert!(dropped.iter().all(|action| actions.contains(action)), "{actions:?}");
    assert!(bench.handle(reaped(1)).contains(&Action::Spawn), "there is nobody to hold up");
    bench.join(3);
    bench.handle(reaped(2));
    assert!(bench.wait(ASIDE, &[3]).contains(&Action::Spawn));
    assert_eq!(formed(&bench.join(4)), None, "they may have saved a newer one");
    let actions = bench.handle(Event::Searched(None));
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position), (vec![3, 4], Position(18)));
    assert!(matches!(group.start, Start::Checkpoint(..)));
}

#[test]
fn a_local_worker_that_is_silent_is_killed_and_its_place_is_free_once_it_has_ended() {
    let mut bench = training_locally(2);
    bench.handle(Event::Disconnected(WorkerId(1)));
    let actions = bench.wait(DEADLINE * 3 / 2, &[2]);
    assert!(actions.contains(&Action::Drop(WorkerId(1))), "{actions:?}");
    assert!(!actions.contains(&Action::Spawn), "its place is not free before it has ended");
    bench.end(1);
    assert!(bench.wait(ASIDE, &[2]).contains(&Action::Spawn));
}

/// Invariant 8.
#[test]
fn replacements_that_do_not_last_come_later_and_later_and_then_no_more() {
    let mut bench = training_locally(2);
    let mut spawned = bench.handle(reaped(1)).contains(&Action::Spawn);
    bench.ready(2, 10);
    let mut pauses = Vec::new();
    let mut gave_up = false;
    while !gave_up {
        let died_at = bench.now;
        while !spawned {
            spawned = bench.wait(Duration::from_millis(100), &[2]).contains(&Action::Spawn);
            assert!(bench.now < died_at + Duration::from_secs(600), "no replacement");
        }
        pauses.push(bench.now - died_at);
        let actions = bench.handle(Event::Reaped { worker: None, status: "exit status: 1".to_string() });
        spawned = actions.contains(&Action::Spawn);
        gave_up = actions.iter().any(|action| matches!(action, Action::GiveUpReplacing(_)));
    }
    assert!(pauses.is_sorted() && pauses.len() == 9, "{pauses:?}");
    assert!(!bench.wait(Duration::from_secs(600), &[2]).contains(&Action::Spawn));
}

/// Invariant 4.
#[test]
fn messages_of_an_older_generation_change_nothing() {
    let mut bench = Bench::training(2);
    bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Peer));
    bench.ready(1, 4);
    assert!(formed(&bench.ready(2, 4)).is_some());
    for event in [
        Event::Ready(WorkerId(1), Generation(1), Some(Position(4))),
        Event::Fault(WorkerId(1), Generation(1), Fault::Diverged("old".to_string())),
        Event::Fault(WorkerId(1), Generation(3), Fault::Peer),
    ] {
        assert_eq!(bench.handle(event), []);
    }
}

#[test]
fn a_worker_that_never_trained_changes_nothing_for_those_who_train() {
    let mut bench = Bench::training(1);
    bench.join(2);
    let slow = Progress { slowest_leaf: Duration::from_secs(3600), ..Progress::default() };
    bench.handle(Event::Heartbeat(WorkerId(2), slow));
    assert_eq!(bench.machine.patience(), DEADLINE, "only members set the pace");
    bench.handle(Event::PartWritten(WorkerId(1), Generation(1), part(3, 0, 7)));
    assert_eq!(
        bench.handle(Event::PartWritten(WorkerId(2), Generation(1), part(3, 1, 8))),
        [],
        "no divergence"
    );
    let unable = bench.handle(Event::Unable(WorkerId(2), "no data".to_string()));
    let loss = Loss::Failed("no data".to_string());
    assert_eq!(unable, [Action::Drop(WorkerId(2)), Action::Lose(WorkerId(2), loss)]);
    assert_eq!(bench.generation(), Generation(1));
}

#[test]
fn signs_of_life_of_one_do_not_hide_the_silence_of_another() {
    let mut bench = Bench::training(2);
    let mut lost = Vec::new();
    while lost.is_empty() {
        bench.now += DEADLINE / 20;
        bench.progress.leaves += 1;
        let actions = bench.handle(Event::Heartbeat(WorkerId(1), bench.progress));
        lost.extend(actions.into_iter().filter(|action| matches!(action, Action::Lose(..))));
        assert!(bench.now <= DEADLINE, "judged when it is due, without a tick");
    }
    assert_eq!(lost, [Action::Lose(WorkerId(2), Loss::Silent)]);
}

#[test]
fn a_silent_worker_is_dropped_and_one_that_gives_signs_is_not() {
    let mut bench = Bench::training(2);
    let actions = bench.wait(DEADLINE * 3 / 2, &[1]);
    assert_eq!(actions[0], Action::Drop(WorkerId(2)));
    assert!(!actions.contains(&Action::Drop(WorkerId(1))));
}

#[test]
fn a_shell_that_overslept_blames_nobody() {
    let mut bench = Bench::training(2);
    bench.now += DEADLINE * 3;
    assert_eq!(bench.handle(Event::Tick), []);
    assert!(bench.wait(DEADLINE / 2, &[]).is_empty());
}

#[test]
fn a_member_that_does_not_get_ready_is_dropped_although_it_lives() {
    let mut bench = Bench::training(2);
    bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Peer));
    bench.ready(1, 4);
    let actions = bench.wait(DEADLINE * 2, &[1, 2]);
    assert!(actions.contains(&Action::Drop(WorkerId(2))), "{actions:?}");
    assert_eq!(members(formed(&actions).unwrap()), [1]);
}

#[test]
fn a_joiner_is_planned_in_and_healed() {
    let mut bench = Bench::training(2);
    let actions = bench.join(3);
    assert!(matches!(&actions[..], [Action::Announce { plan, .. }] if plan.kind == PlanKind::Regroup));
    bench.ready(1, 6);
    let actions = bench.ready(2, 6);
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), &group.start), (vec![1, 2, 3], &Start::Healed(Rank(0))));
}

#[test]
fn a_group_grows_to_one_worker_a_data_shard_and_no_further() {
    let mut bench = Bench::new(2, 2, Recovered::default());
    bench.join(1);
    bench.join(2);
    assert_eq!(bench.join(3), []);
    // The joiner takes the place of a lost member.
    bench.end(1);
    assert_eq!(members(formed(&bench.ready(2, 2)).unwrap()), [2, 3]);
}

/// Invariant 5.
#[test]
fn a_requested_stop_survives_a_fault() {
    let mut bench = Bench::training(2);
    let actions = bench.handle(Event::StopRequested);
    assert!(matches!(&actions[..], [Action::Announce { plan, .. }] if plan.kind == PlanKind::Stop));
    bench.end(1);
    let actions = bench.ready(2, 8);
    let [Action::Form(..), Action::Announce { plan, workers }] = actions.as_slice() else {
        panic!("{actions:?}");
    };
    assert_eq!((plan.kind, workers.as_slice()), (PlanKind::Stop, &[WorkerId(2)][..]));
}

/// Invariant 6.
#[test]
fn workers_are_released_once_the_last_checkpoint_is_committed() {
    let mut bench = Bench::training(2);
    bench.finished(1, 20);
    assert_eq!(bench.finished(2, 20), []);
    bench.handle(Event::PartWritten(WorkerId(1), Generation(1), part(10, 0, 7)));
    let actions = bench.handle(Event::PartWritten(WorkerId(2), Generation(1), part(10, 1, 7)));
    assert_eq!(actions, [Action::Commit(checkpoint(10))]);
    let actions = bench.handle(Event::CheckpointCommitted(checkpoint(10)));
    let [first, second] = [1, 2].map(|worker| Action::Release(WorkerId(worker)));
    assert_eq!(actions[..3], [Action::Close(Generation(1)), first, second]);
    assert_eq!(ended(&actions), Some(&Outcome::Complete));
}

/// Invariant 6: the other members write the files of a dead writer.
#[test]
fn a_loss_while_closing_makes_the_rest_save_again() {
    let mut bench = Bench::training(2);
    bench.finished(1, 20);
    bench.finished(2, 20);
    let actions = bench.end(2);
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position), (vec![1], Position(20)));
}

#[test]
fn two_digests_of_one_step_roll_all_back_and_end_the_run_if_that_does_not_help() {
    let mut bench = Bench::training(2);
    for _ in 0..3 {
        bench.handle(Event::PartWritten(WorkerId(1), bench.generation(), part(4, 0, 7)));
        let actions = bench.handle(Event::PartWritten(WorkerId(2), bench.generation(), part(4, 1, 8)));
        assert_eq!(actions[0], Action::Condemn(bench.generation()));
        bench.ready(1, 9);
        assert_eq!(formed(&bench.ready(2, 9)).unwrap().start, Start::Fresh);
    }
    bench.handle(Event::PartWritten(WorkerId(1), bench.generation(), part(4, 0, 7)));
    let actions = bench.handle(Event::PartWritten(WorkerId(2), bench.generation(), part(4, 1, 8)));
    assert!(matches!(ended(&actions), Some(Outcome::Failed(what)) if what.contains("step 4")), "{actions:?}");
}

#[test]
fn a_group_that_cannot_save_is_not_formed() {
    let mut bench = Bench::new(1, 8, Recovered::default());
    bench.handle(Event::Hello { worker: WorkerId(1), local: true });
    let blind = LoadedFacts { sees_storage: false, ..facts("A") };
    let actions = bench.handle(Event::Loaded(WorkerId(1), blind));
    assert!(matches!(ended(&actions), Some(Outcome::Failed(what)) if what.contains("checkpoint.url")));
}

// ---- Found by the simulation

#[test]
fn a_member_that_waits_longer_than_its_limit_asks_for_no_tick_that_is_due() {
    let mut bench = Bench::training(2);
    let progress = |activity| Progress {
        position: Position(1),
        leaves: 3,
        activity,
        slowest_leaf: Duration::from_millis(10),
    };
    bench.progress = progress(Activity::Waiting);
    bench.wait(DEADLINE / 2, &[1, 2]);
    for leaves in 0..10 {
        bench.progress = progress(Activity::Waiting);
        bench.wait(DEADLINE / 5, &[1]);
        bench.progress = Progress { leaves, ..progress(Activity::Computing) };
        bench.wait(DEADLINE / 5, &[2]);
        assert!(bench.machine.deadline().unwrap() > bench.now);
    }
}

#[test]
fn a_shell_that_sleeps_until_the_next_tick_still_sees_who_is_silent() {
    let mut bench = Bench::training(2);
    let mut actions = Vec::new();
    for _ in 0..20 {
        bench.now = bench.machine.deadline().unwrap();
        actions.extend(bench.handle(Event::Tick));
    }
    assert!(actions.contains(&Action::Lose(WorkerId(1), Loss::Silent)), "{actions:?}");
}

#[test]
fn a_group_is_not_formed_from_members_that_have_not_said_again_what_they_loaded() {
    let recovered =
        Recovered { group: Some(group(4, &[1, 2])), dead: vec![WorkerId(2)], ..Recovered::default() };
    let mut bench = Bench::new(0, 8, recovered);
    let rest = Some(Rested { position: None, finished: None });
    assert_eq!(bench.handle(resumed(1, 4, rest)), []);
    let actions = bench.handle(Event::Loaded(WorkerId(1), facts("A")));
    assert_eq!(members(formed(&actions).unwrap()), [1]);
}

#[test]
fn a_regroup_waits_for_what_a_member_that_is_back_has_loaded() {
    let mut bench = Bench::training(2);
    bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Timeout));
    bench.wait(DEADLINE * 3 / 2, &[1]);
    let rest = Some(Rested { position: Some(Position(7)), finished: None });
    bench.handle(resumed(2, 1, rest));
    assert_eq!(formed(&bench.ready(1, 6)), None);
    let actions = bench.handle(Event::Loaded(WorkerId(2), facts("A")));
    assert_eq!(formed(&actions).unwrap().start, Start::Healed(Rank(1)));
}

/// A window that ended without a worker does not count for the next worker that comes back.
#[test]
fn each_time_one_comes_back_the_others_have_a_window() {
    let mut bench = taking_over();
    bench.handle(resumed(1, 4, None));
    bench.wait(DEADLINE * 2, &[]);
    assert_eq!(bench.resume(1, None), [Action::AdoptPassport(facts("A").passport)]);
    assert_eq!(bench.resume(2, None), [Action::Keep]);
}

#[test]
fn a_requested_stop_ends_the_run_when_the_last_member_is_dead() {
    let mut bench = training_locally(1);
    bench.handle(Event::StopRequested);
    bench.wait(DEADLINE * 3 / 2, &[]);
    assert_eq!(ended(&bench.end(1)), Some(&Outcome::Stopped(None)));
}

#[test]
fn when_the_last_that_was_waited_for_leaves_the_others_begin() {
    let mut bench = Bench::new(0, 8, Recovered::default());
    bench.handle(Event::Hello { worker: WorkerId(1), local: false });
    bench.handle(Event::Hello { worker: WorkerId(2), local: false });
    assert_eq!(formed(&bench.handle(Event::Loaded(WorkerId(1), facts("A")))), None);
    assert_eq!(members(formed(&bench.handle(Event::Leave(WorkerId(2)))).unwrap()), [1]);
}

/// The fault itself may be lost with a session: the others must be told all the same.
#[test]
fn a_member_that_rests_without_a_plan_breaks_the_group_up() {
    let mut bench = Bench::training(2);
    let actions = bench.ready(1, 3);
    assert!(matches!(&actions[..], [Action::Abort { .. }]), "{actions:?}");
    assert!(formed(&bench.ready(2, 3)).is_some());
}

#[test]
fn those_that_do_not_follow_a_planned_rest_are_told_to() {
    let mut bench = Bench::training(2);
    bench.join(3);
    bench.ready(1, 6);
    let actions = bench.wait(DEADLINE * 3 / 2, &[1, 2, 3]);
    assert!(matches!(&actions[..], [Action::Abort { .. }]), "{actions:?}");
}

#[test]
fn a_reduce_that_took_too_long_is_no_proof_against_a_lost_session() {
    let mut bench = Bench::training(2);
    bench.handle(Event::Disconnected(WorkerId(2)));
    let actions = bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Timeout));
    assert!(!actions.contains(&Action::Lose(WorkerId(2), Loss::Session)), "{actions:?}");
}

/// While the shell did not run, all sessions end and members give up on each other.
#[test]
fn sessions_that_ended_while_the_shell_was_not_run_are_no_proof() {
    let mut bench = Bench::training(2);
    bench.now += DEADLINE * 3;
    bench.handle(Event::Disconnected(WorkerId(2)));
    let actions = bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Peer));
    assert!(!actions.contains(&Action::Lose(WorkerId(2), Loss::Session)), "{actions:?}");
}

#[test]
fn a_local_member_that_is_back_is_not_killed_for_having_been_away() {
    let mut bench = training_locally(3);
    bench.handle(Event::Disconnected(WorkerId(3)));
    bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Peer));
    bench.resume(3, None);
    let actions = bench.wait(DEADLINE * 3 / 2, &[1, 2, 3]);
    assert!(!actions.contains(&Action::Drop(WorkerId(3))), "{actions:?}");
}

/// The members never learned of the generation that followed the invalidated one.
#[test]
fn states_of_a_condemned_generation_do_not_come_back_with_a_new_coordinator() {
    let recovered = Recovered {
        group: Some(group(5, &[1])),
        condemned: Some(Generation(4)),
        checkpoint: Some(checkpoint(4)),
        ..Recovered::default()
    };
    let mut bench = Bench::new(0, 8, recovered);
    let rest = Some(Rested { position: Some(Position(30)), finished: None });
    bench.handle(resumed(1, 4, rest));
    let actions = bench.handle(Event::Loaded(WorkerId(1), facts("A")));
    assert_eq!(formed(&actions).unwrap().position, Position(8));
}

#[test]
fn files_of_a_condemned_generation_make_no_checkpoint() {
    let mut bench = Bench::training(2);
    bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Diverged("x".to_string())));
    bench.handle(Event::PartWritten(WorkerId(1), Generation(1), part(4, 0, 8)));
    assert_eq!(bench.handle(Event::PartWritten(WorkerId(2), Generation(1), part(4, 1, 8))), []);
}

/// One file was still on its way when the next generation was formed: seed 943025.
#[test]
fn late_files_of_a_condemned_generation_count_for_nothing_in_the_next_one() {
    let mut bench = Bench::training(2);
    bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Diverged("x".to_string())));
    bench.ready(1, 9);
    assert_eq!(formed(&bench.ready(2, 9)).unwrap().start, Start::Fresh);
    bench.handle(Event::PartWritten(WorkerId(2), Generation(1), part(4, 1, 8)));
    bench.handle(Event::PartWritten(WorkerId(1), Generation(2), part(4, 0, 7)));
    let actions = bench.handle(Event::PartWritten(WorkerId(2), Generation(2), part(4, 1, 7)));
    assert_eq!(actions, [Action::Commit(checkpoint(4))]);
}

/// The session ended before the fault arrived, so the quiesced report came first: seeds 711331 and
/// 988397.
#[test]
fn a_fault_that_is_heard_after_its_rest_breaks_a_planned_change_off() {
    let mut bench = Bench::training(2);
    let planned = bench.join(3);
    assert!(planned.iter().any(|action| matches!(action, Action::Announce { .. })), "{planned:?}");
    bench.handle(Event::Disconnected(WorkerId(1)));
    let at_rest = Rested { position: None, finished: None };
    let aborts = |actions: &[Action]| actions.iter().any(|action| matches!(action, Action::Abort { .. }));
    assert!(!aborts(&bench.handle(resumed(1, 1, Some(at_rest)))), "the others may be coming to rest as well");
    let actions = bench.handle(Event::Fault(WorkerId(1), Generation(1), Fault::Timeout));
    let Some(Action::Abort { workers, cause: Cause::Fault(..), probe: false, .. }) = actions.first() else {
        panic!("{actions:?}");
    };
    assert!(workers.contains(&WorkerId(2)));
}

/// The others have waited for this member for so long that each is past its own limit: seeds 360559
/// and 771947.
#[test]
fn one_that_takes_long_for_the_last_phase_does_not_leave_a_stalled_group_behind() {
    let mut bench = Bench::training(2);
    let progress = |activity, leaves| Progress {
        position: Position(1),
        leaves,
        activity,
        slowest_leaf: Duration::from_millis(10),
    };
    for leaves in 0..8 {
        bench.progress = progress(Activity::Waiting, 3);
        bench.wait(DEADLINE / 4, &[1]);
        bench.progress = progress(Activity::Computing, leaves);
        bench.wait(DEADLINE / 4, &[2]);
    }
    assert_eq!(bench.finished(2, 2), [], "the other one needs what it sent last");
    assert_eq!(bench.wait(DEADLINE / 2, &[2]), []);
    bench.progress = progress(Activity::Waiting, 3);
    assert_eq!(bench.wait(DEADLINE * 2 / 5, &[1]), []);
    let actions = bench.wait(DEADLINE / 5, &[1]);
    assert!(matches!(&actions[..], [Action::Abort { cause: Cause::Stalled, .. }]), "{actions:?}");
}

/// Members that were cut off train on until their leases end, and save what they have by themselves (M11).
#[test]
fn a_checkpoint_that_members_saved_by_themselves_goes_first() {
    let mut bench = training_locally(2);
    bench.handle(Event::CheckpointCommitted(checkpoint(9)));
    bench.end(1);
    let actions = bench.end(2);
    assert_eq!(actions.iter().filter(|action| **action == Action::Search).count(), 1, "{actions:?}");
    bench.join(3);
    bench.join(4);
    let newer = checkpoint(12);
    assert_eq!(formed(&bench.handle(Event::Searched(Some(newer.position)))), None, "it is not committed yet");
    let actions = bench.handle(Event::CheckpointCommitted(newer.clone()));
    let group = formed(&actions).unwrap();
    assert_eq!((group.position, &group.start), (newer.position, &Start::Checkpoint(Rank(0), newer.clone())));
}

/// No worker would ever come: seeds 105034 and 928086.
#[test]
fn local_workers_that_are_not_replaced_any_more_are_not_waited_for() {
    let mut bench = training_locally(3);
    (1..=3).for_each(|worker| drop(bench.end(worker)));
    bench.handle(Event::Searched(None));
    bench.join(4);
    let mut actions = Vec::new();
    while !actions.iter().any(|action| matches!(action, Action::GiveUpReplacing(_))) {
        assert_eq!(formed(&actions), None, "the others may come");
        bench.wait(Duration::from_secs(60), &[4]);
        actions = bench.handle(Event::Reaped { worker: None, status: "signal: 9".to_string() });
    }
    actions.extend(bench.handle(Event::Reaped { worker: None, status: "signal: 9".to_string() }));
    assert_eq!(members(formed(&actions).unwrap()), [4]);
}

/// Otherwise the run would end because its members cannot save, although a worker that can is
/// present: seed 907752.
#[test]
fn one_that_can_save_is_a_member_before_older_ones_that_cannot() {
    let mut bench = Bench::new(3, 2, Recovered::default());
    for worker in 1..=3 {
        bench.handle(Event::Hello { worker: WorkerId(worker), local: false });
    }
    let blind = LoadedFacts { sees_storage: false, ..facts("A") };
    bench.handle(Event::Loaded(WorkerId(1), blind.clone()));
    bench.handle(Event::Loaded(WorkerId(2), blind));
    let actions = bench.handle(Event::Loaded(WorkerId(3), facts("A")));
    let group = formed(&actions).unwrap();
    assert_eq!(members(group), [1, 3]);
    assert!(!group.members[0].writes_parts && group.members[1].writes_parts);
}

/// The remaining members hold the state, and a replacement is on its way.
#[test]
fn when_the_only_member_that_can_save_is_lost_the_others_wait_for_its_replacement() {
    let mut bench = Bench::new(1, 8, Recovered::default());
    bench.handle(Event::Hello { worker: WorkerId(1), local: true });
    bench.handle(Event::Hello { worker: WorkerId(2), local: false });
    let blind = LoadedFacts { sees_storage: false, ..facts("A") };
    bench.handle(Event::Loaded(WorkerId(2), blind));
    assert_eq!(members(formed(&bench.handle(Event::Loaded(WorkerId(1), facts("A")))).unwrap()), [1, 2]);
    bench.wait(FIT * 2, &[1, 2]);
    bench.end(1);
    assert!(bench.wait(ASIDE, &[2]).contains(&Action::Spawn));
    assert_eq!(bench.ready(2, 6), []);
    assert_eq!(bench.wait(DEADLINE * 20, &[2]), []);
    assert!(bench.machine.deadline().unwrap() > bench.now, "it asks for no tick that changes nothing");
    bench.local = true;
    let actions = bench.join(3);
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position), (vec![2, 3], Position(6)));
}

#[test]
fn when_nobody_who_can_save_will_come_the_run_ends_and_says_so() {
    let mut bench = Bench::new(1, 8, Recovered::default());
    bench.handle(Event::Hello { worker: WorkerId(1), local: true });
    bench.handle(Event::Hello { worker: WorkerId(2), local: false });
    let blind = LoadedFacts { sees_storage: false, ..facts("A") };
    bench.handle(Event::Loaded(WorkerId(2), blind));
    bench.handle(Event::Loaded(WorkerId(1), facts("A")));
    bench.end(1);
    let mut actions = bench.ready(2, 6);
    while ended(&actions).is_none() {
        assert!(bench.now < Duration::from_secs(7200), "it waits for ever");
        bench.wait(Duration::from_secs(60), &[2]);
        actions = bench.handle(Event::Reaped { worker: None, status: "signal: 9".to_string() });
    }
    assert!(matches!(ended(&actions), Some(Outcome::Failed(what)) if what.contains("checkpoint.url")));
}

/// A stop was requested, so no replacement comes: seed 892867.
#[test]
fn nobody_waits_for_a_replacement_once_a_stop_was_asked_for() {
    let mut bench = Bench::new(1, 8, Recovered::default());
    bench.handle(Event::Hello { worker: WorkerId(1), local: true });
    bench.handle(Event::Hello { worker: WorkerId(2), local: false });
    let blind = LoadedFacts { sees_storage: false, ..facts("A") };
    bench.handle(Event::Loaded(WorkerId(2), blind));
    bench.handle(Event::Loaded(WorkerId(1), facts("A")));
    bench.handle(Event::Leave(WorkerId(1)));
    bench.ready(1, 6);
    let actions = bench.ready(2, 6);
    assert!(actions.contains(&Action::Release(WorkerId(1))), "{actions:?}");
    bench.handle(Event::StopRequested);
    assert!(ended(&bench.end(1)).is_some());
}
