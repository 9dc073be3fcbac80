//! Every action has a journal row first, and the journal gives the machine's state. That repeating an action
//! is harmless is tried by telling workers some things twice.

use std::collections::BTreeSet;

use ganglion_membership::Generation;

use super::{Finding, Invariant, hold};
use crate::directory::Row;
use crate::world::{Seen, World};

#[derive(Default)]
pub(super) struct JournalFirst {
    groups: BTreeSet<Generation>,
    tokens: BTreeSet<u64>,
    newest: Generation,
}

impl Invariant for JournalFirst {
    fn see(&mut self, seen: &Seen, _world: &World) -> Finding {
        match seen {
            Seen::Journaled(Row::Group(_, group)) => {
                self.newest = group.generation;
                self.groups.insert(group.generation);
                Ok(())
            }
            Seen::Journaled(Row::Token(token)) => {
                self.tokens.insert(*token);
                Ok(())
            }
            Seen::Told { group, .. } => hold(self.groups.contains(&group.generation), || {
                format!("generation {} is told and not journaled", group.generation)
            }),
            Seen::Spawned(token) => {
                hold(self.tokens.contains(token), || format!("process {token} is started and not journaled"))
            }
            _ => Ok(()),
        }
    }

    fn look(&mut self, world: &World) -> Finding {
        let Some(coordinator) = world.touched_coordinator() else { return Ok(()) };
        let known = coordinator.machine.group().map_or(Generation(0), |group| group.generation);
        hold(
            known == self.newest && world.ctx.directory.group.as_ref() == coordinator.machine.group(),
            || format!("the machine is in generation {known}, the journal in {}", self.newest),
        )?;
        let passport = world.ctx.directory.passport.is_some();
        hold(passport || known == Generation(0), || "a group trains without a passport".to_string())
    }
}
