//! Storage for threads that block on it.

use tokio::runtime::{Builder, Runtime};

use crate::Storage;

/// Storage with its own runtime, in which its connections live.
#[derive(Debug)]
pub struct Blocking {
    storage: Storage,
    runtime: Runtime,
}

impl Blocking {
    /// Gives a storage its own runtime.
    ///
    /// # Errors
    /// The system refuses one more thread.
    pub fn new(storage: Storage) -> std::io::Result<Blocking> {
        let runtime =
            // A thread of its own drives the connections also while nobody is in `wait`: an idle one
            // must still answer its server.
            Builder::new_multi_thread().worker_threads(1).thread_name("storage").enable_all().build()?;
        Ok(Blocking { storage, runtime })
    }

    /// Storage to be used in [`Blocking::wait`].
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Blocks until `work` is done. Must not be called from an async task.
    pub fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }
}
