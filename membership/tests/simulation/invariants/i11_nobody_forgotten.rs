//! Every live worker whose session is open is known to the machine, as a member or a spare, or was told to
//! exit.

use super::{Finding, Invariant, hold};
use crate::world::World;

pub(super) struct NobodyForgotten;

impl Invariant for NobodyForgotten {
    fn look(&mut self, world: &World) -> Finding {
        let Some(coordinator) = world.touched_coordinator() else { return Ok(()) };
        for (worker, conn) in &coordinator.newest {
            let process = coordinator.sessions.get(conn).and_then(|(_, proc)| world.workers.get(proc));
            if process.is_none_or(|process| !process.alive || process.session() != Some(*conn)) {
                continue;
            }
            let known = coordinator.machine.workers().any(|id| id == *worker);
            hold(known || coordinator.told.contains(worker), || {
                format!("worker {worker} has session {conn} and nobody knows it")
            })?;
        }
        Ok(())
    }
}
