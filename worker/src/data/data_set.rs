//! The samples of a job, by index.

use std::collections::BTreeSet;
use std::path::Path;

use ganglion_proto::job::{Data, DataKind, Job};
use ganglion_proto::record::found::{Found, Picture};
use ganglion_proto::stream::Change;

use super::folder::Folder;
use super::framing::Framing;
use super::labels::Labels;
use super::left_out::{LeftOut, Names};
use super::memory::Memory;
use super::shape::{ImageShape, SampleShape};
use super::values::{SampleMut, Values};
use super::{DataError, cifar, folder, idx, remote};

/// Error message of a job that excludes every sample.
pub(super) const EVERYTHING: &str = "data.exclude leaves out every sample; leave some in";

/// The samples of a job, by index.
#[derive(Debug)]
pub struct DataSet {
    source: Source,
    framing: Framing,
    images: ImageShape,
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

/// Source of unframed images.
#[derive(Debug)]
pub(super) enum Source {
    Memory(Memory),
    Folder(Folder),
}

impl Source {
    fn len(&self) -> usize {
        match self {
            Source::Memory(memory) => memory.len(),
            Source::Folder(folder) => folder.len(),
        }
    }
}

/// An opened data set, with the findings of the opening.
pub(super) struct Opened {
    pub(super) source: Source,
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
                DataSet::new(framing, opened)
            }
        }
    }

    fn in_memory(
        mut memory: Memory,
        name: &str,
        framing: Framing,
        mut labels: Option<Labels>,
        mut left_out: LeftOut<'_>,
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
        let all = memory.len();
        let mut kept: Vec<usize> = (0..all).collect();
        // The usual case, for which no name is made.
        if !left_out.is_empty() {
            kept.retain(|number| {
                let number = number.to_string();
                left_out.find(&number);
                !left_out.is_from_the_start(&number)
            });
            memory.keep(&kept);
            labels.iter_mut().for_each(|labels| labels.keep(&kept));
        }
        left_out.report(&mut found);
        let (lost, enlarged) =
            (framing.lost(memory.height, memory.width), framing.enlarges(memory.height, memory.width));
        let size = [memory.width, memory.height];
        let picture = Picture { size, alpha: false, turned: false, lost, enlarged };
        found.add_pictures(kept.len() as u64, &picture, || format!("image {}", kept.first().unwrap_or(&0)));
        let numbers = || kept.iter().map(usize::to_string);
        let names = Names::of(numbers());
        // A name that belongs to no sample is most likely a mistake of the user's.
        let numbered =
            || -> Box<dyn Iterator<Item = String>> { Box::new((0..all).map(|number| number.to_string())) };
        left_out.check_all_there(name, numbered)?;
        left_out.check(&names, name, numbered)?;
        let left_out = left_out.indices(numbers());
        // Samples that are left out later may be damaged or gone by then: the fingerprint does not cover
        // them.
        let content = memory.hash_without(&left_out);
        DataSet::new(
            framing,
            Opened { source: Source::Memory(memory), shape, content, labels, found, names, left_out },
        )
    }

    fn new(framing: Framing, opened: Opened) -> Result<DataSet, DataError> {
        let Opened { source, shape, content, labels, mut found, names, left_out } = opened;
        let len = source.len();
        let gone: BTreeSet<usize> =
            left_out.iter().filter_map(|index| usize::try_from(*index).ok()).collect();
        // An epoch over nothing has no place for any number.
        if gone.len() >= len {
            return Err(DataError::Input(EVERYTHING.to_owned()));
        }
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
        Ok(DataSet {
            source,
            framing,
            images: shape,
            shape: SampleShape::Image(shape),
            len,
            labels,
            fingerprint,
            found,
            names,
            left_out,
            gone,
        })
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
            Source::Memory(memory) => (memory.width, memory.height, memory.bytes.len() as u64),
            Source::Folder(_) => (0, 0, 0),
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
        matches!(self.source, Source::Folder(_))
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
            Source::Folder(folder) => folder.name(index),
            Source::Memory(_) => format!("image {index}"),
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
        match out {
            SampleMut::Pixels(out) => self.read(index, out),
            SampleMut::Tokens(out) => panic!("images, and memory of {} tokens", out.len()),
            SampleMut::Arrays(out) => panic!("images, and memory of {} arrays", out.len()),
        }
    }

    /// Writes image `index` to `out`: channels x height x width, each number in [-1, 1] (byte / 127.5 - 1).
    ///
    /// # Errors
    /// A file of a folder cannot be decoded, or differs from the file at the opening.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len), or `out` is not [`ImageShape::numel`] long.
    pub fn read(&self, index: usize, out: &mut [f32]) -> Result<(), DataError> {
        // A number of the stream is below `len`; beyond it the plan is wrong, and not the data.
        assert!(index < self.len, "sample {index} of {}", self.len);
        assert_eq!(out.len(), self.images.numel(), "a sample is {}", self.images);
        match &self.source {
            Source::Memory(memory) => {
                self.framing.render(&memory.image(index), out);
                Ok(())
            }
            Source::Folder(folder) => {
                folder.read(index, &self.framing, self.images, out).map_err(|error| match error {
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
    /// between.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
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
