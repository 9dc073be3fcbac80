//! The fourteen invariants, checked after everything that happens.

mod i01_one_generation;
mod i02_one_apart;
mod i03_one_lineage;
mod i04_ready_is_final;
mod i05_start;
mod i06_lease;
mod i07_fencing;
mod i08_manifests;
mod i09_journal;
mod i10_ledger;
mod i11_nobody_forgotten;
mod i12_progress;
mod i13_no_eviction;
mod i14_rows;

use crate::world::{Seen, World};

/// An invariant that does not hold.
#[derive(Debug)]
pub(crate) struct Breach {
    pub invariant: u32,
    pub what: String,
}

impl Breach {
    pub(crate) fn new(invariant: u32, what: String) -> Breach {
        Breach { invariant, what }
    }
}

/// What an invariant finds.
pub(crate) type Finding = Result<(), String>;

/// One of the fourteen.
trait Invariant {
    /// Looks at something that was done.
    fn see(&mut self, _seen: &Seen, _world: &World) -> Finding {
        Ok(())
    }

    /// Looks at the world as it is.
    fn look(&mut self, _world: &World) -> Finding {
        Ok(())
    }

    /// Looks at the world when the run is complete.
    fn look_back(&mut self, _world: &World) -> Finding {
        Ok(())
    }
}

pub(crate) struct Invariants(Vec<(u32, Box<dyn Invariant>)>);

impl Default for Invariants {
    fn default() -> Self {
        let all: Vec<Box<dyn Invariant>> = vec![
            Box::new(i01_one_generation::OneGeneration::default()),
            Box::new(i02_one_apart::OneApart),
            Box::new(i03_one_lineage::OneLineage::default()),
            Box::new(i04_ready_is_final::ReadyIsFinal::default()),
            Box::new(i05_start::RightStart::default()),
            Box::new(i06_lease::Lease::default()),
            Box::new(i07_fencing::Fencing::default()),
            Box::new(i08_manifests::Manifests),
            Box::new(i09_journal::JournalFirst::default()),
            Box::new(i10_ledger::Ledger),
            Box::new(i11_nobody_forgotten::NobodyForgotten),
            Box::new(i12_progress::Progress::default()),
            Box::new(i13_no_eviction::NoEviction),
            Box::new(i14_rows::Rows),
        ];
        Invariants((1..).zip(all).collect())
    }
}

impl Invariants {
    pub(crate) fn check(&mut self, world: &mut World) -> Result<(), Breach> {
        let seen = std::mem::take(&mut world.ctx.seen);
        for (number, invariant) in &mut self.0 {
            let breach = |what| Breach::new(*number, what);
            for seen in &seen {
                invariant.see(seen, world).map_err(breach)?;
            }
            invariant.look(world).map_err(breach)?;
        }
        Ok(())
    }

    pub(crate) fn check_end(&mut self, world: &World) -> Result<(), Breach> {
        for (number, invariant) in &mut self.0 {
            invariant.look_back(world).map_err(|what| Breach::new(*number, what))?;
        }
        Ok(())
    }
}

/// Says what is wrong unless it holds.
fn hold(holds: bool, what: impl FnOnce() -> String) -> Finding {
    if holds { Ok(()) } else { Err(what()) }
}
