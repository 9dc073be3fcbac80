//! Samples that a job leaves out: `data.exclude`, the request, and `[[data.exclusion]]`, the record
//! of what was granted.
//!
//! 1. `data.exclude` in a new run leaves samples out from the start. Given to a run that has begun
//!    it requests a change, from the run's newest state on; the coordinator writes the change as a
//!    table `[[data.exclusion]]` into job.toml.
//! 2. Samples that a run has left out stay left out: a job that does not repeat them requests no change.
//! 3. A job with tables gives the same bits from scratch as the run that they were recorded in.

use std::path::Path;

use ganglion_proto::job::{Exclusion, Job};
use toml::de::{DeTable, DeValue};

use super::Difference;
use super::settings::Settings;

const WISH: &str = "data.exclude";
const RECORD: &str = "data.exclusion";
/// Example of one table, for messages.
const EXAMPLE: &str = "after_step = 7 and files = [\"cats/0001.jpg\"]";

/// Reads both keys. `data` is the data's path: a name may begin with it, as in messages about files.
pub(super) fn read(settings: &mut Settings, data: Option<&Path>) -> Vec<Exclusion> {
    let mut exclusions: Vec<Exclusion> = Vec::new();
    for (at, table) in settings.tables(RECORD, EXAMPLE).into_iter().enumerate() {
        match table_of(&table) {
            Ok(exclusion) => exclusions.push(exclusion),
            Err(problem) => settings.fault(RECORD, format!("table {}: {problem}", at + 1)),
        }
    }
    let places = exclusions.iter().map(|exclusion| (exclusion.after_step, exclusion.after_phase));
    if !places.is_sorted() {
        settings.fault(RECORD, "the tables are not in the order of after_step; sort them");
    }
    let named = |exclusions: &[Exclusion], name: &String| {
        exclusions.iter().any(|exclusion| exclusion.files.contains(name))
    };
    let mut files = names(settings, data);
    // The request may repeat what the tables record: the same command resumes the run (2).
    files.retain(|name| !named(&exclusions, name));
    // In front: it takes effect at step 0, and the tables are in order.
    if !files.is_empty() {
        exclusions.insert(0, Exclusion { after_step: 0, after_phase: 0, names: None, files });
    }
    exclusions
}

/// Names in the request, sorted, each once.
fn names(settings: &mut Settings, data: Option<&Path>) -> Vec<String> {
    let given = settings.texts(WISH, "[\"cats/0001.jpg\"]");
    let mut names = Vec::new();
    for name in given {
        match name.strip_prefix('@') {
            Some(file) => names.extend(listed(settings, file)),
            None => names.push(name),
        }
    }
    let folder = data.and_then(Path::to_str).map(|data| format!("{}/", data.trim_end_matches('/')));
    let relative = |name: &String| {
        let below = folder.as_ref().and_then(|folder| name.strip_prefix(folder.as_str()));
        below.unwrap_or(name).trim_start_matches("./").to_owned()
    };
    let mut names: Vec<String> = names.iter().map(relative).filter(|name| !name.is_empty()).collect();
    // Sorted, so that the order in which a user lists them makes no other job.
    names.sort();
    names.dedup();
    names
}

/// Names in a file, one a line, as `coordinator data check --bad FILE` writes them.
fn listed(settings: &mut Settings, file: &str) -> Vec<String> {
    let Some(path) = settings.absolute(WISH, file) else { return Vec::new() };
    match std::fs::read_to_string(&path) {
        Ok(text) => text.lines().map(str::to_owned).collect(),
        Err(error) => {
            let shown = path.display();
            settings.fault(WISH, format!("{shown}: {error}; after @ comes a file with a name a line"));
            Vec::new()
        }
    }
}

fn table_of(table: &DeTable<'_>) -> Result<Exclusion, String> {
    let mut exclusion = Exclusion { after_step: 0, after_phase: 0, names: None, files: Vec::new() };
    for (key, value) in table {
        match (&**key.get_ref(), value.get_ref()) {
            ("after_step", DeValue::Integer(number)) => {
                exclusion.after_step = whole(number.as_str(), super::sections::MAX_STEPS)?;
            }
            ("after_phase", DeValue::Integer(number)) => {
                exclusion.after_phase = whole(number.as_str(), 1 << 16)?
            }
            ("names", DeValue::String(text)) => exclusion.names = Some(text.to_string()),
            ("files", DeValue::Array(files)) if files.iter().all(|file| file.get_ref().is_str()) => {
                exclusion.files =
                    files.iter().filter_map(|file| file.get_ref().as_str().map(str::to_owned)).collect();
            }
            (key, _) => return Err(format!("\"{key}\" is unknown, or not of its type; write {EXAMPLE}")),
        }
    }
    match exclusion.files.is_empty() {
        true => Err(format!("names no file; write {EXAMPLE}")),
        false => Ok(exclusion),
    }
}

fn whole(number: &str, most: u64) -> Result<u64, String> {
    let value = number.parse().ok().filter(|value| *value <= most);
    value.ok_or_else(|| format!("must be from 0 to {most}, but is {number}"))
}

/// Names that `given` leaves out and the run does not yet.
///
/// # Errors
/// `given` has a table that the run does not have: it is another job.
pub fn asked(recorded: &Job, given: &Job) -> Result<Vec<String>, Difference> {
    let known = |exclusion: &&Exclusion| {
        recorded.data.exclusions.iter().any(|other| {
            (other.after_step, other.after_phase) == (exclusion.after_step, exclusion.after_phase)
                && exclusion.files.iter().all(|name| other.files.contains(name))
        })
    };
    let (wish, tables): (Vec<_>, Vec<_>) =
        given.data.exclusions.iter().partition(|exclusion| exclusion.is_from_the_start());
    if let Some(other) = tables.into_iter().find(|exclusion| !known(exclusion)) {
        let recorded: Vec<String> = recorded.data.exclusions.iter().map(Exclusion::to_string).collect();
        let recorded = if recorded.is_empty() { "none".to_owned() } else { recorded.join("; ") };
        return Err(Difference { key: RECORD.to_owned(), recorded, given: other.to_string() });
    }
    let left_out: Vec<&String> =
        recorded.data.exclusions.iter().flat_map(|exclusion| &exclusion.files).collect();
    let names = wish.into_iter().flat_map(|exclusion| &exclusion.files);
    Ok(names.filter(|name| !left_out.contains(name)).cloned().collect())
}

/// Checks the tables against the number of phases in a step.
pub(super) fn check(settings: &mut Settings, job: &Job, phases: u64) {
    if settings.sound(&[RECORD]) && job.data.exclusions.iter().any(|one| one.after_phase >= phases) {
        settings.fault(RECORD, format!("after_phase must be below {phases}, the phases of a step"));
    }
}
