//! Data set as a worker found it: size, shape, classes, and the files that were left out.
//!
//! Diagnostic only: no decision depends on it. All of it is bounded, whatever the data set holds.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write};

use serde::{Deserialize, Serialize};

use crate::bounds::{count, name};
use crate::error::{Malformed, malformed};
use crate::wire;
use crate::words::counted;

/// Most classes that are named. The others are counted.
pub const CLASSES_LIMIT: usize = 1000;
/// Most kinds of files that are distinguished. The others count as one kind.
pub const KINDS_LIMIT: usize = 16;
/// Most files of samples that are listed. Of larger data sets no list is made.
pub const FILES_LIMIT: usize = 10_000;
/// Longest name or rule, in characters.
const NAME_LIMIT: usize = 200;
/// Most classes that the one-line summary names.
const SHOWN_CLASSES: usize = 10;

/// Data set as it was found. Its keys are written in alphabetical order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Number of colour channels of a sample.
    pub channels: u32,
    /// Number of classes; 0 if the job does not use classes.
    pub class_count: u32,
    /// Rule that assigned the classes; empty without classes.
    pub class_rule: String,
    /// First [`CLASSES_LIMIT`] classes in the order of their numbers.
    pub classes: Vec<Class>,
    /// Largest width and height among the stored pictures, in the orientation in which they are
    /// viewed.
    pub greatest: [u32; 2],
    /// Height of a sample in pixels, after scaling and cutting.
    pub height: u32,
    /// Rule that selected the files that are pictures; empty where all are.
    pub image_rule: String,
    /// Smallest width and height among the stored pictures, in the orientation in which they are
    /// viewed.
    pub least: [u32; 2],
    /// Files that are not samples, by kind.
    pub left_out: BTreeMap<String, LeftOut>,
    /// Number of samples.
    pub samples: u64,
    /// Count of pictures that are turned or mirrored by their EXIF data.
    pub turned: u64,
    /// Width of a sample in pixels, after scaling and cutting.
    pub width: u32,
    /// Each file of a sample, with which a changed data set is explained; empty if there are more than
    /// [`FILES_LIMIT`]. Not in records.
    #[serde(skip)]
    pub files: Vec<FileFound>,
}

/// File of a sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileFound {
    /// Name within the data set.
    pub name: String,
    /// Hash of its content.
    pub hash: u64,
}

impl FileFound {
    /// The hash as 16 hexadecimal digits.
    pub fn shown_hash(&self) -> String {
        format!("{:016x}", self.hash)
    }
}

/// Class of samples.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Class {
    /// Name of the class: a folder's name, or its number.
    pub name: String,
    /// Count of samples in the class.
    pub samples: u64,
}

/// Files of one kind that are not samples.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Count of the files.
    pub count: u64,
    /// Name of one of them.
    pub example: String,
}

impl Found {
    /// Records a file that is not a sample.
    pub fn leave_out(&mut self, kind: &str, example: impl Display) {
        const OTHERS: &str = "files of other kinds";
        // One more kind collects the rest, so that the list stays bounded for any data set.
        let full = self.left_out.len() >= KINDS_LIMIT && !self.left_out.contains_key(kind);
        let entry = self.left_out.entry(if full { OTHERS } else { kind }.to_string()).or_default();
        entry.count += 1;
        let example = short(&example.to_string());
        // The same example is chosen in whatever order the files come.
        if entry.count == 1 || example < entry.example {
            entry.example = example;
        }
    }

    /// Converts to the wire.
    pub(crate) fn to_wire(&self) -> wire::DataFound {
        wire::DataFound {
            samples: self.samples,
            channels: self.channels,
            height: self.height,
            width: self.width,
            least: self.least.to_vec(),
            greatest: self.greatest.to_vec(),
            turned: self.turned,
            class_count: self.class_count,
            classes: self
                .classes
                .iter()
                .map(|class| wire::ClassFound { name: class.name.clone(), samples: class.samples })
                .collect(),
            class_rule: self.class_rule.clone(),
            image_rule: self.image_rule.clone(),
            left_out: self
                .left_out
                .iter()
                .map(|(kind, left)| wire::LeftOut {
                    kind: kind.clone(),
                    count: left.count,
                    example: left.example.clone(),
                })
                .collect(),
            files: self
                .files
                .iter()
                .map(|file| wire::FileFound { name: file.name.clone(), hash: file.hash })
                .collect(),
        }
    }

    /// Converts a message from the wire and applies the bounds.
    pub(crate) fn from_wire(wire: wire::DataFound) -> Result<Found, Malformed> {
        let pair =
            |sides: Vec<u32>| sides.try_into().map_err(|_| malformed("a size is a width and a height"));
        // The kind of the others comes on top.
        let more = wire.classes.len() > CLASSES_LIMIT || wire.left_out.len() > KINDS_LIMIT + 1;
        if more || wire.files.len() > FILES_LIMIT {
            return Err(malformed("more classes or kinds of files than are told"));
        }
        let class = |class: wire::ClassFound| {
            Ok(Class { name: short(&class.name), samples: count(class.samples, "samples")? })
        };
        // Whole and as it is: a worker's name of a file is compared with another's.
        let file = |file: wire::FileFound| {
            Ok(FileFound { name: name(file.name, "a file's name")?, hash: file.hash })
        };
        let left = |left: wire::LeftOut| {
            let count = count(left.count, "count")?;
            Ok((short(&left.kind), LeftOut { count, example: short(&left.example) }))
        };
        Ok(Found {
            samples: count(wire.samples, "samples")?,
            channels: wire.channels,
            height: wire.height,
            width: wire.width,
            least: pair(wire.least)?,
            greatest: pair(wire.greatest)?,
            turned: count(wire.turned, "turned")?,
            class_count: wire.class_count,
            classes: wire.classes.into_iter().map(class).collect::<Result<_, Malformed>>()?,
            class_rule: short(&wire.class_rule),
            image_rule: short(&wire.image_rule),
            left_out: wire.left_out.into_iter().map(left).collect::<Result<_, Malformed>>()?,
            files: wire.files.into_iter().map(file).collect::<Result<_, Malformed>>()?,
        })
    }

