//! Settings of data that are no images: text and arrays.

use std::path::{Path, PathBuf};

use ganglion_proto::job::{Data, DataKind, Family, Job};

use super::settings::Settings;

const CONTEXT: &str = "data.context";
const TOKENIZER: &str = "data.tokenizer";
const NAMES: &str = "data.names";
/// Key of the tokenizer's hash in a resolved job.
pub(super) const HASH: &str = "data.tokenizer_hash";

/// Settings of images, which mean nothing to other data.
const OF_IMAGES: [&str; 8] = [
    "data.resize",
    "data.crop",
    "data.channels",
    "data.image_extension",
    "data.orientation",
    "data.class_order",
    "data.fit",
    "data.background",
];

/// Settings of text and arrays.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) context: Option<u32>,
    pub(super) tokenizer: Option<PathBuf>,
    pub(super) tokenizer_hash: Option<String>,
    pub(super) names: Option<Vec<String>>,
}

/// Reads the settings of text and arrays, and refuses those of other kinds of data.
pub(super) fn read(settings: &mut Settings, kind: Option<DataKind>, check_paths: bool) -> Rows {
    let context = settings.whole(CONTEXT, 1..=1 << 20, Data::CONTEXT);
    let tokenizer = settings.text(TOKENIZER, "tokenizer.json");
    let tokenizer = tokenizer.and_then(|path| settings.absolute(TOKENIZER, &path));
    let hash = settings.text(HASH, "");
    let names = settings.texts(NAMES, "[\"x\", \"y\"]");
    let Some(kind) = kind else { return Rows::default() };
    refuse(settings, &[CONTEXT, TOKENIZER, HASH], kind == DataKind::Text, "data.kind = \"text\"");
    refuse(settings, &[NAMES], kind == DataKind::Arrays, "data.kind = \"arrays\"");
    refuse(settings, &OF_IMAGES, kind.is_images(), "images");
    match kind {
        DataKind::Text => Rows {
            context: Some(context.unwrap_or(Data::CONTEXT)),
            tokenizer_hash: tokenizer.as_deref().and_then(|file| hash_of(settings, file, hash, check_paths)),
            tokenizer,
            names: None,
        },
        DataKind::Arrays => Rows { names: chosen(settings, names), ..Rows::default() },
        _ => Rows::default(),
    }
}

/// Refuses keys that are given where they mean nothing.
fn refuse(settings: &mut Settings, keys: &[&str], have_meaning: bool, of: &str) {
    for key in keys.iter().filter(|_| !have_meaning) {
        if settings.is_given(key) {
            settings.refuse(key, format!("is of use with {of} alone; remove it"));
        }
    }
}

/// Hash of the tokenizer's file, where files shall be looked at; else the one that the record has.
fn hash_of(settings: &mut Settings, file: &Path, recorded: Option<String>, look: bool) -> Option<String> {
    if !look {
        return recorded;
    }
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) => {
            let problem = format!(
                "{}: {error}; name a tokenizer.json, or leave it out to train on bytes",
                file.display()
            );
            settings.fault(TOKENIZER, problem);
            return None;
        }
    };
    let hash = blake3::hash(&bytes).to_hex().to_string();
    if recorded.is_some_and(|recorded| recorded != hash) {
        settings
            .fault(HASH, "the tokenizer has another hash: it was changed; remove the key to use it as it is");
    }
    Some(hash)
}

/// Names of arrays, sorted, each once.
fn chosen(settings: &mut Settings, mut names: Vec<String>) -> Option<Vec<String>> {
    if !settings.is_given(NAMES) {
        return None;
    }
    names.sort();
    names.dedup();
    if names.is_empty() && settings.sound(&[NAMES]) {
        settings.fault(NAMES, "names no array; name those to train on, or remove it to train on all");
    }
    Some(names)
}

/// Checks that the model is trained on such data.
pub(super) fn check(settings: &mut Settings, job: &Job) {
    let (model, data) = (job.model.kind, job.data.kind);
    let fits = match model.family() {
        Family::Package => true,
        Family::Transformer => data == DataKind::Text,
        Family::Gan | Family::Vae => false,
    };
    if !fits {
        let wanted = if model.family() == Family::Transformer { "text or images" } else { "images" };
        settings.fault(
            "model.kind",
            format!("\"{model}\" is trained on {wanted}, but data.kind = \"{data}\"; change one of the two"),
        );
    }
}
