//! Transfer of files to and from a storage.
//!
//! 1. A large file goes to an object store in parts, a few at a time, and from it in ranges, so a
//!    slow one delays little that has to be sent again. Parts of a failed upload are removed.
//! 2. An upload in parts cannot be conditional at its end. So a large file that is created is first
//!    uploaded under a temporary name, and then copied, within the store, to its name unless that
//!    is taken.
//!
//! 3. Files of a folder are written by [`crate::whole`], which also knows folders that refuse hard
//!    links.
//!
//! Memory: written content is not copied; content that is only hashed, or sent from a file, is held
//! a few parts at a time.

use std::io::{self, ErrorKind, Read, Write};

use bytes::Bytes;
use object_store::path::Path;
use object_store::{Error, ObjectStoreExt, PutMode, PutOptions, PutPayload, Result, WriteMultipart};

use crate::Storage;
use crate::whole::{self, Draft};

/// Size of a part in bytes; larger files are transferred in parts.
const PART: usize = 8 << 20;
/// Most parts in transfer at once.
const AT_ONCE: usize = 4;
/// Upper bound of the number of parts. Every store accepts 10,000.
const PARTS: usize = 5000;

impl Storage {
    /// Writes a file with this hash unless it exists. An existing file with another content is
    /// damaged, and is written again.
    pub async fn create(&self, path: &Path, content: &PutPayload, blake3: &str) -> Result<()> {
        match self.put_new(path, content).await {
            Err(Error::AlreadyExists { .. }) => {}
            // A success, or an error that says nothing about what is there.
            done => return done,
        }
        // The content follows from the job and the update index, so another one is damage (invariant 2).
        if self.hash(path).await? != blake3 {
            tracing::warn!("{path} is damaged; writing it again");
            self.replace(path, content).await?;
        }
        Ok(())
    }

    /// Writes a file; [`Error::AlreadyExists`] if one exists, with any content.
    pub async fn put_new(&self, path: &Path, content: &PutPayload) -> Result<()> {
        if let Some(folder) = &self.folder {
            // An empty file may be another writer's reservation (`whole::claim`), and does not count as
            // there.
            let there = folder.join(path.as_ref()).symlink_metadata();
            if there.is_ok_and(|there| there.is_file() && there.len() > 0) {
                // This check needs no free space.
                return Err(Error::AlreadyExists { path: path.to_string(), source: "it is there".into() });
            }
            return self.put_local(path, content, Draft::put_new).await;
        }
        if content.content_length() <= PART {
            // A small file is one request, which the store itself makes conditional.
            let create = PutOptions::from(PutMode::Create);
            return self.store.put_opts(path, content.clone(), create).await.map(drop);
        }
        // Spares the upload of a file that exists; the conditional copy below decides.
        if self.exists(path).await? {
            return Err(Error::AlreadyExists { path: path.to_string(), source: "it is there".into() });
        }
        let staged = staged(path);
        // A wait without limit of its own: each request in it has one (`cloud::retries`).
        self.put_in_parts(&staged, content).await?;
        let copied = self.store.copy_if_not_exists(&staged, path).await;
        // If the temporary file stays, it is removed with the folder.
        let _ = self.store.delete(&staged).await;
        // The copy's result decides, not the upload's: another writer may have taken the name meanwhile.
        copied
    }

    /// Writes a file, replacing an existing one.
    pub async fn replace(&self, path: &Path, content: &PutPayload) -> Result<()> {
        if self.folder.is_some() {
            return self.put_local(path, content, Draft::put).await;
        }
        if content.content_length() <= PART {
            return self.store.put(path, content.clone()).await.map(drop);
        }
        self.put_in_parts(path, content).await
    }

    async fn put_local(
        &self,
        path: &Path,
        content: &PutPayload,
        put: fn(Draft) -> io::Result<()>,
    ) -> Result<()> {
        let content = content.clone();
        let length = content.content_length();
        self.write_local(path, length, move |draft| {
            content.iter().try_for_each(|piece| draft.file().write_all(piece))?;
            put(draft)
        })
        .await
    }

