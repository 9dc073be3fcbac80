//! The samples of a job, by index.

use std::collections::BTreeSet;
use std::path::Path;

use ganglion_proto::job::{Data, DataKind, Job};
use ganglion_proto::record::found::{ARRAYS_LIMIT, Found, Picture};
use ganglion_proto::stream::Change;

use super::arrays::Arrays;
use super::folder::Folder;
use super::framing::Framing;
use super::labels::Labels;
use super::left_out::{LeftOut, Names};
use super::memory::Memory;
use super::shape::{ImageShape, SampleShape};
use super::text::Text;
use super::values::{SampleMut, Values};
use super::{DataError, cifar, folder, idx, remote};

/// Error message of a job that excludes every sample.
pub(super) const EVERYTHING: &str = "data.exclude leaves out every sample; leave some in";

/// The samples of a job, by index.
#[derive(Debug)]
pub struct DataSet {
    source: Source,
    shape: SampleShape,
    len: usize,
    labels: Option<Labels>,
    fingerprint: [u8; 32],
    found: Found,
    names: Names,
    /// Samples left out after the start of the run, in the job's order.
    left_out: Vec<u64>,
    /// The same samples as a set.
    gone: BTreeSet<usize>,
}

/// Source of samples.
#[derive(Debug)]
enum Source {
    Images { stored: Images, framing: Framing, shape: ImageShape },
    Rows { rows: Rows, kept: Option<Vec<usize>> },
}

/// Source of unframed images.
#[derive(Debug)]
pub(super) enum Images {
    Memory(Memory),
    Folder(Folder),
}

/// Source of samples that lie in files by number.
#[derive(Debug)]
enum Rows {
    Text(Text),
    Arrays(Arrays),
}

/// Samples whose names are their numbers.
struct Numbered {
    /// Those that are not left out from the start, in order; `None` for all.
    kept: Option<Vec<usize>>,
    names: Names,
    /// Samples left out after the start of the run, by index, in the job's order.
    left_out: Vec<u64>,
}

impl Images {
    fn len(&self) -> usize {
        match self {
            Images::Memory(memory) => memory.len(),
            Images::Folder(folder) => folder.len(),
        }
    }
}

impl Numbered {
    /// Takes the samples out of `all` that a job leaves out.
    fn new(
        all: usize,
        place: &str,
        mut left_out: LeftOut<'_>,
        found: &mut Found,
    ) -> Result<Numbered, DataError> {
        let numbered =
            || -> Box<dyn Iterator<Item = String>> { Box::new((0..all).map(|number| number.to_string())) };
        // The usual case, for which no list is made.
        if left_out.is_empty() {
            return Ok(Numbered { kept: None, names: Names::of(numbered()), left_out: Vec::new() });
        }
        let takes_part = |number: &usize| {
            let number = number.to_string();
            left_out.find(&number);
            !left_out.is_from_the_start(&number)
        };
        let kept: Vec<usize> = (0..all).filter(takes_part).collect();
        left_out.report(found);
        let numbers = || kept.iter().map(usize::to_string);
        let names = Names::of(numbers());
        // A name that belongs to no sample is most likely a mistake of the user's.
        left_out.check_all_there(place, numbered)?;
        left_out.check(&names, place, numbered)?;
        let left_out = left_out.indices(numbers());
        Ok(Numbered { names, left_out, kept: Some(kept) })
    }
}

/// An opened set of images, with the findings of the opening.
pub(super) struct Opened {
    pub(super) source: Images,
    /// Shape of every framed image.
    pub(super) shape: ImageShape,
    /// Hash of all samples that are left in.
    pub(super) content: blake3::Hash,
    /// Classes, where they were requested.
    pub(super) labels: Option<Labels>,
    /// Sizes, and the files that were left out.
    pub(super) found: Found,
    pub(super) names: Names,
    /// Samples left out after the start of the run, in the job's order.
    pub(super) left_out: Vec<u64>,
}

