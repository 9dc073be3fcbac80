//! A generation starts at the highest of the positions readied for it and the newest checkpoint that its
//! coordinator knows; each receiver is wholly old or wholly new. Nobody who leaves is a member if somebody
//! who stays holds that position.

use std::collections::{BTreeMap, BTreeSet};

use ganglion_membership::{Action, Event, Generation, Group, Position, Start, WorkerId};

use super::{Finding, Invariant, hold};
use crate::directory::Row;
use crate::world::{Seen, World};

#[derive(Default)]
pub(super) struct RightStart {
    generation: Generation,
    members: Vec<WorkerId>,
    condemned: Option<Generation>,
    readied: BTreeMap<WorkerId, Option<Position>>,
    /// Members that the coordinator gave up, whatever still arrives from them.
    lost: BTreeSet<WorkerId>,
    /// Members that want to leave.
    leaving: BTreeSet<WorkerId>,
    /// Whether the number of workers was ever changed: nobody hears whom that lets go, now or by the next
    /// coordinator.
    scaled: bool,
    /// The newest checkpoint that the coordinator knows.
    known: Option<Position>,
}

impl RightStart {
    fn took(&mut self, event: &Event) {
        match event {
            Event::Resumed { worker, .. } => {
                self.lost.remove(worker);
            }
            Event::Leave(worker) => {
                self.leaving.insert(*worker);
            }
            Event::Scale(_) => self.scaled = true,
            _ => {}
        }
        let (worker, generation, position) = match event {
            Event::Ready(worker, generation, position) => (worker, *generation, *position),
            Event::Finished { worker, generation, position, .. } => (worker, *generation, Some(*position)),
            // A member that never heard of its generation is at rest with what it has.
            Event::Resumed { worker, generation, rest: Some(rest) } => {
                let void = self.condemned.is_some_and(|condemned| *generation <= condemned);
                (worker, self.generation, rest.position.filter(|_| !void))
            }
            Event::CheckpointCommitted(checkpoint) => {
                self.known = self.known.max(Some(checkpoint.position));
                return;
            }
            _ => return,
        };
        if generation == self.generation && self.members.contains(worker) && !self.lost.contains(worker) {
            self.readied.insert(*worker, position);
        }
    }

    fn check(&self, group: &Group) -> Finding {
        let condemned = self.condemned == Some(self.generation);
        let readied = if condemned { None } else { self.readied.values().copied().flatten().max() };
        let expected = readied.max(self.known).unwrap_or(Position(0));
        let healed = matches!(group.start, Start::Healed(_));
        let source = readied.is_some() && readied >= self.known;
        hold(group.position == expected && healed == source, || {
            format!(
                "{group:?} should start at {expected}: {:?} were readied, {:?} is saved",
                self.readied, self.known
            )
        })
    }

    fn check_leavers(&self, group: &Group) -> Finding {
        if self.scaled || self.condemned == Some(self.generation) {
            return Ok(());
        }
        let most = self.readied.values().copied().flatten().max();
        let held = |(worker, position): (&WorkerId, &Option<Position>)| {
            most.is_some() && *position == most && !self.leaving.contains(worker)
        };
        let needed = !self.readied.iter().any(held);
        let leaver = group.members.iter().find(|member| self.leaving.contains(&member.worker));
        hold(needed || leaver.is_none(), || {
            format!("{leaver:?} leaves, and somebody who stays holds {most:?}")
        })
    }
}

impl Invariant for RightStart {
    fn see(&mut self, seen: &Seen, _world: &World) -> Finding {
        match seen {
            Seen::CoordinatorStarted { adopted } => {
                self.known = *adopted;
                self.readied.clear();
                self.lost.clear();
                // Whoever leaves says so again.
                self.leaving.clear();
            }
            Seen::Took(event) => self.took(event),
            Seen::Decided(Action::Lose(worker, _) | Action::Release(worker)) => {
                self.readied.remove(worker);
                self.lost.insert(*worker);
                // If it comes back it says so again.
                self.leaving.remove(worker);
            }
            Seen::Journaled(Row::Condemned(generation)) => self.condemned = Some(*generation),
            Seen::Journaled(Row::Group(_, group)) => {
                self.check(group)?;
                self.check_leavers(group)?;
                self.generation = group.generation;
                self.members = group.members.iter().map(|member| member.worker).collect();
                self.readied.clear();
            }
            Seen::Healed { proc, state, source } => {
                return hold(state.fingerprint() == *source, || {
                    format!("process {proc} holds {state:?}, which is not the source's state")
                });
            }
            _ => {}
        }
        Ok(())
    }

    fn look(&mut self, world: &World) -> Finding {
        let Some(worker) = world.touched_worker() else { return Ok(()) };
        let Some(state) = worker.state.filter(|state| !state.tainted) else { return Ok(()) };
        let expected = world.ctx.job.expected(state.position);
        hold(expected.is_some_and(|whole| whole.halves == state.halves), || {
            format!("process {} holds {state:?}, which is torn", worker.proc)
        })
    }
}