    /// Writes a file of a folder on a blocking thread, since that may take long.
    async fn write_local(
        &self,
        path: &Path,
        length: usize,
        write: impl FnOnce(Draft) -> io::Result<()> + Send + 'static,
    ) -> Result<()> {
        let target = self.folder.as_ref().expect("the storage is a folder").join(path.as_ref());
        let (path, above) = (path.to_string(), target.parent().map(std::path::Path::to_path_buf));
        let failed = |error: io::Error| Error::Generic { store: "folder", source: error.into() };
        let work = move || {
            // A checkpoint's folder appears with its first file, whichever part of it that is.
            whole::create_folders(&above.unwrap_or_default()).map_err(failed)?;
            match Draft::beside(&target).and_then(write) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    Err(Error::AlreadyExists { path, source: error.into() })
                }
                written => written.map_err(|error| failed(whole::explain(error, length, &target))),
            }
        };
        // Waits for the disk or a network file system; not bounded here, as nothing ends a blocked
        // write.
        tokio::task::spawn_blocking(work).await?
    }

    async fn put_in_parts(&self, path: &Path, content: &PutPayload) -> Result<()> {
        let mut upload = self.begin_upload(path, content.content_length()).await?;
        for mut piece in content.iter().cloned() {
            while !piece.is_empty() {
                // Slices of the same memory: content that is written is not copied.
                let part = piece.split_to(piece.len().min(PART));
                upload = pushed(upload, part).await?;
            }
        }
        upload.finish().await.map(drop)
    }

    /// Sends a file of this machine, replacing an existing one. A growing file is sent up to its
    /// length at the start.
    pub async fn send(&self, path: &Path, mut file: std::fs::File) -> Result<()> {
        let failed = |error: std::io::Error| Error::Generic { store: "file", source: error.into() };
        // Read once: a log may grow while it is sent, and the number of parts follows from the length.
        let length = usize::try_from(file.metadata().map_err(failed)?.len()).unwrap_or(usize::MAX);
        if self.folder.is_some() {
            let copy = move |draft: Draft| {
                io::copy(&mut file.take(length as u64), &mut draft.file())?;
                draft.put()
            };
            return self.write_local(path, length, copy).await;
        }
        let mut next = |left: usize| -> Result<Bytes> {
            let mut part = vec![0; left.min(PART)];
            file.read_exact(&mut part).map_err(failed)?;
            Ok(part.into())
        };
        if length <= PART {
            return self.store.put(path, next(length)?.into()).await.map(drop);
        }
        let mut upload = self.begin_upload(path, length).await?;
        let mut left = length;
        while left > 0 {
            let part = match next(left) {
                Ok(part) => part,
                Err(error) => {
                    // The store keeps parts of an unfinished upload, and charges for them.
                    let _ = upload.abort().await;
                    return Err(error);
                }
            };
            left -= part.len();
            upload = pushed(upload, part).await?;
        }
        upload.finish().await.map(drop)
    }

    async fn begin_upload(&self, path: &Path, length: usize) -> Result<WriteMultipart> {
        let upload = self.store.put_multipart(path).await?;
        // Parts grow with the file, so that their number stays below what stores accept.
        Ok(WriteMultipart::new_with_chunk_size(upload, PART.max(length.div_ceil(PARTS))))
    }

    /// Whether a file exists.
    pub async fn exists(&self, path: &Path) -> Result<bool> {
        match self.store.head(path).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns a file's content.
    pub async fn read(&self, path: &Path) -> Result<Bytes> {
        let mut parts = Vec::new();
        self.each_part(path, |part| {
            parts.push(part);
            Ok(())
        })
        .await?;
        // One part needs no copy.
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { parts.concat().into() })
    }

    /// Returns blake3 of a file's content, in hex.
    pub async fn hash(&self, path: &Path) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        self.each_part(path, |part| {
            hasher.update(&part);
            Ok(())
        })
        .await?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Copies a file's content to a file of this machine.
    pub async fn fetch(&self, path: &Path, mut to: &std::fs::File) -> Result<()> {
        let failed = |error: std::io::Error| Error::Generic { store: "file", source: error.into() };
        self.each_part(path, |part| to.write_all(&part).map_err(failed)).await
    }

    /// Passes a file's parts to `take`, in their order.
    async fn each_part(&self, path: &Path, mut take: impl FnMut(Bytes) -> Result<()>) -> Result<()> {
        let whole = self.store.get(path).await?;
        let length = whole.meta.size;
        if length <= PART as u64 {
            return take(whole.bytes().await?);
        }
        // Ends the first request, whose body is not read: the content is read in ranges instead.
        drop(whole);
        for start in (0..length).step_by(PART) {
            // One at a time, so that memory holds one part. Each has the limit of a request.
            take(self.store.get_range(path, start..length.min(start + PART as u64)).await?)?;
        }
        Ok(())
    }
}

