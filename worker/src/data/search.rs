//! Search for the files of a data set: pictures, files for classes, and files left out.
//!
//! 1. A file's name is the path to it from the root, archives included, with `/` between the parts. Names
//!    are compared as bytes; the order in which a file system lists them does not enter. Links are
//!    followed, but not in circles.
//! 2. An archive is a place like its folder: for classes, the names of its members count as if they lay
//!    beside it.
//! 3. In a tar file all members whose names are equal up to the first dot of their last part are one
//!    sample, as in WebDataset. One of them is the picture: that of `data.image_extension`, else the one
//!    whose extension has no dot (`0001.png`, not `0001.seg.png`), the first of [`PICTURES`] of several.
//! 4. Each file is a picture, a file for classes, or counted among those left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ganglion_proto::job::ArchiveKind;
use ganglion_proto::printable_start;
use ganglion_proto::record::found::Found;

use super::packed::{self, OpenArchives};
use super::place::Place;
use super::{DataError, input};

/// Extensions of pictures. Of several pictures of one sample the first of these counts: masks come as PNG.
pub(super) const PICTURES: [&str; 9] = ["jpg", "jpeg", "jpe", "jfif", "webp", "png", "tif", "tiff", "bmp"];
/// Name of the list of classes of the files beside and below it, as StyleGAN's tools write it.
pub(super) const LABELS_FILE: &str = "dataset.json";
/// Extension of a file with the class of the picture beside it.
pub(super) const NOTE: &str = "cls";
/// Extension of a JSON file that may hold the class among other data.
pub(super) const JSON_NOTE: &str = "json";
/// Maximum number of characters of a name in a report.
const SHOWN_CHARACTERS: usize = 200;
/// Label in reports for parts of samples that are not their pictures.
const OTHER_PARTS: &str = "other parts of samples";

/// File with a role in the data set.
#[derive(Debug)]
pub(super) struct Entry {
    /// Path from the root, with `/` between the names.
    pub(super) relative: Vec<u8>,
    /// For a member of an archive: its offset in `relative`, and the length of the archive's own name
    /// before it, with the slash.
    pub(super) archive: Option<(usize, usize)>,
    in_tar: bool,
    pub(super) place: Place,
}

/// Files below a root, by role.
#[derive(Default)]
pub(super) struct Search {
    /// Pictures.
    pub(super) pictures: Vec<Entry>,
    /// Files beside pictures that may hold their classes.
    pub(super) notes: Vec<Entry>,
    /// Lists of classes.
    pub(super) lists: Vec<Entry>,
    /// Report of all other files.
    pub(super) found: Found,
    archives: Arc<OpenArchives>,
}

impl Entry {
    /// Returns an entry for a file that does not exist.
    pub(super) fn missing(root: &Path, name: &str) -> Entry {
        let mut archive = ArchiveKind::of(root).map(|_| (0, 0));
        let mut in_tar = ArchiveKind::of(root) == Some(ArchiveKind::Tar);
        let mut at = 0;
        for part in name.split_inclusive('/') {
            let kind = part.strip_suffix('/').and_then(|part| ArchiveKind::of(Path::new(part)));
            at += part.len();
            // The outermost archive counts: an archive within one is not looked into.
            if let (Some(kind), None) = (kind, archive) {
                (archive, in_tar) = (Some((at, part.len())), kind == ArchiveKind::Tar);
            }
        }
        Entry { relative: name.as_bytes().to_vec(), archive, in_tar, place: Place::Alone(root.join(name)) }
    }

    /// Name by which the job may leave the sample out.
    pub(super) fn name(&self) -> String {
        String::from_utf8_lossy(&self.relative).into_owned()
    }

    /// Name with `/`, diagnostic only.
    pub(super) fn shown(&self) -> String {
        shown(&self.relative)
    }

    /// Name as if members of an archive lay beside it.
    pub(super) fn unpacked(&self) -> Vec<u8> {
        match self.archive {
            // Without the archive's own name, as if its members lay beside it.
            Some((at, own)) => [&self.relative[..at - own], &self.relative[at..]].concat(),
            None => self.relative.clone(),
        }
    }

    /// Key of one sample's files: the name up to the first dot in a tar file, else up to the last one.
    pub(super) fn key(&self) -> &[u8] {
        &self.relative[..self.relative.len() - self.ending().len()]
    }

