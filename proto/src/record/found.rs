//! Data set as a worker found it: size, shape, classes, and the files that were left out.
//!
//! Diagnostic only: no decision depends on it. All of it is bounded, whatever the data set holds.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};

use super::record;
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
/// Most arrays that are listed.
pub const ARRAYS_LIMIT: usize = 256;
/// Longest name or rule, in characters.
const NAME_LIMIT: usize = 200;
/// Most classes that a line names.
const SHOWN_CLASSES: usize = 10;
/// Fewest samples of a class that is not small.
const FEW_SAMPLES: u64 = 10;
/// Share of a picture's area whose loss is worth a warning.
const MUCH: f64 = 1.0 / 3.0;
/// Extensions of pictures in formats that are not read. Their files are counted apart, whatever else is
/// there.
const UNREAD_PICTURES: [&str; 24] = [
    ".arw", ".avif", ".cr2", ".cr3", ".dds", ".dng", ".eps", ".exr", ".gif", ".hdr", ".heic", ".heif",
    ".ico", ".jp2", ".jxl", ".nef", ".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".qoi", ".svg", ".tga",
];

record! {
    /// Data set as it was found. Its keys are written in alphabetical order.
    #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(default)]
    pub struct Found {
        /// Count of pictures with an alpha channel; absent for none.
        #[serde(skip_serializing_if = "is_default")]
        pub alpha: u64,
        /// Name, shape and kind of each array of a sample; absent for other data.
        #[serde(skip_serializing_if = "is_default")]
        pub arrays: Vec<String>,
        /// Colour behind the transparent parts of pictures; absent where the stored colour shows.
        #[serde(skip_serializing_if = "is_default")]
        pub background: String,
        /// Colour channels of a sample; 0 for other data than images.
        pub channels: u32,
        /// Count of classes; 0 if the job does not use classes.
        pub class_count: u32,
        /// Rule that assigned the classes; empty without classes.
        pub class_rule: String,
        /// First 1000 classes in the order of their numbers, each with `name` and `samples`.
        pub classes: Vec<Class>,
        /// Tokens of text that a sample predicts; absent for other data.
        #[serde(skip_serializing_if = "is_default")]
        pub context: u32,
        /// Pictures that lose more than a third of their area to the crop, with `count` and `example`; absent
        /// for none.
        #[serde(skip_serializing_if = "is_default")]
        pub cropped: Counted,
        /// Largest share of a picture's area that the crop takes, in percent; absent for 0.
        #[serde(skip_serializing_if = "is_default")]
        pub cropped_most: u32,
        /// Count of the documents of a text; absent for other data.
        #[serde(skip_serializing_if = "is_default")]
        pub documents: u64,
        /// Pictures that are enlarged to the size of a sample, with `count` and `example`; absent for none.
        #[serde(skip_serializing_if = "is_default")]
        pub enlarged: Counted,
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
        /// Files that are not samples, by kind, each with `count` and `example`.
        pub left_out: BTreeMap<String, Counted>,
        /// Count of samples.
        pub samples: u64,
        /// Count of classes with fewer than 10 samples; absent for none.
        #[serde(skip_serializing_if = "is_default")]
        pub small_classes: u32,
        /// Length of the text in bytes; absent for other data.
        #[serde(skip_serializing_if = "is_default")]
        pub text_bytes: u64,
        /// Count of tokens of the text; absent for other data.
        #[serde(skip_serializing_if = "is_default")]
        pub tokens: u64,
        /// Count of pictures that are turned or mirrored by their EXIF data.
        pub turned: u64,
        /// Count of different tokens; absent for other data than text.
        #[serde(skip_serializing_if = "is_default")]
        pub vocabulary: u32,
        /// Width of a sample in pixels, after scaling and cutting.
        pub width: u32,
        /// Each file of a sample, with which a changed data set is explained; empty if there are more than
        /// [`FILES_LIMIT`]. Not in records.
        #[serde(skip)]
        pub files: Vec<FileFound>,
    }
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

/// Count of files or pictures, with the name of one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Count.
    pub count: u64,
    /// Name of one of them.
    pub example: String,
}

