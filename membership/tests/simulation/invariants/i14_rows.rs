//! A row that a worker reported is recorded, or the worker keeps it. A recorded row is that of an undisturbed
//! run.

use ganglion_membership::Position;

use super::{Finding, Invariant, hold};
use crate::world::{Seen, World};

pub(super) struct Rows;

impl Invariant for Rows {
    fn see(&mut self, seen: &Seen, world: &World) -> Finding {
        let Seen::Recorded(row) = seen else { return Ok(()) };
        let job = &world.ctx.job;
        let expected = job.expected(Position(row.step * job.phases)).map(|state| state.ledger);
        hold(expected == Some(row.ledger), || format!("{row:?} is recorded, its ledger is {expected:?}"))
    }

    fn look(&mut self, world: &World) -> Finding {
        let Some(worker) = world.touched_worker() else { return Ok(()) };
        let recorded = &world.ctx.directory.rows;
        let is_kept = |step: u64| worker.member.rows().any(|row| row.step == step);
        let lost = worker.reported.iter().find(|step| !recorded.contains_key(step) && !is_kept(**step));
        hold(lost.is_none(), || {
            format!("process {} forgot the row of step {lost:?}, which is not recorded", worker.proc)
        })
    }
}
