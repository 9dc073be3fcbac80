//! Manifest of a checkpoint, `manifest.json`: the only module that knows its format.
//!
//! 1. The text is a function of the checkpoint, so any worker that writes the manifest of a state
//!    writes the same bytes.
//! 2. Parsing the output of [`render`] gives the same checkpoint.

use ganglion_membership::{Checkpoint, Position, StoredFile};
use serde::{Deserialize, Serialize};

/// Error: the text is not a manifest.
#[derive(Debug, thiserror::Error)]
#[error("manifest.json: {0}")]
pub struct NoManifest(#[from] serde_json::Error);

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
        checkpoint.files.iter().map(File::of).partition(|file| file.file.starts_with("state-"));
    let manifest = Manifest {
        step: checkpoint.step,
        phase: checkpoint.phase,
        position: checkpoint.position.0,
        state_digest: checkpoint.state_digest.clone(),
        parts,
        exports,
    };
    let text = serde_json::to_string_pretty(&manifest).expect("a manifest is texts and numbers");
    text + "\n"
}

/// Parses a manifest. Does not check whether its files exist and are whole.
pub fn parse(text: &str) -> Result<Checkpoint, NoManifest> {
    let manifest: Manifest = serde_json::from_str(text)?;
    Ok(Checkpoint {
        position: Position(manifest.position),
        step: manifest.step,
        phase: manifest.phase,
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

    /// Other tools read these names, and two writers of one checkpoint must agree on every byte.
    #[test]
    fn the_text_is_fixed() {
        let text = "{\n  \"step\": 3,\n  \"phase\": 1,\n  \"position\": 7,\n  \"state_digest\": \"d\",\n  \"parts\": [\n    \
                    {\n      \"file\": \"state-00001-of-00001.safetensors\",\n      \"bytes\": 9,\n      \"blake3\": \
                    \"h\"\n    }\n  ],\n  \"exports\": [\n    {\n      \"file\": \"generator_ema.safetensors\",\n      \
                    \"bytes\": 9,\n      \"blake3\": \"h\"\n    }\n  ]\n}\n";
        assert_eq!(render(&checkpoint()), text);
        assert_eq!(parse(text).unwrap(), checkpoint());
    }

    #[test]
    fn a_damaged_text_is_refused() {
        let text = render(&checkpoint());
        let error = parse(&text[..text.len() / 2]).unwrap_err().to_string();
        assert!(error.starts_with("manifest.json: "), "{error}");
    }
}
