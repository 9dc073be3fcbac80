//! PNG and JPEG files in a folder, searched recursively, or in archives; decoded when a sample is read.
//!
//! Invariants:
//! 1. Samples are in the order of their relative paths, compared as bytes with `/` between names, whatever the order in
//!    which the file system lists them. Names that begin with a dot and other endings do not count; links are followed.
//! 2. Opening reads only the first bytes of a file, where its size in pixels is written. So memory holds the paths and no
//!    pixels.
//! 3. An archive in a folder is a folder of its name; one that `data.path` names is that folder itself, so pictures give the
//!    same samples packed and unpacked.
//! 4. A file is taken as it is stored: alpha is dropped, orientation tags are not followed, 16 bits become 8.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use ganglion_proto::job::ArchiveKind;
use image::{DynamicImage, ImageFormat, ImageReader};

use super::framing::{Framing, Image};
use super::packed::{self, Member};
use super::{DataError, ImageShape, Labels};

/// Bytes of a file that are read when the folder is opened, and that the fingerprint covers.
const HEAD_BYTES: u64 = 16 << 10;

/// Longest file that is read. Decoded, an image may take 512 MiB, the decoder's own limit.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The files of a data set.
#[derive(Debug)]
pub(super) struct Folder {
    /// Sorted by relative path.
    files: Vec<Place>,
    /// 1 or 3.
    channels: usize,
}

/// A folder with what was learnt while opening it.
pub(super) struct Opened {
    pub(super) folder: Folder,
    /// The shape of every framed image.
    pub(super) shape: ImageShape,
    /// Hash of the relative paths, lengths, sizes in pixels and heads of the files.
    pub(super) content: blake3::Hash,
    /// The classes of the files, where they were asked for.
    pub(super) labels: Option<Labels>,
}

/// Searches a folder and checks that all its images have one size once they are framed.
pub(super) fn open(
    root: &Path,
    channels: u32,
    framing: &Framing,
    labelled: bool,
) -> Result<Opened, DataError> {
    let channels = match channels {
        1 => 1,
        3 => 3,
        other => {
            return Err(DataError::Input(format!(
                "data.channels = {other}, expected 1 (grey) or 3 (colour)"
            )));
        }
    };
    let mut found = Search::default();
    if ArchiveKind::of(root).is_some() {
        found.archive(root, &[])?;
    } else {
        found.folder(root, Vec::new(), &mut Vec::new())?;
    }
    let Search { mut files, notes } = found;
    files.sort_by(|one, other| one.relative.cmp(&other.relative));
    if files.is_empty() || u32::try_from(files.len()).is_err() {
        return Err(DataError::Input(format!(
            "{}: found {} images, expected 1 to {} files *.png, *.jpg or *.jpeg; set data.path to \
             the folder that holds them",
            root.display(),
            files.len(),
            u32::MAX
        )));
    }
    let (shape, content) = survey(&files, channels, framing)?;
    let labels = labelled.then(|| labels(root, &files, &notes)).transpose()?;
    let files = files.into_iter().map(|found| found.place).collect();
    Ok(Opened { folder: Folder { files, channels }, shape, content, labels })
}

/// The file in a folder that may give the classes of its images, as StyleGAN's tools write it.
const LABELS_FILE: &str = "dataset.json";

/// The classes of a folder's files: those of its `dataset.json`, or else the places of their subfolders in sorted order.
fn labels(root: &Path, files: &[Found], notes: &[Found]) -> Result<Labels, DataError> {
    if let Some(list) = notes.iter().find(|note| note.relative == LABELS_FILE.as_bytes()) {
        return listed(&list.place, files);
    }
    if notes.is_empty() { by_subfolder(root, files) } else { by_note(root, files, notes) }
}