    /// Rest of the name, from that dot on.
    fn ending(&self) -> &[u8] {
        let name = last(&self.relative);
        // WebDataset's rule for tar files only: in a folder `a.b.png` is a picture of its own.
        let dot = if self.in_tar {
            name.iter().position(|byte| *byte == b'.')
        } else {
            name.iter().rposition(|byte| *byte == b'.')
        };
        dot.map_or(&[], |dot| &name[dot..])
    }

    /// Extension in lower case, without the dot before it.
    fn extension(&self) -> String {
        let ending = String::from_utf8_lossy(self.ending()).to_ascii_lowercase();
        ending.strip_prefix('.').unwrap_or_default().to_string()
    }
}

/// Returns the last part of a name.
fn last(relative: &[u8]) -> &[u8] {
    relative.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
}

fn shown(relative: &[u8]) -> String {
    printable_start(&String::from_utf8_lossy(relative), SHOWN_CHARACTERS)
}

impl Search {
    /// Finds all files below a folder or in an archive, in the order of their names.
    pub(super) fn of(root: &Path, extension: Option<&str>) -> Result<Search, DataError> {
        let mut search = Search::default();
        if ArchiveKind::of(root).is_some() {
            search.archive(root, &[])?;
        } else {
            search.folder(root)?;
        }
        for entries in [&mut search.pictures, &mut search.notes, &mut search.lists] {
            // File systems list in any order, which must not enter (invariant 1).
            entries.sort_by(|one, other| one.relative.cmp(&other.relative));
        }
        match extension {
            Some(extension) => search.keep(extension),
            None => search.choose()?,
        }
        Ok(search)
    }

    fn take(&mut self, entry: Entry) {
        let name = last(&entry.relative);
        let lower = String::from_utf8_lossy(name).to_ascii_lowercase();
        let is_picture = lower.rsplit_once('.').is_some_and(|(_, ending)| PICTURES.contains(&ending));
        match entry.extension().as_str() {
            // First by the last part: `0001.seg.png` is a picture too, of which `choose` decides.
            _ if is_picture => self.pictures.push(entry),
            JSON_NOTE if name == LABELS_FILE.as_bytes() => self.lists.push(entry),
            NOTE | JSON_NOTE => self.notes.push(entry),
            _ => self.leave_out(&entry),
        }
    }

    /// Counts a file that is no sample by its extension.
    pub(super) fn leave_out(&mut self, entry: &Entry) {
        let name = String::from_utf8_lossy(last(&entry.relative)).to_ascii_lowercase();
        let kind = match name.rsplit_once('.') {
            Some((_, ending)) if !ending.is_empty() => format!(".{}", printable_start(ending, 20)),
            _ => "without an ending".to_string(),
        };
        self.found.leave_out(&kind, entry.shown());
    }

    /// Adds the members of an archive, below `relative`, which is empty or ends with a slash.
    fn archive(&mut self, path: &Path, relative: &[u8]) -> Result<(), DataError> {
        let in_tar = ArchiveKind::of(path) == Some(ArchiveKind::Tar);
        let own = last(relative.strip_suffix(b"/").unwrap_or_default()).len();
        let own = if relative.is_empty() { 0 } else { own + 1 };
        for member in packed::members(path, &shown(relative), &self.archives, &mut self.found)? {
            let name = [relative, member.name.as_str().as_bytes()].concat();
            // Editors, archivers and operating systems leave such files.
            if member.name.as_str().split('/').any(|part| part.starts_with('.')) {
                self.found.leave_out("hidden", shown(&name));
                continue;
            }
            let archive = Some((relative.len(), own));
            self.take(Entry { relative: name, archive, in_tar, place: Place::Packed(member) });
        }
        Ok(())
    }

    /// Adds the files below a folder.
    fn folder(&mut self, folder: &Path) -> Result<(), DataError> {
        walk(folder, &mut |below, path| {
            match path {
                None => self.found.leave_out("hidden", shown(&below)),
                Some(path) if ArchiveKind::of(&path).is_some() => {
                    return self.archive(&path, &[&below, &b"/"[..]].concat());
                }
                Some(path) => {
                    let place = Place::Alone(path);
                    self.take(Entry { relative: below, archive: None, in_tar: false, place });
                }
            }
            Ok(())
        })
    }

