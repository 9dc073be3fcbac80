//! Opening of a run's records, with repair of damaged ones.
//!
//! A damaged diagnostic record never stops a run: it is set aside, and a file with its readable
//! lines takes its place. The journal records the loss before the file changes, and the audit
//! reports it.

use std::path::Path;
use std::sync::Arc;

use ganglion_proto::job::Job;
use ganglion_proto::record::{FORMAT, RunEvent};

use crate::control::records::Records;
use crate::error::Failure;
use crate::journal::Journal;
use crate::records::damage::{self, Damaged, SetAside};
use crate::records::disk::Disk;
use crate::records::progress::Screen;

/// Records that only the run's users read.
const RECORDS: [&str; 2] = ["metrics.jsonl", "events.jsonl"];

/// Opens the records of a run, and reports those that were set aside.
pub(crate) fn open_records(
    job: &Job,
    folder: &Path,
    screen: &Screen,
    disk: &Arc<dyn Disk>,
    journal: &mut Journal,
) -> Result<Records, Failure> {
    let mut aside = missing(job, folder, journal)?;
    let mut records = loop {
        match Records::open(job.clone(), folder, screen.clone(), disk) {
            Ok(records) => break records,
            // At most once per record: its replacement can be read.
            Err(Damaged::Lines(path)) if aside.len() < 2 * RECORDS.len() => {
                aside.push(set_aside(job, &path, journal)?);
            }
            // A full or failing disk: the same command may succeed later, so it is not called the user's
            // mistake.
            Err(error @ Damaged::Io(..)) if !error.is_mistake() => {
                return Err(Failure::Other(error.to_string()));
            }
            Err(error) => return Err(Failure::Input(error.to_string())),
        }
    };
    let format = records.chronicle.look().format;
    if format > FORMAT {
        // No decision depends on what is lacking, so the run goes on.
        records.message(&format!(
            "warning: a newer version wrote to {}: the format is {format}, and this version knows none above {FORMAT}; what \
             it does not know is not shown",
            RECORDS.join(" and ")
        ));
    }
    for found in aside {
        records.message(&format!("warning: {}", found.describe()));
        let SetAside { file, aside, kept, lost, steps } = found;
        records.event(&RunEvent::RecordSetAside { aside, file, kept, lost, steps });
    }
    Ok(records)
}

/// Records that do not exist although the journal knows a step of the run.
fn missing(job: &Job, folder: &Path, journal: &mut Journal) -> Result<Vec<SetAside>, Failure> {
    let step = reach(job, journal)?;
    let mut gone = Vec::new();
    for name in RECORDS.iter().filter(|name| step > 0 && !folder.join(name).exists()) {
        let found = SetAside::gone(name, step);
        // The journal first, here and below: a death in between leaves a loss that is told and did not
        // happen, and never one that happened and is not told.
        journal.set_aside(&found)?;
        gone.push(found);
    }
    Ok(gone)
}

fn set_aside(job: &Job, path: &Path, journal: &mut Journal) -> Result<SetAside, Failure> {
    let failed = |error: std::io::Error| {
        Failure::Other(format!(
            "{}: damaged, and it cannot be set aside: {error}; move it away: the same command then goes on",
            path.display()
        ))
    };
    // Rows behind the damage may have reached up to the newest step that the journal knows.
    let found = damage::examine(path, reach(job, journal)?).map_err(failed)?;
    journal.set_aside(&found)?;
    damage::set_aside(path, &found).map_err(failed)?;
    Ok(found)
}

/// Newest step that the journal knows to be done.
fn reach(job: &Job, journal: &Journal) -> Result<u64, Failure> {
    Ok(journal.newest_position()?.0 / job.phases_per_step())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job_file::{self, Source};
    use crate::records::disk::SystemDisk;
    use ganglion_membership::{Checkpoint, Position};
    use ganglion_proto::record::EventKind;

    /// A run with two rows and an event, whose journal knows step 40.
    fn run() -> (tempfile::TempDir, Job, Journal) {
        let folder = tempfile::tempdir().unwrap();
        let job = job_file::read(&Source::Embedded, &["job.steps=50".to_string()]).unwrap();
        let mut journal = Journal::open(&folder.path().join("journal.sqlite")).unwrap();
        let (position, state_digest) = (Position(40 * job.phases_per_step()), "d".to_string());
        let saved = Checkpoint { position, step: 40, phase: 0, files: Vec::new(), state_digest };
        journal.commit(&saved).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("metrics.jsonl", "{\"step\":10}\n{\"step\":20}\n");
        write("events.jsonl", "{\"time\":1.0,\"kind\":\"a\"}\n{\"time\":2.0,\"kind\":\"b\"}\n");
        (folder, job, journal)
    }

    fn open(folder: &Path, job: &Job, journal: &mut Journal) -> Records {
        let disk: Arc<dyn Disk> = Arc::new(SystemDisk);
        open_records(job, folder, &Screen::silent(), &disk, journal).unwrap()
    }

    /// Neither is damage.
    #[test]
    fn records_of_another_version_are_kept_as_they_are() {
        for started in [r#""term":1"#, r#""format":7,"term":1,"more":{}"#] {
            let (folder, job, mut journal) = run();
            let path = folder.path().join("events.jsonl");
            let text = format!("{{\"time\":1.0,\"kind\":\"coordinator_started\",{started}}}\n");
            std::fs::write(&path, &text).unwrap();
            let records = open(folder.path(), &job, &mut journal);
            let known = records.chronicle.look();
            assert_eq!(
                (known.format, known.count(EventKind::CoordinatorStarted)),
                (if text.contains('7') { 7 } else { 1 }, 1)
            );
            drop(known);
            drop(records);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            assert_eq!(journal.set_asides().unwrap(), []);
        }
    }

    #[test]
    fn a_damaged_record_is_set_aside_and_told_of() {
        for (name, kept) in [("metrics.jsonl", 1), ("events.jsonl", 1)] {
            let (folder, job, mut journal) = run();
            let path = folder.path().join(name);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[1..8].fill(0);
            std::fs::write(&path, &bytes).unwrap();
            let records = open(folder.path(), &job, &mut journal);
            assert_eq!(std::fs::read(folder.path().join(format!("{name}.damaged-1"))).unwrap(), bytes);
            let [found] = &journal.set_asides().unwrap()[..] else { panic!("one was set aside") };
            assert_eq!((found.file.as_str(), found.kept, found.lost), (name, kept, 1));
            assert_eq!(records.chronicle.look().count(EventKind::RecordSetAside), 1);
            drop(records);
            open(folder.path(), &job, &mut journal);
            assert_eq!(journal.set_asides().unwrap().len(), 1, "once");
        }
    }

    #[test]
    fn a_record_that_is_missing_is_told_of_and_a_new_runs_is_not() {
        let (folder, job, mut journal) = run();
        std::fs::remove_file(folder.path().join("metrics.jsonl")).unwrap();
        drop(open(folder.path(), &job, &mut journal));
        assert_eq!(journal.set_asides().unwrap(), [SetAside::gone("metrics.jsonl", 40)]);
        let (folder, job, _) = run();
        RECORDS.iter().for_each(|name| std::fs::remove_file(folder.path().join(name)).unwrap());
        let mut new = Journal::open(&folder.path().join("new.sqlite")).unwrap();
        drop(open(folder.path(), &job, &mut new));
        assert!(new.set_asides().unwrap().is_empty());
    }
}
