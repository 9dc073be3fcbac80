//! Pictures in a folder, searched recursively, or in archives; decoded when a sample is read.
//!
//! Invariants:
//! 1. Samples are in the order of their names, as [`search`](super::search) has them.
//! 2. Opening reads files of up to 1 MiB whole, and sixteen blocks of longer ones, on all processors, and
//!    keeps none of it: memory holds the names and no pixels.
//! 3. An archive in a folder is a folder of its name; one that `data.path` names is that folder itself, so
//!    pictures give the same samples packed and unpacked.
//! 4. Pictures that the job leaves out are not read when the folder is opened, and may be missing by then.
//! 5. A picture's transparent parts show the job's background, 16 bits become 8, and of an animation the
//!    first picture counts.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ganglion_proto::job::{Background, ClassOrder, Data, DataKind, Orientation};
use ganglion_proto::record::found::{FILES_LIMIT, FileFound, Found, Picture};

use image::DynamicImage;

use super::data_set::{EVERYTHING, Images, Opened};
use super::decode::{Decoded, Outline, decode, outline, over};
use super::framing::{Framing, Image};
use super::labels::Labels;
use super::left_out::{LeftOut, Names};
use super::place::Place;
use super::search::{Entry, PICTURES, Search};
use super::{DataError, ImageShape, classes, input, parallel};

/// Duration after which a reading of all files is logged.
const TOLD: Duration = Duration::from_secs(5);

/// Files of a data set.
#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    /// Places of the files, sorted by name.
    files: Vec<Place>,
    /// Number of channels, 1 or 3.
    channels: usize,
    orientation: Orientation,
    background: Background,
}

/// Searches a folder and checks that all its images have one size once they are framed.
pub(super) fn open(
    root: &Path,
    data: &Data,
    framing: &Framing,
    labelled: bool,
    left_out: LeftOut<'_>,
) -> Result<Opened, DataError> {
    let channels = check_channels(data.channels)?;
    let Listed { pictures, labels, mut found, left_out } = list(root, data, labelled, left_out)?;
    let begun = Instant::now();
    // Pictures that are left out, at any time, are not read: they may be damaged.
    let looked_at: Vec<&Entry> = pictures.iter().filter(|entry| !left_out.names(&entry.name())).collect();
    // Waits for all files, without a limit: a run cannot begin without their fingerprint (D11).
    let surveyed = parallel::map(&looked_at, |entry| Surveyed::read(entry, data.orientation))?;
    if begun.elapsed() > TOLD {
        let (files, took) = (looked_at.len(), begun.elapsed().as_secs());
        // Only where it took long enough to be asked about.
        tracing::info!("read the {files} files of {} for their fingerprint in {took} s", root.display());
    }
    let (shape, content) = compare(&looked_at, &surveyed, data, framing, &mut found)?;
    report_background(data, &mut found);
    let (names, left_out) =
        (Names::of(pictures.iter().map(Entry::name)), left_out.indices(pictures.iter().map(Entry::name)));
    let source = Images::Folder(Folder::new(root, pictures, channels, data));
    Ok(Opened { source, shape, content, labels, found, names, left_out })
}

/// A folder whose files were listed and not read.
pub(super) struct ToCheck {
    /// The files that no exclusion leaves out.
    pub(super) folder: Folder,
    /// Classes, if there are any, and the files left out.
    pub(super) found: Found,
    /// Reason for the absence of classes.
    pub(super) no_classes: Option<DataError>,
}

