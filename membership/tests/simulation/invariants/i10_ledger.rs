//! The ledger of a position equals the value computed from the job alone.

use super::{Finding, Invariant, hold};
use crate::world::{Seen, World};

pub(super) struct Ledger;

impl Invariant for Ledger {
    fn see(&mut self, seen: &Seen, world: &World) -> Finding {
        let (proc, state) = match seen {
            Seen::Committed { proc, state, .. } | Seen::Healed { proc, state, .. } => (proc, state),
            _ => return Ok(()),
        };
        let expected = world.ctx.job.expected(state.position).map(|expected| expected.ledger);
        hold(expected == Some(state.ledger), || {
            format!("process {proc} has ledger {} at {}, not {expected:?}", state.ledger, state.position)
        })
    }

    fn look_back(&mut self, world: &World) -> Finding {
        let directory = &world.ctx.directory;
        let last = directory.newest_manifest().and_then(|checkpoint| directory.load(checkpoint));
        let expected = world.ctx.job.expected(world.ctx.job.end()).map(|state| state.ledger);
        hold(directory.storage_down || last.map(|state| state.ledger) == expected, || {
            format!("the last checkpoint's ledger is {last:?}, not {expected:?}")
        })
    }
}
