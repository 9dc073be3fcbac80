//! Tokens of a text in a file: made once, beside the data, or in the folder for fetched data where nothing
//! can be written there.
//!
//! 1. The file appears whole. Its header has the hash of the tokens, and the key that it was made for: the
//!    hash of the documents, of the tokenizer, and of how both are put together. It is read whole, and
//!    compared, before it is used; a damaged one is made again.
//! 2. The workers of a machine share it. One makes it, the others wait; without locks each makes the same.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ganglion_proto::printable_start;
use ganglion_storage::whole;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::codec::TextCodec;
use super::documents::{Document, Documents, MAX_UNPACKED};
use crate::data::{DataError, input, parallel, remote};

/// Form of the file, and of the cutting of documents into pieces.
const FORM: u32 = 1;
/// Length of the header: a line of JSON, filled up with spaces.
const HEADER_BYTES: usize = 512;
/// Bytes of text that are turned into tokens at once. They end with a line, where there is one.
const PIECE: usize = 1 << 18;
/// Number of pieces in memory.
const PIECES: usize = 32;

/// The tokens of a text, in a file.
#[derive(Debug)]
pub(super) struct Tokens {
    file: File,
    path: PathBuf,
    pub(super) tokens: u64,
    pub(super) bytes: u64,
    pub(super) hash: blake3::Hash,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    /// Names what the file is to who looks into it.
    ganglion_tokens: u32,
    key: String,
    /// Bytes of a token, little-endian.
    width: usize,
    tokens: u64,
    /// Length of the text in bytes.
    text_bytes: u64,
    blake3: String,
}

/// Opens the tokens of documents, and makes them first if they are not there.
pub(super) fn open(source: &Path, documents: &Documents, codec: &TextCodec) -> Result<Tokens, DataError> {
    let key = key(documents, codec)?;
    let _turn = turn(source);
    let places = places(source, &key);
    if let Some(tokens) = places.iter().find_map(|place| check(place, &key, codec)) {
        return Ok(tokens);
    }
    for (place, is_last) in places.iter().zip((1..).map(|count| count == places.len())) {
        tracing::info!("turning text into tokens, kept in {}", place.display());
        match make(place, &key, documents, codec) {
            Ok(()) => {
                let damaged = || io::Error::other("the tokens are damaged right after they were written");
                let system = || DataError::System { path: place.clone(), source: damaged() };
                return check(place, &key, codec).ok_or_else(system);
            }
            Err(Failed::Data(error)) => return Err(error),
            // The folder of the data may be for reading alone.
            Err(Failed::Write(error)) if whole::is_mistake(&error) && !is_last => {}
            Err(Failed::Write(source)) => return Err(DataError::System { path: place.clone(), source }),
        }
    }
    unreachable!("the last place ends the loop")
}

