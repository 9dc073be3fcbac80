//! Shared state of a group, its pending operations and its aborters.
//!
//! 1. No lock is held during a call of libtorch, whether it polls an operation or frees lent
//!    memory. So an abort never waits for libtorch or CUDA before it wakes the waiters.
//! 2. Any failure of an operation, a timeout included, breaks the whole group: its ranks are out of step.
//! 3. Buffers go back to the caller only after success. Those of other operations stay with the old
//!    group until it is destroyed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cxx::UniquePtr;

use crate::backend::{Backend, Loan, Poll};
use crate::ffi::shim;
use crate::flight::{Flight, Signal};
use crate::sync::lock;
use crate::{Buffer, Error};

/// Id of an operation within its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OperationId(u64);

/// Operation whose buffers the caller has not taken back yet.
struct Claim {
    flight: Arc<Flight>,
    loan: Loan,
    abandoned: bool,
}

impl Claim {
    /// Returns libtorch's side of an operation without an outcome yet; some backends have to be
    /// polled.
    fn unsettled(&self) -> Option<Arc<dyn Poll>> {
        self.loan.work.clone().filter(|_| self.flight.outcome().is_none())
    }

    fn has_succeeded(&self) -> bool {
        self.flight.outcome() == Some(Ok(()))
    }
}

#[derive(Default)]
struct Registry {
    /// `None` once the group is closed or broken.
    backend: Option<Arc<Backend>>,
    next_id: u64,
    claims: BTreeMap<OperationId, Claim>,
}

/// Launched operation.
pub(crate) struct Launched {
    pub(crate) id: OperationId,
    pub(crate) flight: Arc<Flight>,
    /// Work that must be polled; `None` if the backend reports the end by itself.
    pub(crate) work: Option<Arc<dyn Poll>>,
}

pub(crate) struct Core {
    registry: Mutex<Registry>,
    exchanges: bool,
}

impl Core {
    pub(crate) fn new(group: UniquePtr<shim::Group>) -> Arc<Core> {
        let exchanges = group.exchanges();
        let registry = Registry { backend: Some(Backend::new(group)), ..Registry::default() };
        Arc::new(Core { registry: Mutex::new(registry), exchanges })
    }

    /// Whether the backend lets two ranks exchange something.
    pub(crate) fn exchanges(&self) -> bool {
        self.exchanges
    }

    /// Starts an operation on the buffers, or gives them back if the group is no longer open.
    pub(crate) fn launch(
        &self,
        buffers: Vec<Buffer>,
        start: impl FnOnce(&shim::Group, &[Buffer], Box<Signal>) -> Result<UniquePtr<shim::Work>, cxx::Exception>,
    ) -> Result<Launched, (Error, Vec<Buffer>)> {
        // Refused before anything is lent, so that the buffers can go back.
        let Some(backend) = self.open_backend() else {
            return Err((Error::Aborted, buffers));
        };
        let flight = Arc::<Flight>::default();
        // libtorch's callback owns this half: it may come long after the caller has given up.
        let signal = Box::new(Signal(Arc::clone(&flight)));
        let work: Option<Arc<dyn Poll>> = match start(backend.group(), &buffers, signal) {
            Ok(work) => Some(Arc::new(work)),
            Err(exception) => {
                // It is unknown how far libtorch came, so the buffers count as lent.
                let _ = flight.settle(Err(exception.into()));
                None
            }
        };
        // A backend that reports the end by itself spares its waiters the polling.
        let polled = work.clone().filter(|_| backend.group().polls());
        let id = self.enter(&backend, Arc::clone(&flight), Loan { work, buffers });
        Ok(Launched { id, flight, work: polled })
    }

    /// Polls all operations that are under way.
    fn poll(&self) {
        // Invariant 1: the lock is released at the end of this statement, before libtorch is
        // called.
        let unsettled: Vec<_> = lock(&self.registry).claims.values().filter_map(Claim::unsettled).collect();
        unsettled.iter().for_each(|work| work.poll());
    }

    /// Returns the backend, if the group is open and none of its operations has failed.
    fn open_backend(&self) -> Option<Arc<Backend>> {
        // A failure that nobody has asked for yet must be known before another operation starts.
        self.poll();
        let mut registry = lock(&self.registry);
        // Nobody takes back the buffers of an abandoned operation, so they are freed here once it is
        // over.
        let over = |claim: &Claim| claim.abandoned && claim.has_succeeded();
        let ids = registry.claims.iter().filter(|(_, claim)| over(claim)).map(|(id, _)| *id);
        let ids: Vec<OperationId> = ids.collect();
        let freed: Vec<_> = ids.iter().filter_map(|id| registry.claims.remove(id)).collect();
        let failed = |claim: &Claim| matches!(claim.flight.outcome(), Some(Err(_)));
        // Invariant 2: after a failure the ranks may disagree on which operation comes next.
        let backend = match registry.claims.values().any(failed) {
            true => None,
            false => registry.backend.clone(),
        };
        // Invariant 1: libtorch frees the memory after the lock is released.
        drop(registry);
        drop(freed);
        // Also the peers have to notice, and the waiters of the other operations.
        if backend.is_none() {
            self.abort();
        }
        backend
    }

