//! With delays below the deadline nobody is evicted and no group stalls, pauses of the coordinator included.
//! Below means: a heartbeat's interval, the longest pause that is not noticed (half a deadline) and two
//! delays are less than a deadline.

use ganglion_membership::{Action, Cause, Loss};

use super::{Finding, Invariant, hold};
use crate::worker::Worker;
use crate::world::{Seen, World};

pub(super) struct NoEviction;

impl Invariant for NoEviction {
    fn see(&mut self, seen: &Seen, world: &World) -> Finding {
        let calm = world.ctx.scenario.calm;
        match seen {
            Seen::Decided(Action::Lose(worker, loss)) => {
                let evicted = !matches!(loss, Loss::Exited(_));
                // A number that was given to a process that gave up waiting for it is nobody's, and pauses
                // that follow on each other may be longer than a lease: who is past it trains no more, also
                // while it still saves.
                let is_it = |process: &Worker| process.id() == Some(*worker);
                let lives = world.workers.values().any(|w| w.alive && !w.expired() && is_it(w));
                hold(!calm || !evicted || !lives, || format!("worker {worker} is evicted: {loss}"))
            }
            Seen::Decided(Action::Abort { generation, cause: Cause::Stalled, .. }) => {
                hold(!calm, || format!("generation {generation} stalls"))
            }
            _ => Ok(()),
        }
    }
}