impl DataSet {
    /// Opens the data of section `[data]` and checks it as far as that needs no decoding of images.
    ///
    /// # Errors
    /// [`DataError::Input`] if the section or the files are wrong, [`DataError::System`] if the system fails.
    pub fn open(source: &Data) -> Result<DataSet, DataError> {
        DataSet::open_as(source, false)
    }

    /// The same with the class of each sample: from the file of labels beside one of images, CIFAR's records,
    /// or by the rules of `classes.rs`.
    ///
    /// # Errors
    /// As [`open`](DataSet::open), and [`DataError::Input`] if a sample has no label.
    pub fn open_labelled(source: &Data) -> Result<DataSet, DataError> {
        DataSet::open_as(source, true)
    }

    fn open_as(source: &Data, labelled: bool) -> Result<DataSet, DataError> {
        let mut found = Found::default();
        // First: all that follows reads local files.
        let source = &remote::here(source, &mut found)?;
        if !source.kind.is_images() {
            return DataSet::of_rows(source, labelled, found);
        }
        let framing = Framing::new(source)?;
        let left_out = LeftOut::new(&source.exclusions);
        match source.kind {
            DataKind::Mnist10k if source.path.is_some() => Err(DataError::Input(
                "data.path is set, but data.kind = \"mnist-10k\" is bundled with the worker and \
                 has no path; remove data.path or set data.kind to the format of that file"
                    .to_owned(),
            )),
            DataKind::Mnist10k => {
                // Labels are opened only on request, and their absence is no error otherwise (invariant
                // 4 of `data`).
                let labels = labelled.then(idx::bundled_labels).transpose()?;
                DataSet::in_memory(idx::bundled()?, "the bundled digits", framing, labels, left_out)
            }
            DataKind::Idx => {
                let path = &idx::file_of(required_path(source)?)?;
                let memory = idx::open(path)?;
                let labels = labelled.then(|| idx::labels_beside(path)).transpose()?;
                DataSet::in_memory(memory, &path.display().to_string(), framing, labels, left_out)
            }
            DataKind::Cifar10 => {
                let path = required_path(source)?;
                let (memory, labels) = cifar::open(path)?;
                let labels = labelled.then_some(labels);
                DataSet::in_memory(memory, &path.display().to_string(), framing, labels, left_out)
            }
            DataKind::Folder => {
                let mut opened = folder::open(required_path(source)?, source, &framing, labelled, left_out)?;
                opened.found.left_out.append(&mut found.left_out);
                DataSet::of_images(framing, opened)
            }
            DataKind::Text | DataKind::Arrays => unreachable!("these are no images"),
        }
    }

    /// Opens text or arrays.
    fn of_rows(source: &Data, labelled: bool, mut found: Found) -> Result<DataSet, DataError> {
        let (kind, path) = (source.kind, required_path(source)?);
        if labelled {
            return Err(DataError::Input(format!(
                "data.kind = \"{kind}\" gives no classes of samples; set model.conditional = false"
            )));
        }
        let rows = match kind {
            DataKind::Text => Rows::Text(Text::open(source, path, &mut found)?),
            _ => Rows::Arrays(Arrays::open(source, path, &mut found)?),
        };
        let all = usize::try_from(rows.len()).expect("samples were counted, and fit into 32 bits");
        let left_out = LeftOut::new(&source.exclusions);
        let Numbered { kept, names, left_out } =
            Numbered::new(all, &path.display().to_string(), left_out, &mut found)?;
        let len = kept.as_ref().map_or(all, Vec::len);
        let gone = gone(&left_out, len)?;
        let shape = rows.shape();
        let mut hasher = blake3::Hasher::new_derive_key("ganglion 2026 data set of rows");
        let about = format!("{shape:?} {len} {kept:?}");
        hasher.update(&(about.len() as u64).to_le_bytes());
        hasher.update(about.as_bytes());
        hasher.update(rows.content(kept.as_deref(), &gone)?.as_bytes());
        let fingerprint = hasher.finalize().into();
        found.samples = len as u64;
        rows.describe(&mut found);
        let source = Source::Rows { rows, kept };
        Ok(DataSet { source, shape, len, labels: None, fingerprint, found, names, left_out, gone })
    }

