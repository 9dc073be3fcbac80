//! Text: the tokens of all documents one after the other, cut into pieces of fixed places.
//!
//! 1. Sample i is tokens [i * context, i * context + context], the last of which is the first of the next
//!    one. So each token but the first is predicted once in an epoch.
//! 2. Between two documents stands a separator. Documents are files, in the order of their names.
//! 3. Tokens are read where they lie, by their place: bytes of plain files in the files themselves, all
//!    others in a cache (`cache.rs`). Memory holds a place for each document.
//! 4. The fingerprint covers every token.

mod cache;
mod codec;
mod documents;

use std::path::Path;

use ganglion_proto::job::Data;
use ganglion_proto::record::found::Found;
use ganglion_proto::words::counted;

pub use self::codec::TextCodec;
use self::documents::Documents;
pub(super) use self::documents::is_document;
use super::shape::TokenShape;
use super::{DataError, input};

/// The text of a data set.
#[derive(Debug)]
pub struct Text {
    store: Store,
    codec: TextCodec,
    shape: TokenShape,
    tokens: u64,
    /// Length of the text that the tokens are of.
    bytes: u64,
    /// Hash of all tokens, each in as many bytes as the vocabulary needs.
    hash: blake3::Hash,
}

/// Place of the tokens.
#[derive(Debug)]
enum Store {
    /// Bytes in the files of the documents.
    Files(Documents),
    Cached(cache::Tokens),
}

impl Text {
    /// Opens the text of section `[data]`. The data are on this machine.
    pub(super) fn open(source: &Data, path: &Path, found: &mut Found) -> Result<Text, DataError> {
        let codec = match &source.tokenizer {
            None => TextCodec::bytes(),
            Some(file) => TextCodec::open(file).map_err(|problem| {
                DataError::Input(format!("data.tokenizer: {}: {problem}", file.display()))
            })?,
        };
        check_hash(source, &codec)?;
        let context = source.context.ok_or_else(|| DataError::Input("data.context is missing".to_owned()))?;
        let documents = Documents::find(path, found)?;
        let shape = TokenShape { context: context as usize, vocabulary: codec.vocabulary() };
        let text = if codec.is_bytes() && !documents.are_packed() {
            let (bytes, hash) = documents.hash()?;
            let tokens = documents.tokens();
            Text { store: Store::Files(documents), codec, shape, tokens, bytes, hash }
        } else {
            let cached = cache::open(path, &documents, &codec)?;
            let (tokens, bytes, hash) = (cached.tokens, cached.bytes, cached.hash);
            Text { store: Store::Cached(cached), codec, shape, tokens, bytes, hash }
        };
        text.check(path)?;
        Ok(text)
    }

    fn check(&self, path: &Path) -> Result<(), DataError> {
        let needed = self.shape.numel();
        if self.tokens < needed as u64 {
            let found = match self.tokens {
                0 => "no text".to_owned(),
                tokens => counted(tokens, "token"),
            };
            return Err(input(
                path,
                &format!(
                    "found {found}, and a sample takes {needed} (data.context + 1); give more text, or lower data.context"
                ),
            ));
        }
        if self.samples() > u64::from(u32::MAX) {
            return Err(input(path, "found more samples than 2^32 - 1; raise data.context"));
        }
        Ok(())
    }

    /// Number of samples, at least 1.
    pub(super) fn samples(&self) -> u64 {
        // The last token of a sample is only predicted, and begins the next sample.
        self.tokens.saturating_sub(1) / self.shape.context as u64
    }

    /// Reads the tokens of a sample.
    pub(super) fn read(&self, sample: usize, out: &mut [i64]) -> Result<(), DataError> {
        let first = sample as u64 * self.shape.context as u64;
        let width = self.codec.width();
        let mut bytes = vec![0; out.len() * width];
        match &self.store {
            Store::Files(documents) => documents.read(first, &mut bytes)?,
            Store::Cached(cached) => cached.read(first * width as u64, &mut bytes)?,
        }
        for (token, bytes) in out.iter_mut().zip(bytes.chunks_exact(width)) {
            let mut all = [0; 8];
            all[..width].copy_from_slice(bytes);
            *token = i64::from_le_bytes(all);
        }
        Ok(())
    }

    /// Size of a sample.
    pub(super) fn shape(&self) -> TokenShape {
        self.shape
    }

    /// Number of tokens that a sample predicts.
    pub(super) fn context(&self) -> u32 {
        u32::try_from(self.shape.context).expect("the job has it with 32 bits")
    }

    /// Hash of all tokens and of what they mean.
    pub(super) fn content(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.codec.hash().as_bytes());
        hasher.update(self.hash.as_bytes());
        hasher.finalize()
    }

    /// Number of tokens of the whole text.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Length of the whole text in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// From text to tokens and back.
    pub fn codec(&self) -> &TextCodec {
        &self.codec
    }
}

/// Checks that the tokenizer is the one of the run.
fn check_hash(source: &Data, codec: &TextCodec) -> Result<(), DataError> {
    let (Some(wanted), Some(file)) = (&source.tokenizer_hash, &source.tokenizer) else { return Ok(()) };
    if *wanted == codec.hash().to_hex().as_str() {
        return Ok(());
    }
    Err(DataError::Input(format!(
        "data.tokenizer: {}: is another tokenizer than the run's: its hash begins with {}, and the run's with {}; put the \
         same file there on each machine, as it was when the run began",
        file.display(),
        &codec.hash().to_hex()[..12],
        wanted.get(..12).unwrap_or(wanted)
    )))
}
