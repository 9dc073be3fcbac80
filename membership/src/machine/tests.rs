//! The machine by example, then under random events. Numbers refer to the invariants of the module.

use proptest::prelude::*;

use super::*;
use crate::checkpoint::StoredFile;

const DEADLINE: Duration = Duration::from_secs(5);
const PHASES: u32 = 2;

/// A machine and the time.
struct Bench {
    machine: Machine,
    now: Time,
    /// Whether those that join are the coordinator's own.
    local: bool,
}

fn settings(local_workers: u32, data_shards: u32) -> Settings {
    Settings { local_workers, data_shards, failure_deadline: DEADLINE }
}

fn facts(cpu: &str) -> LoadedFacts {
    let passport = Passport([("cpu".to_string(), cpu.to_string())].into());
    LoadedFacts { passport, samples: 100, sees_storage: true, phases_per_step: PHASES }
}

fn file(index: u32) -> StoredFile {
    StoredFile { file: format!("state-{index}"), bytes: 1, blake3: "h".to_string() }
}

fn part(step: u64, index: u32, digest: &str) -> WrittenPart {
    WrittenPart { step, phase: 0, index, count: 2, file: file(index), state_digest: digest.to_string() }
}

fn checkpoint(step: u64) -> Checkpoint {
    Checkpoint {
        position: Position(step * u64::from(PHASES)),
        step,
        phase: 0,
        files: vec![file(0), file(1)],
        state_digest: "d".to_string(),
    }
}

impl Bench {
    fn new(local_workers: u32, data_shards: u32, recovered: Recovered) -> Bench {
        Bench {
            machine: Machine::new(settings(local_workers, data_shards), recovered),
            now: Time::ZERO,
            local: false,
        }
    }

    /// A group of workers 1 to `count` in generation 1.
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

    /// Lets time pass in small pieces, as a shell that is awake sees it, while these workers give signs of life.
    fn wait(&mut self, time: Duration, alive: &[u64]) -> Vec<Action> {
        let mut actions = Vec::new();
        for _ in 0..10 {
            self.now += time / 10;
            for worker in alive {
                actions.extend(self.handle(Event::Heartbeat(WorkerId(*worker))));
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
        Action::Form(group) => Some(group),
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
    let recovered = Recovered { generation: Generation(41), ..Recovered::default() };
    let mut bench = Bench::new(1, 8, recovered);
    assert_eq!(formed(&bench.join(1)).unwrap().generation, Generation(42));
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

/// Invariants 2 and 3.
#[test]
fn after_a_loss_the_survivors_go_on_from_the_most_advanced() {
    let mut bench = Bench::training(3);
    let actions = bench.handle(Event::Lost(WorkerId(2), Loss::Session));
    assert!(
        matches!(&actions[..], [Action::Abort { workers, .. }] if *workers == [WorkerId(1), WorkerId(3)])
    );
    assert_eq!(formed(&bench.ready(1, 10)), None);
    let actions = bench.ready(3, 11);
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position), (vec![1, 3], Position(11)));
    assert_eq!(group.start, Start::Healed(Rank(1)));
    assert_eq!(group.members.iter().map(|m| m.shards.len()).sum::<usize>(), 8);
}

/// Invariant 3.
#[test]
fn a_checkpoint_that_is_newer_than_every_member_goes_first() {
    let mut bench = Bench::training(2);
    bench.handle(Event::CheckpointCommitted(checkpoint(9)));
    bench.handle(Event::Lost(WorkerId(1), Loss::Session));
    let actions = bench.ready(2, 17);
    assert_eq!(formed(&actions).unwrap().start, Start::Checkpoint(Rank(0), checkpoint(9)));
    bench.handle(Event::Fault(WorkerId(2), Generation(2), Fault::Timeout));
    let actions = bench.ready(2, 18);
    assert_eq!(formed(&actions).unwrap().start, Start::Healed(Rank(0)));
}

/// Invariant 7: a worker of another machine may train on although its session ended.
#[test]
fn when_no_member_is_left_and_one_was_not_ours_the_run_ends() {
    let mut bench = Bench::training(2);
    bench.handle(Event::Lost(WorkerId(1), Loss::Session));
    let actions = bench.handle(Event::Lost(WorkerId(2), Loss::Session));
    assert!(matches!(ended(&actions), Some(Outcome::Failed(_))), "{actions:?}");
}

fn reaped(worker: u64) -> Event {
    Event::Reaped { worker: Some(WorkerId(worker)), status: "signal: 9".to_string() }
}

/// A group of local workers 1 to `count`, which have trained for a while.
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
    let actions = bench.handle(reaped(1));
    assert!(actions.contains(&Action::Spawn), "{actions:?}");
    assert_eq!(members(formed(&bench.ready(2, 10)).unwrap()), [2]);
    let actions = bench.join(3);
    assert!(matches!(&actions[..], [Action::Announce { .. }]), "{actions:?}");
    let actions = bench.ready(2, 12);
    assert_eq!(members(formed(&actions).unwrap()), [2, 3]);
}

/// Invariant 7.
#[test]
fn when_all_local_members_are_dead_the_checkpoint_goes_on_once_all_were_reaped() {
    let mut bench = training_locally(2);
    bench.handle(Event::CheckpointCommitted(checkpoint(9)));
    bench.handle(Event::Lost(WorkerId(1), Loss::Session));
    let actions = bench.handle(Event::Lost(WorkerId(2), Loss::Session));
    assert_eq!(ended(&actions), None);
    assert!(bench.handle(reaped(1)).contains(&Action::Spawn));
    bench.join(3);
    assert!(bench.handle(reaped(2)).contains(&Action::Spawn));
    let actions = bench.join(4);
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position), (vec![3, 4], Position(18)));
    assert!(matches!(group.start, Start::Checkpoint(..)));
}

