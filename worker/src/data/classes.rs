//! Classes of a folder's pictures.
//!
//! The first of these rules that finds anything is the rule for all pictures:
//! 1. Lists. A `dataset.json` gives the classes of the pictures beside and below it, in an archive too:
//!    {"labels": [["NAME", CLASS], ...]}, with names from its place on. The nearest list that names a picture
//!    counts.
//! 2. Files beside the pictures with the same key: `0001.cls` with a whole number, or else `0001.json` with a
//!    whole number under `label`, `cls` or `class`.
//! 3. Folders, by their names in natural order (2 before 10), or in the order of their bytes in runs that
//!    began so: the first folder on the way to a picture. An archive's own name is none. Two kinds of folders
//!    do not count as long as all pictures in them lie in folders further below: one at the top of an archive
//!    with the archive's name, and one that holds all pictures.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use ganglion_proto::job::ClassOrder;
use ganglion_proto::printable_start;
use serde_json::Value;

use super::labels::{Labels, NAME_CHARACTERS};
use super::search::{Entry, JSON_NOTE, LABELS_FILE, NOTE, Search};
use super::{DataError, input, parallel};

/// Maximum length of a list of classes: some millions of files.
const LIST_LIMIT: u64 = 256 << 20;
/// Maximum length of a file with the class of one picture.
const NOTE_LIMIT: u64 = 1 << 20;
/// Keys of a JSON file that may hold the class.
const JSON_KEYS: [&str; 3] = ["label", "cls", "class"];

/// Finds the classes of all pictures. Files for classes that the rule does not use are counted as left out.
pub(super) fn of(root: &Path, search: &mut Search, order: ClassOrder) -> Result<Labels, DataError> {
    // A list is meant for this purpose only, so it comes first.
    if !search.lists.is_empty() {
        leave_out(search, |_| true);
        return by_list(root, search);
    }
    let is = |entry: &Entry, ending: &str| entry.relative.ends_with(format!(".{ending}").as_bytes());
    if search.notes.iter().any(|note| is(note, NOTE)) {
        leave_out(search, |note| !is(note, NOTE));
        return by_note(root, search, NOTE);
    }
    // The first picture decides: JSON files beside pictures often hold something else.
    if search.pictures.first().is_some_and(|picture| has_json_class(search, picture)) {
        return by_note(root, search, JSON_NOTE);
    }
    leave_out(search, |_| true);
    by_folder(root, &search.pictures, order)
}

/// Counts unused files for classes as left out.
pub(super) fn leave_out(search: &mut Search, unused: impl Fn(&Entry) -> bool) {
    let notes = std::mem::take(&mut search.notes);
    let (unused, used): (Vec<Entry>, Vec<Entry>) = notes.into_iter().partition(unused);
    search.notes = used;
    unused.iter().for_each(|note| search.leave_out(note));
}

/// Error of a picture that the rule gives no class.
fn without(entry: &Entry, why: &str) -> DataError {
    input(&entry.place.shown(), &format!("has no class, which model.conditional needs: {why}"))
}

// ---- Lists
// -------------------------------------------------------------------------------------------------------

/// Classes of files by their names relative to the list.
type List = HashMap<Vec<u8>, u32>;

fn by_list(root: &Path, search: &Search) -> Result<Labels, DataError> {
    let mut lists: HashMap<&[u8], (&Entry, List)> = HashMap::new();
    for list in &search.lists {
        let place = &list.relative[..list.relative.len() - LABELS_FILE.len()];
        lists.insert(place, (list, read_list(list)?));
    }
    let class = |entry: &Entry| {
        let mut nearest = None;
        let name = &entry.relative;
        // From the nearest folder up, so that a list below another one wins.
        let places = (0..name.len()).rev().filter(|at| *at == 0 || name[at - 1] == b'/');
        for place in places {
            let Some((list, classes)) = lists.get(&name[..place]) else { continue };
            let unpacked = match entry.archive {
                // The list lies outside of the archive, and may name its members as if they were
                // unpacked.
                Some((at, own)) if place + own <= at => [&name[place..at - own], &name[at..]].concat(),
                _ => name[place..].to_vec(),
            };
            if let Some(class) = classes.get(&name[place..]).or_else(|| classes.get(&unpacked)) {
                return Ok(*class);
            }
            nearest = nearest.or(Some(list));
        }
        Err(match nearest {
            Some(list) => input(
                &list.place.shown(),
                &format!("gives no class for {}; add it", entry.place.shown().display()),
            ),
            None => without(entry, &format!("others are in a {LABELS_FILE}, and there is none above it")),
        })
    };
    // The first error in the order of the names.
    let of: Result<Vec<u32>, DataError> = search.pictures.iter().map(class).collect();
    let origin = search.lists.first().map_or(root.to_path_buf(), |list| list.place.shown());
    Ok(Labels::new(of?, LABELS_FILE, origin.display().to_string()))
}