    /// Registers an operation in flight. If the group was aborted since the launch began, the
    /// operation is aborted too.
    fn enter(&self, backend: &Arc<Backend>, flight: Arc<Flight>, loan: Loan) -> OperationId {
        // Taken after the launch, which is a call of libtorch (invariant 1): an abort may have come in
        // between.
        let mut registry = lock(&self.registry);
        let id = OperationId(registry.next_id);
        registry.next_id += 1;
        // A success that came before the abort still counts: the caller can claim its buffers.
        if registry.backend.is_none() && flight.settle(Err(Error::Aborted)).is_err() {
            backend.park(loan);
        } else {
            registry.claims.insert(id, Claim { flight, loan, abandoned: false });
        }
        id
    }

    /// Takes the buffers of a successful operation.
    pub(crate) fn claim(&self, id: OperationId) -> Vec<Buffer> {
        // The lock ends with this statement; the work, which belongs to libtorch, is dropped after it.
        let claim = lock(&self.registry).claims.remove(&id);
        claim.expect("an operation that succeeded is claimed once").loan.buffers
    }

    /// Gives up the right to an operation's buffers. They are freed once the operation is over.
    pub(crate) fn abandon(&self, id: OperationId) {
        let mut registry = lock(&self.registry);
        // Claimed by `wait`, or parked by an abort.
        let Some(claim) = registry.claims.get_mut(&id) else { return };
        claim.abandoned = true;
        let unsettled = claim.unsettled();
        // Invariant 1: polling may block. The operation may be claimed or parked meanwhile, so it
        // is looked up again below.
        drop(registry);
        if let Some(work) = unsettled {
            work.poll();
        }
        // Locked for a moment to look and to remove; freeing comes after.
        let mut registry = lock(&self.registry);
        let over = registry.claims.get(&id).is_some_and(Claim::has_succeeded);
        let freed = over.then(|| registry.claims.remove(&id));
        drop(registry);
        drop(freed);
    }

    /// Wakes all waiters with an abort, then cuts the connections. The old group winds down in the
    /// background.
    pub(crate) fn abort(&self) {
        let Some(backend) = self.close_registry() else { return };
        backend.cut();
    }

    /// Closes the group to new operations; aborts and parks those in flight.
    fn close_registry(&self) -> Option<Arc<Backend>> {
        let mut registry = lock(&self.registry);
        // The first abort takes the backend. Later ones find none, and have nothing left to do.
        let backend = registry.backend.take()?;
        for (id, claim) in std::mem::take(&mut registry.claims) {
            match claim.flight.settle(Err(Error::Aborted)) {
                // Succeeded before the abort: its caller can still claim the buffers.
                Ok(()) => drop(registry.claims.insert(id, claim)),
                Err(_) => backend.park(claim.loan),
            }
        }
        Some(backend)
    }

    /// Closes the group gently if nothing is in flight, otherwise aborts it.
    pub(crate) fn close(&self) {
        // Asked now, as an operation that is over but not polled would turn this close into an abort.
        self.poll();
        let mut registry = lock(&self.registry);
        // Nothing is in flight, so the destructor waits for nobody; unclaimed buffers are no longer in
        // use.
        if registry.claims.values().all(Claim::has_succeeded) {
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::sync::deadline;
    use crate::{GlooAddress, GlooOptions, Group, MemoryStore};

    const LONG: Duration = Duration::from_secs(20);

    /// Work that signals when it is polled, and does not return before it is released.
    struct Stuck {
        asked: Sender<()>,
        let_go: Mutex<Receiver<()>>,
    }

    impl Poll for Stuck {
        fn poll(&self) {
            let _ = self.asked.send(());
            let _ = lock(&self.let_go).recv();
        }
    }

    fn core() -> Arc<Core> {
        let address = GlooAddress::Hostname("127.0.0.1".into());
        let options = GlooOptions { rank: 0, world_size: 1, timeout: LONG, operation_timeout: LONG, address };
        Group::gloo(options, MemoryStore::new(), "alone").unwrap().into_core()
    }

    /// Invariant 1, wherever an operation is polled.
    #[test]
    fn an_abort_does_not_wait_for_an_answer_of_libtorch() {
        let asks: [fn(&Core, OperationId); 3] =
            [|core, _| drop(core.open_backend()), |core, id| core.abandon(id), |core, _| core.close()];
        for ask in asks {
            let core = core();
            let (asked, is_asked) = channel();
            let (let_go, answer) = channel();
            let flight = Arc::<Flight>::default();
            let work: Arc<dyn Poll> = Arc::new(Stuck { asked, let_go: Mutex::new(answer) });
            let backend = core.open_backend().unwrap();
            let id = core.enter(&backend, flight.clone(), Loan { work: Some(work), buffers: Vec::new() });
            let asking = core.clone();
            let asking = std::thread::spawn(move || ask(&asking, id));
            is_asked.recv_timeout(LONG).unwrap();
            let aborting = core.clone();
            let aborting = std::thread::spawn(move || aborting.abort());
            assert_eq!(flight.wait_until(deadline(LONG)), Some(Err(Error::Aborted)));
            aborting.join().unwrap();
            assert!(!core.is_open() && !asking.is_finished(), "nobody has answered yet");
            assert!(core.open_backend().is_none(), "a new operation is refused at once");
            drop(let_go);
            asking.join().unwrap();
        }
    }
}
