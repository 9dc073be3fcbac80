//! Report on every sample of a data set, which a worker sends to the coordinator as lines of JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::record::found::Found;

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// Progress of the reading.
    Progress {
        /// Count of samples read so far.
        done: u64,
        /// Count of samples to read.
        of: u64,
    },
    /// Last line: the report.
    Report(Box<Report>),
    /// Last line, if the data set as a whole is wrong; with the reason.
    Wrong(String),
}

/// Contents of a data set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Kind of the data set, as in job files: `folder`, `idx` and so on.
    pub kind: String,
    /// Path of the data set; `None` if it is bundled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Samples that were examined, classes, and files that were left out. Sizes are those of good
    /// samples.
    #[serde(flatten)]
    pub found: Found,
    /// Size of their files in bytes, or of all pixels where those lie in one file.
    pub bytes: u64,
    /// Count of good samples by file format.
    pub formats: BTreeMap<String, u64>,
    /// Most frequent sizes of samples, the most frequent first.
    pub sizes: Vec<Size>,
    /// Count of samples of other sizes.
    pub other_sizes: u64,
    /// Reason why there are no classes; `None` if there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_classes: Option<String>,
    /// Count of samples that cannot be trained on.
    pub bad: u64,
    /// First of those samples, in the order of the data set.
    pub bad_samples: Vec<Bad>,
    /// Duration in seconds.
    pub seconds: f64,
}

/// Count of samples of one size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Count of samples.
    pub samples: u64,
}

/// Sample that cannot be trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bad {
    /// Name of the sample, by which `data.exclude` leaves it out.
    pub name: String,
    /// Place and kind of the problem.
    pub problem: String,
}