#[test]
fn a_local_worker_that_lost_its_session_and_does_not_end_is_killed() {
    let mut bench = training_locally(2);
    bench.handle(Event::Lost(WorkerId(1), Loss::Session));
    bench.ready(2, 10);
    let actions = bench.wait(DEADLINE * 3 / 2, &[2]);
    assert!(actions.contains(&Action::Drop(WorkerId(1))), "{actions:?}");
    assert!(!actions.contains(&Action::Spawn), "its place is not free before it has ended");
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
    // It takes the place of one that is lost.
    bench.handle(Event::Lost(WorkerId(1), Loss::Session));
    assert_eq!(members(formed(&bench.ready(2, 2)).unwrap()), [2, 3]);
}

/// Invariant 5.
#[test]
fn a_requested_stop_survives_a_fault() {
    let mut bench = Bench::training(2);
    let actions = bench.handle(Event::StopRequested);
    assert!(matches!(&actions[..], [Action::Announce { plan, .. }] if plan.kind == PlanKind::Stop));
    bench.handle(Event::Lost(WorkerId(1), Loss::Session));
    let actions = bench.ready(2, 8);
    let [Action::Form(_), Action::Announce { plan, workers }] = actions.as_slice() else {
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
    bench.handle(Event::PartWritten(WorkerId(1), part(10, 0, "d")));
    let actions = bench.handle(Event::PartWritten(WorkerId(2), part(10, 1, "d")));
    assert_eq!(actions, [Action::Commit(checkpoint(10))]);
    let actions = bench.handle(Event::CheckpointCommitted(checkpoint(10)));
    let released = [1, 2].map(|worker| Action::Release(WorkerId(worker)));
    assert_eq!(actions[..2], released);
    assert_eq!(ended(&actions), Some(&Outcome::Complete));
}

/// Invariant 6: what a dead writer left out is written by the others.
#[test]
fn a_loss_while_closing_makes_the_rest_save_again() {
    let mut bench = Bench::training(2);
    bench.finished(1, 20);
    bench.finished(2, 20);
    let actions = bench.handle(Event::Lost(WorkerId(2), Loss::Session));
    let group = formed(&actions).unwrap();
    assert_eq!((members(group), group.position), (vec![1], Position(20)));
}

#[test]
fn two_digests_of_one_step_end_the_run() {
    let mut bench = Bench::training(2);
    bench.handle(Event::PartWritten(WorkerId(1), part(4, 0, "d")));
    let actions = bench.handle(Event::PartWritten(WorkerId(2), part(4, 1, "e")));
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

// ---- Random events ---------------------------------------------------------------------------------------------------

/// What a model worker may do next, chosen by a number.
#[derive(Clone, Copy, Debug)]
enum Move {
    /// Whether the coordinator started it.
    Join(bool),
    Train(u64),
    GetReady(u64),
    Fault(u64),
    Die(u64),
    /// The process of a local worker that died a while ago is seen to have ended.
    Reap,
    Late(u64),
    Pass(u32),
    Stop,
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        4 => any::<bool>().prop_map(Move::Join),
        6 => (0..6u64).prop_map(Move::Train),
        8 => (0..6u64).prop_map(Move::GetReady),
        2 => (0..6u64).prop_map(Move::Fault),
        3 => (0..6u64).prop_map(Move::Die),
        2 => Just(Move::Reap),
        2 => (0..6u64).prop_map(Move::Late),
        3 => (1..2000u32).prop_map(Move::Pass),
        1 => Just(Move::Stop),
    ]
}

/// A worker as the protocol has it: it commits only in a group that it was assigned to and has not left.
#[derive(Clone, Debug)]
struct ModelWorker {
    id: u64,
    local: bool,
    held: Option<u64>,
    /// The generation that it trains in.
    group: Option<Generation>,
}

/// The machine with model workers, and what must hold after each event.
struct World {
    bench: Bench,
    workers: Vec<ModelWorker>,
    /// Local workers that are dead, which the coordinator has not seen.
    unreaped: Vec<u64>,
    next_id: u64,
    highest: Generation,
    ended: bool,
}

impl World {
    fn new() -> World {
        World {
            bench: Bench::new(0, 4, Recovered::default()),
            workers: Vec::new(),
            unreaped: Vec::new(),
            next_id: 1,
            highest: Generation(0),
            ended: false,
        }
    }

    fn play(&mut self, step: Move) {
        let at = |worker: u64| usize::try_from(worker).unwrap();
        let pick =
            |workers: &[ModelWorker], worker| (!workers.is_empty()).then(|| at(worker) % workers.len());
        let actions = match step {
            Move::Join(local) => {
                self.workers.push(ModelWorker { id: self.next_id, local, held: None, group: None });
                self.next_id += 1;
                self.bench.local = local;
                self.bench.join(self.next_id - 1)
            }
            Move::Train(lead) => {
                self.commit_a_phase(at(lead));
                Vec::new()
            }
            Move::GetReady(worker) => match pick(&self.workers, worker) {
                Some(index) => self.get_ready(index),
                None => Vec::new(),
            },
            Move::Fault(worker) => match pick(&self.workers, worker) {
                Some(index) if self.workers[index].group.is_some() => {
                    let ModelWorker { id, group, .. } = self.workers[index].clone();
                    let fault = Event::Fault(WorkerId(id), group.unwrap(), Fault::Peer);
                    let actions = self.bench.handle(fault);
                    self.check(&actions);
                    self.get_ready(index)
                }
                _ => Vec::new(),
            },
            Move::Die(worker) => match pick(&self.workers, worker) {
                Some(index) => {
                    let dead = self.workers.remove(index);
                    if dead.local {
                        self.unreaped.push(dead.id);
                    }
                    self.bench.handle(Event::Lost(WorkerId(dead.id), Loss::Session))
                }
                None => Vec::new(),
            },
            Move::Reap => match self.unreaped.pop() {
                Some(worker) => self.bench.handle(reaped(worker)),
                None => Vec::new(),
            },
            Move::Late(worker) => {
                let old = Generation(self.highest.0.saturating_sub(1));
                self.bench.handle(Event::Ready(WorkerId(worker), old, Some(Position(1_000_000))))
            }
            Move::Pass(milliseconds) => {
                let alive: Vec<u64> = self.workers.iter().map(|worker| worker.id).collect();
                self.bench.wait(Duration::from_millis(milliseconds.into()), &alive)
            }
            Move::Stop => self.bench.handle(Event::StopRequested),
        };
        self.check(&actions);
    }

    /// Commits in the newest group as a reduce allows it: it needs all members, and a few commit before the rest.
    fn commit_a_phase(&mut self, lead: usize) {
        let newest = self.bench.machine.group().map(|group| (group.generation, members(group)));
        let Some((generation, ids)) = newest else { return };
        let trains = |worker: &&mut ModelWorker| worker.group == Some(generation) && ids.contains(&worker.id);
        let mut training: Vec<_> = self.workers.iter_mut().filter(trains).collect();
        if training.len() < ids.len() {
            return;
        }
        let highest = training.iter().map(|worker| worker.held).max().flatten();
        if training.iter().any(|worker| worker.held < highest) {
            training.iter_mut().for_each(|worker| worker.held = highest);
        } else {
            let next = highest.map(|held| held + 1);
            training.iter_mut().take(1 + lead).for_each(|worker| worker.held = next);
        }
    }

    fn get_ready(&mut self, index: usize) -> Vec<Action> {
        let worker = &mut self.workers[index];
        let Some(generation) = worker.group.take() else { return Vec::new() };
        let position = worker.held.map(Position);
        self.bench.handle(Event::Ready(WorkerId(worker.id), generation, position))
    }

    fn check(&mut self, actions: &[Action]) {
        for action in actions {
            assert!(!self.ended, "{action:?} after the end");
            match action {
                Action::Form(group) => self.check_group(group),
                Action::Drop(worker) => {
                    // One that does not get ready, for all give signs of life; or one that is dead already.
                    let dropped = self.workers.iter().position(|known| known.id == worker.0);
                    let dropped = dropped.map(|index| self.workers.remove(index));
                    self.unreaped.extend(dropped.filter(|worker| worker.local).map(|worker| worker.id));
                }
                Action::End(_) => self.ended = true,
                _ => {}
            }
        }
    }

    fn check_group(&mut self, group: &Group) {
        assert!(group.generation > self.highest, "invariant 1: {group:?}");
        self.highest = group.generation;
        let ids = members(group);
        for worker in &self.workers {
            assert!(worker.group.is_none(), "invariant 2: worker {} still trains at {group:?}", worker.id);
        }
        let held = |id: u64| self.workers.iter().find(|worker| worker.id == id).unwrap().held;
        let highest = ids.iter().filter_map(|id| held(*id)).max();
        assert_eq!(group.position.0, highest.unwrap_or(0), "invariant 3: {group:?}");
        match &group.start {
            Start::Healed(rank) => assert_eq!(held(ids[rank.0 as usize]), highest),
            Start::Fresh => assert_eq!(highest, None),
            Start::Checkpoint(..) => panic!("there is no checkpoint"),
        }
        if highest.is_none() {
            assert!(
                self.unreaped.is_empty(),
                "invariant 7: {:?} may still train at {group:?}",
                self.unreaped
            );
        }
        let mut shards: Vec<u32> = group.members.iter().flat_map(|member| member.shards.clone()).collect();
        shards.sort_unstable();
        assert_eq!(shards, [0, 1, 2, 3]);
        for worker in &mut self.workers {
            if ids.contains(&worker.id) {
                worker.group = Some(group.generation);
                worker.held = Some(group.position.0);
            }
        }
    }
}

proptest! {
    /// Invariants 1 to 4 and 7, whatever happens in whatever order.
    #[test]
    fn invariants_hold_under_random_events(moves in prop::collection::vec(moves(), 1..200)) {
        let mut world = World::new();
        for step in moves {
            world.play(step);
            if world.ended {
                break;
            }
        }
    }
}