/// Lists the pictures that are left in, and reads none.
pub(super) fn to_check(root: &Path, data: &Data) -> Result<ToCheck, DataError> {
    let channels = check_channels(data.channels)?;
    let listed = |labelled| list(root, data, labelled, LeftOut::new(&data.exclusions));
    let (listed, no_classes) = match listed(true) {
        // A check of data tells also about folders that have no classes.
        Ok(listed) => (listed, None),
        Err(error) => (listed(false)?, Some(error)),
    };
    let Listed { mut pictures, mut labels, mut found, left_out } = listed;
    let kept: Vec<usize> = (0..pictures.len()).filter(|at| !left_out.names(&pictures[*at].name())).collect();
    labels.iter_mut().for_each(|labels| labels.keep(&kept));
    pictures.retain(|entry| !left_out.names(&entry.name()));
    if let Some(labels) = &labels {
        labels.check(pictures.len())?;
        labels.report(&mut found);
    }
    let folder = Folder::new(root, pictures, channels, data);
    Ok(ToCheck { folder, found, no_classes })
}

/// Facts of a file after a complete read.
pub(super) struct Looked {
    /// Length of the file in bytes.
    pub(super) bytes: u64,
    pub(super) format: &'static str,
    pub(super) picture: Picture,
    /// Height and width, once framed.
    pub(super) framed: (usize, usize),
}

/// Colour behind transparent parts; jobs from before there was a setting show the stored one.
fn background(data: &Data) -> Background {
    data.background.unwrap_or(Background::Stored)
}

/// Reports the colour behind transparent parts, where there are any.
pub(super) fn report_background(data: &Data, found: &mut Found) {
    let background = background(data);
    if found.alpha > 0 && background != Background::Stored {
        found.background = background.to_string();
    }
}

fn check_channels(channels: u32) -> Result<usize, DataError> {
    match channels {
        1 => Ok(1),
        3 => Ok(3),
        other => Err(DataError::Input(format!("data.channels = {other}, expected 1 (grey) or 3 (colour)"))),
    }
}

/// Pictures that take part in a run, in order, including those that are left out later.
struct Listed<'a> {
    pictures: Vec<Entry>,
    labels: Option<Labels>,
    found: Found,
    left_out: LeftOut<'a>,
}

/// Lists a folder's pictures, and reads none.
fn list<'a>(
    root: &Path,
    data: &Data,
    labelled: bool,
    mut left_out: LeftOut<'a>,
) -> Result<Listed<'a>, DataError> {
    let mut search = Search::of(root, data.image_extension.as_deref())?;
    check_count(root, data, &search)?;
    if !left_out.is_empty() {
        add_missing(root, &mut search, &mut left_out)?;
    }
    // Classes keep their numbers, so pictures that are left out from the start count too.
    let mut labels = if labelled {
        let order = data.class_order.unwrap_or(ClassOrder::Bytes);
        Some(classes::of(root, &mut search, order)?)
    } else {
        // Without classes the files for them are reported as left out (invariant 4 of `search`).
        classes::leave_out(&mut search, |_| true);
        let lists = std::mem::take(&mut search.lists);
        lists.iter().for_each(|list| search.leave_out(list));
        None
    };
    let Search { mut pictures, mut found, .. } = search;
    if !left_out.is_empty() {
        let takes_part = |at: &usize| !left_out.is_from_the_start(&pictures[*at].name());
        let kept: Vec<usize> = (0..pictures.len()).filter(takes_part).collect();
        labels.iter_mut().for_each(|labels| labels.keep(&kept));
        pictures.retain(|entry| !left_out.is_from_the_start(&entry.name()));
    }
    left_out.report(&mut found);
    Ok(Listed { pictures, labels, found, left_out })
}

/// Adds excluded pictures that no longer exist, once it is certain that they did.
fn add_missing(root: &Path, search: &mut Search, left_out: &mut LeftOut<'_>) -> Result<(), DataError> {
    let there: Vec<String> = search.pictures.iter().map(Entry::name).collect();
    for name in &there {
        left_out.find(name);
    }
    // A name that a change recorded did exist, and its picture keeps its index (invariant 2 of
    // `left_out`).
    let missing = left_out.missing().filter(|(name, known)| *known || !left_out.is_from_the_start(name));
    search.pictures.extend(missing.map(|(name, _)| Entry::missing(root, name)));
    // In the order of the names, as if the missing ones were there.
    search.pictures.sort_by(|one, other| one.relative.cmp(&other.relative));
    let all = search.pictures.iter().map(Entry::name);
    let names = Names::of(all.filter(|name| !left_out.is_from_the_start(name)));
    left_out.check(&names, &root.display().to_string(), || Box::new(there.iter().cloned()))
}