/// Reads {"labels": [["00000/img00000000.png", 5], ...]}.
fn read_list(list: &Entry) -> Result<List, DataError> {
    #[derive(serde::Deserialize)]
    struct Written {
        labels: Vec<(String, u32)>,
    }
    let parsed: Result<Written, _> = serde_json::from_slice(&list.place.read_small(LIST_LIMIT)?);
    let parsed = parsed.map_err(|error| {
        let wanted = "expected {\"labels\": [[\"FILE\", CLASS], ...]} with whole numbers for classes";
        input(&list.place.shown(), &format!("cannot be read: {error}; {wanted}"))
    })?;
    Ok(parsed.labels.into_iter().map(|(file, class)| (file.into_bytes(), class)).collect())
}

// ---- Files beside the pictures
// -----------------------------------------------------------------------------------

fn by_note(root: &Path, search: &Search, kind: &str) -> Result<Labels, DataError> {
    // Up to the first dot in a tar file, as WebDataset has it.
    let by_key: HashMap<&[u8], &Entry> = search.notes.iter().map(|note| (note.key(), note)).collect();
    let class = |entry: &Entry| {
        let note = by_key.get(entry.key());
        let note = note.ok_or_else(|| without(entry, &format!("others have a file *.{kind}")))?;
        read_note(note, kind)
    };
    let rule = if kind == NOTE { "files *.cls" } else { "files *.json" };
    Ok(Labels::new(parallel::map(&search.pictures, class)?, rule, root.display().to_string()))
}

fn read_note(note: &Entry, kind: &str) -> Result<u32, DataError> {
    let content = note.place.read_small(NOTE_LIMIT)?;
    if kind == JSON_NOTE {
        let expected = || {
            let wanted = format!("expected a whole number under {}", JSON_KEYS.join(", "));
            input(&note.place.shown(), &format!("holds no class, {wanted}"))
        };
        return json_class(&content).ok_or_else(expected);
    }
    let text = String::from_utf8_lossy(&content);
    let wrong = |_| {
        let found = printable_start(text.trim(), 40);
        input(&note.place.shown(), &format!("found {found:?}, expected a whole number"))
    };
    text.trim().parse().map_err(wrong)
}

fn json_class(content: &[u8]) -> Option<u32> {
    let value: Value = serde_json::from_slice(content).ok()?;
    // The first of these keys that is there, also if its value is no class: nothing is guessed.
    let class = JSON_KEYS.iter().find_map(|key| value.get(key))?;
    class.as_u64().and_then(|class| u32::try_from(class).ok())
}

/// Whether the JSON file beside a picture holds its class. Others hold captions, sizes and licences.
fn has_json_class(search: &Search, picture: &Entry) -> bool {
    let note = search.notes.iter().find(|note| note.key() == picture.key());
    note.and_then(|note| note.place.read_small(NOTE_LIMIT).ok())
        .is_some_and(|content| json_class(&content).is_some())
}

// ---- Folders
// -----------------------------------------------------------------------------------------------------

fn by_folder(root: &Path, pictures: &[Entry], order: ClassOrder) -> Result<Labels, DataError> {
    let wrapped = wrapping_archives(pictures);
    let place = |entry: &Entry| -> Vec<u8> {
        let mut place = entry.unpacked();
        if let Some((at, own)) = entry.archive
            && wrapped.contains(&entry.relative[..at])
        {
            let inner = at - own;
            let top = first(&place[inner..]).map_or(0, |top| top.len() + 1);
            place.drain(inner..inner + top);
        }
        place
    };
    let places: Vec<Vec<u8>> = pictures.iter().map(place).collect();
    // Folders that hold all pictures tell none of them apart.
    let above = shared(&places);
    let class = |(place, entry): (&Vec<u8>, &Entry)| {
        let folder = first(&place[above..]).map(<[u8]>::to_vec);
        folder.ok_or_else(|| {
            let archive = if entry.archive.is_some() { ", for which an archive does not count" } else { "" };
            let root = root.display();
            let why = format!(
                "it lies in no subfolder of {root}{archive}, and there is no {LABELS_FILE}; sort the images into one \
                 subfolder a class"
            );
            without(entry, &why)
        })
    };
    let folders: Result<Vec<Vec<u8>>, DataError> = places.iter().zip(pictures).map(class).collect();
    let folders = folders?;
    // Sorted, so that the numbers do not depend on the order of the pictures.
    let mut names: Vec<&Vec<u8>> = folders.iter().collect::<BTreeSet<_>>().into_iter().collect();
    if order == ClassOrder::Natural {
        names.sort_by_cached_key(|name| natural(name));
    }
    let numbers: HashMap<&Vec<u8>, u32> = names.iter().copied().zip(0..).collect();
    let number = |folder: &Vec<u8>| numbers[folder];
    let of = folders.iter().map(number).collect();
    let names =
        names.iter().map(|name| printable_start(&String::from_utf8_lossy(name), NAME_CHARACTERS)).collect();
    Ok(Labels::new(of, "folder", root.display().to_string()).named(names))
}

