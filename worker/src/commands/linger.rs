//! Lingering after the run (`--stay`): for supervisors that restart a worker whenever it ends.

use std::io;

use ganglion_proto::signals::hangup_is_ignored;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Listener for the signals that end a lingering worker. It listens from its creation, so that no signal is
/// lost between training and waiting.
pub(crate) struct Stay {
    runtime: Runtime,
    terminate: Signal,
    interrupt: Signal,
    /// `None` where SIGHUP is ignored.
    hangup: Option<Signal>,
}

impl Stay {
    /// Listens for SIGTERM, SIGINT and SIGHUP. Starts no thread.
    pub(crate) fn listen() -> io::Result<Stay> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let hangup = (!hangup_is_ignored()).then(SignalKind::hangup);
        let (terminate, interrupt, hangup) = {
            let _within = runtime.enter();
            (
                signal(SignalKind::terminate())?,
                signal(SignalKind::interrupt())?,
                hangup.map(signal).transpose()?,
            )
        };
        Ok(Stay { runtime, terminate, interrupt, hangup })
    }

    /// Releases the memory that was kept for training, and waits for one of the signals.
    pub(crate) fn until_asked_to_end(mut self) -> Result<(), c10d::Error> {
        // The saving thread may end later, with the last copy.
        c10d::HostCopy::keep_no_memory();
        c10d::aten::release_memory()?;
        let mut hangup = self.hangup;
        let hung_up = async {
            match &mut hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        self.runtime.block_on(async {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
                _ = hung_up => {}
            }
        });
        Ok(())
    }
}