/// The classes in files beside the images, such as `0001.cls` for `0001.png`, as WebDataset has them.
fn by_note(root: &Path, files: &[Found], notes: &[Found]) -> Result<Labels, DataError> {
    let stem = |relative: &[u8]| relative[..relative.len() - ending(relative).len()].to_vec();
    let by_stem: HashMap<Vec<u8>, &Place> =
        notes.iter().map(|note| (stem(&note.relative), &note.place)).collect();
    let class = |found: &Found| {
        let shown = found.place.shown();
        let note = by_stem.get(&stem(&found.relative)).ok_or_else(|| {
            input(
                &shown,
                &format!("has no class, which model.conditional needs: others have a file *.{NOTE}"),
            )
        })?;
        let text = String::from_utf8_lossy(&note.read()?).trim().to_string();
        text.parse().map_err(|_| input(&note.shown(), &format!("found {text:?}, expected a whole number")))
    };
    let of: Result<Vec<u32>, DataError> = files.iter().map(class).collect();
    Ok(Labels::new(of?, root.display().to_string()))
}

/// The part of a path from the dot of its ending on; empty without one.
fn ending(relative: &[u8]) -> &[u8] {
    let name = relative.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    name.iter().rposition(|byte| *byte == b'.').map_or(&[], |dot| &name[dot..])
}

fn by_subfolder(root: &Path, files: &[Found]) -> Result<Labels, DataError> {
    let mut names: Vec<&[u8]> = Vec::new();
    let mut of = Vec::with_capacity(files.len());
    for found in files {
        let Some(end) = found.relative.iter().position(|byte| *byte == b'/') else {
            return Err(input(
                &found.place.shown(),
                &format!(
                    "has no class, which model.conditional needs: it lies in no subfolder of {}, where there is no \
                     {LABELS_FILE}; sort the images into one subfolder a class",
                    root.display()
                ),
            ));
        };
        let name = &found.relative[..end];
        // The files are sorted, so those of one subfolder follow each other, but for names like "a" and "a.b".
        let at = names.iter().position(|known| *known == name).unwrap_or_else(|| {
            names.push(name);
            names.len() - 1
        });
        of.push(at);
    }
    let mut sorted = names.clone();
    sorted.sort_unstable();
    let place = |name: &[u8]| sorted.iter().position(|other| *other == name);
    let places: Vec<u32> = names
        .iter()
        .map(|name| place(name).and_then(|at| u32::try_from(at).ok()).unwrap_or(u32::MAX))
        .collect();
    Ok(Labels::new(of.into_iter().map(|at| places[at]).collect(), root.display().to_string()))
}

/// The classes of `dataset.json`: {"labels": [["00000/img00000000.png", 5], ...]}.
fn listed(list: &Place, files: &[Found]) -> Result<Labels, DataError> {
    #[derive(serde::Deserialize)]
    struct List {
        labels: Vec<(String, u32)>,
    }
    let (bytes, list) = (list.read()?, &list.shown());
    let parsed: Result<List, _> = serde_json::from_slice(&bytes);
    let parsed = parsed.map_err(|error| {
        let wanted = "expected {\"labels\": [[\"FILE\", CLASS], ...]} with whole numbers for classes";
        input(list, &format!("cannot be read: {error}; {wanted}"))
    })?;
    let of: HashMap<&[u8], u32> =
        parsed.labels.iter().map(|(file, class)| (file.as_bytes(), *class)).collect();
    let class = |found: &Found| {
        let missing =
            || input(list, &format!("gives no class for {}; add it", found.place.shown().display()));
        of.get(found.relative.as_slice()).copied().ok_or_else(missing)
    };
    let of: Result<Vec<u32>, DataError> = files.iter().map(class).collect();
    Ok(Labels::new(of?, list.display().to_string()))
}

/// Where a file is.
#[derive(Debug)]
enum Place {
    Alone(PathBuf),
    Packed(Member),
}

impl Place {
    /// For people.
    fn shown(&self) -> PathBuf {
        match self {
            Place::Alone(path) => path.clone(),
            Place::Packed(member) => member.shown(),
        }
    }

    /// The whole file.
    fn read(&self) -> Result<Vec<u8>, DataError> {
        match self {
            Place::Alone(path) => read_file(path),
            Place::Packed(member) => {
                check_length(&member.shown(), member.length)?;
                member.head(member.length)
            }
        }
    }

