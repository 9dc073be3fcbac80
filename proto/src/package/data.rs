//! Data that a package's graphs read.

use serde::{Deserialize, Serialize};

use crate::array::ArraySpec;

/// Data that the graphs read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub struct DataSpec {
    /// Kind and size of the samples.
    pub samples: SampleSpec,
    /// Number of classes; 0 if no graph reads them.
    pub classes: u32,
}

/// Kind and size of samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SampleSpec {
    /// Images.
    Images(ImageSpec),
    /// Pieces of text.
    Tokens(TokenSpec),
    /// Arrays by their names.
    Arrays(Vec<ArraySpec>),
}

/// Shape of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// Colour channels.
    pub channels: u32,
    /// Rows of pixels.
    pub height: u32,
    /// Columns of pixels.
    pub width: u32,
}

/// Size of a piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenSpec {
    /// Tokens that are predicted: a sample has one more.
    pub context: u32,
    /// Number of different tokens: each is below it.
    pub vocabulary: u32,
}

/// Form in the manifest: one of the three kinds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    images: Option<ImageSpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokens: Option<TokenSpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    arrays: Option<Vec<ArraySpec>>,
    #[serde(default)]
    classes: u32,
}

impl TryFrom<Json> for DataSpec {
    type Error = &'static str;

    fn try_from(json: Json) -> Result<DataSpec, &'static str> {
        let samples = match (json.images, json.tokens, json.arrays) {
            (Some(images), None, None) => SampleSpec::Images(images),
            (None, Some(tokens), None) => SampleSpec::Tokens(tokens),
            (None, None, Some(arrays)) => SampleSpec::Arrays(arrays),
            _ => return Err("data has none or several of images, tokens and arrays, expected one"),
        };
        Ok(DataSpec { samples, classes: json.classes })
    }
}

impl From<DataSpec> for Json {
    fn from(data: DataSpec) -> Json {
        let mut json = Json { images: None, tokens: None, arrays: None, classes: data.classes };
        match data.samples {
            SampleSpec::Images(images) => json.images = Some(images),
            SampleSpec::Tokens(tokens) => json.tokens = Some(tokens),
            SampleSpec::Arrays(arrays) => json.arrays = Some(arrays),
        }
        json
    }
}
