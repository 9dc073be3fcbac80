//! A storage for threads that wait for it.

use tokio::runtime::{Builder, Runtime};

use crate::Storage;

/// A storage with a runtime of its own, in which its connections live.
#[derive(Debug)]
pub struct Blocking {
    storage: Storage,
    runtime: Runtime,
}

impl Blocking {
    /// Gives a storage a thread.
    ///
    /// # Errors
    /// What the system said to one more thread.
    pub fn new(storage: Storage) -> std::io::Result<Blocking> {
        let runtime =
            Builder::new_multi_thread().worker_threads(1).thread_name("storage").enable_all().build()?;
        Ok(Blocking { storage, runtime })
    }

    /// The storage.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Waits for something that is done with it. Not to be called from a task.
    pub fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }
}