    /// Keeps the pictures with the extension that the job names.
    fn keep(&mut self, extension: &str) {
        let extension = extension.to_ascii_lowercase();
        let matches = |entry: &Entry| {
            let name = String::from_utf8_lossy(last(&entry.relative)).to_ascii_lowercase();
            match entry.in_tar {
                true => entry.extension() == extension,
                false => name.strip_suffix(&extension).is_some_and(|stem| stem.ends_with('.')),
            }
        };
        let (kept, others) = std::mem::take(&mut self.pictures).into_iter().partition(matches);
        self.pictures = kept;
        let others: Vec<Entry> = others;
        others.iter().for_each(|entry| self.found.leave_out("pictures of other endings", entry.shown()));
        self.found.image_rule = format!("pictures are the files *.{extension}");
    }

    /// Chooses the picture of each sample in tar files.
    fn choose(&mut self) -> Result<(), DataError> {
        let pictures = std::mem::take(&mut self.pictures);
        // The list is sorted, so the files of a sample lie together.
        let groups: Vec<&[Entry]> =
            pictures.chunk_by(|one, other| one.in_tar && other.in_tar && one.key() == other.key()).collect();
        let mut chosen = BTreeMap::new();
        let mut parts = BTreeSet::new();
        for group in groups.iter().filter(|group| group.len() > 1) {
            let picture = picture_of(group)?;
            *chosen.entry(picture.extension()).or_insert(0_u64) += 1;
            // Their extensions are those of masks and the like in the whole data set.
            parts.extend(group.iter().map(Entry::extension).filter(|extension| extension.contains('.')));
        }
        let is_picture = |group: &[Entry], entry: &Entry| match group {
            // A mask whose picture is missing must not be trained on.
            [alone] => !parts.contains(&alone.extension()),
            several => picture_of(several).is_ok_and(|picture| picture.relative == entry.relative),
        };
        let kept: Vec<bool> =
            groups.iter().flat_map(|group| group.iter().map(move |entry| is_picture(group, entry))).collect();
        for (entry, kept) in pictures.into_iter().zip(kept) {
            match kept {
                true => self.pictures.push(entry),
                false => self.found.leave_out(OTHER_PARTS, entry.shown()),
            }
        }
        if !chosen.is_empty() {
            let names: Vec<String> = chosen.into_keys().collect();
            self.found.image_rule =
                format!("the picture of a sample in tar files is its {}", names.join(", "));
        }
        Ok(())
    }
}

/// Returns the picture among several files of one sample.
fn picture_of(group: &[Entry]) -> Result<&Entry, DataError> {
    let rank = |entry: &Entry| PICTURES.iter().position(|known| *known == entry.extension());
    group.iter().filter(|entry| rank(entry).is_some()).min_by_key(|entry| rank(entry)).ok_or_else(|| {
        let endings: Vec<String> = group.iter().map(Entry::extension).take(4).collect();
        input(
            &group[0].place.shown(),
            &format!(
                "is one of {} pictures of one sample, for in a tar file the files of a sample have the same name up \
                 to the first dot; set data.image_extension to one of: {}",
                group.len(),
                endings.join(", ")
            ),
        )
    })
}

/// Function of a file's path from the folder that is searched, and of where it lies; `None` for what is hidden.
pub(super) type Visit<'a> = dyn FnMut(Vec<u8>, Option<PathBuf>) -> Result<(), DataError> + 'a;

/// Calls `visit` with each file below a folder, in no order, and with all that is hidden there.
pub(super) fn walk(folder: &Path, visit: &mut Visit<'_>) -> Result<(), DataError> {
    walk_below(folder, &[], &mut Vec::new(), visit)
}

/// The same for a folder on the way. `ancestors` are those above it, without links.
fn walk_below(
    folder: &Path,
    relative: &[u8],
    ancestors: &mut Vec<PathBuf>,
    visit: &mut Visit<'_>,
) -> Result<(), DataError> {
    let failed = |error| DataError::reading(folder, error);
    let real = folder.canonicalize().map_err(failed)?;
    // By real paths: a link to a folder above would never end.
    if ancestors.contains(&real) {
        return Err(input(
            folder,
            "found a link to a folder that holds it, expected a tree; remove the link",
        ));
    }
    ancestors.push(real);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.as_encoded_bytes();
        let below = [relative, name].concat();
        if name.starts_with(b".") {
            visit(below, None)?;
        } else if path.is_dir() {
            walk_below(&path, &[&below, &b"/"[..]].concat(), ancestors, visit)?;
        } else {
            visit(below, Some(path))?;
        }
    }
    // Only folders on the way count: two links to one folder are no circle.
    ancestors.pop();
    Ok(())
}