    /// Its first bytes, and how many it has.
    fn head(&self) -> Result<(Vec<u8>, u64), DataError> {
        match self {
            Place::Packed(member) => {
                check_length(&member.shown(), member.length)?;
                Ok((member.head(HEAD_BYTES)?, member.length))
            }
            Place::Alone(path) => {
                let (file, length) = open_file(path)?;
                let mut bytes = Vec::new();
                let read = file.take(HEAD_BYTES).read_to_end(&mut bytes);
                read.map_err(|error| DataError::reading(path, error))?;
                Ok((bytes, length))
            }
        }
    }
}

/// A file that counts.
struct Found {
    /// The names on the way from the root, with `/` between them.
    relative: Vec<u8>,
    place: Place,
}

/// The ending of a file with the class of the image beside it.
const NOTE: &str = "cls";

/// What lies below the root.
#[derive(Default)]
struct Search {
    /// The images.
    files: Vec<Found>,
    /// What tells of their classes.
    notes: Vec<Found>,
}

impl Search {
    fn take(&mut self, relative: Vec<u8>, place: Place) {
        let name = String::from_utf8_lossy(&relative).into_owned();
        if is_image(Path::new(&name)) {
            self.files.push(Found { relative, place });
        } else if name == LABELS_FILE || Path::new(&name).extension().is_some_and(|ending| ending == NOTE) {
            self.notes.push(Found { relative, place });
        }
    }

    /// Adds what is in an archive, below `relative`.
    fn archive(&mut self, path: &Path, relative: &[u8]) -> Result<(), DataError> {
        for member in packed::members(path)? {
            if member.name.split('/').any(|name| name.starts_with('.')) {
                continue;
            }
            self.take([relative, member.name.as_bytes()].concat(), Place::Packed(member));
        }
        Ok(())
    }

    /// Adds what lies below a folder. `ancestors` are the folders on the way to it, without links.
    fn folder(
        &mut self,
        folder: &Path,
        relative: Vec<u8>,
        ancestors: &mut Vec<PathBuf>,
    ) -> Result<(), DataError> {
        let failed = |error| DataError::reading(folder, error);
        let real = folder.canonicalize().map_err(failed)?;
        if ancestors.contains(&real) {
            return Err(DataError::Input(format!(
                "{}: found a link to a folder that holds it, expected a tree; remove the link",
                folder.display()
            )));
        }
        ancestors.push(real);
        for entry in fs::read_dir(folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.as_encoded_bytes();
            if name.starts_with(b".") {
                continue;
            }
            let mut below = relative.clone();
            below.extend(name);
            if path.is_dir() {
                below.push(b'/');
                self.folder(&path, below, ancestors)?;
            } else if ArchiveKind::of(&path).is_some() {
                below.push(b'/');
                self.archive(&path, &below)?;
            } else {
                self.take(below, Place::Alone(path));
            }
        }
        ancestors.pop();
        Ok(())
    }
}

fn is_image(path: &Path) -> bool {
    path.extension()
        .is_some_and(|ending| ["png", "jpg", "jpeg"].iter().any(|known| ending.eq_ignore_ascii_case(known)))
}

/// Reads the heads of all files: the shape that they share once framed, and a hash.
fn survey(
    files: &[Found],
    channels: usize,
    framing: &Framing,
) -> Result<(ImageShape, blake3::Hash), DataError> {
    let mut content = blake3::Hasher::new();
    let mut first: Option<(Head, (usize, usize))> = None;
    for found in files {
        let head = Head::read(&found.place)?;
        content.update(&(found.relative.len() as u64).to_le_bytes());
        content.update(&found.relative);
        content.update(&head.length.to_le_bytes());
        content.update(&head.width.to_le_bytes());
        content.update(&head.height.to_le_bytes());
        content.update(&head.bytes);

        let size = framing
            .output_size(head.height, head.width)
            .map_err(|wrong| input(&found.place.shown(), &wrong))?;
        match &first {
            None => first = Some((head, size)),
            Some((_, first_size)) if *first_size == size => {}
            Some((first, _)) => {
                return Err(DataError::Input(format!(
                    "found images of different sizes, {} of {} x {} pixels and {} of {} x {} \
                     (width x height), expected one; set data.resize to the size to train on",
                    files[0].place.shown().display(),
                    first.width,
                    first.height,
                    found.place.shown().display(),
                    head.width,
                    head.height
                )));
            }
        }
    }
    let (_, (height, width)) = first.expect("the search found a file");
    Ok((ImageShape { channels, height, width }, content.finalize()))
}

