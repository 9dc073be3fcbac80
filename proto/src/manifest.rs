//! Manifest of a checkpoint, `manifest.json`: the only module that knows its format.
//!
//! 1. The text is a function of the checkpoint, so any worker that writes the manifest of a state
//!    writes the same bytes.
//! 2. Parsing the output of [`render`] gives the same checkpoint, and so does parsing the manifest of
//!    an earlier version.

use ganglion_membership::{Checkpoint, Position, StoredFile};
use serde::{Deserialize, Serialize};

use crate::format::{self, FormatError, Numbered};

/// Number of the format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;

/// Error: the text is not a manifest of a known format.
#[derive(Debug, thiserror::Error)]
#[error("manifest.json: {0}")]
pub struct NoManifest(#[from] FormatError);

#[derive(Serialize, Deserialize)]
struct Manifest {
    step: u64,
    phase: u32,
    position: u64,
    state_digest: String,
    parts: Vec<File>,
    exports: Vec<File>,
}

#[derive(Serialize, Deserialize)]
struct File {
    file: String,
    bytes: u64,
    blake3: String,
}

/// Formats the manifest of a checkpoint.
pub fn render(checkpoint: &Checkpoint) -> String {
    let (parts, exports) =
        // In this order within each: the parts hold the state, exports can be made from it again.
        checkpoint.files.iter().map(File::of).partition(|file| file.file.starts_with("state-"));
    let manifest = Manifest {
        step: checkpoint.step,
        phase: checkpoint.phase,
        position: checkpoint.position.0,
        state_digest: checkpoint.state_digest.clone(),
        parts,
        exports,
    };
    let numbered = Numbered { format: FORMAT, content: manifest };
    // In the order of the fields, so the text is a function of the checkpoint (invariant 1).
    let text = serde_json::to_string_pretty(&numbered).expect("a manifest is texts and numbers");
    text + "\n"
}

/// Parses a manifest. Does not check whether its files exist and are whole.
pub fn parse(text: &str) -> Result<Checkpoint, NoManifest> {
    let manifest: Manifest = format::parse(text, FORMAT)?;
    Ok(Checkpoint {
        position: Position(manifest.position),
        step: manifest.step,
        phase: manifest.phase,
        // The order in which `render` took them apart.
        files: manifest.parts.into_iter().chain(manifest.exports).map(StoredFile::from).collect(),
        state_digest: manifest.state_digest,
    })
}

impl File {
    fn of(file: &StoredFile) -> File {
        File { file: file.file.clone(), bytes: file.bytes, blake3: file.blake3.clone() }
    }
}

impl From<File> for StoredFile {
    fn from(file: File) -> Self {
        StoredFile { file: file.file, bytes: file.bytes, blake3: file.blake3 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        let file = |name: &str| StoredFile { file: name.into(), bytes: 9, blake3: "h".into() };
        Checkpoint {
            position: Position(7),
            step: 3,
            phase: 1,
            files: vec![file("state-00001-of-00001.safetensors"), file("generator_ema.safetensors")],
            state_digest: "d".into(),
        }
    }

    /// Manifest as the first version wrote it: without a number.
    const OF_THE_FIRST_VERSION: &str = r#"{
  "step": 3,
  "phase": 1,
  "position": 7,
  "state_digest": "d",
  "parts": [
    {
      "file": "state-00001-of-00001.safetensors",
      "bytes": 9,
      "blake3": "h"
    }
  ],
  "exports": [
    {
      "file": "generator_ema.safetensors",
      "bytes": 9,
      "blake3": "h"
    }
  ]
}
"#;

    /// Other tools read these names, and two writers of one checkpoint must agree on every byte.
    #[test]
    fn the_text_is_fixed() {
        let text = OF_THE_FIRST_VERSION.replacen('{', "{\n  \"format\": 1,", 1);
        assert_eq!(render(&checkpoint()), text);
        assert_eq!(parse(&text).unwrap(), checkpoint());
    }

    #[test]
    fn a_manifest_of_an_earlier_version_is_read_and_one_of_a_newer_version_is_named() {
        assert_eq!(parse(OF_THE_FIRST_VERSION).unwrap(), checkpoint());
        let newer = parse(r#"{"format": 2, "files": []}"#).unwrap_err().to_string();
        assert!(newer.starts_with("manifest.json: its format is 2, and this version knows none"), "{newer}");
    }

    #[test]
    fn a_damaged_text_is_refused() {
        let text = render(&checkpoint());
        let error = parse(&text[..text.len() / 2]).unwrap_err().to_string();
        assert!(error.starts_with("manifest.json: "), "{error}");
    }
}