/// First byte, and length and digits of a number without leading zeros.
type NamePart<'a> = (u8, usize, &'a [u8]);

/// Key that orders names as people read them: a row of digits by its value, all else by its bytes. Names that
/// differ in leading zeros alone are ordered by their bytes.
fn natural(name: &[u8]) -> (Vec<NamePart<'_>>, &[u8]) {
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let parts = name.chunk_by(|one, other| is_digit(one) && is_digit(other)).map(|part| {
        // All digits are on one side of any other byte, so one of them stands for a number there.
        let (first, number) = if is_digit(&part[0]) { (b'0', part) } else { (part[0], &[][..]) };
        let zeros = number.iter().take_while(|digit| **digit == b'0').count();
        // Without leading zeros a longer number is a greater one.
        (first, number.len() - zeros, &number[zeros..])
    });
    (parts.collect(), name)
}

/// Returns the first folder on the way to a file, if it lies in one.
fn first(place: &[u8]) -> Option<&[u8]> {
    place.iter().position(|byte| *byte == b'/').map(|end| &place[..end])
}

/// Returns the folder that all files share, if below it all lie in further folders.
fn top<'a>(mut places: impl Iterator<Item = &'a [u8]>) -> Option<&'a [u8]> {
    // Only if every picture lies in a folder further below: otherwise this level has classes.
    let leads = |place: &'a [u8]| first(place).filter(|top| first(&place[top.len() + 1..]).is_some());
    let top = leads(places.next()?)?;
    places.all(|place| leads(place) == Some(top)).then_some(top)
}

/// Returns the archives, by their names with the slash, whose pictures all lie in folders of one folder
/// with the archive's name.
fn wrapping_archives(pictures: &[Entry]) -> BTreeSet<&[u8]> {
    let name = |entry: &Entry| entry.archive.map(|(at, _)| at);
    let mut found = BTreeSet::new();
    let same = |one: &Entry, other: &Entry| {
        name(one) == name(other) && name(one).is_some_and(|at| one.relative[..at] == other.relative[..at])
    };
    for pictures in pictures.chunk_by(same) {
        let Some((at, own)) = pictures[0].archive else { continue };
        let archive = &pictures[0].relative[..at];
        let own = &archive[at - own..];
        let stem = own.iter().rposition(|byte| *byte == b'.').map_or(own, |dot| &own[..dot]);
        if top(pictures.iter().map(|entry| &entry.relative[at..])).is_some_and(|top| top == stem) {
            found.insert(archive);
        }
    }
    found
}

/// Length in bytes of the folders that hold all pictures, with their slashes.
fn shared(places: &[Vec<u8>]) -> usize {
    let mut above = 0;
    while let Some(top) = top(places.iter().map(|place| &place[above..])) {
        above += top.len() + 1;
    }
    above
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_are_in_their_order() {
        let sorted = [
            "",
            "-",
            "0",
            "00",
            "1",
            "02",
            "2",
            "10",
            "11",
            "99999999999999999999999",
            "a",
            "a-",
            "a1",
            "a2",
            "a2b",
            "a10",
            "a10b2",
            "a10b10",
            "b",
            "b-1",
        ];
        assert!(sorted.is_sorted_by_key(|name| natural(name.as_bytes())));
        let keys: BTreeSet<_> = sorted.iter().map(|name| natural(name.as_bytes())).collect();
        assert_eq!(keys.len(), sorted.len(), "no two names are equal");
    }
}