/// Hash of all that the tokens follow from.
fn key(documents: &Documents, codec: &TextCodec) -> Result<String, DataError> {
    let mut hasher = blake3::Hasher::new_derive_key("ganglion 2026 tokens");
    hasher.update(&FORM.to_le_bytes());
    hasher.update(codec.hash().as_bytes());
    for document in &documents.0 {
        let mut own = blake3::Hasher::new();
        let length = document.update(&mut own)?;
        hasher.update(&length.to_le_bytes());
        hasher.update(&[u8::from(document.is_packed)]);
        hasher.update(own.finalize().as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Places for the file: beside the data, in the folder for fetched data, and in that for temporary files.
fn places(source: &Path, key: &str) -> Vec<PathBuf> {
    let name = source.file_name().map_or("text".into(), |name| name.to_string_lossy());
    // A file system's names have at most 255 bytes.
    let name = format!("{}.tokens-{}", printable_start(&name, 50), &key[..16]);
    let folders = [remote::cache().ok(), Some(std::env::temp_dir())];
    let elsewhere = folders.into_iter().flatten().map(|folder| folder.join(&name));
    std::iter::once(source.with_file_name(&name)).chain(elsewhere).collect()
}

/// Waits until no other worker of this machine makes the tokens of a source; they are free again once the
/// result is dropped. Returns `None` where files cannot be locked.
fn turn(source: &Path) -> Option<File> {
    let file = File::open(source).ok()?;
    loop {
        // Bounded: the system releases the lock when its holder ends.
        match flock(&file, FlockOperation::LockExclusive) {
            Ok(()) => return Some(file),
            Err(Errno::INTR) => {}
            // Each worker makes the tokens then, and puts the same whole file in place.
            Err(_) => return None,
        }
    }
}

/// Opens the file of tokens at a place, if it is there, whole, and of this key.
fn check(path: &Path, key: &str, codec: &TextCodec) -> Option<Tokens> {
    let file = File::open(path).ok()?;
    match verify(&file, key, codec) {
        Ok(header) => {
            let hash = blake3::Hash::from_hex(&header.blake3).ok()?;
            Some(Tokens {
                file,
                path: path.to_owned(),
                tokens: header.tokens,
                bytes: header.text_bytes,
                hash,
            })
        }
        Err(problem) => {
            tracing::warn!("{}: {problem}; the tokens are made again", path.display());
            None
        }
    }
}

fn verify(file: &File, key: &str, codec: &TextCodec) -> Result<Header, String> {
    let mut reader = BufReader::new(file);
    let mut head = [0; HEADER_BYTES];
    reader.read_exact(&mut head).map_err(|error| error.to_string())?;
    let header: Header =
        serde_json::from_slice(&head).map_err(|error| format!("no file of tokens: {error}"))?;
    if (header.ganglion_tokens, header.key.as_str(), header.width) != (FORM, key, codec.width()) {
        return Err("tokens of another text".to_owned());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut reader).map_err(|error| error.to_string())?;
    // Of what lies there, at each opening.
    if hasher.count() != header.tokens.saturating_mul(header.width as u64)
        || hasher.finalize().to_hex().as_str() != header.blake3
    {
        return Err("damaged".to_owned());
    }
    Ok(header)
}

/// Reasons why the tokens were not made.
enum Failed {
    Data(DataError),
    Write(io::Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Write(error)
    }
}

impl From<DataError> for Failed {
    fn from(error: DataError) -> Failed {
        Failed::Data(error)
    }
}

/// Turns the documents into tokens, in a file that appears whole.
fn make(path: &Path, key: &str, documents: &Documents, codec: &TextCodec) -> Result<(), Failed> {
    whole::create_folders(path.parent().unwrap_or(Path::new("")))?;
    whole::write_by(path, |file| -> Result<(), Failed> {
        let mut out =
            Out { file: BufWriter::new(file), hasher: blake3::Hasher::new(), tokens: 0, bytes: 0, codec };
        out.file.write_all(&[b' '; HEADER_BYTES])?;
        for (index, document) in documents.0.iter().enumerate() {
            if index > 0 {
                out.write(codec.separator())?;
            }
            out.document(document)?;
        }
        let header = Header {
            ganglion_tokens: FORM,
            key: key.to_owned(),
            width: codec.width(),
            tokens: out.tokens,
            text_bytes: out.bytes,
            blake3: out.hasher.finalize().to_hex().to_string(),
        };
        let header = serde_json::to_vec(&header).map_err(io::Error::other)?;
        let mut file = out.file;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header)?;
        // The rest of the line stays spaces.
        file.seek(SeekFrom::Start(HEADER_BYTES as u64 - 1))?;
        file.write_all(b"\n")?;
        file.flush()?;
        Ok(())
    })
}

/// The file of tokens that is being written.
struct Out<'a, W: Write> {
    file: W,
    hasher: blake3::Hasher,
    tokens: u64,
    bytes: u64,
    codec: &'a TextCodec,
}

impl<W: Write> Out<'_, W> {
    fn write(&mut self, tokens: &[u32]) -> io::Result<()> {
        let width = self.codec.width();
        let bytes: Vec<u8> =
            tokens.iter().flat_map(|token| token.to_le_bytes().into_iter().take(width)).collect();
        self.hasher.update(&bytes);
        self.tokens += tokens.len() as u64;
        self.file.write_all(&bytes)
    }

    /// Adds the tokens of a document, piece by piece.
    fn document(&mut self, document: &Document) -> Result<(), Failed> {
        let mut pieces = Pieces { reader: document.open()?, left: Vec::new(), at_end: false };
        let mut offset = 0;
        loop {
            let mut some = Vec::new();
            while some.len() < PIECES {
                let Some(piece) = pieces.next().map_err(|error| document.unreadable(error))? else { break };
                let length = piece.len() as u64;
                some.push((offset, piece));
                offset += length;
                if document.is_packed && offset > MAX_UNPACKED {
                    let problem =
                        format!("unpacks to more than {MAX_UNPACKED} bytes; unpack it to train on it");
                    return Err(input(&document.path, &problem).into());
                }
            }
            if some.is_empty() {
                self.bytes += offset;
                return Ok(());
            }
            let codec = self.codec;
            for tokens in
                parallel::map_blocks(&some, 1, |(offset, piece)| encode(codec, document, *offset, piece))?
            {
                self.write(&tokens)?;
            }
        }
    }
}

