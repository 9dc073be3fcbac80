//! Storage of checkpoints, a folder or an object store, by its address. Coordinator and workers
//! share this crate.
//!
//! 1. A file appears whole or not at all, and stays: in a folder it is on the disk, also after a
//!    power cut, when the call that wrote it returns; an object store promises the same.
//! 2. A created file replaces none. An existing file with the same content counts as success. One
//!    with other content is damaged, because a file's content follows from the job and the update
//!    index, and is written again.
//! 3. A storage belongs to one run, whose name is in its marker.
//! 4. Texts that leave this crate contain no credentials; an address with credentials is refused.
//! 5. No request waits for ever: an object store that does not answer is an error within about half
//!    a minute.
//!
//! ```
//! use ganglion_storage::{Address, Path, PutPayload, Storage};
//!
//! let folder = tempfile::tempdir()?;
//! let address = Address::parse(&folder.path().display().to_string())?;
//! let storage = Storage::open(&address)?;
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! let path = Path::parse("step-00000100/manifest.json")?;
//! storage.put_new(&path, &PutPayload::from_static(b"{}")).await?;
//! assert_eq!(storage.read(&path).await?.as_ref(), b"{}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! assert!(Address::parse("s3://key:secret@bucket/runs").is_err(), "no address has credentials");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod address;
mod blocking;
#[cfg(feature = "cloud")]
mod cloud;
mod failure;
mod layout;
mod name;
mod pause;
pub mod run;
mod transfer;
pub mod whole;

use std::path::PathBuf;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
#[cfg(feature = "cloud")]
use object_store::prefix::PrefixStore;

pub use address::{Address, AddressError};
pub use blocking::Blocking;
pub use bytes::Bytes;
pub use failure::reason;
pub use layout::{BEST, BEST_FORMAT, Claim, LATEST, MANIFEST, MODEL_CARD, Version, in_folder};
pub use name::{BadName, RelativeName};
pub use object_store::path::Path;
pub use object_store::{Error, PutPayload, Result};
pub use pause::Pauses;

/// Open storage.
#[derive(Clone, Debug)]
pub struct Storage {
    store: Arc<dyn ObjectStore>,
    address: Address,
    /// Path of the folder, if the storage is one: operations without a counterpart in object stores
    /// use it directly.
    folder: Option<PathBuf>,
}

impl Storage {
    /// Opens a storage. A folder must exist; an object store is not contacted yet.
    ///
    /// # Errors
    /// Returns the problem and the fix.
    pub fn open(address: &Address) -> std::result::Result<Storage, String> {
        match address {
            Address::Folder(folder) => Storage::open_folder(folder),
            Address::Cloud(url) => Storage::open_cloud(url),
        }
    }

    fn open_folder(folder: &std::path::Path) -> std::result::Result<Storage, String> {
        // A folder that does not exist is an error here, and not the beginning of a new one: it may not
        // be mounted.
        let opened = LocalFileSystem::new_with_prefix(folder).map_err(|error| reason(&error))?;
        // Links and dots are resolved once, so that the folder stays the same for the whole run.
        let folder = folder.canonicalize().map_err(|error| error.to_string())?;
        let store = Arc::new(opened);
        Ok(Storage { store, address: Address::Folder(folder.clone()), folder: Some(folder) })
    }

    #[cfg(feature = "cloud")]
    fn open_cloud(url: &url::Url) -> std::result::Result<Storage, String> {
        let (store, prefix) = cloud::open(url)?;
        let store = Arc::new(PrefixStore::new(store, prefix));
        Ok(Storage { store, address: Address::Cloud(url.clone()), folder: None })
    }

    #[cfg(not(feature = "cloud"))]
    fn open_cloud(_: &url::Url) -> std::result::Result<Storage, String> {
        Err("this program was built for folders only; build it with: make build CLOUD=1".to_string())
    }

    /// Creates a storage in memory, which ends with this process.
    pub fn in_memory() -> Storage {
        let address = Address::Folder(PathBuf::from("memory"));
        Storage { store: Arc::new(InMemory::new()), address, folder: None }
    }

    /// Address of the storage.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether an error only means that the storage, or the way to it, is away and may come back,
    /// and says nothing about the content.
    pub fn is_away(&self, error: &Error) -> bool {
        match self.folder {
            Some(_) => failure::is_passing(error),
            None => failure::may_pass(error),
        }
    }

    /// Whether an error of a folder means that it is full or failing, and not that it is the wrong
    /// one.
    pub fn is_failing(&self, error: &Error) -> bool {
        self.folder.is_some() && failure::is_failing(error)
    }

    /// Removes the drafts that killed writers left beside the checkpoints. For the coordinator
    /// only: no other process writes there.
    pub async fn sweep(&self) -> Result<()> {
        // Object stores have no drafts: uploads in parts appear at their end, or never.
        let Some(folder) = self.folder.clone() else { return Ok(()) };
        // On a thread for blocking work, as it lists and removes files.
        let swept = tokio::task::spawn_blocking(move || whole::sweep(&folder)).await?;
        swept.map_err(|error| Error::Generic { store: "folder", source: error.into() })
    }

    /// Whether waiting may help against an error: the storage is away, or a folder is full,
    /// read-only or failing, which an operator can mend.
    pub fn may_mend(&self, error: &Error) -> bool {
        self.is_away(error) || (self.folder.is_some() && !failure::is_final(error))
    }
}
