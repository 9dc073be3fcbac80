//! Operations in flight, and their abort.
//!
//! 1. Every wait is limited.
//! 2. A wait returns at once when its group is aborted, whatever libtorch is doing.
//! 3. After an abort, a timeout or a failure the buffers never come back.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::core::{Core, Launched};
use crate::flight::Outcome;
use crate::staging::Staged;
use crate::sync::deadline;
use crate::{Buffer, Error};

/// Interval at which a backend that does not report the end of an operation by itself is polled.
// Linux rounds a shorter sleep up to about this: its timers have a slack of 50 us.
const POLL_INTERVAL: Duration = Duration::from_micros(50);

mod sealed {
    use crate::Buffer;

    /// Conversion of lent values to buffers and back.
    pub trait Parts: Sized {
        fn into_buffers(self) -> Vec<Buffer>;
        fn from_buffers(buffers: Vec<Buffer>) -> Self;
    }
}
pub(crate) use sealed::Parts;

/// Values that can be lent to an operation: nothing, a buffer, or two.
pub trait Lent: Parts {}

impl<T: Parts> Lent for T {}

const COUNT: &str = "as many buffers come back as were lent";

impl Parts for () {
    fn into_buffers(self) -> Vec<Buffer> {
        Vec::new()
    }
    fn from_buffers(_: Vec<Buffer>) {}
}

impl Parts for Buffer {
    fn into_buffers(self) -> Vec<Buffer> {
        vec![self]
    }
    fn from_buffers(buffers: Vec<Buffer>) -> Buffer {
        let [buffer] = <[Buffer; 1]>::try_from(buffers).expect(COUNT);
        buffer
    }
}

impl Parts for (Buffer, Buffer) {
    fn into_buffers(self) -> Vec<Buffer> {
        vec![self.0, self.1]
    }
    fn from_buffers(buffers: Vec<Buffer>) -> (Buffer, Buffer) {
        let [send, receive] = <[Buffer; 2]>::try_from(buffers).expect(COUNT);
        (send, receive)
    }
}

/// Operation in flight, which holds the buffers `T` until it has succeeded.
///
/// Dropping it gives the buffers up: the operation goes on, and they are freed once it is over.
#[must_use = "the operation's buffers come back through wait"]
pub struct Pending<T: Lent> {
    core: Arc<Core>,
    launched: Launched,
    /// Buffers of the caller, if copies of them are sent.
    staged: Option<Staged>,
    lent: std::marker::PhantomData<fn() -> T>,
}

impl<T: Lent> Pending<T> {
    pub(crate) fn new(core: Arc<Core>, launched: Launched, staged: Option<Staged>) -> Pending<T> {
        Pending { core, launched, staged, lent: std::marker::PhantomData }
    }

    /// Waits until the operation has succeeded, and returns its buffers.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::PeerLost`], [`Error::Aborted`] or [`Error::Fatal`]. Each of them breaks
    /// the group: its other operations are aborted, and later ones are refused as [`Error::Aborted`].
    pub fn wait(mut self, timeout: Duration) -> Result<T, Error> {
        let outcome = match self.sleep_until(deadline(timeout)) {
            Some(outcome) => outcome,
            // The operation may have ended just now; then its own outcome counts.
            None => self.launched.flight.settle(Err(Error::Timeout)),
        };
        let done = outcome.and_then(|()| self.take_buffers());
        // A peer may wait in this operation or the next: an abort cuts the connections, so it notices.
        if done.is_err() {
            self.core.abort();
        }
        done.map(T::from_buffers)
    }

    /// Returns the caller's buffers of a successful operation.
    fn take_buffers(&mut self) -> Result<Vec<Buffer>, Error> {
        let came = self.core.claim(self.launched.id);
        match self.staged.take() {
            None => Ok(came),
            // Copied on this thread, after the success: no other thread writes the caller's memory.
            Some(staged) => staged.finish(&came),
        }
    }

    /// Whether the operation is over, with any outcome, so that `wait` would not sleep.
    pub fn is_done(&self) -> bool {
        self.poll();
        self.launched.flight.outcome().is_some()
    }

    fn poll(&self) {
        if let Some(work) = &self.launched.work {
            work.poll();
        }
    }

    fn sleep_until(&self, end: Instant) -> Option<Outcome> {
        if self.launched.work.is_none() {
            // libtorch reports the end by itself, so nothing has to be polled.
            return self.launched.flight.wait_until(end);
        }
        loop {
            // At the limit too: an operation that ended in the last interval counts as ended.
            self.poll();
            let now = Instant::now();
            let outcome = self.launched.flight.wait_until(end.min(now + POLL_INTERVAL));
            if outcome.is_some() || now >= end {
                return outcome;
            }
        }
    }
}

impl<T: Lent> Drop for Pending<T> {
    fn drop(&mut self) {
        // After `wait` the operation is claimed or parked, and this does nothing.
        self.core.abandon(self.launched.id);
    }
}

impl<T: Lent> std::fmt::Debug for Pending<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let outcome = self.launched.flight.outcome();
        formatter.debug_struct("Pending").field("id", &self.launched.id).field("outcome", &outcome).finish()
    }
}

/// Handle that ends all operations of one group from any thread. It does not keep the group alive.
#[derive(Clone)]
pub struct Aborter(Weak<Core>);

impl Aborter {
    pub(crate) fn new(core: &Arc<Core>) -> Aborter {
        Aborter(Arc::downgrade(core))
    }

    /// Wakes all waiters of the group's operations with [`Error::Aborted`], then cuts its
    /// connections. A peer notices if it is just waiting for this rank; one that waits for another
    /// rank has to be aborted too. Later operations are refused. A second call, or one after the
    /// group is gone, has no effect.
    pub fn abort(&self) {
        if let Some(core) = self.0.upgrade() {
            core.abort();
        }
    }
}