/// Refuses a place without pictures, with a message on what is there instead.
fn check_count(root: &Path, data: &Data, search: &Search) -> Result<(), DataError> {
    // The stream's permutations hold indices of 32 bits.
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

/// Outline and hash of a file at the opening.
struct Surveyed {
    outline: Outline,
    length: u64,
    hash: blake3::Hash,
}

impl Surveyed {
    fn read(entry: &Entry, turn: Orientation) -> Result<Surveyed, DataError> {
        Surveyed::of(&entry.place, turn).map_err(|error| error.of_sample(&entry.name()))
    }

    fn of(place: &Place, turn: Orientation) -> Result<Surveyed, DataError> {
        let head = place.head()?;
        // From the first bytes if they suffice: a survey of many files must not decode them.
        let outline = match outline(&head.bytes, head.length, turn) {
            Some(outline) => outline,
            None => outline(&place.read()?, head.length, turn)
                .unwrap_or_else(|| Err("its size cannot be found".to_owned())),
        };
        let outline = outline.map_err(|wrong| corrupt(&place.shown(), &wrong))?;
        Ok(Surveyed { outline, length: head.length, hash: head.hash })
    }
}

/// Returns the shape that all files share once framed, and a hash of them all.
fn compare(
    pictures: &[&Entry],
    surveyed: &[Surveyed],
    data: &Data,
    framing: &Framing,
    found: &mut Found,
) -> Result<(ImageShape, blake3::Hash), DataError> {
    let mut content = blake3::Hasher::new();
    let mut first: Option<(Outline, (usize, usize))> = None;
    for (entry, Surveyed { outline, length, hash }) in pictures.iter().zip(surveyed) {
        let Outline { width, height, orientation, alpha } = *outline;
        // Lengths before names, so that no two lists of files give the same bytes.
        content.update(&(entry.relative.len() as u64).to_le_bytes());
        content.update(&entry.relative);
        let own = [
            &length.to_le_bytes()[..],
            &width.to_le_bytes(),
            &height.to_le_bytes(),
            &[orientation],
            hash.as_bytes(),
        ];
        let own = own.concat();
        content.update(&own);
        if pictures.len() <= FILES_LIMIT {
            let first = *blake3::hash(&own).as_bytes().first_chunk().expect("a hash has 32 bytes");
            found.files.push(FileFound { name: entry.name(), hash: u64::from_le_bytes(first) });
        }
        found.add_pictures(1, &picture(width, height, alpha, orientation, framing), || entry.name());

        let size = framing
            .output_size(height, width)
            .map_err(|wrong| input(&entry.place.shown(), &wrong).of_sample(&entry.name()))?;
        // One size for all: a batch is one tensor.
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
    let Some((_, (height, width))) = first else { return Err(DataError::Input(EVERYTHING.to_owned())) };
    // Without an alpha channel anywhere no pixel depends on it.
    if let (Background::Colour(colour), true) = (background(data), found.alpha > 0) {
        content.update(b"background").update(&colour);
    }
    let channels = check_channels(data.channels)?;
    Ok((ImageShape { channels, height, width }, content.finalize()))
}

/// Returns the facts of a picture for the report; sizes are those after turning.
fn picture(width: u32, height: u32, alpha: bool, orientation: u8, framing: &Framing) -> Picture {
    Picture {
        size: [width, height],
        alpha,
        // 1 is the usual one, in which nothing is turned.
        turned: orientation != 1,
        lost: framing.lost(height, width),
        enlarged: framing.enlarges(height, width),
    }
}

impl Folder {
    fn new(root: &Path, pictures: Vec<Entry>, channels: usize, data: &Data) -> Folder {
        let files = pictures.into_iter().map(|entry| entry.place).collect();
        let (orientation, background) = (data.orientation, background(data));
        Folder { root: root.to_path_buf(), files, channels, orientation, background }
    }

    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    /// Name of file `index`, diagnostic only.
    pub(super) fn name(&self, index: usize) -> String {
        self.files[index].shown().display().to_string()
    }

    /// Name of file `index` by which the job may leave it out.
    pub(super) fn relative(&self, index: usize) -> String {
        let shown = self.files[index].shown();
        shown.strip_prefix(&self.root).unwrap_or(&shown).to_string_lossy().into_owned()
    }

    pub(super) fn channels(&self) -> usize {
        self.channels
    }

    /// Decodes and frames image `index` into `out`, whatever its size.
    pub(super) fn look(
        &self,
        index: usize,
        framing: &Framing,
        out: &mut Vec<f32>,
    ) -> Result<Looked, DataError> {
        let place = &self.files[index];
        let path = &place.shown();
        let bytes = place.read()?;
        let decoded = decode(&bytes, self.orientation).map_err(|wrong| corrupt(path, &wrong))?;
        let Decoded { image, orientation } = decoded;
        let (width, height) = (image.width(), image.height());
        // Framed whatever its size: the check of data tells which size most have.
        let framed = framing.output_size(height, width).map_err(|wrong| input(path, &wrong))?;
        out.resize(self.channels * framed.0 * framed.1, 0.0);
        let picture = picture(width, height, image.color().has_alpha(), orientation, framing);
        self.render(image, framing, out);
        let format = image::guess_format(&bytes).ok().and_then(|format| format.extensions_str().first());
        let format = format.copied().unwrap_or("other");
        Ok(Looked { bytes: bytes.len() as u64, format, picture, framed })
    }

    fn render(&self, image: DynamicImage, framing: &Framing, out: &mut [f32]) {
        let (width, height) = (image.width(), image.height());
        let image = over(image, self.background);
        // The job decides, not the file: grey pictures may be trained on in colour, and the reverse.
        let bytes = match self.channels {
            1 => image.into_luma8().into_raw(),
            _ => image.into_rgb8().into_raw(),
        };
        framing.render(&Image { width, height, channels: self.channels, bytes: &bytes }, out);
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
        let decoded = decode(&place.read()?, self.orientation);
        let Decoded { image, .. } = decoded.map_err(|wrong| corrupt(path, &wrong))?;
        let (width, height) = (image.width(), image.height());
        let size = framing.output_size(height, width).map_err(|wrong| input(path, &wrong))?;
        // It would be written beyond its place in the batch.
        if size != (shape.height, shape.width) {
            return Err(input(
                path,
                &format!(
                    "found {width} x {height} pixels, another size than at the start; do not \
                     change data in use"
                ),
            ));
        }
        self.render(image, framing, out);
        Ok(())
    }
}

/// Reads one picture, scaled and cut to the square of a shape, as numbers in [-1, 1].
///
/// # Errors
/// The file cannot be read or decoded.
pub(crate) fn read_picture(path: &Path, shape: ImageShape) -> Result<Vec<f32>, DataError> {
    let side = u32::try_from(shape.height).ok();
    let framed = Data { resize: side, crop: side, ..Data::plain(DataKind::Folder, None, 1) };
    let folder = Folder {
        root: PathBuf::new(),
        files: vec![Place::Alone(path.to_path_buf())],
        channels: shape.channels,
        orientation: framed.orientation,
        background: background(&framed),
    };
    let mut pixels = vec![0.0; shape.numel()];
    folder.read(0, &Framing::new(&framed)?, shape, &mut pixels)?;
    Ok(pixels)
}

fn corrupt(path: &Path, wrong: &str) -> DataError {
    input(path, &format!("cannot decode the image, {wrong}"))
}
