//! Pictures in a folder, searched recursively, or in archives; decoded when a sample is read.
//!
//! Invariants:
//! 1. Samples are in the order of their names, as [`search`](super::search) has them.
//! 2. Opening reads files of up to 1 MiB whole, and sixteen blocks of longer ones, on all processors, and keeps none of it:
//!    memory holds the names and no pixels.
//! 3. An archive in a folder is a folder of its name; one that `data.path` names is that folder itself, so pictures give the
//!    same samples packed and unpacked.
//! 4. Of a picture alpha is dropped, 16 bits become 8, and of an animation the first picture counts.

use std::path::Path;
use std::time::{Duration, Instant};

use ganglion_proto::found::Found;
use ganglion_proto::job::{Data, Orientation};

use super::decode::{Outline, decode, outline};
use super::framing::{Framing, Image};
use super::place::Place;
use super::search::{Entry, PICTURES, Search};
use super::{DataError, ImageShape, Labels, classes, input, parallel};

/// A reading of all files that takes longer is told.
const TOLD: Duration = Duration::from_secs(5);

/// The files of a data set.
#[derive(Debug)]
pub(super) struct Folder {
    /// Sorted by name.
    files: Vec<Place>,
    /// 1 or 3.
    channels: usize,
    orientation: Orientation,
}

/// A folder with what was learnt while opening it.
pub(super) struct Opened {
    pub(super) folder: Folder,
    /// The shape of every framed image.
    pub(super) shape: ImageShape,
    /// Hash of the names, lengths, sizes in pixels, orientations and contents of the files.
    pub(super) content: blake3::Hash,
    /// The classes of the files, where they were asked for.
    pub(super) labels: Option<Labels>,
    /// Sizes, and what was left out.
    pub(super) found: Found,
}

/// Searches a folder and checks that all its images have one size once they are framed.
pub(super) fn open(root: &Path, data: &Data, framing: &Framing, labelled: bool) -> Result<Opened, DataError> {
    let channels = match data.channels {
        1 => 1,
        3 => 3,
        other => {
            return Err(DataError::Input(format!(
                "data.channels = {other}, expected 1 (grey) or 3 (colour)"
            )));
        }
    };
    let mut search = Search::of(root, data.image_extension.as_deref())?;
    check_count(root, data, &search)?;
    let labels = if labelled {
        Some(classes::of(root, &mut search)?)
    } else {
        classes::leave_out(&mut search, |_| true);
        let lists = std::mem::take(&mut search.lists);
        lists.iter().for_each(|list| search.leave_out(list));
        None
    };
    let Search { pictures, mut found, .. } = search;
    let begun = Instant::now();
    let surveyed = parallel::map(&pictures, |entry| Surveyed::read(entry, data.orientation))?;
    if begun.elapsed() > TOLD {
        let (files, took) = (pictures.len(), begun.elapsed().as_secs());
        tracing::info!("read the {files} files of {} for their fingerprint in {took} s", root.display());
    }
    let (shape, content) = compare(&pictures, &surveyed, channels, framing, &mut found)?;
    let files = pictures.into_iter().map(|entry| entry.place).collect();
    let folder = Folder { files, channels, orientation: data.orientation };
    Ok(Opened { folder, shape, content, labels, found })
}

/// Refuses a place without pictures, and says what there is instead.
fn check_count(root: &Path, data: &Data, search: &Search) -> Result<(), DataError> {
    if !search.pictures.is_empty() && u32::try_from(search.pictures.len()).is_ok() {
        return Ok(());
    }
    let endings = PICTURES.map(|ending| format!("*.{ending}")).join(", ");
    let wanted = data.image_extension.as_ref().map_or(endings, |ending| format!("*.{ending}"));
    let left = search.found.left_out.iter();
    let mut others: Vec<String> =
        left.map(|(kind, left)| format!("{} {kind} ({})", left.count, left.example)).collect();
    if others.is_empty() {
        others.push("nothing else".to_owned());
    }
    Err(DataError::Input(format!(
        "{}: found {} images, expected 1 to {} files {wanted}; there is {}; set data.path to the folder that holds them",
        root.display(),
        search.pictures.len(),
        u32::MAX,
        others.join(", ")
    )))
}

