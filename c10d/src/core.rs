//! The state that a group, its pending operations and its aborters share.
//!
//! 1. No lock is held while libtorch is called, so an abort never waits for libtorch to wake the waiters.
//! 2. Any failure of an operation, a timeout included, breaks the whole group: its ranks are out of step.
//! 3. Buffers go back to the caller only after success. Those of operations that did not succeed stay with the old
//!    group until it is destroyed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cxx::UniquePtr;

use crate::backend::{Backend, Loan};
use crate::ffi::shim;
use crate::flight::{Flight, Outcome, Signal};
use crate::sync::lock;
use crate::{Buffer, Error};

/// Which operation of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OperationId(u64);

/// An operation whose buffers nobody has taken back yet.
struct Claim {
    flight: Arc<Flight>,
    loan: Loan,
    abandoned: bool,
}

impl Claim {
    /// How the operation ended, if it has; some backends have to be asked.
    fn outcome(&self) -> Option<Outcome> {
        if let Some(work) = &self.loan.work {
            work.poll();
        }
        self.flight.outcome()
    }
}

#[derive(Default)]
struct Registry {
    /// None once the group is closed or broken.
    backend: Option<Arc<Backend>>,
    next_id: u64,
    claims: BTreeMap<OperationId, Claim>,
}

/// What was launched.
pub(crate) struct Launched {
    pub(crate) id: OperationId,
    pub(crate) flight: Arc<Flight>,
    /// Set if somebody has to poll the work.
    pub(crate) work: Option<Arc<UniquePtr<shim::Work>>>,
}

pub(crate) struct Core {
    registry: Mutex<Registry>,
}

impl Core {
    pub(crate) fn new(group: UniquePtr<shim::Group>) -> Arc<Core> {
        let registry = Registry { backend: Some(Backend::new(group)), ..Registry::default() };
        Arc::new(Core { registry: Mutex::new(registry) })
    }

    /// Starts an operation on the buffers, or gives them back if the group is no longer open.
    pub(crate) fn launch(
        &self,
        buffers: Vec<Buffer>,
        start: impl FnOnce(&shim::Group, &[Buffer], Box<Signal>) -> Result<UniquePtr<shim::Work>, cxx::Exception>,
    ) -> Result<Launched, (Error, Vec<Buffer>)> {
        let Some(backend) = self.open_backend() else {
            return Err((Error::Aborted, buffers));
        };
        let flight = Arc::<Flight>::default();
        let signal = Box::new(Signal(Arc::clone(&flight)));
        let work = match start(backend.group(), &buffers, signal) {
            Ok(work) => Some(Arc::new(work)),
            Err(exception) => {
                // How much libtorch had done is unknown, so the buffers count as lent.
                let _ = flight.settle(Err(exception.into()));
                None
            }
        };
        let polled = work.clone().filter(|_| backend.group().polls());
        let id = self.enter(&backend, Arc::clone(&flight), Loan { work, buffers });
        Ok(Launched { id, flight, work: polled })
    }

    /// The backend, if the group is open and none of its operations has failed.
    fn open_backend(&self) -> Option<Arc<Backend>> {
        let mut registry = lock(&self.registry);
        registry.claims.retain(|_, claim| !(claim.abandoned && claim.outcome() == Some(Ok(()))));
        if registry.claims.values().any(|claim| matches!(claim.outcome(), Some(Err(_)))) {
            drop(registry);
            self.abort();
            return None;
        }
        registry.backend.clone()
    }

    /// Notes what is in flight. If the group was aborted since the launch began, the operation is aborted too.
    fn enter(&self, backend: &Arc<Backend>, flight: Arc<Flight>, loan: Loan) -> OperationId {
        let mut registry = lock(&self.registry);
        let id = OperationId(registry.next_id);
        registry.next_id += 1;
        if registry.backend.is_none() && flight.settle(Err(Error::Aborted)).is_err() {
            backend.park(loan);
        } else {
            registry.claims.insert(id, Claim { flight, loan, abandoned: false });
        }
        id
    }

    /// Takes the buffers of an operation that succeeded.
    pub(crate) fn claim(&self, id: OperationId) -> Vec<Buffer> {
        let claim = lock(&self.registry).claims.remove(&id);
        claim.expect("an operation that succeeded is claimed once").loan.buffers
    }

    /// Gives up the right to an operation's buffers. They are freed once the operation is over.
    pub(crate) fn abandon(&self, id: OperationId) {
        let mut registry = lock(&self.registry);
        if let Some(claim) = registry.claims.get_mut(&id) {
            claim.abandoned = true;
            if claim.outcome() == Some(Ok(())) {
                registry.claims.remove(&id);
            }
        }
    }

    /// Wakes all waiters with an abort, then cuts the connections. The old group winds down in the background.
    pub(crate) fn abort(&self) {
        let Some(backend) = self.close_registry() else { return };
        backend.cut();
    }

    /// Closes the group to new operations, aborts and parks those in flight.
    fn close_registry(&self) -> Option<Arc<Backend>> {
        let mut registry = lock(&self.registry);
        let backend = registry.backend.take()?;
        for (id, claim) in std::mem::take(&mut registry.claims) {
            match claim.flight.settle(Err(Error::Aborted)) {
                Ok(()) => drop(registry.claims.insert(id, claim)),
                Err(_) => backend.park(claim.loan),
            }
        }
        Some(backend)
    }

    /// Closes the group gently if nothing is in flight, else aborts it.
    pub(crate) fn close(&self) {
        let mut registry = lock(&self.registry);
        if registry.claims.values().all(|claim| claim.outcome() == Some(Ok(()))) {
            let backend = registry.backend.take();
            drop(registry);
            drop(backend);
        } else {
            drop(registry);
            self.abort();
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        lock(&self.registry).backend.is_some()
    }
}
