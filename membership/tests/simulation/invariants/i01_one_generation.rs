//! A generation has one term, membership, ranks, start and source, for ever; terms and generations only grow.

use std::collections::BTreeMap;

use ganglion_membership::{Generation, Group, Term};

use super::{Finding, Invariant, hold};
use crate::directory::Row;
use crate::network::Proc;
use crate::world::{Seen, World};

#[derive(Default)]
pub(super) struct OneGeneration {
    known: BTreeMap<Generation, (Term, Group)>,
    term: Term,
    newest: Generation,
    workers: BTreeMap<Proc, (Term, Generation)>,
}

impl OneGeneration {
    fn is_the_one(&self, term: Term, group: &Group) -> Finding {
        let one = self.known.get(&group.generation);
        hold(one.is_some_and(|(t, g)| *t == term && g == group), || {
            format!("generation {} is {group:?} of term {term}, and it is {one:?}", group.generation)
        })
    }
}

impl Invariant for OneGeneration {
    fn see(&mut self, seen: &Seen, _world: &World) -> Finding {
        match seen {
            Seen::Journaled(Row::Term(term)) => {
                hold(*term > self.term, || format!("term {term} comes after {}", self.term))?;
                self.term = *term;
                Ok(())
            }
            Seen::Journaled(Row::Group(term, group)) => {
                let (generation, newest) = (group.generation, self.newest);
                hold(generation > newest && *term == self.term, || {
                    format!("generation {generation} of term {term} comes after {newest}")
                })?;
                self.newest = generation;
                self.known.insert(generation, (*term, group.clone()));
                Ok(())
            }
            Seen::Told { term, group } => self.is_the_one(*term, group),
            Seen::Assigned { proc, term, group } => {
                self.is_the_one(*term, group)?;
                let before = self.workers.insert(*proc, (*term, group.generation));
                let grows = before.is_none_or(|(t, g)| *term >= t && group.generation > g);
                hold(grows, || format!("process {proc} goes from {before:?} to {term}, {}", group.generation))
            }
            _ => Ok(()),
        }
    }
}
