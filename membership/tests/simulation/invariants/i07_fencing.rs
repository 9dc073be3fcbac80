//! Nothing from an older term or generation changes the coordinator's state, a worker's state or a published
//! name.

use std::collections::BTreeMap;

use ganglion_membership::{Generation, Term};

use super::{Finding, Invariant, hold};
use crate::network::Proc;
use crate::world::{Seen, World};

#[derive(Default)]
pub(super) struct Fencing {
    newest: BTreeMap<Proc, (Term, Generation)>,
}

impl Fencing {
    fn is_newest(&self, proc: Proc, term: Term, generation: Generation) -> Finding {
        let newest = self.newest.get(&proc).copied();
        hold(newest.is_some_and(|(t, g)| t == term && g >= generation), || {
            format!("process {proc} acts in {generation} of term {term}, its newest is {newest:?}")
        })
    }

    fn same_group(proc: Proc, generation: Generation, world: &World) -> Finding {
        let team_of = |proc: &Proc| world.workers.get(proc).and_then(|w| w.team.as_ref());
        let Some(own) = team_of(&proc) else { return Ok(()) };
        for peer in &own.peers {
            let Some(its) = team_of(peer).filter(|team| team.group.generation == generation) else {
                continue;
            };
            hold(its.term == own.term && its.group == own.group, || {
                format!("processes {proc} and {peer} train in different groups {generation}")
            })?;
        }
        Ok(())
    }
}

impl Invariant for Fencing {
    fn see(&mut self, seen: &Seen, world: &World) -> Finding {
        match seen {
            Seen::Assigned { proc, term, group } => {
                let seen = world.workers[proc].term();
                self.newest.insert(*proc, (*term, group.generation));
                hold(*term >= seen, || format!("process {proc} takes term {term} after {seen}"))
            }
            Seen::Trains { proc, term, generation } => {
                self.is_newest(*proc, *term, *generation)?;
                Self::same_group(*proc, *generation, world)
            }
            Seen::Heard { conn, newest, term, current } => {
                hold(Some(*conn) == *newest && term == current, || {
                    format!("a message of connection {conn} is heard, the newest is {newest:?}")
                })
            }
            Seen::TookStale { event, actions } => {
                hold(actions.is_empty(), || format!("{event:?} is old and leads to {actions:?}"))
            }
            _ => Ok(()),
        }
    }
}