/// A file as it was found at the start.
struct Surveyed {
    outline: Outline,
    length: u64,
    hash: blake3::Hash,
}

impl Surveyed {
    fn read(entry: &Entry, turn: Orientation) -> Result<Surveyed, DataError> {
        let place = &entry.place;
        let head = place.head()?;
        let outline = match outline(&head.bytes, head.length, turn) {
            Some(outline) => outline,
            None => outline(&place.read()?, head.length, turn)
                .unwrap_or_else(|| Err("its size cannot be found".to_owned())),
        };
        let outline = outline.map_err(|wrong| corrupt(&place.shown(), &wrong))?;
        Ok(Surveyed { outline, length: head.length, hash: head.hash })
    }
}

/// The shape that all files share once framed, and a hash of them all.
fn compare(
    pictures: &[Entry],
    surveyed: &[Surveyed],
    channels: usize,
    framing: &Framing,
    found: &mut Found,
) -> Result<(ImageShape, blake3::Hash), DataError> {
    let mut content = blake3::Hasher::new();
    let mut first: Option<(Outline, (usize, usize))> = None;
    (found.least, found.greatest) = ([u32::MAX; 2], [0; 2]);
    for (entry, Surveyed { outline, length, hash }) in pictures.iter().zip(surveyed) {
        let Outline { width, height, orientation } = *outline;
        content.update(&(entry.relative.len() as u64).to_le_bytes());
        content.update(&entry.relative);
        content.update(&length.to_le_bytes());
        content.update(&width.to_le_bytes());
        content.update(&height.to_le_bytes());
        content.update(&[orientation]);
        content.update(hash.as_bytes());
        for (side, size) in [width, height].into_iter().enumerate() {
            found.least[side] = found.least[side].min(size);
            found.greatest[side] = found.greatest[side].max(size);
        }
        found.turned += u64::from(orientation != 1);

        let size = framing.output_size(height, width).map_err(|wrong| input(&entry.place.shown(), &wrong))?;
        match &first {
            None => first = Some((*outline, size)),
            Some((_, first_size)) if *first_size == size => {}
            Some((first, _)) => {
                return Err(DataError::Input(format!(
                    "found images of different sizes, {} of {} x {} pixels and {} of {width} x {height} \
                     (width x height), expected one; set data.resize to the size to train on",
                    pictures[0].place.shown().display(),
                    first.width,
                    first.height,
                    entry.place.shown().display(),
                )));
            }
        }
    }
    let (_, (height, width)) = first.expect("the search found a file");
    Ok((ImageShape { channels, height, width }, content.finalize()))
}

impl Folder {
    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    /// The name of file `index`, for people.
    pub(super) fn name(&self, index: usize) -> String {
        self.files[index].shown().display().to_string()
    }

    /// Decodes and frames image `index`.
    pub(super) fn read(
        &self,
        index: usize,
        framing: &Framing,
        shape: ImageShape,
        out: &mut [f32],
    ) -> Result<(), DataError> {
        let place = &self.files[index];
        let path = &place.shown();
        let image = decode(&place.read()?, self.orientation).map_err(|wrong| corrupt(path, &wrong))?;
        let (width, height) = (image.width(), image.height());
        let size = framing.output_size(height, width).map_err(|wrong| input(path, &wrong))?;
        if size != (shape.height, shape.width) {
            return Err(input(
                path,
                &format!(
                    "found {width} x {height} pixels, another size than at the start; do not \
                     change data in use"
                ),
            ));
        }
        let bytes = match self.channels {
            1 => image.into_luma8().into_raw(),
            _ => image.into_rgb8().into_raw(),
        };
        framing.render(&Image { width, height, channels: self.channels, bytes: &bytes }, out);
        Ok(())
    }
}

fn corrupt(path: &Path, wrong: &str) -> DataError {
    input(path, &format!("cannot decode the image, {wrong}; remove the file or get it again"))
}
