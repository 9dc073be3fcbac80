//! No commit begins past its worker's lease. Before a generation trains, a member of the one before has given
//! ready, or all its members are gone or past their lease.

use ganglion_membership::{Generation, WorkerId};

use super::{Finding, Invariant, hold};
use crate::directory::Row;
use crate::worker::Worker;
use crate::world::{Seen, World};

#[derive(Default)]
pub(super) struct Lease {
    generation: Generation,
    members: Vec<WorkerId>,
}

impl Lease {
    /// Whether one of the group will never commit in it, so that the others cannot either.
    fn is_over(&self, world: &World) -> bool {
        let is_out = |worker: &Worker| worker.is_out_of(self.generation);
        self.members.is_empty()
            || self.of(world).any(is_out)
            || self.of(world).all(|w| Self::is_gone(w, world))
    }

    fn is_gone(worker: &Worker, world: &World) -> bool {
        !worker.alive || worker.expired() || world.ctx.now >= worker.lease_until()
    }

    fn of<'a>(&'a self, world: &'a World) -> impl Iterator<Item = &'a Worker> {
        let is_member = |worker: &&Worker| worker.id().is_some_and(|id| self.members.contains(&id));
        world.workers.values().filter(is_member)
    }
}

impl Invariant for Lease {
    fn see(&mut self, seen: &Seen, world: &World) -> Finding {
        if let Seen::Committed { proc, begun, state, .. } = seen {
            let lease = world.workers[proc].lease_until();
            return hold(*begun < lease, || {
                format!("process {proc} begins to commit {} at {begun} us, past its lease", state.position)
            });
        }
        let Seen::Journaled(Row::Group(_, group)) = seen else { return Ok(()) };
        hold(self.is_over(world), || {
            format!("{} follows while {} may still train", group.generation, self.generation)
        })?;
        self.generation = group.generation;
        self.members = group.members.iter().map(|member| member.worker).collect();
        Ok(())
    }
}