fn encode(codec: &TextCodec, document: &Document, offset: u64, piece: &[u8]) -> Result<Vec<u32>, DataError> {
    if codec.is_bytes() {
        return Ok(piece.iter().map(|byte| u32::from(*byte)).collect());
    }
    let text = std::str::from_utf8(piece).map_err(|error| {
        let at = offset + error.valid_up_to() as u64;
        input(
            &document.path,
            &format!(
                "byte {at} is not UTF-8, and data.tokenizer reads text; save the file as UTF-8, or remove data.tokenizer to \
                 train on bytes"
            ),
        )
    })?;
    let tokens =
        codec.encode(text).map_err(|problem| input(&document.path, &format!("data.tokenizer: {problem}")))?;
    match tokens.iter().find(|token| **token >= codec.vocabulary()) {
        Some(token) => {
            Err(input(&document.path, &format!("data.tokenizer gives token {token}, which it does not list")))
        }
        None => Ok(tokens),
    }
}

/// Pieces of a document, each at the end of a line where there is one, else at the end of a character.
struct Pieces {
    reader: Box<dyn Read>,
    left: Vec<u8>,
    at_end: bool,
}

impl Pieces {
    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        while !self.at_end && self.left.len() < PIECE {
            let wanted = (PIECE - self.left.len()) as u64;
            self.at_end = self.reader.by_ref().take(wanted).read_to_end(&mut self.left)? == 0;
        }
        let end = if self.left.len() < PIECE { self.left.len() } else { cut(&self.left) };
        let rest = self.left.split_off(end);
        let piece = std::mem::replace(&mut self.left, rest);
        Ok((!piece.is_empty()).then_some(piece))
    }
}

/// Place at which a piece of text ends.
fn cut(bytes: &[u8]) -> usize {
    if let Some(line) = bytes.iter().rposition(|byte| *byte == b'\n') {
        return line + 1;
    }
    // At most the last three bytes belong to a character that goes on.
    let is_begun = |byte: &u8| (byte & 0b1100_0000) != 0b1000_0000;
    let last = bytes.iter().rev().take(4).position(is_begun).map(|back| bytes.len() - 1 - back);
    last.filter(|last| *last > 0).unwrap_or(bytes.len())
}

impl Tokens {
    /// Reads bytes of the tokens from an offset on.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DataError> {
        let read = self.file.read_exact_at(out, HEADER_BYTES as u64 + offset);
        read.map_err(|error| DataError::reading(&self.path, error))
    }
}
