//! Two states at one position are equal, those of dead holders and manifests included. A flipped bit is
//! allowed until the generation in which it was found is condemned, and where it was copied before anybody
//! could see it. No more generations are condemned than bits flipped.

use ganglion_membership::{Checkpoint, Generation};

use super::{Finding, Invariant, hold};
use crate::directory::Row;
use crate::job::State;
use crate::world::{Seen, World};

#[derive(Default)]
pub(super) struct OneLineage {
    condemned: Option<Generation>,
    times: u32,
}

impl OneLineage {
    fn fits(&self, state: &State, who: &dyn std::fmt::Display, world: &World) -> Finding {
        if state.tainted {
            return Ok(());
        }
        let expected = world.ctx.job.expected(state.position);
        hold(expected.is_some_and(|e| e.halves == state.halves), || {
            format!("{who} holds {state:?}, and that state is {expected:?}")
        })
    }

    fn fits_manifest(&self, checkpoint: &Checkpoint, world: &World) -> Finding {
        let expected = world.ctx.job.expected(checkpoint.position).map(State::digest);
        hold(world.ctx.spoiled || expected.as_ref() == Some(&checkpoint.state_digest), || {
            format!("a manifest is {checkpoint:?}, and the digest is {expected:?}")
        })
    }
}

impl Invariant for OneLineage {
    fn see(&mut self, seen: &Seen, world: &World) -> Finding {
        match seen {
            Seen::Journaled(Row::Condemned(generation)) => {
                self.condemned = Some(*generation);
                self.times += 1;
                hold(self.times <= world.ctx.flips || world.ctx.spoiled, || {
                    format!("generation {generation} is condemned, and its members' states were equal")
                })
            }
            Seen::Committed { proc, state, .. } => self.fits(state, &format_args!("process {proc}"), world),
            Seen::Healed { proc, state, .. } => self.fits(state, &format_args!("process {proc}"), world),
            Seen::Trains { proc, generation, .. } => {
                let tainted = world.workers[proc].state.is_some_and(|state| state.tainted);
                let late = self.condemned.is_some_and(|condemned| *generation > condemned);
                hold(!tainted || !late || world.ctx.spoiled, || {
                    format!("process {proc} trains in {generation} with a state that was condemned")
                })
            }
            Seen::ManifestWritten(checkpoint) => self.fits_manifest(checkpoint, world),
            _ => Ok(()),
        }
    }

    fn look(&mut self, world: &World) -> Finding {
        let Some(worker) = world.touched_worker() else { return Ok(()) };
        let Some(state) = &worker.state else { return Ok(()) };
        self.fits(state, &format_args!("process {}", worker.proc), world)
    }

    fn look_back(&mut self, world: &World) -> Finding {
        let end = world.ctx.job.end();
        let last = world.ctx.directory.newest_manifest();
        hold(last.is_some_and(|last| last.position == end), || {
            format!("the run is complete and its newest checkpoint is {last:?}")
        })?;
        last.map_or(Ok(()), |last| self.fits_manifest(last, world))
    }
}
