//! Live members that completed a generation's handshake and healing differ by at most one position.

use super::{Finding, Invariant};
use crate::world::{Seen, World};

pub(super) struct OneApart;

impl Invariant for OneApart {
    fn see(&mut self, seen: &Seen, world: &World) -> Finding {
        let Seen::Committed { generation, state, .. } = seen else { return Ok(()) };
        for worker in world.workers.values().filter(|worker| worker.alive) {
            let in_it = |team: &&crate::team::Team| team.trains && team.group.generation == *generation;
            let Some(its) = worker.team.as_ref().filter(in_it).and(worker.state) else { continue };
            if its.position.0.abs_diff(state.position.0) > 1 {
                return Err(format!(
                    "in generation {generation} one is at {} and process {} at {}",
                    state.position, worker.proc, its.position
                ));
            }
        }
        Ok(())
    }
}
