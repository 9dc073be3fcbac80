//! Report on every sample of a data set, as the worker tells the coordinator: lines of JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::found::Found;

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// How far it is.
    Progress {
        /// Samples read.
        done: u64,
        /// Samples to read.
        of: u64,
    },
    /// The last line.
    Report(Box<Report>),
    /// The last line, where the data set as a whole is wrong.
    Wrong(String),
}

/// Contents of a data set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `folder`, `idx` and so on.
    pub kind: String,
    /// Where it is, if it is not bundled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Samples that were looked at, classes, and what was left out. Sizes are those of good samples.
    #[serde(flatten)]
    pub found: Found,
    /// Bytes of their files, or of all pixels where those lie in one file.
    pub bytes: u64,
    /// Good samples by the format of their files.
    pub formats: BTreeMap<String, u64>,
    /// The sizes that most samples have, in pixels, the most frequent first.
    pub sizes: Vec<Size>,
    /// Samples of other sizes than these.
    pub other_sizes: u64,
    /// Why there are no classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_classes: Option<String>,
    /// How many cannot be trained on.
    pub bad: u64,
    /// The first of those, in the order of samples.
    pub bad_samples: Vec<Bad>,
    /// How long it took.
    pub seconds: f64,
}

/// How many samples have a size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// How many.
    pub samples: u64,
}

/// A sample that cannot be trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bad {
    /// The sample's name, by which `data.exclude` leaves it out.
    pub name: String,
    /// Where it is, and what is wrong with it.
    pub problem: String,
}
