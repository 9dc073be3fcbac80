//! From text to tokens and back: bytes, or a tokenizer of Hugging Face's format.

use std::fmt;
use std::path::Path;
#[cfg(feature = "tokenizers")]
use std::sync::Arc;

/// Most bytes of a tokenizer file.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Tokens between two documents, of tokenizers that have one of them. Else documents are set apart by an
/// empty line.
#[cfg(feature = "tokenizers")]
const SEPARATORS: [&str; 6] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]"];

/// Turns text into tokens and back. Copies share a tokenizer.
#[derive(Clone)]
pub struct TextCodec {
    kind: Kind,
    vocabulary: u32,
    separator: Vec<u32>,
    hash: blake3::Hash,
}

#[derive(Clone)]
enum Kind {
    Bytes,
    #[cfg(feature = "tokenizers")]
    Tokenizer(Arc<tokenizers::Tokenizer>),
}

impl fmt::Debug for TextCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_bytes() { "bytes" } else { "tokenizer" };
        write!(f, "{kind} of {} tokens", self.vocabulary)
    }
}

impl TextCodec {
    /// Each byte is a token.
    pub fn bytes() -> TextCodec {
        // No text has such a byte.
        TextCodec { kind: Kind::Bytes, vocabulary: 256, separator: vec![0], hash: blake3::hash(b"bytes") }
    }

    /// Reads a `tokenizer.json` of Hugging Face's format.
    ///
    /// # Errors
    /// The file is no tokenizer; the text says why, and how to fix it.
    pub fn open(file: &Path) -> Result<TextCodec, String> {
        let unreadable = |error| format!("cannot be read: {error}");
        let about = std::fs::metadata(file).map_err(unreadable)?;
        if !about.is_file() {
            return Err("is no file; name a tokenizer.json".to_owned());
        }
        if about.len() > MAX_FILE_BYTES {
            return Err(format!("has {} bytes, more than a tokenizer.json; name one", about.len()));
        }
        TextCodec::read(&std::fs::read(file).map_err(unreadable)?)
    }

    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`open`](TextCodec::open).
    #[cfg(feature = "tokenizers")]
    pub fn read(bytes: &[u8]) -> Result<TextCodec, String> {
        use tokenizers::{ModelWrapper, Tokenizer};

        const ANOTHER: &str = "name a tokenizer.json, as Hugging Face's tokenizers save it";
        if let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(bytes) {
            return Err(format!("is no JSON ({error}); {ANOTHER}"));
        }
        // The library may panic on a damaged file, such as one with a merge of tokens that there are not.
        let parsed = std::panic::catch_unwind(|| Tokenizer::from_bytes(bytes));
        let mut tokenizer = match parsed {
            Ok(Ok(tokenizer)) => tokenizer,
            Ok(Err(error)) => return Err(format!("is JSON, but no tokenizer ({error}); {ANOTHER}")),
            Err(_) => return Err(format!("is a damaged tokenizer; {ANOTHER}")),
        };
        if matches!(tokenizer.get_model(), ModelWrapper::BPE(model) if model.dropout.is_some_and(|p| p > 0.0))
        {
            return Err(
                "drops merges at random, so that a text has other tokens each time; set its dropout to null"
                    .to_owned(),
            );
        }
        // Files made for a model with a limit would cut each text there.
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?.with_padding(None);
        let greatest = tokenizer.get_vocab(true).into_values().max();
        // Numbers may have gaps, so the greatest counts.
        let vocabulary =
            greatest.and_then(|greatest| greatest.checked_add(1)).filter(|count| *count <= 1 << 24);
        let vocabulary =
            vocabulary.ok_or_else(|| format!("has no tokens, or numbers above 2^24; {ANOTHER}"))?;
        let kind = Kind::Tokenizer(Arc::new(tokenizer));
        let mut codec = TextCodec { kind, vocabulary, separator: Vec::new(), hash: blake3::hash(bytes) };
        let Kind::Tokenizer(tokenizer) = &codec.kind else { unreachable!("made above") };
        let special = SEPARATORS.iter().find_map(|name| tokenizer.token_to_id(name));
        codec.separator = match special {
            Some(token) => vec![token],
            None => codec.encode("\n\n")?,
        };
        Ok(codec)
    }

    /// Refuses the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// This build reads none.
    #[cfg(not(feature = "tokenizers"))]
    pub fn read(_: &[u8]) -> Result<TextCodec, String> {
        Err("this worker is built without the feature tokenizers; remove data.tokenizer to train on bytes"
            .to_owned())
    }

    /// Returns the tokens of a text.
    ///
    /// # Errors
    /// The tokenizer has no tokens for it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            #[cfg(feature = "tokenizers")]
            Kind::Tokenizer(tokenizer) => {
                let tokenizer = std::panic::AssertUnwindSafe(tokenizer);
                // Without the tokens that a tokenizer puts around a text: texts are cut anywhere.
                let encoded = std::panic::catch_unwind(|| tokenizer.encode_fast(text, false));
                let encoded = encoded.map_err(|_| "the tokenizer failed".to_owned())?;
                encoded.map(|encoding| encoding.get_ids().to_vec()).map_err(|error| error.to_string())
            }
        }
    }

    /// Returns the text of tokens. The bytes of a character may be incomplete where tokens begin or end.
    ///
    /// # Errors
    /// A token is not of the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<Vec<u8>, String> {
        match &self.kind {
            Kind::Bytes => {
                let byte = |token: &u32| u8::try_from(*token).map_err(|_| format!("{token} is no byte"));
                tokens.iter().map(byte).collect()
            }
            #[cfg(feature = "tokenizers")]
            Kind::Tokenizer(tokenizer) => {
                tokenizer.decode(tokens, false).map(String::into_bytes).map_err(|error| error.to_string())
            }
        }
    }

    /// Whether each byte is a token.
    pub fn is_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes)
    }

    /// Number of different tokens: each is below it.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// Tokens between two documents.
    pub fn separator(&self) -> &[u32] {
        &self.separator
    }

    /// Hash of the tokenizer's file.
    pub fn hash(&self) -> blake3::Hash {
        self.hash
    }

    /// Bytes that a token takes in a file.
    pub(super) fn width(&self) -> usize {
        match self.vocabulary {
            0..=0x100 => 1,
            0x101..=0x1_0000 => 2,
            _ => 4,
        }
    }
}
