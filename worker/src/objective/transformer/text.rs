//! Text that a network writes.

use std::path::{Path, PathBuf};

use tch::no_grad;

use super::drawing::{Header, Pen};
use super::writer::Writer;
use crate::data::TextCodec;
use crate::sampling::SampleError;

/// Text as tokens.
#[derive(Clone, Debug)]
pub(crate) struct Prose {
    pub codec: TextCodec,
    /// File of the tokenizer; `None` for bytes.
    pub tokenizer: Option<PathBuf>,
}

impl Prose {
    /// Tokens that stand in front of a text without a prompt.
    pub(crate) fn start(&self) -> Vec<u32> {
        // A text in one document has no separator, and each has lines.
        if self.codec.is_bytes() { vec![u32::from(b'\n')] } else { self.codec.separator().to_vec() }
    }

    /// Writes `count` tokens of a sample behind a prompt of at least one token; hands each piece of text to `show`
    /// as it is complete, and ends early where that returns false.
    ///
    /// # Errors
    /// libtorch refused.
    pub(crate) fn write(
        &self,
        pen: &Pen<'_>,
        sample: u32,
        (prompt, count): (&[u32], u64),
        mut show: impl FnMut(&str) -> bool,
    ) -> Result<(), c10d::Error> {
        let tokens = vec![prompt.iter().map(|token| i64::from(*token)).collect()];
        let mut writer = Writer::new(pen.weights.network(), tokens, vec![pen.draws(sample)], pen.choice);
        let mut shown = Shown::after(&self.codec, prompt);
        for _ in 0..count {
            let token = no_grad(|| writer.write())?[0];
            let piece = shown.push(u32::try_from(token).expect("a token of the vocabulary"));
            if !piece.is_empty() && !show(&piece) {
                return Ok(());
            }
        }
        show(&shown.end());
        Ok(())
    }

    /// Writes a sample of a state: as many tokens as a context.
    pub(super) fn sample(&self, pen: &Pen<'_>, sample: u32) -> Result<String, c10d::Error> {
        let count = u64::try_from(pen.weights.sizes.context).expect("a positive number");
        let mut text = String::new();
        self.write(pen, sample, (&self.start(), count), |piece| {
            text.push_str(piece);
            true
        })?;
        Ok(text)
    }

    /// Adds to the header of a weights file.
    pub(super) fn describe(&self, about: &mut Vec<(&'static str, String)>) {
        about.push(("samples", "text".to_string()));
        if let Some(file) = &self.tokenizer {
            about.push(("tokenizer", file.display().to_string()));
            about.push(("tokenizer_hash", self.codec.hash().to_hex().to_string()));
        }
    }

    /// Reads the header of a weights file, and the tokenizer that it names.
    pub(super) fn read(header: &Header<'_>, tokenizer: Option<&Path>) -> Result<Prose, SampleError> {
        let Some(file) = header.optional("tokenizer") else {
            return Ok(Prose { codec: TextCodec::bytes(), tokenizer: None });
        };
        let file = tokenizer.map_or_else(|| PathBuf::from(file), Path::to_path_buf);
        let moved =
            if tokenizer.is_none() { "; if it has moved, give its place with --tokenizer FILE" } else { "" };
        let wrong = |what: &str| {
            header.wrong(&format!("it belongs to a tokenizer: {}: {what}{moved}", file.display()))
        };
        let codec = TextCodec::open(&file).map_err(|problem| wrong(&problem))?;
        if header.text("tokenizer_hash")? != codec.hash().to_hex().as_str() {
            return Err(wrong("is another tokenizer than the run's"));
        }
        Ok(Prose { codec, tokenizer: Some(file) })
    }
}

/// Text of tokens that come one by one: characters as soon as they are whole. Bytes that belong to no character
/// become U+FFFD.
pub(crate) struct Shown<'a> {
    codec: &'a TextCodec,
    tokens: Vec<u32>,
    /// Tokens whose text is told, from the first that the next text may depend on to its end.
    told: [usize; 2],
}

impl<'a> Shown<'a> {
    /// Text behind tokens that are not told.
    pub(crate) fn after(codec: &'a TextCodec, prompt: &[u32]) -> Shown<'a> {
        Shown { codec, tokens: prompt.to_vec(), told: [0, prompt.len()] }
    }

    /// Adds a token; returns the text that it completes.
    pub(crate) fn push(&mut self, token: u32) -> String {
        self.tokens.push(token);
        self.next(false)
    }

    /// Returns what is left.
    pub(crate) fn end(&mut self) -> String {
        self.next(true)
    }

    fn next(&mut self, is_end: bool) -> String {
        // Some tokenizers write a token otherwise at the beginning of a text: so the ones before it are written too.
        let [start, end] = self.told;
        let text = |tokens: &[u32]| {
            let bytes = self.codec.decode(tokens).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (before, all) = (text(&self.tokens[start..end]), text(&self.tokens[start..]));
        if !is_end && all.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        self.told = [end, self.tokens.len()];
        all.get(before.len()..).unwrap_or_default().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_shown_as_they_are_whole() {
        let codec = TextCodec::bytes();
        let mut shown = Shown::after(&codec, &[]);
        let mut push = |byte: u8| shown.push(u32::from(byte));
        // "aé", a byte that begins nothing, "b", and the beginning of a character.
        let pieces: Vec<String> = [b'a', 0xc3, 0xa9, 0xff, b'b', 0xe2, 0x82].map(&mut push).to_vec();
        assert_eq!(pieces, ["a", "", "é", "", "\u{fffd}b", "", ""]);
        assert_eq!((shown.end(), shown.end()), ("\u{fffd}".to_string(), String::new()));
    }
}