    fn in_memory(
        mut memory: Memory,
        name: &str,
        framing: Framing,
        mut labels: Option<Labels>,
        left_out: LeftOut<'_>,
    ) -> Result<DataSet, DataError> {
        let (height, width) = framing
            .output_size(memory.height, memory.width)
            .map_err(|wrong| DataError::Input(format!("{name}: {wrong}")))?;
        let shape = ImageShape { channels: memory.channels, height, width };
        let mut found = Found::default();
        if let Some(labels) = &labels {
            // Before samples are dropped: both lists still have the same numbers.
            labels.check(memory.len())?;
        }
        // The name of an image in memory is its number in the files.
        let Numbered { kept, names, left_out } = Numbered::new(memory.len(), name, left_out, &mut found)?;
        if let Some(kept) = &kept {
            memory.keep(kept);
            labels.iter_mut().for_each(|labels| labels.keep(kept));
        }
        let (lost, enlarged) =
            (framing.lost(memory.height, memory.width), framing.enlarges(memory.height, memory.width));
        let size = [memory.width, memory.height];
        let picture = Picture { size, alpha: false, turned: false, lost, enlarged };
        let (count, first) =
            (kept.as_ref().map_or(memory.len(), Vec::len), kept.as_ref().and_then(|kept| kept.first()));
        found.add_pictures(count as u64, &picture, || format!("image {}", first.unwrap_or(&0)));
        // Samples that are left out later may be damaged or gone by then: the fingerprint does not cover
        // them.
        let content = memory.hash_without(&left_out);
        DataSet::of_images(
            framing,
            Opened { source: Images::Memory(memory), shape, content, labels, found, names, left_out },
        )
    }

    fn of_images(framing: Framing, opened: Opened) -> Result<DataSet, DataError> {
        let Opened { source, shape, content, labels, mut found, names, left_out } = opened;
        let len = source.len();
        let gone = gone(&left_out, len)?;
        // A key of its own, so that this hash equals no other of the same bytes.
        let mut hasher = blake3::Hasher::new_derive_key("ganglion 2026 data set");
        for size in [shape.channels, shape.height, shape.width, len - gone.len()] {
            hasher.update(&(size as u64).to_le_bytes());
        }
        // Two framings of the same files give other samples (D11).
        hasher.update(&framing.to_bytes());
        hasher.update(content.as_bytes());
        let mut fingerprint = hasher.finalize().into();
        if let Some(labels) = &labels {
            labels.check(len)?;
            labels.report(&mut found);
            // Labels of samples that are left out later count too: the generator's classes are drawn from
            // all.
            fingerprint = labels.fingerprint_with(&fingerprint);
        }
        let pixels = |size: usize| u32::try_from(size).expect("a side is at most 8192 pixels");
        found.samples = len as u64;
        [found.channels, found.height, found.width] = [shape.channels, shape.height, shape.width].map(pixels);
        let source = Source::Images { stored: source, framing, shape };
        let shape = SampleShape::Image(shape);
        Ok(DataSet { source, shape, len, labels, fingerprint, found, names, left_out, gone })
    }

    /// Samples that the job leaves out after its start, by index, in its order.
    pub fn left_out(&self) -> &[u64] {
        &self.left_out
    }

    /// Samples that no exclusion leaves out, by index, in order. At least one.
    pub fn left(&self) -> Vec<usize> {
        (0..self.len).filter(|index| !self.gone.contains(index)).collect()
    }

    /// A job's changes to the stream of these samples.
    pub fn changes(&self, job: &Job) -> Vec<Change> {
        job.changes(self.left_out.iter().copied())
    }

    /// Width, height and total bytes of the stored images, if they are in memory; else zeros.
    pub(super) fn stored(&self) -> (u32, u32, u64) {
        match &self.source {
            Source::Images { stored: Images::Memory(memory), .. } => {
                (memory.width, memory.height, memory.bytes.len() as u64)
            }
            _ => (0, 0, 0),
        }
    }