/// What a file's beginning tells.
struct Head {
    bytes: Vec<u8>,
    /// Bytes in the whole file.
    length: u64,
    width: u32,
    height: u32,
}

impl Head {
    fn read(place: &Place) -> Result<Head, DataError> {
        let (bytes, length) = place.head()?;
        let (width, height) = match dimensions(&bytes) {
            // A colour profile or a preview may come first.
            Err(_) if length > HEAD_BYTES => dimensions(&place.read()?),
            found => found,
        }
        .map_err(|wrong| corrupt(&place.shown(), &wrong))?;
        Ok(Head { bytes, length, width, height })
    }
}

impl Folder {
    pub(super) fn len(&self) -> usize {
        self.files.len()
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
        let image = decode(&place.read()?).map_err(|wrong| corrupt(path, &wrong))?;
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

/// Width and height in pixels, from a file's first bytes.
fn dimensions(bytes: &[u8]) -> Result<(u32, u32), String> {
    reader(bytes)?.into_dimensions().map_err(|error| error.to_string())
}

fn decode(bytes: &[u8]) -> Result<DynamicImage, String> {
    let reader = reader(bytes)?;
    // The decoder fills what is missing with grey and says nothing.
    if reader.format() == Some(ImageFormat::Jpeg) && !has_end(bytes) {
        return Err("the file is cut off".to_owned());
    }
    reader.decode().map_err(|error| error.to_string())
}

/// A decoder by the content: the ending of a file's name is often wrong.
fn reader(bytes: &[u8]) -> Result<ImageReader<Cursor<&[u8]>>, String> {
    let reader =
        ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|error| error.to_string())?;
    match reader.format() {
        Some(ImageFormat::Png | ImageFormat::Jpeg) => Ok(reader),
        _ => Err("the content is neither PNG nor JPEG".to_owned()),
    }
}

/// Whether the last scan of a JPEG file is followed by the end marker. Neither marker can be part of the coded pixels.
fn has_end(bytes: &[u8]) -> bool {
    const START_OF_SCAN: [u8; 2] = [0xff, 0xda];
    const END_OF_IMAGE: [u8; 2] = [0xff, 0xd9];
    let last_end = bytes.windows(2).rposition(|marker| marker == END_OF_IMAGE);
    last_end.is_some_and(|end| !bytes[end..].windows(2).any(|marker| marker == START_OF_SCAN))
}

/// A whole file.
fn read_file(path: &Path) -> Result<Vec<u8>, DataError> {
    let (file, length) = open_file(path)?;
    let mut bytes = Vec::new();
    // The file may have grown since its length was asked.
    file.take(length).read_to_end(&mut bytes).map_err(|error| DataError::reading(path, error))?;
    Ok(bytes)
}

/// Opens a file whose length, in bytes, is within the limits.
fn open_file(path: &Path) -> Result<(File, u64), DataError> {
    let failed = |error| DataError::reading(path, error);
    // Asked before opening, because to open a pipe is to wait for its writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(input(path, "found neither a file nor a folder, expected an image; remove it"));
    }
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    check_length(path, length)?;
    Ok((file, length))
}

fn check_length(path: &Path, length: u64) -> Result<(), DataError> {
    if length <= MAX_FILE_BYTES {
        return Ok(());
    }
    Err(input(
        path,
        &format!("found {length} bytes, expected an image of at most {MAX_FILE_BYTES}; remove it"),
    ))
}

fn corrupt(path: &Path, wrong: &str) -> DataError {
    input(path, &format!("cannot decode the image, {wrong}; remove the file or get it again"))
}

fn input(path: &Path, wrong: &str) -> DataError {
    DataError::Input(format!("{}: {wrong}", path.display()))
}