    fn sizes(&self) -> Option<String> {
        let shown = |[width, height]: [u32; 2]| format!("{width} x {height}");
        match (self.least, self.greatest) {
            (least, greatest) if least == greatest && least == [self.width, self.height] => None,
            (least, greatest) if least == greatest => Some(format!("stored as {}", shown(least))),
            (least, greatest) => Some(format!("stored with {} to {} pixels", shown(least), shown(greatest))),
        }
    }

    fn shown_classes(&self) -> String {
        let shown = self.classes.iter().take(SHOWN_CLASSES);
        let mut names: Vec<String> =
            shown.map(|class| format!("{} ({})", class.name, class.samples)).collect();
        if self.class_count as usize > names.len() {
            names.push("...".to_string());
        }
        names.join(", ")
    }
}

/// Returns a text of bounded length without control characters.
fn short(text: &str) -> String {
    let mut shown: String =
        // Of a file on a worker's machine, and shown on a terminal.
        text.chars().filter(|character| !character.is_control()).take(NAME_LIMIT).collect();
    if text.chars().nth(NAME_LIMIT).is_some() {
        shown.push_str("...");
    }
    shown
}

/// One-line summary; diagnostic only.
impl Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Found { width, height, .. } = self;
        write!(f, "{} of {width} x {height} pixels", counted(self.samples, "sample"))?;
        f.write_str(match self.channels {
            1 => ", grey",
            _ => ", in colour",
        })?;
        self.sizes().map_or(Ok(()), |sizes| write!(f, " ({sizes})"))?;
        if self.turned > 0 {
            write!(f, "; {} turned as their EXIF data say", self.turned)?;
        }
        if !self.image_rule.is_empty() {
            write!(f, "; {}", self.image_rule)?;
        }
        if self.class_count > 0 {
            let classes = counted(self.class_count, "class");
            write!(f, "; {classes} by {}: {}", self.class_rule, self.shown_classes())?;
        }
        if !self.left_out.is_empty() {
            let mut left = String::new();
            for (kind, LeftOut { count, example }) in &self.left_out {
                let comma = if left.is_empty() { "" } else { ", " };
                write!(left, "{comma}{count} {kind} ({example})")?;
            }
            write!(f, "; left out: {left}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found() -> Found {
        let class = |name: &str, samples| Class { name: name.to_string(), samples };
        let mut found = Found {
            samples: 48,
            channels: 3,
            height: 28,
            width: 28,
            least: [28, 28],
            greatest: [400, 300],
            turned: 1,
            class_count: 2,
            classes: vec![class("cat", 24), class("dog", 24)],
            class_rule: "folder".to_string(),
            image_rule: "in tar files the picture of a key is its png".to_string(),
            ..Found::default()
        };
        found.leave_out(".txt", "a.txt");
        found.leave_out(".txt", "b.txt");
        found.leave_out(".gif", "c.gif");
        found
    }

    #[test]
    fn a_line_says_all_of_it() {
        let line = found().to_string();
        for part in [
            "48 samples of 28 x 28 pixels, in colour (stored with 28 x 28 to 400 x 300 pixels)",
            "1 turned",
            "is its png",
            "2 classes by folder: cat (24), dog (24)",
            "left out: 1 .gif (c.gif), 2 .txt (a.txt)",
        ] {
            assert!(line.contains(part), "{part:?} is not in {line:?}");
        }
        let plain = Found { samples: 1, channels: 1, ..Found::default() };
        assert_eq!(plain.to_string(), "1 sample of 0 x 0 pixels, grey");
    }

    #[test]
    fn kinds_are_bounded() {
        let mut found = Found::default();
        (0..100_u32).for_each(|kind| found.leave_out(&format!(".{kind}"), "x".repeat(100_000)));
        assert_eq!(found.left_out.len(), KINDS_LIMIT + 1);
        assert_eq!(found.left_out.values().map(|left| left.count).sum::<u64>(), 100);
        assert!(found.left_out.values().all(|left| left.example.len() < 10_000));
        assert_eq!(Found::from_wire(found.to_wire()).unwrap(), found);
    }

    #[test]
    fn a_message_of_too_much_is_refused() {
        assert_eq!(Found::from_wire(found().to_wire()).unwrap(), found());
        let classes = vec![wire::ClassFound::default(); CLASSES_LIMIT + 1];
        assert!(Found::from_wire(wire::DataFound { classes, ..found().to_wire() }).is_err());
        assert!(Found::from_wire(wire::DataFound { least: vec![1], ..found().to_wire() }).is_err());
    }
}