    /// Bytes of text, or of the numbers of all samples; 0 for images.
    pub(super) fn bytes(&self) -> u64 {
        match (&self.source, &self.shape) {
            (Source::Rows { rows: Rows::Text(text), .. }, _) => text.bytes(),
            (_, SampleShape::Arrays(specs)) => {
                specs.iter().map(|spec| spec.bytes() as u64).sum::<u64>() * self.len as u64
            }
            _ => 0,
        }
    }

    /// Hash of the set of the samples' names, including those left out after the start.
    pub fn names(&self) -> String {
        self.names.hash()
    }

    /// Number of samples, at least 1 and less than 2^32.
    #[expect(clippy::len_without_is_empty, reason = "a data set that opened is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether reading a sample means decoding a file.
    pub(super) fn is_decoded(&self) -> bool {
        matches!(self.source, Source::Images { stored: Images::Folder(_), .. })
    }

    /// Findings of the opening, diagnostic only.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// Name of sample `index`, diagnostic only: that of its file, or the number of an image.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    pub fn name(&self, index: usize) -> String {
        match &self.source {
            Source::Images { stored: Images::Folder(folder), .. } => folder.name(index),
            Source::Images { stored: Images::Memory(_), .. } => format!("image {index}"),
            Source::Rows { .. } => format!("sample {index}"),
        }
    }

    /// The text that the samples are pieces of, where they are.
    pub fn text(&self) -> Option<&Text> {
        match &self.source {
            Source::Rows { rows: Rows::Text(text), .. } => Some(text),
            _ => None,
        }
    }

    /// Number of classes by the labels; 0 if the data set was opened without labels.
    pub fn classes(&self) -> u32 {
        self.labels.as_ref().map_or(0, |labels| labels.classes)
    }

    /// Class of each sample, below [`classes`](Self::classes); empty if the data set was opened without
    /// labels.
    pub fn labels(&self) -> &[u32] {
        self.labels.as_ref().map_or(&[], |labels| &labels.of)
    }

    /// Names of the classes by their numbers; empty where the data have none.
    pub fn class_names(&self) -> &[String] {
        self.labels.as_ref().map_or(&[], |labels| &labels.names)
    }

    /// Shape of every sample.
    pub fn shape(&self) -> &SampleShape {
        &self.shape
    }

    /// Reads samples, in the order of the indices.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    ///
    /// # Panics
    /// If an index is not below [`len`](Self::len).
    pub fn read_all(&self, indices: &[usize]) -> Result<Values, DataError> {
        let mut values = Values::new(&self.shape, indices.len());
        for (index, out) in indices.iter().zip(values.samples_mut(&self.shape)) {
            self.read_into(*index, out)?;
        }
        Ok(values)
    }

    /// Reads sample `index` into memory for one.
    pub(super) fn read_into(&self, index: usize, out: SampleMut<'_>) -> Result<(), DataError> {
        // A number of the stream is below `len`; beyond it the plan is wrong, and not the data.
        assert!(index < self.len, "sample {index} of {}", self.len);
        match (&self.source, out) {
            (Source::Images { .. }, SampleMut::Pixels(out)) => self.read(index, out),
            (Source::Rows { rows, kept }, out) => {
                rows.read(kept.as_ref().map_or(index, |kept| kept[index]), out)
            }
            _ => panic!("memory of other samples than {}", self.shape),
        }
    }

    /// Writes image `index` to `out`: channels x height x width, each number in [-1, 1] (byte / 127.5 - 1).
    ///
    /// # Errors
    /// A file of a folder cannot be decoded, or differs from the file at the opening.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len), `out` is not [`ImageShape::numel`] long, or the samples
    /// are no images.
    pub fn read(&self, index: usize, out: &mut [f32]) -> Result<(), DataError> {
        assert!(index < self.len, "sample {index} of {}", self.len);
        let Source::Images { stored, framing, shape } = &self.source else {
            panic!("no images, but {}", self.shape);
        };
        assert_eq!(out.len(), shape.numel(), "a sample is {shape}");
        match stored {
            Images::Memory(memory) => {
                framing.render(&memory.image(index), out);
                Ok(())
            }
            Images::Folder(folder) => {
                folder.read(index, framing, *shape, out).map_err(|error| match error {
                    // The file may be gone by now, and a run that went back needs it once more.
                    DataError::Input(problem) if self.gone.contains(&index) => DataError::Input(format!(
                        "{problem}; it is needed by a step from before the one after which data.exclude leaves it out: \
                         put the file back as it was, or begin anew with another --run-dir"
                    )),
                    error => error.of_sample(&folder.relative(index)),
                })
            }
        }
    }

    /// Fingerprint of the samples: data sets with equal fingerprints give equal samples.
    ///
    /// Covers those that no exclusion leaves out: the number of samples, their shape and framing, and their
    /// labels if it was opened with them. Of data in memory it covers every byte. Of a folder it covers each
    /// file's name, length, size in pixels, orientation, and content: all of it up to 1 MiB, and of a longer
    /// file sixteen blocks of 64 KiB, the first at its beginning, the last at its end, the others evenly
    /// between. Of text it covers every token, and of arrays every number of samples that are left in.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