/// Stored picture, and what becomes of it.
#[derive(Clone, Copy, Debug)]
pub struct Picture {
    /// Width and height in pixels, in the orientation in which it is viewed.
    pub size: [u32; 2],
    /// Whether it has an alpha channel.
    pub alpha: bool,
    /// Whether its EXIF data turn or mirror it.
    pub turned: bool,
    /// Share of its area that is cut off, from 0 to 1.
    pub lost: f64,
    /// Whether it is enlarged.
    pub enlarged: bool,
}

impl Counted {
    fn add(&mut self, count: u64, example: &str) {
        // The smallest name, so that the order of files and of threads does not enter.
        if count > 0 && (self.count == 0 || *example < *self.example) {
            example.clone_into(&mut self.example);
        }
        self.count += count;
    }

    fn to_wire(&self) -> Option<wire::CountedFiles> {
        (self.count > 0).then(|| wire::CountedFiles { count: self.count, example: self.example.clone() })
    }

    fn from_wire(wire: Option<wire::CountedFiles>) -> Result<Counted, Malformed> {
        let Some(wire) = wire else { return Ok(Counted::default()) };
        Ok(Counted { count: count(wire.count, "count")?, example: short(&wire.example) })
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Found {
    /// Records a file that is not a sample.
    pub fn leave_out(&mut self, kind: &str, example: impl Display) {
        const OTHERS: &str = "files of other kinds";
        // One more kind collects the rest, so that the list stays bounded for any data set.
        let full = self.left_out.len() >= KINDS_LIMIT && !self.left_out.contains_key(kind);
        let kind = if full && !UNREAD_PICTURES.contains(&kind) { OTHERS } else { kind };
        let entry = self.left_out.entry(kind.to_string()).or_default();
        entry.add(1, &short(&example.to_string()));
    }

    /// Records `count` stored pictures that are alike, the first of them with this name.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a share in percent
    pub fn add_pictures(&mut self, count: u64, picture: &Picture, name: impl Fn() -> String) {
        let Picture { size, alpha, turned, lost, enlarged } = *picture;
        let mut of_these = Found { least: size, greatest: size, ..Found::default() };
        of_these.alpha = if alpha { count } else { 0 };
        of_these.turned = if turned { count } else { 0 };
        of_these.cropped_most = (100.0 * lost).floor() as u32;
        if lost > MUCH {
            of_these.cropped.add(count, &short(&name()));
        }
        if enlarged {
            of_these.enlarged.add(count, &short(&name()));
        }
        self.join(&of_these);
    }

    /// Adds the pictures of another part of the same data set.
    pub fn join(&mut self, other: &Found) {
        // 0 is no size: there are no pictures yet.
        let has_pictures = |found: &Found| found.greatest != [0; 2];
        self.least = match (has_pictures(self), has_pictures(other)) {
            (true, true) => [0, 1].map(|side| self.least[side].min(other.least[side])),
            (true, false) => self.least,
            (false, _) => other.least,
        };
        self.greatest = [0, 1].map(|side| self.greatest[side].max(other.greatest[side]));
        self.alpha += other.alpha;
        self.turned += other.turned;
        self.cropped_most = self.cropped_most.max(other.cropped_most);
        self.cropped.add(other.cropped.count, &other.cropped.example);
        self.enlarged.add(other.enlarged.count, &other.enlarged.example);
    }

    /// Records the classes, in the order of their numbers, by a rule.
    pub fn add_classes(&mut self, rule: &str, classes: impl ExactSizeIterator<Item = Class>) {
        self.class_count = u32::try_from(classes.len()).unwrap_or(u32::MAX);
        self.class_rule = rule.to_string();
        for class in classes {
            self.small_classes += u32::from(class.samples < FEW_SAMPLES);
            if self.classes.len() < CLASSES_LIMIT {
                self.classes.push(class);
            }
        }
    }

    /// Lines on what is most likely not meant, if there is any.
    pub fn warnings(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let of_all = |what: &Counted| format!("{} of {}", what.count, counted(self.samples, "picture"));
        let (width, height) = (self.width, self.height);
        if self.cropped.count > 0 {
            let (most, example) = (self.cropped_most, &self.cropped.example);
            lines.push(format!(
                "{} lose more than a third of their area to the crop, up to {most} % ({example}); data.fit = \"pad\" keeps \
                 all of each",
                of_all(&self.cropped)
            ));
        }
        if self.enlarged.count > 0 {
            let example = &self.enlarged.example;
            lines.push(format!(
                "{} are smaller than {width} x {height} pixels and are enlarged ({example})",
                of_all(&self.enlarged)
            ));
        }
        let unread = self.left_out.iter().filter(|(kind, _)| UNREAD_PICTURES.contains(&kind.as_str()));
        let unread: Vec<String> =
            unread.map(|(kind, files)| format!("{} {kind} ({})", files.count, files.example)).collect();
        if !unread.is_empty() {
            let unread = unread.join(", ");
            lines.push(format!(
                "pictures in formats that are not read are left out: {unread}; convert them to PNG"
            ));
        }
        lines.extend(self.small());
        lines
    }

    /// Line on classes with few samples.
    fn small(&self) -> Option<String> {
        if self.small_classes == 0 {
            return None;
        }
        let small = self.classes.iter().filter(|class| class.samples < FEW_SAMPLES).take(SHOWN_CLASSES);
        let mut names: Vec<String> = small.map(Class::to_string).collect();
        if self.small_classes as usize > names.len() {
            names.push("...".to_string());
        }
        let (few, all) = (self.small_classes, counted(self.class_count, "class"));
        let have = if few == 1 { "has" } else { "have" };
        Some(format!("{few} of {all} {have} fewer than {FEW_SAMPLES} samples: {}", names.join(", ")))
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
            alpha: self.alpha,
            background: self.background.clone(),
            cropped: self.cropped.to_wire(),
            cropped_most: self.cropped_most,
            enlarged: self.enlarged.to_wire(),
            small_classes: self.small_classes,
            arrays: self.arrays.clone(),
            context: self.context,
            documents: self.documents,
            text_bytes: self.text_bytes,
            tokens: self.tokens,
            vocabulary: self.vocabulary,
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
        let more = wire.classes.len() > CLASSES_LIMIT
            || wire.left_out.len() > KINDS_LIMIT + UNREAD_PICTURES.len() + 1;
        if more || wire.files.len() > FILES_LIMIT || wire.arrays.len() > ARRAYS_LIMIT {
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
            Ok((short(&left.kind), Counted { count, example: short(&left.example) }))
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
            alpha: count(wire.alpha, "alpha")?,
            background: short(&wire.background),
            cropped: Counted::from_wire(wire.cropped)?,
            // Of a hundred.
            cropped_most: wire.cropped_most.min(100),
            enlarged: Counted::from_wire(wire.enlarged)?,
            small_classes: wire.small_classes,
            arrays: wire.arrays.iter().map(|array| short(array)).collect(),
            context: wire.context,
            documents: count(wire.documents, "documents")?,
            text_bytes: count(wire.text_bytes, "text_bytes")?,
            tokens: count(wire.tokens, "tokens")?,
            vocabulary: wire.vocabulary,
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

    /// Count and names of the classes in a line, cut short if there are many; `None` without classes.
    pub fn classes_line(&self) -> Option<String> {
        if self.class_count == 0 {
            return None;
        }
        let mut names: Vec<String> = self.classes.iter().take(SHOWN_CLASSES).map(Class::to_string).collect();
        if self.class_count as usize > names.len() {
            names.push("...".to_string());
        }
        let count = counted(self.class_count, "class");
        Some(format!("{count} by {}: {}", self.class_rule, names.join(", ")))
    }

    /// Files left out by kind in a line; `None` if there are none.
    pub fn left_out_line(&self) -> Option<String> {
        let kinds = self.left_out.iter();
        let kinds: Vec<String> =
            kinds.map(|(kind, files)| format!("{} {kind} ({})", files.count, files.example)).collect();
        (!kinds.is_empty()).then(|| kinds.join(", "))
    }

    /// Number and kind of the samples, in a line.
    pub fn samples_line(&self) -> String {
        let samples = counted(self.samples, "sample");
        if !self.arrays.is_empty() {
            return format!("{samples} of {}", self.arrays.join(", "));
        }
        if self.tokens == 0 {
            return self.pictures_line();
        }
        format!(
            "{samples} of {} tokens, out of {} of {} different ones; {} of text in {}",
            self.context,
            self.tokens,
            self.vocabulary,
            counted(self.text_bytes, "byte"),
            counted(self.documents, "document")
        )
    }

    /// Sizes, channels and treatment of the pictures, in a line.
    fn pictures_line(&self) -> String {
        let Found { width, height, .. } = self;
        let channels = if self.channels == 1 { "grey" } else { "in colour" };
        let mut line =
            format!("{} of {width} x {height} pixels, {channels}", counted(self.samples, "sample"));
        if let Some(sizes) = self.sizes() {
            line.push_str(&format!(" ({sizes})"));
        }
        if self.turned > 0 {
            line.push_str(&format!("; {} turned as their EXIF data say", self.turned));
        }
        if self.alpha > 0 {
            let over = match self.background.as_str() {
                "" => "which is dropped".to_string(),
                colour => format!("over {colour}"),
            };
            line.push_str(&format!("; {} with an alpha channel, {over}", self.alpha));
        }
        if !self.image_rule.is_empty() {
            line.push_str(&format!("; {}", self.image_rule));
        }
        line
    }
}

impl Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.samples)
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
        f.write_str(&self.samples_line())?;
        if let Some(classes) = self.classes_line() {
            write!(f, "; {classes}")?;
        }
        if let Some(left_out) = self.left_out_line() {
            write!(f, "; left out: {left_out}")?;
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
    fn a_picture_counts_by_what_becomes_of_it() {
        let mut found = Found { samples: 9, width: 64, height: 64, ..Found::default() };
        let plain = Picture { size: [64, 64], alpha: false, turned: false, lost: 0.0, enlarged: false };
        let name = |name: &'static str| move || name.to_string();
        found.add_pictures(4, &plain, name("plain"));
        assert_eq!((found.warnings(), found.cropped_most), (Vec::new(), 0));
        let wide = Picture { size: [400, 28], alpha: true, lost: 0.93, enlarged: true, ..plain };
        found.add_pictures(1, &Picture { lost: 1.0 / 3.0, ..plain }, name("a third"));
        let mut other = Found::default();
        other.add_pictures(3, &wide, name("wide"));
        other.add_pictures(1, &Picture { lost: 0.4, turned: true, ..plain }, name("b.png"));
        found.join(&other);
        found.join(&Found::default());
        assert_eq!((found.least, found.greatest), ([64, 28], [400, 64]));
        assert_eq!((found.alpha, found.turned, found.cropped_most), (3, 1, 93));
        let crop = "4 of 9 pictures lose more than a third of their area to the crop, up to 93 % (b.png)";
        assert!(found.warnings()[0].starts_with(crop), "{:?}", found.warnings());
        assert!(found.warnings()[1].starts_with("3 of 9 pictures are smaller than 64 x 64 pixels"));
        let line = |found: &Found| found.to_string();
        assert!(line(&found).contains("3 with an alpha channel, which is dropped"));
        found.background = "white".to_string();
        assert!(line(&found).contains("3 with an alpha channel, over white"));
        assert_eq!(Found::from_wire(found.to_wire()).unwrap(), found);
    }

    #[test]
    fn pictures_that_are_not_read_and_small_classes_are_warned_of() {
        let mut found = Found::default();
        (0..100_u32).for_each(|kind| found.leave_out(&format!(".{kind}"), "x"));
        found.leave_out(".heic", "b.heic");
        found.leave_out(".heic", "a.heic");
        let class = |samples: u64| Class { name: format!("of {samples}"), samples };
        found.add_classes("folder", [class(0), class(9), class(10)].into_iter());
        let expected = [
            "pictures in formats that are not read are left out: 2 .heic (a.heic); convert them to PNG",
            "2 of 3 classes have fewer than 10 samples: of 0 (0), of 9 (9)",
        ];
        assert_eq!(found.warnings(), expected);
        assert_eq!(found.classes_line().unwrap(), "3 classes by folder: of 0 (0), of 9 (9), of 10 (10)");
        assert_eq!(Found::from_wire(found.to_wire()).unwrap(), found);
        // Beyond the limit classes are counted and not named.
        let mut many = Found::default();
        many.add_classes("folder", vec![class(1); CLASSES_LIMIT + 5].into_iter());
        assert_eq!(
            (many.class_count as usize, many.small_classes as usize),
            (CLASSES_LIMIT + 5, CLASSES_LIMIT + 5)
        );
        assert_eq!(many.classes.len(), CLASSES_LIMIT);
        assert!(many.warnings()[0].ends_with("of 1 (1), ..."));
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
