//! Once the faults stop, the next commit comes within a bound and the run is complete within another. The
//! machine never asks for a tick that changes nothing.

use ganglion_membership::{Outcome, Position};

use super::{Finding, Invariant, hold};
use crate::job::Instant;
use crate::world::{Seen, World};

/// To hear that all holders are gone takes a lease, and half of one more to come back in order.
const NEXT: u64 = 40_000_000;
/// The run is complete after this time and twice what all its leaves take one worker.
const ALL: u64 = 80_000_000;

#[derive(Default)]
pub(super) struct Progress {
    newest: Position,
    moved: Instant,
}

impl Invariant for Progress {
    fn see(&mut self, seen: &Seen, world: &World) -> Finding {
        match seen {
            Seen::Committed { state, .. } if state.position != self.newest => {
                self.newest = state.position;
                self.moved = world.ctx.now;
            }
            Seen::Ended(Outcome::Failed(what)) => {
                let since = world.quiet_since.map(|since| world.ctx.now - since);
                return hold(since.is_none_or(|since| since < NEXT), || {
                    format!("the run fails {since:?} us after the faults: {what}")
                });
            }
            _ => {}
        }
        Ok(())
    }

    fn look(&mut self, world: &World) -> Finding {
        if let Some(coordinator) = &world.coordinator {
            hold(coordinator.idle_ticks < 20, || {
                "the machine asks for ticks that change nothing".to_string()
            })?;
        }
        let Some(since) = world.quiet_since else { return Ok(()) };
        let now = world.ctx.now;
        let at_end = world.ctx.directory.manifests.contains_key(&world.ctx.job.end().0);
        hold(at_end || now < self.moved.max(since) + NEXT, || {
            format!("nothing was committed since {} us, when the newest was {}", self.moved, self.newest)
        })?;
        let job = &world.ctx.job;
        let leaves = job.end().0 * u64::from(job.shards) * world.ctx.scenario.leaf;
        hold(now < since + ALL + 2 * leaves, || {
            format!("the run is not complete {} us after the faults", now - since)
        })
    }
}