/// Samples that are left out after the start, as a set.
///
/// # Errors
/// Nothing is left.
fn gone(left_out: &[u64], len: usize) -> Result<BTreeSet<usize>, DataError> {
    let gone: BTreeSet<usize> = left_out.iter().filter_map(|index| usize::try_from(*index).ok()).collect();
    // An epoch over nothing has no place for any number.
    if gone.len() >= len { Err(DataError::Input(EVERYTHING.to_owned())) } else { Ok(gone) }
}

impl Rows {
    fn len(&self) -> u64 {
        match self {
            Rows::Text(text) => text.samples(),
            Rows::Arrays(arrays) => arrays.samples(),
        }
    }

    fn shape(&self) -> SampleShape {
        match self {
            Rows::Text(text) => SampleShape::Tokens(text.shape()),
            Rows::Arrays(arrays) => SampleShape::Arrays(arrays.specs()),
        }
    }

    /// Hash of all samples but those that are left out: by `kept` from the start, by `gone` later.
    fn content(&self, kept: Option<&[usize]>, gone: &BTreeSet<usize>) -> Result<blake3::Hash, DataError> {
        let is_left_out = |row: u64| {
            let row = usize::try_from(row).unwrap_or(usize::MAX);
            let index = kept.map_or(Some(row), |kept| kept.binary_search(&row).ok());
            index.is_none_or(|index| gone.contains(&index))
        };
        match self {
            Rows::Text(text) => Ok(text.content()),
            Rows::Arrays(arrays) => arrays.check(is_left_out),
        }
    }

    fn describe(&self, found: &mut Found) {
        match self {
            Rows::Text(text) => {
                (found.tokens, found.text_bytes) = (text.tokens(), text.bytes());
                (found.vocabulary, found.context) = (text.shape().vocabulary, text.context());
            }
            Rows::Arrays(arrays) => {
                found.arrays = arrays.specs().iter().map(ToString::to_string).take(ARRAYS_LIMIT).collect();
            }
        }
    }

    fn read(&self, row: usize, out: SampleMut<'_>) -> Result<(), DataError> {
        match (self, out) {
            (Rows::Text(text), SampleMut::Tokens(out)) => text.read(row, out),
            (Rows::Arrays(arrays), SampleMut::Arrays(out)) => arrays.read(row, out),
            _ => panic!("memory of other samples than {}", self.shape()),
        }
    }
}

pub(super) fn required_path(source: &Data) -> Result<&Path, DataError> {
    source.path.as_deref().ok_or_else(|| {
        DataError::Input(
            "data.path is missing; set it to the file or folder of the samples, or set data.kind \
             = \"mnist-10k\" for the bundled digits"
                .to_owned(),
        )
    })
}