/// Adds a part to an upload once there is capacity; aborts an upload that failed.
async fn pushed(mut upload: WriteMultipart, part: Bytes) -> Result<WriteMultipart> {
    // Bounds the memory that parts in transfer take.
    if let Err(error) = upload.wait_for_capacity(AT_ONCE).await {
        let _ = upload.abort().await;
        return Err(error);
    }
    // Only queued here; an error of this part shows at the next one, or at the end.
    upload.put(part);
    Ok(upload)
}

/// Returns a temporary name beside a file's, which no other writer uses.
fn staged(path: &Path) -> Path {
    use std::hash::{BuildHasher, RandomState};
    // Drawn anew: two processes on different machines may have the same number.
    let own = RandomState::new().hash_one(std::process::id());
    Path::from(format!("{path}.{own:016x}.new"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(length: usize) -> (PutPayload, Bytes, String) {
        let bytes: Bytes =
            (0..length).map(|i| u8::try_from(i * i / 7 % 251).unwrap()).collect::<Vec<u8>>().into();
        // In two pieces, like a file with a header.
        let (front, rest) = (bytes.slice(..length / 3), bytes.slice(length / 3..));
        let hash = blake3::hash(&bytes).to_hex().to_string();
        (PutPayload::from_iter([front, rest]), bytes, hash)
    }

    fn storages() -> (tempfile::TempDir, [Storage; 2]) {
        let folder = tempfile::tempdir().unwrap();
        let address = crate::Address::Folder(folder.path().to_path_buf());
        let storages = [Storage::open(&address).unwrap(), Storage::in_memory()];
        (folder, storages)
    }

    /// Invariant 2 of the crate, for small files and for large ones.
    #[tokio::test]
    async fn a_file_is_created_once_and_written_again_if_it_is_damaged() {
        let (_folder, storages) = storages();
        for storage in storages {
            for length in [0, 5, PART, 2 * PART + 77] {
                let path = Path::from(format!("step-00000001/{length}"));
                let (payload, bytes, hash) = content(length);
                storage.create(&path, &payload, &hash).await.unwrap();
                assert!(storage.read(&path).await.unwrap() == bytes);
                let there = storage.put_new(&path, &payload).await;
                assert!(matches!(there, Err(Error::AlreadyExists { .. })), "{there:?}");
                storage.create(&path, &payload, &hash).await.unwrap();
                storage.replace(&path, &PutPayload::from_static(b"damaged")).await.unwrap();
                storage.create(&path, &payload, &hash).await.unwrap();
                assert_eq!(storage.hash(&path).await.unwrap(), hash);
                let copy = tempfile::NamedTempFile::new().unwrap();
                storage.fetch(&path, copy.as_file()).await.unwrap();
                assert!(std::fs::read(copy.path()).unwrap() == bytes);
            }
            let files = storage.files("step-00000001").await.unwrap();
            assert_eq!(files.len(), 4, "nothing else stays: {files:?}");
        }
    }

    #[tokio::test]
    async fn a_file_of_this_machine_is_sent_in_parts() {
        let (folder, storages) = storages();
        for storage in storages {
            for length in [0, 9, 2 * PART + 1] {
                let (_, bytes, _) = content(length);
                let file = folder.path().join("file");
                std::fs::write(&file, &bytes).unwrap();
                storage.send(&Path::from("copy"), std::fs::File::open(&file).unwrap()).await.unwrap();
                assert!(storage.read(&Path::from("copy")).await.unwrap() == bytes);
            }
        }
    }
}
