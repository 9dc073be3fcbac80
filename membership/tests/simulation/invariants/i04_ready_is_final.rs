//! A worker never commits in a generation after it was ready for it, and holds the state that it says it is
//! ready with.

use std::collections::BTreeMap;

use ganglion_membership::Generation;

use super::{Finding, Invariant, hold};
use crate::network::Proc;
use crate::world::{Seen, World};

#[derive(Default)]
pub(super) struct ReadyIsFinal {
    rested: BTreeMap<Proc, Generation>,
}

impl Invariant for ReadyIsFinal {
    fn see(&mut self, seen: &Seen, _world: &World) -> Finding {
        match seen {
            Seen::Rested { proc, generation, position, held } => {
                self.rested.insert(*proc, *generation);
                hold(held.map(|state| state.position) == *position, || {
                    format!("process {proc} says it rests at {position:?}, and holds {held:?}")
                })
            }
            Seen::Committed { proc, generation, state, .. } => {
                let final_since = self.rested.get(proc).is_some_and(|rested| generation <= rested);
                hold(!final_since, || {
                    format!("process {proc} commits {} in {generation} after its ready", state.position)
                })
            }
            _ => Ok(()),
        }
    }
}
